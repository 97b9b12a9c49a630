//! The requests that the disk probe sees are those that fio says it had.
//!
//! The kernel does not run a program on a CPU where the same program is interrupted (for classic tracepoints: any
//! program), so on a busy machine one request in some ten thousand is missed, and under emulation, where a program takes
//! long, some in a thousand; the probe tells how many. And what holds fio back after a request is in fio's figures
//! alone. So each test may be repeated until little of that happened; that nothing is missed unseen must hold each time.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[allow(dead_code, reason = "the measure of the cost uses all of it")]
mod fio;
mod privilege;

use std::sync::{Mutex, PoisonError};

use fio::{Backing, Fio, Loop, Told};
use livesnap_ebpf::disk::{DiskProbe, DiskReading, Irregular, Issuer, Operation, Requests, Tier};
use privilege::is_root;

const ATTEMPTS: usize = 8;
/// How many of a hundred requests may be missed.
const MISSED_PER_CENT: u64 = 1;
/// What fio's figures may differ.
const TOLERANCE_NS: f64 = 2_000.0;
const TOLERANCE: f64 = 0.1;

/// Runs `attempt` with each tier that the kernel has until it succeeds, while no other test does.
fn repeat(attempt: impl Fn(Tier) -> Result<(), String>) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    if !is_root("seeing requests on disks") {
        return;
    }
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for tier in Tier::ALL.into_iter().filter(|tier| is_had(*tier)) {
        let problems: Vec<String> = (0..ATTEMPTS).map_while(|_| attempt(tier).err()).collect();
        assert!(problems.len() < ATTEMPTS, "{tier}: {problems:#?}");
    }
}

/// Whether the kernel has this tier; says so if not.
fn is_had(tier: Tier) -> bool {
    let device = Loop::new(Backing::PageCache);
    let attached = DiskProbe::attach_tier(device.path(), std::process::id(), tier);
    if let Err(error) = &attached {
        assert_ne!(std::env::var("REQUIRE_TIERS").as_deref(), Ok("1"), "{error}");
        eprintln!("SKIPPED: {error}");
    }
    attached.is_ok()
}

fn of(reading: &DiskReading, operation: Operation, issuer: Issuer) -> &Requests {
    reading.of(operation, issuer).unwrap()
}

/// Number and bytes are the same; if not, then by no more requests than the probe tells that it has missed, which are few.
/// Returns how many.
fn compare(reading: &DiskReading, pairs: &[(&Requests, &Told)]) -> Result<u64, String> {
    let irregular = reading.irregular;
    let missed =
        irregular.issue_without_completion + irregular.completion_without_issue + reading.depth.now;
    let mut lacking = 0;
    for (seen, told) in pairs {
        eprintln!("seen {:?}, {} bytes; fio tells {told:?}", seen.latency.summary(), seen.bytes);
        assert!(seen.latency.count <= told.requests, "none is counted twice, and none too many");
        assert_eq!(seen.bytes * told.requests, told.bytes * seen.latency.count);
        lacking += told.requests - seen.latency.count;
    }
    assert!(lacking <= missed, "{lacking} are not counted: {reading:?}");
    assert!(reading.depth.ours_now <= missed, "{reading:?}");
    let others =
        Irregular { issue_without_completion: 0, completion_without_issue: 0, ..irregular };
    let all: u64 = pairs.iter().map(|(_, told)| told.requests).sum();
    if others == Irregular::default() && missed * 100 <= all * MISSED_PER_CENT {
        Ok(missed)
    } else {
        Err(format!("{missed} of {all} were missed: {irregular:?}"))
    }
}

#[test]
fn number_bytes_and_latency_are_those_that_fio_tells() {
    repeat(|tier| {
        // What fio needs to wake up is in its figures alone, and is the same for requests of any size.
        let (small, large) = (latencies(tier, "64k")?, latencies(tier, "512k")?);
        for (small, large) in small.into_iter().zip(large) {
            let (seen, told) = (large.0 - small.0, large.1 - small.1);
            if (seen - told).abs() > TOLERANCE_NS.max(large.1 * TOLERANCE) {
                return Err(format!("{seen} ns more for large ones, {told} ns by fio: {large:?}"));
            }
        }
        Ok(())
    });
}

