//! Addition that other CPUs may do at the same time. The compiler's own atomics are not there for this target, because
//! it counts as one that cannot compare and exchange.

use core::arch::asm;

/// Adds to `*value`, wrapping, and returns what was there before. Linux 5.12.
///
/// # Safety
/// `value` is valid for writes and aligned, and all others that write to it do so by this function.
#[inline(always)]
pub unsafe fn fetch_add(value: *mut u64, mut by: u64) -> u64 {
    // SAFETY: by the caller's word.
    unsafe {
        asm!(
            "{by} = atomic_fetch_add((u64 *)({value} + 0), {by})",
            value = in(reg) value,
            by = inout(reg) by,
            options(nostack, preserves_flags),
        );
    }
    by
}
