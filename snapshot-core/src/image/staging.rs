//! The partial directory: where a snapshot grows, and how it becomes one.
//!
//! ```text
//! create    .NAME.livesnap-partial/            locked; holds an empty RAM file
//! (engine)  pages at their places
//! commit    headers, bitmaps, trailer, checksums, device state     fsync each
//!           manifest.json.partial -> fsync -> rename -> fsync directory
//!           .NAME.livesnap-partial -> NAME     fsync parent
//! drop      without commit: the partial directory is removed
//! ```
//!
//! The session's thread owns it. The lock on the directory tells a live partial from one that a killed
//! process left behind: the kernel frees it with the process.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::address::PAGE_BYTES;
use crate::image::manifest::{FileRecord, Files, disk_records, unix_ms};
use crate::image::{
    BlockRecord, CHECKSUM_FILE, DEVICE_STATE_FILE, FilePlan, ImageError, MANIFEST_FILE, Manifest,
    RAM_FILE, RamRecord, checksums, device_state,
};
use crate::ram::RamLayout;
use crate::vmm::{DeviceState, DiskSnapshot, MachineDescription, RunState};

/// A snapshot holds the guest's memory, with all its secrets: only the owner may read it.
const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// How often a partial directory may vanish between being opened and being locked.
const ATTEMPTS_MAX: u32 = 16;

/// Page checksums that are encoded and written at a time.
const CHECKSUMS_PER_WRITE: usize = 64 * 1024;

/// What the manifest tells besides what the tables do.
#[derive(Clone, Debug)]
pub struct SnapshotFacts {
    /// The virtual machine.
    pub machine: MachineDescription,
    /// Whether the guest was running.
    pub run_state: RunState,
    /// The disks at the consistency point.
    pub disks: DiskSnapshot,
    /// The consistency point.
    pub taken_at: SystemTime,
    /// What was measured.
    pub report: serde_json::Value,
}

/// A snapshot that is being written.
#[derive(Debug)]
pub struct Staging {
    destination: PathBuf,
    parent: PathBuf,
    /// Where the files are: under its own name, from the rename on under that of `destination`.
    partial: PathBuf,
    /// Open on `partial`; holds the lock.
    lock: OwnedFd,
    /// Whether `partial` has become `destination`.
    committed: bool,
}

