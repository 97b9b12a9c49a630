//! A userfaultfd context of the process that owns the RAM, used for write protection only.
//!
//! Facts from `userfaultfd(2)`, `ioctl_userfaultfd(2)` and `Documentation/admin-guide/mm/userfaultfd.rst`.
//! When the last descriptor of a context is closed, the kernel unregisters every range, drops the
//! protection and wakes every waiter: closing is always safe.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_EVENT_REMAP, UFFD_FEATURE_EVENT_REMOVE, UFFD_FEATURE_EVENT_UNMAP,
    UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_THREAD_ID, UFFD_FEATURE_WP_ASYNC,
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, uffdio_api,
};
use linux_raw_sys::ioctl::UFFDIO_API;
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use userfaultfd::{Event, EventBuffer, FaultKind, RegisterMode, Uffd};

use crate::address::{HostVirtAddr, as_index};

/// Gives contexts that also serve faults taken inside the kernel; Linux 6.1.
pub const DEVICE: &str = "/dev/userfaultfd";

/// `_IO(0xAA, 0x00)` of `linux/userfaultfd.h`.
pub const USERFAULTFD_IOC_NEW: u32 = 0xAA00;

/// Events read at most at once.
const EVENTS_PER_READ: usize = 32;

/// Feature bits of `UFFDIO_API`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Without these no snapshot is possible: write faults, with the thread that had them, and notice of pages
    /// taken away.
    pub const REQUIRED: Self = Self(
        UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64
            | UFFD_FEATURE_THREAD_ID as u64
            | UFFD_FEATURE_EVENT_REMAP as u64
            | UFFD_FEATURE_EVENT_REMOVE as u64
            | UFFD_FEATURE_EVENT_UNMAP as u64,
    );
    /// Write protection of shared memory and huge page pools; Linux 5.19.
    pub const SHARED: Self = Self(UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64);
    /// Protection of pages that do not exist yet; Linux 6.4.
    pub const UNPOPULATED: Self = Self(UFFD_FEATURE_WP_UNPOPULATED as u64);
    /// Write faults, and nothing else, for those who serve them.
    pub const FAULTS: Self = Self(UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64);
    /// Writes go through, and the page table remembers them; includes [`UNPOPULATED`](Self::UNPOPULATED).
    /// Linux 6.7.
    pub const ASYNC: Self = Self(UFFD_FEATURE_WP_ASYNC as u64);

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all bits of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What this kernel offers of the features that a snapshot uses: not [`ASYNC`](Self::ASYNC), for a write that goes
    /// through cannot be undone.
    ///
    /// # Errors
    /// `EPERM` or `EACCES` without the privilege to create a context, `ENOENT`/`ENOSYS` without support.
    pub fn of_this_kernel() -> io::Result<Self> {
        let offered = Self::all_of_this_kernel()?;
        Ok(Self(offered.0 & (Self::REQUIRED.0 | Self::SHARED.0 | Self::UNPOPULATED.0)))
    }

    /// Whether this kernel has [`ASYNC`](Self::ASYNC).
    ///
    /// # Errors
    /// As [`of_this_kernel`](Self::of_this_kernel).
    pub fn can_track_writes() -> io::Result<bool> {
        Ok(Self::all_of_this_kernel()?.contains(Self::ASYNC))
    }

    fn all_of_this_kernel() -> io::Result<Self> {
        // A context accepts UFFDIO_API once, so the probe needs one of its own.
        let fd = create_local()?;
        handshake(fd.as_fd(), Self(0))
    }
}

