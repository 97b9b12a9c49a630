//! Snapshots of running, busy, stock QEMUs through the command line: consistent offline, and when restored.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;
use std::time::Duration;

use livesnap_tests::check::{WindowReport, check_files};
use livesnap_tests::qemu::{Builder, Disk, Load, Qemu};
use livesnap_tests::{is_root_or_skip, livesnap};
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(120);

/// Boots `builder`'s VM and waits until it has work behind it.
fn boot(builder: &Builder, has_disk: bool) -> Qemu {
    let mut qemu = builder.start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu.wait_heartbeat(BOOT, |beat| beat.laps >= 1 && (!has_disk || beat.disk > 10)).unwrap();
    qemu
}

/// The image of the snapshot's only disk, as a raw file.
fn raw_disk(snapshot: &Path, disk: &Disk) -> std::path::PathBuf {
    let raw = snapshot.with_extension("raw");
    disk.export_raw(&raw).unwrap();
    raw
}

/// Takes a snapshot of the running VM, checks it offline, restores it, and lets the copy check itself.
fn take_check_restore(builder: &Builder, disk: Option<&Disk>) -> (Value, WindowReport) {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let snapshot = dir.path().join("snapshot");
    let mut source = boot(builder, disk.is_some());
    let told = livesnap::snapshot(&source, &snapshot, &[]).unwrap();
    assert_eq!(source.status().unwrap(), "running");
    let verified = livesnap::command(["verify"]).unwrap().arg(&snapshot).output().unwrap();
    assert!(verified.status.success(), "{verified:?}");
    let raw = disk.map(|disk| raw_disk(&snapshot, disk));
    let report = check_files(&snapshot.join("ram.mapped-ram"), raw.as_deref())
        .unwrap_or_else(|error| panic!("{builder:?}: {error:#}"));
    assert_eq!(report.inconsistent, 0, "{builder:?}");
    // The source goes on as if nothing had been.
    let now = source.wait_laps(1, BOOT).unwrap();
    assert_eq!(now.inconsistent, 0, "{builder:?}");
    drop(source);

    let mut copy = builder.clone().incoming().start().unwrap();
    copy.load_mapped_ram(&snapshot.join("ram.mapped-ram")).unwrap();
    copy.qmp("cont", json!({})).unwrap();
    let after = copy.wait_laps(1, BOOT).unwrap();
    assert_eq!(after.inconsistent, 0, "{builder:?}");
    assert!(after.workers[0] > report.newest[0], "{builder:?}");
    (told, report)
}

#[test]
fn anonymous_memory() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let load = Load { workers: 2, ..Load::default() };
    take_check_restore(&Qemu::builder().vcpus(2).load(load), None);
}
