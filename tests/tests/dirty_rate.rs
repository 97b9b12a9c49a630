//! The dirty rate of real guests, against the guest's own count of what it wrote.
//!
//! Each goes the whole way through the command line; the control goes through the library, because the
//! command line cannot be told to protect nothing.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::time::Duration;

use livesnap_tests::console::Heartbeat;
use livesnap_tests::livesnap::{self, Running, snapshot_command};
use livesnap_tests::qemu::{HugePages, Load, Qemu, Ram};
use livesnap_tests::{is_root_or_skip, poll_until};
use rustix::process::Signal;
use serde_json::Value;
use snapshot_core::Cancel;
use snapshot_core::dirty_rate::{Sampler, SamplerOptions};
use snapshot_core::vmm::qemu::{QemuOptions, QemuVmm};

const BOOT: Duration = Duration::from_secs(120);
const PAGE_BYTES: f64 = 4096.0;
/// Pages a second that the guest's worker writes, unless the host is too busy.
const RATE: u32 = 4_000;
const WINDOW: Duration = Duration::from_secs(1);
/// More than any guest here has.
const ALL: &str = "1GiB";

/// A guest that writes at a known rate, each page of its ring far less than once in a window.
fn guest(ram: Ram) -> Qemu {
    let load = Load { ring_mib: 128, rate: RATE, ..Load::default() };
    let mut guest = Qemu::builder().vcpus(2).ram(ram).load(load).start().unwrap();
    // The first lap finds memory that does not exist yet, and zeroes it before.
    guest.wait_ready(BOOT).unwrap();
    guest
}

fn watch(guest: &Qemu, windows: u32, sample: &str, interval: &str) -> std::process::Command {
    let mut command = livesnap::command(["watch", "--json", "--sample", sample]).unwrap();
    command.arg("--count").arg(windows.to_string()).arg("--interval").arg(interval);
    command.arg("--qmp").arg(guest.qmp_socket());
    command
}

/// The windows that `livesnap watch` tells, and the bytes a second that the guest says it wrote meanwhile.
fn compare(guest: &mut Qemu, windows: u32, sample: &str, interval: &str) -> (Vec<Value>, f64) {
    let before = newest(guest);
    let output = watch(guest, windows, sample, interval).output().unwrap();
    let after = newest(guest);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let told: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(told.len(), usize::try_from(windows).unwrap(), "{text}");
    assert_eq!(after.inconsistent, 0, "{after:?}");
    (told, bytes_per_second(&before, &after))
}

