//! The daemon killed, and snapshots aborted, in every phase of a snapshot: what becomes of the guest, and what is told.
//!
//! A phase may last less than the signal takes. So the snapshot's process is stopped at the beginning of the phase, and
//! goes on when the harm is done.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use livesnap_tests::daemon::{Daemon, Phases};
use livesnap_tests::qemu::{Disk, Format, Load, Qemu};
use livesnap_tests::traces::Traces;
use livesnap_tests::{is_root_or_skip, livesnap, poll_until};
use rustix::process::Signal;
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(60);
/// The phases of a session, in order.
const PHASES: [&str; 6] = ["preparing", "arming", "frozen", "copying", "draining", "committing"];
/// The time in which it is committed, whoever wants it no more.
const PAST: &str = "past the last look whether it is wanted";
/// Those that may be over before the process is stopped, and the snapshot with them.
const LATE: [&str; 3] = ["draining", "committing", PAST];

/// A busy VM with a disk, and a daemon's directory.
struct Scene {
    qemu: Qemu,
    disk: tempfile::TempDir,
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let [disk, dir] = [(), ()].map(|()| tempfile::tempdir_in("/var/tmp").unwrap());
        let image = Disk::create(disk.path().join("disk.qcow2"), Format::Qcow2, 32).unwrap();
        let load = Load { workers: 2, disk: true, ..Load::default() };
        let mut qemu = Qemu::builder().vcpus(2).disk(image).load(load).start().unwrap();
        qemu.wait_ready(BOOT).unwrap();
        qemu.wait_heartbeat(BOOT, |beat| beat.disk > 10).unwrap();
        Daemon::configure(dir.path(), &[("vm1", &qemu)], "").unwrap();
        Self { qemu, disk, dir }
    }

    fn traces(&mut self) -> Traces {
        Traces::of(&mut self.qemu, self.disk.path()).unwrap()
    }

    fn snapshots(&self) -> PathBuf {
        self.dir.path().join("snapshots")
    }

    /// The guest runs, and its memory is nobody's any more; nothing is left of an operation's processes.
    fn expect_unharmed(&mut self) {
        let reached = poll_until("the guest runs", LIMIT, || {
            Ok((self.qemu.status()? == "running").then_some(()))
        });
        reached.unwrap();
        self.qemu.wait_unprotected(LIMIT).unwrap();
        let seen = self.qemu.wait_heartbeat(BOOT, |_| true).unwrap();
        let goes_on = self.qemu.wait_heartbeat(BOOT, |now| {
            now.workers.iter().zip(&seen.workers).all(|(now, seen)| now > seen)
        });
        assert_eq!(goes_on.unwrap().inconsistent, 0);
        assert_eq!(names(&self.dir.path().join("run/operations")), [""; 0]);
    }

    /// There is no snapshot, and nothing that was made for one.
    fn expect_nothing(&self) {
        let vm1 = self.snapshots().join("vm1");
        let gone = || Ok(names(&vm1).is_empty().then_some(()));
        poll_until("what was begun is removed", LIMIT, gone).unwrap();
    }

    /// The operation's snapshot is whole; it is taken away.
    fn expect_whole(&self, completed: &Value) {
        let directory = Path::new(completed["destination"].as_str().unwrap());
        assert!(completed["result"]["report"]["ram_bytes"].is_number(), "{completed:#}");
        let verified = livesnap::command(["verify"]).unwrap().arg(directory).output().unwrap();
        assert!(verified.status.success(), "{verified:?}");
        fs::remove_dir_all(directory).unwrap();
    }
}

/// What lies in a directory; nothing if it is missing.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Begins a snapshot and waits until it is in `phase`. It takes minutes where the phase is an early one, and else seconds.
fn begin(daemon: &Daemon, phases: &mut Phases, phase: &str) -> String {
    let bandwidth = if LATE.contains(&phase) { 48 << 20 } else { 1 << 20 };
    let policy = json!({
        "on_infeasible": "wait", "buffer_bytes": 16 << 20, "max_bandwidth_bytes_per_second": bandwidth,
    });
    let request = json!({"vm": "vm1", "policy": policy});
    let taken_up = daemon.post("/snapshot", &[], &request).unwrap();
    assert_eq!(taken_up.status, 202, "{taken_up:?}");
    if phase == PAST {
        phases.reach("committing").unwrap();
        let destination = Path::new(taken_up.body["destination"].as_str().unwrap());
        let name = destination.file_name().unwrap().to_str().unwrap();
        let sums = destination.with_file_name(format!(".{name}.livesnap-partial/ram.crc32c"));
        // What is left of it may last less than a sleep.
        let deadline = Instant::now() + LIMIT;
        while !sums.exists() && !destination.exists() {
            assert!(Instant::now() < deadline, "it is not committed");
        }
    } else {
        phases.reach(phase).unwrap();
    }
    format!("/snapshot/{}", taken_up.body["id"].as_str().unwrap())
}

