//! Client of the QEMU Machine Protocol: JSON commands over a Unix socket, one at a time.
//!
//! Written for this purpose rather than taken from a crate, because a snapshot needs what general
//! clients leave out: a time limit on every command, a bound on what a peer can make us store,
//! descriptors sent with a command (`SCM_RIGHTS`), and a connection that stays usable after nonsense.
//! Commands carry an `id`, so that the late reply to a command that timed out is not taken for the next
//! one's; and each goes out in one piece, so that a second process on the same socket (the
//! [`guard`](crate::vmm::guard)) can append its own.
//!
//! Used by one thread; owns its socket.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Reason;
use crate::vmm::fd_passing::{receive, send, wait_for};

/// Longest message taken from the peer; the longest known reply, `query-qmp-schema`, has 0.3 MiB.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Events kept until somebody asks; older ones are dropped first.
const EVENTS_MAX: usize = 1024;
/// Bytes of a peer's nonsense that an error message shows.
const EXCERPT_BYTES_MAX: usize = 80;

/// What went wrong on the control socket.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket could not be reached.
    #[error(
        "cannot connect to the QMP socket {path}: {source}: check the path and that QEMU was started with -qmp unix:{path},server=on,wait=off"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Errno.
        source: io::Error,
    },
    /// Connected, but QEMU did not greet: it serves one client at a time.
    #[error(
        "the QMP socket {path} sent no greeting: another program holds it, for it serves one at a time; give livesnap a second -qmp socket"
    )]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// No reply within the time limit.
    #[error("QEMU did not answer {command} within {limit:?}: it is overloaded or hangs")]
    Timeout {
        /// The command.
        command: String,
        /// The limit.
        limit: Duration,
    },
    /// The time for all commands together was over before this one was sent.
    #[error("QEMU no longer answers, so {command} was not waited for: it is overloaded or hangs")]
    GivenUp {
        /// The command.
        command: String,
    },
    /// The peer closed the connection.
    #[error(
        "QEMU closed the QMP connection during {command}: it has ended or its monitor was removed"
    )]
    Closed {
        /// The command.
        command: String,
    },
    /// The socket failed.
    #[error("the QMP connection failed during {command}: {source}")]
    Io {
        /// The command.
        command: String,
        /// Errno.
        source: io::Error,
    },
    /// The peer sent what is not QMP.
    #[error("the answer to {command} is not QMP ({excerpt:?}): check that the socket is QEMU's")]
    Garbage {
        /// The command.
        command: String,
        /// The beginning of what was received, or what was missing.
        excerpt: String,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {description} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QAPI error class, such as `GenericError`.
        class: String,
        /// QEMU's text.
        description: String,
    },
}

impl QmpError {
    /// Stable code.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Refused { .. } => Reason::VmmRefused,
            _ => Reason::VmmUnreachable,
        }
    }

    /// Whether QEMU does not know the command, as opposed to failing at it.
    #[must_use]
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "CommandNotFound")
    }

    /// The answer to `command` lacked `what`.
    pub(super) fn lacks(command: &str, what: &str) -> Self {
        Self::Garbage { command: command.into(), excerpt: format!("no {what}") }
    }
}

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Event {
    /// Its name, such as `STOP`.
    #[serde(rename = "event")]
    pub name: String,
    /// Its details.
    #[serde(default)]
    pub data: Value,
    #[serde(default)]
    timestamp: Timestamp,
}

/// QEMU's own clock; negative where it could not be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
struct Timestamp {
    #[serde(default)]
    seconds: i64,
    #[serde(default)]
    microseconds: i64,
}

