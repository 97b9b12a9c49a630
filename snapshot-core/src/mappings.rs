//! What stands behind guest RAM in the process that owns it, read from `/proc/PID/smaps`.
//!
//! The preflight judges by it whether RAM can be write-protected at all; the engine chooses by it how to
//! read pages. Reading smaps walks the page tables, tens of milliseconds per GiB of populated RAM in small pages, so
//! a snapshot looks once, before anything begins, and the daemon only at those that it takes no snapshot of.

use std::path::PathBuf;

use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process, VmFlags};
use rustix::process::Pid;

use crate::address::HostVirtAddr;
use crate::ram::RamLayout;

/// `f_type` of tmpfs, memfd and shared anonymous memory (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// `f_type` of hugetlbfs and huge page memfds (linux/magic.h).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What backs a mapping, as far as userfaultfd makes a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingKind {
    /// Private anonymous memory.
    Anonymous,
    /// memfd, tmpfs, System V or shared anonymous memory, of base or transparent huge pages.
    SharedMemory,
    /// Pages of the huge page pool, private or shared.
    Hugetlb,
    /// Anything else: a file on a file system that cannot be write-protected, or a device.
    File,
}

/// One mapping (VMA) that holds guest RAM; it may reach beyond the RAM blocks on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamMapping {
    /// First address.
    pub start: HostVirtAddr,
    /// Length in bytes.
    pub len_bytes: u64,
    /// What backs it.
    pub kind: MappingKind,
    /// `MAP_SHARED`: another process can have the same pages.
    pub shared: bool,
    /// Name of the backing file, if it has one; gone files end in ` (deleted)`.
    pub path: Option<PathBuf>,
    /// Offset in the backing file, in bytes.
    pub offset_bytes: u64,
    /// Device (major, minor) of the backing file; with `inode` it names the file among all processes.
    pub device: (i32, i32),
    /// Inode of the backing file; 0 without one.
    pub inode: u64,
    /// Whether kernel same-page merging may merge its pages (`mg`).
    pub mergeable: bool,
    /// Whether a userfaultfd is registered for it already (`um` or `uw`).
    pub has_userfaultfd: bool,
    /// Page size of the backing memory in bytes.
    pub page_size_bytes: u64,
    /// Bytes of it in RAM.
    pub rss_bytes: u64,
    /// Bytes of it in anonymous or shared transparent huge pages.
    pub huge_bytes: u64,
    /// Bytes of it that same-page merging has merged.
    pub merged_bytes: u64,
}

impl RamMapping {
    /// The address after the last one.
    #[must_use]
    pub const fn end(&self) -> HostVirtAddr {
        self.start.add(self.len_bytes)
    }
}

/// Why the mappings of guest RAM could not be told.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// procfs could not be read.
    #[error(
        "cannot read the memory mappings of process {pid}: {source}: check that it runs and that livesnap has CAP_SYS_PTRACE"
    )]
    Read {
        /// The process.
        pid: i32,
        /// procfs's error.
        source: procfs::ProcError,
    },
    /// A block's addresses are not mapped readable and writable in the process.
    #[error(
        "ram block {id:?} is not mapped at {address} in process {pid}: the process is not the one that the control socket belongs to, or RAM was unplugged meanwhile"
    )]
    Unmapped {
        /// Block id.
        id: String,
        /// First address that is missing.
        address: HostVirtAddr,
        /// The process.
        pid: i32,
    },
}

/// The mappings that hold the blocks of `layout` in process `pid`, ascending, each once.
///
/// # Errors
/// If procfs cannot be read, or a part of a block is not mapped.
pub fn covering(pid: Pid, layout: &RamLayout) -> Result<Vec<RamMapping>, MappingError> {
    let pid = pid.as_raw_nonzero().get();
    let read = |source| MappingError::Read { pid, source };
    let maps = Process::new(pid).and_then(|process| process.smaps()).map_err(read)?.0;
    select(pid, &maps, layout)?.into_iter().map(|map| describe(pid, map).map_err(read)).collect()
}

/// Those of `maps` (ascending, as procfs lists them) that hold a part of a block.
fn select<'a>(
    pid: i32,
    maps: &'a [MemoryMap],
    layout: &RamLayout,
) -> Result<Vec<&'a MemoryMap>, MappingError> {
    let mut chosen = vec![false; maps.len()];
    for block in layout.blocks() {
        let end = block.hva.add(block.len_bytes).0;
        let mut next = block.hva.0;
        let mut at = maps.partition_point(|map| map.address.1 <= next);
        while next < end {
            let usable = MMPermissions::READ | MMPermissions::WRITE;
            let map = maps
                .get(at)
                .filter(|map| map.address.0 <= next && map.perms.contains(usable))
                .ok_or_else(|| MappingError::Unmapped {
                    id: block.id.clone(),
                    address: HostVirtAddr(next),
                    pid,
                })?;
            chosen[at] = true;
            next = map.address.1;
            at += 1;
        }
    }
    Ok(maps.iter().zip(chosen).filter_map(|(map, chosen)| chosen.then_some(map)).collect())
}