fn newest(guest: &mut Qemu) -> Heartbeat {
    guest.wait_heartbeat(BOOT, |_| true).unwrap()
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn bytes_per_second(before: &Heartbeat, after: &Heartbeat) -> f64 {
    let pages = after.workers[0] - before.workers[0];
    pages as f64 * PAGE_BYTES / ((after.t_ms - before.t_ms) as f64 / 1e3)
}

fn mean(told: &[Value], field: &str) -> f64 {
    let sum: f64 = told.iter().map(|window| window[field].as_f64().unwrap()).sum();
    sum / f64::from(u32::try_from(told.len()).unwrap())
}

fn expect_within_a_tenth(told: &[Value], written: f64) {
    let rate = mean(told, "bytes_per_second");
    eprintln!("{rate:.0} B/s, the guest says {written:.0}; ratio {:.3}", rate / written);
    assert!((rate - written).abs() < 0.1 * written, "{rate} is not {written}: {told:#?}");
}

/// All memory is watched: what is told is what the guest writes.
fn all_memory_tells_what_the_guest_writes(ram: Ram) {
    if !is_root_or_skip("a userfaultfd in another process").unwrap() {
        return;
    }
    let mut guest = guest(ram);
    let (told, written) = compare(&mut guest, 4, ALL, "1s");
    expect_within_a_tenth(&told, written);
    for window in &told {
        assert_eq!(window["error_bytes_per_second"], 0.0, "{window}");
        assert_eq!(window["sampled_bytes"], window["ram_bytes"], "{window}");
        assert_eq!(window["vcpu_shares"].as_array().unwrap().len(), 2, "{window}");
    }
    assert!(!guest.has_userfaultfd().unwrap());
}

#[test]
fn a_memfd_tells_what_the_guest_writes() {
    all_memory_tells_what_the_guest_writes(Ram::Memfd);
}

#[test]
fn small_anonymous_pages_tell_what_the_guest_writes() {
    all_memory_tells_what_the_guest_writes(Ram::AnonymousSmallPages);
}

#[test]
fn a_sample_tells_it_too_and_its_error_is_honest() {
    if !is_root_or_skip("a userfaultfd in another process").unwrap() {
        return;
    }
    let mut guest = guest(Ram::AnonymousSmallPages);
    // Half of memory, for so long that the worker goes through many chunks in each window.
    let (told, written) = compare(&mut guest, 8, "128MiB", "3s");
    expect_within_a_tenth(&told, written);
    let holds = |window: &&Value| {
        let field = |name: &str| window[name].as_f64().unwrap();
        assert!(field("sampled_bytes") < 0.6 * field("ram_bytes"), "{window}");
        (field("bytes_per_second") - written).abs() <= field("error_bytes_per_second")
    };
    // 19 of 20 are expected to.
    assert!(told.iter().filter(holds).count() >= 6, "{written}: {told:#?}");
}

#[test]
fn huge_pages_are_counted_whole_and_stay_whole() {
    if !is_root_or_skip("a userfaultfd in another process").unwrap() {
        return;
    }
    let mut guest = guest(Ram::Anonymous);
    let before_kib = guest.anon_huge_kib().unwrap();
    if before_kib == 0 {
        eprintln!("SKIPPED: this host gives no huge pages");
        return;
    }
    let (told, written) = compare(&mut guest, 4, ALL, "1s");
    assert!(mean(&told, "sampled_huge_bytes") > 0.0, "{told:#?}");
    assert!(mean(&told, "bytes_per_second") > 0.9 * written, "{written}: {told:#?}");
    let after_kib = guest.anon_huge_kib().unwrap();
    assert!(after_kib >= before_kib, "{before_kib} KiB became {after_kib} KiB");
}

#[test]
fn a_pool_of_huge_pages_can_be_watched() {
    if is_root_or_skip("a pool of huge pages").unwrap() {
        let _pool = HugePages::reserve(256).unwrap();
        let mut guest = guest(Ram::HugetlbMemfd);
        let (told, written) = compare(&mut guest, 2, ALL, "1s");
        assert!(mean(&told, "bytes_per_second") > 0.9 * written, "{written}: {told:#?}");
    }
}

#[test]
fn without_protection_the_figure_is_wrong() {
    if !is_root_or_skip("a userfaultfd in another process").unwrap() {
        return;
    }
    let mut guest = guest(Ram::AnonymousSmallPages);
    let guard_command = vec![livesnap::binary().unwrap().into(), "guard".into()];
    let qemu = QemuOptions { guard_command, ..QemuOptions::new(guest.qmp_socket()) };
    let mut vmm = QemuVmm::attach_to_measure(qemu).unwrap();
    let options = SamplerOptions { without_protection: true, ..SamplerOptions::new(1 << 30, 0) };
    let before = newest(&mut guest);
    let mut sampler = Sampler::attach(&mut vmm, &options).unwrap();
    let window = sampler.window(WINDOW, &Cancel::default()).unwrap().unwrap();
    let written = bytes_per_second(&before, &newest(&mut guest));
    let rate = window.rate.bytes_per_second;
    assert!((rate - written).abs() > 0.1 * written, "{rate} {written}");
}

/// A `livesnap watch` that has begun to watch.
fn watching(guest: &Qemu) -> Running {
    let running = Running::start(watch(guest, 1_000, "64MiB", "1s")).unwrap();
    let begun = || Ok(guest.has_userfaultfd().unwrap().then_some(()));
    poll_until("memory is watched", BOOT, begun).unwrap();
    running
}

fn expect_unharmed(guest: &mut Qemu) {
    guest.wait_unprotected(BOOT).unwrap();
    assert_eq!(guest.wait_laps(1, BOOT).unwrap().inconsistent, 0);
}

#[test]
fn however_it_ends_the_guest_goes_on() {
    if !is_root_or_skip("a userfaultfd in another process").unwrap() {
        return;
    }
    let load = Load { workers: 2, ..Load::default() };
    let mut guest = Qemu::builder().vcpus(2).load(load).start().unwrap();
    guest.wait_ready(BOOT).unwrap();
    let killed = watching(&guest);
    killed.signal(Signal::KILL).unwrap();
    assert_eq!(killed.wait().unwrap().status.code(), None);
    expect_unharmed(&mut guest);

    let interrupted = watching(&guest);
    interrupted.signal(Signal::INT).unwrap();
    assert_eq!(interrupted.wait().unwrap().status.code(), Some(0));
    expect_unharmed(&mut guest);

    // A snapshot is refused meanwhile, and the other way round.
    let watcher = watching(&guest);
    let out = guest.dir().join("snapshot");
    let snapshot = Running::start(snapshot_command(&guest, &out, &[]).unwrap()).unwrap();
    snapshot.wait().unwrap().expect_failure(3, "foreign_userfaultfd", &["userfaultfd"]).unwrap();
    let second = Running::start(watch(&guest, 1, ALL, "1s")).unwrap().wait().unwrap();
    second.expect_failure(3, "foreign_userfaultfd", &["cannot be measured"]).unwrap();

    drop(guest);
    watcher.wait().unwrap().expect_failure(1, "vmm_died", &["has ended"]).unwrap();
}
