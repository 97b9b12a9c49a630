//! What was measured, and whether to believe it.
//!
//! Counters only grow and are differenced here, so that a lost sample loses precision, but no bytes.

use crate::number;

/// Age beyond which a sample no longer says how things are, in nanoseconds.
pub const AGE_NS_MAX: u64 = 500_000_000;

/// Samples refused one after the other from which on the counters are taken to have begun anew.
const REBASE_AFTER: u32 = 3;

/// The state of a snapshot while it copies, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Sample {
    /// When the counters were read, on any clock that only goes forward, in nanoseconds.
    pub taken_ns: u64,
    /// How long ago that is now, in nanoseconds.
    pub age_ns: u64,
    /// Length of RAM in bytes.
    pub total_bytes: u64,
    /// Bytes saved so far, by anybody, holes included.
    pub saved_bytes: u64,
    /// Of these, bytes that faults brought into the buffer.
    pub touched_bytes: u64,
    /// Bytes that have left the buffer since the consistency point: written, or found to be zero.
    pub drained_bytes: u64,
    /// Copy buffer in use, in bytes.
    pub buffer_used_bytes: u64,
    /// Its bound now, in bytes.
    pub buffer_limit_bytes: u64,
    /// Fault stalls since the last sample, if probes measure them.
    pub stall: Option<Stall>,
    /// Memory of the host, if it was read.
    pub host: Option<Host>,
}

/// What one virtual CPU has done so far. Counters, taken with the sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Vcpu {
    /// Bytes saved because it wrote to them first.
    pub touched_bytes: u64,
    /// How long it would have run if nobody had held it back, in nanoseconds.
    pub wanted_ns: u64,
    /// For how much of this it did run, in nanoseconds: no throttle withheld it, nor was it lost because the buffer was full or
    /// nearly so (waits for faults beyond what the same bytes cost while there is room).
    pub kept_ns: u64,
}

/// Fault stalls, as the guest sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Stall {
    /// Faults that ended.
    pub faults: u64,
    /// Of these, how many took longer than the policy allows.
    pub over_limit: u64,
    /// Events that the probes lost.
    pub lost_events: u64,
}

/// Memory of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Host {
    /// `MemAvailable` in bytes.
    pub available_bytes: u64,
    /// Share of time in which some task waited for memory (`some avg10` of `/proc/pressure/memory`, over 100).
    pub memory_pressure_ratio: f64,
}

/// Why a sample is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Absurdity {
    /// The period is not a number above zero, or longer than any pause of the sampler could be.
    Period,
    /// Taken before the sample before it.
    TimeBackwards,
    /// A counter is less than it was.
    CounterBackwards,
    /// A counter grew by more than all of RAM, or there is more saved than RAM.
    CounterJump,
    /// More in the buffer than it holds.
    Buffer,
    /// A ratio that is no number, or negative.
    Ratio,
}

/// What is wrong with a tick's sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blindness {
    Lost,
    Stale,
    Absurd(Absurdity),
}

/// What happened between two samples that are believed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Seen {
    /// Time between them, in seconds.
    pub elapsed_s: f64,
    /// Bytes that entered the buffer by faults.
    pub touched_bytes: f64,
    /// Bytes that left the buffer.
    pub drained_bytes: f64,
    /// The later of the two.
    pub now: Sample,
}

/// The last sample that was believed, and how many were not since then.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Baseline {
    last: Option<Sample>,
    refused: u32,
}

impl Baseline {
    /// Compares with the last good sample; nothing on the first one, which has none before it.
    pub fn see(&mut self, sample: Option<&Sample>, dt_s: f64) -> Result<Option<Seen>, Blindness> {
        if !(dt_s > 0.0 && dt_s < 10.0) {
            return Err(Blindness::Absurd(Absurdity::Period));
        }
        let now = *sample.ok_or(Blindness::Lost)?;
        if now.age_ns > AGE_NS_MAX {
            return Err(Blindness::Stale);
        }
        match self.compare(&now) {
            Ok(seen) => {
                self.last = Some(now);
                self.refused = 0;
                Ok(seen)
            }
            Err(Blindness::Absurd(absurdity)) => {
                self.refused += 1;
                let makes_sense_alone = alone(&now).is_ok();
                if self.refused >= REBASE_AFTER && makes_sense_alone {
                    *self = Self { last: Some(now), refused: 0 };
                }
                Err(Blindness::Absurd(absurdity))
            }
            Err(other) => Err(other),
        }
    }

    fn compare(&self, now: &Sample) -> Result<Option<Seen>, Blindness> {
        alone(now).map_err(Blindness::Absurd)?;
        let Some(last) = self.last else { return Ok(None) };
        if now.taken_ns == last.taken_ns {
            return Err(Blindness::Stale);
        }
        let elapsed_ns = now
            .taken_ns
            .checked_sub(last.taken_ns)
            .ok_or(Blindness::Absurd(Absurdity::TimeBackwards))?;
        let grown = |now: u64, last: u64| match now.checked_sub(last) {
            Some(bytes) => Ok(bytes),
            None => Err(Blindness::Absurd(Absurdity::CounterBackwards)),
        };
        grown(now.saved_bytes, last.saved_bytes)?;
        let touched = grown(now.touched_bytes, last.touched_bytes)?;
        let drained = grown(now.drained_bytes, last.drained_bytes)?;
        if touched.max(drained) > now.total_bytes {
            return Err(Blindness::Absurd(Absurdity::CounterJump));
        }
        Ok(Some(Seen {
            elapsed_s: number(elapsed_ns) / crate::NS_PER_S,
            touched_bytes: number(touched),
            drained_bytes: number(drained),
            now: *now,
        }))
    }
}

/// What can be told from one sample alone.
fn alone(sample: &Sample) -> Result<(), Absurdity> {
    let pressure = sample.host.map(|host| host.memory_pressure_ratio);
    if pressure.is_some_and(|ratio| !(ratio.is_finite() && ratio >= 0.0)) {
        return Err(Absurdity::Ratio);
    }
    // A buffer that was made smaller holds more than its bound until the disk has taken it.
    if sample.buffer_limit_bytes == 0
        || sample.buffer_used_bytes > sample.total_bytes.max(sample.buffer_limit_bytes)
    {
        return Err(Absurdity::Buffer);
    }
    if sample.saved_bytes > sample.total_bytes {
        return Err(Absurdity::CounterJump);
    }
    Ok(())
}