fn describe(pid: i32, map: &MemoryMap) -> Result<RamMapping, procfs::ProcError> {
    let (start, end) = map.address;
    let bytes = |field: &str| map.extension.map.get(field).copied().unwrap_or(0);
    let flags = map.extension.vm_flags;
    let path = match &map.pathname {
        MMapPath::Path(path) => Some(path.clone()),
        _ => None,
    };
    Ok(RamMapping {
        start: HostVirtAddr(start),
        len_bytes: end - start,
        kind: kind(pid, map)?,
        shared: map.perms.contains(MMPermissions::SHARED),
        path,
        offset_bytes: map.offset,
        device: map.dev,
        inode: map.inode,
        mergeable: flags.contains(VmFlags::MG),
        has_userfaultfd: flags.intersects(VmFlags::UM | VmFlags::UW),
        page_size_bytes: bytes("KernelPageSize"),
        rss_bytes: bytes("Rss"),
        huge_bytes: bytes("AnonHugePages") + bytes("ShmemPmdMapped"),
        merged_bytes: bytes("KSM"),
    })
}

fn kind(pid: i32, map: &MemoryMap) -> Result<MappingKind, procfs::ProcError> {
    if map.extension.vm_flags.contains(VmFlags::HT) {
        return Ok(MappingKind::Hugetlb);
    }
    if map.inode == 0 {
        return Ok(MappingKind::Anonymous);
    }
    // The path may be gone or lie in another mount namespace; this link leads to the file itself.
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", map.address.0, map.address.1);
    let file_system = rustix::fs::statfs(&link).map_err(std::io::Error::from)?;
    Ok(match file_system.f_type {
        TMPFS_MAGIC => MappingKind::SharedMemory,
        HUGETLBFS_MAGIC => MappingKind::Hugetlb,
        _ => MappingKind::File,
    })
}

#[cfg(test)]
impl RamMapping {
    /// Private anonymous memory of base pages, none of which exists yet.
    pub(crate) const fn anonymous(start: HostVirtAddr, len_bytes: u64) -> Self {
        Self {
            start,
            len_bytes,
            kind: MappingKind::Anonymous,
            shared: false,
            path: None,
            offset_bytes: 0,
            device: (0, 0),
            inode: 0,
            mergeable: false,
            has_userfaultfd: false,
            page_size_bytes: 4096,
            rss_bytes: 0,
            huge_bytes: 0,
            merged_bytes: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::address::PAGE_BYTES;
    use crate::ram::RamBlock;
    use procfs::FromBufRead;
    use procfs::process::MemoryMaps;

    fn block(hva: u64, len_bytes: u64) -> RamBlock {
        RamBlock {
            id: "ram".into(),
            hva: HostVirtAddr(hva),
            len_bytes,
            page_size_bytes: PAGE_BYTES,
            store_zero_pages: false,
        }
    }

    const SMAPS: &str = "\
7f0000000000-7f0000100000 rw-p 00000000 00:00 0 \n\
Size:               1024 kB\n\
KernelPageSize:        4 kB\n\
Rss:                 512 kB\n\
AnonHugePages:         8 kB\n\
KSM:                   4 kB\n\
VmFlags: rd wr mr mw me ac sd mg uw \n\
7f0000100000-7f0000200000 rw-p 00000000 00:00 0 \n\
VmFlags: rd wr mr mw me ac sd \n\
7f0000300000-7f0000400000 r--p 00000000 00:00 0 \n\
VmFlags: rd mr mw me ac sd \n";

    fn maps() -> Vec<MemoryMap> {
        MemoryMaps::from_buf_read(SMAPS.as_bytes()).unwrap().0
    }

    #[test]
    fn a_block_may_span_mappings_and_begin_inside_one() {
        let maps = maps();
        let layout = RamLayout::new(vec![block(0x7f00_0008_0000, 0x10_0000)]).unwrap();
        let found = select(1, &maps, &layout).unwrap();
        assert_eq!(found.len(), 2);
        let first = describe(1, found[0]).unwrap();
        assert_eq!((first.rss_bytes, first.huge_bytes, first.merged_bytes), (524_288, 8192, 4096));
        assert_eq!(first.kind, MappingKind::Anonymous);
        assert!(first.mergeable && first.has_userfaultfd && !first.shared);
        assert_eq!(first.end(), HostVirtAddr(0x7f00_0010_0000));
        assert!(!describe(1, found[1]).unwrap().mergeable);
    }

    #[test]
    fn holes_and_read_only_parts_are_errors() {
        let maps = maps();
        for (start, missing) in
            [(0x7f00_001f_f000, 0x7f00_0020_0000), (0x7f00_0030_0000, 0x7f00_0030_0000)]
        {
            let layout = RamLayout::new(vec![block(start, 0x2000)]).unwrap();
            let error = select(1, &maps, &layout).unwrap_err();
            assert!(
                matches!(error, MappingError::Unmapped { address, .. } if address.0 == missing),
                "{error}"
            );
        }
    }

    #[test]
    fn the_backing_is_told_from_the_process_itself() {
        let pid = rustix::process::getpid();
        let heap = vec![1_u8; 1 << 20];
        let address = (heap.as_ptr().addr() as u64).next_multiple_of(PAGE_BYTES);
        let layout = RamLayout::new(vec![block(address, PAGE_BYTES)]).unwrap();
        let found = covering(pid, &layout).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].kind, MappingKind::Anonymous);
        assert!(found[0].rss_bytes >= PAGE_BYTES);
        assert_eq!(found[0].page_size_bytes, PAGE_BYTES);
    }
}
