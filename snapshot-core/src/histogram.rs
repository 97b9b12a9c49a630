//! Durations, counted in 8 linear steps per power of two, by any number of threads without a lock.
//!
//! A plain log2 histogram cannot tell 5 us from 9; this one is right to 12.5 %. A library's histogram either
//! allocates or wants `&mut`: the fault path can afford neither.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::address::as_index;

const STEP_BITS: u32 = 3;
const STEPS: u64 = 1 << STEP_BITS;
/// Values up to 2^42 ns, more than an hour, have a bucket of their own.
const BUCKETS: usize = as_index(42 * STEPS);

/// Histogram of durations.
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    count: AtomicU64,
    sum_ns: AtomicU64,
    max_ns: AtomicU64,
}

/// What a histogram holds, in numbers for a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// Number of durations.
    pub count: u64,
    /// Their sum, in nanoseconds.
    pub sum_ns: u64,
    /// Median, in nanoseconds.
    pub p50_ns: u64,
    /// 90th percentile, in nanoseconds.
    pub p90_ns: u64,
    /// 99th percentile, in nanoseconds.
    pub p99_ns: u64,
    /// Longest, in nanoseconds.
    pub max_ns: u64,
}

/// The same, with all that is known of how they are distributed: for those who add up several histograms.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Distribution {
    /// In numbers.
    #[serde(flatten)]
    pub summary: Summary,
    /// For each bucket that is not empty, in ascending order: its longest duration in nanoseconds, and how many lie in
    /// it.
    pub buckets: Vec<(u64, u64)>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicU64::new(0),
            sum_ns: AtomicU64::new(0),
            max_ns: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(ns)].fetch_add(1, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
        self.max_ns.fetch_max(ns, Ordering::Relaxed);
    }

    /// Count, sum, percentiles (each the upper edge of its bucket, at most the longest) and maximum.
    #[must_use]
    pub fn summary(&self) -> Summary {
        self.summary_of(&self.counts())
    }

    /// The same with its buckets, which add up to the count.
    #[must_use]
    pub fn distribution(&self) -> Distribution {
        let counts = self.counts();
        let filled = counts.iter().enumerate().filter(|(_, count)| **count > 0);
        let buckets = filled.map(|(bucket, count)| (upper_edge_ns(bucket), *count)).collect();
        Distribution { summary: self.summary_of(&counts), buckets }
    }

    fn counts(&self) -> Vec<u64> {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect()
    }

    fn summary_of(&self, counts: &[u64]) -> Summary {
        let max_ns = self.max_ns.load(Ordering::Relaxed);
        let total: u64 = counts.iter().sum();
        let quantile = |per_cent: u64| {
            let rank = (total * per_cent).div_ceil(100).max(1);
            let mut seen = 0;
            let bucket = counts.iter().position(|count| {
                seen += count;
                seen >= rank
            });
            bucket.map_or(0, |bucket| upper_edge_ns(bucket).min(max_ns))
        };
        Summary {
            count: total,
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
            p50_ns: quantile(50),
            p90_ns: quantile(90),
            p99_ns: quantile(99),
            max_ns,
        }
    }
}

/// Values below 8 have a bucket each; from there on, bucket `8e + s` holds `[(8+s) << (e-1), (9+s) << (e-1))`.
fn bucket_of(ns: u64) -> usize {
    if ns < STEPS {
        return as_index(ns);
    }
    let shift = ns.ilog2() - STEP_BITS;
    let bucket = u64::from(shift + 1) * STEPS + (ns >> shift) - STEPS;
    as_index(bucket).min(BUCKETS - 1)
}

fn upper_edge_ns(bucket: usize) -> u64 {
    let (exponent, step) = (bucket as u64 / STEPS, bucket as u64 % STEPS);
    if exponent == 0 { step } else { ((STEPS + step + 1) << (exponent - 1)) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket_and_within_an_eighth() {
        let mut previous = None;
        for exponent in 0..41 {
            for step in 0..64_u64 {
                let ns = (1_u64 << exponent) + (step << exponent) / 64;
                let bucket = bucket_of(ns);
                assert!(upper_edge_ns(bucket) >= ns, "{ns}");
                assert!(upper_edge_ns(bucket) <= ns + ns / 8, "{ns}");
                assert!(previous.is_none_or(|previous| previous <= bucket), "{ns}");
                previous = Some(bucket);
            }
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_come_from_the_counts() {
        let histogram = Histogram::default();
        for us in 1..=100 {
            histogram.record(Duration::from_micros(us));
        }
        let summary = histogram.summary();
        assert_eq!((summary.count, summary.max_ns), (100, 100_000));
        assert!((50_000..56_300).contains(&summary.p50_ns), "{summary:?}");
        assert!((99_000..=100_000).contains(&summary.p99_ns), "{summary:?}");
        assert_eq!(Histogram::default().summary(), Summary::default());

        let distribution = histogram.distribution();
        assert_eq!(distribution.summary, summary);
        assert_eq!(distribution.buckets.iter().map(|(_, count)| count).sum::<u64>(), 100);
        assert!(distribution.buckets.is_sorted(), "{distribution:?}");
        // All that lie below an edge are counted up to it.
        let up_to = |edge_ns| {
            let buckets = distribution.buckets.iter().filter(|(upper, _)| *upper < edge_ns);
            buckets.map(|(_, count)| count).sum::<u64>()
        };
        assert_eq!((up_to(16_384), up_to(65_536)), (16, 65));
    }
}
