//! What the controller acts on, and how all of it is put back.
//!
//! ```text
//! journal    what was found before anything was changed, in a file that survives this process
//! demand     how much CPU time a virtual CPU would use
//! throttle   the virtual CPUs' share of it
//! ```
//!
//! Owned by the thread that runs the snapshot. Everything is put back when the [`Throttle`] is dropped; by the
//! guard process after a `kill -9`; and by the next livesnap if the guard was killed too.

mod demand;
mod journal;
#[cfg(test)]
mod tests;
mod throttle;

pub use journal::{default_directory, in_words, leftovers, repair, repair_after};
pub use throttle::{SHARE_MIN, Throttle, Used, withheld_ratio};
