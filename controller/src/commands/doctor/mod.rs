//! `livesnap doctor`: what this host, and a given virtual machine, can do, and what to do about what they cannot.
//!
//! ```text
//! mod     the command, and how findings are told
//! host    what is found on the host
//! ```

mod host;

use std::path::{Path, PathBuf};

use rustix::process::Pid;
use serde::Serialize;
use serde_json::json;
use snapshot_core::Reason;
use snapshot_core::vmm::RunState;
use snapshot_core::vmm::qemu::preflight::{Refusal, Survey};
use snapshot_core::vmm::qemu::{QemuOptions, survey};

use super::target::parse_pid;
use crate::control_loop::StateArgs;
use crate::{Failure, actuator, output};

const EXAMPLES: &str = "\
Examples:
  livesnap doctor
  livesnap doctor --out /backup
  livesnap doctor --qmp /run/vm1/qmp.sock
  livesnap doctor --json | jq '.findings[] | select(.verdict != \"ok\")'

Looks only, unless told to --repair: nothing is changed, and a virtual machine is not paused. Every finding is
  ok        as it should be
  degraded  snapshots work, with the limit that is told
  unfit     no snapshot is possible before that is changed

Exit codes:
  0  fit for snapshots
  1  unfit
  2  wrong usage";

/// Tell what this host can do, and what is in the way of a snapshot
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Look at the virtual machine behind this QMP socket too
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// QEMU's process id, where another process (such as libvirt) made the socket
    #[arg(long, value_parser = parse_pid, requires = "qmp")]
    pid: Option<Pid>,
    /// Look at the file system of this destination too
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Put back what a livesnap that was killed has changed
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    state: StateArgs,
    /// Report as JSON on standard output
    #[arg(long)]
    json: bool,
}

/// How it stands with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Degraded,
    Unfit,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    subject: &'static str,
    verdict: Verdict,
    /// What was found, and what that means.
    found: String,
    /// What to do about it, unless it is ok.
    remedy: Option<String>,
    /// Why a snapshot would fail, if it is unfit.
    reason: Option<Reason>,
}

impl Finding {
    fn ok(subject: &'static str, found: impl Into<String>) -> Self {
        let found = found.into();
        Self { subject, verdict: Verdict::Ok, found, remedy: None, reason: None }
    }

    fn degraded(
        subject: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let remedy = Some(remedy.into());
        Self { verdict: Verdict::Degraded, remedy, ..Self::ok(subject, found) }
    }

    fn unfit(
        subject: &'static str,
        reason: Reason,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let (remedy, reason) = (Some(remedy.into()), Some(reason));
        Self { verdict: Verdict::Unfit, remedy, reason, ..Self::ok(subject, found) }
    }

    /// A line, and one more for the remedy.
    fn in_words(&self) -> String {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Degraded => "degraded",
            Verdict::Unfit => "unfit",
        };
        let line = format!("{verdict:<9} {:<13} {}", self.subject, self.found);
        match &self.remedy {
            Some(remedy) => format!("{line}\n{:<24}remedy: {remedy}", ""),
            None => line,
        }
    }
}

/// Runs the command.
pub fn run(args: Args) -> Result<(), Failure> {
    let mut findings = host::look();
    findings.extend(leftovers(&args.state.directory(), args.repair));
    findings.extend(args.out.iter().flat_map(|out| host::look_at_destination(out)));
    if let Some(qmp_socket) = args.qmp {
        let options = QemuOptions { pid: args.pid, ..QemuOptions::new(qmp_socket) };
        findings.extend(match survey(&options) {
            Ok(survey) => virtual_machine(&survey),
            Err(error) => {
                let remedy = "give the QMP socket of a running QEMU that no other program uses";
                vec![Finding::unfit("VM", error.reason(), error.to_string(), remedy)]
            }
        });
    }
    let verdict = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    if args.json {
        output::json(&json!({"verdict": verdict, "findings": findings}))?;
    } else {
        for finding in &findings {
            output::line(finding.in_words())?;
        }
    }
    match findings.iter().find_map(|finding| finding.reason) {
        Some(reason) => Err(Failure::new(
            reason,
            "no snapshot is possible: follow the remedies of what is unfit",
        )),
        None => Ok(()),
    }
}

/// What livesnaps that were killed have left behind, or what became of putting it back.
fn leftovers(state_dir: &Path, repair: bool) -> Vec<Finding> {
    let subject = "throttle";
    let remedy = "run `livesnap doctor --repair`";
    let found = if repair { actuator::repair(state_dir) } else { actuator::leftovers(state_dir) };
    let findings = found.into_iter().map(|leftover| match leftover {
        Ok(_) if repair => Finding::ok(subject, actuator::in_words(&leftover)),
        Ok(journal) => {
            let path = journal.path().display();
            let found =
                format!("a livesnap that was killed has left virtual CPUs slowed down: {path}");
            Finding::degraded(subject, found, remedy)
        }
        Err(error) => Finding::degraded(subject, error.to_string(), remedy),
    });
    findings.collect()
}

fn virtual_machine(survey: &Survey) -> Vec<Finding> {
    let machine = &survey.machine;
    let state = match survey.run_state {
        Some(RunState::Running) => "running",
        Some(RunState::Paused) => "paused",
        None => "neither running nor paused",
    };
    let found = format!(
        "{} in QEMU {}, process {}, {} CPUs, {} of memory, {} disks, {state}",
        machine.machine_type,
        machine.version,
        survey.pid,
        machine.cpus,
        output::bytes(survey.layout.total_bytes()),
        survey.disks.len()
    );
    let refused = |refusal: &Refusal| {
        Finding::unfit("VM", refusal.reason, refusal.what.clone(), refusal.remedy.clone())
    };
    let mut findings = vec![Finding::ok("VM", found)];
    findings.extend(survey.refusals.iter().map(refused));
    findings
}
