//! A userfaultfd of a process that was never made for it, obtained from outside.
//!
//! A userfaultfd belongs to the address space of whoever creates it, so a thread of the target is
//! stopped for about 100 µs and made to create one; the descriptor is then fetched with `pidfd_getfd`
//! and the thread closes its copy. Time-outs and system calls of that thread go on as if nothing had
//! happened, `epoll_wait` and `sigtimedwait` excepted, which return `EINTR`; threads that wait in
//! those are taken last.
//!
//! The work is done on a thread of its own: whatever it may still trace when it ends, the kernel
//! releases. A `kill -9` in between would leave the target's thread with foreign registers, so
//! programs that can be killed go through a [`Guard`](super::guard::Guard).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use procfs::process::{MMapPath, Process, Syscall};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::Reason;
use crate::sys::ptrace::{SYSCALL_INSTRUCTION, StoppedThread};

/// How long a thread may take to stop. One in an uninterruptible sleep takes until that ends.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// Threads that are tried before giving up.
const CANDIDATES_MAX: usize = 4;
/// `_IO(0xAA, 0)` (linux/userfaultfd.h).
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;

/// By which call the target creates its userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// `userfaultfd(2)`: the target needs `CAP_SYS_PTRACE`, or vm.unprivileged_userfaultfd = 1.
    Syscall,
    /// `USERFAULTFD_IOC_NEW` on the target's own descriptor of `/dev/userfaultfd` with this number; the
    /// target needs no privilege.
    DevFd(i32),
}

/// Why no userfaultfd was obtained. The target runs on unharmed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The target's threads cannot be listed, or there is none that may be stopped.
    #[error(
        "process {pid} has no thread that could be stopped: {source}: check that it still runs"
    )]
    NoThread {
        /// The target.
        pid: i32,
        /// What procfs said.
        source: procfs::ProcError,
    },
    /// The kernel does not let us trace the target.
    #[error(
        "not allowed to trace process {pid}: run as root or with CAP_SYS_PTRACE, and see kernel.yama.ptrace_scope: {source}"
    )]
    Denied {
        /// The target.
        pid: i32,
        /// Errno.
        source: io::Error,
    },
    /// Stopping a thread, or making it do a call, failed.
    #[error(
        "cannot {doing} in thread {tid} of process {pid}: {source}: the process runs on; try again"
    )]
    Trace {
        /// What was being done.
        doing: &'static str,
        /// The target.
        pid: i32,
        /// The thread.
        tid: i32,
        /// Errno.
        source: io::Error,
    },
    /// The call in the target failed.
    #[error(
        "process {pid} may not create a userfaultfd ({source}): a kernel with /dev/userfaultfd (6.1 or later) is needed"
    )]
    Refused {
        /// The target.
        pid: i32,
        /// Errno in the target.
        source: io::Error,
    },
}

impl AttachError {
    /// Stable code.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::NoThread { .. } => Reason::NoProcess,
            Self::Denied { .. } => Reason::MissingPrivilege,
            Self::Trace { .. } | Self::Refused { .. } => Reason::AttachFailed,
        }
    }
}

