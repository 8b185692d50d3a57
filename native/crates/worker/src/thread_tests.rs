//! A ring thread, step by step: what it must do when memory, rings and drivers do what they may.

use std::sync::atomic::{AtomicBool, Ordering};

use fuse_abi::opcode;
use session::inflight::CRASH_LIMIT;

use super::*;
use crate::RingSetup;
use crate::channel::{Command, Op};
use crate::testing::*;

#[test]
fn a_read_waits_for_its_chunk() {
    let (bench, mut driver, mut thread) = running(65_535);
    bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), []);
    assert_eq!(bench.shared.log(1).parked(), 1);
    let post = bench.shared.thread(0).posts.pop().expect("a post");
    assert_eq!((post.blob_index, post.chunk_index), (1, 0));
    bench.blobs[1].store(0, 9);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), [(0, 116)]);
    assert_eq!(bench.reply(1, 0), (116, 0));
    assert_eq!(bench.answer(1, 0, 101), [vec![9; 100], vec![0]].concat());
    assert_eq!(bench.shared.log(1).in_flight(), 0);
    assert_eq!(bench.shared.log(1).next_avail(), driver.offered);
}

/// SET_MEM_TABLE, or a region that is removed and added: the ring's memory is away while a chunk comes.
#[test]
fn nothing_is_lost_while_memory_is_away() {
    let (bench, mut driver, mut thread) = running(0);
    bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
    turn(&mut thread);
    bench.remove_memory(&mut thread);
    bench.blobs[1].store(0, 9);
    bench.request(&mut driver, 1, 2, &get_attr(&bench), 0x1000);
    for _ in 0..3 {
        turn(&mut thread);
    }
    assert_eq!(driver.answers(&bench.guest), []);
    bench.add_memory(&mut thread);
    turn(&mut thread);
    let mut heads: Vec<u32> = driver.answers(&bench.guest).iter().map(|a| a.0).collect();
    heads.sort_unstable();
    assert_eq!(heads, [0, 2]);
    assert_eq!(bench.reply(1, 0), (116, 0));
    assert_eq!(bench.reply(1, 2), (120, 0));
}

#[test]
fn what_the_pool_has_read_is_served_once_memory_is_back() {
    let bench = Bench::sample();
    bench.blobs[1].store_in_file(0, 9);
    let mut driver = bench.driver(1, SIZE, 0);
    let mut thread = bench.thread(vec![ring(&driver, 1)]);
    bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
    turn(&mut thread);
    bench.remove_memory(&mut thread);
    let served = |thread: &RingThread| thread.queues[0].backlog.len();
    while served(&thread) == 0 {
        turn(&mut thread);
    }
    bench.add_memory(&mut thread);
    while driver.used_index(&bench.guest) == 0 {
        turn(&mut thread);
    }
    assert_eq!(driver.answers(&bench.guest), [(0, 116)]);
    assert_eq!(bench.answer(1, 0, 101), [vec![9; 100], vec![0]].concat());
    assert_eq!(bench.shared.log(1).in_flight(), 0);
}

/// A read of two chunks that come one after the other, in a cache that has room for one.
#[test]
fn a_chunk_that_came_and_went_is_asked_for_again() {
    let (bench, mut driver, mut thread) = running(0);
    let posts = &bench.shared.thread(0).posts;
    let asked = || std::iter::from_fn(|| posts.pop().map(|p| p.chunk_index)).collect::<Vec<_>>();
    let read = message(opcode::READ, node(bench.mount, b"big"), &read_args(0, 8192));
    bench.request(&mut driver, 1, 0, &read, 0x2000 + 16);
    turn(&mut thread);
    assert_eq!(asked(), [0, 1]);
    bench.blobs[0].store(1, 7);
    turn(&mut thread);
    bench.blobs[0].discard(1);
    bench.blobs[0].store(0, 9);
    turn(&mut thread);
    assert_eq!(asked(), [1]);
    bench.blobs[0].store(1, 7);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), [(0, 8192 + 16)]);
}

/// Nor does what the pool has read keep commands and hiprio waiting.
#[test]
fn what_the_pool_has_read_is_served_in_rounds() {
    let (bench, mut driver, mut thread) = running(0);
    bench.blobs[1].store_in_file(0, 9);
    for head in (0..SIZE).step_by(2) {
        bench.request(&mut driver, 1, head, &read_small(&bench), 0x1000);
    }
    while thread.round() {}
    while bench.pool_has_ended() < usize::from(SIZE / 2) {
        std::thread::yield_now();
    }
    for more in [true, true, false] {
        assert_eq!(thread.finish_pool(), more);
        let n = driver.answers(&bench.guest).len();
        assert_eq!(n, if more { ROUND_HEADS } else { 0 });
    }
    assert!(!bench.pool_is_busy());
}

