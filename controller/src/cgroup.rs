//! One group of the cpu controller, on cgroup v1 or v2.
//!
//! ```text
//!               v1 (cpu.rst, sched-bwc.rst)                v2 (cgroup-v2.rst)
//! threads       tasks                                      cgroup.threads, in a group of type `threaded`
//! quota         cpu.cfs_quota_us (-1 is none),             cpu.max: "QUOTA PERIOD", "max" is none
//!               cpu.cfs_period_us
//! withheld      throttled_time in cpu.stat, nanoseconds    throttled_usec in cpu.stat, microseconds
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use procfs::process::{MountInfo, Process};
use serde::{Deserialize, Serialize};

/// Which of the kernel's two interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Version {
    /// A hierarchy of the cpu controller alone.
    V1,
    /// The unified hierarchy.
    V2,
}

/// CPU time that a group may use in each period.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    /// In microseconds; nothing means as much as there is.
    pub quota_us: Option<u64>,
    /// In microseconds.
    pub period_us: u64,
}

/// What a quota has done, since the group was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Periods in which the group wanted to run.
    pub periods: u64,
    /// Of these, periods in which the quota ran out.
    pub throttled_periods: u64,
    /// Time for which its threads wanted to run and could not, in nanoseconds.
    pub withheld_ns: u64,
}

/// Why a group could not be found or changed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A thread's groups could not be read.
    #[error("cannot tell the cgroup of thread {thread}: {source}")]
    Thread {
        /// Thread id.
        thread: i32,
        /// The operating system's error.
        source: io::Error,
    },
    /// No cpu controller.
    #[error(
        "the cpu controller is not to be had for {group}, neither on cgroup v1 nor on v2: mount it, or enable it (`+cpu`) in the cgroup.subtree_control of the groups above"
    )]
    NoController {
        /// The thread's group.
        group: String,
    },
    /// A file of a group.
    #[error(
        "cannot {operation} {path:?}: {source}: run livesnap as root, and with /sys/fs/cgroup writable"
    )]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// A file of a group says something else than the kernel's documentation.
    #[error("{path:?} says {text:?}, which is not understood")]
    Format {
        /// The file.
        path: PathBuf,
        /// What it says.
        text: String,
    },
}

/// A group of the cpu controller.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Group {
    version: Version,
    directory: PathBuf,
}

impl Group {
    /// The group that decides on the CPU time of a thread.
    ///
    /// # Errors
    /// If there is no cpu controller for it, or none to be seen from here.
    pub fn of_thread(thread: i32) -> Result<Self, CgroupError> {
        let nearest = Self::all_of_thread(thread)?.swap_remove(0);
        if nearest.version == Version::V2 && !nearest.read("cgroup.controllers")?.contains("cpu") {
            let group = nearest.directory.display().to_string();
            return Err(CgroupError::NoController { group });
        }
        Ok(nearest)
    }

    /// All groups whose quotas hold a thread back: the one that it is in first, and then those above it.
    ///
    /// # Errors
    /// As for [`of_thread`](Self::of_thread). There is at least one.
    pub fn all_of_thread(thread: i32) -> Result<Vec<Self>, CgroupError> {
        let failed = |source| CgroupError::Thread { thread, source };
        let told = fs::read_to_string(format!("/proc/{thread}/cgroup")).map_err(failed)?;
        let mounts = Process::myself().and_then(|own| own.mountinfo());
        let mounts = mounts.map_err(|error| failed(io::Error::other(error)))?;
        let mounts: Vec<_> = mounts.into_iter().filter_map(Mount::of).collect();
        Self::locate(&told, &mounts)
            .ok_or_else(|| CgroupError::NoController { group: told.trim().replace('\n', ", ") })
    }

