//! The self-describing 4 KiB page.
//!
//! ```text
//! word   0      magic
//!        1      kind << 32 | worker
//!        2      run: which boot wrote it, so that leftovers of another boot are never counted
//!        3      slot: place in the ring (or index of a populated page, or disk block)
//!        4      counter: 1 for the first page that this worker wrote, then 2, 3, ...
//!        5..13  pages that each worker had finished when this one was begun
//!       13      disk blocks that were on the disk when this one was begun
//!       14..511 body, derived from the header: not zero, and not worth compressing
//!      511      checksum of all words before it
//! ```
//!
//! The counter is written first and the checksum last, so a page that was caught half-written shows it.

use std::sync::atomic::{Ordering, compiler_fence};

/// Bytes of a page, and of a disk block.
pub const PAGE_BYTES: usize = 4096;
/// 64-bit words of a page.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Most workers that one guest can run.
pub const WORKERS_MAX: usize = 8;
/// First word of every page.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LSselfV1");

const COUNTER_WORD: usize = 4;
const PEERS_WORD: usize = 5;
const DISK_WORD: usize = PEERS_WORD + WORKERS_MAX;
const BODY_WORD: usize = DISK_WORD + 1;
const CHECKSUM_WORD: usize = PAGE_WORDS - 1;

/// A page as words; in memory and on disk each is little-endian.
pub type Words = [u64; PAGE_WORDS];

/// What a page is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Rewritten over and over by a worker.
    Ring,
    /// Written once before the guest is ready.
    Populate,
    /// A disk block, or its buffer in RAM.
    Disk,
    /// The one [`crate::status`] page.
    Status,
}

impl Kind {
    /// The number that stands for this kind in a page.
    pub const fn number(self) -> u64 {
        match self {
            Self::Ring => 1,
            Self::Populate => 2,
            Self::Disk => 3,
            Self::Status => 4,
        }
    }

    fn from_number(number: u64) -> Option<Self> {
        [Self::Ring, Self::Populate, Self::Disk, Self::Status]
            .into_iter()
            .find(|kind| kind.number() == number)
    }
}

/// Everything that a page says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the page is for.
    pub kind: Kind,
    /// Which worker wrote it; 0 where there is only one.
    pub worker: usize,
    /// Which boot wrote it.
    pub run: u64,
    /// Its place among the pages of this kind and worker.
    pub slot: u64,
    /// How many pages this worker had written, this one included.
    pub counter: u64,
    /// Pages that each worker had finished when this one was begun.
    pub peers: [u64; WORKERS_MAX],
    /// Disk blocks that were on the disk when this one was begun.
    pub disk_completed: u64,
}

/// A page that carries the magic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// The checksum is right.
    Whole(Header),
    /// The checksum is wrong: caught while it was being written, or mixed from two instants.
    Torn(Header),
}

impl Header {
    /// Writes the whole page.
    pub fn write(&self, words: &mut Words) {
        words[COUNTER_WORD] = self.counter;
        compiler_fence(Ordering::SeqCst);
        words[0] = MAGIC;
        words[1] = self.kind.number() << 32 | self.worker as u64;
        words[2] = self.run;
        words[3] = self.slot;
        words[PEERS_WORD..DISK_WORD].copy_from_slice(&self.peers);
        words[DISK_WORD] = self.disk_completed;
        let mut body =
            self.counter ^ self.slot.rotate_left(32) ^ self.kind.number().rotate_left(56);
        for word in &mut words[BODY_WORD..CHECKSUM_WORD] {
            // Knuth's MMIX generator: one multiplication a word is what an emulated CPU can afford.
            body = body
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            *word = body;
        }
        let checksum = checksum(words);
        compiler_fence(Ordering::SeqCst);
        words[CHECKSUM_WORD] = checksum;
    }
}

impl Page {
    /// Reads a page; `None` if it is not one of ours.
    pub fn read(words: &Words) -> Option<Self> {
        if words[0] != MAGIC {
            return None;
        }
        let mut peers = [0; WORKERS_MAX];
        peers.copy_from_slice(&words[PEERS_WORD..DISK_WORD]);
        let header = Header {
            kind: Kind::from_number(words[1] >> 32)?,
            worker: usize::try_from(words[1] & u64::from(u32::MAX)).ok()?,
            run: words[2],
            slot: words[3],
            counter: words[COUNTER_WORD],
            peers,
            disk_completed: words[DISK_WORD],
        };
        Some(if checksum(words) == words[CHECKSUM_WORD] {
            Self::Whole(header)
        } else {
            Self::Torn(header)
        })
    }

    /// What the page says of itself; of a torn page, at least kind, worker, run and slot are as they
    /// were before.
    pub fn header(&self) -> &Header {
        match self {
            Self::Whole(header) | Self::Torn(header) => header,
        }
    }
}

/// Decodes a page from its bytes; `None` unless there are exactly [`PAGE_BYTES`].
pub fn words_from_bytes(bytes: &[u8]) -> Option<Words> {
    let (chunks, []) = bytes.as_chunks::<8>() else { return None };
    let chunks: &[[u8; 8]; PAGE_WORDS] = chunks.try_into().ok()?;
    Some(chunks.map(u64::from_le_bytes))
}

/// Encodes a page to its bytes.
pub fn words_to_bytes(words: &Words, bytes: &mut [u8; PAGE_BYTES]) {
    for (chunk, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *chunk = word.to_le_bytes();
    }
}

/// Every step is a bijection of the word, so no single changed word goes unseen.
fn checksum(words: &Words) -> u64 {
    words[..CHECKSUM_WORD]
        .iter()
        .fold(MAGIC, |sum, word| (sum.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    fn header() -> Header {
        Header {
            kind: Kind::Ring,
            worker: 1,
            run: 7,
            slot: 42,
            counter: 4242,
            peers: [9; WORKERS_MAX],
            disk_completed: 5,
        }
    }

    #[test]
    fn a_page_survives_the_way_over_bytes() {
        let mut words = [0; PAGE_WORDS];
        header().write(&mut words);
        let mut bytes = [0; PAGE_BYTES];
        words_to_bytes(&words, &mut bytes);
        let read = words_from_bytes(&bytes).unwrap();
        assert_eq!(Page::read(&read), Some(Page::Whole(header())));
    }

    #[test]
    fn any_changed_word_but_the_magic_makes_it_torn() {
        let mut words = [0; PAGE_WORDS];
        header().write(&mut words);
        for changed in 2..PAGE_WORDS {
            let mut words = words;
            words[changed] ^= 1;
            assert!(matches!(Page::read(&words), Some(Page::Torn(_))), "word {changed}");
        }
    }

    #[test]
    fn a_page_mixed_from_two_instants_is_torn() {
        let (mut old, mut new) = ([0; PAGE_WORDS], [0; PAGE_WORDS]);
        header().write(&mut old);
        Header { counter: 9999, ..header() }.write(&mut new);
        for cut in COUNTER_WORD + 1..PAGE_WORDS {
            let mut mixed = old;
            mixed[..cut].copy_from_slice(&new[..cut]);
            assert!(matches!(Page::read(&mixed), Some(Page::Torn(_))), "cut at word {cut}");
        }
    }

    #[test]
    fn foreign_bytes_are_not_ours() {
        assert_eq!(Page::read(&[0; PAGE_WORDS]), None);
        assert_eq!(words_from_bytes(&[0; 4095]), None);
    }
}
