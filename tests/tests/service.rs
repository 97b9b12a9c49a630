//! The daemon under a service manager: what it tells it, and that the unit leaves it all it needs.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use livesnap_tests::check::check_files;
use livesnap_tests::daemon::Daemon;
use livesnap_tests::is_root_or_skip;
use livesnap_tests::qemu::{Disk, Format, Load, Qemu};
use rustix::process::Signal;
use serde_json::json;

const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn the_manager_is_told_of_beginning_life_and_end() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    Daemon::configure(dir.path(), &[], "").unwrap();
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let mut through = Command::new("env");
    through.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "100000");
    let daemon = Daemon::start_through(dir.path(), through).unwrap();
    let told = || {
        let mut text = [0; 64];
        let length = manager.recv(&mut text).unwrap();
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    assert_eq!(told(), "READY=1");
    for _ in 0..3 {
        assert_eq!(told(), "WATCHDOG=1");
    }
    assert!(daemon.end(Signal::TERM).unwrap().success());
    let rest: Vec<_> =
        std::iter::repeat_with(told).skip_while(|told| told == "WATCHDOG=1").take(1).collect();
    assert_eq!(rest, ["STOPPING=1"]);
}

/// The capabilities that the unit leaves, as setpriv names them.
fn capabilities() -> String {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/livesnap.service");
    let unit = fs::read_to_string(unit).unwrap();
    let set = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let names = set.split(' ').map(|name| name.strip_prefix("CAP_").unwrap().to_lowercase());
    names.fold("-all".to_owned(), |all, name| format!("{all},+{name}"))
}

#[test]
fn the_units_capabilities_are_enough_for_a_snapshot() {
    if !is_root_or_skip("a snapshot of another user's process").unwrap() {
        return;
    }
    let disks = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(disks.path(), Permissions::from_mode(0o755)).unwrap();
    let disk = Disk::create(disks.path().join("disk"), Format::Qcow2, 32).unwrap();
    let load = Load { disk: true, ..Load::default() };
    let mut qemu = Qemu::builder().nobody().sandbox().disk(disk).load(load).start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu.wait_heartbeat(BOOT, |beat| beat.laps >= 1).unwrap();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    Daemon::configure(dir.path(), &[("vm1", &qemu)], "").unwrap();

    let mut measured = Vec::new();
    for set in [capabilities(), "+all".into()] {
        let mut through = Command::new("setpriv");
        through.args(["--no-new-privs", "--inh-caps=-all", "--bounding-set", &set, "--"]);
        let daemon = Daemon::start_through(dir.path(), through).unwrap();
        let request = json!({"vm": "vm1", "policy": {"on_infeasible": "wait"}});
        let taken = daemon.post("/snapshot", &[("Prefer", "wait=60")], &request).unwrap().body;
        assert_eq!(taken["state"], "completed", "{taken:#}\n{}", daemon.log());
        let snapshot = Path::new(taken["destination"].as_str().unwrap());
        let window = check_files(&snapshot.join("ram.mapped-ram"), None).unwrap();
        assert_eq!(window.inconsistent, 0, "{window:?}");
        let progress = &taken["progress"];
        measured.push((
            progress["stalls"].is_null(),
            progress["disk_writes"].is_null(),
            progress["control"]["problem"].clone(),
        ));
        assert!(daemon.end(Signal::TERM).unwrap().success());
    }
    assert_eq!(measured[0], measured[1], "what works without limits works within them");
    assert_eq!(qemu.wait_laps(1, BOOT).unwrap().inconsistent, 0);
}
