//! Guest, copy buffer and disk, as bytes that flow.
//!
//! Modelled on the engine: the buffer is a hard bound, at which writes wait; the sweep uses no more than 32 MiB of it; less is
//! captured around a fault the fuller the buffer; a thread that waits gets an extent of 2 MiB, from which it
//! then serves many faults. Pages that nobody touches twice count once: what is saved is not touched for the first
//! time again.
//!
//! A *share* is of what a virtual CPU would have if it were left alone and the buffer had room, as in the policy: what the
//! handling of its faults then costs is not taken from it by anybody.

use std::collections::VecDeque;

use livesnap_control::{AbortReason, WINDOW_S};

use crate::random::Random;
use crate::scenario::{Class, Order, Scenario, bytes, weighted};

/// Length of a step in seconds.
pub const STEP_S: f64 = 0.01;
/// A run that takes longer is stopped, in seconds.
const RUN_S_MAX: f64 = 900.0;
/// Bytes of an extent.
const EXTENT: f64 = (2_u64 << 20) as f64;
/// Most that the sweep uses of the buffer, in bytes.
const SWEEP: f64 = (32_u64 << 20) as f64;
/// Handler's time for a fault, in seconds: what was measured with a spinning handler, and some.
const SERVICE_S: f64 = 30e-6;
/// Bytes captured for a fault that shows no locality while the buffer has room.
const FAULT_BYTES_MAX: f64 = 65536.0;
/// Steps in [`WINDOW_S`].
const WINDOW_STEPS: usize = 100;

/// Durations of stalls: four buckets for each power of two of microseconds.
#[derive(Clone, Debug)]
pub struct Stalls {
    counts: [f64; 128],
}

impl Default for Stalls {
    fn default() -> Self {
        Self { counts: [0.0; 128] }
    }
}

impl Stalls {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "`as` saturates; the bucket is bounded"
    )]
    fn add(&mut self, seconds: f64, count: f64) {
        let bucket = ((seconds * 1e6).max(1.0).log2() * 4.0) as usize;
        self.counts[bucket.min(127)] += count;
    }

    /// Number of stalls.
    #[must_use]
    pub fn count(&self) -> f64 {
        self.counts.iter().sum()
    }

    /// The 99th percentile in seconds, by the upper end of its bucket.
    #[must_use]
    pub fn p99_s(&self) -> f64 {
        let mut above = self.count() / 100.0;
        for (bucket, count) in (0_u32..128).zip(&self.counts).rev() {
            above -= count;
            if above < 0.0 {
                return (f64::from(bucket + 1) / 4.0).exp2() / 1e6;
            }
        }
        0.0
    }
}

/// A part of RAM that is written.
#[derive(Clone, Debug)]
struct Part {
    class: Class,
    unsaved: f64,
    /// Sequential: bytes up to the end of this pass.
    ahead: f64,
}

impl Part {
    /// First touches in the time `work_s` of CPU time, in bytes.
    fn touches(&self, work_s: f64) -> f64 {
        let written = self.class.rate * work_s;
        let touched = match self.class.order {
            Order::Random => self.unsaved * (1.0 - (-written / self.class.bytes).exp()),
            // In the first pass, what is unsaved lies ahead; after it nothing does.
            Order::Sequential => self.unsaved * (written / self.ahead.max(1.0)).min(1.0),
        };
        touched.min(self.unsaved)
    }
}

/// What the law sets.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Share of its time that each virtual CPU gets.
    pub shares: Vec<f64>,
    /// Bound of the buffer in bytes.
    pub limit: f64,
}

/// How a run came out.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Seconds until all was saved, or the end.
    pub copying_s: f64,
    /// Share of their time that virtual CPUs could use, all of them, over that time.
    pub cpu_ratio: f64,
    /// Share of their time that writers lost because the buffer was full, or nearly.
    pub lost_ratio: f64,
    /// When a limit was broken first, in seconds.
    pub broken_at_s: Option<f64>,
    /// 99th percentile of fault stalls in seconds.
    pub stall_p99_s: f64,
    /// Most of the buffer that was in use beyond what the policy allows, in bytes: must be 0.
    pub overrun: f64,
    /// When the law gave up, in seconds, and why.
    pub aborted: Option<(f64, AbortReason)>,
    /// Changes of the throttle's direction by a tenth or more.
    pub reversals: u32,
    /// Lowest share that was set.
    pub share_min: f64,
}

