//! How long write-protect faults keep threads: which faults count, and where durations are counted.
//!
//! An exception does not tell whether the thread will wait. It has waited if it has left its CPU until the end.
//!
//! A virtual CPU under KVM has no exception on the host: its fault lasts from KVM's word of it until the guest is
//! entered again.
//!
//! A thread is in one fault at a time. Start and end run on that thread, so its start and its histograms have
//! one writer and need no atomics.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_perf_event_data;
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_get_current_task_btf, generated::bpf_ktime_get_ns,
};
use aya_ebpf::programs::PerfEventContext;
use livesnap_ebpf_common::{
    HISTOGRAMS_MAX, Histogram, HistogramKey, KIND_SERVED, KIND_WAITED, Kind, MODE_KERNEL, Mode,
    RANGES_MAX, STARTS_MAX, Start, class_of, counter,
};

/// Bits of the error code of an x86 page fault: the page is present, and was written to.
const PRESENT_AND_WRITE: u64 = 0b11;
/// The bit for a write in what KVM tells of a guest's fault: in an error code, and in Intel's exit qualification.
const GUEST_WRITE: u64 = 0b10;
/// Stands for the address in the start of a guest's fault: KVM tells only where that is for the guest.
const IN_GUEST: u64 = u64::MAX;

/// The process whose threads count; set by the loader.
#[unsafe(no_mangle)]
static TGID: u32 = 0;
/// Pairs of first address and address behind the last; set by the loader. Unused ones are empty.
#[unsafe(no_mangle)]
static RANGES: [u64; 2 * RANGES_MAX] = [0; 2 * RANGES_MAX];
/// Where the kernel's `struct task_struct` counts how often the thread left its CPU, of its own accord and otherwise:
/// `nvcsw`, which `nivcsw` follows. Set by the loader; 0: it does not know, or whatever is seen has waited.
#[unsafe(no_mangle)]
static TASK_SWITCHES: u32 = 0;

/// The maps that every object has. Each object declares its own, so that none holds what it does not use.
pub struct Maps {
    pub histograms: &'static HashMap<HistogramKey, Histogram, HISTOGRAMS_MAX>,
    pub counters: &'static PerCpuArray<u64, { counter::COUNT }>,
    pub period: &'static Array<u32, 1>,
    /// A histogram without faults, to make new ones from; too large for the stack.
    pub empty: &'static Array<Histogram, 1>,
}

/// Declares the maps of an object, as `MAPS`.
#[macro_export]
macro_rules! stall_maps {
    () => {
        #[aya_ebpf::macros::btf_map]
        static HISTOGRAMS: aya_ebpf::btf_maps::HashMap<
            livesnap_ebpf_common::HistogramKey,
            livesnap_ebpf_common::Histogram,
            { livesnap_ebpf_common::HISTOGRAMS_MAX },
        > = aya_ebpf::btf_maps::HashMap::new();
        #[aya_ebpf::macros::btf_map]
        static COUNTERS: aya_ebpf::btf_maps::PerCpuArray<
            u64,
            { livesnap_ebpf_common::counter::COUNT },
        > = aya_ebpf::btf_maps::PerCpuArray::new();
        #[aya_ebpf::macros::btf_map]
        static PERIOD: aya_ebpf::btf_maps::Array<u32, 1> = aya_ebpf::btf_maps::Array::new();
        #[aya_ebpf::macros::btf_map]
        static EMPTY: aya_ebpf::btf_maps::Array<livesnap_ebpf_common::Histogram, 1> =
            aya_ebpf::btf_maps::Array::new();
        static MAPS: $crate::stall::Maps = $crate::stall::Maps {
            histograms: &HISTOGRAMS,
            counters: &COUNTERS,
            period: &PERIOD,
            empty: &EMPTY,
        };
    };
}

/// Declares the programs that see, by raw tracepoints, what virtual CPUs under KVM wait; the file has `MAPS` and `STARTS`.
#[macro_export]
macro_rules! stall_raw_kvm {
    () => {
        /// The third argument is the error code since Linux 6.0.
        #[aya_ebpf::macros::raw_tracepoint]
        pub fn raw_kvm_page_fault(ctx: aya_ebpf::programs::RawTracePointContext) -> i32 {
            $crate::stall::guest_faults(&MAPS, &STARTS, ctx.arg(2));
            0
        }

        #[aya_ebpf::macros::raw_tracepoint]
        pub fn raw_kvm_entry(_: aya_ebpf::programs::RawTracePointContext) -> i32 {
            $crate::stall::guest_goes_on(&MAPS, &STARTS);
            0
        }

        #[aya_ebpf::macros::raw_tracepoint]
        pub fn raw_kvm_userspace_exit(_: aya_ebpf::programs::RawTracePointContext) -> i32 {
            $crate::stall::guest_is_left(&MAPS, &STARTS);
            0
        }
    };
}

