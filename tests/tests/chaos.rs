//! What a snapshot may do to a guest when things go wrong around it: nothing.
//!
//! livesnap is killed, interrupted, stopped, and let down by its disk, by QEMU and by the guest, at moments
//! spread over its whole run. Moments are random; `LIVESNAP_SEED` repeats those of an earlier run.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::cell::Cell;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use livesnap_tests::check::check_files;
use livesnap_tests::livesnap::{Ended, Running, snapshot, snapshot_command};
use livesnap_tests::mount::Mount;
use livesnap_tests::qemu::{Builder, Disk, Format, Load, Qemu, Ram};
use livesnap_tests::qmp_proxy::{Answer, QmpProxy};
use livesnap_tests::traces::Traces;
use livesnap_tests::{is_root_or_skip, livesnap, poll_until};
use rustix::process::Signal;
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(120);
/// The product's default limit of a pause, and some time for a busy machine to act on it.
const PAUSE: Duration = Duration::from_secs(5);
/// The limit of a pause and that of one answer after it, and some time for a busy machine.
const GIVEN_UP: Duration = Duration::from_secs(25);
/// The phases of a session, in order; before the first it gets in touch with QEMU.
const PHASES: [&str; 6] = ["preparing", "arming", "frozen", "copying", "draining", "committing"];
/// What the guard logs when it continues a stopped livesnap.
const WOKEN: &str = "livesnap was stopped";
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

    /// A snapshot that was stopped by a signal amid the pause, and what was to be seen before it.
    fn snapshot_stuck_in_the_pause(&mut self) -> (Running, Traces) {
        for _ in 0..100 {
            let before = self.traces();
            let running = self.snapshot_at(Some("frozen"));
            let seen_paused = || self.qemu.status().unwrap() == "paused";
            // The pause is a matter of milliseconds: it may have been, or have ended before the signal.
            if std::iter::repeat_with(seen_paused).take(20).any(|paused| paused) {
                running.signal(Signal::STOP).unwrap();
                if self.qemu.status().unwrap() == "paused" {
                    return (running, before);
                }
            }
            running.signal(Signal::CONT).unwrap();
            running.signal(Signal::INT).unwrap();
            running.wait().unwrap();
            was_too_late(&self.out());
        }
        panic!("no pause lasted long enough to be caught");
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

    /// What is to be seen of snapshots.
    fn traces(&mut self) -> Traces {
        Traces::of(&mut self.qemu, self.dir.path()).unwrap()
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
    qemu.wait_unprotected(PAUSE).unwrap();
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
    for _ in 0..3 {
        let (running, _) = scene.snapshot_stuck_in_the_pause();
        running.signal(Signal::KILL).unwrap();
        running.wait().unwrap();
        scene.expect_unharmed("running");
        scene.expect_no_snapshot();
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

#[test]
fn a_livesnap_that_hangs_in_the_pause_fails_and_the_guest_goes_on() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let mut scene = Scene::new();
    let (hanging, before) = scene.snapshot_stuck_in_the_pause();
    poll_until("the guard continues the guest", PAUSE, || {
        Ok((scene.qemu.status()? == "running").then_some(()))
    })
    .unwrap();
    // The guard has woken it as well.
    let ended = hanging.wait().unwrap();
    ended.expect_failure(1, "pause_too_long", &["2s"]).unwrap();
    scene.expect_unharmed("running");
    scene.expect_no_snapshot();
    assert_eq!(scene.traces(), before);
    scene.expect_next_works();
}

#[test]
fn a_livesnap_that_is_stopped_while_copying_is_woken() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let mut scene = Scene::new();
    let stopped = scene.snapshot_at(Some("copying"));
    stopped.signal(Signal::STOP).unwrap();
    let ended = stopped.wait().unwrap();
    assert!(ended.status.success() && ended.log.contains(WOKEN), "{}", ended.log);
    scene.expect_unharmed("running");
    check_files(&scene.out().join("ram.mapped-ram"), None).unwrap();
    scene.expect_next_works();
}

#[test]
fn ctrl_z_does_not_stop_a_livesnap() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let mut qemu = boot(&Qemu::builder());
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    let mut command = snapshot_command(&qemu, &out, &[]).unwrap();
    // As a shell's job has: the kernel stops no group that nobody of its session could continue.
    command.process_group(0);
    let mut running = Running::start(command).unwrap();
    running.reach("copying").unwrap();
    running.signal(Signal::TSTP).unwrap();
    let ended = running.wait().unwrap();
    assert!(ended.status.success() && !ended.log.contains(WOKEN), "{}", ended.log);
    expect_unharmed(&mut qemu, "running");
}

