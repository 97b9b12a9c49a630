//! The daemon's metrics: every series that it exports is made and counted here, by what `livesnap-metrics` says of it.
//!
//! ```text
//!   supervisor ──changes of operations──▶ Observer ─┐
//!   HTTP ──────routes, codes, durations─────────────┼─▶ families ──▶ text ──▶ GET /metrics
//!   vms ───────what is left in them─────────────────┤
//!   host ──────memory, pressure, destinations───────┘
//! ```
//!
//! A snapshot's process tells counts and histograms since its own beginning. What they have grown by is added, so the
//! series grow across snapshots, and what the kernel has put into buckets is never observed anew: the edges of our
//! buckets are edges of the probes' own.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use livesnap_metrics::{self as catalogue, Metric, label, outcomes_and_reasons};
use procfs::Current as _;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{self, MetricFamily, MetricType};
use prometheus::{CounterVec, GaugeVec, HistogramOpts, HistogramVec, Opts, Registry, TextEncoder};
use serde::Deserialize;
use serde_json::Value;

use super::look::Seen;
use super::operation::{Observer, Operation, Progress, State, time};
use super::schedule::Schedule;
use crate::units::number;

/// All metrics. Clones share them.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

struct Inner {
    registry: Registry,
    families: Families,
    /// Below which snapshots may lie.
    roots: Vec<PathBuf>,
    schedules: Vec<Schedule>,
    seen: Mutex<Known>,
}

/// What has to be remembered between two changes.
#[derive(Default)]
struct Known {
    /// Machines whose series are there.
    vms: Vec<String>,
    /// Operations that have not ended: of which machine, and where they are.
    unfinished: HashMap<String, (String, State)>,
}

struct Families {
    http: HistogramVec,
    snapshots: CounterVec,
    snapshot_duration: HistogramVec,
    downtime: HistogramVec,
    last_success: GaugeVec,
    last_start: GaugeVec,
    last_end: GaugeVec,
    last_succeeded: GaugeVec,
    last_duration: GaugeVec,
    last_downtime_part: GaugeVec,
    last_stored: GaugeVec,
    last_buffer_peak: GaugeVec,
    last_throttled: GaugeVec,
    schedule_interval: GaugeVec,
    registered: GaugeVec,
    verify_failures: CounterVec,
    queued: GaugeVec,
    in_progress: GaugeVec,
    phase: GaugeVec,
    ram: GaugeVec,
    remaining: GaugeVec,
    captured: CounterVec,
    stored: CounterVec,
    first_touch: CounterVec,
    dirty_rate: GaugeVec,
    buffer_used: GaugeVec,
    buffer_limit: GaugeVec,
    drain_rate: GaugeVec,
    protected: GaugeVec,
    fault_stall: Distributions,
    fault_service: Distributions,
    throttle: GaugeVec,
    throttled: CounterVec,
    decisions: CounterVec,
    forecast_peak: GaugeVec,
    forecast_completion: GaugeVec,
    policy_buffer: GaugeVec,
    policy_stall: GaugeVec,
    policy_cpu: GaugeVec,
    policy_deadline: GaugeVec,
    probe_attached: GaugeVec,
    probe_lost: CounterVec,
    disk_write_latency: Distributions,
    destination_free: GaugeVec,
    destination_size: GaugeVec,
    host_memory_available: GaugeVec,
    host_pressure: CounterVec,
}

/// Registers what the catalogue describes.
struct Registrar<'a>(&'a Registry);

type Registered<T> = Result<T, prometheus::Error>;

impl Registrar<'_> {
    fn put<C: Collector + Clone + 'static>(&self, collector: C) -> Registered<C> {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn counter(&self, metric: &Metric) -> Registered<CounterVec> {
        self.put(CounterVec::new(Opts::new(metric.name, metric.help), &names(metric))?)
    }

    fn gauge(&self, metric: &Metric) -> Registered<GaugeVec> {
        self.put(GaugeVec::new(Opts::new(metric.name, metric.help), &names(metric))?)
    }

    fn histogram(&self, metric: &Metric) -> Registered<HistogramVec> {
        let options = HistogramOpts::new(metric.name, metric.help);
        let options = options.buckets(metric.bucket_edges().to_vec());
        self.put(HistogramVec::new(options, &names(metric))?)
    }

    fn distributions(&self, metric: &'static Metric) -> Registered<Distributions> {
        self.put(Distributions::new(metric)?)
    }
}

