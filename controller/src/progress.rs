//! A running snapshot as a line on the terminal, and a finished one as a report.

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use snapshot_core::{Phase, Progress, Report};

use crate::output;

/// A line on standard error that shows phase, percent, rates, buffer and stall. Shows nothing where that is no
/// terminal.
pub struct Bar {
    bar: ProgressBar,
    /// When copying began.
    copying_since: Option<Instant>,
    faults: Rate,
    first_touch_bytes: Rate,
}

impl Bar {
    /// Nothing shown yet.
    pub fn new() -> Self {
        let bar = if std::io::stderr().is_terminal() {
            ProgressBar::new(1)
        } else {
            ProgressBar::hidden()
        };
        let style = ProgressStyle::with_template("{prefix:>10} [{bar:24}] {percent:>3}% {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self {
            bar,
            copying_since: None,
            faults: Rate::default(),
            first_touch_bytes: Rate::default(),
        }
    }

    /// Whether anybody sees it.
    pub fn is_seen(&self) -> bool {
        !self.bar.is_hidden()
    }

    /// Shows `progress`, with what is to be said `more`.
    pub fn show(&mut self, progress: &Progress, more: &str) {
        // The guest stands still: no time for a terminal.
        if progress.phase == Phase::Frozen && progress.is_consistent {
            return;
        }
        self.bar.set_prefix(progress.phase.as_str());
        if progress.phase < Phase::Copying || progress.phase > Phase::Committing {
            self.bar.tick();
            return;
        }
        let since = *self.copying_since.get_or_insert_with(Instant::now);
        self.bar.set_length(progress.total_bytes.max(1));
        self.bar.set_position(progress.saved_bytes);
        let fill = progress.buffer_used_bytes * 100 / progress.buffer_limit_bytes.max(1);
        let (now, touched) =
            (Instant::now(), progress.first_touches.iter().map(|touch| touch.bytes).sum());
        self.bar.set_message(format!(
            "{}  buffer {fill}%  {} faults, {}/s  first touch {}/s  stall p99 {}{more}",
            rate(progress.written_bytes, since.elapsed()),
            progress.faults,
            self.faults.at(now, progress.faults),
            output::bytes(self.first_touch_bytes.at(now, touched)),
            nanos(progress.service.summary.p99_ns),
        ));
    }

