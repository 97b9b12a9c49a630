//! One tick: what was seen, what it means, what shall be in force.
//!
//! **The law.** While the buffer has room beyond the *reserve*, the guest is left alone. The rest of the room is given out
//! so that it would last for [`GLIDE_S`]:
//!
//! ```text
//!   q = (d + (useful part − reserve − B) / GLIDE_S) / a          clamped to min_cpu .. 1
//! ```
//!
//! If the forecast peak at some greater share stays below [`HELD_UP_RATIO`] of the buffer, then that is the share: what
//! will fit anyway is left alone. CPU time is given back at once where the room left lasts for [`ROOM_S`], and else slowly.
//!
//! The law needs no integrator and no tuning to the guest: where the guest is too fast the buffer comes to rest where `q·a = d`, so an
//! error in `a` or `d` moves the level of the buffer, not the guest's share of CPU. It also takes as late as
//! possible: with a bounded buffer and a first-touch rate that only falls, running freely until the buffer is used and
//! then at the pace of the disk leaves the guest the most work at every moment, for the bytes touched up to `t` are
//! bounded by limit + `d·t` and this reaches the bound.
//!
//! **The reserve** is what the buffer would still grow by if the guest were throttled to `min_cpu` from now on, by the
//! pessimistic side of the model, for as long as the present regime may well last. It is what the forecast is for:
//! without it the buffer would be used up at full speed, and be missing where even `min_cpu` is more than the disk takes.
//!
//! **Abort** when even the optimistic side overflows at `min_cpu`, in no more than a third of the time that the regime
//! has lasted (so that it lasts until then with a probability of 3 in 4), for [`EVIDENCE_S`] on end; or when writers
//! have got less than the policy allows for a whole second, whatever the forecast says. What a full buffer leaves to
//! them is seen, and not forecast: it costs a second, and many a burst ends within it.
//!
//! **The least share** is what writers keep, not what is commanded: where a nearly full buffer takes from them as well,
//! the throttle takes that much less ([`crate::kept`]). Who got too little in the last second is owed it, and gets all until
//! that is made good.

use crate::forecast::{Forecast, Position, forecast, persistence_ratio, position};
use crate::kept::Kept;
use crate::model::{Fit, Model, Observation};
use crate::policy::{BUFFER_BYTES_MIN, OnInfeasible, Policy, PolicyError, WINDOW_S};
use crate::sample::{Absurdity, Baseline, Blindness, Sample, Seen, Vcpu};
use crate::stalls::Stalls;
use crate::vcpu::Vcpus;
use crate::{NS_PER_S, count, number};

/// Length of a tick for which the constants are chosen, in seconds.
pub const TICK_S: f64 = 0.05;

/// Time in which the room left may be used up, in seconds.
const GLIDE_S: f64 = 0.2;
/// What the sweep keeps in the buffer whatever the guest does, in bytes: 16 extents of 2 MiB.
const SWEEP_BYTES: f64 = (32_u64 << 20) as f64;
/// Share of the rest of the buffer that is planned with. Beyond it the engine captures less for a fault
/// (`fault::Locality`), which slows writers down: that part is kept for what could not be foreseen.
const USEFUL_RATIO: f64 = 0.3;
/// Share of the buffer from which on the engine captures less for a fault, which holds writers up.
const HELD_UP_RATIO: f64 = 0.65;
/// Share of the buffer from which on it is as good as full: soon the engine captures page by page.
const FULL_RATIO: f64 = 0.88;
/// A regime is taken to last for so many times its age, at least for [`REGIME_S_MIN`].
const REGIME_AGES: f64 = 2.0;
/// Least time that a regime is taken to last, in seconds.
const REGIME_S_MIN: f64 = 1.0;
/// A regime must have lasted so many times as long as it takes until the buffer is full: it then lasts until there with
/// a probability of 3 in 4.
const OVERFLOW_AGES: f64 = 3.0;
/// Share of `min_cpu` below which writers are owed what they did not get: short of that is within what can be measured.
const OWED_RATIO: f64 = 0.9;
/// How long the forecast must have said so before the snapshot is given up, in seconds.
const EVIDENCE_S: f64 = 0.5;
/// For how long in a row writers must have got too little of the second before, in seconds: longer than one tick, which may be
/// wrong.
const BROKEN_S: f64 = 0.15;
/// How long fault stalls may be over the limit although the guest gets no more than it must, in seconds.
const STALLED_S: f64 = 1.0;
/// Steps in search of the largest share that fits.
const BISECTIONS: u32 = 5;
/// For so long the room left must last if CPU time is given back at once, in seconds.
const ROOM_S: f64 = 1.0;
/// How fast CPU time is given back else, as a share per second.
const RELEASE_PER_S: f64 = 0.3;
/// Changes upwards by less than this share are not worth a write to the cgroup.
const HYSTERESIS_RATIO: f64 = 0.05;
/// How long the last command is held when there are no samples, in seconds.
const HOLD_S: f64 = 1.0;
/// Buffer in use from which on the disk has something to do, in bytes.
const BUSY_BYTES: u64 = 8 << 20;
/// Share of its forecast peak by which the buffer is made larger than that.
const GROWTH_RATIO: f64 = 1.25;
/// Share of the host's available memory that the buffer may still grow by.
const AVAILABLE_RATIO: f64 = 0.25;
/// Memory pressure from which on the buffer shrinks.
const PRESSURE_RATIO: f64 = 0.1;
/// What is left of the CPU share in a second in which stalls are over the limit.
const STALL_CUT_PER_S: f64 = 0.8;

