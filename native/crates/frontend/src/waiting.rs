//! How threads wait on a queue: one leads and sleeps on the eventfds, the others on the condition variable.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::fault::FaultKind;
use crate::fuse::OutHeader;
use crate::state::{Leader, Queue, State};
use crate::sys::{self, Until};

/// Between a completion and its interrupt, on a busy host.
const INTERRUPT_GRACE: Duration = Duration::from_secs(1);

impl Queue {
    /// Waits until `ready` returns something; it is called with the ring reaped.
    pub(crate) fn wait_until<T>(
        &self,
        timeout: Duration,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            self.reap(&mut state, None);
            if let Some(result) = ready(&mut state) {
                return Ok(result);
            }
            if state.closed {
                return Err(Error::Closed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout);
            }
            if state.leader != Leader::None || !state.ports.is_empty() || state.paused {
                state = self
                    .cond
                    .wait_timeout(state, left)
                    .unwrap_or_else(|e| e.into_inner())
                    .0;
                continue;
            }
            if state.ring.enable_interrupts() {
                continue;
            }
            state.leader = Leader::Waiter;
            state = self.sleep(state, left)?;
            if state.leader == Leader::Waiter {
                state.leader = Leader::None;
            }
            // Somebody else may have to lead now.
            self.cond.notify_all();
        }
    }

    /// Sleeps on the eventfds with the lock released, for the leader, who has asked for an interrupt.
    ///
    /// Errors: [`Error::Timeout`] when completions came without one, which a driver would not have noticed.
    pub(crate) fn sleep<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        timeout: Duration,
    ) -> Result<MutexGuard<'a, State>, Error> {
        let calls = state.calls.clone();
        let connection = state.connection.clone();
        drop(state);
        let mut fds: Vec<Until> = calls
            .iter()
            .map(|fd| Until::Readable(fd.as_raw_fd()))
            .collect();
        fds.push(Until::Readable(self.wake.as_raw_fd()));
        fds.extend(connection.as_ref().map(|c| Until::HungUp(c.as_raw_fd())));
        let mut mask = sys::poll(&fds, timeout);
        let mut state = self.lock();
        if matches!(mask, Ok(0)) && !state.paused && state.ring.has_used() {
            // It may have come at the last moment, with its interrupt on the way.
            drop(state);
            mask = sys::poll(&fds, INTERRUPT_GRACE);
            state = self.lock();
            if matches!(mask, Ok(0)) {
                self.faults.record(FaultKind::InterruptMissing, || {
                    format!("queue {}, used index {}", self.index, state.ring.used_idx())
                });
                state.leader = Leader::None;
                return Err(Error::Timeout);
            }
        }
        let mask = match mask {
            Ok(mask) => mask,
            Err(e) => {
                state.leader = Leader::None;
                return Err(e);
            }
        };
        for (i, call) in calls.iter().enumerate() {
            if mask & 1 << i != 0 {
                self.stats
                    .interrupts
                    .fetch_add(sys::take_signal(call.as_fd()), Ordering::Relaxed);
            }
        }
        if mask & 1 << calls.len() != 0 {
            sys::take_signal(self.wake.as_fd());
        }
        if mask & 2 << calls.len() != 0 {
            state.closed = true;
        }
        Ok(state)
    }

    /// Waits until request `token` completes. Its data stay for [`Queue::take`].
    pub fn wait(
        &self,
        token: u64,
        timeout: Duration,
    ) -> Result<(u32, Option<OutHeader>, Duration), Error> {
        self.wait_until(timeout, |state| {
            if let Some(done) = state.done.get(&token) {
                return Some(Ok((done.used, done.header, done.latency)));
            }
            (!state.pending.contains_key(&token)).then_some(Err(Error::Reset))
        })?
    }

    /// Tokens that are completed and not taken, waiting up to `timeout` for the first.
    pub fn completed(&self, timeout: Duration) -> Result<Vec<u64>, Error> {
        let found = self.wait_until(timeout, |state| {
            (!state.done.is_empty()).then(|| state.done.keys().copied().collect::<Vec<u64>>())
        });
        match found {
            Err(Error::Timeout) => Ok(Vec::new()),
            other => other,
        }
    }
}
