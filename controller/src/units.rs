//! Numbers from one unit, or kind, to another.

use std::time::Duration;

/// A duration in nanoseconds; what does not fit is centuries.
pub fn as_nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A count of nanoseconds, microseconds or bytes, to calculate with.
#[expect(clippy::cast_precision_loss, reason = "2^53 nanoseconds are a hundred days")]
pub const fn number(count: u64) -> f64 {
    count as f64
}

/// A count again; what is none becomes the nearest one.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
pub const fn whole(number: f64) -> u64 {
    number as u64
}

/// A share for people.
pub fn percent(ratio: f64) -> String {
    format!("{:.0} %", ratio * 100.0)
}
