//! schemathesis, which holds the daemon's API against its description: a Python environment of its own below `target`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::step::{program, run};

/// The tests look for it there.
const DIRECTORY: &str = "target/livesnap-schemathesis";
/// It and all that it needs, each with its version.
const REQUIREMENTS: &str = "xtask/schemathesis.txt";
/// What was installed there, written last.
const INSTALLED: &str = "target/livesnap-schemathesis/requirements.txt";

/// Whether it is there as it should be.
pub fn is_installed() -> bool {
    let wanted = fs::read(REQUIREMENTS).ok();
    wanted.is_some() && wanted == fs::read(INSTALLED).ok()
}

/// Installs it from where pip is told to find packages.
pub fn install() -> Result<()> {
    if Path::new(DIRECTORY).exists() {
        fs::remove_dir_all(DIRECTORY).with_context(|| format!("cannot remove {DIRECTORY}"))?;
    }
    run("python environment", program("python3", ["-m", "venv", DIRECTORY]))?;
    let mut pip = program(&format!("{DIRECTORY}/bin/pip"), ["install", "--quiet", "--no-deps"]);
    pip.args(["--requirement", REQUIREMENTS]);
    run("install schemathesis", pip)?;
    // What a killed run left has no such file.
    fs::copy(REQUIREMENTS, INSTALLED).with_context(|| format!("cannot write {INSTALLED}"))?;
    Ok(())
}