/// Boots a busy VM without a disk.
fn boot(builder: &Builder) -> Qemu {
    let mut qemu = builder.start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu
}

/// Runs a snapshot into `out`, doing `harm` at the beginning of `phase` while livesnap stands still.
fn snapshot_with(qemu: &mut Qemu, out: &Path, phase: &str, harm: impl FnOnce(&mut Qemu)) -> Ended {
    let mut running = Running::start(snapshot_command(qemu, out, &[]).unwrap()).unwrap();
    running.reach(phase).unwrap();
    running.hold(|| harm(qemu)).unwrap();
    running.wait().unwrap()
}

/// There is no snapshot at `out`, and nothing beside it that was made for it.
fn expect_nothing_at(out: &Path) {
    assert!(!out.exists());
    let entries = std::fs::read_dir(out.parent().unwrap()).unwrap();
    let left: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("livesnap"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_destination_that_fails_fails_the_snapshot_and_the_next_one_works() {
    if !is_root_or_skip("mounting file systems").unwrap() {
        return;
    }
    let mut qemu = boot(&Qemu::builder());
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();

    let tmpfs = Mount::tmpfs(&dir.path().join("tmpfs"), "size=600M").unwrap();
    let out = tmpfs.path().join("snapshot");
    let full = |_: &mut Qemu| tmpfs.remount("size=4M").unwrap();
    let ended = snapshot_with(&mut qemu, &out, "arming", full);
    ended.expect_failure(1, "no_space", &["No space left", "free space"]).unwrap();
    expect_unharmed(&mut qemu, "running");
    expect_nothing_at(&out);
    tmpfs.remount("size=600M").unwrap();
    snapshot(&qemu, &out, &[]).unwrap();

    // Through a real file system and O_DIRECT.
    let image = dir.path().join("image");
    let ext4 = Mount::ext4(&dir.path().join("ext4"), &image, 700).unwrap();
    let out = ext4.path().join("snapshot");
    let filler = ext4.path().join("filler");
    let ended = snapshot_with(&mut qemu, &out, "arming", |_| ext4.fill(&filler).unwrap());
    ended.expect_failure(1, "no_space", &["No space left"]).unwrap();
    expect_unharmed(&mut qemu, "running");
    expect_nothing_at(&out);
    std::fs::remove_file(&filler).unwrap();
    snapshot(&qemu, &out, &[]).unwrap();
    ext4.remount("ro").unwrap();
    let command = snapshot_command(&qemu, &ext4.path().join("other"), &[]).unwrap();
    let ended = Running::start(command).unwrap().wait().unwrap();
    ended.expect_failure(3, "bad_destination", &["read-only"]).unwrap();
    drop(ext4);

    // A disk that loses most of its blocks.
    let image = dir.path().join("broken-image");
    let broken = Mount::ext4(&dir.path().join("broken"), &image, 700).unwrap();
    let out = broken.path().join("snapshot");
    let cut_off = |_: &mut Qemu| broken.cut_off(&image, 40).unwrap();
    let ended = snapshot_with(&mut qemu, &out, "arming", cut_off);
    ended.expect_failure(1, "io", &["Input/output error", "mend the disk"]).unwrap();
    expect_unharmed(&mut qemu, "running");
    assert!(!out.exists());
    drop(broken);

    // A limit on the size of files, which by default ends a process by SIGXFSZ.
    let out = dir.path().join("snapshot");
    let limited = limit_file_size(&snapshot_command(&qemu, &out, &[]).unwrap());
    let ended = Running::start(limited).unwrap().wait().unwrap();
    ended.expect_failure(3, "io", &["File too large"]).unwrap();
    expect_unharmed(&mut qemu, "running");
    expect_nothing_at(&out);
    qemu.wait_laps(1, BOOT).unwrap();
}

/// `command` with a limit of 16 MiB for each file.
fn limit_file_size(command: &Command) -> Command {
    let mut limited = Command::new("prlimit");
    limited.args(["--fsize=16777216", "--"]).arg(command.get_program()).args(command.get_args());
    limited
}

#[test]
fn a_guest_that_its_owner_paused_stays_paused() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let builder = Qemu::builder();
    let mut qemu = boot(&builder);
    qemu.qmp("stop", json!({})).unwrap();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    for signal in [Signal::KILL, Signal::TERM] {
        for phase in ["arming", "frozen", "copying"] {
            let ended = {
                let command = snapshot_command(&qemu, &out, &[]).unwrap();
                let mut running = Running::start(command).unwrap();
                running.reach(phase).unwrap();
                running.signal(signal).unwrap();
                running.wait().unwrap()
            };
            assert!(!ended.status.success(), "{phase}: {}", ended.log);
            expect_unharmed(&mut qemu, "paused");
            assert!(!out.exists());
        }
    }
    snapshot(&qemu, &out, &[]).unwrap();
    expect_unharmed(&mut qemu, "paused");
    assert_eq!(qemu.take_pauses().unwrap(), []);
    drop(qemu);

    let mut copy = builder.incoming().start().unwrap();
    copy.load_mapped_ram(&out.join("ram.mapped-ram")).unwrap();
    assert_eq!(copy.status().unwrap(), "paused");
    copy.qmp("cont", json!({})).unwrap();
    copy.wait_laps(1, BOOT).unwrap();
}

#[test]
fn the_end_of_qemu_ends_the_snapshot() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    for phase in ["arming", "frozen", "copying"] {
        // All its memory exists from the start, so that there is something to save before it has booted.
        let mut qemu = Qemu::builder().arguments(["-overcommit", "mem-lock=on"]).start().unwrap();
        let ended = snapshot_with(&mut qemu, &out, phase, |qemu| {
            qemu.signal(Signal::KILL).unwrap();
            qemu.wait_exit(PAUSE).unwrap();
        });
        ended.expect_failure(1, "vmm_died", &[" has ended"]).unwrap();
        expect_nothing_at(&out);
    }
}

