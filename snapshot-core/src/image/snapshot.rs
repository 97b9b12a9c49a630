//! Opening a published snapshot: structure and agreement of its files, without reading their content.
//!
//! Runs on the caller's thread. The directory may come from anywhere; see `reader.rs` for what that means.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::address::PAGE_BYTES;
use crate::image::manifest::FileRecord;
use crate::image::reader::Stream;
use crate::image::{
    CHECKSUM_FILE, DEVICE_STATE_FILE, ImageError, MANIFEST_FILE, Manifest, RAM_FILE, checksums,
};
use crate::ram::PAGES_PER_WORD;

/// Longest manifest that is read: far more than 4096 blocks, a long command line and a report need.
const MANIFEST_BYTES_MAX: u64 = 16 << 20;

/// A snapshot on disk whose files are all there and agree with each other on what is where.
#[derive(Debug)]
pub struct Snapshot {
    dir: PathBuf,
    manifest: Manifest,
    pub(super) ram: File,
    pub(super) checksums: File,
    pub(super) device_state: Option<File>,
    pub(super) stream: Stream,
}

impl Snapshot {
    /// Opens the snapshot in the directory `dir`.
    ///
    /// # Errors
    /// If there is none, it is of a newer format, a file is missing, cut off or malformed, or files contradict each
    /// other. Content is not looked at: that is [`verify`](Self::verify).
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        let manifest = read_manifest(dir)?;
        let ram = open_file(&dir.join(RAM_FILE), manifest.files.ram)?;
        let checksums = open_file(&dir.join(CHECKSUM_FILE), manifest.files.checksums)?;
        let device_state = match manifest.files.device_state {
            Some(record) => Some(open_file(&dir.join(DEVICE_STATE_FILE), record)?),
            None => None,
        };
        let ram_bytes = manifest.files.ram.len_bytes;
        let stream = Stream::read(&ram, ram_bytes)
            .and_then(|stream| stream.check_ending(&ram, ram_bytes).map(|()| stream))
            .map_err(|source| ImageError::Stream { path: dir.join(RAM_FILE), source })?;
        let snapshot = Self { dir: dir.into(), manifest, ram, checksums, device_state, stream };
        snapshot.compare_structure()?;
        snapshot.compare_checksum_header()?;
        Ok(snapshot)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The RAM file, which QEMU loads.
    #[must_use]
    pub fn ram_path(&self) -> PathBuf {
        self.dir.join(RAM_FILE)
    }

    /// What the snapshot is.
    #[must_use]
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Whether the RAM file says what the manifest says.
    fn compare_structure(&self) -> Result<(), ImageError> {
        let contradiction = |problem| ImageError::Contradiction { path: self.ram_path(), problem };
        let expected = &self.manifest.machine.machine_type;
        if self.stream.machine_type != *expected {
            let found = &self.stream.machine_type;
            return Err(contradiction(format!("machine type is {found:?}, not {expected:?}")));
        }
        let ram = &self.manifest.ram;
        let blocks = &self.stream.blocks;
        if ram.page_bytes != PAGE_BYTES || blocks.len() != ram.blocks.len() {
            return Err(contradiction(format!(
                "it has {} RAM blocks with pages of {PAGE_BYTES} bytes, not {} with {}",
                blocks.len(),
                ram.blocks.len(),
                ram.page_bytes
            )));
        }
        for (found, expected) in blocks.iter().zip(&ram.blocks) {
            let same = found.id == expected.id
                && found.len_bytes == expected.len_bytes
                && found.bitmap_offset == expected.bitmap_offset
                && found.pages_offset == expected.pages_offset;
            if !same {
                return Err(contradiction(format!(
                    "RAM block {:?} of {} bytes at {} stands where {:?} of {} bytes at {} should",
                    found.id,
                    found.len_bytes,
                    found.pages_offset,
                    expected.id,
                    expected.len_bytes,
                    expected.pages_offset
                )));
            }
        }
        Ok(())
    }

    /// Whether the checksum file is one, for as many pages as there are.
    fn compare_checksum_header(&self) -> Result<(), ImageError> {
        let path = self.dir.join(CHECKSUM_FILE);
        let slots = self.page_slots();
        let expected_bytes = checksums::file_bytes(slots).unwrap_or(u64::MAX);
        let actual_bytes = self.manifest.files.checksums.len_bytes;
        if expected_bytes != actual_bytes {
            return Err(ImageError::WrongLength { path, expected_bytes, actual_bytes });
        }
        let expected = checksums::header(slots);
        let mut found = expected;
        self.checksums
            .read_exact_at(&mut found, 0)
            .map_err(|error| ImageError::io("read", &path, error))?;
        if found != expected {
            let problem = "its header is not that of a checksum file for this RAM".into();
            return Err(ImageError::Contradiction { path, problem });
        }
        Ok(())
    }

    /// Number of page slots: each block starts at a multiple of 64.
    fn page_slots(&self) -> u64 {
        self.stream.blocks.iter().map(|b| b.pages().next_multiple_of(PAGES_PER_WORD)).sum()
    }
}

fn read_manifest(dir: &Path) -> Result<Manifest, ImageError> {
    let path = dir.join(MANIFEST_FILE);
    let (file, len_bytes) = match open_regular(&path) {
        Err(ImageError::MissingFile { .. }) => {
            return Err(ImageError::NotASnapshot { path: dir.into() });
        }
        other => other?,
    };
    if len_bytes > MANIFEST_BYTES_MAX {
        let problem = format!("it is {len_bytes} bytes long, more than {MANIFEST_BYTES_MAX}");
        return Err(ImageError::BadManifest { path, problem });
    }
    let mut bytes = Vec::new();
    file.take(MANIFEST_BYTES_MAX)
        .read_to_end(&mut bytes)
        .map_err(|error| ImageError::io("read", &path, error))?;
    Manifest::decode(&path, &bytes)
}

/// Opens `path` and checks its length.
fn open_file(path: &Path, record: FileRecord) -> Result<File, ImageError> {
    let (file, actual_bytes) = open_regular(path)?;
    let expected_bytes = record.len_bytes;
    if actual_bytes != expected_bytes {
        return Err(ImageError::WrongLength { path: path.into(), expected_bytes, actual_bytes });
    }
    Ok(file)
}

/// Opens `path`, which must be a regular file, and tells its length in bytes.
fn open_regular(path: &Path) -> Result<(File, u64), ImageError> {
    // A FIFO would otherwise make open wait for a writer.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file =
        OpenOptions::new().read(true).custom_flags(nonblocking).open(path).map_err(|error| {
            match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                    ImageError::MissingFile { path: path.into() }
                }
                _ => ImageError::io("open", path, error),
            }
        })?;
    let metadata = file.metadata().map_err(|error| ImageError::io("look at", path, error))?;
    if !metadata.is_file() {
        let problem = "it is no regular file".into();
        return Err(ImageError::Contradiction { path: path.into(), problem });
    }
    Ok((file, metadata.len()))
}
