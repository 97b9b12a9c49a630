//! Requests on disks: which count, whose they are, how long they take.
//!
//! ```text
//!   (queued) ──insert──▶ waiting ──issue──▶ in flight ──complete──▶ counted
//!                           ▲                   │ │
//!                           └──────requeue──────┘ └─ a part completed: stays
//! ```
//!
//! A request is remembered by its address, or by what tells it from others. The thread that puts it into a queue is the
//! one it belongs to; without a queue it is the thread that issues it. Who completes it tells nothing: that is an
//! interrupt.

use crate::atomic::fetch_add;
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_probe_read_kernel, generated::bpf_ktime_get_ns,
};
use livesnap_ebpf_common::disk::{
    CLASSES, DISKS_MAX, ISSUER_FOREIGN, ISSUER_OURS, Issuer, OPERATION_FLUSH, OPERATION_OTHER,
    OPERATION_READ, OPERATION_WRITE, Operation, REQUESTS_MAX, Request, Transfers, class_of,
    counter, depth,
};

/// The lowest bits of a request's flags are its operation; see `enum req_op` of the kernel.
const REQ_OP_MASK: u32 = 0xff;

/// The process whose requests are ours; set by the loader.
#[unsafe(no_mangle)]
static OUR_TGID: u32 = 0;
/// The disks that count; set by the loader. Unused ones are 0.
#[unsafe(no_mangle)]
static DISKS: [u32; DISKS_MAX] = [0; DISKS_MAX];

/// The maps that every object has.
pub struct Maps {
    pub requests: &'static HashMap<u64, Request, REQUESTS_MAX>,
    pub transfers: &'static PerCpuArray<Transfers, CLASSES>,
    pub counters: &'static PerCpuArray<u64, { counter::COUNT }>,
    pub depths: &'static Array<u64, { depth::COUNT }>,
}

/// Declares the maps of an object, as `MAPS`.
#[macro_export]
macro_rules! disk_maps {
    () => {
        #[aya_ebpf::macros::btf_map]
        static REQUESTS: aya_ebpf::btf_maps::HashMap<
            u64,
            livesnap_ebpf_common::disk::Request,
            { livesnap_ebpf_common::disk::REQUESTS_MAX },
        > = aya_ebpf::btf_maps::HashMap::new();
        #[aya_ebpf::macros::btf_map]
        static TRANSFERS: aya_ebpf::btf_maps::PerCpuArray<
            livesnap_ebpf_common::disk::Transfers,
            { livesnap_ebpf_common::disk::CLASSES },
        > = aya_ebpf::btf_maps::PerCpuArray::new();
        #[aya_ebpf::macros::btf_map]
        static DISK_COUNTERS: aya_ebpf::btf_maps::PerCpuArray<
            u64,
            { livesnap_ebpf_common::disk::counter::COUNT },
        > = aya_ebpf::btf_maps::PerCpuArray::new();
        #[aya_ebpf::macros::btf_map]
        static DEPTHS: aya_ebpf::btf_maps::Array<
            u64,
            { livesnap_ebpf_common::disk::depth::COUNT },
        > = aya_ebpf::btf_maps::Array::new();
        static MAPS: $crate::disk::Maps = $crate::disk::Maps {
            requests: &REQUESTS,
            transfers: &TRANSFERS,
            counters: &DISK_COUNTERS,
            depths: &DEPTHS,
        };
    };
}

/// The index of a disk among those that count, if it does.
#[inline(always)]
pub fn index_of(disk: u32) -> Option<u32> {
    let disks = (&raw const DISKS).cast::<u32>();
    for index in 0..DISKS_MAX {
        // SAFETY: the index is within the array; volatile because the loader sets it in the object, unseen by the
        // compiler.
        let known = unsafe { core::ptr::read_volatile(disks.add(index)) };
        if known == 0 {
            break;
        }
        if known == disk {
            return Some(index as u32);
        }
    }
    None
}

/// Whether a disk is one of those that count.
#[inline(always)]
pub fn is_of_interest(disk: u32) -> bool {
    index_of(disk).is_some()
}

/// What flags of a request say that it does.
#[inline(always)]
pub fn operation(flags: u32) -> Operation {
    match flags & REQ_OP_MASK {
        0 => OPERATION_READ,
        1 => OPERATION_WRITE,
        2 => OPERATION_FLUSH,
        _ => OPERATION_OTHER,
    }
}

/// The kernel's word at an address; zero where there is none.
#[inline(always)]
pub fn read<T: Copy + Default>(base: u64, offset: u32) -> T {
    // SAFETY: the helper checks the address itself.
    unsafe { bpf_probe_read_kernel((base + offset as u64) as *const T) }.unwrap_or_default()
}

/// Whether the running thread is ours.
#[inline(always)]
fn issuer() -> Issuer {
    // SAFETY: a static of ours; volatile as above.
    let tgid = unsafe { core::ptr::read_volatile(&raw const OUR_TGID) };
    if (bpf_get_current_pid_tgid() >> 32) as u32 == tgid { ISSUER_OURS } else { ISSUER_FOREIGN }
}

impl Maps {
    /// The running thread puts a request into a queue.
    #[inline(always)]
    pub fn insert(&self, id: u64) {
        match self.requests.get_ptr_mut(&id) {
            // The kernel itself puts back what was requeued: it still belongs to whom it belonged to.
            Some(_) => {}
            None => self.remember(id, 0, class_of(OPERATION_OTHER, issuer()), 0),
        }
    }

