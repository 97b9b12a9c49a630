//! What `/proc/PID/pagemap` tells of a page: is it there, and does its write protection stand?
//!
//! Source: `Documentation/admin-guide/mm/pagemap.rst`; the uffd-wp bit exists since Linux 5.13, scanning since 6.7.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use linux_raw_sys::general::{
    PAGE_IS_FILE, PAGE_IS_HUGE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN,
    PM_SCAN_WP_MATCHING,
};
use rustix::process::Pid;

use crate::address::{HostVirtAddr, PAGE_BYTES, as_index};
use crate::chunk::CHUNK_PAGES_MAX;
use crate::sys::pagemap_scan::{Query, scan};

const ENTRY_BYTES: usize = 8;
const BYTES_MAX: usize = as_index(CHUNK_PAGES_MAX) * ENTRY_BYTES;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const UFFD_WP: u64 = 1 << 57;
/// Bits 0 to 54 of an entry that is not present: swap type and offset, or a marker in their place.
const SWAP_ENTRY: u64 = (1 << 55) - 1;
/// Bits 0 to 4: swap type.
const SWAP_TYPE: u64 = (1 << 5) - 1;

/// One page's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// Whether the write protection by userfaultfd stands.
    #[must_use]
    pub const fn is_protected(self) -> bool {
        self.0 & UFFD_WP != 0
    }

    /// Whether the page table knows no content: never touched, or only a protection marker. In private
    /// anonymous memory such a page reads as zero.
    #[must_use]
    pub const fn is_hole(self) -> bool {
        self.0 & (PRESENT | SWAPPED) == 0 || self.is_marker()
    }

    /// Whether it is a write-protect marker. The kernel gives markers the swap types behind the last one
    /// that swap files can have (`SWP_PTE_MARKER`, at least 23 of 32 in every configuration) with the marker bits as offset, of
    /// which the write-protect marker is bit 0.
    const fn is_marker(self) -> bool {
        let swap = self.0 & SWAP_ENTRY;
        let (kind, offset) = (swap & SWAP_TYPE, swap >> 5);
        self.0 & (PRESENT | SWAPPED | UFFD_WP) == SWAPPED | UFFD_WP
            && kind >= FIRST_MARKER_TYPE
            && offset == 1
    }
}

/// Lowest swap type that no swap file can have: `MAX_SWAPFILES` is 32 less the kernel's own types, of
/// which there are at most nine (`include/linux/swap.h`).
const FIRST_MARKER_TYPE: u64 = 23;

/// A process's page map.
pub struct Pagemap {
    file: File,
}

/// Entries of one chunk, read at once.
pub struct Entries {
    bytes: [u8; BYTES_MAX],
    count: usize,
}

impl Entries {
    /// None yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: [0; BYTES_MAX], count: 0 }
    }

    /// The entries read last, in the order of their pages.
    pub fn iter(&self) -> impl Iterator<Item = Entry> + '_ {
        let (entries, _) = self.bytes[..self.count * ENTRY_BYTES].as_chunks();
        entries.iter().map(|&bytes| Entry(u64::from_ne_bytes(bytes)))
    }
}

impl Pagemap {
    /// Opens the page map of `pid`.
    ///
    /// # Errors
    /// `EACCES`/`EPERM` without the right to read another process's memory, `ENOENT` if it is gone.
    pub fn open(pid: Pid) -> io::Result<Self> {
        let file = File::open(format!("/proc/{}/pagemap", pid.as_raw_pid()))?;
        Ok(Self { file })
    }

    /// Reads the entries of `pages` pages from `start` on, at most a chunk's worth.
    ///
    /// # Errors
    /// The kernel's; `UnexpectedEof` when the process is gone.
    pub fn read(&self, start: HostVirtAddr, pages: u64, into: &mut Entries) -> io::Result<()> {
        let count = as_index(pages.min(CHUNK_PAGES_MAX));
        into.count = 0;
        let offset = start.0 / PAGE_BYTES * ENTRY_BYTES as u64;
        self.file.read_exact_at(&mut into.bytes[..count * ENTRY_BYTES], offset)?;
        into.count = count;
        Ok(())
    }

    /// How many pages exist whose write protection does not stand: where all was protected before, those that
    /// were written to since. A page that was only read into being, and so is the kernel's zero page, is none.
    ///
    /// # Errors
    /// As [`scan`].
    pub fn count_written(&self, start: HostVirtAddr, len_bytes: u64) -> io::Result<u64> {
        let written = Query {
            all_of: PAGE_IS_WRITTEN,
            none_of: PAGE_IS_PFNZERO,
            // Where there is not even a page table, the kernel says "written".
            any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            flags: 0,
        };
        scan(self.file.as_fd(), start, len_bytes, written)
    }

    /// Whether anonymous memory there is mapped by transparent huge pages.
    ///
    /// # Errors
    /// As [`scan`].
    pub fn has_anonymous_huge_pages(
        &self,
        start: HostVirtAddr,
        len_bytes: u64,
    ) -> io::Result<bool> {
        let huge = Query { all_of: PAGE_IS_HUGE, none_of: PAGE_IS_FILE, any_of: 0, flags: 0 };
        Ok(scan(self.file.as_fd(), start, len_bytes, huge)? > 0)
    }

    /// Write-protects the pages that exist, and leaves no marker where none does. The range must be registered with a
    /// context that lets writes through.
    ///
    /// # Errors
    /// As [`scan`].
    pub fn protect_existing(&self, start: HostVirtAddr, len_bytes: u64) -> io::Result<()> {
        let existing = Query {
            all_of: 0,
            none_of: 0,
            any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            flags: PM_SCAN_WP_MATCHING,
        };
        scan(self.file.as_fd(), start, len_bytes, existing).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_holes_and_swapped_pages_are_not() {
        assert!(Entry(0).is_hole());
        assert!(Entry(SWAPPED | UFFD_WP | 1 << 5 | 30).is_hole());
        assert!(!Entry(SWAPPED | UFFD_WP | 1 << 5 | 3).is_hole(), "type 3 is a swap file");
        assert!(!Entry(SWAPPED | UFFD_WP | 77 << 5 | 30).is_hole(), "not the marker bit");
        assert!(!Entry(PRESENT | UFFD_WP).is_hole());
        assert!(Entry(PRESENT | UFFD_WP).is_protected());
        assert!(!Entry(PRESENT).is_protected());
    }
}
