//! A panel, and how Grafana wants it written.

use serde_json::{Value, json};

use crate::lint::Quantity;
use crate::{DATASOURCE, runbook_url};

/// One question, and the picture that answers it.
#[derive(Clone, Debug)]
pub struct Panel {
    /// A few words.
    pub title: &'static str,
    /// What is to be seen, and what is good or bad about it.
    pub description: &'static str,
    /// The kind of picture.
    pub shape: Shape,
    /// What its numbers are; every query must be of it.
    pub quantity: Quantity,
    /// What is shown.
    pub queries: Vec<Query>,
    /// Where a value turns orange, and where red; empty where no value is bad.
    pub bad_from: &'static [f64],
    /// Series that have a colour of their own, by their names.
    pub colours: &'static [(&'static str, &'static str)],
    /// Whether its axis is logarithmic.
    pub is_logarithmic: bool,
    /// Columns of 24.
    pub width: u32,
    /// Rows of 30 pixels.
    pub height: u32,
    /// The alert whose runbook tells what to do.
    pub runbook: Option<&'static str>,
}

/// A query of a panel.
#[derive(Clone, Debug)]
pub struct Query {
    /// PromQL, with Grafana's variables.
    pub expr: String,
    /// How a series is called; labels in double braces.
    pub legend: &'static str,
}

/// Kinds of pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Lines over time.
    Lines,
    /// Bars over time.
    Bars,
    /// The newest value, large.
    Figure,
    /// The newest series' name, large.
    Name,
    /// A share as an arc.
    Dial,
    /// The newest values as bars.
    Levels,
    /// A histogram over time.
    Heatmap,
    /// What is so and what is not, over time.
    States,
    /// Rows of labels and the newest value.
    Table,
}

impl Shape {
    const fn plugin(self) -> &'static str {
        match self {
            Self::Lines | Self::Bars => "timeseries",
            Self::Figure | Self::Name => "stat",
            Self::Dial => "gauge",
            Self::Levels => "bargauge",
            Self::Heatmap => "heatmap",
            Self::States => "state-timeline",
            Self::Table => "table",
        }
    }

    /// Whether only the newest values are asked for.
    #[must_use]
    pub const fn is_instant(self) -> bool {
        matches!(self, Self::Figure | Self::Name | Self::Dial | Self::Levels | Self::Table)
    }
}

impl Panel {
    /// A panel of the usual size.
    pub fn new(
        shape: Shape,
        quantity: Quantity,
        title: &'static str,
        description: &'static str,
    ) -> Self {
        let (width, height) = match shape {
            Shape::Figure | Shape::Name | Shape::Dial => (4, 4),
            _ => (12, 8),
        };
        Self {
            title,
            description,
            shape,
            quantity,
            queries: Vec::new(),
            bad_from: &[],
            colours: &[],
            is_logarithmic: false,
            width,
            height,
            runbook: None,
        }
    }

    /// Adds a query.
    pub(crate) fn query(mut self, expr: impl Into<String>, legend: &'static str) -> Self {
        self.queries.push(Query { expr: expr.into(), legend });
        self
    }

    /// Sets from where values are orange and red.
    #[must_use]
    pub const fn bad_from(mut self, values: &'static [f64]) -> Self {
        self.bad_from = values;
        self
    }

    /// Gives series colours of their own.
    #[must_use]
    pub const fn colours(mut self, colours: &'static [(&'static str, &'static str)]) -> Self {
        self.colours = colours;
        self
    }

    /// For what may be a thousand times as much at one time as at another.
    #[must_use]
    pub const fn logarithmic(mut self) -> Self {
        self.is_logarithmic = true;
        self
    }

    /// Sets the size.
    #[must_use]
    pub const fn size(mut self, width: u32, height: u32) -> Self {
        (self.width, self.height) = (width, height);
        self
    }

    /// Links to the runbook of an alert.
    #[must_use]
    pub const fn runbook(mut self, alert: &'static str) -> Self {
        self.runbook = Some(alert);
        self
    }

