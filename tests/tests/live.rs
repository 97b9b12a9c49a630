//! Snapshots of running, busy, stock QEMUs: of one instant when checked offline, and when restored.
//!
//! Each goes the whole way through the command line; the control goes through the library, because the
//! command line cannot be told to take a wrong snapshot.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;
use std::time::Duration;

use livesnap_tests::check::check_files;
use livesnap_tests::qemu::{Aio, Builder, Disk, Format, HugePages, Load, Machine, Qemu, Ram};
use livesnap_tests::{is_root_or_skip, livesnap};
use serde_json::{Value, json};
use snapshot_core::vmm::qemu::{QemuOptions, QemuVmm};
use snapshot_core::{Cancel, Controls, Options};

const BOOT: Duration = Duration::from_secs(120);

/// A VM to be snapshotted, and restored with an overlay in the place of its disk.
struct Case {
    builder: Builder,
    disk: Option<(Format, Aio)>,
    /// Whether the source runs as nobody and sandboxed; the copy must read the snapshot, which is private.
    unprivileged: bool,
}

impl Case {
    fn new(machine: Machine, vcpus: u32, ram: Ram) -> Self {
        let load = Load { workers: vcpus, ..Load::default() };
        let builder = Qemu::builder().machine(machine).vcpus(vcpus).ram(ram).load(load);
        Self { builder, disk: None, unprivileged: false }
    }

    fn with_disk(self, format: Format, aio: Aio) -> Self {
        Self { disk: Some((format, aio)), ..self }
    }

    /// The whole way; returns what `livesnap snapshot --json` told.
    fn run(&self) -> Option<Value> {
        if !is_root_or_skip("a snapshot of another process").unwrap() {
            return None;
        }
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        open_to_all(dir.path());
        let snapshot = dir.path().join("snapshot");
        let disk = self.disk.map(|(format, aio)| {
            Disk::create(dir.path().join("disk"), format, 32).unwrap().aio(aio)
        });
        let builder = with(&self.builder, disk.as_ref());
        let builder = if self.unprivileged { builder.sandbox().nobody() } else { builder };
        let mut source = boot(&builder, disk.is_some());
        let told = livesnap::snapshot(&source, &snapshot, &[]).unwrap();
        assert_eq!(source.status().unwrap(), "running");
        // By QEMU's clock it stood still, and for less than the whole exchange took.
        let downtime = &told["report"]["downtime"];
        let stood_still = downtime["stood_still_ns"].as_u64().unwrap();
        assert!(
            0 < stood_still && stood_still < downtime["total_ns"].as_u64().unwrap(),
            "{told:#}"
        );
        let overlays = told["report"]["overlays"].as_array().unwrap();
        assert_eq!(overlays.len(), usize::from(disk.is_some()), "{told:#}");
        let verified = livesnap::command(["verify"]).unwrap().arg(&snapshot).output().unwrap();
        assert!(verified.status.success(), "{verified:?}");

        let raw = disk.as_ref().map(|disk| {
            let raw = dir.path().join("disk.raw");
            disk.export_raw(&raw).unwrap();
            raw
        });
        let window = check_files(&snapshot.join("ram.mapped-ram"), raw.as_deref())
            .unwrap_or_else(|error| panic!("{:?}: {error:#}", self.builder));
        assert_eq!(window.inconsistent, 0, "{window:?}");
        // The source goes on as if nothing had been.
        assert_eq!(source.wait_laps(1, BOOT).unwrap().inconsistent, 0);
        drop(source);

        let overlay =
            disk.as_ref().map(|disk| disk.overlay(dir.path().join("fresh.qcow2")).unwrap());
        let mut copy = with(&self.builder, overlay.as_ref()).incoming().start().unwrap();
        copy.load_mapped_ram(&snapshot.join("ram.mapped-ram")).unwrap();
        copy.qmp("cont", json!({})).unwrap();
        let after = copy.wait_laps(1, BOOT).unwrap();
        assert_eq!(after.inconsistent, 0);
        assert!(after.workers[0] > window.newest[0], "{after:?} {window:?}");
        Some(told)
    }
}

