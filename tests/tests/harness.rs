//! Proves the tools of the other tests by QEMU's own snapshots of a stopped VM: what is consistent passes,
//! what is not is found.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use livesnap_guest::page::PAGE_BYTES;
use livesnap_tests::check::{Checker, check_files};
use livesnap_tests::qemu::{Disk, Format, Load, Machine, Qemu};
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
    qemu.wait_heartbeat(BOOT, |heartbeat| heartbeat.inconsistent > 0).unwrap();
    assert!(!qemu.console().unwrap().inconsistencies().is_empty());
}
