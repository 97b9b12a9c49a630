//! How much of a guest's RAM a snapshot would have to write: at most, by the process's mappings, and about, by looking
//! at a random sample of its pages.
//!
//! Memory that does not exist takes no room, nor does memory of zeros; guests leave much of both. Memory is only read,
//! and only where it exists, so nothing comes into being by it. Runs on the caller's thread.

use std::io::{self, IoSliceMut};
use std::path::{Path, PathBuf};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use rustix::process::Pid;

use crate::Reason;
use crate::address::{HostVirtAddr, PAGE_BYTES, as_index};
use crate::dirty_rate::Random;
use crate::image::{self, ImageError};
use crate::mappings::{MappingError, MappingKind, RamMapping};
use crate::pagemap::{Entries, Pagemap};
use crate::ram::RamLayout;
use crate::vmm::{Vmm, VmmError};

/// Pages that are looked at: some microseconds each, and an error of 2 % of RAM at most.
const PAGES: u64 = 2048;
/// Standard errors in half a 95 % confidence interval.
const STANDARD_ERRORS: f64 = 2.0;
/// If of `n` pages none is of one kind, with 95 % confidence no more than `3 / n` of all are.
const RULE_OF_THREE: f64 = 3.0;

/// What a guest's RAM is made of.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Footprint {
    /// All RAM, in bytes.
    pub ram_bytes: u64,
    /// Memory with anything but zeros in it, in bytes.
    pub stored_bytes: f64,
    /// Half the width of its 95 % confidence interval, in bytes.
    pub stored_error_bytes: f64,
    /// Most that a snapshot can take at its destination, in bytes.
    pub size_max_bytes: u64,
}

/// Why that is not known.
#[derive(Debug, thiserror::Error)]
pub enum FootprintError {
    /// The VMM refused.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The memory's mappings are not known.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// A page could not be looked at.
    #[error(
        "cannot look at the memory of process {pid} at {address}: {source}: check that it runs and that livesnap is root"
    )]
    Look {
        /// The process.
        pid: i32,
        /// Where.
        address: HostVirtAddr,
        /// Errno.
        source: io::Error,
    },
}

impl FootprintError {
    /// Stable code.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Vmm(error) => error.reason,
            Self::Mapping(_) => Reason::NoProcess,
            Self::Look { .. } => Reason::Memory,
        }
    }
}

/// Looks at pages of `vmm`'s RAM that `seed` decides on.
///
/// # Errors
/// If the VMM or its memory cannot be looked at.
pub fn look(vmm: &mut dyn Vmm, seed: u64) -> Result<Footprint, FootprintError> {
    let pid = vmm.pid();
    let layout = vmm.ram_layout()?;
    let mappings = vmm.ram_mappings(&layout)?;
    let failed =
        |address| move |source| FootprintError::Look { pid: pid.as_raw_pid(), address, source };
    let pagemap = Pagemap::open(pid).map_err(failed(HostVirtAddr(0)))?;
    let (mut looked, mut stored) = (0, 0);
    for address in sample(&layout, &mut Random::new(seed)) {
        looked += 1;
        let is_stored = is_stored(pid, &pagemap, address).map_err(failed(address))?;
        stored += u64::from(is_stored);
    }
    let ram_bytes = layout.total_bytes();
    let (share, error) = share(stored, looked);
    Ok(Footprint {
        ram_bytes,
        stored_bytes: share * number(ram_bytes),
        stored_error_bytes: error * number(ram_bytes),
        size_max_bytes: size_max_bytes(pid, &layout, &mappings),
    })
}

/// Most that a snapshot can take: all memory that exists, and the tables.
#[must_use]
pub fn size_max_bytes(pid: Pid, layout: &RamLayout, mappings: &[RamMapping]) -> u64 {
    let populated: u64 = mappings.iter().map(|mapping| populated_bytes(pid, mapping)).sum();
    let total_bytes = layout.total_bytes();
    // A bit and a checksum of four bytes for each page; alignment, device state and manifest.
    let tables_bytes = total_bytes / PAGE_BYTES / 8 + total_bytes / PAGE_BYTES * 4;
    let blocks = layout.blocks().len() as u64;
    populated.min(total_bytes) + tables_bytes + (blocks + 4) * (1 << 20)
}

/// A destination without room.
#[derive(Debug, thiserror::Error)]
#[error(
    "the snapshot needs up to {needed_bytes} bytes and {path:?} has {free_bytes} free: free space there or choose another destination"
)]
pub struct NoSpace {
    /// The directory that the snapshot would be made in.
    pub path: PathBuf,
    /// What it may need at most, in bytes.
    pub needed_bytes: u64,
    /// What is free there, in bytes.
    pub free_bytes: u64,
}

/// Whether the place of `destination` lacks room for `needed_bytes`.
///
/// # Errors
/// If the file system cannot be asked.
pub fn lacks_space(destination: &Path, needed_bytes: u64) -> Result<Option<NoSpace>, ImageError> {
    let parent = destination.parent().filter(|parent| !parent.as_os_str().is_empty());
    let path = parent.unwrap_or(Path::new(".")).to_owned();
    let free_bytes = image::free_bytes(&path)?;
    Ok((free_bytes < needed_bytes).then_some(NoSpace { path, needed_bytes, free_bytes }))
}

