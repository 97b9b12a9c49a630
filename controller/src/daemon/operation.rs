//! What the daemon tells of a snapshot that was asked for: the request, how far it is, how it ended; and who wants to
//! know of it. Only data.
//!
//! ```text
//! queued ─▶ preparing ─▶ arming ─▶ frozen ─▶ copying ─▶ draining ─▶ committing ─▶ completed
//!    │          └───────────┴─────────┴─────────┴──────────┴────────────┴─▶ aborting ─▶ aborted
//!    └─▶ aborted                                                        └─▶ failed
//! ```

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use snapshot_core::{FirstTouch, Phase, Reason};
use utoipa::ToSchema;

use super::budget::Grant;
use super::policy::Policy;
use crate::json;

/// Where an operation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It waits for its turn.
    #[default]
    Queued,
    /// Asking, checking, measuring. Nothing of the guest is changed.
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
    /// It is being given up: unprotecting, resuming, undoing.
    Aborting,
    /// There is a snapshot.
    Completed,
    /// It was given up, by somebody or because the limits could not be kept. There is no snapshot.
    Aborted,
    /// It did not work. There is no snapshot.
    Failed,
}

impl State {
    /// Every state, in order.
    #[cfg(test)]
    pub const ALL: [Self; 11] = [
        Self::Queued,
        Self::Preparing,
        Self::Arming,
        Self::Frozen,
        Self::Copying,
        Self::Draining,
        Self::Committing,
        Self::Aborting,
        Self::Completed,
        Self::Aborted,
        Self::Failed,
    ];

    /// The word for people and programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Arming => "arming",
            Self::Frozen => "frozen",
            Self::Copying => "copying",
            Self::Draining => "draining",
            Self::Committing => "committing",
            Self::Aborting => "aborting",
            Self::Completed => "completed",
            Self::Aborted => "aborted",
            Self::Failed => "failed",
        }
    }

    /// Whether nothing more will come.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Aborted | Self::Failed)
    }

    /// Whether a process is at it.
    pub const fn is_running(self) -> bool {
        !matches!(self, Self::Queued) && !self.is_final()
    }

    /// Where the operation is whose session is in `phase`. A session's end is not the operation's: its process still has to
    /// report, and to let go of the virtual machine.
    pub const fn of(phase: Phase) -> Self {
        match phase {
            Phase::Preparing => Self::Preparing,
            Phase::Arming => Self::Arming,
            Phase::Frozen => Self::Frozen,
            Phase::Copying => Self::Copying,
            Phase::Draining => Self::Draining,
            Phase::Committing | Phase::Completed => Self::Committing,
            Phase::Aborting | Phase::Failed => Self::Aborting,
        }
    }
}

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Name of the virtual machine, as `GET /vms` lists it.
    pub vm: String,
    /// Directory that the snapshot becomes: a path below a configured root, or relative to the first root. Left out, it is
    /// VM/ID below the first root.
    #[serde(default)]
    pub destination: Option<String>,
    /// Limits, and how they are kept.
    #[serde(default, deserialize_with = "json::object")]
    pub policy: Policy,
    /// Whether the snapshot is read again when it is completed.
    #[serde(default)]
    pub verify: bool,
}

/// A snapshot that was asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Unique, and in the order in which they were asked for.
    pub id: String,
    /// Name of the virtual machine.
    pub vm: String,
    /// Directory that the snapshot becomes.
    pub destination: String,
    /// Limits, and how they are kept.
    pub policy: Policy,
    /// What it has of the host's budget, once its turn has come.
    #[serde(default)]
    pub granted: Option<Grant>,
    /// The schedule that wanted it; null if somebody asked for it.
    pub schedule: Option<String>,
    /// Where it is.
    pub state: State,
    /// Grows with each change; the id of an event.
    pub version: u64,
    /// When it was asked for (RFC 3339).
    pub created_at: String,
    /// When its turn came.
    pub started_at: Option<String>,
    /// When it ended.
    pub ended_at: Option<String>,
    /// How far it is, or was at its end.
    pub progress: Option<Progress>,
    /// What was forecast before it was begun, if anything was.
    #[schema(value_type = Option<Object>)]
    pub forecast: Option<Value>,
    /// Why there is no snapshot.
    pub error: Option<OperationError>,
    /// What was found when the snapshot was read again; null if that was not asked for, or there is none.
    pub verification: Option<Verification>,
    /// When the daemon removed the snapshot, or found that it is there no longer.
    pub removed_at: Option<String>,
    /// What `livesnap snapshot --json` tells at the end. Not in lists.
    #[schema(value_type = Option<Object>)]
    pub result: Option<Value>,
}

