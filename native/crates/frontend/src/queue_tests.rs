use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::Connection;
use crate::error::Error;
use crate::fault::FaultKind;
use crate::fuse::{self, GETATTR};
use crate::queue::Queue;
use crate::ring::Desc;
use crate::sys;
use crate::testing::{FakeDevice, queue};

const LONG: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(20);

fn submit(queue: &Queue, unique: u64) -> u64 {
    let mut request = fuse::in_header(56, GETATTR, unique, 1).to_vec();
    request.extend([0; 16]);
    queue
        .submit(request, 116, queue.options.layout, None, LONG)
        .unwrap()
}

#[test]
fn requests_complete_in_any_order() {
    let queue = queue(16);
    let mut device = FakeDevice::new(&queue);
    let tokens: Vec<u64> = (0..10).map(|i| submit(&queue, 100 + i)).collect();
    let mut taken: Vec<_> = (0..10).map(|_| device.expect()).collect();
    assert!(matches!(queue.wait(tokens[3], SHORT), Err(Error::Timeout)));
    taken.reverse();
    for (i, (head, descs, request)) in taken.iter().enumerate() {
        device.reply(*head, descs, request, &[i as u8; 100]);
    }
    for (i, token) in tokens.iter().enumerate() {
        let (used, header, _) = queue.wait(*token, LONG).unwrap();
        assert_eq!((used, header.unwrap().unique), (116, 100 + i as u64));
        let mut data = [0u8; 100];
        queue.take(*token, &mut data).unwrap();
        assert_eq!(data, [9 - i as u8; 100]);
        assert!(queue.take(*token, &mut data).is_err());
    }
    queue.check();
    assert_eq!(queue.faults.texts(false), Vec::<String>::new());
}

#[test]
fn several_threads_wait_on_one_queue() {
    let queue = queue(64);
    let mut device = FakeDevice::new(&queue);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let queue = &queue;
            scope.spawn(move || {
                for i in 0..50 {
                    let token = submit(queue, 1000 * thread + i);
                    let (_, header, _) = queue.wait(token, LONG).unwrap();
                    assert_eq!(header.unwrap().unique, 1000 * thread + i);
                    queue.take(token, &mut []).unwrap();
                }
            });
        }
        // Two at a time and the later one first, as long as there are two.
        let mut left = 200;
        while left > 0 {
            let first = device.expect();
            let second = device.take();
            for (head, descs, request) in second.into_iter().chain([first]) {
                device.reply(head, &descs, &request, &[0; 100]);
                left -= 1;
            }
        }
    });
    assert_eq!(queue.faults.texts(false), Vec::<String>::new());
}

#[test]
fn a_full_ring_waits_for_room() {
    let queue = queue(2);
    let mut device = FakeDevice::new(&queue);
    submit(&queue, 1);
    submit(&queue, 2);
    let request = fuse::in_header(40, GETATTR, 3, 1).to_vec();
    let third = queue.submit(request, 116, queue.options.layout, None, SHORT);
    assert!(matches!(third, Err(Error::RingFull)));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| submit(&queue, 3));
        let (head, descs, request) = device.expect();
        device.reply(head, &descs, &request, &[]);
        let token = waiter.join().unwrap();
        for _ in 0..2 {
            let (head, descs, request) = device.expect();
            device.reply(head, &descs, &request, &[]);
        }
        queue.wait(token, LONG).unwrap();
    });
}

#[test]
fn misdeeds_are_recorded() {
    let queue = queue(16);
    let mut device = FakeDevice::new(&queue);
    // A used length of 0, as one known back-end sends it.
    let token = submit(&queue, 1);
    let (head, descs, _) = device.expect();
    device.answer(head, &descs, &crate::testing::reply(1, 0, &[0; 100]), 0);
    queue.wait(token, LONG).unwrap();
    assert_eq!(queue.faults.count(FaultKind::UsedLength), 1);
    // The same head once more.
    device.answer(head, &[], &[], 116);
    submit(&queue, 2);
    let (head, descs, request) = device.expect();
    device.reply(head, &descs, &request, &[0; 100]);
    assert!(!queue.completed(LONG).unwrap().is_empty());
    assert_eq!(queue.faults.count(FaultKind::NotInFlight), 1);
}

#[test]
fn a_late_write_is_found_in_quarantine() {
    let queue = queue(16);
    let mut device = FakeDevice::new(&queue);
    let token = submit(&queue, 1);
    let (head, descs, request) = device.expect();
    device.reply(head, &descs, &request, &[7; 100]);
    queue.wait(token, LONG).unwrap();
    queue.take(token, &mut [0; 100]).unwrap();
    queue.check();
    assert_eq!(queue.faults.total(), 0);
    crate::testing::answer(&queue.memory, &descs, &[0; 16]);
    queue.check();
    assert_eq!(queue.faults.count(FaultKind::LateWrite), 1);
}

