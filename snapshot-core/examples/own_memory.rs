//! A process snapshots its own memory under writing threads, and checks that the snapshot is of one instant.
//!
//! ```text
//! cargo run --example own_memory
//! ```
//!
//! This is what a VMM that embeds the engine does: it implements [`Vmm`] and calls [`snapshot`]. Here the "virtual
//! CPUs" are the two threads of a [`Workload`], whose memory tells of any copy of it whether it is of one instant.

use std::os::fd::OwnedFd;
use std::path::Path;

use snapshot_core::address::PAGE_BYTES;
use snapshot_core::image::Snapshot;
use snapshot_core::ram::RamLayout;
use snapshot_core::vmm::{
    DeviceState, DiskSnapshot, MachineDescription, Outcome, RunState, Vmm, VmmError,
};
use snapshot_core::workload::{self, Workload};
use snapshot_core::{Cancel, Options, Progress, Reason, Report, SessionError, snapshot};

type Error = Box<dyn std::error::Error>;

const WRITERS: usize = 2;
const PAGES_PER_WRITER: usize = 8192;

/// The embedder's side of the engine.
struct Embedder<'a>(&'a Workload);

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
        RamLayout::new(vec![self.0.ram_block()])
            .map_err(|error| VmmError::new(Reason::Internal, error))
    }

    fn userfaultfd(&mut self) -> Result<OwnedFd, VmmError> {
        snapshot_core::userfaultfd().map_err(|error| VmmError::new(Reason::MissingPrivilege, error))
    }

    fn prepare_disks(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<RunState, VmmError> {
        self.0.pause();
        Ok(RunState::Running)
    }

    fn device_state(&mut self) -> Result<DeviceState, VmmError> {
        let counters = self.0.counters();
        Ok(DeviceState::Opaque(counters.iter().flat_map(|next| next.to_le_bytes()).collect()))
    }

    fn switch_disks(&mut self) -> Result<DiskSnapshot, VmmError> {
        Ok(DiskSnapshot { left_out: true, ..DiskSnapshot::default() })
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.0.resume();
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
    Ok(take_observed(dir, options, &Cancel::default(), &mut |_| {})?)
}

/// The same, for a caller who looks on and may end it.
pub fn take_observed(
    dir: &Path,
    options: &Options,
    cancel: &Cancel,
    observe: &mut dyn FnMut(&Progress),
) -> Result<Report, SessionError> {
    let workload = Workload::new(WRITERS, PAGES_PER_WRITER);
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let workload = &workload;
            scope.spawn(move || workload.run(writer));
        }
        let mut embedder = Embedder(&workload);
        let taken = snapshot(&mut embedder, dir, options, cancel, observe);
        workload.end();
        taken
    })
}

/// Checks that every page in the snapshot is of the instant that the device state tells of.
pub fn check(dir: &Path) -> Result<(), Error> {
    let snapshot = Snapshot::open(dir)?;
    snapshot.verify(&mut |_, _| {})?;
    let image = std::fs::read(snapshot.ram_path())?;
    let block = &snapshot.manifest().ram.blocks[0];
    let ram = &image[usize::try_from(block.pages_offset)?..][..usize::try_from(block.len_bytes)?];
    let state = std::fs::read(dir.join("device-state.bin"))?;
    let counters: Vec<_> =
        state.as_chunks().0.iter().map(|&next| u64::from_le_bytes(next)).collect();
    match workload::count_strays(ram, 0, block.len_bytes / PAGE_BYTES, &counters) {
        0 => Ok(()),
        strays => Err(format!("{strays} pages are of another instant").into()),
    }
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
