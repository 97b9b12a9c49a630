//! Live snapshot, of one virtual machine: is the guest hurt, will it finish, why was it throttled or given up.

use super::{ACTION_COLOURS, ANNOTATIONS, INSTANCE, JOB};
use crate::dashboard::{Row, Variable};
use crate::lint::Quantity::{Bytes, BytesPerSecond, Number, Ratio, Seconds, Truth};
use crate::panel::Shape::{Bars, Dial, Figure, Heatmap, Levels, Lines, Name, States, Table};
use crate::{Dashboard, Panel};

const VM: Variable = Variable {
    label: "vm",
    series: "livesnap_snapshots_in_progress{job=\"$job\", instance=\"$instance\"}",
    is_multiple: false,
};
/// What a policy allows is told from what is.
const LIMIT_COLOURS: &[(&str, &str)] = &[("limit", "red"), ("allowed", "red"), ("deadline", "red")];
const CHOSEN: &str = "job=\"$job\", instance=\"$instance\", vm=\"$vm\"";

pub fn board() -> Dashboard {
    Dashboard {
        uid: "livesnap-live",
        title: "livesnap: live snapshot",
        description: "One virtual machine's snapshot while it runs: is the guest hurt, will it finish, why was it slowed down or given up.",
        from: "now-15m",
        variables: vec![JOB, INSTANCE, VM],
        annotations: ANNOTATIONS.into(),
        rows: vec![glance(), hurt(), finish(), why(), last()],
    }
}

fn glance() -> Row {
    Row {
        title: "At a glance",
        panels: vec![
            Panel::new(Name, Truth, "Phase", "Where the snapshot is. No data: none runs.")
                .ask(CHOSEN, "livesnap_snapshot_phase{%} == 1", "{{phase}}")
                .runbook("SnapshotStuck"),
            Panel::new(Dial, Ratio, "Saved", "Share of the guest's memory that is saved.")
                .ask(CHOSEN, "1 - livesnap_remaining_bytes{%} / livesnap_ram_bytes{%}", ""),
            Panel::new(Figure, Seconds, "Still to go", "How long until all memory is saved, as the controller forecasts; 0 if no snapshot runs.")
                .ask(CHOSEN, "livesnap_forecast_completion_seconds{%}", ""),
            Panel::new(Figure, Seconds, "Guest's stalls, p99", "Of 100 first writes, 99 stood still for less than this, over the last 5 minutes. No data: nobody waited.")
                .ask(CHOSEN, "vm:livesnap_fault_stall_seconds:p99_5m{%}", "")
                .bad_from(&[0.001, 0.01])
                .runbook("GuestStallHigh"),
            Panel::new(Dial, Ratio, "Buffer", "Share of the copy buffer that is in use. Full, the guest's writes wait for the disk. No data: no snapshot runs.")
                .ask(CHOSEN, "livesnap_buffer_used_bytes{%} / (livesnap_buffer_limit_bytes{%} > 0)", "")
                .bad_from(&[0.7, 0.9])
                .runbook("BufferNearLimit"),
            Panel::new(Dial, Ratio, "CPU time withheld", "Share of its CPU time that the guest does not get, so that the disk can keep up.")
                .ask(CHOSEN, "livesnap_throttle_ratio{%}", "")
                .bad_from(&[0.3, 0.7])
                .runbook("ThrottleLeaked"),
        ],
    }
}

fn hurt() -> Row {
    Row {
        title: "Is the guest hurt?",
        panels: vec![
            Panel::new(
                Lines,
                Seconds,
                "Stalls of the guest's first writes",
                "How long the guest's threads stood still, measured in the kernel, and the limit on the 99th percentile. The \
                 handler's part is livesnap's own; the rest is the kernel's way there and back, or want of a processor.",
            )
            .ask(CHOSEN, "histogram_quantile(0.5, sum by (le) (rate(livesnap_fault_stall_seconds_bucket{%}[$__rate_interval])))", "p50")
            .ask(CHOSEN, "histogram_quantile(0.99, sum by (le) (rate(livesnap_fault_stall_seconds_bucket{%}[$__rate_interval])))", "p99")
            .ask(CHOSEN, "histogram_quantile(0.99, sum by (le) (rate(livesnap_fault_service_seconds_bucket{%}[$__rate_interval])))", "p99, handler's part")
            .ask(CHOSEN, "livesnap_policy_stall_limit_seconds{%}", "limit")
            .colours(LIMIT_COLOURS)
            .logarithmic()
            .runbook("GuestStallHigh"),
            Panel::new(Heatmap, Number, "Stalls, all of them", "Each column is a time, each cell a range of stalls; the more a cell stands out, the more there were.")
                .ask(CHOSEN, "sum by (le) (increase(livesnap_fault_stall_seconds_bucket{%}[$__rate_interval]))", "{{le}}")
                .runbook("GuestStallHigh"),
            Panel::new(
                Lines,
                Ratio,
                "CPU time withheld",
                "Share of their CPU time that the virtual CPUs do not get: commanded, as it was in the end, and the most that the \
                 policy allows.",
            )
            .ask(CHOSEN, "livesnap_throttle_ratio{%}", "withheld")
            .ask(CHOSEN, "rate(livesnap_throttled_seconds_total{%}[$__rate_interval])", "CPU seconds a second")
            .ask(CHOSEN, "1 - livesnap_policy_min_cpu_ratio{%}", "allowed")
            .colours(LIMIT_COLOURS)
            .runbook("ThrottleLeaked"),
            Panel::new(
                Lines,
                Bytes,
                "Memory under protection",
                "Guest memory that the kernel has under userfaultfd. After a snapshot it must be 0. No line: nobody could look, for QEMU \
                 does not answer, and has not since the daemon's start.",
            )
            .ask(CHOSEN, "livesnap_protected_bytes{%}", "protected")
            .runbook("ProtectionLeaked"),
        ],
    }
}

