//! How fast a running guest dirties its memory: measured on a random sample, without a snapshot.
//!
//! ```text
//! sample     which chunks of RAM are looked at in a window               (pure)
//! sampler    protects them, waits, counts what was written, lets go      (the caller's thread)
//! estimate   from the counts to a rate with its error                    (pure)
//! ```
//!
//! The figure is *bytes of pages first written to in the window, per second*: a page that is written to over and over
//! counts once a window, so a longer window shows a lower rate. It counts at the granularity at which the kernel
//! protects, which is also what a snapshot would have to copy:
//!
//! | memory | a write counts as | how |
//! | --- | --- | --- |
//! | anonymous or shared, in small pages | 4 KiB | the write goes through by itself (`WP_ASYNC`) and the page map remembers it |
//! | anonymous, in transparent huge pages | 2 MiB | the write waits until this thread has made the huge page writable: `WP_ASYNC` would split it |
//! | shared, in transparent huge pages | 4 KiB | as small pages; the kernel maps such memory by small pages when it is protected |
//! | pool of huge pages | its page size | as small pages |
//!
//! A guest cannot be harmed: memory is protected in the sample only and for a window only, pages that do not exist in
//! anonymous memory are left alone, and when the [`Sampler`] is dropped, or its process is killed, the kernel lifts
//! the protection and wakes whoever waits.

mod estimate;
mod sample;
mod sampler;

use std::io;

pub use estimate::Estimate;
pub(crate) use sample::Random;
pub use sampler::{Sampler, SamplerOptions, Window};

use crate::Reason;
use crate::address::HostVirtAddr;
use crate::mappings::MappingError;
use crate::vmm::VmmError;

/// Why the dirty rate is not known. The guest is unprotected.
#[derive(Debug, thiserror::Error)]
pub enum DirtyRateError {
    /// No `WP_ASYNC`.
    #[error(
        "the dirty rate needs Linux 6.7 or later: this kernel cannot let writes to protected memory through and remember them; QEMU's own calc-dirty-rate estimates it there"
    )]
    Kernel,
    /// The VMM refused.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The memory's mappings are not known.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The process that owns the memory has ended.
    #[error("process {pid}, whose memory was watched, has ended")]
    Ended {
        /// The process.
        pid: i32,
    },
    /// `EBUSY`.
    #[error(
        "another userfaultfd covers guest RAM at {start}: a snapshot or a migration has begun; watch again when it is over"
    )]
    Taken {
        /// First address of the chunk.
        start: HostVirtAddr,
    },
    /// A system call failed.
    #[error(
        "cannot {doing} of process {pid}: {source}: check that livesnap is root, and that no memory was unplugged meanwhile"
    )]
    System {
        /// What was tried.
        doing: &'static str,
        /// The process.
        pid: i32,
        /// Errno.
        source: io::Error,
    },
}

impl DirtyRateError {
    /// Stable code.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Kernel => Reason::KernelUnfit,
            Self::Vmm(error) => error.reason,
            Self::Mapping(_) => Reason::NoProcess,
            Self::Ended { .. } => Reason::VmmDied,
            Self::Taken { .. } => Reason::ForeignUserfaultfd,
            Self::System { .. } => Reason::Memory,
        }
    }
}