fn names(metric: &Metric) -> Vec<&'static str> {
    metric.label_names().collect()
}

impl Families {
    fn register(registry: &Registry) -> Registered<Self> {
        let make = Registrar(registry);
        Ok(Self {
            http: make.histogram(&catalogue::HTTP_REQUEST_DURATION)?,
            snapshots: make.counter(&catalogue::SNAPSHOTS)?,
            snapshot_duration: make.histogram(&catalogue::SNAPSHOT_DURATION)?,
            downtime: make.histogram(&catalogue::DOWNTIME)?,
            last_success: make.gauge(&catalogue::LAST_SUCCESS)?,
            last_start: make.gauge(&catalogue::LAST_START)?,
            last_end: make.gauge(&catalogue::LAST_END)?,
            last_succeeded: make.gauge(&catalogue::LAST_SUCCEEDED)?,
            last_duration: make.gauge(&catalogue::LAST_DURATION)?,
            last_downtime_part: make.gauge(&catalogue::LAST_DOWNTIME_PART)?,
            last_stored: make.gauge(&catalogue::LAST_STORED)?,
            last_buffer_peak: make.gauge(&catalogue::LAST_BUFFER_PEAK)?,
            last_throttled: make.gauge(&catalogue::LAST_THROTTLED)?,
            schedule_interval: make.gauge(&catalogue::SCHEDULE_INTERVAL)?,
            registered: make.gauge(&catalogue::REGISTERED)?,
            verify_failures: make.counter(&catalogue::VERIFY_FAILURES)?,
            queued: make.gauge(&catalogue::QUEUED)?,
            in_progress: make.gauge(&catalogue::IN_PROGRESS)?,
            phase: make.gauge(&catalogue::PHASE)?,
            ram: make.gauge(&catalogue::RAM)?,
            remaining: make.gauge(&catalogue::REMAINING)?,
            captured: make.counter(&catalogue::CAPTURED)?,
            stored: make.counter(&catalogue::STORED)?,
            first_touch: make.counter(&catalogue::FIRST_TOUCH)?,
            dirty_rate: make.gauge(&catalogue::DIRTY_RATE)?,
            buffer_used: make.gauge(&catalogue::BUFFER_USED)?,
            buffer_limit: make.gauge(&catalogue::BUFFER_LIMIT)?,
            drain_rate: make.gauge(&catalogue::DRAIN_RATE)?,
            protected: make.gauge(&catalogue::PROTECTED)?,
            fault_stall: make.distributions(&catalogue::FAULT_STALL)?,
            fault_service: make.distributions(&catalogue::FAULT_SERVICE)?,
            throttle: make.gauge(&catalogue::THROTTLE)?,
            throttled: make.counter(&catalogue::THROTTLED)?,
            decisions: make.counter(&catalogue::DECISIONS)?,
            forecast_peak: make.gauge(&catalogue::FORECAST_PEAK)?,
            forecast_completion: make.gauge(&catalogue::FORECAST_COMPLETION)?,
            policy_buffer: make.gauge(&catalogue::POLICY_BUFFER)?,
            policy_stall: make.gauge(&catalogue::POLICY_STALL)?,
            policy_cpu: make.gauge(&catalogue::POLICY_CPU)?,
            policy_deadline: make.gauge(&catalogue::POLICY_DEADLINE)?,
            probe_attached: make.gauge(&catalogue::PROBE_ATTACHED)?,
            probe_lost: make.counter(&catalogue::PROBE_LOST)?,
            disk_write_latency: make.distributions(&catalogue::DISK_WRITE_LATENCY)?,
            destination_free: make.gauge(&catalogue::DESTINATION_FREE)?,
            destination_size: make.gauge(&catalogue::DESTINATION_SIZE)?,
            host_memory_available: make.gauge(&catalogue::HOST_MEMORY_AVAILABLE)?,
            host_pressure: make.counter(&catalogue::HOST_PRESSURE)?,
        })
    }

    /// Series that are there before anything happens: of one that is born at 1, `increase()` sees nothing.
    fn begin_host(&self) {
        for probe in ["stall", "disk"] {
            self.probe_lost.with_label_values(&[probe]);
            self.set_tier(probe, None);
        }
        for issuer in label::ISSUERS {
            self.disk_write_latency.add(issuer, &Durations::default(), &Durations::default());
        }
        self.queued.with_label_values::<&str>(&[]).set(0.0);
    }

