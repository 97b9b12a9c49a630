//! System calls on raw addresses and raw memory, each behind a safe function.
//!
//! The only module that may use `unsafe`. Nothing here decides anything: policy lives in the callers.

pub mod io_priority;
pub mod memory;
pub mod pagemap_scan;
pub mod ptrace;
pub mod signals;
#[cfg(any(test, feature = "test-guest"))]
pub mod test_kvm;
#[cfg(any(test, feature = "test-guest"))]
pub mod test_memory;
pub mod uffd;
pub mod uring;
