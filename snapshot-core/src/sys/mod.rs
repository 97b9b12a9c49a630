//! System calls on raw addresses, each behind a safe function with its preconditions checked.

pub mod ptrace;
pub mod signals;
