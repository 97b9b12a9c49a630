//! The model of guest and disk, fitted while they run.
//!
//! **First touches.** A guest that writes at random within a working set of `M` bytes touches a page for the first
//! time at a rate in proportion to what is left of the set: the rate falls *linearly with what was taken*. So the
//! slope of a straight line through (bytes saved, rate) tells how soon the set is exhausted, without knowing its size.
//! This is the depletion method by which stocks of fish are counted (Leslie and Davis 1939, `DeLury` 1947: catch per unit
//! of effort against cumulative catch); effort is here the CPU time of the writers, so that a throttle does not look
//! like a depletion. The line is fitted with exponential forgetting and shrunk by its coefficient of determination: of a
//! decline that may be noise, only the part counts that the line explains.
//!
//! **Regimes.** Three ticks in a row on the same side of what the model says, by far, begin a new regime: what was
//! learnt of the old one is dropped. How long a regime has lasted is the only hint at how long it will last; as nothing is
//! known of its scale, a regime of age `t` lasts for at least another `k·t` with probability `1/(1+k)` (Gott 1993).
//!
//! **Spread.** Mean deviations instead of variances, as TCP keeps for its round trips (RFC 6298): robust, and no root.

/// Time constant of levels, in seconds: some ticks.
const LEVEL_S: f64 = 0.15;
/// Time constant of the drain rate, in seconds: a disk is rougher than a guest.
const DRAIN_S: f64 = 0.4;
/// Time constant within which the best drain rate is forgotten, in seconds: longer than a disk usually pauses.
const DRAIN_BEST_S: f64 = 15.0;
/// Time constant of the straight line, in seconds.
const LINE_S: f64 = 2.0;
/// Points that make a line, by weight.
const LINE_POINTS_MIN: f64 = 3.0;
/// Ticks in a row that tell a new regime.
const SURPRISES: i32 = 3;
/// Mean deviations of a surprise.
const SURPRISE_DEVIATIONS: f64 = 3.0;
/// Share of the expected rate within which nothing is a surprise.
const SURPRISE_RATIO: f64 = 0.25;
/// CPU share below which no rate can be told.
const CPU_RATIO_MIN: f64 = 0.01;

/// A level that moves, with its mean deviation.
#[derive(Clone, Copy, Debug, Default)]
struct Level {
    value: f64,
    deviation: f64,
    known: bool,
}

impl Level {
    fn update(&mut self, value: f64, dt_s: f64, constant_s: f64) {
        if !self.known {
            *self = Self { value, deviation: value / 4.0, known: true };
            return;
        }
        let gain = dt_s / (constant_s + dt_s);
        self.deviation += gain * ((value - self.value).abs() - self.deviation);
        self.value += gain * (value - self.value);
    }
}

/// A straight line through points, the later the weightier (West 1979: weighted means and sums of squares).
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
    yy: f64,
}

impl Line {
    fn add(&mut self, x: f64, y: f64, keep: f64) {
        self.weight = keep * self.weight + 1.0;
        let (dx, dy) = (x - self.x, y - self.y);
        let rest = 1.0 - 1.0 / self.weight;
        self.x += dx / self.weight;
        self.y += dy / self.weight;
        self.xx = keep * self.xx + rest * dx * dx;
        self.xy = keep * self.xy + rest * dx * dy;
        self.yy = keep * self.yy + rest * dy * dy;
    }

    /// How fast `y` falls with `x`, or 0.
    fn fall(&self) -> f64 {
        if self.weight > LINE_POINTS_MIN && self.xx > 0.0 {
            (-self.xy / self.xx).max(0.0)
        } else {
            0.0
        }
    }

    /// Share of the spread of `y` that the line explains (coefficient of determination).
    fn explained(&self) -> f64 {
        let all = self.xx * self.yy;
        if all > 0.0 { (self.xy * self.xy / all).min(1.0) } else { 0.0 }
    }

    fn at(&self, x: f64) -> f64 {
        (self.y - self.fall() * (x - self.x)).max(0.0)
    }
}

/// What one tick tells the model.
#[derive(Clone, Copy, Debug)]
pub struct Observation {
    /// Length of the tick in seconds.
    pub elapsed_s: f64,
    /// Bytes that entered the buffer by faults.
    pub touched_bytes: f64,
    /// Bytes that left the buffer.
    pub drained_bytes: f64,
    /// Bytes of RAM saved so far.
    pub saved_bytes: f64,
    /// Share of their CPU time that the writers kept.
    pub cpu_ratio: f64,
    /// The disk had something to do all the while.
    pub disk_was_busy: bool,
}

/// What is known of guest and disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Model {
    touch: Level,
    drain: Level,
    drain_best: f64,
    line: Line,
    /// Ticks in a row above (positive) or below (negative) what was expected.
    surprises: i32,
    regime_s: f64,
}

