//! One virtqueue: ring, in-flight log, and the batch of answers that the driver has not seen yet.
//!
//! The order of steps is what makes a crash harmless: log the head, answer it, write used entries, note the batch in
//! the log, publish the used index, clear the log, signal. See `session::inflight`.

use std::collections::VecDeque;
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
    /// Heads of the log that have to be served once more: a predecessor left them, or their ring's memory was away
    /// when their turn came.
    pub backlog: VecDeque<Outstanding>,
    /// Heads whose buffers lie in memory that was taken away: they join the backlog when memory changes.
    pub waiting: Vec<Outstanding>,
    call: Option<OwnedFd>,
    spec: RingSpec,
    /// None while a part of it is not in shared memory.
    ring: Option<Vring>,
    /// The ring has never been mapped: whether the log is to be gone on from.
    unstarted: Option<bool>,
    /// Next avail position while the ring is not mapped.
    position: u16,
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
            backlog: VecDeque::new(),
            waiting: Vec::new(),
            call,
            spec,
            ring: None,
            unstarted: None,
            position: 0,
            broken: false,
            shared,
            log: shared.log(index),
            newest_in_batch: 0,
            batch: 0,
        }
    }

    /// Maps the ring for the first time. With `resume` the log is repaired and its heads become the backlog; otherwise,
    /// and where the log is not this ring's, it starts empty at `base`.
    pub fn start(&mut self, mem: &GuestMemory, base: u16, resume: bool) {
        let ours = resume && self.log.belongs_to(self.spec.size);
        self.position = if ours { self.log.next_avail() } else { base };
        self.unstarted = Some(ours);
        self.remap(mem);
    }

    /// Maps the ring anew after memory regions changed. Answers must have been flushed.
    pub fn remap(&mut self, mem: &GuestMemory) {
        self.position = self.next_avail();
        self.backlog.extend(self.waiting.drain(..));
        let spec = self.spec;
        self.ring = Vring::new(mem, spec.size, spec.at, self.position, spec.event_idx).ok();
        // Where it cannot be mapped, a later region may bring the memory.
        let Some(ring) = self.ring.as_mut() else {
            return;
        };
        let Some(ours) = self.unstarted.take() else {
            return;
        };
        let used = ring.published_used();
        if ours && self.log.fits(spec.size, used) {
            self.log.repair(used);
            self.log.requeue();
            let mut outstanding = Vec::new();
            self.log.outstanding(spec.size, &mut outstanding);
            self.backlog = outstanding.into();
            ring.set_next_avail(self.log.next_avail());
            // Nobody knows what the driver was told before the crash or the stop: tell it once more.
            self.signal();
        } else {
            self.log.reset(spec.size, used, self.position);
        }
    }

    /// The next avail position: what GET_VRING_BASE answers.
    pub fn next_avail(&self) -> u16 {
        self.ring.as_ref().map_or(self.position, Vring::next_avail)
    }

    /// Ends the ring; its next avail position. What is in flight stays in the log, and waits without a clock.
    pub fn stop(self) -> u16 {
        self.log.stop_clocks();
        self.next_avail()
    }

    /// Whether the VMM wants the ring to be looked at without a kick.
    pub fn is_polled(&self) -> bool {
        self.kick.is_none() && self.is_live()
    }

    /// Whether requests can be read and answered. A disabled ring is left as it is: that of a machine which stands
    /// still, for a snapshot perhaps.
    pub fn can_answer(&self) -> bool {
        self.enabled && self.ring.is_some()
    }

    /// Enables or disables the ring. While it is disabled no deadline comes nearer.
    pub fn enable(&mut self, enabled: bool, now_ns: u64) {
        self.enabled = enabled;
        self.log.stop_clocks();
        for known in &mut self.backlog {
            known.taken_ns = 0;
        }
        for known in &mut self.waiting {
            known.taken_ns = now_ns;
        }
    }

    /// The head cannot be read before more memory comes.
    pub fn wait_for_memory(&mut self, known: Outstanding) {
        self.park(known.head);
        self.waiting.push(known);
    }

    /// Gives heads back that have waited for their memory since `taken_until_ns` or longer; how many.
    pub fn expire_waiting(&mut self, taken_until_ns: u64) -> usize {
        if self.waiting.is_empty() || !self.can_answer() {
            return 0;
        }
        let (late, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<Vec<_>, _>(|known| known.taken_ns <= taken_until_ns);
        self.waiting = waiting;
        for known in &late {
            self.complete(known.head, 0);
        }
        late.len()
    }

    /// The next head of the backlog, if it can be served now.
    pub fn next_in_backlog(&mut self, now_ns: u64) -> Option<Outstanding> {
        if !self.can_answer() {
            return None;
        }
        let mut known = self.backlog.pop_front()?;
        if known.taken_ns == 0 {
            known.taken_ns = now_ns;
            self.log.set_taken(known.head, now_ns);
        }
        Some(known)
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
    #[inline]
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
            session::say!(
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
        session::add(completed, u64::from(self.batch));
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

    /// Answers that the driver has not been told of, and heads that it has offered and that were not taken.
    pub fn untold_and_waiting(&self) -> (u16, u16) {
        self.ring
            .as_ref()
            .map_or((0, 0), |ring| (ring.unsignalled(), ring.waiting()))
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

    /// No kicks are needed while the queue is being drained. A disabled ring is left as it is.
    pub fn disarm(&mut self) {
        let live = self.is_live();
        if let Some(ring) = self.ring.as_mut().filter(|_| live) {
            ring.disarm();
        }
    }
}
