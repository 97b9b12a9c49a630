//! The init program of a VM that tests another kernel: runs test programs, tells how each ended, and switches off.
//!
//! `cargo xtask vmtest` puts it into an initramfs as `/init`, with the programs and the list `/tests`: one a line, name,
//! program and arguments between tabs. What the programs write goes to the console as it is; in between stands
//!
//! ```text
//! VMTEST on Linux 6.1.0-56-cloud-amd64
//! VMTEST begin snapshot-core/own_memory
//! VMTEST end snapshot-core/own_memory exit status: 0
//! VMTEST done
//! ```
//!
//! Without the last line the VM has died, or has not reached the end.

#![forbid(unsafe_code)]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use livesnap_guest::boot;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

/// The disk for what tests write: tests of storage want a file system that takes `O_DIRECT`.
const DISK: &str = "/dev/vda";

fn main() {
    if let Err(error) = run() {
        console(&format!("VMTEST failed {error:#}"));
    }
    // What the console has not sent yet would be lost.
    let _ = rustix::termios::tcdrain(std::io::stdout());
    // QEMU ends instead of starting anew. If even that fails, init ends, and with it the kernel.
    let _ = reboot(RebootCommand::Restart);
}

fn run() -> Result<()> {
    boot::mount_kernel_file_systems()?;
    boot::load_modules()?;
    mount_others()?;
    let release = rustix::system::uname();
    console(&format!("VMTEST on Linux {}", release.release().to_string_lossy()));

    let list = fs::read_to_string("/tests").context("cannot read /tests")?;
    for line in list.lines() {
        let mut words = line.split('\t');
        let name = words.next().context("a test has no name")?;
        let program = words.next().with_context(|| format!("{name} has no program"))?;
        console(&format!("VMTEST begin {name}"));
        let status = Command::new(program)
            .args(words)
            .env_clear()
            .envs([
                ("PATH", "/usr/sbin:/usr/bin:/bin"),
                ("TMPDIR", "/var/tmp"),
                ("REQUIRE_PRIVILEGED", "1"),
                ("REQUIRE_KVM", "1"),
                ("REQUIRE_TIERS", "1"),
            ])
            .status()
            .with_context(|| format!("cannot run {program}"))?;
        console(&format!("VMTEST end {name} {status}"));
    }
    console("VMTEST done");
    Ok(())
}

/// What a system has besides, and tests use.
fn mount_others() -> Result<()> {
    boot::wait_for_device(DISK)?;
    let others = [
        ("tmpfs", "tmpfs", "/dev/shm"),
        ("cgroup2", "cgroup2", "/sys/fs/cgroup"),
        ("tracefs", "tracefs", "/sys/kernel/tracing"),
        ("bpf", "bpf", "/sys/fs/bpf"),
    ];
    for (source, kind, target) in others {
        mount_on(source, kind, target)?;
    }
    for (source, kind, target) in [("tmpfs", "tmpfs", "/tmp"), (DISK, "ext4", "/var/tmp")] {
        mount_beside(source, kind, target)?;
    }
    Ok(())
}

fn mount_on(source: &str, kind: &str, target: &str) -> Result<()> {
    if !Path::new(target).exists() {
        fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
    }
    mount(source, target, kind, MountFlags::empty(), None)
        .with_context(|| format!("cannot mount {kind} on {target}"))
}

/// Mounts on a directory in which the programs may lie, for they have the paths at which they were built. What was there
/// is found there still, by links.
fn mount_beside(source: &str, kind: &str, target: &str) -> Result<()> {
    let aside = format!("/aside/{}", target.replace('/', "-"));
    let was_there = Path::new(target).exists();
    if was_there {
        fs::create_dir_all("/aside").context("cannot create /aside")?;
        fs::rename(target, &aside).with_context(|| format!("cannot put {target} aside"))?;
    }
    mount_on(source, kind, target)?;
    if was_there {
        for entry in fs::read_dir(&aside).with_context(|| format!("cannot list {aside}"))? {
            let entry = entry.with_context(|| format!("cannot list {aside}"))?;
            let link = Path::new(target).join(entry.file_name());
            symlink(entry.path(), &link)
                .with_context(|| format!("cannot make the link {}", link.display()))?;
        }
    }
    Ok(())
}

/// One line on the console, in one write. If the console fails there is nobody left to tell.
fn console(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(format!("{line}\n").as_bytes());
    let _ = out.flush();
}
