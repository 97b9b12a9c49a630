//! Point-in-time snapshots of running virtual machines.
//!
//! RAM is write-protected with userfaultfd while the guest runs; inside one short pause the device
//! state and the disks are taken and the remainder of RAM is protected; from then on a guest's first
//! write to a page waits until the page's old content has been copied out, and a background sweep
//! saves everything else. See `ARCHITECTURE.md` for the map of this crate and its invariants.
//!
//! A stock QEMU is reached through its QMP socket:
//!
//! ```no_run
//! use std::path::Path;
//!
//! use snapshot_core::vmm::qemu::{QemuOptions, QemuVmm};
//! use snapshot_core::{Cancel, Options, snapshot};
//!
//! let mut vmm = QemuVmm::attach(QemuOptions::new("/run/vm1/qmp.sock".into()))?;
//! let directory = Path::new("/backup/vm1");
//! let mut observe = |progress: &_| eprintln!("{progress:?}");
//! let report =
//!     snapshot(&mut vmm, directory, &Options::default(), &Cancel::default(), &mut observe)?;
//! eprintln!("the guest stood still for {} ns", report.downtime.total_ns);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The program that does so must also be able to run as the guard ([`vmm::guard::main`]), by default when it is called with the
//! one argument `guard`.
//!
//! Any other virtual machine monitor implements [`Vmm`](vmm::Vmm); `examples/own_memory.rs` does so for a process that
//! snapshots its own memory, and runs without any virtual machine. [`image::Snapshot`] opens and checks what was taken.

#![warn(missing_docs)]
#![deny(unsafe_code)]

pub mod address;
mod arm;
pub mod bandwidth;
mod buffer;
mod capture;
mod chunk;
pub mod dirty_rate;
mod fault;
mod first_touch;
pub mod footprint;
mod histogram;
pub mod host;
pub mod image;
pub mod mappings;
mod pace;
mod pagemap;
mod priority;
mod protection;
pub mod ram;
pub mod reason;
mod report;
mod session;
mod storage;
mod sweep;
mod sync;
#[allow(unsafe_code, reason = "the one place where system calls are made on raw addresses")]
mod sys;
pub mod vmm;
pub mod workload;
mod writer;

pub use capture::CaptureError;
pub use first_touch::FirstTouch;
pub use histogram::{Distribution, Summary};
pub use pace::BandwidthLimit;
pub use priority::stand_back;
pub use protection::RegisterError;
pub use reason::Reason;
pub use report::{Captured, Downtime, Phase, Progress, Report};
#[cfg(feature = "controls")]
pub use session::Controls;
pub use session::{
    Abort, BUFFER_BYTES_MIN, BufferLimit, Cancel, Cause, Options, SessionError, snapshot,
};
#[cfg(feature = "test-guest")]
pub use sys::test_kvm::{KvmGuest, kvm};
#[cfg(feature = "test-guest")]
pub use sys::test_memory::{Kind as TestMemoryKind, TestMemory};
pub use sys::uffd::create_local as userfaultfd;
