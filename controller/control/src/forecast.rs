//! What will happen if the guest goes on like this with a given share of its CPU time.
//!
//! ```text
//!   first touches   a(t) = hot + cold          d hot/dt = −depletion·q·hot,   cold ∝ what is unsaved
//!   buffer          dB/dt = q·a + s − d        sweep s: only while B is below its bound, at most what the disk has left
//!   unsaved         dU/dt = −q·a − s
//! ```
//!
//! The disk is busy from beginning to end, because the sweep takes what faults leave of it. Two things follow that make
//! the rest simple. The time to completion is (unsaved + buffer) / drain rate *whatever the throttle is*: a deadline can be
//! missed, but no throttle helps to keep it. And the peak can never exceed buffer + unsaved, so a snapshot of a small
//! rest always fits.

use crate::model::Fit;
use crate::number;

/// The sweep takes no more while so much of the buffer is in use (`SWEEP_EXTENTS_MAX` extents of 2 MiB in the
/// engine), in bytes.
const SWEEP_BYTES: f64 = (32_u64 << 20) as f64;

/// First step of the integration, in seconds.
const STEP_S: f64 = 0.05;
/// Each step is so much longer than the one before: what is far off need not be known exactly.
const STEP_GROWTH: f64 = 1.1;
/// Steps, together more than an hour.
const STEPS: u32 = 96;

/// Where a snapshot is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Position {
    /// Bytes that nobody has saved yet.
    pub unsaved_bytes: f64,
    /// Copy buffer in use, in bytes.
    pub buffer_used_bytes: f64,
}

/// A forecast, for people, metrics and decisions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Forecast {
    /// Most of the buffer that will be wanted, in bytes.
    pub peak_buffer_bytes: f64,
    /// When that is, in seconds from now.
    pub peak_after_s: f64,
    /// When the buffer is full, in seconds from now; nothing if it never is.
    pub full_after_s: Option<f64>,
    /// When all is on disk, in seconds from now; nothing if that is beyond an hour.
    pub completion_after_s: Option<f64>,
    /// How long writes will wait for room altogether, in seconds: what exceeds the buffer must wait for the disk.
    pub expected_wait_s: f64,
    /// Probability that things go on like this until the peak, from how long they have.
    pub confidence_ratio: f64,
}

/// Looks ahead, with a share `cpu_ratio` of the writers' CPU time, until all is saved, or only for `horizon_s`.
#[must_use]
pub fn forecast(
    fit: &Fit,
    from: Position,
    cpu_ratio: f64,
    limit_bytes: f64,
    horizon_s: f64,
) -> Forecast {
    let mut now = from;
    let mut hot = fit.touch_rate * (1.0 - fit.cold_ratio);
    let cold_per_byte = fit.touch_rate * fit.cold_ratio / from.unsaved_bytes.max(1.0);
    let mut seen = Forecast { peak_buffer_bytes: from.buffer_used_bytes, ..Forecast::default() };
    if from.buffer_used_bytes >= limit_bytes {
        seen.full_after_s = Some(0.0);
    }
    let (mut at_s, mut step_s) = (0.0, STEP_S);
    for _ in 0..STEPS {
        if at_s >= horizon_s || (now.unsaved_bytes <= 0.0 && at_s > 0.0) {
            break;
        }
        let length_s = step_s.min(horizon_s - at_s);
        // e^(−x) as 1/(1 + x + x²/2): positive and stable for any step. Its mean over the step follows.
        let x = fit.depletion_per_s * cpu_ratio * length_s;
        let after = 1.0 / (1.0 + x + x * x / 2.0);
        let hot_mean = hot * (1.0 + x / 2.0) * after;
        let rate = cpu_ratio * (hot_mean + cold_per_byte * now.unsaved_bytes);
        let touched = (rate * length_s).min(now.unsaved_bytes);
        let drained = fit.drain_rate * length_s;
        let without_sweep = now.buffer_used_bytes + touched - drained;
        let swept =
            (SWEEP_BYTES - without_sweep).clamp(0.0, drained).min(now.unsaved_bytes - touched);
        let before = now.buffer_used_bytes;
        now.buffer_used_bytes = (without_sweep + swept).max(0.0);
        now.unsaved_bytes -= touched + swept;
        if now.buffer_used_bytes > seen.peak_buffer_bytes {
            seen.peak_buffer_bytes = now.buffer_used_bytes;
            seen.peak_after_s = at_s + length_s;
        }
        if seen.full_after_s.is_none() && now.buffer_used_bytes >= limit_bytes {
            let share = (limit_bytes - before) / (now.buffer_used_bytes - before);
            seen.full_after_s = Some(at_s + share * length_s);
        }
        hot *= after;
        at_s += length_s;
        step_s *= STEP_GROWTH;
    }
    let all = from.unsaved_bytes + from.buffer_used_bytes;
    let completion_s = all / fit.drain_rate;
    seen.completion_after_s = (completion_s < 3600.0).then_some(completion_s);
    let excess = (seen.peak_buffer_bytes - limit_bytes).max(0.0);
    seen.expected_wait_s = if excess > 0.0 { excess / fit.drain_rate.max(1.0) } else { 0.0 };
    seen
}

