//! The daemon on real QEMUs, through its API only.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use livesnap_tests::check::check_files;
use livesnap_tests::daemon::Daemon;
use livesnap_tests::qemu::{Builder, Load, Qemu};
use livesnap_tests::{is_root_or_skip, livesnap, poll_until};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(60);

fn builder() -> Builder {
    Qemu::builder().load(Load { ring_mib: 64, ..Load::default() })
}

fn boot() -> Qemu {
    let mut qemu = builder().start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu.wait_heartbeat(BOOT, |beat| beat.laps >= 1).unwrap();
    qemu
}

/// A request whose limits no busy host breaks.
fn request(vm: &str) -> Value {
    json!({"vm": vm, "policy": {"on_infeasible": "wait"}})
}

/// One whose snapshot takes minutes.
fn slow_request(vm: &str) -> Value {
    let policy = json!({
        "on_infeasible": "wait", "buffer_bytes": 16 << 20, "max_bandwidth_bytes_per_second": 1 << 20,
    });
    json!({"vm": vm, "policy": policy})
}

/// The guest goes on as if nothing had been, and nothing is left at the destination.
fn expect_no_trace(qemu: &mut Qemu, snapshots: &Path) {
    qemu.wait_unprotected(LIMIT).unwrap();
    assert_eq!(qemu.status().unwrap(), "running");
    assert_eq!(qemu.wait_laps(1, BOOT).unwrap().inconsistent, 0);
    let left: Vec<_> =
        fs::read_dir(snapshots).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn path_of(operation: &Value) -> String {
    format!("/snapshot/{}", operation["id"].as_str().unwrap())
}

#[test]
fn a_snapshot_is_taken_followed_and_restored() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let source = boot();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let daemon = Daemon::serve(dir.path(), &[("vm1", &source)], "").unwrap();
    let vms = daemon.get("/vms").unwrap().body;
    assert_eq!(vms["vms"][0]["name"], "vm1", "{vms:#}");

    let key = [("Idempotency-Key", "monday")];
    let taken_up = daemon.post("/snapshot", &key, &request("vm1")).unwrap();
    assert_eq!(taken_up.status, 202, "{taken_up:?}");
    let path = taken_up.header("location").unwrap();
    assert_eq!(path, path_of(&taken_up.body));
    // Again, and with another body.
    let again = daemon.post("/snapshot", &key, &request("vm1")).unwrap();
    assert_eq!(again.header("location"), Some(path), "{again:?}");
    let other = json!({"vm": "vm1", "destination": "other"});
    let reused = daemon.post("/snapshot", &key, &other).unwrap();
    assert_eq!((reused.status, &reused.body["reason"]), (422, &json!("key_reused")), "{reused:?}");

    let copying = daemon.wait_operation(path, |now| {
        now["progress"]["saved_bytes"].as_u64().is_some_and(|saved| saved > 0)
    });
    let copying = copying.unwrap();
    assert!(copying["progress"]["total_bytes"].as_u64().unwrap() >= 256 << 20, "{copying:#}");
    let ended = daemon.wait_state(path, "completed").unwrap();
    assert!(ended["result"]["report"]["downtime"]["total_ns"].is_number(), "{ended:#}");
    // Who knows it is not told again.
    let known = daemon.get(path).unwrap();
    let tag = known.header("etag").unwrap();
    let unchanged = daemon.get_with(path, &[("If-None-Match", tag)]).unwrap();
    assert_eq!((unchanged.status, unchanged.body), (304, Value::Null));
    // The same request again, and waiting for the end of another.
    let again = daemon.post("/snapshot", &key, &request("vm1")).unwrap();
    assert_eq!((again.status, &again.body["state"]), (200, &json!("completed")), "{again:?}");
    let waited = daemon.post("/snapshot", &[("Prefer", "wait=60")], &request("vm1")).unwrap();
    assert_eq!((waited.status, &waited.body["state"]), (200, &json!("completed")), "{waited:?}");
    let list = daemon.get("/snapshot?limit=1").unwrap().body;
    assert_eq!(list["operations"][0]["id"], waited.body["id"], "{list:#}");
    let rest = daemon.get(list["next"].as_str().unwrap()).unwrap().body;
    assert_eq!(rest["operations"][0]["id"], ended["id"], "{rest:#}");
    assert_eq!(rest["next"], Value::Null);

    // Forgotten, the snapshot stays; it is sound, of one instant, and a guest goes on from it.
    assert_eq!(daemon.call("DELETE", path, &[], "").unwrap().status, 204);
    assert_eq!(daemon.get(path).unwrap().body["reason"], "unknown_operation");
    drop(daemon);
    let snapshot = Path::new(ended["destination"].as_str().unwrap());
    assert!(snapshot.starts_with(dir.path().join("snapshots/vm1")), "{ended:#}");
    let verified = livesnap::command(["verify"]).unwrap().arg(snapshot).output().unwrap();
    assert!(verified.status.success(), "{verified:?}");
    let window = check_files(&snapshot.join("ram.mapped-ram"), None).unwrap();
    assert_eq!(window.inconsistent, 0, "{window:?}");
    drop(source);
    let mut copy = builder().incoming().start().unwrap();
    copy.load_mapped_ram(&snapshot.join("ram.mapped-ram")).unwrap();
    copy.qmp("cont", json!({})).unwrap();
    let after = copy.wait_laps(1, BOOT).unwrap();
    assert!(after.workers[0] > window.newest[0], "{after:?} {window:?}");
}

