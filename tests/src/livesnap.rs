//! Runs the product as a user does: the `livesnap` binary.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::Value;

use crate::poll_until;
use crate::qemu::Qemu;

/// A livesnap that says nothing new for so long hangs.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// The binary that was built beside this program.
pub fn binary() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this program lies")?;
    // Tests lie in a folder `deps` beside the binaries.
    let path = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("livesnap"))
        .find(|path| path.is_file())
        .context("there is no livesnap beside this program: run `cargo build -p livesnap` in the same profile")?;
    Ok(path)
}

/// `livesnap` with arguments, not started yet.
pub fn command<I: IntoIterator<Item = impl Into<OsString>>>(arguments: I) -> Result<Command> {
    let mut command = Command::new(binary()?);
    command.args(arguments.into_iter().map(Into::into));
    Ok(command)
}

/// `livesnap snapshot --json` of `qemu` into `out`, with more arguments, not started yet.
///
/// On a busy host writes wait longer than a limit allows that is meant for real ones: that is no failure of a test, unless
/// it says so by another `--on-infeasible` behind this one.
pub fn snapshot_command(qemu: &Qemu, out: &Path, more: &[&str]) -> Result<Command> {
    let mut command = command(["snapshot", "--json", "--on-infeasible=wait", "--qmp"])?;
    command.arg(qemu.qmp_socket()).arg("--out").arg(out).args(more);
    Ok(command)
}

/// Takes a snapshot and returns the JSON that the command printed.
pub fn snapshot(qemu: &Qemu, out: &Path, more: &[&str]) -> Result<Value> {
    let output = snapshot_command(qemu, out, more)?.output().context("cannot run livesnap")?;
    let told = json(&output)?;
    ensure!(output.status.success() && told["outcome"] == "completed", "{told:#}");
    Ok(told)
}

/// What a command told on standard output.
pub fn json(output: &Output) -> Result<Value> {
    serde_json::from_slice(&output.stdout).with_context(|| {
        format!("livesnap printed no JSON; on stderr: {}", String::from_utf8_lossy(&output.stderr))
    })
}

/// Starts somebody else's snapshot, which a daemon that serves the VM knows nothing of: for the daemon it is what a snapshot
/// would be that left its protection and its throttle. It takes minutes.
pub fn others_snapshot(qemu: &Qemu, out: &Path) -> Result<Running> {
    let mut command = command(["snapshot", "--fixed-cpu=50%", "--max-bandwidth=1MiB", "--qmp"])?;
    command.arg(qemu.other_qmp_socket()).arg("--out").arg(out);
    Running::start(command)
}

/// A livesnap at work, followed by what it logs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    log: String,
}

/// How a livesnap ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it printed on standard output.
    pub stdout: Vec<u8>,
    /// What it logged.
    pub log: String,
}

impl Running {
    /// Starts `command` with a log of its phases.
    pub fn start(command: Command) -> Result<Self> {
        Self::start_with(command, Stdio::null())
    }

    /// The same, with an input that [`tell`](Self::tell) writes to.
    pub fn start_listening(command: Command) -> Result<Self> {
        Self::start_with(command, Stdio::piped())
    }

    fn start_with(mut command: Command, stdin: Stdio) -> Result<Self> {
        command.env("RUST_LOG", "snapshot_core=debug");
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run livesnap")?;
        let stderr = child.stderr.take().context("livesnap has no stderr")?;
        let (sender, lines) = channel();
        // Ends with livesnap and its guard, which share the pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, lines, log: String::new() })
    }