/// Why a command is what it is: stable words for logs, metrics and tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Because {
    /// Too little is known yet: nothing is changed.
    Learning,
    /// The forecast fits the limits: the guest is left alone.
    Fits,
    /// CPU time is being given back.
    Release,
    /// The buffer would overflow otherwise.
    Throttle,
    /// Fault stalls are over the limit.
    Stalls,
    /// Not even the least CPU share keeps the limits; the policy, or a want of evidence, says to go on.
    Infeasible,
    /// The snapshot is given up.
    Abort,
    /// There is no sample: what is in force is held, for a while.
    SampleLost,
    /// The sample is too old: what is in force is held, for a while.
    SampleStale,
    /// The sample cannot be true: what is in force is held, for a while.
    SampleAbsurd(Absurdity),
    /// Nothing has been seen for so long that what is in force may be wrong: CPU time is given back. Memory stays
    /// bounded, because writes wait for room in the buffer.
    Blind,
}

/// Why a snapshot is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum AbortReason {
    /// The buffer will be full although the guest gets no more than it must.
    BufferOverflow,
    /// Writers get less than the least CPU share, because the buffer is full.
    MinCpu,
    /// Faults stall for longer than the limit although the guest gets no more than it must.
    StallLimit,
    /// The disk is too slow for the deadline.
    Deadline,
}

/// A snapshot given up, with the evidence.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Abort {
    /// The stable reason.
    pub reason: AbortReason,
    /// What would have happened at the least CPU share, on the optimistic side.
    pub forecast: Forecast,
    /// First-touch rate of the guest if it were not throttled, in bytes per second.
    pub touch_rate: f64,
    /// Drain rate, in bytes per second.
    pub drain_rate: f64,
    /// How long this has been so, in seconds.
    pub evidence_s: f64,
}

/// All that shall be in force from now on.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Command {
    /// Why.
    pub because: Because,
    /// Bound of the copy buffer in bytes; 0 as long as none is known.
    pub buffer_limit_bytes: u64,
    /// Share of their CPU time that the writers keep, weighted by what they write;
    /// [`Controller::vcpu_shares`] has it for each virtual CPU.
    pub cpu_ratio: f64,
    /// Give the snapshot up.
    pub abort: Option<Abort>,
    /// What is going to happen if the guest is left alone.
    pub forecast: Forecast,
}

/// The state from tick to tick.
#[derive(Clone, Debug)]
pub struct Controller {
    policy: Policy,
    baseline: Baseline,
    model: Model,
    command: Command,
    /// When the first sample was taken, as the deadline counts from there.
    began_ns: Option<u64>,
    /// How long no sample has been believed, in seconds.
    blind_s: f64,
    /// How long an abort has been called for, in seconds, by reason.
    overflow_s: f64,
    broken_s: f64,
    stalled_s: f64,
    late_s: f64,
    kept: Kept,
    /// Whether writers are owed CPU time.
    is_owed: bool,
    stalls: Stalls,
    /// Upper bound on the CPU share that fault stalls have brought about.
    stall_ratio: f64,
    vcpus: Vcpus,
}

