//! A process snapshots its own memory under writing threads, and checks that the snapshot is of one instant.
//!
//! ```text
//! cargo run --example own_memory
//! ```
//!
//! This is what a VMM that embeds the engine does: it implements [`Vmm`] and calls [`snapshot`]. Here the "virtual
//! CPUs" are two threads that write pages round-robin, each page stamped with a counter that goes up by one.
//! At any one instant the stamps of all pages are therefore one contiguous window of counters. A snapshot that mixed
//! two instants would have a gap in it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use snapshot_core::address::{HostVirtAddr, PAGE_BYTES};
use snapshot_core::image::Snapshot;
use snapshot_core::ram::{RamBlock, RamLayout};
use snapshot_core::vmm::{
    DeviceState, DiskSnapshot, MachineDescription, Outcome, RunState, Vmm, VmmError,
};
use snapshot_core::{Cancel, Options, Reason, Report, snapshot};

type Error = Box<dyn std::error::Error>;

const WRITERS: usize = 2;
const PAGES_PER_WRITER: usize = 8192;

/// One page of "guest RAM": every word of it holds the counter of its last write.
#[repr(align(4096))]
struct Page([AtomicU64; 512]);

/// The "virtual machine": memory, and a gate at which its threads stop.
struct Machine {
    ram: Vec<Page>,
    gate: Mutex<Gate>,
    changed: Condvar,
    stop: AtomicBool,
    /// Counter of the next page, for each writer.
    next: [AtomicU64; WRITERS],
}

#[derive(Default)]
struct Gate {
    closed: bool,
    waiting: usize,
}

impl Machine {
    fn new() -> Self {
        let page = |_| Page([const { AtomicU64::new(0) }; 512]);
        Self {
            ram: (0..WRITERS * PAGES_PER_WRITER).map(page).collect(),
            gate: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            next: [const { AtomicU64::new(1) }; WRITERS],
        }
    }

    /// What a virtual CPU does until it is told to end.
    fn run(&self, writer: usize) {
        let pages = &self.ram[writer * PAGES_PER_WRITER..(writer + 1) * PAGES_PER_WRITER];
        while !self.stop.load(Ordering::Relaxed) {
            self.pass_gate();
            for _ in 0..64 {
                let counter = self.next[writer].fetch_add(1, Ordering::Relaxed);
                let slot = usize::try_from(counter).unwrap_or(0) % PAGES_PER_WRITER;
                for word in &pages[slot].0 {
                    word.store(counter, Ordering::Relaxed);
                }
            }
        }
    }

    fn pass_gate(&self) {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        gate.waiting += 1;
        self.changed.notify_all();
        while gate.closed && !self.stop.load(Ordering::Relaxed) {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.waiting -= 1;
    }

    fn set_gate(&self, closed: bool) {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        gate.closed = closed;
        self.changed.notify_all();
        while closed && gate.waiting < WRITERS {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn laps(&self) -> u64 {
        let least = self.next.iter().map(|next| next.load(Ordering::Relaxed)).min();
        least.unwrap_or(0) / PAGES_PER_WRITER as u64
    }
}

/// The embedder's side of the engine.
struct Embedder<'a>(&'a Machine);

impl Vmm for Embedder<'_> {
    fn pid(&self) -> rustix::process::Pid {
        rustix::process::getpid()
    }

    fn describe(&mut self) -> Result<MachineDescription, VmmError> {
        Ok(MachineDescription {
            vmm: "own_memory".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            machine_type: "two-threads".into(),
            cpus: 2,
            ..MachineDescription::default()
        })
    }

    fn ram_layout(&mut self) -> Result<RamLayout, VmmError> {
        let ram = RamBlock {
            id: "ram".into(),
            hva: HostVirtAddr(self.0.ram.as_ptr().addr() as u64),
            len_bytes: size_of_val(self.0.ram.as_slice()) as u64,
            page_size_bytes: PAGE_BYTES,
            store_zero_pages: false,
        };
        RamLayout::new(vec![ram]).map_err(|error| VmmError::new(Reason::Internal, error))
    }

    fn userfaultfd(&mut self) -> Result<OwnedFd, VmmError> {
        snapshot_core::userfaultfd().map_err(|error| VmmError::new(Reason::MissingPrivilege, error))
    }

    fn prepare_disks(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<RunState, VmmError> {
        self.0.set_gate(true);
        Ok(RunState::Running)
    }

    fn device_state(&mut self) -> Result<DeviceState, VmmError> {
        let next = self.0.next.iter().flat_map(|next| next.load(Ordering::Relaxed).to_le_bytes());
        Ok(DeviceState::Opaque(next.collect()))
    }

    fn switch_disks(&mut self) -> Result<DiskSnapshot, VmmError> {
        Ok(DiskSnapshot { left_out: true, ..DiskSnapshot::default() })
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.0.set_gate(false);
        Ok(())
    }

    fn check(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    fn finish(&mut self, _outcome: Outcome) -> Result<(), VmmError> {
        Ok(())
    }
}

/// Takes a snapshot of this process's own memory into `dir` while two threads write to it.
pub fn take(dir: &Path, options: &Options) -> Result<Report, Error> {
    let machine = Machine::new();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let machine = &machine;
            scope.spawn(move || machine.run(writer));
        }
        while machine.laps() < 2 {
            std::thread::yield_now();
        }
        let taken =
            snapshot(&mut Embedder(&machine), dir, options, &Cancel::default(), &mut |_| {});
        machine.stop.store(true, Ordering::Relaxed);
        machine.set_gate(false);
        Ok(taken?)
    })
}

/// Checks that every page in the snapshot was written in one piece and that the counters of each writer are one
/// contiguous window, the one that the device state tells of.
pub fn check(dir: &Path) -> Result<(), Error> {
    let snapshot = Snapshot::open(dir)?;
    snapshot.verify(&mut |_, _| {})?;
    let image = std::fs::read(snapshot.ram_path())?;
    let at = usize::try_from(snapshot.manifest().ram.blocks[0].pages_offset)?;
    let words: Vec<u64> = image[at..][..WRITERS * PAGES_PER_WRITER * 4096]
        .as_chunks::<8>()
        .0
        .iter()
        .map(|&bytes| u64::from_le_bytes(bytes))
        .collect();
    let state = std::fs::read(dir.join("device-state.bin"))?;
    for (writer, next) in state.as_chunks::<8>().0.iter().enumerate() {
        let next = u64::from_le_bytes(*next);
        for counter in next - PAGES_PER_WRITER as u64..next {
            let slot = usize::try_from(counter)? % PAGES_PER_WRITER;
            let page = &words[(writer * PAGES_PER_WRITER + slot) * 512..][..512];
            if page.iter().any(|&word| word != counter) {
                let found = (page[0], page[511]);
                return Err(format!(
                    "writer {writer}, page {slot}: expected {counter}, found {found:?}"
                )
                .into());
            }
        }
    }
    Ok(())
}

#[allow(dead_code, reason = "the tests include this file for the two functions above")]
#[expect(clippy::print_stdout, reason = "an example shows what it did")]
fn main() -> Result<(), Error> {
    let dir = std::env::temp_dir().join(format!("own-memory-{}", std::process::id()));
    let report = take(&dir, &Options::default())?;
    let checked = check(&dir);
    std::fs::remove_dir_all(&dir)?;
    checked?;
    println!("one instant, {} MiB of RAM:\n{report:#?}", report.ram_bytes >> 20);
    Ok(())
}
