//! How much CPU time a virtual CPU would use if nothing held it back: neither a quota nor a full copy buffer.
//!
//! A share is of that, not of a whole CPU: on a host that is short of CPUs, or for a guest that is idle half of the time, a
//! quota of 60 % of a CPU takes nothing away at all.
//!
//! What a virtual CPU uses while nothing holds it back is seen. While something does, it is taken to be what was seen last; but a
//! guest may have come to life meanwhile. So the estimate then approaches what the virtual CPU uses of the time in which it
//! is left alone, which is the most that it can be: others get the CPU only while it does not run.

use std::time::Duration;

/// Of so many observations, half a second at twenty a second, the largest counts: work comes in bursts.
const REMEMBERED: usize = 10;
/// From this part of the time on, it counts as held back.
const HELD_RATIO: f64 = 0.05;
/// Time constant with which the estimate approaches the most that it can be, in seconds.
const GROWTH_S: f64 = 1.0;

/// The demand of one virtual CPU, as a share of one CPU.
#[derive(Debug)]
pub struct Demand {
    /// What it used while nothing held it back; 0 where there is no observation yet.
    recent: [f64; REMEMBERED],
    oldest: usize,
    estimate: f64,
}

impl Default for Demand {
    /// All of a CPU, as long as nothing is known.
    fn default() -> Self {
        Self { recent: [0.0; REMEMBERED], oldest: 0, estimate: 1.0 }
    }
}

impl Demand {
    /// Notes what became of `elapsed`, for `held` of which it was held back; returns the demand in it, as time.
    pub fn observe(&mut self, elapsed: Duration, ran: Duration, held: Duration) -> Duration {
        let (elapsed_s, ran_s) = (elapsed.as_secs_f64(), ran.as_secs_f64());
        if elapsed.is_zero() {
            return Duration::ZERO;
        }
        let used = (ran_s / elapsed_s).min(1.0);
        if held.as_secs_f64() < HELD_RATIO * elapsed_s {
            self.recent[self.oldest] = used;
            self.oldest = (self.oldest + 1) % REMEMBERED;
            self.estimate = self.recent.iter().copied().fold(0.0, f64::max);
            return ran.min(elapsed);
        }
        let left_alone_s = elapsed.saturating_sub(held).as_secs_f64();
        let most = if ran_s < left_alone_s { ran_s / left_alone_s } else { 1.0 };
        let gain = elapsed_s / (GROWTH_S + elapsed_s);
        self.estimate = (self.estimate + gain * (most - self.estimate).max(0.0)).max(used);
        elapsed.mul_f64(self.estimate)
    }

    /// The estimate.
    pub const fn estimate(&self) -> f64 {
        self.estimate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(50);

    fn is_near(demand: &Demand, share: f64) -> bool {
        (demand.estimate() - share).abs() < 1e-9
    }

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// After a tick in which nothing held it back.
    fn accustomed(ran: Duration) -> Demand {
        let mut demand = Demand::default();
        assert!(is_near(&demand, 1.0), "nothing is known");
        assert_eq!(demand.observe(TICK, ran, ms(0)), ran.min(TICK));
        demand
    }

    #[test]
    fn what_is_used_while_nothing_is_withheld_is_the_demand() {
        assert!(is_near(&accustomed(ms(20)), 0.4));
        assert!(is_near(&accustomed(ms(60)), 1.0), "the kernel accounts in ticks");
        let mut burst = accustomed(ms(5));
        burst.observe(TICK, ms(25), ms(0));
        burst.observe(TICK, ms(5), ms(0));
        assert!(is_near(&burst, 0.5));
        for _ in 0..REMEMBERED {
            burst.observe(TICK, ms(5), ms(0));
        }
        assert!(is_near(&burst, 0.1));
    }

    #[test]
    fn time_withheld_is_no_time_in_which_nothing_was_wanted() {
        let mut busy = accustomed(ms(50));
        assert_eq!(busy.observe(TICK, ms(15), ms(35)), TICK, "its quota alone holds it back");
        let mut crowded = accustomed(ms(20));
        let wanted = crowded.observe(TICK, ms(10), ms(25));
        assert_eq!(wanted, ms(20), "others have the CPU in the rest of the time");
    }

    #[test]
    fn who_comes_to_life_is_believed_after_a_while() {
        let mut demand = accustomed(ms(1));
        let ticks = (1..).find(|_| {
            demand.observe(TICK, ms(5), ms(45));
            demand.estimate() > 0.6
        });
        assert!(matches!(ticks, Some(10..=30)), "{ticks:?}");
        assert_eq!(Demand::default().observe(ms(0), ms(0), ms(0)), ms(0));
    }
}
