//! What the programs of the guest share with each other and with who reads their pages.
//!
//! `page` and `status` are what the guest program (`main.rs`) writes to its RAM and disk, and how anybody proves later
//! that it is one instant: the offline checker of the tests package reads them back from a snapshot. Both use this
//! one definition. `boot` is what every init program begins with.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod boot;
pub mod page;
pub mod status;
