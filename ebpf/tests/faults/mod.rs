//! Write-protect faults whose length is known: a thread writes to protected memory and times each write by its own
//! clock, and another one lets the writes through. For the tests of the probes, and for the measure of their cost.

use std::fs::File;
use std::io::Read as _;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use livesnap_ebpf::Range;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CpuSet, sched_setaffinity};
use userfaultfd::{Event, EventBuffer, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

/// Size of a page.
pub const PAGE_BYTES: usize = 4096;
const PAGES: usize = 1024;
/// Longest time between two faults.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

#[repr(align(4096))]
struct Page([AtomicU8; PAGE_BYTES]);

/// Memory under userfaultfd.
pub struct Memory {
    pages: Vec<Page>,
    uffd: Uffd,
}

/// What a run of faults was like, by the clock of the thread that had them.
pub struct Timed {
    /// The thread.
    pub tid: u32,
    /// Duration of each write, in nanoseconds, ascending.
    pub sorted_ns: Vec<u64>,
}

impl Timed {
    /// Mean, in nanoseconds.
    pub fn mean_ns(&self) -> u64 {
        self.sorted_ns.iter().sum::<u64>() / self.sorted_ns.len() as u64
    }

    /// The duration that `per_mille` of 1000 do not exceed.
    pub fn quantile_ns(&self, per_mille: usize) -> u64 {
        self.sorted_ns[(self.sorted_ns.len() * per_mille / 1000).min(self.sorted_ns.len() - 1)]
    }
}

impl Memory {
    /// Present, registered, not protected yet.
    pub fn new() -> userfaultfd::Result<Self> {
        let pages: Vec<Page> =
            (0..PAGES).map(|_| Page(std::array::from_fn(|_| AtomicU8::new(1)))).collect();
        let memory = Self { pages, uffd: open()? };
        memory.uffd.register_with_mode(
            memory.start(),
            PAGES * PAGE_BYTES,
            RegisterMode::WRITE_PROTECT,
        )?;
        Ok(memory)
    }

    fn start(&self) -> *mut std::ffi::c_void {
        self.pages.as_ptr().cast_mut().cast()
    }

    /// Its addresses.
    pub fn range(&self) -> Range {
        Range { start: self.start() as u64, len_bytes: (PAGES * PAGE_BYTES) as u64 }
    }

    /// Has `count` faults, a multiple of the pages rounded up, in a thread on CPU `writer`, served by one on CPU
    /// `handler`. Both have ended when it returns.
    pub fn fault(&self, count: usize, writer: usize, handler: usize) -> Timed {
        let rounds = count.div_ceil(PAGES);
        std::thread::scope(|scope| {
            scope.spawn(|| serve(&self.uffd, rounds * PAGES, handler));
            let timed = scope.spawn(|| self.write(rounds, writer));
            timed.join().unwrap()
        })
    }

    /// Has a system call write to each page; returns how many those are.
    pub fn fault_in_system_calls(&mut self) -> usize {
        let zeros = File::open("/dev/zero").unwrap();
        self.fault_by(|byte| assert_eq!((&zeros).read(byte).unwrap(), 1))
    }

    /// Has `write` write to each page; returns how many those are.
    pub fn fault_by(&mut self, mut write: impl FnMut(&mut [u8])) -> usize {
        let (start, len) = (self.start(), PAGES * PAGE_BYTES);
        let Self { pages, uffd } = self;
        std::thread::scope(|scope| {
            scope.spawn(|| serve(uffd, PAGES, 0));
            uffd.write_protect(start, len).unwrap();
            for page in pages {
                write(std::slice::from_mut(page.0[0].get_mut()));
            }
        });
        PAGES
    }

    fn write(&self, rounds: usize, cpu: usize) -> Timed {
        pin(cpu);
        let mut durations = Vec::with_capacity(rounds * PAGES);
        for _ in 0..rounds {
            self.uffd.write_protect(self.start(), PAGES * PAGE_BYTES).unwrap();
            for page in &self.pages {
                let began = Instant::now();
                page.0[0].store(2, Ordering::Relaxed);
                durations.push(u64::try_from(began.elapsed().as_nanos()).unwrap());
            }
        }
        durations.sort_unstable();
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        Timed { tid, sorted_ns: durations }
    }
}

/// A userfaultfd that also sees faults of the kernel.
pub fn open() -> userfaultfd::Result<Uffd> {
    UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(false)
        .require_features(FeatureFlags::PAGEFAULT_FLAG_WP)
        .create()
}

/// Lets `count` faults through, on one CPU.
pub fn serve(uffd: &Uffd, count: usize, cpu: usize) {
    pin(cpu);
    let mut buffer = EventBuffer::new(16);
    let mut served = 0;
    while served < count {
        // Rather fail than wait for ever if the writer has failed.
        let mut readable = [PollFd::new(uffd, PollFlags::IN)];
        assert_ne!(poll(&mut readable, Some(&PATIENCE)).unwrap(), 0, "{served} of {count} faults");
        for event in uffd.read_events(&mut buffer).unwrap() {
            let Event::Pagefault { addr, .. } = event.unwrap() else { continue };
            let page = (addr as usize & !(PAGE_BYTES - 1)) as *mut std::ffi::c_void;
            uffd.remove_write_protection(page, PAGE_BYTES, true).unwrap();
            served += 1;
        }
    }
}

/// Keeps this thread on one CPU.
pub fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).unwrap();
}

/// How often this thread lost its CPU against its will.
pub fn preemptions() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:"));
    line.unwrap().trim().parse().unwrap()
}