#[test]
fn a_stopped_queue_must_not_change() {
    let queue = queue(16);
    let mut device = FakeDevice::new(&queue);
    let token = submit(&queue, 1);
    let (head, descs, request) = device.expect();
    queue.pause();
    queue.freeze();
    assert!(matches!(queue.wait(token, SHORT), Err(Error::Timeout)));
    queue.check();
    assert_eq!(queue.faults.total(), 0);
    crate::testing::answer(&queue.memory, &descs, &[1; 4]);
    queue.check();
    assert_eq!(queue.faults.count(FaultKind::WriteWhileStopped), 1);
    device.reply(head, &descs, &request, &[0; 100]);
    assert!(matches!(queue.wait(token, SHORT), Err(Error::Timeout)));
    queue.thaw();
    assert_eq!(queue.faults.count(FaultKind::WriteWhileStopped), 3);
    queue.resume();
    queue.wait(token, LONG).unwrap();
}

#[test]
fn a_reset_loses_requests_and_watches_their_buffers() {
    let queue = queue(16);
    let mut device = FakeDevice::new(&queue);
    let token = submit(&queue, 1);
    let (head, descs, request) = device.expect();
    queue.pause();
    queue.freeze();
    queue.reset(0).unwrap();
    assert!(matches!(queue.wait(token, LONG), Err(Error::Reset)));
    queue.check();
    assert_eq!(queue.faults.total(), 0);
    device.reply(head, &descs, &request, &[0; 100]);
    queue.check();
    assert_eq!(queue.faults.count(FaultKind::LateWrite), 1);
    assert_eq!(queue.faults.count(FaultKind::WriteWhileStopped), 1);
    let mut device = FakeDevice::new(&queue);
    let token = submit(&queue, 2);
    let (head, descs, request) = device.expect();
    device.reply(head, &descs, &request, &[0; 100]);
    assert_eq!(queue.wait(token, LONG).unwrap().1.unwrap().unique, 2);
}

#[test]
fn a_swapped_call_fd_wakes_who_sleeps_on_the_old_one() {
    let queue = queue(16);
    let mut device = FakeDevice::new(&queue);
    let token = submit(&queue, 1);
    let (head, descs, request) = device.expect();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| queue.wait(token, LONG));
        std::thread::sleep(SHORT);
        let old = queue.call_fd();
        queue.swap_call().unwrap();
        std::thread::sleep(SHORT);
        device.reply(head, &descs, &request, &[0; 100]);
        waiter.join().unwrap().unwrap();
        assert_eq!(sys::take_signal(old.as_fd()), 0);
    });
}

#[test]
fn waiting_ends_when_the_back_end_goes() {
    let queue = queue(16);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    queue.set_connection(Some(Arc::new(Connection::adopt(ours.into()))));
    let token = submit(&queue, 1);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| queue.wait(token, LONG));
        std::thread::sleep(SHORT);
        drop(theirs);
        assert!(matches!(waiter.join().unwrap(), Err(Error::Closed)));
    });
}

#[test]
fn raw_chains_complete_unchecked() {
    let queue = queue(16);
    let mut device = FakeDevice::new(&queue);
    let span = queue.memory.alloc(64, 8, None).unwrap();
    let descs = [
        Desc {
            gpa: span.gpa(),
            len: 8,
            writable: true,
            indirect: false,
        },
        Desc {
            gpa: span.gpa() + 8,
            len: 8,
            writable: false,
            indirect: false,
        },
    ];
    for indirect in [false, true] {
        let token = queue.submit_raw(&descs, indirect).unwrap();
        let (head, seen, _) = device.expect();
        assert_eq!(seen, descs);
        device.answer(head, &seen, &[1], 1);
        let (used, header, _) = queue.wait(token, LONG).unwrap();
        assert_eq!((used, header), (1, None));
    }
    assert_eq!(queue.faults.total(), 0);
}

#[test]
fn a_completion_without_its_interrupt_is_a_time_out_and_a_fault() {
    let queue = queue(16);
    let mut device = FakeDevice::new(&queue);
    let token = submit(&queue, 1);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| queue.wait(token, 25 * SHORT));
        let (head, descs, request) = device.expect();
        device.mute = true;
        // Only once the waiter sleeps is the interrupt needed.
        std::thread::sleep(SHORT);
        device.reply(head, &descs, &request, &[]);
        assert!(matches!(waiter.join().unwrap(), Err(Error::Timeout)));
    });
    assert_eq!(queue.faults.count(FaultKind::InterruptMissing), 1);
    assert!(queue.wait(token, SHORT).is_ok());
}
