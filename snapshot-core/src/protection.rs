//! Guest RAM under userfaultfd contexts: which page belongs to which context, and how it reads.
//!
//! A [`Region`] is a stretch of one RAM block in one mapping under one context. Contexts are sharded by
//! address range because one context is one wait queue: it does not scale past a few faulting CPUs.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{SeekFrom, seek};
use rustix::process::Pid;

use crate::address::{HostVirtAddr, PAGE_BYTES, PageIndex, PageRun};
use crate::chunk::CHUNK_PAGES_MAX;
use crate::mappings::{MappingKind, RamMapping};
use crate::ram::RamLayout;
use crate::sys::uffd::{Context, Notices};

/// Most that one ioctl protects: it holds the target's `mmap_lock` for reading all the while.
const PROTECT_BYTES_MAX: u64 = 256 << 20;

/// How pages without content are told in a region.
enum Holes {
    /// The page table tells: private anonymous memory.
    InPageTable,
    /// The file tells (`SEEK_DATA`): shared memory may have pages that this page table does not show.
    InFile {
        file: File,
        /// File offset of the region's first byte.
        offset_bytes: u64,
    },
    /// Nothing tells cheaply, or zero pages are stored as well: every page is read.
    Unknown,
}

/// A stretch of RAM that is protected and read in one way.
pub struct Region {
    /// Its pages.
    pub run: PageRun,
    /// Address of the first one.
    pub hva: HostVirtAddr,
    /// Index of the context that it is registered with.
    pub context: usize,
    /// Pages that must be protected, captured and unprotected together because they are one page to the
    /// hardware or the pool: 1 or 512.
    pub unit_pages: u64,
    /// Whether keeping huge pages whole is worth capturing them whole.
    pub has_huge_pages: bool,
    holes: Holes,
}

impl Region {
    /// The address of `page`, which must lie in the region.
    #[must_use]
    pub const fn address_of(&self, page: PageIndex) -> HostVirtAddr {
        self.hva.add((page.0 - self.run.first.0) * PAGE_BYTES)
    }

    /// The part of the region around `page` that is aligned in memory to `pages`, a power of two.
    #[must_use]
    pub fn window(&self, page: PageIndex, pages: u64) -> PageRun {
        let pages = pages.max(self.unit_pages);
        // Alignment counts in host memory: that is where huge pages lie.
        let skew = self.hva.0 / PAGE_BYTES;
        let number = page.0 - self.run.first.0 + skew;
        let start = (number - number % pages).max(skew) - skew;
        let end = (number - number % pages + pages - skew).min(self.run.count);
        PageRun { first: PageIndex(self.run.first.0 + start), count: end - start }
    }

    /// All windows of `pages`, ascending.
    pub fn windows(&self, pages: u64) -> impl Iterator<Item = PageRun> + '_ {
        let mut next = self.run.first;
        std::iter::from_fn(move || {
            let window = (next.0 < self.run.end()).then(|| self.window(next, pages))?;
            next = PageIndex(window.end());
            Some(window)
        })
    }

    /// Whether the page table tells which pages are holes.
    #[must_use]
    pub const fn holes_in_page_table(&self) -> bool {
        matches!(self.holes, Holes::InPageTable)
    }

    /// Whether the page table alone holds the region's protection, so that a kernel without
    /// `WP_UNPOPULATED` cannot protect what it does not show.
    #[must_use]
    pub const fn is_protected_where_populated(&self) -> bool {
        !matches!(self.holes, Holes::InFile { .. })
    }

    /// The first run of pages from `page` on that has content according to the backing file, or nothing if
    /// there is none; the rest of the region where the file does not tell.
    ///
    /// # Errors
    /// The file system's.
    pub fn data_in_file(&self, page: PageIndex) -> io::Result<Option<PageRun>> {
        let Holes::InFile { file, offset_bytes } = &self.holes else {
            return Ok(Some(PageRun { first: page, count: self.run.end() - page.0 }));
        };
        let at = |page: u64| offset_bytes + (page - self.run.first.0) * PAGE_BYTES;
        let page_of = |offset: u64| (offset - offset_bytes) / PAGE_BYTES + self.run.first.0;
        let data = match seek(file, SeekFrom::Data(at(page.0))) {
            Ok(offset) => page_of(offset),
            // No data from here to the end of file.
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if data >= self.run.end() {
            return Ok(None);
        }
        let hole = page_of(seek(file, SeekFrom::Hole(at(data)))?).min(self.run.end());
        Ok(Some(PageRun { first: PageIndex(data), count: hole - data }))
    }
}

