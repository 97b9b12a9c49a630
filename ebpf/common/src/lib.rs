//! What the BPF programs and their loader agree on: histograms, keys, counters, and how each lies in a map.
//!
//! Both sides are compiled from this file. The kernel's side writes the structures; the loader reads them as
//! words of 64 bit, by the indexes that stand here, so that neither needs to reinterpret memory.

#![no_std]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod disk;

/// Address ranges that the programs look at.
pub const RANGES_MAX: usize = 16;

/// Histograms that are kept: one for each thread, [`Period`], [`Mode`] and [`Kind`] that had a fault.
pub const HISTOGRAMS_MAX: usize = 2048;

/// Threads that can be inside a fault at one time, where a map of ours must remember them.
pub const STARTS_MAX: usize = 8192;

const STEP_BITS: u32 = 3;
const STEPS: u64 = 1 << STEP_BITS;
/// From here on all durations share the last bucket: 2^32 ns, 4.3 s.
const EXPONENT_END: u32 = 32;

/// Buckets of a histogram: 8 for each power of two, and one for all that is longer.
pub const BUCKETS: usize = (((EXPONENT_END - STEP_BITS + 1) << STEP_BITS) + 1) as usize;

/// The bucket that a duration is counted in. Below 8 ns each has its own.
#[inline(always)]
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "both sides are of 64 bits, and the value is below BUCKETS"
)]
pub const fn bucket_of(ns: u64) -> usize {
    if ns < STEPS {
        return ns as usize;
    }
    let shift = ns.ilog2() - STEP_BITS;
    let bucket = (shift as u64 + 1) * STEPS + (ns >> shift) - STEPS;
    if bucket < BUCKETS as u64 { bucket as usize } else { BUCKETS - 1 }
}

/// The shortest and the longest duration of a bucket, in nanoseconds.
#[must_use]
pub const fn bucket_bounds_ns(bucket: usize) -> (u64, u64) {
    if bucket + 1 >= BUCKETS {
        return (1 << EXPONENT_END, u64::MAX);
    }
    (lower_bound_ns(bucket as u64), lower_bound_ns(bucket as u64 + 1) - 1)
}

const fn lower_bound_ns(bucket: u64) -> u64 {
    match bucket / STEPS {
        0 => bucket,
        octave => (STEPS + bucket % STEPS) << (octave - 1),
    }
}

/// How long faults kept a thread: the value of the map `HISTOGRAMS`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Histogram {
    /// Number of faults.
    pub count: u64,
    /// Their durations together, in nanoseconds.
    pub sum_ns: u64,
    /// The longest, in nanoseconds.
    pub max_ns: u64,
    /// How many lie in each bucket.
    pub buckets: [u64; BUCKETS],
}

/// A [`Histogram`] as the loader reads it: count, sum, maximum, buckets.
pub type HistogramWords = [u64; HISTOGRAM_WORDS];
/// Length of [`HistogramWords`].
pub const HISTOGRAM_WORDS: usize = BUCKETS + 3;

impl Histogram {
    /// Without a fault.
    pub const EMPTY: Self = Self { count: 0, sum_ns: 0, max_ns: 0, buckets: [0; BUCKETS] };

    /// Counts a duration.
    #[inline(always)]
    pub fn record(&mut self, ns: u64) {
        self.count += 1;
        self.sum_ns += ns;
        if ns > self.max_ns {
            self.max_ns = ns;
        }
        if let Some(bucket) = self.buckets.get_mut(bucket_of(ns)) {
            *bucket += 1;
        }
    }
}

/// Whose histogram: the key of the map `HISTOGRAMS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistogramKey {
    /// The thread.
    pub tid: u32,
    /// [`Period`], [`Mode`] and [`Kind`]: see [`class_of`].
    pub class: u32,
}

/// Before or after the moment that the loader marked.
pub type Period = u32;
/// The first period.
pub const PERIOD_BEFORE: Period = 0;
/// The period since the mark.
pub const PERIOD_AFTER: Period = 1;

