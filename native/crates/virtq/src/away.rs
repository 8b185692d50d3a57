//! Guest addresses whose memory has been taken away, and may come back.
//!
//! A VMM changes its memory table one region at a time, under rings that run: a request that is taken between
//! REM_MEM_REG and ADD_MEM_REG names addresses that are nobody's for the moment. They are told apart from addresses that
//! never were memory, which are the driver's fault.

/// More ranges than any table has slots. Beyond it the lowest addresses are forgotten: they count as a driver's fault.
const MAX_RANGES: usize = 1024;

/// Disjoint ranges of guest addresses, sorted. Ends are exclusive; no range reaches the end of the address space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Away {
    ranges: Vec<(u64, u64)>,
}

impl Away {
    /// The memory from `start` to `end` has been taken away.
    pub fn take(&mut self, start: u64, end: u64) {
        self.give(start, end);
        let at = self.ranges.partition_point(|r| r.0 < start);
        self.ranges.insert(at, (start, end));
        if self.ranges.len() > MAX_RANGES {
            self.ranges.remove(0);
        }
    }

    /// There is memory from `start` to `end` again.
    pub fn give(&mut self, start: u64, end: u64) {
        if !self.ranges.iter().any(|r| r.0 < end && start < r.1) {
            return;
        }
        self.ranges = self
            .ranges
            .iter()
            .flat_map(|&(from, to)| [(from, to.min(start)), (from.max(end), to)])
            .filter(|(from, to)| from < to)
            .collect();
    }

    /// Whether `addr` was memory and is none now.
    pub fn contains(&self, addr: u64) -> bool {
        let at = self.ranges.partition_point(|r| r.0 <= addr);
        at > 0 && addr < self.ranges[at - 1].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_taken_and_given_back_in_parts() {
        let mut away = Away::default();
        away.take(100, 200);
        away.take(300, 400);
        assert!([100, 199, 300, 399].iter().all(|&a| away.contains(a)));
        assert!([0, 99, 200, 299, 400].iter().all(|&a| !away.contains(a)));
        away.give(150, 350);
        assert_eq!(away.ranges, [(100, 150), (350, 400)]);
        away.take(120, 370);
        assert!((100..400).all(|a| away.contains(a)));
        away.give(0, 1000);
        assert_eq!(away, Away::default());
    }

    /// Against a set of single addresses.
    #[test]
    fn any_order_of_changes() {
        let mut seed = 7u64;
        let mut random = |n: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % n
        };
        let (mut away, mut set) = (Away::default(), std::collections::HashSet::new());
        for _ in 0..2000 {
            let start = random(60);
            let end = start + 1 + random(20);
            if random(2) == 0 {
                away.take(start, end);
                set.extend(start..end);
            } else {
                away.give(start, end);
                set.retain(|a| !(start..end).contains(a));
            }
            for addr in 0..90 {
                assert_eq!(away.contains(addr), set.contains(&addr));
            }
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut away = Away::default();
        for i in 0..2 * MAX_RANGES as u64 {
            away.take(2 * i, 2 * i + 1);
        }
        assert_eq!(away.ranges.len(), MAX_RANGES);
        assert!(away.contains(4 * MAX_RANGES as u64 - 2));
    }
}
