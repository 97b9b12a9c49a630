//! The same forecast before anything is touched: would a snapshot now keep the limits, and at what price?
//!
//! What decides is the rate at which the guest will first touch memory that is *not yet saved*. Beforehand only the rate
//! is known at which it dirtied memory in a window of some length, and how much slower it came to pages that were new to
//! the window in its second half than in its first. A guest that writes at random within a working set comes to new pages
//! in proportion to what is left of the set, so that with `f` the ratio of the halves, `T` the window and `D` the bytes
//! seen
//!
//! ```text
//!   depletion α = −2·ln f / T        working set M = D / (1 − f²)        rate at first a = α·M
//! ```
//!
//! One window proves little of what comes later. So a plan looks at three guests:
//!
//! | side | dirties | working set | destination |
//! | --- | --- | --- | --- |
//! | optimistic | the lower end of the error | **only what was seen to be written** | upper end |
//! | expected | the middle | as above, but a tenth of the second half's rate goes on in all of memory | the middle |
//! | pessimistic | the upper end | as above, but half of the second half's rate goes on in all of memory | lower end |

use crate::forecast::{Forecast, Position, forecast};
use crate::model::Fit;
use crate::number;
use crate::policy::Policy;
use crate::step::AbortReason;

/// Steps of the search for the share of CPU time: to better than a thousandth.
const BISECTIONS: u32 = 10;
/// Share of the second half's rate that is taken to go on until all memory is saved.
const COLD_SHARE_EXPECTED: f64 = 0.1;
/// The same on the pessimistic side.
const COLD_SHARE_PESSIMISTIC: f64 = 0.5;
/// Least ratio of the halves that is believed: a guest that wrote all of its set at once.
const FRESH_RATIO_MIN: f64 = 0.05;

/// What is known of a guest and a disk beforehand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlanInputs {
    /// Bytes of RAM that have to be written.
    pub unsaved_bytes: f64,
    /// Half the width of its confidence interval, in bytes.
    pub unsaved_error_bytes: f64,
    /// Bytes of distinct pages that the guest wrote in a second, on average over the window.
    pub dirty_rate: f64,
    /// Half the width of its confidence interval, in bytes per second.
    pub dirty_rate_error: f64,
    /// Length of the window, in seconds.
    pub window_s: f64,
    /// Rate of pages new to the window in its second half, as a share of that in its first; 1 if it is not known.
    pub fresh_ratio: f64,
    /// Bandwidth of the destination, in bytes per second.
    pub drain_rate: f64,
    /// Half the width of its confidence interval, in bytes per second.
    pub drain_rate_error: f64,
}

/// What a plan comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// The guest would be left alone, even on the pessimistic side.
    Fits,
    /// It might be throttled, on the pessimistic side to this share of its CPU time.
    NeedsThrottle {
        /// Not below `min_cpu_ratio`.
        cpu_ratio: f64,
    },
    /// The limits would be broken as it is expected, and kept on the optimistic side: that will show only while the
    /// snapshot is taken.
    Uncertain {
        /// The limit that is in the way.
        reason: AbortReason,
        /// The CPU share that the buffer would take; 0 if no share helps.
        cpu_ratio: f64,
    },
    /// The limits cannot be kept, not even on the optimistic side.
    Infeasible {
        /// The limit that is in the way.
        reason: AbortReason,
        /// The CPU share that the buffer would take; 0 if no share helps.
        cpu_ratio: f64,
    },
    /// The inputs are no numbers that a plan can be made of.
    Unknown,
}

/// A plan: the verdict, and the forecasts that it stands on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// What it comes to.
    pub verdict: Verdict,
    /// The guest and destination that are expected.
    pub fit: Fit,
    /// If the guest is left alone, as it most likely would be.
    pub expected: Forecast,
    /// The same on the pessimistic side.
    pub pessimistic: Forecast,
    /// The expected guest with no more than `min_cpu_ratio`: its peak is the buffer that would be enough.
    pub slowest: Forecast,
    /// The optimistic guest with no more than `min_cpu_ratio`: what has to overflow for a plan to be infeasible.
    pub optimistic_slowest: Forecast,
}

/// What one of the three guests is taken to do.
#[derive(Clone, Copy, Debug)]
struct Side {
    fit: Fit,
    unsaved_bytes: f64,
}

