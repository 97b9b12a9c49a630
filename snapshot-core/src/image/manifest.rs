//! `manifest.json`: what a snapshot is, and the checksums of its files.
//!
//! ```json
//! {"format": 1, "crc32c": "1b2c3d4e", "snapshot": { ... }}
//! ```
//!
//! `crc32c` covers the bytes of `snapshot` as they stand in the file, so that any altered bit of the manifest
//! is found. A reader refuses a `format` it does not know; fields are only added together with a new one, except
//! within `report`, which is open.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::image::ImageError;
use crate::vmm::{Disk, DiskSnapshot, MachineDescription, RunState};

/// Version of the manifest that this livesnap writes and reads.
pub const FORMAT: u64 = 1;

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the livesnap that wrote it.
    pub livesnap_version: String,
    /// The consistency point, in milliseconds since 1970 UTC.
    pub taken_at_unix_ms: u64,
    /// When it was committed, in milliseconds since 1970 UTC.
    pub committed_at_unix_ms: u64,
    /// The virtual machine.
    pub machine: MachineDescription,
    /// Whether the guest was running; it restores the same way.
    pub run_state: RunState,
    /// RAM blocks, in the order of the RAM file.
    pub ram: RamRecord,
    /// True if disks were left out on request, so that RAM and disks do not fit together.
    pub disks_left_out: bool,
    /// The disks.
    pub disks: Vec<DiskRecord>,
    /// The files of the snapshot.
    pub files: Files,
    /// What was measured while it was taken; for people and tools, not needed to restore.
    pub report: serde_json::Value,
}

/// RAM as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamRecord {
    /// Bytes of a page of the file.
    pub page_bytes: u64,
    /// The blocks.
    pub blocks: Vec<BlockRecord>,
}

impl RamRecord {
    /// Length of all blocks, in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.blocks.iter().fold(0, |sum, block| sum.saturating_add(block.len_bytes))
    }

    /// Bytes of the pages that are stored.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let pages = self.blocks.iter().fold(0_u64, |sum, b| sum.saturating_add(b.stored_pages));
        pages.saturating_mul(self.page_bytes)
    }
}

/// One RAM block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockRecord {
    /// Block id, such as `pc.ram`.
    pub id: String,
    /// Used length in bytes. QEMU does not check it when it loads, so a restore must.
    pub len_bytes: u64,
    /// Page size of the memory behind it when the snapshot was taken, in bytes.
    pub page_size_bytes: u64,
    /// Offset of the bitmap in the RAM file.
    pub bitmap_offset: u64,
    /// Offset of the first page in the RAM file.
    pub pages_offset: u64,
    /// Pages that are stored; all others are zero.
    pub stored_pages: u64,
}

/// A disk, and how its image can be told from an altered one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The disk at the consistency point.
    #[serde(flatten)]
    pub disk: Disk,
    /// The image, then its backing chain.
    pub files: Vec<DiskFile>,
}

/// A file of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskFile {
    /// Its path; a relative one starts at the VMM's working directory.
    pub path: PathBuf,
    /// What it was at the commit; nothing if it is no regular file, such as a block device, and cannot be told
    /// from an altered one.
    pub stamp: Option<FileStamp>,
}

/// By what a later write to a file is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileStamp {
    /// Length in bytes.
    pub len_bytes: u64,
    /// Time of the last modification, whole seconds since 1970 UTC.
    pub modified_unix_s: i64,
    /// Its nanoseconds.
    pub modified_ns: i64,
}

/// The files of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// The RAM file; the checksum covers what is not a page: headers, bitmaps and trailer, in this order.
    pub ram: FileRecord,
    /// The page checksums.
    pub checksums: FileRecord,
    /// Device state, where it is not part of the RAM file.
    pub device_state: Option<FileRecord>,
}

/// A file's length and checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Length in bytes.
    pub len_bytes: u64,
    /// CRC32C.
    pub crc32c: u32,
}

/// The outermost object, on the way out and in.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    format: u64,
    crc32c: String,
    snapshot: Box<RawValue>,
}

/// All that is read of a manifest before its format is known.
#[derive(Deserialize)]
struct FormatOnly {
    format: u64,
}

impl Manifest {
    /// The bytes of `manifest.json`.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let snapshot = RawValue::from_string(serde_json::to_string_pretty(self)?)?;
        let crc32c = format!("{:08x}", crc32c::crc32c(snapshot.get().as_bytes()));
        let mut out = serde_json::to_vec(&Envelope { format: FORMAT, crc32c, snapshot })?;
        out.push(b'\n');
        Ok(out)
    }

    /// Reads `bytes`, which came from `path`.
    pub(crate) fn decode(path: &Path, bytes: &[u8]) -> Result<Self, ImageError> {
        let bad = |problem: String| ImageError::BadManifest { path: path.into(), problem };
        let not_json = |error: serde_json::Error| bad(format!("it cannot be parsed ({error})"));
        let FormatOnly { format } = serde_json::from_slice(bytes).map_err(not_json)?;
        if format != FORMAT {
            return Err(ImageError::UnknownFormat { path: path.into(), format });
        }
        let envelope: Envelope = serde_json::from_slice(bytes).map_err(not_json)?;
        let snapshot = envelope.snapshot.get();
        let actual = format!("{:08x}", crc32c::crc32c(snapshot.as_bytes()));
        if actual != envelope.crc32c {
            let expected = envelope.crc32c;
            return Err(bad(format!("its CRC32C is {actual} instead of {expected}")));
        }
        serde_json::from_str(snapshot).map_err(not_json)
    }
}

impl DiskRecord {
    /// Notes what `disk`'s files are like now.
    pub(crate) fn new(disk: Disk, working_dir: Option<&Path>) -> Self {
        let paths = std::iter::once(&disk.image).chain(&disk.backing_chain);
        let files = paths
            .map(|path| {
                let stamp = FileStamp::of(&resolve(path, working_dir)).ok().flatten();
                DiskFile { path: path.clone(), stamp }
            })
            .collect();
        Self { disk, files }
    }
}

/// All disks, with what their files are like now.
pub fn disk_records(disks: DiskSnapshot, working_dir: Option<&Path>) -> Vec<DiskRecord> {
    disks.disks.into_iter().map(|disk| DiskRecord::new(disk, working_dir)).collect()
}

impl FileStamp {
    /// What the file at `path` is like now; nothing if it is no regular file.
    pub(crate) fn of(path: &Path) -> std::io::Result<Option<Self>> {
        use std::os::unix::fs::MetadataExt as _;
        let metadata = std::fs::metadata(path)?;
        Ok(metadata.is_file().then(|| Self {
            len_bytes: metadata.len(),
            modified_unix_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        }))
    }
}

/// `path` as seen from the VMM's working directory.
pub(super) fn resolve(path: &Path, working_dir: Option<&Path>) -> PathBuf {
    working_dir.map_or_else(|| path.into(), |dir| dir.join(path))
}

/// Milliseconds since 1970 UTC; clocks before that count as 1970.
pub fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