    /// Gives it a line on standard input.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("livesnap has no input")?;
        writeln!(stdin, "{line}").context("livesnap does not take its input")
    }

    /// What it prints from now on, to be read while it runs.
    pub fn take_stdout(&mut self) -> Result<ChildStdout> {
        self.child.stdout.take().context("livesnap's output was taken before")
    }

    /// Waits until the session enters `phase`, such as "copying".
    pub fn reach(&mut self, phase: &str) -> Result<()> {
        let wanted = format!("session phase=\"{phase}\"");
        loop {
            let Ok(line) = self.lines.recv_timeout(SILENCE_MAX) else {
                bail!("livesnap did not come to {phase}; it logged:\n{}", self.log);
            };
            self.log.push_str(&line);
            self.log.push('\n');
            if line.ends_with(&wanted) {
                return Ok(());
            }
        }
    }

    /// From now on it may not write beyond the first `bytes` of a file: such writes fail with `EFBIG`.
    pub fn limit_files(&self, bytes: u64) -> Result<()> {
        let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
        prlimit(Some(self.pid()?), Resource::Fsize, limit)
            .context("cannot limit the size of livesnap's files")?;
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // It is a child that was not waited for, so the number is not another's; one that has ended takes it.
        kill_process(self.pid()?, signal).context("cannot signal livesnap")
    }

    /// Holds it up while `meanwhile` runs, and its guard too, which would wake it.
    pub fn hold(&self, meanwhile: impl FnOnce()) -> Result<()> {
        let guard = self.guard()?;
        let both = |signal| {
            kill_process(guard, signal).context("cannot signal the guard")?;
            self.signal(signal)
        };
        both(Signal::STOP)?;
        meanwhile();
        both(Signal::CONT)
    }

    /// Kills it, and first its guard, so that nobody is left to put anything right.
    pub fn kill_with_guard(&self) -> Result<()> {
        kill_process(self.guard()?, Signal::KILL).context("cannot kill the guard")?;
        self.signal(Signal::KILL)
    }

    fn pid(&self) -> Result<Pid> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        pid.context("no process id")
    }

    /// Its only child. Does not end before it does.
    fn guard(&self) -> Result<Pid> {
        let pid = self.pid()?.as_raw_nonzero();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
            .context("cannot list livesnap's children")?;
        let guard = children.trim().parse().ok().and_then(Pid::from_raw);
        guard.with_context(|| format!("the guard is not the only child: {children:?}"))
    }

    /// Waits for its end.
    pub fn wait(self) -> Result<Ended> {
        self.wait_while(|| ())
    }

    /// Waits for its end, and runs `meanwhile` again and again until then.
    pub fn wait_while(mut self, mut meanwhile: impl FnMut()) -> Result<Ended> {
        let status = poll_until("livesnap ends", SILENCE_MAX, || {
            meanwhile();
            self.child.try_wait().context("cannot wait for livesnap")
        })?;
        let mut stdout = Vec::new();
        if let Some(mut pipe) = self.child.stdout.take() {
            pipe.read_to_end(&mut stdout).context("cannot read what livesnap printed")?;
        }
        // The guard may live a little longer and keep the pipe open: what livesnap logged is there by then.
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(2)) {
            self.log.push_str(&line);
            self.log.push('\n');
        }
        Ok(Ended { status, stdout, log: std::mem::take(&mut self.log) })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The JSON that it printed.
    pub fn told(&self) -> Result<Value> {
        serde_json::from_slice(&self.stdout)
            .with_context(|| format!("livesnap printed no JSON; it logged:\n{}", self.log))
    }

    /// Fails unless it ended with this exit code, reason and words in its error; shows the error.
    pub fn expect_failure(&self, code: i32, reason: &str, words: &[&str]) -> Result<()> {
        let told = self.told()?;
        let error = told["error"].as_str().unwrap_or_default();
        eprintln!("{}: {error}", told["reason"]);
        ensure!(
            self.status.code() == Some(code) && told["reason"] == reason,
            "{} instead of {code}, {told:#} instead of {reason}; log:\n{}",
            self.status,
            self.log
        );
        for word in words {
            ensure!(error.contains(word), "{word:?} is not in {error:?}");
        }
        ensure!(self.log.contains(error), "the error is not on stderr:\n{}", self.log);
        Ok(())
    }
}
