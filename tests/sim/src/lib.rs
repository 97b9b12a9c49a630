//! A deterministic plant, guest and disk and copy buffer, that judges the very control core which livesnap runs.
//!
//! ```text
//!   seed ──▶ scenario ──▶ plant ◀──── shares, buffer limit ──── law: the controller, or a peer
//!                           │                                    ▲
//!                           └──── sampler: late, lost ───────────┘
//! ```
//!
//! Everything follows from the seed: a run is repeated by its number, and every law meets the same guest and disk.
//! Run by `cargo xtask sim` and, with fewer seeds, by `cargo test`.

#![forbid(unsafe_code)]

pub mod judge;
pub mod law;
pub mod oracle;
pub mod plant;
pub mod random;
pub mod record;
pub mod sampler;
pub mod scenario;
pub mod series;
pub mod table;
