//! The `livesnap` command line.
//!
//! Exit codes: 0 done and sound, 1 failed or not sound, 2 wrong usage, 3 refused, 4 given up, 130 interrupted.

#![forbid(unsafe_code)]

mod actuator;
mod cgroup;
mod commands;
mod control_loop;
mod disk;
#[cfg(test)]
mod docs;
mod failure;
mod forecast;
mod json;
mod lines;
mod measures;
mod output;
mod probes;
mod progress;
mod scheduling;
mod units;

use std::process::ExitCode;

use clap::Parser;

pub use failure::Failure;

/// Live point-in-time snapshots of running virtual machines.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: commands::Command,
}

fn main() -> ExitCode {
    // Diagnosis, off unless asked for: RUST_LOG=snapshot_core=debug.
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    match Cli::parse().command.run() {
        Ok(code) => code,
        Err(failure) => {
            output::error(&failure);
            ExitCode::from(failure.exit_code)
        }
    }
}
