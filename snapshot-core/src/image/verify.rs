//! Checking a snapshot's content: every stored page, everything else in its files, and its disk images.
//!
//! ```text
//! caller's thread   metadata, checksum file, device state, disks; then progress
//! worker threads    pieces of RAM in ascending order: bitmap, checksums, pages
//! ```
//!
//! A worker ends at the first bad page it finds. Pieces are handed out in ascending order and always finished,
//! so the lowest of those is the first bad page of the snapshot.

use std::fs::File;
use std::num::NonZero;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};

use crate::address::PAGE_BYTES;
use crate::image::manifest::{FileRecord, FileStamp, resolve};
use crate::image::plan::index;
use crate::image::reader::StreamBlock;
use crate::image::{CHECKSUM_FILE, DEVICE_STATE_FILE, ImageError, Snapshot, checksums};
use crate::ram::PAGES_PER_WORD;

/// Pages that a worker takes on at a time: 64 MiB of RAM. A multiple of 64.
const PIECE_PAGES: u64 = 16 * 1024;
/// Pages read by one system call.
const READ_PAGES: u64 = 256;
/// Bytes read at a time where there are no pages.
const READ_BYTES: u64 = 1 << 20;
/// Workers; more only queue at the disk.
const THREADS_MAX: usize = 8;

/// What was found to be sound.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct VerifyReport {
    /// Pages that match their checksums.
    pub pages: u64,
    /// Their length in bytes.
    pub page_bytes: u64,
    /// Length of the RAM that the snapshot describes, in bytes.
    pub ram_bytes: u64,
    /// Files of disks that have the length and the modification time they had at the commit.
    pub disk_files: usize,
    /// Files of disks that nothing is recorded about, such as block devices.
    pub disk_files_unchecked: Vec<std::path::PathBuf>,
}

/// A part of a block's pages.
#[derive(Clone, Copy)]
struct Piece<'a> {
    block: &'a StreamBlock,
    /// Slot of the block's first page in the checksum file.
    first_slot: u64,
    /// First page and number of pages, within the block.
    first: u64,
    count: u64,
}