/// Plans a snapshot. It is said to fit if the pessimistic side fits, and to be infeasible only if the optimistic
/// side is: what lies between is for the controller to find out.
#[must_use]
pub fn plan(inputs: &PlanInputs, policy: &Policy) -> Plan {
    let limit = number(policy.buffer_bytes_max);
    let look = |side: &Side, cpu_ratio: f64| {
        let from = Position { unsaved_bytes: side.unsaved_bytes, buffer_used_bytes: 0.0 };
        forecast(&side.fit, from, cpu_ratio, limit, f64::INFINITY)
    };
    let overflows = |side: &Side, cpu_ratio: f64| look(side, cpu_ratio).full_after_s.is_some();
    let is_late = |side: &Side| {
        policy.deadline_ns.is_some_and(|deadline_ns| {
            side.unsaved_bytes > number(deadline_ns) / crate::NS_PER_S * side.fit.drain_rate
        })
    };
    let min_cpu = policy.min_cpu_ratio;
    let [good, middle, bad] = [optimistic(inputs), expected(inputs), pessimistic(inputs)];
    let share_for = |side: &Side| largest_share(|share| !overflows(side, share));
    let verdict = if !inputs.are_sane() || policy.check().is_err() {
        Verdict::Unknown
    } else if is_late(&good) {
        Verdict::Infeasible { reason: AbortReason::Deadline, cpu_ratio: 0.0 }
    } else if overflows(&good, min_cpu) {
        let cpu_ratio = share_for(&middle);
        Verdict::Infeasible { reason: AbortReason::BufferOverflow, cpu_ratio }
    } else if is_late(&bad) {
        Verdict::Uncertain { reason: AbortReason::Deadline, cpu_ratio: 0.0 }
    } else if overflows(&middle, min_cpu) {
        let cpu_ratio = share_for(&middle);
        Verdict::Uncertain { reason: AbortReason::BufferOverflow, cpu_ratio }
    } else if overflows(&bad, 1.0) {
        Verdict::NeedsThrottle { cpu_ratio: share_for(&bad).max(min_cpu) }
    } else {
        Verdict::Fits
    };
    Plan {
        verdict,
        fit: middle.fit,
        expected: look(&middle, 1.0),
        pessimistic: look(&bad, 1.0),
        slowest: look(&middle, min_cpu),
        optimistic_slowest: look(&good, min_cpu),
    }
}

impl PlanInputs {
    fn are_sane(&self) -> bool {
        let numbers = [
            self.unsaved_bytes,
            self.unsaved_error_bytes,
            self.dirty_rate,
            self.dirty_rate_error,
            self.drain_rate,
            self.drain_rate_error,
        ];
        let is_rate = |number: &f64| number.is_finite() && *number >= 0.0;
        numbers.iter().all(is_rate)
            && self.window_s.is_finite()
            && self.window_s > 0.0
            && self.fresh_ratio >= 0.0
    }

    /// A guest with this mean rate over the window, of which `cold_share` of the second half's rate goes on.
    fn fit(&self, mean_rate: f64, cold_share: f64, drain_rate: f64) -> Fit {
        let fresh = self.fresh_ratio.clamp(FRESH_RATIO_MIN, 1.0);
        // No working set is larger than memory.
        let least = mean_rate / self.unsaved_bytes.max(1.0);
        let depletion_per_s = (-2.0 * natural_log(fresh) / self.window_s).max(least);
        let seen_share = 1.0 - fresh * fresh;
        let at_first = if seen_share > 1e-3 {
            depletion_per_s * mean_rate * self.window_s / seen_share
        } else {
            mean_rate
        };
        let touch_rate = at_first.max(mean_rate);
        let second_half_rate = mean_rate * 2.0 * fresh / (1.0 + fresh);
        let cold_ratio = cold_share * second_half_rate / touch_rate.max(1.0);
        Fit { touch_rate, depletion_per_s, cold_ratio, drain_rate }
    }
}

/// It writes to nothing but what it was seen to write to, at the lower end of its rate.
fn optimistic(inputs: &PlanInputs) -> Side {
    let touch_rate = (inputs.dirty_rate - inputs.dirty_rate_error).max(0.0);
    Side {
        fit: Fit {
            touch_rate,
            depletion_per_s: 1.0 / inputs.window_s,
            cold_ratio: 0.0,
            drain_rate: inputs.drain_rate + inputs.drain_rate_error,
        },
        unsaved_bytes: (inputs.unsaved_bytes - inputs.unsaved_error_bytes).max(0.0),
    }
}