/// Remembers where the file behind a region has content, for a pass in ascending order: looking it up
/// takes the kernel a walk over all pages up to the next hole.
#[derive(Default)]
pub struct DataCursor {
    /// Pages that are looked up: from here to the end of `data`, or to the region's end if that is nothing.
    from: u64,
    end: u64,
    data: Option<PageRun>,
}

impl DataCursor {
    /// The first part of `run`, which lies in `region`, that has content.
    ///
    /// # Errors
    /// The file system's.
    pub fn first_data(&mut self, region: &Region, run: PageRun) -> io::Result<Option<PageRun>> {
        if run.first.0 < self.from || run.first.0 >= self.end {
            self.data = region.data_in_file(run.first)?;
            self.from = run.first.0;
            self.end = self.data.map_or(region.run.end(), PageRun::end);
        }
        Ok(self.data.and_then(|data| {
            let first = data.first.max(run.first);
            let end = data.end().min(run.end());
            (first.0 < end).then(|| PageRun { first, count: end - first.0 })
        }))
    }
}

/// All RAM with its contexts. Dropping it closes the contexts: the kernel then unprotects everything.
pub struct ProtectedRam {
    /// Where pages are.
    pub layout: RamLayout,
    /// The contexts; a fault thread reads each.
    pub contexts: Vec<Context>,
    regions: Vec<Region>,
    /// Set before the first region is given up.
    given_up: AtomicBool,
}

impl ProtectedRam {
    /// Divides `layout` among `contexts` and registers it; nothing is protected yet.
    ///
    /// # Errors
    /// With the address at which the kernel refused.
    pub fn register(
        pid: Pid,
        layout: RamLayout,
        mappings: &[RamMapping],
        contexts: Vec<Context>,
    ) -> Result<Self, RegisterError> {
        let regions = divide(pid, &layout, mappings, contexts.len())?;
        let ram = Self { layout, contexts, regions, given_up: AtomicBool::new(false) };
        for region in &ram.regions {
            let len_bytes = region.run.bytes();
            ram.contexts[region.context].register(region.hva, len_bytes).map_err(|source| {
                RegisterError::Register { start: region.hva, len_bytes, source }
            })?;
        }
        Ok(ram)
    }

    /// All regions, ascending by page.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The region of a page of the layout.
    #[must_use]
    pub fn region_of(&self, page: PageIndex) -> &Region {
        let after = self.regions.partition_point(|region| region.run.first <= page);
        &self.regions[after - 1]
    }

    /// Write-protects `run`, which lies in `region`.
    ///
    /// # Errors
    /// As [`Context::protect`].
    pub fn protect(&self, region: &Region, run: PageRun) -> io::Result<()> {
        let context = &self.contexts[region.context];
        let (start, len_bytes) = (region.address_of(run.first), run.bytes());
        (0..len_bytes.div_ceil(PROTECT_BYTES_MAX)).try_for_each(|slice| {
            let offset = slice * PROTECT_BYTES_MAX;
            context.protect(start.add(offset), PROTECT_BYTES_MAX.min(len_bytes - offset))
        })
    }

    /// Makes `run`, which lies in `region`, writable and wakes who waits for it.
    ///
    /// # Errors
    /// As [`Context::unprotect`]. None once RAM is given up: then it is writable anyhow.
    pub fn unprotect(&self, region: &Region, run: PageRun) -> io::Result<()> {
        let context = &self.contexts[region.context];
        match context.unprotect(region.address_of(run.first), run.bytes()) {
            // Notices are served, and last pages made writable, while RAM is being given up.
            Err(_) if self.given_up.load(Ordering::Acquire) => Ok(()),
            result => result,
        }
    }

    /// Gives all of RAM up: no page is protected any more, nobody waits. Goes on past errors, for closing
    /// the contexts does the rest.
    pub fn unregister(&self) {
        self.give_up(Context::unregister);
    }

    /// Gives up RAM of which every page is writable again, after the fault threads have ended.
    pub fn unregister_writable(&self) {
        self.give_up(Context::unregister_writable);
        let mut room = Notices::new();
        for context in &self.contexts {
            // Whoever discards pages at this moment goes on once the notice of it is read.
            if let Err(error) = context.read(&mut room, |_| {}) {
                tracing::debug!(%error, "last notices are read by closing instead");
            }
        }
    }

