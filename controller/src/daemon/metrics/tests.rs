//! That nothing is counted twice or lost on the way from a snapshot's process to Prometheus.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use livesnap_metrics::CATALOGUE;
use serde_json::json;
use snapshot_core::Reason;

use super::*;
use crate::daemon::look::VmState;
use crate::daemon::operation::{OperationError, Verification, VerificationState};

fn metrics() -> Metrics {
    Metrics::new(vec!["/".into()], &[], std::iter::empty()).unwrap()
}

fn operation(id: &str, state: State) -> Operation {
    Operation {
        id: id.into(),
        vm: "vm1".into(),
        destination: "/backup/vm1".into(),
        state,
        created_at: "2026-01-01T00:00:00Z".into(),
        ..Operation::default()
    }
}

/// An operation that has come so far.
fn copying(id: &str, saved_bytes: u64, stalls: &[(u64, u64)]) -> Operation {
    let sum_ns: u64 = stalls.iter().map(|(longest_ns, count)| longest_ns * count).sum();
    let progress = json!({
        "total_bytes": 1000, "saved_bytes": saved_bytes, "fault_bytes": saved_bytes / 10,
        "remaining_bytes": 1000 - saved_bytes, "written_bytes": saved_bytes,
        "buffer_used_bytes": 5, "buffer_limit_bytes": 50,
        "first_touches": [
            {"thread": 7, "faults": 1, "bytes": saved_bytes / 20, "wait_ns": 0},
            {"thread": 8, "faults": 0, "bytes": 0, "wait_ns": 0},
        ],
        "service": {"count": 1, "sum_ns": 1000, "buckets": [[1023, 1]]},
        "stalls": {"tier": "tp-btf", "lost": saved_bytes / 100, "sum_ns": sum_ns, "buckets": stalls},
        "disk_writes": {"tier": "raw-tp", "lost": 0, "livesnap": {"sum_ns": 9, "buckets": []},
            "others": {"sum_ns": 1, "buckets": [[1, 1]]}},
        "control": {
            "cpu_ratio_min": 0.2, "cpu_ratio_mean": 0.4, "withheld_seconds": saved_bytes as f64 / 100.0,
            "decisions": {"none": 0, "buffer": 0, "throttle": saved_bytes / 100, "abort": 0},
            "forecast": {"completion_seconds": null, "peak_buffer_bytes": 77.0,
                "first_touch_bytes_per_second": 88.0, "drain_bytes_per_second": 99.0},
            "policy": {"buffer_bytes": 64, "stall_limit_seconds": 0.01, "min_cpu_ratio": 0.3,
                "deadline_seconds": 60.0, "on_infeasible": "abort"},
        },
    });
    let progress = Some(serde_json::from_value(progress).unwrap());
    Operation { progress, ..operation(id, State::Copying) }
}

/// The value of a series, by its name and labels as they are written.
fn value(metrics: &Metrics, series: &str) -> f64 {
    let text = metrics.text().unwrap();
    let mut lines = text.lines();
    let found = lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().unwrap()
}

