//! The limits of a snapshot, kept on a real QEMU: the virtual CPUs' share of CPU time, that it is given back whatever
//! happens, and when a snapshot is given up.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use livesnap_tests::check::check_files;
use livesnap_tests::cpu_time::{Withheld, busy, ran};
use livesnap_tests::daemon::Daemon;
use livesnap_tests::livesnap::{Running, snapshot, snapshot_command};
use livesnap_tests::qemu::{Builder, Load, Qemu};
use livesnap_tests::slow_disk::SlowDisk;
use livesnap_tests::{is_root_or_skip, livesnap, poll_until};
use rustix::process::Signal;
use serde_json::json;

const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(60);
/// Slow enough that a snapshot is still at it when the test has looked.
const CRAWL: u64 = 2 << 20;

/// One guest at a time, by emulation and busy on two virtual CPUs: more of them would hold each other up. Nothing where the
/// tests cannot run.
fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    is_root_or_skip("cgroups").unwrap().then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

fn boot(builder: &Builder) -> Qemu {
    let mut qemu = builder.start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu
}

/// The cgroups of all of QEMU's threads, by thread.
fn cgroups(qemu: &Qemu) -> BTreeMap<i64, String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", qemu.pid())).unwrap();
    let cgroup = |path: &Path| fs::read_to_string(path.join("cgroup")).ok();
    tasks
        .filter_map(|task| {
            let path = task.unwrap().path();
            Some((path.file_name()?.to_str()?.parse().ok()?, cgroup(&path)?))
        })
        .collect()
}

fn is_ours(cgroup: &str) -> bool {
    cgroup.contains("/livesnap-")
}

/// Whether all these threads are in groups of their own.
fn are_throttled(qemu: &Qemu, vcpus: &[i64]) -> bool {
    let cgroups = cgroups(qemu);
    vcpus.iter().all(|thread| is_ours(&cgroups[thread]))
}

/// Waits until the virtual CPUs, and they alone, are in groups of their own.
fn wait_throttled(qemu: &mut Qemu) {
    let vcpus = qemu.vcpu_threads().unwrap();
    let throttled = || Ok(are_throttled(qemu, &vcpus).then_some(()));
    poll_until("virtual CPUs are throttled", LIMIT, throttled).unwrap();
    for (thread, cgroup) in cgroups(qemu) {
        assert_eq!(is_ours(&cgroup), vcpus.contains(&thread), "{thread}: {cgroup}");
    }
}

/// Waits until nothing is left of a throttle, and checks that the guest works.
fn wait_given_back(qemu: &mut Qemu, state_dir: &Path) {
    poll_until("all is given back", LIMIT, || {
        let is_left = cgroups(qemu).values().any(|cgroup| is_ours(cgroup));
        // A daemon has directories there too.
        let is_journal = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().path().is_file();
        let has_journal = fs::read_dir(state_dir).is_ok_and(|mut all| all.any(is_journal));
        Ok((!is_left && !has_journal).then_some(()))
    })
    .unwrap();
    assert_eq!(qemu.status().unwrap(), "running");
    qemu.wait_laps(1, BOOT).unwrap();
}

/// How a snapshot ends that throttles a guest.
#[derive(Clone, Copy, Debug)]
enum Ending {
    Completed,
    Failed,
    Interrupted,
    Killed,
    KilledWithItsGuard,
}

