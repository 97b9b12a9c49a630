//! Steps: a command with a name, and the time it took.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

/// Runs a command to its end, and tells its name and seconds.
pub fn run(name: &str, mut command: Command) -> Result<()> {
    eprintln!("==> {name}");
    let began = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("{name}: cannot run {:?}", command.get_program()))?;
    eprintln!("==> {name}: {:.1} s", began.elapsed().as_secs_f64());
    ensure!(status.success(), "{name} failed: {command:?} ended with {status}");
    Ok(())
}

/// Runs a command to its end, and returns what it wrote to standard output.
pub fn output(mut command: Command) -> Result<String> {
    let output =
        command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The cargo that runs us, with the environment of its caller.
pub fn cargo<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments);
    command
}

/// Another program.
pub fn program<'a>(name: &str, arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(name);
    command.args(arguments);
    command
}