    fn give_up(&self, unregister: impl Fn(&Context, HostVirtAddr, u64) -> io::Result<()>) {
        self.given_up.store(true, Ordering::Release);
        for region in &self.regions {
            let context = &self.contexts[region.context];
            if let Err(error) = unregister(context, region.hva, region.run.bytes()) {
                tracing::debug!(%error, start = %region.hva, "range is unregistered by closing instead");
            }
        }
    }
}

/// Why RAM could not be registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The kernel refused.
    #[error("cannot register {len_bytes} bytes at {start} for write protection: {source}")]
    Register {
        /// First address.
        start: HostVirtAddr,
        /// Length.
        len_bytes: u64,
        /// `EBUSY`: another userfaultfd has it. `EINVAL`: this memory cannot be protected.
        source: io::Error,
    },
    /// The file behind shared RAM could not be opened.
    #[error("cannot open the memory file behind guest RAM at {start}: {source}")]
    MapFile {
        /// First address of the mapping.
        start: HostVirtAddr,
        /// The operating system's error.
        source: io::Error,
    },
}

fn divide(
    pid: Pid,
    layout: &RamLayout,
    mappings: &[RamMapping],
    shards: usize,
) -> Result<Vec<Region>, RegisterError> {
    let shard_bytes = layout.total_bytes().div_ceil(shards.max(1) as u64).max(1);
    let mut regions = Vec::new();
    let mut assigned_bytes = 0;
    for (number, block) in layout.blocks().iter().enumerate() {
        let block_end = block.hva.add(block.len_bytes);
        for mapping in mappings {
            let start = mapping.start.max(block.hva);
            let end = mapping.end().min(block_end);
            let mut at = start;
            while at < end {
                let context = usize::try_from(assigned_bytes / shard_bytes).unwrap_or(0);
                // To the end of the shard, rounded up to where huge pages may begin.
                let left = shard_bytes - assigned_bytes % shard_bytes;
                let cut = at.0.saturating_add(left).next_multiple_of(CHUNK_PAGES_MAX * PAGE_BYTES);
                let upto = HostVirtAddr(cut).min(end);
                let first = layout.block_run(number).first.0 + (at.0 - block.hva.0) / PAGE_BYTES;
                regions.push(Region {
                    run: PageRun { first: PageIndex(first), count: (upto.0 - at.0) / PAGE_BYTES },
                    hva: at,
                    context: context.min(shards - 1),
                    unit_pages: match mapping.kind {
                        MappingKind::Hugetlb => mapping.page_size_bytes / PAGE_BYTES,
                        _ => 1,
                    },
                    has_huge_pages: mapping.kind == MappingKind::Anonymous
                        && mapping.huge_bytes > 0,
                    holes: if block.store_zero_pages {
                        Holes::Unknown
                    } else {
                        holes_of(pid, mapping, at)?
                    },
                });
                assigned_bytes += upto.0 - at.0;
                at = upto;
            }
        }
    }
    regions.sort_by_key(|region| region.run.first);
    Ok(regions)
}

fn holes_of(pid: Pid, mapping: &RamMapping, at: HostVirtAddr) -> Result<Holes, RegisterError> {
    match mapping.kind {
        MappingKind::Anonymous => Ok(Holes::InPageTable),
        MappingKind::SharedMemory if mapping.shared => {
            let (pid, start, end) = (pid.as_raw_pid(), mapping.start.0, mapping.end().0);
            let file = File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}"))
                .map_err(|source| RegisterError::MapFile { start: mapping.start, source })?;
            let offset_bytes = mapping.offset_bytes + (at.0 - mapping.start.0);
            Ok(Holes::InFile { file, offset_bytes })
        }
        _ => Ok(Holes::Unknown),
    }
}

#[cfg(test)]
pub mod testing {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::mappings;
    use crate::ram::RamBlock;
    use crate::sys::uffd::{Features, create_local};

