//! Requests on disks by raw tracepoints of the block layer, whose arguments are the kernel's own structures. Where
//! in them the fields are tells the loader.

#![no_std]
#![no_main]

use aya_ebpf::macros::{btf_map, raw_tracepoint};
use aya_ebpf::programs::RawTracePointContext;
use livesnap_ebpf_common::disk::{counter, disk_number, offset};
use livesnap_ebpf_programs::disk::{is_of_interest, operation, read};

livesnap_ebpf_programs::disk_maps!();

/// See `offset`; set by the loader.
#[unsafe(no_mangle)]
static OFFSETS: [u32; offset::COUNT] = [0; offset::COUNT];

#[raw_tracepoint]
pub fn block_rq_insert(ctx: RawTracePointContext) -> i32 {
    let request = request(&ctx);
    if is_of_interest(disk(request)) {
        MAPS.insert(request);
    }
    0
}

#[raw_tracepoint]
pub fn block_rq_merge(ctx: RawTracePointContext) -> i32 {
    MAPS.merge(request(&ctx));
    0
}

#[raw_tracepoint]
pub fn block_rq_issue(ctx: RawTracePointContext) -> i32 {
    let request = request(&ctx);
    if is_of_interest(disk(request)) {
        MAPS.issue(request, operation(read(request, offset(offset::FLAGS))), 0);
    }
    0
}

#[raw_tracepoint]
pub fn block_rq_requeue(ctx: RawTracePointContext) -> i32 {
    MAPS.requeue(request(&ctx));
    0
}

#[raw_tracepoint]
pub fn block_rq_complete(ctx: RawTracePointContext) -> i32 {
    let (request, error, bytes) = (ctx.arg::<u64>(0), ctx.arg::<u32>(1), ctx.arg::<u32>(2));
    if let Some(known) = MAPS.in_flight(request) {
        MAPS.complete(request, known, error != 0, bytes, read(request, offset(offset::LEFT)));
    } else if is_of_interest(disk(request)) {
        MAPS.count(counter::COMPLETION_WITHOUT_ISSUE);
    }
    0
}

/// The request of a tracepoint, the first or, on older kernels, the second argument of all but `block_rq_complete`.
#[inline(always)]
fn request(ctx: &RawTracePointContext) -> u64 {
    if offset(offset::REQUEST_ARGUMENT) == 0 { ctx.arg(0) } else { ctx.arg(1) }
}

/// The number of a request's disk.
#[inline(always)]
fn disk(request: u64) -> u32 {
    let mut disk: u64 = read(request, offset(offset::QUEUE_OR_DISK));
    let in_queue = offset(offset::DISK);
    if in_queue != offset::NONE {
        disk = read(disk, in_queue);
    }
    disk_number(read(disk, offset(offset::MAJOR)), read(disk, offset(offset::MINOR)))
}

#[inline(always)]
fn offset(index: usize) -> u32 {
    // SAFETY: the index is within the array; volatile because the loader sets it in the object, unseen by the compiler.
    unsafe { core::ptr::read_volatile((&raw const OFFSETS).cast::<u32>().add(index)) }
}

livesnap_ebpf_programs::program_file!();
