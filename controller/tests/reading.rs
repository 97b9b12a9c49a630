//! The commands that read a snapshot, as a user runs them.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use snapshot_core::address::{HostVirtAddr, PAGE_BYTES, PageIndex};
use snapshot_core::image::{FilePlan, SnapshotFacts, Staging};
use snapshot_core::ram::{RamBlock, RamLayout};
use snapshot_core::vmm::{DeviceState, DiskSnapshot, MachineDescription, RunState};

const CONTENT: [u8; 4096] = [0x5a; 4096];

/// Commits a snapshot with the second of four pages stored; returns its directory and that page's offset.
fn snapshot(temp: &Path) -> (PathBuf, u64) {
    let dir = temp.join("vm1");
    let block = RamBlock {
        id: "pc.ram".into(),
        hva: HostVirtAddr(0x1000),
        len_bytes: 4 * PAGE_BYTES,
        page_size_bytes: PAGE_BYTES,
        store_zero_pages: false,
    };
    let layout = RamLayout::new(vec![block]).unwrap();
    let plan = FilePlan::new("pc-q35-10.0", &layout).unwrap();
    let staging = Staging::create(&dir).unwrap();
    let offset = plan.page_offset(PageIndex(1));
    let ram = File::options().write(true).open(staging.ram_path()).unwrap();
    ram.write_all_at(&CONTENT, offset).unwrap();
    let mut checksums = [0; 64];
    checksums[1] = crc32c::crc32c(&CONTENT);
    let facts = SnapshotFacts {
        machine: MachineDescription {
            vmm: "qemu".into(),
            version: "10.0.2".into(),
            machine_type: "pc-q35-10.0".into(),
            cpus: 2,
            command_line: ["qemu-system-x86_64", "-smp", "2", "-name", "it's 1", "-S"]
                .map(Into::into)
                .into(),
            ..MachineDescription::default()
        },
        run_state: RunState::Running,
        disks: DiskSnapshot::default(),
        taken_at: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        report: json!({}),
    };
    let state = DeviceState::QemuSections(vec![]);
    staging.commit(&layout, &plan, &[0b10], &checksums, &state, facts).unwrap();
    (dir, offset)
}

/// Exit code, standard output and standard error.
fn livesnap(arguments: &[&str], dir: &Path) -> (Option<i32>, String, String) {
    let out =
        Command::new(env!("CARGO_BIN_EXE_livesnap")).args(arguments).arg(dir).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

#[test]
fn a_sound_snapshot_is_called_sound_and_an_altered_one_is_not() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, offset) = snapshot(temp.path());
    let (code, out, err) = livesnap(&["verify"], &dir);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(out.starts_with("sound: 1 pages"), "{out}");
    let (_, out, _) = livesnap(&["verify", "--json"], &dir);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["sound"], true);

    let ram = File::options().write(true).open(dir.join("ram.mapped-ram")).unwrap();
    ram.write_all_at(b"x", offset + 5).unwrap();
    let (code, out, err) = livesnap(&["verify"], &dir);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(err.contains("page 1 of RAM block \"pc.ram\""), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
    let (code, out, _) = livesnap(&["verify", "--json"], &dir);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &report["reason"]), (Some(1), &json!("corrupt")));
}

#[test]
fn inspect_tells_what_is_in_it() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, _) = snapshot(temp.path());
    let (code, out, _) = livesnap(&["inspect"], &dir);
    assert_eq!(code, Some(0));
    for part in ["2023-11-14T22:13:20.000Z", "pc-q35-10.0, 2 CPUs, running", "16.0 KiB", "pc.ram"] {
        assert!(out.contains(part), "{part} is not in {out}");
    }
    let (_, out, _) = livesnap(&["inspect", "--json"], &dir);
    let manifest: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(manifest["machine"]["machine_type"], "pc-q35-10.0");
}

#[test]
fn what_is_no_snapshot_and_wrong_usage_have_their_exit_codes() {
    let temp = tempfile::tempdir().unwrap();
    for command in ["verify", "inspect"] {
        let (code, out, err) = livesnap(&[command], temp.path());
        assert_eq!((code, out.as_str()), (Some(1), ""));
        assert!(err.contains("manifest.json"), "{err}");
        assert_eq!(livesnap(&[command, "--nonsense"], temp.path()).0, Some(2));
    }
}

#[test]
fn restore_prints_a_script_and_touches_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, _) = snapshot(temp.path());
    let (code, out, err) = livesnap(&["restore"], &dir);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let ram = dir.canonicalize().unwrap().join("ram.mapped-ram");
    let command = format!(
        "exec qemu-system-x86_64 -smp 2 -name 'it'\\''s 1' -machine pc-q35-10.0 -display none \
         -global migration.mapped-ram=on -incoming file:{}",
        ram.display()
    );
    assert_eq!(out.lines().last(), Some(command.as_str()));
    assert!(out.contains("# -S: dropped"), "{out}");
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1);
}
