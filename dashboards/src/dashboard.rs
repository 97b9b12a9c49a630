//! A dashboard: rows of panels, with variables, annotations and links.

use serde_json::{Value, json};

use crate::panel::datasource;
use crate::{DATASOURCE, Panel};

/// Version of the classic schema (Grafana 10 and 11 write it; later ones read it).
const SCHEMA: u32 = 39;
const COLUMNS: u32 = 24;

/// A dashboard.
#[derive(Clone, Debug)]
pub struct Dashboard {
    /// Its identity in Grafana, and the name of its file; links rely on it.
    pub uid: &'static str,
    /// What it is called.
    pub title: &'static str,
    /// What it is for.
    pub description: &'static str,
    /// How long a time it shows at first.
    pub from: &'static str,
    /// What can be chosen.
    pub variables: Vec<Variable>,
    /// What is marked in time.
    pub annotations: Vec<Annotation>,
    /// Panels under a heading.
    pub rows: Vec<Row>,
}

/// Panels under a heading.
#[derive(Clone, Debug)]
pub struct Row {
    /// The heading.
    pub title: &'static str,
    /// From left to right, then down.
    pub panels: Vec<Panel>,
}

/// Something to choose, from the values of a label.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name, which is the label's too.
    pub label: &'static str,
    /// The series whose labels are offered.
    pub series: &'static str,
    /// Whether several can be chosen, or all.
    pub is_multiple: bool,
}

/// A mark in time.
#[derive(Clone, Copy, Debug)]
pub struct Annotation {
    /// What it marks.
    pub name: &'static str,
    /// When.
    pub expr: &'static str,
    /// What it says; labels in double braces.
    pub text: &'static str,
    /// Its colour.
    pub colour: &'static str,
    /// Whether the value is the time, in milliseconds, rather than the moment that has a value.
    pub is_time: bool,
}

impl Variable {
    /// The query of its values.
    #[must_use]
    pub fn query(&self) -> String {
        format!("label_values({}, {})", self.series, self.label)
    }

    fn json(&self) -> Value {
        let current = if self.is_multiple {
            json!({"selected": true, "text": ["All"], "value": ["$__all"]})
        } else {
            json!({})
        };
        json!({
            "name": self.label,
            "label": self.label,
            "type": "query",
            "datasource": datasource(),
            "definition": self.query(),
            "query": {"query": self.query(), "refId": "Variable"},
            "current": current,
            "options": [],
            "multi": self.is_multiple,
            "includeAll": self.is_multiple,
            "hide": 0,
            "refresh": 2,
            "regex": "",
            "skipUrlSync": false,
            "sort": 1,
        })
    }
}

impl Annotation {
    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "datasource": datasource(),
            "enable": true,
            "hide": false,
            "iconColor": self.colour,
            // Where Grafana looks for the query since its version 10, and where it did before.
            "target": {"refId": "Anno", "expr": self.expr},
            "expr": self.expr,
            "titleFormat": self.name,
            "textFormat": self.text,
            "tagKeys": "",
            "useValueForTime": self.is_time,
        })
    }
}

impl Dashboard {
    /// All its panels.
    pub fn panels(&self) -> impl Iterator<Item = &Panel> {
        self.rows.iter().flat_map(|row| &row.panels)
    }

    /// The classic schema.
    #[must_use]
    pub fn json(&self) -> Value {
        let datasource_variable = json!({
            "name": DATASOURCE.trim_matches(['$', '{', '}']),
            "label": "data source",
            "type": "datasource",
            "query": "prometheus",
            "current": {},
            "options": [],
            "multi": false,
            "includeAll": false,
            "hide": 0,
            "refresh": 1,
            "regex": "",
            "skipUrlSync": false,
        });
        let variables: Vec<_> = std::iter::once(datasource_variable)
            .chain(self.variables.iter().map(Variable::json))
            .collect();
        json!({
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["livesnap"],
            "schemaVersion": SCHEMA,
            "version": 1,
            "editable": false,
            "graphTooltip": 1,
            "time": {"from": self.from, "to": "now"},
            "timezone": "browser",
            "refresh": "10s",
            "fiscalYearStartMonth": 0,
            "links": [{
                "type": "dashboards", "title": "livesnap", "tags": ["livesnap"], "asDropdown": false, "icon": "external link",
                "includeVars": true, "keepTime": true, "targetBlank": false, "tooltip": "", "url": "",
            }],
            "templating": {"list": variables},
            "annotations": {"list": self.annotations.iter().map(Annotation::json).collect::<Vec<_>>()},
            "panels": self.placed(),
        })
    }

    /// Panels fill a line from left to right; one that does not fit begins the next.
    fn placed(&self) -> Vec<Value> {
        let mut panels = Vec::new();
        let (mut id, mut y) = (0, 0);
        for row in &self.rows {
            id += 1;
            panels.push(json!({
                "id": id, "type": "row", "title": row.title, "collapsed": false, "panels": [],
                "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
            }));
            y += 1;
            let (mut x, mut tallest) = (0, 0);
            for panel in &row.panels {
                if x + panel.width > COLUMNS {
                    (x, y, tallest) = (0, y + tallest, 0);
                }
                id += 1;
                panels.push(panel.json(id, x, y));
                x += panel.width;
                tallest = tallest.max(panel.height);
            }
            y += tallest;
        }
        panels
    }
}
