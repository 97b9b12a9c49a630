//! Constants of QEMU's migration stream and of its mapped-ram layout, shared by the writer and the reader.
//!
//! Source: QEMU 10.0, `migration/savevm.c`, `migration/ram.c`, `docs/devel/migration/mapped-ram.rst`. Numbers are
//! big-endian, the bitmaps excepted, whose page `i` is bit `i & 7` of byte `i >> 3`.
//!
//! ```text
//! "QEVM" be32 3                                                           stream header
//! 07 be32 len, machine type                                               configuration
//!    05 u8 26 "configuration/capabilities" be32 1, be32 1, u8 10 "mapped-ram"
//! 01 be32 SID, u8 3 "ram", be32 0, be32 4                                 start of the RAM section
//!    be64 total | 4
//! for each block:
//!    u8 len, id, be64 used length
//!    be32 1, be64 4096, be64 bitmap offset, be64 pages offset             mapped-ram header
//!    bitmap; padding to 1 MiB; pages
//! trailer:
//!    be64 10, 7e be32 SID                                                 end of the start section
//!    03 be32 SID, be64 10, 7e be32 SID                                    end of the RAM section
//!    device sections
//!    00                                                                   end of file
//!    06 be32 2 "{}"                                                       description, empty
//! ```

/// First bytes of every stream.
pub const MAGIC: [u8; 4] = *b"QEVM";
/// Version of the stream.
pub const STREAM_VERSION: u32 = 3;
/// Section types of the stream.
pub const SECTION_EOF: u8 = 0x00;
pub const SECTION_START: u8 = 0x01;
pub const SECTION_PART: u8 = 0x02;
pub const SECTION_END: u8 = 0x03;
pub const SECTION_FULL: u8 = 0x04;
pub const SUBSECTION: u8 = 0x05;
pub const SECTION_DESCRIPTION: u8 = 0x06;
pub const SECTION_CONFIGURATION: u8 = 0x07;
pub const COMMAND: u8 = 0x08;
pub const SECTION_FOOTER: u8 = 0x7e;
/// The one command that QEMU writes into a file: be16 number, be16 length 0. livesnap writes none.
pub const COMMAND_SWITCHOVER_START: u32 = 0x000b_0000;

/// Name of the configuration's subsection that lists capabilities, and its version.
pub const CAPABILITIES: &str = "configuration/capabilities";
pub const CAPABILITIES_VERSION: u32 = 1;
/// The capability that says how the RAM section is laid out.
pub const MAPPED_RAM: &str = "mapped-ram";

/// Name, instance and version of the RAM section.
pub const RAM_SECTION: &str = "ram";
pub const RAM_INSTANCE: u32 = 0;
pub const RAM_VERSION: u32 = 4;
/// Flags in the low bits of the RAM section's 64-bit words.
pub const RAM_FLAG_TOTAL: u64 = 0x04;
pub const RAM_FLAG_END: u64 = 0x10;
/// Version of the mapped-ram header of a block, and the header's length in bytes.
pub const BLOCK_HEADER_VERSION: u32 = 1;
pub const BLOCK_HEADER_BYTES: u64 = 28;
/// Pages start at multiples of this many bytes.
pub const PAGES_ALIGN_BYTES: u64 = 1 << 20;

/// Section id of RAM in the files that livesnap writes. QEMU counts its ids up from zero, so this one is
/// never a device's.
pub const RAM_SECTION_ID: u32 = 0x6c73_6e70;

/// Bytes of a block's bitmap: whole 64-bit words.
pub const fn bitmap_bytes(pages: u64) -> u64 {
    pages.div_ceil(64) * 8
}