impl Snapshot {
    /// Checks everything that a restore reads, and the disk images that belong to it.
    ///
    /// `progress` is called now and then with the bytes of pages done and to do. Bytes between the parts of the RAM
    /// file, and in the places of pages that are not stored, are not looked at: nobody reads them.
    ///
    /// # Errors
    /// With the first thing that is not sound; if it is a page, with the first such page.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport, ImageError> {
        self.verify_metadata()?;
        let files = &self.manifest().files;
        verify_file(&self.checksums, &self.dir().join(CHECKSUM_FILE), files.checksums)?;
        if let (Some(file), Some(record)) = (&self.device_state, files.device_state) {
            verify_file(file, &self.dir().join(DEVICE_STATE_FILE), record)?;
        }
        let (disk_files, disk_files_unchecked) = self.check_disks()?;
        self.verify_pages(progress)?;
        let ram = &self.manifest().ram;
        Ok(VerifyReport {
            pages: ram.stored_bytes() / PAGE_BYTES,
            page_bytes: ram.stored_bytes(),
            ram_bytes: ram.total_bytes(),
            disk_files,
            disk_files_unchecked,
        })
    }

    /// Headers, bitmaps and trailer of the RAM file.
    fn verify_metadata(&self) -> Result<(), ImageError> {
        let path = self.ram_path();
        let record = self.manifest().files.ram;
        let first = self.stream.blocks.first().map_or(0, |block| block.header_offset);
        let mut actual = 0;
        checksum(&self.ram, &path, 0..first, &mut |bytes| {
            actual = crc32c::crc32c_append(actual, bytes);
        })?;
        let mut stored_pages = Vec::new();
        for block in &self.stream.blocks {
            checksum(&self.ram, &path, block.header_offset..block.bitmap_offset, &mut |bytes| {
                actual = crc32c::crc32c_append(actual, bytes);
            })?;
            let mut stored = 0_u64;
            let bitmap = block.bitmap_offset..block.bitmap_offset + block.bitmap_bytes();
            checksum(&self.ram, &path, bitmap, &mut |bytes| {
                actual = crc32c::crc32c_append(actual, bytes);
                stored += bytes.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
            })?;
            stored_pages.push(stored);
        }
        checksum(&self.ram, &path, self.stream.trailer_offset..record.len_bytes, &mut |bytes| {
            actual = crc32c::crc32c_append(actual, bytes);
        })?;
        compare("the part that is not pages", &path, record.crc32c, actual)?;
        for (block, stored) in self.manifest().ram.blocks.iter().zip(stored_pages) {
            if block.stored_pages != stored {
                let problem = format!(
                    "block {:?} stores {stored} pages, not {}",
                    block.id, block.stored_pages
                );
                return Err(ImageError::Contradiction { path, problem });
            }
        }
        Ok(())
    }

    /// Checks that the disk images are there and nobody wrote to them; counts those checked, lists the others.
    ///
    /// # Errors
    /// With the first image that is not what it was.
    pub fn check_disks(&self) -> Result<(usize, Vec<std::path::PathBuf>), ImageError> {
        let working_dir = self.manifest().machine.working_dir.as_deref();
        let mut checked = 0;
        let mut unchecked = Vec::new();
        for file in self.manifest().disks.iter().flat_map(|disk| &disk.files) {
            let path = resolve(&file.path, working_dir);
            match file.stamp {
                Some(expected) => {
                    verify_disk_file(&path, expected)?;
                    checked += 1;
                }
                None => unchecked.push(path),
            }
        }
        Ok((checked, unchecked))
    }

    fn verify_pages(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), ImageError> {
        let pieces = Mutex::new(self.pieces().enumerate());
        let total = self.manifest().ram.stored_bytes();
        let stop = AtomicBool::new(false);
        let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
        let (report, reports) = mpsc::channel();
        let work = |report: mpsc::Sender<(usize, Result<u64, ImageError>)>| {
            while !stop.load(Ordering::Relaxed) {
                let next = pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((number, piece)) = next else { return };
                let outcome = self.verify_piece(piece);
                stop.fetch_or(outcome.is_err(), Ordering::Relaxed);
                if report.send((number, outcome)).is_err() {
                    return;
                }
            }
        };
        let mut first_error: Option<(usize, ImageError)> = None;
        std::thread::scope(|scope| {
            for _ in 0..cpus.min(THREADS_MAX) {
                let (report, work) = (report.clone(), &work);
                scope.spawn(move || work(report));
            }
            drop(report);
            let mut done = 0;
            progress(done, total);
            for (number, outcome) in reports {
                match outcome {
                    Ok(bytes) => {
                        done += bytes;
                        progress(done, total);
                    }
                    Err(error) => {
                        if first_error.as_ref().is_none_or(|&(other, _)| number < other) {
                            first_error = Some((number, error));
                        }
                    }
                }
            }
        });
        first_error.map_or(Ok(()), |(_, error)| Err(error))
    }

    /// All pages, in pieces, in the order of the file.
    fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let first_slots = self.stream.blocks.iter().scan(0, |slots, block| {
            let first = *slots;
            *slots += block.pages().next_multiple_of(PAGES_PER_WORD);
            Some(first)
        });
        self.stream.blocks.iter().zip(first_slots).flat_map(|(block, first_slot)| {
            (0..block.pages().div_ceil(PIECE_PAGES)).map(move |piece| {
                let first = piece * PIECE_PAGES;
                Piece { block, first_slot, first, count: PIECE_PAGES.min(block.pages() - first) }
            })
        })
    }

    /// Checks the stored pages of `piece`; returns their length in bytes.
    fn verify_piece(&self, piece: Piece<'_>) -> Result<u64, ImageError> {
        let block = piece.block;
        let ram_path = self.ram_path();
        let read = |file: &File, path: &Path, bytes: u64, offset: u64| {
            let mut out = vec![0; index(bytes)];
            file.read_exact_at(&mut out, offset)
                .map_err(|error| ImageError::io("read", path, error))?;
            Ok::<_, ImageError>(out)
        };
        let bitmap = read(
            &self.ram,
            &ram_path,
            piece.count.div_ceil(PAGES_PER_WORD) * 8,
            block.bitmap_offset + piece.first / 8,
        )?;
        let expected = read(
            &self.checksums,
            &self.dir().join(CHECKSUM_FILE),
            piece.count * checksums::SLOT_BYTES,
            checksums::HEADER_BYTES + (piece.first_slot + piece.first) * checksums::SLOT_BYTES,
        )?;
        let stored = |page: u64| bitmap[index(page / 8)] >> (page % 8) & 1 == 1;
        let mut buffer = vec![0; index(READ_PAGES * PAGE_BYTES)];
        let mut done = 0;
        let mut page = 0;
        while page < piece.count {
            if !stored(page) {
                page += 1;
                continue;
            }
            let limit = piece.count.min(page + READ_PAGES);
            let end = (page..limit).find(|&page| !stored(page)).unwrap_or(limit);
            let content = &mut buffer[..index((end - page) * PAGE_BYTES)];
            let offset = block.pages_offset + (piece.first + page) * PAGE_BYTES;
            self.ram
                .read_exact_at(content, offset)
                .map_err(|error| ImageError::io("read", &ram_path, error))?;
            let (crcs, _) = expected.as_chunks::<4>();
            let crcs = &crcs[index(page)..index(end)];
            for ((number, content), &crc) in
                (page..).zip(content.chunks_exact(index(PAGE_BYTES))).zip(crcs)
            {
                let (expected, actual) = (u32::from_le_bytes(crc), crc32c::crc32c(content));
                if expected != actual {
                    return Err(ImageError::BadPage {
                        path: ram_path,
                        block: block.id.clone(),
                        page: piece.first + number,
                        offset: block.pages_offset + (piece.first + number) * PAGE_BYTES,
                        expected,
                        actual,
                    });
                }
            }
            done += (end - page) * PAGE_BYTES;
            page = end;
        }
        Ok(done)
    }
}

