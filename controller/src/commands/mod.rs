//! The commands, one module each.

mod inspect;
mod restore;
mod verify;

use crate::Failure;

/// What livesnap shall do.
#[derive(clap::Subcommand)]
pub enum Command {
    Verify(verify::Args),
    Inspect(inspect::Args),
    Restore(restore::Args),
}

impl Command {
    /// Does it.
    pub fn run(self) -> Result<(), Failure> {
        match self {
            Self::Verify(args) => verify::run(args),
            Self::Inspect(args) => inspect::run(args),
            Self::Restore(args) => restore::run(args),
        }
    }
}
