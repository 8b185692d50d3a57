//! The short wait before a sleep.
//!
//! To be woken costs some ten microseconds on another processor, which is longer than most requests take to serve. A
//! driver that keeps the queue filled comes back within less, so a thread looks at its rings a little longer before it
//! sleeps. How long adapts: a wait that found something makes the next one longer, one in vain makes it shorter, down
//! to none at all, so that a driver that sleeps itself costs no processor time here.

use session::clock::now_ns;

const MAX_NS: u64 = 16_000;
const MIN_NS: u64 = 2_000;
/// After so many sleeps without a wait one is tried again.
const PROBE_EVERY: u32 = 64;

/// How long the next wait will be.
#[derive(Default)]
pub struct Spin {
    budget_ns: u64,
    sleeps: u32,
}

impl Spin {
    /// Waits for `ready`; true when it came true in time.
    pub fn wait(&mut self, ready: impl Fn() -> bool) -> bool {
        if self.budget_ns == 0 {
            self.sleeps += 1;
            if self.sleeps < PROBE_EVERY {
                return false;
            }
            self.sleeps = 0;
            self.budget_ns = MIN_NS;
        }
        let end = now_ns() + self.budget_ns;
        loop {
            for _ in 0..16 {
                if ready() {
                    self.budget_ns = (self.budget_ns * 2).min(MAX_NS);
                    return true;
                }
                std::hint::spin_loop();
            }
            if now_ns() >= end {
                break;
            }
        }
        self.budget_ns /= 2;
        if self.budget_ns < MIN_NS {
            self.budget_ns = 0;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_in_vain_end() {
        let mut spin = Spin::default();
        for _ in 0..PROBE_EVERY * 4 {
            assert!(!spin.wait(|| false));
        }
        assert!(spin.budget_ns <= MIN_NS);
    }

    #[test]
    fn a_busy_driver_is_waited_for() {
        let mut spin = Spin::default();
        let hits = (0..PROBE_EVERY * 2).filter(|_| spin.wait(|| true)).count();
        assert!(hits as u32 > PROBE_EVERY / 2);
        assert_eq!(spin.budget_ns, MAX_NS);
    }
}
