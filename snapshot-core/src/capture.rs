//! The one path on which a page's old content is saved, shared by fault threads and sweep.
//!
//! ```text
//! take buffer ─▶ claim ─▶ copy ─▶ check protection ─▶ mark saved ─▶ unprotect (wakes) ─▶ to the writer
//! ```
//!
//! Buffer comes first, so that nobody holds a claim while waiting for room. The check comes after the copy: a
//! page that is still protected now was protected all the while, so what was copied is what it held at the
//! consistency point. [`Engine`] is what the threads of a session share; it takes no lock that a thread
//! of the guest could hold.

use std::io::{self, IoSliceMut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError, RwLock};
use std::time::Duration;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use rustix::process::Pid;

use crate::Reason;
use crate::address::{HostVirtAddr, PAGE_BYTES, PageRun, as_index};
use crate::arm::Marks;
use crate::buffer::{Buffer, EXTENT_BYTES, Extent, Purpose};
use crate::chunk::{CHUNK_PAGES_MAX, ChunkMap};
use crate::first_touch::FirstTouches;
use crate::histogram::Histogram;
use crate::pagemap::{Entries, Pagemap};
use crate::protection::{DataCursor, ProtectedRam, Region};
use crate::report::Progress;

/// What went wrong between the consistency point and the last page.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Guest memory could not be read.
    #[error(
        "cannot read guest memory at {address}: {source}: the virtual machine runs on without a snapshot; check that its process is alive and its memory free of hardware errors"
    )]
    Read {
        /// Address in the process that owns it.
        address: HostVirtAddr,
        /// `ESRCH`: the process ended. `EFAULT`: unmapped or poisoned memory.
        source: io::Error,
    },
    /// A page was writable before it was saved.
    #[error(
        "the page at {address} lost its write protection before it was saved: something discards or merges guest pages (a balloon, free page reporting, same-page merging); stop it for the snapshot and take it again"
    )]
    ProtectionLost {
        /// Address in the process that owns it.
        address: HostVirtAddr,
    },
    /// Protection could not be changed or its notices not be read.
    #[error(
        "cannot {operation} guest memory at {address}: {source}: the virtual machine runs on without a snapshot"
    )]
    Protection {
        /// What was tried.
        operation: &'static str,
        /// Address in the process that owns it.
        address: HostVirtAddr,
        /// The kernel's error.
        source: io::Error,
    },
    /// Pages were discarded before they were saved.
    #[error(
        "guest memory from {start} to {end} was discarded before it was saved: do not change the balloon and switch free page reporting off while a snapshot is taken"
    )]
    Discarded {
        /// First address.
        start: HostVirtAddr,
        /// Address after the last one.
        end: HostVirtAddr,
    },
    /// RAM was unplugged or moved.
    #[error(
        "guest memory from {start} to {end} was unmapped: do not unplug memory while a snapshot is taken"
    )]
    Unmapped {
        /// First address.
        start: HostVirtAddr,
        /// Address after the last one.
        end: HostVirtAddr,
    },
    /// A fault outside of all RAM blocks.
    #[error(
        "a write fault at {address} belongs to no ram block: this is a defect of livesnap, please report it"
    )]
    UnknownAddress {
        /// Address in the process that owns it.
        address: HostVirtAddr,
    },
    /// There was no memory for the buffer.
    #[error(
        "no memory for the copy buffer: {source}: free memory on the host or set a smaller buffer"
    )]
    NoMemory {
        /// The kernel's error.
        source: io::Error,
    },
    /// The destination failed.
    #[error(
        "cannot write the RAM file ({stage}): {source}: the virtual machine runs on without a snapshot; free space or mend the disk and take it again"
    )]
    Storage {
        /// What was done.
        stage: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// A thread of the engine panicked.
    #[error("the {thread} thread panicked: this is a defect of livesnap, please report it")]
    Panicked {
        /// Which one.
        thread: &'static str,
    },
}