    /// Takes the line away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}

/// For how long a rate is shown before a newer one.
const RATE_INTERVAL: Duration = Duration::from_millis(500);

/// How fast a count has grown lately.
#[derive(Default)]
struct Rate {
    /// When it was last looked at, and what it was then.
    last: Option<(Instant, u64)>,
    per_second: u64,
}

impl Rate {
    /// The rate, where the count is `count` by `now`.
    fn at(&mut self, now: Instant, count: u64) -> u64 {
        let (then, before) = *self.last.get_or_insert((now, count));
        let elapsed = now.saturating_duration_since(then);
        if elapsed >= RATE_INTERVAL {
            let per_second =
                u128::from(count.saturating_sub(before)) * 1_000 / elapsed.as_millis().max(1);
            self.per_second = u64::try_from(per_second).unwrap_or(u64::MAX);
            self.last = Some((now, count));
        }
        self.per_second
    }
}

/// A report as people read it, with `more` rows.
pub fn summary(report: &Report, more: &[(&'static str, String)]) -> String {
    let mut text = String::new();
    let down = &report.downtime;
    let mut row = |name: &str, value: String| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {name:<12} {value}");
    };
    row(
        "downtime",
        format!(
            "{}{} (pause {}, device state {}, protection {}, disks {}, resume {})",
            down.stood_still_ns.map_or(String::new(), |ns| format!(
                "{} by the VMM's clock; with asking and answering ",
                nanos(ns)
            )),
            nanos(down.total_ns),
            nanos(down.pause_ns),
            nanos(down.device_state_ns),
            nanos(down.protect_ns),
            nanos(down.disks_ns),
            nanos(down.resume_ns)
        ),
    );
    row(
        "total",
        format!(
            "{} (arming {}, copying {}, committing {})",
            nanos(report.total_ns),
            nanos(report.arming_ns),
            nanos(report.copying_ns),
            nanos(report.committing_ns)
        ),
    );
    row(
        "memory",
        format!(
            "{}, of it {} saved by faults, {} by the sweep, {} never existed",
            output::bytes(report.ram_bytes),
            output::bytes(report.captured.by_fault_bytes),
            output::bytes(report.captured.by_sweep_bytes - report.captured.hole_bytes),
            output::bytes(report.captured.hole_bytes)
        ),
    );
    row(
        "written",
        format!(
            "{} at {}/s ({})",
            output::bytes(report.stored_bytes),
            output::bytes(report.throughput_bytes_per_second),
            report.storage
        ),
    );
    let service = &report.service;
    row(
        "faults",
        format!(
            "{} in the copy, {} while arming; handler p50 {}, p99 {}, max {}",
            report.faults,
            report.arming_faults,
            nanos(service.p50_ns),
            nanos(service.p99_ns),
            nanos(service.max_ns)
        ),
    );
    if !report.first_touches.is_empty() {
        row("first touch", first_touches(report));
    }
    row(
        "buffer",
        format!(
            "peak {} of {}, {} faults waited for room",
            output::bytes(report.buffer_peak_bytes),
            output::bytes(report.buffer_limit_bytes),
            report.buffer_waits
        ),
    );
    for (name, value) in more {
        row(name, value.clone());
    }
    text.truncate(text.trim_end().len());
    text
}

/// Threads that are named; the others are told of together.
const THREADS_NAMED: usize = 4;

/// Whose first writes were saved, and how fast they came while RAM was being copied.
fn first_touches(report: &Report) -> String {
    let mut touches = report.first_touches.clone();
    touches.sort_by_key(|touch| std::cmp::Reverse(touch.bytes));
    let rate = |bytes| rate(bytes, Duration::from_nanos(report.copying_ns));
    let (named, others) = touches.split_at(touches.len().min(THREADS_NAMED));
    let mut parts: Vec<_> = named
        .iter()
        .map(|touch| format!("{} by thread {}", rate(touch.bytes), touch.thread))
        .collect();
    if !others.is_empty() {
        let bytes = others.iter().map(|touch| touch.bytes).sum();
        parts.push(format!("{} by {} others", rate(bytes), others.len()));
    }
    parts.join(", ")
}

/// A duration in the unit that suits it.
pub fn nanos(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{ns} ns"),
        10_000..1_000_000 => format!("{} us", ns / 1_000),
        1_000_000..1_000_000_000 => {
            format!("{}.{} ms", ns / 1_000_000, ns / 100_000 % 10)
        }
        _ => format!("{}.{:02} s", ns / 1_000_000_000, ns / 10_000_000 % 100),
    }
}

fn rate(bytes: u64, elapsed: Duration) -> String {
    let per_second = u128::from(bytes) * 1_000 / elapsed.as_millis().max(1);
    format!("{}/s", output::bytes(u64::try_from(per_second).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_interval() {
        let (mut growth, start) = (Rate::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(growth.at(at(0), 1_000), 0);
        assert_eq!(growth.at(at(100), 2_000), 0, "too early to tell");
        assert_eq!(growth.at(at(1_000), 3_000), 2_000);
        assert_eq!(growth.at(at(1_400), 9_000), 2_000, "still the one before");
        assert_eq!(growth.at(at(2_000), 3_500), 500);
    }

    #[test]
    fn durations_read_well() {
        assert_eq!(nanos(950), "950 ns");
        assert_eq!(nanos(15_300), "15 us");
        assert_eq!(nanos(2_350_000), "2.3 ms");
        assert_eq!(nanos(1_230_000_000), "1.23 s");
    }
}
