//! HTTP over the daemon's Unix socket, as much as is needed of it: one request a connection, by HTTP/1.0, so that an answer ends
//! with it.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use snapshot_core::Reason;

use super::reason;
use crate::Failure;

/// Bytes of an answer, or of an event.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// A daemon that says nothing for so long hangs. While it is followed it sends a sign of life every 15 seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// A client of one daemon.
pub struct Client {
    socket: PathBuf,
}

type Reader = BufReader<UnixStream>;

impl Client {
    /// Of the daemon that serves `socket`.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.into() }
    }

    /// Asks, and returns the answer.
    ///
    /// # Errors
    /// If the daemon cannot be asked, or refuses.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        let (status, reader) = self.send(method, path, body)?;
        self.read(status, reader)
    }

    /// Follows events, and returns what each tells.
    ///
    /// # Errors
    /// If the daemon cannot be asked, or refuses.
    pub fn follow(
        &self,
        path: &str,
    ) -> Result<impl Iterator<Item = Result<Value, Failure>> + use<'_>, Failure> {
        let (status, reader) = self.send("GET", path, None)?;
        if status != 200 {
            self.read(status, reader)?;
            return Err(self.lost("its answer is no stream of events"));
        }
        let lines = reader.lines().map_while(Result::ok);
        let events = lines.filter_map(|line| Some(line.strip_prefix("data: ")?.to_owned()));
        Ok(events.map(|data| serde_json::from_str(&data).map_err(|error| self.lost(error))))
    }

    /// Sends a request, and reads the answer's head.
    fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(u16, Reader), Failure> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let exchange = || {
            let mut stream = UnixStream::connect(&self.socket)?;
            stream.set_read_timeout(Some(LIMIT))?;
            stream.set_write_timeout(Some(LIMIT))?;
            stream.write_all(request.as_bytes())?;
            let mut reader = BufReader::new(stream);
            let status = read_head(&mut reader)?;
            Ok((status, reader))
        };
        exchange().map_err(|error: io::Error| {
            let socket = self.socket.display();
            let error = format!(
                "cannot ask the daemon at {socket}: {error}: start it with livesnap serve, or name its socket by --daemon"
            );
            Failure::refused(Reason::Io, error)
        })
    }

    /// Reads an answer's body: what was asked for, or why it is refused.
    fn read(&self, status: u16, reader: Reader) -> Result<Value, Failure> {
        let mut body = Vec::new();
        reader.take(ANSWER_BYTES_MAX).read_to_end(&mut body).map_err(|error| self.lost(error))?;
        let body: Value = serde_json::from_slice(&body).map_err(|error| self.lost(error))?;
        if status < 400 {
            return Ok(body);
        }
        let detail = body["detail"].as_str().unwrap_or("the daemon refuses without a word");
        let reason = reason(&body["reason"]).unwrap_or(Reason::BadArgument);
        Err(Failure::refused(reason, detail))
    }

    fn lost(&self, why: impl std::fmt::Display) -> Failure {
        let socket = self.socket.display();
        Failure::new(Reason::Io, format!("the daemon at {socket} is not understood: {why}"))
    }
}

/// Reads the status, and past the headers.
fn read_head(reader: &mut Reader) -> io::Result<u16> {
    let mut head = String::new();
    while reader.by_ref().take(ANSWER_BYTES_MAX).read_line(&mut head)? > 2 {}
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    status.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it does not speak HTTP"))
}
