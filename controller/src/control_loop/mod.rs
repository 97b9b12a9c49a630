//! The loop that keeps a snapshot within the operator's limits, while the guest's memory is saved.
//!
//! ```text
//!   Progress ─┐                                         ┌─▶ throttle        share of each virtual CPU
//!   stalls   ─┼─▶ Sample ─▶ Controller::step ─▶ Command ┼─▶ BufferLimit     bound of the copy buffer
//!   cpu.stat ─┤   Vcpu     (livesnap-control)   │       └─▶ Cancel::abort   with forecast and evidence
//!   meminfo  ─┘                                 ▼
//!                                        record, account, progress bar
//! ```
//!
//! It runs on the session's thread, called with each [`Progress`], about twenty times a second; no thread that serves faults
//! waits for it. It begins to act when the guest runs again after the consistency point, and gives everything back as soon as
//! all memory is saved, whatever comes then.

mod account;
mod live;
mod policy;
mod record;
mod state;
mod waits;

use std::time::{Duration, Instant};

use livesnap_control::record::Tick;
use livesnap_control::{Command, Controller, Host, Policy, Sample, Stall, Vcpu};
use procfs::Current as _;
use serde_json::{Value, json};
use snapshot_core::vmm::Vmm as _;
use snapshot_core::vmm::qemu::QemuVmm;
use snapshot_core::{Abort, BufferLimit, Cancel, Phase, Progress, Reason};

use crate::Failure;
use crate::actuator::{Throttle, Used};
use crate::probes::SnapshotProbes;
use crate::units::{as_nanos, number, percent, whole};

pub use account::reason;
use account::{Account, abort_in_words};
pub use live::{Change, Limits, LiveLimits, on_infeasible_schema};
pub use policy::{
    Infeasible, LimitArgs, PolicyArgs, Rule, StateArgs, parse_bandwidth, parse_share,
};
use record::Recorder;
pub use state::State;
use state::{Action, Decisions, Outlook};
use waits::{Waits, has_room};

/// Progress that comes sooner than this after the last decision brings nothing new.
const TICK_MIN: Duration = Duration::from_millis(25);

/// The loop of one snapshot.
pub enum ControlLoop {
    /// Nobody wants it.
    Off,
    /// It acts.
    On(Box<Acting>),
}

/// A loop that acts.
pub struct Acting {
    law: Law,
    limits: LiveLimits,
    /// Nothing if the guest's CPU time cannot be touched; the account says why.
    throttle: Option<Throttle>,
    /// Their ids, by which first touches are told.
    vcpu_ids: Vec<u32>,
    /// What each has done so far.
    vcpus: Vec<Vcpu>,
    waits: Vec<Waits>,
    /// The share of each virtual CPU that was asked for last.
    shares: Vec<f64>,
    buffer_limit: BufferLimit,
    cancel: Cancel,
    recorder: Option<Recorder>,
    began: Instant,
    last: Option<Last>,
    is_over: bool,
    account: Account,
    outlook: Option<Outlook>,
    decisions: Decisions,
}

/// Who decides.
enum Law {
    Fixed(f64),
    Adaptive { controller: Box<Controller>, policy: Policy },
}

/// What there was at the last decision.
struct Last {
    at: Instant,
    stall: Option<Stall>,
}

