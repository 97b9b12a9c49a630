//! What an operator installs to watch livesnap: Grafana's dashboards, Prometheus' rules, an example of Alertmanager's
//! configuration, a runbook for each alert. All of it is data in this crate; the files beside it are written from here by
//! `cargo xtask dashboards`, and a test holds them to it.
//!
//! Nothing is written that does not pass [`check`]: each query is parsed, and held against the catalogue of metrics.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod alertmanager;
pub mod boards;
mod dashboard;
pub mod lint;
mod panel;
pub mod rules;

use std::collections::BTreeSet;

use livesnap_metrics::CATALOGUE;

pub use dashboard::{Annotation, Dashboard, Row, Variable};
use lint::{Quantity, Recorded};
pub use panel::{Panel, Query, Shape};

/// What stands at the head of every file that may have a comment.
const WRITTEN: &str =
    "Written by `cargo xtask dashboards`; changes belong into the crate livesnap-dashboards.";
/// Uid of the data source in every panel: a variable.
const DATASOURCE: &str = "${datasource}";
/// Where the runbooks are; everybody has another place for them, and `sed` puts it in.
const RUNBOOKS: &str = "https://runbooks.example/livesnap";

/// Where the runbook of an alert is.
fn runbook_url(alert: &str) -> String {
    format!("{RUNBOOKS}/{alert}.md")
}

/// Every file, by its path from the workspace's root.
#[must_use]
pub fn files() -> Vec<(String, String)> {
    let mut files = vec![
        ("dashboards/prometheus/recordings.yml".into(), rules::recording_file()),
        ("dashboards/prometheus/alerts.yml".into(), rules::alert_file(rules::ALERTS)),
        ("dashboards/prometheus/prometheus.yml".into(), prometheus_file()),
        ("dashboards/alertmanager/alertmanager.yml".into(), alertmanager::file()),
        (
            "dashboards/grafana/provisioning/datasources/livesnap.yml".into(),
            provisioned_datasource(),
        ),
        (
            "dashboards/grafana/provisioning/dashboards/livesnap.yml".into(),
            provisioned_dashboards(),
        ),
    ];
    for board in boards::all() {
        files.push((
            format!("dashboards/grafana/{}.json", board.uid),
            format!("{:#}\n", board.json()),
        ));
    }
    for alert in rules::ALERTS {
        files.push((format!("docs/runbooks/{}.md", alert.name), rules::runbook(alert)));
    }
    files
}

/// Every query that Prometheus will be asked, with what it is for.
#[must_use]
pub fn queries(board: &Dashboard) -> Vec<(String, String)> {
    let panels = board.panels().flat_map(|panel| {
        panel
            .queries
            .iter()
            .map(|query| (format!("{}: {}", board.uid, panel.title), query.expr.clone()))
    });
    let annotations = board
        .annotations
        .iter()
        .map(|mark| (format!("{}: mark {}", board.uid, mark.name), mark.expr.to_owned()));
    panels.chain(annotations).collect()
}

