//! The hidden command `livesnap child-of PID PROGRAM ...`: becomes a program that is ended when its parent ends.
//!
//! The kernel's own tie (`PR_SET_PDEATHSIG`) holds also if the parent is killed, survives the change of program,
//! and can only be set by the child itself. It is lost if the program changes its user.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use snapshot_core::Reason;

use super::target::parse_pid;
use crate::Failure;

/// The tie and the program.
#[derive(clap::Args)]
pub struct Args {
    /// Only with what nobody else wants of processors and disks
    #[arg(long)]
    idle: bool,
    /// The parent
    #[arg(value_parser = parse_pid)]
    parent: Pid,
    /// The program
    program: String,
    /// Its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// A command that runs `program`, and has it terminated when the thread that starts it ends.
pub fn command(program: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("child-of").arg(std::process::id().to_string()).arg(program);
    command
}

/// The same of a program that takes only what nobody else wants of processors and disks.
pub fn idle_command(program: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args(["child-of", "--idle"]).arg(std::process::id().to_string()).arg(program);
    command
}

/// Becomes the program; returns only if that fails.
pub fn run(args: &Args) -> Result<(), Failure> {
    let program = &args.program;
    let failed = |error: std::io::Error| {
        Failure::new(Reason::BadArgument, format!("could not run {program}: {error}"))
    };
    set_parent_process_death_signal(Some(Signal::TERM)).map_err(|errno| failed(errno.into()))?;
    if getppid() != Some(args.parent) {
        // It ended before the tie was made.
        return Err(Failure::new(Reason::Cancelled, format!("{program} is not wanted any more")));
    }
    if args.idle {
        snapshot_core::stand_back();
    }
    Err(failed(Command::new(program).args(&args.arguments).exec()))
}
