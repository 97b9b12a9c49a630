//! What a session tells: while it runs ([`Progress`]) and at its end ([`Report`]).

use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::first_touch::FirstTouch;
use crate::histogram::{Distribution, Summary};
use crate::session::nanos;

/// Where a session is.
///
/// ```text
/// preparing ─▶ arming ─▶ frozen ─▶ copying ─▶ draining ─▶ committing ─▶ completed
///     └──────────┴─────────┴──────────┴───────────┴────────────┴─▶ aborting ─▶ failed
/// ```
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    #[default]
    /// Asking, checking, reserving. Nothing of the guest is changed.
    Preparing,
    /// RAM is being write-protected; the guest runs.
    Arming,
    /// The virtual machine is paused.
    Frozen,
    /// The guest runs; its RAM is being saved.
    Copying,
    /// All RAM is saved and unprotected; the copy buffer goes to disk.
    Draining,
    /// Files are completed and made durable.
    Committing,
    /// There is a snapshot.
    Completed,
    /// Unprotecting, resuming, undoing.
    Aborting,
    /// There is no snapshot.
    Failed,
}

impl Phase {
    /// The word for people and programs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Arming => "arming",
            Self::Frozen => "frozen",
            Self::Copying => "copying",
            Self::Draining => "draining",
            Self::Committing => "committing",
            Self::Completed => "completed",
            Self::Aborting => "aborting",
            Self::Failed => "failed",
        }
    }
}

/// A session at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// Whether the consistency point has passed: faults that begin from now on wait for a copy.
    pub is_consistent: bool,
    /// Length of RAM in bytes.
    pub total_bytes: u64,
    /// Bytes of RAM whose content at the consistency point is saved, holes included.
    pub saved_bytes: u64,
    /// Of these, bytes saved because of faults, with what was captured around.
    pub fault_bytes: u64,
    /// Bytes of RAM that nobody has saved yet.
    pub remaining_bytes: u64,
    /// Bytes written to the RAM file.
    pub written_bytes: u64,
    /// Bytes of pages that have left the copy buffer: written, or found to be zero.
    pub drained_bytes: u64,
    /// Copy buffer in use, in bytes.
    pub buffer_used_bytes: u64,
    /// Its bound now, in bytes.
    pub buffer_limit_bytes: u64,
    /// Faults that had to wait for room in it.
    pub buffer_waits: u64,
    /// Write faults served since the consistency point.
    pub faults: u64,
    /// The threads that had them.
    pub first_touches: Vec<FirstTouch>,
    /// Time that the handler took for them.
    pub service: Distribution,
    /// Time since the session began, in nanoseconds.
    pub elapsed_ns: u64,
}

/// The pause, in its parts. In nanoseconds, by the session's own clock: from before `pause` is sent until
/// after `resume` is acknowledged. The guest's virtual CPUs stood still for less, on a busy host for much less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Downtime {
    /// How long the virtual CPUs stood still, by the VMM's clock; nothing if it does not tell.
    pub stood_still_ns: Option<u64>,
    /// All of it, from asking for the pause until its end was acknowledged.
    pub total_ns: u64,
    /// Stopping virtual CPUs, draining and flushing disks.
    pub pause_ns: u64,
    /// Saving device state.
    pub device_state_ns: u64,
    /// Protecting the remainder of RAM.
    pub protect_ns: u64,
    /// Switching disks to their overlays.
    pub disks_ns: u64,
    /// Letting it run again.
    pub resume_ns: u64,
}

/// Who saved how many bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    /// Because the guest wanted to write there, with what was captured around.
    pub by_fault_bytes: u64,
    /// In the background.
    pub by_sweep_bytes: u64,
    /// Of the latter, memory that does not exist: nothing was read or stored.
    pub hole_bytes: u64,
}

/// A completed snapshot, measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Length of RAM in bytes.
    pub ram_bytes: u64,
    /// Bytes of pages written to the RAM file.
    pub stored_bytes: u64,
    /// Who saved what.
    pub captured: Captured,
    /// The pause.
    pub downtime: Downtime,
    /// From the start to the durable snapshot, in nanoseconds.
    pub total_ns: u64,
    /// Of it: write-protecting while the guest runs.
    pub arming_ns: u64,
    /// Of it: from the consistency point until all RAM was saved and unprotected.
    pub copying_ns: u64,
    /// Of it: from then until the snapshot was durable.
    pub committing_ns: u64,
    /// Rounds of protecting again what was written meanwhile.
    pub arming_rounds: u32,
    /// Pages that were left to be protected in the pause.
    pub remainder_pages: u64,
    /// Write faults let through while arming.
    pub arming_faults: u64,
    /// Write faults that waited for a copy.
    pub faults: u64,
    /// The threads of the VMM that had them, and what was saved for each.
    pub first_touches: Vec<FirstTouch>,
    /// Faults that had to wait for room in the copy buffer.
    pub buffer_waits: u64,
    /// Handler's time for a fault, from reading its notice until the write could go through. The fault's
    /// whole stall is longer by the kernel's way to the handler and back.
    pub service: Summary,
    /// Most of the copy buffer that was in use, in bytes.
    pub buffer_peak_bytes: u64,
    /// Bound of the copy buffer at the end, in bytes.
    pub buffer_limit_bytes: u64,
    /// Bytes written per second between the consistency point and the durable snapshot.
    pub throughput_bytes_per_second: u64,
    /// How the RAM file was written.
    pub storage: String,
    /// Userfaultfd contexts, each with a fault thread.
    pub contexts: u32,
    /// Images on which the guest's disks go on, and with which it must be started from now on.
    pub overlays: Vec<PathBuf>,
    /// What is not as it should be although the snapshot is sound.
    pub warnings: Vec<String>,
}

impl Report {
    /// Fills in what is known only at the end of the session that began at `began`.
    pub(crate) fn finish(&mut self, began: Instant, consistent: Instant, saved: Instant) {
        self.total_ns = nanos(began.elapsed());
        self.committing_ns = nanos(saved.elapsed());
        let writing_ns = u128::from(nanos(consistent.elapsed()).max(1));
        let rate = u128::from(self.stored_bytes) * 1_000_000_000 / writing_ns;
        self.throughput_bytes_per_second = u64::try_from(rate).unwrap_or(u64::MAX);
    }
}
