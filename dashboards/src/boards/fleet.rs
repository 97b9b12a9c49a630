//! Fleet: do all virtual machines have a recent snapshot, and what went wrong where.

use super::{ACTION_COLOURS, ANNOTATIONS, JOB, OUTCOME_COLOURS};
use crate::dashboard::{Row, Variable};
use crate::lint::Quantity::{Bytes, Number, PerSecond, Ratio, Seconds};
use crate::panel::Shape::{Bars, Figure, Levels, Lines, Table};
use crate::{Dashboard, Panel};

const VM: Variable = Variable {
    label: "vm",
    series: "livesnap_snapshots_in_progress{job=\"$job\"}",
    is_multiple: true,
};
const CHOSEN: &str = "job=\"$job\", vm=~\"$vm\"";

pub fn board() -> Dashboard {
    Dashboard {
        uid: "livesnap-fleet",
        title: "livesnap: fleet",
        description: "All virtual machines: rate, errors and duration of snapshots, and how old the newest ones are.",
        from: "now-24h",
        variables: vec![JOB, VM],
        annotations: ANNOTATIONS.into(),
        rows: vec![now(), outcomes(), age(), cost()],
    }
}

fn now() -> Row {
    let figure = |quantity, title, description, expr| {
        Panel::new(Figure, quantity, title, description).ask(CHOSEN, expr, "")
    };
    Row {
        title: "Now",
        panels: vec![
            figure(
                Number,
                "Daemons down",
                "Hosts whose daemon did not answer the last scrape; nothing here tells of their virtual machines. Anything but 0 is bad.",
                "count(up{job=\"$job\"}) - sum(up{job=\"$job\"})",
            )
            .bad_from(&[0.5, 1.0])
            .runbook("TargetDown"),
            figure(Number, "Virtual machines", "Virtual machines that a daemon knows.", "count(livesnap_snapshots_in_progress{%})"),
            figure(Number, "Snapshots running", "Snapshots that run now.", "sum(livesnap_snapshots_in_progress{%})"),
            figure(Number, "Waiting", "Snapshots that wait for their turn, on all hosts.", "sum(livesnap_operations_queued{job=\"$job\"})"),
            figure(
                Ratio,
                "Lost in a day",
                "Share of the snapshots of the last 24 hours that came to nothing, those that somebody cancelled left out. \
                 No data: none was taken.",
                "sum(vm:livesnap_snapshots_lost:increase1d{%}) / sum(vm:livesnap_snapshots_ended:increase1d{%})",
            )
            .bad_from(&[0.05, 0.3])
            .runbook("AbortBudgetBurn"),
            figure(
                Seconds,
                "Oldest recovery point",
                "How old the newest snapshot is of the virtual machine that waits longest for one.",
                "max(vm:livesnap_snapshot_age:seconds{%})",
            )
            .runbook("SnapshotOverdue"),
        ],
    }
}

fn outcomes() -> Row {
    Row {
        title: "Rate and errors",
        panels: vec![
            Panel::new(Bars, Number, "Snapshots ended", "How snapshots ended, at the time when they did.").ask(
                CHOSEN,
                "sum by (outcome) (increase(livesnap_snapshots_total{%}[$__rate_interval]))",
                "{{outcome}}",
            )
            .colours(OUTCOME_COLOURS),
            Panel::new(
                Table,
                Number,
                "Why there is no snapshot",
                "Snapshots that came to nothing in the time shown, by virtual machine and reason; docs/reasons.md explains the \
                 reasons. Empty is good.",
            )
            .ask(
                CHOSEN,
                "sum by (vm, outcome, reason) (increase(livesnap_snapshots_total{outcome!=\"completed\", %}[$__range])) > 0",
                "",
            )
            .runbook("SnapshotAborted"),
            Panel::new(
                Lines,
                Ratio,
                "Lost snapshots, two windows",
                "Share of snapshots that came to nothing, over 2 hours and over a day, of the worst virtual machine. The alert \
                 wants both above the line.",
            )
            .ask(CHOSEN, "max(vm:livesnap_snapshots_lost:ratio2h{%})", "2 hours")
            .ask(CHOSEN, "max(vm:livesnap_snapshots_lost:ratio1d{%})", "1 day")
            .bad_from(&[0.3])
            .runbook("AbortBudgetBurn"),
            Panel::new(
                Lines,
                Number,
                "Verifications that failed",
                "Snapshots that did not match their checksums when they were verified. Anything but 0 is bad.",
            )
            .ask(CHOSEN, "sum by (vm) (increase(livesnap_verify_failures_total{%}[$__rate_interval]))", "{{vm}}")
            .runbook("VerifyFailed"),
        ],
    }
}

