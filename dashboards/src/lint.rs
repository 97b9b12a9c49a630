//! What a query is of, found out without running it: its quantity and its labels, inferred from the catalogue.
//!
//! A query that makes no sense is refused with one sentence: metrics or labels that do not exist, values that a label
//! never has, a counter that is not under `rate`, seconds added to bytes, a quantile without `le`.

use std::collections::{BTreeMap, BTreeSet};

use livesnap_metrics::{Kind, Metric, Unit, Values, find};
use promql_parser::label::{MatchOp, Matcher};
use promql_parser::parser::{
    self, AggregateExpr, BinaryExpr, Call, Expr, LabelModifier, VectorMatchCardinality,
    VectorSelector,
};

/// What numbers are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Bytes.
    Bytes,
    /// Bytes a second.
    BytesPerSecond,
    /// Seconds.
    Seconds,
    /// Seconds since 1970.
    Timestamp,
    /// Milliseconds since 1970, as Grafana takes them.
    TimestampMs,
    /// A share of a whole.
    Ratio,
    /// How many.
    Number,
    /// How many a second.
    PerSecond,
    /// 0 or 1.
    Truth,
    /// A number that stands in the query itself, and fits to all.
    Literal,
}

/// What a query is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What its values are.
    pub quantity: Quantity,
    /// The labels that its series have.
    pub labels: BTreeSet<String>,
    /// The metrics and recording rules that it reads.
    pub metrics: BTreeSet<String>,
}

/// Recording rules by name.
pub type Recorded = BTreeMap<String, Finding>;

/// Labels that Prometheus gives to every series it scrapes.
const TARGET_LABELS: [&str; 2] = ["instance", "job"];

/// Finds out what a query is of. Grafana's variables may stand in it.
///
/// # Errors
/// With a sentence, if the query makes no sense.
pub fn query(text: &str, recorded: &Recorded) -> Result<Finding, String> {
    let expression =
        parser::parse(&with_values(text)).map_err(|error| format!("{text}: {error}"))?;
    let mut lint = Lint { recorded, metrics: BTreeSet::new() };
    let Series { quantity, labels } =
        lint.infer(&expression).map_err(|problem| format!("{text}: {problem}"))?;
    Ok(Finding { quantity, labels, metrics: lint.metrics })
}

/// Puts a duration where Grafana will put one. Its other variables stand in strings, where they do no harm.
fn with_values(text: &str) -> String {
    text.replace("$__rate_interval", "1m").replace("$__range", "1h")
}

struct Series {
    quantity: Quantity,
    labels: BTreeSet<String>,
}

struct Lint<'a> {
    recorded: &'a Recorded,
    metrics: BTreeSet<String>,
}

/// How a selector is used: what is given to `rate` and the like must be a counter, all else must not.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    AsItIs,
    AsCounter,
}

