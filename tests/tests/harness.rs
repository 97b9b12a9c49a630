//! Proves the tools of the other tests by QEMU's own snapshots of a stopped VM: what is consistent passes,
//! what is not is found.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::Duration;

use livesnap_guest::page::PAGE_BYTES;
use livesnap_tests::check::{Checker, WindowReport, check_files};
use livesnap_tests::is_root_or_skip;
use livesnap_tests::qemu::{Aio, Builder, Disk, Format, HugePages, Load, Machine, Qemu, Ram};
use serde_json::json;

const BOOT: Duration = Duration::from_secs(120);

/// A size that no other mapping of QEMU has.
const MEMORY_MIB: u32 = 272;

/// Reads guest RAM page by page, as it is when its turn comes.
fn read_ram(pid: u32, mut visit: impl FnMut(&[u8])) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let address = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let ram = maps
        .lines()
        .map(|line| line.split(['-', ' ']).map(str::to_owned).collect::<Vec<_>>())
        .map(|words| address(&words[0])..address(&words[1]))
        .find(|range| range.end - range.start == u64::from(MEMORY_MIB) << 20)
        .unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut page = [0; PAGE_BYTES];
    for at in ram.step_by(PAGE_BYTES) {
        memory.read_exact_at(&mut page, at).unwrap();
        visit(&page);
    }
}

#[test]
fn a_snapshot_of_a_stopped_vm_passes_and_goes_on() {
    for (machine, format) in [(Machine::Q35, Format::Raw), (Machine::Pc, Format::Qcow2)] {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let disk = Disk::create(dir.path().join("disk"), format, 32).unwrap();
        let load = Load { workers: 2, disk: true, ..Load::default() };
        let builder = Qemu::builder().machine(machine).vcpus(2).disk(disk.clone()).load(load);
        let file = dir.path().join("ram");
        let raw = dir.path().join("disk.raw");

        let mut source = builder.start().unwrap();
        source.wait_ready(BOOT).unwrap();
        let before = source
            .wait_heartbeat(BOOT, |heartbeat| heartbeat.laps >= 2 && heartbeat.disk > 10)
            .unwrap();
        source.save_mapped_ram(&file).unwrap();
        drop(source);
        disk.export_raw(&raw).unwrap();

        let report = check_files(&file, Some(&raw)).unwrap();
        assert_eq!((report.ring_pages + report.torn, report.populated), (4096, 4096), "{report:?}");
        assert!(report.newest[0] >= before.workers[0], "{report:?} {before:?}");
        assert!(report.disk_newest >= Some(before.disk), "{report:?} {before:?}");
        assert_eq!(report.inconsistent, 0);

        let mut restored = builder.incoming().start().unwrap();
        restored.load_mapped_ram(&file).unwrap();
        restored.qmp("cont", json!({})).unwrap();
        let after = restored.wait_laps(1, BOOT).unwrap();
        assert!(
            after.workers[0] > report.newest[0] && after.disk > report.disk_newest.unwrap(),
            "{after:?}"
        );
    }
}

/// Boots the VM, has QEMU save it, and checks that.
fn boot_and_check(builder: &Builder, disk: Option<&Disk>) -> WindowReport {
    let mut qemu = builder.start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    if disk.is_some() {
        qemu.wait_heartbeat(BOOT, |heartbeat| heartbeat.disk > 0).unwrap();
    }
    let file = qemu.dir().join("ram");
    qemu.save_mapped_ram(&file).unwrap();
    let raw = disk.map(|disk| {
        let raw = qemu.dir().join("disk.raw");
        disk.export_raw(&raw).unwrap();
        raw
    });
    check_files(&file, raw.as_deref()).unwrap_or_else(|error| panic!("{builder:?}: {error:#}"))
}

#[test]
fn ram_of_every_kind_runs_the_guest() {
    for ram in [Ram::SharedAnonymous, Ram::Memfd, Ram::File("/dev/shm".into())] {
        boot_and_check(&Qemu::builder().ram(ram), None);
    }
    if is_root_or_skip("a pool of huge pages").unwrap() {
        let _pool = HugePages::reserve(256).unwrap();
        boot_and_check(&Qemu::builder().ram(Ram::HugetlbMemfd), None);
    }
}

#[test]
fn huge_pages_are_there_only_where_they_are_wanted() {
    let huge_kib = |ram: Ram| {
        let mut qemu = Qemu::builder().ram(ram).start().unwrap();
        qemu.wait_ready(BOOT).unwrap();
        qemu.anon_huge_kib().unwrap()
    };
    assert_eq!(huge_kib(Ram::AnonymousSmallPages), 0);
    let policy = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap();
    assert_eq!(huge_kib(Ram::Anonymous) > 0, !policy.contains("[never]"), "{policy}");
}

#[test]
fn disks_of_every_kind_run_the_guest() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    for (aio, format) in [(Aio::Native, Format::Raw), (Aio::IoUring, Format::Qcow2)] {
        let disk =
            Disk::create(dir.path().join(format.name()), format, 32).unwrap().aio(aio).iothread();
        let load = Load { disk: true, ..Load::default() };
        let report = boot_and_check(&Qemu::builder().disk(disk.clone()).load(load), Some(&disk));
        assert!(report.disk_newest > Some(0), "{report:?}");
    }
}

#[test]
fn a_qemu_without_privileges_runs_the_guest() {
    if is_root_or_skip("starting a QEMU as nobody").unwrap() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let disk = Disk::create(dir.path().join("disk"), Format::Raw, 32).unwrap();
        let load = Load { disk: true, ..Load::default() };
        boot_and_check(
            &Qemu::builder().nobody().sandbox().disk(disk.clone()).load(load),
            Some(&disk),
        );
    }
}

#[test]
fn an_early_snapshot_holds_only_what_was_written_by_then() {
    // About 25 s a lap: it cannot be over.
    let load = Load { ring_mib: 64, rate: 650, random: true, ready_early: true, ..Load::default() };
    let report = boot_and_check(&Qemu::builder().load(load), None);
    assert!(report.newest[0] < 16384 && report.ring_pages == report.newest[0], "{report:?}");
}

#[test]
fn memory_copied_from_a_running_vm_is_refused() {
    let load = Load { workers: 2, ..Load::default() };
    let mut qemu = Qemu::builder().memory_mib(MEMORY_MIB).vcpus(2).load(load).start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    let mut checker = Checker::default();
    read_ram(qemu.pid(), |bytes| checker.ram_page(bytes));
    let error = format!("{:#}", checker.finish().unwrap_err());
    assert!(error.contains("ring of worker"), "{error}");
}

#[test]
fn a_guest_that_is_given_another_instant_of_its_disk_says_so() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let disk = Disk::create(dir.path().join("disk"), Format::Raw, 1).unwrap();
    let mut qemu = Qemu::builder()
        .disk(disk.clone())
        .load(Load { disk: true, ..Load::default() })
        .start()
        .unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu.wait_heartbeat(BOOT, |heartbeat| heartbeat.disk > 256).unwrap();
    qemu.qmp("stop", json!({})).unwrap();
    std::fs::write(disk.path(), vec![0; 1 << 20]).unwrap();
    qemu.qmp("cont", json!({})).unwrap();
    assert_eq!(qemu.take_pauses().unwrap().len(), 1);
    qemu.wait_heartbeat(BOOT, |heartbeat| heartbeat.inconsistent > 0).unwrap();
    assert!(!qemu.console().unwrap().inconsistencies().is_empty());
}
