//! Every metric keeps Prometheus' conventions, and `docs/metrics.md` has them all.
//!
//! After a change: `REWRITE_DOCS=1 cargo test -p livesnap-metrics`.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::label::{NO_REASON, OUTCOMES};
use super::*;

/// Words that only other than base units have in their names (prometheus.io/docs/practices/naming).
const OTHER_UNITS: [&str; 12] = [
    "ms",
    "us",
    "ns",
    "milliseconds",
    "microseconds",
    "nanoseconds",
    "minutes",
    "hours",
    "kb",
    "mb",
    "mib",
    "percent",
];

#[test]
fn names_have_prefix_unit_and_total() {
    for Metric { name, kind, unit, .. } in CATALOGUE {
        let rest = name.strip_prefix("livesnap_").unwrap();
        assert!(rest.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'_')), "{name}");
        let counted = rest.strip_suffix("_total");
        assert_eq!(counted.is_some(), matches!(kind, Kind::Counter), "{name}");
        let base = format!("_{}", counted.unwrap_or(rest));
        let suffixes =
            [Unit::Bytes, Unit::BytesPerSecond, Unit::Timestamp, Unit::Seconds, Unit::Ratio]
                .map(|unit| unit.suffix().unwrap());
        // Of several that fit, the longest is the unit: a timestamp also ends in seconds.
        let found = suffixes
            .into_iter()
            .filter(|suffix| base.ends_with(suffix))
            .max_by_key(|suffix| suffix.len());
        assert_eq!(found, unit.suffix(), "{name}");
        assert!(!base.split('_').any(|word| OTHER_UNITS.contains(&word)), "{name}");
        for suffix in ["_bucket", "_sum", "_count", "_info_total"] {
            assert!(!base.ends_with(suffix), "{name} looks like a part of a histogram");
        }
    }
}

#[test]
fn names_are_unique_and_found() {
    let mut names = HashSet::new();
    for metric in CATALOGUE {
        for name in metric.series_names() {
            assert_eq!(find(&name).unwrap().name, metric.name);
            assert!(names.insert(name), "{} is there twice", metric.name);
        }
    }
    assert!(find("livesnap_nothing").is_none());
    assert!(find("livesnap_ram_bytes_bucket").is_none(), "a gauge has no buckets");
}

#[test]
fn helps_are_sentences() {
    for Metric { name, help, .. } in CATALOGUE {
        assert!(
            help.ends_with('.') && help.starts_with(|first: char| first.is_ascii_alphanumeric()),
            "{name}: {help}"
        );
        assert!(!help.contains(['\n', '|']), "{name}: {help}");
    }
}

#[test]
fn labels_are_few_and_closed() {
    for Metric { name, labels, .. } in CATALOGUE {
        for label in *labels {
            let is_good = |word: &str| {
                !word.is_empty() && word.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'_'))
            };
            assert!(is_good(label.name), "{name}: {}", label.name);
            assert!(
                !["id", "snapshot", "pid", "le", "job", "instance"].contains(&label.name),
                "{name}: {}",
                label.name
            );
            if let Values::Closed(values) = label.values {
                assert!(
                    values.iter().collect::<HashSet<_>>().len() == values.len(),
                    "{name}: {values:?}"
                );
                assert!(
                    values.iter().all(|value| !value.is_empty()),
                    "{name}: an empty value is no value"
                );
            }
        }
    }
}

#[test]
fn buckets_ascend() {
    for metric in CATALOGUE {
        let edges = metric.bucket_edges();
        assert!(edges.is_sorted_by(|a, b| a < b), "{}: {edges:?}", metric.name);
        assert!(
            edges.len() <= 24,
            "{}: each bucket is a series for each virtual machine",
            metric.name
        );
    }
    let stall = FAULT_STALL.bucket_edges();
    assert_eq!((stall[0], stall[stall.len() - 1]), (1.024e-6, 4.294_967_296));
}

#[test]
fn every_reason_has_its_outcome_and_its_series() {
    let pairs: Vec<_> = outcomes_and_reasons().collect();
    assert_eq!(pairs.len(), snapshot_core::Reason::ALL.len() + 1);
    assert_eq!(pairs[0], ("completed", NO_REASON));
    for reason in snapshot_core::Reason::ALL {
        let outcome = outcome_of(reason.as_str());
        assert!(pairs.contains(&(outcome, reason.as_str())));
        assert_ne!(outcome, "completed");
    }
    for (reason, outcome) in [("cancelled", "aborted"), ("deadline", "aborted"), ("io", "failed")] {
        assert_eq!(outcome_of(reason), outcome, "{reason}");
    }
    assert_eq!(
        OUTCOMES.len(),
        pairs.iter().map(|(outcome, _)| outcome).collect::<HashSet<_>>().len()
    );
}

#[test]
fn the_metrics_are_documented() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/metrics.md");
    let text = document();
    if std::env::var_os("REWRITE_DOCS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == text,
        "docs/metrics.md is not what the catalogue says; run: REWRITE_DOCS=1 cargo test -p livesnap-metrics"
    );
}

fn document() -> String {
    let mut text = "# Metrics\n\n\
        What `livesnap serve` exports at `/metrics`. All units are base units. The identity of a snapshot is never a label: \
        labels have the values below, or are bounded by the configuration. `le` of histograms is left out.\n\n\
        | metric | kind | unit | labels | meaning |\n| --- | --- | --- | --- | --- |\n"
        .to_owned();
    for metric in CATALOGUE {
        let labels: Vec<_> = metric.label_names().map(|name| format!("`{name}`")).collect();
        let (kind, unit) = (metric.kind.as_str(), metric.unit.as_str());
        writeln!(
            text,
            "| `{}` | {kind} | {unit} | {} | {} |",
            metric.name,
            labels.join(", "),
            metric.help
        )
        .unwrap();
    }

    text += "\n## Labels\n\n| label | values |\n| --- | --- |\n";
    let mut seen = HashSet::new();
    for label in
        CATALOGUE.iter().flat_map(|metric| metric.labels).filter(|label| seen.insert(label.name))
    {
        let values = match label.values {
            Values::Bounded(by) => by.to_owned(),
            Values::Closed(_) if label.name == "reason" => {
                format!(
                    "`{NO_REASON}` for a completed snapshot, else a word of [reasons.md](reasons.md)"
                )
            }
            Values::Closed(values) => {
                values.iter().map(|value| format!("`{value}`")).collect::<Vec<_>>().join(", ")
            }
        };
        writeln!(text, "| `{}` | {values} |", label.name).unwrap();
    }

    text += "\n## Buckets\n\n| histogram | from | to | buckets | why |\n| --- | --- | --- | --- | --- |\n";
    for metric in CATALOGUE {
        if let Kind::Histogram(Buckets { edges, reason }) = metric.kind {
            let (first, last) = (edges[0], edges[edges.len() - 1]);
            writeln!(
                text,
                "| `{}` | {first:.3e} s | {last} s | {} | {reason} |",
                metric.name,
                edges.len() + 1
            )
            .unwrap();
        }
    }
    text
}
