//! Host: what snapshots share there. The disk, memory, the probes, the daemon itself.

use super::{INSTANCE, JOB};
use crate::dashboard::Row;
use crate::lint::Quantity::{Bytes, BytesPerSecond, Number, PerSecond, Ratio, Seconds, Truth};
use crate::panel::Shape::{Figure, Heatmap, Lines, Table};
use crate::{Dashboard, Panel};

const CHOSEN: &str = "job=\"$job\", instance=\"$instance\"";

pub fn board() -> Dashboard {
    Dashboard {
        uid: "livesnap-host",
        title: "livesnap: host",
        description: "One host: the destination's disk, memory and pressure, the probes, the daemon.",
        from: "now-3h",
        variables: vec![JOB, INSTANCE],
        annotations: Vec::new(),
        rows: vec![disk(), memory(), probes(), daemon()],
    }
}

fn disk() -> Row {
    Row {
        title: "Disk",
        panels: vec![
            Panel::new(
                Lines,
                Seconds,
                "Write latency during snapshots",
                "How long the destination's disk took for a write, measured in the kernel: livesnap's own writes, and those of others, \
                 who share it. No data: nothing was written.",
            )
            .ask(CHOSEN, "histogram_quantile(0.5, sum by (issuer, le) (rate(livesnap_disk_write_latency_seconds_bucket{%}[$__rate_interval])))", "p50 {{issuer}}")
            .ask(CHOSEN, "histogram_quantile(0.99, sum by (issuer, le) (rate(livesnap_disk_write_latency_seconds_bucket{%}[$__rate_interval])))", "p99 {{issuer}}")
            .logarithmic(),
            Panel::new(Heatmap, Number, "Write latency, all writes", "Each column is a time, each cell a range of latencies; the more a cell stands out, the more there were.")
                .ask(CHOSEN, "sum by (le) (increase(livesnap_disk_write_latency_seconds_bucket{%}[$__rate_interval]))", "{{le}}"),
            Panel::new(Lines, BytesPerSecond, "Written", "Bytes that all snapshots of this host wrote a second.")
                .ask(CHOSEN, "sum(rate(livesnap_stored_bytes_total{%}[$__rate_interval]))", "written"),
            Panel::new(
                Lines,
                Ratio,
                "Space used",
                "Share of the file systems for snapshots that is in use. A snapshot is refused where it would not fit.",
            )
            .ask(CHOSEN, "1 - livesnap_destination_free_bytes{%} / livesnap_destination_size_bytes{%}", "{{root}}")
            .bad_from(&[0.8, 0.95]),
        ],
    }
}

fn memory() -> Row {
    Row {
        title: "Memory and pressure",
        panels: vec![
            Panel::new(
                Lines,
                Bytes,
                "Memory",
                "What the host can still give away, and what the copy buffers of its snapshots have and may have.",
            )
            .ask(CHOSEN, "livesnap_host_memory_available_bytes{%}", "available")
            .ask(CHOSEN, "sum(livesnap_buffer_used_bytes{%})", "buffers, in use")
            .ask(CHOSEN, "sum(livesnap_buffer_limit_bytes{%})", "buffers, bound")
            .runbook("BufferNearLimit"),
            Panel::new(
                Lines,
                Ratio,
                "Pressure",
                "Share of the time in which some, or all, threads of the host waited for a resource (pressure stall information). No \
                 data: the kernel has none.",
            )
            .ask(CHOSEN, "rate(livesnap_host_pressure_seconds_total{%}[$__rate_interval])", "{{resource}}, {{kind}}")
            .runbook("GuestStallHigh"),
        ],
    }
}

fn probes() -> Row {
    Row {
        title: "Probes",
        panels: vec![
            Panel::new(
                Table,
                Truth,
                "Probes of the last snapshot",
                "Which kinds were attached, and how; docs/probes.md has the tiers. A kind that is missing was refused by the kernel.",
            )
            .ask(CHOSEN, "livesnap_probe_attached{%} == 1", "")
            .runbook("ProbeBlind"),
            Panel::new(
                Lines,
                PerSecond,
                "Events lost",
                "What the probes could not count. Anything but 0 means that stalls or latencies are told too low.",
            )
            .ask(CHOSEN, "rate(livesnap_probe_events_lost_total{%}[$__rate_interval])", "{{probe}}")
            .runbook("ProbeBlind"),
        ],
    }
}

fn daemon() -> Row {
    Row {
        title: "Daemon",
        panels: vec![
            Panel::new(Figure, Truth, "Up", "Whether the daemon answered the last scrape.").ask(CHOSEN, "up{%}", "").runbook("TargetDown"),
            Panel::new(Table, Truth, "Version", "Which version runs.").ask(CHOSEN, "livesnap_build_info{%}", "").size(8, 4),
            Panel::new(Figure, Number, "Running", "Snapshots that run on this host.").ask(CHOSEN, "sum(livesnap_snapshots_in_progress{%})", ""),
            Panel::new(Figure, Number, "Waiting", "Snapshots that wait for their turn.").ask(CHOSEN, "livesnap_operations_queued{%}", ""),
            Panel::new(Lines, PerSecond, "Requests", "Answers of the HTTP interface, by route and status.")
                .ask(CHOSEN, "sum by (route, code) (rate(livesnap_http_request_duration_seconds_count{%}[$__rate_interval]))", "{{route}} {{code}}"),
            Panel::new(
                Lines,
                Seconds,
                "Answering time, p99",
                "Of 100 requests, 99 were answered in less. A client that asks to wait for the end of a snapshot waits.",
            )
            .ask(CHOSEN, "histogram_quantile(0.99, sum by (route, le) (rate(livesnap_http_request_duration_seconds_bucket{%}[$__rate_interval])))", "{{route}}"),
        ],
    }
}
