//! Debian's packages, unpacked below `target` and never installed: what the tests need of them are files, not services.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::apt;
use crate::step::{program, run};

/// Whether packages are unpacked in `directory`.
pub fn is_unpacked(directory: &str) -> bool {
    // They are put there complete or not at all.
    Path::new(directory).exists()
}

/// Downloads packages and unpacks them into `directory`.
pub fn into(packages: &[&str], directory: &str) -> Result<()> {
    let names = packages.join(", ");
    eprintln!("unpacking {names} into {directory}");
    let partial = PathBuf::from(format!("{directory}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial)
            .with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let is_known = packages.iter().all(|package| apt::is_known(package));
    // Old lists name versions that the mirror has no more.
    if !is_known || download(packages, &partial).is_err() {
        apt::update()?;
        download(packages, &partial)?;
    }
    let archives = archives(&partial)?;
    ensure!(
        archives.len() == packages.len(),
        "apt-get download left {} packages of {names}",
        archives.len()
    );
    for archive in archives {
        let mut extract = program("dpkg-deb", ["--extract"]);
        extract.arg(&archive).arg(&partial);
        run(&format!("unpack {}", archive.display()), extract)?;
        fs::remove_file(&archive)
            .with_context(|| format!("cannot remove {}", archive.display()))?;
    }
    // Complete or not there at all: what a killed run left is no package.
    fs::rename(&partial, directory).with_context(|| format!("cannot rename to {directory}"))
}

fn download(packages: &[&str], directory: &Path) -> Result<()> {
    // As root, apt would try to download as its own user, who may not write here, and warn.
    let mut command =
        program("apt-get", ["download", "--quiet", "--option=APT::Sandbox::User=root"]);
    command.args(packages).current_dir(directory);
    run(&format!("download {}", packages.join(", ")), command)
}

fn archives(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    Ok(entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|end| end == "deb"))
        .collect())
}
