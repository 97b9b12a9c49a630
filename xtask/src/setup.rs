//! `cargo xtask setup`: brings a fresh Debian with a Rust toolchain to where everything can be built and
//! tested. It looks first and installs only what is missing, so a second run takes no time.
//!
//! Only a C compiler must be there before: without one, cargo cannot link this program either.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::step::{cargo, output, program, run as run_step};
use crate::{apt, bpf, kernel, schemathesis, unpack};

/// The first QEMU that reads mapped-ram files.
const QEMU_MAJOR_MIN: u32 = 9;
/// The first kernel whose userfaultfd write-protects memory that was never touched; before, it is populated first.
const KERNEL_GOOD: (u32, u32) = (6, 4);
/// Where the guest's kernel is unpacked; the tests look for it there.
const KERNEL_DIRECTORY: &str = "target/livesnap-guest/kernel";

/// Prometheus and Alertmanager with their tools, and where they are unpacked; the tests look for them there. Installed,
/// they would be started as services.
const MONITORING: [&str; 2] = ["prometheus", "prometheus-alertmanager"];
const MONITORING_DIRECTORY: &str = "target/livesnap-monitoring";

/// Something that a Debian package brings.
struct Need {
    package: &'static str,
    reason: &'static str,
    is_met: fn() -> bool,
    /// The release's own package is too old for us.
    from_backports: bool,
}

const NEEDS: [Need; 9] = [
    Need {
        package: "libclang-dev",
        reason: "the userfaultfd bindings are generated from the kernel's headers",
        is_met: || std::env::var_os("LIBCLANG_PATH").is_some() || is_installed("libclang-dev"),
        from_backports: false,
    },
    Need {
        package: "linux-libc-dev",
        reason: "the kernel's headers",
        is_met: || Path::new("/usr/include/linux/userfaultfd.h").exists(),
        from_backports: false,
    },
    Need {
        package: "qemu-system-x86",
        reason: "QEMU 9 or newer, which runs the test VMs and loads the snapshots",
        is_met: || qemu_major().is_some_and(|major| major >= QEMU_MAJOR_MIN),
        from_backports: true,
    },
    Need {
        package: "qemu-utils",
        reason: "qemu-img and qemu-storage-daemon, for disks",
        is_met: || runs("qemu-img") && runs("qemu-storage-daemon"),
        from_backports: true,
    },
    Need {
        package: "fio",
        reason: "tests hold what the disk probe sees against what fio says it did",
        is_met: || runs("fio"),
        from_backports: false,
    },
    Need {
        package: "chromium-headless-shell",
        reason: "tests open the daemon's page in it",
        is_met: || runs("chromium-headless-shell"),
        from_backports: false,
    },
    Need {
        package: "python3-venv",
        reason: "schemathesis, which holds the daemon's API against its description, gets an environment of its own",
        is_met: || output(program("python3", ["-c", "import ensurepip, venv"])).is_ok(),
        from_backports: false,
    },
    Need {
        package: "openssl",
        reason: "tests come to the daemon by TLS with it",
        is_met: || output(program("openssl", ["version"])).is_ok(),
        from_backports: false,
    },
    Need {
        package: "xz-utils",
        reason: "Debian's kernels from 6.12 on have compressed modules",
        is_met: || runs("xz"),
        from_backports: false,
    },
];

/// Installs what is missing, and says what makes this machine unfit.
pub fn run() -> Result<()> {
    let missing: Vec<&Need> = NEEDS.iter().filter(|need| !(need.is_met)()).collect();
    let has_kernel = unpack::is_unpacked(KERNEL_DIRECTORY);
    for need in &missing {
        eprintln!("will install {}: {}", need.package, need.reason);
    }
    if !has_kernel {
        eprintln!(
            "will unpack Debian's cloud kernel into {KERNEL_DIRECTORY}, for the test VMs; it is not installed"
        );
    }
    let has_monitoring = unpack::is_unpacked(MONITORING_DIRECTORY);
    if !has_monitoring {
        eprintln!(
            "will unpack {} into {MONITORING_DIRECTORY}, for the tests of alerts and dashboards; they are not installed",
            MONITORING.join(" and ")
        );
    }
    let has_schemathesis = schemathesis::is_installed();
    if !has_schemathesis {
        eprintln!(
            "will install schemathesis by pip, below target: tests hold the daemon's API against its description"
        );
    }
    install(&missing)?;
    if !has_schemathesis {
        schemathesis::install()?;
    }
    if !has_kernel {
        kernel::unpack_default(KERNEL_DIRECTORY)?;
    }
    if !has_monitoring {
        unpack::into(&MONITORING, MONITORING_DIRECTORY)?;
    }
    bpf::install()?;
    for problem in unfit() {
        eprintln!("warning: {problem}");
    }
    Ok(())
}