fn with(builder: &Builder, disk: Option<&Disk>) -> Builder {
    let builder = builder.clone();
    match disk {
        Some(disk) => {
            let load = Load { workers: 1, disk: true, ..Load::default() };
            builder.load(load).disk(disk.clone())
        }
        None => builder,
    }
}

/// Boots the VM and waits until it has work behind it.
fn boot(builder: &Builder, has_disk: bool) -> Qemu {
    let mut qemu = builder.start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu.wait_heartbeat(BOOT, |beat| beat.laps >= 1 && (!has_disk || beat.disk > 10)).unwrap();
    qemu
}

/// An unprivileged QEMU makes its overlay in this directory.
fn open_to_all(dir: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o777)).unwrap();
}

#[test]
fn huge_anonymous_memory_with_a_raw_disk_by_aio_threads() {
    Case::new(Machine::Q35, 2, Ram::Anonymous).with_disk(Format::Raw, Aio::Threads).run();
}

#[test]
fn small_anonymous_pages_with_a_qcow2_disk_by_native_aio_on_pc() {
    let case = Case::new(Machine::Pc, 1, Ram::AnonymousSmallPages);
    case.with_disk(Format::Qcow2, Aio::Native).run();
}

#[test]
fn shared_memfd_with_a_disk_by_io_uring_in_an_unprivileged_sandboxed_qemu() {
    let mut case = Case::new(Machine::Q35, 2, Ram::Memfd).with_disk(Format::Raw, Aio::IoUring);
    case.unprivileged = true;
    case.run();
}

#[test]
fn shared_anonymous_memory() {
    Case::new(Machine::Q35, 2, Ram::SharedAnonymous).run();
}

#[test]
fn a_file_on_tmpfs() {
    Case::new(Machine::Pc, 2, Ram::File("/dev/shm".into())).run();
}

#[test]
fn a_pool_of_huge_pages() {
    if is_root_or_skip("a pool of huge pages").unwrap() {
        // The copy gets its pages from the same pool, after the source has ended.
        let _pool = HugePages::reserve(256).unwrap();
        Case::new(Machine::Q35, 1, Ram::HugetlbMemfd).run();
    }
}

#[test]
fn memory_that_the_guest_touches_for_the_first_time() {
    let mut case = Case::new(Machine::Q35, 1, Ram::AnonymousSmallPages);
    let load = Load { ring_mib: 64, ready_early: true, ..Load::default() };
    case.builder = case.builder.load(load);
    let Some(told) = case.run() else { return };
    let report = &told["report"];
    assert!(report["captured"]["hole_bytes"].as_u64().unwrap() > 0, "{told:#}");
    // What does not exist costs nothing in the file.
    assert!(
        report["stored_bytes"].as_u64().unwrap() < report["ram_bytes"].as_u64().unwrap(),
        "{told:#}"
    );
}

#[test]
fn without_protection_both_checks_find_the_snapshot_wrong() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let snapshot = dir.path().join("snapshot");
    let builder = Qemu::builder().load(Load { ring_mib: 64, ..Load::default() });
    let source = boot(&builder, false);
    let guard_command = vec![livesnap::binary().unwrap().into(), "guard".into()];
    let qemu = QemuOptions { guard_command, ..QemuOptions::new(source.qmp_socket()) };
    let controls = Controls { without_protection: true, ..Controls::default() };
    let options = Options { controls, ..Options::default() };
    let mut vmm = QemuVmm::attach(qemu).unwrap();
    snapshot_core::snapshot(&mut vmm, &snapshot, &options, &Cancel::default(), &mut |_| {})
        .unwrap();
    drop(source);

    let file = snapshot.join("ram.mapped-ram");
    assert!(check_files(&file, None).is_err(), "the offline check must find it");
    let mut copy = builder.incoming().start().unwrap();
    copy.load_mapped_ram(&file).unwrap();
    copy.qmp("cont", json!({})).unwrap();
    assert!(copy.wait_laps(1, BOOT).is_err(), "the guest's own check must find it");
}
