//! Serving write faults: one thread for each userfaultfd context.
//!
//! ```text
//!            read notices              fault            arming: let through, note
//!   poll ───────────────▶ each notice ─────────────────▶ capturing: capture around it
//!    ▲                         │ discard                 released: let through
//!    │ nothing for a while     ▼
//!    └──── spin ◀──── put-off unprotects tried again
//! ```
//!
//! A thread that has just served a fault reads on for some microseconds before it sleeps in `poll`: being woken
//! costs three times as much as serving the fault.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::address::{HostVirtAddr, PageIndex, PageRun};
use crate::arm::LET_THROUGH_PAGES;
use crate::buffer::Purpose;
use crate::capture::{CaptureError, Engine, Mode, PanicReport, Worker};
use crate::chunk::CHUNK_PAGES_MAX;
use crate::priority;
use crate::protection::Region;
use crate::sys::uffd::{Notice, Notices};

/// How long a thread looks for the next fault before it sleeps.
const SPIN: Duration = Duration::from_micros(30);

/// Pages captured around a fault that shows no locality, while the buffer has room.
const AROUND_PAGES: u64 = 16;

/// Serves context number `context` until `stop` is readable.
pub fn run(engine: &Engine, context: usize, stop: BorrowedFd<'_>) {
    let _report = PanicReport { engine, thread: "fault" };
    priority::raise();
    let mut server = Server {
        engine,
        worker: Worker::new(engine, Purpose::Fault, true),
        locality: Locality::default(),
        put_off: Vec::with_capacity(64),
        faults: Vec::with_capacity(64),
    };
    if let Err(error) = server.serve(context, stop) {
        engine.fail(error);
    }
}

struct Server<'a> {
    engine: &'a Engine,
    worker: Worker<'a>,
    locality: Locality,
    /// Pages that could not be made writable because a discard was going on: all saved, or else let through
    /// before the consistency point.
    put_off: Vec<PageRun>,
    /// Where, and which thread.
    faults: Vec<(HostVirtAddr, u32)>,
}

