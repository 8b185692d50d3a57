//! Requests that cannot be answered for the moment: their buffers' memory is away, or the machine stands still.

use std::sync::atomic::Ordering;

use crate::RingSetup;
use crate::testing::*;

/// The heads that were answered since the last call, sorted.
fn heads(driver: &mut virtq::testing::Driver, bench: &Bench) -> Vec<u32> {
    let mut heads: Vec<u32> = driver.answers(&bench.guest).iter().map(|a| a.0).collect();
    heads.sort_unstable();
    heads
}

/// Taken between REM_MEM_REG and ADD_MEM_REG, parked before, read by the pool meanwhile: each is answered once.
#[test]
fn requests_wait_for_the_memory_of_their_buffers() {
    let (bench, mut driver, mut thread) = running(65_530);
    bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
    turn(&mut thread);
    bench.remove_places(&mut thread);
    bench.request(&mut driver, 1, 2, &get_attr(&bench), 0x1000);
    bench.blobs[1].store(0, 9);
    for _ in 0..3 {
        turn(&mut thread);
    }
    assert_eq!(driver.answers(&bench.guest), []);
    assert_eq!(bench.shared.log(1).parked(), 2);
    assert!(!thread.nobody_waits());
    bench.add_places(&mut thread);
    turn(&mut thread);
    assert_eq!(heads(&mut driver, &bench), [0, 2]);
    assert_eq!(bench.reply(1, 0), (116, 0));
    assert_eq!(bench.reply(1, 2), (120, 0));
    assert!(thread.nobody_waits());
    let errors = &bench.shared.thread(0).errors;
    assert_eq!(errors.load(Ordering::Relaxed), 0);
}

#[test]
fn a_ring_can_be_stopped_while_requests_wait_for_memory() {
    let bench = Bench::sample();
    let mut driver = bench.driver(1, SIZE, 0);
    let setup = ring(&driver, 1);
    let mut thread = bench.thread(vec![setup]);
    bench.remove_places(&mut thread);
    bench.request(&mut driver, 1, 0, &get_attr(&bench), 0x1000);
    turn(&mut thread);
    assert_eq!(bench.stop(&mut thread, 1).value, 1);
    bench.add_places(&mut thread);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), []);
    let again = RingSetup {
        base: 1,
        resume: true,
        ..setup
    };
    assert_eq!(bench.set_ring(&mut thread, &again).status, 0);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), [(0, 120)]);
}

/// Nothing can be told to somebody who waits for memory that does not come: the buffer goes back.
#[test]
fn memory_that_does_not_come_back_is_waited_for_until_the_deadline() {
    let (bench, mut driver, mut thread) = running(0);
    bench.remove_places(&mut thread);
    for head in [0, 2] {
        bench.request(&mut driver, 1, head, &get_attr(&bench), 0x1000);
    }
    turn(&mut thread);
    thread.queues[0].waiting[1].taken_ns = 0;
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), [(2, 0)]);
    let late = &bench.shared.thread(0).deadline_errors;
    assert_eq!(late.load(Ordering::Relaxed), 1);
    bench.add_places(&mut thread);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), [(0, 120)]);
}

/// A VMM that pauses with SET_VRING_ENABLE alone saves memory that must not change any more.
#[test]
fn a_paused_ring_gets_no_answers() {
    for by_pool in [false, true] {
        let bench = Bench::sample();
        let mut driver = bench.driver(1, SIZE, 0);
        let mut thread = bench.thread(vec![ring(&driver, 1)]);
        if by_pool {
            bench.blobs[1].store_in_file(0, 9);
        }
        bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
        turn(&mut thread);
        bench.enable(&mut thread, 1, false);
        if !by_pool {
            bench.blobs[1].store(0, 9);
        }
        let places = bench.guest.read(PLACES, 0x4000);
        while bench.pool_is_busy() {
            turn(&mut thread);
        }
        for _ in 0..3 {
            turn(&mut thread);
        }
        assert!(bench.guest.read(PLACES, 0x4000) == places);
        assert_eq!(driver.answers(&bench.guest), [], "by_pool {by_pool}");
        bench.enable(&mut thread, 1, true);
        while driver.used_index(&bench.guest) == 0 {
            turn(&mut thread);
        }
        assert_eq!(driver.answers(&bench.guest), [(0, 116)]);
        assert_eq!(bench.answer(1, 0, 100), [9; 100]);
    }
}

#[test]
fn a_pause_brings_no_deadline_nearer() {
    let (bench, mut driver, mut thread) = running(0);
    bench.request(&mut driver, 1, 0, &read_small(&bench), 0x1000);
    turn(&mut thread);
    bench.enable(&mut thread, 1, false);
    thread.server.parking.list[0].deadline_ns = 1;
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), []);
    bench.enable(&mut thread, 1, true);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), []);
    // Enabled once more, as some VMMs do without need: the clock goes on.
    thread.server.parking.list[0].deadline_ns = 1;
    bench.enable(&mut thread, 1, true);
    turn(&mut thread);
    assert_eq!(driver.answers(&bench.guest), [(0, 16)]);
    assert_eq!(bench.reply(1, 0), (16, libc::EIO));
}
