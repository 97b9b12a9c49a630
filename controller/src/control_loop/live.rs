//! The limits of a running snapshot, which another thread may change.
//!
//! The session's thread takes the newest with its next decision, the writer with its next write; whoever changes them
//! never waits for either.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};

use livesnap_control::{OnInfeasible, Policy, PolicyError};
use serde::{Deserialize, Deserializer, Serialize};
use snapshot_core::BandwidthLimit;
use utoipa::ToSchema;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};

use super::Rule;
use crate::actuator::SHARE_MIN;
use crate::units::{number, whole};

/// Limits to be changed while a snapshot runs; what is not named stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(as = PolicyChange)]
pub struct Change {
    /// Bound of the copy buffer in bytes.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64)]
    pub buffer_bytes: Option<u64>,
    /// Longest wait of 99 in 100 of the guest's writes, in seconds.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = f64, minimum = 1e-6, maximum = 1e9)]
    pub stall_limit_seconds: Option<f64>,
    /// Least share of its CPU time that the guest keeps, up to 1.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = f64, minimum = 0.1, maximum = 1)]
    pub min_cpu_ratio: Option<f64>,
    /// Longest time until all memory is saved, in seconds; null takes the limit away.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<f64>, minimum = 1e-6, maximum = 1e9)]
    pub deadline_seconds: Option<Option<f64>>,
    /// Most bytes to write a second; null takes the limit away.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 1)]
    pub max_bandwidth_bytes_per_second: Option<Option<NonZeroU64>>,
    /// What to do if the limits cannot be kept.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = on_infeasible_schema)]
    pub on_infeasible: Option<OnInfeasible>,
}

/// What the API may be told to do if limits cannot be kept: the control core's words.
pub fn on_infeasible_schema() -> Schema {
    let words = [OnInfeasible::Abort, OnInfeasible::Wait].map(|word| serde_json::json!(word));
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(words)).into()
}

/// Limits in force, by the same names.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// All but the bandwidth; nothing if nobody would keep them.
    #[serde(flatten)]
    kept: Option<Kept>,
    max_bandwidth_bytes_per_second: Option<NonZeroU64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Kept {
    buffer_bytes: u64,
    stall_limit_seconds: f64,
    min_cpu_ratio: f64,
    deadline_seconds: Option<f64>,
    on_infeasible: OnInfeasible,
}

/// Why limits were not changed.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ChangeError {
    /// There is nobody who would keep them.
    #[error(
        "of this snapshot only max_bandwidth_bytes_per_second can be changed, because of --no-control, --fixed-cpu or a --buffer below 64MiB"
    )]
    NotControlled,
    /// A share that cannot be put into force.
    #[error("min_cpu_ratio is {ratio}, but can be {SHARE_MIN} to 1")]
    Share {
        /// What was given.
        ratio: f64,
    },
    /// They make no sense.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

/// The rule and the bandwidth in force. Clones share them.
#[derive(Clone, Debug)]
pub struct LiveLimits {
    state: Arc<Mutex<State>>,
    max_bandwidth: BandwidthLimit,
}

#[derive(Debug)]
struct State {
    rule: Rule,
    /// Whether it is another one than was taken last.
    is_new: bool,
}

impl LiveLimits {
    /// Begins with `rule`, and changes `max_bandwidth` on the spot.
    pub fn new(rule: Rule, max_bandwidth: BandwidthLimit) -> Self {
        Self { state: Arc::new(Mutex::new(State { rule, is_new: false })), max_bandwidth }
    }

    /// The rule now.
    pub fn rule(&self) -> Rule {
        self.with(|state| state.rule.clone())
    }

    /// All limits now.
    pub fn in_force(&self) -> Limits {
        let kept = match self.rule() {
            Rule::Limits(policy) => Some(Kept::of(&policy)),
            Rule::None | Rule::Fixed(_) => None,
        };
        Limits { kept, max_bandwidth_bytes_per_second: self.max_bandwidth.get() }
    }

    /// A policy that has changed since this was last asked.
    pub fn take_changed(&self) -> Option<Policy> {
        self.with(|state| match (std::mem::take(&mut state.is_new), &state.rule) {
            (true, Rule::Limits(policy)) => Some(*policy),
            _ => None,
        })
    }