/// Probability that what has lasted for `age_s` lasts for `further_s` more, if nothing is known of its scale: Gott's
/// delta-t argument (Nature 363, 1993).
#[must_use]
pub fn persistence_ratio(age_s: f64, further_s: f64) -> f64 {
    if age_s + further_s > 0.0 { age_s / (age_s + further_s) } else { 0.0 }
}

/// A position from counts.
#[must_use]
pub const fn position(unsaved_bytes: u64, buffer_used_bytes: u64) -> Position {
    Position { unsaved_bytes: number(unsaved_bytes), buffer_used_bytes: number(buffer_used_bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: f64 = 1e9;
    const FOREVER: f64 = f64::INFINITY;

    fn fit(touch: f64, depletion: f64, drain: f64) -> Fit {
        Fit { touch_rate: touch, depletion_per_s: depletion, cold_ratio: 0.0, drain_rate: drain }
    }

    fn fresh(unsaved: f64) -> Position {
        Position { unsaved_bytes: unsaved, buffer_used_bytes: 0.0 }
    }

    #[test]
    fn a_hot_set_peaks_where_its_rate_meets_the_disk() {
        // F(t) = M(1 − e^(−αt)); at the peak a = d, so F = (a₀ − d)/α, t = ln(a₀/d)/α, B = F − d·t.
        let seen = forecast(&fit(2.0 * GB, 0.5, 0.5 * GB), fresh(16.0 * GB), 1.0, GB, FOREVER);
        let time_s = 4.0_f64.ln() / 0.5;
        let peak = 1.5 * GB / 0.5 - 0.5 * GB * time_s;
        assert!((seen.peak_buffer_bytes / peak - 1.0).abs() < 0.1, "{seen:?} is not {peak}");
        assert!((seen.peak_after_s - time_s).abs() < 0.4, "{seen:?} is not {time_s}");
        // B(t) reaches 1 GB: 4(1 − e^(−t/2)) − t/2 = 1, t = 0.90.
        assert!((seen.full_after_s.unwrap_or(0.0) - 0.90).abs() < 0.05, "{seen:?}");
    }

    #[test]
    fn half_the_cpu_is_half_the_rate() {
        let seen = forecast(&fit(2.0 * GB, 0.0, GB), fresh(8.0 * GB), 0.5, GB, FOREVER);
        assert!(seen.full_after_s.is_none(), "{seen:?}");
        let seen = forecast(&fit(2.0 * GB, 0.0, GB), fresh(8.0 * GB), 1.0, GB, FOREVER);
        assert!((seen.full_after_s.unwrap_or(0.0) - 1.0).abs() < 0.1, "{seen:?}");
    }

    #[test]
    fn the_completion_is_a_matter_of_the_disk_alone() {
        for cpu_ratio in [1.0, 0.2] {
            let seen = forecast(&fit(GB, 0.0, 0.5 * GB), fresh(8.0 * GB), cpu_ratio, GB, FOREVER);
            assert_eq!(seen.completion_after_s, Some(16.0));
        }
        let stopped = forecast(&fit(GB, 0.0, 0.0), fresh(8.0 * GB), 1.0, GB, FOREVER);
        assert_eq!(stopped.completion_after_s, None);
    }

    #[test]
    fn the_peak_never_exceeds_what_there_is() {
        let from = Position { unsaved_bytes: 0.3 * GB, buffer_used_bytes: 0.1 * GB };
        let seen = forecast(&fit(100.0 * GB, 0.0, 0.1 * GB), from, 1.0, GB, FOREVER);
        assert!(seen.peak_buffer_bytes <= 0.4 * GB, "{seen:?}");
    }

    #[test]
    fn an_idle_guest_leaves_the_buffer_to_the_sweep() {
        let seen = forecast(&fit(0.0, 0.0, GB), fresh(8.0 * GB), 1.0, GB, FOREVER);
        assert!(seen.peak_buffer_bytes <= SWEEP_BYTES, "{seen:?}");
    }

    #[test]
    fn a_full_buffer_is_full_now_and_what_exceeds_it_waits_for_the_disk() {
        let full = Position { unsaved_bytes: 8.0 * GB, buffer_used_bytes: GB };
        assert_eq!(forecast(&fit(GB, 0.0, GB), full, 1.0, GB, FOREVER).full_after_s, Some(0.0));
        // 2 GB/s against 1 GB/s: of 8 GB, 4 GB are in the buffer at the end, 3 GB more than fit.
        let seen = forecast(&fit(2.0 * GB, 0.0, GB), fresh(8.0 * GB), 1.0, GB, FOREVER);
        assert!((seen.expected_wait_s - 3.0).abs() < 0.2, "{seen:?}");
    }

    #[test]
    fn the_sweep_takes_no_more_than_the_disk_leaves() {
        let slow = fit(0.0, 0.0, 0.01 * GB);
        let seen = forecast(&slow, fresh(8.0 * GB), 1.0, GB, 0.1);
        assert!(seen.peak_buffer_bytes <= 0.001 * GB, "{seen:?}");
    }

    #[test]
    fn what_has_lasted_three_times_as_long_lasts_with_three_in_four() {
        assert!((persistence_ratio(3.0, 1.0) - 0.75).abs() < 1e-9);
        assert!(persistence_ratio(0.0, 0.0).abs() < 1e-9);
    }
}
