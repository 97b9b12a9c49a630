//! The forecast before a snapshot, on a real QEMU: what it says, what a snapshot makes of it, and that nothing of it stays.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use livesnap_tests::livesnap::{self, Ended, Running, binary, snapshot, snapshot_command};
use livesnap_tests::mount::Mount;
use livesnap_tests::qemu::{Builder, Load, Qemu};
use livesnap_tests::slow_disk::SlowDisk;
use livesnap_tests::{is_root_or_skip, poll_until};
use rustix::process::Signal;
use serde_json::Value;

const BOOT: Duration = Duration::from_secs(120);
/// Far less than the guest writes.
const CRAWL: u64 = 2 << 20;

fn boot(builder: &Builder) -> Qemu {
    let mut qemu = builder.start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu
}

/// A guest that overwrites more memory than the smallest buffer holds, without rest.
fn busy_guest() -> Qemu {
    let load = Load { ring_mib: 160, random: true, ..Load::default() };
    boot(&Qemu::builder().memory_mib(320).load(load))
}

fn plan_command(qemu: &Qemu, out: &Path, more: &[&str]) -> Command {
    let mut command = livesnap::command(["plan", "--json", "--qmp"]).unwrap();
    command.arg(qemu.qmp_socket()).arg("--out").arg(out).args(more);
    command
}

fn run(command: Command) -> Ended {
    Running::start(command).unwrap().wait().unwrap()
}

/// Neither guest nor destination show that there was a plan.
fn expect_untouched(qemu: &mut Qemu, dir: &Path) {
    qemu.wait_unprotected(BOOT).unwrap();
    assert_eq!(qemu.wait_laps(1, BOOT).unwrap().inconsistent, 0);
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
}

fn number(told: &Value, pointer: &str) -> f64 {
    told.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer}: {told:#}"))
}

#[test]
fn a_guest_that_fits_is_forecast_and_does_not_notice() {
    if !is_root_or_skip("a userfaultfd in another process").unwrap() {
        return;
    }
    let load = Load { populate_mib: 64, rate: 2_000, ..Load::default() };
    let mut qemu = boot(&Qemu::builder().load(load));
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    let ended = run(plan_command(&qemu, &out, &["--sample=1GiB"]));
    let told = ended.told().unwrap();
    eprintln!("{told:#}");
    assert!(ended.status.success(), "{}", ended.log);
    assert_eq!(told["verdict"], "fits", "{told:#}");
    // It writes 7.8 MiB/s, to 16 MiB.
    let rate = number(&told, "/guest/bytes_per_second") / f64::from(1 << 20);
    assert!(rate > 2.0 && rate < 40.0, "{rate} MiB/s");
    assert!(number(&told, "/disk/bytes_per_second") > 1e6, "{told:#}");
    expect_untouched(&mut qemu, dir.path());

    // For people it is one screen.
    let mut command = livesnap::command(["plan", "--window=200ms", "--qmp"]).unwrap();
    let output = command.arg(qemu.qmp_socket()).arg("--out").arg(&out).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    eprintln!("{text}");
    assert!(text.starts_with("feasible: ") && text.lines().count() < 12, "{text}");

    // A snapshot that does not fit into its buffer as a whole makes the forecast too, and goes on.
    let limits = ["--on-infeasible=abort", "--buffer=64MiB", "--stall-limit=1m"];
    let taken = snapshot(&qemu, &out, &limits).unwrap();
    assert_eq!(taken["forecast"]["reason"], Value::Null, "{taken:#}");
    assert!(number(&taken, "/forecast/guest/window_ns") < 1e9, "{taken:#}");
    // What was forecast to be written is about what a snapshot writes.
    let stored = number(&taken, "/report/stored_bytes");
    let (forecast, error) =
        (number(&told, "/memory/stored_bytes"), number(&told, "/memory/stored_error_bytes"));
    // 19 of 20 are within the error; those beyond twice the error come not once in ten thousand.
    assert!((forecast - stored).abs() < 2.0 * error, "{forecast} ± {error} is not {stored}");
    assert!(number(&told, "/memory/size_max_bytes") >= stored, "{told:#}");
}

