//! What quotas withhold from threads, as the kernel accounts it: read from the threads' own cgroups, from outside.
//!
//! cgroup v1: `cpu.cfs_quota_us`, `cpu.cfs_period_us`, `throttled_time` of `cpu.stat` in nanoseconds (sched-bwc.rst of the
//! kernel's documentation); v2: `cpu.max`, `throttled_usec` of `cpu.stat` (cgroup-v2.rst).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

const V1: &str = "/sys/fs/cgroup/cpu";
const V2: &str = "/sys/fs/cgroup";
/// The product names so what it makes.
const MADE_BY_LIVESNAP: &str = "livesnap-";

/// What the groups that the product has made for some threads have withheld from them.
#[derive(Debug, Clone)]
pub struct Withheld {
    threads: Vec<i64>,
    /// By group, in nanoseconds. The groups are new, so they began with nothing.
    groups: BTreeMap<PathBuf, u64>,
}

impl Withheld {
    /// From these threads; nothing yet.
    #[must_use]
    pub fn new(threads: Vec<i64>) -> Self {
        Self { threads, groups: BTreeMap::new() }
    }

    /// Looks what there is by now. What has disappeared keeps what it had when it was last looked at.
    pub fn look(&mut self) {
        for &thread in &self.threads {
            let Some(group) = group_of(thread).filter(|group| is_made_by_livesnap(group)) else {
                continue;
            };
            if let Some(withheld_ns) = withheld_ns(&group) {
                self.groups.insert(group, withheld_ns);
            }
        }
    }

    /// All together.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.groups.values().sum())
    }
}

/// Time that a thread ran (`schedstat` of sched-stats.rst).
pub fn ran(pid: u32, thread: i64) -> Result<Duration> {
    let path = format!("/proc/{pid}/task/{thread}/schedstat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let ns = text.split_whitespace().next().and_then(|word| word.parse().ok());
    Ok(Duration::from_nanos(ns.with_context(|| format!("{path} holds {text:?}"))?))
}

/// Time that all CPUs together were not idle since the boot (`/proc/stat` of proc(5)).
pub fn busy() -> Result<Duration> {
    // `USER_HZ` of every architecture that Linux has.
    const TICK: Duration = Duration::from_millis(10);
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let line = text.lines().next().and_then(|line| line.strip_prefix("cpu "));
    let line = line.with_context(|| format!("/proc/stat begins with {:?}", text.lines().next()))?;
    // User, nice, system, idle, waiting for I/O, interrupts, soft interrupts, stolen; the rest is in user already.
    let ticks = line.split_whitespace().take(8).map(str::parse::<u32>).enumerate();
    let busy = ticks.filter(|(column, _)| !matches!(column, 3 | 4)).map(|(_, ticks)| ticks);
    let ticks =
        busy.sum::<Result<u32, _>>().with_context(|| format!("/proc/stat holds {line:?}"))?;
    Ok(TICK * ticks)
}

fn is_made_by_livesnap(group: &Path) -> bool {
    let name = group.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with(MADE_BY_LIVESNAP))
}

/// The directory of the group that decides on a thread's CPU time.
fn group_of(thread: i64) -> Option<PathBuf> {
    locate(&fs::read_to_string(format!("/proc/{thread}/cgroup")).ok()?)
}

/// The same by what `/proc/PID/cgroup` tells, lines of `ID:CONTROLLERS:PATH`.
fn locate(told: &str) -> Option<PathBuf> {
    let lines = || told.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let v1 = lines().find(|(controllers, _)| controllers.split(',').any(|name| name == "cpu"));
    let v2 = lines().find(|(controllers, _)| controllers.is_empty());
    let (root, (_, path)) = match v1 {
        Some(line) => (V1, line),
        None => (V2, v2?),
    };
    Some(Path::new(root).join(path.trim_start_matches('/')))
}

fn withheld_ns(group: &Path) -> Option<u64> {
    throttled_ns(&fs::read_to_string(group.join("cpu.stat")).ok()?)
}

fn throttled_ns(cpu_stat: &str) -> Option<u64> {
    cpu_stat.lines().find_map(|line| match line.split_once(' ')? {
        ("throttled_time", ns) => ns.parse().ok(),
        ("throttled_usec", us) => us.parse::<u64>().ok()?.checked_mul(1_000),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_read() {
        assert_eq!(throttled_ns("nr_periods 7\nthrottled_time 5000\n"), Some(5_000));
        assert_eq!(throttled_ns("usage_usec 1\nthrottled_usec 5\n"), Some(5_000));
        assert_eq!(throttled_ns("usage_usec 1\n"), None);
        let v1 = locate("5:cpu,cpuacct:/a/b\n0::/c\n");
        assert_eq!(v1, Some("/sys/fs/cgroup/cpu/a/b".into()));
        assert_eq!(locate("5:cpuset:/\n0::/c\n"), Some("/sys/fs/cgroup/c".into()));
        assert!(is_made_by_livesnap(Path::new("/x/livesnap-1-2")));
        assert!(!is_made_by_livesnap(Path::new("/livesnap-x/vcpu0")));
    }

    #[test]
    fn a_thread_that_runs_has_run() -> Result<()> {
        let pid = std::process::id();
        assert!(ran(pid, pid.into())? > Duration::ZERO);
        assert!(busy()? > Duration::ZERO);
        Ok(())
    }
}
