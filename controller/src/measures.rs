//! What a snapshot costs and what it waits for, as far as the kernel tells: the stalls of the guest's threads, the
//! destination's disk, and what the scheduler gave to virtual CPUs and fault threads.
//!
//! A snapshot never fails for want of them.

use std::path::Path;

use rustix::process::Pid;
use serde_json::{Value, json};
use snapshot_core::vmm::Vmm as _;
use snapshot_core::vmm::qemu::QemuVmm;
use snapshot_core::{Phase, Progress};

use crate::disk::{SnapshotDisk, Writes};
use crate::probes::{Choice, SnapshotProbes, StallsSoFar};
use crate::progress::nanos;
use crate::scheduling::{self, Account, Quotas, ThreadAccount, Threads};

/// The name of the engine's threads that serve faults.
const FAULT_THREADS: &str = "fault";

/// All that is measured beside a snapshot.
pub struct Measures {
    probes: SnapshotProbes,
    disk: SnapshotDisk,
    scheduling: Option<Scheduling>,
}

/// What the scheduler gave, from the beginning until RAM was given up.
struct Scheduling {
    vcpus: Threads,
    quotas: Quotas,
    outcome: Option<Outcome>,
}

struct Outcome {
    vcpus: Vec<ThreadAccount>,
    fault_threads: Vec<ThreadAccount>,
    throttled_ns: Option<u64>,
}

impl Measures {
    /// Nothing is measured.
    pub const fn none() -> Self {
        Self { probes: SnapshotProbes::Off, disk: SnapshotDisk::Off, scheduling: None }
    }

    /// Attaches to `vmm` and to the disk that `destination` will lie on.
    pub fn attach(choice: Choice, vmm: &mut QemuVmm, destination: &Path) -> Self {
        let probes = SnapshotProbes::attach(choice, vmm);
        let disk = match choice {
            Choice::Off => SnapshotDisk::Off,
            Choice::Auto | Choice::Only(_) => SnapshotDisk::attach(destination),
        };
        // If QEMU does not tell its threads, the snapshot fails for that.
        let threads = vmm.cpu_threads().ok();
        let scheduling = threads.map(|threads| Scheduling::new(vmm.pid(), &threads));
        Self { probes, disk, scheduling }
    }

    /// Follows the snapshot.
    pub fn observe(&mut self, progress: &Progress) {
        self.probes.observe(progress);
        self.disk.observe(progress);
        if let Some(scheduling) = &mut self.scheduling {
            scheduling.observe(progress);
        }
    }

    /// The guest's stalls.
    pub const fn probes(&self) -> &SnapshotProbes {
        &self.probes
    }

    /// How long the guest's writes have been stalled so far.
    pub fn stalls(&self) -> Option<StallsSoFar> {
        self.probes.so_far()
    }

    /// How long writes to the destination's disk have taken so far.
    pub fn disk_writes(&self) -> Option<Writes> {
        self.disk.writes()
    }

    /// For programs: the stalls, the disk, the scheduler.
    pub fn json(&self) -> [(&'static str, Value); 3] {
        let outcome = self.scheduling.as_ref().and_then(|scheduling| scheduling.outcome.as_ref());
        [
            ("probes", self.probes.json()),
            ("disk", self.disk.json()),
            ("scheduling", outcome.map_or(Value::Null, Outcome::json)),
        ]
    }

    /// For people: rows of a name and a value.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let outcome = self.scheduling.as_ref().and_then(|scheduling| scheduling.outcome.as_ref());
        let mut rows = self.probes.rows();
        rows.extend(self.disk.row());
        rows.extend(outcome.map(|outcome| ("scheduling", outcome.in_words())));
        rows
    }
}

impl Scheduling {
    fn new(pid: Pid, vcpus: &[Pid]) -> Self {
        Self { vcpus: Threads::new(pid, vcpus), quotas: Quotas::of(vcpus), outcome: None }
    }

    fn observe(&mut self, progress: &Progress) {
        // The fault threads are about to end.
        if progress.phase == Phase::Draining && self.outcome.is_none() {
            self.outcome = Some(Outcome {
                vcpus: self.vcpus.take(),
                fault_threads: scheduling::of_own_threads(FAULT_THREADS),
                throttled_ns: self.quotas.take_throttled_ns(),
            });
        }
    }
}

impl Outcome {
    fn json(&self) -> Value {
        json!({
            "vcpus": self.vcpus,
            "fault_threads": self.fault_threads,
            "throttled_ns": self.throttled_ns,
        })
    }

    fn in_words(&self) -> String {
        let in_words = |threads: &[ThreadAccount]| {
            let sum = Account::sum(threads);
            format!(
                "ran {}, waited {} for a CPU, mean {}",
                nanos(sum.run_ns),
                nanos(sum.wait_ns),
                nanos(sum.mean_wait_ns())
            )
        };
        format!(
            "vCPUs {}{}; fault threads {}",
            in_words(&self.vcpus),
            self.throttled_ns
                .filter(|ns| *ns > 0)
                .map_or(String::new(), |ns| format!(", throttled for {}", nanos(ns))),
            in_words(&self.fault_threads)
        )
    }
}