impl ControlLoop {
    /// A loop for `vmm` by `limits`, also when they change, which moves `buffer_limit` and ends the session by `cancel`.
    ///
    /// # Errors
    /// If the limits make no sense, or the record cannot be written. That the guest's CPU time cannot be touched is no
    /// error but part of the account.
    pub fn new(
        args: &PolicyArgs,
        limits: &LiveLimits,
        vmm: &mut QemuVmm,
        buffer_limit: &BufferLimit,
        cancel: &Cancel,
    ) -> Result<Self, Failure> {
        let rule = limits.rule();
        if rule == Rule::None {
            return Ok(Self::Off);
        }
        let threads = vmm.cpu_threads().map_err(|error| Failure::refused(error.reason(), error))?;
        let law = match rule {
            Rule::Limits(policy) => {
                let controller = Controller::new(policy, threads.len())
                    .map_err(|error| Failure::refused(Reason::BadArgument, error))?;
                Law::Adaptive { controller: Box::new(controller), policy }
            }
            Rule::Fixed(share) => Law::Fixed(share),
            Rule::None => return Ok(Self::Off),
        };
        let recorder = match (&law, args.record()) {
            (Law::Adaptive { policy, .. }, Some(path)) => {
                let created = Recorder::create(path, *policy, threads.len());
                Some(created.map_err(|error| {
                    let text = format!("cannot write the record {}: {error}", path.display());
                    Failure::refused(Reason::BadArgument, text)
                })?)
            }
            _ => None,
        };
        let mut account = Account::default();
        let throttle = match Throttle::find(&args.state.directory(), vmm.pid(), &threads) {
            Ok(throttle) => Some(throttle),
            Err(error) => {
                account.problem = Some(error.to_string());
                None
            }
        };
        Ok(Self::On(Box::new(Acting {
            law,
            limits: limits.clone(),
            throttle,
            vcpu_ids: threads.iter().map(|thread| thread.as_raw_pid().unsigned_abs()).collect(),
            vcpus: vec![Vcpu::default(); threads.len()],
            waits: vec![Waits::default(); threads.len()],
            shares: vec![1.0; threads.len()],
            buffer_limit: buffer_limit.clone(),
            cancel: cancel.clone(),
            recorder,
            began: Instant::now(),
            last: None,
            is_over: false,
            account,
            outlook: None,
            decisions: Decisions::default(),
        })))
    }

    /// Decides and acts.
    pub fn observe(&mut self, progress: &Progress, probes: &SnapshotProbes) {
        let Self::On(acting) = self else { return };
        if progress.phase == Phase::Copying {
            acting.tick(progress, probes);
        } else if progress.phase > Phase::Copying {
            acting.give_back();
        }
    }

    /// For the progress bar.
    pub fn in_brief(&self) -> String {
        match self {
            Self::Off => String::new(),
            Self::On(acting) => acting.in_brief(),
        }
    }

    /// For programs.
    pub fn json(&self) -> Value {
        match self {
            Self::Off => Value::Null,
            Self::On(acting) => json!(acting.account),
        }
    }

    /// What is in force now, for those who follow the snapshot.
    pub fn state(&self) -> Option<State> {
        match self {
            Self::Off => None,
            Self::On(acting) => Some(acting.state()),
        }
    }

    /// For people.
    pub fn row(&self) -> Option<(&'static str, String)> {
        match self {
            Self::Off => None,
            Self::On(acting) => Some(("control", acting.account.in_words())),
        }
    }
}

impl Acting {
    fn tick(&mut self, progress: &Progress, probes: &SnapshotProbes) {
        let now = Instant::now();
        let elapsed = self.last.as_ref().map(|last| now - last.at);
        if self.is_over || elapsed.is_some_and(|elapsed| elapsed < TICK_MIN) {
            return;
        }
        let elapsed = elapsed.unwrap_or_default();
        self.account.count(as_nanos(elapsed), self.cpu_ratio());
        self.account.note_limit(progress.buffer_limit_bytes);
        self.measure(progress, elapsed);
        match &mut self.law {
            Law::Fixed(share) => {
                let share = *share;
                self.shares.fill(share);
                self.last.get_or_insert(Last { at: now, stall: None });
            }
            Law::Adaptive { controller, policy } => {
                let changed = self
                    .limits
                    .take_changed()
                    .filter(|limits| controller.set_policy(*limits).is_ok());
                *policy = changed.unwrap_or(*policy);
                let total = probes.stalls_over(policy.fault_stall_max_ns);
                let before = self.last.as_ref().and_then(|last| last.stall);
                let sample = Sample {
                    taken_ns: as_nanos(now - self.began),
                    age_ns: as_nanos(now.elapsed()),
                    total_bytes: progress.total_bytes,
                    saved_bytes: progress.saved_bytes,
                    touched_bytes: progress.fault_bytes,
                    drained_bytes: progress.drained_bytes,
                    buffer_used_bytes: progress.buffer_used_bytes,
                    buffer_limit_bytes: progress.buffer_limit_bytes,
                    // How many were over another limit before does not matter any more.
                    stall: total
                        .filter(|_| changed.is_none())
                        .map(|total| since(total, before.unwrap_or_default())),
                    host: host(),
                };
                let dt_s = if elapsed.is_zero() {
                    livesnap_control::TICK_S
                } else {
                    elapsed.as_secs_f64()
                };
                let command = controller.step(Some(&sample), &self.vcpus, dt_s);
                self.shares.copy_from_slice(controller.vcpu_shares());
                if let Some(recorder) = &mut self.recorder {
                    let vcpus = self.vcpus.as_slice().into();
                    let shares = self.shares.as_slice().into();
                    let sample = Some(sample);
                    let policy = changed;
                    recorder.tick(&Tick { policy, dt_s, sample, vcpus, command, shares });
                }
                let least = policy.min_cpu_ratio;
                self.last.get_or_insert(Last { at: now, stall: None }).stall = total;
                self.outlook = controller.fit().map(|fit| Outlook::new(&command.forecast, &fit));
                self.follow(&command, least);
            }
        }
        if let Some(last) = &mut self.last {
            last.at = now;
        }
        self.throttle();
        self.account.decisions += 1;
        self.decisions.note(self.action());
    }