/// Memory in a mapping that exists. Of shared memory this process may have mapped only a part.
fn populated_bytes(pid: Pid, mapping: &RamMapping) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    if mapping.kind != MappingKind::SharedMemory {
        return mapping.rss_bytes;
    }
    let (start, end) = (mapping.start.0, mapping.end().0);
    std::fs::metadata(format!("/proc/{}/map_files/{start:x}-{end:x}", pid.as_raw_pid()))
        .map_or(mapping.len_bytes, |file| (file.blocks() * 512).min(mapping.len_bytes))
        .max(mapping.rss_bytes)
}

/// One page of each of [`PAGES`] strata of RAM, or of every page if they are fewer.
fn sample<'a>(
    layout: &'a RamLayout,
    random: &'a mut Random,
) -> impl Iterator<Item = HostVirtAddr> + 'a {
    let pages: u64 = layout.blocks().iter().map(crate::ram::RamBlock::pages).sum();
    let strata = pages.min(PAGES);
    (0..strata).filter_map(move |stratum| {
        let first = stratum * pages / strata;
        let end = (stratum + 1) * pages / strata;
        let mut page = first + random.below(end - first);
        for block in layout.blocks() {
            if page < block.pages() {
                return Some(block.hva.add(page * PAGE_BYTES));
            }
            page -= block.pages();
        }
        None
    })
}

/// Whether the page at `address` exists and holds anything but zeros.
fn is_stored(pid: Pid, pagemap: &Pagemap, address: HostVirtAddr) -> io::Result<bool> {
    let mut entries = Entries::new();
    pagemap.read(address, 1, &mut entries)?;
    // To read a hole of shared memory would fill it.
    if entries.iter().all(crate::pagemap::Entry::is_hole) {
        return Ok(false);
    }
    let mut page = [0; as_index(PAGE_BYTES)];
    let base = as_index(address.0);
    let remote = [RemoteIoVec { base, len: page.len() }];
    let pid = nix::unistd::Pid::from_raw(pid.as_raw_pid());
    match process_vm_readv(pid, &mut [IoSliceMut::new(&mut page)], &remote) {
        Ok(read) => Ok(page[..read].iter().any(|&byte| byte != 0)),
        Err(errno) => Err(io::Error::from_raw_os_error(errno as i32)),
    }
}

/// A share with half its 95 % confidence interval.
fn share(some: u64, of: u64) -> (f64, f64) {
    if of == 0 {
        return (0.0, 0.0);
    }
    let (share, count) = (number(some) / number(of), number(of));
    let error = STANDARD_ERRORS * (share * (1.0 - share) / count).sqrt();
    (share, error.max(if some == 0 || some == of { RULE_OF_THREE / count } else { 0.0 }))
}

#[expect(clippy::cast_precision_loss, reason = "no machine has 2^53 bytes")]
const fn number(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::ram::RamBlock;
    use rustix::process::getpid;

    #[test]
    fn what_holds_something_is_told_from_zeros_and_holes() {
        const LEN: usize = 64 << 20;
        let mut bytes = vec![0_u8; LEN + 4096];
        let aligned = bytes.as_ptr().align_offset(4096);
        let pages = bytes[aligned..].as_chunks_mut::<4096>().0;
        let pages = &mut pages[..LEN / 4096];
        // A quarter holds something, a quarter exists and is zero, the rest does not exist.
        for page in &mut pages[..LEN / 4096 / 4] {
            page[4095] = 1;
        }
        for page in &mut pages[LEN / 4096 / 4..LEN / 4096 / 2] {
            page[0] = 0;
        }
        let block = RamBlock {
            id: "ram".into(),
            hva: HostVirtAddr(pages.as_ptr().addr() as u64),
            len_bytes: LEN as u64,
            page_size_bytes: PAGE_BYTES,
            store_zero_pages: false,
        };
        let layout = RamLayout::new(vec![block]).unwrap();
        let pagemap = Pagemap::open(getpid()).unwrap();
        let mut random = Random::new(3);
        let found = sample(&layout, &mut random);
        let stored = found.filter(|&at| is_stored(getpid(), &pagemap, at).unwrap()).count();
        // One page of each stratum: the quarter, and no stratum lies across its end.
        assert_eq!(stored as u64, PAGES / 4);
    }

    #[test]
    fn a_share_has_an_error_also_where_all_are_alike() {
        assert_eq!(share(0, 0), (0.0, 0.0));
        let (half, error) = share(1024, 2048);
        assert!((half - 0.5).abs() < 1e-9 && (error - 0.0221).abs() < 1e-3, "{error}");
        for some in [0, 2048] {
            assert!((share(some, 2048).1 - 3.0 / 2048.0).abs() < 1e-9);
        }
    }
}
