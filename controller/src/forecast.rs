//! Would a snapshot keep its limits? Measured and forecast before anything of the guest is touched.
//!
//! ```text
//!   footprint   how much is to be written ─┐
//!   Sampler     how fast the guest writes ─┼─▶ livesnap_control::plan ─▶ verdict
//!   bandwidth   how fast the disk takes it ┘
//! ```
//!
//! The guest is watched by the caller's thread, and meanwhile another one writes to the destination. Both end by
//! themselves; what they do is undone when they return, or by the kernel if they are killed.

use std::num::NonZeroU64;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use livesnap_control::{AbortReason, Forecast as Outlook, Plan, PlanInputs, Policy, Verdict, plan};
use serde_json::{Value, json};
use snapshot_core::bandwidth::{self, Bandwidth, Limits};
use snapshot_core::dirty_rate::{DirtyRateError, Sampler, SamplerOptions, Window};
use snapshot_core::footprint::{self, Footprint};
use snapshot_core::vmm::Vmm;
use snapshot_core::{Cancel, Reason};

use crate::actuator::SHARE_MIN;
use crate::control_loop::reason;
use crate::units::{percent, whole};
use crate::{Failure, output};

/// How much is done for a forecast.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// For how long the guest is watched.
    pub window: Duration,
    /// How much of its memory, in bytes.
    pub sample_bytes: u64,
    /// For how long, and how much, is written to the destination.
    pub disk: Limits,
}

impl Effort {
    /// Little enough to go before any snapshot.
    pub const BRIEF: Self = Self {
        window: Duration::from_millis(400),
        sample_bytes: 128 << 20,
        disk: Limits { time: Duration::from_millis(300), bytes: 256 << 20, bytes_per_second: None },
    };

    /// The same for a snapshot that is kept to so many bytes a second.
    pub fn at_most(self, bytes_per_second: Option<NonZeroU64>) -> Self {
        Self { disk: Limits { bytes_per_second, ..self.disk }, ..self }
    }
}

/// A forecast, with what it stands on.
#[derive(Debug)]
pub struct Forecast {
    policy: Policy,
    memory: Footprint,
    disk: Bandwidth,
    guest: Result<Window, DirtyRateError>,
    plan: Plan,
}

/// How much of its RAM `vmm` would have written.
///
/// # Errors
/// If it cannot be looked at.
pub fn footprint(vmm: &mut dyn Vmm) -> Result<Footprint, Failure> {
    footprint::look(vmm, seed()).map_err(|error| Failure::refused(error.reason(), error))
}

/// Whether `memory` fits into the buffer as a whole, and no deadline is set: then nothing can break the limits.
pub fn is_trivial(memory: &Footprint, policy: &Policy) -> bool {
    let most = memory.stored_bytes + memory.stored_error_bytes;
    policy.deadline_ns.is_none() && whole(most) < policy.buffer_bytes_max
}

/// Measures and forecasts a snapshot of `vmm`, which has `memory`, into `out`. That the dirty rate cannot be measured is
/// part of the forecast.
///
/// # Errors
/// If the limits make no sense, the destination cannot be measured, the guest has ended, or it was cancelled.
pub fn forecast(
    vmm: &mut dyn Vmm,
    memory: Footprint,
    out: &Path,
    policy: Policy,
    effort: &Effort,
    cancel: &Cancel,
) -> Result<Forecast, Failure> {
    policy.check().map_err(|error| Failure::refused(Reason::BadArgument, error))?;
    let cancelled =
        || Failure::new(Reason::Cancelled, "cancelled: nothing of the guest was changed");
    let (guest, disk) = std::thread::scope(|scope| {
        let disk = scope.spawn(|| bandwidth::measure(out, effort.disk, cancel));
        let guest = watch(vmm, effort, cancel);
        (guest, disk.join())
    });
    let disk = disk
        .map_err(|_| Failure::new(Reason::Internal, "the thread that measures the disk panicked"))?
        .map_err(|error| Failure::refused(error.reason(), error))?
        .ok_or_else(cancelled)?;
    let guest = match guest {
        Ok(Some(window)) => Ok(window),
        Ok(None) => return Err(cancelled()),
        Err(error @ DirtyRateError::Ended { .. }) => return Err(error.into()),
        Err(error) => Err(error),
    };
    Ok(Forecast::new(policy, memory, disk, guest))
}

