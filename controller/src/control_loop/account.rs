//! What the control loop has done, for the report.

use livesnap_control::{Abort, AbortReason, Command, Forecast};
use serde::Serialize;
use snapshot_core::Reason;

use crate::output;
use crate::progress::nanos;
use crate::units::{number, percent, whole};

/// Changes of the buffer's bound that are told at most.
const LIMITS_MAX: usize = 256;

/// A bound of the copy buffer, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// Since the loop began, in nanoseconds.
    at_ns: u64,
    /// In bytes.
    limit_bytes: u64,
}

/// What was decided, and what came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Account {
    /// Decisions taken.
    pub decisions: u64,
    /// How long the loop ran, in nanoseconds.
    pub controlled_ns: u64,
    /// Of it, how long the guest had less than all of its CPU time.
    pub throttled_ns: u64,
    /// Least share of its CPU time that it was left.
    pub cpu_ratio_min: f64,
    /// Mean share.
    pub cpu_ratio_mean: f64,
    /// CPU time that the kernel withheld from virtual CPUs, in nanoseconds.
    pub withheld_ns: u64,
    /// Bounds of the copy buffer, one after the other.
    pub buffer_limits: Vec<Limit>,
    /// The last forecast.
    pub forecast: Option<Forecast>,
    /// Why the snapshot was given up.
    pub abort: Option<Abort>,
    /// Why the guest's CPU time could not be touched, or not be given back.
    pub problem: Option<String>,
}

impl Account {
    /// Counts a tick with what was in force meanwhile.
    pub fn count(&mut self, tick_ns: u64, cpu_ratio: f64) {
        let before = number(self.controlled_ns) * self.cpu_ratio_mean;
        self.cpu_ratio_min =
            if self.controlled_ns == 0 { cpu_ratio } else { self.cpu_ratio_min.min(cpu_ratio) };
        self.controlled_ns += tick_ns;
        if cpu_ratio < 1.0 {
            self.throttled_ns += tick_ns;
        }
        let sum = before + number(tick_ns) * cpu_ratio;
        self.cpu_ratio_mean = sum / number(self.controlled_ns.max(1));
    }

    /// Notes a bound of the buffer if it is another one.
    pub fn note_limit(&mut self, limit_bytes: u64) {
        let is_new = self.buffer_limits.last().is_none_or(|last| last.limit_bytes != limit_bytes);
        if is_new && self.buffer_limits.len() < LIMITS_MAX {
            self.buffer_limits.push(Limit { at_ns: self.controlled_ns, limit_bytes });
        }
    }

    /// Whether the buffer's bound is another one than at first.
    pub fn has_moved_buffer(&self) -> bool {
        let [first, last] = [self.buffer_limits.first(), self.buffer_limits.last()];
        first.map(|limit| limit.limit_bytes) != last.map(|limit| limit.limit_bytes)
    }

    /// For people.
    pub fn in_words(&self) -> String {
        let mut text = if self.throttled_ns == 0 {
            "the guest kept all of its CPU time".to_owned()
        } else {
            format!(
                "the guest kept {} of its CPU time, at least {}; throttled for {} of {}, {} withheld",
                percent(self.cpu_ratio_mean),
                percent(self.cpu_ratio_min),
                nanos(self.throttled_ns),
                nanos(self.controlled_ns),
                nanos(self.withheld_ns)
            )
        };
        if let [first, .., last] = &self.buffer_limits[..] {
            let [first, last] = [first, last].map(|limit| output::bytes(limit.limit_bytes));
            text.push_str(&format!("; buffer bound moved from {first} to {last}"));
        }
        if let Some(problem) = &self.problem {
            text.push_str("; ");
            text.push_str(problem);
        }
        text
    }
}

/// The word for why a snapshot is given up.
pub const fn reason(reason: AbortReason) -> Reason {
    match reason {
        AbortReason::BufferOverflow => Reason::BufferForecast,
        AbortReason::StallLimit => Reason::StallLimit,
        AbortReason::MinCpu => Reason::CpuFloor,
        AbortReason::Deadline => Reason::Deadline,
    }
}