/// Holds everything against the catalogue.
///
/// # Errors
/// With a sentence for each thing that makes no sense.
pub fn check() -> Result<(), Vec<String>> {
    let recorded = rules::recorded().map_err(|problem| vec![problem])?;
    let mut problems = Vec::new();
    let mut used: BTreeSet<String> =
        recorded.values().flat_map(|finding| finding.metrics.clone()).collect();
    for alert in rules::ALERTS {
        match lint::query(alert.expr, &recorded) {
            Ok(finding) => {
                problems.extend(alert_texts(alert, &finding));
                used.extend(finding.metrics);
            }
            Err(problem) => problems.push(problem),
        }
    }
    for board in boards::all() {
        for panel in board.panels() {
            problems.extend(check_panel(panel, &recorded, &mut used));
        }
        for mark in &board.annotations {
            let wanted = if mark.is_time { Quantity::TimestampMs } else { Quantity::Number };
            problems.extend(check_query(mark.expr, mark.text, wanted, &recorded, &mut used).err());
        }
        for variable in &board.variables {
            match lint::query(variable.series, &recorded) {
                Ok(finding) if finding.labels.contains(variable.label) => {
                    used.extend(finding.metrics)
                }
                Ok(_) => {
                    problems.push(format!("{} has no label {}", variable.series, variable.label))
                }
                Err(problem) => problems.push(problem),
            }
        }
    }
    for metric in CATALOGUE {
        if !metric.series_names().iter().any(|name| used.contains(name)) {
            problems.push(format!("{} is shown nowhere", metric.name));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

fn check_panel(panel: &Panel, recorded: &Recorded, used: &mut BTreeSet<String>) -> Vec<String> {
    let mut problems = Vec::new();
    if panel.queries.is_empty() || panel.description.is_empty() {
        problems.push(format!("{} has no query or no description", panel.title));
    }
    if panel.runbook.is_some_and(|name| !rules::ALERTS.iter().any(|alert| alert.name == name)) {
        problems.push(format!("{} links to a runbook that is not there", panel.title));
    }
    for query in &panel.queries {
        let text = query.legend;
        problems.extend(check_query(&query.expr, text, panel.quantity, recorded, used).err());
        // Long ranges are for figures; what is drawn must not depend on how far one zooms.
        if !panel.shape.is_instant() && query.expr.contains("$__range") {
            problems.push(format!("{} is drawn by $__range", query.expr));
        }
    }
    problems
}

fn check_query(
    expr: &str,
    text: &str,
    wanted: Quantity,
    recorded: &Recorded,
    used: &mut BTreeSet<String>,
) -> Result<(), String> {
    let finding = lint::query(expr, recorded)?;
    if finding.quantity != wanted {
        return Err(format!("{expr} is {:?}, shown as {wanted:?}", finding.quantity));
    }
    if let Some(label) = labels_in(text, "{{", "}}").find(|label| !finding.labels.contains(label)) {
        return Err(format!("{expr} has no label {label} to be named by"));
    }
    used.extend(finding.metrics);
    Ok(())
}

/// Labels that an alert's texts name must be there when it fires.
fn alert_texts(alert: &rules::Alert, finding: &lint::Finding) -> Option<String> {
    let texts = [alert.summary, alert.description];
    let mut labels = texts.iter().flat_map(|text| labels_in(text, "$labels.", " "));
    let label = labels.find(|label| !finding.labels.contains(label))?;
    Some(format!("{} names the label {label}, which it has not", alert.name))
}

/// The words of `text` between `open` and `close`.
fn labels_in(text: &str, open: &'static str, close: &'static str) -> impl Iterator<Item = String> {
    text.split(open)
        .skip(1)
        .filter_map(move |rest| Some(rest.split_once(close)?.0.trim().to_owned()))
}

fn prometheus_file() -> String {
    format!(
        "# {WRITTEN}
# An example: how Prometheus finds livesnap, its rules, and Alertmanager.
global:
  scrape_interval: 5s
  evaluation_interval: 5s

rule_files: [recordings.yml, alerts.yml]

alerting:
  alertmanagers:
    - static_configs: [{{targets: ['127.0.0.1:9093']}}]

scrape_configs:
  # The alert TargetDown goes by the name of the job.
  - job_name: {}
    static_configs: [{{targets: ['127.0.0.1:9464']}}]
",
        rules::JOB
    )
}

fn provisioned_datasource() -> String {
    format!(
        "# {WRITTEN}
# Leave this out if Grafana knows your Prometheus already; the dashboards ask which to take.
apiVersion: 1
datasources:
  - name: Prometheus
    type: prometheus
    access: proxy
    url: http://127.0.0.1:9090
    jsonData:
      # As in prometheus.yml; $__rate_interval is at least four of them.
      timeInterval: 5s
"
    )
}

fn provisioned_dashboards() -> String {
    format!(
        "# {WRITTEN}
apiVersion: 1
providers:
  - name: livesnap
    folder: livesnap
    type: file
    allowUiUpdates: false
    options:
      path: /var/lib/grafana/dashboards/livesnap
"
    )
}
