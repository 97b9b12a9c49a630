//! Write faults that the kernel serves by itself are told apart from those that wait for a userfaultfd's handler.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod faults;
mod privilege;

use std::hint::black_box;

use faults::{PAGE_BYTES, pin, preemptions, serve};
use livesnap_ebpf::{Kind, Options, Probes, Range, Stalls, Tier};
use privilege::is_root;
use rustix::thread::disable_transparent_huge_pages;
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};

/// What the C library never takes from memory that was in use before (its `DEFAULT_MMAP_THRESHOLD_MAX`).
const FRESH_BYTES: usize = 33 << 20;
const PAGES: usize = 256;
/// Those that a handler lets through, each by itself.
const WAITED: usize = 64;

/// Memory that was read and never written: all of it the kernel's page of zeros, which is copied at the first write. So,
/// as with shared memory, lifting userfaultfd's protection leaves it read-only, and the kernel serves the next write.
struct Zeros {
    bytes: Vec<u8>,
    start: usize,
    uffd: Uffd,
}

impl Zeros {
    fn new() -> Self {
        disable_transparent_huge_pages(true).unwrap();
        let bytes = vec![0_u8; FRESH_BYTES];
        let address = bytes.as_ptr() as usize;
        let start = address.next_multiple_of(PAGE_BYTES) - address;
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .require_features(FeatureFlags::PAGEFAULT_FLAG_WP)
            .create()
            .unwrap();
        let zeros = Self { bytes, start, uffd };
        let (first, len) = (zeros.address(0), PAGES * PAGE_BYTES);
        zeros.uffd.register_with_mode(first, len, RegisterMode::WRITE_PROTECT).unwrap();
        for page in 0..PAGES {
            // By reference, or the compiler tells from the allocation what would be read.
            assert_eq!(*black_box(&zeros.bytes[start + page * PAGE_BYTES]), 0);
        }
        zeros.uffd.write_protect(first, len).unwrap();
        zeros
    }

    fn address(&self, page: usize) -> *mut std::ffi::c_void {
        self.bytes[self.start + page * PAGE_BYTES..].as_ptr().cast_mut().cast()
    }

    fn range(&self) -> Range {
        Range { start: self.address(0) as u64, len_bytes: (PAGES * PAGE_BYTES) as u64 }
    }

    /// Writes to the first `WAITED` pages while a handler lets that through, lifts the protection of the others, and
    /// writes to those. Returns how often this thread was preempted.
    fn write(&mut self) -> u64 {
        let before = preemptions();
        pin(0);
        let Self { bytes, start, uffd } = self;
        let pages = &mut bytes[*start..][..PAGES * PAGE_BYTES];
        let (first, rest) = pages.split_at_mut(WAITED * PAGE_BYTES);
        std::thread::scope(|scope| {
            scope.spawn(|| serve(uffd, WAITED, 0));
            touch(first);
        });
        uffd.remove_write_protection(rest.as_mut_ptr().cast(), rest.len(), false).unwrap();
        touch(rest);
        preemptions() - before
    }
}

fn touch(pages: &mut [u8]) {
    for page in pages.chunks_mut(PAGE_BYTES) {
        *black_box(&mut page[0]) = 1;
    }
}

/// What the probes of `options` tell of it, and how often the thread was preempted; nothing if there are none.
fn measure(options: &Options) -> Option<(Tier, Stalls, u64)> {
    let mut zeros = Zeros::new();
    let probes = match Probes::attach(std::process::id(), &[zeros.range()], options) {
        Ok(probes) => probes,
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            return None;
        }
    };
    let preempted = zeros.write();
    Some((probes.tier(), probes.read().unwrap().stalls, preempted))
}

#[test]
fn what_the_kernel_serves_is_no_stall() {
    if !is_root("measuring stalls") {
        return;
    }
    for tier in Tier::ALL {
        let options = Options { tier: Some(tier), ..Options::default() };
        let Some((_, stalls, preempted)) = measure(&options) else { continue };
        let (waited, served) = (stalls.total().count, stalls.served().count);
        eprintln!("{tier}: {waited} waited, {served} served, preempted {preempted} times");
        assert!(stalls.kinds_are_known, "{tier}");
        // A fault that the kernel serves counts as a wait if the thread loses its CPU in it.
        assert!((WAITED as u64..=WAITED as u64 + preempted).contains(&waited), "{tier}: {waited}");
        let seen = if matches!(tier, Tier::Fentry | Tier::Kprobe) { WAITED } else { PAGES };
        assert_eq!(waited + served, seen as u64, "{tier}");
    }
}

#[test]
fn without_type_information_it_says_that_it_cannot_tell() {
    if !is_root("measuring stalls") {
        return;
    }
    let btf = Some("/nonexistent/vmlinux".into());
    let Some((tier, stalls, _)) = measure(&Options { btf, ..Options::default() }) else { return };
    assert!(!stalls.kinds_are_known, "{tier}");
    assert_eq!(stalls.total().count, PAGES as u64, "{tier}");
    assert!(stalls.threads.iter().all(|faults| faults.kind == Kind::Waited), "{tier}");
}