/// Creates a userfaultfd in process `pid` and moves it here: non-blocking, close-on-exec, before
/// `UFFDIO_API`; no copy stays in the target.
///
/// # Errors
/// See [`AttachError`]; the target is unharmed in every case.
pub fn userfaultfd_of(pid: Pid, source: Source) -> Result<OwnedFd, AttachError> {
    let worker = std::thread::spawn(move || {
        let mut last = None;
        for tid in candidates(pid)?.into_iter().take(CANDIDATES_MAX) {
            match create_in(pid, tid, source) {
                // The thread sleeps deeply or is ending (which the kernel also denies): another one
                // will do, unless it is denied for all.
                Err(
                    error @ (AttachError::Trace { doing: "stop", .. } | AttachError::Denied { .. }),
                ) => last = Some(error),
                other => return other,
            }
        }
        Err(last.unwrap_or_else(|| AttachError::NoThread {
            pid: pid.as_raw_nonzero().get(),
            source: procfs::ProcError::NotFound(None),
        }))
    });
    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Threads of the target, those best to stop first.
fn candidates(pid: Pid) -> Result<Vec<Pid>, AttachError> {
    let failed = |source| AttachError::NoThread { pid: pid.as_raw_nonzero().get(), source };
    let process = Process::new(pid.as_raw_nonzero().get()).map_err(failed)?;
    let mut ranked: Vec<(u8, Pid)> = process
        .tasks()
        .map_err(failed)?
        // A thread may end while we look.
        .filter_map(Result::ok)
        // io_uring's kernel workers never return to user space.
        .filter(|task| task.stat().is_ok_and(|stat| !stat.comm.starts_with("iou-wrk-")))
        .filter_map(|task| Some((rank(task.syscall().ok()?), Pid::from_raw(task.tid)?)))
        .collect();
    ranked.sort_unstable_by_key(|&(rank, _)| rank);
    Ok(ranked.into_iter().map(|(_, tid)| tid).collect())
}

/// How much stopping a thread there would be noticed, least first.
const fn rank(syscall: Syscall) -> u8 {
    match syscall {
        // No time-out that could be off by the microseconds: in QEMU, the RCU thread.
        Syscall::Blocked { syscall_number: libc::SYS_futex, argument_registers, .. }
            if argument_registers[3] == 0 =>
        {
            0
        }
        // signal(7): these are never restarted.
        Syscall::Blocked {
            syscall_number:
                libc::SYS_epoll_wait
                | libc::SYS_epoll_pwait
                | libc::SYS_epoll_pwait2
                | libc::SYS_rt_sigtimedwait
                | libc::SYS_rt_sigsuspend
                | libc::SYS_pause,
            ..
        } => 3,
        Syscall::Blocked { .. } => 1,
        _ => 2,
    }
}

fn create_in(pid: Pid, tid: Pid, source: Source) -> Result<OwnedFd, AttachError> {
    let raw = |pid: Pid| pid.as_raw_nonzero().get();
    let fail = |doing| {
        move |source: io::Error| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => AttachError::Denied { pid: raw(pid), source },
            _ => AttachError::Trace { doing, pid: raw(pid), tid: raw(tid), source },
        }
    };
    // All that can be done beforehand is: while the thread stands still, every microsecond counts.
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| fail("open")(e.into()))?;
    let memory = File::open(format!("/proc/{}/mem", raw(pid))).map_err(fail("open memory"))?;
    let in_vdso = vdso_syscall(pid, &memory);
    let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK).cast_unsigned());
    let (number, args) = match source {
        Source::Syscall => (libc::SYS_userfaultfd, [flags, 0, 0]),
        Source::DevFd(fd) => {
            (libc::SYS_ioctl, [u64::from(fd.cast_unsigned()), USERFAULTFD_IOC_NEW, flags])
        }
    };

    let mut thread = StoppedThread::seize(tid, STOP_LIMIT).map_err(fail("stop"))?;
    let before = thread.instruction_pointer().wrapping_sub(2);
    let at = if is_syscall_at(&memory, before) { Some(before) } else { in_vdso };
    let at =
        at.ok_or_else(|| fail("find a system call instruction")(io::ErrorKind::NotFound.into()))?;
    let number = thread
        .inject(at, number, args)
        .map_err(|source| AttachError::Refused { pid: raw(pid), source })?;
    let fetched = i32::try_from(number)
        .map_err(io::Error::other)
        .and_then(|fd| Ok(pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty())?));
    let closed = thread.inject(at, libc::SYS_close, [number, 0, 0]);
    thread.release().map_err(fail("release"))?;
    closed.map_err(fail("close the userfaultfd"))?;
    fetched.map_err(fail("fetch the userfaultfd"))
}

/// Address of a `syscall` instruction in the target's vdso.
fn vdso_syscall(pid: Pid, memory: &File) -> Option<u64> {
    let maps = Process::new(pid.as_raw_nonzero().get()).ok()?.maps().ok()?;
    let (start, end) = maps.iter().find(|map| map.pathname == MMapPath::Vdso)?.address;
    let mut code = vec![0_u8; usize::try_from(end - start).ok()?];
    memory.read_exact_at(&mut code, start).ok()?;
    let offset = code.windows(2).position(|bytes| bytes == SYSCALL_INSTRUCTION)?;
    Some(start + offset as u64)
}

