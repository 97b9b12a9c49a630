//! The virtual CPUs' share of CPU time, by quotas of the cpu controller.
//!
//! Each virtual CPU's thread has a group of its own: the one it is in if nobody else is in there, as libvirt makes them
//! (`.../libvirt/vcpu0`), and otherwise one that is made below it, so that what limits the VM goes on limiting it. All
//! other threads of the VMM, and all of ours, stay where they are: the main loop and the I/O threads serve the disks
//! and QMP, and must not be held up.
//!
//! Nothing is changed before the first share below 1.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Pid;

use super::demand::Demand;
use super::journal::{Change, Journal, JournalError};
use crate::cgroup::{CgroupError, Group, Quota};
use crate::scheduling::{Account, Threads};
use crate::units::{as_nanos, number};

/// Least share that can be put into force: the kernel's least quota in the longest period used.
pub const SHARE_MIN: f64 = 0.1;
/// Least quota, in microseconds (`min_cfs_quota_period` in the kernel).
const QUOTA_US_MIN: f64 = 1_000.0;
/// Length of a period in microseconds. A virtual CPU stands still for the rest of it at a stretch: the shorter the
/// better.
const PERIOD_US: u32 = 5_000;
/// The same for shares of which that one would be too short.
const PERIOD_US_LONG: u32 = 10_000;
/// Changes of a quota by less than this part of it are left out: each one that is written hands the group a new quota at
/// once, in the middle of a period.
const TRIFLE_RATIO: f64 = 0.05;

/// Why virtual CPUs cannot be throttled.
#[derive(Debug, thiserror::Error)]
pub enum ThrottleError {
    /// A group.
    #[error("cannot throttle the virtual CPUs: {0}")]
    Cgroup(#[from] CgroupError),
    /// The journal.
    #[error("cannot throttle the virtual CPUs: {0}")]
    Journal(#[from] JournalError),
}

struct Vcpu {
    thread: i32,
    /// Where its quota is set.
    group: Group,
    /// Where it was; nothing if it had a group of its own.
    moved_from: Option<Group>,
    /// The group's own quota.
    found: Quota,
    in_force: Quota,
    demand: Demand,
    runs: Threads,
    /// What the group had withheld when it was last looked at, in nanoseconds; nothing before the first change.
    withheld_ns: Option<u64>,
}

/// What became of the time of one virtual CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// How long it would have run if nothing had held it back.
    pub wanted: Duration,
    /// How long of that it ran.
    pub kept: Duration,
}

/// The throttle of one VMM's virtual CPUs. Dropping it puts everything back.
pub struct Throttle {
    state_dir: PathBuf,
    pid: i32,
    vcpus: Vec<Vcpu>,
    /// Exists while anything is changed.
    journal: Option<Journal>,
    measured_at: Instant,
    withheld_ns: u64,
}

impl Throttle {
    /// Looks where the virtual CPUs `threads` of process `pid` are. Nothing is changed yet.
    ///
    /// # Errors
    /// If there is no cpu controller for them.
    pub fn find(state_dir: &Path, pid: Pid, threads: &[Pid]) -> Result<Self, ThrottleError> {
        let vcpus = threads.iter().map(|thread| Vcpu::find(pid, *thread));
        Ok(Self {
            state_dir: state_dir.into(),
            pid: pid.as_raw_nonzero().get(),
            vcpus: vcpus.collect::<Result<_, _>>()?,
            journal: None,
            measured_at: Instant::now(),
            withheld_ns: 0,
        })
    }

    /// Leaves each virtual CPU its share of the CPU time that it would have, as far as that is known from
    /// [`measure`](Self::measure): 1, or less, but never less than [`SHARE_MIN`] of a CPU.
    ///
    /// # Errors
    /// If that is not possible; what was changed is then put back.
    pub fn set(&mut self, shares: &[f64]) -> Result<(), ThrottleError> {
        if self.journal.is_none() {
            if shares.iter().all(|&share| share >= 1.0) {
                return Ok(());
            }
            self.prepare()?;
        }
        let set = self.vcpus.iter_mut().zip(shares).try_for_each(|(vcpu, &share)| vcpu.set(share));
        match set {
            Ok(()) => Ok(()),
            Err(error) => {
                self.restore()?;
                Err(error.into())
            }
        }
    }

