//! The limits of a snapshot as they stand in a request, in base units, and as `livesnap snapshot` takes them.

use std::num::NonZeroU64;

use livesnap_control::OnInfeasible;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::actuator::SHARE_MIN;
use crate::control_loop::{Change, on_infeasible_schema};

/// Limits of a snapshot, and how they are kept. What is left out is as `livesnap snapshot` has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Bound of the copy buffer in bytes.
    pub buffer_bytes: Option<u64>,
    /// Longest wait of 99 in 100 of the guest's writes, in seconds.
    #[schema(minimum = 1e-6, maximum = 1e9)]
    pub stall_limit_seconds: Option<f64>,
    /// Least share of its CPU time that the guest keeps, up to 1.
    #[schema(minimum = 0.1, maximum = 1)]
    pub min_cpu_ratio: Option<f64>,
    /// Longest time until all memory is saved, in seconds.
    #[schema(minimum = 1e-6, maximum = 1e9)]
    pub deadline_seconds: Option<f64>,
    /// Most bytes to write a second.
    #[schema(minimum = 1)]
    pub max_bandwidth_bytes_per_second: Option<u64>,
    /// What to do if the limits cannot be kept.
    #[schema(schema_with = on_infeasible_schema)]
    pub on_infeasible: OnInfeasible,
    /// Begin even if it is forecast that the limits cannot be kept.
    pub force: bool,
    /// Leave the disks out: memory and device state only.
    pub no_disks: bool,
}

/// A figure that makes no sense.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("policy.{field} is {value}: give {range}")]
pub struct PolicyError {
    field: &'static str,
    value: f64,
    range: String,
}

impl Policy {
    /// Whether each figure makes sense.
    ///
    /// # Errors
    /// With the first that does not.
    pub fn check(&self) -> Result<(), PolicyError> {
        let ratio = |value: f64| (SHARE_MIN..=1.0).contains(&value);
        let seconds = |value: f64| (1e-6..=1e9).contains(&value);
        let time = "a time from 0.000001 to 1000000000 seconds";
        let share = format!("a share from {SHARE_MIN} to 1");
        let figures = [
            ("stall_limit_seconds", self.stall_limit_seconds, seconds as fn(f64) -> bool, time),
            ("min_cpu_ratio", self.min_cpu_ratio, ratio, &share),
            ("deadline_seconds", self.deadline_seconds, seconds, time),
        ];
        for (field, value, is_good, range) in figures {
            if let Some(value) = value.filter(|value| !is_good(*value)) {
                return Err(PolicyError { field, value, range: range.to_owned() });
            }
        }
        if self.max_bandwidth_bytes_per_second == Some(0) {
            let field = "max_bandwidth_bytes_per_second";
            return Err(PolicyError { field, value: 0.0, range: "at least 1".to_owned() });
        }
        Ok(())
    }

    /// The same with what `change` names changed.
    pub fn changed(&self, change: &Change) -> Self {
        let bandwidth = |limit: Option<NonZeroU64>| limit.map(NonZeroU64::get);
        Self {
            buffer_bytes: change.buffer_bytes.or(self.buffer_bytes),
            stall_limit_seconds: change.stall_limit_seconds.or(self.stall_limit_seconds),
            min_cpu_ratio: change.min_cpu_ratio.or(self.min_cpu_ratio),
            deadline_seconds: change.deadline_seconds.unwrap_or(self.deadline_seconds),
            max_bandwidth_bytes_per_second: change
                .max_bandwidth_bytes_per_second
                .map_or(self.max_bandwidth_bytes_per_second, bandwidth),
            on_infeasible: change.on_infeasible.unwrap_or(self.on_infeasible),
            ..self.clone()
        }
    }

    /// The limits, as arguments of `livesnap snapshot` and `livesnap plan`.
    pub fn limits(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut give = |name: &str, value: Option<String>| {
            arguments.extend(value.map(|value| format!("--{name}={value}")));
        };
        give("buffer", self.buffer_bytes.map(bytes));
        give("stall-limit", self.stall_limit_seconds.map(duration));
        give("min-cpu", self.min_cpu_ratio.map(|ratio| ratio.to_string()));
        give("deadline", self.deadline_seconds.map(duration));
        let bandwidth = self.max_bandwidth_bytes_per_second;
        give("max-bandwidth", bandwidth.map(bytes));
        arguments.extend(self.no_disks.then(|| "--no-disks".into()));
        arguments
    }

    /// All of it, as arguments of `livesnap snapshot`.
    pub fn arguments(&self) -> Vec<String> {
        let is_patient = self.on_infeasible == OnInfeasible::Wait;
        let mut arguments = self.limits();
        for (name, is_wanted) in [("--on-infeasible=wait", is_patient), ("--force", self.force)] {
            arguments.extend(is_wanted.then(|| name.to_owned()));
        }
        arguments
    }
}

fn bytes(count: u64) -> String {
    format!("{count}B")
}

fn duration(seconds: f64) -> String {
    format!("{}ns", (seconds * 1e9).round())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn limits_become_arguments() {
        assert_eq!(Policy::default().arguments(), Vec::<String>::new());
        let policy: Policy = serde_json::from_str(
            r#"{"buffer_bytes": 268435456, "stall_limit_seconds": 0.01, "min_cpu_ratio": 0.5,
                "deadline_seconds": 60, "max_bandwidth_bytes_per_second": 1000000,
                "on_infeasible": "wait", "force": true, "no_disks": true}"#,
        )
        .unwrap();
        policy.check().unwrap();
        let expected = [
            "--buffer=268435456B",
            "--stall-limit=10000000ns",
            "--min-cpu=0.5",
            "--deadline=60000000000ns",
            "--max-bandwidth=1000000B",
            "--no-disks",
            "--on-infeasible=wait",
            "--force",
        ];
        assert_eq!(policy.arguments(), expected);
        assert_eq!(policy.limits(), expected[..6]);
    }

    #[test]
    fn what_a_change_names_changes() {
        let change = |text: &str| serde_json::from_str::<Change>(text).unwrap();
        let before = Policy { deadline_seconds: Some(9.0), force: true, ..Policy::default() };
        let after = before.changed(&change(r#"{"min_cpu_ratio": 0.5, "on_infeasible": "wait"}"#));
        assert_eq!((after.min_cpu_ratio, after.deadline_seconds), (Some(0.5), Some(9.0)));
        assert_eq!((after.on_infeasible, after.force), (OnInfeasible::Wait, true));
        let after = after
            .changed(&change(r#"{"deadline_seconds": null, "max_bandwidth_bytes_per_second": 7}"#));
        assert_eq!((after.deadline_seconds, after.max_bandwidth_bytes_per_second), (None, Some(7)));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, field) in [
            (r#"{"stall_limit_seconds": 0}"#, "stall_limit_seconds"),
            (r#"{"min_cpu_ratio": 1.5}"#, "min_cpu_ratio"),
            (r#"{"min_cpu_ratio": -1}"#, "min_cpu_ratio"),
            (r#"{"deadline_seconds": -3}"#, "deadline_seconds"),
            (r#"{"max_bandwidth_bytes_per_second": 0}"#, "max_bandwidth_bytes_per_second"),
        ] {
            let policy: Policy = serde_json::from_str(text).unwrap();
            assert_eq!(policy.check().unwrap_err().field, field);
        }
        assert!(serde_json::from_str::<Policy>(r#"{"stall_limit": 1}"#).is_err(), "no such field");
    }
}