impl CaptureError {
    /// The stable code.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Read { source, .. } | Self::Protection { source, .. }
                if source.raw_os_error() == Some(libc::ESRCH) =>
            {
                Reason::VmmDied
            }
            Self::Read { .. } | Self::Protection { .. } | Self::NoMemory { .. } => Reason::Memory,
            Self::ProtectionLost { .. } => Reason::ProtectionLost,
            Self::Discarded { .. } | Self::Unmapped { .. } => Reason::PagesDiscarded,
            Self::UnknownAddress { .. } | Self::Panicked { .. } => Reason::Internal,
            Self::Storage { source, .. } => match source.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT) => Reason::NoSpace,
                _ => Reason::Io,
            },
        }
    }
}

/// What a write fault means at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Before the consistency point: let the write through and note the page.
    Arming,
    /// After it: save the page first.
    Capturing,
}

/// Counters that only go up, readable at any time.
#[derive(Default)]
pub struct Counters {
    /// Write faults let through before the consistency point.
    pub arming_faults: AtomicU64,
    /// Write faults served after it.
    pub faults: AtomicU64,
    /// Pages saved because of a fault, neighbours included.
    pub fault_pages: AtomicU64,
    /// Pages saved by the sweep, holes included.
    pub sweep_pages: AtomicU64,
    /// Of these, holes.
    pub hole_pages: AtomicU64,
    /// Bytes handed to storage.
    pub stored_bytes: AtomicU64,
    /// Bytes that storage has completed.
    pub written_bytes: AtomicU64,
    /// Faults that had to wait for room in the buffer.
    pub buffer_waits: AtomicU64,
    /// Who they are of.
    pub first_touches: FirstTouches,
    /// From reading a fault's notice to the write going through.
    pub service: Histogram,
}

/// What all threads of a session share.
pub struct Engine {
    /// The process that owns the RAM.
    pub pid: Pid,
    /// RAM and its contexts.
    pub ram: ProtectedRam,
    /// Which pages are saved.
    pub chunks: ChunkMap,
    /// Which pages were let through while arming.
    pub marks: Marks,
    /// Copies on their way to the disk.
    pub buffer: Buffer,
    /// Page map of `pid`.
    pub pagemap: Pagemap,
    /// Figures.
    pub counters: Counters,
    /// Held for reading while a fault is let through, for writing at the consistency point.
    pub mode: RwLock<Mode>,
    failed: AtomicBool,
    failure: Mutex<Option<CaptureError>>,
    /// Told of a failure and of the end of the sweep.
    news: Condvar,
    swept: Mutex<bool>,
}

impl Engine {
    /// Puts the parts together.
    #[must_use]
    pub fn new(pid: Pid, ram: ProtectedRam, buffer: Buffer, pagemap: Pagemap) -> Self {
        let slots = ram.layout.page_slots();
        Self {
            pid,
            ram,
            chunks: ChunkMap::new(slots),
            marks: Marks::new(slots),
            buffer,
            pagemap,
            counters: Counters::default(),
            mode: RwLock::new(Mode::Arming),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            news: Condvar::new(),
            swept: Mutex::new(false),
        }
    }

    /// Ends the capture as [`release`](Self::release) does. The first error counts.
    pub fn fail(&self, error: CaptureError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.release();
    }

    /// Ends the capture without an error of the engine's own: RAM is given up, so that nobody waits for
    /// threads that have failed, or for whoever has to notice it.
    pub fn release(&self) {
        self.failed.store(true, Ordering::Release);
        self.ram.unregister();
        self.buffer.close();
        self.news.notify_all();
    }

