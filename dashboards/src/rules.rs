//! Prometheus' rules: recording rules, and the alerts, each with its runbook.

use crate::lint::{self, Recorded};
use crate::runbook_url;

/// The `job` of the scrape in the example configuration, and the one that the alert on a silent target watches.
pub(crate) const JOB: &str = "livesnap";

/// A query that Prometheus answers beforehand.
struct Recording {
    /// `level:metric:operations`, as Prometheus' documentation names them.
    name: &'static str,
    expr: &'static str,
}

/// An alert, with what an operator needs to know.
#[derive(Clone, Copy, Debug)]
pub struct Alert {
    /// Its name, and that of its runbook.
    pub name: &'static str,
    /// When.
    pub expr: &'static str,
    /// For how long without a break.
    pub lasting: &'static str,
    /// How long it goes on when that is over, or nobody knows any more.
    pub keeping: &'static str,
    /// Who is told, and when.
    pub severity: Severity,
    /// One line, with labels and value.
    pub summary: &'static str,
    /// What is so, with labels and value.
    pub description: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// What it does to users.
    pub impact: &'static str,
    /// What to look at first; one step each.
    pub first_look: &'static [&'static str],
    /// What to do; one remedy each.
    pub remedy: &'static [&'static str],
}

/// Who is told, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Somebody, now.
    Critical,
    /// Somebody, in working hours.
    Warning,
}

impl Severity {
    /// The label's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::Warning => "warning",
        }
    }
}

/// How long a page of harm to a guest goes on without news of it: longer than `TargetDown` waits, which silences it. A daemon
/// that ends would be told as a cure otherwise.
const KEEPING: &str = "5m";
const BANDWIDTH: &str = "Less bandwidth while it runs: `curl --unix-socket /run/livesnap/livesnap.sock -X PATCH --json '{\"max_bandwidth_bytes_per_second\": 100000000}' http://localhost/snapshot/ID/policy`.";

/// Recording rules, each after those that it reads.
const RECORDINGS: &[Recording] = &[
    Recording {
        name: "vm:livesnap_snapshots_ended:increase2h",
        expr: r#"sum by (job, instance, vm) (increase(livesnap_snapshots_total{reason!="cancelled"}[2h]))"#,
    },
    Recording {
        name: "vm:livesnap_snapshots_ended:increase1d",
        expr: r#"sum by (job, instance, vm) (increase(livesnap_snapshots_total{reason!="cancelled"}[1d]))"#,
    },
    Recording {
        name: "vm:livesnap_snapshots_lost:increase2h",
        expr: r#"sum by (job, instance, vm) (increase(livesnap_snapshots_total{outcome!="completed", reason!="cancelled"}[2h]))"#,
    },
    Recording {
        name: "vm:livesnap_snapshots_lost:increase1d",
        expr: r#"sum by (job, instance, vm) (increase(livesnap_snapshots_total{outcome!="completed", reason!="cancelled"}[1d]))"#,
    },
    Recording {
        name: "vm:livesnap_snapshots_lost:ratio2h",
        expr: "vm:livesnap_snapshots_lost:increase2h / (vm:livesnap_snapshots_ended:increase2h > 0)",
    },
    Recording {
        name: "vm:livesnap_snapshots_lost:ratio1d",
        expr: "vm:livesnap_snapshots_lost:increase1d / (vm:livesnap_snapshots_ended:increase1d > 0)",
    },
    // A virtual machine that never had one counts from when the daemon came to know it.
    Recording {
        name: "vm:livesnap_snapshot_age:seconds",
        expr: "time() - ((livesnap_last_success_timestamp_seconds > 0) or livesnap_vm_registered_timestamp_seconds)",
    },
    Recording {
        name: "vm:livesnap_saved_bytes:rate5m",
        expr: "sum by (job, instance, vm) (rate(livesnap_captured_bytes_total[5m])) \
               + sum by (job, instance, vm) (rate(livesnap_stored_bytes_total[5m]))",
    },
    Recording {
        name: "vm:livesnap_fault_stall_seconds:p99_5m",
        expr: "histogram_quantile(0.99, sum by (job, instance, vm, le) (rate(livesnap_fault_stall_seconds_bucket[5m]))) \
               and sum by (job, instance, vm) (increase(livesnap_fault_stall_seconds_count[5m])) >= 100",
    },
];