impl Controller {
    /// A controller for a guest with so many virtual CPUs. The only place that allocates.
    ///
    /// # Errors
    /// When the policy makes no sense.
    pub fn new(policy: Policy, vcpus: usize) -> Result<Self, PolicyError> {
        policy.check()?;
        Ok(Self {
            policy,
            baseline: Baseline::default(),
            model: Model::default(),
            command: Command {
                because: Because::Learning,
                buffer_limit_bytes: 0,
                cpu_ratio: 1.0,
                abort: None,
                forecast: Forecast::default(),
            },
            began_ns: None,
            blind_s: 0.0,
            overflow_s: 0.0,
            broken_s: 0.0,
            stalled_s: 0.0,
            late_s: 0.0,
            kept: Kept::new(),
            is_owed: false,
            stalls: Stalls::default(),
            stall_ratio: 1.0,
            vcpus: Vcpus::new(vcpus),
        })
    }

    /// Share of its CPU time that each virtual CPU keeps, as of the last command.
    #[must_use]
    pub fn vcpu_shares(&self) -> &[f64] {
        self.vcpus.shares()
    }

    /// From now on other limits; what has been learnt of guest and disk stays.
    ///
    /// # Errors
    /// When the policy makes no sense; the one in force then stays in force.
    pub fn set_policy(&mut self, policy: Policy) -> Result<(), PolicyError> {
        policy.check()?;
        self.policy = policy;
        Ok(())
    }

    /// What is known of guest and disk; nothing as long as too little has been seen.
    #[must_use]
    pub fn fit(&self) -> Option<Fit> {
        self.model.is_fitted().then(|| self.model.expected())
    }

    /// One tick of `dt_s` seconds. `vcpus` has what each virtual CPU has done, or is empty if that is not known: all are then
    /// treated alike, taken to have kept what was commanded, and what a full buffer costs them goes unseen. It never
    /// panics, whatever it is given.
    pub fn step(&mut self, sample: Option<&Sample>, vcpus: &[Vcpu], dt_s: f64) -> Command {
        let dt_s_known = if dt_s > 0.0 && dt_s < 10.0 { dt_s } else { TICK_S };
        match self.baseline.see(sample, dt_s) {
            Ok(Some(seen)) => {
                self.blind_s = 0.0;
                let kept_ratio = self.vcpus.see(vcpus, seen.elapsed_s);
                self.decide(&seen, kept_ratio.unwrap_or(self.command.cpu_ratio));
            }
            Ok(None) => {
                if let Some(first) = sample {
                    self.began_ns = Some(first.taken_ns);
                    self.command.buffer_limit_bytes = first.buffer_limit_bytes;
                }
                self.vcpus.rebase(vcpus);
            }
            Err(blindness) => self.hold(blindness, dt_s_known),
        }
        self.vcpus.divide(self.command.cpu_ratio, self.policy.min_cpu_ratio);
        self.command
    }

    /// The safe command: hold for a while, then give back.
    fn hold(&mut self, blindness: Blindness, dt_s: f64) {
        self.blind_s += dt_s;
        self.command.because = match blindness {
            Blindness::Lost => Because::SampleLost,
            Blindness::Stale => Because::SampleStale,
            Blindness::Absurd(absurdity) => Because::SampleAbsurd(absurdity),
        };
        if self.blind_s > HOLD_S {
            self.command.because = Because::Blind;
            self.command.cpu_ratio = (self.command.cpu_ratio + RELEASE_PER_S * dt_s).min(1.0);
        }
    }

    fn decide(&mut self, seen: &Seen, kept_ratio: f64) {
        let now = &seen.now;
        self.model.observe(&Observation {
            elapsed_s: seen.elapsed_s,
            touched_bytes: seen.touched_bytes,
            drained_bytes: seen.drained_bytes,
            saved_bytes: number(now.saved_bytes),
            cpu_ratio: kept_ratio,
            disk_was_busy: now.buffer_used_bytes >= BUSY_BYTES,
        });
        if !self.model.is_fitted() {
            self.command.because = Because::Learning;
            return;
        }
        self.kept.see(seen.elapsed_s, kept_ratio, self.command.cpu_ratio);
        self.notice_owed();
        let from = position(now.total_bytes - now.saved_bytes, now.buffer_used_bytes);
        let reachable = number(self.size_buffer(now, from));
        self.command.forecast =
            forecast(&self.model.expected(), from, 1.0, reachable, f64::INFINITY);
        self.command.forecast.confidence_ratio =
            persistence_ratio(self.model.regime_s(), self.command.forecast.peak_after_s);
        self.notice_stalls(now, seen.elapsed_s);
        let free = self.free_ratio(from, reachable, number(now.age_ns) / NS_PER_S);
        let room_lasts = self.room_lasts(from, reachable, free);
        self.move_to(free, room_lasts, seen.elapsed_s);
        self.consider_abort(seen, from, reachable * FULL_RATIO);
    }