/// Refuses a destination without room, by the engine's own rule.
///
/// # Errors
/// `no_space`.
pub fn check_space(memory: &Footprint, out: &Path) -> Result<(), Failure> {
    match footprint::lacks_space(out, memory.size_max_bytes) {
        Ok(Some(lacking)) => Err(Failure::refused(Reason::NoSpace, lacking)),
        // Who measures the destination says better what is wrong with it.
        Ok(None) | Err(_) => Ok(()),
    }
}

fn watch(
    vmm: &mut dyn Vmm,
    effort: &Effort,
    cancel: &Cancel,
) -> Result<Option<Window>, DirtyRateError> {
    let options = SamplerOptions::new(effort.sample_bytes, seed());
    Sampler::attach(vmm, &options)?.window(effort.window, cancel)
}

fn inputs(memory: &Footprint, guest: Option<&Window>, disk: &Bandwidth) -> PlanInputs {
    let window_ns = guest.map_or(1, |window| window.window_ns);
    PlanInputs {
        unsaved_bytes: memory.stored_bytes,
        unsaved_error_bytes: memory.stored_error_bytes,
        dirty_rate: guest.map_or(0.0, |window| window.rate.bytes_per_second),
        dirty_rate_error: guest.map_or(0.0, |window| window.rate.error_bytes_per_second),
        window_s: Duration::from_nanos(window_ns).as_secs_f64(),
        fresh_ratio: guest.and_then(|window| window.fresh_ratio).unwrap_or(1.0),
        drain_rate: disk.bytes_per_second,
        drain_rate_error: disk.error_bytes_per_second,
    }
}

