//! The pool's memory does not follow what a guest asks for.

use std::os::fd::{AsRawFd, IntoRawFd};

use super::*;

fn job(fd: RawFd, pieces: usize, len: u32) -> Job {
    let piece = Piece {
        fd,
        offset: 0,
        len,
        blob_index: 0,
        chunk_index: 0,
        stamp: 0,
        in_memory: false,
    };
    Job {
        thread: 0,
        ticket: Ticket {
            queue: 1,
            epoch: 1,
            head: 0,
        },
        pieces: vec![piece; pieces],
        taken_ns: 0,
        waited: false,
    }
}

fn pool() -> &'static Pool {
    Box::leak(Box::new(Pool::new(1)))
}

/// What has ended by now: taking it lets more begin.
fn take_all(pool: &Pool) -> Vec<Finished> {
    let ended = 0..pool.ended(0);
    ended.filter_map(|_| pool.take_finished(0)).collect()
}

/// Waits until every thread has found nothing that it may begin.
fn settle(pool: &Pool) {
    loop {
        let state = pool.lock();
        let next = state.jobs.front().map_or(0, |j| bytes_of(&j.pieces));
        let may_begin = next > 0 && (state.bytes == 0 || state.bytes + next <= MAX_BYTES);
        if state.idle == state.running && !may_begin {
            return;
        }
        drop(state);
        std::thread::yield_now();
    }
}

#[test]
fn reads_begin_while_there_is_memory_for_them() {
    const LEN: usize = 4 << 20;
    let (pool, fd) = (pool(), virtq::testing::memfd(LEN as u64).into_raw_fd());
    for _ in 0..10 {
        assert!(pool.submit(job(fd, 1, LEN as u32)));
    }
    let mut ended = Vec::new();
    while ended.iter().sum::<usize>() < 10 {
        settle(pool);
        let finished = take_all(pool);
        assert!(
            finished
                .iter()
                .all(|f| f.data.as_ref().is_ok_and(|d| d.len() == LEN))
        );
        ended.push(finished.len());
    }
    assert_eq!(ended, [4, 4, 2]);
    assert!(!pool.is_busy());
}

#[test]
fn a_read_that_is_larger_than_the_memory_is_the_only_one() {
    let len = MAX_BYTES as u64 + 1;
    let (pool, fd) = (pool(), virtq::testing::memfd(len).into_raw_fd());
    for _ in 0..2 {
        assert!(pool.submit(job(fd, 1, len as u32)));
    }
    for _ in 0..2 {
        settle(pool);
        assert_eq!(take_all(pool).len(), 1);
    }
}

#[test]
fn only_so_many_pieces_wait() {
    let (pool, fd) = (pool(), virtq::testing::memfd(1 << 25).into_raw_fd());
    // Nobody takes it back, so that what follows waits.
    assert!(pool.submit(job(fd, 1, MAX_BYTES as u32)));
    settle(pool);
    assert!(
        pool.submit(job(fd, MAX_PIECES + 1, 1)),
        "alone it may be larger"
    );
    assert!(!pool.submit(job(fd, 1, 1)));
    while pool.is_busy() {
        pool.take_finished(0);
    }
    assert!(pool.submit(job(fd, 1, 1)));
}

#[test]
fn a_file_that_ends_early_is_an_error() {
    let (pool, fd) = (pool(), virtq::testing::memfd(100).into_raw_fd());
    assert!(pool.submit(job(fd, 2, 60)));
    assert!(pool.submit(job(fd, 1, 101)));
    assert!(pool.submit(job(-1, 1, 1)));
    let mut ended = Vec::new();
    while ended.len() < 3 {
        ended.extend(pool.take_finished(0));
    }
    let errors: Vec<_> = ended.iter().filter_map(|f| f.data.as_ref().err()).collect();
    assert_eq!(errors.len(), 2);
    assert!(errors.contains(&&libc::EIO) && errors.contains(&&libc::EBADF));
}

#[test]
fn what_is_in_the_page_cache_and_what_is_not_come_both() {
    let path = std::env::temp_dir().join(format!("pool-{}", std::process::id()));
    let bytes: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    std::fs::write(&path, &bytes).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.sync_all().unwrap();
    // SAFETY: plain call on an open file.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 512 << 10, 0, libc::POSIX_FADV_DONTNEED) };
    let (pool, fd) = (pool(), file.into_raw_fd());
    let places: Vec<u64> = (0..16).map(|n| n * 65_521).collect();
    for (head, offset) in places.iter().enumerate() {
        let mut job = job(fd, 1, 4096);
        job.ticket.head = head as u16;
        job.pieces[0].offset = *offset;
        assert!(pool.submit(job));
    }
    let mut ended = Vec::new();
    while ended.len() < places.len() {
        ended.extend(pool.take_finished(0));
    }
    for finished in ended {
        let at = places[usize::from(finished.ticket.head)] as usize;
        assert_eq!(finished.data.unwrap(), bytes[at..at + 4096]);
    }
    assert!(!pool.is_busy());
}

#[test]
fn reads_that_need_no_disk_do_not_keep_one_waiting_that_does() {
    let pool = pool();
    let read = || job(-1, 1, 1);
    // No thread is started: what one would do next is asked for here.
    {
        let mut state = pool.lock();
        state.jobs.extend((0..3 * MAX_STREAK).map(|_| read()));
        state.pieces = 3 * MAX_STREAK;
        let data = vec![0];
        state.begun.push_back(Begun { job: read(), data });
    }
    let begins = (0..)
        .take_while(|_| matches!(pool.next_step(), Step::Begin(_)))
        .count();
    assert_eq!(begins, MAX_STREAK);
    // With nothing begun, the rest need not stop.
    for _ in MAX_STREAK..3 * MAX_STREAK {
        assert!(matches!(pool.next_step(), Step::Begin(_)));
    }
}
