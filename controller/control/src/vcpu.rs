//! Who is to be slowed down: virtual CPUs in proportion to what each writes.
//!
//! A virtual CPU that writes nothing costs the snapshot nothing and keeps all of its time. Of the others, the one that writes
//! twice as much has twice as much taken away: the cut `1 − qᵢ` is `k·rᵢ`, with `k` such that the writes left are
//! the share that was asked for, `Σ rᵢqᵢ = q·Σ rᵢ`. This takes less CPU time in sum than an equal cut, because it is taken
//! where it saves most (Cauchy–Schwarz: `Σ cuts = (1−q)(Σr)²/Σr² ≤ n(1−q)`).

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
