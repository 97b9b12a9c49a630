//! Which chunks of RAM are watched in a window.
//!
//! RAM is divided into chunks of one huge page each, and the chunks, in the order of their addresses, into strata of
//! (nearly) the same size. A window watches one chunk of each stratum. Every chunk of a stratum has its turn, in
//! random order, before any comes again: so the sample is random in each window, spread over all memory, and after as
//! many windows as a stratum has chunks, all memory was watched once.

use crate::address::HostVirtAddr;
use crate::mappings::{MappingKind, RamMapping};
use crate::ram::RamLayout;

/// Most bytes in a chunk, and its alignment: one x86-64 huge page, so that no huge page is watched in parts.
pub const CHUNK_BYTES: u64 = 2 << 20;

/// A stretch of RAM that is watched as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chunk {
    /// First address.
    pub start: HostVirtAddr,
    /// At most [`CHUNK_BYTES`].
    pub len_bytes: u64,
    /// Whether it is private anonymous memory.
    pub is_anonymous: bool,
}

/// All RAM in chunks, ascending by address.
///
/// Chunks are whole also at the ends of RAM blocks, as far as the mapping reaches: a huge page of which only a part is
/// registered would be split.
#[must_use]
pub fn divide(layout: &RamLayout, mappings: &[RamMapping]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for block in layout.blocks() {
        let block_end = block.hva.add(block.len_bytes);
        for mapping in mappings {
            let end = mapping.end().min(block_end).0;
            let mut at = mapping.start.max(block.hva).0;
            while at < end {
                let start = (at - at % CHUNK_BYTES).max(mapping.start.0);
                let upto = (at + 1).next_multiple_of(CHUNK_BYTES);
                chunks.push(Chunk {
                    start: HostVirtAddr(start),
                    len_bytes: upto.min(mapping.end().0) - start,
                    is_anonymous: mapping.kind == MappingKind::Anonymous,
                });
                at = upto;
            }
        }
    }
    chunks.sort_unstable();
    // Small blocks may share one.
    chunks.dedup();
    chunks
}

/// A chunk that is to be watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Its number.
    pub chunk: usize,
    /// Chunks of its stratum.
    pub stands_for: u64,
}

/// Draws samples.
#[derive(Debug)]
pub struct Strata {
    strata: Vec<Stratum>,
    random: Random,
}

#[derive(Debug)]
struct Stratum {
    /// Its chunks, in the order in which they are watched.
    order: Vec<usize>,
    next: usize,
}

impl Strata {
    /// Divides the chunks numbered from 0 to `chunks` so that a sample has `sample` of them, or all if they are fewer.
    #[must_use]
    pub fn new(chunks: usize, sample: usize, seed: u64) -> Self {
        let count = sample.clamp(1, chunks.max(1));
        let stratum = |number| {
            let order: Vec<_> = (number * chunks / count..(number + 1) * chunks / count).collect();
            Stratum { next: order.len(), order }
        };
        Self { strata: (0..count).map(stratum).collect(), random: Random::new(seed) }
    }

    /// The next sample, ascending by chunk.
    pub fn draw(&mut self) -> Vec<Draw> {
        let random = &mut self.random;
        self.strata.iter_mut().filter_map(|stratum| stratum.draw(random)).collect()
    }
}

impl Stratum {
    fn draw(&mut self, random: &mut Random) -> Option<Draw> {
        if self.next >= self.order.len() {
            random.shuffle(&mut self.order);
            self.next = 0;
        }
        let &chunk = self.order.get(self.next)?;
        self.next += 1;
        Some(Draw { chunk, stands_for: self.order.len() as u64 })
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): good enough to draw by, and replayed by its seed.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Starts from `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    /// A number below `limit`, which must not be 0. The bias is below `limit` / 2^64.
    pub const fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Fisher and Yates.
    fn shuffle(&mut self, numbers: &mut [usize]) {
        for last in (1..numbers.len()).rev() {
            let other = usize::try_from(self.below(last as u64 + 1)).unwrap_or(last);
            numbers.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::ram::RamBlock;

    #[test]
    fn every_chunk_has_its_turn_before_any_comes_again() {
        let mut strata = Strata::new(37, 8, 5);
        let mut seen = vec![0_u32; 37];
        // Strata have 4 or 5 chunks; after 20 windows each chunk came 5 or 4 times.
        for _ in 0..20 {
            let sample = strata.draw();
            assert_eq!(sample.iter().map(|draw| draw.stands_for).sum::<u64>(), 37);
            assert!(sample.is_sorted_by_key(|draw| draw.chunk), "{sample:?}");
            sample.iter().for_each(|draw| seen[draw.chunk] += 1);
        }
        assert!(seen.iter().all(|&times| times == 4 || times == 5), "{seen:?}");
    }

    #[test]
    fn the_order_is_random_and_replayed_by_its_seed() {
        let samples = |seed| {
            let mut strata = Strata::new(100, 10, seed);
            (0..5).map(|_| strata.draw()).collect::<Vec<_>>()
        };
        assert_eq!(samples(3), samples(3));
        assert_ne!(samples(3), samples(4));
        assert_ne!(samples(3)[0], samples(3)[1]);
    }

    #[test]
    fn a_sample_may_be_all_there_is() {
        let all = Strata::new(5, 64, 0).draw();
        assert_eq!(all.iter().map(|draw| draw.chunk).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert!(all.iter().all(|draw| draw.stands_for == 1));
        assert_eq!(Strata::new(0, 64, 0).draw(), []);
        assert_eq!(Strata::new(5, 0, 0).draw().len(), 1);
    }

    #[test]
    fn chunks_are_whole_huge_pages_and_cover_all_ram_once() {
        let mapping = |start: u64, len_bytes, kind| RamMapping {
            kind,
            ..RamMapping::anonymous(HostVirtAddr(start), len_bytes)
        };
        let block = |id: &str, hva, len_bytes| RamBlock {
            id: id.into(),
            hva: HostVirtAddr(hva),
            len_bytes,
            page_size_bytes: 4096,
            store_zero_pages: false,
        };
        let blocks = vec![
            block("ram", 0x7f00_0010_0000, 0x50_0000),
            block("rom", 0x7e00_0000_1000, 4096),
            block("another rom", 0x7e00_0000_3000, 4096),
        ];
        let mappings = [
            mapping(0x7e00_0000_1000, 0x8_0000, MappingKind::SharedMemory),
            mapping(0x7f00_0010_0000, 0x100_0000, MappingKind::Anonymous),
        ];
        let found = divide(&RamLayout::new(blocks).unwrap(), &mappings);
        let shape: Vec<_> =
            found.iter().map(|c| (c.start.0, c.len_bytes, c.is_anonymous)).collect();
        assert_eq!(
            shape,
            [
                (0x7e00_0000_1000, 0x8_0000, false),
                (0x7f00_0010_0000, 0x10_0000, true),
                (0x7f00_0020_0000, 0x20_0000, true),
                (0x7f00_0040_0000, 0x20_0000, true),
            ]
        );
    }
}