fn is_syscall_at(memory: &File, address: u64) -> bool {
    let mut code = [0_u8; 2];
    memory.read_exact_at(&mut code, address).is_ok() && code == SYSCALL_INSTRUCTION
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::vmm::testing::{DEADLINE, Role, privileged};
    use std::io::Write;
    use std::time::Instant;

    /// The sleeper, and its threads as (kind, tid).
    fn sleeper() -> (Role, Vec<(String, Pid)>) {
        let mut role = Role::start("sleeper", "");
        let threads = (0..6)
            .map(|_| {
                let line = role.line();
                let (kind, tid) = line.split_once(' ').unwrap();
                (kind.into(), Pid::from_raw(tid.parse().unwrap()).unwrap())
            })
            .collect();
        (role, threads)
    }

    /// Anomalies, and open descriptors, after the sleeper's threads have gone on for a while.
    fn report(role: &mut Role) -> (u32, u32) {
        let deadline = Instant::now() + DEADLINE;
        let mut laps_left = 200_u32;
        loop {
            role.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
            let line = role.line();
            let numbers: Vec<u32> = line.split(' ').map(|n| n.parse().unwrap()).collect();
            laps_left = laps_left.saturating_sub(numbers[1]);
            if laps_left == 0 {
                return (numbers[0], numbers[2]);
            }
            assert!(Instant::now() < deadline, "the threads stand still");
        }
    }

    #[test]
    fn injection_into_a_waiting_thread_is_not_noticed() {
        if !privileged() {
            return;
        }
        let (mut role, threads) = sleeper();
        let before = report(&mut role);
        for (kind, tid) in &threads {
            for _ in 0..40 {
                let fd = create_in(role.pid(), *tid, Source::Syscall).unwrap();
                let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
                let name = std::fs::read_link(link).unwrap();
                assert_eq!(name.to_str(), Some("anon_inode:[userfaultfd]"), "{kind}");
            }
            assert_eq!(report(&mut role), before, "{kind}: anomalies, descriptors");
        }
        assert_eq!(before.0, 0);
    }

    #[test]
    fn a_descriptor_that_is_not_dev_userfaultfd_is_refused() {
        if !privileged() {
            return;
        }
        let (mut role, _threads) = sleeper();
        let before = report(&mut role);
        let error = userfaultfd_of(role.pid(), Source::DevFd(0)).unwrap_err();
        assert!(matches!(error, AttachError::Refused { .. }), "{error}");
        assert_eq!(report(&mut role), before);
    }

    #[test]
    fn the_thread_that_notices_least_comes_first() {
        let (role, threads) = sleeper();
        let is_first = || {
            let found = candidates(role.pid()).unwrap();
            let place = |kind: &str| {
                let tid = threads.iter().find(|(name, _)| name == kind).unwrap().1;
                found.iter().position(|&candidate| candidate == tid).unwrap()
            };
            place("futex") < place("poll") && place("futex") < place("compute")
        };
        // A thread tells its id before it falls asleep.
        let deadline = Instant::now() + DEADLINE;
        while !is_first() {
            assert!(Instant::now() < deadline, "the thread on a futex never came first");
        }
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        let (mut role, _threads) = sleeper();
        role.child.kill().unwrap();
        role.child.wait().unwrap();
        let error = userfaultfd_of(role.pid(), Source::Syscall).unwrap_err();
        assert_eq!(error.reason(), Reason::NoProcess, "{error}");
    }

    #[test]
    fn killing_the_snapshotter_amid_injections_leaves_the_target_alone() {
        if !privileged() {
            return;
        }
        let (mut role, _threads) = sleeper();
        let before = report(&mut role);
        for round in 0..20_u32 {
            let mut injector = Role::start("injector", &role.child.id().to_string());
            // Killed at another point each time: after some injections, and while the next is under way.
            for _ in 0..=round % 4 {
                assert_eq!(injector.line(), "injected");
            }
            let spin = Instant::now() + Duration::from_micros(u64::from(round) * 37);
            while Instant::now() < spin {}
            drop(injector);
        }
        // Its guard, which is not killed, may still be at it.
        let deadline = Instant::now() + DEADLINE;
        while report(&mut role) != before {
            assert!(Instant::now() < deadline, "{:?} is not {before:?}", report(&mut role));
        }
    }
}
