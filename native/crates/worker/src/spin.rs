//! The short wait before a sleep.
//!
//! To be woken costs ten microseconds on another processor, thirty and more when that is virtual: longer than most
//! requests take to serve. When a thread sleeps after every batch, so does the driver, and both spend their time being
//! woken. So a thread looks at its rings a little longer, for as long as a driver needs that was woken by the last
//! answer. How long adapts: a wait that found something makes the next one longer, one in vain makes it shorter, down
//! to none at all, so that a slow driver costs next to no processor time here: one wait in so many sleeps, which finds
//! out whether it has become fast.

use session::clock::now_ns;

const MIN_NS: u64 = 2_000;
/// After so many sleeps without a wait a long one is tried again.
const PROBE_EVERY: u32 = 64;

/// How long the next wait will be.
pub struct Spin {
    budget_ns: u64,
    max_ns: u64,
    sleeps: u32,
}

impl Spin {
    /// Waits of at most `max_ns`; with 0 there are none.
    pub fn new(max_ns: u64) -> Spin {
        Spin {
            budget_ns: 0,
            max_ns,
            sleeps: 0,
        }
    }

    /// Waits for `ready`; true when it came true in time.
    pub fn wait(&mut self, ready: impl Fn() -> bool) -> bool {
        if self.max_ns == 0 {
            return false;
        }
        let probe = self.budget_ns == 0;
        if probe {
            self.sleeps += 1;
            if self.sleeps < PROBE_EVERY {
                return false;
            }
            self.sleeps = 0;
            self.budget_ns = self.max_ns;
        }
        let end = now_ns() + self.budget_ns;
        loop {
            for _ in 0..16 {
                if ready() {
                    self.budget_ns = (self.budget_ns * 2).min(self.max_ns);
                    return true;
                }
                std::hint::spin_loop();
            }
            if now_ns() >= end {
                break;
            }
        }
        self.budget_ns /= 2;
        if probe || self.budget_ns < MIN_NS {
            self.budget_ns = 0;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_NS: u64 = 50_000;

    #[test]
    fn waits_in_vain_end() {
        let mut spin = Spin::new(MAX_NS);
        let looks = std::cell::Cell::new(0);
        for _ in 0..PROBE_EVERY * 4 {
            let before = looks.get();
            assert!(!spin.wait(|| {
                looks.set(looks.get() + 1);
                false
            }));
            assert_eq!(spin.budget_ns, 0, "a wait in vain is followed by sleeps");
            assert_eq!(looks.get() > before, spin.sleeps == 0);
        }
        assert!(looks.get() > 0, "now and then a wait is tried");
    }

    #[test]
    fn a_busy_driver_is_waited_for() {
        let mut spin = Spin::new(MAX_NS);
        let hits = (0..PROBE_EVERY * 2).filter(|_| spin.wait(|| true)).count();
        assert!(hits as u32 > PROBE_EVERY / 2);
        assert_eq!(spin.budget_ns, MAX_NS);
    }

    #[test]
    fn without_polling_nobody_looks() {
        let mut spin = Spin::new(0);
        assert!((0..PROBE_EVERY * 2).all(|_| !spin.wait(|| panic!("a look"))));
    }
}
