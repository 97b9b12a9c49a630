//! Who saves which page, exactly once.
//!
//! A *chunk* is a run of pages that one thread captures in one go; its length varies. What has to be
//! agreed between threads is kept per page, in two bits:
//!
//! ```text
//!            claim (fetch_or, one winner)          saved (by the winner)
//! unclaimed ────────────────────────────▶ claimed ───────────────────────▶ saved
//! ```
//!
//! The winner of a page copies it, marks it saved and *then* unprotects it. Whoever does not win leaves the
//! page alone: the winner's unprotect wakes every thread that waits for it.

use crate::address::{PageIndex, PageRun, as_index};
use crate::sync::{AtomicU64, Ordering};

/// Pages in one word of the maps.
const WORD_PAGES: u64 = u64::BITS as u64;

/// Pages in the longest chunk: 2 MiB, one x86-64 huge page.
pub const CHUNK_PAGES_MAX: u64 = 512;

/// Words that the longest chunk can touch when it is not aligned.
const CHUNK_WORDS: usize = as_index(CHUNK_PAGES_MAX / WORD_PAGES) + 1;

/// State of all pages of a guest.
pub struct ChunkMap {
    claimed: Box<[AtomicU64]>,
    saved: Box<[AtomicU64]>,
}

/// Pages won by one call of [`ChunkMap::claim`]; whoever holds it must save them all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    first_word: u64,
    words: [u64; CHUNK_WORDS],
}

impl ChunkMap {
    /// All pages unclaimed.
    #[must_use]
    pub fn new(page_slots: u64) -> Self {
        let zeroed = || (0..page_slots.div_ceil(WORD_PAGES)).map(|_| AtomicU64::new(0)).collect();
        Self { claimed: zeroed(), saved: zeroed() }
    }

    /// Claims those pages of `run`, at most [`CHUNK_PAGES_MAX`], that nobody has claimed yet.
    #[must_use]
    pub fn claim(&self, run: PageRun) -> Claim {
        assert!(run.count <= CHUNK_PAGES_MAX, "a chunk has at most {CHUNK_PAGES_MAX} pages");
        let mut claim = Claim { first_word: run.first.0 / WORD_PAGES, words: [0; CHUNK_WORDS] };
        for (slot, (word, mask)) in claim.words.iter_mut().zip(masks(run)) {
            // One atomic operation decides: of all claimers exactly one sees the bit clear.
            let before = word_at(&self.claimed, word).fetch_or(mask, Ordering::AcqRel);
            *slot = mask & !before;
        }
        claim
    }

    /// The longest run of unclaimed pages around `page` within `window`; nothing if `page` is claimed.
    ///
    /// A hint: others may claim meanwhile, and [`claim`](Self::claim) decides.
    #[must_use]
    pub fn unclaimed_around(&self, page: PageIndex, window: PageRun) -> Option<PageRun> {
        let free = |index: u64| {
            let word = word_at(&self.claimed, index / WORD_PAGES).load(Ordering::Acquire);
            word & (1 << (index % WORD_PAGES)) == 0
        };
        if !free(page.0) {
            return None;
        }
        let first = (window.first.0..page.0).rev().take_while(|&index| free(index)).last();
        let last = (page.0 + 1..window.end()).take_while(|&index| free(index)).last();
        let first = first.unwrap_or(page.0);
        Some(PageRun { first: PageIndex(first), count: last.unwrap_or(page.0) + 1 - first })
    }

    /// Marks claimed pages as saved. Their content must be in the copy buffer, and they must still be
    /// protected.
    pub fn mark_saved(&self, run: PageRun) {
        for (word, mask) in masks(run) {
            let claimed = word_at(&self.claimed, word).load(Ordering::Relaxed);
            debug_assert_eq!(claimed & mask, mask, "only claimed pages can be saved");
            word_at(&self.saved, word).fetch_or(mask, Ordering::AcqRel);
        }
    }

    /// Whether every page of `run` is saved.
    #[must_use]
    pub fn all_saved(&self, run: PageRun) -> bool {
        masks(run)
            .all(|(word, mask)| word_at(&self.saved, word).load(Ordering::Acquire) & mask == mask)
    }
}