impl Event {
    /// When it happened, since 1970 by QEMU's clock; nothing where QEMU could not tell.
    #[must_use]
    pub fn time(&self) -> Option<Duration> {
        let seconds = u64::try_from(self.timestamp.seconds).ok().filter(|&seconds| seconds > 0)?;
        let microseconds = u64::try_from(self.timestamp.microseconds).ok()?;
        Some(Duration::from_secs(seconds) + Duration::from_micros(microseconds))
    }
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

/// A connection that is past negotiation.
#[derive(Debug)]
pub struct Qmp {
    socket: OwnedFd,
    received: Vec<u8>,
    events: VecDeque<Event>,
    /// Who sends: tells our replies from those to another sender on this socket, or to an earlier client.
    sender: String,
    commands: u64,
    /// No command waits longer, whatever its own limit.
    give_up_at: Option<Instant>,
}

impl Qmp {
    /// Connects, and negotiates without optional capabilities.
    ///
    /// # Errors
    /// If the socket cannot be reached, is held by another client, or is not QMP.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let failed = |source| QmpError::Connect { path: path.into(), source };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| failed(e.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {}
            // QEMU accepts nobody while it has a client, and its queue is full.
            Err(rustix::io::Errno::AGAIN) => return Err(QmpError::Busy { path: path.into() }),
            Err(error) => return Err(failed(error.into())),
        }
        Self::negotiate(socket, limit).map_err(|error| match error {
            QmpError::Timeout { command, .. } if command == "greeting" => {
                QmpError::Busy { path: path.into() }
            }
            other => other,
        })
    }

    /// Takes a freshly connected socket, waits for the greeting and negotiates.
    fn negotiate(socket: OwnedFd, limit: Duration) -> Result<Self, QmpError> {
        static CONNECTIONS: AtomicU32 = AtomicU32::new(0);
        let connection = CONNECTIONS.fetch_add(1, Ordering::Relaxed);
        let mut qmp = Self::adopt(socket, &format!("livesnap-{}-{connection}", std::process::id()));
        let deadline = Instant::now() + limit;
        // QEMU may first send us what it still owed to a client that was killed.
        while qmp.next_message("greeting", deadline, limit)?.get("QMP").is_none() {}
        qmp.execute("qmp_capabilities", json!({}), limit)?;
        Ok(qmp)
    }

    /// Takes over a connection that somebody else negotiated and perhaps left in the middle of a message.
    #[must_use]
    pub fn adopt(socket: OwnedFd, sender: &str) -> Self {
        Self {
            socket,
            received: Vec::new(),
            events: VecDeque::new(),
            sender: sender.into(),
            commands: 0,
            give_up_at: None,
        }
    }

    /// From now on no command waits beyond `at`, and none is sent after it; with nothing, each has its own limit only.
    pub fn give_up_at(&mut self, at: Option<Instant>) {
        self.give_up_at = at;
    }

    /// The socket, to be shared with the guard.
    #[must_use]
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Runs a command and returns its result, waiting at most `limit`.
    ///
    /// # Errors
    /// If QEMU refuses, does not answer in time, or the connection fails.
    pub fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        self.run(command, arguments, None, limit)
    }

    /// Runs a command that comes with a descriptor.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn execute_with_fd(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        self.run(command, arguments, Some(fd), limit)
    }

    fn run(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let now = Instant::now();
        let limit = match self.give_up_at {
            Some(at) if at <= now => return Err(QmpError::GivenUp { command: command.into() }),
            Some(at) => limit.min(at - now),
            None => limit,
        };
        let id = self.post(command, arguments, fd, now + limit, limit)?;
        // From when it was sent: who was held up before, as by a signal, has not waited for QEMU.
        let deadline = Instant::now() + limit;
        let deadline = self.give_up_at.map_or(deadline, |at| deadline.min(at));
        loop {
            let mut reply = self.next_message(command, deadline, limit)?;
            // Others' replies, and late ones to commands that were given up.
            if reply.get("id").and_then(Value::as_str) != Some(&id) {
                tracing::debug!(command, %reply, "skipped a QMP reply that is not for this command");
                continue;
            }
            if let Some(result) = reply.get_mut("return") {
                return Ok(result.take());
            }
            let refusal = reply.get_mut("error").map(Value::take).unwrap_or_default();
            return Err(match Refusal::deserialize(refusal) {
                Ok(Refusal { class, desc }) => {
                    QmpError::Refused { command: command.into(), class, description: desc }
                }
                Err(_) => QmpError::lacks(command, "result"),
            });
        }
    }

    /// Sends a command without waiting for its reply; returns its id.
    ///
    /// # Errors
    /// If QEMU does not take it by `deadline`, or the connection fails.
    pub fn post(
        &mut self,
        command: &str,
        arguments: Value,
        mut fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
        limit: Duration,
    ) -> Result<String, QmpError> {
        self.commands += 1;
        let id = format!("{}-{}", self.sender, self.commands);
        let mut message = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        message.push('\n');
        let mut left = message.as_bytes();
        while !left.is_empty() {
            match send(&self.socket, left, fd) {
                Ok(sent) => {
                    left = &left[sent..];
                    fd = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::OUT, command, deadline, limit)?;
                }
                Err(error) => return Err(failed(command, error)),
            }
        }
        Ok(id)
    }

    /// Makes QEMU's JSON reader forget an unfinished message of a predecessor.
    ///
    /// A byte that occurs in no UTF-8 text does that (docs/interop/qmp-spec in QEMU); an error reply
    /// without id answers it.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn reset_reader(&mut self) -> Result<(), QmpError> {
        send(&self.socket, b"\xff\n", None).map_err(|error| failed("reset", error))?;
        Ok(())
    }

    /// The events that were read with the answers so far and are not taken yet, oldest first.
    pub fn pending_events(&self) -> impl DoubleEndedIterator<Item = &Event> {
        self.events.iter()
    }

    /// Takes the events seen so far, reading what is there without waiting.
    ///
    /// # Errors
    /// If the connection fails or carries nonsense.
    pub fn take_events(&mut self) -> Result<Vec<Event>, QmpError> {
        let none = Duration::ZERO;
        match self.next_message("events", Instant::now(), none) {
            // A late reply: of no interest.
            Ok(_) | Err(QmpError::Timeout { .. }) => Ok(self.events.drain(..).collect()),
            Err(error) => Err(error),
        }
    }

    /// The next message that is not an event.
    fn next_message(
        &mut self,
        command: &str,
        deadline: Instant,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        loop {
            while let Some(message) = self.parse(command)? {
                if message.get("event").is_none() {
                    return Ok(message);
                }
                match Event::deserialize(message) {
                    Ok(event) => self.keep(event),
                    Err(_) => return Err(QmpError::lacks(command, "event name")),
                }
            }
            self.fill(command, deadline, limit)?;
        }
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Takes one message out of what was received. Messages may span lines (`pretty=on`).
    fn parse(&mut self, command: &str) -> Result<Option<Value>, QmpError> {
        // What is left of the line of the message before: else it would pass for a line of nonsense.
        let blank = self.received.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        self.received.drain(..blank);
        // QEMU ends every message with a line break: before it there is nothing to be had.
        let Some(line_end) = self.received.iter().rposition(|&byte| byte == b'\n') else {
            return Ok(None);
        };
        let mut messages =
            serde_json::Deserializer::from_slice(&self.received[..=line_end]).into_iter::<Value>();
        let found = messages.next();
        let end = messages.byte_offset();
        match found {
            Some(Ok(message)) if message.is_object() => {
                self.received.drain(..end);
                Ok(Some(message))
            }
            None => {
                self.received.drain(..=line_end);
                Ok(None)
            }
            Some(Err(error)) if error.is_eof() => Ok(None),
            Some(_) => {
                // Starting afresh behind this line is the best guess at where sense begins again.
                let first = self.received.iter().position(|&byte| byte == b'\n');
                let line: Vec<u8> = self.received.drain(..=first.unwrap_or(line_end)).collect();
                Err(QmpError::Garbage { command: command.into(), excerpt: excerpt(&line) })
            }
        }
    }

    /// Waits for more bytes and takes them.
    fn fill(&mut self, command: &str, deadline: Instant, limit: Duration) -> Result<(), QmpError> {
        let mut chunk = [0_u8; 1 << 16];
        loop {
            match receive(&self.socket, &mut chunk) {
                Ok((0, _)) => return Err(QmpError::Closed { command: command.into() }),
                Ok((count, _)) => {
                    if self.received.len() + count > MESSAGE_BYTES_MAX {
                        let excerpt = excerpt(&self.received);
                        self.received.clear();
                        return Err(QmpError::Garbage { command: command.into(), excerpt });
                    }
                    self.received.extend_from_slice(&chunk[..count]);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::IN, command, deadline, limit)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(command, error)),
            }
        }
    }

    fn wait(
        &self,
        what: PollFlags,
        command: &str,
        deadline: Instant,
        limit: Duration,
    ) -> Result<(), QmpError> {
        match wait_for(&self.socket, what, Some(deadline)) {
            Ok(true) => Ok(()),
            Ok(false) => Err(QmpError::Timeout { command: command.into(), limit }),
            Err(error) => Err(failed(command, error)),
        }
    }
}

