//! The metrics themselves.

use crate::{Buckets, Kind, Metric, Unit, label};

/// A time of `2^exponent` nanoseconds, in seconds.
macro_rules! powers_of_two_ns {
    ($($exponent:literal)+) => { &[$((1_u64 << $exponent) as f64 / 1e9),+] };
}

const STALL: Buckets = Buckets {
    edges: powers_of_two_ns!(10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32),
    reason: "Powers of two from 1 us to 4.3 s. Probes and handler count in steps that end at each power of two nanoseconds, so \
             no count has to be divided between buckets.",
};

const DISK_LATENCY: Buckets = Buckets {
    edges: powers_of_two_ns!(14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33),
    reason: "Powers of two from 16 us, less than an NVMe disk takes, to 8.6 s, when a throttled disk is long past use; at the \
             edges of the probe's own buckets.",
};

const PAUSE: Buckets = Buckets {
    edges: &[0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0],
    reason: "A pause takes some milliseconds on an idle host; a session gives up after 2 s, unless it is told otherwise.",
};

const DURATION: Buckets = Buckets {
    edges: &[1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0, 7200.0],
    reason: "From a small guest on a fast disk to 1 TiB at 150 MB/s.",
};

const HTTP: Buckets = Buckets {
    edges: &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0],
    reason: "An answer takes less than a millisecond; one that was asked to wait for a snapshot's end takes up to a minute.",
};

/// Declares each metric as a constant, and [`CATALOGUE`] of all: none can be left out of it.
macro_rules! catalogue {
    ($($constant:ident: $kind:expr, $unit:ident, $name:literal, [$($label:ident),*], $help:literal;)+) => {
        $(
            #[doc = $help]
            pub const $constant: Metric = Metric {
                name: concat!("livesnap_", $name),
                kind: $kind,
                unit: Unit::$unit,
                help: $help,
                labels: &[$(label::$label),*],
            };
        )+

        /// Every metric, in the order of the documentation.
        pub const CATALOGUE: &[Metric] = &[$($constant),+];
    };
}

use Kind::{Counter, Gauge, Histogram};

