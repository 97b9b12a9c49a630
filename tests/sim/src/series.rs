//! A series of seeds, on all processors.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Result, anyhow};

use crate::judge::{Judged, Variant, judge};

/// Judges `count` scenarios from seed `first` on, in the order of seeds.
///
/// # Errors
/// When a scenario's policy makes no sense.
pub fn judge_all(first: u64, count: u64, variant: Variant) -> Result<Vec<Judged>> {
    let next = AtomicU64::new(first);
    let end = first.saturating_add(count);
    let work = || -> Result<Vec<Judged>> {
        let mut judged = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return Ok(judged);
            }
            judged.push(judge(seed, variant)?);
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut judged = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| anyhow!("a worker panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?
    .concat();
    judged.sort_by_key(|case| case.scenario.seed);
    Ok(judged)
}
