//! What is checked in is what the code writes, and it is what Grafana reads: the classic schema, with nothing in it that
//! only one installation has.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use livesnap_dashboards::{boards, check, files, queries, rules};
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn the_files_are_what_the_code_writes() {
    for (path, text) in files() {
        let found = fs::read_to_string(root().join(&path)).unwrap_or_default();
        assert!(found == text, "{path} is not what the code says; run: cargo xtask dashboards");
    }
}

#[test]
fn no_file_is_left_over() {
    let written: HashSet<PathBuf> =
        files().into_iter().map(|(path, _)| root().join(path)).collect();
    for directory in ["dashboards/grafana", "docs/runbooks"] {
        for entry in fs::read_dir(root().join(directory)).unwrap() {
            let path = entry.unwrap().path();
            assert!(
                path.is_dir() || written.contains(&path),
                "{} is written by nobody",
                path.display()
            );
        }
    }
}

#[test]
fn everything_agrees_with_the_catalogue() {
    if let Err(problems) = check() {
        panic!("{}", problems.join("\n"));
    }
}

#[test]
fn every_alert_has_a_test_of_its_own_and_is_in_the_docs() {
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let tests = read("dashboards/prometheus/alerts.test.yml");
    let docs = read("docs/dashboards.md");
    for alert in rules::ALERTS {
        let (name, severity) = (alert.name, alert.severity.as_str());
        assert!(tests.contains(&format!("- name: {name}\n")), "{name}");
        let row = format!("| {name} | {severity} | [{name}](runbooks/{name}.md) |\n");
        assert!(docs.contains(&row), "{name}");
    }
}

/// Calls `visit` with every value below `value`, and the keys that lead there.
fn walk(value: &Value, path: &str, visit: &mut impl FnMut(&str, &Value)) {
    visit(path, value);
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(key, value)| walk(value, &format!("{path}/{key}"), visit))
        }
        Value::Array(values) => values.iter().for_each(|value| walk(value, path, visit)),
        _ => {}
    }
}

#[test]
fn no_dashboard_names_a_data_source() {
    for board in boards::all() {
        let mut seen = 0;
        walk(&board.json(), "", &mut |path, value| {
            if path.ends_with("/datasource") {
                assert_eq!(value["uid"], "${datasource}", "{}: {path}", board.uid);
                seen += 1;
            }
        });
        assert!(seen > 20, "{}: {seen}", board.uid);
    }
}

#[test]
fn panels_have_numbers_and_places_of_their_own() {
    let number = |panel: &Value, key: &str| panel["gridPos"][key].as_u64().unwrap();
    for board in boards::all() {
        let json = board.json();
        let panels = json["panels"].as_array().unwrap();
        let ids: HashSet<u64> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
        assert_eq!(ids.len(), panels.len(), "{}", board.uid);

        let mut taken = HashSet::new();
        for panel in panels {
            let (x, y, w, h) =
                (number(panel, "x"), number(panel, "y"), number(panel, "w"), number(panel, "h"));
            assert!(x + w <= 24, "{}: {}", board.uid, panel["title"]);
            for cell in (y..y + h).flat_map(|y| (x..x + w).map(move |x| (x, y))) {
                assert!(taken.insert(cell), "{}: {} lies over another", board.uid, panel["title"]);
            }
        }
    }
}

#[test]
fn every_query_is_of_what_is_chosen_and_by_the_rate_interval() {
    for board in boards::all() {
        for (name, expr) in queries(&board) {
            assert!(expr.contains("job=\"$job\""), "{name}: {expr}");
            // What is drawn over a fixed time must say so; only quantiles of rare events are.
            for range in expr.split('[').skip(1).filter_map(|rest| rest.split_once(']')) {
                assert!(
                    ["$__rate_interval", "$__range", "1h"].contains(&range.0),
                    "{name}: {expr}"
                );
            }
        }
    }
}

#[test]
fn dashboards_have_fixed_uids_and_variables() {
    let uids: Vec<_> = boards::all().iter().map(|board| board.uid).collect();
    assert_eq!(uids, ["livesnap-fleet", "livesnap-live", "livesnap-host"]);
    for board in boards::all() {
        let json = board.json();
        let variables: Vec<_> = json["templating"]["list"]
            .as_array()
            .unwrap()
            .iter()
            .map(|variable| variable["name"].as_str().unwrap())
            .collect();
        assert_eq!(variables[..2], ["datasource", "job"], "{}", board.uid);
        for panel in
            json["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row")
        {
            assert!(!panel["fieldConfig"]["defaults"]["unit"].as_str().unwrap().is_empty());
            assert!(panel["description"].as_str().unwrap().ends_with('.'), "{}", panel["title"]);
        }
    }
}
