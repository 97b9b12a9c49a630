//! How fast a destination takes what a snapshot would write there: measured by writing, for a moment.
//!
//! Written as the engine writes: by the same `storage`, from the same kind of buffers, as many writes in
//! flight. The file has lost its name before the first byte, so that nothing is left however this ends. What is written is
//! random, because file systems and disks may be faster with what they can compress.
//!
//! A moment cannot show a cache that is used up later, as in many SSDs, nor what others will ask of the disk. Runs on the
//! caller's thread.

use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Cancel;
use crate::address::{PAGE_BYTES, as_index};
use crate::dirty_rate::Random;
use crate::image::{self, ImageError, Staging};
use crate::session::nanos;
use crate::storage::{self, DEPTH, Storage};
use crate::sys::memory::{HUGE_BYTES, HugeBuffer};
use crate::sys::uring::Write;

/// What is written first, in four writes: little enough for the slowest disk.
const FIRST_BYTES: u64 = 128 << 10;
/// Each round writes so many times as much as the one before, if there is time.
const GROWTH: u64 = 4;
/// Writes of a round at least, as long as they are smaller than a buffer: its halves are compared.
const WRITES_MIN: u64 = 4;
/// Of what is free at the destination, one part in so many is written at most.
const FREE_DIVISOR: u64 = 4;
/// Least relative error: a disk is no steadier than this.
const ERROR_RATIO_MIN: f64 = 0.1;

/// How long and how much to write.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For about so long; a disk that takes longer for the first writes is waited for.
    pub time: Duration,
    /// At most so many bytes, and at most a quarter of what is free.
    pub bytes: u64,
    /// What the snapshot is to be kept to: no more is written in the time, and no more is told.
    pub bytes_per_second: Option<NonZeroU64>,
}

impl Limits {
    /// At most so many bytes, where so many are free.
    fn bytes(&self, free_bytes: u64) -> u64 {
        let bytes = self.bytes.min(free_bytes / FREE_DIVISOR);
        self.bytes_per_second.map_or(bytes, |rate| {
            let allowed = whole_pages(rate.get() as f64 * self.time.as_secs_f64());
            bytes.min(allowed.max(FIRST_BYTES))
        })
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Bandwidth {
    /// Bytes per second, of the last and longest round of writes.
    pub bytes_per_second: f64,
    /// By how much its halves differ, and at least a tenth.
    pub error_bytes_per_second: f64,
    /// Written altogether.
    pub written_bytes: u64,
    /// How long that took, in nanoseconds.
    pub elapsed_ns: u64,
    /// How it was written, as in a snapshot's report.
    pub storage: &'static str,
}

impl Bandwidth {
    /// The same if no more than `limit` is wanted.
    fn at_most(self, limit: Option<NonZeroU64>) -> Self {
        let Some(limit) = limit.map(|limit| limit.get() as f64) else { return self };
        let least = (self.bytes_per_second - self.error_bytes_per_second).min(limit);
        let most = (self.bytes_per_second + self.error_bytes_per_second).min(limit);
        Self {
            bytes_per_second: f64::midpoint(least, most),
            error_bytes_per_second: (most - least) / 2.0,
            ..self
        }
    }
}

/// Measures where a snapshot into `destination` would be written; nothing if it was cancelled.
///
/// # Errors
/// If `destination` is none for a snapshot, or cannot be written to.
pub fn measure(
    destination: &Path,
    limits: Limits,
    cancel: &Cancel,
) -> Result<Option<Bandwidth>, ImageError> {
    let staging = Staging::create(destination)?;
    let path = staging.ram_path();
    let failed =
        |source: io::Error| ImageError::io("measure the bandwidth by writing", &path, source);
    let free_bytes = image::free_bytes(&path)?;
    let bytes_max = limits.bytes(free_bytes) / PAGE_BYTES * PAGE_BYTES;
    if bytes_max < FIRST_BYTES {
        return Err(failed(io::ErrorKind::StorageFull.into()));
    }
    let mut storage = storage::open(&path, bytes_max).map_err(failed)?;
    fs::remove_file(&path).map_err(failed)?;
    drop(staging);
    let source = Source { buffers: Vec::new(), random: Random::new(bytes_max) };
    let mut bench = Bench { storage: &mut *storage, source, offset: 0, cancel };
    let began = Instant::now();
    let mut bytes = FIRST_BYTES;
    loop {
        let Some(round) = bench.write(bytes).map_err(failed)? else { return Ok(None) };
        let left = limits.time.saturating_sub(began.elapsed()).as_secs_f64();
        let in_time = whole_pages(round.bytes_per_second * left);
        let next = (bytes * GROWTH).min(in_time).min(bytes_max - bench.offset);
        if next < bytes {
            let measured = Bandwidth {
                bytes_per_second: round.bytes_per_second,
                error_bytes_per_second: round.error,
                written_bytes: bench.offset,
                elapsed_ns: nanos(began.elapsed()),
                storage: bench.storage.name(),
            };
            return Ok(Some(measured.at_most(limits.bytes_per_second)));
        }
        bytes = next;
    }
}

struct Bench<'a> {
    storage: &'a mut dyn Storage,
    source: Source,
    /// Where the next write goes.
    offset: u64,
    cancel: &'a Cancel,
}

struct Round {
    bytes_per_second: f64,
    error: f64,
}

impl Bench<'_> {
    /// Writes so many bytes and waits until they are written; nothing if it was cancelled.
    fn write(&mut self, bytes: u64) -> io::Result<Option<Round>> {
        let size =
            (bytes / WRITES_MIN / PAGE_BYTES * PAGE_BYTES).clamp(PAGE_BYTES, HUGE_BYTES as u64);
        self.source.prepare(as_index(bytes.div_ceil(size)).min(DEPTH as usize))?;
        let began = Instant::now();
        let (mut started, mut done, mut half) = (0, 0, None);
        // Buffers that no write is in flight from.
        let mut free: Vec<usize> = (0..self.source.buffers.len()).collect();
        while done < bytes {
            if self.cancel.is_cancelled() {
                return Ok(None);
            }
            if started < bytes
                && let Some(buffer) = free.pop()
            {
                let len = size.min(bytes - started);
                self.submit(buffer, len)?;
                started += len;
                continue;
            }
            let Some(token) = self.storage.complete(true)? else { break };
            let (buffer, len) = (token >> u32::BITS, token & u64::from(u32::MAX));
            free.push(as_index(buffer));
            done += len;
            if half.is_none() && done >= bytes / 2 {
                half = Some((done, began.elapsed()));
            }
        }
        let whole = began.elapsed();
        let (half_bytes, half_time) = half.unwrap_or((done, whole));
        let first = rate(half_bytes, half_time);
        let second = rate(done - half_bytes, whole - half_time);
        let bytes_per_second = rate(done, whole);
        let error = ((first - second).abs() / 2.0).max(ERROR_RATIO_MIN * bytes_per_second);
        Ok(Some(Round { bytes_per_second, error: error.min(bytes_per_second) }))
    }

