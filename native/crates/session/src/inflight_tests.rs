//! The in-flight log: what a worker that may die at every step leaves, and what its successor makes of it.

use super::*;

fn new_log() -> Box<QueueLog> {
    // SAFETY: every field is an atomic integer, for which all-zero bytes are valid.
    Box::new(unsafe { std::mem::zeroed() })
}

fn heads(log: &QueueLog) -> Vec<u16> {
    let mut out = Vec::new();
    log.outstanding(64, &mut out);
    out.iter().map(|o| o.head).collect()
}

#[test]
fn a_published_batch_is_finished_by_repair() {
    let log = new_log();
    log.reset(64, 10, 10);
    for head in [3, 7, 5] {
        assert!(log.log(head, 1));
    }
    log.link(7, 0);
    log.link(3, 7);
    log.note_batch(3);
    // The worker dies after used.idx went from 10 to 12.
    log.repair(12);
    assert_eq!(heads(&log), [5]);
    assert_eq!(log.used_idx(), 12);
}

#[test]
fn an_unpublished_batch_is_served_again_in_order() {
    let log = new_log();
    log.reset(64, 0, 0);
    for head in [9, 1, 4] {
        assert!(log.log(head, 1));
    }
    log.link(1, 0);
    log.note_batch(1);
    log.repair(0);
    assert_eq!(heads(&log), [9, 1, 4]);
}

#[test]
fn three_crashes_in_a_row_poison_only_what_was_served() {
    let log = new_log();
    log.reset(64, 0, 0);
    log.log(1, 1);
    log.set_phase(1, PHASE_SERVING);
    log.log(2, 1);
    log.set_phase(2, PHASE_PARKED);
    for _ in 0..3 {
        log.count_crash();
    }
    let mut out = Vec::new();
    log.outstanding(64, &mut out);
    assert_eq!(
        out.iter().map(|o| o.poisonous).collect::<Vec<_>>(),
        [true, false]
    );
}

#[test]
fn a_head_cannot_be_taken_twice() {
    let log = new_log();
    log.reset(8, 0, 0);
    assert!(log.log(1, 1));
    assert!(!log.log(1, 2));
}

#[test]
fn a_head_that_nobody_got_to_is_not_blamed() {
    let log = new_log();
    log.reset(64, 0, 0);
    log.log(1, 1);
    log.set_phase(1, PHASE_SERVING);
    log.log(2, 1);
    // The first crash; the next worker dies at another head, three times.
    for _ in 0..3 {
        log.count_crash();
        log.requeue();
    }
    let mut out = Vec::new();
    log.outstanding(64, &mut out);
    assert!(out.iter().all(|o| !o.poisonous));
}

#[test]
fn a_log_that_belongs_to_nobody_fits_no_ring() {
    let log = new_log();
    log.reset(64, 5, 5);
    log.log(1, 1);
    assert!(log.fits(64, 5));
    log.disown();
    assert!((0..=1024).all(|size| size == 0 || !log.fits(size, 5)));
    assert_eq!(log.in_flight(), 0);
}

#[test]
fn a_stopped_ring_has_no_clocks() {
    let log = new_log();
    log.reset(64, 0, 0);
    log.log(3, 7);
    log.stop_clocks();
    let mut out = Vec::new();
    log.outstanding(64, &mut out);
    assert_eq!(out[0].taken_ns, 0);
    log.set_taken(3, 9);
    log.outstanding(64, &mut out);
    assert_eq!(out[0].taken_ns, 9);
}

/// xorshift64*: a failure comes back with its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % n
    }
}

/// A worker, its ring and a driver, reduced to what the log sees. Each step may be the last of a worker.
struct Model {
    log: Box<QueueLog>,
    size: u16,
    /// Free-running; what the driver offers and sees.
    offered: std::collections::VecDeque<u16>,
    free: Vec<u16>,
    used: u16,
    /// Heads that the driver waits for, in the order in which they were taken.
    taken: Vec<u16>,
    /// The worker's own memory: gone when it dies.
    next_avail: u16,
    batch: Vec<u16>,
    /// Steps until the worker dies.
    left: u32,
}

impl Model {
    /// False: the worker has died before this step.
    fn step(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.left > 0
    }

    /// The driver reads its used ring: these heads are its own again.
    fn seen_by_driver(&mut self, heads: &[u16]) {
        for head in heads {
            let at = self.taken.iter().position(|h| h == head);
            self.taken.remove(at.expect("answered once"));
            self.free.push(*head);
        }
    }

