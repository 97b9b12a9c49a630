//! The guard: a small process beside livesnap that finishes what must not be left half done.
//!
//! It has three duties, all for the case that livesnap itself is killed or hangs:
//!
//! - **Injection.** Between altering a thread's registers and putting them back, the tracer must not
//!   die; so it is the guard that traces (see [`attach`](super::attach)).
//! - **The pause.** Before `stop`, livesnap arms the guard. If livesnap ends, or the pause's limit
//!   passes, while it is armed, the guard sends `cont` on the shared QMP socket.
//! - **Stops.** A livesnap that is stopped (SIGSTOP) serves no faults, and whoever writes to protected
//!   RAM waits with it. From the first userfaultfd on, the guard looks after livesnap all the time, and
//!   sends SIGCONT to one that stays stopped; in the pause it does so at the limit.
//!
//! ```text
//!           Arm                         Disarm → "disarmed"
//!   idle ────────► armed ──────────────────────────────────► idle
//!                    │  limit passed: post `cont`
//!                    ├────────────────► fired ── Disarm → "fired" ─► idle
//!                    │                    │
//!                    └────────────────────┴─► end
//!                      livesnap ended: `cont` until the guest runs
//! ```
//!
//! QEMU works off one socket's commands in order, so a `cont` behind a `stop` always wins, also over a
//! `stop` that is still being carried out. While livesnap lives only livesnap reads the socket; the
//! guard reads it from livesnap's end on. A guest that its owner had paused is never armed for, and so
//! never continued.
//!
//! The guard is this same program started anew (`livesnap guard`), with the control socket for its
//! standard input. It is its own session with all signals blocked, so that neither Ctrl-C nor a
//! service manager's SIGTERM takes it away first; it ends when livesnap does. Packets on the control
//! socket are JSON, at most one descriptor with each; every request has one reply.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use procfs::process::Process;
use rustix::event::PollFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::attach::{Source, userfaultfd_of};
use super::fd_passing::{receive, send, wait_for};
use super::qemu::qmp::{Qmp, QmpError};
use crate::Reason;

/// Longest packet on the control socket, in bytes.
const PACKET_BYTES_MAX: usize = 4096;
/// How long livesnap waits for the guard's reply; the slowest request stops and steps threads.
const REPLY_LIMIT: Duration = Duration::from_secs(30);
/// How long an orphaned guard tries to continue the guest.
const RESCUE_LIMIT: Duration = Duration::from_secs(120);
/// How long it waits for each answer, and between attempts.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(5);
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// How often the guard looks whether livesnap is stopped. One found so twice in a row is woken.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// State in `/proc/PID/stat` of what a signal has stopped; what a debugger has stopped is `t`, and stays so.
const STOPPED: char = 'T';
/// How long a guard may take to end when it is no longer needed.
const END_LIMIT: Duration = Duration::from_secs(2);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    /// Comes with the QMP socket.
    Watch,
    Userfaultfd {
        pid: i32,
        source: Source,
    },
    Arm {
        limit_ms: u64,
    },
    Disarm,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    /// Out of reach of signals; sent once, unasked.
    Ready,
    Done,
    /// The limit had passed, and the guest was continued.
    Fired,
    Failed {
        reason: Reason,
        text: String,
    },
}

/// Why the guard could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// It could not be started.
    #[error("cannot start the guard process {command:?}: {source}")]
    Start {
        /// Program and arguments.
        command: Vec<OsString>,
        /// Errno.
        source: io::Error,
    },
    /// It ended or does not answer; nothing may be paused without it.
    #[error(
        "the guard process does not answer ({source}): it was killed, or its command is not `livesnap guard`; start the snapshot again"
    )]
    Lost {
        /// Errno.
        source: io::Error,
    },
    /// It reported a failure.
    #[error("{text}")]
    Failed {
        /// Stable code.
        reason: Reason,
        /// One sentence.
        text: String,
    },
}

impl GuardError {
    /// Stable code.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Failed { reason, .. } => *reason,
            Self::Start { .. } | Self::Lost { .. } => Reason::Internal,
        }
    }
}

/// Livesnap's end of a running guard. Dropping it ends the guard, which continues the guest if it is
/// still armed.
#[derive(Debug)]
pub struct Guard {
    /// None only while being dropped.
    control: Option<OwnedFd>,
    child: Child,
}

impl Guard {
    /// The command that starts this very program as a guard, also after its file was replaced.
    #[must_use]
    pub fn own_command() -> Vec<OsString> {
        vec!["/proc/self/exe".into(), "guard".into()]
    }