impl Lint<'_> {
    fn infer(&mut self, expression: &Expr) -> Result<Series, String> {
        match expression {
            Expr::NumberLiteral(_) => {
                Ok(Series { quantity: Quantity::Literal, labels: BTreeSet::new() })
            }
            Expr::Paren(inner) => self.infer(&inner.expr),
            Expr::VectorSelector(selector) => self.select(selector, Use::AsItIs),
            Expr::Aggregate(aggregate) => self.aggregate(aggregate),
            Expr::Binary(binary) => self.binary(binary),
            Expr::Call(call) => self.call(call),
            other => Err(format!("{other} is of a kind that is not used here")),
        }
    }

    fn select(&mut self, selector: &VectorSelector, usage: Use) -> Result<Series, String> {
        let name = selector.name.as_deref().ok_or("a selector has no name")?;
        if !selector.matchers.or_matchers.is_empty() {
            return Err(format!("the matchers of {name} are joined by or"));
        }
        let matchers = &selector.matchers.matchers;
        self.metrics.insert(name.to_owned());
        if let Some(rule) = self.recorded.get(name) {
            if usage == Use::AsCounter {
                return Err(format!("{name} is no counter"));
            }
            known_labels(name, matchers.iter().map(|matcher| &matcher.name), &rule.labels)?;
            return Ok(Series { quantity: rule.quantity, labels: rule.labels.clone() });
        }
        // Prometheus' own, of every target.
        if name == "up" && usage == Use::AsItIs {
            let labels = target_labels();
            known_labels(name, matchers.iter().map(|matcher| &matcher.name), &labels)?;
            return Ok(Series { quantity: Quantity::Truth, labels });
        }
        let metric = find(name).ok_or_else(|| format!("there is no metric {name}"))?;
        let is_histogram = matches!(metric.kind, Kind::Histogram(_));
        if is_histogram && name == metric.name {
            return Err(format!("{name} is a histogram: read its _bucket, _sum or _count"));
        }
        let is_counter = is_histogram || matches!(metric.kind, Kind::Counter);
        match usage {
            Use::AsItIs if is_counter => {
                return Err(format!("{name} is a counter: take its rate or increase"));
            }
            Use::AsCounter if !is_counter => return Err(format!("{name} is no counter")),
            _ => {}
        }
        let mut labels = target_labels();
        labels.extend(metric.label_names().map(str::to_owned));
        if name.ends_with("_bucket") {
            labels.insert("le".into());
        }
        known_labels(name, matchers.iter().map(|matcher| &matcher.name), &labels)?;
        matchers.iter().try_for_each(|matcher| possible_values(metric, matcher))?;
        let quantity = if is_histogram && !name.ends_with("_sum") {
            Quantity::Number
        } else {
            of_unit(metric.unit)
        };
        Ok(Series { quantity, labels })
    }

    fn aggregate(&mut self, aggregate: &AggregateExpr) -> Result<Series, String> {
        let Series { quantity, labels } = self.infer(&aggregate.expr)?;
        let operator = aggregate.op.to_string();
        let labels = match &aggregate.modifier {
            None => BTreeSet::new(),
            Some(modifier) => {
                known_labels(&operator, &modifier.labels().labels, &labels)?;
                let named: BTreeSet<_> = modifier.labels().labels.iter().cloned().collect();
                match modifier {
                    LabelModifier::Include(_) => named,
                    LabelModifier::Exclude(_) => labels.difference(&named).cloned().collect(),
                }
            }
        };
        let quantity = match (operator.as_str(), quantity) {
            ("count", _) | ("sum", Quantity::Truth) => Quantity::Number,
            ("sum" | "max", quantity) => quantity,
            _ => return Err(format!("{operator} is not used here")),
        };
        Ok(Series { quantity, labels })
    }

    fn call(&mut self, call: &Call) -> Result<Series, String> {
        let arguments = &call.args.args;
        let first =
            || arguments.first().ok_or_else(|| format!("{} has no argument", call.func.name));
        match call.func.name {
            "time" => Ok(Series { quantity: Quantity::Timestamp, labels: BTreeSet::new() }),
            "histogram_quantile" => {
                let buckets = arguments.get(1).ok_or("histogram_quantile needs two arguments")?;
                let Series { mut labels, .. } = self.infer(buckets)?;
                if !labels.remove("le") {
                    return Err("histogram_quantile of what has no le".into());
                }
                let unit = self.metrics.iter().find_map(|name| {
                    let metric = find(name)?;
                    name.ends_with("_bucket").then_some(metric.unit)
                });
                let unit = unit.ok_or("histogram_quantile of what is no bucket")?;
                Ok(Series { quantity: of_unit(unit), labels })
            }
            "absent" => {
                let Expr::VectorSelector(selector) = first()?.as_ref() else {
                    return Err("absent of what is no selector".into());
                };
                self.select(selector, Use::AsItIs)?;
                let equal = selector
                    .matchers
                    .matchers
                    .iter()
                    .filter(|matcher| matcher.op == MatchOp::Equal);
                let labels = equal.map(|matcher| matcher.name.clone()).collect();
                Ok(Series { quantity: Quantity::Truth, labels })
            }
            name @ ("rate" | "increase") => {
                let Expr::MatrixSelector(matrix) = first()?.as_ref() else {
                    return Err(format!("{name} of what is no selector"));
                };
                let Series { quantity, labels } = self.select(&matrix.vs, Use::AsCounter)?;
                let quantity = match (name, quantity) {
                    ("rate", Quantity::Bytes) => Quantity::BytesPerSecond,
                    // Seconds in each second.
                    ("rate", Quantity::Seconds) => Quantity::Ratio,
                    ("rate", Quantity::Number) => Quantity::PerSecond,
                    ("rate", other) => return Err(format!("the rate of {other:?} is nothing")),
                    (_, quantity) => quantity,
                };
                Ok(Series { quantity, labels })
            }
            name => Err(format!("{name} is not used here")),
        }
    }

    fn binary(&mut self, binary: &BinaryExpr) -> Result<Series, String> {
        let (left, right) = (self.infer(&binary.lhs)?, self.infer(&binary.rhs)?);
        let operator = binary.op.to_string();
        let quantity = combine(&operator, left.quantity, right.quantity).ok_or_else(|| {
            format!("{:?} {operator} {:?} is nothing", left.quantity, right.quantity)
        })?;

        let matching = binary.modifier.as_ref().and_then(|modifier| modifier.matching.as_ref());
        let is_scalar = |series: &Series, side: &Expr| {
            series.labels.is_empty() && !matches!(side, Expr::Aggregate(_))
        };
        if is_scalar(&left, &binary.lhs) {
            return Ok(Series { quantity, labels: right.labels });
        }
        if is_scalar(&right, &binary.rhs) {
            return Ok(Series { quantity, labels: left.labels });
        }
        match matching {
            Some(modifier) => {
                for side in [&left, &right] {
                    known_labels(&operator, &modifier.labels().labels, &side.labels)?;
                }
            }
            // Such series never match.
            None if operator != "or" && left.labels != right.labels => {
                return Err(format!("{operator} between {:?} and {:?}", left.labels, right.labels));
            }
            None => {}
        }
        let is_set = matches!(operator.as_str(), "and" | "or" | "unless");
        let is_grouped = binary.modifier.as_ref().is_some_and(|modifier| {
            matches!(
                modifier.card,
                VectorMatchCardinality::ManyToOne(_) | VectorMatchCardinality::OneToMany(_)
            )
        });
        let labels = match matching {
            Some(LabelModifier::Include(on)) if !is_set && !is_grouped => {
                on.labels.iter().cloned().collect()
            }
            _ if operator == "or" => left.labels.union(&right.labels).cloned().collect(),
            _ => left.labels,
        };
        Ok(Series { quantity, labels })
    }
}