    /// The panel in the classic schema, with its number and its place.
    pub(crate) fn json(&self, id: u32, x: u32, y: u32) -> Value {
        let targets = self.queries.iter().zip('A'..='Z').map(|(query, id)| self.target(query, id));
        let links = self.runbook.map(|alert| {
            json!({"title": format!("Runbook: {alert}"), "url": runbook_url(alert), "targetBlank": true})
        });
        let mut panel = json!({
            "id": id,
            "type": self.shape.plugin(),
            "title": self.title,
            "description": self.description,
            "datasource": datasource(),
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": targets.collect::<Vec<_>>(),
            "links": links.into_iter().collect::<Vec<_>>(),
            "fieldConfig": {"defaults": self.defaults(), "overrides": self.overrides()},
            "options": self.options(),
        });
        if self.shape == Shape::Bars {
            // Bars that each count what is between them and the last: shorter than the scrapes' range they would overlap.
            panel["interval"] = json!("1m");
        }
        if self.shape == Shape::Table {
            // A row is there if it is so: its value says nothing more.
            let is_truth = self.quantity == Quantity::Truth;
            let hidden = json!({"Time": true, "Value": is_truth, "instance": true, "job": true});
            panel["transformations"] = json!([{"id": "organize", "options": {
                "excludeByName": hidden, "indexByName": {}, "renameByName": {"Value": "count"},
            }}]);
        }
        panel
    }

    fn target(&self, query: &Query, id: char) -> Value {
        let is_instant = self.shape.is_instant();
        let format = match self.shape {
            Shape::Heatmap => "heatmap",
            Shape::Table => "table",
            _ => "time_series",
        };
        json!({
            "refId": id.to_string(),
            "datasource": datasource(),
            "editorMode": "code",
            "expr": query.expr,
            "legendFormat": query.legend,
            "format": format,
            "instant": is_instant,
            "range": !is_instant,
        })
    }

    fn defaults(&self) -> Value {
        let mut steps = vec![json!({"color": "green", "value": null})];
        let colours = ["orange", "red"];
        steps.extend(
            self.bad_from
                .iter()
                .zip(colours)
                .map(|(value, color)| json!({"color": color, "value": value})),
        );
        let colour = match self.shape {
            Shape::Lines | Shape::Bars | Shape::Heatmap | Shape::States => "palette-classic",
            _ => "thresholds",
        };
        let mut defaults = json!({
            "unit": grafana_unit(self.quantity),
            "color": {"mode": colour},
            "thresholds": {"mode": "absolute", "steps": steps},
            "custom": self.custom(),
        });
        if self.quantity != Quantity::TimestampMs && !self.is_logarithmic {
            defaults["min"] = json!(0);
        }
        // Prometheus extrapolates: of three snapshots it tells 3.01.
        if self.quantity == Quantity::Number {
            defaults["decimals"] = json!(0);
        }
        if self.shape == Shape::Dial {
            defaults["max"] = json!(1);
        }
        if self.shape == Shape::Figure && self.quantity == Quantity::Truth {
            defaults["mappings"] = json!([{"type": "value", "options": {
                "0": {"text": "no", "color": "red", "index": 0},
                "1": {"text": "yes", "color": "green", "index": 1},
            }}]);
        }
        if self.shape == Shape::States {
            defaults["mappings"] = json!([{"type": "value", "options": {
                "0": {"text": " ", "color": "transparent", "index": 0},
                "1": {"text": "now", "color": "blue", "index": 1},
            }}]);
        }
        defaults
    }

    fn overrides(&self) -> Vec<Value> {
        let colour = |(name, colour): &(&str, &str)| {
            json!({
                "matcher": {"id": "byName", "options": name},
                "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
            })
        };
        self.colours.iter().map(colour).collect()
    }