    /// Starts `command`, which must call [`main`], and waits until no signal reaches it any more.
    ///
    /// # Errors
    /// If it cannot be started or does not report.
    pub fn start(command: &[OsString]) -> Result<Self, GuardError> {
        let failed = |source| GuardError::Start { command: command.into(), source };
        let (program, arguments) =
            command.split_first().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|error| failed(error.into()))?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(theirs)
            .stdout(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let guard = Self { control: Some(ours), child };
        match guard.reply()? {
            (Reply::Ready, _) => Ok(guard),
            _ => Err(unexpected()),
        }
    }

    /// Shares the QMP socket with the guard.
    ///
    /// # Errors
    /// If the guard is lost.
    pub fn watch(&self, qmp: BorrowedFd<'_>) -> Result<(), GuardError> {
        self.ask(&Request::Watch, Some(qmp)).map(drop)
    }

    /// A userfaultfd of process `pid`; see [`userfaultfd_of`].
    ///
    /// # Errors
    /// If it cannot be had, or the guard is lost.
    pub fn userfaultfd(&self, pid: Pid, source: Source) -> Result<OwnedFd, GuardError> {
        let pid = pid.as_raw_nonzero().get();
        let (_, fd) = self.ask(&Request::Userfaultfd { pid, source }, None)?;
        fd.ok_or_else(unexpected)
    }

    /// From now on the guest is continued if livesnap ends, or when `limit` has passed.
    ///
    /// # Errors
    /// If the guard is lost: nothing may be paused then.
    pub fn arm(&self, limit: Duration) -> Result<(), GuardError> {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.ask(&Request::Arm { limit_ms }, None).map(drop)
    }

    /// The pause is over. True if the limit had passed, and the guest was continued by the guard.
    ///
    /// # Errors
    /// If the guard is lost.
    pub fn disarm(&self) -> Result<bool, GuardError> {
        Ok(self.ask(&Request::Disarm, None)?.0 == Reply::Fired)
    }

    fn ask(
        &self,
        request: &Request,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(Reply, Option<OwnedFd>), GuardError> {
        send_packet(self.control()?, request, fd).map_err(|source| GuardError::Lost { source })?;
        match self.reply()? {
            (Reply::Failed { reason, text }, _) => Err(GuardError::Failed { reason, text }),
            reply => Ok(reply),
        }
    }

    fn reply(&self) -> Result<(Reply, Option<OwnedFd>), GuardError> {
        let control = self.control()?;
        let lost = |source| GuardError::Lost { source };
        if !wait_for(control, PollFlags::IN, Some(Instant::now() + REPLY_LIMIT)).map_err(lost)? {
            return Err(lost(io::ErrorKind::TimedOut.into()));
        }
        receive_packet(control)
            .and_then(|packet| packet.ok_or_else(|| io::ErrorKind::UnexpectedEof.into()))
            .map_err(lost)
    }

    fn control(&self) -> Result<BorrowedFd<'_>, GuardError> {
        self.control.as_ref().map(AsFd::as_fd).ok_or_else(unexpected)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.control.take());
        // Reaped if it ends soon; one that has a guest to rescue takes the time it needs.
        let ended = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
            .and_then(|fd| wait_for(fd, PollFlags::IN, Some(Instant::now() + END_LIMIT)).ok());
        let _ = self.child.try_wait();
        if ended != Some(true) {
            tracing::warn!("the guard process is still at work on continuing the guest");
        }
    }
}

fn unexpected() -> GuardError {
    GuardError::Lost { source: io::ErrorKind::InvalidData.into() }
}

fn send_packet(
    socket: impl AsFd,
    packet: &impl Serialize,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    send(socket, &serde_json::to_vec(packet)?, fd).map(drop)
}

/// The next packet, or nothing when the other side has ended.
fn receive_packet<T: for<'a> Deserialize<'a>>(
    socket: impl AsFd,
) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut bytes = [0_u8; PACKET_BYTES_MAX];
    match receive(socket, &mut bytes) {
        Ok((0, _)) => Ok(None),
        Ok((count, fd)) => Ok(Some((serde_json::from_slice(&bytes[..count])?, fd))),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(error),
    }
}

/// The guard process: serves the control socket on standard input until livesnap ends.
///
/// To be called in the program's hidden `guard` subcommand, before any thread is started.
#[must_use]
pub fn main() -> ExitCode {
    match serve(&io::stdin().as_fd()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "guard: cannot serve its control socket on standard input");
            ExitCode::FAILURE
        }
    }
}

/// What the guard knows of the pause.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Pause {
    Idle,
    Armed { deadline: Instant },
    Fired,
}

/// The process that started this guard.
struct Livesnap {
    process: Process,
    pidfd: OwnedFd,
    was_stopped: bool,
}

