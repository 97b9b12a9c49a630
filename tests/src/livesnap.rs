//! Runs the product as a user does: the `livesnap` binary.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::qemu::Qemu;

/// The binary that was built beside this program.
pub fn binary() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this program lies")?;
    // Tests lie in a folder `deps` beside the binaries.
    let path = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("livesnap"))
        .find(|path| path.is_file())
        .context("there is no livesnap beside this program: run `cargo build -p livesnap` in the same profile")?;
    Ok(path)
}

/// `livesnap` with arguments, not started yet.
pub fn command<I: IntoIterator<Item = impl Into<OsString>>>(arguments: I) -> Result<Command> {
    let mut command = Command::new(binary()?);
    command.args(arguments.into_iter().map(Into::into));
    Ok(command)
}

/// `livesnap snapshot --json` of `qemu` into `out`, with more arguments, not started yet.
pub fn snapshot_command(qemu: &Qemu, out: &Path, more: &[&str]) -> Result<Command> {
    let mut command = command(["snapshot", "--json", "--qmp"])?;
    command.arg(qemu.qmp_socket()).arg("--out").arg(out).args(more);
    Ok(command)
}

/// Takes a snapshot and returns the JSON that the command printed.
pub fn snapshot(qemu: &Qemu, out: &Path, more: &[&str]) -> Result<Value> {
    let output = snapshot_command(qemu, out, more)?.output().context("cannot run livesnap")?;
    let told = json(&output)?;
    ensure!(output.status.success() && told["outcome"] == "completed", "{told:#}");
    Ok(told)
}

/// What a command told on standard output.
pub fn json(output: &Output) -> Result<Value> {
    serde_json::from_slice(&output.stdout).with_context(|| {
        format!("livesnap printed no JSON; on stderr: {}", String::from_utf8_lossy(&output.stderr))
    })
}
