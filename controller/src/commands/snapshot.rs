//! `livesnap snapshot`: take a snapshot of a running QEMU.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGTSTP, SIGXFSZ};
use snapshot_core::vmm::Vmm;
use snapshot_core::vmm::qemu::{QemuOptions, QemuVmm};
use snapshot_core::{Cancel, Options, Reason, Report, snapshot};

use super::guard;
use super::target::TargetArgs;
use crate::actuator;
use crate::control_loop::{ControlLoop, PolicyArgs};
use crate::forecast::{self, Effort, Forecast};
use crate::measures::Measures;
use crate::probes::Choice;
use crate::{Failure, output, progress};

const EXAMPLES: &str = "\
Examples:
  livesnap snapshot --qmp /run/vm1/qmp.sock --out /backup/vm1-monday
  livesnap snapshot --qmp /run/vm1/qmp.sock --out /backup/vm1 --buffer 2GiB --json
  livesnap snapshot --qmp /run/vm1/qmp.sock --out /backup/vm1 --no-disks
  livesnap snapshot --qmp /run/vm1/qmp.sock --out /backup/vm1 --max-bandwidth 200MiB
  livesnap snapshot --qmp /run/vm1/qmp.sock --out /backup/vm1 --min-cpu 50% --deadline 5m

The guest pauses for some milliseconds and runs on while its memory is saved. Each writable disk goes on in a
new overlay (IMAGE.livesnap-*.qcow2); the image below it is the disk of the snapshot and must not be written to.
If the snapshot fails, overlays are merged back. Interrupting it (Ctrl-C, SIGTERM) is safe at any time; Ctrl-Z does nothing, for the guest would
wait with it.

Exit codes:
  0    there is a snapshot
  1    failed; the guest runs on and nothing that looks like a snapshot is left
  2    wrong usage
  3    refused before anything was touched; every reason and its remedy is told
  4    given up, or not begun, because the limits cannot be kept; as 1
  130  interrupted; as 1";

/// Take a point-in-time snapshot of a running virtual machine
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    target: TargetArgs,
    /// Longest pause; beyond it the guest is continued and the snapshot fails
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = humantime::parse_duration)]
    pause_limit: Duration,
    /// Put the overlays here instead of beside their images
    #[arg(long, value_name = "DIR", conflicts_with = "no_disks")]
    overlay_dir: Option<PathBuf>,
    /// How to measure in the kernel what the guest's threads wait: the best way that the kernel allows, none, or one of
    /// the others; docs/probes.md explains them
    #[arg(long, value_name = "TIER", default_value = "auto", value_parser = Choice::parser())]
    probes: Choice,
    /// Report as JSON on standard output
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    policy: PolicyArgs,
}

/// Runs the command.
pub fn run(args: Args) -> Result<(), Failure> {
    let cancel = cancel_on_signal()?;
    let state_dir = args.policy.state.directory();
    for leftover in actuator::repair(&state_dir) {
        output::error(actuator::in_words(&leftover));
    }
    let qemu = QemuOptions {
        overlay_dir: args.overlay_dir.clone(),
        pause_limit: args.pause_limit,
        guard_command: guard::command(&state_dir),
        ..args.target.qemu_options()
    };
    let options = Options {
        buffer_bytes: args.target.buffer_bytes(),
        max_bandwidth: args.policy.limits.max_bandwidth,
        pause_limit: args.pause_limit,
        ..Options::default()
    };
    let outcome = QemuVmm::attach(qemu)
        .map_err(|error| Failure::refused(error.reason(), error))
        .and_then(|mut vmm| {
            let forecast = refuse_infeasible(&args, &mut vmm, options.buffer_bytes, &cancel)?;
            let measures = Measures::attach(args.probes, &mut vmm, &args.target.out);
            let (bytes, limit) = (options.buffer_bytes, &options.buffer_limit);
            let control = ControlLoop::new(&args.policy, bytes, &mut vmm, limit, &cancel)?;
            Ok((vmm, forecast, measures, control))
        })
        .map(|(mut vmm, forecast, mut measures, mut control)| {
            let taken =
                take(&mut vmm, &args.target.out, &options, &cancel, &mut measures, &mut control);
            Attempt { taken, forecast, measures, control }
        });
    tell(&args.target.out, outcome, args.json)
}

/// A snapshot that was tried, and what was seen and done meanwhile.
struct Attempt {
    taken: Result<Report, Failure>,
    /// Nothing where nothing could come of it, or it could not be made.
    forecast: Option<Forecast>,
    measures: Measures,
    control: ControlLoop,
}

