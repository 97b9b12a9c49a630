//! What somebody who knows the future would have done.
//!
//! A scenario is *feasible* if any throttle of the oracle's keeps all limits: none, one that runs freely until a part of the
//! buffer is used and then at the exact pace of the disk of that very moment, or a constant one, down to the least share.
//! Of those that keep them, it takes the one that leaves the guest the most. The least share from the very beginning is
//! not enough to tell: who runs freely exhausts his hot set before the disk becomes slow. The oracle sees the plant as it
//! is, without samples.

use livesnap_control::AbortReason;

use crate::law::{Law, Until, Waiting, run, share_out};
use crate::plant::{Outcome, Plant, STEP_S, Setting};
use crate::scenario::{Scenario, bytes};

/// Parts of the buffer that the oracle tries to keep to.
const LEVELS: [f64; 6] = [1.0, 0.95, 0.85, 0.7, 0.5, 0.25];
/// Steps of its search for a constant throttle.
const BISECTIONS: u32 = 6;
/// Time in which the rest of the level may be used up, in seconds.
const GLIDE_S: f64 = 0.05;

/// What the oracle says of a scenario.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// The limits can be kept; so is it done best.
    Feasible(Outcome),
    /// They cannot, and nobody can know before this time, in seconds.
    Infeasible {
        /// When what makes it so began.
        known_at_s: f64,
    },
}

/// A constant share.
struct Constant(f64);

impl Law for Constant {
    fn period_s(&self) -> f64 {
        f64::INFINITY
    }

    fn decide(&mut self, plant: &Plant, setting: &mut Setting) -> Option<AbortReason> {
        share_out(plant.scenario, self.0, setting);
        None
    }
}

/// Runs freely up to a level of the buffer, and from there at the pace of the disk.
struct AtLevel(f64);

impl Law for AtLevel {
    fn period_s(&self) -> f64 {
        STEP_S
    }

    fn decide(&mut self, plant: &Plant, setting: &mut Setting) -> Option<AbortReason> {
        let policy = &plant.scenario.policy;
        let room = bytes(policy.buffer_bytes_max) * self.0 - plant.used;
        let rate = plant.touch_rate();
        let ratio = if rate > 0.0 { (plant.drain_rate() + room / GLIDE_S) / rate } else { 1.0 };
        share_out(plant.scenario, ratio.clamp(policy.min_cpu_ratio, 1.0), setting);
        None
    }
}

/// Asks the oracle.
#[must_use]
pub fn ask(scenario: &Scenario) -> Verdict {
    match best(scenario, f64::INFINITY) {
        Some(best) => Verdict::Feasible(best),
        None => Verdict::Infeasible {
            known_at_s: scenario
                .known_at()
                .into_iter()
                .find(|moment| best(scenario, *moment).is_none())
                .unwrap_or(0.0),
        },
    }
}

/// The throttle that leaves the guest the most, if any keeps the limits.
fn best(scenario: &Scenario, knows_until_s: f64) -> Option<Outcome> {
    let keeping = |law: &mut dyn Law| {
        let outcome = run(scenario, law, knows_until_s, Until::Broken);
        outcome.broken_at_s.is_none().then_some(outcome)
    };
    if let Some(outcome) = keeping(&mut Waiting) {
        return Some(outcome);
    }
    let late = LEVELS.iter().find_map(|level| keeping(&mut AtLevel(*level)));
    let least = scenario.policy.min_cpu_ratio;
    let mut constant = keeping(&mut Constant(least));
    let (mut keeps, mut breaks) = (least, 1.0);
    for _ in 0..if constant.is_some() { BISECTIONS } else { 0 } {
        let middle = f64::midpoint(keeps, breaks);
        match keeping(&mut Constant(middle)) {
            Some(outcome) => {
                keeps = middle;
                constant = Some(outcome);
            }
            None => breaks = middle,
        }
    }
    [late, constant]
        .into_iter()
        .flatten()
        .max_by(|one, other| one.cpu_ratio.total_cmp(&other.cpu_ratio))
}
