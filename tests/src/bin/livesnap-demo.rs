//! `cargo xtask demo`: one snapshot under load, from the boot of the guest to the proof that its copy is sound.
//!
//! Run by people who want to see it, and by CI. Everything lies in temporary directories that go with it.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "standard output is what this program is for")]

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use livesnap_tests::check::{WindowReport, check_files};
use livesnap_tests::console::Heartbeat;
use livesnap_tests::qemu::{Disk, Format, Load, Qemu};
use livesnap_tests::restored::Restored;
use livesnap_tests::{interrupt, livesnap};

/// Two busy cores and emulation take their time; usually it is a few seconds.
const BOOT: Duration = Duration::from_secs(120);
const WORKERS: u32 = 2;

/// Snapshot a QEMU guest that never stops writing, restore it beside the original, and have both judged
#[derive(Parser)]
#[command(name = "livesnap-demo", version)]
struct Args {
    /// RAM of the guest, in MiB
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(256..=16384))]
    memory: u32,
    /// Memory that the guest rewrites over and over, in MiB
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    ring: u32,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let told = Told(Instant::now());
    match run(&args, &told) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            told.tell("VERDICT: FAILED.");
            eprintln!("livesnap-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The story, with the time since it began.
struct Told(Instant);

impl Told {
    fn tell(&self, sentence: &str) {
        println!("[{:5.1} s] {sentence}", self.0.elapsed().as_secs_f64());
    }
}

fn run(args: &Args, told: &Told) -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "a snapshot needs root: write-protecting another process's memory does"
    );
    ensure!(args.ring + 128 <= args.memory, "--ring must leave the guest 128 MiB of --memory");
    interrupt::watch()?;
    let dir = tempfile::Builder::new()
        .prefix("livesnap-demo-")
        .tempdir_in("/var/tmp")
        .context("cannot make a directory in /var/tmp")?;
    let disk = Disk::create(dir.path().join("disk.raw"), Format::Raw, 32)?;
    let image = disk.path().to_owned();

    let mut source = boot(args, disk, told)?;
    let snapshot = dir.path().join("snapshot");
    let before = take(&mut source, &snapshot, told)?;
    let window = judge(&snapshot, &image, &before, told)?;
    let slots = u64::from(args.ring) * 256 / u64::from(WORKERS);
    let mut copy = restore(&snapshot, dir.path(), &window, slots, told)?;

    let now = source.wait_laps(1, BOOT)?;
    told.tell(&format!(
        "The original went on all the while: {} pages and {} disk blocks by now, {} of them wrong.",
        pages(&now),
        now.disk,
        now.inconsistent
    ));
    let both = copy.wait_heartbeat(BOOT, |_| true)?;
    ensure!(both.inconsistent == 0, "the restored guest found wrong pages");
    drop((source, copy));
    told.tell("VERDICT: PASSED. The snapshot is one instant of a guest that never stopped writing, and its copy lives.");
    Ok(())
}

/// Boots the guest and waits until it is at work.
fn boot(args: &Args, disk: Disk, told: &Told) -> Result<Qemu> {
    told.tell(&format!(
        "Booting a QEMU guest of {} MiB, in which {WORKERS} workers rewrite {} MiB of RAM over and over and a third writes the disk; \
         every page carries a counter and a checksum.",
        args.memory, args.ring
    ));
    let load = Load {
        populate_mib: (args.memory - args.ring) / 4,
        ring_mib: args.ring,
        workers: WORKERS,
        disk: true,
        ..Load::default()
    };
    let mut source =
        Qemu::builder().memory_mib(args.memory).vcpus(WORKERS).disk(disk).load(load).start()?;
    source.wait_ready(BOOT)?;
    let beat = source.wait_heartbeat(BOOT, |beat| beat.laps >= 1 && beat.disk > 10)?;
    told.tell(&format!(
        "The guest is at work: {} pages/s, {} MiB of new data a second.",
        beat.pages_per_s,
        beat.pages_per_s / 256
    ));
    Ok(source)
}

/// Takes the snapshot, with livesnap's own report on standard output; returns the last heartbeat before.
fn take(source: &mut Qemu, snapshot: &Path, told: &Told) -> Result<Heartbeat> {
    let before = source.wait_heartbeat(BOOT, |_| true)?;
    source.take_pauses()?;
    told.tell("Taking a snapshot of it: livesnap snapshot --qmp SOCKET --out DIR");
    let mut command = livesnap::command(["snapshot", "--qmp"])?;
    command.arg(source.qmp_socket()).arg("--out").arg(snapshot);
    let status = command.status().context("cannot run livesnap")?;
    ensure!(status.success(), "livesnap snapshot ended with {status}");
    let pauses = source.take_pauses()?;
    ensure!(
        source.status()? == "running",
        "the guest does not run after the snapshot, but is {}",
        source.status()?
    );
    let total_ms = pauses.iter().sum::<Duration>().as_secs_f64() * 1e3;
    told.tell(&format!("There is a snapshot. By QEMU's own events the guest stood still for {total_ms:.1} ms; it runs on."));
    Ok(before)
}

/// Verifies the snapshot by the product, then by the checker that shares no code with it.
fn judge(snapshot: &Path, image: &Path, before: &Heartbeat, told: &Told) -> Result<WindowReport> {
    let verified = livesnap::command(["verify"])?
        .arg(snapshot)
        .output()
        .context("cannot run livesnap verify")?;
    ensure!(
        verified.status.success(),
        "livesnap verify: {}",
        String::from_utf8_lossy(&verified.stderr)
    );
    told.tell("livesnap verify: structure and every checksum are right.");
    let window = check_files(&snapshot.join("ram.mapped-ram"), Some(image))
        .context("the image is not one instant of the guest")?;
    ensure!(
        window.newest.iter().zip(&before.workers).all(|(saved, before)| saved >= before),
        "the image is older than the snapshot command"
    );
    told.tell(&format!(
        "An independent checker read the image: each worker's pages are one unbroken run of counters ({} pages, newest {:?}, {} in the \
         making), and the disk ends at block {}, where RAM says it does.",
        window.ring_pages,
        window.newest,
        window.torn,
        window.disk_newest.unwrap_or(0)
    ));
    Ok(window)
}

/// Restores the snapshot and waits until the copy has checked all that it rewrites.
fn restore(
    snapshot: &Path,
    dir: &Path,
    window: &WindowReport,
    slots: u64,
    told: &Told,
) -> Result<Restored> {
    told.tell(
        "Restoring it into a second, stock QEMU beside the first: livesnap restore --exec DIR",
    );
    let dir = dir.join("restored");
    fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut copy = Restored::start(snapshot, &dir)?;
    let after = copy.wait_heartbeat(BOOT, |beat| {
        let has_lapped =
            beat.workers.iter().zip(&window.newest).all(|(now, then)| *now >= then + slots);
        beat.inconsistent > 0 || has_lapped && Some(beat.disk) > window.disk_newest
    })?;
    ensure!(after.inconsistent == 0, "the restored guest found {} wrong pages", after.inconsistent);
    told.tell(&format!(
        "The copy counted on from there, a full lap and more, and checked each page before overwriting it: {} pages, {} disk blocks, \
         {} wrong.",
        pages(&after),
        after.disk,
        after.inconsistent
    ));
    Ok(copy)
}

fn pages(beat: &Heartbeat) -> u64 {
    beat.workers.iter().sum()
}
