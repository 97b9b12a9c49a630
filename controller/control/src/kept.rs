//! What writers really keep of their CPU time: in any second, as the limit counts, and of what was commanded.
//!
//! A nearly full buffer slows writers down as well as a throttle does. What it takes has to be part of what may be
//! taken from them, or both together would take more than the operator allows.

use alloc::collections::VecDeque;

use crate::policy::WINDOW_S;

/// Most ticks of a window: of 4 ms, shorter than any that is used.
const TICKS_MAX: usize = 256;
/// Time constant of the share that is passed on, in seconds: some ticks.
const PASSED_S: f64 = 0.15;
/// Least share that is taken to be passed on: whoever waits for room is not helped by CPU time.
const PASSED_RATIO_MIN: f64 = 0.05;
/// What sums of ticks may be off by, in seconds.
const ROUNDING_S: f64 = 1e-6;

/// What writers kept of late.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    /// Ticks of the last second: length in seconds, and the share that was kept.
    ticks: VecDeque<(f64, f64)>,
    passed_ratio: f64,
}

impl Kept {
    /// Nothing was seen; the only place that allocates.
    pub fn new() -> Self {
        Self { ticks: VecDeque::with_capacity(TICKS_MAX), passed_ratio: 1.0 }
    }

    /// A tick in which writers kept this share, while another was in force.
    pub fn see(&mut self, elapsed_s: f64, kept_ratio: f64, in_force_ratio: f64) {
        let passed = (kept_ratio / in_force_ratio).clamp(PASSED_RATIO_MIN, 1.0);
        self.passed_ratio += elapsed_s / (PASSED_S + elapsed_s) * (passed - self.passed_ratio);
        if self.ticks.len() == TICKS_MAX {
            self.ticks.pop_front();
        }
        self.ticks.push_back((elapsed_s, kept_ratio));
        let mut length_s = self.length_s();
        while let Some((first_s, _)) = self.ticks.front()
            && length_s - first_s >= WINDOW_S - ROUNDING_S
        {
            length_s -= first_s;
            self.ticks.pop_front();
        }
    }

    fn length_s(&self) -> f64 {
        self.ticks.iter().map(|(tick_s, _)| tick_s).sum()
    }

    /// The mean over the last second; nothing until a second was seen.
    pub fn in_window(&self) -> Option<f64> {
        let length_s = self.length_s();
        let kept_s: f64 = self.ticks.iter().map(|(tick_s, kept)| tick_s * kept).sum();
        (length_s >= WINDOW_S - ROUNDING_S).then(|| kept_s / length_s)
    }

    /// The share to command so that writers keep `kept_ratio`, as far as a throttle has a say in it.
    pub fn to_command(&self, kept_ratio: f64) -> f64 {
        (kept_ratio / self.passed_ratio).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(ticks: &[(u32, f64)]) -> Kept {
        let mut kept = Kept::new();
        for (count, ratio) in ticks {
            (0..*count).for_each(|_| kept.see(0.05, *ratio, 0.5));
        }
        kept
    }

    #[test]
    fn the_window_is_the_last_second_and_no_more() {
        assert_eq!(after(&[(19, 0.5)]).in_window(), None);
        for (ticks, mean) in [([(20, 0.5), (0, 0.0)], 0.5), ([(90, 0.5), (10, 0.1)], 0.3)] {
            let seen = after(&ticks).in_window().unwrap_or(f64::NAN);
            assert!((seen - mean).abs() < 1e-9, "{ticks:?}: {seen}");
        }
        assert!(after(&[(40, 0.5), (20, 0.0)]).in_window().is_some_and(|mean| mean < 1e-9));
    }

    #[test]
    fn what_a_full_buffer_takes_is_made_good_by_the_throttle() {
        assert!((after(&[(40, 0.5)]).to_command(0.3) - 0.3).abs() < 1e-9);
        assert!((after(&[(40, 0.25)]).to_command(0.3) - 0.6).abs() < 0.01);
        assert!((after(&[(40, 0.0)]).to_command(0.3) - 1.0).abs() < 1e-9);
        assert!((after(&[(40, 0.0)]).to_command(0.02) - 0.4).abs() < 0.01, "room first");
    }

    #[test]
    fn ticks_of_any_length_stay_within_what_was_allocated() {
        let mut kept = Kept::new();
        (0..10_000).for_each(|_| kept.see(1e-4, 0.5, 1.0));
        assert_eq!(kept.ticks.len(), TICKS_MAX);
        assert_eq!(kept.ticks.capacity(), Kept::new().ticks.capacity());
    }
}