/// A forecast leaves nothing behind, and says why a snapshot would be refused.
#[test]
fn a_snapshot_is_forecast_before_it_is_taken() {
    if !is_root_or_skip("a forecast for another process").unwrap() {
        return;
    }
    let mut qemu = boot();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let daemon = Daemon::serve(dir.path(), &[("vm1", &qemu)], "").unwrap();
    let plan = |request: Value| daemon.post("/snapshot/plan", &[], &request).unwrap();
    let easy = plan(json!({"vm": "vm1", "policy": {"buffer_bytes": 512 << 20}}));
    assert_eq!((easy.status, &easy.body["is_feasible"]), (200, &json!(true)), "{easy:?}");
    assert_eq!(easy.body["error"], Value::Null, "{easy:?}");
    let late =
        plan(json!({"vm": "vm1", "destination": "a/b", "policy": {"deadline_seconds": 0.001}}));
    assert_eq!((late.status, &late.body["is_feasible"]), (200, &json!(false)), "{late:?}");
    assert_eq!(late.body["error"]["reason"], "deadline", "{late:?}");
    assert_eq!(late.body["forecast"]["verdict"], "infeasible", "{late:?}");
    for (request, reason) in [
        (json!({"vm": "vm2"}), "unknown_vm"),
        (json!({"vm": "vm1", "destination": "../a"}), "bad_destination"),
        (json!({"vm": "vm1", "policy": {"min_cpu_ratio": 7}}), "bad_argument"),
    ] {
        let refused = plan(request);
        assert!((400..500).contains(&refused.status), "{refused:?}");
        assert_eq!(refused.body["reason"], reason, "{refused:?}");
    }
    expect_no_trace(&mut qemu, &dir.path().join("snapshots"));

    let taken_up = daemon.post("/snapshot", &[], &slow_request("vm1")).unwrap();
    let busy = plan(request("vm1"));
    assert_eq!((busy.status, &busy.body["reason"]), (409, &json!("busy")), "{busy:?}");
    assert_eq!(busy.body["operation"], path_of(&taken_up.body).as_str(), "{busy:?}");
}

