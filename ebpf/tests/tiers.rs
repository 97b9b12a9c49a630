//! What each tier sees, where the kernel has it: every fault, whoever has it.
//!
//! No kernel that we know has them all on a usual machine, so the tests run in VMs as well; there every tier must be
//! had (`REQUIRE_TIERS=1`).

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod faults;
mod privilege;

use std::ffi::c_void;
use std::io::IoSlice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use faults::Memory;
use livesnap_ebpf::{Mode, Options, Probes, Range, Tier};
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;
use privilege::is_root;
use snapshot_core::{KvmGuest, TestMemory, TestMemoryKind, kvm};
use userfaultfd::RegisterMode;

/// RAM of the KVM guest.
const GUEST_PAGES: usize = 1024;
/// Tiers that see what the kernel does for a fault, and not the exception.
const AT_THE_WAIT: [Tier; 2] = [Tier::Fentry, Tier::Kprobe];

/// Taken by every test: a thread that waits while another test attaches or detaches `fentry` leaves the kernel's function
/// without its end being seen.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Probes of our own process, if the kernel has this tier; says so if it has not.
fn attach(tier: Tier, range: Range) -> Option<Probes> {
    let options = Options { tier: Some(tier), ..Options::default() };
    match Probes::attach(std::process::id(), &[range], &options) {
        Ok(probes) => Some(probes),
        Err(error) => {
            assert_ne!(std::env::var("REQUIRE_TIERS").as_deref(), Ok("1"), "{error}");
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

/// How many stalls were seen in user mode and in the kernel. None may have been lost on the way.
fn seen(probes: &Probes) -> (u64, u64) {
    let stalls = probes.read().unwrap().stalls;
    let of = |mode| stalls.sum(|thread| thread.mode == mode).count;
    let lost = (stalls.lost.map_full, stalls.lost.start_without_end);
    assert_eq!(lost, (0, 0), "{}: {} and {} seen", probes.tier(), of(Mode::User), of(Mode::Kernel));
    (of(Mode::User), of(Mode::Kernel))
}

#[test]
fn writes_of_threads_are_all_seen() {
    let _alone = alone();
    for tier in Tier::ALL.into_iter().filter(|_| is_root("attaching probes")) {
        let memory = Memory::new().unwrap();
        let Some(probes) = attach(tier, memory.range()) else { continue };
        for handler in [0, 1] {
            memory.fault(1024, 0, handler);
        }
        assert_eq!(seen(&probes), (2048, 0), "{tier}");
    }
}

#[test]
fn writes_of_system_calls_are_all_seen() {
    let _alone = alone();
    for tier in Tier::ALL.into_iter().filter(|_| is_root("attaching probes")) {
        let mut memory = Memory::new().unwrap();
        let Some(probes) = attach(tier, memory.range()) else { continue };
        let count = memory.fault_in_system_calls() as u64;
        assert_eq!(seen(&probes), (0, count), "{tier}");
    }
}

#[test]
fn writes_to_pinned_pages_are_seen_where_the_wait_is() {
    let _alone = alone();
    for tier in Tier::ALL.into_iter().filter(|_| is_root("attaching probes")) {
        let mut memory = Memory::new().unwrap();
        let Some(probes) = attach(tier, memory.range()) else { continue };
        // This system call pins the pages that it writes to, as direct I/O does: no exception.
        let count = memory.fault_by(|byte| {
            let to = RemoteIoVec { base: byte.as_mut_ptr().addr(), len: 1 };
            let written = process_vm_writev(Pid::this(), &[IoSlice::new(&[0])], &[to]);
            assert_eq!(written, Ok(1));
        });
        let count = if AT_THE_WAIT.contains(&tier) { count as u64 } else { 0 };
        assert_eq!(seen(&probes), (0, count), "{tier}");
    }
}

#[test]
fn writes_of_a_kvm_guest_are_all_seen() {
    let _alone = alone();
    let Some(kvm) = is_root("attaching probes").then(kvm).flatten() else { return };
    // Where the guest and the handler share a CPU, the guest has always left it when the handler lets it go on.
    faults::pin(0);
    for tier in Tier::ALL {
        let ram = Arc::new(TestMemory::map(TestMemoryKind::Anonymous, GUEST_PAGES).unwrap());
        let range = Range { start: ram.address(), len_bytes: ram.len_bytes() };
        let mut guest = KvmGuest::new(&kvm, ram).unwrap();
        guest.write_pages(GUEST_PAGES);
        let Some(probes) = attach(tier, range) else { continue };

        let uffd = faults::open().unwrap();
        let (start, len) = (range.start as *mut c_void, usize::try_from(range.len_bytes).unwrap());
        uffd.register_with_mode(start, len, RegisterMode::WRITE_PROTECT).unwrap();
        uffd.write_protect(start, len).unwrap();
        let before = faults::preemptions();
        std::thread::scope(|scope| {
            scope.spawn(|| faults::serve(&uffd, GUEST_PAGES, 0));
            guest.write_pages(GUEST_PAGES);
        });
        let preempted = faults::preemptions() - before;
        let (in_user_mode, in_kernel) = seen(&probes);
        // A guest that has lost its CPU in a fault that KVM serves by itself has waited, too.
        let spurious = if AT_THE_WAIT.contains(&tier) { 0 } else { preempted };
        let pages = GUEST_PAGES as u64;
        eprintln!("{tier}: {in_kernel} of {pages} seen, {preempted} times preempted");
        assert_eq!(in_user_mode, 0, "{tier}");
        assert!((pages..=pages + spurious).contains(&in_kernel), "{tier}: {in_kernel}");
    }
}
