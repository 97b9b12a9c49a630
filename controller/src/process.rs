//! A process, told apart from those that get its number when it has ended. Looks at procfs; owns nothing.

use procfs::process::Process;
use serde::{Deserialize, Serialize};

/// Why it cannot be told which process has a number.
#[derive(Debug, thiserror::Error)]
#[error("cannot tell when process {pid} started: {source}")]
pub struct ProcessError {
    /// The number.
    pid: i32,
    /// What procfs says.
    source: Box<procfs::ProcError>,
}

/// A process, or what is left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since the boot: numbers come again, but not with the same start.
    started_ticks: u64,
}

impl ProcessId {
    /// The process that has this number now.
    ///
    /// # Errors
    /// If there is none.
    pub fn of(pid: i32) -> Result<Self, ProcessError> {
        let stat = Process::new(pid).and_then(|process| process.stat());
        let stat = stat.map_err(|error| ProcessError { pid, source: Box::new(error) })?;
        Ok(Self { pid, started_ticks: stat.starttime })
    }

    /// Whether it still runs.
    pub fn runs(self) -> bool {
        let stat = Process::new(self.pid).and_then(|process| process.stat());
        // Dead ones keep their number until their parent has asked for them.
        stat.is_ok_and(|stat| {
            stat.starttime == self.started_ticks && !matches!(stat.state, 'Z' | 'X')
        })
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn one_that_has_ended_or_is_another_does_not_run() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = ProcessId::of(child.id().try_into().unwrap()).unwrap();
        assert!(process.runs());
        let another = ProcessId { started_ticks: process.started_ticks - 1, ..process };
        assert!(!another.runs());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!process.runs());
    }
}
