//! Invariant: a worker that a guest has taken over may write anything into the memory it shares; keeper, control and the next worker neither panic nor loop nor leave it.

use std::cell::RefCell;

use session::inflight::QueueLog;
use session::rings::Trace;
use session::{MAX_QUEUE_SIZE, Shared, ThreadRecord};

use crate::input::Input;

fn fill<T>(place: &T, at: usize, bytes: &[u8]) {
    let size = size_of::<T>();
    let at = at % size;
    let n = bytes.len().min(size - at);
    // SAFETY: inside `place`, which consists of atomic integers in shared memory; nobody else uses it meanwhile.
    unsafe {
        let base = std::ptr::from_ref(place).cast_mut().cast::<u8>();
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), base.add(at), n);
    }
}

fn clear<T>(place: &T) {
    fill(place, 0, &vec![0; size_of::<T>()]);
}

/// What a new worker and the keeper do with a log that others wrote.
fn take_over(log: &QueueLog, size: u16, used: u16) {
    log.count_crash();
    if log.belongs_to(size) && log.fits(size, used) {
        log.repair(used);
    }
    log.requeue();
    let mut outstanding = Vec::new();
    log.outstanding(size, &mut outstanding);
    assert!(outstanding.len() <= usize::from(size).min(MAX_QUEUE_SIZE));
    assert!(outstanding.iter().all(|known| known.head < size));
    assert!(outstanding.is_sorted_by_key(|known| known.counter));
    assert!(log.in_flight() as usize <= MAX_QUEUE_SIZE && log.parked() <= log.in_flight());
    let _ = (log.next_avail(), log.used_idx());
    log.stop_clocks();
    for known in outstanding {
        log.set_phase(known.head, 2);
        log.link(known.head, used);
        log.set_taken(known.head, 1);
    }
}

fn read_rings(thread: &ThreadRecord) {
    // More entries than a ring has would be an endless supply of old ones.
    let posts = std::iter::from_fn(|| thread.posts.pop())
        .take(1 << 16)
        .count();
    assert!(posts < 1 << 16, "a ring without an end");
    let traces = std::iter::from_fn(|| thread.traces.pop())
        .take(1 << 16)
        .count();
    assert!(traces < 1 << 16, "a ring without an end");
    thread.traces.push(&Trace::default());
    thread.count(u32::MAX);
}

/// Writes (a byte that says where, three for the place, one for the length, the bytes), then everybody looks.
pub fn run(data: &[u8]) {
    thread_local! {
        static SHARED: RefCell<Option<Shared>> = const { RefCell::new(None) };
    }
    SHARED.with(|cell| {
        let mut shared = cell.borrow_mut();
        let shared = shared.get_or_insert_with(|| Shared::create().expect("memory"));
        let (log, thread) = (shared.log(1), shared.thread(0));
        clear(log);
        clear(thread);
        let mut input = Input::new(data);
        let size = 1u16 << (input.u8() % 11);
        let used = input.u16();
        log.reset(size, input.u16(), input.u16());
        for _ in 0..input.u8() % 16 {
            log.log(u16::from(input.u8()) % size, 1);
        }
        while !input.is_empty() {
            let (kind, at) = (input.u8(), input.u24() as usize);
            let len = usize::from(input.u8());
            let bytes = match kind >> 1 & 3 {
                0 => vec![input.u8(); len * 16],
                _ => input.bytes(len).to_vec(),
            };
            match kind & 1 {
                0 => fill(log, at, &bytes),
                _ => fill(thread, at, &bytes),
            }
            if kind & 0x80 != 0 {
                take_over(log, size, used);
            }
        }
        take_over(log, size, used);
        read_rings(thread);
        log.disown();
        assert_eq!(log.in_flight(), 0);
    });
}

pub fn seeds() -> Vec<Vec<u8>> {
    let start = |used: u16| {
        let mut seed = vec![6];
        seed.extend(used.to_le_bytes());
        seed.extend([0, 0, 0, 0, 5, 1, 2, 3, 4, 5]);
        seed
    };
    let write = |kind: u8, at: u32, bytes: &[u8]| {
        let mut out = vec![kind];
        out.extend(&at.to_le_bytes()[..3]);
        out.push(bytes.len() as u8);
        out.extend(bytes);
        out
    };
    let mut seeds = vec![start(0), start(3)];
    for at in (0..48).step_by(2) {
        seeds.push([start(3), write(0x82, at, &[0xff; 8])].concat());
    }
    for at in [0, 64, 512, 584, 592, 600, 4096, 8192] {
        seeds.push([start(0), write(3, at, &[0xff; 16])].concat());
        seeds.push(
            [
                start(0),
                vec![1],
                at.to_le_bytes()[..3].to_vec(),
                vec![255, 0xfe],
            ]
            .concat(),
        );
    }
    seeds
}