    /// The same for a virtual machine.
    fn begin_vm(&self, vm: &str) {
        for (outcome, reason) in outcomes_and_reasons() {
            self.snapshots.with_label_values(&[vm, outcome, reason]);
        }
        for histogram in [&self.snapshot_duration, &self.downtime] {
            histogram.with_label_values(&[vm]);
        }
        for path in ["fault", "sweep"] {
            self.captured.with_label_values(&[vm, path]);
        }
        for action in label::ACTIONS {
            self.decisions.with_label_values(&[vm, action]);
        }
        for counter in [&self.verify_failures, &self.stored, &self.first_touch, &self.throttled] {
            counter.with_label_values(&[vm]);
        }
        for distributions in [&self.fault_stall, &self.fault_service] {
            distributions.add(vm, &Durations::default(), &Durations::default());
        }
        for gauge in [&self.last_success, &self.last_start, &self.last_end, &self.last_succeeded] {
            gauge.with_label_values(&[vm]);
        }
        self.ram.with_label_values(&[vm]);
        self.registered.with_label_values(&[vm]).set(unix_seconds(SystemTime::now()));
        self.set_idle(vm);
    }

    /// No snapshot of `vm` runs.
    fn set_idle(&self, vm: &str) {
        for gauge in [
            &self.in_progress,
            &self.remaining,
            &self.buffer_used,
            &self.buffer_limit,
            &self.drain_rate,
            &self.forecast_peak,
            &self.forecast_completion,
        ] {
            gauge.with_label_values(&[vm]).set(0.0);
        }
        // Nobody sees them, so 0 would be wrong. There was none before either, if this fails.
        let _ = self.dirty_rate.remove_label_values(&[vm, "first_touch"]);
    }

    /// What is left in `vm` while no snapshot of it runs.
    fn set_left(&self, vm: &str, protected_bytes: Option<u64>, throttle_ratio: Option<f64>) {
        set_known(&self.protected, vm, protected_bytes.map(number));
        set_known(&self.throttle, vm, throttle_ratio);
    }

    /// Where the snapshot of `vm` is; nothing if none was asked for.
    fn set_phase(&self, vm: &str, state: Option<State>) {
        for phase in label::PHASES {
            let is_in_it = state.is_some_and(|state| state.as_str() == phase);
            self.phase.with_label_values(&[vm, phase]).set(truth(is_in_it));
        }
        let runs = state.is_some_and(State::is_running);
        self.in_progress.with_label_values(&[vm]).set(truth(runs));
    }

    /// How `probe` was attached.
    fn set_tier(&self, probe: &str, attached: Option<&str>) {
        if let catalogue::Values::Closed(tiers) = label::TIER.values {
            for tier in tiers {
                let is_it = attached == Some(tier);
                self.probe_attached.with_label_values(&[probe, tier]).set(truth(is_it));
            }
        }
    }

    /// What a running snapshot has come to since `before`.
    fn note_progress(&self, vm: &str, state: State, before: &Progress, now: &Progress) {
        let grown = |count: fn(&Progress) -> u64| number(count(now).saturating_sub(count(before)));
        let swept = |progress: &Progress| progress.saved_bytes.saturating_sub(progress.fault_bytes);
        let touched = |progress: &Progress| {
            progress.first_touches.iter().map(|touch| touch.bytes).sum::<u64>()
        };
        self.captured.with_label_values(&[vm, "fault"]).inc_by(grown(|now| now.fault_bytes));
        self.captured.with_label_values(&[vm, "sweep"]).inc_by(grown(swept));
        self.stored.with_label_values(&[vm]).inc_by(grown(|now| now.written_bytes));
        self.first_touch.with_label_values(&[vm]).inc_by(grown(touched));

        let set = |gauge: &GaugeVec, value: f64| gauge.with_label_values(&[vm]).set(value);
        set(&self.ram, number(now.total_bytes));
        set(&self.remaining, number(now.remaining_bytes));
        set(&self.buffer_used, number(now.buffer_used_bytes));
        set(&self.buffer_limit, number(now.buffer_limit_bytes));
        let is_protected = matches!(state, State::Arming | State::Frozen | State::Copying);
        set(&self.protected, if is_protected { number(now.remaining_bytes) } else { 0.0 });

        self.note_control(vm, &part(&before.control), &part(&now.control));
        self.fault_service.add(vm, &part(&before.service), &part(&now.service));
        let (then, stalls) = (part::<Probe>(&before.stalls), part::<Probe>(&now.stalls));
        self.fault_stall.add(vm, &then.durations, &stalls.durations);
        self.note_probe("stall", &then, &stalls);
        let (then, disk) = (part::<Disk>(&before.disk_writes), part::<Disk>(&now.disk_writes));
        self.disk_write_latency.add("livesnap", &then.livesnap, &disk.livesnap);
        self.disk_write_latency.add("others", &then.others, &disk.others);
        self.note_probe("disk", &then.probe, &disk.probe);
    }

