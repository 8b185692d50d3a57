use std::os::fd::AsFd;

use super::*;

fn fd() -> OwnedFd {
    std::io::stderr().as_fd().try_clone_to_owned().unwrap()
}

fn begin(blobs: u32) -> ControlMessage {
    ControlMessage::Begin {
        blobs,
        bootstrap: fd(),
        spill: fd(),
    }
}

fn blob(index: u32) -> ControlMessage {
    ControlMessage::Blob {
        index,
        state: fd(),
        extents: fd(),
        touched: fd(),
        data: None,
    }
}

#[test]
fn a_mount_is_there_with_its_last_message() {
    let mut table = MountTable::default();
    for message in [begin(2), blob(0), blob(1)] {
        assert!(!table.message(message).unwrap());
        assert!(table.current.is_none());
    }
    assert!(table.message(ControlMessage::Commit).unwrap());
    assert_eq!(table.current.as_ref().unwrap().fds().blobs.len(), 2);
    // Half of another one changes nothing.
    assert!(!table.message(begin(1)).unwrap());
    assert_eq!(table.current.as_ref().unwrap().fds().blobs.len(), 2);
    assert!(!table.message(begin(0)).unwrap());
    assert!(table.message(ControlMessage::Commit).unwrap());
    assert_eq!(table.current.as_ref().unwrap().fds().blobs.len(), 0);
}

#[test]
fn messages_in_a_wrong_order_are_refused() {
    let wrong: [Vec<ControlMessage>; 8] = [
        vec![blob(0)],
        vec![ControlMessage::Commit],
        vec![begin(256)],
        vec![begin(u32::MAX)],
        vec![begin(1), blob(1)],
        vec![begin(1), blob(u32::MAX)],
        vec![begin(1), blob(0), blob(1)],
        vec![begin(2), blob(0), ControlMessage::Commit],
    ];
    for (n, messages) in wrong.into_iter().enumerate() {
        let mut table = MountTable::default();
        let mut results: Vec<_> = messages.into_iter().map(|m| table.message(m)).collect();
        assert!(results.pop().unwrap().is_err(), "case {n}");
        assert!(results.iter().all(|r| matches!(r, Ok(false))), "case {n}");
        assert!(table.current.is_none());
        // It is no obstacle for a right one.
        for message in [begin(1), blob(0)] {
            table.message(message).unwrap();
        }
        assert!(table.message(ControlMessage::Commit).unwrap());
    }
}

fn packet(words: [u32; 4]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[test]
fn malformed_packets_are_refused() {
    let (ours, theirs) = worker::channel::pair().unwrap();
    let send = |bytes: &[u8], fds: usize| {
        let fds = vec![2; fds];
        worker::channel::send_packet(theirs.as_raw_fd(), bytes, &fds).unwrap();
        receive(ours.as_raw_fd())
    };
    assert!(matches!(receive(ours.as_raw_fd()), Ok(None)));
    for (words, fds) in [
        ([1, 0, 1, 0], 0),
        ([1, 0, 1, 0], 1),
        ([2, 0, 0, 0], 1),
        ([2, 0, 0, 0], 2),
        ([0, 0, 0, 0], 2),
        ([5, 0, 0, 0], 0),
        ([u32::MAX; 4], 4),
    ] {
        assert!(send(&packet(words), fds).is_err(), "{words:?}");
    }
    assert!(send(&packet([3, 0, 0, 0])[..15], 0).is_err());
    assert!(matches!(
        send(&packet([1, 0, 7, 0]), 2),
        Ok(Some(ControlMessage::Begin { blobs: 7, .. }))
    ));
    assert!(matches!(
        send(&packet([2, 0, 3, 0]), 4),
        Ok(Some(ControlMessage::Blob {
            index: 3,
            data: Some(_),
            ..
        }))
    ));
    assert!(matches!(
        send(&packet([4, 70, 0, 0]), 0),
        Ok(Some(ControlMessage::Fatal(70)))
    ));
    drop(theirs);
    let end = receive(ours.as_raw_fd()).err().map(|e| e.kind());
    assert_eq!(end, Some(io::ErrorKind::UnexpectedEof));
}
