//! What a queue is made of, and what happens to completions: taken from the ring, checked, handed to their owners,
//! and watched in quarantine.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::connection::Connection;
use crate::error::Error;
use crate::exchange::{Exchange, Layout, verify_untouched};
use crate::fault::Faults;
use crate::fuse::OutHeader;
use crate::memory::{Memory, Span};
use crate::ring::{Ring, RingOptions};
use crate::sys;

/// Completed buffers are watched for late writes until so many newer ones came, or so many bytes.
const QUARANTINE_BUFFERS: usize = 512;
const QUARANTINE_BYTES: usize = 32 << 20;
/// Tags of load loops have this bit; below it the port's id, then the slot.
pub(crate) const PORT_TAG: u64 = 1 << 63;

/// How a queue is set up and played.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    pub ring: RingOptions,
    /// Framing of the requests that the queue builds itself.
    pub layout: Layout,
}

/// Counts since the queue was made.
#[derive(Default)]
pub struct Stats {
    pub kicks: AtomicU64,
    /// Submissions for which the device had said that it needs no kick.
    pub kicks_suppressed: AtomicU64,
    pub interrupts: AtomicU64,
    pub completions: AtomicU64,
}

pub(crate) struct Pending {
    pub(crate) exchange: Option<Exchange>,
    pub(crate) request: Vec<u8>,
    pub(crate) unique: u64,
    pub(crate) submitted: Instant,
}