/// Where the fault that a thread is in is remembered.
pub trait Starts {
    /// That of the running thread `tid`, if it ever had one.
    fn of_thread(&'static self, tid: u32) -> Option<&'static mut Start>;

    /// The same; makes it, empty, if there is none.
    fn of_thread_or_new(&'static self, tid: u32) -> Option<&'static mut Start>;
}

/// By thread id. Entries stay, for making and removing them costs more than a fault should.
pub type StartsByThread = HashMap<u32, Start, STARTS_MAX>;

impl Starts for StartsByThread {
    #[inline(always)]
    fn of_thread(&'static self, tid: u32) -> Option<&'static mut Start> {
        // SAFETY: entries are never removed, and only the thread itself uses its own.
        self.get_ptr_mut(tid).map(|start| unsafe { &mut *start })
    }

    #[inline(always)]
    fn of_thread_or_new(&'static self, tid: u32) -> Option<&'static mut Start> {
        if let Some(start) = self.of_thread(tid) {
            return Some(start);
        }
        self.insert(tid, Start { at_ns: 0, address: 0, class: 0, switches: 0 }, 0).ok()?;
        self.of_thread(tid)
    }
}

/// A fault begins: an exception with an x86 error code.
#[inline(always)]
pub fn exception(maps: &Maps, starts: &'static impl Starts, mode: Mode, address: u64, code: u64) {
    let Some(tid) = thread_of_interest() else { return };
    if code & PRESENT_AND_WRITE == PRESENT_AND_WRITE && is_in_ranges(address) {
        begin(maps, starts, tid, address, mode);
    }
}

/// A virtual CPU has left its guest for a fault, with what KVM calls its error code.
#[inline(always)]
pub fn guest_faults(maps: &Maps, starts: &'static impl Starts, code: u64) {
    let Some(tid) = thread_of_interest() else { return };
    if code & GUEST_WRITE != 0 {
        begin(maps, starts, tid, IN_GUEST, MODE_KERNEL);
    }
}

/// A virtual CPU enters its guest: a fault is over. Where it did not wait nothing is known of it, not even whether it
/// was in the ranges.
#[inline(always)]
pub fn guest_goes_on(maps: &Maps, starts: &'static impl Starts) {
    let Some((start, tid)) = of_guest(starts) else { return };
    if has_waited(start) {
        maps.end(start, tid);
    } else {
        start.at_ns = 0;
    }
}

/// A virtual CPU returns to its program instead: for a signal, after which the guest faults again, or because nothing
/// but the program can serve the access.
#[inline(always)]
pub fn guest_is_left(maps: &Maps, starts: &'static impl Starts) {
    let Some((start, _)) = of_guest(starts) else { return };
    if has_waited(start) {
        maps.count(counter::START_WITHOUT_END);
    }
    start.at_ns = 0;
}

/// The guest's fault that the running thread is in.
#[inline(always)]
fn of_guest(starts: &'static impl Starts) -> Option<(&'static mut Start, u32)> {
    let tid = thread_of_interest()?;
    let start = starts.of_thread(tid)?;
    (start.at_ns != 0 && start.address == IN_GUEST).then_some((start, tid))
}

/// Notes that a fault of the running thread begins.
#[inline(always)]
pub fn begin(maps: &Maps, starts: &'static impl Starts, tid: u32, address: u64, mode: Mode) {
    // First of all: what the rest takes is part of the fault.
    // SAFETY: a helper without preconditions.
    let at_ns = unsafe { bpf_ktime_get_ns() };
    match starts.of_thread_or_new(tid) {
        Some(start) => maps.begin(start, at_ns, address, mode),
        None => maps.count(counter::MAP_FULL),
    }
}

/// A page fault is done: perf's event tells at which address.
#[inline(always)]
pub fn page_fault_end(maps: &Maps, starts: &'static impl Starts, ctx: &PerfEventContext) {
    let Some(tid) = thread_of_interest() else { return };
    // SAFETY: the context of this kind of program.
    let address = unsafe { (*ctx.as_ptr().cast::<bpf_perf_event_data>()).addr };
    match starts.of_thread(tid) {
        Some(start) if start.at_ns != 0 && start.address == address => maps.end(start, tid),
        _ if is_in_ranges(address) => maps.count(counter::END_WITHOUT_START),
        _ => {}
    }
}

/// The id of the running thread, if it belongs to the process that is looked at.
#[inline(always)]
pub fn thread_of_interest() -> Option<u32> {
    let ids = bpf_get_current_pid_tgid();
    // SAFETY: a static of ours; volatile because the loader sets it in the object, unseen by the compiler.
    let tgid = unsafe { core::ptr::read_volatile(&raw const TGID) };
    ((ids >> 32) as u32 == tgid).then_some(ids as u32)
}

/// How often the running thread has left its CPU. Both counts, because on a preemptible kernel the handler that it
/// wakes may take its CPU before it goes to sleep of its own accord. Always 0 if the loader does not know.
#[inline(always)]
fn switches() -> u64 {
    // SAFETY: a static of ours; volatile because the loader sets it in the object, unseen by the compiler.
    let offset = unsafe { core::ptr::read_volatile(&raw const TASK_SWITCHES) };
    if offset == 0 {
        return 0;
    }
    // SAFETY: a helper without preconditions. The verifier does not look at it where the offset is 0, so it may lack BTF.
    let task = unsafe { bpf_get_current_task_btf() }.cast::<u8>().cast_const();
    // SAFETY: the offset is that of a member.
    let counts = unsafe { task.add(offset as usize) }.cast::<u64>();
    // SAFETY: a member of the running thread, as the verifier sees to.
    let voluntary = unsafe { core::ptr::read_volatile(counts) };
    // SAFETY: the same.
    let involuntary = unsafe { core::ptr::read_volatile(counts.add(1)) };
    voluntary + involuntary
}

/// Whether the running thread has left its CPU since its fault began.
#[inline(always)]
fn has_waited(start: &Start) -> bool {
    start.switches != switches()
}

/// What the fault of the running thread is.
#[inline(always)]
fn kind(start: &Start) -> Kind {
    // SAFETY: as above.
    let is_known = unsafe { core::ptr::read_volatile(&raw const TASK_SWITCHES) } != 0;
    if is_known && !has_waited(start) { KIND_SERVED } else { KIND_WAITED }
}

/// Whether an address lies in the ranges.
#[inline(always)]
pub fn is_in_ranges(address: u64) -> bool {
    let ranges = &raw const RANGES;
    for index in 0..RANGES_MAX {
        // SAFETY: as above; the index is within the array.
        let first = unsafe { core::ptr::read_volatile(ranges.cast::<u64>().add(2 * index)) };
        // SAFETY: the same.
        let end = unsafe { core::ptr::read_volatile(ranges.cast::<u64>().add(2 * index + 1)) };
        if address >= first && address < end {
            return true;
        }
    }
    false
}

impl Maps {
    /// Notes in `start` that a fault begins.
    #[inline(always)]
    pub fn begin(&self, start: &mut Start, at_ns: u64, address: u64, mode: Mode) {
        // KVM may itself write to the guest's memory for it, and fault there.
        if start.at_ns != 0 && (start.address != IN_GUEST || has_waited(start)) {
            self.count(counter::START_WITHOUT_END);
        }
        let period = self.period.get(0).copied().unwrap_or_default();
        start.address = address;
        start.class = class_of(period, mode, KIND_WAITED).into();
        start.switches = switches();
        start.at_ns = at_ns;
    }

    /// Counts the fault that `start` noted, and forgets it.
    #[inline(always)]
    pub fn end(&self, start: &mut Start, tid: u32) {
        // SAFETY: a helper without preconditions.
        let ns = unsafe { bpf_ktime_get_ns() } - start.at_ns;
        start.at_ns = 0;
        // The kinds differ in a bit that those who waited lack.
        let class = start.class as u32 | class_of(0, 0, kind(start));
        let key = HistogramKey { tid, class };
        let Some(histogram) = self.histogram(&key) else {
            self.count(counter::MAP_FULL);
            return;
        };
        // SAFETY: the map keeps the value while the program runs; the thread it belongs to is this one.
        unsafe { &mut *histogram }.record(ns);
    }

    #[inline(always)]
    fn histogram(&self, key: &HistogramKey) -> Option<*mut Histogram> {
        if let Some(histogram) = self.histograms.get_ptr_mut(key) {
            return Some(histogram);
        }
        self.histograms.insert(key, self.empty.get(0)?, 0).ok()?;
        self.histograms.get_ptr_mut(key)
    }

    /// Counts what did not go by the book.
    #[inline(always)]
    pub fn count(&self, counter: u32) {
        if let Some(value) = self.counters.get_ptr_mut(counter) {
            // SAFETY: this CPU's own value; a program is not interrupted by another on it that counts too often
            // to matter, and never moves to another CPU.
            unsafe { *value += 1 };
        }
    }
}