impl Staging {
    /// Starts a snapshot that shall become the directory `destination`.
    ///
    /// `destination` must not exist or be an empty directory, and its parent must exist. The RAM file is made
    /// empty.
    ///
    /// # Errors
    /// If `destination` is unsuitable, another process is writing to it, or the file system refuses.
    pub fn create(destination: &Path) -> Result<Self, ImageError> {
        let bad = |problem| ImageError::Destination { path: destination.into(), problem };
        let name = destination.file_name().ok_or_else(|| {
            bad("names no directory: give the path of one that does not exist yet")
        })?;
        let parent = match destination.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let parent = fs::canonicalize(parent).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => bad("lies in a directory that does not exist: create it"),
            _ => ImageError::io("open the directory above", destination, error),
        })?;
        let destination = parent.join(name);
        check_destination(&parent, &destination)?;
        let mut partial_name = std::ffi::OsString::from(".");
        partial_name.push(name);
        partial_name.push(".livesnap-partial");
        let partial = parent.join(partial_name);
        let lock = lock_partial(&destination, &partial)?;
        let staging = Self { destination, parent, partial, lock, committed: false };
        staging.clear()?;
        create_file(&staging.ram_path())?;
        Ok(staging)
    }

    /// The RAM file: exists and is empty; the engine opens it and writes pages where the plan says.
    #[must_use]
    pub fn ram_path(&self) -> PathBuf {
        self.partial.join(RAM_FILE)
    }

    /// The directory that the snapshot will be, absolute.
    #[must_use]
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Completes the files and publishes the snapshot.
    ///
    /// Pages must be at their places, as far as the kernel is concerned: this makes them durable. `stored` has a
    /// bit, and `checksums` the page's CRC32C or 0, for each page slot of `layout`.
    ///
    /// # Errors
    /// If the tables contradict the layout or the file system refuses. There is no snapshot then, and the partial
    /// directory is removed.
    pub fn commit(
        mut self,
        layout: &RamLayout,
        plan: &FilePlan,
        stored: &[u64],
        checksums: &[u32],
        device_state: &DeviceState,
        facts: SnapshotFacts,
    ) -> Result<Manifest, ImageError> {
        check_tables(layout, plan, stored, checksums)?;
        // Everything that the manifest vouches for is durable before the manifest is written, and the manifest
        // before the directory gets its name: after a crash at any point, what bears the name is whole.
        let files = Files {
            ram: self.finish_ram(plan, stored, device_state, facts.run_state)?,
            checksums: self.write_checksums(checksums)?,
            device_state: self.write_device_state(device_state)?,
        };
        let working_dir = facts.machine.working_dir.clone();
        let manifest = Manifest {
            livesnap_version: env!("CARGO_PKG_VERSION").into(),
            taken_at_unix_ms: unix_ms(facts.taken_at),
            committed_at_unix_ms: unix_ms(SystemTime::now()),
            machine: facts.machine,
            run_state: facts.run_state,
            ram: ram_record(layout, plan, stored),
            disks_left_out: facts.disks.left_out,
            disks: disk_records(facts.disks, working_dir.as_deref()),
            files,
            report: facts.report,
        };
        self.write_manifest(&manifest)?;
        self.publish()?;
        Ok(manifest)
    }

    /// Writes what is not a page into the RAM file.
    fn finish_ram(
        &self,
        plan: &FilePlan,
        stored: &[u64],
        device_state: &DeviceState,
        run_state: RunState,
    ) -> Result<FileRecord, ImageError> {
        let path = self.ram_path();
        let file = OpenOptions::new()
            .write(true)
            .open(&path)
            .map_err(|error| ImageError::io("open", &path, error))?;
        let trailer = match (device_state, run_state) {
            (DeviceState::QemuSections(sections), RunState::Running) => FilePlan::trailer(sections),
            (DeviceState::QemuSections(sections), RunState::Paused) => {
                FilePlan::trailer(&device_state::mark_paused(sections)?)
            }
            (DeviceState::Opaque(_), _) => FilePlan::trailer(&[]),
        };
        let len_bytes = plan.trailer_offset() + trailer.len() as u64;
        file.set_len(len_bytes)
            .map_err(|error| ImageError::io("set the length of", &path, error))?;
        let mut crc32c = 0;
        let parts = plan.metadata(stored).chain(std::iter::once((plan.trailer_offset(), trailer)));
        for (offset, bytes) in parts {
            file.write_all_at(&bytes, offset)
                .map_err(|error| ImageError::io("write to", &path, error))?;
            crc32c = crc32c::crc32c_append(crc32c, &bytes);
        }
        sync(&file, &path)?;
        Ok(FileRecord { len_bytes, crc32c })
    }

    fn write_checksums(&self, checksums: &[u32]) -> Result<FileRecord, ImageError> {
        let path = self.partial.join(CHECKSUM_FILE);
        let mut file = create_file(&path)?;
        let mut record = FileRecord { len_bytes: 0, crc32c: 0 };
        let mut put = |bytes: &[u8]| {
            record.len_bytes += bytes.len() as u64;
            record.crc32c = crc32c::crc32c_append(record.crc32c, bytes);
            file.write_all(bytes).map_err(|error| ImageError::io("write to", &path, error))
        };
        put(&checksums::header(checksums.len() as u64))?;
        for part in checksums.chunks(CHECKSUMS_PER_WRITE) {
            let bytes: Vec<u8> = part.iter().flat_map(|crc| crc.to_le_bytes()).collect();
            put(&bytes)?;
        }
        sync(&file, &path)?;
        Ok(record)
    }

    fn write_device_state(&self, state: &DeviceState) -> Result<Option<FileRecord>, ImageError> {
        let DeviceState::Opaque(bytes) = state else { return Ok(None) };
        let path = self.partial.join(DEVICE_STATE_FILE);
        self.write_file(&path, bytes)?;
        Ok(Some(FileRecord { len_bytes: bytes.len() as u64, crc32c: crc32c::crc32c(bytes) }))
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<(), ImageError> {
        let path = self.partial.join(MANIFEST_FILE);
        let bytes = manifest.encode().map_err(|error| ImageError::Inconsistent {
            what: format!("the manifest is no JSON ({error})"),
        })?;
        // Renamed into place, so that even a copy of the partial directory never shows half a manifest.
        let unfinished = self.partial.join(format!("{MANIFEST_FILE}.partial"));
        self.write_file(&unfinished, &bytes)?;
        fs::rename(&unfinished, &path)
            .map_err(|error| ImageError::io("rename", &unfinished, error))?;
        rustix::fs::fsync(&self.lock).map_err(|errno| ImageError::io("sync", &self.partial, errno))
    }

    /// Creates a small file with all its content, durably.
    fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
        let mut file = create_file(path)?;
        file.write_all(bytes).map_err(|error| ImageError::io("write to", path, error))?;
        sync(&file, path)
    }

    /// Gives the directory its name.
    fn publish(&mut self) -> Result<(), ImageError> {
        // rename(2) of a directory replaces an empty one and fails on everything else, in one step: what
        // appeared there since the start is never overwritten.
        let parent = File::open(&self.parent)
            .map_err(|error| ImageError::io("open", &self.parent, error))?;
        fs::rename(&self.partial, &self.destination).map_err(|error| match error.kind() {
            io::ErrorKind::DirectoryNotEmpty
            | io::ErrorKind::AlreadyExists
            | io::ErrorKind::NotADirectory => occupied(&self.destination),
            _ => ImageError::io("rename the finished snapshot to", &self.destination, error),
        })?;
        // Should the last step fail, what bears the name already is no snapshot and goes with the rest.
        self.partial.clone_from(&self.destination);
        sync(&parent, &self.parent)?;
        self.committed = true;
        Ok(())
    }

    /// Removes what a killed process left in the partial directory.
    fn clear(&self) -> Result<(), ImageError> {
        let failed = |error| ImageError::io("clear the stale directory", &self.partial, error);
        for entry in fs::read_dir(&self.partial).map_err(failed)? {
            fs::remove_file(entry.map_err(failed)?.path()).map_err(failed)?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.partial) {
            tracing::warn!(
                path = %self.partial.display(), %error,
                "could not remove the partial snapshot; the next one to the same destination will"
            );
        }
    }
}