    fn note_probe(&self, probe: &str, before: &Probe, now: &Probe) {
        if let Some(tier) = &now.tier {
            self.set_tier(probe, Some(tier));
        }
        let lost = number(now.lost.saturating_sub(before.lost));
        self.probe_lost.with_label_values(&[probe]).inc_by(lost);
    }

    fn note_control(&self, vm: &str, before: &Control, now: &Control) {
        let set = |gauge: &GaugeVec, value: f64| gauge.with_label_values(&[vm]).set(value);
        set(&self.throttle, 1.0 - now.cpu_ratio_mean.unwrap_or(1.0));
        let withheld = (now.withheld_seconds - before.withheld_seconds).max(0.0);
        self.throttled.with_label_values(&[vm]).inc_by(withheld);
        for action in label::ACTIONS {
            let count = |control: &Control| control.decisions.get(action).copied().unwrap_or(0);
            let more = number(count(now).saturating_sub(count(before)));
            self.decisions.with_label_values(&[vm, action]).inc_by(more);
        }
        if let Some(forecast) = &now.forecast {
            set(&self.drain_rate, forecast.drain_bytes_per_second);
            set(&self.forecast_peak, forecast.peak_buffer_bytes);
            set(&self.forecast_completion, forecast.completion_seconds.unwrap_or(f64::INFINITY));
            let touched = forecast.first_touch_bytes_per_second;
            self.dirty_rate.with_label_values(&[vm, "first_touch"]).set(touched);
        }
        if let Some(policy) = &now.policy {
            set(&self.policy_buffer, policy.buffer_bytes);
            set(&self.policy_stall, policy.stall_limit_seconds);
            set(&self.policy_cpu, policy.min_cpu_ratio);
            set_known(&self.policy_deadline, vm, policy.deadline_seconds);
        }
    }

    /// When the last snapshot began.
    fn note_begin(&self, operation: &Operation) {
        if let Some(begun) = operation.started_at.as_deref().and_then(time) {
            self.last_start.with_label_values(&[&operation.vm]).set(unix_seconds(begun));
        }
    }

    /// When the last snapshot that has ended was taken, and whether it was completed.
    fn note_last(&self, operation: &Operation) {
        self.note_begin(operation);
        let set = |gauge: &GaugeVec, value| gauge.with_label_values(&[&operation.vm]).set(value);
        set(&self.last_succeeded, truth(operation.state == State::Completed));
        let at = |text: &Option<String>| text.as_deref().and_then(time);
        let Some(ended) = at(&operation.ended_at) else { return };
        set(&self.last_end, unix_seconds(ended));
        let begun = at(&operation.started_at).unwrap_or(ended);
        set(&self.last_duration, ended.duration_since(begun).unwrap_or_default().as_secs_f64());
    }

    /// How a snapshot ended.
    fn note_end(&self, operation: &Operation) {
        let vm = operation.vm.as_str();
        let is_completed = operation.state == State::Completed;
        let reason = match &operation.error {
            _ if is_completed => label::NO_REASON,
            Some(error) => error.reason.as_str(),
            None => snapshot_core::Reason::Internal.as_str(),
        };
        let outcome = catalogue::outcome_of(reason);
        self.snapshots.with_label_values(&[vm, outcome, reason]).inc();
        let set = |gauge: &GaugeVec, value: f64| gauge.with_label_values(&[vm]).set(value);
        self.note_last(operation);
        let result = operation.result.as_ref().unwrap_or(&Value::Null);
        let figure = |pointer: &str| result.pointer(pointer).and_then(Value::as_f64);
        set(&self.last_throttled, figure("/control/withheld_ns").unwrap_or(0.0) / 1e9);
        for (probe, pointer) in [("stall", "/probes/tier"), ("disk", "/disk/tier")] {
            if result.get("report").is_some() {
                self.set_tier(probe, result.pointer(pointer).and_then(Value::as_str));
            }
        }
        if !is_completed {
            return;
        }
        self.note_success(operation);
        let seconds = |pointer: &str| figure(pointer).unwrap_or(0.0) / 1e9;
        self.snapshot_duration.with_label_values(&[vm]).observe(seconds("/report/total_ns"));
        self.downtime.with_label_values(&[vm]).observe(seconds("/report/downtime/total_ns"));
        if let catalogue::Values::Closed(parts) = label::PART.values {
            for part in parts {
                let took = seconds(&format!("/report/downtime/{part}_ns"));
                self.last_downtime_part.with_label_values(&[vm, part]).set(took);
            }
        }
        set(&self.last_stored, figure("/report/stored_bytes").unwrap_or(0.0));
        set(&self.last_buffer_peak, figure("/report/buffer_peak_bytes").unwrap_or(0.0));
    }

