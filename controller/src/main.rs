//! The `livesnap` command line.
//!
//! Exit codes: 0 done and sound, 1 failed or not sound, 2 wrong usage, 3 refused, 4 given up, 130 interrupted.

#![forbid(unsafe_code)]

mod actuator;
mod cgroup;
mod commands;
mod control_loop;
mod daemon;
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
mod process;
mod progress;
mod scheduling;
mod units;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use commands::Command;
use commands::serve::LogFormat;
pub use failure::Failure;

/// Live point-in-time snapshots of running virtual machines.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    log(&command);
    match command.run() {
        Ok(code) => code,
        Err(failure) => {
            output::error(&failure);
            ExitCode::from(failure.exit_code)
        }
    }
}

/// Diagnosis on standard error: of the daemon what it does, of other commands only what is asked for by
/// `RUST_LOG=snapshot_core=debug`.
fn log(command: &Command) {
    let format = match command {
        Command::Serve(args) => Some(args.log()),
        _ => None,
    };
    let default = if format.is_some() { "livesnap=info" } else { "" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    // See no-color.org.
    let may_colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(may_colour && std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        Some(LogFormat::Json) => log.json().init(),
        Some(LogFormat::Text) | None => log.init(),
    }
}
