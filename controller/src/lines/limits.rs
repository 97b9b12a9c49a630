//! Limits that another program changes while a snapshot runs: on standard input, one JSON object a line, which says by
//! name what shall be changed (see [`Change`]). Each line gets an answer among those of the snapshot.
//!
//! A thread of its own reads; it ends with the input, and the snapshot goes on without.

use std::io::{self, BufRead};
use std::thread;

use serde::Serialize;

use super::{Event, Lines};
use crate::control_loop::{Change, Limits, LiveLimits};
use crate::json;

/// Longest line.
const LINE_BYTES_MAX: usize = 4096;

/// What became of a change.
#[derive(Debug, Serialize)]
pub struct Answer {
    accepted: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    /// All limits that are in force now.
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<Limits>,
}

impl From<Result<Limits, String>> for Answer {
    fn from(changed: Result<Limits, String>) -> Self {
        let accepted = changed.is_ok();
        match changed {
            Ok(limits) => Self { accepted, detail: None, policy: Some(limits) },
            Err(detail) => Self { accepted, detail: Some(detail), policy: None },
        }
    }
}

/// Begins to follow standard input.
///
/// # Errors
/// If there can be no thread.
pub fn follow_stdin(live: LiveLimits, lines: Lines) -> io::Result<()> {
    let run = move || follow(io::stdin().lock(), &live, &lines);
    thread::Builder::new().name("limits".into()).spawn(run).map(drop)
}

fn follow(mut input: impl BufRead, live: &LiveLimits, lines: &Lines) {
    // Whoever does not read its answers is not listened to either.
    while lines.wait_for_room() {
        let Ok(Some(line)) = next_line(&mut input) else { return };
        let changed = line.and_then(|line| change(live, &line));
        lines.post(Event::Policy(changed.into()));
    }
}

fn change(live: &LiveLimits, line: &[u8]) -> Result<Limits, String> {
    let change: Change = json::from_slice(line).map_err(|error| error.to_string())?;
    live.change(&change).map_err(|error| error.to_string())
}

/// The next line, or that it was too long; nothing at the end.
fn next_line(input: &mut impl BufRead) -> io::Result<Option<Result<Vec<u8>, String>>> {
    let mut line = Vec::new();
    let limit = LINE_BYTES_MAX as u64 + 1;
    if io::Read::take(&mut *input, limit).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.len() > LINE_BYTES_MAX {
        if line.last() != Some(&b'\n') {
            input.skip_until(b'\n')?;
        }
        return Ok(Some(Err(format!("the line is longer than {LINE_BYTES_MAX} bytes"))));
    }
    Ok(Some(Ok(line)))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

    use std::sync::mpsc::{Sender, channel};

    use livesnap_control::Policy;
    use serde_json::Value;
    use snapshot_core::{BandwidthLimit, Cancel};

    use super::*;
    use crate::control_loop::Rule;

    struct Reader(Sender<Value>);

    impl io::Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(serde_json::from_slice(bytes)?).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The answers to `input`, and the rule after it.
    fn answers(input: &str) -> (Vec<Value>, LiveLimits) {
        let rule = Rule::Limits(Policy::for_host(1 << 34));
        let live = LiveLimits::new(rule, BandwidthLimit::default());
        let (sender, answers) = channel();
        let lines = Lines::to(Reader(sender)).unwrap();
        follow(input.as_bytes(), &live, &lines);
        lines.end(serde_json::json!({}), &Cancel::default());
        drop(lines);
        let answers = answers.iter().take_while(|answer| answer["event"] == "policy").collect();
        (answers, live)
    }

    #[test]
    fn each_line_gets_its_answer_and_the_good_ones_are_in_force() {
        let long = "x".repeat(LINE_BYTES_MAX);
        let input = format!(
            "{{\"min_cpu_ratio\": 0.6}}\n{{\"min_cpu_ratio\": 0}}\n\n{long}{long}\n{{\"deadline_seconds\": 9}}"
        );
        let (answers, live) = answers(&input);
        let accepted: Vec<_> = answers.iter().map(|answer| answer["accepted"].as_bool()).collect();
        assert_eq!(accepted, [true, false, false, false, true].map(Some), "{answers:#?}");
        assert!(answers[1]["detail"].as_str().unwrap().contains("must be above 0"), "{answers:#?}");
        assert!(answers[3]["detail"].as_str().unwrap().contains("longer than 4096"));
        assert_eq!(answers[4]["policy"]["min_cpu_ratio"], 0.6, "{answers:#?}");
        let in_force = live.take_changed().unwrap();
        assert_eq!((in_force.min_cpu_ratio, in_force.deadline_ns), (0.6, Some(9_000_000_000)));
    }
}
