//! Whole sessions on memory of every kind: memory that is mostly not there, and memory of a KVM guest.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::num::NonZeroU64;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use super::*;
use crate::address::{HostVirtAddr, as_index};
use crate::image::Snapshot;
use crate::ram::RamBlock;
use crate::sys::test_kvm::{KvmGuest, kvm};
use crate::sys::test_memory::{Kind, TestMemory};
use crate::sys::uffd::create_local;
use crate::vmm::testing::{DEADLINE, privileged};

/// Every kind, with a number of pages that can be divided by four.
const KINDS: [(Kind, usize); 4] = [
    (Kind::Anonymous, 4096),
    (Kind::Shared, 4096),
    (Kind::PrivatePool, 32),
    (Kind::SharedPool, 32),
];

/// What a guest does at the moments of a session, each time until it is done.
trait Guest: Send {
    fn memory(&self) -> &TestMemory;
    fn work_before(&mut self);
    fn work_while_arming(&mut self);
    fn work_after_the_consistency_point(&mut self);
}

struct GuestVmm<G>(G);

impl<G: Guest> Vmm for GuestVmm<G> {
    fn pid(&self) -> rustix::process::Pid {
        rustix::process::getpid()
    }

    fn describe(&mut self) -> Result<MachineDescription, VmmError> {
        self.0.work_before();
        Ok(MachineDescription { machine_type: "none".into(), cpus: 1, ..Default::default() })
    }

    fn ram_layout(&mut self) -> Result<RamLayout, VmmError> {
        let memory = self.0.memory();
        let block = RamBlock {
            id: "ram".into(),
            hva: HostVirtAddr(memory.address()),
            len_bytes: memory.len_bytes(),
            page_size_bytes: memory.kind().page_bytes() as u64,
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
        self.0.work_while_arming();
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
        // The sweep begins only after this.
        self.0.work_after_the_consistency_point();
        Ok(())
    }

    fn check(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    fn finish(&mut self, _outcome: Outcome) -> Result<(), VmmError> {
        Ok(())
    }
}

/// The first word of each page in a snapshot.
fn words_in_snapshot_of(guest: impl Guest) -> Vec<u64> {
    words_in_snapshot_with(Options::default(), guest)
}

fn words_in_snapshot_with(options: Options, guest: impl Guest) -> Vec<u64> {
    let page_bytes = guest.memory().kind().page_bytes();
    let dir = tempfile::tempdir().unwrap();
    let options = Options { pause_limit: DEADLINE, ..options };
    let mut vmm = GuestVmm(guest);
    snapshot(&mut vmm, dir.path(), &options, &Cancel::default(), &mut |_| {}).unwrap();

    let snapshot = Snapshot::open(dir.path()).unwrap();
    snapshot.verify(&mut |_, _| {}).unwrap();
    let block = &snapshot.manifest().ram.blocks[0];
    let image = fs::read(snapshot.ram_path()).unwrap();
    let ram = &image[as_index(block.pages_offset)..][..as_index(block.len_bytes)];
    let pages = ram.chunks_exact(page_bytes);
    pages.map(|page| u64::from_ne_bytes(*page.first_chunk().unwrap())).collect()
}

/// Lets the pool of huge pages grow by what one test needs, and shrink again; for one test at a time.
struct PoolLimit {
    before: String,
    _turn: MutexGuard<'static, ()>,
}

impl PoolLimit {
    const FILE: &str = "/proc/sys/vm/nr_overcommit_hugepages";

    fn raise(pages: usize) -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let before = fs::read_to_string(Self::FILE).unwrap();
        let raised = before.trim().parse::<usize>().unwrap() + pages;
        fs::write(Self::FILE, raised.to_string()).unwrap();
        Self { before, _turn }
    }
}

impl Drop for PoolLimit {
    fn drop(&mut self) {
        fs::write(Self::FILE, &self.before).unwrap();
    }
}

/// Writes each fourth page in its turn: before the snapshot, while RAM is being protected, and after the consistency
/// point. Each last one it leaves alone.
struct Sparse(TestMemory);

impl Sparse {
    const BEFORE: u64 = 1;
    const WHILE_ARMING: u64 = 2;
    const AFTER: u64 = 3;

