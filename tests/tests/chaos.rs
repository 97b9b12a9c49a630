//! What a snapshot may do to a guest when things go wrong around it: nothing.
//!
//! livesnap is killed, interrupted, stopped, and let down by its disk, by QEMU and by the guest, at moments
//! spread over its whole run. Moments are random; `LIVESNAP_SEED` repeats those of an earlier run.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::cell::Cell;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use livesnap_tests::check::check_files;
use livesnap_tests::livesnap::{Ended, Running, snapshot, snapshot_command};
use livesnap_tests::qemu::{Disk, Format, Load, Qemu};
use livesnap_tests::{is_root_or_skip, livesnap, poll_until};
use rustix::process::Signal;
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(120);
/// The product's default limit of a pause, and some time for a busy machine to act on it.
const PAUSE: Duration = Duration::from_secs(5);
/// The phases of a session, in order; before the first it gets in touch with QEMU.
const PHASES: [&str; 6] = ["preparing", "arming", "frozen", "copying", "draining", "committing"];
/// Longer than most phases last for the guests of these tests.
const MOMENT_MAX: Duration = Duration::from_millis(40);

/// Random moments that can be had again.
struct Moments(Cell<u64>);

impl Moments {
    fn new() -> Self {
        let seed = std::env::var("LIVESNAP_SEED").ok().map(|text| text.parse().unwrap());
        let clock = || u64::from(std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos());
        let seed = seed.unwrap_or_else(clock) | 1;
        eprintln!("LIVESNAP_SEED={seed}");
        Self(Cell::new(seed))
    }

    /// Lets some time pass. Not by sleeping, which cannot take microseconds.
    fn pass(&self) {
        // xorshift64 (Marsaglia).
        let mut x = self.0.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.set(x);
        let moment = Duration::from_nanos(x % u64::try_from(MOMENT_MAX.as_nanos()).unwrap());
        let until = Instant::now() + moment;
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    }
}

