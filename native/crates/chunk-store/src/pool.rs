//! Threads that decode and verify, and an eventfd that says when something is done.
//!
//! Whoever hands jobs over runs an event loop in an interpreter with one lock. Threads of that interpreter would have to
//! take its lock to come back with a result, and while one of them holds it and waits for a processor, the event loop
//! waits too. These threads never see the lock.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use crate::sys::eventfd;

type Job<T> = Box<dyn FnOnce() -> T + Send>;

struct State<T> {
    jobs: VecDeque<(u64, Job<T>)>,
    done: VecDeque<(u64, T)>,
    n_idle: usize,
    ends: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    work: Condvar,
    event: File,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Jobs run without the lock, so nothing was left half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.ends {
            let Some((ticket, job)) = state.jobs.pop_front() else {
                state.n_idle += 1;
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.n_idle -= 1;
                continue;
            };
            drop(state);
            let result = job();
            self.lock().done.push_back((ticket, result));
            // Without the lock: who wakes up takes it at once. It cannot get full: each result adds 1.
            let _ = (&self.event).write(&1u64.to_ne_bytes());
            state = self.lock();
        }
    }
}

/// At most so many threads, started when they are needed. Jobs must not panic.
pub struct Pool<T> {
    shared: Arc<Shared<T>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    n_threads: usize,
}

impl<T: Send + 'static> Pool<T> {
    pub fn new(n_threads: usize) -> io::Result<Self> {
        Ok(Pool {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    jobs: VecDeque::new(),
                    done: VecDeque::new(),
                    n_idle: 0,
                    ends: false,
                }),
                work: Condvar::new(),
                event: eventfd()?,
            }),
            threads: Mutex::new(Vec::new()),
            n_threads: n_threads.max(1),
        })
    }

    /// Readable while there are results to take, and then until [`Pool::take`] has found none.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// Runs `job` on a thread of the pool. Its result comes back with `ticket`.
    pub fn submit(&self, ticket: u64, job: impl FnOnce() -> T + Send + 'static) -> io::Result<()> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.shared.lock();
        // Those that were woken for a job of before have not taken it yet.
        if state.n_idle <= state.jobs.len() && threads.len() < self.n_threads {
            let shared = Arc::clone(&self.shared);
            let started = Builder::new()
                .name("ingest".into())
                .spawn(move || shared.run());
            match started {
                Ok(thread) => threads.push(thread),
                // Those that there are do it later.
                Err(e) if threads.is_empty() => return Err(e),
                Err(_) => {}
            }
        }
        state.jobs.push_back((ticket, Box::new(job)));
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }

    /// The next result, in the order in which jobs ended. Whoever was told takes until there is none.
    pub fn take(&self) -> Option<(u64, T)> {
        let mut state = self.shared.lock();
        let taken = state.done.pop_front();
        if taken.is_none() {
            let _ = (&self.shared.event).read(&mut [0; 8]);
        }
        taken
    }
}

impl<T> Drop for Pool<T> {
    /// Waits for the jobs that run; those that have not begun never do.
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.work.notify_all();
        let threads = self
            .threads
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // A panic in a job has been reported by its hook; there is nothing left to do about it.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    fn ready(pool: &Pool<u64>, timeout_ms: i32) -> bool {
        let mut poll = libc::pollfd {
            fd: std::os::fd::AsRawFd::as_raw_fd(&pool.event()),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid entry.
        unsafe { libc::poll(&mut poll, 1, timeout_ms) == 1 }
    }

    fn take_all(pool: &Pool<u64>, n: usize) -> Vec<(u64, u64)> {
        let mut got = Vec::new();
        while got.len() < n {
            assert!(ready(pool, 10_000), "{got:?}");
            got.extend(pool.take());
        }
        got
    }

    #[test]
    fn every_job_comes_back_once_with_its_ticket() {
        let pool = Pool::new(2).unwrap();
        for ticket in 0..1000 {
            pool.submit(ticket, move || ticket * 3).unwrap();
        }
        let got = take_all(&pool, 1000);
        assert_eq!(got.len(), 1000);
        assert!(got.iter().all(|(ticket, result)| *result == ticket * 3));
        let tickets: HashSet<u64> = got.iter().map(|(ticket, _)| *ticket).collect();
        assert_eq!(tickets.len(), 1000);
        // Told is until none is found, and of the last results perhaps after they have been taken, once for each thread.
        let quiet = || {
            let quiet = !ready(&pool, 0);
            assert_eq!(pool.take(), None);
            quiet
        };
        assert!((0..4).any(|_| quiet()));
    }

    #[test]
    fn jobs_run_beside_each_other_as_far_as_there_are_threads() {
        let pool = Pool::new(2).unwrap();
        let (first, at_first) = mpsc::channel();
        let (second, at_second) = mpsc::channel();
        pool.submit(1, move || {
            second.send(()).unwrap();
            at_first.recv().unwrap();
            1
        })
        .unwrap();
        // Ends the first one: in one thread it would never run.
        pool.submit(2, move || {
            at_second.recv().unwrap();
            first.send(()).unwrap();
            2
        })
        .unwrap();
        assert_eq!(take_all(&pool, 2).len(), 2);
        assert_eq!(pool.threads.lock().unwrap().len(), 2);
    }

    #[test]
    fn one_job_at_a_time_needs_one_thread() {
        let pool = Pool::new(4).unwrap();
        for ticket in 0..20 {
            pool.submit(ticket, move || ticket).unwrap();
            take_all(&pool, 1);
            // Until the thread sleeps again: it may not have when its result is seen.
            while pool.shared.lock().n_idle == 0 {
                thread::yield_now();
            }
        }
        assert_eq!(pool.threads.lock().unwrap().len(), 1);
    }

    #[test]
    fn the_end_waits_for_what_runs_and_forgets_the_rest() {
        let pool = Pool::new(1).unwrap();
        let (begun, has_begun) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        let ended = Arc::new(Mutex::new(Vec::new()));
        let (one, two) = (Arc::clone(&ended), Arc::clone(&ended));
        pool.submit(1, move || {
            begun.send(()).unwrap();
            may_go.recv().unwrap();
            one.lock().unwrap().push(1);
            1
        })
        .unwrap();
        pool.submit(2, move || {
            two.lock().unwrap().push(2);
            2
        })
        .unwrap();
        has_begun.recv().unwrap();
        let shared = Arc::clone(&pool.shared);
        let end = thread::spawn(move || drop(pool));
        while !shared.lock().ends {
            thread::yield_now();
        }
        go.send(()).unwrap();
        end.join().unwrap();
        assert_eq!(*ended.lock().unwrap(), [1]);
    }
}
