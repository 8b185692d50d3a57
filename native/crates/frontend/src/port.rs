//! The way by which a native loop uses a queue: many requests at once, completions in batches, no allocation.
//!
//! While a port is open, its thread leads the queue, unless another port does already.

use std::sync::MutexGuard;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::exchange::Exchange;
use crate::state::{Leader, PORT_TAG, Queue, State};
use crate::sys::{self, Until};

/// How a loop waits for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Asks for an interrupt and sleeps on the call eventfd, as a guest's driver.
    Sleep,
    /// Asks for no interrupts and looks at the used ring all the time.
    Spin,
}

/// How often a spinning loop looks whether the back-end is still there.
const SPINS_PER_LOOK: u32 = 1 << 14;

static NEXT_ID: AtomicU32 = AtomicU32::new(1);

/// An open port. Dropped, it must have nothing in flight: see [`Port::abandon`].
pub struct Port<'a> {
    queue: &'a Queue,
    id: u32,
    generation: u64,
    wait: Wait,
}

impl<'a> Port<'a> {
    pub fn open(queue: &'a Queue, wait: Wait) -> Self {
        // Ids are only compared inside a queue; 31 bits fit between the tag's mark and the slot.
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed) & 0x7fff_ffff;
        let mut state = queue.lock();
        state.ports.insert(id, Vec::new());
        queue.wake_leader(&state);
        let generation = state.generation;
        drop(state);
        Port {
            queue,
            id,
            generation,
            wait,
        }
    }

    fn check(&self, state: &State) -> Result<(), Error> {
        if state.generation != self.generation {
            return Err(Error::Reset);
        }
        if state.closed {
            return Err(Error::Closed);
        }
        Ok(())
    }

    /// Waits while the queue is paused; returns whether it was.
    fn wait_while_paused<'s>(
        &self,
        mut state: MutexGuard<'s, State>,
    ) -> (MutexGuard<'s, State>, bool) {
        let was = state.paused;
        while state.paused {
            state = self
                .queue
                .cond
                .wait(state)
                .unwrap_or_else(|e| e.into_inner());
        }
        (state, was)
    }

    /// Makes exchanges available, each as the slot beside it, and kicks once if the device wants that; returns
    /// how many the ring had room for.
    pub fn submit<'x>(
        &self,
        batch: impl Iterator<Item = (u32, &'x Exchange)>,
    ) -> Result<usize, Error> {
        let (mut state, _) = self.wait_while_paused(self.queue.lock());
        self.check(&state)?;
        let old = state.ring.avail_idx();
        let mut n = 0;
        for (slot, exchange) in batch {
            let (descs, table) = exchange.chain();
            let tag = PORT_TAG | u64::from(self.id) << 32 | u64::from(slot);
            match state.ring.add(descs, table, tag, exchange.watch()) {
                Ok(_) => n += 1,
                Err(Error::RingFull) => break,
                Err(e) => return Err(e),
            }
        }
        if n > 0 {
            self.queue.kick_if_needed(&state, old)?;
        }
        Ok(n)
    }

    /// Appends completions (slot, used length) to `out`, waiting up to `timeout` for the first. Time in which the
    /// queue is paused does not count.
    pub fn completions(&self, timeout: Duration, out: &mut Vec<(u32, u32)>) -> Result<(), Error> {
        let mut deadline = Instant::now() + timeout;
        let mut spins = 0u32;
        let mut state = self.queue.lock();
        loop {
            let was_paused;
            (state, was_paused) = self.wait_while_paused(state);
            if was_paused {
                deadline = Instant::now() + timeout;
            }
            self.queue.reap(&mut state, Some(self.id));
            if let Some(sink) = state
                .ports
                .get_mut(&self.id)
                .filter(|sink| !sink.is_empty())
            {
                out.append(sink);
                return Ok(());
            }
            self.check(&state)?;
            let lead =
                matches!(state.leader, Leader::None) || state.leader == Leader::Port(self.id);
            if lead && self.wait == Wait::Spin {
                state.leader = Leader::Port(self.id);
                state.ring.disable_interrupts();
                drop(state);
                spins += 1;
                if spins % SPINS_PER_LOOK == 0 {
                    self.look(deadline)?;
                }
                std::hint::spin_loop();
                state = self.queue.lock();
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout);
            }
            if !lead {
                state = self
                    .queue
                    .cond
                    .wait_timeout(state, left)
                    .unwrap_or_else(|e| e.into_inner())
                    .0;
                continue;
            }
            state.leader = Leader::Port(self.id);
            if state.ring.enable_interrupts() {
                continue;
            }
            state = self.queue.sleep(state, left)?;
            state.ring.disable_interrupts();
        }
    }

    /// The rare part of spinning: is the deadline past, is the back-end gone?
    fn look(&self, deadline: Instant) -> Result<(), Error> {
        if Instant::now() >= deadline {
            return Err(Error::Timeout);
        }
        let connection = self.queue.lock().connection.clone();
        let Some(connection) = connection else {
            return Ok(());
        };
        if sys::poll(&[Until::HungUp(connection.as_raw_fd())], Duration::ZERO)? != 0 {
            self.queue.lock().closed = true;
        }
        Ok(())
    }

    /// Hands exchanges that are still in flight to the queue, which keeps them: the device may yet use them.
    pub fn abandon(self, exchanges: impl Iterator<Item = Exchange>) {
        self.queue.lock().orphans.extend(exchanges);
    }
}

impl Drop for Port<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.ports.remove(&self.id);
        if state.leader == Leader::Port(self.id) {
            state.leader = Leader::None;
        }
        self.queue.cond.notify_all();
    }
}