/// Where the thread was when it faulted.
pub type Mode = u32;
/// In its own code.
pub const MODE_USER: Mode = 0;
/// In a system call, or in another service of the kernel.
pub const MODE_KERNEL: Mode = 1;

/// What a fault was.
pub type Kind = u32;
/// The thread waited until somebody let it go on: a stall.
pub const KIND_WAITED: Kind = 0;
/// The kernel served it by itself, without the thread leaving its CPU.
pub const KIND_SERVED: Kind = 1;

/// Period, mode and kind in one number.
#[inline(always)]
#[must_use]
pub const fn class_of(period: Period, mode: Mode, kind: Kind) -> u32 {
    (kind << 2) | (period << 1) | mode
}

/// What [`class_of`] was made of.
#[must_use]
pub const fn class_parts(class: u32) -> (Period, Mode, Kind) {
    (class >> 1 & 1, class & 1, class >> 2)
}

/// A fault that has begun: the value of the map `STARTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// When, by `CLOCK_MONOTONIC` in nanoseconds; 0: there is none.
    pub at_ns: u64,
    /// The address that was written to.
    pub address: u64,
    /// [`Period`] and [`Mode`] at the start.
    pub class: u64,
    /// How often the thread had left its CPU until then.
    pub switches: u64,
}

/// What did not go by the book, each an index of the map `COUNTERS`, which counts for each CPU.
pub mod counter {
    /// A fault that could not be remembered or counted, for its map was full.
    pub const MAP_FULL: u32 = 0;
    /// A start that another start followed: a signal interrupted the fault, or its end was not seen.
    pub const START_WITHOUT_END: u32 = 1;
    /// An end that no start preceded, in the ranges: an ordinary fault, or its start was not seen.
    pub const END_WITHOUT_START: u32 = 2;
    /// How many there are.
    pub const COUNT: usize = 3;
}

// No padding: every byte of a map is a byte of a field.
const _: () = assert!(size_of::<Histogram>() == 8 * HISTOGRAM_WORDS);
const _: () = assert!(size_of::<HistogramKey>() == 8);
const _: () = assert!(size_of::<Start>() == 32);
// The kernel allows values of 32 KiB in preallocated maps for each CPU.
const _: () = assert!(size_of::<Histogram>() < 32 << 10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_lies_within_its_bucket() {
        for exponent in 0..64 {
            for step in 0..64_u64 {
                let ns = (1_u64 << exponent) | ((step << exponent) >> 6);
                let (low, high) = bucket_bounds_ns(bucket_of(ns));
                assert!((low..=high).contains(&ns), "{ns} in {low}..={high}");
            }
        }
    }

    #[test]
    fn buckets_follow_each_other_and_are_an_eighth_wide() {
        let mut next = 0;
        for bucket in 0..BUCKETS {
            let (low, high) = bucket_bounds_ns(bucket);
            assert_eq!(low, next);
            assert!(bucket + 1 == BUCKETS || high - low <= low / 8, "{bucket}");
            next = high.wrapping_add(1);
        }
        assert_eq!(next, 0, "the last one reaches to the end");
    }

    #[test]
    fn classes_are_made_of_their_parts() {
        for period in [PERIOD_BEFORE, PERIOD_AFTER] {
            for mode in [MODE_USER, MODE_KERNEL] {
                for kind in [KIND_WAITED, KIND_SERVED] {
                    let class = class_of(period, mode, kind);
                    assert_eq!(class_parts(class), (period, mode, kind), "{class}");
                }
            }
        }
    }

    #[test]
    fn what_is_recorded_is_counted_once() {
        let mut histogram = Histogram::EMPTY;
        for ns in [0, 1_500, 1_500, u64::from(u32::MAX) * 4] {
            histogram.record(ns);
        }
        assert_eq!((histogram.count, histogram.max_ns), (4, u64::from(u32::MAX) * 4));
        assert_eq!(histogram.buckets.iter().sum::<u64>(), 4);
        assert_eq!(histogram.buckets[bucket_of(1_500)], 2);
    }
}