    /// What each virtual CPU used since this was last asked, of which it has `lost` so much to anything but a quota.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn measure(&mut self, lost: &[Duration]) -> Result<Vec<Used>, ThrottleError> {
        let elapsed = self.measured_at.elapsed();
        self.measured_at = Instant::now();
        let mut used = Vec::with_capacity(self.vcpus.len());
        for (vcpu, lost) in self.vcpus.iter_mut().zip(lost) {
            let ran = vcpu.ran();
            let withheld = vcpu.withheld()?;
            self.withheld_ns += as_nanos(withheld);
            let wanted = vcpu.demand.observe(elapsed, ran, withheld + *lost);
            used.push(Used { wanted, kept: ran.min(wanted) });
        }
        Ok(used)
    }

    /// For how long virtual CPUs wanted to run and their quota forbade it, all together from the first change to the last
    /// [`measure`](Self::measure), in nanoseconds.
    pub const fn withheld_ns(&self) -> u64 {
        self.withheld_ns
    }

    /// Puts everything back as it was found.
    ///
    /// # Errors
    /// If some of it could not be; the journal then remains for the next livesnap.
    pub fn restore(&mut self) -> Result<(), ThrottleError> {
        match self.journal.take() {
            Some(journal) => Ok(journal.undo()?),
            None => Ok(()),
        }
    }

    /// Journals, makes groups, moves threads.
    fn prepare(&mut self) -> Result<(), ThrottleError> {
        let changes = self.changes()?;
        self.journal = Some(Journal::write(&self.state_dir, self.pid, changes.clone())?);
        if let Err(error) = self.make(&changes) {
            self.restore()?;
            return Err(error.into());
        }
        Ok(())
    }

    fn changes(&self) -> Result<Vec<Change>, CgroupError> {
        let mut changes = Vec::new();
        for vcpu in &self.vcpus {
            let Some(from) = vcpu.moved_from.clone() else {
                changes.push(Change::Quota { group: vcpu.group.clone(), found: vcpu.found });
                continue;
            };
            let lent = Change::LentCpu { group: from.clone() };
            if !from.lends_cpu()? && !changes.contains(&lent) {
                changes.push(lent);
            }
            changes.push(Change::Moved { from, to: vcpu.group.clone() });
        }
        Ok(changes)
    }

    fn make(&mut self, changes: &[Change]) -> Result<(), CgroupError> {
        for vcpu in self.vcpus.iter().filter(|vcpu| vcpu.moved_from.is_some()) {
            vcpu.group.create()?;
        }
        for change in changes {
            if let Change::LentCpu { group } = change {
                group.lend_cpu(true)?;
            }
        }
        for vcpu in &mut self.vcpus {
            if vcpu.moved_from.is_some() {
                vcpu.found = vcpu.group.quota()?;
                vcpu.group.add_thread(vcpu.thread)?;
            }
            vcpu.in_force = vcpu.found;
            vcpu.withheld_ns = Some(vcpu.group.statistics()?.withheld_ns);
        }
        Ok(())
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            tracing::error!(%error, "the virtual CPUs could not be given back their CPU time");
        }
    }
}

impl Vcpu {
    fn find(pid: Pid, thread: Pid) -> Result<Self, CgroupError> {
        let runs = Threads::new(pid, &[thread]);
        let (pid, thread) = (pid.as_raw_nonzero(), thread.as_raw_nonzero().get());
        let at = Group::of_thread(thread)?;
        let unlimited = Quota { quota_us: None, period_us: PERIOD_US.into() };
        let (group, moved_from, found) = if at.threads()? == [thread] {
            let found = at.quota()?;
            (at, None, found)
        } else {
            (at.child(&format!("livesnap-{pid}-{thread}")), Some(at), unlimited)
        };
        let (in_force, demand) = (found, Demand::default());
        Ok(Self { thread, group, moved_from, found, in_force, demand, runs, withheld_ns: None })
    }

    fn set(&mut self, share: f64) -> Result<(), CgroupError> {
        let wanted = quota(share, self.demand.estimate(), self.found);
        if !is_trifle(self.in_force, wanted) {
            self.group.replace_quota(self.in_force, wanted)?;
            self.in_force = wanted;
        }
        Ok(())
    }

    /// Time that it ran since this was last asked.
    fn ran(&mut self) -> Duration {
        Duration::from_nanos(Account::sum(&self.runs.take()).run_ns)
    }

    /// Time withheld from it since this was last asked.
    fn withheld(&mut self) -> Result<Duration, CgroupError> {
        let Some(before_ns) = &mut self.withheld_ns else { return Ok(Duration::ZERO) };
        let now_ns = self.group.statistics()?.withheld_ns;
        let since_ns = now_ns.saturating_sub(std::mem::replace(before_ns, now_ns));
        Ok(Duration::from_nanos(since_ns))
    }
}

