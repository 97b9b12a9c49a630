//! One snapshot to a slow destination: how it ended, what was taken from the guest, and what the guest noticed.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use livesnap_tests::cpu_time::Withheld;
use livesnap_tests::livesnap::{Running, snapshot_command};
use livesnap_tests::qemu::Qemu;
use livesnap_tests::slow_disk::SlowDisk;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{BUFFER, MB, Writer};
use crate::measure::{BEFORE, Sighting, load_average};

/// A snapshot to be measured.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub writer: Writer,
    pub limit_mb_s: u64,
    pub is_controlled: bool,
}

/// A snapshot that was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Cell {
    pub writer: Writer,
    /// What the destination takes, in MB/s.
    pub limit_mb_s: u64,
    /// Whether the controller was on.
    pub is_controlled: bool,
    /// Pages a second that the guest wrote before.
    pub pages_per_s_before: f64,
    /// From the start of the command to its end.
    pub total_s: f64,
    /// Seconds of the guest's work that it cost: at its usual rate it would have needed so much less time.
    pub lost_s: f64,
    /// Why it was given up, in a word.
    pub given_up: Option<String>,
    /// Most of the copy buffer that was in use, in bytes.
    pub buffer_peak_bytes: Option<u64>,
    /// CPU time that the writer was to be denied, by the controller's own record.
    pub commanded_s: f64,
    /// CPU time that they were denied: `cpu.stat` of their groups, read from outside.
    pub withheld_s: f64,
    /// Least share of CPU time that was commanded for the writers.
    pub cpu_ratio_min: f64,
    /// Load average of the host, over a minute, just before; the guest itself makes a part of it.
    pub load_average: f64,
    /// All that livesnap told.
    pub told: Value,
}

impl Plan {
    /// Takes a snapshot below `dir` and removes it again.
    pub fn measure(self, guest: &mut Qemu, dir: &Path) -> Result<Cell> {
        let Self { writer, limit_mb_s, is_controlled } = self;
        let load_average = load_average()?;
        let first = Sighting::next(guest, Duration::ZERO)?;
        let before = Sighting::next(guest, BEFORE)?;
        let pages_per_s_before = before.pages_per_s_since(&first);
        ensure!(pages_per_s_before > 0.0, "the guest writes nothing");

        let dir = tempfile::tempdir_in(dir).context("cannot make a directory")?;
        let slow = SlowDisk::new(dir.path(), limit_mb_s * MB)?;
        let record = dir.path().join("record");
        let mut command = snapshot_command(
            guest,
            &dir.path().join("snapshot"),
            &["--buffer", BUFFER, "--on-infeasible=abort", "--force"],
        )?;
        if is_controlled {
            command.arg("--record").arg(&record);
        } else {
            command.arg("--no-control");
        }
        let mut withheld = Withheld::new(guest.vcpu_threads()?);
        let began = Instant::now();
        let mut total = Duration::ZERO;
        let ended = Running::start(slow.command(&command))?.wait_while(|| {
            withheld.look();
            total = began.elapsed();
        })?;
        let after = Sighting::next(guest, Duration::ZERO)?;
        let told = ended.told()?;
        let is_expected = matches!(told["outcome"].as_str(), Some("completed" | "aborted"));
        ensure!(is_expected, "{told:#}");
        let recorded = if is_controlled { Recorded::read(&record)? } else { Recorded::default() };
        let peak = told.pointer("/report/buffer_peak_bytes").and_then(Value::as_u64);
        Ok(Cell {
            writer,
            limit_mb_s,
            is_controlled,
            pages_per_s_before,
            total_s: total.as_secs_f64(),
            lost_s: after.lost_s_since(&before, pages_per_s_before),
            given_up: told["reason"].as_str().map(str::to_owned),
            buffer_peak_bytes: peak.or(recorded.buffer_peak_bytes),
            commanded_s: recorded.commanded_s,
            withheld_s: withheld.total().as_secs_f64(),
            cpu_ratio_min: recorded.cpu_ratio_min,
            load_average,
            told,
        })
    }
}

impl Cell {
    /// Share of its usual rate that the guest kept during the snapshot.
    pub fn rate_kept(&self) -> f64 {
        (1.0 - self.lost_s / self.total_s).clamp(0.0, 1.0)
    }

    /// A number that livesnap told, by its JSON pointer.
    pub fn number(&self, pointer: &str) -> Option<f64> {
        self.told.pointer(pointer)?.as_f64()
    }
}

/// What the controller commanded, from its own record.
struct Recorded {
    commanded_s: f64,
    cpu_ratio_min: f64,
    buffer_peak_bytes: Option<u64>,
}

impl Default for Recorded {
    fn default() -> Self {
        Self { commanded_s: 0.0, cpu_ratio_min: 1.0, buffer_peak_bytes: None }
    }
}

impl Recorded {
    /// The first line is about the run, each further one a decision, which holds until the next.
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the record {}", path.display()))?;
        let mut recorded = Self::default();
        let mut denied_ratio = 0.0;
        for line in text.lines().skip(1) {
            let tick: Value = serde_json::from_str(line).context("the record is no JSON")?;
            let number = |pointer: &str| tick.pointer(pointer).and_then(Value::as_f64);
            recorded.commanded_s +=
                denied_ratio * number("/dt_s").context("a tick has no length")?;
            let ratio = number("/command/cpu_ratio").context("a tick has no command")?;
            denied_ratio = 1.0 - ratio;
            recorded.cpu_ratio_min = recorded.cpu_ratio_min.min(ratio);
            let used = tick.pointer("/sample/buffer_used_bytes").and_then(Value::as_u64);
            recorded.buffer_peak_bytes = recorded.buffer_peak_bytes.max(used);
        }
        Ok(recorded)
    }
}
