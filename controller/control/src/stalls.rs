//! Whether faults stall for longer than the limit: more than one in a hundred, and more than chance brings about.
//!
//! A guest that hardly writes has a few faults in a second. One of them that finds the host busy is more than one in a
//! hundred, but says nothing of the next hundred, and taking CPU time from such a guest helps nobody.

use crate::number;
use crate::sample::Stall;

/// For about so long a fault counts, in seconds.
const MEMORY_S: f64 = 0.25;
/// Share of faults over the limit that breaks it: the 99th percentile.
const OVER_LIMIT_RATIO: f64 = 0.01;
/// Less than so many are chance, however few faults there were; between 1 and 2, as their weight fades.
const OVER_LIMIT_MIN: f64 = 1.5;
/// So many standard deviations above the expected number are not. Rare events are Poisson distributed: their variance is
/// their expected number.
const DEVIATIONS: f64 = 3.0;

/// What was seen of late.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stalls {
    faults: f64,
    over_limit: f64,
}

impl Stalls {
    /// A tick with these faults, if that was measured.
    pub fn see(&mut self, stall: Option<Stall>, elapsed_s: f64) {
        let stall = stall.unwrap_or_default();
        let kept = MEMORY_S / (MEMORY_S + elapsed_s);
        self.faults = self.faults * kept + number(stall.faults);
        self.over_limit = self.over_limit * kept + number(stall.over_limit);
    }

    /// Whether the limit is broken.
    pub fn are_over(&self) -> bool {
        let expected = OVER_LIMIT_RATIO * self.faults;
        let beyond = self.over_limit - expected;
        self.over_limit >= OVER_LIMIT_MIN
            && beyond > 0.0
            && beyond * beyond > DEVIATIONS * DEVIATIONS * expected
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(ticks: &[(u64, u64)]) -> bool {
        let mut stalls = Stalls::default();
        for &(faults, over_limit) in ticks {
            stalls.see(Some(Stall { faults, over_limit, lost_events: 0 }), 0.05);
        }
        stalls.are_over()
    }

    #[test]
    fn many_slow_faults_are_no_chance() {
        assert!(after(&[(1000, 50)]));
        assert!(after(&[(3, 1), (2, 1), (3, 2)]), "a few that all but stand still");
        assert!(!after(&[(1000, 9)]), "within the limit");
        assert!(!after(&[(1000, 15)]), "may be chance");
    }

    #[test]
    fn one_slow_fault_of_a_few_is_chance() {
        assert!(!after(&[(1, 1)]));
        assert!(!after(&[(5, 1), (0, 0), (4, 0), (0, 0), (0, 0), (0, 0), (3, 1)]));
        assert!(!after(&[(1000, 50), (1000, 0), (1000, 0), (1000, 0), (1000, 0)]), "it is over");
    }
}
