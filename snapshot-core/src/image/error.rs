//! Errors of the image on disk, with the reason code that programs see.

use std::io;
use std::path::{Path, PathBuf};

use crate::Reason;
use crate::image::manifest::FORMAT;
use crate::image::reader::StreamError;

/// Why an image could not be written, opened or trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A system call failed.
    #[error("could not {operation} {}: {source}", path.display())]
    Io {
        /// What was tried, to be followed by the path.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The destination cannot become a snapshot.
    #[error("destination {} {problem}", path.display())]
    Destination {
        /// The directory asked for.
        path: PathBuf,
        /// What is the matter with it, and what to do.
        problem: &'static str,
    },
    /// Another process is writing a snapshot to the same destination.
    #[error(
        "destination {} is being written by another livesnap (its lock on {} is held): choose another directory or wait for it to end",
        path.display(), partial.display()
    )]
    Busy {
        /// The directory asked for.
        path: PathBuf,
        /// The other's partial directory.
        partial: PathBuf,
    },
    /// A name does not fit into its length field.
    #[error("{what} {name:?} has {} bytes but the image file has room for {limit}: rename it", name.len())]
    NameTooLong {
        /// Kind of name.
        what: &'static str,
        /// The name.
        name: String,
        /// Longest possible, in bytes.
        limit: usize,
    },
    /// Offsets would exceed what a file can hold.
    #[error(
        "RAM of {total_bytes} bytes does not fit into a file: exclude blocks or use less memory"
    )]
    TooLarge {
        /// Length of all blocks together.
        total_bytes: u64,
    },
    /// What the engine handed over contradicts the layout; a defect of livesnap.
    #[error("{what}: this is a defect of livesnap, report it; no snapshot was made")]
    Inconsistent {
        /// What contradicts what.
        what: String,
    },
    /// A paused guest's device state cannot be marked as paused.
    #[error(
        "device state has {found} usable globalstate sections instead of one, so the paused guest would restore running: start QEMU with migration.store-global-state on"
    )]
    GlobalState {
        /// How many were found.
        found: usize,
    },
    /// There is no manifest.
    #[error(
        "{} holds no {MANIFEST}, so it is not a finished snapshot: give the directory that `livesnap snapshot --out` named",
        path.display(), MANIFEST = super::MANIFEST_FILE
    )]
    NotASnapshot {
        /// The directory.
        path: PathBuf,
    },
    /// The manifest is of a later livesnap.
    #[error(
        "snapshot {} has format {format} but this livesnap reads only {FORMAT}: use the livesnap that wrote it or a newer one",
        path.display()
    )]
    UnknownFormat {
        /// The directory.
        path: PathBuf,
        /// Its format number.
        format: u64,
    },
    /// The manifest cannot be read as one.
    #[error("{} is damaged: {problem}; take the snapshot from another copy", path.display())]
    BadManifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file of the snapshot is missing.
    #[error("snapshot is incomplete: {} is missing; take it from another copy", path.display())]
    MissingFile {
        /// The file.
        path: PathBuf,
    },
    /// A file does not have the recorded length.
    #[error(
        "{} is {actual_bytes} bytes long instead of {expected_bytes}, so it was cut off or written to; take it from another copy",
        path.display()
    )]
    WrongLength {
        /// The file.
        path: PathBuf,
        /// Length that the manifest records.
        expected_bytes: u64,
        /// Length found.
        actual_bytes: u64,
    },
    /// A file's structure is broken.
    #[error("{} is no sound mapped-ram file: {source}; take it from another copy", path.display())]
    Stream {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: StreamError,
    },
    /// A file says something else than the manifest.
    #[error("{} contradicts the manifest: {problem}; take both from another copy", path.display())]
    Contradiction {
        /// The file.
        path: PathBuf,
        /// Which value.
        problem: String,
    },
    /// A checksum over something that is not a page does not match.
    #[error(
        "{what} of {} has CRC32C {actual:#010x} instead of {expected:#010x}, so it was altered; take it from another copy",
        path.display()
    )]
    BadChecksum {
        /// Which part of the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Checksum on record.
        expected: u32,
        /// Checksum found.
        actual: u32,
    },
    /// A page does not match its checksum. It is the first one.
    #[error(
        "page {page} of RAM block {block:?} at offset {offset} of {} has CRC32C {actual:#010x} instead of {expected:#010x}, so it was altered; take it from another copy",
        path.display()
    )]
    BadPage {
        /// The RAM file.
        path: PathBuf,
        /// RAM block's id.
        block: String,
        /// Page's number within the block.
        page: u64,
        /// Where it lies in the file, in bytes.
        offset: u64,
        /// Checksum on record.
        expected: u32,
        /// Checksum found.
        actual: u32,
    },
    /// A disk image is not what it was at the consistency point.
    #[error(
        "disk image {} {problem}, so RAM and disk no longer fit together: restore the image from a copy, and let nobody write to it",
        path.display()
    )]
    DiskChanged {
        /// The image.
        path: PathBuf,
        /// What differs.
        problem: String,
    },
}

impl ImageError {
    /// An I/O error of `operation` on `path`.
    pub(crate) fn io(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { operation, path: path.into(), source: source.into() }
    }

    /// The stable reason code.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Reason::NoSpace,
                _ => Reason::Io,
            },
            Self::Destination { .. } | Self::Busy { .. } => Reason::BadDestination,
            Self::NameTooLong { .. } | Self::TooLarge { .. } => Reason::BadArgument,
            Self::Inconsistent { .. } => Reason::Internal,
            Self::GlobalState { .. } => Reason::NotMigratable,
            Self::NotASnapshot { .. } | Self::UnknownFormat { .. } => Reason::NotASnapshot,
            Self::Stream { source: StreamError::Read { .. }, .. } => Reason::Io,
            Self::BadManifest { .. }
            | Self::MissingFile { .. }
            | Self::WrongLength { .. }
            | Self::Stream { .. }
            | Self::Contradiction { .. }
            | Self::BadChecksum { .. }
            | Self::BadPage { .. }
            | Self::DiskChanged { .. } => Reason::Corrupt,
        }
    }
}