#[test]
fn cpu_time_is_given_back_however_a_snapshot_ends() {
    let Some(_turn) = turn() else { return };
    let mut qemu = boot(&Qemu::builder().vcpus(2));
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let state_dir = dir.path().join("state");
    let state = state_dir.to_str().unwrap();
    for ending in [
        Ending::Completed,
        Ending::Failed,
        Ending::Interrupted,
        Ending::Killed,
        Ending::KilledWithItsGuard,
    ] {
        eprintln!("{ending:?}");
        let slow = SlowDisk::new(dir.path(), CRAWL).unwrap();
        let out = dir.path().join(format!("{ending:?}"));
        let arguments = ["--fixed-cpu=30%", "--state-dir", state];
        let command = snapshot_command(&qemu, &out, &arguments).unwrap();
        let mut running = Running::start(slow.command(&command)).unwrap();
        running.reach("copying").unwrap();
        wait_throttled(&mut qemu);
        match ending {
            Ending::Completed => slow.lift().unwrap(),
            Ending::Failed => running.limit_files(1 << 20).unwrap(),
            Ending::Interrupted => running.signal(Signal::TERM).unwrap(),
            Ending::Killed => running.signal(Signal::KILL).unwrap(),
            Ending::KilledWithItsGuard => running.kill_with_guard().unwrap(),
        }
        let ended = running.wait().unwrap();
        match ending {
            Ending::Completed => {
                let told = ended.told().unwrap();
                assert!(told["control"]["withheld_ns"].as_u64().unwrap() > 0, "{told:#}");
                check_files(&out.join("ram.mapped-ram"), None).unwrap();
            }
            Ending::Failed => ended.expect_failure(1, "io", &["too large"]).unwrap(),
            Ending::Interrupted => assert_eq!(ended.status.code(), Some(130), "{}", ended.log),
            Ending::Killed => {}
            Ending::KilledWithItsGuard => {
                wait_throttled(&mut qemu);
                let look = |more: &[&str]| {
                    let mut doctor = livesnap::command(["doctor", "--json"]).unwrap();
                    doctor.args(["--state-dir", state]).args(more);
                    let told = livesnap::json(&doctor.output().unwrap()).unwrap();
                    let findings = told["findings"].as_array().unwrap().clone();
                    findings.into_iter().find(|found| found["subject"] == "throttle").unwrap()
                };
                assert_eq!(look(&[])["verdict"], "degraded");
                assert_eq!(look(&["--repair"])["verdict"], "ok");
            }
        }
        wait_given_back(&mut qemu, &state_dir);
    }
    // And a snapshot that needs no throttle changes nothing, not even for a while.
    let before = cgroups(&qemu);
    let told = snapshot(&qemu, &dir.path().join("last"), &["--fixed-cpu=100%"]).unwrap();
    assert_eq!(told["control"]["throttled_ns"], 0, "{told:#}");
    let vcpus = qemu.vcpu_threads().unwrap();
    assert!(vcpus.iter().all(|thread| cgroups(&qemu)[thread] == before[thread]));
}

/// What is killed with a daemon; who is left puts back what there is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Killed {
    /// Its snapshot's process does.
    Daemon,
    /// That one's guard does.
    AndProcess,
    /// The next daemon does.
    AndGuard,
}

#[test]
fn cpu_time_is_given_back_when_a_daemon_is_killed() {
    let Some(_turn) = turn() else { return };
    let mut qemu = busy_guest();
    let vcpus = qemu.vcpu_threads().unwrap();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    Daemon::configure(dir.path(), &[("vm1", &qemu)], "").unwrap();
    // It takes minutes.
    let policy = json!({
        "on_infeasible": "wait", "buffer_bytes": 64 << 20, "min_cpu_ratio": 0.1, "max_bandwidth_bytes_per_second": 1 << 20,
    });
    for killed in [Killed::Daemon, Killed::AndProcess, Killed::AndGuard] {
        eprintln!("{killed:?}");
        let daemon = Daemon::start(dir.path()).unwrap();
        let request = json!({"vm": "vm1", "policy": policy});
        let taken_up = daemon.post("/snapshot", &[], &request).unwrap();
        assert_eq!(taken_up.status, 202, "{taken_up:?}");
        let path = format!("/snapshot/{}", taken_up.body["id"].as_str().unwrap());
        daemon.wait_state(&path, "copying").unwrap();
        let family = daemon.snapshots().unwrap();
        // The controller may let go at any moment: it is held up in one in which it does not.
        let held = poll_until("virtual CPUs are throttled", LIMIT, || {
            family.stop()?;
            if are_throttled(&qemu, &vcpus) {
                return Ok(Some(()));
            }
            family.go_on()?;
            Ok(None)
        });
        held.unwrap_or_else(|error| panic!("{error:#}: {:#}", daemon.get(&path).unwrap().body));
        // One that saw its snapshot die would put it right itself.
        daemon.signal(Signal::STOP).unwrap();
        if killed != Killed::Daemon {
            family.kill().unwrap();
        }
        if killed == Killed::AndGuard {
            family.kill_guards().unwrap();
        }
        assert!(are_throttled(&qemu, &vcpus), "somebody has given it back before");
        if killed == Killed::Daemon {
            // One that stood still would be ended by the kernel in another way (setpgid(2)).
            family.go_on().unwrap();
        }
        daemon.end(Signal::KILL).unwrap();
        family.go_on().unwrap();
        let start = || Daemon::start(dir.path()).unwrap();
        let next = (killed == Killed::AndGuard).then(start);
        wait_given_back(&mut qemu, &dir.path().join("run"));
        let next = next.unwrap_or_else(start);
        let ended = next.wait_operation(&path, |now| now["ended_at"].is_string()).unwrap();
        assert_eq!(ended["error"]["reason"], "daemon_restart", "{ended:#}");
        assert!(next.end(Signal::TERM).unwrap().success());
    }
}

