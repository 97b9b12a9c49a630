//! The lines of a recorded run: what was seen and what was commanded, so that any run can be put through the control core
//! again. Whoever runs it writes them, the simulator reads them; the crate itself does neither.

use alloc::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::{Command, Policy, Sample, Vcpu};

/// The first line.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// The limits.
    pub policy: Policy,
    /// Number of virtual CPUs.
    pub vcpus: usize,
}

/// Each further line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tick<'a> {
    /// Limits that came into force with it, if the operator changed them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    /// Length of the tick in seconds.
    pub dt_s: f64,
    /// What was seen; nothing if it was lost.
    pub sample: Option<Sample>,
    /// What each virtual CPU has done so far; empty if that is not known.
    pub vcpus: Cow<'a, [Vcpu]>,
    /// What was commanded.
    pub command: Command,
    /// The share of each virtual CPU.
    pub shares: Cow<'a, [f64]>,
}