    /// By what `/proc/PID/cgroup` and `/proc/self/mountinfo` tell.
    fn locate(told: &str, mounts: &[Mount]) -> Option<Vec<Self>> {
        // Lines are `ID:CONTROLLERS:PATH`; v2 has the id 0 and names no controllers.
        let lines = || told.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
        let v1 = lines().find(|(controllers, _)| controllers.split(',').any(|name| name == "cpu"));
        let v2 = lines().find(|(controllers, _)| controllers.is_empty());
        let (version, (_, path)) = match v1 {
            Some(line) => (Version::V1, line),
            None => (Version::V2, v2?),
        };
        mounts.iter().filter(|mount| mount.version == version).find_map(|mount| {
            // A container may see only a part of the hierarchy.
            let below = Path::new(path).strip_prefix(&mount.root).ok()?;
            let directories = below.ancestors().map(|path| mount.point.join(path));
            Some(directories.map(|directory| Self { version, directory }).collect())
        })
    }

    /// Ids of its threads.
    pub fn threads(&self) -> Result<Vec<i32>, CgroupError> {
        let name = self.threads_file();
        let text = self.read(name)?;
        let ids: Result<Vec<_>, _> = text.lines().map(str::parse).collect();
        ids.map_err(|_| CgroupError::Format { path: self.directory.join(name), text })
    }

    /// Moves a thread here from another group of its process. One that has ended is left in peace.
    pub fn add_thread(&self, thread: i32) -> Result<(), CgroupError> {
        match self.write(self.threads_file(), &thread.to_string()) {
            Err(CgroupError::File { source, .. }) if has_ended(&source) => Ok(()),
            result => result,
        }
    }

