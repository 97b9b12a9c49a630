//! What livesnap's BPF programs have in common. Each file in `bin/` becomes one object with programs and the
//! maps that they use; the loader (`ebpf/src`) takes the one that the kernel accepts.
//!
//! The programs run in the kernel: on the thread that faults, inside its fault.

#![no_std]
// For `atomic`; aya-ebpf uses it as well.
#![feature(asm_experimental_arch)]

mod atomic;
pub mod disk;
pub mod stall;
