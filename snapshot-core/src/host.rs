//! What this host offers to the engine, asked by trying it. Touches no guest.

use std::fs::File;
use std::io;
use std::path::Path;

use procfs::process::{MMapPath, Process};
use rustix::fs::{Mode, OFlags};

use crate::storage;
use crate::sys::uffd::{DEVICE, Features};
use crate::sys::uring::WriteRing;

/// How this process gets a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// From `/dev/userfaultfd` (Linux 6.1), which can also be handed to a QEMU without privileges.
    Device,
    /// By the system call only: memory of this process, or of privileged ones.
    Syscall,
}

/// What the kernel's userfaultfd can do; see `ioctl_userfaultfd(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Userfaultfd {
    /// Where it comes from.
    pub access: Access,
    /// Write-protects anonymous memory and tells when pages are taken away; without it nothing works. Linux 5.7.
    pub protects: bool,
    /// Write-protects shared memory and huge page pools too. Linux 5.19.
    pub protects_shared: bool,
    /// Write-protects pages that do not exist yet, which must otherwise be populated first. Linux 6.4.
    pub protects_holes: bool,
    /// Lets writes through and remembers them, which the [dirty rate](crate::dirty_rate) needs. Linux 6.7.
    pub tracks_writes: bool,
}

/// Creates a userfaultfd and asks for its features.
///
/// # Errors
/// `EPERM` or `EACCES` without the privilege (root, `CAP_SYS_PTRACE`, or access to the device), `ENOSYS` without
/// support.
pub fn userfaultfd() -> io::Result<Userfaultfd> {
    let offered = Features::of_this_kernel()?;
    let device = File::options().read(true).write(true).open(DEVICE);
    Ok(Userfaultfd {
        access: if device.is_ok() { Access::Device } else { Access::Syscall },
        protects: offered.contains(Features::REQUIRED),
        protects_shared: offered.contains(Features::SHARED),
        protects_holes: offered.contains(Features::UNPOPULATED),
        tracks_writes: Features::can_track_writes()?,
    })
}

/// Whether snapshots are written through io_uring; else by one plain write after the other.
///
/// # Errors
/// `ENOSYS` or `EPERM` where it is absent or forbidden, `ENOMEM` where memory may not be locked.
pub fn io_uring() -> io::Result<()> {
    WriteRing::new(storage::DEPTH).map(drop)
}

/// Whether files in the directory `dir` can be written past the page cache. Leaves no file.
///
/// # Errors
/// If no file can be created there, or the file system has no unnamed files to try it with.
pub fn direct_io(dir: &Path) -> io::Result<bool> {
    let create = |flags| {
        rustix::fs::open(
            dir,
            OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC | flags,
            Mode::RUSR,
        )
    };
    create(OFlags::empty())?;
    match create(OFlags::DIRECT) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether the files behind mappings can be opened, as reading shared guest RAM takes.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` or `CAP_CHECKPOINT_RESTORE` (`proc_pid_map_files(5)`).
pub fn map_files() -> io::Result<()> {
    let maps = Process::myself().and_then(|process| process.maps()).map_err(io::Error::other)?;
    let of_file = maps.iter().find(|map| matches!(map.pathname, MMapPath::Path(_)));
    let (start, end) = of_file.ok_or(io::ErrorKind::NotFound)?.address;
    File::open(format!("/proc/self/map_files/{start:x}-{end:x}")).map(drop)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;

    #[test]
    fn a_directory_that_is_none_has_no_direct_io() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        direct_io(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let error = direct_io(&dir.path().join("none")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