#[test]
fn chunks_are_touched_by_the_reads_that_they_answer() {
    let (bench, mut driver, mut thread) = running(0);
    // A read that waits has not been answered.
    bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
    turn(&mut thread);
    assert_eq!(bench.blobs[1].touched(), [0]);
    for by_pool in [false, true] {
        bench.blobs[1].clear_touched();
        if by_pool {
            bench.blobs[1].discard(0);
            bench.blobs[1].store_in_file(0, 9);
            bench.request(&mut driver, 1, 2, &read_small(&bench), 0x1000);
        } else {
            bench.blobs[1].store(0, 9);
        }
        let answered = driver.used_index(&bench.guest);
        while driver.used_index(&bench.guest) == answered {
            turn(&mut thread);
        }
        assert_eq!(bench.blobs[1].touched(), [1], "by_pool {by_pool}");
        assert_eq!(bench.blobs[0].touched(), [0; 3]);
    }
}

#[test]
fn what_the_pool_has_read_for_a_stopped_ring_is_dropped() {
    let bench = Bench::sample();
    bench.blobs[1].store_in_file(0, 9);
    let mut driver = bench.driver(1, SIZE, 0);
    let mut thread = bench.thread(vec![ring(&driver, 1)]);
    bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
    turn(&mut thread);
    assert_eq!(bench.stop(&mut thread, 1).value, 1);
    let setup = RingSetup {
        resume: true,
        ..ring(&driver, 1)
    };
    // Both reads end, in any order; only that of the ring that goes on counts.
    assert_eq!(bench.set_ring(&mut thread, &setup).status, 0);
    while driver.used_index(&bench.guest) == 0 {
        turn(&mut thread);
    }
    while bench.pool_is_busy() {
        turn(&mut thread);
    }
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), [(0, 116)]);
}

/// A new worker may know a ring before it knows the memory behind it.
#[test]
fn what_was_outstanding_is_served_once_memory_comes() {
    let bench = Bench::sample();
    let mut driver = bench.driver(1, SIZE, 65_534);
    let setup = ring(&driver, 1);
    let mut thread = bench.thread(vec![setup]);
    for head in [4, 0, 8] {
        bench.request(&mut driver, 1, head, &read_small(&bench), 0x1000);
    }
    turn(&mut thread);
    assert_eq!(bench.shared.log(1).parked(), 3);
    drop(thread);
    bench.blobs[1].store(0, 9);
    let mut thread = bench.thread_with(
        vec![RingSetup {
            resume: true,
            ..setup
        }],
        false,
    );
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), []);
    bench.add_memory(&mut thread);
    turn(&mut thread);
    let heads: Vec<u32> = driver.answers(&bench.guest).iter().map(|a| a.0).collect();
    assert_eq!(heads, [4, 0, 8], "in the order in which they were taken");
}

#[test]
fn a_ring_that_is_stopped_before_its_memory_came_keeps_its_base() {
    let bench = Bench::sample();
    let driver = bench.driver(1, SIZE, 77);
    let mut thread = bench.thread_with(vec![ring(&driver, 1)], false);
    turn(&mut thread);
    let answer = bench.stop(&mut thread, 1);
    assert_eq!((answer.status, answer.value), (0, 77));
}

/// The log of a driver that has gone must not be gone on from, even when the first worker of its successor dies early.
#[test]
fn a_disowned_log_is_not_gone_on_from() {
    let bench = Bench::sample();
    let mut old = bench.driver(1, SIZE, 0);
    let mut thread = bench.thread(vec![ring(&old, 1)]);
    bench.request(&mut old, 1, 0, &read_small(&bench), 0x1000);
    turn(&mut thread);
    drop(thread);
    bench.blobs[1].store(0, 9);
    bench.shared.log(1).disown();
    let mut new = bench.driver(1, SIZE, 0);
    let mut thread = bench.thread(vec![RingSetup {
        resume: true,
        ..ring(&new, 1)
    }]);
    turn(&mut thread);
    assert_eq!(new.answers(&bench.guest), []);
    bench.request(&mut new, 1, 2, &get_attr(&bench), 0x1000);
    turn(&mut thread);
    assert_eq!(new.answers(&bench.guest), [(2, 120)]);
}

#[test]
fn stop_and_go_on() {
    let (bench, mut driver, mut thread) = running(65_535);
    bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
    turn(&mut thread);
    let answer = bench.stop(&mut thread, 1);
    assert_eq!((answer.status, answer.value), (0, 0));
    bench.blobs[1].store(0, 9);
    turn(&mut thread);
    assert_eq!(
        driver.answers(&bench.guest),
        [],
        "a stopped ring is written to"
    );
    let resumed_ns = now_ns();
    bench.blobs[1].discard(0);
    let setup = RingSetup {
        base: 0,
        resume: true,
        ..ring(&driver, 1)
    };
    assert_eq!(bench.set_ring(&mut thread, &setup).status, 0);
    turn(&mut thread);
    let waits = thread.server.parking.list[0];
    assert!(
        waits.taken_ns >= resumed_ns,
        "the time of the stop counts against the deadline"
    );
    bench.blobs[1].store(0, 9);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), [(0, 116)]);
}

