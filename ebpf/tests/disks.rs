//! The requests that the disk probe sees are those that fio says it had.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[allow(dead_code, reason = "the measure of the cost uses all of it")]
mod fio;
mod privilege;

use fio::{Backing, Fio, Loop, Told};
use livesnap_ebpf::disk::{DiskProbe, DiskReading, Irregular, Issuer, Operation, Requests};
use privilege::is_root;

/// What fio's figure may differ: its own wake-up is in it.
const TOLERANCE_NS: f64 = 2_000.0;
const TOLERANCE: f64 = 0.1;

fn of(reading: &DiskReading, operation: Operation, issuer: Issuer) -> &Requests {
    reading.of(operation, issuer).unwrap()
}

fn assert_same(seen: &Requests, told: &Told) {
    eprintln!("seen {:?}, {} bytes; fio tells {told:?}", seen.latency.summary(), seen.bytes);
    assert_eq!((seen.latency.count, seen.bytes), (told.requests, told.bytes));
}

#[test]
fn number_bytes_and_latency_are_those_that_fio_tells() {
    if !is_root("seeing requests on disks") {
        return;
    }
    let device = Loop::new(Backing::Disk);
    // Large ones, beside which the wake-up is small.
    let one_at_a_time = ["--rw=randrw", "--bs=256k", "--size=64m", "--ioengine=libaio"];
    let mut fio = Fio::new(&device, &one_at_a_time);
    let probe = DiskProbe::attach(device.path(), fio.pid()).unwrap();
    fio.start();
    let (read, written) = fio.finish();
    let reading = probe.read().unwrap();
    for (operation, told) in [(Operation::Read, read), (Operation::Write, written)] {
        let seen = of(&reading, operation, Issuer::Ours);
        assert_same(seen, &told);
        let difference = (seen.latency.mean_ns() as f64 - told.clat_ns).abs();
        assert!(difference <= TOLERANCE_NS.max(told.clat_ns * TOLERANCE), "{difference} ns");
    }
    assert_eq!(reading.irregular, Irregular::default());
    assert_eq!((reading.depth.ours_max, reading.depth.now), (1, 0));
}

#[test]
fn the_depth_of_the_queue_is_that_which_fio_keeps() {
    const DEPTH: u64 = 8;
    if !is_root("seeing requests on disks") {
        return;
    }
    let device = Loop::new(Backing::Disk);
    let mut fio = Fio::new(
        &device,
        &["--rw=randread", "--bs=64k", "--size=64m", "--ioengine=libaio", "--iodepth=8"],
    );
    let probe = DiskProbe::attach(device.path(), fio.pid()).unwrap();
    fio.start();
    let (told, _) = fio.finish();
    let reading = probe.read().unwrap();
    assert_same(of(&reading, Operation::Read, Issuer::Ours), &told);
    let mean = reading.mean_depth(Some(Issuer::Ours));
    assert!((2..=DEPTH).contains(&reading.depth.ours_max), "{:?}", reading.depth);
    assert_eq!((reading.depth.now, reading.depth.ours_now), (0, 0));
    // fio needs time to start and to end, in which there are none.
    assert!(0.0 < mean && mean <= 8.0, "{mean}");
}

#[test]
fn our_requests_are_told_from_those_of_others() {
    if !is_root("seeing requests on disks") {
        return;
    }
    let (device, elsewhere) = (Loop::new(Backing::Disk), Loop::new(Backing::Disk));
    let mut ours = Fio::new(&device, &["--rw=randwrite", "--bs=8k", "--size=32m"]);
    let mut other =
        Fio::new(&device, &["--rw=randwrite", "--bs=16k", "--size=32m", "--offset=32m"]);
    let probe = DiskProbe::attach(device.path(), ours.pid()).unwrap();
    let of_another_disk = DiskProbe::attach(elsewhere.path(), ours.pid()).unwrap();
    ours.start();
    other.start();
    let (_, told) = ours.finish();
    let (_, told_by_other) = other.finish();
    let reading = probe.read().unwrap();
    assert_same(of(&reading, Operation::Write, Issuer::Ours), &told);
    assert_same(of(&reading, Operation::Write, Issuer::Foreign), &told_by_other);
    assert!((1..=2).contains(&reading.depth.max), "{:?}", reading.depth);

    let nothing = of_another_disk.read().unwrap();
    assert!(
        nothing
            .requests
            .iter()
            .all(|requests| requests.issuer == Issuer::Foreign || requests.latency.count == 0),
        "{nothing:?}"
    );
    assert_eq!(of(&nothing, Operation::Write, Issuer::Foreign).latency.count, 0);
}
