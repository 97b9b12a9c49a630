//! Watches a sample of a process's memory for one window after another.
//!
//! All work is done by the thread that calls [`Sampler::window`], the serving of writes to huge pages included: while
//! it protects and counts chunks it looks for such writes after each.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::DirtyRateError;
use super::estimate::{Estimate, Observation, estimate, float};
use super::sample::{CHUNK_BYTES, Chunk, Strata, divide};
use crate::Cancel;
use crate::address::{HostVirtAddr, PAGE_BYTES, as_index};
use crate::mappings::RamMapping;
use crate::pagemap::Pagemap;
use crate::ram::RamLayout;
use crate::sys::uffd::{Context, Features, Notice, Notices};
use crate::vmm::Vmm;

/// Enough for an error of some tenths where a tenth of memory is busy, and at most some 16 ms of page faults a window.
const SAMPLE_BYTES: u64 = 64 << 20;
/// Longest time until a cancelled window ends.
const CANCEL_INTERVAL: Duration = Duration::from_millis(50);

/// How to measure.
#[derive(Clone, Debug)]
pub struct SamplerOptions {
    /// Memory that is watched at a time, in bytes; rounded up to chunks of 2 MiB.
    pub sample_bytes: u64,
    /// Decides which chunks are drawn.
    pub seed: u64,
    /// The control of the project's tests: protect nothing.
    #[cfg(feature = "controls")]
    pub without_protection: bool,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self::new(SAMPLE_BYTES, 0)
    }
}

impl SamplerOptions {
    /// A sample of so many bytes, drawn by `seed`.
    #[must_use]
    pub const fn new(sample_bytes: u64, seed: u64) -> Self {
        Self {
            sample_bytes,
            seed,
            #[cfg(feature = "controls")]
            without_protection: false,
        }
    }

    const fn is_protecting(&self) -> bool {
        #[cfg(feature = "controls")]
        if self.without_protection {
            return false;
        }
        true
    }
}

/// What a window showed.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Window {
    /// The rate of all memory.
    #[serde(flatten)]
    pub rate: Estimate,
    /// For how long chunks were watched, on average, in nanoseconds.
    pub window_ns: u64,
    /// Bytes that were watched.
    pub sampled_bytes: u64,
    /// Of these, bytes in transparent huge pages, where a write counts as 2 MiB.
    pub sampled_huge_bytes: u64,
    /// Bytes of all memory, in whole chunks.
    pub ram_bytes: u64,
    /// Rate at which pages were first written to in the second half of the window, as a share of that in the first: below 1
    /// where the guest mostly returns to the same pages. Nothing if nothing was written to in the first half.
    pub fresh_ratio: Option<f64>,
}

/// A process whose memory can be watched.
pub struct Sampler {
    target: Target,
    chunks: Vec<Chunk>,
    strata: Strata,
    ram_bytes: u64,
    is_protecting: bool,
}

impl Sampler {
    /// Has `vmm`'s process make two userfaultfds, which is all that happens to it here. `vmm` is not needed any more
    /// afterwards.
    ///
    /// # Errors
    /// If the kernel is too old, or the VMM cannot be asked or attached to.
    pub fn attach(vmm: &mut dyn Vmm, options: &SamplerOptions) -> Result<Self, DirtyRateError> {
        let pid = vmm.pid();
        let failed =
            |doing| move |source| DirtyRateError::System { doing, pid: pid.as_raw_pid(), source };
        if !Features::can_track_writes().map_err(failed("create a userfaultfd for memory"))? {
            return Err(DirtyRateError::Kernel);
        }
        let layout = vmm.ram_layout()?;
        let mappings = vmm.ram_mappings(&layout)?;
        let descriptors = [vmm.userfaultfd()?, vmm.userfaultfd()?];
        Self::new(pid, &layout, &mappings, descriptors, options)
            .map_err(failed("prepare watching memory"))
    }

