//! Stalls by BTF tracepoints: a fault starts at `exceptions:page_fault_user` or `page_fault_kernel`, is
//! remembered in the thread's own storage, and ends at the page-fault event of perf.

#![no_std]
#![no_main]

use aya_ebpf::bindings::{
    BPF_F_NO_PREALLOC, BPF_LOCAL_STORAGE_GET_F_CREATE, bpf_map_type::BPF_MAP_TYPE_TASK_STORAGE,
};
use aya_ebpf::helpers::{bpf_get_current_task_btf, generated::bpf_task_storage_get};
use aya_ebpf::macros::{btf_map, btf_tracepoint, perf_event};
use aya_ebpf::programs::{BtfTracePointContext, PerfEventContext};
use livesnap_ebpf_common::{MODE_KERNEL, MODE_USER, Start};
use livesnap_ebpf_programs::stall::{self, Starts};

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

impl Starts for TaskStorage<Start> {
    #[inline(always)]
    fn of_thread(&'static self, _: u32) -> Option<&'static mut Start> {
        self.of_this_thread(0)
    }

    #[inline(always)]
    fn of_thread_or_new(&'static self, _: u32) -> Option<&'static mut Start> {
        self.of_this_thread(BPF_LOCAL_STORAGE_GET_F_CREATE)
    }
}

#[btf_map]
static STARTS: TaskStorage<Start> = TaskStorage::new();

#[btf_tracepoint]
pub fn page_fault_user(ctx: BtfTracePointContext) -> i32 {
    stall::exception(&MAPS, &STARTS, MODE_USER, ctx.arg(0), ctx.arg(2));
    0
}

#[btf_tracepoint]
pub fn page_fault_kernel(ctx: BtfTracePointContext) -> i32 {
    stall::exception(&MAPS, &STARTS, MODE_KERNEL, ctx.arg(0), ctx.arg(2));
    0
}

// The loader cannot find BTF tracepoints of modules, which KVM may be.
livesnap_ebpf_programs::stall_raw_kvm!();

#[perf_event]
pub fn page_fault_end(ctx: PerfEventContext) -> i32 {
    stall::page_fault_end(&MAPS, &STARTS, &ctx);
    0
}

livesnap_ebpf_programs::program_file!();