impl Claim {
    /// The won pages as maximal runs, ascending.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        runs_of(self.first_word, &self.words)
    }
}

/// Set bits of `words`, the first of which is number `first_word`, as maximal runs, ascending.
pub fn runs_of(first_word: u64, words: &[u64]) -> impl Iterator<Item = PageRun> + '_ {
    let bits = words.len() as u64 * WORD_PAGES;
    let bit =
        move |index: u64| words[as_index(index / WORD_PAGES)] & (1 << (index % WORD_PAGES)) != 0;
    let mut next = 0;
    std::iter::from_fn(move || {
        while next < bits && !bit(next) {
            // Whole empty words are the common case in a sparse map.
            let is_empty = words[as_index(next / WORD_PAGES)] == 0;
            next = if is_empty { (next / WORD_PAGES + 1) * WORD_PAGES } else { next + 1 };
        }
        if next >= bits {
            return None;
        }
        let first = next;
        while next < bits && bit(next) {
            next += 1;
        }
        let page = PageIndex(first_word * WORD_PAGES + first);
        Some(PageRun { first: page, count: next - first })
    })
}

/// The words that `run` touches, each with the mask of its pages in it.
pub fn masks(run: PageRun) -> impl Iterator<Item = (u64, u64)> {
    (run.first.0 / WORD_PAGES..run.end().div_ceil(WORD_PAGES)).map(move |word| {
        let from = run.first.0.max(word * WORD_PAGES) - word * WORD_PAGES;
        let to = run.end().min((word + 1) * WORD_PAGES) - word * WORD_PAGES;
        (word, (u64::MAX >> (WORD_PAGES - (to - from))) << from)
    })
}

fn word_at(words: &[AtomicU64], word: u64) -> &AtomicU64 {
    &words[as_index(word)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first: PageIndex(first), count }
    }

    #[test]
    fn a_claim_wins_what_is_left() {
        let map = ChunkMap::new(1024);
        assert_eq!(map.claim(run(60, 10)).runs().collect::<Vec<_>>(), [run(60, 10)]);
        let rest = map.claim(run(50, 30));
        assert_eq!(rest.runs().collect::<Vec<_>>(), [run(50, 10), run(70, 10)]);
        assert_eq!(map.claim(run(50, 30)).runs().count(), 0);
    }

    #[test]
    fn the_longest_unaligned_chunk_can_be_claimed() {
        let map = ChunkMap::new(2048);
        let claim = map.claim(run(63, CHUNK_PAGES_MAX));
        assert_eq!(claim.runs().collect::<Vec<_>>(), [run(63, CHUNK_PAGES_MAX)]);
    }

    #[test]
    fn unclaimed_neighbours_are_found_up_to_the_claimed_ones() {
        let map = ChunkMap::new(1024);
        let _ = map.claim(run(10, 1));
        let _ = map.claim(run(100, 1));
        assert_eq!(map.unclaimed_around(PageIndex(64), run(0, 512)), Some(run(11, 89)));
        assert_eq!(map.unclaimed_around(PageIndex(64), run(60, 10)), Some(run(60, 10)));
        assert_eq!(map.unclaimed_around(PageIndex(10), run(0, 512)), None);
    }

    #[test]
    fn saved_is_told_only_of_whole_runs() {
        let map = ChunkMap::new(256);
        let _ = map.claim(run(0, 128));
        map.mark_saved(run(0, 100));
        assert!(map.all_saved(run(0, 100)));
        assert!(!map.all_saved(run(0, 101)));
    }

    #[test]
    fn masks_cover_exactly_the_run() {
        assert_eq!(masks(run(0, 64)).collect::<Vec<_>>(), [(0, u64::MAX)]);
        assert_eq!(masks(run(63, 2)).collect::<Vec<_>>(), [(0, 1 << 63), (1, 1)]);
    }

    #[test]
    fn runs_skip_empty_words_and_join_full_ones() {
        let words = [0, u64::MAX, 1, 0, 0b110];
        let found: Vec<_> = runs_of(10, &words).collect();
        assert_eq!(found, [run(11 * 64, 65), run(14 * 64 + 1, 2)]);
    }
}