    /// Memory of this process, in one block and one context, write-protected.
    pub fn protected(hva: HostVirtAddr, len_bytes: u64) -> ProtectedRam {
        let id = "ram".into();
        let page_size_bytes = PAGE_BYTES;
        let block = RamBlock { id, hva, len_bytes, page_size_bytes, store_zero_pages: false };
        let pid = rustix::process::getpid();
        let layout = RamLayout::new(vec![block]).unwrap();
        let mappings = mappings::covering(pid, &layout).unwrap();
        let features = Features::of_this_kernel().unwrap();
        let context = Context::new(create_local().unwrap(), features).unwrap();
        let ram = ProtectedRam::register(pid, layout, &mappings, vec![context]).unwrap();
        crate::arm::protect_all(&ram).unwrap();
        ram
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::testing::protected;
    use super::*;
    use crate::sys::test_memory::{Kind, TestMemory};
    use crate::vmm::testing::privileged;

    fn region(hva: u64, pages: u64) -> Region {
        Region {
            run: PageRun { first: PageIndex(1000), count: pages },
            hva: HostVirtAddr(hva),
            context: 0,
            unit_pages: 1,
            has_huge_pages: false,
            holes: Holes::Unknown,
        }
    }

    #[test]
    fn windows_are_aligned_in_host_memory_and_cover_the_region_once() {
        let region = region(0x7f00_0000_3000, 40);
        let windows: Vec<_> =
            region.windows(16).map(|run| (run.first.0 - 1000, run.count)).collect();
        assert_eq!(windows, [(0, 13), (13, 16), (29, 11)]);
        assert_eq!(region.window(PageIndex(1013), 16).first, PageIndex(1013));
        assert_eq!(region.window(PageIndex(1012), 1).count, 1);
    }

    #[test]
    fn the_cursor_finds_what_the_file_holds_and_looks_each_stretch_up_once() {
        use std::os::unix::fs::FileExt as _;
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(100 * PAGE_BYTES).unwrap();
        for page in [2, 3, 4, 50] {
            file.write_all_at(&[1], page * PAGE_BYTES).unwrap();
        }
        let mut region = region(0x7f00_0000_0000, 90);
        region.holes = Holes::InFile { file, offset_bytes: 0 };
        let mut cursor = DataCursor::default();
        let mut found = |first: u64, count: u64| {
            let run = PageRun { first: PageIndex(1000 + first), count };
            let data = cursor.first_data(&region, run).unwrap();
            data.map(|data| (data.first.0 - 1000, data.count))
        };
        assert_eq!(found(0, 4), Some((2, 2)));
        assert_eq!(found(4, 10), Some((4, 1)));
        assert_eq!(found(5, 9), None);
        assert_eq!(found(14, 40), Some((50, 1)));
        assert_eq!(found(51, 39), None);
        assert_eq!(found(0, 90), Some((2, 3)), "going back looks up again");
    }

    /// Minor faults of this thread.
    fn faults() -> u64 {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let process = procfs::process::Process::myself().unwrap();
        process.task_from_tid(thread).unwrap().stat().unwrap().minflt
    }

    #[test]
    fn shared_memory_that_was_writable_stays_so_when_it_is_given_up() {
        const PAGES: u64 = 2048;
        if !privileged() {
            return;
        }
        let memory = TestMemory::map(Kind::Shared, crate::address::as_index(PAGES)).unwrap();
        let write = || memory.words().for_each(|word| word.store(1, Ordering::Relaxed));
        let faults_after = |give_up: fn(&ProtectedRam)| {
            write();
            let ram = protected(HostVirtAddr(memory.address()), PAGES * PAGE_BYTES);
            let region = &ram.regions()[0];
            ram.unprotect(region, region.run).unwrap();
            write();
            give_up(&ram);
            let before = faults();
            write();
            faults() - before
        };
        assert!(faults_after(ProtectedRam::unregister_writable) < PAGES / 10);
        // Not a matter of course, but for older kernels: 6.1 leaves the pages writable anyhow.
        let faults = faults_after(ProtectedRam::unregister);
        eprintln!("{faults} faults of {PAGES} pages where it is done the plain way");
    }

    #[test]
    fn ram_is_divided_evenly_at_huge_page_boundaries() {
        let block = crate::ram::RamBlock {
            id: "ram".into(),
            hva: HostVirtAddr(0x7f00_0000_0000),
            len_bytes: 64 << 20,
            page_size_bytes: PAGE_BYTES,
            store_zero_pages: false,
        };
        let mapping = RamMapping::anonymous(HostVirtAddr(0x7eff_ffff_f000), 65 << 20);
        let layout = RamLayout::new(vec![block]).unwrap();
        let regions = divide(rustix::process::getpid(), &layout, &[mapping], 3).unwrap();
        let shape: Vec<_> = regions.iter().map(|r| (r.context, r.run.bytes() >> 20)).collect();
        assert_eq!(shape, [(0, 22), (1, 22), (2, 20)]);
    }
}