impl Livesnap {
    fn find() -> io::Result<Self> {
        let pid = getppid().ok_or(io::ErrorKind::NotFound)?;
        let process = Process::new(pid.as_raw_nonzero().get()).map_err(io::Error::other)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self { process, pidfd, was_stopped: false })
    }

    /// Wakes it if it is stopped and was so at the last look.
    fn look(&mut self) {
        let is_stopped = self.process.stat().is_ok_and(|stat| stat.state == STOPPED);
        if is_stopped && self.was_stopped {
            tracing::warn!("guard: livesnap was stopped, and the guest may wait for it; woke it");
            self.wake();
        }
        self.was_stopped = is_stopped;
    }

    fn wake(&self) {
        // Fails only if it has ended, which the control socket tells.
        let _ = pidfd_send_signal(&self.pidfd, Signal::CONT);
    }
}

fn serve(control: &BorrowedFd<'_>) -> io::Result<()> {
    crate::sys::signals::block_all()?;
    // Refused to a group leader, which a shell may have made us; harmless then.
    let _ = rustix::process::setsid();
    let mut livesnap = Livesnap::find()?;
    let mut qmp: Option<Qmp> = None;
    let mut pause = Pause::Idle;
    // Guest RAM may be protected.
    let mut is_watching = false;
    send_packet(control, &Reply::Ready, None)?;
    loop {
        let deadline = match pause {
            Pause::Armed { deadline } => Some(deadline),
            Pause::Idle | Pause::Fired => is_watching.then(|| Instant::now() + LOOK_INTERVAL),
        };
        if !wait_for(control, PollFlags::IN, deadline)? {
            if let Pause::Armed { .. } = pause {
                // QEMU's main thread may be waiting for a page.
                livesnap.wake();
                pause = fire(qmp.as_mut());
            } else {
                livesnap.look();
            }
            continue;
        }
        let request = receive_packet(control);
        let Ok(Some((request, fd))) = request else {
            // Also after a `cont` of ours: QEMU forgets commands it has not carried out when a client goes.
            if pause != Pause::Idle {
                rescue(qmp.as_mut());
            }
            return request.map(drop);
        };
        let (reply, fd) = answer(request, fd, &mut qmp, &mut pause);
        is_watching |= fd.is_some();
        // Livesnap may have ended meanwhile: the next turn sees that.
        let _ = send_packet(control, &reply, fd.as_ref().map(AsFd::as_fd));
    }
}

fn answer(
    request: Request,
    fd: Option<OwnedFd>,
    qmp: &mut Option<Qmp>,
    pause: &mut Pause,
) -> (Reply, Option<OwnedFd>) {
    match request {
        Request::Watch => {
            *qmp = fd.map(|socket| Qmp::adopt(socket, "guard"));
            (Reply::Done, None)
        }
        Request::Userfaultfd { pid, source } => match obtain(pid, source) {
            Ok(fd) => (Reply::Done, Some(fd)),
            Err(failed) => (failed, None),
        },
        Request::Arm { limit_ms } => {
            *pause = Pause::Armed { deadline: Instant::now() + Duration::from_millis(limit_ms) };
            (Reply::Done, None)
        }
        Request::Disarm => match std::mem::replace(pause, Pause::Idle) {
            Pause::Fired => (Reply::Fired, None),
            Pause::Idle | Pause::Armed { .. } => (Reply::Done, None),
        },
    }
}

fn obtain(pid: i32, source: Source) -> Result<OwnedFd, Reply> {
    let pid = Pid::from_raw(pid).ok_or(Reply::Failed {
        reason: Reason::BadArgument,
        text: format!("{pid} is no process"),
    })?;
    userfaultfd_of(pid, source)
        .map_err(|error| Reply::Failed { reason: error.reason(), text: error.to_string() })
}

/// The limit has passed: appends `cont` to what livesnap has sent. Its reply is livesnap's to skip.
fn fire(qmp: Option<&mut Qmp>) -> Pause {
    let retry = Instant::now() + RETRY_INTERVAL;
    match qmp.map(|qmp| qmp.post("cont", json!({}), None, retry, RETRY_INTERVAL)) {
        // The socket is full, QEMU reads nothing: again, a little later.
        Some(Err(QmpError::Timeout { .. })) => Pause::Armed { deadline: retry },
        // Sent, or QEMU has ended.
        _ => Pause::Fired,
    }
}

/// Livesnap has ended in the pause: `cont`, until the guest is seen running.
fn rescue(qmp: Option<&mut Qmp>) {
    let Some(qmp) = qmp else { return };
    let deadline = Instant::now() + RESCUE_LIMIT;
    while Instant::now() < deadline {
        match proceed(qmp) {
            Ok(true) => {
                tracing::warn!("guard: livesnap ended while the guest was paused; continued it");
                return;
            }
            Err(QmpError::Closed { .. }) => return,
            // Leftovers of livesnap's last exchange, or a QEMU that is busy with it.
            Ok(false) | Err(_) => std::thread::sleep(RETRY_INTERVAL),
        }
    }
    tracing::error!("guard: the guest is still paused after {RESCUE_LIMIT:?}; send it QMP `cont`");
}

