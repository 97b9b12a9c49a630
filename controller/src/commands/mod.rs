//! The commands, one module each.

mod ask;
pub mod child_of;
mod completions;
mod demo;
mod doctor;
mod guard;
mod inspect;
mod man_pages;
mod plan;
mod restore;
pub mod serve;
mod snapshot;
mod target;
mod verify;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use crate::Failure;

/// What the commands that only read a snapshot are given.
#[derive(clap::Args)]
pub struct ReadArgs {
    /// Directory of the snapshot
    dir: PathBuf,
    /// Report as JSON on standard output
    #[arg(long)]
    json: bool,
}

/// What livesnap shall do.
#[derive(clap::Subcommand)]
pub enum Command {
    Demo(demo::Args),
    Doctor(doctor::Args),
    Watch(watch::Args),
    Plan(plan::Args),
    Snapshot(snapshot::Args),
    Restore(restore::Args),
    /// Check a snapshot's checksums and structure, and that its disk images are unchanged
    #[command(after_help = verify::EXAMPLES)]
    Verify(ReadArgs),
    /// Show what is in a snapshot; with --json the whole manifest
    #[command(after_help = inspect::EXAMPLES)]
    Inspect(ReadArgs),
    Serve(serve::Args),
    Ask(ask::Args),
    Completions(completions::Args),
    /// Watch over another livesnap process, and finish what it leaves half done
    #[command(hide = true)]
    Guard(guard::Args),
    /// Run a program that ends with another livesnap process
    #[command(hide = true)]
    ChildOf(child_of::Args),
    /// Write the manual
    #[command(hide = true)]
    ManPages(man_pages::Args),
    /// Play the guest for another livesnap process
    #[command(hide = true)]
    DemoGuest(demo::guest::Args),
}

impl Command {
    /// Does it.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let done = match self {
            Self::Demo(args) => demo::run(&args),
            Self::Doctor(args) => doctor::run(args),
            Self::Watch(args) => watch::run(args),
            Self::Plan(args) => plan::run(&args),
            Self::Snapshot(args) => snapshot::run(args),
            Self::Restore(args) => restore::run(args),
            Self::Verify(args) => verify::run(&args),
            Self::Inspect(args) => inspect::run(&args),
            Self::Serve(args) => serve::run(&args),
            Self::Ask(args) => ask::run(&args),
            Self::Completions(args) => completions::run(&args),
            Self::Guard(args) => return Ok(guard::run(&args)),
            Self::ChildOf(args) => child_of::run(&args),
            Self::ManPages(args) => man_pages::run(&args),
            Self::DemoGuest(args) => demo::guest::run(&args),
        };
        done.map(|()| ExitCode::SUCCESS)
    }
}
