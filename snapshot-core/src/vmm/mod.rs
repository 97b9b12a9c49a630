//! What the engine needs of a virtual machine monitor.

pub mod attach;
mod fd_passing;
pub mod guard;
pub mod qemu;
#[cfg(test)]
pub(crate) mod testing;

use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Reason;
use crate::mappings::{MappingError, RamMapping, covering};
use crate::ram::RamLayout;

/// A virtual machine monitor whose guest can be snapshotted.
///
/// All calls come from the thread that runs the session, in the order of the way below; none may wait
/// without a time limit. From [`resume`](Vmm::resume) on, and already from the first
/// `WRITEPROTECT`, any thread of the VMM that writes guest RAM may sleep until the engine's fault
/// threads serve it, so an implementation must not make *those* wait for itself.
///
/// ```text
/// describe, ram_layout, ram_mappings                        guest running
/// userfaultfd × n, prepare_disks                            guest running
/// prepare_pause                                             guest running, RAM protected
/// pause, device_state, switch_disks, resume                 the pause
/// check × n, check_saved                                    guest running, RAM being copied
/// finish(outcome)                                           always the last call
/// ```
pub trait Vmm: Send {
    /// The process that owns the RAM: this one for an embedder, the VMM's for an attached one.
    fn pid(&self) -> rustix::process::Pid;

    /// What the virtual machine is, for the manifest.
    ///
    /// # Errors
    /// If the VMM cannot be asked.
    fn describe(&mut self) -> Result<MachineDescription, VmmError>;

    /// All RAM that belongs to the snapshot.
    ///
    /// # Errors
    /// If the VMM cannot be asked or its answer is not understood.
    fn ram_layout(&mut self) -> Result<RamLayout, VmmError>;

    /// What stands behind the blocks of `layout` in the process that owns them. An implementation that has looked
    /// already hands that out, for looking takes long.
    ///
    /// # Errors
    /// As [`covering`].
    fn ram_mappings(&mut self, layout: &RamLayout) -> Result<Vec<RamMapping>, MappingError> {
        covering(self.pid(), layout)
    }

    /// A new userfaultfd of the process that owns the RAM, non-blocking, before `UFFDIO_API`. No copy of
    /// it may stay in that process or any other.
    ///
    /// # Errors
    /// If it cannot be created.
    fn userfaultfd(&mut self) -> Result<OwnedFd, VmmError>;

    /// Does, while the guest runs, what the disk snapshot needs beforehand.
    ///
    /// # Errors
    /// If a disk cannot take part.
    fn prepare_disks(&mut self) -> Result<(), VmmError>;

    /// Does, while the guest still runs, what would otherwise make the pause longer, such as flushing disks.
    ///
    /// # Errors
    /// If the virtual machine is not what it was when it was described.
    fn prepare_pause(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    /// Stops all virtual CPUs and device emulation, drains disk I/O, and tells what was found.
    ///
    /// The implementation makes sure by means outside this process that a guest found running runs
    /// again even if this process dies before [`resume`](Vmm::resume).
    ///
    /// # Errors
    /// If the virtual machine did not stop; it then runs on.
    fn pause(&mut self) -> Result<RunState, VmmError>;

    /// Saves device state. The virtual machine is paused.
    ///
    /// # Errors
    /// If the VMM refuses; the session then resumes it and fails.
    fn device_state(&mut self) -> Result<DeviceState, VmmError>;

    /// Takes the disk snapshot, atomically over all disks. The virtual machine is paused.
    ///
    /// # Errors
    /// If the VMM refuses; no disk is then switched.
    fn switch_disks(&mut self) -> Result<DiskSnapshot, VmmError>;

    /// Lets the virtual machine run on, if [`pause`](Vmm::pause) found it running; repeating it does
    /// no harm.
    ///
    /// # Errors
    /// If the VMM does not answer or refuses.
    fn resume(&mut self) -> Result<(), VmmError>;

    /// How long the virtual CPUs stood still in the pause that [`resume`](Vmm::resume) has just ended, by the VMM's own
    /// clock, where it tells.
    fn stood_still(&self) -> Option<Duration> {
        None
    }

    /// Looks, without waiting, for what would spoil the snapshot while RAM is being copied: the
    /// process ended, pages given to a balloon, and so on.
    ///
    /// # Errors
    /// With what was seen.
    fn check(&mut self) -> Result<(), VmmError>;

    /// Looks for the last time: all RAM is saved, and nothing that was given back to the host before may have been
    /// missed. May ask what is too much for each [`check`](Vmm::check).
    ///
    /// # Errors
    /// With what was seen.
    fn check_saved(&mut self) -> Result<(), VmmError> {
        self.check()
    }

    /// The session is over: RAM is unprotected, the guest resumed. Undoes what was prepared but is not
    /// needed any more; after a failure also merges the overlays back.
    ///
    /// # Errors
    /// If something had to be left behind; the message says what, and how to remove it.
    fn finish(&mut self, outcome: Outcome) -> Result<(), VmmError>;
}

/// Whether the session brought forth a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The snapshot is committed; disks stay on their overlays.
    Completed,
    /// There is no snapshot.
    Failed,
}

/// Whether virtual CPUs were running when the pause began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// They were.
    Running,
    /// The owner had paused it; it stays paused.
    Paused,
}

/// What a virtual machine is: enough to check that another one can take its snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// Kind of VMM, such as `qemu`.
    pub vmm: String,
    /// Its version, such as `10.0.2`.
    pub version: String,
    /// Machine type with its version, such as `pc-q35-10.0`; part of the image file.
    pub machine_type: String,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// The VMM's argument list; empty where there is none.
    pub command_line: Vec<String>,
    /// The VMM's working directory, to which relative paths in `command_line` refer.
    pub working_dir: Option<std::path::PathBuf>,
}

/// Device state, as the VMM saved it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// QEMU migration sections, to be placed behind RAM in the mapped-ram file, without the file header and
    /// the end mark: what `xen-save-devices-state` writes from byte 8 up to the last one.
    QemuSections(Vec<u8>),
    /// Bytes that only the VMM understands; kept in a file of their own.
    Opaque(Vec<u8>),
}

/// The disks at the consistency point.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSnapshot {
    /// True if disks were left out on request, so that RAM and disks do not fit together.
    pub left_out: bool,
    /// Every writable disk.
    pub disks: Vec<Disk>,
}

/// One disk: the image that holds its content at the consistency point, and the overlay on which the guest
/// went on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// How the VMM names the device, such as `virtio0` or a QOM path.
    pub device: String,
    /// Node that was on top before the snapshot.
    pub node: String,
    /// Image with the content at the consistency point: nobody may write to it any more.
    pub image: std::path::PathBuf,
    /// Its format, such as `raw` or `qcow2`.
    pub image_format: String,
    /// Backing files of `image`, nearest first.
    pub backing_chain: Vec<std::path::PathBuf>,
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// Image on which the guest runs since.
    pub overlay: std::path::PathBuf,
}

/// What went wrong with a VMM: a stable reason, and the implementation's own error, whose text is shown.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct VmmError {
    /// Stable code.
    pub reason: Reason,
    /// One sentence: what failed, on what, why, what to do.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl VmmError {
    /// An error whose text is `source`'s.
    pub fn new(
        reason: Reason,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { reason, source: source.into() }
    }
}
