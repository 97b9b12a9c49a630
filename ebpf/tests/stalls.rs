//! The stalls that the probes see are those that the faulting thread itself sees, by its own clock.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod faults;
mod privilege;

use faults::{Memory, Timed};
use livesnap_ebpf::{Histogram, Options, Probes, Reading};
use privilege::is_root;

/// Rounded up to a whole number of rounds over the memory.
const FAULTS: usize = 300_000;
/// What the probes may be off: they see neither the processor's way into the exception nor the way back from it.
const TOLERANCE_NS: u64 = 2_000;

/// Within 2 us, or 10 % if that is more.
fn is_close(seen_ns: u64, own_ns: u64) -> bool {
    seen_ns.abs_diff(own_ns) <= TOLERANCE_NS.max(own_ns / 10)
}

fn compare(seen: &Histogram, own: &Timed) -> Result<(), String> {
    let figures = [
        ("mean", seen.mean_ns(), own.mean_ns()),
        ("p50", seen.quantile_ns(500), own.quantile_ns(500)),
        ("p99", seen.quantile_ns(990), own.quantile_ns(990)),
    ];
    eprintln!("seen {:?}, by the thread's own clock {figures:?}", seen.summary());
    if seen.count != own.sorted_ns.len() as u64 {
        return Err(format!("{} of {} faults were counted", seen.count, own.sorted_ns.len()));
    }
    match figures.iter().find(|(_, seen, own)| !is_close(*seen, *own)) {
        Some((name, seen, own)) => Err(format!("{name} is {own} ns, and {seen} ns were seen")),
        None => Ok(()),
    }
}

fn measure(writer: usize, handler: usize) {
    if !is_root("measuring stalls") {
        return;
    }
    let memory = Memory::new().unwrap();
    let options = Options::default();
    let probes = Probes::attach(std::process::id(), &[memory.range()], &options).unwrap();
    let own = memory.fault(FAULTS, writer, handler);
    let Reading { stalls } = probes.read().unwrap();
    assert_eq!(stalls.lost.map_full, 0);
    assert_eq!(stalls.lost.start_without_end, 0);
    compare(&stalls.sum(|thread| thread.tid == own.tid), &own).unwrap();
    assert_eq!(stalls.total().count, own.sorted_ns.len() as u64, "nobody else had any");
}

#[test]
fn stalls_on_one_cpu_are_those_of_the_threads_own_clock() {
    measure(0, 0);
}

#[test]
fn stalls_across_cpus_are_those_of_the_threads_own_clock() {
    measure(0, 1);
}

#[test]
fn faults_elsewhere_and_of_others_do_not_count() {
    if !is_root("measuring stalls") {
        return;
    }
    let (memory, elsewhere) = (Memory::new().unwrap(), Memory::new().unwrap());
    let options = Options::default();
    let probes = Probes::attach(std::process::id(), &[elsewhere.range()], &options).unwrap();
    let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get().unsigned_abs();
    let of_another = Probes::attach(parent, &[memory.range()], &options).unwrap();
    memory.fault(1, 0, 0);
    assert_eq!(probes.read().unwrap().stalls.total().count, 0);
    assert_eq!(of_another.read().unwrap().stalls.total().count, 0);
}

#[test]
fn faults_after_the_mark_are_counted_apart() {
    if !is_root("measuring stalls") {
        return;
    }
    let memory = Memory::new().unwrap();
    let options = Options::default();
    let mut probes = Probes::attach(std::process::id(), &[memory.range()], &options).unwrap();
    let before = memory.fault(1, 0, 0).sorted_ns.len() as u64;
    probes.mark().unwrap();
    let after = memory.fault(3000, 0, 0).sorted_ns.len() as u64;
    let Reading { stalls } = probes.read().unwrap();
    assert_eq!((stalls.before().count, stalls.after().count), (before, after));
}
