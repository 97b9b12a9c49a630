//! What the disk probe costs a request: `cargo xtask bench --probes`.
//!
//! Rounds of small requests to a loop device in memory, which is faster than any disk, without and with the probe in
//! turn, so that whatever else happens on the machine meets both. Told are the medians of the rounds.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement that fails shall stop")]

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../tests/fio/mod.rs"]
mod fio;

use fio::{Backing, Fio, Loop};
use livesnap_ebpf::disk::{DiskProbe, Tier};

const ROUNDS: usize = 21;
const SECONDS: u64 = 1;

fn main() {
    let device = Loop::new(Backing::PageCache);
    let mut rows: Vec<(Option<Tier>, Vec<u64>)> = vec![(None, Vec::new())];
    rows.extend(Tier::ALL.map(|tier| (Some(tier), Vec::new())));
    for _ in 0..ROUNDS {
        for (tier, rounds) in &mut rows {
            rounds.extend(round(&device, *tier));
        }
    }
    let base = median(&mut rows[0].1.clone()).unwrap();
    for (tier, mut rounds) in rows {
        let name = tier.map_or("without", Tier::as_str);
        match median(&mut rounds) {
            Some(rate) => println!(
                "disk  {name:<11} {rate:>7} requests/s, {:>5}.{} %",
                rate * 100 / base,
                rate * 1000 / base % 10
            ),
            None => println!("disk  {name:<11} is refused here"),
        }
    }
}

/// Requests per second; nothing if the tier is refused.
fn round(device: &Loop, tier: Option<Tier>) -> Option<u64> {
    let runtime = format!("--runtime={SECONDS}");
    let mut fio = Fio::new(
        device,
        &["--rw=randread", "--bs=4k", "--size=64m", "--time_based", &runtime, "--ioengine=psync"],
    );
    let attach = |tier| DiskProbe::attach_tier(device.path(), fio.pid(), tier);
    let probe = tier.map(attach).transpose().ok()?;
    fio.start();
    let (read, _) = fio.finish();
    drop(probe);
    Some(read.requests / SECONDS)
}

fn median(values: &mut [u64]) -> Option<u64> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}
