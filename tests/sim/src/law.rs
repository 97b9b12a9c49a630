//! Laws: the controller that livesnap runs, and peers to compare it with.

use livesnap_control::record::Tick;
use livesnap_control::vcpu::divide;
use livesnap_control::{AbortReason, Command, Controller, PolicyError, TICK_S};

use crate::plant::{Outcome, Plant, STEP_S, Setting};
use crate::sampler::Sampler;
use crate::scenario::{Scenario, bytes, weighted};

/// Changes of the throttle that count as a change of direction.
const REVERSAL_RATIO: f64 = 0.1;

/// Decides from tick to tick.
pub trait Law {
    /// Seconds between decisions.
    fn period_s(&self) -> f64 {
        TICK_S
    }

    /// Sets what shall be in force from now on; returns a reason to give up.
    fn decide(&mut self, plant: &Plant, setting: &mut Setting) -> Option<AbortReason>;
}

/// When to stop a run that is not over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Never.
    Over,
    /// As soon as a limit is broken.
    Broken,
}

/// Runs a law on what happens up to `knows_until_s`.
pub fn run(scenario: &Scenario, law: &mut dyn Law, knows_until_s: f64, until: Until) -> Outcome {
    let mut plant = Plant::new(scenario, knows_until_s);
    let mut setting =
        Setting { shares: vec![1.0; scenario.vcpus.len()], limit: scenario.buffer_bytes };
    let mut reversals = Reversals::default();
    let mut aborted = None;
    let mut next_s = 0.0;
    while !plant.is_over() {
        if plant.time_s + STEP_S / 2.0 >= next_s {
            next_s += law.period_s();
            aborted = law.decide(&plant, &mut setting).map(|reason| (plant.time_s, reason));
            if aborted.is_some() {
                break;
            }
            reversals.see(weighted(scenario, &setting.shares));
        }
        plant.step(&setting);
        if until == Until::Broken && plant.broken_at_s().is_some() {
            break;
        }
    }
    Outcome { aborted, reversals: reversals.count, share_min: reversals.lowest, ..plant.outcome() }
}

/// Counts changes of direction, trifles aside.
struct Reversals {
    count: u32,
    lowest: f64,
    turning: f64,
    rises: Option<bool>,
}

impl Default for Reversals {
    fn default() -> Self {
        Self { count: 0, lowest: 1.0, turning: 1.0, rises: None }
    }
}

impl Reversals {
    fn see(&mut self, share: f64) {
        self.lowest = self.lowest.min(share);
        let moved = share - self.turning;
        match self.rises {
            Some(true) if moved > 0.0 => self.turning = share,
            Some(false) if moved < 0.0 => self.turning = share,
            _ if moved.abs() >= REVERSAL_RATIO => {
                self.count += u32::from(self.rises.is_some());
                self.rises = Some(moved > 0.0);
                self.turning = share;
            }
            _ => {}
        }
    }
}

/// The control core, seeing what the sampler lets it see.
#[derive(Debug)]
pub struct Controlled {
    controller: Controller,
    sampler: Sampler,
    /// Keeps the number of first touches from it, so that it has nothing to forecast from.
    blindfold: bool,
    /// Every tick, if it is to be kept.
    record: Option<Vec<Tick<'static>>>,
}

impl Controlled {
    /// The controller as livesnap runs it.
    ///
    /// # Errors
    /// When the scenario's policy makes no sense.
    pub fn new(scenario: &Scenario) -> Result<Self, PolicyError> {
        Ok(Self {
            controller: Controller::new(scenario.policy, scenario.vcpus.len())?,
            sampler: Sampler::new(scenario.seed),
            blindfold: false,
            record: None,
        })
    }

    /// The same without a forecast: the control that shows that the forecast is what keeps the limits.
    ///
    /// # Errors
    /// When the scenario's policy makes no sense.
    pub fn blindfolded(scenario: &Scenario) -> Result<Self, PolicyError> {
        Ok(Self { blindfold: true, ..Self::new(scenario)? })
    }

    /// The same, keeping a record.
    ///
    /// # Errors
    /// When the scenario's policy makes no sense.
    pub fn recorded(scenario: &Scenario) -> Result<Self, PolicyError> {
        Ok(Self { record: Some(Vec::new()), ..Self::new(scenario)? })
    }

    /// What was recorded.
    #[must_use]
    pub fn into_record(self) -> Vec<Tick<'static>> {
        self.record.unwrap_or_default()
    }
}

impl Law for Controlled {
    fn decide(&mut self, plant: &Plant, setting: &mut Setting) -> Option<AbortReason> {
        let mut seen = self.sampler.sample(plant, setting.limit);
        if self.blindfold
            && let Some((sample, vcpus)) = &mut seen
        {
            sample.touched_bytes = 0;
            vcpus.iter_mut().for_each(|vcpu| vcpu.touched_bytes = 0);
        }
        let (sample, vcpus) = seen.unzip();
        let vcpus = vcpus.unwrap_or_default();
        let command: Command = self.controller.step(sample.as_ref(), &vcpus, TICK_S);
        if let Some(record) = &mut self.record {
            record.push(Tick {
                policy: None,
                dt_s: TICK_S,
                sample,
                vcpus: vcpus.into(),
                command,
                shares: self.controller.vcpu_shares().to_vec().into(),
            });
        }
        setting.shares.copy_from_slice(self.controller.vcpu_shares());
        if command.buffer_limit_bytes > 0 {
            setting.limit = bytes(command.buffer_limit_bytes);
        }
        command.abort.map(|abort| abort.reason)
    }
}

/// Plain waiting: the whole buffer, no throttle, no abort.
#[derive(Debug)]
pub struct Waiting;

impl Law for Waiting {
    fn decide(&mut self, plant: &Plant, setting: &mut Setting) -> Option<AbortReason> {
        setting.limit = bytes(plant.scenario.policy.buffer_bytes_max);
        None
    }
}

/// As QEMU's auto-converge (`migration/ram.c`): where a period brought more than half of what it took away, twice,
/// 20 % are taken from all virtual CPUs, then 10 % more each time. Never given back. Here no further than to the least
/// share of the policy, which QEMU's `max-cpu-throttle` would be set to.
#[derive(Debug, Default)]
pub struct AutoConverge {
    before: (f64, f64),
    high_periods: u32,
    throttle: f64,
}

impl Law for AutoConverge {
    fn period_s(&self) -> f64 {
        1.0
    }

    fn decide(&mut self, plant: &Plant, setting: &mut Setting) -> Option<AbortReason> {
        let policy = &plant.scenario.policy;
        setting.limit = bytes(policy.buffer_bytes_max);
        let (touched, drained) = (plant.touched - self.before.0, plant.drained - self.before.1);
        self.before = (plant.touched, plant.drained);
        if touched > drained / 2.0 {
            self.high_periods += 1;
            if self.high_periods >= 2 {
                self.high_periods = 0;
                self.throttle += if self.throttle > 0.0 { 0.1 } else { 0.2 };
            }
        }
        self.throttle = self.throttle.min(1.0 - policy.min_cpu_ratio);
        setting.shares.fill(1.0 - self.throttle);
        None
    }
}

/// Shares of virtual CPUs that leave `ratio` of all writes.
pub fn share_out(scenario: &Scenario, ratio: f64, setting: &mut Setting) {
    setting.limit = bytes(scenario.policy.buffer_bytes_max);
    divide(ratio, scenario.policy.min_cpu_ratio, &scenario.vcpus, &mut setting.shares);
}
