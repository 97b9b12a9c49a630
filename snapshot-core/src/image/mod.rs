//! What a snapshot looks like on disk: written by the session, read by `verify`, `inspect` and `restore`.
//!
//! ```text
//! DIR/manifest.json       what it is: machine, RAM blocks, disks, and the checksums of everything below
//!     ram.mapped-ram      RAM and device state, a file that stock QEMU (>= 9.0) loads
//!     ram.crc32c          one CRC32C for each page
//!     device-state.bin    only for VMMs whose device state does not fit into the RAM file
//! ```
//!
//! [`FilePlan`] fixes the offsets before the first page is written, [`Staging`] collects the files where
//! nobody takes them for a snapshot and publishes them by one rename, [`Snapshot`] opens what was published.
//! [`reader`] parses the RAM file on its own, sharing no offset arithmetic with [`FilePlan`], so that each
//! checks the other. All of it runs on the caller's thread; only [`Snapshot::verify`] starts its own.

mod checksums;
mod device_state;
mod error;
mod format;
mod manifest;
mod plan;
pub mod reader;
mod snapshot;
mod staging;
mod verify;

use std::path::Path;

pub use error::ImageError;
pub use manifest::{
    BlockRecord, DiskFile, DiskRecord, FileRecord, FileStamp, Files, Manifest, RamRecord,
};
pub use plan::FilePlan;
pub use snapshot::Snapshot;
pub use staging::{SnapshotFacts, Staging};
pub use verify::VerifyReport;

/// Name of the RAM file in a snapshot's directory.
pub const RAM_FILE: &str = "ram.mapped-ram";
/// Name of the page checksums in a snapshot's directory.
pub const CHECKSUM_FILE: &str = "ram.crc32c";
/// Name of an opaque VMM's device state in a snapshot's directory.
pub const DEVICE_STATE_FILE: &str = "device-state.bin";
/// Name of the manifest in a snapshot's directory; without it there is no snapshot.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Bytes that an unprivileged process may still write to the file system that holds `path`.
///
/// # Errors
/// If the file system cannot be asked, for example because `path` does not exist.
pub fn free_bytes(path: &Path) -> Result<u64, ImageError> {
    let stat = rustix::fs::statvfs(path)
        .map_err(|errno| ImageError::io("ask for the free space at", path, errno))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests;
