//! Memory of every kind that guest RAM is made of, for tests; nothing of it exists before it is touched.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::memory::HUGE_BYTES;
use crate::address::{PAGE_BYTES, as_index};

/// What the memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory of 4 KiB pages.
    Anonymous,
    /// Shared anonymous memory, which is a tmpfs file.
    Shared,
    /// Pages of 2 MiB from the pool, private.
    PrivatePool,
    /// The same, shared.
    SharedPool,
}

impl Kind {
    /// Size of its pages in bytes.
    pub const fn page_bytes(self) -> usize {
        match self {
            Self::Anonymous | Self::Shared => as_index(PAGE_BYTES),
            Self::PrivatePool | Self::SharedPool => HUGE_BYTES,
        }
    }

    const fn flags(self) -> MapFlags {
        match self {
            Self::Anonymous => MapFlags::PRIVATE,
            Self::Shared => MapFlags::SHARED,
            Self::PrivatePool => MapFlags::PRIVATE.union(MapFlags::HUGETLB),
            Self::SharedPool => MapFlags::SHARED.union(MapFlags::HUGETLB),
        }
    }
}

/// A mapping; gone when dropped.
pub struct TestMemory {
    start: NonNull<u8>,
    len: usize,
    kind: Kind,
}

// SAFETY: the mapping is owned by this value alone.
unsafe impl Send for TestMemory {}
// SAFETY: it is reached only through atomics.
unsafe impl Sync for TestMemory {}

impl TestMemory {
    /// Maps `pages` pages of `kind`.
    ///
    /// # Errors
    /// `ENOMEM` if the pool has not so many.
    pub fn map(kind: Kind, pages: usize) -> io::Result<Self> {
        let len = pages * kind.page_bytes();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint asks for a fresh mapping, which aliases nothing.
        let raw = unsafe { mmap_anonymous(std::ptr::null_mut(), len, protection, kind.flags()) }?;
        let start = NonNull::new(raw.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let memory = Self { start, len, kind };
        if kind == Kind::Anonymous {
            // SAFETY: the advice changes no content, and the range is this mapping.
            unsafe { madvise(raw, len, Advice::LinuxNoHugepage) }?;
        }
        Ok(memory)
    }

    /// Its first address.
    pub fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// Its length in bytes.
    pub const fn len_bytes(&self) -> u64 {
        self.len as u64
    }

    /// What it is made of.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The first word of each page.
    pub fn words(&self) -> impl Iterator<Item = &AtomicU64> {
        (0..self.len).step_by(self.kind.page_bytes()).map(|offset| self.word(offset))
    }

    /// Writes whole words from the start on.
    pub fn write(&self, words: &[u64]) {
        for (index, &word) in words.iter().enumerate() {
            self.word(index * size_of::<u64>()).store(word, Ordering::Relaxed);
        }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(size_of::<u64>()) && offset < self.len);
        // SAFETY: the offset lies in the mapping.
        let word = unsafe { self.start.add(offset) };
        // SAFETY: mapped as long as `self` lives, aligned, and reached only as an atomic.
        unsafe { word.cast().as_ref() }
    }
}

impl Drop for TestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is owned by `self`, and no borrow outlives it.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}
