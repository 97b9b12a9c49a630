//! The atomics of the state machines that are model-checked: the model checker puts its own in their place.

pub use std::sync::atomic::{AtomicU64, Ordering};
