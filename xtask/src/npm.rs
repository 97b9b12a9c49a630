//! Programs of npm's, in a directory below `target`: for what is no part of `cargo xtask test`, because it needs npm, and
//! packages from its registry.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::step::{program, run};

/// Copies the files of `from` to `to`, and installs there what its `package.json` names.
pub fn install(from: &str, to: &str) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {to}"))?;
    for path in files(from)? {
        let copy = Path::new(to).join(path.file_name().context("no name")?);
        fs::copy(&path, copy).with_context(|| format!("cannot copy {}", path.display()))?;
    }
    let options = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"];
    let mut install = program("npm", ["install"].into_iter().chain(options));
    install.current_dir(to);
    run("install packages of npm's", install)
}

/// The files in a directory.
pub fn files(directory: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {directory}"))?;
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file()).collect())
}
