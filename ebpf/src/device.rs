//! Which disks a directory's files lie on.
//!
//! A file tells the device of its file system. That may be a partition, or made of other devices (device mapper, MD
//! RAID); requests are what the disks at the bottom get. A loop device is a disk of its own.
//!
//! ```text
//!   directory ─▶ file system's device ─▶ 252:3 (dm) ─slaves─▶ 8:2 (partition) ─▶ 8:0 (disk)
//!                                                   └────────▶ 8:17 (partition) ─▶ 8:16 (disk)
//! ```

use std::fmt;
use std::fs;
use std::io;
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use livesnap_ebpf_common::disk::DISKS_MAX;
use serde::Serialize;

/// Where sysfs has block devices by number.
const SYSFS: &str = "/sys/dev/block";
const MOUNTS: &str = "/proc/self/mountinfo";
/// Devices made of devices that are followed.
const DEPTH_MAX: u32 = 16;

/// A disk, of which the kernel tells requests.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Disk {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// The kernel's name for it, such as `nvme0n1`.
    pub name: String,
}

impl fmt::Display for Disk {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.name)
    }
}

/// Why no disk is known of a directory.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It cannot be looked at.
    #[error("cannot tell which disk {path} lies on: {source}")]
    Unreadable {
        /// Directory, or file of the kernel's.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// A file system in memory, of the network, or of several layers.
    #[error("{path} lies on no disk that is known: its file system's device is {major}:{minor}")]
    NoDisk {
        /// The directory.
        path: PathBuf,
        /// Major number of the file system's device.
        major: u32,
        /// Minor number of it.
        minor: u32,
    },
    /// More than the programs can compare.
    #[error("{path} lies on {found} disks, and the probe can look at {DISKS_MAX}")]
    TooMany {
        /// The directory.
        path: PathBuf,
        /// How many.
        found: usize,
    },
}

impl Disk {
    /// The disks at the bottom of a directory's file system, or below a block device that `path` names.
    ///
    /// # Errors
    /// If there are none, or they cannot be told.
    pub fn of(path: &Path) -> Result<Vec<Self>, DeviceError> {
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            move |source| DeviceError::Unreadable { path, source }
        };
        let metadata = fs::metadata(path).map_err(unreadable(path))?;
        let is_device = metadata.file_type().is_block_device();
        let number = split(if is_device { metadata.st_rdev() } else { metadata.st_dev() });
        let mut start = sysfs(number);
        if !start.exists() {
            // btrfs has a number of its own for each subvolume; what is mounted names one of its devices.
            let mounts = fs::read_to_string(MOUNTS).map_err(unreadable(Path::new(MOUNTS)))?;
            let source = mounted(&mounts, number).and_then(|source| fs::metadata(source).ok());
            let (major, minor) = number;
            let device = source.filter(|source| source.file_type().is_block_device());
            let device = device.ok_or_else(|| DeviceError::NoDisk {
                path: path.to_owned(),
                major,
                minor,
            })?;
            start = sysfs(split(device.st_rdev()));
        }
        let mut disks = Vec::new();
        descend(&start, DEPTH_MAX, &mut disks).map_err(unreadable(&start))?;
        disks.sort();
        disks.dedup();
        let found = disks.len();
        if found > DISKS_MAX {
            return Err(DeviceError::TooMany { path: path.to_owned(), found });
        }
        Ok(disks)
    }
}

/// Adds the disks below the device that sysfs has at `directory`.
fn descend(directory: &Path, depth_left: u32, disks: &mut Vec<Disk>) -> io::Result<()> {
    let mut directory = fs::canonicalize(directory)?;
    if directory.join("partition").exists() {
        directory.pop();
    }
    let below: Vec<PathBuf> = match fs::read_dir(directory.join("slaves")) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    if below.is_empty() || depth_left == 0 {
        let number = fs::read_to_string(directory.join("dev"))?;
        let (major, minor) = parse_number(&number).ok_or(io::ErrorKind::InvalidData)?;
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        disks.push(Disk { major, minor, name });
        return Ok(());
    }
    below.iter().try_for_each(|device| descend(device, depth_left - 1, disks))
}

fn sysfs((major, minor): (u32, u32)) -> PathBuf {
    Path::new(SYSFS).join(format!("{major}:{minor}"))
}

/// Major and minor of a device number as `stat(2)` has it.
fn split(device: u64) -> (u32, u32) {
    (rustix::fs::major(device), rustix::fs::minor(device))
}

fn parse_number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// What is mounted with that device number; see `proc_pid_mountinfo(5)`.
fn mounted(mounts: &str, (major, minor): (u32, u32)) -> Option<&Path> {
    let number = format!("{major}:{minor}");
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some(&number))?;
    let (_, after) = line.split_once(" - ")?;
    after.split(' ').nth(1).map(Path::new)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    #[test]
    fn what_is_mounted_is_found_by_its_number() {
        let mounts = "21 1 0:19 / /proc rw - proc proc rw\n\
                      36 1 0:32 /@home /home rw,noatime shared:1 - btrfs /dev/sda2 rw,ssd\n";
        assert_eq!(mounted(mounts, (0, 32)), Some(Path::new("/dev/sda2")));
        assert_eq!(mounted(mounts, (0, 19)), Some(Path::new("proc")));
        assert_eq!(mounted(mounts, (0, 3)), None);
    }

    #[test]
    fn devices_made_of_others_are_followed_to_their_disks() {
        let sysfs = tempfile::tempdir().unwrap();
        let device = |path: &str, number: &str| {
            let directory = sysfs.path().join(path);
            fs::create_dir_all(directory.join("slaves")).unwrap();
            fs::write(directory.join("dev"), number).unwrap();
            directory
        };
        let (sda, sdb, dm) =
            (device("sda", "8:0\n"), device("sdb", "8:16\n"), device("dm-0", "252:0\n"));
        let partition = sda.join("sda2");
        fs::create_dir_all(&partition).unwrap();
        fs::write(partition.join("partition"), "2\n").unwrap();
        std::os::unix::fs::symlink(&partition, dm.join("slaves/sda2")).unwrap();
        std::os::unix::fs::symlink(&sdb, dm.join("slaves/sdb")).unwrap();

        let mut disks = Vec::new();
        descend(&dm, DEPTH_MAX, &mut disks).unwrap();
        disks.sort();
        let numbers: Vec<_> = disks.iter().map(|disk| (disk.minor, disk.name.as_str())).collect();
        assert_eq!(numbers, [(0, "sda"), (16, "sdb")]);
    }

    #[test]
    fn a_file_system_in_memory_has_no_disk() {
        let error = Disk::of(Path::new("/proc")).unwrap_err();
        assert!(matches!(error, DeviceError::NoDisk { major: 0, .. }), "{error}");
    }
}
