//! The hidden command `livesnap guard`: the engine's guard, which survives a `kill -9` of the livesnap that started it, and
//! puts back the CPU time of virtual CPUs after that.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::process::getppid;
use snapshot_core::vmm::guard::{self, Guard};

use crate::{actuator, output};

/// Where to look for what is to be put back.
#[derive(clap::Args)]
pub struct Args {
    /// Directory of journals
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// The command that starts this program as a guard which puts back what it finds in `state_dir`.
pub fn command(state_dir: &Path) -> Vec<OsString> {
    let mut command = Guard::own_command();
    command.extend(["--state-dir".into(), state_dir.into()]);
    command
}

/// Runs until the livesnap that started it has ended.
pub fn run(args: &Args) -> ExitCode {
    let owner = getppid();
    let code = guard::main();
    if let (Some(state_dir), Some(owner)) = (&args.state_dir, owner) {
        for repaired in actuator::repair_after(state_dir, owner) {
            output::error(actuator::in_words(&repaired));
        }
    }
    code
}
