//! Addresses and page numbers. No raw `u64` that means one of these crosses a module.

use std::fmt;

/// Bytes in a page: the unit of protection, of the file's bitmap and of the checksums.
///
/// x86-64's base page, and the target page size that QEMU writes into mapped-ram files for it.
pub const PAGE_BYTES: u64 = 4096;

const _: () =
    assert!(usize::BITS == 64, "lengths and page numbers of a guest must fit into a usize");

/// A length or an index in memory. Never truncates: see the assertion above.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, as asserted")]
pub const fn as_index(number: u64) -> usize {
    number as usize
}

/// Address in the virtual address space of the process that owns the RAM (HVA).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostVirtAddr(pub u64);

impl HostVirtAddr {
    /// The address `bytes` further up.
    #[must_use]
    pub const fn add(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl fmt::Debug for HostVirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for HostVirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A page of the whole guest: pages of all RAM blocks numbered in one row by
/// [`RamLayout`](crate::ram::RamLayout).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

/// A run of pages, half open; never empty, never across a RAM block's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// First page.
    pub first: PageIndex,
    /// Number of pages.
    pub count: u64,
}

impl PageRun {
    /// Length in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.count * PAGE_BYTES
    }

    /// The page after the last one.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.first.0 + self.count
    }
}
