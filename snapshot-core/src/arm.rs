//! Write-protecting RAM without a pause that grows with it.
//!
//! RAM is protected while the guest runs. A write to a protected page is let through and noted; the pages
//! noted are protected again, in rounds, until few are left. Only what the guest writes during the last
//! round has to be protected in the pause.

use std::io;

use crate::address::{PageRun, as_index};
use crate::chunk::{masks, runs_of};
use crate::protection::{ProtectedRam, Region};
use crate::sync::{AtomicU64, Ordering};

/// Pages made writable together when one of them is written before the consistency point: few enough that
/// little is protected again in vain, enough that a writer does not fault at every page.
pub const LET_THROUGH_PAGES: u64 = 64;

/// A remainder of this many pages costs less to protect than another round costs the guest: about 0.1 ms.
const REMAINDER_PAGES_GOOD: u64 = 4096;

const ROUNDS_MAX: u32 = 8;

/// Pages that are not protected although they should be.
///
/// A mark is set *after* its page was made writable. A round takes marks *before* it protects. So a page
/// that is writable when no fault is being handled has its mark.
pub struct Marks {
    words: Box<[AtomicU64]>,
}

impl Marks {
    /// None.
    #[must_use]
    pub fn new(page_slots: u64) -> Self {
        Self { words: (0..page_slots.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Marks `run`.
    pub fn set(&self, run: PageRun) {
        for (word, mask) in masks(run) {
            self.words[as_index(word)].fetch_or(mask, Ordering::AcqRel);
        }
    }

    /// Takes all marks of `region` away and returns them as runs.
    fn take(&self, region: &Region) -> Vec<PageRun> {
        let mut taken: Vec<u64> = Vec::new();
        let first_word = region.run.first.0 / 64;
        for (word, mask) in masks(region.run) {
            taken.push(self.words[as_index(word)].fetch_and(!mask, Ordering::AcqRel) & mask);
        }
        runs_of(first_word, &taken).collect()
    }
}

/// Protects all of RAM once.
///
/// # Errors
/// The kernel's.
pub fn protect_all(ram: &ProtectedRam) -> io::Result<()> {
    ram.regions().iter().try_for_each(|region| retry(|| ram.protect(region, region.run)))
}

/// Protects what is marked; returns the number of pages.
///
/// # Errors
/// The kernel's.
pub fn protect_marked(ram: &ProtectedRam, marks: &Marks) -> io::Result<u64> {
    let mut pages = 0;
    for region in ram.regions() {
        for run in marks.take(region) {
            // Units larger than a page are marked whole, because they are let through whole.
            retry(|| ram.protect(region, run))?;
            pages += run.count;
        }
    }
    Ok(pages)
}

/// When to stop going round.
#[derive(Debug, Default)]
pub struct Rounds {
    done: u32,
    last_pages: Option<u64>,
}

impl Rounds {
    /// Takes the size of the round just done; true if another one is worth it.
    pub fn go_on(&mut self, pages: u64) -> bool {
        self.done += 1;
        let shrinking = self.last_pages.is_none_or(|last| pages < last - last / 4);
        self.last_pages = Some(pages);
        pages > REMAINDER_PAGES_GOOD && shrinking && self.done < ROUNDS_MAX
    }

    /// Rounds done.
    #[must_use]
    pub const fn done(&self) -> u32 {
        self.done
    }
}

/// Repeats what the kernel puts off with `EAGAIN` because a discard of pages waits until its notice is read.
/// Not for the thread that reads the notices.
///
/// # Errors
/// With the operation's.
pub fn retry(mut operation: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    for _ in 0..RETRIES_MAX {
        match operation() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
            result => return result,
        }
    }
    operation()
}

/// A bound, so that a guest that discards pages without end cannot keep a thread for ever.
const RETRIES_MAX: u32 = 100_000;

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::address::PageIndex;

    #[test]
    fn rounds_end_when_little_is_left_or_nothing_is_gained() {
        let mut shrinking = Rounds::default();
        assert!([100_000, 50_000, 20_000].iter().all(|&pages| shrinking.go_on(pages)));
        assert!(!shrinking.go_on(100));
        let mut steady = Rounds::default();
        assert!(steady.go_on(100_000));
        assert!(!steady.go_on(90_000));
        let mut endless = Rounds::default();
        let rounds = (0..100).map(|round| u64::MAX >> round).take_while(|&p| endless.go_on(p));
        assert!(rounds.count() < 10);
    }

    #[test]
    fn marks_are_taken_once() {
        let marks = Marks::new(256);
        let run = PageRun { first: PageIndex(60), count: 10 };
        marks.set(run);
        let word = |index: usize| marks.words[index].load(Ordering::Relaxed);
        assert_eq!((word(0).count_ones(), word(1).count_ones()), (4, 6));
        assert_eq!(runs_of(0, &[word(0), word(1)]).next().unwrap(), run);
    }

    #[test]
    fn a_would_block_is_tried_again() {
        let mut left = 3;
        let result = retry(|| {
            left -= 1;
            if left > 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        assert!(result.is_ok() && left == 0);
    }
}