impl Server<'_> {
    fn serve(&mut self, context: usize, stop: BorrowedFd<'_>) -> Result<(), CaptureError> {
        let context = &self.engine.ram.contexts[context];
        let mut room = Notices::new();
        let mut idle_since = Instant::now();
        // When there was no fault that has not been served since.
        let mut none_at = idle_since;
        loop {
            let read_at = Instant::now();
            let count = self.read(context, &mut room)?;
            let mut captured = 0;
            while let Some((address, thread)) = self.faults.pop() {
                captured += u32::from(self.fault(address, thread, none_at)?);
                idle_since = Instant::now();
            }
            none_at = read_at;
            for _ in 0..captured {
                self.engine.counters.service.record(idle_since - read_at);
            }
            self.retry_put_off()?;
            if count > 0 || !self.put_off.is_empty() || idle_since.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            if self.engine.buffer.writer_is_idle() {
                self.worker.flush();
            }
            let mut fds = [
                PollFd::from_borrowed_fd(context.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    return Err(protection("wait for faults on", HostVirtAddr(0))(error.into()));
                }
            }
            if !fds[1].revents().is_empty() {
                self.worker.flush();
                return Ok(());
            }
            idle_since = Instant::now();
            none_at = idle_since;
        }
    }

    fn read(
        &mut self,
        context: &crate::sys::uffd::Context,
        room: &mut Notices,
    ) -> Result<usize, CaptureError> {
        let Self { engine, faults, .. } = self;
        let mut spoiled = None;
        let count = context.read(room, |notice| match notice {
            Notice::WriteFault { address, thread } => faults.push((address, thread)),
            Notice::Discarded { start, end } => {
                if let Err(error) = discarded(engine, start, end) {
                    spoiled.get_or_insert(error);
                }
            }
            Notice::Unmapped { start, end } => {
                if overlap(engine, start, end).next().is_some() {
                    spoiled.get_or_insert(CaptureError::Unmapped { start, end });
                }
            }
        });
        if let Some(error) = spoiled {
            engine.fail(error);
        }
        count.map_err(protection("read faults on", HostVirtAddr(0)))
    }

    /// Serves one fault of `thread`, which came after `none_at`; true if after the consistency point, as part of the snapshot.
    fn fault(
        &mut self,
        address: HostVirtAddr,
        thread: u32,
        none_at: Instant,
    ) -> Result<bool, CaptureError> {
        let engine = self.engine;
        let Some(page) = engine.ram.layout.page_at(address) else {
            return Err(CaptureError::UnknownAddress { address });
        };
        let region = engine.ram.region_of(page);
        if engine.is_released() {
            self.unprotect(region, region.window(page, 1))?;
            return Ok(false);
        }
        let mode = engine.mode.read().unwrap_or_else(PoisonError::into_inner);
        if *mode == Mode::Arming {
            let pages = if region.has_huge_pages { CHUNK_PAGES_MAX } else { LET_THROUGH_PAGES };
            let window = region.window(page, pages);
            self.let_through(region, window)?;
            engine.counters.arming_faults.fetch_add(1, Ordering::Relaxed);
            return Ok(false);
        }
        drop(mode);
        engine.counters.faults.fetch_add(1, Ordering::Relaxed);
        engine.counters.first_touches.begin(thread, none_at);
        let pages = self.capture_around(region, page)?;
        engine.counters.first_touches.end(thread, pages);
        Ok(true)
    }

    /// Saves what is not saved yet of the page's surroundings; returns how many pages.
    fn capture_around(&mut self, region: &Region, page: PageIndex) -> Result<u64, CaptureError> {
        let engine = self.engine;
        let unit = region.window(page, 1);
        if engine.chunks.all_saved(unit) {
            // Saved while the notice was on its way; waking once more does no harm.
            return self.unprotect(region, unit).map(|()| 0);
        }
        let headroom = engine.buffer.headroom_percent();
        let wanted = self.locality.wanted_pages(page, region.has_huge_pages, headroom);
        let Some(room) = self.worker.make_room(unit.count)? else {
            return self.unprotect(region, unit).map(|()| 0);
        };
        let largest = 1 << room.ilog2();
        let window = region.window(page, wanted.min(largest));
        // Whoever has claimed the page makes it writable.
        let Some(run) = engine.chunks.unclaimed_around(page, window) else { return Ok(0) };
        self.locality.captured(run);
        self.capture(region, run)
    }

    fn capture(&mut self, region: &Region, run: PageRun) -> Result<u64, CaptureError> {
        let Self { engine, worker, put_off, .. } = self;
        worker.capture(region, run, |won| unprotect_or_put_off(engine, region, won, put_off))
    }

    fn unprotect(&mut self, region: &Region, run: PageRun) -> Result<(), CaptureError> {
        unprotect_or_put_off(self.engine, region, run, &mut self.put_off)
    }

    /// Lets `run` through before the consistency point, and notes it.
    fn let_through(&mut self, region: &Region, run: PageRun) -> Result<(), CaptureError> {
        self.unprotect(region, run)?;
        self.engine.marks.set(run);
        Ok(())
    }

    /// Tries again what was put off: as it has to be done now, for the consistency point may have come in
    /// between, or a round of arming have taken the mark.
    fn retry_put_off(&mut self) -> Result<(), CaptureError> {
        let engine = self.engine;
        for run in std::mem::take(&mut self.put_off) {
            let region = engine.ram.region_of(run.first);
            let mode = engine.mode.read().unwrap_or_else(PoisonError::into_inner);
            if *mode == Mode::Arming {
                self.let_through(region, run)?;
                continue;
            }
            drop(mode);
            if engine.chunks.all_saved(run) || self.worker.make_room(run.count)?.is_none() {
                self.unprotect(region, run)?;
            } else {
                self.capture(region, run)?;
            }
        }
        Ok(())
    }
}

