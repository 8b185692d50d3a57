//! The in-flight log of one queue, in the layout of vhost-user's INFLIGHT_SHMFD for split rings
//! (docs/interop/vhost-user.rst, struct QueueRegionSplit), plus what a new worker needs beyond it.
//!
//! Every head is logged before it is served. `last_avail = used.idx + in flight`: the avail ring alone cannot tell
//! which heads are outstanding, because requests complete in any order and the slot of a parked head is overwritten
//! once the ring wraps.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use crate::MAX_QUEUE_SIZE;

/// In the log; nothing was done for it yet.
pub const PHASE_QUEUED: u8 = 0;
/// Being served right now: the only phase in which a head can be the cause of a crash.
pub const PHASE_SERVING: u8 = 1;
/// Waiting for data.
pub const PHASE_PARKED: u8 = 2;
/// Answered in guest memory; its batch is not published yet.
pub const PHASE_SERVED: u8 = 3;

/// A request that was being served at this many crashes in a row is answered with EIO.
pub const CRASH_LIMIT: u8 = 3;

/// One head (struct DescStateSplit); `phase` and `crashes` use its padding.
#[repr(C)]
pub struct Slot {
    inflight: AtomicU8,
    phase: AtomicU8,
    crashes: AtomicU8,
    _padding: [AtomicU8; 3],
    next: AtomicU16,
    counter: AtomicU64,
}

/// The log of one queue. Aligned so that no two threads write to one cache line.
#[repr(C, align(128))]
pub struct QueueLog {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
    slots: [Slot; MAX_QUEUE_SIZE],
    // Beyond the specification's layout:
    next_counter: AtomicU64,
    skew: AtomicU16,
    first_taken_ns: [AtomicU64; MAX_QUEUE_SIZE],
}

/// A head that a worker has to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outstanding {
    pub head: u16,
    /// Order in which heads were taken.
    pub counter: u64,
    /// When it was taken first, CLOCK_MONOTONIC; 0 when the ring has been stopped since.
    pub taken_ns: u64,
    /// It was being served at `CRASH_LIMIT` crashes in a row.
    pub poisonous: bool,
}

impl QueueLog {
    /// Forgets everything: a new driver owns the ring. `used_idx` is the ring's used index, `next_avail` the position
    /// from which heads will be taken.
    pub fn reset(&self, size: u16, used_idx: u16, next_avail: u16) {
        for slot in &self.slots {
            slot.inflight.store(0, Ordering::Relaxed);
        }
        self.version.store(1, Ordering::Relaxed);
        // Zero wherever the driver and the device agree; kept so that `next_avail` is right where they do not.
        self.skew
            .store(next_avail.wrapping_sub(used_idx), Ordering::Relaxed);
        self.desc_num.store(size, Ordering::Relaxed);
        self.used_idx.store(used_idx, Ordering::SeqCst);
    }

    /// Forgets that it belonged to any ring: whoever takes it over starts anew. For the keeper, which knows that a
    /// driver has gone before a worker has seen the new one's ring.
    pub fn disown(&self) {
        self.desc_num.store(0, Ordering::Relaxed);
        for slot in &self.slots {
            slot.inflight.store(0, Ordering::Relaxed);
        }
    }

    /// Whether the log belongs to a ring of `size`, as far as can be told without the ring.
    pub fn belongs_to(&self, size: u16) -> bool {
        self.desc_num.load(Ordering::Relaxed) == size
    }

    /// Whether the log belongs to a ring of `size` whose used index is `used_idx` or one batch further.
    pub fn fits(&self, size: u16, used_idx: u16) -> bool {
        self.belongs_to(size) && used_idx.wrapping_sub(self.used_idx.load(Ordering::SeqCst)) <= size
    }

    /// The used index that the log knows.
    pub fn used_idx(&self) -> u16 {
        self.used_idx.load(Ordering::SeqCst)
    }

    #[inline]
    fn slot(&self, head: u16) -> &Slot {
        &self.slots[usize::from(head) % MAX_QUEUE_SIZE]
    }

    /// Notes `head` as in flight. False when it already is: the driver offered it twice.
    #[inline]
    pub fn log(&self, head: u16, now_ns: u64) -> bool {
        let slot = self.slot(head);
        if slot.inflight.load(Ordering::Relaxed) != 0 {
            return false;
        }
        // One thread at a time writes the log: no need for an atomic addition.
        let counter = self.next_counter.load(Ordering::Relaxed);
        self.next_counter
            .store(counter.wrapping_add(1), Ordering::Relaxed);
        slot.counter.store(counter, Ordering::Relaxed);
        slot.phase.store(PHASE_QUEUED, Ordering::Relaxed);
        slot.crashes.store(0, Ordering::Relaxed);
        self.first_taken_ns[usize::from(head) % MAX_QUEUE_SIZE].store(now_ns, Ordering::Relaxed);
        slot.inflight.store(1, Ordering::Release);
        true
    }

