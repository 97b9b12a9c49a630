//! What no client should send, sent to the real daemon over its socket and over TCP: it refuses, or hangs up, and goes on.
//!
//! Requests are made from fixed seeds, one for each kind; `LIVESNAP_SEED` gives others. A failure tells the seed and
//! the bytes that were sent.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use livesnap_tests::daemon::Daemon;
use livesnap_tests::is_root_or_skip;
use livesnap_tests::qemu::Qemu;
use rustix::process::Signal;
use serde_json::json;

const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(60);
/// Requests of each kind.
const ROUNDS: usize = 250;
/// What the daemon's memory may have grown by at the end: far less than all that was sent.
const GROWTH_MAX_KIB: u64 = 32 << 10;

/// A source of chance that can be had again.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        // xorshift64 (Marsaglia).
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }

    fn bytes(&mut self, length_max: usize) -> Vec<u8> {
        let length = self.below(length_max + 1);
        (0..length).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// What is sent, and what may be answered.
struct Case {
    bytes: Vec<u8>,
    /// Only refusals; nothing else than that the daemon does not fail otherwise.
    is_refused: bool,
}

impl Case {
    /// A request that a library for HTTP understands, which must be refused.
    fn refused(line: &str, headers: &str, body: &[u8]) -> Self {
        let length = body.len();
        let head = format!(
            "{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n"
        );
        Self { bytes: [head.as_bytes(), body].concat(), is_refused: true }
    }

    fn raw(bytes: impl Into<Vec<u8>>, is_refused: bool) -> Self {
        Self { bytes: bytes.into(), is_refused }
    }
}

const JSON: &str = "Content-Type: application/json\r\n";
/// What takes a body; none of them can be done, for neither machine nor operation is there.
const CALLS: [&str; 4] = [
    "POST /snapshot",
    "PATCH /snapshot/07/policy",
    "POST /snapshot/07/abort",
    "DELETE /snapshot/07",
];
const KEYS: [&str; 12] = [
    "vm",
    "destination",
    "policy",
    "buffer_bytes",
    "stall_limit_seconds",
    "min_cpu_ratio",
    "deadline_seconds",
    "max_bandwidth_bytes_per_second",
    "on_infeasible",
    "force",
    "no_disks",
    "\\u0000\\ud83d\\ude00",
];
const SCALARS: [&str; 22] = [
    "null",
    "true",
    "0",
    "-0",
    "-1",
    "1e308",
    "1e309",
    "-1e999999999",
    "18446744073709551615",
    "18446744073709551616",
    "0.1",
    "1e-400",
    "NaN",
    "\"\"",
    "\"nobody\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\"../../etc\"",
    "\"wait\"",
    "\"\u{202e}\"",
    "00",
    "'",
];

/// Something like JSON. No virtual machine is ever named that there is.
fn value(chance: &mut Chance, depth: usize) -> String {
    match chance.below(if depth == 0 { 1 } else { 3 }) {
        0 => chance.pick(&SCALARS).to_owned(),
        1 => {
            let count = chance.below(4);
            let parts: Vec<_> = (0..count).map(|_| value(chance, depth - 1)).collect();
            format!("[{}]", parts.join(","))
        }
        _ => {
            let count = chance.below(6);
            let mut part = || format!("\"{}\":{}", chance.pick(&KEYS), value(chance, depth - 1));
            let parts: Vec<_> = (0..count).map(|_| part()).collect();
            format!("{{{}}}", parts.join(","))
        }
    }
}

fn wrong_types(chance: &mut Chance) -> Case {
    Case::refused(chance.pick(&CALLS), JSON, value(chance, 4).as_bytes())
}

/// A good body with some bytes changed, put in or left out.
fn damaged(chance: &mut Chance) -> Case {
    let good = json!({
        "vm": "nobody", "destination": "a/b",
        "policy": {"min_cpu_ratio": 0.5, "buffer_bytes": 1 << 30, "on_infeasible": "wait", "force": true},
    });
    let mut body = good.to_string().into_bytes();
    for _ in 0..=chance.below(4) {
        let at = chance.below(body.len());
        let byte = chance.next().to_le_bytes()[0];
        match chance.below(3) {
            0 => body[at] = byte,
            1 => body.insert(at, byte),
            _ => drop(body.remove(at)),
        }
    }
    Case::refused(chance.pick(&CALLS), JSON, &body)
}

fn garbage(chance: &mut Chance) -> Case {
    let kinds =
        [JSON, "", "Content-Type: text/plain\r\n", "Content-Type: application/json; charset=\r\n"];
    let kind = chance.pick(&kinds);
    Case::refused(chance.pick(&CALLS), kind, &chance.bytes(300))
}

fn deep_or_long(chance: &mut Chance) -> Case {
    let repeated = |text: &str, times: usize| text.repeat(times);
    let times = 1 + chance.below(30_000);
    let body = match chance.below(6) {
        0 => repeated("[", times),
        1 => repeated("{\"vm\":", times / 2),
        2 => format!("{}1{}", repeated("[", times / 2), repeated("]", times / 2)),
        3 => format!(
            "{{\"vm\":\"nobody\",\"policy\":{{\"buffer_bytes\":{}}}}}",
            repeated("9", times)
        ),
        4 => format!("{{{}\"vm\":\"nobody\"}}", repeated("\"vm\":\"a\",", times / 10)),
        _ => format!("{{\"vm\":\"{}\"}}", repeated("x", times * 10)),
    };
    // Without a body they may be read to their end or not: they cannot be done either way.
    Case::refused(chance.pick(&CALLS), JSON, body.as_bytes())
}

const STRANGE_PATHS: [&str; 24] = [
    "/snapshot/../../etc",
    "/snapshot/../vms/..",
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/snapshot/%2e%2e%2fetc",
    "/snapshot/%2e%2e",
    "/snapshot/%00",
    "/snapshot/07%00",
    "/snapshot/%",
    "/snapshot/%zz",
    "/snapshot/%ff%fe",
    "/snapshot//",
    "//snapshot",
    "/SNAPSHOT",
    "/snapshot/07/../../vms",
    "/snapshot/07/events/",
    "/snapshot/07/policy",
    "/snapshot/..%5c..%5cetc",
    "/app.js/../../etc/passwd",
    "/metrics/",
    "/snapshot?limit=0",
    "/snapshot?limit=99999999999999999999",
    "/snapshot?limit=1&limit=2&state=%00",
    "/snapshot?colour=red",
];

fn strange_path(chance: &mut Chance) -> Case {
    let mut path = chance.pick(&STRANGE_PATHS).to_owned();
    if chance.below(4) == 0 {
        path = format!("/snapshot/{}", "%2e".repeat(1 + chance.below(3_000)));
    }
    let methods = ["GET", "PUT", "DELETE", "PATCH", "POST", "TRACE", "get", "FOO", "\u{7f}"];
    // Answered with headers alone.
    Case::refused(&format!("{} {path}", chance.pick(&methods)), "", b"")
}

/// Destinations of a machine that there is.
fn strange_destination(chance: &mut Chance) -> Case {
    let parts = [
        "..", ".", "", "etc", "link", "a\0", "\u{202e}", "%2e%2e", "a\n", " ", ".hidden", "-o", "~",
    ];
    let mut parts: Vec<_> = (0..1 + chance.below(12)).map(|_| chance.pick(&parts)).collect();
    let at = chance.below(parts.len() + 1);
    parts.insert(at, "..");
    let text = json!({"vm": "vm1", "destination": parts.join("/")}).to_string();
    Case::refused("POST /snapshot", JSON, text.as_bytes())
}

fn strange_headers(chance: &mut Chance) -> Case {
    let long = "x".repeat(1 + chance.below(40_000));
    let many: String = (0..chance.below(300)).map(|n| format!("X-{n}: {n}\r\n")).collect();
    let headers = match chance.below(8) {
        0 => format!("Idempotency-Key: {long}\r\n"),
        1 => "Idempotency-Key: a\r\nIdempotency-Key: b\r\n".into(),
        2 => format!("X-Long: {long}\r\n"),
        3 => many,
        4 => "Idempotency-Key: \u{e9}\r\n".into(),
        5 => "Prefer: wait=99999999999999999999999, wait=, ;;=,\r\n".into(),
        6 => format!("{long}: 1\r\n"),
        _ => "Expect: 200-never\r\nIf-None-Match: \"\", W/, *\r\n".into(),
    };
    Case::refused("POST /snapshot", &format!("{JSON}{headers}"), br#"{"vm": "nobody"}"#)
}

/// Requests within requests: whatever stands behind the first must not be done as a second one, nor anything be taken for
/// a request that is none.
fn smuggled(chance: &mut Chance) -> Case {
    let inner = "POST /snapshot HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let length = inner.len();
    let framing = chance.pick(&[
        "Content-Length: 0\r\nContent-Length: 50\r\n",
        "Content-Length: 5, 5\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: 0x5\r\n",
        "Content-Length: 5 5\r\n",
        "Content-Length: 99999999999999999999999999\r\n",
        "Content-Length : 5\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: gzip\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding:\u{b}chunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding\r\n: chunked\r\n",
        " Transfer-Encoding: chunked\r\n",
        "X: a\nTransfer-Encoding: chunked\r\n",
        "X: a\r\n b\r\n",
        "X: a\0b\r\n",
    ]);
    let body = match chance.below(5) {
        0 => inner.to_owned(),
        1 => format!("0\r\n\r\n{inner}"),
        2 => format!("{length:x}\r\n{inner}\r\n0\r\n\r\n"),
        3 => format!("{length:x};{}\r\n{inner}\r\n0\r\n\r\n", "e".repeat(chance.below(20_000))),
        _ => format!("fffffffffffffffff\r\n{inner}"),
    };
    let head = format!("POST /snapshot HTTP/1.1\r\nHost: localhost\r\n{JSON}{framing}\r\n");
    Case::raw(head + &body, true)
}

/// Not even a request.
fn no_request(chance: &mut Chance) -> Case {
    let line = chance.pick(&[
        "",
        "\r\n\r\n\r\n",
        "GET\r\n\r\n",
        "GET /vms\r\n\r\n",
        "GET /vms HTTP/9.9\r\n\r\n",
        "GET /vms HTTP/1.1 HTTP/1.1\r\n\r\n",
        "GET  /vms HTTP/1.1\r\n\r\n",
        "GET /v ms HTTP/1.1\r\n\r\n",
        "GET /\0 HTTP/1.1\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\u{16}\u{3}\u{1}\u{2}",
        "CONNECT localhost:22 HTTP/1.1\r\nHost: localhost:22\r\n\r\n",
        "GET /vms HTTP/1.1\r\nHost",
        "POST /snapshot HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
    ]);
    let bytes = match chance.below(3) {
        0 => chance.bytes(2_000),
        1 => [line.as_bytes(), &chance.bytes(100)].concat(),
        _ => line.into(),
    };
    Case::raw(bytes, true)
}

/// Good requests one behind the other, of which one may be none.
fn pipelined(chance: &mut Chance) -> Case {
    let mut text = String::new();
    for _ in 0..1 + chance.below(40) {
        let path =
            chance.pick(&["/vms", "/healthz", "/snapshot", "/nothing", "/snapshot/07/events"]);
        text.push_str(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    }
    if chance.below(2) == 0 {
        text.truncate(chance.below(text.len()));
    }
    Case::raw(text, false)
}

/// A kind of requests: its name, and how one is made.
type Kind = (&'static str, fn(&mut Chance) -> Case);

trait Connection: Read + Write {
    fn finish(&self) -> std::io::Result<()>;
}

impl Connection for UnixStream {
    fn finish(&self) -> std::io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Connection for TcpStream {
    fn finish(&self) -> std::io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

fn connect(daemon: &Daemon, by_tcp: bool) -> Box<dyn Connection> {
    if by_tcp {
        let stream = TcpStream::connect(daemon.tcp().unwrap()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        return Box::new(stream);
    }
    let stream = UnixStream::connect(daemon.socket()).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    Box::new(stream)
}

/// Whether the other side has hung up in the middle.
fn is_hung_up(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected)
}

/// All that is answered until the daemon hangs up.
fn read_all(mut connection: impl Read) -> Vec<u8> {
    let mut answer = Vec::new();
    match connection.read_to_end(&mut answer) {
        Err(error) if is_hung_up(error.kind()) => {}
        read => drop(read.unwrap()),
    }
    answer
}

fn ask(daemon: &Daemon, by_tcp: bool, bytes: &[u8]) -> Vec<u8> {
    let mut connection = connect(daemon, by_tcp);
    for done in [connection.write_all(bytes), connection.finish()] {
        match done {
            Err(error) if is_hung_up(error.kind()) => {}
            done => done.unwrap(),
        }
    }
    read_all(connection)
}

/// What is wrong with the answer, if anything is.
fn fault(case: &Case, answer: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(answer);
    // Answers are of JSON, in which no line begins so.
    let mut rest = Some(&*text).filter(|text| !text.is_empty());
    while let Some(one) = rest {
        let (one, next) = match one[1..].find("HTTP/1.1 ") {
            Some(at) => (&one[..=at], Some(&one[at + 1..])),
            None => (one, None),
        };
        rest = next;
        let status = one.strip_prefix("HTTP/1.1 ").and_then(|line| line.get(..3)?.parse().ok());
        let Some(status) = status else { return Some("no answer of HTTP".into()) };
        if !(200..500).contains::<u16>(&status) || case.is_refused && status < 400 {
            return Some(format!("status {status}"));
        }
        let body = one.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let is_problem = one.contains("content-type: application/problem+json");
        // What the library for HTTP refuses has no body.
        if status >= 400 && !body.is_empty() && !is_problem {
            return Some("no problem details".into());
        }
    }
    None
}

/// A figure of the daemon's memory, in KiB (proc_pid_status(5)).
fn memory_kib(daemon: &Daemon, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
}

fn descriptors(daemon: &Daemon) -> usize {
    fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count()
}

#[test]
fn whatever_is_sent_is_refused_and_does_no_harm() {
    if !is_root_or_skip("a virtual machine to leave alone").unwrap() {
        return;
    }
    let mut qemu = Qemu::builder().start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    // Looked at once, for a look is seen by QEMU.
    let more = "look_seconds = 100000\nhttp.read_seconds_max = 2\ntcp.listen = \"127.0.0.1:0\"";
    let daemon = Daemon::serve(dir.path(), &[("vm1", &qemu)], more).unwrap();
    let before = memory_kib(&daemon, "VmRSS:");

    let given = std::env::var("LIVESNAP_SEED").ok().map(|text| text.parse::<u64>().unwrap());
    let kinds: [Kind; 10] = [
        ("wrong types", wrong_types),
        ("damaged", damaged),
        ("garbage", garbage),
        ("deep or long", deep_or_long),
        ("strange path", strange_path),
        ("strange destination", strange_destination),
        ("strange headers", strange_headers),
        ("smuggled", smuggled),
        ("no request", no_request),
        ("pipelined", pipelined),
    ];
    for (number, (kind, make)) in (1..).zip(kinds) {
        let seed = given.unwrap_or(0x5eed_0000 + number);
        let mut chance = Chance(seed);
        for round in 0..ROUNDS {
            let case = make(&mut chance);
            let answer = ask(&daemon, round % 2 == 0, &case.bytes);
            if let Some(fault) = fault(&case, &answer) {
                let [sent, answer] =
                    [&case.bytes, &answer].map(|bytes| bytes.escape_ascii().to_string());
                panic!(
                    "{kind}, LIVESNAP_SEED={seed}, round {round}: {fault}\nsent {sent:.3000}\nanswer {answer:.3000}"
                );
            }
        }
    }

    // Half a request, and then nothing: all of them are hung up on.
    let halves: Vec<_> = (0..40)
        .map(|number| {
            let mut connection = connect(&daemon, number % 2 == 0);
            let half = ["GET /vms HTTP/1.1\r\nHost: local", "POST /snapshot HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"vm\":"];
            connection.write_all(half[number / 2 % 2].as_bytes()).unwrap();
            connection
        })
        .collect();
    for connection in halves {
        let answer = read_all(connection);
        assert!(
            answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"),
            "{:?}",
            answer.escape_ascii().to_string()
        );
    }

    assert_eq!(daemon.get("/healthz").unwrap().status, 200);
    let after = memory_kib(&daemon, "VmHWM:");
    assert!(after < before + GROWTH_MAX_KIB, "{before} KiB before, at most {after}");
    livesnap_tests::poll_until("connections are closed", LIMIT, || {
        Ok((descriptors(&daemon) < 40).then_some(()))
    })
    .unwrap();
    assert_eq!(daemon.get("/snapshot").unwrap().body["operations"], json!([]));
    let metrics = daemon.metrics().unwrap();
    let failed: Vec<_> = metrics.lines().filter(|line| line.contains("code=\"5")).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let snapshots = dir.path().join("snapshots");
    assert_eq!(fs::read_dir(&snapshots).unwrap().count(), 0);
    assert!(!qemu.has_userfaultfd().unwrap());
    assert_eq!(qemu.take_pauses().unwrap(), []);
    assert_eq!(qemu.status().unwrap(), "running");
    let log = daemon.log();
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
    assert!(daemon.end(Signal::TERM).unwrap().success());
}
