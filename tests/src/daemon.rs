//! Runs `livesnap serve` and talks to it as its clients do: by HTTP over its Unix socket, in a few lines of our own.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::qemu::Qemu;
use crate::{livesnap, poll_until};

/// A daemon that says nothing for so long hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// An answer to a request.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    headers: Vec<(String, String)>,
    /// Its body; null if there is none.
    pub body: Value,
}

impl Answer {
    /// A header, by its name in small letters.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers.find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Reads an answer to its end.
    fn read(mut stream: impl Read) -> Result<Self> {
        let mut bytes = Vec::new();
        match stream.read_to_end(&mut bytes) {
            // A daemon that answers before it has read all of a request resets the connection behind its answer.
            Err(error) if error.kind() == ErrorKind::ConnectionReset && !bytes.is_empty() => {}
            read => drop(read.context("cannot read the answer")?),
        }
        let text = String::from_utf8(bytes).context("the answer is no text")?;
        let (head, body) =
            text.split_once("\r\n\r\n").context("the answer has no end of headers")?;
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
        let header = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        };
        Ok(Self {
            status: status.with_context(|| format!("no status in {head:?}"))?,
            headers: lines.filter_map(header).collect(),
            body: match body {
                "" => Value::Null,
                body => serde_json::from_str(body).unwrap_or_else(|_| body.into()),
            },
        })
    }
}

/// A series of `metrics`, by its name and labels as they are written; nothing if it is not there.
pub fn series(metrics: &str, name: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// A daemon at work; killed when dropped. What it logs goes to `log` in its directory.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    dir: PathBuf,
}

impl Daemon {
    /// Writes a configuration into `dir` that serves `vms`, each with its name, and says `more`; snapshots go to
    /// `dir/snapshots`.
    pub fn configure(dir: &Path, vms: &[(&str, &Qemu)], more: &str) -> Result<()> {
        let path = |name: &str| dir.join(name).display().to_string();
        let snapshots = path("snapshots");
        fs::create_dir_all(&snapshots).context("cannot make the directory of snapshots")?;
        let mut text = format!(
            "socket = {:?}\nstate_dir = {:?}\nruntime_dir = {:?}\ndestinations = [{snapshots:?}]\n{more}\n",
            path("sock"),
            path("state"),
            path("run"),
        );
        for (name, qemu) in vms {
            text.push_str(&format!("[[vm]]\nname = {name:?}\nqmp = {:?}\n", qemu.qmp_socket()));
        }
        fs::write(dir.join("config.toml"), text).context("cannot write the configuration")
    }

    /// [Configures](Self::configure) and [starts](Self::start) it.
    pub fn serve(dir: &Path, vms: &[(&str, &Qemu)], more: &str) -> Result<Self> {
        Self::configure(dir, vms, more)?;
        Self::start(dir)
    }

    /// Starts it as configured in `dir`, and waits until it is ready.
    pub fn start(dir: &Path) -> Result<Self> {
        Self::spawn(dir, Self::command(dir)?)
    }

    /// The same through another program, which gets the daemon's command line behind its own and must replace itself by it.
    pub fn start_through(dir: &Path, mut program: Command) -> Result<Self> {
        let daemon = Self::command(dir)?;
        program.arg(daemon.get_program()).args(daemon.get_args());
        program.stderr(Self::log_file(dir)?);
        Self::spawn(dir, program)
    }

