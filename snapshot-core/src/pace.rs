//! A limit on how fast the writer writes: a leaky bucket, so that others who use the disk keep their share.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A writer that had less to write may catch up by what it has missed in so long, not more: others should not
/// notice.
const BURST: Duration = Duration::from_millis(20);

/// Most bytes to write a second, which may change while a session runs. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct BandwidthLimit(Arc<AtomicU64>);

impl From<Option<NonZeroU64>> for BandwidthLimit {
    fn from(bytes_per_s: Option<NonZeroU64>) -> Self {
        let limit = Self::default();
        limit.set(bytes_per_s);
        limit
    }
}

impl BandwidthLimit {
    /// Sets another one, from any thread; nothing means as fast as the disk takes them.
    pub fn set(&self, bytes_per_s: Option<NonZeroU64>) {
        self.0.store(bytes_per_s.map_or(0, NonZeroU64::get), Ordering::Relaxed);
    }

    /// The limit now.
    #[must_use]
    pub fn get(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.0.load(Ordering::Relaxed))
    }
}

/// When the next write may begin.
#[derive(Debug)]
pub struct Pace {
    limit: BandwidthLimit,
    /// From when on the last bytes count.
    begun: Instant,
    bytes: u64,
}

impl Pace {
    /// Nothing has been written at `now`.
    pub const fn new(limit: BandwidthLimit, now: Instant) -> Self {
        Self { limit, begun: now, bytes: 0 }
    }

    /// `bytes` more are being written from `now` on.
    pub fn add(&mut self, bytes: u64, now: Instant) {
        self.begun = match (self.due(), now.checked_sub(BURST)) {
            (Some(due), Some(earliest)) => due.max(earliest),
            (Some(due), None) => due,
            (None, _) => now,
        };
        self.bytes = bytes;
    }

    /// How long to wait before anything more is written, by the limit as it is now.
    pub fn wait(&self, now: Instant) -> Duration {
        self.due().map_or(Duration::ZERO, |due| due.saturating_duration_since(now))
    }

    /// By when the limit allows what has been written.
    fn due(&self) -> Option<Instant> {
        let bytes_per_s = self.limit.get()?.get();
        Some(self.begun + Duration::from_secs_f64(self.bytes as f64 / bytes_per_s as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limit() -> BandwidthLimit {
        NonZeroU64::new(100 * MIB).into()
    }

    #[test]
    fn as_much_passes_as_the_limit_says() {
        let start = Instant::now();
        let (mut pace, mut now) = (Pace::new(limit(), start), start);
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
        let mut pace = Pace::new(limit(), start);
        let later = start + Duration::from_secs(60);
        pace.add(3 * MIB, later);
        assert_eq!(pace.wait(later), Duration::from_millis(30) - BURST);
    }

    #[test]
    fn another_limit_counts_at_once() {
        let (limit, start) = (BandwidthLimit::default(), Instant::now());
        let mut pace = Pace::new(limit.clone(), start);
        pace.add(MIB, start);
        assert_eq!(pace.wait(start), Duration::ZERO);
        limit.set(NonZeroU64::new(1));
        assert!(pace.wait(start) > Duration::from_secs(1_000_000));
        limit.set(NonZeroU64::new(MIB));
        assert_eq!(pace.wait(start), Duration::from_secs(1));
        limit.set(None);
        assert_eq!(pace.wait(start), Duration::ZERO);
    }
}
