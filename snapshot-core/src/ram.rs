//! The guest's RAM as its VMM laid it out: named blocks, and the way from an address to a page.

use crate::address::{HostVirtAddr, PAGE_BYTES, PageIndex, PageRun};

/// Pages per word of the page bitmaps; every block starts at a multiple of it, so that no word
/// belongs to two blocks.
pub const PAGES_PER_WORD: u64 = 64;

/// One contiguous piece of guest memory, under the name by which the VMM's image format knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Block id, such as `pc.ram` or `0000:00:02.0/vga.vram`.
    pub id: String,
    /// Where the owning process has it mapped.
    pub hva: HostVirtAddr,
    /// Used length in bytes, a multiple of [`PAGE_BYTES`].
    pub len_bytes: u64,
    /// Page size of the backing memory in bytes: 4096, or that of the huge page pool.
    pub page_size_bytes: u64,
    /// Whether the loader keeps what it finds in pages that the file does not hold, so that zero pages
    /// must be stored too. True for ROMs and device memory, which the destination preloads.
    pub store_zero_pages: bool,
}

impl RamBlock {
    /// Number of pages of [`PAGE_BYTES`].
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.len_bytes / PAGE_BYTES
    }
}

/// Why a list of blocks is no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No block at all, or one of no length.
    #[error(
        "ram block {id:?} is empty, so there is nothing to save: check that the virtual machine has RAM"
    )]
    Empty {
        /// Block id, or nothing for an empty list.
        id: String,
    },
    /// Start or length not page-aligned.
    #[error(
        "ram block {id:?} at {hva} of {len_bytes} bytes is not made of whole {PAGE_BYTES}-byte pages, so it cannot be write-protected"
    )]
    Unaligned {
        /// Block id.
        id: String,
        /// Its start.
        hva: HostVirtAddr,
        /// Its length.
        len_bytes: u64,
    },
    /// Two blocks share addresses or a name.
    #[error(
        "ram blocks {a:?} and {b:?} overlap or share a name, so a page could not be told apart"
    )]
    Overlap {
        /// One block.
        a: String,
        /// The other.
        b: String,
    },
}

/// All RAM blocks, in the VMM's order, with their pages numbered in one row.
#[derive(Clone, Debug)]
pub struct RamLayout {
    blocks: Vec<RamBlock>,
    /// First page of each block, ascending.
    first_pages: Vec<u64>,
    /// Block numbers sorted by address.
    by_address: Vec<usize>,
    page_slots: u64,
}

