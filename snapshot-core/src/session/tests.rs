//! Whole sessions on memory that is mostly not there, of every kind.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::sync::atomic::Ordering;

use super::*;
use crate::address::{HostVirtAddr, as_index};
use crate::image::Snapshot;
use crate::ram::RamBlock;
use crate::sys::test_memory::{Kind, TestMemory};
use crate::sys::uffd::create_local;
use crate::vmm::testing::{DEADLINE, privileged};

const BEFORE: u64 = 1;
const WHILE_ARMING: u64 = 2;
const AFTER: u64 = 3;

/// A guest that writes its memory page by page, each fourth in its turn: before the snapshot, while RAM is being
/// protected, and after the consistency point. Each last one it leaves alone.
struct Guest {
    kind: Kind,
    memory: TestMemory,
}

impl Guest {
    fn write(&self, turn: usize, value: u64) {
        for word in self.memory.words().skip(turn).step_by(4) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

impl Vmm for Guest {
    fn pid(&self) -> Pid {
        rustix::process::getpid()
    }

    fn describe(&mut self) -> Result<MachineDescription, VmmError> {
        self.write(0, BEFORE);
        Ok(MachineDescription { machine_type: "none".into(), cpus: 1, ..Default::default() })
    }

    fn ram_layout(&mut self) -> Result<RamLayout, VmmError> {
        let page_bytes = self.kind.page_bytes();
        let block = RamBlock {
            id: "ram".into(),
            hva: HostVirtAddr(self.memory.address()),
            len_bytes: (self.memory.words().count() * page_bytes) as u64,
            page_size_bytes: page_bytes as u64,
            store_zero_pages: false,
        };
        Ok(RamLayout::new(vec![block]).unwrap())
    }

    fn userfaultfd(&mut self) -> Result<OwnedFd, VmmError> {
        Ok(create_local().unwrap())
    }

    fn prepare_disks(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    fn prepare_pause(&mut self) -> Result<(), VmmError> {
        self.write(1, WHILE_ARMING);
        Ok(())
    }

    fn pause(&mut self) -> Result<RunState, VmmError> {
        Ok(RunState::Running)
    }

    fn device_state(&mut self) -> Result<DeviceState, VmmError> {
        Ok(DeviceState::Opaque(Vec::new()))
    }

    fn switch_disks(&mut self) -> Result<DiskSnapshot, VmmError> {
        Ok(DiskSnapshot { left_out: true, ..DiskSnapshot::default() })
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        for turn in 0..3 {
            self.write(turn, AFTER);
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    fn finish(&mut self, _outcome: Outcome) -> Result<(), VmmError> {
        Ok(())
    }
}

/// The first word of each page in a snapshot of a guest with `pages` pages of `kind`.
fn snapshot_of(kind: Kind, pages: usize) -> Vec<u64> {
    let mut guest = Guest { kind, memory: TestMemory::map(kind, pages).unwrap() };
    let dir = tempfile::tempdir().unwrap();
    let options = Options { pause_limit: DEADLINE, ..Options::default() };
    snapshot(&mut guest, dir.path(), &options, &Cancel::default(), &mut |_| {}).unwrap();

    let snapshot = Snapshot::open(dir.path()).unwrap();
    snapshot.verify(&mut |_, _| {}).unwrap();
    let block = &snapshot.manifest().ram.blocks[0];
    let image = fs::read(snapshot.ram_path()).unwrap();
    let ram = &image[as_index(block.pages_offset)..][..as_index(block.len_bytes)];
    let pages = ram.chunks_exact(kind.page_bytes());
    pages.map(|page| u64::from_ne_bytes(*page.first_chunk().unwrap())).collect()
}

/// Lets the pool of huge pages grow by what one test needs, and shrink again.
struct PoolLimit {
    before: String,
}

impl PoolLimit {
    const FILE: &str = "/proc/sys/vm/nr_overcommit_hugepages";

    fn raise(pages: usize) -> Self {
        let before = fs::read_to_string(Self::FILE).unwrap();
        let raised = before.trim().parse::<usize>().unwrap() + pages;
        fs::write(Self::FILE, raised.to_string()).unwrap();
        Self { before }
    }
}

impl Drop for PoolLimit {
    fn drop(&mut self) {
        fs::write(Self::FILE, &self.before).unwrap();
    }
}

#[test]
fn sparse_memory_of_every_kind_is_saved_as_it_was() {
    if !privileged() {
        return;
    }
    let _pool = PoolLimit::raise(64);
    let kinds = [
        (Kind::Anonymous, 4096),
        (Kind::Shared, 4096),
        (Kind::PrivatePool, 32),
        (Kind::SharedPool, 32),
    ];
    for (kind, pages) in kinds {
        let expected = [BEFORE, WHILE_ARMING, 0, 0].into_iter().cycle().take(pages);
        assert!(snapshot_of(kind, pages).into_iter().eq(expected), "{kind:?}");
    }
}
