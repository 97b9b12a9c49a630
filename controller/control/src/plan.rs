//! The same forecast before anything is touched: would a snapshot now keep the limits, and at what price?

use crate::forecast::{Forecast, Position, forecast};
use crate::model::Fit;
use crate::number;
use crate::policy::Policy;
use crate::step::AbortReason;

/// Steps of the search for the share of CPU time: to better than a thousandth.
const BISECTIONS: u32 = 10;

/// What is known of a guest and a disk beforehand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlanInputs {
    /// Length of RAM in bytes.
    pub ram_bytes: u64,
    /// Bytes of distinct pages that the guest writes in a second.
    pub dirty_rate: f64,
    /// Half the width of its confidence interval, in bytes per second.
    pub dirty_rate_error: f64,
    /// Bytes of distinct pages that it writes at all within a longer time, if that was watched. Otherwise it may be all
    /// of RAM.
    pub working_set_bytes: Option<u64>,
    /// Bandwidth of the destination, in bytes per second.
    pub drain_rate: f64,
}

/// What a plan comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// The guest would be left alone.
    Fits,
    /// It would be throttled, at worst to this share of its CPU time.
    NeedsThrottle {
        /// Above `min_cpu_ratio`.
        cpu_ratio: f64,
    },
    /// The limits cannot be kept.
    Infeasible {
        /// The limit that is in the way.
        reason: AbortReason,
        /// The CPU share that the buffer would take; 0 if no share does.
        cpu_ratio: f64,
    },
    /// The inputs are no numbers that a plan can be made of.
    Unknown,
}

/// A plan: the verdict, and the forecast that it stands on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// What it comes to.
    pub verdict: Verdict,
    /// If the guest is left alone, as it most likely would be.
    pub expected: Forecast,
    /// The same with the upper end of the dirty rate's error: the buffer to have.
    pub pessimistic: Forecast,
}

/// Plans a snapshot. It is said to fit if the upper end of the dirty rate fits, and to be infeasible only if
/// the lower end is: what lies between is for the controller to find out.
#[must_use]
pub fn plan(inputs: &PlanInputs, policy: &Policy) -> Plan {
    let limit = number(policy.buffer_bytes_max);
    let from = Position { unsaved_bytes: number(inputs.ram_bytes), buffer_used_bytes: 0.0 };
    let look = |error: f64, cpu_ratio: f64| {
        forecast(&fit(inputs, error), from, cpu_ratio, limit, f64::INFINITY)
    };
    let (expected, pessimistic) = (look(0.0, 1.0), look(1.0, 1.0));
    let numbers = [inputs.dirty_rate, inputs.dirty_rate_error, inputs.drain_rate];
    let is_sane = numbers.iter().all(|number| number.is_finite() && *number >= 0.0);
    let verdict = if !is_sane || policy.check().is_err() {
        Verdict::Unknown
    } else if is_late(inputs, policy) {
        Verdict::Infeasible { reason: AbortReason::Deadline, cpu_ratio: 0.0 }
    } else if pessimistic.full_after_s.is_none() {
        Verdict::Fits
    } else if look(-1.0, policy.min_cpu_ratio).full_after_s.is_some() {
        let cpu_ratio = share_that_fits(|share| look(0.0, share));
        Verdict::Infeasible { reason: AbortReason::BufferOverflow, cpu_ratio }
    } else {
        let cpu_ratio = share_that_fits(|share| look(1.0, share)).max(policy.min_cpu_ratio);
        Verdict::NeedsThrottle { cpu_ratio }
    };
    Plan { verdict, expected, pessimistic }
}

/// A guest that writes at random within its working set, with so many of its rate's errors added.
fn fit(inputs: &PlanInputs, errors: f64) -> Fit {
    let touch_rate = (inputs.dirty_rate + errors * inputs.dirty_rate_error).max(0.0);
    let set =
        inputs.working_set_bytes.unwrap_or(inputs.ram_bytes).clamp(1, inputs.ram_bytes.max(1));
    let depletion_per_s = touch_rate / number(set);
    Fit { touch_rate, depletion_per_s, cold_ratio: 0.0, drain_rate: inputs.drain_rate }
}

fn is_late(inputs: &PlanInputs, policy: &Policy) -> bool {
    let bytes = number(inputs.ram_bytes);
    policy.deadline_ns.is_some_and(|deadline_ns| {
        bytes > number(deadline_ns) / crate::NS_PER_S * inputs.drain_rate
    })
}

/// The largest constant share for which the buffer suffices.
fn share_that_fits(look: impl Fn(f64) -> Forecast) -> f64 {
    let (mut fits, mut overflows) = (0.0, 1.0);
    for _ in 0..BISECTIONS {
        let middle = f64::midpoint(fits, overflows);
        if look(middle).full_after_s.is_some() {
            overflows = middle;
        } else {
            fits = middle;
        }
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn inputs(dirty_rate: f64) -> PlanInputs {
        PlanInputs {
            ram_bytes: 32 * GIB,
            dirty_rate,
            dirty_rate_error: dirty_rate / 20.0,
            working_set_bytes: None,
            drain_rate: 400e6,
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
        let plan = plan(&inputs, &policy());
        let Verdict::NeedsThrottle { cpu_ratio } = plan.verdict else { panic!("{plan:?}") };
        let from = Position { unsaved_bytes: number(32 * GIB), buffer_used_bytes: 0.0 };
        let limit = number(2 * GIB);
        let fits = |share| {
            forecast(&fit(&inputs, 1.0), from, share, limit, f64::INFINITY).full_after_s.is_none()
        };
        assert!(fits(cpu_ratio) && !fits(cpu_ratio + 0.01), "{plan:?}");
    }

    #[test]
    fn the_busiest_is_refused_with_the_share_that_it_would_take() {
        let plan = plan(&inputs(3.2e9), &policy());
        let Verdict::Infeasible { reason: AbortReason::BufferOverflow, cpu_ratio } = plan.verdict
        else {
            panic!("{plan:?}")
        };
        assert!(cpu_ratio > 0.05 && cpu_ratio < 0.2, "{plan:?}");
        assert!(plan.expected.peak_buffer_bytes > number(9 * GIB), "{plan:?}");
    }

    #[test]
    fn a_small_working_set_fits_however_busy_it_is() {
        let inputs = PlanInputs { working_set_bytes: Some(GIB), ..inputs(3.2e9) };
        assert_eq!(plan(&inputs, &policy()).verdict, Verdict::Fits);
    }

    #[test]
    fn a_deadline_that_the_disk_cannot_keep_is_told() {
        let policy = Policy { deadline_ns: Some(60_000_000_000), ..policy() };
        let plan = plan(&inputs(0.0), &policy);
        assert_eq!(
            plan.verdict,
            Verdict::Infeasible { reason: AbortReason::Deadline, cpu_ratio: 0.0 }
        );
    }

    #[test]
    fn what_is_no_number_makes_no_plan() {
        for dirty_rate in [f64::NAN, -1.0, f64::INFINITY] {
            assert_eq!(plan(&inputs(dirty_rate), &policy()).verdict, Verdict::Unknown);
        }
    }
}
