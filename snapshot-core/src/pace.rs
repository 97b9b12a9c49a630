//! A limit on how fast the writer writes: a leaky bucket, so that others who use the disk keep their share.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// A writer that had less to write may catch up by what it has missed in so long, not more: others should not
/// notice.
const BURST: Duration = Duration::from_millis(20);

/// When the next write may begin.
#[derive(Debug)]
pub struct Pace {
    bytes_per_s: NonZeroU64,
    /// By when the limit allows what has been written.
    due: Instant,
}

impl Pace {
    /// Nothing has been written at `now`.
    pub fn new(bytes_per_s: NonZeroU64, now: Instant) -> Self {
        Self { bytes_per_s, due: now }
    }

    /// `bytes` more are being written from `now` on.
    pub fn add(&mut self, bytes: u64, now: Instant) {
        let begun = now.checked_sub(BURST).map_or(self.due, |earliest| self.due.max(earliest));
        self.due = begun + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s.get() as f64);
    }

    /// How long to wait before anything more is written.
    pub fn wait(&self, now: Instant) -> Duration {
        self.due.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

    use super::*;

    const MIB: u64 = 1 << 20;

    fn pace(now: Instant) -> Pace {
        Pace::new(NonZeroU64::new(100 * MIB).unwrap(), now)
    }

    #[test]
    fn as_much_passes_as_the_limit_says() {
        let start = Instant::now();
        let (mut pace, mut now) = (pace(start), start);
        for _ in 0..500 {
            now += pace.wait(now);
            pace.add(2 * MIB, now);
        }
        now += pace.wait(now);
        assert!((now - start).abs_diff(Duration::from_secs(10)) < Duration::from_millis(1));
    }

    #[test]
    fn what_was_not_used_is_lost_but_for_a_burst() {
        let start = Instant::now();
        let mut pace = pace(start);
        let later = start + Duration::from_secs(60);
        pace.add(3 * MIB, later);
        assert_eq!(pace.wait(later), Duration::from_millis(30) - BURST);
    }
}