    /// Whether the capture has ended early.
    #[must_use]
    pub fn is_released(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// The error that ended the capture.
    pub fn take_failure(&self) -> Option<CaptureError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The sweep has claimed every page.
    pub fn set_swept(&self) {
        *self.swept.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.news.notify_all();
    }

    /// Waits until the sweep is through or the capture has ended, at most `limit`; true if either is so.
    pub fn wait_swept(&self, limit: Duration) -> bool {
        let swept = self.swept.lock().unwrap_or_else(PoisonError::into_inner);
        let pending = |swept: &mut bool| !*swept && !self.is_released();
        let waited = self.news.wait_timeout_while(swept, limit, pending);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Whether every page of RAM is saved.
    #[must_use]
    pub fn all_saved(&self) -> bool {
        self.ram.regions().iter().all(|region| self.chunks.all_saved(region.run))
    }

    /// How far the session is; the caller adds phase and time.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        let total_bytes = self.ram.layout.total_bytes();
        let fault_bytes = load(&counters.fault_pages) * PAGE_BYTES;
        let saved_bytes = fault_bytes + load(&counters.sweep_pages) * PAGE_BYTES;
        Progress {
            total_bytes,
            saved_bytes,
            fault_bytes,
            remaining_bytes: total_bytes.saturating_sub(saved_bytes),
            written_bytes: load(&counters.written_bytes),
            drained_bytes: self.buffer.drained_bytes(),
            buffer_used_bytes: self.buffer.used_bytes(),
            buffer_limit_bytes: self.buffer.limit_bytes(),
            buffer_waits: load(&counters.buffer_waits),
            faults: load(&counters.faults),
            first_touches: counters.first_touches.get(),
            service: counters.service.distribution(),
            ..Progress::default()
        }
    }

    /// Populates the holes of private anonymous RAM with the zero page, by reading them: for kernels whose
    /// write protection passes over pages that do not exist (before `WP_UNPOPULATED`, Linux 6.4).
    ///
    /// # Errors
    /// [`CaptureError::Read`].
    pub fn populate_holes(&self) -> Result<(), CaptureError> {
        let mut scratch = vec![0; EXTENT_BYTES];
        for region in
            self.ram.regions().iter().filter(|region| region.is_protected_where_populated())
        {
            for window in region.windows(CHUNK_PAGES_MAX) {
                let len = as_index(window.bytes());
                self.read(region.address_of(window.first), &mut scratch[..len])?;
            }
        }
        Ok(())
    }

    /// Copies guest memory from `start` on into `into`.
    ///
    /// # Errors
    /// [`CaptureError::Read`].
    pub fn read(&self, start: HostVirtAddr, mut into: &mut [u8]) -> Result<(), CaptureError> {
        let pid = nix::unistd::Pid::from_raw(self.pid.as_raw_pid());
        let mut address = start;
        while !into.is_empty() {
            let failed = |source| CaptureError::Read { address, source };
            let base = usize::try_from(address.0)
                .map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
            let remote = [RemoteIoVec { base, len: into.len() }];
            let read = match process_vm_readv(pid, &mut [IoSliceMut::new(into)], &remote) {
                Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => read,
                Err(errno) => return Err(failed(io::Error::from_raw_os_error(errno as i32))),
            };
            address = address.add(read as u64);
            into = &mut into[read..];
        }
        Ok(())
    }
}

/// A thread's own part in capturing.
pub struct Worker<'a> {
    engine: &'a Engine,
    purpose: Purpose,
    extent: Option<Extent>,
    entries: Entries,
    cursor: DataCursor,
    checks: bool,
}

impl<'a> Worker<'a> {
    /// A worker with nothing captured yet, which checks that pages are still protected if `checks`.
    #[must_use]
    pub fn new(engine: &'a Engine, purpose: Purpose, checks: bool) -> Self {
        Self {
            engine,
            purpose,
            extent: None,
            entries: Entries::new(),
            cursor: DataCursor::default(),
            checks,
        }
    }

    /// Makes sure of room for at least `pages` in the current extent and returns what there is, waiting for
    /// the writer if the buffer is exhausted; nothing once the buffer is closed.
    ///
    /// # Errors
    /// [`CaptureError::NoMemory`].
    pub fn make_room(&mut self, pages: u64) -> Result<Option<u64>, CaptureError> {
        if self.extent.as_ref().is_some_and(|extent| extent.room_pages() < pages) {
            self.flush();
        }
        if self.extent.is_none() {
            if self.purpose == Purpose::Fault && self.engine.buffer.headroom_percent() == 0 {
                self.engine.counters.buffer_waits.fetch_add(1, Ordering::Relaxed);
            }
            let taken = self.engine.buffer.take(self.purpose);
            self.extent = taken.map_err(|source| CaptureError::NoMemory { source })?;
        }
        Ok(self.extent.as_ref().map(Extent::room_pages))
    }