/// While pages are being discarded the kernel answers `EAGAIN` until the notice of it has been read, which
/// is for this very thread to do: so the run is remembered and tried again after the next read.
fn unprotect_or_put_off(
    engine: &Engine,
    region: &Region,
    run: PageRun,
    put_off: &mut Vec<PageRun>,
) -> Result<(), CaptureError> {
    match engine.ram.unprotect(region, run) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            put_off.push(run);
            Ok(())
        }
        result => result.map_err(protection("unprotect", region.address_of(run.first))),
    }
}

/// Pages that are discarded while arming are protected again; afterwards they must have been saved.
fn discarded(engine: &Engine, start: HostVirtAddr, end: HostVirtAddr) -> Result<(), CaptureError> {
    let mode = engine.mode.read().unwrap_or_else(PoisonError::into_inner);
    for run in overlap(engine, start, end) {
        match *mode {
            Mode::Arming => engine.marks.set(run),
            Mode::Capturing if engine.chunks.all_saved(run) => {}
            Mode::Capturing => return Err(CaptureError::Discarded { start, end }),
        }
    }
    Ok(())
}

/// The pages of RAM between two addresses.
fn overlap(
    engine: &Engine,
    start: HostVirtAddr,
    end: HostVirtAddr,
) -> impl Iterator<Item = PageRun> + '_ {
    engine.ram.regions().iter().filter_map(move |region| {
        let region_end = region.hva.add(region.run.bytes());
        let (from, to) = (start.max(region.hva), end.min(region_end));
        let first = engine.ram.layout.page_at(from)?;
        (from < to)
            .then(|| PageRun { first, count: (to.0 - from.0).div_ceil(crate::address::PAGE_BYTES) })
    })
}

fn protection(
    operation: &'static str,
    address: HostVirtAddr,
) -> impl FnOnce(io::Error) -> CaptureError {
    move |source| CaptureError::Protection { operation, address, source }
}

/// How much to capture around a fault: more while faults come one behind the other, less while the buffer
/// fills. Nothing captured is wasted, for every page must be saved anyway; it only takes buffer earlier.
#[derive(Default)]
struct Locality {
    last: Option<PageRun>,
    pages: u64,
}

impl Locality {
    fn wanted_pages(&mut self, page: PageIndex, has_huge_pages: bool, headroom: u64) -> u64 {
        let near = self.last.is_some_and(|last| {
            page.0 + self.pages >= last.first.0 && page.0 < last.end() + self.pages
        });
        let pages = if near { self.pages * 2 } else { self.pages / 2 };
        let (least, most) = match headroom {
            50.. => (AROUND_PAGES, CHUNK_PAGES_MAX),
            25..50 => (AROUND_PAGES, 64),
            10..25 => (4, AROUND_PAGES),
            _ => (1, 1),
        };
        self.pages = pages.clamp(least, most);
        // Less than a huge page would split it.
        if has_huge_pages && headroom >= 25 { CHUNK_PAGES_MAX } else { self.pages }
    }

    const fn captured(&mut self, run: PageRun) {
        self.last = Some(run);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use std::sync::mpsc;

    use super::*;
    use crate::buffer::Buffer;
    use crate::pagemap::Pagemap;
    use crate::protection::testing::protected;
    use crate::sys::memory::{HUGE_BYTES, HugeBuffer};
    use crate::vmm::testing::privileged;

    /// An engine whose RAM is `memory`, protected.
    fn engine_on(memory: &HugeBuffer) -> Engine {
        let pid = rustix::process::getpid();
        let ram = protected(HostVirtAddr(memory.as_ptr().addr() as u64), HUGE_BYTES as u64);
        Engine::new(pid, ram, Buffer::new(16 << 20, 0).unwrap(), Pagemap::open(pid).unwrap())
    }

    fn server(engine: &Engine) -> Server<'_> {
        Server {
            engine,
            worker: Worker::new(engine, Purpose::Fault, true),
            locality: Locality::default(),
            put_off: Vec::new(),
            faults: Vec::new(),
        }
    }