#[test]
fn a_disabled_ring_is_left_alone() {
    let bench = Bench::sample();
    bench.blobs[1].store(0, 9);
    for event_idx in [false, true] {
        let mut driver = bench.driver(1, SIZE, 0);
        let mut thread = bench.thread(vec![RingSetup {
            enabled: false,
            event_idx,
            ..ring(&driver, 1)
        }]);
        bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
        let before = bench.guest.read(driver.used_gpa(), 4096);
        turn(&mut thread);
        assert!(bench.guest.read(driver.used_gpa(), 4096) == before);
        let enable = Command::new(Op::Enable, 1).with([1, 0, 0, 0]);
        bench.tell(&mut thread, &enable, &[]);
        turn(&mut thread);
        assert_eq!(driver.answers(&bench.guest), [(0, 116)]);
    }
}

/// One queue that is always full must not keep the others from being served.
#[test]
fn every_queue_has_its_turn() {
    let bench = Bench::sample();
    let mut drivers: Vec<_> = (0..3).map(|q| bench.driver(q, SIZE, 0)).collect();
    let mut thread = bench.thread((0..3).map(|q| ring(&drivers[q], q)).collect());
    for (queue, driver) in drivers.iter_mut().enumerate() {
        for head in (0..SIZE).step_by(2) {
            bench.request(driver, queue as u64, head, &get_attr(&bench), 0x1000);
        }
    }
    assert!(thread.round(), "there is more");
    for driver in &mut drivers {
        assert_eq!(driver.answers(&bench.guest).len(), ROUND_HEADS);
    }
    assert!(thread.round() && !thread.round());
    for driver in &mut drivers {
        assert_eq!(driver.answers(&bench.guest).len(), ROUND_HEADS);
    }
}

/// A driver that offers the next request as soon as one is answered must not keep the thread from its commands.
#[test]
fn a_round_ends_whatever_the_driver_does() {
    let bench = Bench::sample();
    let mut driver = bench.driver(1, 2, 0);
    let mut thread = bench.thread(vec![ring(&driver, 1)]);
    bench.request(&mut driver, 1, 0, &get_attr(&bench), 0x1000);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let guest = &bench.guest;
        let offering = scope.spawn(|| {
            let mut offered = 1;
            while !ended.load(Ordering::Relaxed) && offered < 10_000 {
                if driver.used_index(guest) == driver.offered {
                    driver.offer(guest, 0);
                    offered += 1;
                }
            }
            offered
        });
        thread.round();
        ended.store(true, Ordering::Relaxed);
        let offered = offering.join().unwrap();
        assert!(
            offered <= 2 * ROUND_HEADS,
            "{offered} requests in one round"
        );
    });
}

/// What one chunk frees is served in rounds too: a command in between is answered at once.
#[test]
fn what_one_chunk_frees_is_served_in_rounds() {
    let (bench, mut driver, mut thread) = running(0);
    for head in (0..SIZE).step_by(2) {
        bench.request(&mut driver, 1, head, &read_small(&bench), 0x1000);
    }
    while thread.round() {}
    assert_eq!(bench.shared.log(1).parked(), SIZE / 2);
    bench.blobs[1].store(0, 9);
    assert!(thread.unpark(), "there is more");
    let heads: Vec<u32> = driver.answers(&bench.guest).iter().map(|a| a.0).collect();
    let want: Vec<u32> = (0..ROUND_HEADS as u32).map(|n| 2 * n).collect();
    assert_eq!(heads, want, "the oldest first");
    thread.unpark();
    assert!(!thread.unpark());
    assert_eq!(driver.answers(&bench.guest).len(), ROUND_HEADS);
    assert_eq!(bench.shared.log(1).in_flight(), 0);
}

/// SET_VRING_KICK after a stop is answered at once, however much is outstanding.
#[test]
fn a_backlog_is_served_in_rounds() {
    let bench = Bench::sample();
    bench.blobs[1].store(0, 9);
    let mut driver = bench.driver(1, SIZE, 0);
    let setup = ring(&driver, 1);
    bench.shared.log(1).reset(SIZE, 0, 0);
    for head in (0..SIZE).step_by(2) {
        bench.request(&mut driver, 1, head, &read_small(&bench), 0x1000);
        assert!(bench.shared.log(1).log(head, 5));
    }
    let mut thread = bench.thread(Vec::new());
    let resumed = RingSetup {
        resume: true,
        ..setup
    };
    assert_eq!(bench.set_ring(&mut thread, &resumed).status, 0);
    assert_eq!(driver.answers(&bench.guest), []);
    assert!(thread.round());
    assert_eq!(driver.answers(&bench.guest).len(), ROUND_HEADS);
    while thread.round() {}
    assert_eq!(driver.answers(&bench.guest).len(), ROUND_HEADS);
    assert_eq!(bench.shared.log(1).next_avail(), driver.offered);
}

