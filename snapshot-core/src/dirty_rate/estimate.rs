//! From what was counted in a sample to a rate for all memory, with its error.

use std::time::Duration;

use super::sample::CHUNK_BYTES;

/// What one chunk of the sample did.
#[derive(Clone, Copy, Debug)]
pub struct Observation {
    /// Chunks of which this one was drawn.
    pub stands_for: u64,
    /// Bytes of pages that were written to.
    pub written_bytes: u64,
    /// For how long it was watched.
    pub window: Duration,
}

/// A rate of all memory, as a sample shows it.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Estimate {
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Half the width of the 95 % confidence interval; 0 if all memory was watched.
    pub error_bytes_per_second: f64,
}

/// Standard errors in half a 95 % confidence interval, by normal theory.
const STANDARD_ERRORS: f64 = 2.0;

/// Estimates from a sample of one chunk for each stratum, in the order of their addresses.
///
/// The rate is the sum of what each chunk says for its stratum, and has no bias. The unit of the error is the chunk,
/// because what is written lies in clusters. With one chunk for each stratum the variance within strata shows only in
/// the difference of neighbours (successive differences, as for systematic samples), which overstates it where
/// strata differ. A few hot chunks in much cold memory can all be missed, and then nothing in the sample varies; so
/// one more chunk like the busiest one seen is counted as missed, or, if none was, a chunk written to from end to end.
#[must_use]
pub fn estimate(sample: &[Observation]) -> Estimate {
    let chunks: u64 = sample.iter().map(|one| one.stands_for).sum();
    let (count, chunks) = (float(sample.len() as u64), float(chunks));
    let rates: Vec<f64> = sample.iter().map(|one| one.rate(one.written_bytes)).collect();
    let total: f64 = rates.iter().sum();
    let differences: f64 = rates.windows(2).map(|pair| (pair[0] - pair[1]).powi(2)).sum();
    let spread = if count > 1.0 { count / (2.0 * (count - 1.0)) * differences } else { 0.0 };
    let busiest = rates.iter().copied().fold(0.0, f64::max);
    let missed = if busiest > 0.0 {
        busiest
    } else {
        sample.iter().map(|one| one.rate(CHUNK_BYTES)).fold(0.0, f64::max)
    };
    let unseen_share = if chunks > 0.0 { 1.0 - count / chunks } else { 0.0 };
    let variance = unseen_share * (spread + missed.powi(2));
    Estimate { bytes_per_second: total, error_bytes_per_second: STANDARD_ERRORS * variance.sqrt() }
}

impl Observation {
    /// The rate of the whole stratum, in bytes per second, if the chunk had `bytes` written.
    fn rate(&self, bytes: u64) -> f64 {
        float(self.stands_for * bytes) / self.window.as_secs_f64().max(f64::EPSILON)
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate needs no more than 52 bits")]
pub const fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Random, Strata};
    use super::*;

    const CHUNKS: usize = 512;
    const SAMPLE: usize = 64;
    const DRAWS: u32 = 2_000;

    /// Mean of many estimates, and the share of them whose interval holds the truth.
    fn try_many(written: &[u64]) -> (f64, f64) {
        let truth = float(written.iter().sum());
        let mut strata = Strata::new(written.len(), SAMPLE, 1);
        let (mut sum, mut covered) = (0.0, 0.0);
        for _ in 0..DRAWS {
            let observe = |draw: super::super::sample::Draw| Observation {
                stands_for: draw.stands_for,
                written_bytes: written[draw.chunk],
                window: Duration::from_secs(1),
            };
            let sample: Vec<_> = strata.draw().into_iter().map(observe).collect();
            let found = estimate(&sample);
            sum += found.bytes_per_second;
            let holds = (found.bytes_per_second - truth).abs() <= found.error_bytes_per_second;
            covered += f64::from(u8::from(holds));
        }
        (sum / f64::from(DRAWS), covered / f64::from(DRAWS))
    }

    fn expect_honest(what: &str, written: &[u64]) {
        let truth = float(written.iter().sum());
        let (mean, covered) = try_many(written);
        assert!((mean - truth).abs() <= 0.03 * truth, "{what}: mean {mean} of {truth}");
        assert!(covered >= 0.93, "{what}: only {covered} of the intervals hold the truth");
    }

    #[test]
    fn estimates_have_no_bias_and_their_errors_hold() {
        let mut random = Random::new(7);
        let uniform: Vec<u64> = (0..CHUNKS).map(|_| random.below(100) << 12).collect();
        expect_honest("everywhere a little", &uniform);
        let ring: Vec<u64> =
            (0..CHUNKS).map(|chunk| u64::from((100..164).contains(&chunk)) * CHUNK_BYTES).collect();
        expect_honest("one busy stretch", &ring);
        let scattered: Vec<u64> =
            (0..CHUNKS).map(|_| u64::from(random.below(10) == 0) * CHUNK_BYTES).collect();
        expect_honest("busy chunks here and there", &scattered);
        let mut sparse = vec![0; CHUNKS];
        sparse[77] = CHUNK_BYTES;
        sparse[300] = CHUNK_BYTES / 2;
        expect_honest("two busy chunks", &sparse);
    }

    #[test]
    fn the_error_is_no_larger_than_it_must_be() {
        let even = Observation {
            stands_for: 8,
            written_bytes: 40 << 12,
            window: Duration::from_millis(500),
        };
        let found = estimate(&[even; SAMPLE]);
        let truth = f64::from(8 * 64 * (40 << 12) * 2);
        assert!((found.bytes_per_second - truth).abs() < 1.0, "{found:?}");
        assert!(found.error_bytes_per_second < 0.04 * truth, "{found:?}");
    }

    #[test]
    fn nothing_seen_in_a_sample_is_not_nothing_and_in_all_memory_it_is() {
        let quiet = |stands_for| Observation {
            stands_for,
            written_bytes: 0,
            window: Duration::from_secs(1),
        };
        let sampled = estimate(&[quiet(8); SAMPLE]);
        assert!(sampled.bytes_per_second == 0.0, "{sampled:?}");
        assert!(sampled.error_bytes_per_second > f64::from(8 << 20), "{sampled:?}");
        let all = estimate(&[quiet(1); SAMPLE]);
        assert!(all.error_bytes_per_second == 0.0, "{all:?}");
        assert!(estimate(&[]).error_bytes_per_second == 0.0);
    }
}
