//! What the operator allows: limits, and what to do when they cannot be kept.

use core::fmt;

/// Most of the copy buffer where the operator says nothing, in bytes.
pub const BUFFER_BYTES_DEFAULT: u64 = 1 << 30;

/// Least copy buffer that can work: some extents of 2 MiB for the sweep and for each fault thread, in bytes.
pub const BUFFER_BYTES_MIN: u64 = 64 << 20;

/// Length of the window in which `min_cpu_ratio` counts, in seconds.
pub const WINDOW_S: f64 = 1.0;

/// Part of `min_cpu_ratio` below which it is broken: over a second it may be short by a quarter.
const KEPT_TOLERANCE_RATIO: f64 = 0.75;

/// What to do when the limits cannot be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum OnInfeasible {
    /// Give the snapshot up, early.
    #[default]
    Abort,
    /// Go on, and let writes wait for room in the buffer. The throttle takes no more than brings writers to
    /// `min_cpu_ratio`, what they wait included.
    Wait,
}

/// The limits that a snapshot has to keep.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Policy {
    /// Most memory that the copy buffer may take, in bytes.
    pub buffer_bytes_max: u64,
    /// Longest stall of 99 in 100 write faults, in nanoseconds.
    pub fault_stall_max_ns: u64,
    /// Least CPU time that each virtual CPU keeps, as a share of what it would have: above 0, up to 1.
    pub min_cpu_ratio: f64,
    /// Longest time from the consistency point until all is saved, in nanoseconds.
    pub deadline_ns: Option<u64>,
    /// What to do when these cannot be kept.
    pub on_infeasible: OnInfeasible,
}

impl Policy {
    /// The defaults for a host with so much memory available (`MemAvailable`, in bytes).
    #[must_use]
    pub const fn for_host(available_bytes: u64) -> Self {
        let tenth = available_bytes / 10;
        let bytes = if tenth < BUFFER_BYTES_DEFAULT { tenth } else { BUFFER_BYTES_DEFAULT };
        Self {
            buffer_bytes_max: if bytes > BUFFER_BYTES_MIN { bytes } else { BUFFER_BYTES_MIN },
            fault_stall_max_ns: 10_000_000,
            min_cpu_ratio: 0.3,
            deadline_ns: None,
            on_infeasible: OnInfeasible::Abort,
        }
    }

    /// Share of their CPU time that writers have to keep in any second of [`WINDOW_S`]; less breaks `min_cpu_ratio`.
    #[must_use]
    pub const fn kept_ratio_min(&self) -> f64 {
        self.min_cpu_ratio * KEPT_TOLERANCE_RATIO
    }

    /// Whether it can be kept at all.
    ///
    /// # Errors
    /// The first field that makes no sense, with its value.
    pub fn check(&self) -> Result<(), PolicyError> {
        if self.buffer_bytes_max < BUFFER_BYTES_MIN {
            return Err(PolicyError::Buffer { bytes: self.buffer_bytes_max });
        }
        // So that NaN is refused as well.
        if !(self.min_cpu_ratio > 0.0 && self.min_cpu_ratio <= 1.0) {
            return Err(PolicyError::MinCpu { ratio: self.min_cpu_ratio });
        }
        if self.fault_stall_max_ns == 0 {
            return Err(PolicyError::FaultStall);
        }
        if self.deadline_ns == Some(0) {
            return Err(PolicyError::Deadline);
        }
        Ok(())
    }
}

/// A policy that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PolicyError {
    /// The buffer cannot work in so little memory.
    Buffer {
        /// What was allowed.
        bytes: u64,
    },
    /// Not a share.
    MinCpu {
        /// What was given.
        ratio: f64,
    },
    /// No fault takes no time.
    FaultStall,
    /// No snapshot takes no time.
    Deadline,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Buffer { bytes } => write!(
                to,
                "buffer_bytes_max is {bytes}, but the copy buffer needs at least {BUFFER_BYTES_MIN} bytes"
            ),
            Self::MinCpu { ratio } => write!(
                to,
                "min_cpu_ratio is {ratio}, but must be above 0, so that the guest goes on, and at most 1"
            ),
            Self::FaultStall => write!(
                to,
                "fault_stall_max_ns is 0, but every fault takes some microseconds; use 10000000 for 10 ms"
            ),
            Self::Deadline => {
                write!(to, "deadline_ns is 0, which no snapshot can keep; leave it out for none")
            }
        }
    }
}

impl core::error::Error for PolicyError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_make_sense_on_any_host() {
        for available in [0, 1 << 30, 1 << 33, 1 << 40] {
            let policy = Policy::for_host(available);
            assert_eq!(policy.check(), Ok(()), "{available} bytes available");
        }
        assert_eq!(Policy::for_host(4 << 30).buffer_bytes_max, (4 << 30) / 10);
        assert_eq!(Policy::for_host(1 << 40).buffer_bytes_max, 1 << 30);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let good = Policy::for_host(1 << 34);
        assert!(Policy { buffer_bytes_max: 1, ..good }.check().is_err());
        for ratio in [0.0, -1.0, 1.1, f64::NAN, f64::INFINITY] {
            assert!(Policy { min_cpu_ratio: ratio, ..good }.check().is_err(), "{ratio}");
        }
        assert!(Policy { fault_stall_max_ns: 0, ..good }.check().is_err());
        assert!(Policy { deadline_ns: Some(0), ..good }.check().is_err());
    }
}