    /// Starts it, and follows the phases of its snapshots as they log them.
    pub fn start_followed(dir: &Path) -> Result<(Self, Phases)> {
        let mut command = Self::command(dir)?;
        command.env("RUST_LOG", "info,snapshot_core=debug").stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start the daemon")?;
        let stderr = child.stderr.take().context("the daemon has no stderr")?;
        let mut log = Self::log_file(dir)?;
        let (sender, lines) = channel();
        // Ends with the daemon and its snapshots, which share the pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(std::result::Result::ok) {
                // Nobody may be interested any more; then it is still logged.
                let _ = sender.send(line.clone());
                if writeln!(log, "{line}").is_err() {
                    return;
                }
            }
        });
        Ok((Self { child, dir: dir.into() }.ready()?, Phases(lines)))
    }

    fn spawn(dir: &Path, mut command: Command) -> Result<Self> {
        let child = command.spawn().context("cannot start the daemon")?;
        Self { child, dir: dir.into() }.ready()
    }

    fn ready(self) -> Result<Self> {
        let mut daemon = self;
        poll_until("the daemon is ready", LIMIT, || {
            if let Some(status) = daemon.child.try_wait().context("cannot wait for the daemon")? {
                bail!("the daemon has ended with {status}; it logged:\n{}", daemon.log());
            }
            Ok(daemon.get("/readyz").ok().filter(|answer| answer.status == 200))
        })?;
        Ok(daemon)
    }

    /// Has the next daemon in `dir` read the snapshot of an operation again, as if the last one had ended before it had.
    pub fn leave_unverified(dir: &Path, id: &str) -> Result<()> {
        let path = dir.join(format!("state/operations/{id}.json"));
        let text = fs::read_to_string(&path).context("the operation is not in the journal")?;
        let mut record: Value = serde_json::from_str(&text).context("its record is no JSON")?;
        record["operation"]["verification"] = json!({"state": "running"});
        fs::write(&path, record.to_string()).context("cannot write its record")
    }

    /// The command that starts it.
    pub fn command(dir: &Path) -> Result<Command> {
        let mut command = livesnap::command(["serve", "--config"])?;
        command.arg(dir.join("config.toml")).stderr(Self::log_file(dir)?);
        Ok(command)
    }

    fn log_file(dir: &Path) -> Result<File> {
        let log = File::options().create(true).append(true).open(dir.join("log"));
        log.context("cannot create the daemon's log")
    }

    /// What it and those before it have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("sock")
    }

    /// Where it listens on TCP, as it has logged.
    pub fn tcp(&self) -> Result<SocketAddr> {
        self.logged_address("by TCP")
    }

    fn logged_address(&self, words: &str) -> Result<SocketAddr> {
        poll_until("the daemon listens on TCP", LIMIT, || {
            let log = self.log();
            let address = log.rsplit_once(&format!("{words} address="));
            Ok(address.and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok()))
        })
    }

    /// Sends a request there, of which `head` is all up to the empty line.
    pub fn call_tcp(&self, head: &str) -> Result<Answer> {
        call_at(self.tcp()?, head)
    }

    /// Sends a request, and returns the connection to read the answer from.
    pub fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Result<UnixStream> {
        let mut stream = UnixStream::connect(self.socket()).context("cannot connect")?;
        stream.set_read_timeout(Some(LIMIT)).context("cannot limit the time to read")?;
        let mut text =
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
        stream.write_all(text.as_bytes()).context("cannot send the request")?;
        Ok(stream)
    }

    /// Asks.
    pub fn get(&self, path: &str) -> Result<Answer> {
        Answer::read(self.send("GET", path, &[], "")?)
    }

    /// Asks with headers.
    pub fn get_with(&self, path: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        Answer::read(self.send("GET", path, headers, "")?)
    }

    /// All metrics.
    pub fn metrics(&self) -> Result<String> {
        let answer = self.get("/metrics")?;
        ensure!(answer.status == 200, "{answer:?}");
        Ok(answer.body.as_str().context("metrics are no text")?.to_owned())
    }

    /// Where it serves metrics over TCP.
    pub fn metrics_address(&self) -> Result<SocketAddr> {
        self.logged_address("serving metrics")
    }

    /// Asks there.
    pub fn get_by_tcp(&self, path: &str) -> Result<Answer> {
        let address = self.metrics_address()?;
        call_at(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}"))
    }

    /// Sends JSON.
    pub fn post(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Result<Answer> {
        let headers = [&[("Content-Type", "application/json")], headers].concat();
        Answer::read(self.send("POST", path, &headers, &body.to_string())?)
    }

    /// Sends anything.
    pub fn call(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Result<Answer> {
        Answer::read(self.send(method, path, headers, body)?)
    }

    /// Follows an operation, by its path: each event's id and data, until there are no more.
    pub fn follow(&self, path: &str) -> Result<impl Iterator<Item = (u64, Value)> + use<>> {
        let stream = self.send("GET", &format!("{path}/events"), &[], "")?;
        let mut lines = BufReader::new(stream).lines().map_while(std::result::Result::ok);
        let mut id = None;
        Ok(std::iter::from_fn(move || {
            // Lines between them are lengths of chunks, and comments that keep the connection alive.
            lines.find_map(|line| {
                if let Some(number) = line.strip_prefix("id: ") {
                    id = number.parse().ok();
                }
                Some((id?, serde_json::from_str(line.strip_prefix("data: ")?).ok()?))
            })
        }))
    }

    /// Waits until an operation, by its path, fulfils `wanted`, and returns it. Fails if it has ended otherwise.
    pub fn wait_operation(&self, path: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        poll_until("the operation is as expected", LIMIT, || {
            let answer = self.get(path)?;
            ensure!(answer.status == 200, "{answer:?}");
            let operation = answer.body;
            if wanted(&operation) {
                return Ok(Some(operation));
            }
            ensure!(operation["ended_at"].is_null(), "it has ended: {operation:#}");
            Ok(None)
        })
        .with_context(|| format!("the daemon logged:\n{}", self.log()))
    }

    /// The same until it is in `state`.
    pub fn wait_state(&self, path: &str, state: &str) -> Result<Value> {
        self.wait_operation(path, |operation| operation["state"] == state)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context("cannot signal the daemon")
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processes that it has started.
    pub fn children(&self) -> Result<Vec<Pid>> {
        children(Pid::from_child(&self.child))
    }

    /// The processes of the snapshots that run, and their guards, as far as they have one by now.
    pub fn snapshots(&self) -> Result<Family> {
        let processes = self.children()?;
        // One that has just ended has none.
        let guards = processes.iter().flat_map(|pid| children(*pid).unwrap_or_default()).collect();
        Ok(Family { processes, guards })
    }

    /// Sends a signal and waits for its end.
    pub fn end(mut self, signal: Signal) -> Result<ExitStatus> {
        self.signal(signal)?;
        self.wait()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        poll_until("the daemon ends", LIMIT, || {
            self.child.try_wait().context("cannot wait for the daemon")
        })
    }
}

/// The processes that the main thread of `pid` has started.
fn children(pid: Pid) -> Result<Vec<Pid>> {
    let pid = pid.as_raw_nonzero();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .with_context(|| format!("cannot list the children of process {pid}"))?;
    Ok(children.split(' ').filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect())
}

/// The state of a process (proc_pid_stat(5)); nothing if there is none.
fn state(pid: Pid) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // A program's name may have blanks and brackets in it.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The processes of snapshots. When dropped they go on, so that a test that fails leaves none that stands still.
#[derive(Debug)]
pub struct Family {
    processes: Vec<Pid>,
    guards: Vec<Pid>,
}

impl Family {
    /// Has them all stand still; a guard would wake its owner. Returns whether there is a guard that does.
    ///
    /// When their daemon dies only guards still do: the kernel continues a process whose group nobody of its session could
    /// continue any more (setpgid(2)), and guards have a session of their own.
    pub fn stop(&self) -> Result<bool> {
        self.signal(Signal::STOP)?;
        let mut is_held = false;
        for pid in &self.guards {
            is_held |= poll_until("a guard stands still", LIMIT, || {
                Ok(match state(*pid) {
                    Some('T') => Some(true),
                    None | Some('Z' | 'X') => Some(false),
                    Some(_) => None,
                })
            })?;
        }
        Ok(is_held)
    }

    /// Has them go on.
    pub fn go_on(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Kills the snapshots' processes, and leaves their guards.
    pub fn kill(&self) -> Result<()> {
        signal_all(&self.processes, Signal::KILL)
    }

    /// Kills the guards.
    pub fn kill_guards(&self) -> Result<()> {
        signal_all(&self.guards, Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        signal_all(&self.guards, signal)?;
        signal_all(&self.processes, signal)
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        // It fails only where they could not be stopped either.
        let _ = self.go_on();
    }
}

/// Those that have ended need no signal.
fn signal_all(pids: &[Pid], signal: Signal) -> Result<()> {
    for pid in pids {
        match kill_process(*pid, signal) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(errno).context("cannot signal a snapshot's processes"),
        }
    }
    Ok(())
}

/// The phases of a daemon's snapshots, as they come.
#[derive(Debug)]
pub struct Phases(Receiver<String>);

impl Phases {
    /// Waits until a session enters `phase`, such as "copying".
    pub fn reach(&mut self, phase: &str) -> Result<()> {
        let wanted = format!("session phase=\"{phase}\"");
        loop {
            let line = self.0.recv_timeout(LIMIT);
            if line.with_context(|| format!("no snapshot came to {phase}"))?.ends_with(&wanted) {
                return Ok(());
            }
        }
    }
}

/// The answer to a request without a body, over TCP: `head` is its first line and headers.
pub(crate) fn call_at(address: SocketAddr, head: &str) -> Result<Answer> {
    let mut stream = TcpStream::connect(address).context("cannot connect")?;
    stream.set_read_timeout(Some(LIMIT)).context("cannot limit the time to read")?;
    let text = format!("{head}\r\nConnection: close\r\n\r\n");
    stream.write_all(text.as_bytes()).context("cannot send the request")?;
    Answer::read(stream)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only if it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whom_a_test_has_stopped_goes_on_when_it_fails() -> Result<()> {
        let mut child = Command::new("sleep").arg("60").spawn()?;
        let pid = Pid::from_child(&child);
        let family = Family { processes: Vec::new(), guards: vec![pid] };
        let is_held = family.stop();
        drop(family);
        let goes_on =
            poll_until("it goes on", LIMIT, || Ok((state(pid) != Some('T')).then_some(())));
        child.kill()?;
        child.wait()?;
        assert!(is_held?);
        goes_on
    }
}