/// Installs wrk, which only a benchmark needs.
pub fn wrk() -> Result<()> {
    // It tells its version and calls that a failure.
    if Command::new("wrk").arg("--version").output().is_ok() {
        return Ok(());
    }
    apt::update()?;
    apt::install(&["wrk"], None)
}

/// Installs cargo-deny, which only `cargo xtask test` needs.
pub fn cargo_deny() -> Result<()> {
    if output(cargo(["deny", "--version"])).is_ok() {
        return Ok(());
    }
    run_step("install cargo-deny", cargo(["install", "--locked", "cargo-deny"]))
}

fn install(missing: &[&Need]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|need| need.package).collect();
    ensure!(
        runs("apt-get"),
        "this is not a Debian: install {} by your own means",
        names.join(", ")
    );

    let codename = apt::codename()?;
    // Later releases have a QEMU that is new enough.
    let needs_backports = codename == "bookworm" && missing.iter().any(|need| need.from_backports);
    if needs_backports {
        apt::add_backports(&codename)?;
    }
    apt::update()?;
    let suite = format!("{codename}-backports");
    for from_backports in [false, true] {
        let packages: Vec<&str> = missing
            .iter()
            .filter(|need| (need.from_backports && needs_backports) == from_backports)
            .map(|need| need.package)
            .collect();
        if !packages.is_empty() {
            apt::install(&packages, from_backports.then_some(&suite))?;
        }
    }
    for need in missing {
        ensure!(
            (need.is_met)(),
            "{} is installed, but still missing: {}",
            need.package,
            need.reason
        );
    }
    Ok(())
}

/// What this machine cannot do, or not well; nothing of it stops a build.
fn unfit() -> Vec<String> {
    let mut problems = Vec::new();
    if !Path::new("/dev/userfaultfd").exists() {
        problems.push(
            "there is no /dev/userfaultfd: snapshots need Linux 6.1 with CONFIG_USERFAULTFD"
                .to_owned(),
        );
    }
    match kernel_version() {
        Ok(version) if version >= KERNEL_GOOD => {}
        Ok((major, minor)) => problems.push(format!(
            "Linux {major}.{minor} cannot protect memory that was never touched as it is: it is read first, which makes \
             snapshots take longer; {}.{} or newer can",
            KERNEL_GOOD.0, KERNEL_GOOD.1
        )),
        Err(error) => problems.push(format!("{error:#}")),
    }
    problems
}

fn kernel_version() -> Result<(u32, u32)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")
        .context("cannot read the kernel's version")?;
    parse_version(release.trim()).with_context(|| format!("the kernel's version is {release}"))
}

fn qemu_major() -> Option<u32> {
    let text = output(program("qemu-system-x86_64", ["--version"])).ok()?;
    Some(parse_version(text.split_once("version ")?.1)?.0)
}

/// Major and minor number at the start of a version.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn runs(name: &str) -> bool {
    output(program(name, ["--version"])).is_ok()
}

fn is_installed(package: &str) -> bool {
    output(program("dpkg-query", ["--show", "--showformat=${db:Status-Status}", package]))
        .is_ok_and(|status| status == "installed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_version("6.18.44-generic"), Some((6, 18)));
        assert_eq!(parse_version("10.0.2 (Debian 1:10.0.2+ds-2)"), Some((10, 0)));
        assert_eq!(parse_version("unknown"), None);
    }
}
