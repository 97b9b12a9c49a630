//! One snapshot by one tool: what it took, and what the guest noticed.
//!
//! Both tools are measured by the same means: the pause by QEMU's STOP and RESUME events, the time by this process's
//! clock until the data is durable, the guest by its own heartbeats.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use livesnap_tests::console::Heartbeat;
use livesnap_tests::qemu::Qemu;
use livesnap_tests::{livesnap, poll_until};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Time over which the guest's usual rate is measured.
pub const BEFORE: Duration = Duration::from_secs(2);
/// Nothing that is measured takes longer.
const LIMIT: Duration = Duration::from_secs(300);

/// Who takes the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tool {
    /// The product.
    Livesnap,
    /// QEMU's migration with the capability `background-snapshot`.
    Qemu,
}

/// What one snapshot took.
#[derive(Debug, Serialize, Deserialize)]
pub struct Run {
    pub tool: Tool,
    /// All pauses, by QEMU's events.
    pub downtime_ms: f64,
    /// From the start of the command until the snapshot is durable.
    pub total_s: f64,
    /// Pages a second that the guest wrote before.
    pub pages_per_s_before: f64,
    /// Seconds of the guest's work that the snapshot cost: at its usual rate it would have needed so much less time.
    pub lost_s: f64,
    /// Longest time between two pages of a worker in the [`BEFORE`] seconds before, in guest time.
    pub gap_before_ms: f64,
    /// The same during the snapshot. Guest time stands still in a pause, so the downtime is not in it.
    pub gap_ms: f64,
    /// QEMU's memory in transparent huge pages just before.
    pub huge_mib: u64,
    /// Load average of the host, over a minute, just before; the guest itself makes a part of it.
    pub load_average: f64,
    /// livesnap's own report; QEMU has none but the times above.
    pub report: Option<Value>,
}

impl Run {
    /// Share of its usual rate that the guest kept during the snapshot.
    pub fn rate_kept(&self) -> f64 {
        (1.0 - self.lost_s / self.total_s).clamp(0.0, 1.0)
    }

    /// A number of livesnap's report, by its JSON pointer, in milliseconds if it is one of nanoseconds.
    pub fn reported(&self, pointer: &str) -> Option<f64> {
        let number = self.report.as_ref()?.pointer(pointer)?.as_f64()?;
        Some(if pointer.ends_with("_ns") { number / 1e6 } else { number })
    }
}

/// Takes a snapshot below `dir` and removes it again.
pub fn run(tool: Tool, guest: &mut Qemu, dir: &Path) -> Result<Run> {
    let load_average = load_average()?;
    let huge_mib = guest.anon_huge_kib()? >> 10;
    let first = Sighting::next(guest, Duration::ZERO)?;
    let before = Sighting::next(guest, BEFORE)?;
    let pages_per_s_before = before.pages_per_s_since(&first);
    ensure!(pages_per_s_before > 0.0, "the guest writes nothing");

    guest.take_pauses()?;
    let out = tempfile::tempdir_in(dir).context("cannot make a directory for the snapshot")?;
    let (total, report) = match tool {
        Tool::Livesnap => by_livesnap(guest, &out.path().join("livesnap"))?,
        Tool::Qemu => (by_qemu(guest, &out.path().join("qemu"))?, None),
    };
    let pauses = guest.take_pauses()?;
    ensure!(!pauses.is_empty(), "QEMU told of no pause");
    let after = Sighting::next(guest, Duration::ZERO)?;
    // Not before: removing gigabytes takes time, which the guest would lose as well.
    out.close().context("cannot remove the snapshot")?;

    Ok(Run {
        tool,
        downtime_ms: pauses.iter().sum::<Duration>().as_secs_f64() * 1e3,
        total_s: total.as_secs_f64(),
        pages_per_s_before,
        lost_s: after.lost_s_since(&before, pages_per_s_before),
        gap_before_ms: worst_gap_ms(guest, &first, &before)?,
        gap_ms: worst_gap_ms(guest, &before, &after)?,
        huge_mib,
        load_average,
        report,
    })
}

fn by_livesnap(guest: &Qemu, out: &Path) -> Result<(Duration, Option<Value>)> {
    let began = Instant::now();
    let mut told = livesnap::snapshot(guest, out, &[])?;
    let total = began.elapsed();
    Ok((total, Some(told["report"].take())))
}

fn by_qemu(guest: &mut Qemu, file: &Path) -> Result<Duration> {
    switch_background_snapshot(guest, true)?;
    guest.qmp("migrate-set-parameters", json!({"max-bandwidth": 0}))?;
    let began = Instant::now();
    guest.qmp("migrate", json!({"uri": format!("file:{}", file.display())}))?;
    poll_until("QEMU's snapshot completes", LIMIT, || {
        let state = guest.qmp("query-migrate", json!({}))?;
        match state["status"].as_str() {
            Some("completed") => Ok(Some(())),
            Some("failed") => bail!("QEMU's snapshot failed: {}", state["error-desc"]),
            _ => Ok(None),
        }
    })?;
    let written = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    written.sync_all().with_context(|| format!("cannot sync {}", file.display()))?;
    let total = began.elapsed();
    switch_background_snapshot(guest, false)?;
    Ok(total)
}

fn switch_background_snapshot(guest: &mut Qemu, state: bool) -> Result<()> {
    let capability = json!({"capability": "background-snapshot", "state": state});
    guest.qmp("migrate-set-capabilities", json!({"capabilities": [capability]}))?;
    Ok(())
}

/// A heartbeat, seen as it came.
pub struct Sighting {
    at: Instant,
    /// Heartbeats up to it.
    count: usize,
    pages: u64,
}

impl Sighting {
    /// The first heartbeat that comes when `delay` has passed.
    pub fn next(guest: &mut Qemu, delay: Duration) -> Result<Self> {
        let began = Instant::now();
        let mut known = guest.heartbeats()?.len();
        poll_until("the guest's next heartbeat", LIMIT, || {
            let beats = guest.heartbeats()?;
            let at = Instant::now();
            let is_new = beats.len() > known;
            known = beats.len();
            let newest = beats.last().filter(|_| is_new && at - began >= delay);
            Ok(newest.map(|beat| Self { at, count: known, pages: beat.workers.iter().sum() }))
        })
    }

    /// The rate since an earlier one.
    pub fn pages_per_s_since(&self, earlier: &Self) -> f64 {
        pages(self.pages - earlier.pages) / (self.at - earlier.at).as_secs_f64()
    }

    /// By how much longer it took since `earlier` than it would have at so many pages a second.
    pub fn lost_s_since(&self, earlier: &Self, pages_per_s: f64) -> f64 {
        (self.at - earlier.at).as_secs_f64() - pages(self.pages - earlier.pages) / pages_per_s
    }
}

fn worst_gap_ms(guest: &Qemu, from: &Sighting, to: &Sighting) -> Result<f64> {
    let beats: Vec<Heartbeat> = guest.heartbeats()?;
    let worst_us = beats[from.count..to.count].iter().map(|beat| beat.worst_gap_us).max();
    let worst = Duration::from_micros(worst_us.context("no heartbeat came")?);
    Ok(worst.as_secs_f64() * 1e3)
}

#[expect(clippy::cast_precision_loss, reason = "a count of pages is far below 2^53")]
fn pages(count: u64) -> f64 {
    count as f64
}

/// Load average of the host, over a minute.
pub fn load_average() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg").context("cannot read /proc/loadavg")?;
    let minute = text.split(' ').next().unwrap_or_default();
    minute.parse().with_context(|| format!("/proc/loadavg holds {text}"))
}
