//! What `livesnap watch` costs a guest that writes as fast as it can: `cargo xtask bench --probes`.
//!
//! The guest counts the pages that it writes. Set against the time that QEMU's threads had a CPU, which other work on the
//! machine takes little from, without and with `watch` in turn; told is the median of the ratios of such pairs. Time in
//! which a thread waited for `watch`, as it does once a window for each huge page of the sample, is not in it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement that fails shall stop")]

use std::time::Duration;

use livesnap_tests::console::Heartbeat;
use livesnap_tests::livesnap::{self, Running};
use livesnap_tests::poll_until;
use livesnap_tests::qemu::{Load, Qemu, Ram};
use rustix::process::Signal;

const BOOT: Duration = Duration::from_secs(120);
const PAIRS: usize = 11;
/// By the guest's clock.
const ROUND_MS: u64 = 2_000;

fn main() {
    let kinds = [
        ("small pages", Ram::AnonymousSmallPages),
        ("huge pages", Ram::Anonymous),
        ("memfd", Ram::Memfd),
    ];
    for (name, ram) in kinds {
        let load = Load { ring_mib: 128, ..Load::default() };
        let mut guest = Qemu::builder().ram(ram).load(load).start().unwrap();
        guest.wait_ready(BOOT).unwrap();
        let mut ratios = Vec::with_capacity(PAIRS);
        let mut rates = Vec::with_capacity(PAIRS);
        for _ in 0..PAIRS {
            let without = pages_per_cpu_second(&mut guest);
            ratios.push(100.0 * watched(&mut guest) / without);
            rates.push(without);
        }
        for values in [&mut ratios, &mut rates] {
            values.sort_unstable_by(f64::total_cmp);
        }
        println!(
            "watch {name:<12} {:.0} pages for a second of CPU time without, with it {:.1} % \
             (quartiles {:.1} and {:.1} %)",
            rates[PAIRS / 2],
            ratios[PAIRS / 2],
            ratios[PAIRS / 4],
            ratios[PAIRS * 3 / 4]
        );
    }
}

fn watched(guest: &mut Qemu) -> f64 {
    let mut watch = livesnap::command(["watch", "--json"]).unwrap();
    watch.arg("--qmp").arg(guest.qmp_socket());
    let running = Running::start(watch).unwrap();
    let begun = || Ok(guest.has_userfaultfd().unwrap().then_some(()));
    poll_until("memory is watched", BOOT, begun).unwrap();
    let rate = pages_per_cpu_second(guest);
    running.signal(Signal::INT).unwrap();
    assert_eq!(running.wait().unwrap().status.code(), Some(0));
    rate
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn pages_per_cpu_second(guest: &mut Qemu) -> f64 {
    let (before, began_ns) = (newest(guest, 0), cpu_ns(guest));
    let (after, ended_ns) = (newest(guest, before.t_ms + ROUND_MS), cpu_ns(guest));
    assert_eq!(after.inconsistent, 0, "{after:?}");
    let pages = after.workers[0] - before.workers[0];
    pages as f64 * 1e9 / (ended_ns - began_ns) as f64
}

/// The newest heartbeat, just after one has come.
fn newest(guest: &mut Qemu, from_ms: u64) -> Heartbeat {
    let last = guest.wait_heartbeat(BOOT, |_| true).unwrap();
    let from_ms = from_ms.max(last.t_ms + 1);
    guest.wait_heartbeat(BOOT, |beat| beat.t_ms >= from_ms).unwrap()
}

/// CPU time that QEMU's threads have had.
fn cpu_ns(guest: &Qemu) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap();
    let of_task = |task: std::io::Result<std::fs::DirEntry>| {
        // A thread may end meanwhile.
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    };
    tasks.filter_map(of_task).sum()
}
