//! What the disk programs and their loader agree on.

use crate::{HISTOGRAM_WORDS, Histogram};

/// Disks that are told from all others.
pub const DISKS_MAX: usize = 16;

/// Requests that can be remembered at one time, on all of these disks.
pub const REQUESTS_MAX: usize = 16_384;

/// What a request does.
pub type Operation = u32;
/// It reads.
pub const OPERATION_READ: Operation = 0;
/// It writes.
pub const OPERATION_WRITE: Operation = 1;
/// It makes the disk empty its cache.
pub const OPERATION_FLUSH: Operation = 2;
/// Anything else, such as to discard or to write zeroes.
pub const OPERATION_OTHER: Operation = 3;
const OPERATIONS: u32 = 4;

/// Who issued a request.
pub type Issuer = u32;
/// Any other process, or the kernel.
pub const ISSUER_FOREIGN: Issuer = 0;
/// A thread of the process that the loader named.
pub const ISSUER_OURS: Issuer = 1;

/// [`Operation`] and [`Issuer`] in one number below [`CLASSES`].
#[inline(always)]
#[must_use]
pub const fn class_of(operation: Operation, issuer: Issuer) -> u32 {
    operation << 1 | issuer
}

/// Classes of requests.
pub const CLASSES: usize = (OPERATIONS as usize) << 1;

/// A request that was put into a queue, or that the disk works on: the value of the map `REQUESTS`, by the
/// request's address or [`request_id`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// When it was issued to the disk, by `CLOCK_MONOTONIC` in nanoseconds; 0: it waits in a queue.
    pub issued_ns: u64,
    /// See [`class_of`]. Of a request that waits only the issuer is known.
    pub class: u32,
    /// Of a request that was issued, sectors that are not complete yet; 0 where the kernel's own request tells.
    pub sectors: u32,
}

/// A [`Request`] as the loader reads it: the time, and class and sectors.
pub type RequestWords = [u64; 2];

/// Class in the second of [`RequestWords`].
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the class is the lower half, by little-endian order"
)]
pub const fn class_in(word: u64) -> usize {
    word as u32 as usize
}

/// What stands for a request where its address is not known: the disk's index of those that count, what the request does,
/// and its first sector. Two at a time that are the same in all of that are not told apart.
#[inline(always)]
#[must_use]
pub const fn request_id(disk: u32, operation: Operation, sector: u64) -> u64 {
    (disk as u64) << 60 | (operation as u64) << 58 | sector & ((1 << 58) - 1)
}

/// A sector is 2 to the power of this many bytes, whatever the disk calls a sector (`SECTOR_SHIFT` of the kernel).
pub const SECTOR_SHIFT: u32 = 9;

/// Requests of one class that are done: the value of the map `TRANSFERS`, for each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Transfers {
    /// From issue to completion.
    pub latency: Histogram,
    /// Bytes that they moved.
    pub bytes: u64,
}

/// [`Transfers`] as the loader reads them: the histogram's words, then the bytes.
pub type TransferWords = [u64; TRANSFER_WORDS];
/// Length of [`TransferWords`].
pub const TRANSFER_WORDS: usize = HISTOGRAM_WORDS + 1;

/// Where the kernel has its fields, from its type information: the static `OFFSETS`, in bytes.
pub mod offset {
    /// Which argument of `block_rq_issue` is the request; others than offsets come first.
    pub const REQUEST_ARGUMENT: usize = 0;
    /// `cmd_flags` in a request.
    pub const FLAGS: usize = 1;
    /// `__data_len` in a request: the bytes that are not completed yet.
    pub const LEFT: usize = 2;
    /// In a request, the pointer to its queue or to its disk.
    pub const QUEUE_OR_DISK: usize = 3;
    /// In a queue, the pointer to its disk; [`NONE`] where requests point to disks.
    pub const DISK: usize = 4;
    /// `major` in a disk.
    pub const MAJOR: usize = 5;
    /// `first_minor` in a disk.
    pub const MINOR: usize = 6;
    /// How many there are.
    pub const COUNT: usize = 7;
    /// There is no such field.
    pub const NONE: u32 = u32::MAX;
}

/// Where tracepoints' records have their fields, in bytes: the static `RECORDS`, [`FIELDS`](record::FIELDS) for each
/// tracepoint.
pub mod record {
    /// `block_rq_insert`.
    pub const INSERT: usize = 0;
    /// `block_rq_merge`.
    pub const MERGE: usize = 1;
    /// `block_bio_frontmerge`.
    pub const FRONT_MERGE: usize = 2;
    /// `block_rq_issue`.
    pub const ISSUE: usize = 3;
    /// `block_rq_requeue`.
    pub const REQUEUE: usize = 4;
    /// `block_rq_complete`.
    pub const COMPLETE: usize = 5;
    /// How many there are.
    pub const TRACEPOINTS: usize = 6;

    /// The disk's number, as [`disk_number`](super::disk_number) has it.
    pub const DISK: usize = 0;
    /// The first sector.
    pub const SECTOR: usize = 1;
    /// How many sectors.
    pub const SECTORS: usize = 2;
    /// Letters for what the request does.
    pub const OPERATION: usize = 3;
    /// Whether it failed; of [`COMPLETE`] only.
    pub const ERROR: usize = 4;
    /// How many there are.
    pub const FIELDS: usize = 5;

    /// Length of the static.
    pub const COUNT: usize = TRACEPOINTS * FIELDS;
}

/// Disks as the programs compare them: major and minor number as the kernel itself puts them together.
#[inline(always)]
#[must_use]
pub const fn disk_number(major: u32, minor: u32) -> u32 {
    major << 20 | minor
}

/// Figures for each CPU, each an index of the map `DISK_COUNTERS`.
pub mod counter {
    /// A request that could not be remembered, for the map was full.
    pub const MAP_FULL: u32 = 0;
    /// A completion of a request whose issue was not seen: it was issued before the probe was there.
    pub const COMPLETION_WITHOUT_ISSUE: u32 = 1;
    /// A request that was issued although it had been issued before: its completion was not seen.
    pub const ISSUE_WITHOUT_COMPLETION: u32 = 2;
    /// A request that the disk could not take; it is issued again.
    pub const REQUEUED: u32 = 3;
    /// A completion of a part of a request.
    pub const PARTIAL: u32 = 4;
    /// A request that failed.
    pub const FAILED: u32 = 5;
    /// The most requests that were in flight when one more was issued; see [`super::depth`].
    pub const DEPTH_MAX: u32 = 6;
    /// The same of ours.
    pub const DEPTH_MAX_OURS: u32 = 7;
    /// How many there are.
    pub const COUNT: usize = 8;
}

/// Requests in flight, each an index of the map `DEPTHS`.
pub mod depth {
    /// All of them.
    pub const ALL: u32 = 0;
    /// Ours.
    pub const OURS: u32 = 1;
    /// How many there are.
    pub const COUNT: usize = 2;
}

// An index of a disk has four bits in a request's id, and an operation two.
const _: () = assert!(DISKS_MAX <= 1 << 4 && OPERATIONS <= 1 << 2);
// No padding: every byte of a map is a byte of a field.
const _: () = assert!(size_of::<Request>() == size_of::<RequestWords>());
const _: () = assert!(size_of::<Transfers>() == 8 * TRANSFER_WORDS);
