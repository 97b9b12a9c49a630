//! What livesnap's BPF programs have in common. Each file in `bin/` becomes one object with programs and the
//! maps that they use; the loader (`ebpf/src`) loads those programs of it that it wants.
//!
//! The programs run in the kernel: on the thread that faults, inside its fault.

#![no_std]
// For `atomic`; aya-ebpf uses it as well.
#![feature(asm_experimental_arch)]

mod atomic;
pub mod disk;
pub mod stall;

/// What every file in `bin/` ends with.
#[macro_export]
macro_rules! program_file {
    () => {
        /// Never reached: the verifier takes no program that could panic.
        #[panic_handler]
        fn panic(_: &core::panic::PanicInfo) -> ! {
            loop {}
        }

        /// Some of the kernel's helpers are for free software only.
        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
    };
}