    const fn threads_file(&self) -> &'static str {
        match self.version {
            Version::V1 => "tasks",
            Version::V2 => "cgroup.threads",
        }
    }

    /// Its quota; a group at the root of v2 has none.
    pub fn quota(&self) -> Result<Quota, CgroupError> {
        let (quota, period, name) = match self.version {
            Version::V1 => (
                self.read("cpu.cfs_quota_us")?,
                self.read("cpu.cfs_period_us")?,
                "cpu.cfs_quota_us",
            ),
            Version::V2 => {
                let text = self.read("cpu.max")?;
                let (quota, period) = text.split_once(' ').unwrap_or((&text, ""));
                (quota.into(), period.into(), "cpu.max")
            }
        };
        let unlimited = matches!(quota.as_str(), "-1" | "max");
        let quota_us = quota.parse().ok();
        match period.parse() {
            Ok(period_us) if unlimited || quota_us.is_some() => {
                Ok(Quota { quota_us: quota_us.filter(|_| !unlimited), period_us })
            }
            _ => Err(CgroupError::Format {
                path: self.directory.join(name),
                text: format!("{quota} {period}"),
            }),
        }
    }

    /// Puts `quota` into force.
    pub fn set_quota(&self, quota: Quota) -> Result<(), CgroupError> {
        self.replace_quota(self.quota()?, quota)
    }

    /// The same where it is known which quota is in force.
    pub fn replace_quota(&self, in_force: Quota, quota: Quota) -> Result<(), CgroupError> {
        let word = |none: &str| quota.quota_us.map_or(none.to_owned(), |us| us.to_string());
        match self.version {
            Version::V1 => {
                if in_force.period_us != quota.period_us {
                    // The old quota may be no quota for the new period.
                    self.write("cpu.cfs_quota_us", "-1")?;
                    self.write("cpu.cfs_period_us", &quota.period_us.to_string())?;
                }
                self.write("cpu.cfs_quota_us", &word("-1"))
            }
            Version::V2 => self.write("cpu.max", &format!("{} {}", word("max"), quota.period_us)),
        }
    }

    /// What the quota has done.
    pub fn statistics(&self) -> Result<Statistics, CgroupError> {
        let text = self.read("cpu.stat")?;
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        };
        let withheld_ns = match self.version {
            Version::V1 => field("throttled_time"),
            Version::V2 => field("throttled_usec").map(|us: u64| us.saturating_mul(1_000)),
        };
        match (field("nr_periods"), field("nr_throttled"), withheld_ns) {
            (Some(periods), Some(throttled_periods), Some(withheld_ns)) => {
                Ok(Statistics { periods, throttled_periods, withheld_ns })
            }
            _ => Err(CgroupError::Format { path: self.directory.join("cpu.stat"), text }),
        }
    }

    /// The group of this name below, whether it exists or not.
    pub fn child(&self, name: &str) -> Self {
        Self { version: self.version, directory: self.directory.join(name) }
    }

    /// Makes it, for single threads of a process in the group above. One that is left from before is taken over.
    pub fn create(&self) -> Result<(), CgroupError> {
        match fs::create_dir(&self.directory) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(self.failed("create", "", source));
            }
            _ => {}
        }
        match self.version {
            Version::V1 => Ok(()),
            Version::V2 => self.write("cgroup.type", "threaded"),
        }
    }

    /// Removes it; it has no threads. One that does not exist is as good as removed.
    pub fn remove(&self) -> Result<(), CgroupError> {
        match fs::remove_dir(&self.directory) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(self.failed("remove", "", source))
            }
            _ => Ok(()),
        }
    }

    /// Whether it exists.
    pub fn exists(&self) -> bool {
        self.directory.is_dir()
    }

    /// Whether groups below it have quotas of their own, which v1 always has.
    pub fn lends_cpu(&self) -> Result<bool, CgroupError> {
        match self.version {
            Version::V1 => Ok(true),
            Version::V2 => {
                let enabled = self.read("cgroup.subtree_control")?;
                Ok(enabled.split_whitespace().any(|name| name == "cpu"))
            }
        }
    }

    /// Lets groups below it have quotas of their own, or no longer.
    pub fn lend_cpu(&self, lends: bool) -> Result<(), CgroupError> {
        self.write("cgroup.subtree_control", if lends { "+cpu" } else { "-cpu" })
    }

    /// Whether there are groups below it.
    pub fn has_children(&self) -> Result<bool, CgroupError> {
        let failed = |source| self.failed("list", "", source);
        let mut entries = fs::read_dir(&self.directory).map_err(failed)?.flatten();
        Ok(entries.any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())))
    }

    /// The content of one of its files, without white space at the ends.
    fn read(&self, name: &str) -> Result<String, CgroupError> {
        let read = fs::read_to_string(self.directory.join(name));
        Ok(read.map_err(|source| self.failed("read", name, source))?.trim().into())
    }

    fn write(&self, name: &str, text: &str) -> Result<(), CgroupError> {
        fs::write(self.directory.join(name), text)
            .map_err(|source| self.failed("write", name, source))
    }

    fn failed(&self, operation: &'static str, name: &str, source: io::Error) -> CgroupError {
        CgroupError::File { operation, path: self.directory.join(name), source }
    }
}

