//! `cargo xtask vmtest`: the tests that depend on the kernel, on other kernels than this machine's.

use std::env;
use std::process::Command;

use anyhow::{Context, Result};

use crate::step::{cargo, run};
use crate::{kernel, setup, unpack};

/// The oldest that snapshots work on, and the newest that Debian 12 has.
const KERNELS: [&str; 2] = ["6.1", "6.12"];
/// `livesnap-vmtest` looks for kernels here, each in a directory of its version.
const DIRECTORY: &str = "target/livesnap-guest/kernels";

/// Unpacks the kernels that `arguments` name, or else all, and has `livesnap-vmtest` run the tests on each.
pub fn run_on_kernels(arguments: &[String]) -> Result<()> {
    setup::run()?;
    let (kernels, rest) = split(arguments)?;
    for version in &kernels {
        let directory = format!("{DIRECTORY}/{version}");
        if !unpack::is_unpacked(&directory) {
            kernel::unpack_version(version, &directory)?;
        }
    }
    // The whole workspace, so that dependencies have the same features as in `cargo test` and are built once.
    run("build", cargo(["build", "--locked", "--workspace", "--bins"]))?;
    let this = env::current_exe().context("cannot tell where this program is")?;
    let mut tests = Command::new(this.with_file_name("livesnap-vmtest"));
    tests.args(kernels.iter().flat_map(|version| ["--kernel", version])).args(rest);
    run("tests on other kernels", tests)
}

/// The versions after each `--kernel`, and everything else.
fn split(arguments: &[String]) -> Result<(Vec<&str>, Vec<&str>)> {
    let (mut kernels, mut rest) = (Vec::new(), Vec::new());
    let mut words = arguments.iter().map(String::as_str);
    while let Some(word) = words.next() {
        match word {
            "--kernel" => kernels.push(words.next().context("--kernel needs a version")?),
            _ => rest.push(word),
        }
    }
    if kernels.is_empty() {
        kernels.extend(KERNELS);
    }
    Ok((kernels, rest))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    #[test]
    fn kernels_are_taken_out_of_the_arguments() {
        let arguments = ["--kernel", "6.12", "hugetlb"].map(str::to_owned);
        assert_eq!(split(&arguments).unwrap(), (vec!["6.12"], vec!["hugetlb"]));
        assert_eq!(split(&arguments[2..]).unwrap(), (KERNELS.to_vec(), vec!["hugetlb"]));
        assert!(split(&arguments[..1]).is_err());
    }
}
