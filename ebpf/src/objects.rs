//! The BPF programs, compiled by `build.rs`. Empty where the build had no compiler for them.

use aya::include_bytes_aligned;

/// Raw tracepoints of the block layer.
pub const DISK_RAW_TP: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/disk_raw_tp.o"));

/// Tracepoints of the block layer.
pub const DISK_TRACEPOINT: &[u8] =
    include_bytes_aligned!(concat!(env!("OUT_DIR"), "/disk_tracepoint.o"));

/// All tiers but that of BTF tracepoints.
pub const STALL: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/stall.o"));

/// BTF tracepoints and task storage.
pub const STALL_TP_BTF: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/stall_tp_btf.o"));