fn proceed(qmp: &mut Qmp) -> Result<bool, QmpError> {
    qmp.reset_reader()?;
    qmp.execute("cont", json!({}), ATTEMPT_LIMIT)?;
    let status = qmp.execute("query-status", json!({}), ATTEMPT_LIMIT)?;
    Ok(status["running"] == json!(true))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::vmm::testing::{DEADLINE, Role, guard_command};
    use rustix::process::kill_process;
    use serde_json::Value;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    fn watched() -> (Guard, UnixStream) {
        let (qmp, peer) = UnixStream::pair().unwrap();
        peer.set_read_timeout(Some(DEADLINE)).unwrap();
        let guard = Guard::start(&guard_command()).unwrap();
        guard.watch(qmp.as_fd()).unwrap();
        (guard, peer)
    }

    fn rest(mut peer: UnixStream) -> String {
        let mut text = String::new();
        peer.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_pause_over_its_limit_is_ended_and_reported() {
        let (guard, peer) = watched();
        guard.arm(Duration::from_millis(20)).unwrap();
        let mut line = String::new();
        BufReader::new(&peer).read_line(&mut line).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["execute"], "cont");
        assert!(guard.disarm().unwrap());
        assert!(!guard.disarm().unwrap(), "reported once only");
        drop(guard);
        assert_eq!(rest(peer), "");
    }

    #[test]
    fn a_pause_within_its_limit_and_no_pause_are_left_alone() {
        let (guard, peer) = watched();
        guard.arm(DEADLINE).unwrap();
        assert!(!guard.disarm().unwrap());
        drop(guard);
        assert_eq!(rest(peer), "");
    }

    #[test]
    fn the_guest_runs_on_when_the_snapshotter_is_killed_in_the_pause() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let mut pauser = Role::start("pauser", path.to_str().unwrap());
        let (mut peer, _) = listener.accept().unwrap();
        peer.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(pauser.line(), "armed");
        // The end of a reply that the dead one has begun to read, and one it never read.
        peer.write_all(b"ning\": false}}\r\n{\"return\": {}, \"id\": \"livesnap-9\"}\r\n").unwrap();
        drop(pauser);

        let mut received = BufReader::new(peer.try_clone().unwrap());
        let mut leftover = Vec::new();
        received.read_until(0xff, &mut leftover).unwrap();
        assert_eq!(leftover, b"{\"execute\": \"st\xff");
        let mut running = false;
        let mut seen = Vec::new();
        let mut line = Vec::new();
        while received.read_until(b'\n', &mut line).unwrap() > 0 {
            let command: Value = match serde_json::from_slice(&line) {
                Ok(command) => command,
                // The byte that resets the reader.
                Err(_) => json!({}),
            };
            line.clear();
            let Some(name) = command["execute"].as_str() else { continue };
            running |= name == "cont";
            seen.push(name.to_owned());
            let result = json!({"return": {"running": running}, "id": command["id"]});
            peer.write_all(format!("{result}\r\n").as_bytes()).unwrap();
        }
        assert_eq!(seen.first().unwrap(), "cont");
        assert_eq!(seen.last().unwrap(), "query-status");
    }

    #[test]
    fn a_snapshotter_that_is_stopped_in_the_pause_is_woken_at_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let mut hanger = Role::start("hanger", path.to_str().unwrap());
        let (peer, _) = listener.accept().unwrap();
        peer.set_read_timeout(Some(DEADLINE)).unwrap();
        let process = Process::new(hanger.pid().as_raw_nonzero().get()).unwrap();
        let is_stopped = || process.stat().unwrap().state == STOPPED;
        assert_eq!(hanger.line(), "armed");
        kill_process(hanger.pid(), Signal::STOP).unwrap();
        let deadline = Instant::now() + DEADLINE;
        while !is_stopped() {
            assert!(Instant::now() < deadline, "it does not stop");
            std::thread::yield_now();
        }
        let mut line = String::new();
        BufReader::new(&peer).read_line(&mut line).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["execute"], "cont");
        // Woken first: a `cont` that waits for a page would wait for a stopped livesnap.
        assert!(!is_stopped());
    }

    #[test]
    fn a_command_that_is_no_guard_is_an_error() {
        let error = Guard::start(&["/bin/true".into()]).unwrap_err();
        assert!(matches!(error, GuardError::Lost { .. }), "{error}");
        let error = Guard::start(&["/nonexistent".into()]).unwrap_err();
        assert!(matches!(error, GuardError::Start { .. }), "{error}");
    }
}
