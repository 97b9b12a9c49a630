//! Requests on disks by tracepoints of the block layer. Their records do not tell which request it is, so requests are
//! told apart by what the records have: disk, first sector, and what they do. Where the fields lie tells the loader.

#![no_std]
#![no_main]

use aya_ebpf::macros::{btf_map, tracepoint};
use aya_ebpf::programs::TracePointContext;
use livesnap_ebpf_common::disk::{
    OPERATION_FLUSH, OPERATION_OTHER, OPERATION_READ, OPERATION_WRITE, Operation, SECTOR_SHIFT,
    counter, record, request_id,
};
use livesnap_ebpf_programs::disk::index_of;

livesnap_ebpf_programs::disk_maps!();

/// See `record`; set by the loader.
#[unsafe(no_mangle)]
static RECORDS: [u32; record::COUNT] = [0; record::COUNT];

/// What all the records tell of a request, or of a part of one.
struct Seen {
    disk: u32,
    operation: Operation,
    sector: u64,
    sectors: u32,
}

impl Seen {
    /// Nothing if it is not on a disk that counts.
    #[inline(always)]
    fn new(ctx: &TracePointContext, tracepoint: usize) -> Option<Self> {
        let disk = index_of(field(ctx, tracepoint, record::DISK)?)?;
        let sector = match field(ctx, tracepoint, record::SECTOR)? {
            // Without a place on the disk, such as a flush: some tracepoints say so by -1, and others by 0.
            u64::MAX => 0,
            sector => sector,
        };
        let operation = operation(field(ctx, tracepoint, record::OPERATION)?);
        Some(Self { disk, operation, sector, sectors: field(ctx, tracepoint, record::SECTORS)? })
    }

    #[inline(always)]
    fn id(&self) -> u64 {
        request_id(self.disk, self.operation, self.sector)
    }

    /// Of what comes behind it.
    #[inline(always)]
    fn id_behind(&self) -> u64 {
        request_id(self.disk, self.operation, self.sector + u64::from(self.sectors))
    }
}

#[tracepoint]
pub fn block_rq_insert(ctx: TracePointContext) -> u32 {
    if let Some(seen) = Seen::new(&ctx, record::INSERT) {
        MAPS.insert(seen.id());
    }
    0
}

#[tracepoint]
pub fn block_rq_merge(ctx: TracePointContext) -> u32 {
    if let Some(seen) = Seen::new(&ctx, record::MERGE) {
        MAPS.merge(seen.id());
    }
    0
}

/// Something is put before a request that waits, which begins there from now on.
#[tracepoint]
pub fn block_bio_frontmerge(ctx: TracePointContext) -> u32 {
    if let Some(seen) = Seen::new(&ctx, record::FRONT_MERGE) {
        MAPS.rename(seen.id_behind(), seen.id());
    }
    0
}

#[tracepoint]
pub fn block_rq_issue(ctx: TracePointContext) -> u32 {
    if let Some(seen) = Seen::new(&ctx, record::ISSUE) {
        MAPS.issue(seen.id(), seen.operation, seen.sectors);
    }
    0
}

#[tracepoint]
pub fn block_rq_requeue(ctx: TracePointContext) -> u32 {
    if let Some(seen) = Seen::new(&ctx, record::REQUEUE) {
        MAPS.requeue(seen.id());
    }
    0
}

#[tracepoint]
pub fn block_rq_complete(ctx: TracePointContext) -> u32 {
    let Some(seen) = Seen::new(&ctx, record::COMPLETE) else { return 0 };
    let Some(error) = field::<u32>(&ctx, record::COMPLETE, record::ERROR) else { return 0 };
    let Some(known) = MAPS.in_flight(seen.id()) else {
        MAPS.count(counter::COMPLETION_WITHOUT_ISSUE);
        return 0;
    };
    let bytes = |sectors: u32| sectors << SECTOR_SHIFT;
    MAPS.complete(seen.id(), known, error != 0, bytes(seen.sectors), bytes(known.sectors));
    if seen.sectors < known.sectors {
        MAPS.shorten(seen.id(), seen.sectors);
        MAPS.rename(seen.id(), seen.id_behind());
    }
    0
}

/// What the letters of a record say that a request does (`blk_fill_rwbs` of the kernel). An F before another operation is
/// a flush that goes before it.
#[inline(always)]
fn operation(letters: [u8; 2]) -> Operation {
    match letters {
        [b'R', _] => OPERATION_READ,
        [b'W', _] | [b'F', b'W'] => OPERATION_WRITE,
        [b'F', _] => OPERATION_FLUSH,
        _ => OPERATION_OTHER,
    }
}

/// A field of a tracepoint's record.
#[inline(always)]
fn field<T>(ctx: &TracePointContext, tracepoint: usize, field: usize) -> Option<T> {
    let index = tracepoint * record::FIELDS + field;
    // SAFETY: the index is within the array; volatile because the loader sets it in the object, unseen by the compiler.
    let offset = unsafe { core::ptr::read_volatile((&raw const RECORDS).cast::<u32>().add(index)) };
    // SAFETY: the helper checks the address that it reads from.
    unsafe { ctx.read_at(offset as usize) }.ok()
}

livesnap_ebpf_programs::program_file!();
