//! A QMP client for tests: one request, one answer, and the events that came in between.
//!
//! The product has its own; a test must not judge the product by the product.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A connection to one QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects and negotiates; every read fails after `timeout`.
    pub fn connect(socket: &Path, timeout: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(timeout)).context("cannot limit the time of a QMP read")?;
        let mut qmp = Self { reader: BufReader::new(stream), events: Vec::new() };
        let greeting = qmp.read()?;
        greeting.get("QMP").with_context(|| format!("not a QMP greeting: {greeting}"))?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returned; an error answer is an error.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.reader.get_mut(), "{request}")
            .with_context(|| format!("cannot send {command}"))?;
        loop {
            let mut message = self.read().with_context(|| format!("no answer to {command}"))?;
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(error) = message.get("error") {
                bail!("{command} failed: {error}");
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Runs a monitor command for humans.
    pub fn human(&mut self, line: &str) -> Result<String> {
        let answer = self.execute("human-monitor-command", json!({"command-line": line}))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// The events so far, oldest first; each is given once.
    pub fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let bytes = self.reader.read_line(&mut line).context("cannot read from QMP")?;
        if bytes == 0 {
            bail!("QEMU closed the QMP connection");
        }
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
    }
}