/// Long enough that a virtual CPU uses up its quota many times, and how often it is looked at.
const WINDOW: Duration = Duration::from_millis(500);
const WINDOWS: usize = 20;

#[test]
fn virtual_cpus_are_denied_the_cpu_time_that_was_commanded() {
    let Some(_turn) = turn() else { return };
    let mut qemu = boot(&Qemu::builder());
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let slow = SlowDisk::new(dir.path(), CRAWL).unwrap();
    let share = 0.5;
    let arguments = ["--fixed-cpu=50%"];
    let command = snapshot_command(&qemu, &dir.path().join("snapshot"), &arguments).unwrap();
    let mut running = Running::start(slow.command(&command)).unwrap();
    running.reach("copying").unwrap();
    wait_throttled(&mut qemu);
    let threads = qemu.vcpu_threads().unwrap();
    let mut withheld = Withheld::new(threads.clone());
    let mut look = || {
        withheld.look();
        let ran = ran(qemu.pid(), threads[0]).unwrap();
        [withheld.total(), ran, busy().unwrap()].map(|time| time.as_secs_f64())
    };
    let mut undisturbed = 0;
    let has_come = (0..WINDOWS).any(|_| {
        let (before, began) = (look(), Instant::now());
        let end = || Ok((began.elapsed() >= WINDOW).then_some(()));
        poll_until("the end of the window", LIMIT, end).unwrap();
        let (after, elapsed) = (look(), began.elapsed().as_secs_f64());
        let [withheld, ran, busy]: [f64; 3] = std::array::from_fn(|at| after[at] - before[at]);
        let others = busy - ran;
        eprintln!("{elapsed:.3} s: withheld {withheld:.3}, ran {ran:.3}; others {others:.3}");
        // On a host that is never at rest only this can be said of all windows.
        assert!(ran < share * elapsed * 1.1, "{ran} in {elapsed}");
        let commanded = (1.0 - share) * elapsed;
        undisturbed += usize::from(others < 0.1 * elapsed);
        // What was taken from it as long as others had the CPUs comes back in a second or two.
        others < 0.1 * elapsed && (withheld / commanded - 1.0).abs() < 0.1
    });
    assert!(has_come || undisturbed < WINDOWS / 2, "too much or too little is withheld");
    if !has_come {
        eprintln!("SKIPPED: whether so much is withheld, for others use the CPUs");
    }
    running.signal(Signal::TERM).unwrap();
    let told = running.wait().unwrap().told().unwrap();
    let told_ns = u128::from(told["control"]["withheld_ns"].as_u64().unwrap());
    let total = withheld.total();
    assert!(told_ns >= total.as_nanos() / 10 * 9, "{total:?} by cpu.stat, {told:#}");
}

/// `command`, started where no cgroup can be written: as in a container that has them read-only.
fn with_cgroups_read_only(command: &Command) -> Command {
    let script = "while read -r _ path kind _; do
        case $kind in cgroup|cgroup2) mount -o remount,bind,ro \"$path\" || exit 1 ;; esac
    done < /proc/self/mounts
    exec \"$@\"";
    let mut wrapped = Command::new("unshare");
    wrapped.args(["--mount", "sh", "-c", script, "sh"]);
    wrapped.arg(command.get_program()).args(command.get_args());
    wrapped
}

#[test]
fn where_no_cgroup_can_be_written_that_is_told_and_the_snapshot_goes_on_without() {
    let Some(_turn) = turn() else { return };
    let mut qemu = boot(&Qemu::builder());
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let state_dir = dir.path().join("state");
    let out = dir.path().join("snapshot");
    let arguments = ["--fixed-cpu=30%", "--state-dir", state_dir.to_str().unwrap()];
    let command = snapshot_command(&qemu, &out, &arguments).unwrap();
    let ended = Running::start(with_cgroups_read_only(&command)).unwrap().wait().unwrap();
    let told = ended.told().unwrap();
    assert_eq!(told["outcome"], "completed", "{told:#}\n{}", ended.log);
    let problem = told["control"]["problem"].as_str().unwrap_or_default();
    assert!(problem.starts_with("cannot throttle the virtual CPUs: "), "{told:#}");
    assert!(problem.contains("/sys/fs/cgroup/") && problem.contains("Read-only"), "{problem}");
    assert_eq!(told["control"]["throttled_ns"], 0, "{told:#}");
    check_files(&out.join("ram.mapped-ram"), None).unwrap();
    wait_given_back(&mut qemu, &state_dir);
}

/// A guest that overwrites more memory than the smallest buffer holds, without rest.
fn busy_guest() -> Qemu {
    let load = Load { ring_mib: 192, workers: 2, random: true, ..Load::default() };
    boot(&Qemu::builder().memory_mib(384).vcpus(2).load(load))
}