/// The share of a CPU that a quota of livesnap's withholds from a thread now, whoever put it there: 0 without one. Of the
/// quotas of others, who may want them, ours are told by their period.
///
/// # Errors
/// If the kernel does not tell.
pub fn withheld_ratio(thread: Pid) -> Result<f64, CgroupError> {
    let group = Group::of_thread(thread.as_raw_nonzero().get())?;
    // The root of the hierarchy has no quota, and is nobody's own.
    if group.threads()? != [thread.as_raw_nonzero().get()] {
        return Ok(0.0);
    }
    Ok(withheld_by(group.quota()?))
}

fn withheld_by(quota: Quota) -> f64 {
    let is_ours = [PERIOD_US, PERIOD_US_LONG].map(u64::from).contains(&quota.period_us);
    let left = quota.quota_us.map(|us| number(us) / number(quota.period_us));
    left.filter(|_| is_ours).map_or(0.0, |left| (1.0 - left).max(0.0))
}

/// Whether one quota is as good as the other.
fn is_trifle(in_force: Quota, wanted: Quota) -> bool {
    match (in_force.quota_us, wanted.quota_us) {
        (Some(before), Some(after)) if in_force.period_us == wanted.period_us => {
            number(before.abs_diff(after)) < TRIFLE_RATIO * number(before)
        }
        _ => in_force == wanted,
    }
}

/// The quota that leaves a thread `share` of what it has by the quota `found`, if it uses as much as `demand` of a CPU.
fn quota(share: f64, demand: f64, found: Quota) -> Quota {
    if share >= 1.0 {
        return found;
    }
    let share = share.max(SHARE_MIN);
    let most = found.quota_us.map_or(1.0, |us| number(us) / number(found.period_us)).min(demand);
    let is_short = share * most * f64::from(PERIOD_US) < QUOTA_US_MIN;
    let period_us = if is_short { PERIOD_US_LONG } else { PERIOD_US };
    let quota_us = (share * most * f64::from(period_us)).max(QUOTA_US_MIN).round();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1000 to 10000")]
    let quota_us = quota_us as u64;
    Quota { quota_us: Some(quota_us), period_us: period_us.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Quota = Quota { quota_us: None, period_us: 100_000 };

    fn limited(quota_us: u64, period_us: u64) -> Quota {
        Quota { quota_us: Some(quota_us), period_us }
    }

    #[test]
    fn a_share_is_a_quota_in_a_short_period() {
        assert_eq!(quota(1.0, 1.0, FREE), FREE);
        assert_eq!(quota(0.5, 1.0, FREE), limited(2_500, 5_000));
        assert_eq!(quota(0.2, 1.0, FREE), limited(1_000, 5_000));
        assert_eq!(
            quota(0.15, 1.0, FREE),
            limited(1_500, 10_000),
            "a quota has at least a millisecond"
        );
        assert_eq!(quota(0.0, 1.0, FREE), limited(1_000, 10_000), "the guest goes on");
    }

    #[test]
    fn a_share_is_of_what_there_was() {
        let half = limited(50_000, 100_000);
        assert_eq!(quota(1.0, 1.0, half), half);
        assert_eq!(quota(0.5, 1.0, half), limited(1_250, 5_000));
        assert_eq!(quota(0.5, 1.0, limited(400_000, 100_000)), limited(2_500, 5_000), "of one CPU");
        assert_eq!(quota(0.5, 0.6, FREE), limited(1_500, 5_000), "of what it uses");
        assert_eq!(quota(0.5, 0.8, half), limited(1_250, 5_000), "of the less of both");
        assert_eq!(quota(1.0, 0.1, FREE), FREE);
        assert_eq!(quota(0.5, 0.0, FREE), limited(1_000, 10_000), "the guest goes on");
    }

    #[test]
    fn what_a_quota_withholds_is_told_if_it_is_ours() {
        for share in [0.1, 0.5, 0.8] {
            let withheld = withheld_by(quota(share, 1.0, FREE));
            assert!((withheld - (1.0 - share)).abs() < 1e-9, "{share}: {withheld}");
        }
        for others in [FREE, limited(50_000, 100_000), quota(1.0, 1.0, FREE)] {
            assert_eq!(withheld_by(others), 0.0, "{others:?}");
        }
    }

    #[test]
    fn trifles_are_not_written() {
        assert!(is_trifle(FREE, FREE) && is_trifle(limited(2_500, 5_000), limited(2_400, 5_000)));
        assert!(!is_trifle(limited(2_500, 5_000), limited(2_300, 5_000)));
        assert!(!is_trifle(limited(2_500, 5_000), limited(2_500, 10_000)));
        assert!(
            !is_trifle(limited(2_500, 5_000), FREE) && !is_trifle(FREE, limited(100_000, 100_000))
        );
    }
}
