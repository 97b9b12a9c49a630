//! Debian's cloud kernels, unpacked below `target` and never installed: for the test VMs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::apt;
use crate::step::{output, program, run};

/// Debian's smallest kernel with all that a VM needs; the package only depends on the newest version.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// Whether a kernel is unpacked in `directory`.
pub fn is_unpacked(directory: &str) -> bool {
    // It is put there complete or not at all.
    Path::new(directory).exists()
}

/// Unpacks the release's own kernel into `directory`.
pub fn unpack_default(directory: &str) -> Result<()> {
    if !apt::is_known(PACKAGE) {
        apt::update()?;
    }
    unpack(&newest(PACKAGE)?, directory)
}

/// Unpacks the newest kernel of a version such as "6.12" into `directory`. The release has its own, and some a later one
/// under a name of its own.
pub fn unpack_version(version: &str, directory: &str) -> Result<()> {
    apt::update()?;
    let named = format!("linux-image-{version}-cloud-amd64");
    let package = newest(if apt::is_known(&named) { &named } else { PACKAGE })?;
    ensure!(
        is_of_version(&package, version),
        "apt knows no cloud kernel {version}, only {package}"
    );
    unpack(&package, directory)
}

/// Downloads a package and unpacks it.
fn unpack(package: &str, directory: &str) -> Result<()> {
    eprintln!("unpacking {package} into {directory}");
    let partial = PathBuf::from(format!("{directory}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial)
            .with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    // As root, apt would try to download as its own user, who may not write here, and warn.
    let mut download =
        program("apt-get", ["download", "--quiet", "--option=APT::Sandbox::User=root", package]);
    download.current_dir(&partial);
    run("download the kernel", download)?;
    let archive = fs::read_dir(&partial)
        .with_context(|| format!("cannot list {}", partial.display()))?
        .find_map(|entry| {
            Some(entry.ok()?.path()).filter(|path| path.extension().is_some_and(|end| end == "deb"))
        })
        .with_context(|| format!("apt-get download left no package of {package}"))?;
    let mut unpack = program("dpkg-deb", ["--extract"]);
    unpack.arg(&archive).arg(&partial);
    run("unpack the kernel", unpack)?;
    fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))?;
    // Complete or not there at all: what a killed run left is no kernel.
    fs::rename(&partial, directory).with_context(|| format!("cannot rename to {directory}"))
}

/// The package that a meta-package depends on.
fn newest(meta: &str) -> Result<String> {
    let depends = output(program("apt-cache", ["depends", meta]))?;
    newest_in(&depends).with_context(|| format!("{meta} depends on no kernel: {depends}"))
}

/// The same from what `apt-cache depends` prints.
fn newest_in(depends: &str) -> Option<String> {
    depends.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned)
}

/// Whether `linux-image-6.12.117+deb12-cloud-amd64` is of version "6.12".
fn is_of_version(package: &str, version: &str) -> bool {
    package
        .strip_prefix("linux-image-")
        .and_then(|rest| rest.strip_prefix(version))
        .is_some_and(|rest| rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    #[test]
    fn the_kernel_is_what_the_meta_package_depends_on() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(newest_in(text).unwrap(), "linux-image-6.1.0-56-cloud-amd64");
        assert_eq!(newest_in("linux-image-cloud-amd64\n"), None);
    }

    #[test]
    fn versions_are_told_apart() {
        assert!(is_of_version("linux-image-6.1.0-56-cloud-amd64", "6.1"));
        assert!(is_of_version("linux-image-6.12.117+deb12-cloud-amd64", "6.12"));
        assert!(!is_of_version("linux-image-6.12.117+deb12-cloud-amd64", "6.1"));
    }
}
