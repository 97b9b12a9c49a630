//! Memory that is written all the time and tells of any copy of it whether the copy is of one instant.
//!
//! What `livesnap demo` and the example `own_memory` snapshot in place of a guest. Each writer, on a thread that the
//! caller gives it, writes its part of the memory page by page, round and round, and fills every word of a page with
//! a counter that goes up by one from page to page. At any one instant, with writers waiting at the gate, the
//! counters of a part are therefore one contiguous window, and the counters' next values tell which:
//!
//! ```text
//! next = 13, 6 pages    │ 12 │  7 │  8 │  9 │ 10 │ 11 │     of one instant
//!                       │ 12 │ 13 │  8 │  9 │ 10 │ 11 │     page 1 is of a later one
//! ```

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::address::{HostVirtAddr, PAGE_BYTES, as_index};
use crate::ram::RamBlock;

const PAGE_WORDS: usize = as_index(PAGE_BYTES) / 8;
/// Pages that a writer writes between two looks at the gate.
const PAGES_PER_LOOK: usize = 64;

#[repr(align(4096))]
struct Page([AtomicU64; PAGE_WORDS]);

/// The memory, and the gate at which its writers can be held.
pub struct Workload {
    pages: Vec<Page>,
    /// Counter of the next page, for each writer.
    next: Vec<AtomicU64>,
    gate: Mutex<Gate>,
    changed: Condvar,
    ended: AtomicBool,
}

#[derive(Default)]
struct Gate {
    closed: bool,
    waiting: usize,
}

impl Workload {
    /// Memory of `writers` × `pages_per_writer` pages, all of them written once.
    #[must_use]
    pub fn new(writers: usize, pages_per_writer: usize) -> Self {
        let page = |index: usize| {
            let counter = (index % pages_per_writer) as u64;
            Page(std::array::from_fn(|_| AtomicU64::new(counter)))
        };
        Self {
            pages: (0..writers * pages_per_writer).map(page).collect(),
            next: (0..writers).map(|_| AtomicU64::new(pages_per_writer as u64)).collect(),
            gate: Mutex::default(),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
        }
    }

    /// Writes the part of `writer` until [`end`](Self::end). Every writer needs a thread, or pausing waits for ever.
    pub fn run(&self, writer: usize) {
        let len = self.pages.len() / self.next.len();
        let pages = &self.pages[writer * len..(writer + 1) * len];
        while !self.ended.load(Ordering::Relaxed) {
            self.pass_gate();
            for _ in 0..PAGES_PER_LOOK {
                let counter = self.next[writer].fetch_add(1, Ordering::Relaxed);
                for word in &pages[as_index(counter) % len].0 {
                    word.store(counter, Ordering::Relaxed);
                }
            }
        }
    }

    /// Holds all writers at the gate; returns when they are there.
    pub fn pause(&self) {
        let mut gate = self.gate();
        gate.closed = true;
        while gate.waiting < self.next.len() {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Opens the gate.
    pub fn resume(&self) {
        self.gate().closed = false;
        self.changed.notify_all();
    }

    /// Ends all writers.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        self.resume();
    }

    /// The counters' next values; in a pause they are the state that belongs to the memory.
    #[must_use]
    pub fn counters(&self) -> Vec<u64> {
        self.next.iter().map(|next| next.load(Ordering::Relaxed)).collect()
    }

    /// Where the memory lies.
    #[must_use]
    pub fn ram_block(&self) -> RamBlock {
        RamBlock {
            id: "ram".into(),
            hva: HostVirtAddr(self.pages.as_ptr().addr() as u64),
            len_bytes: self.pages.len() as u64 * PAGE_BYTES,
            page_size_bytes: PAGE_BYTES,
            store_zero_pages: false,
        }
    }

    fn pass_gate(&self) {
        let mut gate = self.gate();
        gate.waiting += 1;
        self.changed.notify_all();
        while gate.closed && !self.ended.load(Ordering::Relaxed) {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.waiting -= 1;
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts the pages of a copy of the memory that are not of the instant at which the counters were `counters`: of
/// another one, or of several. `copy` holds whole pages from page `first` of `total_pages` on.
#[must_use]
pub fn count_strays(copy: &[u8], first: u64, total_pages: u64, counters: &[u64]) -> u64 {
    let len = (total_pages / counters.len() as u64).max(1);
    let is_stray = |(index, page): (u64, &[u8])| {
        let (writer, slot) = (index / len, index % len);
        let next = counters.get(as_index(writer)).copied().unwrap_or(0);
        // The last time before `next` that it was the turn of `slot`.
        let expected = next.wrapping_sub(1 + (next + len - 1 - slot) % len);
        page.as_chunks::<8>().0.iter().any(|&word| u64::from_le_bytes(word) != expected)
    };
    let strays =
        (first..).zip(copy.chunks_exact(as_index(PAGE_BYTES))).filter(|&page| is_stray(page));
    strays.count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(workload: &Workload) -> Vec<u8> {
        let words = workload.pages.iter().flat_map(|page| &page.0);
        words.flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect()
    }

    #[test]
    fn a_copy_in_a_pause_is_of_one_instant_and_one_word_of_another_is_found() {
        let workload = Workload::new(2, 100);
        std::thread::scope(|scope| {
            scope.spawn(|| workload.run(0));
            scope.spawn(|| workload.run(1));
            while workload.counters().iter().any(|&next| next < 1000) {
                std::thread::yield_now();
            }
            workload.pause();
            let (mut bytes, counters) = (copy(&workload), workload.counters());
            assert_eq!(count_strays(&bytes, 0, 200, &counters), 0);
            assert_eq!(count_strays(&bytes[150 * 4096..], 150, 200, &counters), 0);
            bytes[123 * 4096 + 4095] ^= 1;
            assert_eq!(count_strays(&bytes, 0, 200, &counters), 1);
            workload.resume();
            while workload.counters() == counters {
                std::thread::yield_now();
            }
            workload.pause();
            assert!(count_strays(&copy(&workload), 0, 200, &counters) > 0);
            workload.end();
        });
    }
}