/// Refuses what could not be renamed over at the end, before work is put into it.
fn check_destination(parent: &Path, destination: &Path) -> Result<(), ImageError> {
    let bad = |problem| ImageError::Destination { path: destination.into(), problem };
    let metadata = match fs::symlink_metadata(destination) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ImageError::io("look at", destination, error)),
    };
    if !metadata.is_dir() {
        return Err(occupied(destination));
    }
    let above = fs::metadata(parent).map_err(|error| ImageError::io("look at", parent, error))?;
    if above.dev() != metadata.dev() {
        return Err(bad(
            "is a mount point, which cannot be renamed over: name a directory inside it",
        ));
    }
    let mut entries =
        fs::read_dir(destination).map_err(|error| ImageError::io("list", destination, error))?;
    if entries.next().is_some() {
        return Err(occupied(destination));
    }
    Ok(())
}

fn occupied(destination: &Path) -> ImageError {
    ImageError::Destination {
        path: destination.into(),
        problem: "exists and is not an empty directory, and is never overwritten: choose another or remove it",
    }
}

/// Makes the partial directory, or takes over a stale one, and locks it.
fn lock_partial(destination: &Path, partial: &Path) -> Result<OwnedFd, ImageError> {
    for _ in 0..ATTEMPTS_MAX {
        match fs::DirBuilder::new().mode(DIR_MODE).create(partial) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(cannot_create(destination, partial, error)),
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let lock = match rustix::fs::open(partial, flags, Mode::empty()) {
            Ok(lock) => lock,
            Err(rustix::io::Errno::NOENT) => continue,
            Err(errno) => return Err(ImageError::io("open", partial, errno)),
        };
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => break,
            Err(errno) => return Err(ImageError::io("lock", partial, errno)),
        }
        // Its owner may have renamed or removed it before the lock came free.
        if same_file(&lock, partial)? {
            return Ok(lock);
        }
    }
    Err(ImageError::Busy { path: destination.into(), partial: partial.into() })
}