/// A busy VM with a disk, and where its snapshots go.
struct Scene {
    qemu: Qemu,
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let disk = Disk::create(dir.path().join("disk.qcow2"), Format::Qcow2, 32).unwrap();
        let load = Load { workers: 2, disk: true, ..Load::default() };
        let builder = Qemu::builder().vcpus(2).disk(disk).load(load);
        let mut qemu = builder.start().unwrap();
        qemu.wait_ready(BOOT).unwrap();
        qemu.wait_heartbeat(BOOT, |beat| beat.disk > 10).unwrap();
        Self { qemu, dir }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("snapshot")
    }

    /// A snapshot that has come to `phase`; nothing stands for one that was just started.
    fn snapshot_at(&self, phase: Option<&str>) -> Running {
        let command = snapshot_command(&self.qemu, &self.out(), &[]).unwrap();
        let mut running = Running::start(command).unwrap();
        if let Some(phase) = phase {
            running.reach(phase).unwrap();
        }
        running
    }

    /// The guest is in the state it should be in, and its memory is nobody's any more.
    fn expect_unharmed(&mut self, status: &str) {
        expect_unharmed(&mut self.qemu, status);
    }

    /// There is no snapshot, and nothing that could be taken for one.
    fn expect_no_snapshot(&self) {
        let out = self.out();
        let verified = livesnap::command(["verify"]).unwrap().arg(&out).output().unwrap();
        assert_eq!(verified.status.code(), Some(1), "{verified:?}");
        assert!(!out.exists());
    }

    /// What is to be seen of snapshots: files beside the disk, and QEMU's block nodes and jobs.
    fn traces(&mut self) -> (Vec<PathBuf>, Vec<Value>, Value) {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let blocks = self.qemu.qmp("query-block", json!({})).unwrap();
        let nodes = self.qemu.qmp("query-named-block-nodes", json!({})).unwrap();
        let nodes = [&blocks[0]["inserted"]].into_iter().chain(nodes.as_array().unwrap());
        let nodes = nodes.map(|node| node["node-name"].clone()).collect();
        (files, nodes, self.qemu.qmp("query-jobs", json!({})).unwrap())
    }

    /// Takes a snapshot into the place of the failed ones, which is consistent, and the guest finds all it
    /// ever wrote.
    fn expect_next_works(mut self) {
        let out = self.out();
        let _ = std::fs::remove_dir_all(&out);
        snapshot(&self.qemu, &out, &[]).unwrap();
        let manifest = std::fs::read(out.join("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        let image = manifest["snapshot"]["disks"][0]["image"].as_str().unwrap();
        let raw = self.dir.path().join("raw");
        Disk::existing(image, Format::Qcow2).export_raw(&raw).unwrap();
        let report = check_files(&out.join("ram.mapped-ram"), Some(&raw)).unwrap();
        assert_eq!(report.inconsistent, 0);
        self.qemu.wait_laps(1, BOOT).unwrap();
    }
}

fn expect_unharmed(qemu: &mut Qemu, status: &str) {
    let reached = poll_until("the guest is in its state again", PAUSE, || {
        Ok((qemu.status()? == status).then_some(()))
    });
    reached.unwrap_or_else(|error| panic!("{error}: {:?} is not {status:?}", qemu.status()));
    // The kernel takes down a killed process's userfaultfd in its own time.
    poll_until(
        "the guest's memory is free",
        PAUSE,
        || Ok((!qemu.has_userfaultfd()?).then_some(())),
    )
    .unwrap();
    if status == "running" {
        let seen = qemu.wait_heartbeat(BOOT, |_| true).unwrap();
        let now = qemu
            .wait_heartbeat(BOOT, |now| {
                now.workers.iter().zip(&seen.workers).all(|(now, seen)| now > seen)
            })
            .unwrap();
        assert_eq!(now.inconsistent, 0, "{:?}", qemu.console().unwrap().inconsistencies());
    }
}

/// Whether the snapshot was already published when the signal came; it is then a whole one, and is removed.
fn was_too_late(out: &Path) -> bool {
    if !out.exists() {
        return false;
    }
    let verified = livesnap::command(["verify"]).unwrap().arg(out).output().unwrap();
    assert!(verified.status.success(), "{verified:?}");
    std::fs::remove_dir_all(out).unwrap();
    true
}

#[test]
fn killing_livesnap_at_any_moment_leaves_the_guest_running() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let moments = Moments::new();
    let mut scene = Scene::new();
    let phases = [None].into_iter().chain(PHASES.map(Some));
    for (phase, round) in phases.flat_map(|phase| [0, 1, 2].map(|round| (phase, round))) {
        let running = scene.snapshot_at(phase);
        if round > 0 {
            moments.pass();
        }
        running.signal(Signal::KILL).unwrap();
        let Ended { status, log, .. } = running.wait().unwrap();
        // The last phases may be over in less than a moment.
        let may_be_over = round > 0 || phase == Some("committing");
        let killed = status.signal() == Some(Signal::KILL.as_raw());
        assert!(killed || may_be_over && status.success(), "{phase:?}: {status}, {log}");
        scene.expect_unharmed("running");
        if !was_too_late(&scene.out()) {
            scene.expect_no_snapshot();
        }
    }
    // The overlays of killed snapshots stay in the chain, and the next one goes on top of it.
    scene.expect_next_works();
}

#[test]
fn interrupting_livesnap_at_any_moment_leaves_no_trace() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let moments = Moments::new();
    let mut scene = Scene::new();
    let mut before = scene.traces();
    for signal in [Signal::INT, Signal::TERM] {
        for phase in PHASES {
            let running = scene.snapshot_at(Some(phase));
            // The last phase is over in a moment, so that only an immediate signal is in time.
            if phase != "committing" {
                moments.pass();
            }
            running.signal(signal).unwrap();
            let ended = running.wait().unwrap();
            scene.expect_unharmed("running");
            if ended.status.success() {
                assert!(was_too_late(&scene.out()), "{phase}: {}", ended.log);
                before = scene.traces();
                continue;
            }
            ended.expect_failure(130, "cancelled", &[]).unwrap();
            scene.expect_no_snapshot();
            assert_eq!(scene.traces(), before, "{signal:?} while {phase}");
        }
    }
    scene.expect_next_works();
}
