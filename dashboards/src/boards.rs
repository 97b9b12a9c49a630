//! The three dashboards.

mod fleet;
mod host;
mod live;

use crate::dashboard::{Annotation, Variable};
use crate::{Dashboard, Panel};

/// All dashboards.
#[must_use]
pub fn all() -> Vec<Dashboard> {
    vec![fleet::board(), live::board(), host::board()]
}

/// What can be chosen: the job of the scrape, the instance that answered, the virtual machine.
const JOB: Variable = Variable { label: "job", series: "livesnap_build_info", is_multiple: false };
const INSTANCE: Variable =
    Variable { label: "instance", series: "livesnap_build_info{job=\"$job\"}", is_multiple: false };

/// Marks of the virtual machines that are chosen; the same in all dashboards that have a `vm`.
const ANNOTATIONS: [Annotation; 3] = [
    Annotation {
        name: "start",
        expr: "(livesnap_last_snapshot_start_timestamp_seconds{job=\"$job\", vm=~\"$vm\"} > 0) * 1000",
        text: "a snapshot of {{vm}} began",
        colour: "blue",
        is_time: true,
    },
    Annotation {
        name: "throttle",
        expr: "increase(livesnap_decisions_total{job=\"$job\", vm=~\"$vm\", action=\"throttle\"}[$__rate_interval]) > 0",
        text: "{{vm}} is slowed down",
        colour: "orange",
        is_time: false,
    },
    Annotation {
        name: "abort",
        expr: "increase(livesnap_snapshots_total{job=\"$job\", vm=~\"$vm\", outcome!=\"completed\"}[$__rate_interval]) > 0",
        text: "no snapshot of {{vm}}: {{outcome}}, {{reason}}",
        colour: "red",
        is_time: false,
    },
];

/// How snapshots end, and what the controller does: the colours of good and bad, the same in all dashboards.
const OUTCOME_COLOURS: &[(&str, &str)] =
    &[("completed", "green"), ("aborted", "orange"), ("failed", "red")];
const ACTION_COLOURS: &[(&str, &str)] =
    &[("none", "green"), ("buffer", "blue"), ("throttle", "orange"), ("abort", "red")];

impl Panel {
    /// Adds a query in which `%` stands for the matchers of what is chosen.
    fn ask(self, matchers: &str, expr: &str, legend: &'static str) -> Self {
        self.query(expr.replace('%', matchers), legend)
    }
}