    fn submit(&mut self, buffer: usize, len: u64) -> io::Result<()> {
        let memory = self.source.fresh(buffer);
        let token = (buffer as u64) << u32::BITS | len;
        let file_offset = self.offset;
        self.offset += len;
        self.storage.submit(Write { token, memory, range: 0..as_index(len), file_offset })
    }
}

/// Random bytes, no page of them twice.
struct Source {
    buffers: Vec<Arc<HugeBuffer>>,
    random: Random,
}

impl Source {
    /// Has so many buffers.
    fn prepare(&mut self, count: usize) -> io::Result<()> {
        while self.buffers.len() < count {
            let mut buffer = HugeBuffer::new()?;
            for word in buffer.as_chunks_mut().0 {
                *word = self.random.below(u64::MAX).to_ne_bytes();
            }
            self.buffers.push(Arc::new(buffer));
        }
        Ok(())
    }

    /// A buffer that no write is in flight from, with other pages than before.
    fn fresh(&mut self, number: usize) -> Arc<HugeBuffer> {
        let buffer = &mut self.buffers[number];
        if let Some(buffer) = Arc::get_mut(buffer) {
            for page in buffer.as_chunks_mut::<{ as_index(PAGE_BYTES) }>().0 {
                page[..8].copy_from_slice(&self.random.below(u64::MAX).to_ne_bytes());
            }
        }
        Arc::clone(buffer)
    }
}

#[expect(clippy::cast_precision_loss, reason = "nothing near 2^53 bytes is written")]
fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64().max(1e-6)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
const fn whole_pages(bytes: f64) -> u64 {
    bytes as u64 / PAGE_BYTES * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;

    const LIMITS: Limits =
        Limits { time: Duration::from_millis(200), bytes: 64 << 20, bytes_per_second: None };

    #[test]
    fn a_disk_is_measured_and_left_as_it_was() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let found = measure(&dir.path().join("snapshot"), LIMITS, &Cancel::default()).unwrap();
        let found = found.unwrap();
        assert!(found.written_bytes >= FIRST_BYTES && found.written_bytes <= LIMITS.bytes);
        let mean = rate(found.written_bytes, Duration::from_nanos(found.elapsed_ns));
        // Waiting between rounds is not counted, filling buffers neither.
        assert!(found.bytes_per_second > 0.5 * mean, "{found:?}: {mean}");
        assert!(found.error_bytes_per_second >= 0.1 * found.bytes_per_second, "{found:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_kept_to_a_limit_is_not_measured_beyond_it() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let limits = Limits { bytes_per_second: NonZeroU64::new(1 << 20), ..LIMITS };
        let found = measure(&dir.path().join("snapshot"), limits, &Cancel::default()).unwrap();
        let found = found.unwrap();
        assert!(found.written_bytes <= 1 << 20, "{found:?}");
        assert!(found.bytes_per_second + found.error_bytes_per_second <= 1_048_577.0, "{found:?}");
    }

    #[test]
    fn a_cancelled_one_and_one_that_cannot_be_leave_nothing() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let cancel = Cancel::default();
        cancel.cancel();
        assert_eq!(measure(&dir.path().join("snapshot"), LIMITS, &cancel).unwrap(), None);
        let missing = dir.path().join("missing/snapshot");
        let error = measure(&missing, LIMITS, &cancel).unwrap_err();
        assert_eq!(error.reason(), crate::Reason::BadDestination, "{error}");
        let least = Limits { bytes: FIRST_BYTES - 1, ..LIMITS };
        let error = measure(&dir.path().join("snapshot"), least, &cancel).unwrap_err();
        assert_eq!(error.reason(), crate::Reason::NoSpace, "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_written_does_not_compress() {
        let mut source = Source { buffers: Vec::new(), random: Random::new(1) };
        source.prepare(1).unwrap();
        let pages = |memory: &HugeBuffer| {
            let mut pages = memory.as_chunks::<4096>().0.to_vec();
            pages.sort_unstable();
            pages
        };
        let first = pages(&source.fresh(0));
        let again = pages(&source.fresh(0));
        let mut all = [first, again].concat();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 1024, "some page came twice");
        let mut seen = [0_u32; 256];
        all[0].iter().for_each(|&byte| seen[usize::from(byte)] += 1);
        assert!(seen.iter().all(|&count| count < 50), "{seen:?}");
    }
}
