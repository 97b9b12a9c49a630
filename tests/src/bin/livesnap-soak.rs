//! `cargo xtask soak`: snapshot after snapshot of one guest that never stops writing, each judged offline.
//!
//! Run by people and by CI. Most snapshots leave the disk out; every [`DISK_EVERY`]th takes it too and commits the
//! overlay afterwards, so that the chain of images never grows.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "standard output is what this program is for")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use livesnap_tests::check::check_files;
use livesnap_tests::qemu::{Disk, Format, Load, Qemu};
use livesnap_tests::{interrupt, livesnap, poll_until};
use serde_json::{Value, json};

/// Two busy cores and emulation take their time; usually it is a few seconds.
const LIMIT: Duration = Duration::from_secs(120);
/// Every so many snapshots, the first included, the disk is taken too.
const DISK_EVERY: u32 = 5;
/// Every so many snapshots, the copy buffer is so small that faults wait for the disk.
const SMALL_BUFFER_EVERY: u32 = 3;
const SMALL_BUFFER: [&str; 2] = ["--buffer", "16MiB"];
const JOB: &str = "soak-commit";

/// Take and check snapshot after snapshot of one busy QEMU guest
#[derive(Parser)]
#[command(
    name = "livesnap-soak",
    version,
    after_help = "Exit codes:\n  0  all snapshots are consistent\n  1  at least one is not, or could not be taken"
)]
struct Args {
    /// Number of snapshots
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Directory to which inconsistent snapshots are moved, on the file system of /var/tmp; else they are removed
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("livesnap-soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    interrupt::watch()?;
    let dir = tempfile::Builder::new()
        .prefix("livesnap-soak-")
        .tempdir_in("/var/tmp")
        .context("cannot make a directory in /var/tmp")?;
    let mut soak = Soak::start(dir.path())?;
    let (mut bad, mut pauses) = (0, Vec::new());
    for index in 0..args.runs {
        interrupt::check()?;
        let snapshot = dir.path().join("snapshot");
        match soak.once(index, &snapshot) {
            Ok((pause, words)) => {
                println!("{:>4}/{}: {words}", index + 1, args.runs);
                pauses.push(pause);
            }
            Err(error) => {
                bad += 1;
                println!("{:>4}/{}: WRONG: {error:#}", index + 1, args.runs);
                if let Some(keep) = args.keep.as_ref().filter(|_| snapshot.exists()) {
                    keep_snapshot(&snapshot, &keep.join(format!("run-{}", index + 1)))?;
                }
            }
        }
        soak.next(&snapshot).with_context(|| format!("after snapshot {}", index + 1))?;
    }
    let beat = soak.guest.wait_laps(1, LIMIT)?;
    pauses.sort_unstable();
    let middle = pauses.get(pauses.len() / 2).copied().unwrap_or_default();
    println!(
        "{} snapshots in {:.0} s, {bad} of them wrong; the guest wrote {} pages and {} disk blocks and found {} wrong; \
         pause by QEMU's events: median {:.1} ms, longest {:.1} ms.",
        args.runs,
        soak.began.elapsed().as_secs_f64(),
        beat.workers.iter().sum::<u64>(),
        beat.disk,
        beat.inconsistent,
        millis(middle),
        millis(pauses.last().copied().unwrap_or_default()),
    );
    ensure!(bad == 0, "{bad} of {} snapshots are wrong", args.runs);
    Ok(())
}

/// The guest, and its only disk.
struct Soak {
    guest: Qemu,
    image: PathBuf,
    /// The image's node.
    base: Value,
    began: Instant,
}

impl Soak {
    fn start(dir: &Path) -> Result<Self> {
        let disk = Disk::create(dir.join("disk.raw"), Format::Raw, 32)?;
        let image = disk.path().to_owned();
        let load = Load { ring_mib: 32, workers: 2, disk: true, ..Load::default() };
        let mut guest = Qemu::builder().vcpus(2).disk(disk).load(load).start()?;
        guest.wait_ready(LIMIT)?;
        guest.wait_heartbeat(LIMIT, |beat| beat.laps >= 1 && beat.disk > 0)?;
        let base = inserted(&mut guest)?["node-name"].take();
        Ok(Self { guest, image, base, began: Instant::now() })
    }

