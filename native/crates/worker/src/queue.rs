//! One virtqueue: ring, in-flight log, and the batch of answers that the driver has not seen yet.
//!
//! The order of steps is what makes a crash harmless: log the head, answer it, write used entries, note the batch in
//! the log, publish the used index, clear the log, signal. See `session::inflight`.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use session::Shared;
use session::failpoint::Point;
use session::inflight::{Outstanding, PHASE_PARKED, PHASE_SERVED, PHASE_SERVING, QueueLog};
use virtq::{Chain, ChainError, GuestMemory, RingAddresses, Vring};

/// What a ring is made of, kept so that it can be mapped again when memory regions change.
#[derive(Clone, Copy)]
pub struct RingSpec {
    pub size: u16,
    pub at: RingAddresses,
    pub event_idx: bool,
}

/// A virtqueue that was started.
pub struct Queue<'a> {
    pub index: usize,
    pub enabled: bool,
    /// Grows each time the queue is stopped: late results of the pool belong to nobody.
    pub epoch: u64,
    pub kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    spec: RingSpec,
    ring: Option<Vring>,
    broken: bool,
    shared: &'a Shared,
    log: &'a QueueLog,
    newest_in_batch: u16,
    batch: u16,
}

impl<'a> Queue<'a> {
    /// A queue whose ring is not mapped yet.
    pub fn new(
        index: usize,
        shared: &'a Shared,
        spec: RingSpec,
        kick: Option<OwnedFd>,
        call: Option<OwnedFd>,
    ) -> Self {
        let record = shared.queue(index);
        record.size.store(u32::from(spec.size), Ordering::Relaxed);
        record.broken.store(0, Ordering::Relaxed);
        Queue {
            index,
            enabled: false,
            epoch: 0,
            kick,
            call,
            spec,
            ring: None,
            broken: false,
            shared,
            log: shared.log(index),
            newest_in_batch: 0,
            batch: 0,
        }
    }

    /// Maps the ring for the first time. With `resume` the log is repaired and its heads go to `outstanding`;
    /// otherwise the log starts empty at `base`.
    pub fn start(
        &mut self,
        mem: &GuestMemory,
        base: u16,
        resume: bool,
        outstanding: &mut Vec<Outstanding>,
    ) {
        outstanding.clear();
        let spec = self.spec;
        let Ok(mut ring) = Vring::new(mem, spec.size, spec.at, base, spec.event_idx) else {
            // A later region may bring the memory: `remap` tries again from the log's positions.
            if !resume {
                self.log.reset(spec.size, base, base);
            }
            return;
        };
        let used = ring.published_used();
        if resume && self.log.fits(spec.size, used) {
            self.log.repair(used);
            self.log.outstanding(spec.size, outstanding);
            ring.set_next_avail(self.log.next_avail());
        } else {
            self.log.reset(spec.size, used, base);
        }
        self.ring = Some(ring);
    }

    /// Maps the ring anew after memory regions changed. Answers must have been flushed.
    pub fn remap(&mut self, mem: &GuestMemory) {
        let next_avail = self.next_avail();
        let spec = self.spec;
        self.ring = Vring::new(mem, spec.size, spec.at, next_avail, spec.event_idx).ok();
    }

    /// The next avail position: what GET_VRING_BASE answers.
    pub fn next_avail(&self) -> u16 {
        self.ring
            .as_ref()
            .map_or_else(|| self.log.next_avail(), Vring::next_avail)
    }

