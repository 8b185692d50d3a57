use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::*;

fn header(size: u32) -> Vec<u8> {
    [1u32, 1, size]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect()
}

#[test]
fn a_message_is_complete_when_all_of_it_is_there() {
    let (mut front, back) = UnixStream::pair().unwrap();
    let state = || message_state(back.as_raw_fd());
    assert_eq!(state(), MessageState::Partial);
    let message = [header(8), vec![7; 8]].concat();
    for byte in &message {
        assert_eq!(state(), MessageState::Partial);
        front.write_all(&[*byte]).unwrap();
    }
    assert_eq!(state(), MessageState::Complete);
    let mut read = [0; 20];
    (&back).read_exact(&mut read).unwrap();
    assert_eq!(read[..], message, "looking takes nothing");
    assert_eq!(state(), MessageState::Partial);
    front.write_all(&message).unwrap();
    drop(front);
    assert_eq!(state(), MessageState::Complete, "what was said last counts");
    (&back).read_exact(&mut read).unwrap();
    assert_eq!(state(), MessageState::Closed);
}

#[test]
fn an_oversized_message_is_for_the_message_layer_to_refuse() {
    for size in [4097, u32::MAX] {
        let (mut front, back) = UnixStream::pair().unwrap();
        front.write_all(&header(size)).unwrap();
        assert_eq!(message_state(back.as_raw_fd()), MessageState::Complete);
    }
    let (mut front, back) = UnixStream::pair().unwrap();
    front.write_all(&header(4096)).unwrap();
    assert_eq!(message_state(back.as_raw_fd()), MessageState::Partial);
}

#[test]
fn a_socket_that_nobody_reads_is_not_writable() {
    let (front, back) = UnixStream::pair().unwrap();
    assert!(is_writable(back.as_raw_fd()));
    back.set_nonblocking(true).unwrap();
    while (&back).write(&[0; 4096]).is_ok() {}
    assert!(!is_writable(back.as_raw_fd()));
    drop(front);
    assert!(is_writable(back.as_raw_fd()), "an error is not waited for");
}

#[test]
fn half_a_message_of_a_sender_that_has_gone_is_its_end() {
    for bytes in [header(8), header(8)[..5].to_vec()] {
        let (mut front, back) = UnixStream::pair().unwrap();
        front.write_all(&bytes).unwrap();
        assert_eq!(message_state(back.as_raw_fd()), MessageState::Partial);
        drop(front);
        assert_eq!(message_state(back.as_raw_fd()), MessageState::Closed);
    }
}