fn seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Forecast {
    /// From what was measured.
    fn new(
        policy: Policy,
        memory: Footprint,
        disk: Bandwidth,
        guest: Result<Window, DirtyRateError>,
    ) -> Self {
        let mut plan = plan(&inputs(&memory, guest.as_ref().ok(), &disk), &policy);
        // How long it takes is a matter of the disk alone.
        let is_about_disk = matches!(
            plan.verdict,
            Verdict::Infeasible { reason: AbortReason::Deadline, .. }
                | Verdict::Uncertain { reason: AbortReason::Deadline, .. }
        );
        if guest.is_err() && !is_about_disk {
            plan.verdict = Verdict::Unknown;
        }
        Self { policy, memory, disk, guest, plan }
    }

    /// The word for the verdict, and for what is in the way.
    fn verdict(&self) -> (&'static str, Option<Reason>) {
        match (&self.plan.verdict, &self.guest) {
            (Verdict::Fits, _) => ("fits", None),
            (Verdict::NeedsThrottle { .. }, _) => ("needs_throttle", None),
            (Verdict::Uncertain { reason: limit, .. }, _) => ("uncertain", Some(reason(*limit))),
            (Verdict::Infeasible { reason: limit, .. }, _) => ("infeasible", Some(reason(*limit))),
            (Verdict::Unknown, Err(error)) => ("unknown", Some(error.reason())),
            (Verdict::Unknown, Ok(_)) => ("unknown", Some(Reason::Internal)),
        }
    }

    /// Why the limits cannot be kept, as an error with a `hint` at its end: only where even the optimistic side breaks one.
    pub fn infeasible(&self, hint: &str) -> Option<Failure> {
        let Verdict::Infeasible { reason: limit, cpu_ratio } = self.plan.verdict else {
            return None;
        };
        let text = format!(
            "the limits cannot be kept: {}: {}{hint}",
            self.obstacle(limit),
            self.remedy(limit, cpu_ratio)
        );
        Some(Failure::new(reason(limit), text))
    }

    /// Why nothing is known, as an error.
    pub fn unknown(&self) -> Option<Failure> {
        let error = self.guest.as_ref().err().filter(|_| self.plan.verdict == Verdict::Unknown)?;
        let text = format!("unknown whether the limits can be kept: {error}");
        Some(Failure::refused(error.reason(), text))
    }

    /// What breaks the limit, with the evidence.
    fn obstacle(&self, limit: AbortReason) -> String {
        let least = percent(self.policy.min_cpu_ratio);
        let buffer = output::bytes(self.policy.buffer_bytes_max);
        match limit {
            AbortReason::Deadline => format!(
                "to write {} takes {} at {}, and --deadline is {}",
                spread(self.memory.stored_bytes, self.memory.stored_error_bytes, ""),
                seconds(self.time_s()),
                spread(self.disk.bytes_per_second, self.disk.error_bytes_per_second, "/s"),
                seconds(deadline_s(&self.policy))
            ),
            _ => format!(
                "with {least} of its CPU time, and even if the guest writes to nothing else than in the {} in which it was watched, the buffer of {buffer} is full {} ({})",
                seconds(self.window_s()),
                full(&self.plan.optimistic_slowest),
                self.rates()
            ),
        }
    }

    /// What it would take.
    fn remedy(&self, limit: AbortReason, cpu_ratio: f64) -> String {
        match limit {
            AbortReason::Deadline => format!(
                "allow a --deadline of {}, or use a faster destination",
                seconds(self.time_max_s())
            ),
            _ => {
                let buffer = whole_mib(self.plan.slowest.peak_buffer_bytes);
                let cpu = if cpu_ratio >= SHARE_MIN {
                    format!(" or a --min-cpu of {:.0}%", (cpu_ratio * 100.0).floor())
                } else {
                    String::new()
                };
                format!(
                    "allow a --buffer of {buffer}MiB{cpu}, use a faster destination, or let writes wait by --on-infeasible wait"
                )
            }
        }
    }

    fn rates(&self) -> String {
        let disk = spread(self.disk.bytes_per_second, self.disk.error_bytes_per_second, "/s");
        format!("the guest dirties {}, the destination takes {disk}", self.dirty_rate())
    }

    fn dirty_rate(&self) -> String {
        self.guest.as_ref().map_or("an unknown amount".into(), |window| {
            spread(window.rate.bytes_per_second, window.rate.error_bytes_per_second, "/s")
        })
    }

    fn window_s(&self) -> f64 {
        self.guest
            .as_ref()
            .map_or(0.0, |window| Duration::from_nanos(window.window_ns).as_secs_f64())
    }

    /// Until all is written.
    fn time_s(&self) -> f64 {
        self.memory.stored_bytes / self.disk.bytes_per_second.max(1.0)
    }

    fn time_max_s(&self) -> f64 {
        let slow = self.disk.bytes_per_second - self.disk.error_bytes_per_second;
        let slow = slow.max(self.disk.bytes_per_second / 2.0).max(1.0);
        (self.memory.stored_bytes + self.memory.stored_error_bytes) / slow
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let (verdict, limit) = self.verdict();
        let cpu_ratio = match self.plan.verdict {
            Verdict::Fits => Some(1.0),
            Verdict::NeedsThrottle { cpu_ratio }
            | Verdict::Uncertain { cpu_ratio, .. }
            | Verdict::Infeasible { cpu_ratio, .. } => Some(cpu_ratio),
            Verdict::Unknown => None,
        };
        let guest = self.guest.as_ref().ok();
        let known = guest.map(|_| {
            json!({
                "first_touch_bytes_per_second": self.plan.fit.touch_rate,
                "depletion_per_second": self.plan.fit.depletion_per_s,
                "expected": self.plan.expected,
                "pessimistic": self.plan.pessimistic,
                "at_min_cpu": self.plan.slowest,
                "at_min_cpu_optimistic": self.plan.optimistic_slowest,
            })
        });
        json!({
            "verdict": verdict,
            "reason": limit,
            "cpu_ratio": cpu_ratio,
            "problem": self.guest.as_ref().err().map(ToString::to_string),
            "time_s": self.time_s(),
            "time_max_s": self.time_max_s(),
            "buffer": known,
            "policy": self.policy,
            "guest": guest,
            "memory": self.memory,
            "disk": self.disk,
            "in_words": self.in_words(),
        })
    }

    /// For people: a verdict, and what it stands on.
    pub fn in_words(&self) -> String {
        let mut text = self.verdict_in_words();
        let mut row = |name: &str, value: String| text.push_str(&format!("\n  {name:<12} {value}"));
        if let Ok(window) = &self.guest {
            let share = window.sampled_bytes * 100 / window.ram_bytes.max(1);
            let unit = if window.sampled_huge_bytes > 0 { ", by huge pages" } else { "" };
            row(
                "guest",
                format!(
                    "dirties {} (for {}, {share} % of {} watched{unit})",
                    self.dirty_rate(),
                    seconds(self.window_s()),
                    output::bytes(window.ram_bytes)
                ),
            );
            let fit = &self.plan.fit;
            let set = fit.touch_rate / fit.depletion_per_s.max(f64::MIN_POSITIVE);
            row(
                "first touch",
                if fit.touch_rate > 0.0 {
                    format!(
                        "of pages not yet saved: at first {}/s, a tenth of it less after each {}, as of a working set of {}",
                        output::bytes(whole(fit.touch_rate)),
                        seconds(0.105 / fit.depletion_per_s.max(f64::MIN_POSITIVE)),
                        output::bytes(whole(set))
                    )
                } else {
                    "none was seen".into()
                },
            );
        }
        let memory = &self.memory;
        row(
            "memory",
            format!(
                "{}, of it {} to be written, the rest is zero or does not exist",
                output::bytes(memory.ram_bytes),
                spread(memory.stored_bytes, memory.stored_error_bytes, "")
            ),
        );
        let disk = &self.disk;
        row(
            "destination",
            format!(
                "takes {} ({} in {}, {})",
                spread(disk.bytes_per_second, disk.error_bytes_per_second, "/s"),
                output::bytes(disk.written_bytes),
                seconds(Duration::from_nanos(disk.elapsed_ns).as_secs_f64()),
                disk.storage
            ),
        );
        let (time, most) = (seconds(self.time_s()), seconds(self.time_max_s()));
        row("time", format!("about {time}, perhaps {most}, whatever the guest does"));
        if self.guest.is_ok() {
            let peak = |outlook: &Outlook| output::bytes(whole(outlook.peak_buffer_bytes));
            row(
                "buffer",
                format!(
                    "peak about {}, perhaps {}; with {} of its CPU time {}; allowed is {}",
                    peak(&self.plan.expected),
                    peak(&self.plan.pessimistic),
                    percent(self.policy.min_cpu_ratio),
                    peak(&self.plan.slowest),
                    output::bytes(self.policy.buffer_bytes_max)
                ),
            );
        }
        text
    }

    fn verdict_in_words(&self) -> String {
        match self.plan.verdict {
            Verdict::Fits => "feasible: the guest would keep all of its CPU time".into(),
            Verdict::NeedsThrottle { cpu_ratio } => format!(
                "feasible: the guest might have to be slowed down, at worst to {} of its CPU time",
                percent(cpu_ratio)
            ),
            Verdict::Uncertain { reason: limit @ AbortReason::Deadline, cpu_ratio } => format!(
                "uncertain: to write {} takes {} to {}, and --deadline is {}: {}",
                spread(self.memory.stored_bytes, self.memory.stored_error_bytes, ""),
                seconds(self.time_s()),
                seconds(self.time_max_s()),
                seconds(deadline_s(&self.policy)),
                self.remedy(limit, cpu_ratio)
            ),
            Verdict::Uncertain { reason: limit, cpu_ratio } => format!(
                "uncertain: if the guest goes on like this, not even {} of its CPU time keeps the limits, and a snapshot would be given up; if it comes to no new pages soon, it fits. Watch for longer (--window), or {}",
                percent(self.policy.min_cpu_ratio),
                self.remedy(limit, cpu_ratio)
            ),
            Verdict::Infeasible { reason: limit, cpu_ratio } => {
                format!("infeasible: {}: {}", self.obstacle(limit), self.remedy(limit, cpu_ratio))
            }
            Verdict::Unknown => format!(
                "unknown: {}",
                self.guest
                    .as_ref()
                    .err()
                    .map_or("no figure to forecast by".into(), ToString::to_string)
            ),
        }
    }
}