/// Waits for its end.
fn ended(daemon: &Daemon, path: &str) -> Value {
    daemon.wait_operation(path, |now| now["ended_at"].is_string()).unwrap()
}

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Killed {
    /// The daemon, while its snapshot's guard stands still, which goes on when the next daemon is there.
    Daemon,
    /// That process too.
    DaemonAndProcess,
}

/// The daemon is killed; returns what the next one tells of its operation.
fn kill_in(scene: &mut Scene, phase: &str, killed: Killed) -> Value {
    let (daemon, mut phases) = Daemon::start_followed(scene.dir.path()).unwrap();
    let path = begin(&daemon, &mut phases, phase);
    let family = daemon.snapshots().unwrap();
    let is_held = killed == Killed::Daemon && family.stop().unwrap() && !LATE.contains(&phase);
    assert!(is_held || killed != Killed::Daemon || phase != "copying", "there is no guard");
    daemon.end(Signal::KILL).unwrap();
    if killed == Killed::DaemonAndProcess {
        family.kill().unwrap();
    }
    let next = Daemon::start(scene.dir.path()).unwrap();
    if is_held {
        // What is to become of it is not known yet, and its virtual machine is still its own.
        let now = next.get(&path).unwrap().body;
        assert_eq!(
            (&now["state"], &now["ended_at"]),
            (&json!("aborting"), &Value::Null),
            "{now:#}"
        );
        let busy = next.post("/snapshot", &[], &json!({"vm": "vm1"})).unwrap();
        assert_eq!((busy.status, &busy.body["reason"]), (409, &json!("busy")), "{busy:?}");
    }
    family.go_on().unwrap();
    let ended = ended(&next, &path);
    scene.expect_unharmed();
    assert!(next.end(Signal::TERM).unwrap().success());
    ended
}

#[test]
fn a_daemon_that_is_killed_in_any_phase_harms_no_guest_and_tells_the_truth() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let mut scene = Scene::new();
    for killed in [Killed::Daemon, Killed::DaemonAndProcess] {
        for phase in PHASES.into_iter().chain([PAST]) {
            let before = scene.traces();
            let ended = kill_in(&mut scene, phase, killed);
            eprintln!("{killed:?} while {phase}: {}", ended["state"]);
            if ended["state"] == "completed" && LATE.contains(&phase) {
                scene.expect_whole(&ended);
                continue;
            }
            assert!(phase != PAST || killed == Killed::DaemonAndProcess, "{ended:#}");
            let told = (&ended["state"], &ended["error"]["reason"]);
            assert_eq!(told, (&json!("aborted"), &json!("daemon_restart")), "{ended:#}");
            scene.expect_nothing();
            // Overlays of a process that was killed stay in the chain, and the next snapshot goes on top of them.
            if killed != Killed::DaemonAndProcess {
                assert_eq!(scene.traces(), before, "{killed:?} while {phase}");
            }
        }
    }
}

#[test]
fn a_snapshot_that_is_aborted_in_any_phase_leaves_no_trace() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let mut scene = Scene::new();
    let (daemon, mut phases) = Daemon::start_followed(scene.dir.path()).unwrap();
    for phase in PHASES.into_iter().chain([PAST]) {
        let before = scene.traces();
        let path = begin(&daemon, &mut phases, phase);
        let family = daemon.snapshots().unwrap();
        family.stop().unwrap();
        let told = daemon.post(&format!("{path}/abort"), &[], &json!({})).unwrap();
        assert_eq!(told.status, 202, "{told:?}");
        family.go_on().unwrap();
        let ended = ended(&daemon, &path);
        eprintln!("{phase}: {}", ended["state"]);
        scene.expect_unharmed();
        if ended["state"] == "completed" && LATE.contains(&phase) {
            scene.expect_whole(&ended);
            continue;
        }
        assert_ne!(phase, PAST, "{ended:#}");
        let told = (&ended["state"], &ended["error"]["reason"]);
        assert_eq!(told, (&json!("aborted"), &json!("cancelled")), "{ended:#}");
        scene.expect_nothing();
        assert_eq!(scene.traces(), before, "{phase}");
    }
}