impl RamLayout {
    /// Numbers the pages of `blocks`.
    ///
    /// # Errors
    /// If a block is empty, not page-aligned, or overlaps another.
    pub fn new(blocks: Vec<RamBlock>) -> Result<Self, LayoutError> {
        if blocks.is_empty() {
            return Err(LayoutError::Empty { id: String::new() });
        }
        let mut first_pages = Vec::with_capacity(blocks.len());
        let mut next = 0_u64;
        for block in &blocks {
            if block.len_bytes == 0 {
                return Err(LayoutError::Empty { id: block.id.clone() });
            }
            let aligned = block.hva.0.is_multiple_of(PAGE_BYTES)
                && block.len_bytes.is_multiple_of(PAGE_BYTES)
                && block.hva.0.checked_add(block.len_bytes).is_some();
            if !aligned {
                return Err(LayoutError::Unaligned {
                    id: block.id.clone(),
                    hva: block.hva,
                    len_bytes: block.len_bytes,
                });
            }
            first_pages.push(next);
            next += block.pages().next_multiple_of(PAGES_PER_WORD);
        }
        let mut by_address: Vec<usize> = (0..blocks.len()).collect();
        by_address.sort_by_key(|&block| blocks[block].hva);
        for pair in by_address.windows(2) {
            let (a, b) = (&blocks[pair[0]], &blocks[pair[1]]);
            if a.hva.0 + a.len_bytes > b.hva.0 {
                return Err(LayoutError::Overlap { a: a.id.clone(), b: b.id.clone() });
            }
        }
        let mut ids: Vec<&str> = blocks.iter().map(|block| block.id.as_str()).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(LayoutError::Overlap { a: pair[0].into(), b: pair[1].into() });
        }
        Ok(Self { blocks, first_pages, by_address, page_slots: next })
    }

    /// The blocks in the VMM's order.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Size of a table indexed by [`PageIndex`]: all pages, and the unused numbers between blocks.
    #[must_use]
    pub const fn page_slots(&self) -> u64 {
        self.page_slots
    }

    /// Length of all blocks together, in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.len_bytes).sum()
    }

    /// All pages of block number `block`.
    #[must_use]
    pub fn block_run(&self, block: usize) -> PageRun {
        PageRun { first: PageIndex(self.first_pages[block]), count: self.blocks[block].pages() }
    }

    /// The page that holds `address`, or nothing if no block does.
    #[must_use]
    pub fn page_at(&self, address: HostVirtAddr) -> Option<PageIndex> {
        let after = self.by_address.partition_point(|&block| self.blocks[block].hva <= address);
        let block = *self.by_address.get(after.checked_sub(1)?)?;
        let offset = address.0 - self.blocks[block].hva.0;
        (offset < self.blocks[block].len_bytes)
            .then(|| PageIndex(self.first_pages[block] + offset / PAGE_BYTES))
    }

    /// Number of the block that holds `page`.
    ///
    /// `page` must come from this layout; a number between two blocks counts for the one before it.
    #[must_use]
    pub fn block_of(&self, page: PageIndex) -> usize {
        self.first_pages.partition_point(|&first| first <= page.0) - 1
    }

    /// Where `page` lies in the owning process.
    #[must_use]
    pub fn address_of(&self, page: PageIndex) -> HostVirtAddr {
        let block = self.block_of(page);
        self.blocks[block].hva.add((page.0 - self.first_pages[block]) * PAGE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;

    fn block(id: &str, hva: u64, pages: u64) -> RamBlock {
        RamBlock {
            id: id.into(),
            hva: HostVirtAddr(hva),
            len_bytes: pages * PAGE_BYTES,
            page_size_bytes: PAGE_BYTES,
            store_zero_pages: false,
        }
    }

    #[test]
    fn an_address_finds_its_page_and_back() {
        let layout =
            RamLayout::new(vec![block("high", 0x20_0000, 65), block("low", 0x1000, 3)]).unwrap();
        assert_eq!(layout.page_at(HostVirtAddr(0x20_0000)), Some(PageIndex(0)));
        assert_eq!(layout.page_at(HostVirtAddr(0x20_0000 + 65 * 4096 - 1)), Some(PageIndex(64)));
        assert_eq!(layout.page_at(HostVirtAddr(0x20_0000 + 65 * 4096)), None);
        assert_eq!(layout.page_at(HostVirtAddr(0xfff)), None);
        assert_eq!(layout.page_at(HostVirtAddr(0x3fff)), Some(PageIndex(130)));
        assert_eq!(layout.address_of(PageIndex(130)), HostVirtAddr(0x3000));
        assert_eq!(layout.block_of(PageIndex(130)), 1);
        assert_eq!(layout.page_slots(), 192);
    }

    #[test]
    fn overlapping_unaligned_and_empty_blocks_are_refused() {
        let overlap = RamLayout::new(vec![block("a", 0x1000, 2), block("b", 0x2000, 1)]);
        assert!(matches!(overlap, Err(LayoutError::Overlap { .. })));
        let same_name = RamLayout::new(vec![block("a", 0x1000, 1), block("a", 0x2000, 1)]);
        assert!(matches!(same_name, Err(LayoutError::Overlap { .. })));
        let unaligned = RamLayout::new(vec![block("a", 0x1001, 1)]);
        assert!(matches!(unaligned, Err(LayoutError::Unaligned { .. })));
        assert!(matches!(RamLayout::new(vec![]), Err(LayoutError::Empty { .. })));
        assert!(matches!(RamLayout::new(vec![block("a", 0, 0)]), Err(LayoutError::Empty { .. })));
    }
}