catalogue! {
    // The program.
    BUILD_INFO: Gauge, Truth, "build_info", [VERSION],
        "Always 1; which version runs.";
    HTTP_REQUEST_DURATION: Histogram(HTTP), Seconds, "http_request_duration_seconds", [ROUTE, CODE],
        "How long answers of the HTTP interface took, streams of events excepted.";

    // Snapshots that have ended.
    SNAPSHOTS: Counter, Number, "snapshots_total", [VM, OUTCOME, REASON],
        "Snapshots that have ended, by how and why. Every series is there, at 0, as soon as the virtual machine is known.";
    SNAPSHOT_DURATION: Histogram(DURATION), Seconds, "snapshot_duration_seconds", [VM],
        "How long completed snapshots took, from the start until they were durable.";
    DOWNTIME: Histogram(PAUSE), Seconds, "downtime_seconds", [VM],
        "How long the virtual machine was paused for completed snapshots.";
    LAST_SUCCESS: Gauge, Timestamp, "last_success_timestamp_seconds", [VM],
        "When the last completed snapshot ended, of those to be verified the last sound one; 0 if there is none.";
    LAST_START: Gauge, Timestamp, "last_snapshot_start_timestamp_seconds", [VM],
        "When the last snapshot began, whether or not it has ended; 0 if there is none.";
    LAST_END: Gauge, Timestamp, "last_snapshot_end_timestamp_seconds", [VM],
        "When the last snapshot that has ended, however it did, ended; 0 if there is none.";
    LAST_SUCCEEDED: Gauge, Truth, "last_snapshot_succeeded", [VM],
        "Whether the last snapshot that has ended was completed.";
    LAST_DURATION: Gauge, Seconds, "last_snapshot_duration_seconds", [VM],
        "How long the last snapshot that has ended took.";
    LAST_DOWNTIME_PART: Gauge, Seconds, "last_snapshot_downtime_part_seconds", [VM, PART],
        "How long each part of the pause of the last completed snapshot took.";
    LAST_STORED: Gauge, Bytes, "last_snapshot_stored_bytes", [VM],
        "Bytes of memory that the last completed snapshot stored.";
    LAST_BUFFER_PEAK: Gauge, Bytes, "last_snapshot_buffer_peak_bytes", [VM],
        "Most of the copy buffer that the last completed snapshot used.";
    LAST_THROTTLED: Gauge, Seconds, "last_snapshot_throttled_seconds", [VM],
        "CPU time that was withheld from the virtual CPUs for the last snapshot that has ended.";
    SCHEDULE_INTERVAL: Gauge, Seconds, "schedule_interval_seconds", [VM],
        "How often the configuration wants a snapshot; no series where there is no schedule.";
    REGISTERED: Gauge, Timestamp, "vm_registered_timestamp_seconds", [VM],
        "When the daemon came to know the virtual machine, after its own start.";
    VERIFY_FAILURES: Counter, Number, "verify_failures_total", [VM],
        "Snapshots that could not be read, or did not match their checksums or structure, when they were verified.";

    // The snapshot that runs.
    QUEUED: Gauge, Number, "operations_queued", [],
        "Snapshots that wait for their turn.";
    IN_PROGRESS: Gauge, Number, "snapshots_in_progress", [VM],
        "Snapshots that run; those that wait for their turn are not counted.";
    PHASE: Gauge, Truth, "snapshot_phase", [VM, PHASE],
        "1 for the phase that the snapshot is in; 0 for all when none was asked for.";
    RAM: Gauge, Bytes, "ram_bytes", [VM],
        "Length of the memory that the snapshot saves; of the last one when none runs.";
    REMAINING: Gauge, Bytes, "remaining_bytes", [VM],
        "Guest memory that the running snapshot has not saved yet; 0 when none runs.";
    CAPTURED: Counter, Bytes, "captured_bytes_total", [VM, PATH],
        "Guest memory saved, holes included: because the guest wrote to it (fault), or in the background (sweep).";
    STORED: Counter, Bytes, "stored_bytes_total", [VM],
        "Bytes written to the files of snapshots.";
    FIRST_TOUCH: Counter, Bytes, "first_touch_bytes_total", [VM],
        "Guest memory that had to be saved at once, because a thread of the guest wrote to it first.";
    DIRTY_RATE: Gauge, BytesPerSecond, "guest_dirty_rate_bytes_per_second", [VM, SOURCE],
        "Rate at which the guest writes to memory that it had not written to, by how it was found; first_touch only while a snapshot runs.";
    BUFFER_USED: Gauge, Bytes, "buffer_used_bytes", [VM],
        "Copy buffer in use.";
    BUFFER_LIMIT: Gauge, Bytes, "buffer_limit_bytes", [VM],
        "Bound of the copy buffer now; 0 when no snapshot runs.";
    DRAIN_RATE: Gauge, BytesPerSecond, "drain_rate_bytes_per_second", [VM],
        "Rate at which the copy buffer is emptied, as the controller sees it.";
    PROTECTED: Gauge, Bytes, "protected_bytes", [VM],
        "Guest memory under userfaultfd, as the kernel tells it. More than 0 when no snapshot runs means that it was left so; no series if that cannot be measured.";

    // What it costs the guest.
    FAULT_STALL: Histogram(STALL), Seconds, "fault_stall_seconds", [VM],
        "How long each of the guest's first writes stood still after the consistency point, measured in the kernel.";
    FAULT_SERVICE: Histogram(STALL), Seconds, "fault_service_seconds", [VM],
        "The handler's part of it: from reading a fault's notice until the write could go on.";
    THROTTLE: Gauge, Ratio, "throttle_ratio", [VM],
        "Share of their CPU time that is withheld from the virtual CPUs. More than 0 when no snapshot runs means that it was left so; no series if that cannot be measured.";
    THROTTLED: Counter, Seconds, "throttled_seconds_total", [VM],
        "CPU time withheld from the virtual CPUs.";

    // The controller.
    DECISIONS: Counter, Number, "decisions_total", [VM, ACTION],
        "How often the controller went over to an action.";
    FORECAST_PEAK: Gauge, Bytes, "forecast_peak_buffer_bytes", [VM],
        "Most of the copy buffer that the controller expects the running snapshot to need; 0 when none runs.";
    FORECAST_COMPLETION: Gauge, Seconds, "forecast_completion_seconds", [VM],
        "How long the controller expects it to take until all memory is saved; 0 when no snapshot runs.";
    POLICY_BUFFER: Gauge, Bytes, "policy_buffer_bytes", [VM],
        "Most that the copy buffer may become, by the policy of the last snapshot.";
    POLICY_STALL: Gauge, Seconds, "policy_stall_limit_seconds", [VM],
        "Longest that 99 in 100 of the guest's writes may stand still, by the policy of the last snapshot.";
    POLICY_CPU: Gauge, Ratio, "policy_min_cpu_ratio", [VM],
        "Least share of its CPU time that the guest keeps, by the policy of the last snapshot.";
    POLICY_DEADLINE: Gauge, Seconds, "policy_deadline_seconds", [VM],
        "Longest time until all memory is saved, by the policy of the last snapshot; no series if it had no deadline.";

    // The host.
    PROBE_ATTACHED: Gauge, Truth, "probe_attached", [PROBE, TIER],
        "Whether the last snapshot's probes were attached in this way; 0 for all ways if they could not be.";
    PROBE_LOST: Counter, Number, "probe_events_lost_total", [PROBE],
        "Events that the probes could not count.";
    DISK_WRITE_LATENCY: Histogram(DISK_LATENCY), Seconds, "disk_write_latency_seconds", [ISSUER],
        "How long the destination's disk took for each write during snapshots, measured in the kernel.";
    DESTINATION_FREE: Gauge, Bytes, "destination_free_bytes", [ROOT],
        "Free space where snapshots may lie.";
    DESTINATION_SIZE: Gauge, Bytes, "destination_size_bytes", [ROOT],
        "Size of the file system where snapshots may lie.";
    HOST_MEMORY_AVAILABLE: Gauge, Bytes, "host_memory_available_bytes", [],
        "Memory that the host can still give away (MemAvailable).";
    HOST_PRESSURE: Counter, Seconds, "host_pressure_seconds_total", [RESOURCE, KIND],
        "Time in which some, or all, of the host's threads waited for a resource (pressure stall information); no series where the kernel has none.";
}
