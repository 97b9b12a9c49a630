//! Limits of a snapshot as the daemon is asked for them: what is not said is the daemon's to choose.

use std::num::NonZeroU64;
use std::time::Duration;

use bytesize::ByteSize;

use crate::control_loop::{Infeasible, parse_bandwidth, parse_share};
use crate::daemon::Policy;

/// Limits of a snapshot, and how they are kept.
#[derive(clap::Args)]
#[command(next_help_heading = "Limits, and how they are kept")]
pub struct Args {
    /// Bound of the copy buffer
    #[arg(long, value_name = "SIZE")]
    buffer: Option<ByteSize>,
    /// Longest wait of 99 in 100 of the guest's writes
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    stall_limit: Option<Duration>,
    /// Least share of its CPU time that the guest keeps, as 30% or 0.3
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    min_cpu: Option<f64>,
    /// Longest time until all memory is saved
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    deadline: Option<Duration>,
    /// Most bytes to write a second
    #[arg(long, value_name = "SIZE", value_parser = parse_bandwidth)]
    max_bandwidth: Option<NonZeroU64>,
    /// What to do if these limits cannot be kept
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = Infeasible::Abort)]
    on_infeasible: Infeasible,
    /// Begin even if it is forecast that the limits cannot be kept
    #[arg(long)]
    force: bool,
    /// Leave the disks out: memory and device state only
    #[arg(long)]
    no_disks: bool,
}

impl From<&Args> for Policy {
    fn from(args: &Args) -> Self {
        let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
        Self {
            buffer_bytes: args.buffer.map(|size| size.as_u64()),
            stall_limit_seconds: seconds(args.stall_limit),
            min_cpu_ratio: args.min_cpu,
            deadline_seconds: seconds(args.deadline),
            max_bandwidth_bytes_per_second: args.max_bandwidth.map(NonZeroU64::get),
            on_infeasible: args.on_infeasible.into(),
            force: args.force,
            no_disks: args.no_disks,
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

    use serde_json::json;

    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        limits: Args,
    }

    #[test]
    fn limits_are_asked_for_in_base_units() {
        let asked = |arguments: &[&str]| {
            let arguments = ["ask"].iter().chain(arguments);
            let cli: Cli = clap::Parser::try_parse_from(arguments).unwrap();
            json!(Policy::from(&cli.limits))
        };
        assert_eq!(asked(&[]), json!(Policy::default()));
        let all = asked(&[
            "--buffer=1GiB",
            "--stall-limit=5ms",
            "--min-cpu=50%",
            "--deadline=1m",
            "--max-bandwidth=1MB",
            "--on-infeasible=wait",
            "--force",
            "--no-disks",
        ]);
        let expected = json!({
            "buffer_bytes": 1 << 30, "stall_limit_seconds": 0.005, "min_cpu_ratio": 0.5,
            "deadline_seconds": 60.0, "max_bandwidth_bytes_per_second": 1_000_000,
            "on_infeasible": "wait", "force": true, "no_disks": true,
        });
        assert_eq!(all, expected);
    }
}