    fn custom(&self) -> Value {
        match self.shape {
            Shape::Lines => json!({
                "scaleDistribution": if self.is_logarithmic { json!({"type": "log", "log": 10}) } else { json!({"type": "linear"}) },
                "drawStyle": "line", "lineWidth": 1, "fillOpacity": 8, "showPoints": "auto", "spanNulls": false,
                "thresholdsStyle": {"mode": if self.bad_from.is_empty() { "off" } else { "dashed" }},
            }),
            Shape::Bars => json!({
                "drawStyle": "bars", "lineWidth": 0, "fillOpacity": 80, "showPoints": "never",
                "stacking": {"mode": "normal", "group": "A"},
            }),
            Shape::States => json!({"lineWidth": 0, "fillOpacity": 80}),
            _ => json!({}),
        }
    }

    fn options(&self) -> Value {
        let newest = json!({"values": false, "calcs": ["lastNotNull"], "fields": ""});
        let tooltip = json!({"mode": "multi", "sort": "none"});
        match self.shape {
            Shape::Lines | Shape::Bars => json!({
                "legend": {"showLegend": true, "displayMode": "table", "placement": "right", "calcs": ["lastNotNull", "max"]},
                "tooltip": tooltip,
            }),
            Shape::Figure | Shape::Name => json!({
                "reduceOptions": newest, "orientation": "auto", "colorMode": "value", "graphMode": "none",
                "justifyMode": "auto", "wideLayout": true, "showPercentChange": false, "percentChangeColorMode": "standard",
                "textMode": if self.shape == Shape::Name { "name" } else { "auto" },
            }),
            Shape::Dial => json!({
                "reduceOptions": newest, "orientation": "auto", "showThresholdLabels": false, "showThresholdMarkers": true,
                "sizing": "auto", "minVizWidth": 75, "minVizHeight": 75,
            }),
            Shape::Levels => json!({
                "reduceOptions": newest, "orientation": "horizontal", "displayMode": "basic", "valueMode": "color",
                "namePlacement": "auto", "showUnfilled": true, "sizing": "auto", "minVizWidth": 8, "minVizHeight": 16,
                "maxVizHeight": 300, "legend": {"showLegend": false, "displayMode": "list", "placement": "bottom", "calcs": []},
            }),
            Shape::Heatmap => json!({
                "calculate": false,
                "cellGap": 1,
                "cellValues": {"unit": "short"},
                "color": {
                    "mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5, "fill": "dark-orange",
                    "scale": "exponential", "reverse": false,
                },
                "exemplars": {"color": "rgba(255,0,255,0.7)"},
                "filterValues": {"le": 1e-9},
                "legend": {"show": true},
                "rowsFrame": {"layout": "auto"},
                "showValue": "never",
                "tooltip": {"mode": "single", "yHistogram": true, "showColorScale": false},
                "yAxis": {"axisPlacement": "left", "reverse": false, "unit": "s"},
            }),
            Shape::States => json!({
                "mergeValues": true, "showValue": "never", "alignValue": "left", "rowHeight": 0.8,
                "legend": {"showLegend": false, "displayMode": "list", "placement": "bottom", "calcs": []},
                "tooltip": tooltip,
            }),
            Shape::Table => json!({"showHeader": true, "cellHeight": "sm"}),
        }
    }
}

/// The data source is a variable: whoever loads the dashboard chooses.
pub(crate) fn datasource() -> Value {
    json!({"type": "prometheus", "uid": DATASOURCE})
}

/// Grafana's id of a unit.
const fn grafana_unit(quantity: Quantity) -> &'static str {
    match quantity {
        Quantity::Bytes => "bytes",
        Quantity::BytesPerSecond => "binBps",
        Quantity::Seconds => "s",
        Quantity::TimestampMs => "dateTimeFromNow",
        Quantity::Ratio => "percentunit",
        Quantity::PerSecond => "cps",
        Quantity::Truth => "bool",
        Quantity::Number | Quantity::Timestamp | Quantity::Literal => "short",
    }
}
