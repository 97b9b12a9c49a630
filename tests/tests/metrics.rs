//! The daemon's metrics on a real QEMU: what Prometheus' own tool says of them, that they tell what a snapshot's report tells,
//! and that what is left in a guest shows while no snapshot of the daemon's runs.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use livesnap_tests::daemon::{Daemon, series};
use livesnap_tests::livesnap::others_snapshot;
use livesnap_tests::qemu::{Load, Qemu};
use livesnap_tests::{is_root_or_skip, poll_until};
use rustix::process::Signal;
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(60);

/// What Prometheus' own tool has against the text.
fn expect_good(metrics: &str) {
    let path = livesnap_tests::monitoring::program("promtool");
    let mut tool = Command::new(&path)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!("cannot run {}: {error}; `cargo xtask setup` unpacks it", path.display())
        });
    tool.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let said = tool.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success() && said.stdout.is_empty() && words.is_empty(), "{said:?}");
}

#[test]
fn prometheus_is_told_of_snapshots_and_of_what_they_leave() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let load = Load { ring_mib: 64, ..Load::default() };
    let mut qemu = Qemu::builder().load(load).start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    let more = "look_seconds = 1\nmetrics_listen = \"127.0.0.1:0\"";
    let daemon = Daemon::serve(dir.path(), &[("vm1", &qemu)], more).unwrap();
    let value = |name: &str| series(&daemon.metrics().unwrap(), name);
    let completed = "livesnap_snapshots_total{outcome=\"completed\",reason=\"none\",vm=\"vm1\"}";
    assert_eq!(value(completed), Some(0.0), "of a series that begins at 1 nobody sees a rise");
    expect_good(&daemon.metrics().unwrap());

    // By TCP there are metrics and nothing else.
    let by_tcp = daemon.get_by_tcp("/metrics").unwrap();
    assert_eq!(by_tcp.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    assert_eq!(series(by_tcp.body.as_str().unwrap(), completed), Some(0.0));
    for path in ["/", "/vms", "/snapshot", "/openapi.json", "/healthz"] {
        assert_eq!(daemon.get_by_tcp(path).unwrap().status, 404, "{path}");
    }

    // Somebody else's snapshot is, for the daemon, what one that left something would be.
    let left = ["livesnap_protected_bytes{vm=\"vm1\"}", "livesnap_throttle_ratio{vm=\"vm1\"}"];
    let is_none = || Ok((left.map(value) == [Some(0.0); 2]).then_some(()));
    poll_until("a look finds nothing", LIMIT, is_none).unwrap();
    let mut other = others_snapshot(&qemu, &dir.path().join("other")).unwrap();
    other.reach("copying").unwrap();
    let shows = || {
        let found = left.map(|name| value(name).unwrap_or_default());
        Ok((found[0] >= f64::from(64 << 20) && found[1] > 0.1).then_some(()))
    };
    poll_until("what is protected and throttled shows", LIMIT, shows).unwrap();
    assert_eq!(value("livesnap_snapshots_in_progress{vm=\"vm1\"}"), Some(0.0));

    // Also of a QEMU that does not answer: its own threads may wait for what was left protected.
    let wait_for = |daemon: &Daemon, state: &str| {
        let is_it =
            || Ok((daemon.get("/vms")?.body["vms"][0]["seen"]["state"] == state).then_some(()));
        poll_until(&format!("the machine is seen {state}"), LIMIT, is_it).unwrap();
    };
    qemu.signal(Signal::STOP).unwrap();
    wait_for(&daemon, "unreachable");
    assert!(shows().unwrap().is_some(), "{:?}", left.map(value));
    // Who never had an answer does not know where to look, and does not say that there was nothing.
    let stranger_dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let stranger =
        Daemon::serve(stranger_dir.path(), &[("vm1", &qemu)], "look_seconds = 1").unwrap();
    wait_for(&stranger, "unreachable");
    let told = stranger.metrics().unwrap();
    assert_eq!(left.map(|name| series(&told, name)), [None; 2]);
    drop(stranger);
    qemu.signal(Signal::CONT).unwrap();
    wait_for(&daemon, "running");

    other.signal(Signal::TERM).unwrap();
    other.wait().unwrap();
    poll_until("nothing is left", LIMIT, is_none).unwrap();

    // One of its own, which is counted as it says itself.
    let request = json!({"vm": "vm1", "policy": {"on_infeasible": "wait"}});
    let taken = daemon.post("/snapshot", &[("Prefer", "wait=60")], &request).unwrap();
    assert_eq!(taken.body["state"], "completed", "{taken:?}");
    let result = &taken.body["result"];
    let told = daemon.metrics().unwrap();
    expect_good(&told);
    let figure = |pointer: &str| result.pointer(pointer).and_then(Value::as_f64).unwrap();
    let captured = |path: &str| {
        let name = format!("livesnap_captured_bytes_total{{path=\"{path}\",vm=\"vm1\"}}");
        series(&told, &name).unwrap()
    };
    assert_eq!(series(&told, completed), Some(1.0));
    assert_eq!(captured("fault"), figure("/report/captured/by_fault_bytes"));
    assert_eq!(captured("sweep"), figure("/report/captured/by_sweep_bytes"));
    for (name, expected) in [
        ("livesnap_stored_bytes_total", figure("/report/stored_bytes")),
        ("livesnap_last_snapshot_stored_bytes", figure("/report/stored_bytes")),
        ("livesnap_fault_service_seconds_count", figure("/report/faults")),
        ("livesnap_downtime_seconds_count", 1.0),
        ("livesnap_downtime_seconds_sum", figure("/report/downtime/total_ns") / 1e9),
        ("livesnap_remaining_bytes", 0.0),
        ("livesnap_buffer_limit_bytes", 0.0),
    ] {
        assert_eq!(series(&told, &format!("{name}{{vm=\"vm1\"}}")), Some(expected), "{name}");
    }
    if let Some(count) = result.pointer("/probes/stalls/copy/count") {
        let name = "livesnap_fault_stall_seconds_count{vm=\"vm1\"}";
        assert_eq!(series(&told, name), count.as_f64());
    }
    let posts = "livesnap_http_request_duration_seconds_count{code=\"200\",route=\"/snapshot\"}";
    assert_eq!(series(&told, posts), Some(1.0));

    // The next daemon counts anew, and knows how old the last snapshot is.
    let last = "livesnap_last_success_timestamp_seconds{vm=\"vm1\"}";
    let before = value(last).unwrap();
    daemon.end(Signal::TERM).unwrap();
    let daemon = Daemon::start(dir.path()).unwrap();
    let told = daemon.metrics().unwrap();
    assert_eq!(series(&told, completed), Some(0.0));
    assert!((series(&told, last).unwrap() - before).abs() < 5.0, "{before} {told}");
}
