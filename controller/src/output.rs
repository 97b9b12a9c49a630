//! What commands write to standard output and standard error.

use std::io::{self, IsTerminal as _, Write as _};

use snapshot_core::Reason;

use crate::Failure;

/// Writes `text` and a line feed to standard output. Nobody listening any more is not an error.
pub fn line(text: impl std::fmt::Display) -> Result<(), Failure> {
    heard_line(text).map(drop)
}

/// The same, and tells whether somebody still listens.
pub fn heard_line(text: impl std::fmt::Display) -> Result<bool, Failure> {
    match writeln!(io::stdout().lock(), "{text}") {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => {
            Err(Failure::new(Reason::Io, format!("could not write to standard output: {error}")))
        }
    }
}

/// Writes `value` as JSON to standard output.
pub fn json(value: &impl serde::Serialize) -> Result<(), Failure> {
    line(serde_json::to_string_pretty(value).map_err(no_json)?)
}

fn no_json(error: serde_json::Error) -> Failure {
    Failure::new(Reason::Internal, format!("cannot make JSON: {error}"))
}

/// `value` as one line of JSON.
pub fn json_line(value: &impl serde::Serialize) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(no_json)
}

/// Writes one line to standard error.
pub fn error(text: impl std::fmt::Display) {
    note(format_args!("livesnap: {text}"));
}

/// Writes `text` and a line feed to standard error, where there is one.
pub fn note(text: impl std::fmt::Display) {
    // There is nowhere left to complain to.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A percentage on standard error, where that is a terminal.
pub struct Percentage {
    what: &'static str,
    shown: Option<u64>,
}

impl Percentage {
    /// Shows nothing yet.
    pub fn new(what: &'static str) -> Self {
        let shown = io::stderr().is_terminal().then_some(u64::MAX);
        Self { what, shown }
    }

    /// Shows that `done` of `total` is done, if that changes what is shown.
    pub fn show(&mut self, done: u64, total: u64) {
        let percent = done.saturating_mul(100).checked_div(total).unwrap_or(100);
        if self.shown.is_some_and(|shown| shown != percent) {
            self.shown = Some(percent);
            let end = if percent >= 100 { "\n" } else { "" };
            let _ = write!(io::stderr().lock(), "\r{} {percent} %{end}", self.what);
        }
    }
}

/// A number of bytes for people.
pub fn bytes(count: u64) -> String {
    bytesize::ByteSize::b(count).display().iec().to_string()
}
