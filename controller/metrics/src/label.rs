//! Labels, and the closed sets of what they can be.

use snapshot_core::Reason;

use crate::{Label, Values};

/// The virtual machine.
pub const VM: Label =
    Label { name: "vm", values: Values::Bounded("the virtual machines that the daemon knows") };

/// How a snapshot ended.
pub const OUTCOME: Label = Label { name: "outcome", values: Values::Closed(&OUTCOMES) };
/// Values of `outcome`.
pub const OUTCOMES: [&str; 3] = ["completed", "aborted", "failed"];

/// Why there is no snapshot.
pub const REASON: Label = Label { name: "reason", values: Values::Closed(&REASONS) };
/// The `reason` of a snapshot that was completed.
pub const NO_REASON: &str = "none";
/// [`NO_REASON`], then every [`Reason`].
const REASONS: [&str; Reason::ALL.len() + 1] = {
    let mut words = [NO_REASON; Reason::ALL.len() + 1];
    let mut index = 0;
    while index < Reason::ALL.len() {
        words[index + 1] = Reason::ALL[index].as_str();
        index += 1;
    }
    words
};

/// The `outcome` of a snapshot that ended for this reason: aborted, if somebody or the policy's limits gave it up; failed
/// otherwise.
#[must_use]
pub fn outcome_of(reason: &str) -> &'static str {
    if reason == NO_REASON {
        return "completed";
    }
    match Reason::ALL.iter().find(|known| known.as_str() == reason) {
        Some(Reason::Cancelled | Reason::DaemonRestart) => "aborted",
        Some(reason) if reason.is_given_up() => "aborted",
        _ => "failed",
    }
}

/// Every pair of `outcome` and `reason` that there is. The daemon shows all of them, at 0, as soon as it knows a virtual
/// machine: of a series that begins at 1, `increase()` sees nothing.
pub fn outcomes_and_reasons() -> impl Iterator<Item = (&'static str, &'static str)> {
    REASONS.into_iter().map(|reason| (outcome_of(reason), reason))
}

/// Where a snapshot is.
pub const PHASE: Label = Label { name: "phase", values: Values::Closed(&PHASES) };
/// Values of `phase`, in their order.
pub const PHASES: [&str; 8] =
    ["queued", "preparing", "arming", "frozen", "copying", "draining", "committing", "aborting"];

/// By which way a page was saved.
pub const PATH: Label = Label { name: "path", values: Values::Closed(&["fault", "sweep"]) };

/// Part of a pause, as the report has them.
pub const PART: Label = Label {
    name: "part",
    values: Values::Closed(&["pause", "device_state", "protect", "disks", "resume"]),
};

/// How a dirty rate was found: by the random sample of a forecast, or from first touches while a snapshot runs.
pub const SOURCE: Label =
    Label { name: "source", values: Values::Closed(&["sample", "first_touch"]) };

/// What the controller does.
pub const ACTION: Label = Label { name: "action", values: Values::Closed(&ACTIONS) };
/// Values of `action`, the mildest first.
pub const ACTIONS: [&str; 4] = ["none", "buffer", "throttle", "abort"];

/// A kind of probe: of the guest's faults, or of the destination's disk.
pub const PROBE: Label = Label { name: "probe", values: Values::Closed(&["stall", "disk"]) };

/// How a probe is attached, the best first.
pub const TIER: Label = Label {
    name: "tier",
    values: Values::Closed(&["fentry", "tp-btf", "kprobe", "raw-tp", "tracepoint"]),
};

/// Whose requests to a disk: livesnap's, or those of others.
pub const ISSUER: Label = Label { name: "issuer", values: Values::Closed(&ISSUERS) };
/// Values of `issuer`.
pub const ISSUERS: [&str; 2] = ["livesnap", "others"];

/// A route of the HTTP interface.
pub const ROUTE: Label = Label { name: "route", values: Values::Closed(&ROUTES) };
/// Values of `route`: templates, never paths, and `other` for what is no route.
pub const ROUTES: [&str; 13] = [
    "/",
    "/snapshot",
    "/snapshot/plan",
    "/snapshot/{id}",
    "/snapshot/{id}/events",
    "/snapshot/{id}/abort",
    "/snapshot/{id}/policy",
    "/vms",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "other",
];

/// Status of an answer.
pub const CODE: Label = Label {
    name: "code",
    values: Values::Bounded("the status codes that the interface answers with"),
};

/// What a host can be short of, as the kernel's pressure files are named.
pub const RESOURCE: Label =
    Label { name: "resource", values: Values::Closed(&["cpu", "io", "memory"]) };
/// Whether some threads waited, or all of them.
pub const KIND: Label = Label { name: "kind", values: Values::Closed(&["some", "full"]) };

/// A directory that snapshots may lie below.
pub const ROOT: Label =
    Label { name: "root", values: Values::Bounded("the destinations of the configuration") };

/// The program's version.
pub const VERSION: Label = Label { name: "version", values: Values::Bounded("one at a time") };
