//! The `livesnap` command line.
//!
//! Exit codes: 0 done and sound, 1 failed or not sound, 2 wrong usage.

#![forbid(unsafe_code)]

mod commands;
mod failure;
mod output;

use std::process::ExitCode;

use clap::Parser;

pub use failure::Failure;

/// Live point-in-time snapshots of running virtual machines.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: commands::Command,
}

fn main() -> ExitCode {
    match Cli::parse().command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::error(&failure);
            ExitCode::FAILURE
        }
    }
}
