//! What the guest writes to its RAM and disk, and how anybody proves later that it is one instant.
//!
//! The guest program (`main.rs`) writes these pages; the offline checker of the tests package reads
//! them back from a snapshot. Both use this one definition.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod page;
pub mod status;
