//! What the kernel's scheduler accounts to threads: how long they ran, how long they waited for a CPU although they could
//! have run, and how long a quota held them back.
//!
//! The kernel keeps the first two exactly for every thread (`/proc/PID/task/TID/schedstat`, see sched-stats.rst of its
//! documentation), and the last for every cgroup (`cpu.stat`), so nothing needs to be attached to each context switch.

use std::collections::BTreeMap;

use procfs::ProcError;
use procfs::process::{Process, Task};
use rustix::process::Pid;
use serde::Serialize;

use crate::cgroup::Group;

/// What a thread got and did not get. In nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Account {
    /// Time on a CPU. Of a virtual CPU under KVM, that of the guest included.
    pub run_ns: u64,
    /// Time on the queue of a CPU that another thread had.
    pub wait_ns: u64,
    /// How often it was given a CPU.
    pub slices: u64,
}

/// The account of one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ThreadAccount {
    /// The thread's id.
    pub tid: i32,
    /// What it got.
    #[serde(flatten)]
    pub account: Account,
}

impl Account {
    /// Since the thread began.
    fn of(task: &Task) -> Result<Self, ProcError> {
        let stat = task.schedstat()?;
        Ok(Self { run_ns: stat.sum_exec_runtime, wait_ns: stat.run_delay, slices: stat.pcount })
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            run_ns: self.run_ns.saturating_sub(earlier.run_ns),
            wait_ns: self.wait_ns.saturating_sub(earlier.wait_ns),
            slices: self.slices.saturating_sub(earlier.slices),
        }
    }

    /// All of `threads` together.
    pub fn sum(threads: &[ThreadAccount]) -> Self {
        threads.iter().fold(Self::default(), |sum, thread| Self {
            run_ns: sum.run_ns + thread.account.run_ns,
            wait_ns: sum.wait_ns + thread.account.wait_ns,
            slices: sum.slices + thread.account.slices,
        })
    }

    /// What it waited each time until it was given a CPU, in nanoseconds.
    pub fn mean_wait_ns(self) -> u64 {
        self.wait_ns.checked_div(self.slices).unwrap_or(0)
    }
}

/// Threads whose accounts are followed.
pub struct Threads(Vec<(Task, Account)>);

impl Threads {
    /// Those of the process `pid` that have these ids and still are there.
    pub fn new(pid: Pid, tids: &[Pid]) -> Self {
        let process = Process::new(pid.as_raw_pid()).ok();
        let task = |tid: &Pid| process.as_ref()?.task_from_tid(tid.as_raw_pid()).ok();
        let threads = tids.iter().filter_map(task).map(|task| {
            let account = Account::of(&task).unwrap_or_default();
            (task, account)
        });
        Self(threads.collect())
    }

    /// What each got since this was last asked; nothing of threads that are gone.
    pub fn take(&mut self) -> Vec<ThreadAccount> {
        let mut taken = Vec::with_capacity(self.0.len());
        for (task, last) in &mut self.0 {
            let Ok(now) = Account::of(task) else { continue };
            let earlier = std::mem::replace(last, now);
            taken.push(ThreadAccount { tid: task.tid, account: now.since(earlier) });
        }
        taken
    }
}

/// The accounts of this process's threads of that name, since they began.
pub fn of_own_threads(name: &str) -> Vec<ThreadAccount> {
    let Ok(tasks) = Process::myself().and_then(|process| process.tasks()) else {
        return Vec::new();
    };
    let tasks = tasks.flatten().filter(|task| task.stat().is_ok_and(|stat| stat.comm == name));
    tasks
        .filter_map(|task| Some(ThreadAccount { tid: task.tid, account: Account::of(&task).ok()? }))
        .collect()
}

/// The cgroups whose quotas can hold threads back: those that the threads are in, and all above them.
pub struct Quotas(BTreeMap<Group, u64>);

impl Quotas {
    /// Those of threads with these ids.
    pub fn of(tids: &[Pid]) -> Self {
        let groups = tids.iter().flat_map(|tid| Group::all_of_thread(tid.as_raw_pid()));
        let throttled = groups.flatten().filter_map(|group| {
            // Without a quota there is none to be told of.
            let withheld_ns = group.statistics().ok()?.withheld_ns;
            Some((group, withheld_ns))
        });
        Self(throttled.collect())
    }

    /// For how long they held threads back since this was last asked, in nanoseconds, each CPU's time added; nothing
    /// if there are no quotas to be told of.
    pub fn take_throttled_ns(&mut self) -> Option<u64> {
        let mut sum = None;
        for (group, last) in &mut self.0 {
            let Ok(now) = group.statistics() else { continue };
            let earlier = std::mem::replace(last, now.withheld_ns);
            sum = Some(sum.unwrap_or(0) + now.withheld_ns.saturating_sub(earlier));
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;
    use rustix::thread::{CpuSet, gettid, sched_setaffinity};
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;

    /// Long enough that the scheduler's slices, of some milliseconds, even out.
    const SPIN_NS: u64 = 300_000_000;
    const BUSY: &str = "busy";

    /// Keeps CPU 0 busy until each of `count` threads has run for [`SPIN_NS`].
    fn spin(ended: &AtomicU32, count: u32) {
        let mut set = CpuSet::new();
        set.set(0);
        sched_setaffinity(None, &set).unwrap();
        let task = Process::myself().unwrap().task_from_tid(gettid().as_raw_pid()).unwrap();
        let mut has_ended = false;
        while ended.load(Ordering::Relaxed) < count {
            if !has_ended && Account::of(&task).unwrap().run_ns > SPIN_NS {
                has_ended = true;
                ended.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    #[test]
    fn of_two_threads_on_one_cpu_each_waits_while_the_other_runs() {
        let ended = AtomicU32::new(0);
        let (tell, told) = mpsc::channel();
        let (accounts, elapsed) = std::thread::scope(|scope| {
            for _ in 0..2 {
                let (tell, ended) = (tell.clone(), &ended);
                let busy = std::thread::Builder::new().name(BUSY.into());
                busy.spawn_scoped(scope, move || {
                    let began = std::time::Instant::now();
                    spin(ended, 2);
                    let _ = tell.send((of_own_threads(BUSY), began.elapsed()));
                })
                .unwrap();
            }
            told.recv().unwrap()
        });
        assert_eq!(accounts.len(), 2, "{accounts:?}");
        for thread in &accounts {
            let Account { run_ns, wait_ns, slices } = thread.account;
            eprintln!("{elapsed:?} {thread:?}");
            assert!(slices > 0);
            // Others may want this CPU as well.
            assert!(wait_ns * 10 >= run_ns.min(SPIN_NS) * 9, "{thread:?}");
            let told_ns = u128::from(run_ns + wait_ns);
            assert!(told_ns.abs_diff(elapsed.as_nanos()) < elapsed.as_nanos() / 10, "{thread:?}");
        }
        let sum = Account::sum(&accounts);
        assert_eq!(sum.mean_wait_ns(), sum.wait_ns / sum.slices);
    }
}