fn deadline_s(policy: &Policy) -> f64 {
    Duration::from_nanos(policy.deadline_ns.unwrap_or(0)).as_secs_f64()
}

/// When the buffer is full.
fn full(outlook: &Outlook) -> String {
    outlook.full_after_s.map_or("later".into(), |after| format!("in {}", seconds(after)))
}

/// A number of bytes with its error.
fn spread(bytes: f64, error: f64, per: &str) -> String {
    let [bytes, error] = [bytes, error].map(|number| output::bytes(whole(number)));
    format!("{bytes}{per} ± {error}{per}")
}

fn seconds(seconds: f64) -> String {
    match seconds {
        ..1.0 => format!("{:.0} ms", seconds * 1e3),
        ..120.0 => format!("{seconds:.1} s"),
        _ => format!("{:.0} min", seconds / 60.0),
    }
}

/// Rounded up.
fn whole_mib(bytes: f64) -> u64 {
    whole(bytes).div_ceil(1 << 20)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use snapshot_core::dirty_rate::Estimate;

    const MIB: f64 = (1 << 20) as f64;

    fn window(mib_per_s: f64) -> Window {
        Window {
            rate: Estimate { bytes_per_second: mib_per_s * MIB, error_bytes_per_second: MIB },
            window_ns: 2_000_000_000,
            sampled_bytes: 1 << 30,
            sampled_huge_bytes: 0,
            ram_bytes: 1 << 30,
            fresh_ratio: Some(1.0),
        }
    }

    /// Of a guest with 1 GiB and a disk that takes 10 MiB/s.
    fn forecast_of(guest: Result<Window, DirtyRateError>, policy: Policy) -> Forecast {
        let memory = Footprint {
            ram_bytes: 1 << 30,
            stored_bytes: 1024.0 * MIB,
            stored_error_bytes: 0.0,
            size_max_bytes: 1 << 30,
        };
        let disk = Bandwidth {
            bytes_per_second: 10.0 * MIB,
            error_bytes_per_second: MIB,
            written_bytes: 1 << 20,
            elapsed_ns: 100_000_000,
            storage: "io_uring, O_DIRECT",
        };
        Forecast::new(policy, memory, disk, guest)
    }

    fn policy() -> Policy {
        Policy { buffer_bytes_max: 128 << 20, ..Policy::for_host(1 << 34) }
    }

    #[test]
    fn what_cannot_be_measured_is_unknown_and_the_deadline_known_all_the_same() {
        let unmeasured = || Err(DirtyRateError::Kernel);
        let found = forecast_of(unmeasured(), policy());
        assert_eq!(found.json()["verdict"], "unknown");
        assert_eq!(found.json()["guest"], Value::Null);
        assert!(found.infeasible("").is_none());
        let failure = found.unknown().unwrap();
        assert_eq!((failure.reason, failure.exit_code), (Reason::KernelUnfit, 3));
        let told = found.in_words();
        assert!(told.starts_with("unknown: the dirty rate needs Linux 6.7"), "{told}");
        assert!(told.contains("about 102.4 s") && !told.contains("buffer "), "{told}");

        let deadline = Policy { deadline_ns: Some(60_000_000_000), ..policy() };
        let found = forecast_of(unmeasured(), deadline);
        assert_eq!(found.json()["verdict"], "infeasible");
        assert!(found.unknown().is_none());
        let failure = found.infeasible("").unwrap();
        assert_eq!((failure.reason, failure.exit_code), (Reason::Deadline, 4));
    }

    #[test]
    fn each_verdict_says_what_it_would_take() {
        let said = |mib_per_s| {
            let found = forecast_of(Ok(window(mib_per_s)), policy());
            (found.json()["verdict"].as_str().unwrap().to_owned(), found.in_words())
        };
        let (verdict, text) = said(1.0);
        assert_eq!(verdict, "fits", "{text}");
        let (verdict, text) = said(15.0);
        assert_eq!(verdict, "needs_throttle", "{text}");
        assert!(text.contains("slowed down, at worst to"), "{text}");
        let (verdict, text) = said(90.0);
        assert_eq!(verdict, "uncertain", "{text}");
        assert!(text.contains("--window") && text.contains("--buffer of"), "{text}");
        let (verdict, text) = said(400.0);
        assert_eq!(verdict, "infeasible", "{text}");
        for words in ["in the 2.0 s", "128.0 MiB", "400.0 MiB/s", "10.0 MiB/s", "--buffer of"] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn what_fits_into_the_buffer_as_a_whole_needs_no_forecast() {
        let memory = |stored_error_bytes| Footprint {
            ram_bytes: 1 << 30,
            stored_bytes: 100.0 * MIB,
            stored_error_bytes,
            size_max_bytes: 1 << 30,
        };
        assert!(is_trivial(&memory(20.0 * MIB), &policy()));
        assert!(!is_trivial(&memory(30.0 * MIB), &policy()));
        let deadline = Policy { deadline_ns: Some(1), ..policy() };
        assert!(!is_trivial(&memory(0.0), &deadline));
    }
}