/// A completed request.
pub struct Completion {
    pub used: u32,
    /// `None` for requests without reply, replies too short for one, and raw chains.
    pub header: Option<OutHeader>,
    pub latency: Duration,
    pub(crate) exchange: Option<Exchange>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leader {
    None,
    /// A waiting thread sleeps on the eventfds right now.
    Waiter,
    /// A load loop leads, asleep or not.
    Port(u32),
}

pub(crate) struct State {
    pub(crate) ring: Ring,
    /// Call eventfds; the last one is in use. A device that was told of a new one may still signal an old one.
    pub(crate) calls: Vec<Arc<OwnedFd>>,
    pub(crate) connection: Option<Arc<Connection>>,
    pub(crate) closed: bool,
    pub(crate) paused: bool,
    pub(crate) leader: Leader,
    /// Open load loops: completions by port id.
    pub(crate) ports: HashMap<u32, Vec<(u32, u32)>>,
    /// Buffers of load loops that ended with requests in flight.
    pub(crate) orphans: Vec<Exchange>,
    /// Counts resets.
    pub(crate) generation: u64,
    pub(crate) next_tag: u64,
    pub(crate) pending: HashMap<u64, Pending>,
    pub(crate) done: HashMap<u64, Completion>,
    pub(crate) quarantine: VecDeque<Arc<Span>>,
    quarantine_bytes: usize,
    pub(crate) retired: VecDeque<Ring>,
    pub(crate) snapshot: Option<Snapshot>,
}

/// What a stopped queue must look like until it goes on.
pub(crate) struct Snapshot {
    pub(crate) used_idx: u16,
    pub(crate) watched: Vec<(Arc<Span>, u64)>,
}

/// One virtqueue of the front-end.
pub struct Queue {
    pub index: u16,
    pub options: QueueOptions,
    pub(crate) memory: Arc<Memory>,
    pub(crate) faults: Arc<Faults>,
    pub stats: Stats,
    state: Mutex<State>,
    pub(crate) cond: Condvar,
    kick: OwnedFd,
    pub(crate) wake: OwnedFd,
}

impl Queue {
    pub fn new(
        index: u16,
        options: QueueOptions,
        base: u16,
        memory: Arc<Memory>,
        faults: Arc<Faults>,
    ) -> Result<Self, Error> {
        let state = State {
            ring: Ring::new(&memory, options.ring, base)?,
            calls: vec![Arc::new(sys::eventfd()?)],
            connection: None,
            closed: false,
            paused: false,
            leader: Leader::None,
            ports: HashMap::new(),
            orphans: Vec::new(),
            generation: 0,
            next_tag: 1,
            pending: HashMap::new(),
            done: HashMap::new(),
            quarantine: VecDeque::new(),
            quarantine_bytes: 0,
            retired: VecDeque::new(),
            snapshot: None,
        };
        Ok(Queue {
            index,
            options,
            memory,
            faults,
            stats: Stats::default(),
            state: Mutex::new(state),
            cond: Condvar::new(),
            kick: sys::eventfd()?,
            wake: sys::eventfd()?,
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The call eventfd in use.
    pub fn call_fd(&self) -> Arc<OwnedFd> {
        self.lock()
            .calls
            .last()
            .expect("there is always one")
            .clone()
    }

    /// Replaces the call eventfd; whoever sleeps on the old one goes on with both.
    pub fn swap_call(&self) -> Result<Arc<OwnedFd>, Error> {
        let fd = Arc::new(sys::eventfd()?);
        let mut state = self.lock();
        state.calls.push(fd.clone());
        if state.calls.len() > 16 {
            state.calls.remove(0);
        }
        self.wake_leader(&state);
        Ok(fd)
    }

    /// The connection whose end means that nothing will complete any more.
    pub fn set_connection(&self, connection: Option<Arc<Connection>>) {
        let mut state = self.lock();
        state.closed = false;
        state.connection = connection;
    }

    /// (guest-physical, user) addresses of descriptor table, available ring and used ring.
    pub fn addresses(&self) -> ([u64; 3], [u64; 3]) {
        let state = self.lock();
        (state.ring.gpas(), state.ring.user_addresses())
    }

    /// (available index, used index, requests in flight)
    pub fn indices(&self) -> (u16, u16, usize) {
        let state = self.lock();
        (
            state.ring.avail_idx(),
            state.ring.used_idx(),
            state.ring.n_in_flight(),
        )
    }

    pub(crate) fn wake_leader(&self, state: &State) {
        if state.leader != Leader::None {
            // An eventfd of our own: signalling it cannot fail.
            let _ = sys::signal(self.wake.as_fd());
        }
    }

    /// Kicks the device, needed or not.
    pub fn kick(&self) -> Result<(), Error> {
        self.stats.kicks.fetch_add(1, Ordering::Relaxed);
        sys::signal(self.kick.as_fd())
    }

    /// Kicks the device if it asked for that since the available index was `old`.
    pub(crate) fn kick_if_needed(&self, state: &State, old: u16) -> Result<(), Error> {
        if state.ring.needs_kick(old) {
            return self.kick();
        }
        self.stats.kicks_suppressed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Takes completions from the ring, checks them and hands them to their owners, who are told unless `me` is
    /// the port that asks.
    pub(crate) fn reap(&self, state: &mut State, me: Option<u32>) {
        if state.paused {
            return;
        }
        let (mut tell, mut wake) = (false, false);
        while let Some(popped) = state.ring.pop() {
            let used = match popped {
                Ok(used) => used,
                Err(bad) => {
                    self.faults
                        .record(bad.kind, || format!("queue {}: {}", self.index, bad.text));
                    continue;
                }
            };
            self.stats.completions.fetch_add(1, Ordering::Relaxed);
            if used.tag & PORT_TAG != 0 {
                let (port, slot) = (((used.tag & !PORT_TAG) >> 32) as u32, used.tag as u32);
                if let Some(sink) = state.ports.get_mut(&port) {
                    sink.push((slot, used.len));
                }
                if me != Some(port) {
                    tell = true;
                    wake |= state.leader == Leader::Port(port);
                }
                continue;
            }
            if let Some(pending) = state.pending.remove(&used.tag) {
                let completion = self.complete(pending, used.len);
                state.done.insert(used.tag, completion);
                tell = true;
                wake |= state.leader == Leader::Waiter;
            }
        }
        if tell {
            self.cond.notify_all();
        }
        if wake {
            self.wake_leader(state);
        }
    }

    fn complete(&self, pending: Pending, used: u32) -> Completion {
        let latency = pending.submitted.elapsed();
        let header = pending.exchange.as_ref().and_then(|x| {
            let header = x.verify(pending.unique, used, &self.faults, self.index);
            x.verify_poison(
                x.reply_len(used, header),
                pending.unique,
                &self.faults,
                self.index,
            );
            x.verify_request(&pending.request, pending.unique, &self.faults, self.index);
            header
        });
        Completion {
            used,
            header,
            latency,
            exchange: pending.exchange,
        }
    }

    /// Watches a poisoned, completed buffer for late writes.
    pub(crate) fn quarantine(&self, state: &mut State, span: Arc<Span>) {
        state.quarantine_bytes += span.len();
        state.quarantine.push_back(span);
        while state.quarantine.len() > QUARANTINE_BUFFERS
            || state.quarantine_bytes > QUARANTINE_BYTES
        {
            self.release_oldest(state);
        }
    }

    pub(crate) fn release_oldest(&self, state: &mut State) -> bool {
        let Some(span) = state.quarantine.pop_front() else {
            return false;
        };
        state.quarantine_bytes -= span.len();
        verify_untouched(&span, "a completed request", &self.faults, self.index);
        true
    }
}
