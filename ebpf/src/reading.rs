//! What the programs have counted, as plain structures.

use livesnap_ebpf_common::{
    BUCKETS, HistogramWords, KIND_SERVED, MODE_KERNEL, PERIOD_AFTER, bucket_bounds_ns, class_parts,
    counter,
};
use serde::Serialize;

/// All that was counted up to one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reading {
    /// How long write-protect faults kept threads.
    pub stalls: Stalls,
}

/// Stalls by thread, and what the figures leave out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stalls {
    /// In ascending order of thread, period, mode and kind.
    pub threads: Vec<ThreadStalls>,
    /// Whether [`Kind`] is known. If not, faults that the kernel served by itself are among those that waited.
    pub kinds_are_known: bool,
    /// What could not be counted.
    pub lost: Lost,
}

/// The faults of one thread in one period and mode, of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ThreadStalls {
    /// The thread's id.
    pub tid: u32,
    /// Whether the faults began before or after the mark.
    pub period: Period,
    /// Where the thread was.
    pub mode: Mode,
    /// Whether it had to wait.
    pub kind: Kind,
    /// How long they took.
    pub histogram: Histogram,
}

/// Before or after [`Probes::mark`](crate::Probes::mark).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Period {
    /// Since the probes were attached.
    Before,
    /// Since the mark.
    After,
}

/// Where a thread was when it faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// In its own code.
    User,
    /// In the kernel, such as in a system call that writes to guest memory.
    Kernel,
}

/// What a fault was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The thread waited until it was let go on: a stall.
    Waited,
    /// The kernel served it by itself, and the thread kept its CPU.
    Served,
}

/// Events that are not in the histograms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// Faults for which a map had no room.
    pub map_full: u64,
    /// Faults whose end was not seen: a signal interrupted them. The access is repeated and counted then.
    pub start_without_end: u64,
    /// Ends of faults in the ranges whose start did not count: ordinary faults, such as first touches.
    pub end_without_start: u64,
}

/// Durations in 8 steps for each power of two; see [`Histogram::buckets`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Histogram {
    /// Number of durations.
    pub count: u64,
    /// Their sum, in nanoseconds.
    pub sum_ns: u64,
    /// The longest, in nanoseconds.
    pub max_ns: u64,
    buckets: Vec<u64>,
}

/// A histogram in a few numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Number of durations.
    pub count: u64,
    /// Their sum, in nanoseconds.
    pub sum_ns: u64,
    /// Their mean, in nanoseconds.
    pub mean_ns: u64,
    /// Median, in nanoseconds.
    pub p50_ns: u64,
    /// 99th percentile, in nanoseconds.
    pub p99_ns: u64,
    /// The longest, in nanoseconds.
    pub max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { count: 0, sum_ns: 0, max_ns: 0, buckets: vec![0; BUCKETS] }
    }
}

impl Histogram {
    /// From the words of the map.
    pub(crate) fn from_words([count, sum_ns, max_ns, buckets @ ..]: HistogramWords) -> Self {
        Self { count, sum_ns, max_ns, buckets: buckets.to_vec() }
    }

    /// Shortest and longest duration of each bucket that is not empty, in nanoseconds, and its count.
    pub fn buckets(&self) -> impl Iterator<Item = ((u64, u64), u64)> + '_ {
        let filled = self.buckets.iter().enumerate().filter(|(_, count)| **count > 0);
        filled.map(|(bucket, count)| (bucket_bounds_ns(bucket), *count))
    }

    /// The duration that `per_mille` of 1000 do not exceed, in nanoseconds: interpolated within its bucket, which
    /// is an eighth of its value wide.
    #[must_use]
    pub fn quantile_ns(&self, per_mille: u64) -> u64 {
        let total: u64 = self.buckets.iter().sum();
        let mut left = (total * per_mille).div_ceil(1000).max(1);
        for ((low, high), count) in self.buckets() {
            if left <= count {
                let width = u128::from(high.min(self.max_ns).saturating_sub(low));
                let part = width * u128::from(left) / u128::from(count);
                return low + u64::try_from(part).unwrap_or(u64::MAX - low);
            }
            left -= count;
        }
        0
    }

    /// Mean, in nanoseconds.
    #[must_use]
    pub fn mean_ns(&self) -> u64 {
        self.sum_ns.checked_div(self.count).unwrap_or(0)
    }

    /// The durations that came after `earlier`, which was read before from the same place. Of their maximum only the
    /// bucket is known: the end of that is given.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let pairs = self.buckets.iter().zip(&earlier.buckets);
        let buckets: Vec<u64> = pairs.map(|(now, then)| now.saturating_sub(*then)).collect();
        let last = buckets.iter().rposition(|count| *count > 0);
        Self {
            count: self.count.saturating_sub(earlier.count),
            sum_ns: self.sum_ns.saturating_sub(earlier.sum_ns),
            max_ns: last.map_or(0, |bucket| bucket_bounds_ns(bucket).1.min(self.max_ns)),
            buckets,
        }
    }

    /// Count, sum, mean, percentiles and maximum.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            count: self.count,
            sum_ns: self.sum_ns,
            mean_ns: self.mean_ns(),
            p50_ns: self.quantile_ns(500),
            p99_ns: self.quantile_ns(990),
            max_ns: self.max_ns,
        }
    }

    /// Adds the durations of another one.
    pub fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.sum_ns += other.sum_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
        for (bucket, count) in self.buckets.iter_mut().zip(&other.buckets) {
            *bucket += count;
        }
    }
}

