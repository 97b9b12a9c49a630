//! `livesnap snapshot`: take a snapshot of a running QEMU.

use std::path::{Path, PathBuf};
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
use crate::control_loop::{ControlLoop, LiveLimits, PolicyArgs};
use crate::forecast::{self, Effort, Forecast};
use crate::lines::{Event, Follower, Lines, limits};
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
  livesnap snapshot --qmp /run/vm1/qmp.sock --out /backup/vm1 --json-lines | jq --unbuffered -c '[.event, .phase]'

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
    /// For programs that follow a snapshot: progress on standard output, one JSON object a line, as it comes, and at last what
    /// --json tells; docs/following.md explains them
    #[arg(long, conflicts_with = "json")]
    json_lines: bool,
    /// Take changes of limits from standard input, one JSON object a line
    #[arg(long, requires = "json_lines", hide = true)]
    policy_updates: bool,
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
    let options = Options {
        buffer_bytes: args.target.buffer_bytes(),
        max_bandwidth: args.policy.limits.max_bandwidth.into(),
        pause_limit: args.pause_limit,
        ..Options::default()
    };
    let rule = args.policy.rule(options.buffer_bytes);
    let live = LiveLimits::new(rule, options.max_bandwidth.clone());
    let lines = follow_by_lines(&args, &live)?;
    let mut attempt = Attempt::new(lines.clone());
    let taken = attempt.make(&args, &options, &live, &cancel);
    let value = || attempt.json(&args.target.out, &taken);
    if let Some(lines) = &lines {
        lines.end(value(), &cancel);
    } else if args.json {
        output::json(&value())?;
    }
    let report = taken?;
    if !args.json && lines.is_none() {
        output::line(taken_to(&args.target.out.display()))?;
        output::line(attempt.in_words(&report))?;
    }
    for warning in &report.warnings {
        output::error(format_args!("warning: {warning}"));
    }
    Ok(())
}

/// The lines for a program that follows the snapshot, if there is one.
fn follow_by_lines(args: &Args, live: &LiveLimits) -> Result<Option<Lines>, Failure> {
    if !args.json_lines {
        return Ok(None);
    }
    let lines = Lines::to_stdout().and_then(|lines| {
        if args.policy_updates {
            limits::follow_stdin(live.clone(), lines.clone())?;
        }
        Ok(lines)
    });
    let failed = |error| Failure::new(Reason::Internal, format!("cannot make a thread: {error}"));
    lines.map(Some).map_err(failed)
}

/// A snapshot that is tried, and what is seen and done meanwhile.
pub struct Attempt {
    lines: Option<Lines>,
    /// Nothing where nothing could come of it, or it could not be made.
    forecast: Option<Forecast>,
    measures: Measures,
    control: ControlLoop,
}

impl Attempt {
    /// With nothing seen or done yet.
    pub const fn new(lines: Option<Lines>) -> Self {
        Self { lines, forecast: None, measures: Measures::none(), control: ControlLoop::Off }
    }

    /// Attaches, forecasts, and takes the snapshot.
    fn make(
        &mut self,
        args: &Args,
        options: &Options,
        live: &LiveLimits,
        cancel: &Cancel,
    ) -> Result<Report, Failure> {
        let qemu = QemuOptions {
            overlay_dir: args.overlay_dir.clone(),
            pause_limit: args.pause_limit,
            guard_command: guard::command(&args.policy.state.directory()),
            ..args.target.qemu_options()
        };
        let mut vmm =
            QemuVmm::attach(qemu).map_err(|error| Failure::refused(error.reason(), error))?;
        self.refuse_infeasible(args, &mut vmm, options.buffer_bytes, cancel)?;
        self.measures = Measures::attach(args.probes, &mut vmm, &args.target.out);
        let limit = &options.buffer_limit;
        self.control = ControlLoop::new(&args.policy, live, &mut vmm, limit, cancel)?;
        self.take(&mut vmm, &args.target.out, options, cancel)
    }

    /// Forecasts the snapshot where that can change anything, and refuses it if the limits certainly cannot be kept.
    ///
    /// # Errors
    /// If so, or if it was cancelled. What hinders only the forecast is no error: a snapshot that cannot be taken either
    /// says so itself.
    fn refuse_infeasible(
        &mut self,
        args: &Args,
        vmm: &mut QemuVmm,
        buffer_bytes: u64,
        cancel: &Cancel,
    ) -> Result<(), Failure> {
        let Some(policy) = args.policy.to_forecast(buffer_bytes) else { return Ok(()) };
        let effort = Effort::BRIEF.at_most(args.policy.limits.max_bandwidth);
        let made = forecast::footprint(vmm).and_then(|memory| {
            if forecast::is_trivial(&memory, &policy) {
                return Ok(None);
            }
            forecast::forecast(vmm, memory, &args.target.out, policy, &effort, cancel).map(Some)
        });
        match made {
            Ok(forecast) => {
                self.forecast = forecast;
                let Some(forecast) = &self.forecast else { return Ok(()) };
                if let Some(lines) = &self.lines {
                    lines.post(Event::Forecast(forecast.json()));
                }
                let hint = "; nothing was begun, and --force begins all the same";
                forecast.infeasible(hint).map_or(Ok(()), Err)
            }
            Err(failure) if failure.reason == Reason::Cancelled => Err(failure),
            Err(failure) => {
                tracing::info!(%failure, "there is no forecast");
                Ok(())
            }
        }
    }

    /// Takes a snapshot with a progress bar or lines, measures, and keeps the limits.
    pub fn take(
        &mut self,
        vmm: &mut dyn Vmm,
        out: &Path,
        options: &Options,
        cancel: &Cancel,
    ) -> Result<Report, Failure> {
        let Self { measures, control, lines, .. } = self;
        let mut bar = progress::Bar::new();
        let mut follower = lines.clone().map(Follower::new);
        let mut observe = |progress: &_| {
            measures.observe(progress);
            control.observe(progress, measures.probes());
            bar.show(progress, &control.in_brief());
            if let Some(follower) = &mut follower {
                follower.observe(progress, measures, control);
            }
        };
        let taken = snapshot(vmm, out, options, cancel, &mut observe);
        bar.end();
        taken.map_err(Failure::from)
    }

    /// For people.
    fn in_words(&self, report: &Report) -> String {
        let mut rows = self.measures.rows();
        rows.extend(self.control.row());
        let summary = progress::summary(report, &rows);
        let reminder = reminder(&report.overlays).map_or(String::new(), |text| format!("\n{text}"));
        format!("{summary}{reminder}")
    }

    /// For programs.
    fn json(&self, out: &Path, taken: &Result<Report, Failure>) -> Value {
        let mut value = match taken {
            Ok(report) => json!({
                "outcome": "completed",
                "directory": out,
                "report": report,
                "in_words": self.in_words(report),
            }),
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

/// Where a snapshot is, as the first line of its report.
pub fn taken_to(directory: &impl std::fmt::Display) -> String {
    format!("snapshot in {directory}")
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
