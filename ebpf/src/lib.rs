//! Probes: what a running snapshot costs its guest, measured in the kernel by BPF programs.
//!
//! The first thing that is measured is the *stall*: the whole time that a write-protect fault keeps a thread, from
//! the processor's exception until the thread goes on, the way to the handler and back included. The handler itself
//! can only see its own part of it.
//!
//! ```no_run
//! use livesnap_ebpf::{Options, Probes, Range};
//!
//! let ram = Range { start: 0x7f00_0000_0000, len_bytes: 1 << 30 };
//! let mut probes = Probes::attach(4711, &[ram], &Options::default())?;
//! // ... RAM is protected, a snapshot begins ...
//! probes.mark()?;
//! // ... it goes on ...
//! let reading = probes.read()?;
//! eprintln!("{}: {:?}", probes.tier(), reading.stalls.after().summary());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Kernels differ in what they let a tracing program do, so there are several ways to the same figures, called
//! [`Tier`]s. [`Probes::attach`] tries them, best first, and keeps why each better one was refused.
//!
//! | module | what it is |
//! | --- | --- |
//! | `probes` | attaching, reading, detaching |
//! | `tier` | the ways to attach, best first, and why one is refused |
//! | `objects` | the programs, compiled by `build.rs` from `programs/` |
//! | `btf` | where the members of the kernel's structures lie |
//! | `tracefs` | where the fields of tracepoints' records lie |
//! | `disk` | requests on the disks of a directory |
//! | `device` | which disks these are |
//! | `ranges` | which addresses count |
//! | `reading` | what was counted, as plain structures |

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod btf;
mod device;
pub mod disk;
mod objects;
mod probes;
mod ranges;
mod reading;
mod tier;
mod tracefs;

pub use device::{DeviceError, Disk};
#[cfg(feature = "controls")]
pub use probes::Controls;
pub use probes::{Options, ProbeError, Probes};
pub use ranges::Range;
pub use reading::{Histogram, Kind, Lost, Mode, Period, Reading, Stalls, Summary, ThreadStalls};
pub use tier::{Cause, Refusal, Tier, join};