    /// Buffer and abort, as commanded.
    fn follow(&mut self, command: &Command, min_cpu_ratio: f64) {
        self.account.forecast = Some(command.forecast);
        if command.buffer_limit_bytes > 0 {
            self.buffer_limit.set_bytes(command.buffer_limit_bytes);
        }
        if let Some(abort) = command.abort {
            self.account.abort = Some(abort);
            let text = abort_in_words(&abort, command, min_cpu_ratio);
            self.cancel.abort(Abort { reason: reason(abort.reason), text });
        }
    }

    /// Puts the shares into force. If that fails the snapshot goes on without.
    fn throttle(&mut self) {
        let Some(throttle) = &mut self.throttle else { return };
        if let Err(error) = throttle.set(&self.shares) {
            self.account.problem = Some(error.to_string());
            self.throttle = None;
        }
    }

    /// The strongest means in force.
    fn action(&self) -> Action {
        if self.account.abort.is_some() {
            Action::Abort
        } else if self.throttle.is_some() && self.shares.iter().any(|&share| share < 1.0) {
            Action::Throttle
        } else if self.account.has_moved_buffer() {
            Action::Buffer
        } else {
            Action::None
        }
    }

    fn state(&self) -> State {
        let is_throttled = self.throttle.is_some();
        let least = self.shares.iter().copied().fold(1.0, f64::min);
        State {
            cpu_ratio_min: if is_throttled { least } else { 1.0 },
            cpu_ratio_mean: self.cpu_ratio(),
            policy: matches!(self.law, Law::Adaptive { .. }).then(|| self.limits.in_force()),
            action: self.action(),
            forecast: self.outlook,
            throttled_seconds: number(self.account.throttled_ns) / 1e9,
            withheld_seconds: number(self.account.withheld_ns) / 1e9,
            decisions: self.decisions,
            problem: self.account.problem.clone(),
        }
    }

    /// The share in force, on an average over virtual CPUs.
    fn cpu_ratio(&self) -> f64 {
        match &self.throttle {
            Some(_) if !self.shares.is_empty() => {
                self.shares.iter().sum::<f64>() / count(self.shares.len())
            }
            _ => 1.0,
        }
    }

    /// Follows what virtual CPUs write, want and get.
    fn measure(&mut self, progress: &Progress, elapsed: Duration) {
        let has_room = has_room(progress.buffer_used_bytes, progress.buffer_limit_bytes);
        let told = |id| progress.first_touches.iter().find(|touch| touch.thread == id);
        let mut lost = Vec::with_capacity(self.vcpus.len());
        for ((id, vcpu), waits) in self.vcpu_ids.iter().zip(&mut self.vcpus).zip(&mut self.waits) {
            let wait_ns = told(*id).map_or(0, |touch| touch.wait_ns);
            vcpu.touched_bytes = told(*id).map_or(0, |touch| touch.bytes);
            lost.push(waits.see(vcpu.touched_bytes, wait_ns, elapsed, has_room));
        }
        let used = self.used(&lost, elapsed);
        for (vcpu, used) in self.vcpus.iter_mut().zip(used) {
            vcpu.wanted_ns += as_nanos(used.wanted);
            vcpu.kept_ns += as_nanos(used.kept);
        }
    }

