//! What there is to be seen of a virtual machine that nobody snapshots: what it is, what would refuse a snapshot of it, and
//! what one may have left behind. That is seen in its process, also if it does not answer: a thread of QEMU may wait for
//! memory that was left protected.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Pid;
use serde::Serialize;
use snapshot_core::Reason;
use snapshot_core::mappings::{RamMapping, covering};
use snapshot_core::ram::RamLayout;
use snapshot_core::vmm::RunState;
use snapshot_core::vmm::qemu::preflight::Survey;
use snapshot_core::vmm::qemu::{QemuError, QemuOptions, survey};
use utoipa::ToSchema;

use super::operation::{OperationError, timestamp};
use crate::actuator;
use crate::process::ProcessId;
use crate::units::number;

/// A machine that does not answer for so long is not waited for when it is only looked at.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

/// Images below the one that the guest writes to with which no schedule adds one more. Each costs QEMU memory and an open
/// file, and a read of what is in none of them asks all.
const BACKING_IMAGES_MAX: usize = 64;

/// What was seen of a virtual machine.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Seen {
    /// When (RFC 3339).
    pub at: String,
    /// Its state.
    pub state: VmState,
    /// What it is, if it answered.
    pub machine: Option<Machine>,
    /// What would refuse a snapshot, and what to do about it.
    pub refusals: Vec<Hindrance>,
    /// Guest memory under userfaultfd, in bytes. As no snapshot of the daemon's was running, it is another program's, or was
    /// left behind. Null if it does not answer, and the daemon has not seen its process before.
    pub protected_bytes: Option<u64>,
    /// Share of their CPU time that livesnap's quotas withhold from the virtual CPUs, on an average; the same holds.
    pub throttle_ratio: Option<f64>,
    /// Why it could not be asked.
    pub error: Option<OperationError>,
    /// Where to look when it does not answer.
    #[serde(skip)]
    pub(super) body: Option<Arc<Body>>,
}

/// The process of a virtual machine, as it was when that last answered.
#[derive(Debug)]
pub(super) struct Body {
    process: ProcessId,
    layout: RamLayout,
    cpu_threads: Vec<Pid>,
}

/// A virtual machine's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Its virtual CPUs run.
    Running,
    /// Somebody has paused it.
    Paused,
    /// Neither: it cannot be snapshotted now.
    Other,
    /// It does not answer.
    Unreachable,
}

/// What a virtual machine is.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Machine {
    /// Machine type with its version.
    machine_type: String,
    /// Version of QEMU.
    qemu_version: String,
    /// Process id of QEMU.
    pid: i32,
    /// Virtual CPUs.
    cpus: u32,
    /// RAM in bytes.
    memory_bytes: u64,
    /// Disks that a snapshot would switch to overlays.
    disks: usize,
    /// Images below the one that the guest writes to, of the disk that has most.
    backing_images: usize,
}

/// Something that would refuse a snapshot.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Hindrance {
    /// Stable word.
    #[schema(value_type = String)]
    reason: Reason,
    /// What was found.
    what: String,
    /// What to do about it.
    remedy: String,
}

/// Why a schedule leaves a virtual machine alone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// It does not answer.
    #[error("the virtual machine cannot be asked: {0}")]
    Unreachable(String),
    /// Nobody would stop a schedule from making chains ever longer.
    #[error(
        "a disk has {images} images below the one that the guest writes to, and each snapshot adds one: merge some, as \
         docs/disks.md tells, or have no_disks in the schedule's policy"
    )]
    Chain {
        /// How many.
        images: usize,
    },
}

impl Seen {
    /// Why a schedule would not have it snapshotted, with its disks or without.
    pub fn unfit(&self, is_without_disks: bool) -> Option<Unfit> {
        if let Some(error) = &self.error {
            return Some(Unfit::Unreachable(error.detail.clone()));
        }
        let images = self.machine.as_ref().map_or(0, |machine| machine.backing_images);
        let is_long = !is_without_disks && images >= BACKING_IMAGES_MAX;
        is_long.then_some(Unfit::Chain { images })
    }
}

impl Body {
    /// Nothing if its process ended meanwhile.
    fn of(survey: &Survey) -> Option<Self> {
        let process = ProcessId::of(survey.pid.as_raw_pid()).ok()?;
        let (layout, cpu_threads) = (survey.layout.clone(), survey.cpu_threads.clone());
        Some(Self { process, layout, cpu_threads })
    }

