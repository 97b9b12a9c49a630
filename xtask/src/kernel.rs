//! Debian's cloud kernels, unpacked below `target` and never installed: for the test VMs.

use anyhow::{Context, Result, ensure};

use crate::step::{output, program};
use crate::{apt, unpack};

/// Debian's smallest kernel with all that a VM needs; the package only depends on the newest version.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// Unpacks the release's own kernel into `directory`.
pub fn unpack_default(directory: &str) -> Result<()> {
    if !apt::is_known(PACKAGE) {
        apt::update()?;
    }
    unpack::into(&[&newest(PACKAGE)?], directory)
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
    unpack::into(&[&package], directory)
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
