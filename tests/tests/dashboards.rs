//! Dashboards and alerts on the real thing: Debian's Prometheus and Alertmanager scrape a daemon that takes snapshots of a
//! real QEMU guest.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;
use std::time::Duration;

use livesnap_dashboards::{boards, queries};
use livesnap_tests::daemon::Daemon;
use livesnap_tests::livesnap::{self, Running};
use livesnap_tests::monitoring::{Monitoring, Receiver, now};
use livesnap_tests::qemu::{Load, Qemu};
use livesnap_tests::{is_root_or_skip, poll_until};
use rustix::process::Signal;
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(120);
/// Limits that no busy host breaks, and a destination that is slower than the guest writes.
const BUFFER: u64 = 64 << 20;
const SLOW: u64 = 16 << 20;
const VERY_SLOW: u64 = 2 << 20;

/// A guest that overwrites more memory than the buffer holds, without rest, with a second monitor at `second`.
fn busy_guest(second: &Path) -> Qemu {
    let load = Load { ring_mib: 192, workers: 2, random: true, ..Load::default() };
    let monitor = format!("unix:{},server=on,wait=off", second.display());
    let builder = Qemu::builder().memory_mib(384).vcpus(2).load(load).arguments(["-qmp", &monitor]);
    let mut qemu = builder.start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu
}

/// Takes a snapshot and returns how it ended.
fn take(daemon: &Daemon, policy: &Value) -> Value {
    let taken_up = daemon.post("/snapshot", &[], &json!({"vm": "vm1", "policy": policy})).unwrap();
    assert_eq!(taken_up.status, 202, "{taken_up:?}");
    let path = taken_up.header("location").unwrap();
    poll_until("the snapshot ends", LIMIT, || {
        let operation = daemon.get(path)?.body;
        Ok((!operation["ended_at"].is_null()).then_some(operation))
    })
    .unwrap()
}

/// Waits until somebody is told of an alert, and returns it with the path that it was sent to.
fn told(receiver: &Receiver, name: &str, status: &str) -> (String, Value) {
    poll_until(&format!("somebody is told that {name} is {status}"), LIMIT, || {
        let mut alerts = receiver.alerts().into_iter();
        Ok(alerts
            .find(|(_, alert)| alert["labels"]["alertname"] == name && alert["status"] == status))
    })
    .unwrap()
}

/// A query with Grafana's variables replaced as Grafana would.
fn chosen(expr: &str, instance: &str) -> String {
    expr.replace("$job", "livesnap")
        .replace("$instance", instance)
        .replace("$vm", "vm1")
        .replace("$__rate_interval", "4s")
        .replace("$__range", "10m")
}

/// Whether a result has a value that can be drawn.
fn has_value(result: &[Value]) -> bool {
    let values = result.iter().flat_map(|series| series["values"].as_array().unwrap());
    values.filter_map(|pair| pair[1].as_str()?.parse::<f64>().ok()).any(f64::is_finite)
}

/// What a dashboard asks and gets nothing for, from `began` to now.
fn unanswered(monitoring: &Monitoring, instance: &str, began: f64) -> Vec<String> {
    let mut nothing = Vec::new();
    for board in boards::all() {
        for variable in &board.variables {
            let series = chosen(variable.series, instance);
            if monitoring.label_values(variable.label, &series).unwrap().is_empty() {
                nothing.push(format!("{}: variable {}", board.uid, variable.label));
            }
        }
        for (name, expr) in queries(&board) {
            if !has_value(&monitoring.range(&chosen(&expr, instance), began).unwrap()) {
                nothing.push(format!("{name}: {expr}"));
            }
        }
    }
    nothing
}

/// Metrics that there cannot be here: there is no schedule, and a kernel may refuse probes, or count no pressure.
fn nobody_knows(result: &Value) -> Vec<&'static str> {
    let mut metrics = vec!["livesnap_schedule_interval_seconds"];
    for (tier, probed) in [
        ("/probes/tier", "livesnap_fault_stall_seconds"),
        ("/disk/tier", "livesnap_disk_write_latency_seconds"),
    ] {
        if result.pointer(tier).is_none_or(Value::is_null) {
            metrics.push(probed);
        }
    }
    if !Path::new("/proc/pressure").exists() {
        metrics.push("livesnap_host_pressure_seconds_total");
    }
    metrics
}