    fn new(
        pid: Pid,
        layout: &RamLayout,
        mappings: &[RamMapping],
        [passing, waiting]: [OwnedFd; 2],
        options: &SamplerOptions,
    ) -> io::Result<Self> {
        let target = Target {
            pid,
            pidfd: pidfd_open(pid, PidfdFlags::empty())?,
            pagemap: Pagemap::open(pid)?,
            passing: Context::new(
                passing,
                Features::ASYNC.and(Features::FAULTS).and(Features::SHARED),
            )?,
            waiting: Context::new(waiting, Features::FAULTS)?,
        };
        let chunks = divide(layout, mappings);
        let sample = as_index(options.sample_bytes.div_ceil(CHUNK_BYTES));
        let strata = Strata::new(chunks.len(), sample, options.seed);
        let ram_bytes = chunks.iter().map(|chunk| chunk.len_bytes).sum();
        Ok(Self { target, chunks, strata, ram_bytes, is_protecting: options.is_protecting() })
    }

    /// Watches other chunks than in the window before for `length`; nothing if it was cancelled.
    ///
    /// # Errors
    /// If the process has ended, or its memory was taken by another userfaultfd or unmapped.
    pub fn window(
        &mut self,
        length: Duration,
        cancel: &Cancel,
    ) -> Result<Option<Window>, DirtyRateError> {
        let deadline = Instant::now() + length;
        let target = &self.target;
        let mut watched = Vec::new();
        for draw in self.strata.draw() {
            let chunk = self.chunks[draw.chunk];
            watched.push((draw.stands_for, target.watch(chunk, self.is_protecting)?));
            target.serve(&watched)?;
        }
        if !target.serve_until(deadline - length / 2, &watched, cancel)? {
            return Ok(None);
        }
        let mut first_half = Seen::default();
        for (stands_for, chunk) in &watched {
            first_half.add(*stands_for, chunk.written()?);
            target.serve(&watched)?;
        }
        if !target.serve_until(deadline, &watched, cancel)? {
            return Ok(None);
        }
        let mut whole = Seen::default();
        let mut sample = Vec::with_capacity(watched.len());
        let (mut sampled_bytes, mut sampled_huge_bytes) = (0, 0);
        for (stands_for, chunk) in &watched {
            let (written_bytes, window) = chunk.written()?;
            whole.add(*stands_for, (written_bytes, window));
            sample.push(Observation { stands_for: *stands_for, written_bytes, window });
            sampled_bytes += chunk.chunk.len_bytes;
            sampled_huge_bytes += if chunk.waits { chunk.chunk.len_bytes } else { 0 };
            target.serve(&watched)?;
        }
        let windows: Duration = sample.iter().map(|one| one.window).sum();
        let count = u32::try_from(sample.len()).unwrap_or(u32::MAX).max(1);
        Ok(Some(Window {
            rate: estimate(&sample),
            window_ns: u64::try_from((windows / count).as_nanos()).unwrap_or(u64::MAX),
            sampled_bytes,
            sampled_huge_bytes,
            ram_bytes: self.ram_bytes,
            fresh_ratio: whole.fresh_ratio(&first_half),
        }))
    }
}

/// What was written to in a part of a window, in all chunks of the sample together.
#[derive(Default)]
struct Seen {
    bytes: f64,
    time: Duration,
}

impl Seen {
    fn add(&mut self, stands_for: u64, (bytes, time): (u64, Duration)) {
        self.bytes += float(stands_for * bytes);
        self.time += time;
    }

    /// Rate after `first_half`, as a share of that in it.
    fn fresh_ratio(&self, first_half: &Self) -> Option<f64> {
        let (before, after) = (first_half.time, self.time.saturating_sub(first_half.time));
        let first = first_half.bytes / before.as_secs_f64();
        let second = (self.bytes - first_half.bytes).max(0.0) / after.as_secs_f64();
        Some(second / first).filter(|ratio| ratio.is_finite())
    }
}

/// The process and the ways to its memory. Dropping it closes the contexts: the kernel then unprotects everything.
struct Target {
    pid: Pid,
    pidfd: OwnedFd,
    pagemap: Pagemap,
    /// Lets writes through by itself.
    passing: Context,
    /// Has writers wait for [`Target::serve`].
    waiting: Context,
}