fn age() -> Row {
    Row {
        title: "Recovery point",
        panels: vec![
            Panel::new(
                Lines,
                Seconds,
                "Age of the newest snapshot",
                "What a restore would lose. Falls to 0 with each completed snapshot.",
            )
            .ask(CHOSEN, "vm:livesnap_snapshot_age:seconds{%}", "{{vm}}")
            .ask(CHOSEN, "livesnap_schedule_interval_seconds{%}", "{{vm}}: wanted every")
            .runbook("SnapshotOverdue"),
            Panel::new(
                Levels,
                Ratio,
                "Age against schedule",
                "Age of the newest snapshot as a share of the interval that the schedule wants. Virtual machines without a \
                 schedule are not shown.",
            )
            .ask(CHOSEN, "vm:livesnap_snapshot_age:seconds{%} / livesnap_schedule_interval_seconds{%}", "{{vm}}")
            .bad_from(&[1.0, 1.5])
            .runbook("SnapshotOverdue"),
        ],
    }
}

fn cost() -> Row {
    Row {
        title: "Duration and cost",
        panels: vec![
            Panel::new(Lines, Seconds, "Duration of the last snapshot", "From the start until it was durable, or given up.")
                .ask(CHOSEN, "livesnap_last_snapshot_duration_seconds{%}", "{{vm}}"),
            Panel::new(
                Lines,
                Seconds,
                "Duration, quantiles",
                "Of the completed snapshots of the last hour, all virtual machines together; interpolated within buckets. No data: \
                 none was completed.",
            )
            .ask(CHOSEN, "histogram_quantile(0.5, sum by (le) (increase(livesnap_snapshot_duration_seconds_bucket{%}[1h])))", "p50")
            .ask(CHOSEN, "histogram_quantile(0.99, sum by (le) (increase(livesnap_snapshot_duration_seconds_bucket{%}[1h])))", "p99"),
            Panel::new(
                Lines,
                Seconds,
                "Pause, quantiles",
                "How long virtual machines stood still for the completed snapshots of the last hour.",
            )
            .ask(CHOSEN, "histogram_quantile(0.5, sum by (le) (increase(livesnap_downtime_seconds_bucket{%}[1h])))", "p50")
            .ask(CHOSEN, "histogram_quantile(0.99, sum by (le) (increase(livesnap_downtime_seconds_bucket{%}[1h])))", "p99"),
            Panel::new(Lines, Bytes, "Stored by the last snapshot", "Bytes of memory in the files of the last completed snapshot.")
                .ask(CHOSEN, "livesnap_last_snapshot_stored_bytes{%}", "{{vm}}"),
            Panel::new(
                Lines,
                Seconds,
                "CPU time withheld for the last snapshot",
                "What throttling cost the guest: seconds of its virtual CPUs' time.",
            )
            .ask(CHOSEN, "livesnap_last_snapshot_throttled_seconds{%}", "{{vm}}"),
            Panel::new(Lines, PerSecond, "Controller's decisions", "How often the controller went over to an action.").ask(
                CHOSEN,
                "sum by (action) (rate(livesnap_decisions_total{%}[$__rate_interval]))",
                "{{action}}",
            )
            .colours(ACTION_COLOURS),
        ],
    }
}
