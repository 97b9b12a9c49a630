//! From the copy buffer to storage: one thread that finds zero pages, computes checksums, and writes.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::address::{PAGE_BYTES, as_index};
use crate::buffer::Extent;
use crate::capture::{CaptureError, Counters, Engine, PanicReport};
use crate::image::FilePlan;
use crate::pace::Pace;
use crate::priority;
use crate::storage::{DEPTH, Storage};
use crate::sys::uring::Write;

const PAGE: usize = as_index(PAGE_BYTES);

/// Zero pages between two others that are written along rather than making two writes of one.
const ZERO_PAGES_WRITTEN_ALONG: usize = 8;

/// Longest rest of a writer that is kept to a rate before it looks whether the session has ended.
const REST_MAX: Duration = Duration::from_millis(10);

/// What is in the RAM file, page by page; indexed by [`PageIndex`](crate::address::PageIndex).
pub struct Stored {
    /// A bit for each page that the file holds, page 0 in bit 0 of word 0.
    pub bitmap: Vec<u64>,
    /// CRC32C of each page that the file holds, 0 for the others.
    pub checksums: Vec<u32>,
}

/// Writes what the buffer's queue brings until the buffer is closed and empty.
///
/// # Errors
/// None itself: a failure ends the engine, and the result is then not complete.
pub fn run(engine: &Engine, storage: &mut dyn Storage, plan: &FilePlan, pace: Pace) -> Stored {
    let _report = PanicReport { engine, thread: "writer" };
    priority::lower();
    let slots = as_index(engine.ram.layout.page_slots());
    let mut writer = Writer {
        engine,
        storage,
        plan,
        pace,
        stored: Stored { bitmap: vec![0; slots.div_ceil(64)], checksums: vec![0; slots] },
        in_flight: HashMap::with_capacity(DEPTH as usize),
        next_token: 0,
    };
    if let Err(source) = writer.drain_queue() {
        engine.fail(CaptureError::Storage { stage: "writing pages", source });
    }
    writer.give_up_rest();
    writer.stored
}

struct InFlight {
    extent: Extent,
    writes: usize,
    bytes: u64,
}

struct Writer<'a> {
    engine: &'a Engine,
    storage: &'a mut dyn Storage,
    plan: &'a FilePlan,
    pace: Pace,
    stored: Stored,
    /// Extents with writes that are not complete, by token.
    in_flight: HashMap<u64, InFlight>,
    next_token: u64,
}

impl Writer<'_> {
    fn drain_queue(&mut self) -> io::Result<()> {
        loop {
            // Completions first: they give room back to whoever waits for it.
            while self.complete(false)? {}
            if self.engine.is_released() {
                return Ok(());
            }
            let may_wait = self.in_flight.is_empty();
            let rest = self.pace.wait(Instant::now());
            if !rest.is_zero() {
                if may_wait {
                    std::thread::sleep(rest.min(REST_MAX));
                } else {
                    self.complete(true)?;
                }
                continue;
            }
            match self.engine.buffer.next_filled(may_wait) {
                Some(extent) => self.write(extent)?,
                None if may_wait => return Ok(()),
                None => drop(self.complete(true)?),
            }
        }
    }

    fn write(&mut self, extent: Extent) -> io::Result<()> {
        let memory = extent.memory();
        let counters: &Counters = &self.engine.counters;
        let token = self.next_token;
        self.next_token += 1;
        let mut writes = 0;
        let mut bytes = 0;
        let mut ranges: Vec<(Range<usize>, u64)> = Vec::with_capacity(extent.pieces().count());
        for (run, at) in extent.pieces() {
            let offset = self.plan.page_offset(run.first);
            let data = &extent.bytes()[at..at + as_index(run.bytes())];
            let layout = &self.engine.ram.layout;
            let keep_zero = layout.blocks()[layout.block_of(run.first)].store_zero_pages;
            let mut open: Option<Range<usize>> = None;
            for (number, page) in data.as_chunks::<PAGE>().0.iter().enumerate() {
                if !keep_zero && is_zero(page) {
                    continue;
                }
                let index = as_index(run.first.0) + number;
                self.stored.bitmap[index / 64] |= 1 << (index % 64);
                self.stored.checksums[index] = crc32c::crc32c(page);
                let here = at + number * PAGE..at + (number + 1) * PAGE;
                open = Some(match open {
                    Some(range) if here.start - range.end <= ZERO_PAGES_WRITTEN_ALONG * PAGE => {
                        range.start..here.end
                    }
                    Some(range) => {
                        ranges.push((range.clone(), offset + (range.start - at) as u64));
                        here
                    }
                    None => here,
                });
            }
            if let Some(range) = open {
                ranges.push((range.clone(), offset + (range.start - at) as u64));
            }
        }
        for (range, _) in &ranges {
            writes += 1;
            bytes += range.len() as u64;
        }
        if writes == 0 {
            drop(memory);
            self.engine.buffer.recycle(extent);
            return Ok(());
        }
        counters.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.pace.add(bytes, Instant::now());
        self.in_flight.insert(token, InFlight { extent, writes, bytes });
        for (range, offset) in ranges {
            while self.storage.in_flight() >= DEPTH as usize {
                self.complete(true)?;
            }
            let memory = memory.clone();
            self.storage.submit(Write { token, memory, range, file_offset: offset })?;
        }
        Ok(())
    }

    /// Takes one completed write out; false if there was none.
    fn complete(&mut self, wait: bool) -> io::Result<bool> {
        let Some(token) = self.storage.complete(wait)? else { return Ok(false) };
        if let std::collections::hash_map::Entry::Occupied(mut entry) = self.in_flight.entry(token)
        {
            entry.get_mut().writes -= 1;
            if entry.get().writes == 0 {
                let done = entry.remove();
                self.engine.counters.written_bytes.fetch_add(done.bytes, Ordering::Relaxed);
                self.engine.buffer.recycle(done.extent);
            }
        }
        Ok(true)
    }

    /// After a failure: what is queued is not wanted any more.
    fn give_up_rest(&mut self) {
        while let Some(extent) = self.engine.buffer.next_filled(false) {
            self.engine.buffer.recycle(extent);
        }
    }
}

fn is_zero(page: &[u8; PAGE]) -> bool {
    // Most pages differ in their first line; the rest is compared in wide steps.
    page[..64] == [0; 64]
        && page.as_chunks::<16>().0.iter().all(|&part| u128::from_ne_bytes(part) == 0)
}