    /// Chooses the bound of the buffer; returns what it could be made.
    fn size_buffer(&mut self, now: &Sample, from: Position) -> u64 {
        let in_force = now.buffer_limit_bytes;
        let (room, pressed) = match now.host {
            Some(host) => (
                in_force.saturating_add(count(number(host.available_bytes) * AVAILABLE_RATIO)),
                host.memory_pressure_ratio > PRESSURE_RATIO,
            ),
            None => (u64::MAX, false),
        };
        if pressed {
            // What is in use stays until the disk has taken it.
            let smaller = (in_force / 10 * 9).max(now.buffer_used_bytes).max(BUFFER_BYTES_MIN);
            self.command.buffer_limit_bytes = smaller.min(in_force);
            return self.command.buffer_limit_bytes;
        }
        let allowed =
            self.policy.buffer_bytes_max.min(room).max(in_force.min(self.policy.buffer_bytes_max));
        let wanted = forecast(&self.model.pessimistic(), from, 1.0, f64::INFINITY, f64::INFINITY);
        let wanted = count(wanted.peak_buffer_bytes * GROWTH_RATIO / USEFUL_RATIO);
        self.command.buffer_limit_bytes = wanted.min(allowed).max(in_force.min(allowed));
        allowed
    }

    /// The largest CPU share that the law allows; see the head of this file.
    fn free_ratio(&self, from: Position, limit: f64, age_s: f64) -> f64 {
        let fit = self.model.pessimistic();
        if from.unsaved_bytes + from.buffer_used_bytes <= limit || fit.touch_rate <= 0.0 {
            return 1.0;
        }
        let least = self.policy.min_cpu_ratio;
        let lasts_s = (REGIME_AGES * self.model.regime_s()).max(REGIME_S_MIN);
        let at_least = forecast(&fit, from, least, limit, lasts_s);
        let reserve = at_least.peak_buffer_bytes - from.buffer_used_bytes;
        // The sample is of the past: meanwhile the guest went on with the share it has.
        let since = ((self.command.cpu_ratio * fit.touch_rate - fit.drain_rate) * age_s).max(0.0);
        let room = useful_bytes(limit) - reserve - from.buffer_used_bytes - since;
        let glide = (fit.drain_rate + room / GLIDE_S) / fit.touch_rate;
        let level = limit * HELD_UP_RATIO - since;
        largest_share(glide.max(least), |share| {
            forecast(&fit, from, share, limit, f64::INFINITY).peak_buffer_bytes <= level
        })
    }

    /// Fault stalls over the limit: less for the writers, until it helps.
    fn notice_stalls(&mut self, now: &Sample, elapsed_s: f64) {
        self.stalls.see(now.stall, elapsed_s);
        let are_over = self.stalls.are_over();
        let change = if are_over { -STALL_CUT_PER_S * self.stall_ratio } else { RELEASE_PER_S };
        self.stall_ratio =
            (self.stall_ratio + change * elapsed_s).clamp(self.policy.min_cpu_ratio, 1.0);
    }

    /// Whether writers got so much less than `min_cpu` in the last second that no more may be taken from them, until that is
    /// made good.
    fn notice_owed(&mut self) {
        let least = self.policy.min_cpu_ratio * if self.is_owed { 1.0 } else { OWED_RATIO };
        self.is_owed = self.kept.in_window().is_some_and(|kept| kept < least);
    }

    /// The share with which writers keep `min_cpu`, whatever else takes from them; all as long as they are owed some.
    fn least(&self) -> f64 {
        if self.is_owed { 1.0 } else { self.kept.to_command(self.policy.min_cpu_ratio) }
    }

    /// Whether there is room enough to give this share at once and see: it lasts for [`ROOM_S`], on the pessimistic side.
    fn room_lasts(&self, from: Position, limit: f64, share: f64) -> bool {
        let fit = self.model.pessimistic();
        let surplus = (share.min(1.0) * fit.touch_rate - fit.drain_rate).max(0.0);
        useful_bytes(limit) - from.buffer_used_bytes > surplus * ROOM_S
    }