/// Every alert.
pub const ALERTS: &[Alert] = &[
    Alert {
        name: "SnapshotAborted",
        expr: r#"sum by (job, instance, vm, outcome, reason) (increase(livesnap_snapshots_total{outcome!="completed", reason!="cancelled"}[15m])) > 0 and on (job, instance, vm) livesnap_last_snapshot_succeeded == 0"#,
        lasting: "0s",
        keeping: "0s",
        severity: Severity::Warning,
        summary: "No snapshot of {{ $labels.vm }}: {{ $labels.reason }}",
        description: "A snapshot of {{ $labels.vm }} on {{ $labels.instance }} came to nothing: {{ $labels.outcome }}, {{ $labels.reason }}. The last one was none either.",
        meaning: "A snapshot was given up or failed for this reason within the last 15 minutes, and the last one was not completed. \
                  Snapshots that somebody cancelled do not count. The alert ends with the next completed snapshot, or after 15 minutes, so \
                  its end alone says nothing: look at the age of the newest snapshot.",
        impact: "The guest runs on as if nothing had happened; nothing is left of the snapshot. A restore would go further back than \
                 planned.",
        first_look: &[
            "On the host, `livesnap ask list` shows the newest operations, and `livesnap ask follow ID` how one ended: what failed, on what, and what to do. The daemon's log has the same: `journalctl -u livesnap`.",
            "Look the reason up in [reasons.md](../reasons.md).",
            "On the dashboard \"live snapshot\", look at \"Why was it slowed down, or given up?\" at the time of the red mark.",
        ],
        remedy: &[
            "`buffer_forecast`, `cpu_floor`, `deadline`: the destination is slower than the guest writes. Take the snapshot at a quieter time, give a larger buffer, a faster destination, or allow more throttling; `livesnap ask plan VM --buffer 2GiB --min-cpu 30%` forecasts whether that would do.",
            "`stall_limit`: the host has no processor or no memory to spare, or the limit is tighter than the host can keep.",
            "`io`, `no_space`: the destination's disk or file system: `df -h` and the kernel's log, `dmesg`.",
            "`vmm_unreachable`, `no_process`, `vmm_died`: the virtual machine itself; `livesnap doctor --qmp SOCKET` tells what is to be seen of it.",
            "Anything else: what the operation's error says. [troubleshooting.md](../troubleshooting.md) has more.",
        ],
    },
    Alert {
        name: "AbortBudgetBurn",
        expr: "vm:livesnap_snapshots_lost:ratio1d > 0.3 and vm:livesnap_snapshots_lost:ratio2h > 0.3 and vm:livesnap_snapshots_lost:increase1d > 2.5",
        lasting: "0s",
        keeping: "0s",
        severity: Severity::Critical,
        summary: "{{ $labels.vm }} loses {{ $value | humanizePercentage }} of its snapshots",
        description: "{{ $value | humanizePercentage }} of the snapshots of {{ $labels.vm }} on {{ $labels.instance }} in the last day came to nothing, and it goes on.",
        meaning: "More than 30 % of a virtual machine's snapshots came to nothing, both in the last day and in the last 2 hours, and \
                  these were at least 3. The long window shows that it matters, the short one that it still goes on, the count \
                  that it is no accident.",
        impact: "Restores go further back than planned, and the work of the lost snapshots, with its cost to guest and disk, is for nothing.",
        first_look: &[
            "On the dashboard \"fleet\", look at \"Why there is no snapshot\": is it one reason or many, one virtual machine or all of a host?",
            "On the dashboard \"host\", look at write latency, space and pressure.",
        ],
        remedy: &[
            "One virtual machine: as for [SnapshotAborted](SnapshotAborted.md), for its reason.",
            "All of a host: its disk, its memory, or snapshots at the same time as backups. Spread the schedules: other times (`every`), more `jitter`, fewer at a time (`running_max`).",
            "Limits that the guest cannot be kept within: wider ones in the policy of whoever asks for the snapshots, or `on_infeasible` of `wait`, which lets the guest wait for the disk instead.",
        ],
    },
    Alert {
        name: "SnapshotOverdue",
        expr: "vm:livesnap_snapshot_age:seconds > on (job, instance, vm) 1.5 * livesnap_schedule_interval_seconds",
        lasting: "5m",
        keeping: "0s",
        severity: Severity::Critical,
        summary: "The newest snapshot of {{ $labels.vm }} is {{ $value | humanizeDuration }} old",
        description: "{{ $labels.vm }} on {{ $labels.instance }} has had no completed snapshot for {{ $value | humanizeDuration }}, which is more than one and a half intervals of its schedule.",
        meaning: "The schedule wants a snapshot every so often; none was completed for more than one and a half of these intervals. \
                  A virtual machine that never had a snapshot counts from when the daemon came to know it; so the alert \
                  begins anew when such a daemon is restarted.",
        impact: "The recovery point objective is missed: a restore would lose more than was promised.",
        first_look: &[
            "Is a snapshot running or waiting? Dashboard \"fleet\", \"Now\".",
            "Did the last ones fail? Dashboard \"fleet\", \"Why there is no snapshot\".",
            "Were none begun? `journalctl -u livesnap | grep 'turn is left out'` has each turn that was left out, and why; `livesnap ask vms` what would refuse one, and `livesnap ask --json vms` when the next is due (`next_at`).",
        ],
        remedy: &[
            "Take one by hand: `livesnap ask snapshot VM`; its error, if any, is the cause.",
            "Snapshots that wait for each other: allow more at a time (`running_max`), or spread the schedules by more `jitter`.",
            "A virtual machine that is gone: take its name from the schedule's `vms` in /etc/livesnap/livesnap.toml, and `systemctl restart livesnap`, which aborts snapshots that run; guests run on.",
        ],
    },
    Alert {
        name: "ThrottleLeaked",
        expr: "livesnap_throttle_ratio > 0 unless on (job, instance, vm) livesnap_snapshots_in_progress > 0",
        lasting: "1m",
        keeping: KEEPING,
        severity: Severity::Critical,
        summary: "{{ $labels.vm }} is slowed down although no snapshot runs",
        description: "{{ $value | humanizePercentage }} of the CPU time of {{ $labels.vm }} on {{ $labels.instance }} is withheld, and no snapshot of it runs.",
        meaning: "The CPU quota that a snapshot gave to the virtual CPUs is still in force after its end. livesnap puts it back in every \
                  way that a snapshot can end; its guard does when livesnap is killed. Both were killed, or the cgroup could not be written.",
        impact: "The guest is slow, for as long as nobody puts the quota back.",
        first_look: &[
            "Is somebody taking a snapshot by hand? `pgrep -af 'snapshot .*--qmp'` on the host. That one puts it back at its end.",
            "`livesnap doctor` tells what was left, and where.",
            "Compare with the cgroups of QEMU's threads, `cat /proc/PID/task/*/cgroup`: `cpu.max`, or `cpu.cfs_quota_us`, of each below /sys/fs/cgroup.",
        ],
        remedy: &[
            "`livesnap doctor --repair`, or the next snapshot of any virtual machine, puts it back.",
            "If that is refused, write `max` to `cpu.max` (version 1: `-1` to `cpu.cfs_quota_us`) of the group that doctor names.",
        ],
    },
    Alert {
        name: "ProtectionLeaked",
        expr: "livesnap_protected_bytes > 0 unless on (job, instance, vm) livesnap_snapshots_in_progress > 0",
        lasting: "1m",
        keeping: KEEPING,
        severity: Severity::Critical,
        summary: "Memory of {{ $labels.vm }} is protected although no snapshot runs",
        description: "{{ $value | humanize1024 }}B of the memory of {{ $labels.vm }} on {{ $labels.instance }} are under userfaultfd, and no snapshot of it runs.",
        meaning: "The kernel has guest memory registered with a userfaultfd, and the daemon runs no snapshot of it. Either another \
                  program does, or a process still holds a userfaultfd of a snapshot that is over.",
        impact: "A write of the guest to such memory may wait for a handler that nobody runs: the guest may hang, and QEMU with it. That \
                 QEMU does not answer then keeps nobody from seeing what is protected.",
        first_look: &[
            "Is somebody taking a snapshot by hand? `pgrep -af 'snapshot .*--qmp'` on the host. That one lifts it at its end.",
            "Does QEMU itself use one, for a migration after copying (postcopy) or `background-snapshot`?",
            "Who holds one: `find /proc/[0-9]*/fd -lname '*userfaultfd*' 2>/dev/null`; the number in each path is a process, `ps -p NUMBER` names it.",
        ],
        remedy: &[
            "End the process that holds it, unless it is QEMU; the kernel then lifts the protection and wakes whoever waits.",
            "Do not restart QEMU for it: the guest's state would be lost, and is sound.",
        ],
    },
    Alert {
        name: "SnapshotStuck",
        expr: "livesnap_snapshots_in_progress > 0 and on (job, instance, vm) vm:livesnap_saved_bytes:rate5m == 0",
        lasting: "5m",
        keeping: "0s",
        severity: Severity::Critical,
        summary: "The snapshot of {{ $labels.vm }} makes no progress",
        description: "A snapshot of {{ $labels.vm }} on {{ $labels.instance }} runs, and nothing was saved or written for 10 minutes.",
        meaning: "A snapshot runs, but neither memory was saved nor a file written for 10 minutes.",
        impact: "The guest's writes to memory that is not saved yet may be waiting. No other snapshot of it can begin.",
        first_look: &[
            "The phase, on the dashboard \"live snapshot\".",
            "The destination: does `dd if=/dev/zero of=DESTINATION/probe bs=1M count=64 oflag=direct` come to an end (and `rm DESTINATION/probe`)? Is it a network file system whose server is gone?",
            "The processes: `ps -o pid,stat,wchan:30,args -p \"$(pgrep -d, -f 'snapshot .*--qmp')\"`. State D waits for a disk; T is stopped, and `kill -CONT PID` lets it go on.",
        ],
        remedy: &[
            "Abort it: `livesnap ask list` has its id, `livesnap ask abort ID` gives it up. The guest is let go first.",
            "If that does not help, `kill -9` the process of the snapshot, the one above with the virtual machine's socket; the kernel lets the guest go, and the guard gives its CPU time back.",
        ],
    },
    Alert {
        name: "GuestStallHigh",
        expr: "vm:livesnap_fault_stall_seconds:p99_5m > on (job, instance, vm) livesnap_policy_stall_limit_seconds",
        lasting: "30s",
        keeping: "0s",
        severity: Severity::Warning,
        summary: "{{ $labels.vm }} stands still for {{ $value | humanizeDuration }} at a write",
        description: "Of 100 first writes of {{ $labels.vm }} on {{ $labels.instance }}, one stood still for {{ $value | humanizeDuration }} or longer, which is over the limit of its policy.",
        meaning: "In the last 5 minutes, the 99th percentile of the guest's waits, measured in the kernel, was longer than the policy \
                  allows, over at least 100 waits.",
        impact: "The guest's programs see memory that is slow at times: latencies rise, time-outs may come.",
        first_look: &[
            "On the dashboard \"live snapshot\", compare the whole stall with the handler's part. Both long: the handler waits for room in the buffer or for a processor. Only the whole: the guest's threads wait for a processor after they were woken.",
            "On the dashboard \"host\", look at pressure on CPU and memory.",
        ],
        remedy: &[
            "The buffer is full: as for [BufferNearLimit](BufferNearLimit.md).",
            "No processor to spare: less bandwidth (below), other work elsewhere, or the snapshot at another time.",
            BANDWIDTH,
            "The guest matters more: `livesnap ask abort ID`; `livesnap ask list` has the id.",
        ],
    },
    Alert {
        name: "BufferNearLimit",
        expr: "livesnap_buffer_used_bytes / (livesnap_buffer_limit_bytes > 0) > 0.9",
        lasting: "30s",
        keeping: "0s",
        severity: Severity::Warning,
        summary: "The copy buffer of {{ $labels.vm }} is {{ $value | humanizePercentage }} full",
        description: "The copy buffer of the snapshot of {{ $labels.vm }} on {{ $labels.instance }} has been over 90 % full for half a minute.",
        meaning: "What the guest's writes made livesnap save fills the copy buffer, and the destination does not take it fast enough.",
        impact: "When the buffer is full, the guest's writes wait for the disk.",
        first_look: &[
            "On the dashboard \"live snapshot\": \"First touches against the disk\" and \"Copy buffer\".",
            "Write latency on the dashboard \"host\": does somebody else use the disk?",
        ],
        remedy: &[
            "Allow a larger buffer while it runs, if the host has memory (dashboard \"host\"): `curl --unix-socket /run/livesnap/livesnap.sock -X PATCH --json '{\"buffer_bytes\": 4294967296}' http://localhost/snapshot/ID/policy`; `livesnap ask list` has the id.",
            "Or let the controller withhold more CPU time, in the same way: `{\"min_cpu_ratio\": 0.2}` leaves the guest a fifth.",
            "For the next one: a faster destination, or a quieter time.",
        ],
    },
    Alert {
        name: "ProbeBlind",
        expr: r#"sum by (job, instance, probe) (livesnap_probe_attached) == 0 and on (job, instance) (sum by (job, instance) (livesnap_snapshots_in_progress) > 0) or increase(livesnap_probe_events_lost_total{probe="stall"}[10m]) > on (job, instance) group_left () 0.01 * sum by (job, instance) (increase(livesnap_fault_stall_seconds_count[10m])) or increase(livesnap_probe_events_lost_total{probe="disk"}[10m]) > on (job, instance) group_left () 0.05 * sum by (job, instance) (increase(livesnap_disk_write_latency_seconds_count[10m]))"#,
        lasting: "1m",
        keeping: "0s",
        severity: Severity::Warning,
        summary: "The {{ $labels.probe }} probe on {{ $labels.instance }} does not see everything",
        description: "On {{ $labels.instance }}, probes of the kind {{ $labels.probe }} could not be attached, or lost events.",
        meaning: "While a snapshot runs, a kind of probe is not attached; or, in the last 10 minutes, it could not count more than one in \
                  a hundred of the guest's stalls, on whose 99th percentile limits and alerts rest, or more than one in twenty of \
                  the disk's requests. Of these some in a thousand are always missed on a busy host.",
        impact: "The guest is not harmed, but what a snapshot costs it is not known, or told too low. The limit on stalls may not be kept.",
        first_look: &[
            "`livesnap doctor` tells which tiers the kernel refuses, and why.",
            "On the dashboard \"host\": \"Probes of the last snapshot\" and \"Events lost\".",
        ],
        remedy: &[
            "Missing privileges: CAP_BPF and CAP_PERFMON, and no lockdown of the kernel. [probes.md](../probes.md) has the needs of each tier.",
            "Lost events: more threads or requests at a time than there is room for; `livesnap ask --json show ID` tells which, in `result.probes.stalls.lost` and `result.disk`. Nothing need be done but to know that the figures are too low.",
        ],
    },
    Alert {
        name: "TargetDown",
        expr: r#"up{job="livesnap"} == 0 or absent(up{job="livesnap"})"#,
        lasting: "2m",
        keeping: "0s",
        severity: Severity::Critical,
        summary: "livesnap on {{ $labels.instance }} does not answer",
        description: "Prometheus has not been able to scrape livesnap {{ $labels.instance }} for 2 minutes. Alerts of its virtual machines cannot be raised meanwhile.",
        meaning: "The daemon does not answer, or Prometheus does not know any.",
        impact: "No snapshots are taken on schedule, and no other alert can be raised for this host. Guests run on.",
        first_look: &[
            "`systemctl status livesnap` and `journalctl -u livesnap` on the host.",
            "`curl --unix-socket /run/livesnap/livesnap.sock http://localhost/healthz`.",
            "It answers there, but Prometheus cannot reach it: the page \"Targets\" of Prometheus has the error, `metrics_listen` in /etc/livesnap/livesnap.toml the address.",
            "No `instance` in the alert: no scrape of Prometheus has the job `livesnap`.",
        ],
        remedy: &[
            "`systemctl restart livesnap`. What ran when it ended is told as aborted (`daemon_restart`); what it had left in force is put back.",
            "If it ends again at once, its log says why.",
        ],
    },
    Alert {
        name: "VerifyFailed",
        expr: "increase(livesnap_verify_failures_total[1h]) > 0",
        lasting: "0s",
        keeping: "0s",
        severity: Severity::Critical,
        summary: "A snapshot of {{ $labels.vm }} is damaged",
        description: "A snapshot of {{ $labels.vm }} on {{ $labels.instance }} did not match its checksums or structure when it was verified.",
        meaning: "A snapshot was read again, as its request or its schedule wants it (`verify`), and its files could not be read or are not what \
                  was written.",
        impact: "That snapshot cannot be relied on. Others on the same disk may be damaged as well.",
        first_look: &[
            "On the host, `livesnap ask list` says `not sound` beside it; `livesnap verify DIR`, with the directory that is listed, names the first page or file that is wrong.",
            "The kernel's log: errors of the disk or the file system. `smartctl -a` on the disk.",
        ],
        remedy: &[
            "Keep the damaged snapshot apart (`mv`), and take a new one: `livesnap ask snapshot VM`, with `--out` on another disk if `destinations` has one.",
            "Verify all others on that disk: `for dir in /var/lib/livesnap/snapshots/*/*/; do livesnap verify \"$dir\"; done`.",
        ],
    },
];