    /// What virtual CPUs used that have lost so much of `elapsed`: as the kernel tells, or else what they were left.
    fn used(&mut self, lost: &[Duration], elapsed: Duration) -> Vec<Used> {
        if let Some(throttle) = &mut self.throttle {
            let measured = throttle.measure(lost);
            self.account.withheld_ns = throttle.withheld_ns();
            if let Ok(used) = measured {
                return used;
            }
        }
        let is_throttled = self.throttle.is_some();
        let left = self.shares.iter().map(|share| if is_throttled { *share } else { 1.0 });
        left.zip(lost)
            .map(|(share, lost)| Used {
                wanted: elapsed,
                kept: elapsed.mul_f64(share).saturating_sub(*lost),
            })
            .collect()
    }

    /// The end: all is put back, and the record is complete.
    fn give_back(&mut self) {
        if std::mem::replace(&mut self.is_over, true) {
            return;
        }
        if let Some(last) = &self.last {
            let elapsed = last.at.elapsed();
            self.account.count(as_nanos(elapsed), self.cpu_ratio());
            self.used(&vec![Duration::ZERO; self.vcpus.len()], elapsed);
        }
        if let Some(mut throttle) = self.throttle.take()
            && let Err(error) = throttle.restore()
        {
            let text = format!("{error}; `livesnap doctor --repair` tries again");
            self.account.problem = Some(text);
        }
        if let Some(Err((path, error))) = self.recorder.take().map(Recorder::end) {
            let text = format!("the record {} is not complete: {error}", path.display());
            self.account.problem.get_or_insert(text);
        }
    }

    fn in_brief(&self) -> String {
        let forecast = self.account.forecast.as_ref();
        in_brief(
            self.cpu_ratio(),
            forecast.map(|forecast| (forecast.peak_buffer_bytes, forecast.completion_after_s)),
        )
    }
}

/// What a guest is left, and what is forecast (bytes of the buffer, seconds until the end), for the progress bar.
pub fn in_brief(cpu_ratio: f64, forecast: Option<(f64, Option<f64>)>) -> String {
    let mut text = format!("  guest CPU {}", percent(cpu_ratio));
    if let Some((peak_buffer_bytes, seconds)) = forecast {
        let peak = crate::output::bytes(whole(peak_buffer_bytes));
        text.push_str(&format!("  forecast {peak} of buffer"));
        if let Some(seconds) = seconds {
            text.push_str(&format!(", {seconds:.0} s"));
        }
    }
    text
}

/// What came after `before`.
const fn since(now: Stall, before: Stall) -> Stall {
    Stall {
        faults: now.faults.saturating_sub(before.faults),
        over_limit: now.over_limit.saturating_sub(before.over_limit),
        lost_events: now.lost_events.saturating_sub(before.lost_events),
    }
}

/// The host's memory; nothing where the kernel does not tell how much there is.
fn host() -> Option<Host> {
    let available_bytes = procfs::Meminfo::current().ok()?.mem_available?;
    // Kernels without pressure information have none to tell.
    let pressure = procfs::MemoryPressure::current().map_or(0.0, |memory| memory.some.avg10);
    Some(Host { available_bytes, memory_pressure_ratio: f64::from(pressure) / 100.0 })
}

#[expect(clippy::cast_precision_loss, reason = "virtual CPUs are counted by thousands at most")]
const fn count(number: usize) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::in_brief;

    #[test]
    fn the_progress_bar_has_the_share_in_force_and_the_forecast() {
        assert_eq!(in_brief(1.0, None), "  guest CPU 100 %");
        let peak = f64::from(48 << 20);
        let told = "  guest CPU 30 %  forecast 48.0 MiB of buffer";
        assert_eq!(in_brief(0.3, Some((peak, None))), told);
        assert_eq!(in_brief(0.3, Some((peak, Some(12.3)))), format!("{told}, 12 s"));
    }
}