#[test]
fn dashboards_and_alerts_tell_what_happens() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let began = now();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let second = dir.path().join("qmp");
    let guest = busy_guest(&second);
    let more = "look_seconds = 1\nmetrics_listen = \"127.0.0.1:0\"";
    let daemon = Daemon::serve(dir.path(), &[("vm1", &guest)], more).unwrap();
    let target = daemon.metrics_address().unwrap();
    let receiver = Receiver::start().unwrap();
    let monitoring = Monitoring::start(dir.path(), target, receiver.address()).unwrap();

    // Nothing has happened yet, and every way in which a snapshot can end is there.
    let ends = monitoring.query("count(livesnap_snapshots_total{vm=\"vm1\"} == 0)").unwrap();
    let pairs = livesnap_metrics::outcomes_and_reasons().count();
    assert_eq!(ends[0]["value"][1], pairs.to_string(), "{ends:?}");

    let throttled = take(
        &daemon,
        &json!({
            "on_infeasible": "wait", "buffer_bytes": BUFFER, "min_cpu_ratio": 0.1, "stall_limit_seconds": 60,
            "deadline_seconds": 600, "max_bandwidth_bytes_per_second": SLOW, "force": true,
        }),
    );
    assert_eq!(throttled["state"], "completed", "{throttled:#}");
    let withheld = throttled["result"]["control"]["withheld_ns"].as_u64().unwrap();
    assert!(withheld > 0, "{throttled:#}");
    let aborted = take(
        &daemon,
        &json!({
            "on_infeasible": "abort", "buffer_bytes": BUFFER, "min_cpu_ratio": 0.9, "stall_limit_seconds": 60,
            "max_bandwidth_bytes_per_second": VERY_SLOW, "force": true,
        }),
    );
    assert_eq!(aborted["state"], "aborted", "{aborted:#}");

    // Somebody is told what and why, and then that it is well again.
    let (path, alert) = told(&receiver, "SnapshotAborted", "firing");
    assert_eq!(path, "/ticket");
    let labels = &alert["labels"];
    for (name, expected) in [
        ("vm", "vm1"),
        ("severity", "warning"),
        ("outcome", "aborted"),
        ("reason", aborted["error"]["reason"].as_str().unwrap()),
        ("instance", &target.to_string()),
    ] {
        assert_eq!(labels[name], expected, "{alert:#}");
    }
    let runbook = alert["annotations"]["runbook_url"].as_str().unwrap();
    assert!(runbook.ends_with("/SnapshotAborted.md"), "{alert:#}");
    let again = take(&daemon, &json!({"on_infeasible": "wait"}));
    assert_eq!(again["state"], "completed", "{again:#}");
    told(&receiver, "SnapshotAborted", "resolved");

    // Somebody else's snapshot, which the daemon knows nothing of, is what a snapshot that left something would be.
    let mut command =
        livesnap::command(["snapshot", "--fixed-cpu=50%", "--max-bandwidth=1MiB"]).unwrap();
    command.arg("--qmp").arg(&second).arg("--out").arg(dir.path().join("other"));
    let other = Running::start(command).unwrap();
    let leaks = ["ThrottleLeaked", "ProtectionLeaked"];
    for name in leaks {
        let (path, alert) = told(&receiver, name, "firing");
        assert_eq!((path.as_str(), &alert["labels"]["vm"]), ("/page", &json!("vm1")), "{alert:#}");
    }
    other.signal(Signal::TERM).unwrap();
    other.wait().unwrap();
    for name in leaks {
        told(&receiver, name, "resolved");
    }

    // Everything that a dashboard asks had something to show.
    let mut nothing = unanswered(&monitoring, &target.to_string(), began);
    let excused = nobody_knows(&again["result"]);
    nothing.retain(|query| !excused.iter().any(|metric| query.contains(metric)));
    assert!(nothing.is_empty(), "{nothing:#?}");
}
