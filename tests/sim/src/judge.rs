//! One scenario, all laws, and what is to be said of them.

use anyhow::Result;

use crate::law::{AutoConverge, Controlled, Law, Until, Waiting, run};
use crate::oracle::{self, Verdict};
use crate::plant::Outcome;
use crate::scenario::Scenario;

/// Share of their time that writers lose to a full buffer if nobody does anything, from which on a scenario counts as in need of a throttle.
const NEEDS_THROTTLE_RATIO: f64 = 0.001;

/// What became of a scenario.
#[derive(Clone, Debug)]
pub struct Judged {
    /// The scenario.
    pub scenario: Scenario,
    /// What was possible.
    pub oracle: Verdict,
    /// The control core.
    pub controlled: Outcome,
    /// Doing nothing.
    pub waiting: Outcome,
    /// Auto-converge.
    pub converge: Outcome,
}

/// Which variant of the control core is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// As it is.
    Whole,
    /// Without first-touch counters, hence without a forecast.
    Blindfolded,
}

/// Runs everything on the scenario of a seed.
///
/// # Errors
/// When the scenario's policy makes no sense.
pub fn judge(seed: u64, variant: Variant) -> Result<Judged> {
    let scenario = Scenario::new(seed);
    let all = |law: &mut dyn Law| run(&scenario, law, f64::INFINITY, Until::Over);
    let mut law = match variant {
        Variant::Whole => Controlled::new(&scenario)?,
        Variant::Blindfolded => Controlled::blindfolded(&scenario)?,
    };
    let controlled = all(&mut law);
    // What was done can be done: an oracle that did not find it is not the best.
    let was_kept = controlled.aborted.is_none() && controlled.broken_at_s.is_none();
    let oracle = match oracle::ask(&scenario) {
        Verdict::Infeasible { .. } if was_kept => Verdict::Feasible(controlled.clone()),
        verdict => verdict,
    };
    Ok(Judged {
        oracle,
        controlled,
        waiting: all(&mut Waiting),
        converge: all(&mut AutoConverge::default()),
        scenario,
    })
}

impl Judged {
    /// Whether the buffer would fill if nobody did anything.
    #[must_use]
    pub fn needs_throttle(&self) -> bool {
        self.waiting.lost_ratio > NEEDS_THROTTLE_RATIO
    }

    /// What the oracle left to the guest, where the limits could be kept.
    #[must_use]
    pub const fn best(&self) -> Option<&Outcome> {
        match &self.oracle {
            Verdict::Feasible(best) => Some(best),
            Verdict::Infeasible { .. } => None,
        }
    }

    /// Given up although it could have been finished.
    #[must_use]
    pub const fn is_false_abort(&self) -> bool {
        self.best().is_some() && self.controlled.aborted.is_some()
    }

    /// Limits broken that could not be kept, and not given up.
    #[must_use]
    pub const fn is_missed_abort(&self) -> bool {
        let broken = self.controlled.broken_at_s.is_some();
        self.best().is_none() && self.controlled.aborted.is_none() && broken
    }

    /// Limits broken that could have been kept.
    #[must_use]
    pub const fn is_broken(&self) -> bool {
        let broken = self.controlled.broken_at_s.is_some();
        self.best().is_some() && self.controlled.aborted.is_none() && broken
    }

    /// Seconds from when it could be known to giving up.
    #[must_use]
    pub fn abort_delay_s(&self) -> Option<f64> {
        match self.oracle {
            Verdict::Infeasible { known_at_s } => {
                self.controlled.aborted.map(|(at_s, _)| at_s - known_at_s)
            }
            Verdict::Feasible(_) => None,
        }
    }

    /// Changes of the throttle's direction that nothing called for: whatever slows a disk down, or wakes a guest up, and
    /// then is over calls for two.
    #[must_use]
    pub fn reversals_without_cause(&self) -> u32 {
        let events = self.scenario.events.iter();
        let begun = events.filter(|event| event.start_s < self.controlled.copying_s).count();
        self.controlled.reversals.saturating_sub(u32::try_from(2 * begun).unwrap_or(u32::MAX))
    }

    /// Whether faults stalled longer than under plain waiting, beyond the width of a bucket.
    #[must_use]
    pub fn stalls_more_than_waiting(&self) -> bool {
        self.controlled.stall_p99_s > self.waiting.stall_p99_s * 1.2
    }
}
