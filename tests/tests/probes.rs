//! What `livesnap snapshot` tells of the probes, on a real QEMU.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::time::Duration;

use livesnap_tests::qemu::{Qemu, Ram};
use livesnap_tests::{is_root_or_skip, livesnap};

const BOOT: Duration = Duration::from_secs(120);

/// Counts that two sides see differently: a fault may be served twice, or two by one capture; a thread may fault while it
/// is read out.
fn is_about(seen: u64, served: u64) -> bool {
    seen.abs_diff(served) <= 2 + served / 20
}

#[test]
fn on_shared_memory_only_waits_are_stalls() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut source = Qemu::builder().ram(Ram::Memfd).start().unwrap();
    source.wait_ready(BOOT).unwrap();

    let told = livesnap::snapshot(&source, &dir.path().join("out"), &[]).unwrap();
    let number = |pointer: &str| told.pointer(pointer).unwrap().as_u64().unwrap();
    let (count, served) = (number("/probes/stalls/copy/count"), number("/report/faults"));
    assert!(is_about(count, served), "{count} stalls, {served} served");
    let tier = told["probes"]["tier"].as_str().unwrap();
    if !matches!(tier, "fentry" | "kprobe") {
        let by_kernel = number("/probes/stalls/served_by_kernel/count");
        assert!(by_kernel > count, "{by_kernel} by the kernel, {count} stalls");
    }
}

#[test]
fn the_report_tells_whole_stalls_beside_the_handlers_part() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut source = Qemu::builder().vcpus(2).start().unwrap();
    source.wait_ready(BOOT).unwrap();

    let told = livesnap::snapshot(&source, &dir.path().join("with"), &[]).unwrap();
    let number = |pointer: &str| told.pointer(pointer).unwrap().as_u64().unwrap();
    let (count, served) = (number("/probes/stalls/copy/count"), number("/report/faults"));
    assert!(is_about(count, served), "{count} stalls, {served} served");
    assert!(number("/probes/stalls/copy/p50_ns") > number("/report/service/p50_ns"), "{told:#}");
    let (count, served) = (number("/probes/stalls/arming/count"), number("/report/arming_faults"));
    assert!(is_about(count, served), "arming: {count} stalls, {served} served");

    let written = number("/disk/ours/write/bytes");
    assert!(written >= number("/report/stored_bytes"), "{told:#}");
    assert!(number("/disk/depth/ours_max") > 1, "{told:#}");
    assert_eq!(told["scheduling"]["vcpus"].as_array().unwrap().len(), 2, "{told:#}");
    assert!(number("/scheduling/vcpus/0/run_ns") > 0, "{told:#}");
    assert!(number("/scheduling/fault_threads/0/slices") > 0, "{told:#}");

    let vcpus: Vec<_> =
        told["scheduling"]["vcpus"].as_array().unwrap().iter().map(|vcpu| &vcpu["tid"]).collect();
    let touches = told["report"]["first_touches"].as_array().unwrap();
    let by_vcpus = touches.iter().filter(|touch| vcpus.contains(&&touch["thread"]));
    let faults: u64 = by_vcpus.map(|touch| touch["faults"].as_u64().unwrap()).sum();
    assert!(faults > served / 2, "the guest's workers run on its virtual CPUs: {told:#}");

    let told =
        livesnap::snapshot(&source, &dir.path().join("without"), &["--probes", "none"]).unwrap();
    assert!(told["probes"].is_null() && told["disk"].is_null(), "{told:#}");

    let mut watch =
        livesnap::command(["watch", "--json", "--count=1", "--interval=200ms"]).unwrap();
    watch.arg("--qmp").arg(source.qmp_socket()).arg("--out").arg(dir.path());
    let told = livesnap::json(&watch.output().unwrap()).unwrap();
    assert_eq!(told["vcpus"].as_array().unwrap().len(), 2, "{told:#}");
    assert!(told["vcpus"][0]["run_ns"].as_u64().unwrap() > 0, "{told:#}");
    assert!(told["page_faults"].is_u64() && told["disk"]["foreign"].is_object(), "{told:#}");
}
