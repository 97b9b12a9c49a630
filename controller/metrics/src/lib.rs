//! The catalogue of livesnap's metrics, as data: what each is called, what it counts and in which unit, which labels it
//! has and what these can be, and why its buckets are what they are.
//!
//! The daemon registers its metrics from here, the dashboards and alerts are checked against it, and `docs/metrics.md` is
//! written from it. So a metric is described once.
//!
//! Rules that hold for all of them, and that the tests of this crate check: base units; the unit is in the name; a counter
//! ends in `_total`; label values are a closed set, or are bounded by the configuration. The identity of a snapshot is never
//! a label.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod catalogue;
pub mod label;

pub use catalogue::*;
pub use label::{outcome_of, outcomes_and_reasons};

/// One metric, as Prometheus knows it.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name, with prefix, unit and, of a counter, `_total`.
    pub name: &'static str,
    /// Whether it goes up and down.
    pub kind: Kind,
    /// What its value is measured in.
    pub unit: Unit,
    /// One sentence for people; `# HELP` of the exposition.
    pub help: &'static str,
    /// Its labels, in the order in which their values are given.
    pub labels: &'static [Label],
}

impl Metric {
    /// The names of its labels, in their order.
    pub fn label_names(&self) -> impl Iterator<Item = &'static str> {
        self.labels.iter().map(|label| label.name)
    }

    /// Upper edges of its buckets, without the last, which has none. Empty unless it is a histogram.
    #[must_use]
    pub const fn bucket_edges(&self) -> &'static [f64] {
        match self.kind {
            Kind::Histogram(buckets) => buckets.edges,
            Kind::Counter | Kind::Gauge => &[],
        }
    }

    /// The names of the series that carry its values: itself, or the three of a histogram.
    #[must_use]
    pub fn series_names(&self) -> Vec<String> {
        match self.kind {
            Kind::Histogram(_) => {
                ["_bucket", "_sum", "_count"].map(|suffix| format!("{}{suffix}", self.name)).into()
            }
            Kind::Counter | Kind::Gauge => vec![self.name.to_owned()],
        }
    }
}

/// How a value moves.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Only up, and to 0 when the daemon starts.
    Counter,
    /// Up and down.
    Gauge,
    /// Counts in buckets.
    Histogram(Buckets),
}

impl Kind {
    /// Prometheus' word; `# TYPE` of the exposition.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// The buckets of a histogram.
#[derive(Clone, Copy, Debug)]
pub struct Buckets {
    /// Upper edges, ascending, in the metric's unit.
    pub edges: &'static [f64],
    /// Why these.
    pub reason: &'static str,
}

/// What a value is measured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Bytes a second.
    BytesPerSecond,
    /// Seconds.
    Seconds,
    /// Seconds since 1970, UTC; 0 where it has not happened yet.
    Timestamp,
    /// A share from 0 to 1.
    Ratio,
    /// 1 if it is so, else 0.
    Truth,
    /// A plain number.
    Number,
}

impl Unit {
    /// What stands for it at the end of a name, before `_total`.
    #[must_use]
    pub const fn suffix(self) -> Option<&'static str> {
        match self {
            Self::Bytes => Some("_bytes"),
            Self::BytesPerSecond => Some("_bytes_per_second"),
            Self::Seconds => Some("_seconds"),
            Self::Timestamp => Some("_timestamp_seconds"),
            Self::Ratio => Some("_ratio"),
            Self::Truth | Self::Number => None,
        }
    }

    /// For people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::BytesPerSecond => "bytes/s",
            Self::Seconds => "seconds",
            Self::Timestamp => "seconds since 1970",
            Self::Ratio => "0 to 1",
            Self::Truth => "0 or 1",
            Self::Number => "number",
        }
    }
}

/// A label of a metric.
#[derive(Clone, Copy, Debug)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// What it can be.
    pub values: Values,
}

/// What a label can be.
#[derive(Clone, Copy, Debug)]
pub enum Values {
    /// One of these.
    Closed(&'static [&'static str]),
    /// Something else, of which there cannot be many: what bounds them.
    Bounded(&'static str),
}

/// The metric of this name, or the histogram that a series of this name is of.
#[must_use]
pub fn find(name: &str) -> Option<&'static Metric> {
    CATALOGUE.iter().find(|metric| {
        metric.name == name
            || matches!(metric.kind, Kind::Histogram(_))
                && metric.series_names().iter().any(|series| series == name)
    })
}

#[cfg(test)]
mod tests;