/// What the series say of what is left in the virtual machine, protected and throttled; nothing of one that is not there.
fn left(metrics: &Metrics) -> [Option<f64>; 2] {
    let text = metrics.text().unwrap();
    ["livesnap_protected_bytes", "livesnap_throttle_ratio"].map(|name| {
        let prefix = format!("{name}{{vm=\"vm1\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&prefix)?.parse().ok())
    })
}

#[test]
fn every_metric_of_the_catalogue_is_registered() {
    let metrics = metrics();
    for metric in CATALOGUE {
        let again = Registrar(&metrics.0.registry).gauge(metric);
        assert!(again.is_err(), "{} is not registered", metric.name);
    }
}

#[test]
fn series_are_there_before_anything_happens() {
    let metrics = metrics();
    metrics.register("vm1");
    for (outcome, reason) in outcomes_and_reasons() {
        let series = format!(
            "livesnap_snapshots_total{{outcome=\"{outcome}\",reason=\"{reason}\",vm=\"vm1\"}}"
        );
        assert_eq!(value(&metrics, &series), 0.0);
    }
    assert_eq!(value(&metrics, "livesnap_fault_stall_seconds_count{vm=\"vm1\"}"), 0.0);
    assert_eq!(value(&metrics, "livesnap_last_success_timestamp_seconds{vm=\"vm1\"}"), 0.0);
    assert!(value(&metrics, "livesnap_host_memory_available_bytes") > 0.0);
    assert!(value(&metrics, "livesnap_destination_free_bytes{root=\"/\"}") > 0.0);
    // What is known already does not begin anew.
    metrics.0.families.stored.with_label_values(&["vm1"]).inc();
    metrics.register("vm1");
    assert_eq!(value(&metrics, "livesnap_stored_bytes_total{vm=\"vm1\"}"), 1.0);
}

#[test]
fn counts_grow_across_snapshots_by_what_is_new() {
    let mut metrics = metrics();
    let mut before: Option<Operation> = None;
    let mut change = |metrics: &mut Metrics, now: Operation| {
        let earlier = before.as_ref().filter(|before| before.id == now.id);
        metrics.changed(earlier, Some(&now));
        before = Some(now);
    };
    for id in ["1", "2"] {
        change(&mut metrics, operation(id, State::Queued));
        change(&mut metrics, operation(id, State::Preparing));
        change(&mut metrics, copying(id, 400, &[(1_023, 2), (5_000, 1)]));
        // The same once more, as when something else has changed.
        change(&mut metrics, copying(id, 400, &[(1_023, 2), (5_000, 1)]));
        change(&mut metrics, copying(id, 1000, &[(1_023, 2), (2_047, 4), (5_000, 3)]));
        let error = Some(OperationError { reason: Reason::Io, detail: "no".into() });
        let last = copying(id, 1000, &[(1_023, 2), (2_047, 4), (5_000, 3)]);
        change(&mut metrics, Operation { state: State::Failed, error, ..last });
    }
    let is = |series: &str, expected: f64| {
        let found = value(&metrics, series);
        assert!((found - expected).abs() < 1e-9, "{series} is {found}, not {expected}");
    };
    is("livesnap_captured_bytes_total{path=\"fault\",vm=\"vm1\"}", 200.0);
    is("livesnap_captured_bytes_total{path=\"sweep\",vm=\"vm1\"}", 1800.0);
    is("livesnap_stored_bytes_total{vm=\"vm1\"}", 2000.0);
    is("livesnap_first_touch_bytes_total{vm=\"vm1\"}", 100.0);
    is("livesnap_throttled_seconds_total{vm=\"vm1\"}", 20.0);
    is("livesnap_decisions_total{action=\"throttle\",vm=\"vm1\"}", 20.0);
    is("livesnap_probe_events_lost_total{probe=\"stall\"}", 20.0);
    is("livesnap_probe_attached{probe=\"stall\",tier=\"tp-btf\"}", 1.0);
    is("livesnap_probe_attached{probe=\"stall\",tier=\"fentry\"}", 0.0);
    is("livesnap_fault_stall_seconds_bucket{vm=\"vm1\",le=\"0.000001024\"}", 4.0);
    is("livesnap_fault_stall_seconds_bucket{vm=\"vm1\",le=\"0.000002048\"}", 12.0);
    is("livesnap_fault_stall_seconds_bucket{vm=\"vm1\",le=\"+Inf\"}", 18.0);
    is("livesnap_fault_stall_seconds_count{vm=\"vm1\"}", 18.0);
    is("livesnap_fault_stall_seconds_sum{vm=\"vm1\"}", 2.0 * 25_234e-9);
    is("livesnap_fault_service_seconds_count{vm=\"vm1\"}", 2.0);
    is("livesnap_disk_write_latency_seconds_count{issuer=\"others\"}", 2.0);
    is("livesnap_snapshots_total{outcome=\"failed\",reason=\"io\",vm=\"vm1\"}", 2.0);
    is("livesnap_policy_deadline_seconds{vm=\"vm1\"}", 60.0);
    // And nothing of a snapshot stays that is not there any more.
    for gauge in ["snapshots_in_progress", "remaining_bytes"] {
        is(&format!("livesnap_{gauge}{{vm=\"vm1\"}}"), 0.0);
    }
    is("livesnap_snapshot_phase{phase=\"copying\",vm=\"vm1\"}", 0.0);
    is("livesnap_operations_queued", 0.0);
    assert!(!metrics.text().unwrap().contains("source=\"first_touch\""));
    assert_eq!(left(&metrics), [None; 2], "nobody has looked yet");
}

#[test]
fn a_running_snapshot_is_shown_with_the_one_that_waits() {
    let mut metrics = metrics();
    let running = copying("1", 300, &[]);
    metrics.changed(Some(&operation("1", State::Preparing)), Some(&running));
    metrics.changed(None, Some(&operation("2", State::Queued)));
    let is = |metrics: &Metrics, series: &str, expected: f64| {
        assert_eq!(value(metrics, series), expected, "{series}");
    };
    is(&metrics, "livesnap_operations_queued", 1.0);
    is(&metrics, "livesnap_snapshots_in_progress{vm=\"vm1\"}", 1.0);
    is(&metrics, "livesnap_snapshot_phase{phase=\"copying\",vm=\"vm1\"}", 1.0);
    is(&metrics, "livesnap_remaining_bytes{vm=\"vm1\"}", 700.0);
    is(&metrics, "livesnap_protected_bytes{vm=\"vm1\"}", 700.0);
    is(&metrics, "livesnap_throttle_ratio{vm=\"vm1\"}", 0.6);
    is(&metrics, "livesnap_forecast_completion_seconds{vm=\"vm1\"}", f64::INFINITY);
    is(&metrics, "livesnap_drain_rate_bytes_per_second{vm=\"vm1\"}", 99.0);
    let touches = "livesnap_guest_dirty_rate_bytes_per_second{source=\"first_touch\",vm=\"vm1\"}";
    is(&metrics, touches, 88.0);

    let result = json!({
        "outcome": "completed",
        "report": {"total_ns": 3_000_000_000_u64, "stored_bytes": 900, "buffer_peak_bytes": 40,
            "downtime": {"total_ns": 4_000_000, "pause_ns": 1_000_000, "protect_ns": 3_000_000}},
        "control": {"withheld_ns": 500_000_000}, "probes": {"tier": null}, "disk": {"tier": "raw-tp"},
    });
    let ended_at = Some("2026-01-01T00:01:00Z".to_owned());
    let state = State::Completed;
    let completed = Operation { state, ended_at, result: Some(result), ..running.clone() };
    metrics.changed(Some(&running), Some(&completed));
    is(&metrics, "livesnap_snapshots_total{outcome=\"completed\",reason=\"none\",vm=\"vm1\"}", 1.0);
    is(&metrics, "livesnap_downtime_seconds_bucket{vm=\"vm1\",le=\"0.005\"}", 1.0);
    is(&metrics, "livesnap_downtime_seconds_bucket{vm=\"vm1\",le=\"0.002\"}", 0.0);
    is(
        &metrics,
        "livesnap_last_snapshot_downtime_part_seconds{part=\"protect\",vm=\"vm1\"}",
        0.003,
    );
    is(&metrics, "livesnap_last_snapshot_throttled_seconds{vm=\"vm1\"}", 0.5);
    is(&metrics, "livesnap_probe_attached{probe=\"disk\",tier=\"raw-tp\"}", 1.0);
    is(&metrics, "livesnap_probe_attached{probe=\"stall\",tier=\"tp-btf\"}", 0.0);
    is(&metrics, "livesnap_last_success_timestamp_seconds{vm=\"vm1\"}", 1_767_225_660.0);
    is(&metrics, "livesnap_snapshot_phase{phase=\"queued\",vm=\"vm1\"}", 1.0);
    // Forgotten, it has been all the same.
    metrics.changed(Some(&completed), None);
    is(&metrics, "livesnap_snapshots_total{outcome=\"completed\",reason=\"none\",vm=\"vm1\"}", 1.0);
}

#[test]
fn what_could_not_be_kept_waits_for_nothing() {
    let mut metrics = metrics();
    let queued = operation("1", State::Queued);
    metrics.changed(None, Some(&queued));
    assert_eq!(value(&metrics, "livesnap_operations_queued"), 1.0);
    metrics.changed(Some(&queued), None);
    assert_eq!(value(&metrics, "livesnap_operations_queued"), 0.0);
    assert_eq!(value(&metrics, "livesnap_snapshot_phase{phase=\"queued\",vm=\"vm1\"}"), 0.0);
}

#[test]
fn what_is_left_shows_only_while_no_snapshot_runs() {
    let mut metrics = metrics();
    metrics.register("vm1");
    assert_eq!(left(&metrics), [None; 2], "nobody has looked yet");
    let looked = |metrics: &Metrics, protected_bytes, throttle_ratio| {
        let found = Seen {
            at: String::new(),
            state: VmState::Running,
            machine: None,
            refusals: Vec::new(),
            protected_bytes,
            throttle_ratio,
            error: None,
            body: None,
        };
        metrics.looked("vm1", &found);
        left(metrics)
    };
    assert_eq!(looked(&metrics, Some(0), Some(0.0)), [Some(0.0); 2]);
    assert_eq!(looked(&metrics, Some(4096), Some(0.25)), [Some(4096.0), Some(0.25)]);
    // One that waits changes nothing of it.
    metrics.changed(None, Some(&operation("0", State::Queued)));
    assert_eq!(left(&metrics), [Some(4096.0), Some(0.25)]);
    metrics.changed(Some(&operation("0", State::Queued)), None);
    assert_eq!(left(&metrics), [Some(4096.0), Some(0.25)]);
    // What could not be measured is not 0.
    assert_eq!(looked(&metrics, None, None), [None; 2]);
    // A look that a snapshot has overtaken knows less than it.
    metrics.changed(None, Some(&copying("1", 300, &[])));
    assert_eq!(looked(&metrics, Some(0), Some(0.0)), [Some(700.0), Some(0.6)]);
}

#[test]
fn when_the_last_snapshot_was_is_known_after_a_restart() {
    let at = |id, ended_at: &str| Operation {
        ended_at: Some(ended_at.into()),
        ..operation(id, State::Completed)
    };
    let earlier = [at("1", "2026-01-02T00:00:00Z"), at("2", "2026-01-01T00:00:00Z")];
    let metrics = Metrics::new(Vec::new(), &[], earlier.iter()).unwrap();
    let found = value(&metrics, "livesnap_last_success_timestamp_seconds{vm=\"vm1\"}");
    assert_eq!(found, 1_767_312_000.0);
    let completed = "livesnap_snapshots_total{outcome=\"completed\",reason=\"none\",vm=\"vm1\"}";
    assert_eq!(value(&metrics, completed), 0.0, "it was counted by the daemon that took it");
}

#[test]
fn a_snapshot_has_begun_before_it_has_ended_and_that_is_known_after_a_restart() {
    let last = |metrics: &Metrics| {
        ["start_timestamp_seconds", "end_timestamp_seconds", "succeeded"]
            .map(|name| value(metrics, &format!("livesnap_last_snapshot_{name}{{vm=\"vm1\"}}")))
    };
    let mut metrics = metrics();
    let at = |text: &str| Some(text.to_owned());
    let [queued, preparing, completed] =
        [State::Queued, State::Preparing, State::Completed].map(|state| {
            let started_at = at("2026-01-01T00:00:00Z").filter(|_| state != State::Queued);
            let ended_at = at("2026-01-01T00:01:00Z").filter(|_| state.is_final());
            Operation { started_at, ended_at, ..operation("1", state) }
        });
    let next =
        Operation { started_at: at("2026-01-01T01:00:00Z"), ..operation("2", State::Preparing) };
    let failed =
        Operation { state: State::Failed, ended_at: at("2026-01-01T01:00:01Z"), ..next.clone() };
    let unwanted = Operation {
        state: State::Aborted,
        ended_at: at("2026-01-01T02:00:00Z"),
        ..operation("3", State::Aborted)
    };
    metrics.changed(None, Some(&queued));
    assert_eq!(last(&metrics), [0.0; 3]);
    metrics.changed(Some(&queued), Some(&preparing));
    assert_eq!(last(&metrics), [1_767_225_600.0, 0.0, 0.0]);
    metrics.changed(Some(&preparing), Some(&completed));
    assert_eq!(last(&metrics), [1_767_225_600.0, 1_767_225_660.0, 1.0]);
    assert_eq!(value(&metrics, "livesnap_last_snapshot_duration_seconds{vm=\"vm1\"}"), 60.0);
    metrics.changed(None, Some(&next));
    assert_eq!(last(&metrics), [1_767_229_200.0, 1_767_225_660.0, 1.0]);
    metrics.changed(Some(&next), Some(&failed));
    assert_eq!(last(&metrics), [1_767_229_200.0, 1_767_229_201.0, 0.0]);
    // One that never began has no beginning.
    metrics.changed(None, Some(&unwanted));
    let all = last(&metrics);
    assert_eq!(all, [1_767_229_200.0, 1_767_232_800.0, 0.0]);
    let restarted = Metrics::new(Vec::new(), &[], [completed, failed, unwanted].iter()).unwrap();
    assert_eq!(last(&restarted), all);
}

#[test]
fn answers_are_counted_by_route() {
    let metrics = metrics();
    metrics.answered("/snapshot/{id}", 200, Duration::from_millis(3));
    metrics.answered("/etc/passwd", 404, Duration::from_millis(3));
    let count = |route: &str, code: u16| {
        let series = "livesnap_http_request_duration_seconds_count";
        value(&metrics, &format!("{series}{{code=\"{code}\",route=\"{route}\"}}"))
    };
    assert_eq!((count("/snapshot/{id}", 200), count("other", 404)), (1.0, 1.0));
}

#[test]
fn a_snapshot_counts_as_good_once_it_is_found_sound() {
    let mut metrics = metrics();
    let ended_at = Some("2026-01-01T00:01:00Z".to_owned());
    let completed = Operation { ended_at, ..operation("1", State::Completed) };
    let verified = |state, reason: Option<Reason>| {
        let error = reason.map(|reason| OperationError { reason, detail: "no".into() });
        let verification = Some(Verification { state, at: None, error });
        Operation { verification, ..completed.clone() }
    };
    let running = verified(VerificationState::Running, None);
    metrics.changed(Some(&operation("1", State::Committing)), Some(&running));
    let is = |series: &str, expected: f64| {
        assert_eq!(
            value(&metrics, &format!("livesnap_{series}{{vm=\"vm1\"}}")),
            expected,
            "{series}"
        );
    };
    is("last_success_timestamp_seconds", 0.0);
    let mut metrics = metrics.clone();
    for (reason, failures) in [(Reason::Corrupt, 1.0), (Reason::Io, 2.0), (Reason::Internal, 2.0)] {
        let failed = verified(VerificationState::Failed, Some(reason));
        metrics.changed(Some(&running), Some(&failed));
        // Something else has changed.
        metrics.changed(Some(&failed), Some(&failed));
        is("verify_failures_total", failures);
    }
    is("last_success_timestamp_seconds", 0.0);
    metrics.changed(Some(&running), Some(&verified(VerificationState::Sound, None)));
    is("last_success_timestamp_seconds", 1_767_225_660.0);
    is("verify_failures_total", 2.0);
}
