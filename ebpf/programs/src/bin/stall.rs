//! Stalls where BTF tracepoints are not to be had, or where the kernel's own function can be watched. Starts are
//! remembered by thread id. Each tier of the loader takes two or three of these programs.

#![no_std]
#![no_main]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::{
    btf_map, fentry, fexit, kprobe, kretprobe, perf_event, raw_tracepoint, tracepoint,
};
use aya_ebpf::programs::{
    FEntryContext, FExitContext, PerfEventContext, ProbeContext, RawTracePointContext,
    RetProbeContext, TracePointContext,
};
use livesnap_ebpf_common::{MODE_KERNEL, MODE_USER};
use livesnap_ebpf_programs::stall::{
    self, Starts as _, StartsByThread, is_in_ranges, thread_of_interest,
};

livesnap_ebpf_programs::stall_maps!();

#[btf_map]
static STARTS: StartsByThread = StartsByThread::new();

/// `handle_userfault`'s reason for a write-protect fault (`VM_UFFD_WP` in linux/mm.h).
const VM_UFFD_WP: u64 = 0x1000;
/// In `vm_fault::flags`: the access came from user mode (`FAULT_FLAG_USER` in linux/mm_types.h).
const FAULT_FLAG_USER: u32 = 0x40;
/// The same: rather than wait, come back at once (`FAULT_FLAG_RETRY_NOWAIT`). KVM asks so first, and then again.
const FAULT_FLAG_RETRY_NOWAIT: u32 = 0x8;

/// Where these members lie in the kernel's `struct vm_fault`; set by the loader.
#[unsafe(no_mangle)]
static VM_FAULT_ADDRESS: u32 = 0;
#[unsafe(no_mangle)]
static VM_FAULT_FLAGS: u32 = 0;
/// Where KVM's error code lies in the record of `kvm_page_fault`; set by the loader.
#[unsafe(no_mangle)]
static KVM_ERROR_CODE: u32 = 0;

#[raw_tracepoint]
pub fn raw_page_fault_user(ctx: RawTracePointContext) -> i32 {
    stall::exception(&MAPS, &STARTS, MODE_USER, ctx.arg(0), ctx.arg(2));
    0
}

#[raw_tracepoint]
pub fn raw_page_fault_kernel(ctx: RawTracePointContext) -> i32 {
    stall::exception(&MAPS, &STARTS, MODE_KERNEL, ctx.arg(0), ctx.arg(2));
    0
}

#[tracepoint]
pub fn trace_page_fault_user(ctx: TracePointContext) -> u32 {
    trace_page_fault(&ctx, MODE_USER)
}

#[tracepoint]
pub fn trace_page_fault_kernel(ctx: TracePointContext) -> u32 {
    trace_page_fault(&ctx, MODE_KERNEL)
}

/// The record of the exceptions' tracepoints (asm/trace/exceptions.h): eight bytes that all records have, address,
/// instruction pointer, error code.
#[repr(C)]
struct ExceptionRecord {
    common: u64,
    address: u64,
    instruction: u64,
    error_code: u64,
}

#[inline(always)]
fn trace_page_fault(ctx: &TracePointContext, mode: u32) -> u32 {
    let record = ctx.as_ptr().cast::<ExceptionRecord>();
    // SAFETY: the context of this tracepoint is its record.
    let address = unsafe { (*record).address };
    // SAFETY: the same.
    let error_code = unsafe { (*record).error_code };
    stall::exception(&MAPS, &STARTS, mode, address, error_code);
    0
}

livesnap_ebpf_programs::stall_raw_kvm!();

#[tracepoint]
pub fn trace_kvm_page_fault(ctx: TracePointContext) -> u32 {
    // SAFETY: a static of ours; volatile because the loader sets it in the object, unseen by the compiler.
    let offset = unsafe { core::ptr::read_volatile(&raw const KVM_ERROR_CODE) };
    // SAFETY: the helper checks the address that it reads from.
    if let Ok(code) = unsafe { ctx.read_at::<u64>(offset as usize) } {
        stall::guest_faults(&MAPS, &STARTS, code);
    }
    0
}

#[tracepoint]
pub fn trace_kvm_entry(_: TracePointContext) -> u32 {
    stall::guest_goes_on(&MAPS, &STARTS);
    0
}

#[tracepoint]
pub fn trace_kvm_userspace_exit(_: TracePointContext) -> u32 {
    stall::guest_is_left(&MAPS, &STARTS);
    0
}

/// The end of a fault that one of the exceptions above began.
#[perf_event]
pub fn page_fault_end(ctx: PerfEventContext) -> i32 {
    stall::page_fault_end(&MAPS, &STARTS, &ctx);
    0
}

#[fentry]
pub fn fentry_handle_userfault(ctx: FEntryContext) -> i32 {
    wait_begins(ctx.arg(0), ctx.arg(1));
    0
}

#[fexit]
pub fn fexit_handle_userfault(_: FExitContext) -> i32 {
    wait_ends();
    0
}

#[kprobe]
pub fn kprobe_handle_userfault(ctx: ProbeContext) -> u32 {
    if let (Some(vm_fault), Some(reason)) = (ctx.arg(0), ctx.arg(1)) {
        wait_begins(vm_fault, reason);
    }
    0
}

#[kretprobe]
pub fn kretprobe_handle_userfault(_: RetProbeContext) -> u32 {
    wait_ends();
    0
}

/// A thread is about to wait for a userfaultfd.
#[inline(always)]
fn wait_begins(vm_fault: u64, reason: u64) {
    let Some(tid) = thread_of_interest() else { return };
    if reason & VM_UFFD_WP == 0 {
        return;
    }
    // SAFETY: a static of ours; volatile because the loader sets it in the object, unseen by the compiler.
    let address_offset = unsafe { core::ptr::read_volatile(&raw const VM_FAULT_ADDRESS) };
    // SAFETY: the same.
    let flags_offset = unsafe { core::ptr::read_volatile(&raw const VM_FAULT_FLAGS) };
    let member = |offset: u32| (vm_fault + u64::from(offset)) as *const u8;
    // SAFETY: the helper checks the address that it reads from.
    let Ok(address) = (unsafe { bpf_probe_read_kernel(member(address_offset).cast::<u64>()) })
    else {
        return;
    };
    // SAFETY: the same.
    let Ok(flags) = (unsafe { bpf_probe_read_kernel(member(flags_offset).cast::<u32>()) }) else {
        return;
    };
    if flags & FAULT_FLAG_RETRY_NOWAIT == 0 && is_in_ranges(address) {
        let mode = if flags & FAULT_FLAG_USER != 0 { MODE_USER } else { MODE_KERNEL };
        stall::begin(&MAPS, &STARTS, tid, address, mode);
    }
}

/// It need not wait any more. Reasons other than write protection have no start.
#[inline(always)]
fn wait_ends() {
    let Some(tid) = thread_of_interest() else { return };
    if let Some(start) = STARTS.of_thread(tid)
        && start.at_ns != 0
    {
        MAPS.end(start, tid);
    }
}

livesnap_ebpf_programs::program_file!();