fn expected(inputs: &PlanInputs) -> Side {
    Side {
        fit: inputs.fit(inputs.dirty_rate, COLD_SHARE_EXPECTED, inputs.drain_rate),
        unsaved_bytes: inputs.unsaved_bytes,
    }
}

fn pessimistic(inputs: &PlanInputs) -> Side {
    let mean_rate = inputs.dirty_rate + inputs.dirty_rate_error;
    let drain_rate = (inputs.drain_rate - inputs.drain_rate_error).max(inputs.drain_rate / 2.0);
    Side {
        fit: inputs.fit(mean_rate, COLD_SHARE_PESSIMISTIC, drain_rate),
        unsaved_bytes: inputs.unsaved_bytes + inputs.unsaved_error_bytes,
    }
}

/// The largest constant share for which `fits`.
fn largest_share(fits: impl Fn(f64) -> bool) -> f64 {
    let (mut good, mut bad) = (0.0, 1.0);
    for _ in 0..BISECTIONS {
        let middle = f64::midpoint(good, bad);
        if fits(middle) {
            good = middle;
        } else {
            bad = middle;
        }
    }
    good
}

/// Natural logarithm of a share between [`FRESH_RATIO_MIN`] and 1, which `core` does not have: with
/// `y = (1 − x) / (1 + x)`, `ln x = −2·(y + y³/3 + y⁵/5 + …)`; 32 terms are good to four digits.
fn natural_log(share: f64) -> f64 {
    let y = (1.0 - share) / (1.0 + share);
    let (mut power, mut sum, mut divisor) = (y, 0.0, 1.0);
    for _ in 0..32 {
        sum += power / divisor;
        power *= y * y;
        divisor += 2.0;
    }
    -2.0 * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// Seen for 2 s, without any sign that it comes to an end.
    fn inputs(dirty_rate: f64) -> PlanInputs {
        PlanInputs {
            unsaved_bytes: number(32 * GIB),
            unsaved_error_bytes: 0.0,
            dirty_rate,
            dirty_rate_error: dirty_rate / 20.0,
            window_s: 2.0,
            fresh_ratio: 1.0,
            drain_rate: 400e6,
            drain_rate_error: 0.0,
        }
    }

    fn policy() -> Policy {
        Policy { buffer_bytes_max: 2 * GIB, min_cpu_ratio: 0.2, ..Policy::for_host(64 * GIB) }
    }

    #[test]
    fn a_quiet_guest_fits_and_takes_what_the_disk_takes() {
        let plan = plan(&inputs(100e6), &policy());
        assert_eq!(plan.verdict, Verdict::Fits);
        let seconds = plan.expected.completion_after_s.unwrap_or(0.0);
        assert!((seconds - number(32 * GIB) / 400e6).abs() < 1e-6, "{plan:?}");
    }

    #[test]
    fn a_busy_one_needs_a_throttle_that_makes_it_fit() {
        let inputs = inputs(1e9);
        let found = plan(&inputs, &policy());
        let Verdict::NeedsThrottle { cpu_ratio } = found.verdict else { panic!("{found:?}") };
        let bad = pessimistic(&inputs);
        let from = Position { unsaved_bytes: bad.unsaved_bytes, buffer_used_bytes: 0.0 };
        let fits = |share| {
            let seen = forecast(&bad.fit, from, share, number(2 * GIB), f64::INFINITY);
            seen.full_after_s.is_none()
        };
        assert!(fits(cpu_ratio) && !fits(cpu_ratio + 0.01), "{found:?}");
    }

    #[test]
    fn too_busy_a_one_is_told_with_what_it_would_take_and_refused_only_if_that_is_certain() {
        let found = plan(&inputs(3.2e9), &policy());
        // What was seen in 2 s, 6 GB, would fit at a fifth of the CPU time if it were all.
        let Verdict::Uncertain { reason: AbortReason::BufferOverflow, cpu_ratio } = found.verdict
        else {
            panic!("{found:?}")
        };
        assert!(cpu_ratio > 0.05 && cpu_ratio < 0.2, "{found:?}");
        assert!(found.expected.peak_buffer_bytes > number(9 * GIB), "{found:?}");
        // A buffer of that peak is one in which the least share fits.
        let needed = Policy {
            buffer_bytes_max: crate::count(found.slowest.peak_buffer_bytes) + 1,
            ..policy()
        };
        assert!(matches!(plan(&inputs(3.2e9), &needed).verdict, Verdict::NeedsThrottle { .. }));
        // Watched for so long that what was seen does not fit, it is certain.
        let found = plan(&PlanInputs { window_s: 12.0, ..inputs(3.2e9) }, &policy());
        assert!(matches!(found.verdict, Verdict::Infeasible { .. }), "{found:?}");
    }

    #[test]
    fn a_refusal_is_no_matter_of_a_wide_error() {
        let wide = |error| PlanInputs { window_s: 12.0, dirty_rate_error: error, ..inputs(3.2e9) };
        assert!(matches!(plan(&wide(0.1e9), &policy()).verdict, Verdict::Infeasible { .. }));
        assert!(matches!(plan(&wide(3e9), &policy()).verdict, Verdict::Uncertain { .. }));
    }

    #[test]
    fn a_small_working_set_fits_however_busy_it_is() {
        // 1 GB, written at random at 8 GB/s: in half a second all but 2 %.
        let fresh_ratio = 0.135;
        let inputs = PlanInputs { window_s: 0.5, fresh_ratio, ..inputs(2e9) };
        let found = plan(&inputs, &Policy { buffer_bytes_max: 4 * GIB, ..policy() });
        assert_eq!(found.verdict, Verdict::Fits, "{found:?}");
        let fit = inputs.fit(2e9, 0.0, 1.0);
        assert!((fit.touch_rate / fit.depletion_per_s - 1.02e9).abs() < 0.02e9, "{fit:?}");
        assert!((fit.depletion_per_s - 8.0).abs() < 0.1, "{fit:?}");
    }

    #[test]
    fn no_working_set_is_larger_than_memory() {
        // As if none of it had been seen twice: it must have come from all 32 GiB.
        let fit = inputs(4e9).fit(4e9, 0.0, 1.0);
        assert!((fit.depletion_per_s - 4e9 / number(32 * GIB)).abs() < 1e-9, "{fit:?}");
    }

    #[test]
    fn how_much_there_is_to_be_written_is_as_unsure_as_it_was_measured() {
        let unsure = PlanInputs { unsaved_error_bytes: number(16 * GIB), ..inputs(0.0) };
        let policy = Policy { deadline_ns: Some(60_000_000_000), ..policy() };
        // 86 s for what is expected; for what it may be, 43 or 129.
        let told = plan(&unsure, &policy).verdict;
        assert!(
            matches!(told, Verdict::Uncertain { reason: AbortReason::Deadline, .. }),
            "{told:?}"
        );
    }

    #[test]
    fn a_deadline_that_the_disk_cannot_keep_is_told_and_one_that_it_may_keep_is_not_refused() {
        let policy = Policy { deadline_ns: Some(60_000_000_000), ..policy() };
        let told = |inputs: &PlanInputs| plan(inputs, &policy).verdict;
        let late = Verdict::Infeasible { reason: AbortReason::Deadline, cpu_ratio: 0.0 };
        assert_eq!(told(&inputs(0.0)), late);
        let unsteady = PlanInputs { drain_rate_error: 300e6, ..inputs(0.0) };
        let unsure = Verdict::Uncertain { reason: AbortReason::Deadline, cpu_ratio: 0.0 };
        assert_eq!(told(&unsteady), unsure);
        assert_eq!(told(&PlanInputs { drain_rate: 1e9, ..inputs(0.0) }), Verdict::Fits);
    }

    #[test]
    fn what_is_no_number_makes_no_plan() {
        for dirty_rate in [f64::NAN, -1.0, f64::INFINITY] {
            assert_eq!(plan(&inputs(dirty_rate), &policy()).verdict, Verdict::Unknown);
        }
        let timeless = PlanInputs { window_s: 0.0, ..inputs(1.0) };
        assert_eq!(plan(&timeless, &policy()).verdict, Verdict::Unknown);
        let unmeasured = PlanInputs { fresh_ratio: f64::NAN, ..inputs(1.0) };
        assert_eq!(plan(&unmeasured, &policy()).verdict, Verdict::Unknown);
    }

    #[test]
    fn the_logarithm_is_one() {
        for share in [FRESH_RATIO_MIN, 0.135, 0.5, 0.999, 1.0] {
            let found = natural_log(share);
            // The tests have a standard library.
            assert!((found - share.ln()).abs() < 1e-3, "{share}: {found}");
        }
    }
}