/// Checks the whole of `file`.
fn verify_file(file: &File, path: &Path, record: FileRecord) -> Result<(), ImageError> {
    let mut actual = 0;
    checksum(file, path, 0..record.len_bytes, &mut |bytes| {
        actual = crc32c::crc32c_append(actual, bytes);
    })?;
    compare("the content", path, record.crc32c, actual)
}

fn compare(what: &'static str, path: &Path, expected: u32, actual: u32) -> Result<(), ImageError> {
    if expected == actual {
        return Ok(());
    }
    Err(ImageError::BadChecksum { what, path: path.into(), expected, actual })
}

/// Reads `range` of `file` and hands it to `each`, a bounded part at a time.
fn checksum(
    file: &File,
    path: &Path,
    range: Range<u64>,
    each: &mut dyn FnMut(&[u8]),
) -> Result<(), ImageError> {
    let mut at = range.start;
    let mut buffer = vec![0; index(READ_BYTES.min(range.end.saturating_sub(at)))];
    while at < range.end {
        let part = &mut buffer[..index(READ_BYTES.min(range.end - at))];
        file.read_exact_at(part, at).map_err(|error| ImageError::io("read", path, error))?;
        each(part);
        at += part.len() as u64;
    }
    Ok(())
}

fn verify_disk_file(path: &Path, expected: FileStamp) -> Result<(), ImageError> {
    let changed = |problem| ImageError::DiskChanged { path: path.into(), problem };
    let actual = match FileStamp::of(path) {
        Ok(Some(actual)) => actual,
        Ok(None) => return Err(changed("is no longer a regular file".into())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(changed("is missing".into()));
        }
        Err(error) => return Err(ImageError::io("look at", path, error)),
    };
    if actual.len_bytes != expected.len_bytes {
        let (now, then) = (actual.len_bytes, expected.len_bytes);
        return Err(changed(format!("is {now} bytes long, not {then}")));
    }
    if actual != expected {
        return Err(changed("was written to after the snapshot".into()));
    }
    Ok(())
}
