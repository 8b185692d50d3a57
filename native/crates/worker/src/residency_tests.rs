//! A memfd stands for a file: its holes are pages that the cache lacks.

use std::fs::File;
use std::os::fd::AsRawFd;

use super::*;

const PAGE: u64 = 64 << 10;

fn piece(fd: &File, page: u64) -> Piece {
    Piece {
        fd: fd.as_raw_fd(),
        offset: page * PAGE,
        len: PAGE as u32,
        blob_index: 0,
        chunk_index: 0,
        stamp: 0,
        in_memory: false,
    }
}

/// Two pages, the first of which is there.
fn half() -> File {
    let fd = virtq::testing::memfd(2 * PAGE);
    let data = vec![1u8; PAGE as usize];
    // SAFETY: writes from our buffer.
    let n = unsafe { libc::pwrite(fd.as_raw_fd(), data.as_ptr().cast(), data.len(), 0) };
    assert_eq!(n as u64, PAGE);
    fd
}

/// Linux before 6.5 does not tell.
fn tells(fd: &File) -> bool {
    cached_pages(&piece(fd, 0), PAGE).is_some()
}

#[test]
fn nobody_is_asked_before_a_miss() {
    let fd = half();
    let mut residency = Residency::default();
    assert!(!residency.is_absent(&piece(&fd, 1), PAGE));
}

#[test]
fn after_a_miss_the_kernel_tells_for_each_range() {
    let fd = half();
    let mut residency = Residency::default();
    residency.missed(&piece(&fd, 1));
    for _ in 0..3 {
        assert_eq!(residency.is_absent(&piece(&fd, 1), PAGE), tells(&fd));
        assert!(!residency.is_absent(&piece(&fd, 0), PAGE));
    }
    assert_eq!(residency.is_absent(&piece(&fd, 0), PAGE + 1), tells(&fd));
}

#[test]
fn a_chunk_that_is_warm_again_is_not_asked_about_for_ever() {
    let fd = half();
    let mut residency = Residency::default();
    residency.missed(&piece(&fd, 0));
    for _ in 0..ASKED {
        assert!(!residency.is_absent(&piece(&fd, 0), PAGE));
    }
    assert!(!residency.is_absent(&piece(&fd, 1), PAGE));
}

#[test]
fn other_chunks_are_not_asked_about() {
    let fd = half();
    let mut residency = Residency::default();
    residency.missed(&piece(&fd, 1));
    for (blob_index, chunk_index) in [(0, 1), (1, 0), (255, 7)] {
        let other = Piece {
            blob_index,
            chunk_index,
            ..piece(&fd, 1)
        };
        assert!(!residency.is_absent(&other, PAGE));
    }
}

#[test]
fn a_kernel_that_does_not_tell_is_asked_once() {
    let fd = half();
    let mut residency = Residency::default();
    let unknown = Piece {
        fd: -1,
        ..piece(&fd, 1)
    };
    residency.missed(&unknown);
    assert!(!residency.is_absent(&unknown, PAGE));
    residency.missed(&piece(&fd, 1));
    assert!(!residency.is_absent(&piece(&fd, 1), PAGE));
}