#[test]
fn a_qemu_that_hangs_fails_the_snapshot_and_runs_when_it_is_back() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let mut scene = Scene::new();
    let (stuck, _) = scene.snapshot_stuck_in_the_pause();
    scene.qemu.signal(Signal::STOP).unwrap();
    stuck.signal(Signal::CONT).unwrap();
    let ended = stuck.wait().unwrap();
    ended.expect_failure(1, "vmm_unreachable", &["did not answer"]).unwrap();
    scene.expect_no_snapshot();
    // What livesnap and its guard have sent by then is enough.
    scene.qemu.signal(Signal::CONT).unwrap();
    scene.expect_unharmed("running");
    scene.expect_next_works();
}

#[test]
fn answers_that_are_lost_or_garbled_fail_the_snapshot_and_the_guest_goes_on() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let mut qemu = boot(&Qemu::builder());
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    let garbage = || Answer::Other(b"{]\r\n".to_vec());
    type Trouble = Box<dyn Fn() -> Answer + Send>;
    let cases: [(&str, Trouble, i32, &str); 5] = [
        ("query-version", Box::new(garbage), 3, "is not QMP"),
        ("getfd", Box::new(garbage), 3, "is not QMP"),
        ("getfd", Box::new(|| Answer::Close), 3, "closed"),
        ("stop", Box::new(garbage), 1, "is not QMP"),
        ("xen-save-devices-state", Box::new(|| Answer::Nothing), 1, "did not answer"),
    ];
    for (command, trouble, code, words) in cases {
        let spoil = move |name: &str, answer| {
            if name == command { trouble() } else { Answer::Other(answer) }
        };
        let proxy = QmpProxy::start(&qemu, spoil).unwrap();
        let told = proxy.snapshot_command(&out).unwrap();
        let ended = Running::start(told).unwrap().wait().unwrap();
        ended.expect_failure(code, "vmm_unreachable", &[words, command]).unwrap();
        expect_unharmed(&mut qemu, "running");
        expect_nothing_at(&out);
    }
    snapshot(&qemu, &out, &[]).unwrap();
    qemu.wait_laps(1, BOOT).unwrap();
}