    /// Takes a snapshot and judges it; the pause by QEMU's own events, and a line for people.
    fn once(&mut self, index: u32, snapshot: &Path) -> Result<(Duration, String)> {
        let with_disk = index.is_multiple_of(DISK_EVERY);
        let small_buffer = index.is_multiple_of(SMALL_BUFFER_EVERY);
        let mut options = Vec::new();
        options.extend((!with_disk).then_some("--no-disks"));
        options.extend(SMALL_BUFFER.iter().filter(|_| small_buffer));

        self.guest.take_pauses()?;
        let told = livesnap::snapshot(&self.guest, snapshot, &options)?;
        let pause = self.guest.take_pauses()?.iter().sum();
        let verified = livesnap::command(["verify"])?
            .arg(snapshot)
            .output()
            .context("cannot run livesnap verify")?;
        ensure!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
        let disk = with_disk.then_some(self.image.as_path());
        let window = check_files(&snapshot.join("ram.mapped-ram"), disk)?;
        ensure!(
            window.inconsistent == 0,
            "the guest had found {} wrong pages by then",
            window.inconsistent
        );

        let report = &told["report"];
        let total_ns = report["total_ns"].as_u64().context("the report tells no total_ns")?;
        let words = format!(
            "consistent up to {:?}{}; pause {:.1} ms, total {:.0} ms, {} faults, {} waited for room",
            window.newest,
            window.disk_newest.map_or_else(String::new, |newest| format!(", disk block {newest}")),
            millis(pause),
            millis(Duration::from_nanos(total_ns)),
            report["faults"],
            report["buffer_waits"],
        );
        Ok((pause, words))
    }

    /// Removes the snapshot, commits the overlay that it may have brought, and sees that the guest is well.
    fn next(&mut self, snapshot: &Path) -> Result<()> {
        if snapshot.exists() {
            fs::remove_dir_all(snapshot)
                .with_context(|| format!("cannot remove {}", snapshot.display()))?;
        }
        self.commit_overlay()?;
        let status = self.guest.status()?;
        ensure!(status == "running", "the guest does not run, but is {status}");
        let beat = self.guest.wait_heartbeat(LIMIT, |_| true)?;
        ensure!(
            beat.inconsistent == 0,
            "the guest found wrong pages:\n{}",
            self.guest.console()?.inconsistencies().join("\n")
        );
        Ok(())
    }

    fn commit_overlay(&mut self) -> Result<()> {
        let inserted = inserted(&mut self.guest)?;
        let device = inserted["node-name"].clone();
        if device == self.base {
            return Ok(());
        }
        let file = inserted["image"]["filename"].as_str().context("the disk has no file")?;
        let overlay = PathBuf::from(file);
        // Without a base, QEMU would commit to the lowest image of the chain.
        let commit = json!({"job-id": JOB, "device": device, "base-node": self.base});
        self.guest.qmp("block-commit", commit)?;
        let mut completing = false;
        poll_until("the overlay is committed", LIMIT, || {
            let jobs = self.guest.qmp("query-jobs", json!({}))?;
            let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == JOB));
            let Some(job) = job else { return Ok(Some(())) };
            if let Some(error) = job["error"].as_str() {
                bail!("block-commit failed: {error}");
            }
            if job["status"] == "ready" && !completing {
                completing = true;
                self.guest.qmp("job-complete", json!({"id": JOB}))?;
            }
            Ok(None)
        })?;
        // The node outlives the job, for `blockdev-add` had made it, and would keep the image busy.
        self.guest.qmp("blockdev-del", json!({"node-name": device}))?;
        fs::remove_file(&overlay).with_context(|| format!("cannot remove {}", overlay.display()))
    }
}

/// What is in the guest's disk drive.
fn inserted(guest: &mut Qemu) -> Result<Value> {
    Ok(guest.qmp("query-block", json!({}))?[0]["inserted"].take())
}

fn keep_snapshot(snapshot: &Path, to: &Path) -> Result<()> {
    fs::rename(snapshot, to)
        .with_context(|| format!("cannot move {} to {}", snapshot.display(), to.display()))
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