    /// Replaces the call fd.
    pub fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
    }

    /// Whether heads may be taken.
    pub fn is_live(&self) -> bool {
        self.enabled && !self.broken && self.ring.is_some()
    }

    /// Takes the next head and logs it.
    pub fn take(&mut self, now_ns: u64) -> Option<u16> {
        if !self.is_live() {
            return None;
        }
        let ring = self.ring.as_mut()?;
        match ring.take() {
            Ok(Some(head)) => {
                self.shared.failpoint().pass(Point::Taken);
                if !self.log.log(head, now_ns) {
                    // The driver offers a head that is still in flight: nobody could tell the two apart.
                    self.set_broken("a head was offered twice");
                    return None;
                }
                self.shared.failpoint().pass(Point::Logged);
                Some(head)
            }
            Ok(None) => None,
            Err(e) => {
                self.set_broken(&format!("{e:?}"));
                None
            }
        }
    }

    fn set_broken(&mut self, why: &str) {
        if !self.broken {
            eprintln!(
                "rafs-worker: queue {}: the driver broke its ring ({why}); it rests until it is reset",
                self.index
            );
        }
        self.broken = true;
        self.shared
            .queue(self.index)
            .broken
            .store(1, Ordering::Relaxed);
    }

    /// Translates the chain at `head`.
    pub fn walk(&self, mem: &GuestMemory, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        self.log.set_phase(head, PHASE_SERVING);
        match &self.ring {
            Some(ring) => ring.walk(mem, head, chain),
            None => Err(ChainError::BadAddress),
        }
    }

    /// The head waits for data.
    pub fn park(&self, head: u16) {
        self.log.set_phase(head, PHASE_PARKED);
    }

    /// The head is answered with `len` bytes written; the driver sees it after [`Queue::flush`].
    pub fn complete(&mut self, head: u16, len: u32) {
        let Some(ring) = self.ring.as_mut() else {
            return;
        };
        self.log.set_phase(head, PHASE_SERVED);
        ring.push_used(head, len);
        self.shared.failpoint().pass(Point::UsedWritten);
        self.log.link(head, self.newest_in_batch);
        self.newest_in_batch = head;
        self.batch += 1;
        // The used ring must never hold more unpublished entries than it has slots.
        if self.batch >= self.spec.size {
            self.publish();
        }
    }

    /// Shows the driver all answers, without a signal.
    pub fn publish(&mut self) {
        let Some(ring) = self.ring.as_mut() else {
            return;
        };
        if self.batch == 0 {
            return;
        }
        let failpoint = self.shared.failpoint();
        self.log.note_batch(self.newest_in_batch);
        failpoint.pass(Point::BatchNoted);
        ring.publish();
        failpoint.pass(Point::Published);
        self.log
            .clear_batch(self.newest_in_batch, self.batch, ring.published_used());
        failpoint.pass(Point::Cleared);
        let completed = &self.shared.queue(self.index).completed;
        completed.store(
            completed.load(Ordering::Relaxed) + u64::from(self.batch),
            Ordering::Relaxed,
        );
        self.batch = 0;
    }

    /// Shows the driver all answers and signals it when it wants that. True when a signal was sent.
    pub fn flush(&mut self) -> bool {
        self.publish();
        let wanted = self.ring.as_mut().is_some_and(Vring::needs_signal);
        if wanted {
            self.signal();
            self.shared.failpoint().pass(Point::Signalled);
        }
        wanted
    }

    /// Signals the driver whether it wants it or not: after a crash nobody knows what it has been told.
    pub fn signal(&self) {
        if let Some(call) = &self.call {
            let one = 1u64.to_ne_bytes();
            // SAFETY: eight bytes to an eventfd of the VMM. A full counter is a signal that is still pending.
            unsafe { libc::write(call.as_raw_fd(), one.as_ptr().cast(), 8) };
        }
    }

    /// Whether the driver has offered more, without asking for a kick.
    pub fn has_more(&self) -> bool {
        self.is_live() && self.ring.as_ref().is_some_and(Vring::has_more)
    }

    /// Asks for a kick; true when there is more to take already.
    pub fn arm(&mut self) -> bool {
        let live = self.is_live();
        self.ring.as_mut().is_some_and(|ring| live && ring.arm())
    }

    /// No kicks are needed while the queue is being drained.
    pub fn disarm(&mut self) {
        if let Some(ring) = self.ring.as_mut() {
            ring.disarm();
        }
    }
}
