//! Every interleaving of a writing guest, its fault handler and the sweep: each page is captured exactly
//! once, before it changes, and the guest is always let go.
//!
//! The model is the chunk map's own source, compiled against loom's atomics.

#![allow(dead_code, reason = "the model uses a part of the module")]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use snapshot_core::address::{self, PageIndex, PageRun};

mod sync {
    pub use loom::sync::atomic::{AtomicU64, Ordering};
}

#[path = "../src/chunk.rs"]
mod chunk;

const PAGES: u64 = 2;
const PAGE_COUNT: usize = address::as_index(PAGES);
const OLD: u64 = 7;
const NEW: u64 = 8;

/// Two pages of guest RAM, what the kernel knows of them, and what was saved.
struct Model {
    map: chunk::ChunkMap,
    content: [AtomicU64; PAGE_COUNT],
    is_protected: [AtomicBool; PAGE_COUNT],
    saved_content: [AtomicU64; PAGE_COUNT],
    captures: [AtomicU64; PAGE_COUNT],
}

impl Model {
    fn new() -> Self {
        Self {
            map: chunk::ChunkMap::new(PAGES),
            content: [AtomicU64::new(OLD), AtomicU64::new(OLD)],
            is_protected: [AtomicBool::new(true), AtomicBool::new(true)],
            saved_content: [AtomicU64::new(0), AtomicU64::new(0)],
            captures: [AtomicU64::new(0), AtomicU64::new(0)],
        }
    }

    /// What `Worker::capture` does; the order under test is `order`.
    fn capture(&self, run: PageRun, order: Order) {
        for won in self.map.claim(run).runs() {
            let pages = address::as_index(won.first.0)..address::as_index(won.end());
            let unprotect = || {
                pages
                    .clone()
                    .for_each(|page| self.is_protected[page].store(false, Ordering::Release));
            };
            if order == Order::UnprotectFirst {
                unprotect();
            }
            for page in pages.clone() {
                self.saved_content[page]
                    .store(self.content[page].load(Ordering::Acquire), Ordering::Relaxed);
                self.captures[page].fetch_add(1, Ordering::Relaxed);
            }
            self.map.mark_saved(won);
            unprotect();
        }
    }

    /// A virtual CPU's store: a fault first, as long as the page is protected.
    fn write(&self, page: u64, order: Order) {
        let index = address::as_index(page);
        if self.is_protected[index].load(Ordering::Acquire) {
            let run = PageRun { first: PageIndex(page), count: 1 };
            self.capture(run, order);
            // Who lost the claim sleeps until the winner unprotects.
            while self.is_protected[index].load(Ordering::Acquire) {
                loom::thread::yield_now();
            }
        }
        self.content[index].store(NEW, Ordering::Release);
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Order {
    CopyFirst,
    UnprotectFirst,
}

/// Two virtual CPUs write while the sweep passes; true if the saved pages are right.
fn explore(order: Order) {
    loom::model(move || {
        let model = Arc::new(Model::new());
        let guest = {
            let model = Arc::clone(&model);
            loom::thread::spawn(move || {
                model.write(1, order);
                model.write(0, order);
            })
        };
        model.capture(PageRun { first: PageIndex(0), count: PAGES }, order);
        guest.join().expect("the guest is always let go");
        for page in 0..PAGE_COUNT {
            assert_eq!(model.captures[page].load(Ordering::Relaxed), 1, "captured exactly once");
            assert_eq!(model.saved_content[page].load(Ordering::Relaxed), OLD, "of the instant");
        }
        assert!(model.map.all_saved(PageRun { first: PageIndex(0), count: PAGES }));
    });
}

/// No test harness: with it, the included module's own tests would run against loom's atomics as well.
#[expect(clippy::print_stdout, reason = "stands in for the test harness")]
fn main() {
    explore(Order::CopyFirst);
    println!("every page is captured once and before it changes: ok");
    let broken = std::panic::catch_unwind(|| explore(Order::UnprotectFirst));
    assert!(broken.is_err(), "the model must notice unprotecting before the copy");
    println!("the model notices unprotecting before the copy: ok");
}