fn failed(command: &str, source: io::Error) -> QmpError {
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            QmpError::Closed { command: command.into() }
        }
        _ => QmpError::Io { command: command.into(), source },
    }
}

fn excerpt(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(EXCERPT_BYTES_MAX)]).trim_end().into()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;

    const LIMIT: Duration = Duration::from_secs(10);
    const SHORT: Duration = Duration::from_millis(30);

    /// A peer that answers each command it gets with what `answer` makes of its id.
    fn peer(answer: impl Fn(&str) -> String + Send + 'static) -> (Qmp, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
            while let Some(Ok(line)) = lines.next() {
                let command: Value = serde_json::from_str(&line).unwrap();
                // The client may have given up already.
                let _ = (&theirs).write_all(answer(command["id"].as_str().unwrap()).as_bytes());
            }
        });
        (Qmp::adopt(ours.into(), "test"), thread)
    }

    fn ask(answer: impl Fn(&str) -> String + Send + 'static) -> Result<Value, QmpError> {
        peer(answer).0.execute("query-status", json!({}), LIMIT)
    }

    #[test]
    fn a_reply_may_come_amid_events_late_replies_and_line_breaks() {
        let (mut qmp, _peer) = peer(|id| {
            format!(
                "{{\"event\": \"STOP\", \"timestamp\": {{}}}}\r\n{{\"return\": 1, \"id\": \"old-1\"}}\r\n\
                 {{\"error\": {{\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}}}\r\n\
                 {{\n  \"return\": {{\"a\": [1,\n 2]}},\n  \"id\": \"{id}\"\n}}\r\n{{\"event\": \"RESUME\"}}\r\n"
            )
        });
        assert_eq!(qmp.execute("x", json!({}), LIMIT).unwrap(), json!({"a": [1, 2]}));
        let mut names: Vec<String> = Vec::new();
        let deadline = Instant::now() + LIMIT;
        while names.len() < 2 && Instant::now() < deadline {
            names.extend(qmp.take_events().unwrap().into_iter().map(|event| event.name));
        }
        assert_eq!(names, ["STOP", "RESUME"]);
    }

    #[test]
    fn a_refusal_keeps_class_and_text() {
        let refused = ask(|id| {
            format!(
                "{{\"error\": {{\"class\": \"CommandNotFound\", \"desc\": \"no such\"}}, \"id\": \"{id}\"}}\r\n"
            )
        })
        .unwrap_err();
        assert!(refused.is_unknown_command());
        assert_eq!(refused.reason(), Reason::VmmRefused);
        assert_eq!(refused.to_string(), "QEMU refused query-status: no such (CommandNotFound)");
    }

    #[test]
    fn silence_ends_at_the_limit_and_a_late_reply_is_not_taken_for_the_next() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut qmp = Qmp::adopt(ours.into(), "test");
        let silent = qmp.execute("first", json!({}), SHORT).unwrap_err();
        assert!(matches!(silent, QmpError::Timeout { .. }), "{silent}");
        (&theirs)
            .write_all(b"{\"return\": \"late\", \"id\": \"test-1\"}\n{\"return\": 2, \"id\": \"test-2\"}\n")
            .unwrap();
        assert_eq!(qmp.execute("second", json!({}), LIMIT).unwrap(), json!(2));
    }

    #[test]
    fn a_limit_over_all_commands_leaves_the_later_ones_unsent() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut qmp = Qmp::adopt(ours.into(), "test");
        qmp.give_up_at(Some(Instant::now() + SHORT));
        let silent = qmp.execute("first", json!({}), LIMIT).unwrap_err();
        assert!(matches!(silent, QmpError::Timeout { limit, .. } if limit <= SHORT), "{silent}");
        let unsent = qmp.execute("second", json!({}), LIMIT).unwrap_err();
        assert!(matches!(unsent, QmpError::GivenUp { .. }), "{unsent}");
        qmp.give_up_at(None);
        let silent = qmp.execute("third", json!({}), SHORT).unwrap_err();
        assert!(matches!(silent, QmpError::Timeout { .. }), "{silent}");
        drop(qmp);
        let sent: Vec<Value> = BufReader::new(theirs)
            .lines()
            .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
            .collect();
        let names: Vec<_> = sent.iter().map(|command| &command["execute"]).collect();
        assert_eq!(names, ["first", "third"]);
    }

    #[test]
    fn a_closed_connection_is_told_from_silence() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let closed = Qmp::adopt(ours.into(), "test").execute("x", json!({}), LIMIT).unwrap_err();
        assert!(matches!(closed, QmpError::Closed { .. }), "{closed}");
    }

    #[test]
    fn the_connection_survives_nonsense() {
        let nonsense: [&[u8]; 6] = [
            b"HTTP/1.1 400 Bad Request",
            b"\xff\xfe\x00",
            b"]",
            b"3",
            b"\"text\"",
            b"{\"event\": 3}",
        ];
        for bytes in nonsense {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut qmp = Qmp::adopt(ours.into(), "test");
            (&theirs).write_all(bytes).unwrap();
            (&theirs).write_all(b"\r\n").unwrap();
            let garbage = qmp.execute("first", json!({}), LIMIT).unwrap_err();
            assert!(matches!(garbage, QmpError::Garbage { .. }), "{bytes:?}: {garbage}");
            (&theirs).write_all(b"{\"return\": {}, \"id\": \"test-2\"}\r\n").unwrap();
            assert_eq!(qmp.execute("second", json!({}), LIMIT).unwrap(), json!({}), "{bytes:?}");
        }
    }

    #[test]
    fn an_answer_that_is_neither_result_nor_error_is_nonsense() {
        for body in ["\"what\": 1", "\"error\": 7", "\"error\": {\"class\": 1}"] {
            let error = ask(move |id| format!("{{{body}, \"id\": \"{id}\"}}\r\n")).unwrap_err();
            assert!(matches!(error, QmpError::Garbage { .. }), "{body}: {error}");
        }
    }

    #[test]
    fn endless_and_deeply_nested_messages_are_cut_off() {
        for (pattern, end) in [("a", ""), ("{\"a\":", ""), ("[", "\n"), ("\n", "")] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let flood = std::thread::spawn(move || {
                let block = pattern.repeat(1 << 14) + end;
                // Ends when the client hangs up.
                while (&theirs).write_all(block.as_bytes()).is_ok() {}
            });
            let mut qmp = Qmp::adopt(ours.into(), "test");
            let error = qmp.execute("x", json!({}), Duration::from_millis(500)).unwrap_err();
            assert!(
                matches!(error, QmpError::Garbage { .. } | QmpError::Timeout { .. }),
                "{pattern:?}: {error}"
            );
            assert!(qmp.received.len() <= MESSAGE_BYTES_MAX);
            drop(qmp);
            flood.join().unwrap();
        }
    }

    #[test]
    fn events_are_bounded() {
        let (mut qmp, _peer) = peer(|id| {
            "{\"event\": \"RTC_CHANGE\"}\r\n".repeat(EVENTS_MAX + 5)
                + &format!("{{\"event\": \"LAST\"}}\r\n{{\"return\": {{}}, \"id\": \"{id}\"}}\r\n")
        });
        qmp.execute("x", json!({}), LIMIT).unwrap();
        assert_eq!(qmp.events.len(), EVENTS_MAX);
        assert_eq!(qmp.events.back().unwrap().name, "LAST");
    }

    #[test]
    fn the_greeting_may_come_behind_replies_to_an_earlier_client() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = std::thread::spawn(move || {
            let mut commands = BufReader::new(theirs.try_clone().unwrap());
            (&theirs)
                .write_all(b"{\"return\": {}, \"id\": \"livesnap-1-1\"}\r\n{\"QMP\": {}}\r\n")
                .unwrap();
            let mut line = String::new();
            commands.read_line(&mut line).unwrap();
            let command: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(command["execute"], "qmp_capabilities");
            let reply = json!({"return": {}, "id": command["id"]});
            (&theirs).write_all(format!("{reply}\r\n").as_bytes()).unwrap();
        });
        Qmp::negotiate(ours.into(), LIMIT).unwrap();
        peer.join().unwrap();
    }

    #[test]
    fn no_greeting_means_that_another_holds_the_monitor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let busy = Qmp::connect(&path, SHORT).unwrap_err();
        assert!(matches!(busy, QmpError::Busy { .. }), "{busy}");
        let missing = Qmp::connect(&dir.path().join("none"), SHORT).unwrap_err();
        assert!(matches!(missing, QmpError::Connect { .. }), "{missing}");
    }
}