    /// A request became part of another one.
    #[inline(always)]
    pub fn merge(&self, id: u64) {
        let _ = self.requests.remove(&id);
    }

    /// A request is known by another id from now on.
    #[inline(always)]
    pub fn rename(&self, id: u64, new: u64) {
        // SAFETY: the map keeps the value while the program runs; a request is in one place at a time.
        let known = self.requests.get_ptr_mut(&id).map(|known| unsafe { *known });
        if let Some(known) = known {
            let _ = self.requests.remove(&id);
            self.remember(new, known.issued_ns, known.class, known.sectors);
        }
    }

    /// Of a request that is in flight so many sectors are done, and not all.
    #[inline(always)]
    pub fn shorten(&self, id: u64, sectors: u32) {
        if let Some(known) = self.requests.get_ptr_mut(&id) {
            // SAFETY: as above.
            unsafe { (*known).sectors -= sectors };
        }
    }

    /// The disk gets a request, of so many sectors if that will not be told later.
    #[inline(always)]
    pub fn issue(&self, id: u64, operation: Operation, sectors: u32) {
        // SAFETY: the map keeps the value while the program runs; a request is in one place at a time.
        let known = self.requests.get_ptr_mut(&id).map(|known| unsafe { *known });
        let issuer = match known {
            Some(known) if known.issued_ns == 0 => known.class & 1,
            Some(known) => {
                self.count(counter::ISSUE_WITHOUT_COMPLETION);
                self.leave(known.class);
                issuer()
            }
            None => issuer(),
        };
        let class = class_of(operation, issuer);
        self.enter(class);
        // SAFETY: a helper without preconditions.
        self.remember(id, unsafe { bpf_ktime_get_ns() }, class, sectors);
    }

    /// The disk could not take a request.
    #[inline(always)]
    pub fn requeue(&self, id: u64) {
        let Some(request) = self.requests.get_ptr_mut(&id) else { return };
        // SAFETY: as above.
        let request = unsafe { &mut *request };
        if request.issued_ns != 0 {
            request.issued_ns = 0;
            self.leave(request.class);
            self.count(counter::REQUEUED);
        }
    }

    /// A request that is in flight.
    #[inline(always)]
    pub fn in_flight(&self, id: u64) -> Option<Request> {
        // SAFETY: as above.
        let known = self.requests.get_ptr_mut(&id).map(|known| unsafe { *known });
        known.filter(|known| known.issued_ns != 0)
    }

    /// Of a request that is in flight `bytes` are done, of `left` that were not.
    #[inline(always)]
    pub fn complete(&self, id: u64, request: Request, is_error: bool, bytes: u32, left: u32) {
        let Some(transfers) = self.transfers.get_ptr_mut(request.class) else { return };
        // SAFETY: this CPU's own value; the kernel does not run a program within itself.
        let transfers = unsafe { &mut *transfers };
        if is_error {
            self.count(counter::FAILED);
        } else {
            transfers.bytes += bytes as u64;
        }
        if bytes < left {
            self.count(counter::PARTIAL);
            return;
        }
        // SAFETY: a helper without preconditions.
        transfers.latency.record(unsafe { bpf_ktime_get_ns() } - request.issued_ns);
        let _ = self.requests.remove(&id);
        self.leave(request.class);
    }

    #[inline(always)]
    fn remember(&self, id: u64, issued_ns: u64, class: u32, sectors: u32) {
        if self.requests.insert(&id, &Request { issued_ns, class, sectors }, 0).is_err() {
            self.count(counter::MAP_FULL);
            if issued_ns != 0 {
                self.leave(class);
            }
        }
    }

    #[inline(always)]
    fn enter(&self, class: u32) {
        self.deepen(depth::ALL, counter::DEPTH_MAX);
        if class & 1 == ISSUER_OURS {
            self.deepen(depth::OURS, counter::DEPTH_MAX_OURS);
        }
    }

    #[inline(always)]
    fn leave(&self, class: u32) {
        self.change_depth(depth::ALL, u64::MAX);
        if class & 1 == ISSUER_OURS {
            self.change_depth(depth::OURS, u64::MAX);
        }
    }

    #[inline(always)]
    fn deepen(&self, index: u32, max: u32) {
        let Some(max) = self.counters.get_ptr_mut(max) else { return };
        let now = self.change_depth(index, 1);
        // SAFETY: this CPU's own value.
        let max = unsafe { &mut *max };
        if now > *max {
            *max = now;
        }
    }

    /// Adds `by`, of which the highest number stands for -1; returns the depth then.
    #[inline(always)]
    fn change_depth(&self, index: u32, by: u64) -> u64 {
        let Some(depth) = self.depths.get_ptr_mut(index) else { return 0 };
        // SAFETY: a value of a map, which is written here only.
        unsafe { fetch_add(depth, by) }.wrapping_add(by)
    }

    /// Counts what did not go by the book.
    #[inline(always)]
    pub fn count(&self, counter: u32) {
        if let Some(value) = self.counters.get_ptr_mut(counter) {
            // SAFETY: this CPU's own value; each counter is counted by few programs, which seldom interrupt each
            // other.
            unsafe { *value += 1 };
        }
    }
}