/// Forecasts the snapshot where that can change anything, and refuses it if the limits certainly cannot be kept.
///
/// # Errors
/// If so, or if it was cancelled. What hinders only the forecast is no error: a snapshot that cannot be taken either
/// says so itself.
fn refuse_infeasible(
    args: &Args,
    vmm: &mut QemuVmm,
    buffer_bytes: u64,
    cancel: &Cancel,
) -> Result<Option<Forecast>, Failure> {
    let Some(policy) = args.policy.to_forecast(buffer_bytes) else { return Ok(None) };
    let effort = Effort::BRIEF.at_most(args.policy.limits.max_bandwidth);
    let made = forecast::footprint(vmm).and_then(|memory| {
        if forecast::is_trivial(&memory, &policy) {
            return Ok(None);
        }
        forecast::forecast(vmm, memory, &args.target.out, policy, &effort, cancel).map(Some)
    });
    match made {
        Ok(forecast) => {
            let hint = "; nothing was begun, and --force begins all the same";
            let infeasible = forecast.as_ref().and_then(|forecast| forecast.infeasible(hint));
            infeasible.map_or(Ok(forecast), Err)
        }
        Err(failure) if failure.reason == Reason::Cancelled => Err(failure),
        Err(failure) => {
            tracing::info!(%failure, "there is no forecast");
            Ok(None)
        }
    }
}

/// Takes a snapshot with a progress bar, measures, and keeps the limits.
pub fn take(
    vmm: &mut dyn Vmm,
    out: &std::path::Path,
    options: &Options,
    cancel: &Cancel,
    measures: &mut Measures,
    control: &mut ControlLoop,
) -> Result<Report, Failure> {
    let mut bar = progress::Bar::new();
    let mut observe = |progress: &_| {
        measures.observe(progress);
        control.observe(progress, measures.probes());
        bar.show(progress, &control.in_brief());
    };
    let taken = snapshot(vmm, out, options, cancel, &mut observe);
    bar.end();
    taken.map_err(Failure::from)
}

/// Reports the outcome for people or programs.
fn tell(
    out: &std::path::Path,
    outcome: Result<Attempt, Failure>,
    as_json: bool,
) -> Result<(), Failure> {
    if as_json {
        output::json(&match &outcome {
            Ok(attempt) => attempt.json(out),
            Err(failure) => failure.json(),
        })?;
    }
    let Attempt { taken, measures, control, .. } = outcome?;
    let report = taken?;
    if !as_json {
        let mut rows = measures.rows();
        rows.extend(control.row());
        output::line(format_args!("snapshot in {}", out.display()))?;
        output::line(progress::summary(&report, &rows))?;
        if let Some(text) = reminder(&report.overlays) {
            output::line(text)?;
        }
    }
    for warning in &report.warnings {
        output::error(format_args!("warning: {warning}"));
    }
    Ok(())
}

impl Attempt {
    /// For programs.
    fn json(&self, out: &std::path::Path) -> Value {
        let mut value = match &self.taken {
            Ok(report) => json!({"outcome": "completed", "directory": out, "report": report}),
            Err(failure) => failure.json(),
        };
        value["forecast"] = self.forecast.as_ref().map(Forecast::json).into();
        value["control"] = self.control.json();
        for (name, measured) in self.measures.json() {
            value[name] = measured;
        }
        value
    }
}

/// What must not be forgotten where disks go on in overlays.
fn reminder(overlays: &[PathBuf]) -> Option<String> {
    let (first, others) = overlays.split_first()?;
    let others = match others.len() {
        0 => String::new(),
        count => format!(" and {count} more"),
    };
    Some(format!(
        "From now on the VM must be started with its disks' overlays, {}{others}: see docs/disks.md",
        first.display()
    ))
}

/// A session's end on Ctrl-C, on `kill`, and when the terminal goes away.
pub fn cancel_on_signal() -> Result<Cancel, Failure> {
    let flag = Arc::new(AtomicBool::new(false));
    let handle = |signal, flag| {
        signal_hook::flag::register(signal, flag).map_err(|error| {
            Failure::new(Reason::Internal, format!("cannot handle signal {signal}: {error}"))
        })
    };
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        handle(signal, Arc::clone(&flag))?;
    }
    // Caught, it leaves a file that would grow past the process's limit to the write's own error.
    handle(SIGXFSZ, Arc::default())?;
    // Nor does Ctrl-Z stop it: a stopped livesnap serves no faults, and the guest would wait.
    handle(SIGTSTP, Arc::default())?;
    Ok(Cancel::from(flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlays_are_not_to_be_forgotten() {
        assert_eq!(reminder(&[]), None);
        let said = |overlays: &[&str]| {
            let overlays: Vec<_> = overlays.iter().map(PathBuf::from).collect();
            reminder(&overlays).unwrap_or_default()
        };
        assert!(said(&["/a.qcow2"]).contains("overlays, /a.qcow2: see docs/disks.md"));
        assert!(said(&["/a", "/b", "/c"]).contains("/a and 2 more: see"));
    }
}
