//! `PAGEMAP_SCAN`: counts the pages of a range that are in a given state, and protects them in the same step.
//!
//! Source: `Documentation/admin-guide/mm/pagemap.rst`, section "Pagemap Scan IOCTL"; Linux 6.7.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use linux_raw_sys::general::{page_region, pm_scan_arg};

use crate::address::{HostVirtAddr, PAGE_BYTES};

/// `_IOWR('f', 16, struct pm_scan_arg)` of `linux/fs.h`.
const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;
const _: () = assert!(size_of::<pm_scan_arg>() == 0x60);

/// Runs of pages that one call can tell: as many as 512 pages can have.
const REGIONS: usize = 256;

/// Which pages are meant, in categories of `linux/fs.h`.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// Categories that a page must be in.
    pub all_of: u32,
    /// Categories that it must not be in.
    pub none_of: u32,
    /// Categories of which it must be in at least one; 0 for no such condition.
    pub any_of: u32,
    /// Whether what is found is write-protected (`PM_SCAN_WP_MATCHING` or 0), in ranges whose context has `WP_ASYNC`.
    pub flags: u32,
}

/// Counts the pages from `start` on that `query` means.
///
/// `pagemap` is `/proc/PID/pagemap`, opened with the right to read that process's memory.
///
/// # Errors
/// `ENOTTY` before Linux 6.7, `ESRCH` when the process is gone.
pub fn scan(
    pagemap: BorrowedFd<'_>,
    start: HostVirtAddr,
    len_bytes: u64,
    query: Query,
) -> io::Result<u64> {
    let mut regions = [page_region { start: 0, end: 0, categories: 0 }; REGIONS];
    let mut arguments = pm_scan_arg {
        size: size_of::<pm_scan_arg>() as u64,
        flags: query.flags.into(),
        start: start.0,
        end: start.0 + len_bytes,
        walk_end: 0,
        vec: regions.as_mut_ptr().expose_provenance() as u64,
        vec_len: REGIONS as u64,
        max_pages: 0,
        category_inverted: query.none_of.into(),
        category_mask: (query.all_of | query.none_of).into(),
        category_anyof_mask: query.any_of.into(),
        return_mask: 0,
    };
    let mut pages = 0;
    while arguments.start < arguments.end {
        // SAFETY: the kernel reads and writes one `pm_scan_arg` and up to `vec_len` elements at `vec`, which are
        // `arguments` and `regions`; of the memory of the process that `pagemap` belongs to it changes protection only.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        let found = regions.iter().take(count);
        pages += found.map(|region| (region.end - region.start) / PAGE_BYTES).sum::<u64>();
        if arguments.walk_end <= arguments.start {
            return Err(io::Error::other("PAGEMAP_SCAN does not advance"));
        }
        arguments.start = arguments.walk_end;
    }
    Ok(pages)
}
