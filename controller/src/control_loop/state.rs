//! What the control loop has in force at one moment, for programs that follow a snapshot.

use livesnap_control::Forecast;
use livesnap_control::model::Fit;
use serde::Serialize;

use super::Limits;

/// The strongest means in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The guest and the buffer are left alone.
    #[default]
    None,
    /// The buffer has another bound than it began with.
    Buffer,
    /// The guest has less than all of its CPU time.
    Throttle,
    /// The snapshot is given up.
    Abort,
}

/// How often the loop went over to each action.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Decisions {
    #[serde(skip)]
    last: Action,
    none: u64,
    buffer: u64,
    throttle: u64,
    abort: u64,
}

impl Decisions {
    /// Notes what is in force after a decision.
    pub fn note(&mut self, action: Action) {
        if action == std::mem::replace(&mut self.last, action) {
            return;
        }
        let of_action = match action {
            Action::None => &mut self.none,
            Action::Buffer => &mut self.buffer,
            Action::Throttle => &mut self.throttle,
            Action::Abort => &mut self.abort,
        };
        *of_action += 1;
    }
}

/// What will happen if the guest is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Outlook {
    /// Until all is on disk; nothing if that is beyond an hour.
    completion_seconds: Option<f64>,
    /// Most of the buffer that will be wanted.
    peak_buffer_bytes: f64,
    /// How fast the guest comes to memory that is not saved yet.
    first_touch_bytes_per_second: f64,
    /// How fast the destination takes it.
    drain_bytes_per_second: f64,
}

impl Outlook {
    /// From a forecast and the rates that it stands on.
    pub const fn new(forecast: &Forecast, fit: &Fit) -> Self {
        Self {
            completion_seconds: forecast.completion_after_s,
            peak_buffer_bytes: forecast.peak_buffer_bytes,
            first_touch_bytes_per_second: fit.touch_rate,
            drain_bytes_per_second: fit.drain_rate,
        }
    }
}

/// The control loop at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct State {
    /// Share of its CPU time that the virtual CPU keeps which is left least.
    pub cpu_ratio_min: f64,
    /// The same on an average over virtual CPUs.
    pub cpu_ratio_mean: f64,
    /// The limits in force; nothing where the share was given beforehand.
    pub policy: Option<Limits>,
    /// What is in force.
    pub action: Action,
    /// Nothing as long as too little is known.
    pub forecast: Option<Outlook>,
    /// How long the guest has had less than all of its CPU time.
    pub throttled_seconds: f64,
    /// CPU time that the kernel has withheld from virtual CPUs.
    pub withheld_seconds: f64,
    /// How often it went over to each action.
    pub decisions: Decisions,
    /// Why the guest's CPU time cannot be touched.
    pub problem: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changes_is_a_decision() {
        let mut decisions = Decisions::default();
        for action in
            [Action::None, Action::Throttle, Action::Throttle, Action::None, Action::Abort]
        {
            decisions.note(action);
        }
        let expected = Decisions { last: Action::Abort, none: 1, buffer: 0, throttle: 1, abort: 1 };
        assert_eq!(decisions, expected);
    }
}
