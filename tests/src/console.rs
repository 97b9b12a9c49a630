//! What the guest has said on its serial console so far.

use std::collections::HashMap;

/// The console's text, cut after the last complete line.
#[derive(Debug, Clone, Default)]
pub struct Console(String);

/// One `LS ok` line; the numbers are the guest's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heartbeat {
    /// Milliseconds of guest time since its program began.
    pub t_ms: u64,
    /// Pages that each ring worker has written.
    pub workers: Vec<u64>,
    /// Full rounds that the slowest worker has made through its ring.
    pub laps: u64,
    /// Blocks that the disk has acknowledged.
    pub disk: u64,
    /// Populated pages that were checked again.
    pub scrubbed: u64,
    /// Longest time between two pages of one worker since the heartbeat before, in microseconds.
    pub worst_gap_us: u64,
    /// Pages a second since the heartbeat before.
    pub pages_per_s: u64,
    /// Pages and blocks so far that did not hold what they should.
    pub inconsistent: u64,
}

impl Console {
    /// Takes what was read from the console; the last line may still be incomplete.
    pub fn new(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes).replace('\r', "");
        let end = text.rfind('\n').map_or(0, |at| at + 1);
        Self(text[..end].to_owned())
    }

    /// Everything.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Whether the guest has said that it is ready.
    pub fn is_ready(&self) -> bool {
        self.0.lines().any(|line| line.starts_with("LS ready"))
    }

    /// The line with which the guest gave up, if it has.
    pub fn failure(&self) -> Option<&str> {
        self.0.lines().find(|line| line.starts_with("LS FAILED") || line.contains("Kernel panic"))
    }

    /// The lines that tell of wrong pages.
    pub fn inconsistencies(&self) -> Vec<&str> {
        self.0.lines().filter(|line| line.starts_with("LS INCONSISTENT")).collect()
    }

    /// All heartbeats, oldest first.
    pub fn heartbeats(&self) -> Vec<Heartbeat> {
        self.0.lines().filter_map(Heartbeat::parse).collect()
    }
}

impl Heartbeat {
    fn parse(line: &str) -> Option<Self> {
        let numbers: HashMap<&str, u64> = line
            .strip_prefix("LS ok ")?
            .split(' ')
            .map(|word| {
                let (key, value) = word.split_once('=')?;
                Some((key, value.parse().ok()?))
            })
            .collect::<Option<_>>()?;
        let get = |key: &str| numbers.get(key).copied();
        Some(Self {
            t_ms: get("t_ms")?,
            workers: (0..).map_while(|worker| get(&format!("w{worker}"))).collect(),
            laps: get("laps")?,
            disk: get("disk")?,
            scrubbed: get("scrubbed")?,
            worst_gap_us: get("worst_gap_us")?,
            pages_per_s: get("pages_per_s")?,
            inconsistent: get("inconsistent")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "LS ok t_ms=5 w0=1 w1=2 laps=3 disk=4 scrubbed=5 worst_gap_us=6 pages_per_s=7 inconsistent=0\r\n";

    #[test]
    fn incomplete_and_damaged_lines_are_left_out() {
        let text = format!("t_ms=1 w0\r\n{LINE}LS ok t_ms=x\r\nLS ok t_ms=6 w0=9");
        let heartbeats = Console::new(text.as_bytes()).heartbeats();
        assert_eq!(heartbeats.len(), 1);
        assert_eq!(
            (heartbeats[0].t_ms, &heartbeats[0].workers[..], heartbeats[0].inconsistent),
            (5, &[1, 2][..], 0)
        );
    }

    #[test]
    fn trouble_is_found() {
        let console = Console::new(
            b"LS ready t_ms=1\nLS INCONSISTENT ring w0 slot=1\nKernel panic - not syncing\n",
        );
        assert!(console.is_ready());
        assert_eq!(console.inconsistencies().len(), 1);
        assert!(console.failure().is_some());
    }
}