/// Why a snapshot is given up: the limit, the evidence, the remedy.
pub fn abort_in_words(abort: &Abort, command: &Command, min_cpu_ratio: f64) -> String {
    let rates = format!(
        "the guest, if it is left alone, touches {}; the destination {}",
        match whole(abort.touch_rate) {
            0 => "no unsaved memory".to_owned(),
            rate => format!("{}/s of unsaved memory", output::bytes(rate)),
        },
        match whole(abort.drain_rate) {
            0 => "has taken nothing as yet".to_owned(),
            rate => format!("takes {}/s", output::bytes(rate)),
        }
    );
    let least = percent(min_cpu_ratio);
    let limit = output::bytes(command.buffer_limit_bytes);
    let after = |seconds: Option<f64>| {
        seconds.map_or("more than an hour".to_owned(), |seconds| format!("{seconds:.1} s"))
    };
    let (what, remedy) = match abort.reason {
        AbortReason::BufferOverflow => (
            format!(
                "with {least} of its CPU time the buffer of {limit} would be full in {}",
                after(abort.forecast.full_after_s)
            ),
            "allow a larger --buffer or a smaller --min-cpu",
        ),
        AbortReason::StallLimit => (
            format!(
                "writes wait longer than --stall-limit although the guest has only {least} of its CPU time"
            ),
            "allow a longer --stall-limit or a smaller --min-cpu",
        ),
        AbortReason::MinCpu => (
            format!(
                "the buffer of {limit} is full, and waiting leaves the guest less than {least} of its CPU time"
            ),
            "allow a larger --buffer or a smaller --min-cpu",
        ),
        AbortReason::Deadline => (
            format!(
                "all memory would be saved only in {}, after the deadline",
                after(abort.forecast.completion_after_s)
            ),
            "allow a later --deadline",
        ),
    };
    format!(
        "given up, for the limits cannot be kept: {what} ({rates}; so for {:.2} s); the guest runs on, and nothing is left of the snapshot: {remedy}, use a faster destination, or let writes wait by --on-infeasible wait",
        abort.evidence_s
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_over_time() {
        let mut account = Account::default();
        account.count(1_000_000_000, 1.0);
        account.count(3_000_000_000, 0.5);
        assert!((account.cpu_ratio_mean - 0.625).abs() < 1e-9, "{account:?}");
        assert!((account.cpu_ratio_min - 0.5).abs() < 1e-9);
        assert_eq!((account.controlled_ns, account.throttled_ns), (4_000_000_000, 3_000_000_000));
        assert!(account.in_words().contains("kept 62 % of its CPU time, at least 50 %"));
    }

    #[test]
    fn only_changes_of_the_bound_are_noted() {
        let mut account = Account::default();
        for limit_bytes in [64 << 20, 64 << 20, 48 << 20] {
            account.note_limit(limit_bytes);
            account.count(1, 1.0);
        }
        assert_eq!(account.buffer_limits.len(), 2);
        let told = account.in_words();
        assert!(told.contains("kept all") && told.contains("from 64.0 MiB to 48.0 MiB"), "{told}");
    }

    #[test]
    fn whoever_gives_up_says_why_and_what_to_do() {
        let abort = Abort {
            reason: AbortReason::BufferOverflow,
            forecast: Forecast { full_after_s: Some(0.44), ..Forecast::default() },
            touch_rate: 3.0 * f64::from(1 << 30),
            drain_rate: f64::from(100 << 20),
            evidence_s: 0.25,
        };
        let command = Command {
            because: livesnap_control::Because::Abort,
            buffer_limit_bytes: 64 << 20,
            cpu_ratio: 0.3,
            abort: Some(abort),
            forecast: Forecast::default(),
        };
        let told = abort_in_words(&abort, &command, 0.3);
        for words in ["30 %", "64.0 MiB", "0.4 s", "3.0 GiB/s", "100.0 MiB/s", "0.25 s", "--buffer"]
        {
            assert!(told.contains(words), "{words}: {told}");
        }
        let still = Abort { touch_rate: 0.0, drain_rate: 0.0, ..abort };
        let told = abort_in_words(&still, &command, 0.3);
        assert!(
            told.contains("touches no unsaved memory; the destination has taken nothing"),
            "{told}"
        );
    }
}