/// What comes out of `left operator right`; nothing if it makes no sense.
fn combine(operator: &str, left: Quantity, right: Quantity) -> Option<Quantity> {
    use Quantity::{
        Bytes, BytesPerSecond, Literal, PerSecond, Ratio, Seconds, Timestamp, TimestampMs,
    };
    let same = (left == right || right == Literal).then_some(left);
    match (operator, left, right) {
        ("and" | "unless", ..) => Some(left),
        ("or" | "==" | "!=" | "<" | "<=" | ">" | ">=", ..) => same,
        ("-", Timestamp, Timestamp) => Some(Seconds),
        ("-", Literal, Ratio) => Some(Ratio),
        ("-" | "+", ..) => same,
        ("*", Timestamp, Literal) => Some(TimestampMs),
        ("*", Literal, _) => Some(right),
        ("*" | "/", _, Literal) => Some(left),
        ("/", Bytes, BytesPerSecond) => Some(Seconds),
        // The mean of a histogram.
        ("/", Ratio, PerSecond) => Some(Seconds),
        ("/", ..) => (left == right).then_some(Ratio),
        _ => None,
    }
}

const fn of_unit(unit: Unit) -> Quantity {
    match unit {
        Unit::Bytes => Quantity::Bytes,
        Unit::BytesPerSecond => Quantity::BytesPerSecond,
        Unit::Seconds => Quantity::Seconds,
        Unit::Timestamp => Quantity::Timestamp,
        Unit::Ratio => Quantity::Ratio,
        Unit::Truth => Quantity::Truth,
        Unit::Number => Quantity::Number,
    }
}

fn target_labels() -> BTreeSet<String> {
    TARGET_LABELS.map(str::to_owned).into()
}

fn known_labels<'a>(
    of: &str,
    names: impl IntoIterator<Item = &'a String>,
    known: &BTreeSet<String>,
) -> Result<(), String> {
    match names.into_iter().find(|name| !known.contains(*name)) {
        Some(name) => Err(format!("{of} has no label {name}")),
        None => Ok(()),
    }
}

