use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::exchange::Framing;
use crate::testing::{FakeDevice, queue, reply};

fn options() -> Options {
    Options {
        root: 1,
        depth: 3,
        size: 512,
        duration: Duration::from_secs(60),
        count: 2,
        wait: Wait::Sleep,
        layout: Layout {
            framing: Framing::Linux,
            indirect: true,
        },
        stall: Duration::from_secs(10),
    }
}

fn entry(node: u64, offset: u64, kind: u32, name: &str) -> Vec<u8> {
    let mut b = node.to_le_bytes().to_vec();
    b.resize(fuse::ENTRY_OUT + 8, 0);
    b[MODE..MODE + 4].copy_from_slice(&(kind << 12).to_le_bytes());
    b.extend(offset.to_le_bytes());
    b.extend((name.len() as u32).to_le_bytes());
    b.extend(kind.to_le_bytes()); // DT_*: the type in a mode, shifted
    b.extend(name.as_bytes());
    b.resize(b.len().next_multiple_of(8), 0);
    b
}

fn word(request: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(request[at..at + 8].try_into().unwrap())
}

/// A root with two directories and a file, one entry per answer; both directories have a file each.
fn serve(request: &[u8], handles: bool) -> (i32, Vec<u8>) {
    let (opcode, node) = (word(request, 0) >> 32, word(request, 16));
    let (fh, offset) = (
        word(request, 40),
        request.get(48..56).map(|_| word(request, 48)),
    );
    match opcode as u32 {
        fuse::OPENDIR if handles => (0, [(node + 100).to_le_bytes(), [0; 8]].concat()),
        fuse::OPENDIR => (-libc::ENOSYS, Vec::new()),
        fuse::RELEASEDIR => {
            assert!(handles && fh == node + 100);
            (0, Vec::new())
        }
        _ => {
            assert_eq!(fh, if handles { node + 100 } else { 0 });
            let listing = match (node, offset) {
                (1, Some(0)) => [entry(1, 1, 4, "."), entry(2, 2, 4, "directory")].concat(),
                (1, Some(2)) => entry(3, 3, 4, "other"),
                (1, Some(3)) => entry(4, 4, 8, "file"),
                (2 | 3, Some(0)) => entry(5, 1, 8, "inside"),
                _ => Vec::new(),
            };
            (0, listing)
        }
    }
}

fn walked(serve: impl Fn(&[u8]) -> (i32, Vec<u8>) + Send) -> (Walked, Arc<Queue>) {
    let queue = queue(16);
    let stop = AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        let (device_queue, stop) = (queue.clone(), &stop);
        scope.spawn(move || {
            let mut device = FakeDevice::new(&device_queue);
            while !stop.load(Ordering::Relaxed) {
                let Some((head, descs, request)) = device.take() else {
                    std::thread::yield_now();
                    continue;
                };
                let (error, body) = serve(&request);
                let bytes = reply(word(&request, 8), error, &body);
                device.answer(head, &descs, &bytes, bytes.len() as u32);
            }
        });
        let result = run(&queue, &options(), &AtomicU64::new(0));
        stop.store(true, Ordering::Relaxed);
        result
    });
    (result.unwrap(), queue)
}

#[test]
fn every_directory_is_listed_to_its_end_and_closed() {
    let (walked, queue) = walked(|request| serve(request, true));
    assert_eq!(
        (walked.walks, walked.entries, walked.directories),
        (2, 10, 6)
    );
    let requests = &walked.outcome.ops[0];
    // Three of OPENDIR and RELEASEDIR; four listings of the root, two of either directory.
    assert_eq!(requests.latency.count(), 2 * 14);
    assert_eq!(
        (requests.errors, requests.wrong, walked.outcome.lost),
        (0, 0, 0)
    );
    assert_eq!(queue.faults.total(), 0);
}

#[test]
fn who_needs_no_handles_is_asked_once() {
    let (walked, _) = walked(|request| serve(request, false));
    assert_eq!(
        (walked.walks, walked.entries, walked.directories),
        (2, 10, 6)
    );
    // One OPENDIR at least; as many as were under way before the answer at most.
    let requests = &walked.outcome.ops[0];
    assert!((17..=19).contains(&requests.latency.count()));
    assert_eq!(requests.errors, 0);
}

#[test]
fn errors_and_broken_listings_are_counted_and_end_the_directory() {
    let (walked, _) = walked(|request| match (word(request, 0) >> 32) as u32 {
        fuse::READDIRPLUS if word(request, 16) == 2 => (-libc::EIO, Vec::new()),
        fuse::READDIRPLUS if word(request, 16) == 3 => {
            (0, entry(5, 1, 8, "inside")[..100].to_vec())
        }
        _ => serve(request, true),
    });
    let requests = &walked.outcome.ops[0];
    assert_eq!(
        (requests.errors, requests.first_errno, requests.wrong),
        (2, libc::EIO, 2)
    );
    assert_eq!(
        (walked.walks, walked.entries, walked.directories),
        (2, 6, 6)
    );
}