    /// Hands what was captured to the writer.
    pub fn flush(&mut self) {
        if let Some(extent) = self.extent.take() {
            if extent.is_empty() {
                self.engine.buffer.recycle(extent);
            } else {
                self.engine.buffer.submit(extent);
            }
        }
    }

    /// Saves what is still unclaimed of `run`, which lies in `region` and is no longer than the room made;
    /// makes it writable through `unprotect`, which is called once for each run won. Returns how many pages it was.
    ///
    /// # Errors
    /// Those of the copy and the check. The pages are then claimed for good: the session has to end.
    pub fn capture(
        &mut self,
        region: &Region,
        run: PageRun,
        mut unprotect: impl FnMut(PageRun) -> Result<(), CaptureError>,
    ) -> Result<u64, CaptureError> {
        let claim = self.engine.chunks.claim(run);
        let mut pages = 0;
        for won in claim.runs() {
            match self.purpose {
                Purpose::Fault => {
                    self.copy(region, won)?;
                    self.engine.counters.fault_pages.fetch_add(won.count, Ordering::Relaxed);
                }
                Purpose::Sweep => {
                    self.copy_data(region, won)?;
                    self.engine.counters.sweep_pages.fetch_add(won.count, Ordering::Relaxed);
                }
            }
            if self.checks {
                self.check_protected(region, won)?;
            }
            self.engine.chunks.mark_saved(won);
            unprotect(won)?;
            pages += won.count;
        }
        Ok(pages)
    }

    /// Copies those pages of `run` that have content.
    fn copy_data(&mut self, region: &Region, run: PageRun) -> Result<(), CaptureError> {
        let mut copied = 0;
        if region.holes_in_page_table() {
            self.read_entries(region, run)?;
            let mut bits = [0_u64; as_index(CHUNK_PAGES_MAX / 64)];
            for (index, entry) in self.entries.iter().enumerate() {
                bits[index / 64] |= u64::from(!entry.is_hole()) << (index % 64);
            }
            for data in crate::chunk::runs_of(0, &bits) {
                let first = crate::address::PageIndex(run.first.0 + data.first.0);
                self.copy(region, PageRun { first, count: data.count })?;
                copied += data.count;
            }
        } else {
            let mut rest = run;
            while rest.count > 0 {
                let data = self.cursor.first_data(region, rest);
                let data = data.map_err(|source| CaptureError::Read {
                    address: region.address_of(rest.first),
                    source,
                })?;
                let Some(data) = data else { break };
                self.copy(region, data)?;
                copied += data.count;
                rest.first.0 = data.end();
                rest.count = run.end() - data.end();
            }
        }
        self.engine.counters.hole_pages.fetch_add(run.count - copied, Ordering::Relaxed);
        Ok(())
    }

    fn copy(&mut self, region: &Region, run: PageRun) -> Result<(), CaptureError> {
        // Room was made before the claim.
        let Some(extent) = &mut self.extent else { return Ok(()) };
        self.engine.read(region.address_of(run.first), extent.space_for(run))?;
        extent.push(run);
        Ok(())
    }

    fn check_protected(&mut self, region: &Region, run: PageRun) -> Result<(), CaptureError> {
        self.read_entries(region, run)?;
        match self.entries.iter().position(|entry| !entry.is_protected()) {
            None => Ok(()),
            Some(page) => Err(CaptureError::ProtectionLost {
                address: region.address_of(run.first).add(page as u64 * PAGE_BYTES),
            }),
        }
    }

    fn read_entries(&mut self, region: &Region, run: PageRun) -> Result<(), CaptureError> {
        let address = region.address_of(run.first);
        let read = self.engine.pagemap.read(address, run.count, &mut self.entries);
        read.map_err(|source| CaptureError::Read { address, source })
    }
}

/// Reports a thread that unwinds: its work is not done by anybody else.
pub struct PanicReport<'a> {
    /// To be told.
    pub engine: &'a Engine,
    /// The thread's name.
    pub thread: &'static str,
}

impl Drop for PanicReport<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.engine.fail(CaptureError::Panicked { thread: self.thread });
        }
    }
}
