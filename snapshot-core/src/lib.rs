//! Point-in-time snapshots of running virtual machines.
//!
//! RAM is write-protected with userfaultfd while the guest runs; inside one short pause the device
//! state and the disks are taken and the remainder of RAM is protected; from then on a guest's first
//! write to a page waits until the page's old content has been copied out, and a background sweep
//! saves everything else. See `ARCHITECTURE.md` for the map of this crate and its invariants.

#![warn(missing_docs)]
#![deny(unsafe_code)]

pub mod address;
pub mod image;
pub mod mappings;
pub mod ram;
pub mod reason;
#[allow(unsafe_code, reason = "the one place where system calls are made on raw addresses")]
mod sys;
pub mod vmm;

pub use reason::Reason;
