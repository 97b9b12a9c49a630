//! What the operator allows, as it stands on the command line.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::ValueEnum;
use livesnap_control::policy::BUFFER_BYTES_MIN;
use livesnap_control::{OnInfeasible, Policy};

use crate::actuator::{self, SHARE_MIN};
use crate::units::as_nanos;

/// Limits of a snapshot.
#[derive(clap::Args)]
pub struct LimitArgs {
    /// Longest wait of 99 in 100 of the guest's writes, as probes measure it
    #[arg(long, value_name = "DURATION", default_value = "10ms", value_parser = humantime::parse_duration)]
    stall_limit: Duration,
    /// Least share of its CPU time that the guest keeps when it has to be slowed down, as 30% or 0.3
    #[arg(long, value_name = "SHARE", default_value = "30%", value_parser = parse_share)]
    min_cpu: f64,
    /// Longest time until all memory is saved
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    deadline: Option<Duration>,
    /// Most bytes to write a second, to leave others their share of the disk; what the guest writes has to be saved too,
    /// so much less than that makes it wait [default: as fast as the disk takes them]
    #[arg(long, value_name = "SIZE", value_parser = parse_bandwidth)]
    pub max_bandwidth: Option<NonZeroU64>,
}

/// Limits of a snapshot, and how they are kept.
#[derive(clap::Args)]
#[command(next_help_heading = "Limits, and how they are kept")]
pub struct PolicyArgs {
    #[command(flatten)]
    pub limits: LimitArgs,
    /// What to do if these limits cannot be kept
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = Infeasible::Abort, overrides_with = "on_infeasible")]
    on_infeasible: Infeasible,
    /// Begin even if it is forecast that the limits cannot be kept
    #[arg(long)]
    force: bool,
    /// Slow the guest down to this share of its CPU time while its memory is saved, whatever is forecast
    #[arg(long, value_name = "SHARE", value_parser = parse_share, conflicts_with = "no_control")]
    fixed_cpu: Option<f64>,
    /// Leave the guest's CPU time and the buffer alone: writes that find no room in it wait
    #[arg(long)]
    no_control: bool,
    /// Write each decision, with what it stands on, to this file as a line of JSON
    #[arg(long, value_name = "FILE", conflicts_with_all = ["no_control", "fixed_cpu"])]
    record: Option<PathBuf>,
    #[command(flatten)]
    pub state: StateArgs,
}

/// Where it is kept what has to be put back.
#[derive(clap::Args)]
pub struct StateArgs {
    /// Where it is kept what must be put back should livesnap be killed [default: /run/livesnap, or livesnap in
    /// $XDG_RUNTIME_DIR without root]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl StateArgs {
    /// The directory, which need not exist yet.
    pub fn directory(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(actuator::default_directory)
    }
}

/// What to do if limits cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Infeasible {
    /// Give the snapshot up, early
    Abort,
    /// Go on with the guest at its least CPU time, and let writes wait for room in the buffer
    Wait,
}

impl From<Infeasible> for OnInfeasible {
    fn from(word: Infeasible) -> Self {
        match word {
            Infeasible::Abort => Self::Abort,
            Infeasible::Wait => Self::Wait,
        }
    }
}

/// Who decides.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// Nobody: the engine's own bound on the buffer holds.
    None,
    /// The operator, beforehand.
    Fixed(f64),
    /// The control core, within these limits.
    Limits(Policy),
}

impl LimitArgs {
    /// The policy that gives a snapshot up which cannot keep them, with a buffer of at most `buffer_bytes`.
    pub fn policy(&self, buffer_bytes: u64) -> Policy {
        Policy {
            buffer_bytes_max: buffer_bytes,
            fault_stall_max_ns: as_nanos(self.stall_limit),
            min_cpu_ratio: self.min_cpu,
            deadline_ns: self.deadline.map(as_nanos),
            on_infeasible: OnInfeasible::Abort,
        }
    }
}

impl PolicyArgs {
    /// The rule, with a buffer of at most `buffer_bytes`.
    pub fn rule(&self, buffer_bytes: u64) -> Rule {
        match self.fixed_cpu {
            _ if self.no_control => Rule::None,
            Some(share) => Rule::Fixed(share),
            // Too little to forecast anything by: writes that find no room wait.
            None if buffer_bytes < BUFFER_BYTES_MIN => Rule::None,
            None => Rule::Limits(Policy {
                on_infeasible: self.on_infeasible.into(),
                ..self.limits.policy(buffer_bytes)
            }),
        }
    }

    /// The limits that have to be forecast before a snapshot is begun; nothing where the forecast changes nothing.
    pub fn to_forecast(&self, buffer_bytes: u64) -> Option<Policy> {
        match self.rule(buffer_bytes) {
            Rule::Limits(policy) if policy.on_infeasible == OnInfeasible::Abort && !self.force => {
                Some(policy)
            }
            _ => None,
        }
    }

    /// Where decisions are recorded.
    pub fn record(&self) -> Option<&PathBuf> {
        self.record.as_ref()
    }
}

/// Bytes a second, of which there must be some.
///
/// # Errors
/// If it is no size, or nothing.
pub fn parse_bandwidth(text: &str) -> Result<NonZeroU64, String> {
    let size: ByteSize = text.parse()?;
    NonZeroU64::new(size.as_u64())
        .ok_or_else(|| "at this rate there would never be a snapshot".into())
}

/// A share as `30%` or `0.3`, no less than can be put into force.
///
/// # Errors
/// If it is none.
pub fn parse_share(text: &str) -> Result<f64, String> {
    let share = match text.strip_suffix('%') {
        Some(percent) => percent.trim_end().parse::<f64>().map(|percent| percent / 100.0),
        None => text.parse(),
    };
    share
        .ok()
        .filter(|share| (SHARE_MIN..=1.0).contains(share))
        .ok_or_else(|| format!("not a share between {:.0}% and 100%", SHARE_MIN * 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        policy: PolicyArgs,
    }

    #[test]
    fn a_small_buffer_is_left_to_the_engine() {
        let Cli { policy } = clap::Parser::parse_from(["livesnap"]);
        assert_eq!(policy.rule(BUFFER_BYTES_MIN - 1), Rule::None);
        assert!(matches!(policy.rule(BUFFER_BYTES_MIN), Rule::Limits(_)));
    }

    #[test]
    fn only_what_a_forecast_can_change_is_forecast() {
        let is_forecast = |arguments: &[&str]| {
            let arguments = ["livesnap"].iter().chain(arguments);
            let Cli { policy } = clap::Parser::parse_from(arguments);
            policy.to_forecast(BUFFER_BYTES_MIN).is_some()
        };
        assert!(is_forecast(&[]));
        for argument in ["--force", "--no-control", "--on-infeasible=wait", "--fixed-cpu=50%"] {
            assert!(!is_forecast(&[argument]), "{argument}");
        }
    }

    #[test]
    fn shares_are_read_as_people_write_them() {
        for (text, share) in [("30%", 0.3), ("30 %", 0.3), ("0.3", 0.3), ("1", 1.0), ("10%", 0.1)] {
            assert_eq!(parse_share(text), Ok(share), "{text}");
        }
        for text in ["", "%", "5%", "0", "-0.3", "30", "101%", "nan", "half"] {
            assert!(parse_share(text).is_err(), "{text}");
        }
    }
}