/// A chunk under protection; given up when dropped.
struct Watched<'a> {
    target: &'a Target,
    chunk: Chunk,
    /// Whether writers wait.
    waits: bool,
    since: Instant,
}

impl Target {
    /// Protects `chunk`, or with `protect` false only acts as if.
    fn watch(&self, chunk: Chunk, protect: bool) -> Result<Watched<'_>, DirtyRateError> {
        let Chunk { start, len_bytes, is_anonymous } = chunk;
        let waits = is_anonymous
            && self
                .pagemap
                .has_anonymous_huge_pages(start, len_bytes)
                .map_err(|error| self.failed("look at the page map", error))?;
        let context = if waits { &self.waiting } else { &self.passing };
        context.register(start, len_bytes).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => DirtyRateError::Taken { start },
            _ => self.failed("register memory", error),
        })?;
        // From here on it is given up by being dropped.
        let mut watched = Watched { target: self, chunk, waits, since: Instant::now() };
        if protect {
            let protected = if is_anonymous && !waits {
                self.pagemap.protect_existing(start, len_bytes)
            } else {
                // Shared memory gets markers for what is not in the page table: it may exist all the same.
                context.protect(start, len_bytes)
            };
            protected.map_err(|error| self.failed("protect memory", error))?;
            watched.since = Instant::now();
        }
        Ok(watched)
    }

    /// Serves writers until `deadline`; false if it was cancelled.
    fn serve_until(
        &self,
        deadline: Instant,
        watched: &[(u64, Watched<'_>)],
        cancel: &Cancel,
    ) -> Result<bool, DirtyRateError> {
        loop {
            if cancel.is_cancelled() {
                return Ok(false);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(true);
            }
            let nap = left.min(CANCEL_INTERVAL);
            let timeout = Timespec { tv_sec: 0, tv_nsec: nap.subsec_nanos().into() };
            let mut ready = [
                PollFd::new(&self.waiting, PollFlags::IN),
                PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN),
            ];
            match poll(&mut ready, Some(&timeout)) {
                // A signal: perhaps that of cancelling.
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed("wait for writes to memory", errno.into())),
            }
            if !ready[1].revents().is_empty() {
                return Err(DirtyRateError::Ended { pid: self.pid.as_raw_pid() });
            }
            self.serve(watched)?;
        }
    }

    /// Lets all writers go that wait at the moment, each with its whole chunk.
    fn serve(&self, watched: &[(u64, Watched<'_>)]) -> Result<(), DirtyRateError> {
        let mut room = Notices::new();
        loop {
            let mut outcome = Ok(());
            let count = self.waiting.read(&mut room, |notice| {
                if let Notice::WriteFault { address, .. } = notice {
                    let served = watched
                        .iter()
                        .find(|(_, one)| one.holds(address))
                        .map_or(Ok(()), |(_, one)| one.let_through());
                    outcome = std::mem::replace(&mut outcome, Ok(())).and(served);
                }
            });
            let count = count.map_err(|error| self.failed("read of writes to memory", error))?;
            outcome.map_err(|error| self.failed("unprotect memory", error))?;
            if count == 0 {
                return Ok(());
            }
        }
    }

    /// What failed; that the process has ended, if it has.
    fn failed(&self, doing: &'static str, source: io::Error) -> DirtyRateError {
        let pid = self.pid.as_raw_pid();
        let mut process = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut process, Some(&at_once)) {
            Ok(1..) => DirtyRateError::Ended { pid },
            _ => DirtyRateError::System { doing, pid, source },
        }
    }
}