/// Rates in bytes per second, with the side of their uncertainty that was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fit {
    /// First-touch rate of a guest that is not throttled.
    pub touch_rate: f64,
    /// Share of that rate by which it falls in a second, as the hot set is exhausted.
    pub depletion_per_s: f64,
    /// Part of the rate that does not fall with the hot set, only with what is unsaved at all.
    pub cold_ratio: f64,
    /// Rate at which the buffer drains.
    pub drain_rate: f64,
}

impl Model {
    /// Learns from one tick.
    pub fn observe(&mut self, seen: &Observation) {
        let dt_s = seen.elapsed_s;
        self.observe_drain(seen.drained_bytes / dt_s, dt_s, seen.disk_was_busy);
        if seen.cpu_ratio < CPU_RATIO_MIN {
            return;
        }
        let rate = seen.touched_bytes / (dt_s * seen.cpu_ratio);
        self.regime_s += dt_s;
        let usual = self.touch.deviation;
        let is_surprise = self.notice_surprise(rate, seen.saved_bytes);
        self.touch.update(rate, dt_s, LEVEL_S);
        if is_surprise {
            // The level follows at once; what is usual does not, or the next surprise would be none.
            self.touch.deviation = usual;
        } else {
            self.line.add(seen.saved_bytes, rate, LINE_S / (LINE_S + dt_s));
        }
    }

    fn observe_drain(&mut self, rate: f64, dt_s: f64, disk_was_busy: bool) {
        // A disk that had nothing to do could have done more.
        if disk_was_busy || rate > self.drain.value {
            self.drain.update(rate, dt_s, DRAIN_S);
        }
        let forgotten = dt_s / (DRAIN_BEST_S + dt_s);
        self.drain_best += forgotten * (self.drain.value - self.drain_best);
        self.drain_best = self.drain_best.max(self.drain.value);
    }

    /// Whether this rate is not what was expected; begins a new regime when that goes on.
    fn notice_surprise(&mut self, rate: f64, saved_bytes: f64) -> bool {
        let is_line = self.line.weight > LINE_POINTS_MIN;
        let expected = if is_line { self.line.at(saved_bytes) } else { self.touch.value };
        let usual = SURPRISE_DEVIATIONS * self.touch.deviation + SURPRISE_RATIO * expected;
        let off = rate - expected;
        self.surprises = if !self.touch.known || off.abs() <= usual {
            0
        } else if off > 0.0 {
            self.surprises.max(0) + 1
        } else {
            self.surprises.min(0) - 1
        };
        if self.surprises.abs() >= SURPRISES {
            self.touch = Level::default();
            self.line = Line::default();
            self.surprises = 0;
            self.regime_s = 0.0;
        }
        self.surprises != 0
    }

    /// Whether anything is known yet.
    #[must_use]
    pub const fn is_fitted(&self) -> bool {
        self.touch.known && self.drain.known
    }

    /// Age of the present regime in seconds.
    #[must_use]
    pub const fn regime_s(&self) -> f64 {
        self.regime_s
    }

    /// As it most likely is.
    #[must_use]
    pub fn expected(&self) -> Fit {
        Fit {
            touch_rate: self.touch.value,
            depletion_per_s: self.line.fall() * self.line.explained(),
            cold_ratio: 0.1,
            drain_rate: self.drain.value,
        }
    }

    /// As bad as it may well be: more touched, a hot set of which only a part falls off, a slower disk.
    #[must_use]
    pub fn pessimistic(&self) -> Fit {
        Fit {
            touch_rate: self.touch.value + self.touch.deviation,
            depletion_per_s: self.line.fall() * self.line.explained(),
            cold_ratio: 0.2,
            drain_rate: (self.drain.value - self.drain.deviation).max(self.drain.value / 2.0),
        }
    }