#[test]
fn a_snapshot_that_cannot_keep_its_limits_is_given_up_early() {
    let Some(_turn) = turn() else { return };
    let mut qemu = busy_guest();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let state_dir = dir.path().join("state");
    let slow = SlowDisk::new(dir.path(), CRAWL).unwrap();
    let out = dir.path().join("snapshot");
    let record = dir.path().join("record");
    let mut command = snapshot_command(&qemu, &out, &["--buffer=64MiB", "--min-cpu=90%"]).unwrap();
    command.args(["--on-infeasible=abort", "--stall-limit=1m", "--force"]);
    command.arg("--state-dir").arg(&state_dir).arg("--record").arg(&record);
    let began = Instant::now();
    let ended = Running::start(slow.command(&command)).unwrap().wait().unwrap();
    let told = ended.told().unwrap();
    // A guest that is fast enough fills the buffer before anybody can forecast it.
    let reason = ["buffer_forecast", "cpu_floor"].into_iter().find(|word| told["reason"] == *word);
    let reason = reason.unwrap_or_else(|| panic!("{told:#}"));
    ended.expect_failure(4, reason, &["90 %", "64.0 MiB", "--min-cpu"]).unwrap();
    // All of it would have taken minutes.
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    assert_eq!(told["outcome"], "aborted");
    assert!(told["control"]["abort"]["evidence_s"].is_number(), "{told:#}");
    assert!(!out.exists());
    wait_given_back(&mut qemu, &state_dir);

    let record = fs::read_to_string(&record).unwrap();
    let decisions = livesnap_sim::record::replay(record.as_bytes()).unwrap();
    assert_eq!(told["control"]["decisions"], decisions, "{told:#}");
    let last: serde_json::Value = serde_json::from_str(record.lines().last().unwrap()).unwrap();
    assert_eq!(last["command"]["because"], "abort", "{last:#}");
}

#[test]
fn a_slow_destination_slows_the_guest_down_instead_of_failing() {
    let Some(_turn) = turn() else { return };
    let mut qemu = busy_guest();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let state_dir = dir.path().join("state");
    let slow = SlowDisk::new(dir.path(), 16 << 20).unwrap();
    let out = dir.path().join("snapshot");
    let mut command = snapshot_command(&qemu, &out, &["--buffer=64MiB", "--min-cpu=10%"]).unwrap();
    command.arg("--state-dir").arg(&state_dir);
    let ended = Running::start(slow.command(&command)).unwrap().wait().unwrap();
    let told = ended.told().unwrap();
    assert_eq!(told["outcome"], "completed", "{told:#}\n{}", ended.log);
    let number = |pointer: &str| told.pointer(pointer).unwrap().as_f64().unwrap();
    assert!(number("/control/cpu_ratio_min") < 1.0, "{told:#}");
    assert!(number("/control/withheld_ns") > 0.0, "{told:#}");
    assert!(number("/report/buffer_peak_bytes") <= f64::from(64 << 20), "{told:#}");
    check_files(&out.join("ram.mapped-ram"), None).unwrap();
    wait_given_back(&mut qemu, &state_dir);
}

#[test]
fn by_default_no_snapshot_of_a_busy_guest_is_given_up() {
    let Some(_turn) = turn() else { return };
    let load = Load { ring_mib: 256, random: true, ..Load::default() };
    let mut qemu = boot(&Qemu::builder().memory_mib(512).vcpus(2).load(load));
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let state_dir = dir.path().join("state");
    for run in 1..=10 {
        let out = dir.path().join("snapshot");
        // The default, which `snapshot_command` has changed for other tests.
        let arguments = ["--on-infeasible=abort", "--state-dir", state_dir.to_str().unwrap()];
        let told = snapshot(&qemu, &out, &arguments).unwrap();
        let number = |pointer: &str| told.pointer(pointer).unwrap().as_f64().unwrap();
        eprintln!(
            "{run}: {:.2} s, CPU at least {:.2}, buffer {:.0} MiB, stall p99 {:.2} ms",
            number("/report/total_ns") / 1e9,
            number("/control/cpu_ratio_min"),
            number("/report/buffer_peak_bytes") / f64::from(1 << 20),
            told.pointer("/probes/stalls/copy/p99_ns")
                .map_or(f64::NAN, |ns| ns.as_f64().unwrap() / 1e6)
        );
        check_files(&out.join("ram.mapped-ram"), None).unwrap();
        fs::remove_dir_all(&out).unwrap();
    }
    wait_given_back(&mut qemu, &state_dir);
}