/// A snapshot that would take minutes ends soon once it may write as fast as the disk does; who follows it sees all of that,
/// and who does not read holds nobody up.
#[test]
fn a_snapshot_is_followed_and_hurried_on() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let qemu = boot();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let daemon = Daemon::serve(dir.path(), &[("vm1", &qemu)], "").unwrap();
    let taken_up = daemon.post("/snapshot", &[], &slow_request("vm1")).unwrap();
    let path = path_of(&taken_up.body);
    let events = format!("{path}/events");
    let _never_read = daemon.send("GET", &events, &[], "").unwrap();
    let mut told = daemon.follow(&path).unwrap();
    let mut seen: Vec<(u64, Value)> = Vec::new();
    let mut wait_for = |state: &str| {
        let until = told.find(|event| {
            seen.push(event.clone());
            event.1["state"] == state
        });
        until.unwrap_or_else(|| panic!("{state} was not told of: {seen:#?}")).1
    };
    wait_for("copying");

    let policy = format!("{path}/policy");
    let change = |text: &str| {
        daemon.call("PATCH", &policy, &[("Content-Type", "application/json")], text).unwrap()
    };
    for (text, status, reason) in [
        // With such a buffer there is no controller.
        (r#"{"min_cpu_ratio": 0.5}"#, 422, "limits_refused"),
        (r#"{"min_cpu_ratio": 7}"#, 400, "bad_argument"),
        (r#"{"colour": "red"}"#, 400, "bad_argument"),
        ("[]", 400, "bad_argument"),
    ] {
        let refused = change(text);
        assert_eq!((refused.status, &refused.body["reason"]), (status, &json!(reason)), "{text}");
    }
    let changed = change(r#"{"max_bandwidth_bytes_per_second": null}"#);
    assert_eq!(changed.status, 200, "{changed:?}");
    assert_eq!(changed.body["policy"]["max_bandwidth_bytes_per_second"], Value::Null);

    let ended = wait_for("completed");
    assert!(ended["result"]["report"].is_object(), "{ended:#}");
    assert!(told.next().is_none(), "nothing comes after the end");
    assert!(seen.is_sorted_by(|before, after| before.0 < after.0), "{seen:#?}");
    let late = change(r#"{"max_bandwidth_bytes_per_second": 1}"#);
    assert_eq!((late.status, &late.body["reason"]), (409, &json!("ended")));
    // Who comes again knows it all.
    let (last, _) = seen.last().unwrap();
    let again = daemon.get_with(&events, &[("Last-Event-ID", &last.to_string())]).unwrap();
    assert_eq!(again.status, 204, "{again:?}");
}

#[test]
fn a_guest_runs_on_however_its_snapshot_is_ended() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let mut qemu = boot();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let snapshots = dir.path().join("snapshots/vm1");
    let daemon = Daemon::serve(dir.path(), &[("vm1", &qemu)], "").unwrap();
    let begin = |daemon: &Daemon| {
        let taken_up = daemon.post("/snapshot", &[], &slow_request("vm1")).unwrap();
        assert_eq!(taken_up.status, 202, "{taken_up:?}");
        let path = path_of(&taken_up.body);
        daemon.wait_state(&path, "copying").unwrap();
        path
    };

    // By its client, while it keeps the machine to itself.
    let path = begin(&daemon);
    let busy = daemon.post("/snapshot", &[], &request("vm1")).unwrap();
    assert_eq!((busy.status, &busy.body["reason"]), (409, &json!("busy")), "{busy:?}");
    assert_eq!(busy.body["operation"], path);
    assert!(busy.header("link").unwrap().contains(&path), "{busy:?}");
    let forget = daemon.call("DELETE", &path, &[], "").unwrap();
    assert_eq!((forget.status, &forget.body["reason"]), (409, &json!("not_ended")));
    for _ in 0..2 {
        let abort = daemon.post(&format!("{path}/abort"), &[], &json!({})).unwrap();
        assert_eq!(abort.status, 202, "{abort:?}");
    }
    let aborted = daemon.wait_state(&path, "aborted").unwrap();
    assert_eq!(aborted["error"]["reason"], "cancelled", "{aborted:#}");
    assert_eq!(daemon.post(&format!("{path}/abort"), &[], &json!({})).unwrap().status, 202);
    expect_no_trace(&mut qemu, &snapshots);

    // By the death of the daemon, of which the next one tells.
    let path = begin(&daemon);
    daemon.end(Signal::KILL).unwrap();
    let daemon = Daemon::start(dir.path()).unwrap();
    let aborted = daemon.wait_state(&path, "aborted").unwrap();
    assert_eq!(aborted["error"]["reason"], "daemon_restart", "{aborted:#}");
    expect_no_trace(&mut qemu, &snapshots);

    // By the end of the daemon, which waits for it to be undone.
    let path = begin(&daemon);
    assert!(daemon.end(Signal::TERM).unwrap().success());
    assert!(!qemu.has_userfaultfd().unwrap());
    expect_no_trace(&mut qemu, &snapshots);
    let daemon = Daemon::start(dir.path()).unwrap();
    let aborted = daemon.wait_state(&path, "aborted").unwrap();
    assert_eq!(aborted["error"]["reason"], "daemon_restart", "{aborted:#}");

    // By its own process's death, after which the daemon cleans up.
    let path = begin(&daemon);
    for child in daemon.children().unwrap() {
        kill_process(child, Signal::KILL).unwrap();
    }
    let failed = daemon.wait_state(&path, "failed").unwrap();
    assert_eq!(failed["error"]["reason"], "internal", "{failed:#}");
    let empty = || Ok((fs::read_dir(&snapshots).unwrap().count() == 0).then_some(()));
    poll_until("what is left is removed", LIMIT, empty).unwrap();
    expect_no_trace(&mut qemu, &snapshots);
    let waited = daemon.post("/snapshot", &[("Prefer", "wait=60")], &request("vm1")).unwrap();
    assert_eq!(waited.body["state"], "completed", "{waited:?}");
}

/// One operation runs, the next ones wait, as many as may.
#[test]
fn what_waits_has_its_turn_also_after_a_restart() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let (first, second) = (boot(), boot());
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    // The one that waits is found by its socket.
    let found = dir.path().join("vm2.qmp");
    symlink(second.qmp_socket(), &found).unwrap();
    let more = format!(
        "queued_max = 1\ndiscover = [{:?}]\n[[vm]]\nname = \"vm3\"\nqmp = \"/nobody/is/there\"",
        found.with_file_name("*.qmp")
    );
    let daemon = Daemon::serve(dir.path(), &[("vm1", &first)], &more).unwrap();
    let submit = |request: &Value| daemon.post("/snapshot", &[], request).unwrap();
    let running = path_of(&submit(&slow_request("vm1")).body);
    daemon.wait_state(&running, "copying").unwrap();
    let waiting = submit(&request("vm2"));
    assert_eq!((waiting.status, &waiting.body["state"]), (202, &json!("queued")));
    let full = submit(&request("vm3"));
    assert_eq!((full.status, &full.body["reason"]), (503, &json!("queue_full")), "{full:?}");
    assert!(full.header("retry-after").is_some(), "{full:?}");
    let waiting = path_of(&waiting.body);
    // Nothing runs any more, so its turn comes as soon as the next daemon has begun.
    assert!(daemon.end(Signal::TERM).unwrap().success());

    let daemon = Daemon::start(dir.path()).unwrap();
    daemon.wait_state(&running, "aborted").unwrap();
    let completed = daemon.wait_state(&waiting, "completed").unwrap();
    check_files(
        &Path::new(completed["destination"].as_str().unwrap()).join("ram.mapped-ram"),
        None,
    )
    .unwrap();
}

/// As many at once as may, each at its own pace.
#[test]
fn two_virtual_machines_are_snapshotted_at_once() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let (first, second) = (boot(), boot());
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let budget = "running_max = 2
        budget.buffer_bytes = 134217728
        budget.bandwidth_bytes_per_second = 1073741824";
    let daemon = Daemon::serve(dir.path(), &[("vm1", &first), ("vm2", &second)], budget).unwrap();
    let huge = json!({"vm": "vm1", "policy": {"buffer_bytes": 1 << 30}});
    let refused = daemon.post("/snapshot", &[], &huge).unwrap();
    assert_eq!((refused.status, &refused.body["reason"]), (422, &json!("over_budget")));
    let [one, other] = ["vm1", "vm2"].map(|vm| {
        let taken_up = daemon.post("/snapshot", &[], &slow_request(vm)).unwrap();
        assert_eq!(taken_up.status, 202, "{taken_up:?}");
        path_of(&taken_up.body)
    });
    for path in [&one, &other] {
        daemon.wait_state(path, "copying").unwrap();
    }
    // Each has what it asked for; one cannot have what the other has.
    let change = |path: &str, limits: &str| {
        let json = [("Content-Type", "application/json")];
        daemon.call("PATCH", &format!("{path}/policy"), &json, limits).unwrap()
    };
    for path in [&one, &other] {
        let granted = &daemon.get(path).unwrap().body["granted"];
        let asked = json!({"buffer_bytes": 16 << 20, "max_bandwidth_bytes_per_second": 1 << 20});
        assert_eq!(*granted, asked);
    }
    let refused = change(&one, r#"{"buffer_bytes": 130000000}"#);
    assert_eq!((refused.status, &refused.body["reason"]), (422, &json!("limits_refused")));
    // One is hurried on and ends; the other does not notice.
    let fast = r#"{"max_bandwidth_bytes_per_second": null}"#;
    let hurry = |path: &str| {
        let changed = change(path, fast);
        assert_eq!(changed.status, 200, "{changed:?}");
        let completed = daemon.wait_state(path, "completed").unwrap();
        let snapshot = Path::new(completed["destination"].as_str().unwrap()).to_owned();
        assert_eq!(check_files(&snapshot.join("ram.mapped-ram"), None).unwrap().inconsistent, 0);
        completed["granted"]["max_bandwidth_bytes_per_second"].as_u64().unwrap()
    };
    assert_eq!(hurry(&other), (1 << 30) - (1 << 20), "all but what the other wants");
    assert_eq!(daemon.get(&one).unwrap().body["state"], "copying");
    assert_eq!(hurry(&one), 1 << 30);
}

/// By the program's own client, which ends as the snapshot does.
#[test]
fn the_daemon_is_asked_from_a_shell() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let qemu = boot();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let daemon = Daemon::serve(dir.path(), &[("vm1", &qemu)], "").unwrap();
    let ask = |arguments: &[&str]| {
        let mut command = livesnap::command(["ask", "--daemon"]).unwrap();
        command.arg(daemon.socket()).args(arguments).output().unwrap()
    };
    let told = |output: &std::process::Output| {
        String::from_utf8([&output.stdout[..], &output.stderr].concat()).unwrap()
    };
    let known = ask(&["vms"]);
    assert!(told(&known).starts_with("vm1  "), "{known:?}");
    let planned = ask(&["plan", "vm1", "--buffer", "1GiB"]);
    assert_eq!(planned.status.code(), Some(0), "{planned:?}");
    assert!(told(&planned).contains("destination"), "{planned:?}");
    let late = ask(&["plan", "vm1", "--deadline", "1ms"]);
    assert_eq!(late.status.code(), Some(4), "{late:?}");
    assert!(told(&late).contains("infeasible"), "{late:?}");
    let limits = ["--on-infeasible", "wait", "--buffer", "512MiB"];
    let taken = ask(&[&["snapshot", "vm1", "--out", "monday"], &limits[..]].concat());
    assert_eq!(taken.status.code(), Some(0), "{taken:?}");
    let text = told(&taken);
    let last = text.lines().rfind(|line| line.contains("vm1  completed")).unwrap();
    assert!(last.ends_with("/snapshots/monday"), "{last}");
    // Then a report, as the one-shot command has it.
    let (_, report) = text.split_once("\nsnapshot in ").unwrap();
    for word in ["/snapshots/monday\n", "\n  downtime ", "\n  buffer ", " of 512.0 MiB"] {
        assert!(report.contains(word), "{word}: {report}");
    }
    let listed = ask(&["list"]);
    assert_eq!(told(&listed).trim_end(), last);

    let running = daemon.post("/snapshot", &[], &slow_request("vm1")).unwrap().body;
    let id = running["id"].as_str().unwrap();
    let busy = ask(&["snapshot", "vm1"]);
    assert_eq!(busy.status.code(), Some(3), "{busy:?}");
    assert!(told(&busy).contains(id), "{busy:?}");
    let shown = ask(&["--json", "show", id]);
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["id"], id);
    assert_eq!(ask(&["abort", id]).status.code(), Some(0));
    let followed = ask(&["follow", id]);
    assert_eq!(followed.status.code(), Some(130), "{followed:?}");
    let unknown = ask(&["show", "07"]);
    assert_eq!(unknown.status.code(), Some(3), "{unknown:?}");
    daemon.end(Signal::TERM).unwrap();
    let mut command = livesnap::command(["ask", "--daemon"]).unwrap();
    let alone = command.arg(dir.path().join("sock")).arg("list").output().unwrap();
    assert_eq!(alone.status.code(), Some(3), "{alone:?}");
    assert!(told(&alone).contains("livesnap serve"), "{alone:?}");
}

