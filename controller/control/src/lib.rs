//! The control core: *will this snapshot finish within what the operator allows, and if not, what is the least
//! that must be taken from the guest?*
//!
//! ```text
//!             sample::check          model               forecast             step
//!   Sample ───────────────▶ Seen ───────────▶ Fit ───────────────▶ Forecast ───────▶ Command
//!     │ lost, stale, absurd          rates, depletion,     peak buffer, overflow,   buffer limit,
//!     └───────▶ a named safe command  their uncertainty     completion              CPU shares, abort
//! ```
//!
//! It is pure: it reads no clock, does no input or output, and allocates only when a [`Controller`] is made. The same
//! samples give the same commands, so any run can be replayed. Whoever owns the [`Controller`] calls
//! [`Controller::step`] once in every period, from one thread, with what was measured, or with nothing if nothing was.
//!
//! A command is a *level*, not a change: it holds all that shall be in force. One that gets lost is made good by the
//! next.
//!
//! `docs/controller.md` derives the law and says how well it does against an oracle.

#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

extern crate alloc;

pub mod forecast;
mod kept;
pub mod model;
pub mod plan;
pub mod policy;
#[cfg(feature = "serde")]
pub mod record;
pub mod sample;
mod stalls;
mod step;
pub mod vcpu;

pub use forecast::Forecast;
pub use plan::{Plan, PlanInputs, Verdict, plan};
pub use policy::{OnInfeasible, Policy, PolicyError, WINDOW_S};
pub use sample::{Absurdity, Host, Sample, Stall, Vcpu};
pub use step::{Abort, AbortReason, Because, Command, Controller, TICK_S};

/// Nanoseconds in a second.
pub(crate) const NS_PER_S: f64 = 1e9;

/// A count of bytes as a number to calculate with; exact up to 8 PiB.
#[expect(clippy::cast_precision_loss, reason = "no machine has that much memory")]
pub(crate) const fn number(count: u64) -> f64 {
    count as f64
}

/// A number of bytes as a count; what is no count becomes the nearest one.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
pub(crate) const fn count(number: f64) -> u64 {
    number as u64
}