impl Operation {
    /// Whether nothing more will come, also not of the snapshot's verification.
    pub fn is_settled(&self) -> bool {
        self.state.is_final() && !self.is_verified_as(VerificationState::Running)
    }

    /// Whether there is a snapshot that was completed and, if that was asked for, found sound.
    pub fn is_good(&self) -> bool {
        let is_sound = self.verification.is_none() || self.is_verified_as(VerificationState::Sound);
        self.state == State::Completed && is_sound
    }

    /// Whether its verification is in that state.
    pub fn is_verified_as(&self, state: VerificationState) -> bool {
        self.verification.as_ref().is_some_and(|verification| verification.state == state)
    }
}

/// What was found when a snapshot was read again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Verification {
    /// Where it is.
    pub state: VerificationState,
    /// When it ended.
    pub at: Option<String>,
    /// What is wrong with the snapshot.
    pub error: Option<OperationError>,
}

impl Verification {
    /// One that has yet to end.
    pub const fn begun() -> Self {
        Self { state: VerificationState::Running, at: None, error: None }
    }
}

/// Where a verification is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VerificationState {
    /// The snapshot is being read, or waits for that.
    Running,
    /// It is what was written.
    Sound,
    /// It is not, or it could not be read.
    Failed,
}

impl VerificationState {
    /// The word for people and programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Sound => "sound",
            Self::Failed => "failed",
        }
    }
}

/// How far an operation is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Progress {
    /// Length of RAM in bytes.
    pub total_bytes: u64,
    /// Bytes of it that are saved.
    pub saved_bytes: u64,
    /// Of these, bytes saved because the guest wanted to write there.
    pub fault_bytes: u64,
    /// Bytes of RAM that nobody has saved yet.
    pub remaining_bytes: u64,
    /// Bytes written to the RAM file.
    pub written_bytes: u64,
    /// Bytes of pages that have left the copy buffer.
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
    #[schema(value_type = Vec<Object>)]
    pub first_touches: Vec<FirstTouch>,
    /// Time that the handler took for them.
    #[schema(value_type = Option<Object>)]
    pub service: Option<Value>,
    /// Time since it was started, in nanoseconds.
    pub elapsed_ns: u64,
    /// What the controller does.
    #[schema(value_type = Option<Object>)]
    pub control: Option<Value>,
    /// How long the guest's writes waited since the consistency point, as probes saw it.
    #[schema(value_type = Option<Object>)]
    pub stalls: Option<Value>,
    /// Writes to the destination's disk since then, as probes saw them.
    #[schema(value_type = Option<Object>)]
    pub disk_writes: Option<Value>,
}

/// Why there is no snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OperationError {
    /// Stable word; docs/reasons.md has them all.
    #[schema(value_type = String)]
    pub reason: Reason,
    /// What failed, on what, why, and what to do.
    pub detail: String,
}

/// How a snapshot's process ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ended {
    /// There is a snapshot, and this is the report.
    Completed(Value),
    /// There is none.
    Without {
        /// Whether it was given up because its limits cannot be kept.
        is_given_up: bool,
        /// Why.
        error: OperationError,
        /// What was measured, if it came to that.
        result: Option<Value>,
    },
}

/// Whoever wants to know of each change of an operation.
pub trait Observer: Send {
    /// An operation is another than before: new, changed or forgotten. Must not wait for anything.
    fn changed(&mut self, before: Option<&Operation>, now: Option<&Operation>);
}

/// Now (RFC 3339).
pub fn timestamp() -> String {
    at(SystemTime::now())
}

/// A time (RFC 3339).
pub fn at(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// Reads such a time.
pub fn time(text: &str) -> Option<SystemTime> {
    humantime::parse_rfc3339(text).ok()
}