    fn take(&mut self, random: &mut Random) -> bool {
        if self.offered.is_empty() {
            if self.free.is_empty() {
                return true;
            }
            let at = random.below(self.free.len() as u64) as usize;
            self.offered.push_back(self.free.swap_remove(at));
        }
        if !self.step() {
            return false;
        }
        let head = self.offered[0];
        assert!(self.log.log(head, u64::from(head) + 1));
        self.offered.pop_front();
        self.taken.push(head);
        self.next_avail = self.next_avail.wrapping_add(1);
        true
    }

    fn complete(&mut self, random: &mut Random) -> bool {
        let open: Vec<u16> = self
            .taken
            .iter()
            .copied()
            .filter(|h| !self.batch.contains(h))
            .collect();
        if open.is_empty() {
            return true;
        }
        let head = open[random.below(open.len() as u64) as usize];
        self.log.set_phase(head, PHASE_SERVED);
        if !self.step() {
            return false;
        }
        self.log.link(head, self.batch.last().copied().unwrap_or(0));
        if !self.step() {
            return false;
        }
        self.batch.push(head);
        true
    }

    fn publish(&mut self) -> bool {
        let Some(&newest) = self.batch.last() else {
            return true;
        };
        self.log.note_batch(newest);
        if !self.step() {
            return false;
        }
        let batch = std::mem::take(&mut self.batch);
        self.used = self.used.wrapping_add(batch.len() as u16);
        self.seen_by_driver(&batch);
        // Clearing is interrupted after each of its heads.
        let mut head = newest;
        for _ in 0..batch.len() {
            if !self.step() {
                return false;
            }
            self.log.slot(head).inflight.store(0, Ordering::Release);
            head = self.log.slot(head).next.load(Ordering::Relaxed);
        }
        if !self.step() {
            return false;
        }
        self.log.clear_batch(newest, batch.len() as u16, self.used);
        true
    }

    fn run(&mut self, random: &mut Random) {
        loop {
            let alive = match random.below(8) {
                0..4 => self.take(random),
                4..7 => self.complete(random),
                _ => self.publish(),
            };
            if !alive {
                return;
            }
        }
    }

    /// A new worker: what it finds must be what the driver waits for.
    fn recover(&mut self, seed: u64) {
        self.batch.clear();
        assert!(self.log.fits(self.size, self.used), "seed {seed}");
        self.log.repair(self.used);
        self.log.requeue();
        let mut out = Vec::new();
        self.log.outstanding(self.size, &mut out);
        let found: Vec<u16> = out.iter().map(|o| o.head).collect();
        assert_eq!(found, self.taken, "seed {seed}");
        assert!(out.iter().all(|o| o.taken_ns == u64::from(o.head) + 1));
        assert_eq!(self.log.next_avail(), self.next_avail, "seed {seed}");
    }
}

#[test]
fn recovery_finds_what_is_unanswered_in_order() {
    for seed in 1..=400u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let size = 1 << random.below(7);
        let used = random.below(65_536) as u16;
        // A driver and a device that disagree keep their distance.
        let next_avail = used.wrapping_add(random.below(2) as u16 * 9);
        let mut model = Model {
            log: new_log(),
            size,
            offered: Default::default(),
            free: (0..size).collect(),
            used,
            taken: Vec::new(),
            next_avail,
            batch: Vec::new(),
            left: 0,
        };
        model.log.reset(size, used, next_avail);
        for _ in 0..40 {
            model.left = 1 + random.below(60) as u32;
            model.run(&mut random);
            model.recover(seed);
        }
    }
}

/// A worker that a guest has taken over may write anything: its successor and the keeper still end.
#[test]
fn any_bytes_are_a_log() {
    let mut log = new_log();
    let mut random = Random(77);
    for _ in 0..20 {
        // SAFETY: the log is atomics, for which all bytes are valid; nobody else has it.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut((&raw mut *log).cast::<u8>(), size_of::<QueueLog>())
        };
        for byte in bytes {
            *byte = random.below(256) as u8;
        }
        let mut out = Vec::new();
        for size in [1, 64, 1024, u16::MAX] {
            log.fits(size, 9);
            log.repair(9);
            log.count_crash();
            log.requeue();
            log.outstanding(size, &mut out);
            assert!(out.len() <= usize::from(size) && out.iter().all(|o| o.head < size));
            let _ = (log.next_avail(), log.in_flight(), log.parked());
        }
    }
}