#[test]
fn a_qemu_that_answers_no_more_in_the_pause_is_given_up_soon() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let mut qemu = boot(&Qemu::builder());
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    let is_silent = AtomicBool::new(false);
    let proxy = QmpProxy::start(&qemu, move |name, answer| {
        is_silent.fetch_or(name == "xen-save-devices-state", Ordering::Relaxed);
        if is_silent.load(Ordering::Relaxed) { Answer::Nothing } else { Answer::Other(answer) }
    })
    .unwrap();
    let mut running = Running::start(proxy.snapshot_command(&out).unwrap()).unwrap();
    running.reach("frozen").unwrap();
    let frozen = Instant::now();
    let ended = running.wait().unwrap();
    let took = frozen.elapsed();
    assert!(took < GIVEN_UP, "{took:?}: {}", ended.log);
    let words = ["xen-save-devices-state within", "no longer answers"];
    ended.expect_failure(1, "vmm_unreachable", &words).unwrap();
    expect_unharmed(&mut qemu, "running");
    expect_nothing_at(&out);
}

/// A guest with a balloon that takes nothing yet.
fn boot_with_balloon(ram: Ram) -> Qemu {
    let balloon = ["-device", "virtio-balloon-pci,id=balloon"];
    boot(&Qemu::builder().memory_mib(768).ram(ram).arguments(balloon))
}

/// Has most of the guest's memory taken while the snapshot that `command` takes is copying it.
fn inflate_amid(qemu: &mut Qemu, mut command: Command) -> Ended {
    // Slow enough for the balloon, which needs the guest to act, to be noticed before the end.
    command.arg("--max-bandwidth=8MiB");
    let mut running = Running::start(command).unwrap();
    running.reach("copying").unwrap();
    qemu.qmp("balloon", json!({"value": 128 << 20})).unwrap();
    running.wait().unwrap()
}

#[test]
fn pages_given_to_the_balloon_fail_the_snapshot() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let mut qemu = boot_with_balloon(Ram::Anonymous);
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    let command = snapshot_command(&qemu, &out, &[]).unwrap();
    let ended = inflate_amid(&mut qemu, command);
    ended.expect_failure(1, "pages_discarded", &["balloon"]).unwrap();
    expect_unharmed(&mut qemu, "running");
    expect_nothing_at(&out);
    let settle = |qemu: &mut Qemu, bytes: u64| {
        qemu.qmp("balloon", json!({"value": bytes})).unwrap();
        poll_until("the balloon has its size", BOOT, || {
            let actual = qemu.qmp("query-balloon", json!({}))?["actual"].as_u64();
            Ok((actual == Some(bytes)).then_some(()))
        })
        .unwrap();
    };
    // One that is left alone does no harm, whatever its size.
    settle(&mut qemu, 512 << 20);
    // QEMU tells of changes at most once a second, of the last one late.
    poll_until("a snapshot is taken", BOOT, || Ok(snapshot(&qemu, &out, &[]).ok())).unwrap();
    check_files(&out.join("ram.mapped-ram"), None).unwrap();
    qemu.wait_laps(1, BOOT).unwrap();
}

#[test]
fn pages_given_to_the_balloon_are_noticed_even_if_qemu_does_not_tell() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    // The kernel tells of no hole that is punched into shared memory.
    let mut qemu = boot_with_balloon(Ram::Memfd);
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    let spoil = |name: &str, message| match name {
        "BALLOON_CHANGE" => Answer::Nothing,
        _ => Answer::Other(message),
    };
    let proxy = QmpProxy::start(&qemu, spoil).unwrap();
    let mut command = proxy.snapshot_command(&out).unwrap();
    command.arg("--on-infeasible=wait");
    let ended = inflate_amid(&mut qemu, command);
    ended.expect_failure(1, "pages_discarded", &["balloon went from 805306368 to"]).unwrap();
    expect_unharmed(&mut qemu, "running");
    expect_nothing_at(&out);
}

#[test]
fn a_guest_that_reboots_amid_the_snapshot_boots() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let mut qemu = boot(&Qemu::builder());
    qemu.qmp("set-action", json!({"reboot": "reset"})).unwrap();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    let running = {
        let mut running = Running::start(snapshot_command(&qemu, &out, &[]).unwrap()).unwrap();
        running.reach("copying").unwrap();
        running
    };
    qemu.qmp("system_reset", json!({})).unwrap();
    let ended = running.wait().unwrap();
    // The consistency point lies before the reboot, so it is no reason to fail.
    assert!(ended.status.success(), "{}", ended.log);
    check_files(&out.join("ram.mapped-ram"), None).unwrap();
    poll_until("the guest has booted again", BOOT, || {
        Ok((qemu.console()?.text().matches("LS ready").count() == 2).then_some(()))
    })
    .unwrap();
    expect_unharmed(&mut qemu, "running");
}
