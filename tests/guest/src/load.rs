//! The workers: each owns its pages and goes through them round-robin, checking every page before it
//! overwrites it.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use livesnap_guest::page::{
    Header, Kind, PAGE_BYTES, PAGE_WORDS, Page, Words, words_from_bytes, words_to_bytes,
};
use livesnap_guest::status::{Field, Status};
use rustix::fs::OFlags;

use crate::params::{Params, Pattern};

/// A worker with a rate looks at the clock once in this many pages.
const PACE_PAGES: u64 = 16;
/// Only so many inconsistencies are told in words; all are counted.
const REPORTS_MAX: u64 = 20;

/// What all threads share.
pub struct Shared {
    /// The published counters.
    pub status: Status,
    /// Longest time between two pages of one worker since this was last taken, in microseconds.
    pub worst_gap_us: AtomicU64,
    /// Inconsistencies that are not on the console yet.
    pub reports: Mutex<Vec<String>>,
}

impl Shared {
    pub const fn new() -> Self {
        Self {
            status: Status::new(),
            worst_gap_us: AtomicU64::new(0),
            reports: Mutex::new(Vec::new()),
        }
    }

    /// Counts an inconsistency, and keeps the first ones for the console.
    fn report(&self, what: &str, slot: u64, expected: &str, found: &str) {
        self.status.add_one(Field::Inconsistencies);
        if self.status.get(Field::Inconsistencies) <= REPORTS_MAX
            && let Ok(mut reports) = self.reports.lock()
        {
            reports.push(format!("{what} slot={slot} expected={expected} found={found}"));
        }
    }

    fn header(&self, kind: Kind, worker: usize, slot: u64, counter: u64) -> Header {
        Header {
            kind,
            worker,
            run: self.status.get(Field::Run),
            slot,
            counter,
            peers: self.status.progress(),
            disk_completed: self.status.get(Field::DiskCompleted),
        }
    }
}

/// Memory that was never touched: page-aligned, so that each of our pages is one page of guest RAM.
pub fn untouched_pages(count: usize) -> &'static mut [Words] {
    // Zeroed allocations of this size come straight from mmap; the allocator touches their first page only.
    let words = vec![0_u64; (count + 2) * PAGE_WORDS].leak();
    let aligned = words.as_ptr().align_offset(PAGE_BYTES);
    &mut words[aligned..].as_chunks_mut::<PAGE_WORDS>().0[1..=count]
}

/// Writes the pages that stay as they are.
pub fn populate(shared: &Shared, pages: &mut [Words]) {
    for (slot, page) in (0_u64..).zip(pages) {
        shared.header(Kind::Populate, 0, slot, 1).write(page);
    }
}

/// Checks the populated page `slot`.
pub fn check_populated(shared: &Shared, slot: u64, page: &Words) {
    check(shared, "populate", (Kind::Populate, 0, slot, 1), page);
}

/// A ring worker; never ends.
pub fn ring_worker(shared: &Shared, worker: usize, params: &Params, ring: &mut [Words]) -> ! {
    let slots = ring.len() as u64;
    let began = Instant::now();
    let mut last = began;
    for counter in 1_u64.. {
        let slot = slot_of(params.pattern, counter, slots);
        let page = &mut ring[usize::try_from(slot).unwrap_or(usize::MAX)];
        check(shared, "ring", (Kind::Ring, worker, slot, counter.saturating_sub(slots)), page);
        shared.header(Kind::Ring, worker, slot, counter).write(page);
        shared.status.set_progress(worker, counter);

        let now = Instant::now();
        let gap_us = u64::try_from((now - last).as_micros()).unwrap_or(u64::MAX);
        shared.worst_gap_us.fetch_max(gap_us, Ordering::Relaxed);
        last = now;
        if params.rate > 0 && counter % PACE_PAGES == 0 {
            let due =
                began + Duration::from_micros(counter.saturating_mul(1_000_000) / params.rate);
            thread::sleep(due.saturating_duration_since(now));
            last = Instant::now();
        }
    }
    unreachable!("a 64-bit counter does not run out");
}

/// Which slot the page `counter` goes to; each slot once in every `slots` counters.
fn slot_of(pattern: Pattern, counter: u64, slots: u64) -> u64 {
    // A prime beyond any ring: multiplying by it permutes the slots.
    const STRIDE: u64 = 2_654_435_761;
    let turn = (counter - 1) % slots;
    match pattern {
        Pattern::Sequential => turn,
        Pattern::Random => turn * STRIDE % slots,
    }
}

/// The disk that the disk worker writes to.
pub struct Disk {
    file: File,
    slots: u64,
}

/// What the kernel wants of an O_DIRECT buffer.
#[repr(align(4096))]
struct Block([u8; PAGE_BYTES]);

