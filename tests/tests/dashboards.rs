//! Dashboards and alerts on the real thing: Debian's Prometheus and Alertmanager scrape a daemon that takes snapshots of a
//! real QEMU guest.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use livesnap_dashboards::{Dashboard, boards, queries};
use livesnap_tests::daemon::Daemon;
use livesnap_tests::livesnap::others_snapshot;
use livesnap_tests::mapped_ram::damage;
use livesnap_tests::monitoring::{Monitoring, Receiver, now};
use livesnap_tests::qemu::{Load, Qemu};
use livesnap_tests::{is_root_or_skip, poll_until};
use rustix::process::Signal;
use serde_json::{Map, Value, json};

const BOOT: Duration = Duration::from_secs(120);
const VM1: Option<&str> = Some("vm1");
const LIMIT: Duration = Duration::from_secs(120);
/// Limits that no busy host breaks, and a destination that is slower than the guest writes.
const BUFFER: u64 = 64 << 20;
const SLOW: u64 = 16 << 20;
const VERY_SLOW: u64 = 2 << 20;

/// Besides the guest, a virtual machine that a snapshot is wanted of, and that is not there.
const CONFIGURATION: &str = "look_seconds = 1
metrics_listen = \"127.0.0.1:0\"
[[vm]]
name = \"vm2\"
qmp = \"/nobody/listens/here\"
[[schedule]]
name = \"often\"
vms = [\"vm2\"]
every = \"5s\"
";

/// A guest that overwrites more memory than the buffer holds, without rest.
fn busy_guest() -> Qemu {
    let load = Load { ring_mib: 192, workers: 2, random: true, ..Load::default() };
    let mut qemu = Qemu::builder().memory_mib(384).vcpus(2).load(load).start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu
}

/// Begins a snapshot and returns its path.
fn begin(daemon: &Daemon, policy: &Value) -> String {
    let taken_up = daemon.post("/snapshot", &[], &json!({"vm": "vm1", "policy": policy})).unwrap();
    assert_eq!(taken_up.status, 202, "{taken_up:?}");
    taken_up.header("location").unwrap().to_owned()
}

/// Waits for its end, and returns how it ended.
fn end(daemon: &Daemon, path: &str) -> Value {
    poll_until("the snapshot ends", LIMIT, || {
        let operation = daemon.get(path)?.body;
        Ok((!operation["ended_at"].is_null()).then_some(operation))
    })
    .unwrap()
}

/// Takes a snapshot and returns how it ended.
fn take(daemon: &Daemon, policy: &Value) -> Value {
    end(daemon, &begin(daemon, policy))
}

/// What somebody was told of an alert so far, each with the path that it was sent to. The alert is that of `vm`, if there is
/// one of each virtual machine.
fn messages(
    receiver: &Receiver,
    name: &str,
    vm: Option<&str>,
    status: &str,
) -> Vec<(String, Value)> {
    let is_it = |alert: &Value| {
        let labels = &alert["labels"];
        labels["alertname"] == name && labels["vm"].as_str() == vm && alert["status"] == status
    };
    receiver.alerts().into_iter().filter(|(_, alert)| is_it(alert)).collect()
}

/// Waits until somebody is told of an alert, and returns it with the path that it was sent to.
fn told(receiver: &Receiver, name: &str, vm: Option<&str>, status: &str) -> (String, Value) {
    poll_until(&format!("somebody is told that {name} is {status}"), LIMIT, || {
        Ok(messages(receiver, name, vm, status).into_iter().next())
    })
    .unwrap()
}

/// Waits until somebody was paged so many times more.
fn paged_again(receiver: &Receiver, name: &str, vm: Option<&str>, times: usize) {
    let pages = || messages(receiver, name, vm, "firing").len();
    let before = pages();
    poll_until(&format!("somebody is paged again for {name}"), LIMIT, || {
        Ok((pages() >= before + times).then_some(()))
    })
    .unwrap();
}

/// Waits until an alert with these labels fires in Prometheus, but reaches nobody because `cause` does.
fn silenced(monitoring: &Monitoring, labels: &[(&str, &str)], cause: &str) {
    let selected: Vec<String> =
        labels.iter().map(|(name, value)| format!("{name}={value:?}")).collect();
    let fires = format!("ALERTS{{alertstate=\"firing\", {}}}", selected.join(", "));
    poll_until(&format!("{fires} is silenced by {cause}"), LIMIT, || {
        let causes = monitoring.alerts(&[("alertname", cause)])?;
        let is_cause = |id: &Value| causes.iter().any(|cause| cause["fingerprint"] == *id);
        let is_silenced = |alert: &Value| {
            let by = alert["status"]["inhibitedBy"].as_array();
            by.is_some_and(|by| by.iter().any(is_cause))
        };
        let is_so = monitoring.alerts(labels)?.iter().any(is_silenced)
            && !monitoring.query(&fires)?.is_empty();
        Ok(is_so.then_some(()))
    })
    .unwrap();
}

/// A query of a dashboard with Grafana's variables replaced as Grafana would.
fn chosen(board: &Dashboard, expr: &str, instance: &str) -> String {
    let several = board.variables.iter().any(|variable| variable.is_multiple);
    expr.replace("$job", "livesnap")
        .replace("$instance", instance)
        .replace("$vm", if several { "vm1|vm2" } else { "vm1" })
        .replace("$__rate_interval", "5s")
        .replace("$__range", "10m")
}

/// Whether a result has a value that can be drawn.
fn has_value(result: &[Value]) -> bool {
    let values = result.iter().flat_map(|series| series["values"].as_array().unwrap());
    values.filter_map(|pair| pair[1].as_str()?.parse::<f64>().ok()).any(f64::is_finite)
}

/// Keeps what the dashboards ask and get, from `began` to now, for pictures of them: `cargo xtask dashboards --pictures`
/// says where.
fn keep_answers(uids: &[&str], monitoring: &Monitoring, instance: &str, began: f64) {
    let Some(dir) = pictured() else { return };
    for board in boards::all().into_iter().filter(|board| uids.contains(&board.uid)) {
        let answer = |(_, expr): (String, String)| {
            let series = monitoring.range(&chosen(&board, &expr, instance), began).unwrap();
            (expr, Value::from(series))
        };
        let series: Map<_, _> = queries(&board).into_iter().map(answer).collect();
        // Bars are drawn less a scrape apart than they reach back, as Grafana does it.
        let answers =
            json!({"from": began, "to": now(), "step": 1, "interval": 4, "series": series});
        fs::write(dir.join(board.uid).with_extension("json"), answers.to_string()).unwrap();
    }
}

fn pictured() -> Option<PathBuf> {
    std::env::var_os("LIVESNAP_ANSWERS").map(PathBuf::from)
}

/// What a dashboard asks and gets nothing for, from `began` to now.
fn unanswered(monitoring: &Monitoring, instance: &str, began: f64) -> Vec<String> {
    let mut nothing = Vec::new();
    for board in boards::all() {
        for variable in &board.variables {
            let series = chosen(&board, variable.series, instance);
            if monitoring.label_values(variable.label, &series).unwrap().is_empty() {
                nothing.push(format!("{}: variable {}", board.uid, variable.label));
            }
        }
        for (name, expr) in queries(&board) {
            if !has_value(&monitoring.range(&chosen(&board, &expr, instance), began).unwrap()) {
                nothing.push(format!("{name}: {expr}"));
            }
        }
    }
    nothing
}

/// Metrics that there cannot be here: a kernel may refuse probes, or count no pressure.
fn nobody_knows(result: &Value) -> Vec<&'static str> {
    let mut metrics = Vec::new();
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
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let guest = busy_guest();
    let daemon = Daemon::serve(dir.path(), &[("vm1", &guest)], CONFIGURATION).unwrap();
    let target = daemon.metrics_address().unwrap();
    let receiver = Receiver::start().unwrap();
    let began = now();
    let monitoring = Monitoring::start(dir.path(), target, receiver.address()).unwrap();

    // Nothing has happened yet, and every way in which a snapshot can end is there.
    let ends = monitoring.query("count(livesnap_snapshots_total{vm=\"vm1\"} == 0)").unwrap();
    let pairs = livesnap_metrics::outcomes_and_reasons().count();
    assert_eq!(ends[0]["value"][1], pairs.to_string(), "{ends:?}");

    let path = begin(
        &daemon,
        &json!({
            "on_infeasible": "wait", "buffer_bytes": BUFFER, "min_cpu_ratio": 0.1, "stall_limit_seconds": 60,
            "deadline_seconds": 600, "max_bandwidth_bytes_per_second": SLOW, "force": true,
        }),
    );
    // Its beginning is marked as soon as it has begun.
    let begun = "livesnap_last_snapshot_start_timestamp_seconds > 0 and livesnap_last_snapshot_end_timestamp_seconds == 0";
    poll_until("a snapshot that runs has begun", LIMIT, || {
        Ok((!monitoring.query(begun)?.is_empty()).then_some(()))
    })
    .unwrap();
    if pictured().is_some() {
        let half = "livesnap_remaining_bytes / livesnap_ram_bytes < 0.5 and livesnap_snapshots_in_progress == 1";
        poll_until("half of it is saved", LIMIT, || {
            Ok((!monitoring.query(half)?.is_empty()).then_some(()))
        })
        .unwrap();
        keep_answers(&["livesnap-live"], &monitoring, &target.to_string(), began);
    }
    let throttled = end(&daemon, &path);
    assert_eq!(throttled["state"], "completed", "{throttled:#}");
    let withheld = throttled["result"]["control"]["withheld_ns"].as_u64().unwrap();
    assert!(withheld > 0, "{throttled:#}");
    // It would take minutes.
    let hopeless = json!({
        "on_infeasible": "abort", "buffer_bytes": BUFFER, "min_cpu_ratio": 0.9, "stall_limit_seconds": 60,
        "deadline_seconds": 10, "max_bandwidth_bytes_per_second": VERY_SLOW, "force": true,
    });
    let aborted = take(&daemon, &hopeless);
    assert_eq!(aborted["state"], "aborted", "{aborted:#}");

    // Somebody is told what and why, and then that it is well again.
    let (path, alert) = told(&receiver, "SnapshotAborted", VM1, "firing");
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
    told(&receiver, "SnapshotAborted", VM1, "resolved");

    keep_answers(&["livesnap-fleet", "livesnap-host"], &monitoring, &target.to_string(), began);

    // What was written well is found damaged, by a daemon that reads what the one before it was to read.
    assert!(daemon.end(Signal::TERM).unwrap().success());
    Daemon::leave_unverified(dir.path(), again["id"].as_str().unwrap()).unwrap();
    let snapshot = Path::new(again["destination"].as_str().unwrap());
    damage(&snapshot.join("ram.mapped-ram")).unwrap();
    let at_the_same_address = CONFIGURATION.replace("127.0.0.1:0", &target.to_string());
    let daemon = Daemon::serve(dir.path(), &[("vm1", &guest)], &at_the_same_address).unwrap();
    let (path, alert) = told(&receiver, "VerifyFailed", VM1, "firing");
    assert_eq!(path, "/page");
    let labels = &alert["labels"];
    for (name, expected) in
        [("severity", "critical"), ("job", "livesnap"), ("instance", &target.to_string())]
    {
        assert_eq!(labels[name], expected, "{alert:#}");
    }

    // It knows that the last snapshot was none of those that came to nothing.
    let told_again = monitoring.query("ALERTS{alertname=\"SnapshotAborted\", vm=\"vm1\"}").unwrap();
    assert!(told_again.is_empty(), "{told_again:?}");

    // Somebody else's snapshot is, for the daemon, what one that left something would be.
    let other = others_snapshot(&guest, &dir.path().join("other")).unwrap();
    let leaks = ["ThrottleLeaked", "ProtectionLeaked"];
    for name in leaks {
        let (path, _) = told(&receiver, name, VM1, "firing");
        assert_eq!(path, "/page", "{name}");
    }
    other.signal(Signal::TERM).unwrap();
    other.wait().unwrap();
    for name in leaks {
        told(&receiver, name, VM1, "resolved");
    }

    // No snapshot of the one that is not there could be taken.
    let (path, _) = told(&receiver, "SnapshotOverdue", Some("vm2"), "firing");
    assert_eq!(path, "/page");

    // Everything that a dashboard asks had something to show.
    let mut nothing = unanswered(&monitoring, &target.to_string(), began);
    let excused = nobody_knows(&again["result"]);
    nothing.retain(|query| !excused.iter().any(|metric| query.contains(metric)));
    assert!(nothing.is_empty(), "{nothing:#?}");

    // Three lost are a page. Another one, lost by another cause, would be a ticket alone, and is none beside the page.
    for _ in 0..2 {
        let aborted = take(&daemon, &hopeless);
        assert_eq!(aborted["state"], "aborted", "{aborted:#}");
    }
    told(&receiver, "AbortBudgetBurn", VM1, "firing");
    drop(guest);
    let failed = take(&daemon, &json!({}));
    let reason = failed["error"]["reason"].as_str().unwrap();
    assert_eq!(failed["state"], "failed", "{failed:#}");
    let ticket = [("alertname", "SnapshotAborted"), ("vm", "vm1"), ("reason", reason)];
    silenced(&monitoring, &ticket, "AbortBudgetBurn");
    paged_again(&receiver, "AbortBudgetBurn", VM1, 2);
    let tickets = messages(&receiver, "SnapshotAborted", VM1, "firing");
    assert!(tickets.iter().all(|(_, alert)| alert["labels"]["reason"] != reason), "{tickets:#?}");

    // The snapshot is as damaged as before, but was found so long ago.
    told(&receiver, "VerifyFailed", VM1, "resolved");
    let failures = monitoring.query("livesnap_verify_failures_total{vm=\"vm1\"} == 1").unwrap();
    assert_eq!(failures.len(), 1, "{failures:?}");

    // A daemon that is gone is a page, and the only one of its host.
    daemon.end(Signal::TERM).unwrap();
    let (path, alert) = told(&receiver, "TargetDown", None, "firing");
    assert_eq!((path.as_str(), &alert["labels"]["severity"]), ("/page", &json!("critical")));
    let page = [("alertname", "AbortBudgetBurn"), ("vm", "vm1")];
    silenced(&monitoring, &page, "TargetDown");
    // What was on its way is there.
    paged_again(&receiver, "TargetDown", None, 1);
    let before = messages(&receiver, "AbortBudgetBurn", VM1, "firing").len();
    paged_again(&receiver, "TargetDown", None, 2);
    assert_eq!(messages(&receiver, "AbortBudgetBurn", VM1, "firing").len(), before);
}