    /// What is protected and withheld in it; nothing if it has ended, or its memory is another by now.
    fn left(&self) -> Option<(u64, f64)> {
        let pid = Pid::from_raw(self.process.pid)?;
        let left = (
            protected_bytes(&covering(pid, &self.layout).ok()?),
            throttle_ratio(&self.cpu_threads),
        );
        // Asked last: if it runs now, its number was not another's just before.
        self.process.runs().then_some(left)
    }
}

fn protected_bytes(mappings: &[RamMapping]) -> u64 {
    let protected = mappings.iter().filter(|mapping| mapping.has_userfaultfd);
    protected.map(|mapping| mapping.len_bytes).sum()
}

/// Where there is no cpu controller, or a thread has just ended, nothing is withheld.
fn throttle_ratio(threads: &[Pid]) -> f64 {
    let ratios = threads.iter().map(|thread| actuator::withheld_ratio(*thread).unwrap_or(0.0));
    ratios.sum::<f64>() / number(threads.len().max(1) as u64)
}

/// Asks the machine behind a QMP socket, of which `before` was seen last; it is the caller's turn to talk to it.
pub fn look(qmp: &Path, before: Option<&Seen>) -> Seen {
    let options =
        QemuOptions { command_timeout: LOOK_LIMIT, ..QemuOptions::new(qmp.to_path_buf()) };
    match survey(&options) {
        Ok(survey) => Seen::answered(survey),
        Err(error) => Seen::silent(&error, before.and_then(|before| before.body.clone())),
    }
}

impl Seen {
    /// Of one that answers.
    fn answered(survey: Survey) -> Self {
        let body = Body::of(&survey).map(Arc::new);
        let below = survey.disks.iter().map(|disk| disk.backing_chain.len());
        let machine = Machine {
            machine_type: survey.machine.machine_type,
            qemu_version: survey.machine.version,
            pid: survey.pid.as_raw_pid(),
            cpus: survey.machine.cpus,
            memory_bytes: survey.layout.total_bytes(),
            disks: survey.disks.len(),
            backing_images: below.max().unwrap_or(0),
        };
        let refusals = survey.refusals.into_iter().map(|refusal| Hindrance {
            reason: refusal.reason,
            what: refusal.what,
            remedy: refusal.remedy,
        });
        Self {
            at: timestamp(),
            state: match survey.run_state {
                Some(RunState::Running) => VmState::Running,
                Some(RunState::Paused) => VmState::Paused,
                None => VmState::Other,
            },
            machine: Some(machine),
            refusals: refusals.collect(),
            protected_bytes: Some(protected_bytes(&survey.mappings)),
            throttle_ratio: Some(throttle_ratio(&survey.cpu_threads)),
            error: None,
            body,
        }
    }

    /// Of one that does not, and was `body` when it did.
    fn silent(error: &QemuError, body: Option<Arc<Body>>) -> Self {
        let left = body.as_ref().and_then(|body| body.left());
        Self {
            at: timestamp(),
            state: VmState::Unreachable,
            machine: None,
            refusals: Vec::new(),
            protected_bytes: left.map(|(protected_bytes, _)| protected_bytes),
            throttle_ratio: left.map(|(_, throttle_ratio)| throttle_ratio),
            error: Some(OperationError { reason: error.reason(), detail: error.to_string() }),
            body,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(backing_images: usize) -> Seen {
        let machine = Machine {
            machine_type: "pc-q35-10.0".into(),
            qemu_version: "10.0.2".into(),
            pid: 1,
            cpus: 1,
            memory_bytes: 0,
            disks: 1,
            backing_images,
        };
        Seen {
            at: timestamp(),
            state: VmState::Running,
            machine: Some(machine),
            refusals: Vec::new(),
            protected_bytes: Some(0),
            throttle_ratio: Some(0.0),
            error: None,
            body: None,
        }
    }

    #[test]
    fn no_schedule_makes_chains_ever_longer() {
        assert_eq!(seen(BACKING_IMAGES_MAX - 1).unfit(false), None);
        let images = BACKING_IMAGES_MAX;
        assert_eq!(seen(images).unfit(false), Some(Unfit::Chain { images }));
        assert_eq!(seen(images).unfit(true), None);
        let detail = "nobody is there".to_owned();
        let error = Some(OperationError { reason: Reason::VmmUnreachable, detail: detail.clone() });
        let lost = Seen { error, machine: None, ..seen(0) };
        assert_eq!(lost.unfit(true), Some(Unfit::Unreachable(detail)));
    }
}