#[test]
fn a_poisonous_request_fails_alone() {
    let bench = Bench::sample();
    bench.blobs[1].store(0, 9);
    let mut driver = bench.driver(1, SIZE, 0);
    let setup = ring(&driver, 1);
    let log = bench.shared.log(1);
    log.reset(SIZE, 0, 0);
    for head in [0, 2] {
        bench.request(&mut driver, 1, head, &read_small(&bench), 0x1000);
        assert!(log.log(head, 5));
    }
    for _ in 0..CRASH_LIMIT {
        log.set_phase(0, session::inflight::PHASE_SERVING);
        log.count_crash();
    }
    let mut thread = bench.thread(vec![RingSetup {
        resume: true,
        ..setup
    }]);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), [(0, 16), (2, 116)]);
    assert_eq!(bench.reply(1, 0), (16, libc::EIO));
}

#[test]
fn a_deadline_is_an_error_for_that_request() {
    let (bench, mut driver, mut thread) = running(0);
    bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
    turn(&mut thread);
    thread.server.parking.list[0].deadline_ns = 1;
    bench.request(&mut driver, 1, 2, &read_small(&bench), 0x1000);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), [(0, 16)]);
    assert_eq!(bench.reply(1, 0), (16, libc::EIO));
    assert_eq!(bench.shared.log(1).parked(), 1);
    bench.blobs[1].store(0, 9);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), [(2, 116)]);
}

#[test]
fn rings_that_make_no_sense_rest_until_they_are_set_up_anew() {
    let bench = Bench::sample();
    type Damage = fn(&Bench, &mut virtq::testing::Driver);
    let twice: Damage = |bench, driver| {
        driver.offer(&bench.guest, 0);
        driver.offer(&bench.guest, 0);
    };
    let outside: Damage = |bench, driver| driver.offer(&bench.guest, SIZE);
    let ahead: Damage = |bench, driver| driver.set_avail(&bench.guest, SIZE + 2);
    for damage in [twice, outside, ahead] {
        let mut driver = bench.driver(1, SIZE, 0);
        let mut thread = bench.thread(vec![ring(&driver, 1)]);
        bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
        turn(&mut thread);
        damage(&bench, &mut driver);
        for _ in 0..3 {
            turn(&mut thread);
        }
        assert_eq!(driver.answers(&bench.guest), []);
        assert_eq!(bench.shared.queue(1).broken.load(Ordering::Relaxed), 1);
        let mut driver = bench.driver(1, SIZE, 0);
        assert_eq!(bench.set_ring(&mut thread, &ring(&driver, 1)).status, 0);
        bench.request(&mut driver, 1, 2, &get_attr(&bench), 0x1000);
        turn(&mut thread);
        assert_eq!(driver.answers(&bench.guest), [(2, 120)]);
    }
}

#[test]
fn reads_that_ignore_what_init_granted_are_refused() {
    let bench = Bench::sample();
    bench.blobs[1].store(0, 9);
    let mut driver = bench.driver(1, SIZE, 0);
    let mut thread = bench.thread(vec![ring(&driver, 1)]);
    let small = node(bench.mount, b"small");
    for (head, size, errno) in [
        (0, crate::read::MAX_READ, 0),
        (2, crate::read::MAX_READ + 1, libc::EINVAL),
        (4, u32::MAX, libc::EINVAL),
    ] {
        let read = message(opcode::READ, small, &read_args(0, size));
        bench.request(&mut driver, 1, head, &read, 0x1000);
        turn(&mut thread);
        assert_eq!(bench.reply(1, head).1, errno);
    }
}

/// A ring without a kick fd is to be polled.
#[test]
fn a_ring_without_a_kick_is_looked_at() {
    let bench = Bench::sample();
    let mut driver = bench.driver(1, SIZE, 5);
    let setup = ring(&driver, 1);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| bench.thread(vec![setup]).run());
        while driver.avail_event(&bench.guest) != driver.offered {
            std::thread::yield_now();
        }
        bench.request(&mut driver, 1, 0, &get_attr(&bench), 0x1000);
        while driver.used_index(&bench.guest) != driver.offered {
            std::thread::yield_now();
        }
        // SAFETY: plain system call: the keeper hangs up.
        unsafe {
            libc::shutdown(
                std::os::fd::AsRawFd::as_raw_fd(&bench.keeper),
                libc::SHUT_RDWR,
            )
        };
        running.join().unwrap().unwrap();
    });
}
