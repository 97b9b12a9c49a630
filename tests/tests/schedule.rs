//! The daemon's schedules on a real QEMU: what nobody asks for is taken, verified and removed.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use livesnap_tests::daemon::{Daemon, series};
use livesnap_tests::mapped_ram::damage;
use livesnap_tests::qemu::{Builder, Disk, Format, Load, Qemu};
use livesnap_tests::restored::Restored;
use livesnap_tests::{is_root_or_skip, livesnap, poll_until};
use rustix::process::Signal;
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(300);

fn boot(builder: Builder) -> Qemu {
    let mut qemu = builder.start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu.wait_heartbeat(BOOT, |beat| beat.laps >= 1).unwrap();
    qemu
}

/// Waits until the daemon's operations, the newest first, fulfil `wanted`, and returns them.
fn wait_list(daemon: &Daemon, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let listed = poll_until("operations are as expected", LIMIT, || {
        let page = daemon.get("/snapshot?limit=500").unwrap().body;
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
    let qemu = boot(Qemu::builder());
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

    // Whoever asks for one has it verified as well, and is told of that before events end.
    let request = json!({"vm": "vm1", "policy": {"on_infeasible": "wait"}, "verify": true});
    let taken = daemon.post("/snapshot", &[], &request).unwrap();
    assert_eq!(taken.status, 202, "{taken:?}");
    let path = format!("/snapshot/{}", taken.body["id"].as_str().unwrap());
    let (_, last) = daemon.follow(&path).unwrap().last().unwrap();
    assert_eq!(last["state"], "completed", "{last:#}");
    assert!(is_verified(&last, "sound") && last["schedule"].is_null(), "{last:#}");
    // It is no schedule's.
    assert_eq!(next_at(&daemon), turn);

    // Nor is anything taken again because nobody remembers it.
    for operation in wait_list(&daemon, |_| true) {
        let path = format!("/snapshot/{}", operation["id"].as_str().unwrap());
        assert_eq!(daemon.call("DELETE", &path, &[], "").unwrap().status, 204, "{path}");
    }
    assert!(daemon.end(Signal::TERM).unwrap().success());
    let daemon = Daemon::start(dir.path()).unwrap();
    assert_eq!(next_at(&daemon), turn);
    assert_eq!(wait_list(&daemon, |_| true), Vec::<Value>::new());
}

/// Turns as fast as they can be taken, of which two good ones are kept.
const OFTEN: &str = "discover = [\"/nobody/*/is-there\"]
[[schedule]]
name = \"often\"
vms = [\"vm1\"]
every = \"2s\"
keep = 2
verify = true
policy = { on_infeasible = \"wait\" }
";

fn destination(operation: &Value) -> PathBuf {
    operation["destination"].as_str().unwrap().into()
}

fn is_verified(operation: &Value, state: &str) -> bool {
    operation["verification"]["state"] == state
}

fn is_removed(operation: &Value) -> bool {
    !operation["removed_at"].is_null()
}

/// Names in a directory, hidden ones too.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn two_good_ones_are_kept_whatever_becomes_of_others() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let disk = Disk::create(dir.path().join("disk"), Format::Qcow2, 32).unwrap();
    let load = Load { disk: true, ..Load::default() };
    let mut qemu = boot(Qemu::builder().disk(disk).load(load));
    let snapshots = dir.path().join("snapshots/vm1");
    let begin = |more: &str| Daemon::serve(dir.path(), &[("vm1", &qemu)], more).unwrap();
    let end = |daemon: Daemon| assert!(daemon.end(Signal::TERM).unwrap().success());
    let resting = OFTEN.replace("vm1", "nobody");

    let daemon = begin(OFTEN);
    let removed =
        |operations: &[Value]| operations.iter().filter(|known| is_removed(known)).count();
    for operation in wait_list(&daemon, |operations| removed(operations) >= 2) {
        let is_removed = is_removed(&operation);
        assert!(!is_removed || is_verified(&operation, "sound"), "{operation:#}");
        assert!(!is_removed || !destination(&operation).exists(), "{operation:#}");
    }
    end(daemon);

    // What that one was at is done by the next one: there are two, and both are sound, also in their disks.
    let daemon = begin(&resting);
    let is_kept = |known: &&Value| is_verified(known, "sound") && !is_removed(known);
    let operations = wait_list(&daemon, |operations| {
        let is_done = operations.iter().all(|known| !is_verified(known, "running"));
        is_done && operations.iter().filter(is_kept).count() == 2
    });
    let kept: Vec<_> = operations.iter().filter(is_kept).collect();
    let [newer, older] = kept[..] else { panic!("{kept:#?}") };
    let two = || Ok((names(&snapshots).len() == 2).then_some(()));
    poll_until("two are left", LIMIT, two).unwrap();
    for operation in kept {
        let output =
            livesnap::command(["verify"]).unwrap().arg(destination(operation)).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let restored_dir = dir.path().join("restored");
    fs::create_dir(&restored_dir).unwrap();
    let mut restored = Restored::start(&destination(older), &restored_dir).unwrap();
    let beat = restored.wait_heartbeat(BOOT, |beat| beat.laps >= 2 || beat.inconsistent > 0);
    assert_eq!(beat.unwrap().inconsistent, 0);
    drop(restored);
    let metric = |daemon: &Daemon, name: &str| {
        series(&daemon.metrics().unwrap(), &format!("livesnap_{name}{{vm=\"vm1\"}}")).unwrap()
    };
    let newest_at = metric(&daemon, "last_success_timestamp_seconds");
    end(daemon);

    // The newer one is damaged before it has been read, as it would be if the daemon had been ended earlier.
    Daemon::leave_unverified(dir.path(), newer["id"].as_str().unwrap()).unwrap();
    damage(&destination(newer).join("ram.mapped-ram")).unwrap();
    let daemon = begin(&resting);
    let find = |operations: &[Value]| {
        operations.iter().find(|known| known["id"] == newer["id"]).unwrap().clone()
    };
    let failed = wait_list(&daemon, |operations| is_verified(&find(operations), "failed"));
    let failed = find(&failed);
    assert_eq!(failed["verification"]["error"]["reason"], "corrupt", "{failed:#}");
    assert_eq!(failed["state"], "completed", "{failed:#}");
    assert_eq!(metric(&daemon, "verify_failures_total"), 1.0);
    assert!(metric(&daemon, "last_success_timestamp_seconds") < newest_at);
    assert_eq!(names(&snapshots).len(), 2);
    let list = livesnap::command(["ask", "--daemon"])
        .unwrap()
        .arg(daemon.socket())
        .arg("list")
        .output()
        .unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    assert!(list.contains("by often  not sound"), "{list}");
    end(daemon);

    // It goes when there are two good ones, and nothing that a link leads to ever does.
    let elsewhere = dir.path().join("elsewhere");
    fs::rename(destination(older), &elsewhere).unwrap();
    symlink(&elsewhere, destination(older)).unwrap();
    let before = names(&elsewhere);
    let daemon = begin(OFTEN);
    let operations = wait_list(&daemon, |operations| is_removed(&find(operations)));
    let id = |known: &Value| known["id"].as_str().unwrap().to_owned();
    let is_newer = |known: &&Value| id(known) > id(newer) && is_verified(known, "sound");
    let since = operations.iter().filter(is_newer).nth_back(1).unwrap();
    let removed_at = find(&operations)["removed_at"].as_str().unwrap().to_owned();
    assert!(*removed_at >= *since["verification"]["at"].as_str().unwrap(), "{operations:#?}");
    end(daemon);
    assert!(destination(older).is_symlink() && !destination(newer).exists());
    assert_eq!(names(&elsewhere), before);
    assert_eq!(qemu.wait_laps(1, BOOT).unwrap().inconsistent, 0);
}
