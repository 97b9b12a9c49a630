//! The throttle on threads of this very process, with the kernel's own cgroups: whichever version is mounted.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use procfs::{CurrentSI as _, KernelStats};
use rustix::process::{Pid, getpid};
use rustix::thread::{CpuSet, gettid, sched_setaffinity};
use serde_json::Value;

use super::*;
use crate::cgroup::{Group, Quota};
use crate::scheduling::{Account, Threads};
use crate::units::number;

const DEADLINE: Duration = Duration::from_secs(120);
const SPINNERS: usize = 2;
const NOTHING_LOST: [Duration; SPINNERS] = [Duration::ZERO; SPINNERS];
/// How often a while is looked for in which nobody else uses the CPUs.
const WINDOWS: u32 = 20;

/// Whether cgroups may be changed here. Says so loudly if not, and fails where they must be.
fn privileged() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    let required = std::env::var_os("REQUIRE_PRIVILEGED").is_some_and(|value| value == "1");
    assert!(is_root || !required, "root is required here");
    if !is_root {
        eprintln!("SKIPPED: cgroups are changed as root only");
    }
    is_root
}

fn own_pid() -> i32 {
    getpid().as_raw_nonzero().get()
}

fn group_of(thread: Pid) -> Group {
    Group::of_thread(thread.as_raw_nonzero().get()).unwrap()
}

