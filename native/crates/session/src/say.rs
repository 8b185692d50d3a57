//! One line on stderr for people, by processes that must not depend on anybody reading it.
//!
//! `eprintln!` panics when the pipe behind stderr is broken, and blocks when it is full: a guest must not lose its disk
//! because a log collector died. What cannot be written at once is lost. A guest must not fill its host's disk with
//! messages either, so a process says a bounded number of lines in a while, and how many it kept back.

use std::sync::atomic::{AtomicU64, Ordering};

/// Length of the time in which at most `LINES` lines are said, in seconds.
const WINDOW_S: u64 = 10;
/// More than any trouble of one device needs.
const LINES: u64 = 64;

/// What was said in the current window of time. Threads may race for it: then a line more or less is said.
struct Budget {
    window: AtomicU64,
    said: AtomicU64,
    kept_back: AtomicU64,
}

static BUDGET: Budget = Budget::new();

impl Budget {
    const fn new() -> Budget {
        Budget {
            window: AtomicU64::new(0),
            said: AtomicU64::new(0),
            kept_back: AtomicU64::new(0),
        }
    }

    /// Whether one more line may be said at `now_s`, and how many were kept back since the last one that was.
    fn take(&self, now_s: u64) -> Option<u64> {
        let window = now_s / WINDOW_S;
        if self.window.swap(window, Ordering::Relaxed) != window {
            self.said.store(0, Ordering::Relaxed);
        }
        if self.said.fetch_add(1, Ordering::Relaxed) >= LINES {
            self.kept_back.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.kept_back.swap(0, Ordering::Relaxed))
    }
}

fn now_s() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec that we own.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec.unsigned_abs()
}

/// Writes `text` and a newline to stderr if that does not block and not too much was said; see [`say!`](crate::say).
pub fn say_line(text: &str) {
    let line = match BUDGET.take(now_s()) {
        None => return,
        Some(0) => format!("{text}\n"),
        Some(kept_back) => {
            format!("{text} ({kept_back} messages before this one were kept back)\n")
        }
    };
    let mut poll = libc::pollfd {
        fd: 2,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one pollfd that we own, then a write from our buffer. Errors are for nobody.
    unsafe {
        if libc::poll(&mut poll, 1, 0) > 0 && poll.revents & libc::POLLOUT != 0 {
            libc::write(2, line.as_ptr().cast(), line.len());
        }
    }
}

/// Like `eprintln!`, but never panics and never blocks.
#[macro_export]
macro_rules! say {
    ($($args:tt)*) => { $crate::say::say_line(&format!($($args)*)) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_kept_back_and_counted() {
        let budget = Budget::new();
        for _ in 0..LINES {
            assert_eq!(budget.take(100), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(budget.take(109), None);
        }
        assert_eq!(budget.take(110), Some(1000));
        assert_eq!(budget.take(110), Some(0));
    }
}
