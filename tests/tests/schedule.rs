//! The daemon's schedules on a real QEMU: what nobody asks for is taken, verified and removed.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::time::Duration;

use livesnap_tests::daemon::{Daemon, series};
use livesnap_tests::qemu::{Load, Qemu};
use livesnap_tests::{is_root_or_skip, poll_until};
use rustix::process::Signal;
use serde_json::Value;

const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(120);

fn boot() -> Qemu {
    let mut qemu = Qemu::builder().load(Load { ring_mib: 16, ..Load::default() }).start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu.wait_heartbeat(BOOT, |beat| beat.laps >= 1).unwrap();
    qemu
}

/// Waits until the daemon's operations, the newest first, fulfil `wanted`, and returns them.
fn wait_list(daemon: &Daemon, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let listed = poll_until("operations are as expected", LIMIT, || {
        let page = daemon.get("/snapshot").unwrap().body;
        let operations = page["operations"].as_array().unwrap().clone();
        Ok(wanted(&operations).then_some(operations))
    });
    listed.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()))
}

fn are_completed(operations: &[Value], count: usize) -> bool {
    operations.iter().filter(|operation| operation["state"] == "completed").count() >= count
}

/// When the next snapshot is due; waits until the daemon has looked.
fn next_at(daemon: &Daemon) -> String {
    let next = poll_until("the next turn is known", LIMIT, || {
        let vms = daemon.get("/vms").unwrap().body;
        Ok(vms["vms"][0]["next_at"].as_str().map(str::to_owned))
    });
    next.unwrap()
}

/// Turns so far apart that none comes by chance.
const RARE: &str = "[[schedule]]
name = \"rare\"
vms = [\"v*1\"]
every = \"300d\"
jitter = \"0s\"
policy = { on_infeasible = \"wait\" }
";

#[test]
fn what_was_missed_is_taken_once_and_nothing_is_taken_twice() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let qemu = boot();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let daemon = Daemon::serve(dir.path(), &[("vm1", &qemu)], RARE).unwrap();
    let operations = wait_list(&daemon, |operations| are_completed(operations, 1));
    assert_eq!(operations[0]["schedule"], "rare", "{operations:#?}");
    let turn = next_at(&daemon);
    assert!(turn.ends_with("T00:00:00.000Z"), "{turn}");
    let interval =
        series(&daemon.metrics().unwrap(), "livesnap_schedule_interval_seconds{vm=\"vm1\"}");
    assert_eq!(interval, Some(300.0 * 24.0 * 3600.0));
    assert!(daemon.end(Signal::TERM).unwrap().success());

    let daemon = Daemon::start(dir.path()).unwrap();
    assert_eq!(next_at(&daemon), turn);
    assert_eq!(wait_list(&daemon, |_| true), operations);
    assert!(daemon.end(Signal::TERM).unwrap().success());

    // As if it had been years ago.
    let id = operations[0]["id"].as_str().unwrap();
    let record = dir.path().join(format!("state/operations/{id}.json"));
    let text = fs::read_to_string(&record).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    value["operation"]["started_at"] = "2020-01-01T00:00:00.000Z".into();
    fs::write(&record, value.to_string()).unwrap();
    let daemon = Daemon::start(dir.path()).unwrap();
    wait_list(&daemon, |operations| are_completed(operations, 2));
    assert_eq!(next_at(&daemon), turn);
    assert_eq!(wait_list(&daemon, |_| true).len(), 2);
}
