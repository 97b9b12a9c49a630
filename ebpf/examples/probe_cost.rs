//! What the probes cost a fault: `cargo xtask bench --probes`.
//!
//! Rounds of faults without probes and with each tier that this kernel has, in turn, so that whatever else happens on
//! the machine meets all of them. Told are the medians of the rounds; what a tier adds is the median of its differences
//! to the round without probes just before.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement that fails shall stop")]

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../tests/faults/mod.rs"]
mod faults;

use std::time::Instant;

use faults::Memory;
use livesnap_ebpf::{Options, Probes, Tier};

const ROUNDS: usize = 21;
const FAULTS: usize = 10_000;

/// A round: median of a fault in nanoseconds, and faults per second.
type Round = (u64, u64);

fn main() {
    for (place, handler) in [("one CPU", 0), ("two CPUs", 1)] {
        let mut rows: Vec<(Option<Tier>, Vec<Round>)> = vec![(None, Vec::new())];
        rows.extend(Tier::ALL.map(|tier| (Some(tier), Vec::new())));
        for _ in 0..ROUNDS {
            for (tier, rounds) in &mut rows {
                rounds.extend(round(*tier, handler));
            }
        }
        let without: Vec<u64> = rows[0].1.iter().map(|round| round.0).collect();
        for (tier, rounds) in &rows {
            let name = tier.map_or("without", Tier::as_str);
            let p50 = median(rounds.iter().map(|round| round.0));
            let rate = median(rounds.iter().map(|round| round.1));
            let pairs = rounds.iter().zip(&without);
            let more =
                median(pairs.map(|(round, without)| round.0.cast_signed() - without.cast_signed()));
            match (p50, more, rate) {
                (Some(p50), Some(more), Some(rate)) => println!(
                    "{place}  {name:<11} p50 {p50:>6} ns ({more:+} ns)  {rate:>7} faults/s"
                ),
                _ => println!("{place}  {name:<11} is refused here"),
            }
        }
    }
}

/// Nothing if the tier is refused.
fn round(tier: Option<Tier>, handler: usize) -> Option<Round> {
    let memory = Memory::new().unwrap();
    let options = Options { tier, ..Options::default() };
    let attach = || Probes::attach(std::process::id(), &[memory.range()], &options);
    let probes = tier.map(|_| attach()).transpose().ok()?;
    let began = Instant::now();
    let timed = memory.fault(FAULTS, 0, handler);
    let micros = began.elapsed().as_micros().max(1);
    drop(probes);
    let rate = timed.sorted_ns.len() as u128 * 1_000_000 / micros;
    Some((timed.quantile_ns(500), u64::try_from(rate).unwrap()))
}

fn median<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut values: Vec<T> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}
