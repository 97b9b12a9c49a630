//! What virtual CPUs write and keep, and who is to be slowed down: each in proportion to what it writes.
//!
//! A virtual CPU that writes nothing costs the snapshot nothing and keeps all of its time. Of the others, the one that writes
//! twice as much has twice as much taken away: the cut `1 − qᵢ` is `k·rᵢ`, with `k` such that the writes left are
//! the share that was asked for, `Σ rᵢqᵢ = q·Σ rᵢ`. This takes less CPU time in sum than an equal cut, because it is taken
//! where it saves most (Cauchy–Schwarz: `Σ cuts = (1−q)(Σr)²/Σr² ≤ n(1−q)`).

use alloc::vec;
use alloc::vec::Vec;

use crate::{Vcpu, number};

/// Time constant of the rates, in seconds: work moves between virtual CPUs more slowly than it changes.
const RATE_S: f64 = 0.5;
/// Share of its time from which on can be told what a virtual CPU would write if it were left alone.
const SHARE_MIN: f64 = 0.01;

/// What is known of each virtual CPU.
#[derive(Clone, Debug)]
pub(crate) struct Vcpus {
    /// As they were at the last good sample.
    last: Vec<Vcpu>,
    /// First touches of each if it were left alone, in bytes per second.
    rates: Vec<f64>,
    /// The share of its time that each keeps, as of the last command.
    shares: Vec<f64>,
}

impl Vcpus {
    /// Nothing is known of so many; the only place that allocates.
    pub fn new(count: usize) -> Self {
        Self {
            last: vec![Vcpu::default(); count],
            rates: vec![0.0; count],
            shares: vec![1.0; count],
        }
    }

    /// The share of its time that each keeps, as of the last command.
    pub fn shares(&self) -> &[f64] {
        &self.shares
    }

    /// Counts from these on.
    pub fn rebase(&mut self, now: &[Vcpu]) {
        if now.len() == self.last.len() {
            self.last.copy_from_slice(now);
        }
    }

    /// What became of `elapsed_s`: the share of their time that those who write kept, each weighted by what it writes. Nothing if
    /// `now` does not have all of them, as when nobody measures.
    pub fn see(&mut self, now: &[Vcpu], elapsed_s: f64) -> Option<f64> {
        if now.len() != self.last.len() || now.is_empty() {
            self.rates.fill(0.0);
            return None;
        }
        let gain = elapsed_s / (RATE_S + elapsed_s);
        let (mut kept, mut weights) = (0.0, 0.0);
        for (index, rate) in self.rates.iter_mut().enumerate() {
            let (now, last) = (&now[index], &self.last[index]);
            let grown = |of: fn(&Vcpu) -> u64| number(of(now).saturating_sub(of(last)));
            let share = self.shares[index].max(SHARE_MIN);
            *rate += gain * (grown(|vcpu| vcpu.touched_bytes) / elapsed_s / share - *rate);
            let wanted_ns = grown(|vcpu| vcpu.wanted_ns);
            let kept_ns = grown(|vcpu| vcpu.kept_ns).min(wanted_ns);
            kept += *rate * if wanted_ns > 0.0 { kept_ns / wanted_ns } else { 1.0 };
            weights += *rate;
        }
        self.last.copy_from_slice(now);
        // Whoever writes nothing loses nothing.
        Some(if weights > 0.0 { kept / weights } else { 1.0 })
    }

    /// Divides the share `cpu_ratio` of all writes among them; none gets less than `least`.
    pub fn divide(&mut self, cpu_ratio: f64, least: f64) {
        divide(cpu_ratio, least, &self.rates, &mut self.shares);
    }
}

