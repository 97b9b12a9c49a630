//! Memory for the copy buffer: huge-page aligned, so that reading guest pages into it and writing it out
//! with `O_DIRECT` costs the kernel one page-table entry instead of 512.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Bytes in a [`HugeBuffer`], and its alignment: one x86-64 huge page.
pub const HUGE_BYTES: usize = 2 << 20;

/// [`HUGE_BYTES`] of private, zeroed, populated memory.
pub struct HugeBuffer {
    start: NonNull<u8>,
}

// SAFETY: the mapping is owned by this value alone and reached only through its `&`/`&mut` borrows.
unsafe impl Send for HugeBuffer {}
// SAFETY: a shared borrow only reads.
unsafe impl Sync for HugeBuffer {}

impl HugeBuffer {
    /// Maps and populates a buffer.
    ///
    /// # Errors
    /// The kernel's, when there is no memory or no room for another mapping.
    pub fn new() -> io::Result<Self> {
        // Twice the size always contains an aligned part; the rest is given back at once.
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint asks for a fresh mapping, which aliases nothing.
        let raw = unsafe {
            mmap_anonymous(std::ptr::null_mut(), 2 * HUGE_BYTES, protection, MapFlags::PRIVATE)
        }?;
        let head = raw.cast::<u8>().align_offset(HUGE_BYTES);
        let start = raw.cast::<u8>().wrapping_add(head);
        let tail = HUGE_BYTES - head;
        if head > 0 {
            // SAFETY: `[raw, raw + head)` lies in the mapping just made and nothing refers to it.
            unsafe { munmap(raw, head) }?;
        }
        if tail > 0 {
            // SAFETY: the last `tail` bytes of the mapping just made; nothing refers to them.
            unsafe { munmap(start.wrapping_add(HUGE_BYTES).cast(), tail) }?;
        }
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        let buffer = Self { start };
        // Without huge pages (disabled, or none free) the buffer still works, only slower.
        // SAFETY: the advice changes no content, and the range is this mapping.
        let _ = unsafe { madvise(start.as_ptr().cast(), HUGE_BYTES, Advice::LinuxHugepage) };
        // SAFETY: populating the range of this mapping for writing changes no content.
        unsafe { madvise(start.as_ptr().cast(), HUGE_BYTES, Advice::LinuxPopulateWrite) }?;
        Ok(buffer)
    }
}

impl Deref for HugeBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `HUGE_BYTES` initialised (zeroed) bytes, owned by `self` and borrowed from it.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), HUGE_BYTES) }
    }
}

impl DerefMut for HugeBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), HUGE_BYTES) }
    }
}

impl Drop for HugeBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is owned by `self`, and no borrow outlives it.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), HUGE_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;

    #[test]
    fn a_buffer_is_aligned_zeroed_and_writable() {
        let mut buffer = HugeBuffer::new().unwrap();
        assert_eq!(buffer.as_ptr().align_offset(HUGE_BYTES), 0);
        assert!(buffer.iter().all(|&byte| byte == 0));
        buffer[HUGE_BYTES - 1] = 7;
        assert_eq!(buffer[HUGE_BYTES - 1], 7);
    }
}