fn finish() -> Row {
    Row {
        title: "Will it finish?",
        panels: vec![
            Panel::new(Lines, Bytes, "Left to save", "Guest memory that is not saved yet, of all that there is.")
                .ask(CHOSEN, "livesnap_remaining_bytes{%}", "left")
                .ask(CHOSEN, "livesnap_ram_bytes{%}", "all")
                .runbook("SnapshotStuck"),
            Panel::new(
                Lines,
                BytesPerSecond,
                "Saved and written",
                "Rates of saving, because of the guest's writes and in the background, and of writing. Pages of zeroes are saved \
                 but not written.",
            )
            .ask(CHOSEN, "rate(livesnap_captured_bytes_total{%}[$__rate_interval])", "saved: {{path}}")
            .ask(CHOSEN, "rate(livesnap_stored_bytes_total{%}[$__rate_interval])", "written")
            .runbook("SnapshotStuck"),
            Panel::new(
                Lines,
                Bytes,
                "Copy buffer",
                "In use, its bound now, what the controller expects it to need, and what the policy allows. If what is expected \
                 stays above what is allowed, the guest is slowed down or the snapshot given up.",
            )
            .ask(CHOSEN, "livesnap_buffer_used_bytes{%}", "in use")
            .ask(CHOSEN, "livesnap_buffer_limit_bytes{%}", "bound")
            .ask(CHOSEN, "livesnap_forecast_peak_buffer_bytes{%}", "expected peak")
            .ask(CHOSEN, "livesnap_policy_buffer_bytes{%}", "allowed")
            .colours(LIMIT_COLOURS)
            .runbook("BufferNearLimit"),
            Panel::new(
                Lines,
                Seconds,
                "Forecast against deadline",
                "When all memory is expected to be saved, and by when it must be. No line for the deadline: there is none.",
            )
            .ask(CHOSEN, "livesnap_forecast_completion_seconds{%}", "still to go")
            .ask(CHOSEN, "livesnap_policy_deadline_seconds{%}", "deadline")
            .colours(LIMIT_COLOURS)
            .runbook("SnapshotAborted"),
        ],
    }
}

fn why() -> Row {
    Row {
        title: "Why was it slowed down, or given up?",
        panels: vec![
            Panel::new(
                Lines,
                BytesPerSecond,
                "First touches against the disk",
                "What the guest's writes make livesnap save at once, and what the disk takes. As long as the first is above the \
                 second the buffer fills.",
            )
            .ask(CHOSEN, "rate(livesnap_first_touch_bytes_total{%}[$__rate_interval])", "first touches")
            .ask(CHOSEN, "livesnap_drain_rate_bytes_per_second{%}", "disk")
            .runbook("BufferNearLimit"),
            Panel::new(Bars, Number, "Decisions", "When the controller went over to which action.").ask(
                CHOSEN,
                "sum by (action) (increase(livesnap_decisions_total{%}[$__rate_interval]))",
                "{{action}}",
            )
            .colours(ACTION_COLOURS),
            Panel::new(States, Truth, "Phases", "How long the snapshot was in each phase.")
                .ask(CHOSEN, "livesnap_snapshot_phase{%}", "{{phase}}")
                .runbook("SnapshotStuck"),
            Panel::new(Table, Number, "How snapshots ended", "In the time shown, by outcome and reason.").ask(
                CHOSEN,
                "sum by (outcome, reason) (increase(livesnap_snapshots_total{%}[$__range])) > 0",
                "",
            )
            .runbook("SnapshotAborted"),
            Panel::new(
                Lines,
                BytesPerSecond,
                "The guest's writes",
                "How fast the guest writes to memory: by the random sample before a snapshot, and by its first touches during it.",
            )
            .ask(CHOSEN, "livesnap_guest_dirty_rate_bytes_per_second{%}", "{{source}}"),
        ],
    }
}

fn last() -> Row {
    let figure = |quantity, title, description, expr| {
        Panel::new(Figure, quantity, title, description).ask(CHOSEN, expr, "")
    };
    Row {
        title: "The last snapshot",
        panels: vec![
            figure(
                Truth,
                "Succeeded",
                "Whether the last snapshot that has ended was completed. No data: the daemon knows of none.",
                "livesnap_last_snapshot_succeeded{%} and livesnap_last_snapshot_end_timestamp_seconds{%} > 0",
            )
            .runbook("SnapshotAborted"),
            figure(
                Seconds,
                "Age",
                "Time since the last completed snapshot ended.",
                "vm:livesnap_snapshot_age:seconds{%}",
            )
            .runbook("SnapshotOverdue"),
            figure(
                Seconds,
                "Duration",
                "How long the last snapshot that has ended took.",
                "livesnap_last_snapshot_duration_seconds{%}",
            ),
            figure(
                Bytes,
                "Stored",
                "Bytes of memory that the last completed snapshot stored.",
                "livesnap_last_snapshot_stored_bytes{%}",
            ),
            figure(
                Bytes,
                "Buffer's peak",
                "Most of the copy buffer that the last completed snapshot used.",
                "livesnap_last_snapshot_buffer_peak_bytes{%}",
            ),
            figure(
                Seconds,
                "CPU time withheld",
                "CPU time withheld from the virtual CPUs for the last snapshot.",
                "livesnap_last_snapshot_throttled_seconds{%}",
            ),
            Panel::new(
                Levels,
                Seconds,
                "The pause, in its parts",
                "How long each part of the last completed snapshot's pause took.",
            )
            .ask(CHOSEN, "livesnap_last_snapshot_downtime_part_seconds{%}", "{{part}}"),
        ],
    }
}
