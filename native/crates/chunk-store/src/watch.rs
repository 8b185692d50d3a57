//! A thread that looks, for whoever sleeps in an event loop, whether something has changed in shared memory.
//!
//! Daemons that share a cache directory tell each other nothing: who waits for what another one fetches has to look, again
//! and again. In an interpreter, a look that finds nothing costs a hundred times as much as here.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::sys::eventfd;

/// How long a change goes unseen, at most: a small part of what a chunk takes from a registry. Dozens of daemons may wait
/// for the same chunk; those that see it at the same moment want a processor at the same moment.
const LOOK: Duration = Duration::from_millis(25);

/// What became of something that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing yet.
    Same,
    /// It is there.
    Came,
    /// It will not come.
    Gone,
}

struct State<T> {
    /// What is to be watched from now on, until the thread has taken it.
    set: Option<Vec<T>>,
    /// The thread has nothing to look at, and waits for something.
    sleeps: bool,
    ends: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    event: File,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks without the lock: whoever sets what is watched must not wait for this thread, which may wait for a processor.
    fn run(&self, look: impl Fn(&T) -> Seen, came: impl Fn()) {
        let mut watched = Vec::new();
        while let Some(set) = self.next(watched.is_empty()) {
            watched = set.unwrap_or(watched);
            let (mut any_came, mut any_gone) = (false, false);
            watched.retain(|each| {
                let seen = look(each);
                any_came |= seen == Seen::Came;
                any_gone |= seen == Seen::Gone;
                seen == Seen::Same
            });
            if any_came {
                came();
            }
            if any_gone {
                let _ = (&self.event).write(&1u64.to_ne_bytes());
            }
        }
    }

    /// Waits for the next look, or, with nothing to look at, until there is something. What is watched from now on, if that
    /// has changed; None at the end.
    fn next(&self, nothing: bool) -> Option<Option<Vec<T>>> {
        let mut state = self.lock();
        state.sleeps = nothing;
        let mut state = if nothing {
            self.changed
                .wait_while(state, |state| state.set.is_none() && !state.ends)
                .unwrap_or_else(PoisonError::into_inner)
        } else {
            self.changed
                .wait_timeout_while(state, LOOK, |state| !state.ends)
                .unwrap_or_else(PoisonError::into_inner)
                .0
        };
        (!state.ends).then(|| state.set.take())
    }
}

/// The thread, and an eventfd that it writes when something will not come.
pub struct Watch<T> {
    shared: Arc<Shared<T>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Watch<T> {
    /// Watches nothing yet. `came` is called when something is there; neither it nor `look` may block or panic.
    pub fn new(
        look: impl Fn(&T) -> Seen + Send + 'static,
        came: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                set: None,
                sleeps: false,
                ends: false,
            }),
            changed: Condvar::new(),
            event: eventfd()?,
        });
        let looking = Arc::clone(&shared);
        let thread = Builder::new()
            .name("watch".into())
            .stack_size(128 << 10)
            .spawn(move || looking.run(look, came))?;
        Ok(Watch {
            shared,
            thread: Some(thread),
        })
    }

    /// Readable when something has gone, until [`Watch::seen`].
    pub fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// Watches these, and nothing else: each of them until it has come or gone.
    pub fn set(&self, watched: Vec<T>) {
        let mut state = self.shared.lock();
        state.set = Some(watched);
        let sleeps = state.sleeps;
        drop(state);
        if sleeps {
            self.shared.changed.notify_one();
        }
    }

    /// What has gone has been noted.
    pub fn seen(&self) {
        let _ = (&self.shared.event).read(&mut [0; 8]);
    }
}

impl<T> Drop for Watch<T> {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