fn cannot_create(destination: &Path, partial: &Path, error: io::Error) -> ImageError {
    let bad = |problem| ImageError::Destination { path: destination.into(), problem };
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            bad("lies on a read-only file system: choose another place")
        }
        io::ErrorKind::PermissionDenied => {
            bad("lies in a directory that livesnap may not write to: choose another place")
        }
        _ => ImageError::io("create", partial, error),
    }
}

/// Whether `path` still leads to the directory that `fd` is open on.
fn same_file(fd: &OwnedFd, path: &Path) -> Result<bool, ImageError> {
    let failed = |errno| ImageError::io("look at", path, errno);
    let held = rustix::fs::fstat(fd).map_err(failed)?;
    match rustix::fs::lstat(path) {
        Ok(named) => Ok(held.st_dev == named.st_dev && held.st_ino == named.st_ino),
        Err(rustix::io::Errno::NOENT) => Ok(false),
        Err(errno) => Err(failed(errno)),
    }
}

fn create_file(path: &Path) -> Result<File, ImageError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(FILE_MODE)
        .open(path)
        .map_err(|error| ImageError::io("create", path, error))
}

fn sync(file: &File, path: &Path) -> Result<(), ImageError> {
    file.sync_all().map_err(|error| ImageError::io("sync", path, error))
}

/// Checks what the engine hands over before anything is written from it.
fn check_tables(
    layout: &RamLayout,
    plan: &FilePlan,
    stored: &[u64],
    checksums: &[u32],
) -> Result<(), ImageError> {
    let wrong = |what| Err(ImageError::Inconsistent { what });
    let slots = layout.page_slots();
    if plan.blocks() != layout.blocks().len()
        || stored.len() as u64 * 64 != slots
        || checksums.len() as u64 != slots
    {
        return wrong(format!(
            "plan has {} blocks of {}, bitmap {} words and checksums {} entries for {slots} page slots",
            plan.blocks(),
            layout.blocks().len(),
            stored.len(),
            checksums.len()
        ));
    }
    for (number, block) in layout.blocks().iter().enumerate() {
        let words = block_words(layout, number, stored);
        let beyond = block.pages() % 64;
        let last = words.last().copied().unwrap_or(0);
        if beyond != 0 && last >> beyond != 0 {
            return wrong(format!("bitmap has pages behind the end of block {:?}", block.id));
        }
        // The loader would keep what it finds there.
        if block.store_zero_pages && count_pages(words) != block.pages() {
            return wrong(format!("block {:?} must be stored whole and is not", block.id));
        }
    }
    Ok(())
}

/// The bitmap words of block number `block`.
fn block_words<'a>(layout: &RamLayout, block: usize, stored: &'a [u64]) -> &'a [u64] {
    let run = layout.block_run(block);
    let first = super::plan::index(run.first.0 / 64);
    &stored[first..first + super::plan::index(run.count.div_ceil(64))]
}

fn count_pages(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

fn ram_record(layout: &RamLayout, plan: &FilePlan, stored: &[u64]) -> RamRecord {
    let blocks = layout.blocks().iter().enumerate().map(|(number, block)| BlockRecord {
        id: block.id.clone(),
        len_bytes: block.len_bytes,
        page_size_bytes: block.page_size_bytes,
        bitmap_offset: plan.bitmap_offset(number),
        pages_offset: plan.pages_offset(number),
        stored_pages: count_pages(block_words(layout, number, stored)),
    });
    RamRecord { page_bytes: PAGE_BYTES, blocks: blocks.collect() }
}