/// Divides a share `cpu_ratio` of all writes among virtual CPUs with these first-touch rates; none gets less than `least`.
///
/// Without rates (all 0) all get the same share.
pub fn divide(cpu_ratio: f64, least: f64, rates: &[f64], shares: &mut [f64]) {
    let all: f64 = rates.iter().sum();
    if !(all > 0.0 && all.is_finite()) || rates.len() != shares.len() {
        shares.fill(cpu_ratio.max(least));
        return;
    }
    // Whoever would fall below the least is held there, and the others have to bring what is missing. Each round
    // holds at least one more, or is the last.
    shares.fill(1.0);
    for _ in 0..=rates.len() {
        let mut to_save = (1.0 - cpu_ratio) * all;
        let mut squares = 0.0;
        for (rate, share) in rates.iter().zip(&*shares) {
            if *share <= least {
                to_save -= (1.0 - least) * rate;
            } else {
                squares += rate * rate;
            }
        }
        if squares <= 0.0 {
            break;
        }
        let cut_per_rate = (to_save / squares).max(0.0);
        let mut newly_held = false;
        for (rate, share) in rates.iter().zip(shares.iter_mut()) {
            if *share > least {
                *share = (1.0 - cut_per_rate * rate).max(least);
                newly_held |= *share <= least;
            }
        }
        if !newly_held {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that wrote so much, wanted 50 ms and kept so much of it.
    const fn vcpu(touched_bytes: u64, kept_ms: u64) -> Vcpu {
        Vcpu { touched_bytes, wanted_ns: 50_000_000, kept_ns: kept_ms * 1_000_000 }
    }

    #[test]
    fn what_counts_is_what_those_keep_who_write() {
        let see = |now: &[Vcpu]| Vcpus::new(2).see(now, 0.05).unwrap_or(f64::NAN);
        assert!((see(&[vcpu(1000, 10), vcpu(0, 50)]) - 0.2).abs() < 1e-9);
        assert!((see(&[vcpu(3000, 10), vcpu(1000, 50)]) - 0.4).abs() < 1e-9);
        assert!((see(&[vcpu(0, 10), vcpu(0, 10)]) - 1.0).abs() < 1e-9, "nobody writes");
        let idle = Vcpu { touched_bytes: 1000, ..Vcpu::default() };
        assert!((see(&[idle, idle]) - 1.0).abs() < 1e-9, "nobody wanted anything");
        let more = see(&[vcpu(1000, 60), vcpu(1000, 25)]);
        assert!((more - 0.75).abs() < 1e-9, "nobody keeps more than he wanted: {more}");
    }

    #[test]
    fn who_is_not_measured_is_cut_like_the_others() {
        let mut vcpus = Vcpus::new(2);
        vcpus.see(&[vcpu(1000, 50), vcpu(0, 50)], 0.05);
        vcpus.divide(0.5, 0.3);
        assert_eq!(vcpus.shares(), [0.5, 1.0]);
        assert_eq!(vcpus.see(&[vcpu(1000, 50)], 0.05), None);
        vcpus.divide(0.5, 0.3);
        assert_eq!(vcpus.shares(), [0.5, 0.5]);
    }

    #[test]
    fn counters_that_go_backwards_are_no_loss() {
        let mut vcpus = Vcpus::new(1);
        vcpus.see(&[vcpu(1000, 50)], 0.05);
        assert_eq!(vcpus.see(&[vcpu(0, 0)], 0.05), Some(1.0));
    }

    fn divided<const N: usize>(cpu_ratio: f64, rates: [f64; N]) -> [f64; N] {
        let mut shares = [0.0; N];
        divide(cpu_ratio, 0.3, &rates, &mut shares);
        shares
    }

    fn writes_left<const N: usize>(rates: [f64; N], shares: [f64; N]) -> f64 {
        let all: f64 = rates.iter().sum();
        rates.iter().zip(shares).map(|(rate, share)| rate * share).sum::<f64>() / all
    }

    #[test]
    fn equal_writers_are_cut_equally_and_idle_ones_not_at_all() {
        assert_eq!(divided(0.5, [10.0, 10.0, 0.0]), [0.5, 0.5, 1.0]);
    }

    #[test]
    fn the_cut_is_in_proportion_and_saves_what_was_asked_for() {
        let rates = [30.0, 10.0, 10.0];
        let shares = divided(0.8, rates);
        assert!(((1.0 - shares[0]) / (1.0 - shares[1]) - 3.0).abs() < 1e-9, "{shares:?}");
        assert!((writes_left(rates, shares) - 0.8).abs() < 1e-9, "{shares:?}");
    }

    #[test]
    fn nobody_falls_below_the_least_and_the_others_make_up_for_it() {
        let rates = [90.0, 30.0, 30.0];
        let shares = divided(0.4, rates);
        assert!((shares[0] - 0.3).abs() < 1e-9, "{shares:?}");
        assert!((writes_left(rates, shares) - 0.4).abs() < 1e-9, "{shares:?}");
        assert_eq!(divided(0.3, rates), [0.3, 0.3, 0.3]);
    }

    #[test]
    fn without_rates_all_are_alike() {
        assert_eq!(divided(0.6, [0.0, 0.0]), [0.6, 0.6]);
        assert_eq!(divided(0.6, [f64::NAN, 1.0]), [0.6, 0.6]);
    }
}
