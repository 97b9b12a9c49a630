//! QEMU, driven from outside through its monitor.

pub mod qmp;