/// The plant.
#[derive(Clone, Debug)]
pub struct Plant<'a> {
    /// What it is an instance of.
    pub scenario: &'a Scenario,
    /// What begins later than this does not happen.
    knows_until_s: f64,
    noise: Random,
    noise_now: (f64, f64),
    /// Time since the consistency point in seconds.
    pub time_s: f64,
    parts: Vec<Part>,
    /// RAM that nobody writes and nobody has saved.
    rest: f64,
    /// Buffer in use, in bytes.
    pub used: f64,
    /// Bytes that came by faults.
    pub touched: f64,
    /// Bytes that the disk took.
    pub drained: f64,
    /// Bytes that each virtual CPU touched first.
    pub vcpu_touched: Vec<f64>,
    /// CPU time that each had, less what a full buffer cost it, in seconds.
    pub vcpu_kept_s: Vec<f64>,
    /// All stalls, and those over the limit.
    pub stalls: Stalls,
    /// Faults that took longer than the policy allows.
    pub over_limit: f64,
    work_s: f64,
    lost_s: f64,
    /// The writers' wait that goes on, in seconds, and the extents that came meanwhile.
    waiting: (f64, f64),
    /// What writers got in each step of the last second.
    window: VecDeque<f64>,
    broken_at_s: Option<f64>,
    overrun: f64,
}

impl<'a> Plant<'a> {
    /// A plant to which everything happens that begins up to `knows_until_s`.
    #[must_use]
    pub fn new(scenario: &'a Scenario, knows_until_s: f64) -> Self {
        // Parts of phases overlap in RAM; together they must not be more than there is.
        let all: f64 = scenario.classes.iter().map(|class| class.bytes).sum();
        let scale = (scenario.ram_bytes / all).min(1.0);
        let parts: Vec<Part> = scenario
            .classes
            .iter()
            .map(|class| {
                let bytes = class.bytes * scale;
                Part { class: Class { bytes, ..class.clone() }, unsaved: bytes, ahead: bytes }
            })
            .collect();
        let written: f64 = parts.iter().map(|part| part.unsaved).sum();
        Self {
            scenario,
            knows_until_s,
            noise: Random::new(scenario.seed, 2),
            noise_now: (1.0, 1.0),
            time_s: 0.0,
            parts,
            rest: (scenario.ram_bytes - written).max(0.0),
            used: 0.0,
            touched: 0.0,
            drained: 0.0,
            vcpu_touched: vec![0.0; scenario.vcpus.len()],
            vcpu_kept_s: vec![0.0; scenario.vcpus.len()],
            stalls: Stalls::default(),
            over_limit: 0.0,
            work_s: 0.0,
            lost_s: 0.0,
            waiting: (0.0, 0.0),
            window: VecDeque::with_capacity(WINDOW_STEPS + 1),
            broken_at_s: None,
            overrun: 0.0,
        }
    }

    /// Bytes that nobody has saved.
    #[must_use]
    pub fn unsaved(&self) -> f64 {
        self.rest + self.parts.iter().map(|part| part.unsaved).sum::<f64>()
    }