/// Refuses a matcher whose words the label never has. Alternatives of a regular expression are looked at one by one.
fn possible_values(metric: &Metric, matcher: &Matcher) -> Result<(), String> {
    let label = metric.labels.iter().find(|label| label.name == matcher.name);
    let Some(Values::Closed(values)) = label.map(|label| label.values) else { return Ok(()) };
    match matcher.value.split('|').find(|word| !word.starts_with('$') && !values.contains(word)) {
        Some(word) => Err(format!("{} of {} is never {word:?}", matcher.name, metric.name)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    fn quantity(text: &str) -> Result<Quantity, String> {
        query(text, &Recorded::new()).map(|finding| finding.quantity)
    }

    fn labels(text: &str) -> Vec<String> {
        query(text, &Recorded::new()).unwrap().labels.into_iter().collect()
    }

    #[test]
    fn quantities_follow_from_the_catalogue() {
        for (text, expected) in [
            ("livesnap_ram_bytes", Quantity::Bytes),
            ("rate(livesnap_stored_bytes_total[$__rate_interval])", Quantity::BytesPerSecond),
            ("increase(livesnap_stored_bytes_total[1h])", Quantity::Bytes),
            ("rate(livesnap_throttled_seconds_total[1m])", Quantity::Ratio),
            ("rate(livesnap_decisions_total[1m])", Quantity::PerSecond),
            ("time() - livesnap_last_success_timestamp_seconds", Quantity::Seconds),
            ("livesnap_last_success_timestamp_seconds * 1000", Quantity::TimestampMs),
            ("1 - livesnap_remaining_bytes / livesnap_ram_bytes", Quantity::Ratio),
            ("livesnap_remaining_bytes / livesnap_drain_rate_bytes_per_second", Quantity::Seconds),
            ("sum(livesnap_snapshots_in_progress)", Quantity::Number),
            ("sum(up{job=\"$job\"})", Quantity::Number),
            (
                "histogram_quantile(0.99, sum by (le) (rate(livesnap_fault_stall_seconds_bucket[5m])))",
                Quantity::Seconds,
            ),
            (
                "rate(livesnap_fault_stall_seconds_sum[5m]) / rate(livesnap_fault_stall_seconds_count[5m])",
                Quantity::Seconds,
            ),
        ] {
            assert_eq!(quantity(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn labels_follow_from_aggregation_and_matching() {
        assert_eq!(labels("sum by (vm) (livesnap_ram_bytes)"), ["vm"]);
        assert_eq!(labels("sum without (instance) (livesnap_ram_bytes)"), ["job", "vm"]);
        assert_eq!(labels("livesnap_snapshot_phase == 1"), ["instance", "job", "phase", "vm"]);
        assert_eq!(
            labels("livesnap_probe_attached and on (job, instance) livesnap_build_info"),
            ["instance", "job", "probe", "tier"]
        );
        assert_eq!(
            labels("livesnap_buffer_used_bytes / on (vm) livesnap_buffer_limit_bytes"),
            ["vm"]
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, word) in [
            ("livesnap_ram_bytes{", "unexpected end"),
            ("livesnap_nothing", "no metric"),
            ("livesnap_snapshots_total", "is a counter"),
            ("rate(livesnap_ram_bytes[1m])", "no counter"),
            ("livesnap_fault_stall_seconds", "is a histogram"),
            ("livesnap_ram_bytes{phase=\"copying\"}", "no label phase"),
            ("livesnap_snapshot_phase{phase=\"copy\"}", "never \"copy\""),
            (
                "increase(livesnap_snapshots_total{outcome=~\"aborted|faild\"}[1h])",
                "never \"faild\"",
            ),
            ("sum by (id) (livesnap_ram_bytes)", "no label id"),
            ("livesnap_ram_bytes + livesnap_throttle_ratio", "Bytes + Ratio"),
            ("livesnap_ram_bytes > livesnap_throttle_ratio", "Bytes > Ratio"),
            ("livesnap_ram_bytes / livesnap_destination_free_bytes", "/ between"),
            ("livesnap_ram_bytes and on (root) livesnap_destination_free_bytes", "no label root"),
            (
                "histogram_quantile(0.5, sum(rate(livesnap_fault_stall_seconds_bucket[5m])))",
                "no le",
            ),
            ("rate(livesnap_last_success_timestamp_seconds[5m])", "no counter"),
            (
                "label_replace(livesnap_ram_bytes, \"id\", \"$1\", \"vm\", \"(.*)\")",
                "not used here",
            ),
            ("{vm=\"a\"}", "no name"),
            ("topk(3, livesnap_ram_bytes)", "topk is not used here"),
            ("absent(sum(livesnap_ram_bytes))", "absent of what is no selector"),
        ] {
            let problem = quantity(text).unwrap_err();
            assert!(problem.contains(word), "{problem}");
        }
    }
}
