//! How much of its time a virtual CPU lost because the copy buffer was full, or nearly.
//!
//! A write to a page that is not saved yet always waits for its copy. That is what a snapshot costs, and no throttle would spare
//! it. But where the buffer has hardly any room, less is captured for each fault, and where it has none, writes wait for the
//! disk. So what counts is how long a virtual CPU waits beyond what the same bytes cost it while there was room.

use std::time::Duration;

use crate::units::number;

/// Share of the buffer in use up to which there is room: beyond it the engine soon captures less for each fault.
const ROOM_RATIO: f64 = 0.65;
/// Time constant with which the cost of a first touch is forgotten, in seconds.
const COST_S: f64 = 0.5;

/// The waits of one virtual CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Waits {
    /// What was told last.
    bytes: u64,
    wait_ns: u64,
    /// What first touches cost while there was room: so many bytes of late, for so long a wait.
    cost_bytes: f64,
    cost_s: f64,
}

/// Whether so much of a buffer is in use that writers lose nothing by it.
pub fn has_room(used_bytes: u64, limit_bytes: u64) -> bool {
    number(used_bytes) < number(limit_bytes) * ROOM_RATIO
}

impl Waits {
    /// So many bytes were saved for it in all, and so long has it waited for them, `elapsed` after this was told before. Returns how
    /// much of it was lost.
    pub fn see(&mut self, bytes: u64, wait_ns: u64, elapsed: Duration, has_room: bool) -> Duration {
        let grown = number(bytes.saturating_sub(std::mem::replace(&mut self.bytes, bytes)));
        let waited_ns = wait_ns.saturating_sub(std::mem::replace(&mut self.wait_ns, wait_ns));
        let waited = Duration::from_nanos(waited_ns).min(elapsed);
        if has_room {
            let kept = COST_S / (COST_S + elapsed.as_secs_f64());
            self.cost_bytes = self.cost_bytes * kept + grown;
            self.cost_s = self.cost_s * kept + waited.as_secs_f64();
            return Duration::ZERO;
        }
        let cost_s = if self.cost_bytes > 0.0 { self.cost_s / self.cost_bytes } else { 0.0 };
        Duration::try_from_secs_f64(waited.as_secs_f64() - grown * cost_s).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(50);
    const MS: u64 = 1_000_000;

    #[test]
    fn only_what_is_beyond_the_cost_with_room_is_lost() {
        let mut waits = Waits::default();
        // 5 ms a MiB.
        for tick in 1..=20 {
            assert_eq!(waits.see(tick << 20, tick * 5 * MS, TICK, true), Duration::ZERO);
        }
        let lost = waits.see(22 << 20, 140 * MS, TICK, false);
        assert!(lost.abs_diff(Duration::from_millis(30)) < Duration::from_millis(1), "{lost:?}");
        assert_eq!(
            waits.see(30 << 20, 150 * MS, TICK, false),
            Duration::ZERO,
            "cheaper than usual"
        );
        let lost = waits.see(30 << 20, 190 * MS, TICK, false);
        assert_eq!(lost, Duration::from_millis(40), "it waits for the disk");
    }

    #[test]
    fn nobody_loses_more_time_than_there_is() {
        let mut waits = Waits::default();
        assert_eq!(waits.see(0, 900 * MS, TICK, false), TICK);
        assert_eq!(waits.see(0, 0, TICK, false), Duration::ZERO, "counters that begin anew");
    }

    #[test]
    fn a_buffer_has_room_up_to_a_share_of_it() {
        assert!(has_room(64 << 20, 100 << 20) && !has_room(66 << 20, 100 << 20));
        assert!(!has_room(0, 0));
    }
}