    /// Changes limits; returns all that are in force then.
    ///
    /// # Errors
    /// If nobody would keep them, or they make no sense; what was in force stays in force.
    pub fn change(&self, change: &Change) -> Result<Limits, ChangeError> {
        self.with(|state| match &mut state.rule {
            Rule::Limits(policy) => {
                let changed = change.applied_to(*policy);
                check(&changed)?;
                state.is_new |= *policy != changed;
                *policy = changed;
                Ok(())
            }
            Rule::None | Rule::Fixed(_) if change.is_about_bandwidth_alone() => Ok(()),
            Rule::None | Rule::Fixed(_) => Err(ChangeError::NotControlled),
        })?;
        if let Some(max_bandwidth) = change.max_bandwidth_bytes_per_second {
            self.max_bandwidth.set(max_bandwidth);
        }
        Ok(self.in_force())
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Change {
    fn applied_to(&self, policy: Policy) -> Policy {
        let nanos = |seconds: f64| whole(seconds * 1e9);
        Policy {
            buffer_bytes_max: self.buffer_bytes.unwrap_or(policy.buffer_bytes_max),
            fault_stall_max_ns: self.stall_limit_seconds.map_or(policy.fault_stall_max_ns, nanos),
            min_cpu_ratio: self.min_cpu_ratio.unwrap_or(policy.min_cpu_ratio),
            deadline_ns: match self.deadline_seconds {
                Some(deadline) => deadline.map(nanos),
                None => policy.deadline_ns,
            },
            on_infeasible: self.on_infeasible.unwrap_or(policy.on_infeasible),
        }
    }

    fn is_about_bandwidth_alone(&self) -> bool {
        let bandwidth = self.max_bandwidth_bytes_per_second;
        *self == Self { max_bandwidth_bytes_per_second: bandwidth, ..Self::default() }
    }
}

impl Kept {
    fn of(policy: &Policy) -> Self {
        let seconds = |ns: u64| number(ns) / 1e9;
        Self {
            buffer_bytes: policy.buffer_bytes_max,
            stall_limit_seconds: seconds(policy.fault_stall_max_ns),
            min_cpu_ratio: policy.min_cpu_ratio,
            deadline_seconds: policy.deadline_ns.map(seconds),
            on_infeasible: policy.on_infeasible,
        }
    }
}

fn check(policy: &Policy) -> Result<(), ChangeError> {
    policy.check()?;
    let ratio = policy.min_cpu_ratio;
    if ratio < SHARE_MIN { Err(ChangeError::Share { ratio }) } else { Ok(()) }
}

/// What is there is to be changed, also if it is null.
fn named<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

    use super::*;
    use crate::json;

    fn limits(rule: Rule) -> LiveLimits {
        LiveLimits::new(rule, BandwidthLimit::default())
    }

    fn policy() -> Policy {
        Policy::for_host(1 << 34)
    }

    fn change(text: &str) -> Change {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_is_named_changes_and_the_rest_stays() {
        let limits = limits(Rule::Limits(policy()));
        assert_eq!(limits.take_changed(), None);
        let first =
            r#"{"stall_limit_seconds": 0.002, "min_cpu_ratio": 0.5, "deadline_seconds": 60}"#;
        let told = limits.change(&change(first)).unwrap();
        let wanted = Policy {
            fault_stall_max_ns: 2_000_000,
            min_cpu_ratio: 0.5,
            deadline_ns: Some(60_000_000_000),
            ..policy()
        };
        assert_eq!(limits.clone().take_changed(), Some(wanted));
        assert_eq!(limits.take_changed(), None, "it is taken once");
        let told = serde_json::to_value(told).unwrap();
        assert_eq!(told["stall_limit_seconds"], 0.002, "{told:#}");
        assert_eq!(told["deadline_seconds"], 60.0, "{told:#}");
        assert_eq!(told["max_bandwidth_bytes_per_second"], serde_json::Value::Null, "{told:#}");

        let second = r#"{"deadline_seconds": null, "buffer_bytes": 268435456,
            "max_bandwidth_bytes_per_second": 1000000, "on_infeasible": "wait"}"#;
        limits.change(&change(second)).unwrap();
        let last = limits.take_changed().unwrap();
        assert_eq!((last.deadline_ns, last.buffer_bytes_max), (None, 256 << 20));
        assert_eq!((last.on_infeasible, last.min_cpu_ratio), (OnInfeasible::Wait, 0.5));
        assert_eq!(limits.max_bandwidth.get(), NonZeroU64::new(1_000_000));
        limits.change(&change(r#"{"max_bandwidth_bytes_per_second": null}"#)).unwrap();
        assert_eq!(limits.max_bandwidth.get(), None);
        assert_eq!(limits.take_changed(), None, "the policy is the same");
    }

    #[test]
    fn what_is_unknown_or_absurd_changes_nothing() {
        for text in [
            "[]",
            "1",
            r#"{"colour": "red"}"#,
            r#"{"min_cpu_ratio": "50%"}"#,
            r#"{"min_cpu_ratio": null}"#,
            r#"{"on_infeasible": "pray"}"#,
            r#"{"max_bandwidth_bytes_per_second": 0}"#,
            r#"{"buffer_bytes": -1}"#,
        ] {
            assert!(json::from_slice::<Change>(text.as_bytes()).is_err(), "{text}");
        }
        let limits = limits(Rule::Limits(policy()));
        for text in [
            r#"{"stall_limit_seconds": 0}"#,
            r#"{"stall_limit_seconds": -1}"#,
            r#"{"deadline_seconds": 0, "max_bandwidth_bytes_per_second": 1}"#,
            r#"{"buffer_bytes": 1}"#,
            r#"{"min_cpu_ratio": 0.05}"#,
            r#"{"min_cpu_ratio": 2}"#,
        ] {
            assert!(limits.change(&change(text)).is_err(), "{text}");
        }
        assert_eq!((limits.take_changed(), limits.max_bandwidth.get()), (None, None));
        assert_eq!(limits.rule(), Rule::Limits(policy()));
    }

    #[test]
    fn without_control_only_the_bandwidth_can_be_changed() {
        for rule in [Rule::None, Rule::Fixed(0.5)] {
            let limits = limits(rule);
            let changed = limits.change(&change(r#"{"min_cpu_ratio": 0.5}"#));
            assert_eq!(changed, Err(ChangeError::NotControlled));
            limits.change(&change(r#"{"max_bandwidth_bytes_per_second": 7}"#)).unwrap();
            assert_eq!(limits.max_bandwidth.get(), NonZeroU64::new(7));
        }
    }
}