    fn write(&self, turn: usize, value: u64) {
        for word in self.0.words().skip(turn).step_by(4) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

impl Guest for Sparse {
    fn memory(&self) -> &TestMemory {
        &self.0
    }

    fn work_before(&mut self) {
        self.write(0, Self::BEFORE);
    }

    fn work_while_arming(&mut self) {
        self.write(1, Self::WHILE_ARMING);
    }

    fn work_after_the_consistency_point(&mut self) {
        (0..3).for_each(|turn| self.write(turn, Self::AFTER));
    }
}

/// Writes all pages and half of them again before the snapshot, a quarter while RAM is being protected, and all of
/// them afterwards.
struct InKvm(KvmGuest);

impl InKvm {
    fn pages(&self) -> usize {
        self.0.ram().words().count()
    }
}

impl Guest for InKvm {
    fn memory(&self) -> &TestMemory {
        self.0.ram()
    }

    fn work_before(&mut self) {
        self.0.write_pages(self.pages() + self.pages() / 2);
    }

    fn work_while_arming(&mut self) {
        self.0.write_pages(self.pages() / 4);
    }

    fn work_after_the_consistency_point(&mut self) {
        self.0.write_pages(2 * self.pages());
    }
}

#[test]
fn sparse_memory_of_every_kind_is_saved_as_it_was() {
    if !privileged() {
        return;
    }
    let _pool = PoolLimit::raise(64);
    for (kind, pages) in KINDS {
        let guest = Sparse(TestMemory::map(kind, pages).unwrap());
        let expected = [Sparse::BEFORE, Sparse::WHILE_ARMING, 0, 0];
        let expected = expected.into_iter().cycle().take(pages);
        assert!(words_in_snapshot_of(guest).into_iter().eq(expected), "{kind:?}");
    }
}

#[test]
fn memory_of_a_kvm_guest_is_saved_as_it_was() {
    let Some(kvm) = privileged().then(kvm).flatten() else { return };
    let _pool = PoolLimit::raise(64);
    for (kind, pages) in KINDS {
        let ram = Arc::new(TestMemory::map(kind, pages).unwrap());
        let guest = InKvm(KvmGuest::new(&kvm, ram).unwrap());
        let expected = (0..pages).map(|page| if page < pages * 3 / 4 { 2 } else { 1 });
        assert!(words_in_snapshot_of(guest).into_iter().eq(expected), "{kind:?}");
    }
}

#[cfg(feature = "controls")]
#[test]
fn without_protection_neither_is() {
    if !privileged() {
        return;
    }
    let controls = Controls { without_protection: true, ..Controls::default() };
    let options = Options { controls, ..Options::default() };
    let (kind, pages) = KINDS[0];
    let words =
        words_in_snapshot_with(options.clone(), Sparse(TestMemory::map(kind, pages).unwrap()));
    assert!(
        words.into_iter().eq([Sparse::AFTER, Sparse::AFTER, Sparse::AFTER, 0].repeat(pages / 4))
    );
    let Some(kvm) = kvm() else { return };
    let ram = Arc::new(TestMemory::map(kind, pages).unwrap());
    let words = words_in_snapshot_with(options, InKvm(KvmGuest::new(&kvm, ram).unwrap()));
    let expected = (0..pages).map(|page| if page < pages * 3 / 4 { 4 } else { 3 });
    assert!(words.into_iter().eq(expected), "two rounds later");
}

/// A session of 16 MiB, kept to so many bytes a second.
fn limited(
    bytes_per_s: u64,
    cancel: &Cancel,
    observe: &mut dyn FnMut(&Progress),
) -> Result<Report, SessionError> {
    let guest = Sparse(TestMemory::map(Kind::Anonymous, 4096).unwrap());
    let max_bandwidth = NonZeroU64::new(bytes_per_s).into();
    let options = Options { max_bandwidth, pause_limit: DEADLINE, ..Options::default() };
    let dir = tempfile::tempdir().unwrap();
    snapshot(&mut GuestVmm(guest), dir.path(), &options, cancel, observe)
}

#[test]
fn no_more_is_written_than_the_limit_allows() {
    if !privileged() {
        return;
    }
    let bytes_per_s = 16 << 20;
    let (mut begun, mut ended) = (None, None);
    let report = limited(bytes_per_s, &Cancel::default(), &mut |progress| match progress.phase {
        // Nothing is written before; copying may have gone on for a while when it is told.
        Phase::Frozen => drop(begun.get_or_insert_with(Instant::now)),
        Phase::Committing => drop(ended.get_or_insert_with(Instant::now)),
        _ => {}
    });
    // What is written last is not waited for, and a burst may come first.
    let waited_for = report.unwrap().stored_bytes - EXTENT_BYTES as u64 - bytes_per_s / 50;
    let took = ended.unwrap() - begun.unwrap();
    assert!(took.as_secs_f64() * bytes_per_s as f64 >= waited_for as f64, "{took:?}");
}

#[test]
fn a_session_that_rests_can_be_cancelled() {
    if !privileged() {
        return;
    }
    for phase in [Phase::Copying, Phase::Draining] {
        let cancel = Cancel::default();
        let error = limited(1, &cancel, &mut |progress| {
            if progress.phase == phase {
                cancel.cancel();
            }
        });
        assert_eq!(error.unwrap_err().reason(), Reason::Cancelled);
    }
}