impl Watched<'_> {
    fn context(&self) -> &Context {
        if self.waits { &self.target.waiting } else { &self.target.passing }
    }

    fn holds(&self, address: HostVirtAddr) -> bool {
        self.chunk.start <= address && address < self.chunk.start.add(self.chunk.len_bytes)
    }

    fn let_through(&self) -> io::Result<()> {
        self.context().unprotect(self.chunk.start, self.chunk.len_bytes)
    }

    /// Bytes that were written to since it is watched, and how long that is.
    fn written(&self) -> Result<(u64, Duration), DirtyRateError> {
        let Chunk { start, len_bytes, .. } = self.chunk;
        let pages = self
            .target
            .pagemap
            .count_written(start, len_bytes)
            .map_err(|error| self.target.failed("look at the page map", error))?;
        Ok((pages * PAGE_BYTES, self.since.elapsed()))
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        let Chunk { start, len_bytes, .. } = self.chunk;
        if let Err(error) = self.context().unregister(start, len_bytes) {
            tracing::debug!(%error, %start, "a chunk is given up by closing instead");
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::mappings;
    use crate::ram::RamBlock;
    use crate::sys::memory::{HUGE_BYTES, HugeBuffer};
    use crate::sys::uffd::create_local;
    use crate::vmm::testing::privileged;
    use rustix::process::getpid;
    use std::sync::atomic::{AtomicBool, Ordering};

    const WINDOW: Duration = Duration::from_millis(300);

    /// A sampler that watches all of these bytes of this process, which begin and end with whole pages.
    fn sampler_of(memory: &[u8]) -> Sampler {
        let block = RamBlock {
            id: "ram".into(),
            hva: HostVirtAddr(memory.as_ptr().addr() as u64),
            len_bytes: memory.len() as u64,
            page_size_bytes: PAGE_BYTES,
            store_zero_pages: false,
        };
        let layout = RamLayout::new(vec![block]).unwrap();
        let mappings = mappings::covering(getpid(), &layout).unwrap();
        let descriptors = [create_local().unwrap(), create_local().unwrap()];
        let options = SamplerOptions::new(1 << 40, 0);
        Sampler::new(getpid(), &layout, &mappings, descriptors, &options).unwrap()
    }

    /// What is seen in a window in which `step` is done over and over.
    fn look(sampler: &mut Sampler, mut step: impl FnMut() + Send) -> (Window, u64) {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    step();
                }
            });
            let window = sampler.window(WINDOW, &Cancel::default());
            done.store(true, Ordering::Relaxed);
            let window = window.unwrap().unwrap();
            assert_eq!(window.sampled_bytes, window.ram_bytes);
            assert!(window.rate.error_bytes_per_second == 0.0, "{window:?}");
            let seconds = Duration::from_nanos(window.window_ns).as_secs_f64();
            let bytes = window.rate.bytes_per_second * seconds;
            // Chunks are not watched for exactly the same time, so the figure is a little off.
            let pages =
                (0..).take_while(|&pages| f64::from(pages) * 4096.0 < bytes * 0.999).count();
            (window, pages as u64)
        })
    }

    /// Memory that was never touched, with whole pages at both ends.
    fn untouched(bytes: &mut [u8]) -> &mut [[u8; 4096]] {
        let aligned = bytes.as_ptr().align_offset(4096);
        bytes[aligned..].as_chunks_mut().0
    }

    fn is_registered(memory: &[u8]) -> bool {
        let block = |hva| RamBlock {
            id: "ram".into(),
            hva,
            len_bytes: memory.len() as u64,
            page_size_bytes: PAGE_BYTES,
            store_zero_pages: false,
        };
        let layout = block(HostVirtAddr(memory.as_ptr().addr() as u64));
        let layout = RamLayout::new(vec![layout]).unwrap();
        let mappings = mappings::covering(getpid(), &layout).unwrap();
        mappings.iter().any(|mapping| mapping.has_userfaultfd)
    }

    /// Whether the kernel has `WP_ASYNC`; tells if not.
    fn can_track() -> bool {
        let can = privileged() && Features::can_track_writes().unwrap();
        if !can {
            eprintln!("SKIPPED: needs root and Linux 6.7");
        }
        can
    }

    #[test]
    fn pages_count_once_if_they_are_written_to_and_not_if_they_are_read() {
        if !can_track() {
            return;
        }
        let mut bytes = vec![0; 16 << 20];
        let pages = untouched(&mut bytes);
        // Some exist already, written to and read only; most do not.
        pages[..100].iter_mut().for_each(|page| page[5] = 1);
        assert_eq!(pages[100..200].iter().filter(|page| page[5] == 1).count(), 0);
        let mut sampler = sampler_of(pages.as_flattened());
        let (window, written) = look(&mut sampler, || {
            for page in [3, 4, 50, 150, 2_000, 3_333] {
                pages[page][7] = pages[page][7].wrapping_add(1);
            }
            let read = [60, 160, 2_100].map(|page: usize| std::hint::black_box(pages[page][7]));
            assert_eq!(read, [0; 3]);
        });
        // Where the host gives huge pages unasked, chunks of 512 pages are counted.
        if window.sampled_huge_bytes == 0 && written < 512 {
            assert_eq!(written, 6, "{window:?}");
        }
        assert!(written >= 6, "{window:?}");
        assert!(window.fresh_ratio.unwrap() < 0.1, "the same pages over and over: {window:?}");
        let (window, written) = look(&mut sampler, || {});
        assert_eq!((written, window.fresh_ratio), (0, None), "{window:?}");
        assert!(!is_registered(pages.as_flattened()));
    }

    #[test]
    fn a_writer_that_comes_to_new_pages_all_the_while_looks_fresh() {
        if !can_track() {
            return;
        }
        let mut bytes = vec![0; 64 << 20];
        let pages = untouched(&mut bytes);
        pages.iter_mut().for_each(|page| page[0] = 1);
        let mut sampler = sampler_of(pages.as_flattened());
        let mut next = 0;
        let (window, _) = look(&mut sampler, || {
            pages[next % pages.len()][0] = 2;
            next += 1;
            // As long as it takes to go some way through memory in the window, and not to its end.
            let until = Instant::now() + Duration::from_micros(50);
            while Instant::now() < until {}
        });
        let ratio = window.fresh_ratio.unwrap();
        // In huge pages, or on a host that leaves the writer no processor for a while, it is coarse.
        assert!(ratio > 0.4 && ratio < 2.5, "{window:?}");
    }

    #[test]
    fn a_huge_page_counts_as_a_whole_and_stays_whole() {
        if !can_track() {
            return;
        }
        let mut buffer = HugeBuffer::new().unwrap();
        let start = HostVirtAddr(buffer.as_ptr().addr() as u64);
        let mut sampler = sampler_of(&buffer);
        let is_huge = |sampler: &Sampler| {
            let pagemap = &sampler.target.pagemap;
            pagemap.has_anonymous_huge_pages(start, HUGE_BYTES as u64).unwrap()
        };
        if !is_huge(&sampler) {
            eprintln!("SKIPPED: this host gives no huge pages");
            return;
        }
        let (window, written) = look(&mut sampler, || buffer[4096] = buffer[4096].wrapping_add(1));
        assert_eq!((window.sampled_huge_bytes, written), (HUGE_BYTES as u64, 512), "{window:?}");
        assert!(is_huge(&sampler), "it was split");
    }

    #[test]
    fn memory_is_given_up_when_it_is_taken_or_the_window_cancelled() {
        if !can_track() {
            return;
        }
        let mut bytes = vec![0; 8 << 20];
        let memory = untouched(&mut bytes).as_flattened();
        let mut sampler = sampler_of(memory);
        let cancel = Cancel::default();
        cancel.cancel();
        assert_eq!(sampler.window(Duration::MAX / 4, &cancel).unwrap(), None);
        assert!(!is_registered(memory));

        let other = Context::new(create_local().unwrap(), Features::FAULTS).unwrap();
        let last = HostVirtAddr(memory.as_ptr_range().end.addr() as u64 - PAGE_BYTES);
        other.register(last, PAGE_BYTES).unwrap();
        let error = sampler.window(WINDOW, &cancel).unwrap_err();
        assert_eq!(error.reason(), crate::Reason::ForeignUserfaultfd, "{error}");
        drop(other);
        assert!(!is_registered(memory));
    }
}