/// What the recording rules are of.
///
/// # Errors
/// With a sentence, if one makes no sense.
pub(crate) fn recorded() -> Result<Recorded, String> {
    let mut known = Recorded::new();
    for recording in RECORDINGS {
        let finding = lint::query(recording.expr, &known)?;
        known.insert(recording.name.to_owned(), finding);
    }
    Ok(known)
}

/// The file of recording rules.
pub(crate) fn recording_file() -> String {
    let mut text =
        format!("# {}\ngroups:\n  - name: livesnap-recordings\n    rules:\n", crate::WRITTEN);
    for Recording { name, expr } in RECORDINGS {
        text.push_str(&format!("      - record: {name}\n        expr: {}\n", quoted(expr)));
    }
    text
}

/// The file of alerts.
#[must_use]
pub fn alert_file(alerts: &[Alert]) -> String {
    let mut text =
        format!("# {}\ngroups:\n  - name: livesnap-alerts\n    rules:\n", crate::WRITTEN);
    for alert in alerts {
        let keeping = match alert.keeping {
            "0s" => String::new(),
            time => format!("        keep_firing_for: {time}\n"),
        };
        text.push_str(&format!(
            "      - alert: {}\n        expr: {}\n        for: {}\n{keeping}        labels:\n          service: livesnap\n          \
             severity: {}\n        annotations:\n          summary: {}\n          description: {}\n          runbook_url: {}\n",
            alert.name,
            quoted(alert.expr),
            alert.lasting,
            alert.severity.as_str(),
            quoted(alert.summary),
            quoted(alert.description),
            quoted(&runbook_url(alert.name)),
        ));
    }
    text
}

/// The runbook of an alert.
pub(crate) fn runbook(alert: &Alert) -> String {
    let list = |lines: &[&str]| lines.iter().map(|line| format!("- {line}\n")).collect::<String>();
    let waits = match alert.lasting {
        "0s" => "It does not wait.".to_owned(),
        time => format!("It must be so for {time} without a break."),
    };
    let keeps = match alert.keeping {
        "0s" => String::new(),
        time => format!(
            " It goes on for {time} when that is over, so that a daemon that ends does not look like a cure."
        ),
    };
    format!(
        "# {}\n\nSeverity: {}.\n\n```promql\n{}\n```\n\n{waits}{keeps}\n\n## Meaning\n\n{}\n\n## Impact\n\n{}\n\n\
         ## First look\n\n{}\n## Remedy\n\n{}",
        alert.name,
        alert.severity.as_str(),
        alert.expr,
        alert.meaning,
        alert.impact,
        list(alert.first_look),
        list(alert.remedy),
    )
}

/// A string of YAML, in single quotes: only these have to be doubled.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
