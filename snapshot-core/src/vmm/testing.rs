//! Processes that tests need: this test binary started anew in a role.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;

use super::attach::Source;
use super::guard::{self, Guard};

const ROLE: &str = "LIVESNAP_TEST_ROLE";
/// For any one thing that a test waits for.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Long enough for a test to stop the process before it has passed.
const SHORT_PAUSE: Duration = Duration::from_secs(2);

/// A process in a role; killed when dropped.
pub struct Role {
    pub child: Child,
    lines: Lines<BufReader<ChildStderr>>,
}

impl Role {
    pub fn start(role: &str, argument: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "vmm::testing::play_role", "--nocapture"]);
        command.env(ROLE, role).env("LIVESNAP_TEST_ARGUMENT", argument);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, lines }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn line(&mut self) -> String {
        self.lines.next().unwrap().unwrap()
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether this process may do what root may; where not, a test that needs it says so and is skipped,
/// or fails if REQUIRE_PRIVILEGED=1.
pub fn privileged() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert_ne!(std::env::var("REQUIRE_PRIVILEGED").as_deref(), Ok("1"), "root is required");
    eprintln!("SKIPPED: root is required to create a userfaultfd in another process");
    false
}

/// What starts a guard out of this test binary.
pub fn guard_command() -> Vec<OsString> {
    let exe = std::env::current_exe().unwrap();
    let role = format!("{ROLE}=guard");
    let name = "vmm::testing::play_role";
    vec!["/usr/bin/env".into(), role.into(), exe.into(), "--exact".into(), name.into()]
}

/// No test by itself: what a [`Role`] runs.
#[test]
fn play_role() {
    let argument = std::env::var("LIVESNAP_TEST_ARGUMENT").unwrap_or_default();
    match std::env::var(ROLE).as_deref() {
        Ok("guard") => assert_eq!(guard::main(), std::process::ExitCode::SUCCESS),
        Ok("sleeper") => sleeper(),
        Ok("injector") => injector(argument.parse().unwrap()),
        Ok("pauser") => pauser(&argument),
        Ok("hanger") => hanger(&argument),
        _ => {}
    }
}

static ANOMALIES: AtomicU32 = AtomicU32::new(0);
static LAPS: AtomicU32 = AtomicU32::new(0);

/// Threads that wait in one kind of system call each and check what they get. Says `KIND TID` of each;
/// answers every line on standard input with `anomalies laps open-descriptors`.
fn sleeper() {
    const WAIT: Duration = Duration::from_millis(15);
    let timeout = Timespec { tv_sec: 0, tv_nsec: 15_000_000 };
    let (pipe_out, mut pipe_in) = std::io::pipe().unwrap();
    let (silent, _silent_in) = std::io::pipe().unwrap();
    let tick = move || {
        pipe_in.write_all(&[7; 3]).unwrap();
        matches!(rustix::thread::nanosleep(&timeout), rustix::thread::NanosleepRelativeResult::Ok)
    };
    let nap = move || {
        let from = Instant::now();
        let whole = matches!(
            rustix::thread::nanosleep(&timeout),
            rustix::thread::NanosleepRelativeResult::Ok
        );
        whole && from.elapsed() >= WAIT
    };
    let wait = move || {
        let from = Instant::now();
        let result = poll(&mut [PollFd::new(&silent, PollFlags::IN)], Some(&timeout));
        result == Ok(0) && from.elapsed() >= WAIT
    };
    let mut pipe_out = File::from(std::os::fd::OwnedFd::from(pipe_out));
    let read = move || {
        let mut bytes = [0; 3];
        pipe_out.read(&mut bytes).is_ok_and(|count| count > 0) && bytes[0] == 7
    };
    let mut sum = 0_u64;
    let compute = move || {
        let expected = sum + 499_999_500_000;
        sum = (0..1_000_000_u64).fold(sum, |sum, n| std::hint::black_box(sum + n));
        sum == expected
    };
    let parked = || {
        std::thread::park();
        false
    };
    watch("write", tick);
    watch("nanosleep", nap);
    watch("poll", wait);
    watch("read", read);
    watch("compute", compute);
    watch("futex", parked);
    for line in std::io::stdin().lines() {
        line.unwrap();
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let anomalies = ANOMALIES.load(Ordering::Relaxed);
        eprintln!("{anomalies} {} {fds}", LAPS.swap(0, Ordering::Relaxed));
    }
}

/// A thread that does `step` over and over, and counts when it finds something wrong.
fn watch(kind: &'static str, mut step: impl FnMut() -> bool + Send + 'static) {
    std::thread::spawn(move || {
        eprintln!("{kind} {}", rustix::thread::gettid().as_raw_nonzero());
        loop {
            if !step() {
                ANOMALIES.fetch_add(1, Ordering::Relaxed);
            }
            LAPS.fetch_add(1, Ordering::Relaxed);
        }
    });
}

/// Injects into process `pid` through a guard until it is killed; says so after each time.
fn injector(pid: i32) {
    let guard = Guard::start(&guard_command()).unwrap();
    let pid = Pid::from_raw(pid).unwrap();
    loop {
        guard.userfaultfd(pid, Source::Syscall).unwrap();
        eprintln!("injected");
    }
}

/// Connects to the socket `path` and arms a guard for it.
fn armed(path: &str, limit: Duration) -> (UnixStream, Guard) {
    let socket = UnixStream::connect(path).unwrap();
    let guard = Guard::start(&guard_command()).unwrap();
    guard.watch(socket.as_fd()).unwrap();
    guard.arm(limit).unwrap();
    (socket, guard)
}

/// Arms a guard, leaves half a command behind, says so, and hangs.
fn pauser(path: &str) {
    let (socket, _guard) = armed(path, DEADLINE);
    (&socket).write_all(b"{\"execute\": \"st").unwrap();
    eprintln!("armed");
    std::thread::park();
}

/// Arms a guard for a short pause, says so, and hangs.
fn hanger(path: &str) {
    let _armed = armed(path, SHORT_PAUSE);
    eprintln!("armed");
    std::thread::park();
}