#[test]
fn a_guest_that_is_too_fast_for_the_disk_is_refused_unless_forced() {
    if !is_root_or_skip("cgroups").unwrap() {
        return;
    }
    let mut qemu = busy_guest();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    let slow = SlowDisk::new(dir.path(), CRAWL).unwrap();
    let limits = ["--buffer=64MiB", "--min-cpu=90%"];
    let words = ["90 %", "64.0 MiB", "--buffer of", "--on-infeasible wait"];

    let ended = run(slow.command(&plan_command(&qemu, &out, &limits)));
    ended.expect_failure(4, "buffer_forecast", &words).unwrap();
    let told = ended.told().unwrap();
    assert_eq!(told["verdict"], "infeasible", "{told:#}");
    let disk = number(&told, "/disk/bytes_per_second");
    assert!(disk > 1e6 && disk < 8e6, "{told:#}");
    expect_untouched(&mut qemu, dir.path());
    // A deadline says so too, and it would take a minute.
    let ended = run(slow.command(&plan_command(&qemu, &out, &["--buffer=1GiB", "--deadline=10s"])));
    ended.expect_failure(4, "deadline", &["--deadline", "10.0 s"]).unwrap();
    // Where the disk is as fast as it is and the buffer holds all, it fits.
    let ended = run(plan_command(&qemu, &out, &["--buffer=1GiB"]));
    assert!(ended.status.success(), "{:#}", ended.told().unwrap());

    // By its deadline, for that it cannot be kept is certain in however short a look at however slow a guest.
    let snapshot = |more: &[&str]| {
        let arguments = [&["--buffer=64MiB", "--deadline=10s"], more].concat();
        slow.command(&snapshot_command(&qemu, &out, &arguments).unwrap())
    };
    let abort = "--on-infeasible=abort";
    let ended = run(snapshot(&[abort]));
    let words = ["--deadline", "10.0 s", "nothing was begun", "--force"];
    ended.expect_failure(4, "deadline", &words).unwrap();
    let told = ended.told().unwrap();
    assert_eq!(told["forecast"]["verdict"], "infeasible", "{told:#}");
    assert!(number(&told, "/forecast/time_s") > 10.0, "{told:#}");
    assert_eq!((&told["control"], &told["probes"]), (&Value::Null, &Value::Null), "{told:#}");
    assert!(!ended.log.contains("phase="), "a session was begun:\n{}", ended.log);

    for begins in [&[abort, "--force"][..], &["--on-infeasible=wait"]] {
        let mut running = Running::start(snapshot(begins)).unwrap();
        running.reach("copying").unwrap();
        // If the controller has not given it up by itself.
        let _ = running.signal(Signal::TERM);
        let code = running.wait().unwrap().status.code();
        assert!(matches!(code, Some(4 | 130)), "{begins:?}: {code:?}");
    }
    expect_untouched(&mut qemu, dir.path());
}

#[test]
fn a_plan_that_cannot_be_made_says_why_and_changes_nothing() {
    if !is_root_or_skip("a userfaultfd in another process").unwrap() {
        return;
    }
    let builder = Qemu::builder().nobody().arguments(["-machine", "mem-merge=off"]);
    let mut qemu = boot(&builder);
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    let expect = |out: &Path, more: &[&str], reason, words: &[&str]| {
        run(plan_command(&qemu, out, more)).expect_failure(3, reason, words).unwrap();
    };
    expect(&out, &["--buffer=1MiB"], "bad_argument", &["at least 67108864 bytes"]);
    let missing = dir.path().join("missing/snapshot");
    expect(&missing, &[], "bad_destination", &["does not exist: create it"]);
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("file"), "").unwrap();
    expect(&out, &[], "bad_destination", &["is never overwritten"]);
    std::fs::remove_dir_all(&out).unwrap();
    let tiny = Mount::tmpfs(&dir.path().join("tiny"), "size=1M").unwrap();
    expect(&tiny.path().join("snapshot"), &[], "no_space", &["free space there"]);
    assert_eq!(std::fs::read_dir(tiny.path()).unwrap().count(), 0);
    let path = tiny.path().to_owned();
    drop(tiny);
    std::fs::remove_dir(path).unwrap();

    // Without privileges, where nobody can read it.
    let copy = qemu.dir().join("livesnap");
    std::fs::copy(binary().unwrap(), &copy).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]).arg(&copy);
    command.args(["plan", "--json", "--out"]).arg(&out).arg("--qmp").arg(qemu.qmp_socket());
    run(command).expect_failure(3, "missing_privilege", &["CAP_SYS_PTRACE"]).unwrap();
    // What is no duration, or no limit, is wrong usage.
    let ended = run(plan_command(&qemu, &out, &["--window=1ms"]));
    assert_eq!(ended.status.code(), Some(2), "{}", ended.log);

    // Ctrl-C while it watches, for which it is told to take its time.
    for signal in [Signal::INT, Signal::KILL] {
        let running = Running::start(plan_command(&qemu, &out, &["--window=10m"])).unwrap();
        let begun = || Ok(qemu.has_userfaultfd()?.then_some(()));
        poll_until("memory is watched", BOOT, begun).unwrap();
        running.signal(signal).unwrap();
        let code = running.wait().unwrap().status.code();
        assert_eq!(code, (signal == Signal::INT).then_some(130));
    }
    expect_untouched(&mut qemu, dir.path());
}