impl Disk {
    /// Opens the block device; at most its first `mib` MiB will be written.
    pub fn open(path: &str, mib: u64) -> Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::DIRECT.bits().cast_signed())
            .open(path)
            .with_context(|| format!("cannot open {path}"))?;
        let bytes = file
            .seek(SeekFrom::End(0))
            .with_context(|| format!("cannot tell the size of {path}"))?;
        let slots = (bytes / PAGE_BYTES as u64).min(mib << 8);
        ensure!(slots > 0, "{path} has {bytes} bytes, less than one block");
        Ok(Self { file, slots })
    }

    /// Blocks that are written round-robin.
    pub fn slots(&self) -> u64 {
        self.slots
    }

    /// The disk worker; ends only with an error of the disk.
    pub fn worker(&self, shared: &Shared) -> Result<()> {
        let mut block = Box::new(Block([0; PAGE_BYTES]));
        let mut words = [0; PAGE_WORDS];
        for counter in 1_u64.. {
            let slot = (counter - 1) % self.slots;
            let offset = slot * PAGE_BYTES as u64;
            // In the first lap the block may hold anything: another boot may have written it.
            if counter > self.slots {
                self.file
                    .read_exact_at(&mut block.0, offset)
                    .with_context(|| format!("cannot read disk block {slot}"))?;
                let old = words_from_bytes(&block.0).context("a block is not a page")?;
                check(shared, "disk", (Kind::Disk, 0, slot, counter - self.slots), &old);
            }
            shared.header(Kind::Disk, 0, slot, counter).write(&mut words);
            words_to_bytes(&words, &mut block.0);
            shared.status.set(Field::DiskSubmitted, counter);
            self.file
                .write_all_at(&block.0, offset)
                .with_context(|| format!("cannot write disk block {slot}"))?;
            shared.status.set(Field::DiskCompleted, counter);
        }
        Ok(())
    }
}

/// Checks that a page holds what was last written to it; counter 0 stands for "nothing yet".
fn check(
    shared: &Shared,
    what: &str,
    (kind, worker, slot, counter): (Kind, usize, u64, u64),
    words: &Words,
) {
    if counter == 0 {
        if words.iter().any(|&word| word != 0) {
            shared.report(what, slot, "zeros", &format!("{:#x}", words[0]));
        }
        return;
    }
    let run = shared.status.get(Field::Run);
    let found = match Page::read(words) {
        Some(Page::Whole(found))
            if (found.kind, found.worker, found.run, found.slot, found.counter)
                == (kind, worker, run, slot, counter) =>
        {
            return;
        }
        Some(Page::Whole(found)) => {
            format!("{:?}:w{}:{}:{}", found.kind, found.worker, found.slot, found.counter)
        }
        Some(Page::Torn(found)) => format!("torn:{}", found.counter),
        None => "foreign".to_owned(),
    };
    shared.report(&format!("{what} w{worker}"), slot, &counter.to_string(), &found);
}

#[cfg(test)]
mod tests {
    use livesnap_guest::page::WORKERS_MAX;

    use super::*;

    #[test]
    fn every_slot_comes_once_a_lap() {
        for pattern in [Pattern::Sequential, Pattern::Random] {
            for slots in [1, 2, 255, 256, 4096] {
                let mut seen: Vec<u64> = (slots + 1..=2 * slots)
                    .map(|counter| slot_of(pattern, counter, slots))
                    .collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..slots).collect::<Vec<_>>(), "{pattern:?} {slots}");
            }
        }
    }

    #[test]
    fn a_page_that_is_not_the_last_one_written_is_reported() {
        let shared = Shared::new();
        let mut words = [0; PAGE_WORDS];
        check(&shared, "ring", (Kind::Ring, 0, 3, 0), &words);
        shared.header(Kind::Ring, 0, 3, 7).write(&mut words);
        check(&shared, "ring", (Kind::Ring, 0, 3, 7), &words);
        assert_eq!(shared.status.get(Field::Inconsistencies), 0);
        check(&shared, "ring", (Kind::Ring, 0, 3, 8), &words);
        check(&shared, "ring", (Kind::Ring, 0, 3, 0), &words);
        words[100] ^= 1;
        check(&shared, "ring", (Kind::Ring, 0, 3, 7), &words);
        assert_eq!(shared.status.get(Field::Inconsistencies), 3);
    }

    #[test]
    fn pages_are_aligned_and_zero() {
        let pages = untouched_pages(3);
        assert_eq!(pages.len(), 3);
        assert_eq!(pages.as_ptr().align_offset(PAGE_BYTES), 0);
        assert!(pages.iter().flatten().all(|&word| word == 0));
    }

    #[test]
    fn progress_has_room_for_every_worker() {
        let shared = Shared::new();
        shared.status.set_progress(WORKERS_MAX - 1, 5);
        assert_eq!(shared.status.progress()[WORKERS_MAX - 1], 5);
    }
}