impl Stalls {
    /// What all threads waited, since the probes were attached.
    #[must_use]
    pub fn total(&self) -> Histogram {
        self.sum(|faults| faults.kind == Kind::Waited)
    }

    /// What all threads waited, until the mark.
    #[must_use]
    pub fn before(&self) -> Histogram {
        self.sum(|faults| faults.kind == Kind::Waited && faults.period == Period::Before)
    }

    /// What all threads waited, since the mark.
    #[must_use]
    pub fn after(&self) -> Histogram {
        self.sum(|faults| faults.kind == Kind::Waited && faults.period == Period::After)
    }

    /// What the kernel served by itself, in all threads, since the probes were attached.
    #[must_use]
    pub fn served(&self) -> Histogram {
        self.sum(|faults| faults.kind == Kind::Served)
    }

    /// Those that are `wanted`, together.
    pub fn sum(&self, wanted: impl Fn(&ThreadStalls) -> bool) -> Histogram {
        let mut sum = Histogram::default();
        for faults in self.threads.iter().filter(|faults| wanted(faults)) {
            sum.add(&faults.histogram);
        }
        sum
    }
}

impl ThreadStalls {
    /// From a key and a value of the map.
    pub(crate) fn from_words([tid, class]: [u32; 2], histogram: HistogramWords) -> Self {
        let (period, mode, kind) = class_parts(class);
        Self {
            tid,
            period: if period == PERIOD_AFTER { Period::After } else { Period::Before },
            mode: if mode == MODE_KERNEL { Mode::Kernel } else { Mode::User },
            kind: if kind == KIND_SERVED { Kind::Served } else { Kind::Waited },
            histogram: Histogram::from_words(histogram),
        }
    }
}

impl Lost {
    /// From the counters, each summed over all CPUs by `sum`.
    pub(crate) fn from_counters<E>(sum: impl Fn(u32) -> Result<u64, E>) -> Result<Self, E> {
        Ok(Self {
            map_full: sum(counter::MAP_FULL)?,
            start_without_end: sum(counter::START_WITHOUT_END)?,
            end_without_start: sum(counter::END_WITHOUT_START)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use livesnap_ebpf_common::{
        HISTOGRAM_WORDS, KIND_WAITED, MODE_USER, PERIOD_BEFORE, bucket_of, class_of,
    };

    fn of(durations: impl IntoIterator<Item = u64>) -> HistogramWords {
        let mut words = [0; HISTOGRAM_WORDS];
        for ns in durations {
            words[0] += 1;
            words[1] += ns;
            words[2] = words[2].max(ns);
            words[3 + bucket_of(ns)] += 1;
        }
        words
    }

    #[test]
    fn quantiles_are_interpolated() {
        let summary = Histogram::from_words(of((1..=1000).map(|us| us * 1000))).summary();
        assert_eq!((summary.count, summary.mean_ns, summary.max_ns), (1000, 500_500, 1_000_000));
        assert!(summary.p50_ns.abs_diff(500_000) < 5_000, "{summary:?}");
        assert!(summary.p99_ns.abs_diff(990_000) < 5_000, "{summary:?}");
        assert_eq!(Histogram::default().summary(), Summary::default());
    }

    #[test]
    fn what_came_later_is_told_apart() {
        let earlier = Histogram::from_words(of([1_000, 9_000_000]));
        let now = Histogram::from_words(of([1_000, 9_000_000, 2_000, 4_000]));
        let later = now.since(&earlier);
        assert_eq!((later.count, later.sum_ns), (2, 6_000));
        assert!((4_000..4_600).contains(&later.max_ns), "{later:?}");
        assert_eq!(now.since(&now), Histogram::default());
    }

    #[test]
    fn threads_are_summed_by_period_and_kind() {
        let thread = |tid, period, mode, kind, ns| {
            ThreadStalls::from_words([tid, class_of(period, mode, kind)], of([ns]))
        };
        let stalls = Stalls {
            threads: vec![
                thread(1, PERIOD_BEFORE, MODE_USER, KIND_WAITED, 10),
                thread(1, PERIOD_AFTER, MODE_USER, KIND_WAITED, 100),
                thread(1, PERIOD_AFTER, MODE_USER, KIND_SERVED, 1),
                thread(2, PERIOD_AFTER, MODE_KERNEL, KIND_WAITED, 1000),
            ],
            kinds_are_known: true,
            lost: Lost::default(),
        };
        assert_eq!((stalls.before().sum_ns, stalls.before().count), (10, 1));
        assert_eq!((stalls.after().sum_ns, stalls.after().max_ns), (1100, 1000));
        assert_eq!((stalls.total().count, stalls.served().sum_ns), (3, 1));
        assert_eq!(stalls.sum(|stalls| stalls.mode == Mode::Kernel).count, 1);
    }
}