/// `ESRCH`: what was to be moved is no thread any more.
fn has_ended(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// A mounted hierarchy that has, or may have, the cpu controller.
struct Mount {
    version: Version,
    /// The group that is to be seen at `point`.
    root: PathBuf,
    point: PathBuf,
}

impl Mount {
    fn of(mount: MountInfo) -> Option<Self> {
        let version = match mount.fs_type.as_str() {
            "cgroup" if mount.super_options.contains_key("cpu") => Version::V1,
            "cgroup2" => Version::V2,
            _ => return None,
        };
        Some(Self { version, root: mount.root.into(), point: mount.mount_point })
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;

    fn mount(version: Version, root: &str, point: &str) -> Mount {
        Mount { version, root: root.into(), point: point.into() }
    }

    fn found(told: &str, mounts: &[Mount]) -> Option<(Version, PathBuf)> {
        Group::locate(told, mounts).map(|mut groups| {
            let nearest = groups.swap_remove(0);
            (nearest.version, nearest.directory)
        })
    }

    #[test]
    fn the_group_is_where_the_cpu_controller_is() {
        let mounts = [
            mount(Version::V1, "/", "/sys/fs/cgroup/cpu,cpuacct"),
            mount(Version::V2, "/", "/sys/fs/cgroup/unified"),
        ];
        let told = "12:cpuset:/a\n4:cpu,cpuacct:/machine/vm:1/libvirt/vcpu0\n0::/init\n";
        let path = PathBuf::from("/sys/fs/cgroup/cpu,cpuacct/machine/vm:1/libvirt/vcpu0");
        assert_eq!(found(told, &mounts), Some((Version::V1, path)));
        let path = PathBuf::from("/sys/fs/cgroup/unified/machine.slice");
        assert_eq!(found("0::/machine.slice\n", &mounts), Some((Version::V2, path)));
        assert_eq!(found("5:cpuset:/\n", &mounts), None);
    }

    #[test]
    fn those_above_it_hold_a_thread_back_too() {
        let groups = Group::locate("0::/a/b\n", &[mount(Version::V2, "/", "/cgroup")]).unwrap();
        let directories: Vec<_> = groups.iter().map(|group| group.directory.as_path()).collect();
        assert_eq!(directories, ["/cgroup/a/b", "/cgroup/a", "/cgroup/"].map(Path::new));
        let own = Group::all_of_thread(std::process::id().cast_signed()).unwrap();
        assert!(own.iter().all(Group::exists), "{own:?}");
    }

    #[test]
    fn a_hierarchy_of_which_only_a_part_is_mounted_is_no_riddle() {
        let mounts = [mount(Version::V2, "/docker/x", "/sys/fs/cgroup")];
        let path = PathBuf::from("/sys/fs/cgroup/vm");
        assert_eq!(found("0::/docker/x/vm\n", &mounts), Some((Version::V2, path)));
        assert_eq!(found("0::/elsewhere\n", &mounts), None, "it cannot be reached from here");
    }

    /// A directory that looks like a group.
    fn group(version: Version, files: &[(&str, &str)]) -> (tempfile::TempDir, Group) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let directory = dir.path().into();
        (dir, Group { version, directory })
    }

    #[test]
    fn both_interfaces_tell_the_same() {
        let v1 = [
            ("cpu.cfs_quota_us", "-1\n"),
            ("cpu.cfs_period_us", "100000\n"),
            ("cpu.stat", "nr_periods 7\nnr_throttled 3\nthrottled_time 5000000\nnr_bursts 0\n"),
        ];
        let v2 = [
            ("cpu.max", "max 100000\n"),
            ("cpu.stat", "usage_usec 1\nnr_periods 7\nnr_throttled 3\nthrottled_usec 5000\n"),
        ];
        for (version, files) in [(Version::V1, &v1[..]), (Version::V2, &v2[..])] {
            let (_dir, group) = group(version, files);
            let none = Quota { quota_us: None, period_us: 100_000 };
            assert_eq!(group.quota().unwrap(), none);
            let statistics =
                Statistics { periods: 7, throttled_periods: 3, withheld_ns: 5_000_000 };
            assert_eq!(group.statistics().unwrap(), statistics);
            let half = Quota { quota_us: Some(2_500), period_us: 5_000 };
            group.set_quota(half).unwrap();
            assert_eq!(group.quota().unwrap(), half);
            group.set_quota(none).unwrap();
            assert_eq!(group.quota().unwrap(), none);
        }
    }

    #[test]
    fn what_is_no_quota_is_told_with_its_file() {
        for text in ["", "max", "much 100000", "5000 now"] {
            let (_dir, group) = group(Version::V2, &[("cpu.max", text)]);
            let error = group.quota().unwrap_err().to_string();
            assert!(error.contains("cpu.max") && error.contains("not understood"), "{error}");
        }
    }
}