    /// Fast down, slowly up unless there is room to be wrong, and not for trifles.
    fn move_to(&mut self, free: f64, room_lasts: bool, elapsed_s: f64) {
        let before = self.command.cpu_ratio;
        let target = free.min(self.stall_ratio).clamp(self.least(), 1.0);
        let is_trifle = target < 1.0 && target - before < HYSTERESIS_RATIO;
        let after = if target < before || self.is_owed || (room_lasts && !is_trifle) {
            target
        } else if is_trifle {
            before
        } else {
            target.min(before + RELEASE_PER_S * elapsed_s)
        };
        self.command.cpu_ratio = after;
        self.command.because = if self.is_owed {
            Because::Release
        } else if after >= 1.0 {
            Because::Fits
        } else if self.stall_ratio < free {
            Because::Stalls
        } else if after > before {
            Because::Release
        } else {
            Because::Throttle
        };
    }

    fn consider_abort(&mut self, seen: &Seen, from: Position, limit: f64) {
        let (now, elapsed_s) = (&seen.now, seen.elapsed_s);
        let fit = self.model.optimistic();
        let kept_ratio_min = self.policy.kept_ratio_min();
        let best = forecast(&fit, from, kept_ratio_min, limit, f64::INFINITY);
        let at_least = self.command.cpu_ratio <= self.least() + HYSTERESIS_RATIO;
        // What a full buffer leaves to writers can be seen: it need not be forecast.
        let is_full = from.buffer_used_bytes >= limit;
        let soon_s = self.model.regime_s() / OVERFLOW_AGES;
        let overflows =
            at_least && !is_full && best.full_after_s.is_some_and(|after_s| after_s <= soon_s);
        let is_broken = self.kept.in_window().is_some_and(|kept| kept < kept_ratio_min);
        let is_late = self.policy.deadline_ns.is_some_and(|deadline_ns| {
            let gone_ns = now.taken_ns.saturating_sub(self.began_ns.unwrap_or(now.taken_ns));
            let left_s = (number(deadline_ns) - number(gone_ns)) / NS_PER_S;
            from.unsaved_bytes + from.buffer_used_bytes > left_s * fit.drain_rate
        });
        let add =
            |so_far: &mut f64, holds: bool| *so_far = if holds { *so_far + elapsed_s } else { 0.0 };
        add(&mut self.overflow_s, overflows);
        add(&mut self.broken_s, is_broken);
        add(&mut self.stalled_s, at_least && self.stalls.are_over());
        add(&mut self.late_s, is_late);
        let (reason, evidence_s) = if self.late_s >= EVIDENCE_S {
            (AbortReason::Deadline, self.late_s)
        } else if self.overflow_s >= EVIDENCE_S {
            (AbortReason::BufferOverflow, self.overflow_s)
        } else if self.broken_s >= BROKEN_S {
            (AbortReason::MinCpu, WINDOW_S)
        } else if self.stalled_s >= STALLED_S {
            (AbortReason::StallLimit, self.stalled_s)
        } else {
            return;
        };
        if self.policy.on_infeasible == OnInfeasible::Wait {
            self.command.because = Because::Infeasible;
            return;
        }
        self.command.because = Because::Abort;
        self.command.abort = Some(self.abort(reason, best, &fit, evidence_s));
    }

    fn abort(
        &self,
        reason: AbortReason,
        mut forecast: Forecast,
        fit: &Fit,
        evidence_s: f64,
    ) -> Abort {
        forecast.confidence_ratio =
            persistence_ratio(self.model.regime_s(), forecast.full_after_s.unwrap_or(0.0));
        Abort {
            reason,
            forecast,
            touch_rate: fit.touch_rate,
            drain_rate: fit.drain_rate,
            evidence_s,
        }
    }
}

/// How much of a buffer with this bound is planned with, in bytes.
fn useful_bytes(limit: f64) -> f64 {
    SWEEP_BYTES + (limit - SWEEP_BYTES).max(0.0) * USEFUL_RATIO
}

/// The largest share for which this holds, to within a 32nd of what there is between `least` and 1; `least` if
/// there is none.
fn largest_share(least: f64, holds: impl Fn(f64) -> bool) -> f64 {
    if least >= 1.0 || holds(1.0) {
        return 1.0;
    }
    let (mut best, mut too_much) = (least, 1.0);
    for _ in 0..BISECTIONS {
        let middle = f64::midpoint(best, too_much);
        if holds(middle) { best = middle } else { too_much = middle }
    }
    best
}

#[cfg(test)]
mod tests;