    fn is_protected(engine: &Engine, page: u64) -> bool {
        let mut entries = crate::pagemap::Entries::new();
        let address = engine.ram.layout.address_of(PageIndex(page));
        engine.pagemap.read(address, 1, &mut entries).unwrap();
        entries.iter().all(crate::pagemap::Entry::is_protected)
    }

    #[test]
    fn a_notice_that_is_read_after_ram_was_given_up_is_no_error() {
        if !privileged() {
            return;
        }
        let memory = HugeBuffer::new().unwrap();
        let engine = engine_on(&memory);
        *engine.mode.write().unwrap() = Mode::Capturing;
        let mut server = server(&engine);
        let address = engine.ram.layout.address_of(PageIndex(5));
        server.fault(address, 0, Instant::now()).unwrap();
        assert!(!is_protected(&engine, 5));
        engine.ram.unregister();
        server.fault(address, 0, Instant::now()).unwrap();
    }

    #[test]
    fn what_was_put_off_before_the_consistency_point_is_saved_after_it() {
        if !privileged() {
            return;
        }
        let memory = HugeBuffer::new().unwrap();
        let engine = engine_on(&memory);
        let mut server = server(&engine);
        let run = PageRun { first: PageIndex(64), count: 64 };
        server.put_off.push(run);
        *engine.mode.write().unwrap() = Mode::Capturing;
        server.retry_put_off().unwrap();
        assert!(engine.chunks.all_saved(run), "let through without having been saved");
        assert!(!is_protected(&engine, 64));
    }

    #[test]
    fn what_is_put_off_while_arming_is_noted_when_it_is_let_through() {
        if !privileged() {
            return;
        }
        let memory = HugeBuffer::new().unwrap();
        let engine = engine_on(&memory);
        let mut server = server(&engine);
        server.put_off.push(PageRun { first: PageIndex(64), count: 64 });
        server.retry_put_off().unwrap();
        assert!(!is_protected(&engine, 64));
        assert_eq!(crate::arm::protect_marked(&engine.ram, &engine.marks).unwrap(), 64);
        assert!(is_protected(&engine, 64));
    }

    #[test]
    fn nobody_waits_for_an_engine_that_has_failed() {
        if !privileged() {
            return;
        }
        let mut memory = HugeBuffer::new().unwrap();
        let engine = engine_on(&memory);
        let (told, done) = mpsc::channel();
        let writer = std::thread::spawn(move || {
            memory[0] = 1;
            told.send(()).unwrap();
            memory
        });
        let mut pending = [PollFd::new(&engine.ram.contexts[0], PollFlags::IN)];
        poll(&mut pending, None).unwrap();
        engine.fail(CaptureError::UnknownAddress { address: HostVirtAddr(0) });
        let waited = done.recv_timeout(Duration::from_secs(5));
        drop(engine);
        writer.join().unwrap();
        assert!(waited.is_ok(), "the writer waits although nobody serves it any more");
    }

    #[test]
    fn neighbouring_faults_widen_the_capture_and_scattered_ones_narrow_it() {
        let mut locality = Locality::default();
        let mut page = 10_000;
        let mut sizes = Vec::new();
        for _ in 0..7 {
            let wanted = locality.wanted_pages(PageIndex(page), false, 100);
            locality.captured(PageRun { first: PageIndex(page), count: wanted });
            sizes.push(wanted);
            page += wanted;
        }
        assert_eq!(sizes, [16, 32, 64, 128, 256, 512, 512]);
        assert_eq!(locality.wanted_pages(PageIndex(1), false, 100), 256);
    }

    #[test]
    fn a_full_buffer_narrows_the_capture_to_the_page() {
        let mut locality = Locality::default();
        assert_eq!(locality.wanted_pages(PageIndex(0), true, 100), CHUNK_PAGES_MAX);
        assert_eq!(locality.wanted_pages(PageIndex(0), false, 30), AROUND_PAGES);
        assert_eq!(locality.wanted_pages(PageIndex(0), true, 5), 1);
    }
}