    /// Whether all is saved, or the run has lasted too long.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.unsaved() < 1.0 || self.time_s > RUN_S_MAX
    }

    /// When a limit was broken first.
    #[must_use]
    pub const fn broken_at_s(&self) -> Option<f64> {
        self.broken_at_s
    }

    /// Bytes per second that the disk takes now.
    #[must_use]
    pub fn drain_rate(&self) -> f64 {
        let now = |start_s: f64, end_s: f64| {
            start_s <= self.knows_until_s && (start_s..end_s).contains(&self.time_s)
        };
        let ratio: f64 = self
            .scenario
            .events
            .iter()
            .filter(|event| now(event.start_s, event.end_s))
            .map(|event| event.disk_ratio)
            .product();
        self.scenario.disk_rate * ratio * self.noise_now.1
    }

    /// Bytes per second that the guest would touch first now, if it were left alone.
    #[must_use]
    pub fn touch_rate(&self) -> f64 {
        self.touches(STEP_S).map(|(_, touched)| touched).sum::<f64>() / STEP_S
    }

    /// First touches of each part within some CPU time.
    fn touches(&self, work_s: f64) -> impl Iterator<Item = (usize, f64)> {
        let work_s = work_s * self.noise_now.0;
        self.parts
            .iter()
            .enumerate()
            .filter(|(_, part)| self.is_active(&part.class))
            .map(move |(index, part)| (index, part.touches(work_s)))
    }

    fn is_active(&self, class: &Class) -> bool {
        let events = &self.scenario.events;
        let has_begun = class.begins.is_none_or(|index| {
            let event = events[index];
            event.start_s <= self.knows_until_s
                && (event.start_s..event.end_s).contains(&self.time_s)
        });
        let has_ended = class.ends.is_some_and(|index| {
            let event = events[index];
            event.start_s <= self.knows_until_s && event.start_s <= self.time_s
        });
        has_begun && !has_ended
    }

    /// Bytes captured for a fault, by how much of the buffer is free, and without locality.
    fn fault_bytes(&self, limit: f64) -> f64 {
        match (1.0 - self.used / limit) * 100.0 {
            25.0.. => FAULT_BYTES_MAX,
            10.0..25.0 => 16384.0,
            _ => 4096.0,
        }
    }

    /// Share of their time that writers keep beside the handling of their faults.
    fn pace(&self, wanted: f64, fault_bytes: f64) -> f64 {
        let handled_s = wanted / fault_bytes * SERVICE_S / self.writers();
        1.0 / (1.0 + handled_s / STEP_S)
    }

    /// Number of virtual CPUs that write.
    fn writers(&self) -> f64 {
        let count = self.scenario.vcpus.iter().filter(|weight| **weight > 0.0).count();
        f64::from(u32::try_from(count).unwrap_or(1))
    }

    /// Lets [`STEP_S`] pass.
    pub fn step(&mut self, setting: &Setting) {
        let disk_noise = self.scenario.disk_noise;
        self.noise_now = (
            self.noise.between(0.85, 1.15),
            self.noise.between(1.0 - disk_noise, 1.0 + disk_noise),
        );
        let writers = weighted(self.scenario, &setting.shares);
        let limit = setting.limit;
        let disk = self.drain_rate() * STEP_S;

        // What the guest would touch, less what it loses to the handling of faults: that of a guest that is left alone
        // anyway, and more the fuller the buffer, as less is captured for a fault.
        let wanted: f64 = self.touches(writers * STEP_S).map(|(_, touched)| touched).sum();
        let fault_bytes = self.fault_bytes(limit);
        let narrowed = self.pace(wanted, fault_bytes) / self.pace(wanted, FAULT_BYTES_MAX);
        let pace = self.pace(self.touch_rate() * STEP_S, FAULT_BYTES_MAX) * narrowed;
        let demand = wanted * pace;
        // What there is room for, while the disk takes what it can.
        let room = (limit - self.used).max(0.0) + disk.min(self.used + demand);
        let granted = demand.min(room);
        let done = if demand > 0.0 { granted / demand } else { 1.0 };
        self.touch(writers * STEP_S * pace * done, granted);
        self.credit_vcpus(&setting.shares, granted);
        self.record_stalls(granted, fault_bytes, done);

        let mut taken = disk.min(self.used + granted);
        self.used += granted - taken;
        let bound = (limit * 0.75).min(SWEEP);
        let swept = (bound - self.used).max(0.0) + (disk - taken);
        let swept = if self.used < bound { swept.min(self.unsaved()) } else { 0.0 };
        self.sweep(swept);
        let more = (disk - taken).min(swept);
        taken += more;
        self.used += swept - more;
        self.drained += taken;
        self.overrun = self.overrun.max(self.used - bytes(self.scenario.policy.buffer_bytes_max));

        self.time_s += STEP_S;
        let vcpus = self.scenario.vcpus.iter().zip(&setting.shares).zip(&mut self.vcpu_kept_s);
        for ((weight, share), kept_s) in vcpus {
            let (works, keeps) =
                if *weight > 0.0 { (pace * done, narrowed * done) } else { (1.0, 1.0) };
            self.work_s += share * works * STEP_S;
            *kept_s += share * keeps * STEP_S;
        }
        self.lost_s += (1.0 - done * narrowed) * STEP_S;
        self.watch_limits(writers * done * narrowed);
    }

    fn touch(&mut self, work_s: f64, granted: f64) {
        let touches: Vec<(usize, f64)> = self.touches(work_s).collect();
        let all: f64 = touches.iter().map(|(_, touched)| touched).sum();
        // To the byte: what was granted, not what the exponential makes of a part of the time.
        let scale = if all > 0.0 { granted / all } else { 0.0 };
        for (index, touched) in touches {
            let part = &mut self.parts[index];
            part.unsaved = (part.unsaved - touched * scale).max(0.0);
            let written = part.class.rate * work_s * self.noise_now.0;
            part.ahead = (part.ahead - written).max(0.0);
        }
        self.touched += granted;
    }

    /// Each virtual CPU touches in proportion to what it writes and to the share that it has.
    fn credit_vcpus(&mut self, shares: &[f64], granted: f64) {
        let writers = weighted(self.scenario, shares);
        let vcpus = self.scenario.vcpus.iter().zip(shares).zip(&mut self.vcpu_touched);
        for ((weight, share), touched) in vcpus {
            *touched += granted * weight * share / writers;
        }
    }

    /// The sweep takes of every part as much of what is left: parts are spread over RAM.
    fn sweep(&mut self, swept: f64) {
        let all = self.unsaved();
        let keep = if all > 0.0 { 1.0 - (swept / all).min(1.0) } else { 0.0 };
        self.rest *= keep;
        for part in &mut self.parts {
            part.unsaved *= keep;
        }
    }

    fn record_stalls(&mut self, granted: f64, fault_bytes: f64, done: f64) {
        self.stalls.add(SERVICE_S, granted / fault_bytes);
        if done < 1.0 {
            self.waiting.0 += (1.0 - done) * STEP_S;
            self.waiting.1 += granted / EXTENT;
        }
        let (waited_s, extents) = self.waiting;
        if waited_s > 0.0 && (extents >= 1.0 || done >= 1.0) {
            let each_s = waited_s / extents.max(1.0);
            let count = self.writers() * extents.max(1.0);
            self.stalls.add(each_s, count);
            let limit_s = bytes(self.scenario.policy.fault_stall_max_ns) / 1e9;
            if each_s > limit_s {
                self.over_limit += count;
            }
            self.waiting = (0.0, 0.0);
        }
    }

    /// The least share counts in any second, wherever it begins.
    fn watch_limits(&mut self, got: f64) {
        self.window.push_back(got);
        if self.window.len() < WINDOW_STEPS {
            return;
        }
        let sum: f64 = self.window.iter().sum();
        let least = self.scenario.policy.kept_ratio_min() * WINDOW_S;
        if sum * STEP_S < least {
            self.broken_at_s.get_or_insert(self.time_s);
        }
        self.window.pop_front();
    }

    /// The result, once it is over or given up.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        let mut broken_at_s = self.broken_at_s;
        let stall_p99_s = self.stalls.p99_s();
        let policy = &self.scenario.policy;
        let stall_is_over = self.over_limit > self.stalls.count() / 100.0;
        let end_s = self.time_s + self.used / self.drain_rate().max(1.0);
        let is_late =
            policy.deadline_ns.is_some_and(|deadline_ns| end_s > bytes(deadline_ns) / 1e9);
        if stall_is_over || is_late {
            broken_at_s.get_or_insert(self.time_s);
        }
        let vcpus = f64::from(u32::try_from(self.scenario.vcpus.len()).unwrap_or(1));
        Outcome {
            copying_s: self.time_s,
            cpu_ratio: self.work_s / (vcpus * self.time_s.max(STEP_S)),
            lost_ratio: self.lost_s / self.time_s.max(STEP_S),
            broken_at_s,
            stall_p99_s,
            overrun: self.overrun,
            aborted: None,
            reversals: 0,
            share_min: 1.0,
        }
    }
}