    /// As good as it may well be: what has to be true for a snapshot that shall be given up.
    #[must_use]
    pub fn optimistic(&self) -> Fit {
        Fit {
            touch_rate: (self.touch.value - self.touch.deviation).max(0.0),
            depletion_per_s: self.line.fall(),
            cold_ratio: 0.0,
            drain_rate: self.drain_best + self.drain.deviation,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DT_S: f64 = 0.05;

    /// A guest that writes at random within `hot_bytes` at `rate`, with this share of its CPU time.
    fn observe_hot_set(
        model: &mut Model,
        hot_bytes: f64,
        rate: f64,
        cpu_ratio: f64,
        ticks: u32,
    ) -> f64 {
        let mut left = hot_bytes;
        for _ in 0..ticks {
            let touched_bytes = rate * left / hot_bytes * DT_S * cpu_ratio;
            left -= touched_bytes;
            model.observe(&Observation {
                elapsed_s: DT_S,
                touched_bytes,
                drained_bytes: 20e6,
                saved_bytes: hot_bytes - left,
                cpu_ratio,
                disk_was_busy: true,
            });
        }
        left
    }

    #[test]
    fn the_depletion_of_a_hot_set_is_found_with_and_without_throttle() {
        for cpu_ratio in [1.0, 0.4] {
            let mut model = Model::default();
            let left = observe_hot_set(&mut model, 4e9, 1e9, cpu_ratio, 40);
            let fit = model.expected();
            let rate = 1e9 * left / 4e9;
            assert!((fit.depletion_per_s - 0.25).abs() < 0.02, "{cpu_ratio}: {fit:?}");
            assert!(
                (fit.touch_rate / rate - 1.0).abs() < 0.1,
                "{cpu_ratio}: {fit:?} is not {rate}"
            );
            assert!((fit.drain_rate - 400e6).abs() < 1e6, "{fit:?}");
        }
    }

    #[test]
    fn a_steady_writer_shows_no_depletion() {
        let mut model = Model::default();
        for tick in 0..60 {
            // Alternately more and less: noise, no trend.
            let noise = if tick % 2 == 0 { 1.1 } else { 0.9 };
            model.observe(&Observation {
                elapsed_s: DT_S,
                touched_bytes: 50e6 * noise,
                drained_bytes: 20e6,
                saved_bytes: f64::from(tick) * 50e6,
                cpu_ratio: 1.0,
                disk_was_busy: true,
            });
        }
        let fit = model.pessimistic();
        assert!(fit.depletion_per_s < 0.01, "{fit:?}");
        assert!(fit.touch_rate > 1e9 && fit.touch_rate < 1.2e9, "{fit:?}");
    }

    #[test]
    fn a_jump_begins_a_regime_and_noise_does_not() {
        let mut model = Model::default();
        observe_hot_set(&mut model, 1e12, 1e8, 1.0, 40);
        assert!(model.regime_s() > 1.9);
        observe_hot_set(&mut model, 1e12, 2e9, 1.0, 6);
        assert!(model.regime_s() < 0.3, "{}", model.regime_s());
        assert!(model.expected().touch_rate > 1.8e9, "{:?}", model.expected());
    }

    #[test]
    fn a_disk_without_work_is_not_taken_to_be_slow() {
        let mut model = Model::default();
        observe_hot_set(&mut model, 1e12, 1e8, 1.0, 20);
        model.observe(&Observation {
            elapsed_s: DT_S,
            touched_bytes: 0.0,
            drained_bytes: 0.0,
            saved_bytes: 1e9,
            cpu_ratio: 1.0,
            disk_was_busy: false,
        });
        assert!(model.expected().drain_rate > 390e6);
    }

    /// A disk whose rate alternates between these.
    fn rough_disk(rates: [f64; 2], is_busy: bool) -> Model {
        let mut model = Model::default();
        for tick in 0..100 {
            model.observe(&Observation {
                elapsed_s: DT_S,
                touched_bytes: 5e6,
                drained_bytes: rates[tick % 2] * DT_S,
                saved_bytes: 0.0,
                cpu_ratio: 1.0,
                disk_was_busy: is_busy,
            });
        }
        model
    }

    #[test]
    fn a_rough_disk_may_be_faster_than_it_was_and_slower() {
        let model = rough_disk([300e6, 500e6], true);
        assert!(model.optimistic().drain_rate > 480e6, "{model:?}");
        assert!(model.pessimistic().drain_rate < 320e6, "{model:?}");
        let wild = rough_disk([0.0, 800e6], true);
        let floor = wild.expected().drain_rate / 2.0;
        assert!((wild.pessimistic().drain_rate - floor).abs() < 1.0, "{wild:?}");
    }

    #[test]
    fn a_disk_that_had_nothing_to_do_is_as_fast_as_it_was_when_it_was_fastest() {
        assert!(rough_disk([300e6, 500e6], false).expected().drain_rate > 490e6);
    }

    #[test]
    fn surprises_on_either_side_in_turns_are_noise() {
        let mut model = Model::default();
        observe_hot_set(&mut model, 1e12, 1e9, 1.0, 40);
        let age_s = model.regime_s();
        for rate in [1e8, 1e8, 3e9, 1e8, 1e8, 3e9] {
            observe_hot_set(&mut model, 1e12, rate, 1.0, 1);
        }
        assert!(model.regime_s() > age_s, "{model:?}");
    }

    #[test]
    fn a_guest_without_cpu_time_tells_nothing() {
        let mut model = Model::default();
        observe_hot_set(&mut model, 1e12, 1e9, 1.0, 40);
        let before = model.expected().touch_rate;
        observe_hot_set(&mut model, 1e12, 0.0, 0.001, 10);
        assert!((model.expected().touch_rate - before).abs() < 1.0);
    }
}
