//! The file of page checksums.
//!
//! ```text
//! "LSNPCRC\n"  le32 version 1, le32 page bytes 4096, le64 number of slots       24 bytes
//! le32 CRC32C of each page slot; 0 for pages that are not stored
//! ```
//!
//! Slots are numbered as in [`RamLayout`](crate::ram::RamLayout): block after block, each starting at a
//! multiple of 64. CRC32C is that of RFC 3720, which current CPUs compute at memory speed.

use crate::address::PAGE_BYTES;

/// Bytes before the first checksum.
pub const HEADER_BYTES: u64 = 24;
/// Bytes of one checksum.
pub const SLOT_BYTES: u64 = 4;

const MAGIC: &[u8; 8] = b"LSNPCRC\n";
const VERSION: u32 = 1;

/// The bytes before the first checksum.
#[expect(clippy::cast_possible_truncation, reason = "PAGE_BYTES is 4096")]
pub fn header(slots: u64) -> [u8; HEADER_BYTES as usize] {
    let mut out = [0; HEADER_BYTES as usize];
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&(PAGE_BYTES as u32).to_le_bytes());
    out[16..].copy_from_slice(&slots.to_le_bytes());
    out
}

/// Length of a file with `slots` checksums, or nothing if there is no such file.
pub fn file_bytes(slots: u64) -> Option<u64> {
    slots.checked_mul(SLOT_BYTES)?.checked_add(HEADER_BYTES)
}
