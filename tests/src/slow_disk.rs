//! A destination that is as slow as a test wants it, by the kernel's own limit on what a process writes (cgroup v1,
//! `blkio.throttle.write_bps_device`; the kernel's blkio-controller.rst); needs root.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::poll_until;

const HIERARCHY: &str = "/sys/fs/cgroup/blkio";
/// Processes that have ended leave their group a moment later.
const REMOVAL_LIMIT: Duration = Duration::from_secs(10);

/// A group whose processes write slowly to one disk; removed when dropped, when they have all ended.
#[derive(Debug)]
pub struct SlowDisk {
    group: PathBuf,
    device: String,
}

impl SlowDisk {
    /// The disk on which `directory` lies, with so many bytes a second.
    pub fn new(directory: &Path, bytes_per_second: u64) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("livesnap-test-{}-{number}", std::process::id());
        let group = Path::new(HIERARCHY).join(name);
        fs::create_dir(&group).with_context(|| format!("cannot create {}", group.display()))?;
        let slow = Self { group, device: disk_of(directory)? };
        slow.limit(bytes_per_second)?;
        Ok(slow)
    }

    /// From now on as fast as it is.
    pub fn lift(&self) -> Result<()> {
        self.limit(0)
    }

    /// `command`, started among the slow.
    #[must_use]
    pub fn command(&self, command: &Command) -> Command {
        let mut slow = Command::new("sh");
        slow.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.group.join("cgroup.procs"));
        slow.arg(command.get_program()).args(command.get_args());
        slow
    }

    fn limit(&self, bytes_per_second: u64) -> Result<()> {
        let file = self.group.join("blkio.throttle.write_bps_device");
        fs::write(&file, format!("{} {bytes_per_second}", self.device))
            .with_context(|| format!("cannot limit {} by {}", self.device, file.display()))
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // An empty group that stays limits nobody.
        let _ = poll_until("the slow group is empty", REMOVAL_LIMIT, || {
            Ok(fs::remove_dir(&self.group).ok())
        });
    }
}

/// `MAJOR:MINOR` of the whole disk on which `directory` lies.
fn disk_of(directory: &Path) -> Result<String> {
    let metadata =
        fs::metadata(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let (major, minor) = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
    let device = format!("{major}:{minor}");
    let parent = format!("/sys/dev/block/{device}/../dev");
    let is_partition = Path::new(&format!("/sys/dev/block/{device}/partition")).exists();
    if !is_partition {
        return Ok(device);
    }
    let disk = fs::read_to_string(&parent).with_context(|| format!("cannot read {parent}"))?;
    Ok(disk.trim().into())
}