    /// Notes whether `head` is being served or waits.
    #[inline]
    pub fn set_phase(&self, head: u16, phase: u8) {
        self.slot(head).phase.store(phase, Ordering::Relaxed);
    }

    /// Links `head` into the batch whose newest member so far is `previous`.
    #[inline]
    pub fn link(&self, head: u16, previous: u16) {
        self.slot(head).next.store(previous, Ordering::Relaxed);
    }

    /// Notes the newest member of the batch that is about to be published.
    pub fn note_batch(&self, newest: u16) {
        self.last_batch_head.store(newest, Ordering::SeqCst);
    }

    /// Clears the `n` heads of the batch that ends in `newest`, then takes over the ring's used index.
    pub fn clear_batch(&self, newest: u16, n: u16, used_idx: u16) {
        let mut head = newest;
        for _ in 0..n {
            let slot = self.slot(head);
            slot.inflight.store(0, Ordering::Release);
            head = slot.next.load(Ordering::Relaxed);
        }
        self.used_idx.store(used_idx, Ordering::SeqCst);
    }

    /// Repairs the log after a worker died: finishes the batch that the driver has seen already.
    pub fn repair(&self, used_idx: u16) {
        let published = used_idx.wrapping_sub(self.used_idx.load(Ordering::SeqCst));
        if published != 0 {
            self.clear_batch(
                self.last_batch_head.load(Ordering::SeqCst),
                published,
                used_idx,
            );
        }
    }

    /// Counts a crash for every head that was being served; a head that waited starts from zero again.
    pub fn count_crash(&self) {
        for slot in &self.slots {
            if slot.inflight.load(Ordering::Acquire) == 0 {
                continue;
            }
            match slot.phase.load(Ordering::Relaxed) {
                PHASE_SERVING => {
                    let crashes = slot.crashes.load(Ordering::Relaxed).saturating_add(1);
                    slot.crashes.store(crashes, Ordering::Relaxed);
                }
                PHASE_PARKED => slot.crashes.store(0, Ordering::Relaxed),
                _ => {}
            }
        }
    }

    /// Nothing that is in flight has been touched since the last crash: heads that nobody gets to before the next one
    /// are not blamed for it.
    pub fn requeue(&self) {
        for slot in &self.slots {
            if slot.inflight.load(Ordering::Acquire) != 0 {
                slot.phase.store(PHASE_QUEUED, Ordering::Relaxed);
            }
        }
    }

    /// The ring is stopped: while the machine stands still no deadline comes nearer. Heads that go on later count from
    /// then.
    pub fn stop_clocks(&self) {
        for taken in &self.first_taken_ns {
            taken.store(0, Ordering::Relaxed);
        }
    }

    /// Notes since when `head` waits.
    pub fn set_taken(&self, head: u16, now_ns: u64) {
        self.first_taken_ns[usize::from(head) % MAX_QUEUE_SIZE].store(now_ns, Ordering::Relaxed);
    }

    /// The heads that are in flight, in the order in which they were taken, into `out`.
    pub fn outstanding(&self, size: u16, out: &mut Vec<Outstanding>) {
        out.clear();
        for head in 0..size.min(MAX_QUEUE_SIZE as u16) {
            let slot = self.slot(head);
            if slot.inflight.load(Ordering::Acquire) != 0 {
                out.push(Outstanding {
                    head,
                    counter: slot.counter.load(Ordering::Relaxed),
                    taken_ns: self.first_taken_ns[usize::from(head)].load(Ordering::Relaxed),
                    poisonous: slot.crashes.load(Ordering::Relaxed) >= CRASH_LIMIT,
                });
            }
        }
        out.sort_unstable_by_key(|o| o.counter);
    }

    /// The position of the avail ring from which the next head is to be taken, after [`QueueLog::repair`].
    pub fn next_avail(&self) -> u16 {
        let skew = self.skew.load(Ordering::Relaxed);
        self.used_idx()
            .wrapping_add(self.in_flight())
            .wrapping_add(skew)
    }

    /// How many heads are in flight.
    pub fn in_flight(&self) -> u16 {
        self.slots
            .iter()
            .filter(|s| s.inflight.load(Ordering::Relaxed) != 0)
            .count() as u16
    }

    /// How many heads wait for data.
    pub fn parked(&self) -> u16 {
        self.slots
            .iter()
            .filter(|s| {
                s.inflight.load(Ordering::Relaxed) != 0
                    && s.phase.load(Ordering::Relaxed) == PHASE_PARKED
            })
            .count() as u16
    }
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