/// Of reads and writes of `size` each, one at a time, the mean latency that is seen and that which fio tells, in
/// nanoseconds; number and bytes are the same.
fn latencies(tier: Tier, size: &str) -> Result<[(f64, f64); 2], String> {
    let device = Loop::new(Backing::Disk);
    let size = format!("--bs={size}");
    let mut fio = Fio::new(&device, &["--rw=randrw", &size, "--size=64m", "--ioengine=libaio"]);
    let probe = DiskProbe::attach_tier(device.path(), fio.pid(), tier).unwrap();
    fio.start();
    let (read, written) = fio.finish();
    let reading = probe.read().unwrap();
    let seen =
        [Operation::Read, Operation::Write].map(|operation| of(&reading, operation, Issuer::Ours));
    let missed = compare(&reading, &[(seen[0], &read), (seen[1], &written)])?;
    // One that was missed is taken to be still under way.
    assert!((1..=1 + missed).contains(&reading.depth.ours_max), "{:?}", reading.depth);
    Ok([
        (seen[0].latency.mean_ns() as f64, read.clat_ns),
        (seen[1].latency.mean_ns() as f64, written.clat_ns),
    ])
}

#[test]
fn the_depth_of_the_queue_is_that_which_fio_keeps() {
    const DEPTH: u64 = 8;
    repeat(|tier| {
        let device = Loop::new(Backing::Disk);
        let mut fio = Fio::new(
            &device,
            &["--rw=randread", "--bs=64k", "--size=64m", "--ioengine=libaio", "--iodepth=8"],
        );
        let probe = DiskProbe::attach_tier(device.path(), fio.pid(), tier).unwrap();
        fio.start();
        let (told, _) = fio.finish();
        let reading = probe.read().unwrap();
        let missed = compare(&reading, &[(of(&reading, Operation::Read, Issuer::Ours), &told)])?;
        let depth = reading.depth;
        assert!((2..=DEPTH + missed).contains(&depth.ours_max), "{depth:?}");
        // fio needs time to start and to end, in which there are none.
        let mean = reading.mean_depth(Some(Issuer::Ours));
        assert!(0.0 < mean && mean <= depth.ours_max as f64, "{mean}, {depth:?}");
        Ok(())
    });
}

#[test]
fn our_requests_are_told_from_those_of_others() {
    repeat(|tier| {
        let (device, elsewhere) = (Loop::new(Backing::Disk), Loop::new(Backing::Disk));
        let mut ours = Fio::new(&device, &["--rw=randwrite", "--bs=8k", "--size=32m"]);
        let mut other =
            Fio::new(&device, &["--rw=randwrite", "--bs=16k", "--size=31m", "--offset=33m"]);
        let probe = DiskProbe::attach_tier(device.path(), ours.pid(), tier).unwrap();
        let of_another_disk = DiskProbe::attach_tier(elsewhere.path(), ours.pid(), tier).unwrap();
        ours.start();
        other.start();
        let (_, told) = ours.finish();
        let (_, told_by_other) = other.finish();

        let nothing = of_another_disk.read().unwrap();
        for issuer in [Issuer::Ours, Issuer::Foreign] {
            assert_eq!(of(&nothing, Operation::Write, issuer).latency.count, 0, "{nothing:?}");
        }
        let reading = probe.read().unwrap();
        let seen =
            [Issuer::Ours, Issuer::Foreign].map(|issuer| of(&reading, Operation::Write, issuer));
        let missed = compare(&reading, &[(seen[0], &told), (seen[1], &told_by_other)])?;
        assert!((1..=2 + missed).contains(&reading.depth.max), "{:?}", reading.depth);
        Ok(())
    });
}
