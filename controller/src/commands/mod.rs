//! The commands, one module each.

mod inspect;
mod restore;
mod snapshot;
mod verify;

use std::process::ExitCode;

use crate::Failure;

/// What livesnap shall do.
#[derive(clap::Subcommand)]
pub enum Command {
    Snapshot(snapshot::Args),
    Restore(restore::Args),
    Verify(verify::Args),
    Inspect(inspect::Args),
    /// Watch over a pause for another livesnap process
    #[command(hide = true)]
    Guard,
}

impl Command {
    /// Does it.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let done = match self {
            Self::Snapshot(args) => snapshot::run(args),
            Self::Restore(args) => restore::run(args),
            Self::Verify(args) => verify::run(args),
            Self::Inspect(args) => inspect::run(args),
            Self::Guard => return Ok(snapshot_core::vmm::guard::main()),
        };
        done.map(|()| ExitCode::SUCCESS)
    }
}