    /// When the last good snapshot was completed, if this is one.
    fn note_success(&self, operation: &Operation) {
        let ended = operation.ended_at.as_deref().and_then(time);
        if let Some(ended) = ended.filter(|_| operation.is_good()) {
            let series = self.last_success.with_label_values(&[&operation.vm]);
            series.set(series.get().max(unix_seconds(ended)));
        }
    }

    /// What was found of a completed snapshot.
    fn note_verified(&self, operation: &Operation) {
        self.note_success(operation);
        let error = operation.verification.as_ref().and_then(|found| found.error.as_ref());
        // The snapshot is not to blame for what livesnap itself failed at.
        if error.is_some_and(|error| error.reason != snapshot_core::Reason::Internal) {
            self.verify_failures.with_label_values(&[&operation.vm]).inc();
        }
    }

    /// Looks at the host.
    fn note_host(&self, roots: &[PathBuf]) {
        for root in roots {
            let Ok(found) = rustix::fs::statvfs(root) else { continue };
            let root = root.display().to_string();
            let bytes = |blocks: u64| number(blocks.saturating_mul(found.f_frsize));
            self.destination_free.with_label_values(&[&root]).set(bytes(found.f_bavail));
            self.destination_size.with_label_values(&[&root]).set(bytes(found.f_blocks));
        }
        if let Some(bytes) = procfs::Meminfo::current().ok().and_then(|memory| memory.mem_available)
        {
            self.host_memory_available.with_label_values::<&str>(&[]).set(number(bytes));
        }
        let raise = |resource: &str, kind: &str, total_us: u64| {
            let series = self.host_pressure.with_label_values(&[resource, kind]);
            series.inc_by((number(total_us) / 1e6 - series.get()).max(0.0));
        };
        // Kernels without pressure information have none to tell.
        if let Ok(cpu) = procfs::CpuPressure::current() {
            raise("cpu", "some", cpu.some.total);
        }
        if let Ok(io) = procfs::IoPressure::current() {
            raise("io", "some", io.some.total);
            raise("io", "full", io.full.total);
        }
        if let Ok(memory) = procfs::MemoryPressure::current() {
            raise("memory", "some", memory.some.total);
            raise("memory", "full", memory.full.total);
        }
    }
}

