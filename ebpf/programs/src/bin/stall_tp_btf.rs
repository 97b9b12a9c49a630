//! Stalls by BTF tracepoints: a fault starts at `exceptions:page_fault_user` or `page_fault_kernel`, is
//! remembered in the thread's own storage, and ends at the page-fault event of perf.

#![no_std]
#![no_main]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_F_NO_PREALLOC, BPF_LOCAL_STORAGE_GET_F_CREATE, bpf_map_type::BPF_MAP_TYPE_TASK_STORAGE,
    bpf_perf_event_data,
};
use aya_ebpf::helpers::{bpf_get_current_task_btf, generated::bpf_task_storage_get};
use aya_ebpf::macros::{btf_map, btf_tracepoint, perf_event};
use aya_ebpf::programs::{BtfTracePointContext, PerfEventContext};
use livesnap_ebpf_common::{MODE_KERNEL, MODE_USER, Mode, Start, counter};
use livesnap_ebpf_programs::stall::{is_in_ranges, is_write_protect, thread_of_interest};

livesnap_ebpf_programs::stall_maps!();

/// A map of kind task storage, which aya has no type for: its fields are what the loader reads from BTF.
#[repr(C)]
struct TaskStorage<T> {
    r#type: *const [i32; BPF_MAP_TYPE_TASK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; BPF_F_NO_PREALLOC as usize],
}

// SAFETY: only its address is used; the kernel synchronises what lies behind it.
unsafe impl<T> Sync for TaskStorage<T> {}

impl<T> TaskStorage<T> {
    const fn new() -> Self {
        Self {
            r#type: core::ptr::null(),
            key: core::ptr::null(),
            value: core::ptr::null(),
            max_entries: core::ptr::null(),
            map_flags: core::ptr::null(),
        }
    }

    /// The running thread's value; with `BPF_LOCAL_STORAGE_GET_F_CREATE` it is made, of zeros, if there is none.
    #[inline(always)]
    fn of_this_thread(&'static self, flags: u32) -> Option<&'static mut T> {
        // SAFETY: a helper without preconditions.
        let task = unsafe { bpf_get_current_task_btf() };
        let map = core::ptr::from_ref(self).cast_mut().cast();
        // SAFETY: the map is of this kind, and the task is running.
        let value =
            unsafe { bpf_task_storage_get(map, task, core::ptr::null_mut(), u64::from(flags)) };
        // SAFETY: null, or the value of this thread, which no other touches.
        unsafe { value.cast::<T>().as_mut() }
    }
}

#[btf_map]
static STARTS: TaskStorage<Start> = TaskStorage::new();

#[btf_tracepoint]
pub fn page_fault_user(ctx: BtfTracePointContext) -> i32 {
    start(&ctx, MODE_USER)
}

#[btf_tracepoint]
pub fn page_fault_kernel(ctx: BtfTracePointContext) -> i32 {
    start(&ctx, MODE_KERNEL)
}

#[inline(always)]
fn start(ctx: &BtfTracePointContext, mode: Mode) -> i32 {
    if thread_of_interest().is_none() {
        return 0;
    }
    let (address, error_code) = (ctx.arg::<u64>(0), ctx.arg::<u64>(2));
    if !is_write_protect(address, error_code) {
        return 0;
    }
    match STARTS.of_this_thread(BPF_LOCAL_STORAGE_GET_F_CREATE) {
        Some(start) => MAPS.begin(start, address, mode),
        None => MAPS.count(counter::MAP_FULL),
    }
    0
}

/// A page fault is done: the event tells at which address.
#[perf_event]
pub fn page_fault_end(ctx: PerfEventContext) -> i32 {
    let Some(tid) = thread_of_interest() else { return 0 };
    // SAFETY: the context of this kind of program.
    let address = unsafe { (*ctx.as_ptr().cast::<bpf_perf_event_data>()).addr };
    if !is_in_ranges(address) {
        return 0;
    }
    match STARTS.of_this_thread(0) {
        Some(start) if start.at_ns != 0 && start.address == address => MAPS.end(start, tid),
        _ => MAPS.count(counter::END_WITHOUT_START),
    }
    0
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