/// None of these needs a virtual machine.
#[test]
fn what_cannot_be_is_refused_by_name() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let more = "[[vm]]\nname = \"vm1\"\nqmp = \"/nobody/is/there\"";
    Daemon::configure(dir.path(), &[], more).unwrap();
    let snapshots = dir.path().join("snapshots");
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, snapshots.join("link")).unwrap();
    let daemon = Daemon::start(dir.path()).unwrap();

    let to = |destination: &str| json!({"vm": "vm1", "destination": destination});
    for destination in [
        "../elsewhere/a",
        "a/../../elsewhere/a",
        "/etc/livesnap",
        "/",
        "",
        ".",
        "link/a",
        "link",
        elsewhere.join("a").to_str().unwrap(),
        snapshots.join("../elsewhere/a").to_str().unwrap(),
        snapshots.join("link/a").to_str().unwrap(),
        ".hidden",
        "a\nb",
        "a\0",
    ] {
        let refused = daemon.post("/snapshot", &[], &to(destination)).unwrap();
        let expected = (422, &json!("bad_destination"));
        assert_eq!(
            (refused.status, &refused.body["reason"]),
            expected,
            "{destination:?} {refused:?}"
        );
        assert_eq!(refused.header("content-type"), Some("application/problem+json"));
    }
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    assert_eq!(fs::read_dir(&snapshots).unwrap().count(), 1);

    let json = ("Content-Type", "application/json");
    let long = format!("{{\"vm\": \"{}\"}}", "x".repeat(100_000));
    let vm1 = r#"{"vm": "vm1"}"#;
    let long_key = "k".repeat(300);
    for (method, path, headers, body, status, reason) in [
        ("POST", "/snapshot", vec![json], r#"{"vm": "vm2"}"#, 404, "unknown_vm"),
        ("POST", "/snapshot", vec![json], r#"{"vm": "../vm1"}"#, 404, "unknown_vm"),
        ("POST", "/snapshot", vec![json], "{", 400, "bad_argument"),
        ("POST", "/snapshot", vec![json], "", 400, "bad_argument"),
        ("POST", "/snapshot", vec![json], "[\"vm1\"]", 400, "bad_argument"),
        ("POST", "/snapshot", vec![json], r#"{"vm": "vm1", "policy": []}"#, 400, "bad_argument"),
        ("POST", "/snapshot", vec![json], r#"{"vm": "vm1", "x": 1}"#, 400, "bad_argument"),
        (
            "POST",
            "/snapshot",
            vec![json],
            r#"{"vm": "vm1", "policy": {"min_cpu_ratio": 2}}"#,
            400,
            "bad_argument",
        ),
        ("POST", "/snapshot", vec![json, ("Idempotency-Key", &long_key)], vm1, 400, "bad_argument"),
        ("POST", "/snapshot", vec![], vm1, 415, "not_json"),
        ("POST", "/snapshot", vec![json], &long, 413, "body_too_large"),
        ("PUT", "/snapshot", vec![json], vm1, 405, "method_not_allowed"),
        ("GET", "/snapshot?limit=0", vec![], "", 400, "bad_argument"),
        ("GET", "/snapshot?limit=-1", vec![], "", 400, "bad_argument"),
        ("GET", "/snapshot?state=lost", vec![], "", 400, "bad_argument"),
        ("GET", "/snapshot/%2e%2e%2fetc", vec![], "", 404, "unknown_operation"),
        ("GET", "/snapshot/%ff", vec![], "", 404, "unknown_operation"),
        ("DELETE", "/snapshot/07", vec![], "", 404, "unknown_operation"),
        ("POST", "/snapshot/07/abort", vec![], "", 404, "unknown_operation"),
        ("GET", "/etc/passwd", vec![], "", 404, "not_found"),
    ] {
        let refused = daemon.call(method, path, &headers, body).unwrap();
        let told = (refused.status, &refused.body["reason"]);
        assert_eq!(told, (status, &reason.into()), "{method} {path} {body} {refused:?}");
        assert!(refused.body["detail"].is_string() && refused.body["title"].is_string());
        assert_eq!(refused.header("content-type"), Some("application/problem+json"));
        assert_eq!(refused.header("allow").is_some(), status == 405, "{refused:?}");
    }
    // Headers have a limit of the library's own, which answers without a body.
    let long = "x".repeat(100_000);
    let refused = daemon.get_with("/healthz", &[("X-Long", &long)]).unwrap();
    assert_eq!(refused.status, 431);

    // What nobody serves is found out by the operation, which says so.
    let failed = daemon.post("/snapshot", &[("Prefer", "wait=60")], &to("a")).unwrap();
    assert_eq!((failed.status, &failed.body["state"]), (200, &"failed".into()), "{failed:?}");
    assert_eq!(failed.body["error"]["reason"], "vmm_unreachable", "{failed:?}");
    assert!(failed.body["error"]["detail"].as_str().unwrap().contains("/nobody/is/there"));

    let described = daemon.get("/openapi.json").unwrap().body;
    for (path, method) in [("/snapshot", "post"), ("/snapshot/{id}", "get"), ("/vms", "get")] {
        assert!(described["paths"][path][method].is_object(), "{method} {path}: {described:#}");
    }
}

#[test]
fn one_daemon_has_a_socket_and_a_state_and_a_dead_one_has_neither() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let living = Daemon::serve(dir.path(), &[], "").unwrap();
    let mut second = Daemon::command(dir.path()).unwrap().spawn().unwrap();
    assert_eq!(second.wait().unwrap().code(), Some(3), "{}", living.log());
    assert!(living.log().contains("another daemon"), "{}", living.log());
    assert_eq!(living.get("/healthz").unwrap().status, 200);
    living.end(Signal::KILL).unwrap();
    assert!(dir.path().join("sock").exists());

    let next = Daemon::start(dir.path()).unwrap();
    assert!(next.end(Signal::INT).unwrap().success());
    assert!(!dir.path().join("sock").exists());
    // One that cannot be understood is refused before anything is done.
    Daemon::configure(dir.path(), &[], "running_max = 0").unwrap();
    let output = Daemon::command(dir.path()).unwrap().status().unwrap();
    assert_eq!(output.code(), Some(3));
}