impl Metrics {
    /// Of a daemon whose snapshots lie below `roots`; `earlier` operations, the oldest first, tell when the last
    /// snapshots were.
    ///
    /// # Errors
    /// If the catalogue makes no sense.
    pub fn new<'a>(
        roots: Vec<PathBuf>,
        schedules: &[Schedule],
        earlier: impl Iterator<Item = &'a Operation>,
    ) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let families = Families::register(&registry)?;
        let build = Registrar(&registry).gauge(&catalogue::BUILD_INFO)?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        families.begin_host();
        let metrics = Self(Arc::new(Inner {
            registry,
            families,
            roots,
            schedules: schedules.to_vec(),
            seen: Mutex::default(),
        }));
        for operation in earlier.filter(|operation| operation.state.is_final()) {
            if operation.state == State::Completed {
                metrics.register(&operation.vm);
            }
            metrics.0.families.note_last(operation);
            metrics.0.families.note_success(operation);
        }
        Ok(metrics)
    }

    /// Makes the series of a virtual machine, if they are not there.
    pub fn register(&self, vm: &str) {
        let mut seen = self.seen();
        if !seen.vms.iter().any(|known| known == vm) {
            seen.vms.push(vm.to_owned());
            self.0.families.begin_vm(vm);
            self.0.families.set_phase(vm, None);
            let own = self.0.schedules.iter().filter(|schedule| schedule.is_for(vm));
            if let Some(every) = own.map(|schedule| schedule.every).min() {
                let series = self.0.families.schedule_interval.with_label_values(&[vm]);
                series.set(every.as_secs_f64());
            }
        }
    }

    /// Notes what a look at a virtual machine has found while no snapshot of it ran: nothing may be left of any.
    pub fn looked(&self, vm: &str, found: &Seen) {
        let seen = self.seen();
        let runs = |(of, state): &(String, State)| of == vm && state.is_running();
        // One may have begun meanwhile, and tells more.
        if !seen.unfinished.values().any(runs) {
            self.0.families.set_left(vm, found.protected_bytes, found.throttle_ratio);
        }
    }

    /// Counts an answer of the HTTP interface.
    pub fn answered(&self, route: &str, code: u16, took: Duration) {
        let route = label::ROUTES.into_iter().find(|known| *known == route).unwrap_or("other");
        let series = self.0.families.http.with_label_values(&[route, &code.to_string()]);
        series.observe(took.as_secs_f64());
    }

    /// All series, as Prometheus reads them. Looks at the host, so it may wait for a disk.
    ///
    /// # Errors
    /// If they do not fit together.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        self.0.families.note_host(&self.0.roots);
        TextEncoder::new().encode_to_string(&self.0.registry.gather())
    }

    fn seen(&self) -> MutexGuard<'_, Known> {
        self.0.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes where an operation is.
    fn note_state(&self, operation: &Operation) {
        let mut seen = self.seen();
        let Operation { id, vm, state, .. } = operation;
        let before = if state.is_final() {
            seen.unfinished.remove(id)
        } else {
            seen.unfinished.insert(id.clone(), (vm.clone(), *state))
        };
        let ran = before.is_some_and(|(_, before)| before.is_running());
        if state.is_running() && !ran {
            self.0.families.note_begin(operation);
        }
        if state.is_final() && ran {
            // What it has left will be known when somebody has looked.
            self.0.families.set_left(vm, None, None);
        }
        self.show_foremost(&seen, vm);
    }

    /// Shows what waits, and how far the foremost operation of a machine is.
    fn show_foremost(&self, seen: &Known, vm: &str) {
        let families = &self.0.families;
        let queued = seen.unfinished.values().filter(|(_, state)| *state == State::Queued).count();
        families.queued.with_label_values::<&str>(&[]).set(number(queued as u64));
        let own = seen.unfinished.values().filter(|(of, _)| of == vm).map(|(_, state)| *state);
        let foremost = own.max_by_key(|state| state.is_running());
        families.set_phase(vm, foremost);
        if !foremost.is_some_and(State::is_running) {
            families.set_idle(vm);
        }
    }

    /// An operation is no more: one that has ended was counted, one that could not be kept never was.
    fn forget(&self, operation: &Operation) {
        let mut seen = self.seen();
        if seen.unfinished.remove(&operation.id).is_some() {
            self.show_foremost(&seen, &operation.vm);
        }
    }
}

impl Observer for Metrics {
    fn changed(&mut self, before: Option<&Operation>, now: Option<&Operation>) {
        let Some(now) = now else {
            if let Some(before) = before {
                self.forget(before);
            }
            return;
        };
        self.register(&now.vm);
        let families = &self.0.families;
        if let Some(before) = before.filter(|before| before.state.is_final()) {
            if before.verification != now.verification {
                families.note_verified(now);
            }
            return;
        }
        if let Some(progress) = &now.progress {
            let earlier = before.and_then(|before| before.progress.as_ref());
            let none = Progress::default();
            families.note_progress(&now.vm, now.state, earlier.unwrap_or(&none), progress);
        }
        let sampled = |operation: &Operation| {
            operation.forecast.as_ref()?.pointer("/guest/bytes_per_second")?.as_f64()
        };
        if let Some(rate) = sampled(now) {
            families.dirty_rate.with_label_values(&[&now.vm, "sample"]).set(rate);
        }
        self.note_state(now);
        if now.state.is_final() {
            families.note_end(now);
        }
    }
}

/// What the controller tells, as far as it is of use here.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Control {
    cpu_ratio_mean: Option<f64>,
    withheld_seconds: f64,
    decisions: BTreeMap<String, u64>,
    forecast: Option<Forecast>,
    policy: Option<Policy>,
}

