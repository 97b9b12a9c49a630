//! `livesnap plan`: would a snapshot keep its limits? Forecast, without arming anything.

use std::time::Duration;

use bytesize::ByteSize;
use snapshot_core::bandwidth::Limits;
use snapshot_core::vmm::qemu::QemuVmm;

use super::snapshot::cancel_on_signal;
use super::target::TargetArgs;
use super::watch::parse_interval;
use crate::control_loop::LimitArgs;
use crate::forecast::{Effort, Forecast, check_space, footprint, forecast};
use crate::{Failure, output};

/// Enough for an SSD to come up to speed.
const DISK: Limits =
    Limits { time: Duration::from_secs(1), bytes: 512 << 20, bytes_per_second: None };

const EXAMPLES: &str = "\
Examples:
  livesnap plan --qmp /run/vm1/qmp.sock --out /backup/vm1
  livesnap plan --qmp /run/vm1/qmp.sock --out /backup/vm1 --buffer 2GiB --min-cpu 20%
  livesnap plan --qmp /run/vm1/qmp.sock --out /backup/vm1 --deadline 5m --window 10s
  livesnap plan --qmp /run/vm1/qmp.sock --out /backup/vm1 --json | jq .verdict

A random sample of guest memory is watched for a while, as `livesnap watch` does, and up to 512 MiB are written to the
destination's file system meanwhile, to a file without a name. What slows a snapshot down are first writes to
memory not yet saved. They become rarer, so the dirty rate says too much of them; what was seen in one window says too
little. The forecast tells both sides, and is `infeasible` only if the limits would be broken even by a guest that writes
to nothing else than it did meanwhile. Waiting times of writes (--stall-limit) are not forecast. Needs Linux 6.7.

Exit codes:
  0    feasible, perhaps with a throttle; or uncertain: that shows only while a snapshot is taken
  1    failed
  2    wrong usage
  3    refused, as a snapshot would be; or unknown, because the dirty rate cannot be measured
  4    infeasible: the limits cannot be kept; it is told what it would take
  130  interrupted";

/// Forecast whether a snapshot would keep its limits, without taking one
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    target: TargetArgs,
    /// For how long the guest is watched: a longer window tells more of what it comes to write
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = parse_interval)]
    window: Duration,
    /// Memory that is watched: more is more exact and costs the guest more
    #[arg(long, value_name = "SIZE", default_value = "128MiB")]
    sample: ByteSize,
    /// Report as JSON on standard output
    #[arg(long)]
    json: bool,
    #[command(flatten, next_help_heading = "Limits")]
    limits: LimitArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    let found = look(args);
    let failure = match &found {
        Ok(found) => found.infeasible("").or_else(|| found.unknown()),
        Err(_) => None,
    };
    match &found {
        Ok(found) if args.json => {
            let mut value = found.json();
            value["error"] = failure.as_ref().map(ToString::to_string).into();
            output::json(&value)?;
        }
        Ok(found) => output::line(found.in_words())?,
        Err(failure) if args.json => output::json(&failure.json())?,
        Err(_) => {}
    }
    found?;
    failure.map_or(Ok(()), Err)
}

fn look(args: &Args) -> Result<Forecast, Failure> {
    let cancel = cancel_on_signal()?;
    let mut vmm = QemuVmm::attach(args.target.qemu_options())
        .map_err(|error| Failure::refused(error.reason(), error))?;
    let effort = Effort { window: args.window, sample_bytes: args.sample.as_u64(), disk: DISK }
        .at_most(args.limits.max_bandwidth);
    let out = &args.target.out;
    let memory = footprint(&mut vmm)?;
    check_space(&memory, out)?;
    forecast(
        &mut vmm,
        memory,
        out,
        args.limits.policy(args.target.buffer_bytes()),
        &effort,
        &cancel,
    )
}