/// A new userfaultfd of this process, non-blocking, before `UFFDIO_API`.
///
/// # Errors
/// `EPERM` or `EACCES` without the privilege (root, `CAP_SYS_PTRACE`, or access to
/// `/dev/userfaultfd`), `ENOSYS` without support.
pub fn create_local() -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    match std::fs::OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(device) => {
            // SAFETY: USERFAULTFD_IOC_NEW takes its flags by value and touches no memory.
            let fd = unsafe {
                libc::ioctl(
                    device.as_raw_fd(),
                    libc::c_ulong::from(USERFAULTFD_IOC_NEW),
                    flags.bits(),
                )
            };
            if fd == -1 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the ioctl returned a new descriptor that nothing else owns.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        }
        // Before Linux 6.1 there is no device; the system call then asks for CAP_SYS_PTRACE itself.
        // SAFETY: creating the descriptor changes no mapping; ranges are registered later.
        Err(_) => Ok(unsafe { userfaultfd(flags) }?),
    }
}

/// Performs `UFFDIO_API` and returns the features that the kernel offers.
fn handshake(fd: BorrowedFd<'_>, features: Features) -> io::Result<Features> {
    let mut api = uffdio_api { api: u64::from(UFFD_API), features: features.0, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`, which `api` is, for the length of the call.
    let result =
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::c_ulong::from(UFFDIO_API), &raw mut api) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(Features(api.features))
}

/// A context, after `UFFDIO_API`.
pub struct Context {
    uffd: Uffd,
}

/// What the kernel reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A thread sleeps because it wants to write here.
    WriteFault {
        /// Where.
        address: HostVirtAddr,
        /// The thread, by its id in its own PID namespace; 0 if the context was made without that feature.
        thread: u32,
    },
    /// `madvise` is about to discard these pages. Its caller proceeds once this is read, so their content
    /// cannot be saved any more.
    Discarded {
        /// First address.
        start: HostVirtAddr,
        /// Address after the last one.
        end: HostVirtAddr,
    },
    /// These addresses are not what they were: `munmap` or `mremap`.
    Unmapped {
        /// First address.
        start: HostVirtAddr,
        /// Address after the last one.
        end: HostVirtAddr,
    },
}

/// Room for the events of one read, allocated beforehand.
pub struct Notices(EventBuffer);

impl Notices {
    /// Room for a read's worth.
    #[must_use]
    pub fn new() -> Self {
        Self(EventBuffer::new(EVENTS_PER_READ))
    }
}

impl Context {
    /// Takes a fresh userfaultfd and enables `features` on it.
    ///
    /// # Errors
    /// `EINVAL` if the kernel lacks one of them.
    pub fn new(fd: OwnedFd, features: Features) -> io::Result<Self> {
        handshake(fd.as_fd(), features)?;
        // SAFETY: `fd` is an owned userfaultfd and is given up here, so it has one owner again.
        let uffd = unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) };
        Ok(Self { uffd })
    }

    /// Registers a range for write faults; protects nothing yet.
    ///
    /// # Errors
    /// `EINVAL` for memory that cannot be write-protected, `EBUSY` where another context has it,
    /// `ESRCH` when the process is gone.
    pub fn register(&self, start: HostVirtAddr, len_bytes: u64) -> io::Result<()> {
        let (start, len) = as_range(start, len_bytes);
        self.uffd
            .register_with_mode(start, len, RegisterMode::WRITE_PROTECT)
            .map(drop)
            .map_err(into_io)
    }

    /// Gives a range up: its protection is dropped and waiters in it are woken.
    ///
    /// # Errors
    /// `ESRCH` when the process is gone.
    pub fn unregister(&self, start: HostVirtAddr, len_bytes: u64) -> io::Result<()> {
        let (start, len) = as_range(start, len_bytes);
        let unregistered = self.uffd.unregister(start, len);
        // The kernel itself wakes those who wait for missing pages only (fs/userfaultfd.c).
        self.uffd.wake(start, len).and(unregistered).map_err(into_io)
    }

    /// Gives up a range in which nothing is protected any more, without stopping the process.
    ///
    /// A range that is registered for write faults is resolved as a whole when it is unregistered
    /// (`userfaultfd_clear_vma`, mm/userfaultfd.c): the kernel visits each of its page-table entries, during which
    /// no fault of the process goes on, and leaves shared memory read-only, so that each page faults once
    /// more. A range that is registered for missing pages has nothing to resolve. A thread
    /// that touches a missing page just then waits until the range is unregistered, which wakes it.
    ///
    /// # Errors
    /// `ESRCH` when the process is gone.
    pub fn unregister_writable(&self, start: HostVirtAddr, len_bytes: u64) -> io::Result<()> {
        let (from, len) = as_range(start, len_bytes);
        let changed = self.uffd.register_with_mode(from, len, RegisterMode::MISSING);
        // Where the kernel does not let the mode be changed, the plain way does as well.
        self.unregister(start, len_bytes).and(changed.map(drop).map_err(into_io))
    }

    /// Write-protects a registered range. Takes the target's `mmap_lock` for reading only.
    ///
    /// # Errors
    /// `ENOENT` when part of the range is not registered any more, `EAGAIN` while a removal waits to be
    /// read, `ESRCH` when the process is gone.
    pub fn protect(&self, start: HostVirtAddr, len_bytes: u64) -> io::Result<()> {
        let (start, len) = as_range(start, len_bytes);
        self.uffd.write_protect(start, len).map_err(into_io)
    }

    /// Makes a range writable and wakes its waiters.
    ///
    /// # Errors
    /// As [`protect`](Self::protect).
    pub fn unprotect(&self, start: HostVirtAddr, len_bytes: u64) -> io::Result<()> {
        let (start, len) = as_range(start, len_bytes);
        self.uffd.remove_write_protection(start, len, true).map_err(into_io)
    }

    /// Reads, without waiting, what has been reported; returns how many notices there were.
    ///
    /// # Errors
    /// The kernel's, or `InvalidData` for a report that was not asked for.
    pub fn read(&self, room: &mut Notices, mut each: impl FnMut(Notice)) -> io::Result<usize> {
        let mut count = 0;
        for event in self.uffd.read_events(&mut room.0).map_err(into_io)? {
            each(match event.map_err(into_io)? {
                Event::Pagefault { kind: FaultKind::WriteProtected, addr, thread_id, .. } => {
                    let thread = thread_id.as_raw().unsigned_abs();
                    Notice::WriteFault { address: HostVirtAddr(addr as u64), thread }
                }
                Event::Remove { start, end } => Notice::Discarded {
                    start: HostVirtAddr(start as u64),
                    end: HostVirtAddr(end as u64),
                },
                Event::Unmap { start, end } => Notice::Unmapped {
                    start: HostVirtAddr(start as u64),
                    end: HostVirtAddr(end as u64),
                },
                Event::Remap { from, len, .. } => Notice::Unmapped {
                    start: HostVirtAddr(from as u64),
                    end: HostVirtAddr(from as u64).add(len as u64),
                },
                other @ (Event::Pagefault { .. } | Event::Fork { .. }) => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("unexpected userfaultfd event {other:?}"),
                    ));
                }
            });
            count += 1;
        }
        Ok(count)
    }
}

impl AsFd for Context {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

fn as_range(start: HostVirtAddr, len_bytes: u64) -> (*mut c_void, usize) {
    // An address of another process: a number for the kernel, never dereferenced here.
    (std::ptr::without_provenance_mut(as_index(start.0)), as_index(len_bytes))
}

fn into_io(error: userfaultfd::Error) -> io::Error {
    match error {
        userfaultfd::Error::SystemError(errno) => io::Error::from_raw_os_error(errno as i32),
        userfaultfd::Error::OpenDevUserfaultfd(error) => error,
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_never_offered_to_let_writes_through() {
        // Without the privilege there is nothing to offer.
        let offered = Features::of_this_kernel().unwrap_or(Features(0));
        assert!(!offered.contains(Features::ASYNC), "{offered:?}");
    }
}
