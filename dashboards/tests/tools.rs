//! Prometheus' and Alertmanager's own tools on the files: promtool checks and tests the rules, amtool the routes.
//!
//! The tests of the alerts are tested themselves: with any alert altered, they must fail.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use livesnap_dashboards::alertmanager::{PAGE, TICKET};
use livesnap_dashboards::rules::{ALERTS, Alert, alert_file};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn run(tool: &str, arguments: &[&str]) -> Output {
    let path = file("../target/livesnap-monitoring/usr/bin").join(tool);
    Command::new(&path).args(arguments).output().unwrap_or_else(|error| {
        panic!("cannot run {}: {error}; `cargo xtask setup` unpacks it", path.display())
    })
}

/// What a tool prints, if it is content.
fn assert_good(tool: &str, arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = run(tool, arguments);
    let [stdout, stderr] =
        [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(status.success(), "{tool} {arguments:?}: {stdout}{stderr}");
    stdout
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn promtool_takes_rules_and_configuration() {
    for name in ["recordings.yml", "alerts.yml"] {
        assert_good("promtool", &["check", "rules", path(&file("prometheus").join(name))]);
    }
    assert_good("promtool", &["check", "config", path(&file("prometheus/prometheus.yml"))]);
}

#[test]
fn every_alert_fires_waits_and_clears() {
    assert_good("promtool", &["test", "rules", path(&file("prometheus/alerts.test.yml"))]);
}

/// Other alerts than the one that is meant.
fn altered(alert: &Alert) -> Vec<Alert> {
    let mut others =
        vec![Alert { expr: "vector(0) > 1", ..*alert }, Alert { expr: "vector(1)", ..*alert }];
    if alert.lasting != "0s" {
        others.push(Alert { lasting: "0s", ..*alert });
        others.push(Alert { lasting: "3h", ..*alert });
    }
    if alert.keeping != "0s" {
        others.push(Alert { keeping: "0s", ..*alert });
        others.push(Alert { keeping: "3h", ..*alert });
    }
    // Each condition left away.
    for word in [" and ", " unless ", " or "] {
        others.extend(
            alert
                .expr
                .match_indices(word)
                .map(|(at, _)| Alert { expr: &alert.expr[..at], ..*alert }),
        );
    }
    others
}

/// The tests of one alert, from the file that has those of all.
fn tests_of(alert: &Alert, all: &str) -> String {
    let mut parts = all.split("\n  - name: ");
    let head = parts.next().unwrap();
    let own = parts.filter(|part| {
        part.strip_prefix(alert.name).is_some_and(|rest| rest.starts_with(['\n', ',']))
    });
    own.fold(head.to_owned(), |text, part| format!("{text}\n  - name: {part}"))
}

#[test]
fn with_any_alert_altered_the_tests_fail() {
    let directory = tempfile::tempdir().unwrap();
    fs::copy(file("prometheus/recordings.yml"), directory.path().join("recordings.yml")).unwrap();
    let all_tests = fs::read_to_string(file("prometheus/alerts.test.yml")).unwrap();
    let tests = directory.path().join("alerts.test.yml");
    let alerts = directory.path().join("alerts.yml");
    let passes_with = |alert: Alert| {
        fs::write(&alerts, alert_file(&[alert])).unwrap();
        run("promtool", &["test", "rules", path(&tests)]).status.success()
    };
    let mut count = 0;
    for alert in ALERTS {
        fs::write(&tests, tests_of(alert, &all_tests)).unwrap();
        assert!(passes_with(*alert), "{} as it is", alert.name);
        for other in altered(alert) {
            // What is no rule fails too, but tells nothing.
            fs::write(&alerts, alert_file(&[other])).unwrap();
            assert_good("promtool", &["check", "rules", path(&alerts)]);
            let Alert { name, expr, lasting, .. } = other;
            assert!(!passes_with(other), "nobody notices that {name} is {expr} for {lasting}");
            count += 1;
        }
    }
    assert!(count > 30, "{count}");
}

#[test]
fn alerts_go_to_those_who_are_meant() {
    let configuration = file("alertmanager/alertmanager.yml");
    assert_good("amtool", &["check-config", path(&configuration)]);
    let option = format!("--config.file={}", path(&configuration));
    let receiver = |labels: &[&str]| {
        let arguments =
            ["config", "routes", "test", &option].into_iter().chain(labels.iter().copied());
        assert_good("amtool", &arguments.collect::<Vec<_>>()).trim().to_owned()
    };
    for alert in ALERTS {
        let severity = alert.severity.as_str();
        let expected = if severity == "critical" { PAGE } else { TICKET };
        let name = format!("alertname={}", alert.name);
        assert_eq!(
            receiver(&[&name, "service=livesnap", &format!("severity={severity}")]),
            expected,
            "{}",
            alert.name
        );
    }
    assert_eq!(
        receiver(&["alertname=TargetDown", "severity=critical"]),
        "nobody",
        "another service's alert"
    );
}