/// Runs `act` beside threads that never rest, the "virtual CPUs", in a directory for journals.
fn beside_spinners(act: impl FnOnce(&[Pid], &Path)) {
    if !privileged() {
        return;
    }
    let state_dir = tempfile::tempdir().unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        for _ in 0..SPINNERS {
            let (tell, ended) = (tell.clone(), &ended);
            scope.spawn(move || {
                tell.send(gettid()).unwrap();
                while !ended.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let threads: Vec<_> = told.iter().take(SPINNERS).collect();
        // Whatever it comes to, the spinners end.
        let acted = catch_unwind(AssertUnwindSafe(|| act(&threads, state_dir.path())));
        ended.store(true, Ordering::Relaxed);
        acted.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn poll(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What became of a thread's time.
#[derive(Debug)]
struct Window {
    elapsed: Duration,
    ran: Duration,
    withheld: Duration,
    /// CPU time that others used, on all CPUs: where it is next to nothing, only a quota holds a thread back.
    others: Duration,
}

impl Window {
    /// Of the time from now on, of the first of `threads`.
    fn of(threads: &[Pid]) -> Self {
        const LENGTH: Duration = Duration::from_millis(400);
        let group = group_of(threads[0]);
        let mut accounts = Threads::new(getpid(), threads);
        let withheld_ns = || group.statistics().unwrap().withheld_ns;
        let (withheld_before, idle_before, began) = (withheld_ns(), idle(), Instant::now());
        poll("the end of the window", || began.elapsed() >= LENGTH);
        let (elapsed, accounts) = (began.elapsed(), accounts.take());
        let all = Duration::from_nanos(Account::sum(&accounts).run_ns);
        let cpus = u32::try_from(std::thread::available_parallelism().unwrap().get()).unwrap();
        Self {
            elapsed,
            ran: Duration::from_nanos(accounts[0].account.run_ns),
            withheld: Duration::from_nanos(withheld_ns() - withheld_before),
            others: (elapsed * cpus).saturating_sub(all + (idle() - idle_before)),
        }
    }

    fn is_undisturbed(&self) -> bool {
        self.others < self.elapsed / 10
    }
}

/// Time that CPUs had nothing to do, all together since the boot.
fn idle() -> Duration {
    let total = KernelStats::current().unwrap().total;
    let ticks = total.idle + total.iowait.unwrap_or_default();
    Duration::from_secs(ticks) / u32::try_from(procfs::ticks_per_second()).unwrap()
}

/// Everything as it was: the threads where they were, no group of ours, no journal.
fn assert_put_back(threads: &[Pid], home: &Group, state_dir: &Path) {
    for thread in threads {
        assert_eq!(group_of(*thread), *home);
        let ours = home.child(&format!("livesnap-{}-{}", own_pid(), thread.as_raw_nonzero()));
        assert!(!ours.exists(), "{ours:?}");
    }
    assert_eq!(fs::read_dir(state_dir).unwrap().count(), 0, "the journal is left");
}

#[test]
fn virtual_cpus_get_their_share_and_nobody_else_is_touched() {
    beside_spinners(|threads, state_dir| {
        let home = group_of(gettid());
        let mut throttle = Throttle::find(state_dir, getpid(), threads).unwrap();
        throttle.set(&[1.0; SPINNERS]).unwrap();
        assert_put_back(threads, &home, state_dir);

        let share = 0.1;
        throttle.set(&[share, 1.0]).unwrap();
        let mut first = Threads::new(getpid(), &threads[..1]);
        let began = Instant::now();
        let mut run_ns = 0;
        poll("CPU time of the first", || {
            run_ns += first.take()[0].account.run_ns;
            run_ns >= 50_000_000
        });
        let elapsed_ns = began.elapsed().as_nanos();
        // A quota may be overdrawn by a timer tick in some periods, and is then the less in the next.
        assert!(u128::from(run_ns) * 10 <= elapsed_ns * 3 / 2, "{run_ns} ns in {elapsed_ns} ns");
        poll("time withheld", || {
            throttle.measure(&NOTHING_LOST).unwrap();
            throttle.withheld_ns() > 0
        });

        assert_eq!(group_of(gettid()), home, "only virtual CPUs are moved");
        let groups = [threads[0], threads[1]].map(group_of);
        assert_ne!(groups[0], groups[1]);
        assert_eq!(groups[1].quota().unwrap().quota_us, None);
        throttle.restore().unwrap();
        assert_put_back(threads, &home, state_dir);
    });
}

#[test]
fn what_is_withheld_is_what_was_commanded() {
    beside_spinners(|threads, state_dir| {
        let mut throttle = Throttle::find(state_dir, getpid(), threads).unwrap();
        for share in [0.3, 0.7] {
            throttle.set(&[share; SPINNERS]).unwrap();
            let mut undisturbed = Vec::new();
            let is_withheld = (0..WINDOWS).any(|_| {
                let window = Window::of(threads);
                // Whoever else is there, this can be said of all windows.
                let most = window.elapsed.mul_f64(share * 1.1);
                assert!(window.ran < most, "{share}: {window:?}");
                let commanded = window.elapsed.mul_f64(1.0 - share);
                let is_undisturbed = window.is_undisturbed();
                let is_withheld = window.withheld.abs_diff(commanded) < commanded / 10;
                undisturbed.extend(is_undisturbed.then_some(window));
                is_undisturbed && is_withheld
            });
            assert!(is_withheld || undisturbed.is_empty(), "{share}: {undisturbed:?}");
            if undisturbed.is_empty() {
                eprintln!("SKIPPED: whether so much is withheld, for others use the CPUs");
            }
        }
        throttle.measure(&NOTHING_LOST).unwrap();
        assert!(throttle.withheld_ns() > 0);
    });
}

#[test]
fn a_share_is_of_what_a_virtual_cpu_has_on_a_busy_host() {
    beside_spinners(|threads, state_dir| {
        // All on one CPU, so that each has half of it at most.
        let mut one = CpuSet::new();
        one.set(0);
        for thread in threads {
            sched_setaffinity(Some(*thread), &one).unwrap();
        }
        let mut throttle = Throttle::find(state_dir, getpid(), &threads[..1]).unwrap();
        throttle.measure(&NOTHING_LOST).unwrap();
        let before = Window::of(threads);
        throttle.measure(&NOTHING_LOST).unwrap();
        throttle.set(&[0.5]).unwrap();
        let Quota { quota_us, period_us } = group_of(threads[0]).quota().unwrap();
        let has = before.ran.as_secs_f64() / before.elapsed.as_secs_f64();
        let in_force = number(quota_us.unwrap()) / number(period_us);
        // At least the kernel's least quota, of which the share is as much as of a tenth of a CPU.
        assert!(
            has < 0.65 && (in_force - (has / 2.0).max(0.1)).abs() < 0.05,
            "{in_force} of {before:?}"
        );
    });
}

#[test]
fn a_panic_puts_everything_back() {
    beside_spinners(|threads, state_dir| {
        let home = group_of(gettid());
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let mut throttle = Throttle::find(state_dir, getpid(), threads).unwrap();
            throttle.set(&[0.5; SPINNERS]).unwrap();
            assert_ne!(group_of(threads[0]), home);
            panic!("amid the snapshot");
        }));
        assert!(panicked.is_err());
        assert_put_back(threads, &home, state_dir);
    });
}

#[test]
fn a_group_of_its_own_keeps_its_thread_and_gets_its_quota_back() {
    beside_spinners(|threads, state_dir| {
        let home = group_of(gettid());
        let lent = home.lends_cpu().unwrap();
        let own = home.child(&format!("livesnap-test-{}", own_pid()));
        own.create().unwrap();
        if !lent {
            home.lend_cpu(true).unwrap();
        }
        own.add_thread(threads[0].as_raw_nonzero().get()).unwrap();
        let found = Quota { quota_us: Some(50_000), period_us: 100_000 };
        own.set_quota(found).unwrap();

        let mut throttle = Throttle::find(state_dir, getpid(), &threads[..1]).unwrap();
        throttle.set(&[0.5]).unwrap();
        let half_of_half = Quota { quota_us: Some(1_250), period_us: 5_000 };
        assert_eq!(own.quota().unwrap(), half_of_half);
        assert_eq!(group_of(threads[0]), own);
        drop(throttle);
        assert_eq!(own.quota().unwrap(), found);
        assert_eq!(group_of(threads[0]), own);

        home.add_thread(threads[0].as_raw_nonzero().get()).unwrap();
        poll("the group's removal", || own.remove().is_ok());
        if !lent {
            home.lend_cpu(false).unwrap();
        }
    });
}

#[test]
fn what_a_dead_livesnap_left_is_put_back_and_what_a_living_one_does_is_left_alone() {
    beside_spinners(|threads, state_dir| {
        let home = group_of(gettid());
        let mut throttle = Throttle::find(state_dir, getpid(), threads).unwrap();
        throttle.set(&[0.5; SPINNERS]).unwrap();
        assert_eq!(repair(state_dir).len(), 0, "its owner lives");
        assert_ne!(group_of(threads[0]), home);

        let mut second = Throttle::find(state_dir, getpid(), &threads[..1]).unwrap();
        let error = second.set(&[0.5]);
        // The first one's groups have one thread each, so it is the journal that is in the way.
        assert!(error.unwrap_err().to_string().contains("another livesnap"));

        std::mem::forget(throttle);
        let journal = state_dir.join(format!("throttle-{}.json", own_pid()));
        let mut record: Value = serde_json::from_slice(&fs::read(&journal).unwrap()).unwrap();
        record["owner"]["started_ticks"] = 1.into();
        fs::write(&journal, record.to_string()).unwrap();
        let repaired = repair(state_dir);
        assert!(matches!(&repaired[..], [Ok(done)] if done.path() == journal), "{repaired:?}");
        assert_put_back(threads, &home, state_dir);
    });
}

#[test]
fn a_journal_of_changes_that_were_never_made_is_undone_too() {
    let state_dir = tempfile::tempdir().unwrap();
    let path = state_dir.path().join("throttle-1.json");
    let group = serde_json::json!({"version": "v2", "directory": "/nonexistent/group"});
    let record = serde_json::json!({
        "owner": {"pid": 1, "started_ticks": u64::MAX},
        "vmm": {"pid": 1, "started_ticks": u64::MAX},
        "changes": [
            {"quota": {"group": group, "found": {"quota_us": null, "period_us": 100_000}}},
            {"lent_cpu": {"group": group}},
            {"moved": {"from": group, "to": group}},
        ],
    });
    fs::write(&path, record.to_string()).unwrap();
    assert!(matches!(&repair(state_dir.path())[..], [Ok(_)]));
    assert!(!path.exists());
}

#[test]
fn what_is_no_journal_is_told_and_left() {
    let state_dir = tempfile::tempdir().unwrap();
    let path = state_dir.path().join("throttle-1.json");
    fs::write(&path, "{}").unwrap();
    let repaired = repair(state_dir.path());
    assert!(matches!(&repaired[..], [Err(error)] if error.to_string().contains("remove it")));
    assert!(path.exists());
    assert_eq!(repair(&state_dir.path().join("missing")).len(), 0);
}
