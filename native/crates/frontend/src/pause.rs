//! A queue that stops, goes on and is reset, as a VM that is stopped, continued and rebooted; and the watch over
//! memory that must not change.

use std::sync::Arc;

use crate::error::Error;
use crate::exchange::verify_untouched;
use crate::fault::FaultKind;
use crate::memory::Span;
use crate::ring::Ring;
use crate::state::{Queue, Snapshot, State};

/// Rings of earlier resets that are still watched.
const RETIRED_RINGS: usize = 64;

impl Queue {
    /// Looks at everything that must not change: buffers in quarantine, rings of earlier resets, and, while
    /// stopped, the used ring and the buffers in flight.
    pub fn check(&self) {
        let mut state = self.lock();
        self.check_locked(&mut state);
    }

    fn check_locked(&self, state: &mut State) {
        for span in &state.quarantine {
            verify_untouched(span, "a completed request", &self.faults, self.index);
        }
        let stopped = |what: &str| {
            self.faults.record(FaultKind::WriteWhileStopped, || {
                format!("queue {}: {what}", self.index)
            });
        };
        for ring in state
            .retired
            .iter()
            .filter(|ring| ring.used_idx() != ring.frozen_used_idx())
        {
            stopped(&format!(
                "the used index of a ring before the reset is {}",
                ring.used_idx()
            ));
        }
        let Some(snapshot) = &state.snapshot else {
            return;
        };
        let now = state.ring.used_idx();
        if now != snapshot.used_idx {
            stopped(&format!(
                "used index {now}, at the stop {}",
                snapshot.used_idx
            ));
        }
        for (span, fingerprint) in &snapshot.watched {
            if span.fingerprint(0, span.len()) != *fingerprint {
                stopped(&format!(
                    "the buffer at {:#x} of a request in flight changed",
                    span.gpa()
                ));
            }
        }
    }

    /// Stops the driver's side, as a stopped VM does: nothing is submitted or reaped from now on.
    pub fn pause(&self) {
        let mut state = self.lock();
        state.paused = true;
        self.wake_leader(&state);
    }

    /// To be called once the device answered GET_VRING_BASE: from now on nothing may change.
    pub fn freeze(&self) {
        let mut state = self.lock();
        let watched = state.ring.in_flight().filter_map(|f| f.watch.clone());
        let watched = watched
            .map(|span| (span.clone(), span.fingerprint(0, span.len())))
            .collect();
        state.snapshot = Some(Snapshot {
            used_idx: state.ring.used_idx(),
            watched,
        });
    }

    /// Checks that nothing changed since [`Queue::freeze`]; after that the device may write again.
    pub fn thaw(&self) {
        let mut state = self.lock();
        self.check_locked(&mut state);
        state.snapshot = None;
    }

    /// The driver's side goes on.
    pub fn resume(&self) {
        let mut state = self.lock();
        state.paused = false;
        self.wake_leader(&state);
        self.cond.notify_all();
    }

    /// Makes a new, empty ring at `base`, as a rebooted guest does; the old one and the buffers in flight are
    /// watched from now on. Their requests end with [`Error::Reset`].
    pub fn reset(&self, base: u16) -> Result<(), Error> {
        let ring = Ring::new(&self.memory, self.options.ring, base)?;
        let mut state = self.lock();
        self.check_locked(&mut state);
        state.snapshot = None;
        let mut old = std::mem::replace(&mut state.ring, ring);
        old.freeze();
        let spans: Vec<Arc<Span>> = old.drain_watched();
        for span in spans {
            span.poison(0, span.len());
            self.quarantine(&mut state, span);
        }
        state.retired.push_back(old);
        if state.retired.len() > RETIRED_RINGS {
            state.retired.pop_front();
        }
        state.pending.clear();
        state.generation += 1;
        state.paused = false;
        self.wake_leader(&state);
        self.cond.notify_all();
        Ok(())
    }
}
