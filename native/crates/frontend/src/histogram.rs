//! Latencies in log-linear buckets: 64 per power of two, so that a percentile is at most 1.6 % off.

const SUB_BITS: u32 = 6;
const SUBS: usize = 1 << SUB_BITS;
const BUCKETS: usize = (64 - SUB_BITS as usize + 1) * SUBS;

/// Counts of values (nanoseconds), with sum and maximum exact.
#[derive(Clone)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum: u128,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            buckets: vec![0; BUCKETS],
            count: 0,
            sum: 0,
            max: 0,
        }
    }
}

fn bucket(value: u64) -> usize {
    let Some(exponent) = value.checked_ilog2().filter(|&e| e >= SUB_BITS) else {
        return value as usize;
    };
    let sub = (value >> (exponent - SUB_BITS)) as usize & (SUBS - 1);
    (exponent - SUB_BITS + 1) as usize * SUBS + sub
}

/// The largest value of a bucket.
fn upper(bucket: usize) -> u64 {
    let (row, sub) = (bucket / SUBS, (bucket % SUBS) as u64);
    match row.checked_sub(1) {
        None => sub,
        Some(shift) => (((SUBS as u64 + sub) << shift) - 1) + (1 << shift),
    }
}

impl Histogram {
    pub fn record(&mut self, value: u64) {
        if let Some(count) = self.buckets.get_mut(bucket(value)) {
            *count += 1;
        }
        self.count += 1;
        self.sum += u128::from(value);
        self.max = self.max.max(value);
    }

    pub fn merge(&mut self, other: &Histogram) {
        self.buckets
            .iter_mut()
            .zip(&other.buckets)
            .for_each(|(a, b)| *a += b);
        self.count += other.count;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn max(&self) -> u64 {
        self.max
    }

    pub fn mean(&self) -> u64 {
        (self.sum / u128::from(self.count.max(1))) as u64
    }

    /// What occurred, in ascending order: values up to the first number, so many of them.
    pub fn steps(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let filled = self.buckets.iter().enumerate().filter(|(_, n)| **n > 0);
        filled.map(|(i, n)| (upper(i).min(self.max), *n))
    }

    /// The value that `per_million` of all values do not exceed; 0 without values.
    pub fn percentile(&self, per_million: u64) -> u64 {
        let rank = (u128::from(self.count) * u128::from(per_million))
            .div_ceil(1_000_000)
            .max(1) as u64;
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return upper(i).min(self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_their_values_and_are_narrow() {
        let mut last = 0;
        for value in
            (0..200).chain((6..64).flat_map(|e| [(1u64 << e) - 1, 1 << e, (1 << e) + (1 << e) / 3]))
        {
            let b = bucket(value);
            assert!(b < BUCKETS && b >= bucket(value.saturating_sub(1)));
            assert!(
                upper(b) >= value && upper(b) - value <= value / 63,
                "{value} {}",
                upper(b)
            );
            last = last.max(b);
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert!(last < BUCKETS);
    }

    #[test]
    fn percentiles_and_merging() {
        let (mut low, mut high) = (Histogram::default(), Histogram::default());
        (1..=500).for_each(|v| low.record(v * 1000));
        (501..=1000).for_each(|v| high.record(v * 1000));
        low.merge(&high);
        let close =
            |per_million, want: u64| low.percentile(per_million).abs_diff(want) <= want / 60;
        assert!(close(500_000, 500_000) && close(990_000, 990_000) && close(0, 1000));
        assert_eq!(
            (low.percentile(1_000_000), low.max(), low.mean()),
            (1_000_000, 1_000_000, 500_500)
        );
        assert_eq!(low.steps().map(|(_, n)| n).sum::<u64>(), 1000);
        assert_eq!(low.steps().last().map(|(value, _)| value), Some(1_000_000));
        assert!(low.steps().is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(Histogram::default().percentile(500_000), 0);
    }
}