#[derive(Default, Deserialize)]
struct Forecast {
    completion_seconds: Option<f64>,
    peak_buffer_bytes: f64,
    first_touch_bytes_per_second: f64,
    drain_bytes_per_second: f64,
}

#[derive(Default, Deserialize)]
struct Policy {
    buffer_bytes: f64,
    stall_limit_seconds: f64,
    min_cpu_ratio: f64,
    deadline_seconds: Option<f64>,
}

/// A probe's durations.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Probe {
    tier: Option<String>,
    lost: u64,
    #[serde(flatten)]
    durations: Durations,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Disk {
    #[serde(flatten)]
    probe: Probe,
    livesnap: Durations,
    others: Durations,
}

/// Durations since a process's beginning.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Durations {
    sum_ns: u64,
    /// The longest duration of a bucket in nanoseconds, and how many lie in it.
    buckets: Vec<(u64, u64)>,
}

/// Reads a part of what a process tells; nothing of one that is not there, or is of another version.
fn part<T: Default + serde::de::DeserializeOwned>(value: &Option<Value>) -> T {
    value.as_ref().and_then(|value| T::deserialize(value).ok()).unwrap_or_default()
}

/// Histograms that grow by what others have counted, one for each value of a label.
#[derive(Clone)]
struct Distributions {
    metric: &'static Metric,
    desc: Arc<Desc>,
    series: Arc<Mutex<BTreeMap<String, Counts>>>,
}

struct Counts {
    /// In each bucket alone, the last one without an edge.
    buckets: Vec<u64>,
    sum_ns: u64,
}

impl Distributions {
    fn new(metric: &'static Metric) -> Registered<Self> {
        let labels = metric.label_names().map(str::to_owned).collect();
        let desc = Desc::new(metric.name.into(), metric.help.into(), labels, HashMap::default())?;
        Ok(Self { metric, desc: Arc::new(desc), series: Arc::default() })
    }

    /// Adds what `now` has more than `before`.
    fn add(&self, value: &str, before: &Durations, now: &Durations) {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let edges = self.metric.bucket_edges();
        let counts = series
            .entry(value.to_owned())
            .or_insert_with(|| Counts { buckets: vec![0; edges.len() + 1], sum_ns: 0 });
        counts.sum_ns += now.sum_ns.saturating_sub(before.sum_ns);
        let known: HashMap<u64, u64> = before.buckets.iter().copied().collect();
        for (longest_ns, count) in &now.buckets {
            let more = count.saturating_sub(known.get(longest_ns).copied().unwrap_or(0));
            let longest_s = number(*longest_ns) / 1e9;
            counts.buckets[edges.partition_point(|edge| *edge < longest_s)] += more;
        }
    }
}

impl Collector for Distributions {
    fn desc(&self) -> Vec<&Desc> {
        vec![self.desc.as_ref()]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let metrics = series.iter().map(|(value, counts)| {
            let mut histogram = proto::Histogram::default();
            let mut so_far = 0;
            let edges = self.metric.bucket_edges().iter();
            let buckets = edges.zip(&counts.buckets).map(|(edge, count)| {
                so_far += count;
                let mut bucket = proto::Bucket::default();
                bucket.set_upper_bound(*edge);
                bucket.set_cumulative_count(so_far);
                bucket
            });
            histogram.set_bucket(buckets.collect());
            histogram.set_sample_count(counts.buckets.iter().sum());
            histogram.set_sample_sum(number(counts.sum_ns) / 1e9);
            let mut pair = proto::LabelPair::default();
            pair.set_name(self.metric.label_names().next().unwrap_or_default().into());
            pair.set_value(value.clone());
            let mut metric = proto::Metric::from_label(vec![pair]);
            metric.set_histogram(histogram);
            metric
        });
        let mut family = MetricFamily::default();
        family.set_name(self.metric.name.into());
        family.set_help(self.metric.help.into());
        family.set_field_type(MetricType::HISTOGRAM);
        family.set_metric(metrics.collect());
        vec![family]
    }
}

/// Shows what is known of `vm`, and no series if nothing is.
fn set_known(gauge: &GaugeVec, vm: &str, value: Option<f64>) {
    match value {
        Some(value) => gauge.with_label_values(&[vm]).set(value),
        // There was none before either, if this fails.
        None => drop(gauge.remove_label_values(&[vm])),
    }
}

fn truth(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests;
