//! Parser of mapped-ram files: QEMU's own and livesnap's.
//!
//! The file may come from anywhere. Nothing in it is believed before it is checked against the file's length, and
//! nothing is allocated by its word alone. What a block is said to lie at must be where QEMU would have put
//! it, so that no two things overlap. See the diagram in `format.rs`.

use std::fs::File;
use std::io;

use crate::address::PAGE_BYTES;
use crate::image::format::{
    BLOCK_HEADER_VERSION, CAPABILITIES, CAPABILITIES_VERSION, COMMAND, COMMAND_SWITCHOVER_START,
    MAGIC, MAPPED_RAM, PAGES_ALIGN_BYTES, RAM_FLAG_END, RAM_FLAG_TOTAL, RAM_INSTANCE, RAM_SECTION,
    RAM_VERSION, SECTION_CONFIGURATION, SECTION_END, SECTION_FOOTER, SECTION_PART, SECTION_START,
    STREAM_VERSION, SUBSECTION, bitmap_bytes,
};

/// More blocks than any machine has: QEMU allows 256 memory slots, and a few blocks for each PCI device.
const BLOCKS_MAX: usize = 4096;
/// Longest machine type that is read, in bytes.
const MACHINE_TYPE_BYTES_MAX: u32 = 255;
/// Most capabilities that are read; QEMU 10 knows two that it would write.
const CAPABILITIES_MAX: u32 = 16;
/// What stands between the device sections and the end of livesnap's files: end mark, empty description.
const ENDING: &[u8] = b"\0\x06\0\0\0\x02{}";

/// Something that can be read at an offset: a file, or bytes in a test.
pub trait ReadAt: Sync {
    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// If the end comes first or reading fails.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset)
    }
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(buffer.len());
        let bytes = self.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

/// Why bytes are no mapped-ram file.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The file ends too early.
    #[error("it ends at {len_bytes}, but {wanted} bytes should follow at offset {offset}")]
    Truncated {
        /// Where bytes are missing.
        offset: u64,
        /// How many were expected from there.
        wanted: u64,
        /// Length of the file.
        len_bytes: u64,
    },
    /// A field has a value that it cannot have.
    #[error("{what} at offset {offset} is {found}, not {expected}")]
    Unexpected {
        /// Where the field stands.
        offset: u64,
        /// Which field.
        what: &'static str,
        /// What stands there.
        found: String,
        /// What should.
        expected: String,
    },
    /// Reading failed.
    #[error("reading at offset {offset} failed: {source}")]
    Read {
        /// Where.
        offset: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A RAM block of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamBlock {
    /// Block id.
    pub id: String,
    /// Length in bytes, a multiple of the page size.
    pub len_bytes: u64,
    /// Offset of its header.
    pub header_offset: u64,
    /// Offset of its bitmap.
    pub bitmap_offset: u64,
    /// Offset of its first page.
    pub pages_offset: u64,
}

impl StreamBlock {
    /// Number of pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.len_bytes / PAGE_BYTES
    }

    /// Length of the bitmap in bytes.
    #[must_use]
    pub const fn bitmap_bytes(&self) -> u64 {
        bitmap_bytes(self.pages())
    }
}

/// The structure of a mapped-ram file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Versioned machine type.
    pub machine_type: String,
    /// The blocks, in the order of the file; at least one.
    pub blocks: Vec<StreamBlock>,
    /// Where RAM ends and the trailer begins.
    pub trailer_offset: u64,
    /// Where the device sections begin.
    pub devices_offset: u64,
}

impl Stream {
    /// Reads the structure of `source`, which is `len_bytes` long, up to the device sections.
    ///
    /// # Errors
    /// If it is no mapped-ram file or cannot be read.
    pub fn read<R: ReadAt + ?Sized>(source: &R, len_bytes: u64) -> Result<Self, StreamError> {
        let mut cursor = Cursor { source, len_bytes, at: 0 };
        let machine_type = cursor.stream_header()?;
        let (section, total_bytes) = cursor.ram_start()?;
        let mut blocks: Vec<StreamBlock> = Vec::new();
        let mut left = total_bytes;
        while left > 0 {
            let at = cursor.at;
            let block = cursor.block(left)?;
            if blocks.len() == BLOCKS_MAX {
                return Err(unexpected(at, "number of RAM blocks", "more", BLOCKS_MAX));
            }
            if blocks.iter().any(|other| other.id == block.id) {
                return Err(unexpected(
                    at,
                    "RAM block",
                    format!("{:?} again", block.id),
                    "a new one",
                ));
            }
            left -= block.len_bytes;
            blocks.push(block);
        }
        let trailer_offset = cursor.at;
        cursor.ram_end(section)?;
        Ok(Self { machine_type, blocks, trailer_offset, devices_offset: cursor.at })
    }

    /// Checks that `source` ends as livesnap's files do.
    ///
    /// # Errors
    /// If it does not.
    pub fn check_ending<R: ReadAt + ?Sized>(
        &self,
        source: &R,
        len_bytes: u64,
    ) -> Result<(), StreamError> {
        let wanted = ENDING.len() as u64;
        let offset = len_bytes.checked_sub(wanted).filter(|&at| at >= self.devices_offset);
        let offset = offset.ok_or(StreamError::Truncated {
            offset: self.devices_offset,
            wanted,
            len_bytes,
        })?;
        let mut cursor = Cursor { source, len_bytes, at: offset };
        let found = cursor.bytes(ENDING.len())?;
        if found != ENDING {
            return Err(unexpected(
                offset,
                "end of the file",
                format!("{found:02x?}"),
                "the end mark",
            ));
        }
        Ok(())
    }
}

fn unexpected(
    offset: u64,
    what: &'static str,
    found: impl ToString,
    expected: impl ToString,
) -> StreamError {
    StreamError::Unexpected {
        offset,
        what,
        found: found.to_string(),
        expected: expected.to_string(),
    }
}

/// Reads field after field.
struct Cursor<'a, R: ReadAt + ?Sized> {
    source: &'a R,
    len_bytes: u64,
    at: u64,
}

impl<R: ReadAt + ?Sized> Cursor<'_, R> {
    /// Header, configuration; returns the machine type.
    fn stream_header(&mut self) -> Result<String, StreamError> {
        let magic = self.bytes(MAGIC.len())?;
        if magic != MAGIC {
            return Err(unexpected(0, "magic", format!("{magic:02x?}"), "\"QEVM\""));
        }
        self.expect_u32("stream version", STREAM_VERSION)?;
        self.expect_u8("section type", SECTION_CONFIGURATION)?;
        let at = self.at;
        let length = self.u32()?;
        if length > MACHINE_TYPE_BYTES_MAX {
            let what = "length of the machine type";
            return Err(unexpected(at, what, length, format!("at most {MACHINE_TYPE_BYTES_MAX}")));
        }
        let machine_type = self.text("machine type", length as usize)?;
        self.expect_u8("subsection mark", SUBSECTION)?;
        self.expect_short("subsection", CAPABILITIES)?;
        self.expect_u32("version of the capabilities", CAPABILITIES_VERSION)?;
        let at = self.at;
        let count = self.u32()?;
        if count > CAPABILITIES_MAX {
            let expected = format!("at most {CAPABILITIES_MAX}");
            return Err(unexpected(at, "number of capabilities", count, expected));
        }
        let mut names = Vec::new();
        for _ in 0..count {
            names.push(self.short("capability")?);
        }
        if !names.iter().any(|name| name == MAPPED_RAM) {
            return Err(unexpected(at, "list of capabilities", format!("{names:?}"), MAPPED_RAM));
        }
        Ok(machine_type)
    }

    /// Start of the RAM section; returns its id and the length of all blocks.
    fn ram_start(&mut self) -> Result<(u32, u64), StreamError> {
        self.expect_u8("section type", SECTION_START)?;
        let section = self.u32()?;
        self.expect_short("section", RAM_SECTION)?;
        self.expect_u32("instance of the RAM section", RAM_INSTANCE)?;
        self.expect_u32("version of the RAM section", RAM_VERSION)?;
        let at = self.at;
        let word = self.u64()?;
        let total_bytes = word & !(PAGE_BYTES - 1);
        if word - total_bytes != RAM_FLAG_TOTAL || total_bytes == 0 {
            let expected = "a length in whole pages with flag 4";
            return Err(unexpected(at, "RAM size", format!("{word:#x}"), expected));
        }
        Ok((section, total_bytes))
    }

    /// One block; leaves the cursor behind its pages. No more than `left` bytes of RAM may follow.
    fn block(&mut self, left: u64) -> Result<StreamBlock, StreamError> {
        let header_offset = self.at;
        let id = self.short("RAM block id")?;
        let at = self.at;
        let len_bytes = self.u64()?;
        if len_bytes == 0 || len_bytes > left || !len_bytes.is_multiple_of(PAGE_BYTES) {
            let expected = format!("whole pages, at most {left} bytes");
            return Err(unexpected(at, "length of the RAM block", len_bytes, expected));
        }
        self.expect_u32("version of the block header", BLOCK_HEADER_VERSION)?;
        self.expect_u64("page size of the block", PAGE_BYTES)?;
        let bitmap_offset = self.at + 16;
        self.expect_u64("offset of the bitmap", bitmap_offset)?;
        // A length of at most 2^64 bytes has a bitmap of at most 2^49; a file's offset at most 2^63.
        let pages_offset = (bitmap_offset + bitmap_bytes(len_bytes / PAGE_BYTES))
            .next_multiple_of(PAGES_ALIGN_BYTES);
        self.expect_u64("offset of the pages", pages_offset)?;
        self.at = pages_offset
            .checked_add(len_bytes)
            .filter(|&end| end <= self.len_bytes)
            .ok_or_else(|| self.truncated(pages_offset, len_bytes))?;
        Ok(StreamBlock { id, len_bytes, header_offset, bitmap_offset, pages_offset })
    }

    /// What follows the last page: end of the start section, then until the end of the RAM section parts
    /// without content and a command, which QEMU writes and livesnap does not.
    fn ram_end(&mut self, section: u32) -> Result<(), StreamError> {
        self.end_of_section(section)?;
        loop {
            let at = self.at;
            match self.u8()? {
                SECTION_PART => self.empty_section(section)?,
                SECTION_END => return self.empty_section(section),
                COMMAND => self.expect_u32("command", COMMAND_SWITCHOVER_START)?,
                kind => {
                    let found = format!("{kind:#04x}");
                    return Err(unexpected(
                        at,
                        "section type",
                        found,
                        "the end of the RAM section",
                    ));
                }
            }
        }
    }

    fn empty_section(&mut self, section: u32) -> Result<(), StreamError> {
        self.expect_u32("section id", section)?;
        self.end_of_section(section)
    }

    fn end_of_section(&mut self, section: u32) -> Result<(), StreamError> {
        self.expect_u64("end of RAM", RAM_FLAG_END)?;
        self.expect_u8("section footer", SECTION_FOOTER)?;
        self.expect_u32("section id of the footer", section)
    }

    fn truncated(&self, offset: u64, wanted: u64) -> StreamError {
        StreamError::Truncated { offset, wanted, len_bytes: self.len_bytes }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StreamError> {
        let mut out = [0; N];
        self.fill(&mut out)?;
        Ok(out)
    }

    fn bytes(&mut self, count: usize) -> Result<Vec<u8>, StreamError> {
        let mut out = vec![0; count];
        self.fill(&mut out)?;
        Ok(out)
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<(), StreamError> {
        let (offset, wanted) = (self.at, out.len() as u64);
        let end = offset
            .checked_add(wanted)
            .filter(|&end| end <= self.len_bytes)
            .ok_or_else(|| self.truncated(offset, wanted))?;
        self.source
            .read_exact_at(out, offset)
            .map_err(|source| StreamError::Read { offset, source })?;
        self.at = end;
        Ok(())
    }

    fn u8(&mut self) -> Result<u8, StreamError> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, StreamError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, StreamError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// Text of `count` bytes, which must be UTF-8.
    fn text(&mut self, what: &'static str, count: usize) -> Result<String, StreamError> {
        let at = self.at;
        let bytes = self.bytes(count)?;
        String::from_utf8(bytes)
            .map_err(|error| unexpected(at, what, format!("{:02x?}", error.as_bytes()), "text"))
    }

    /// Text after its length in one byte.
    fn short(&mut self, what: &'static str) -> Result<String, StreamError> {
        let count = self.u8()?;
        self.text(what, usize::from(count))
    }

    fn expect_short(&mut self, what: &'static str, expected: &str) -> Result<(), StreamError> {
        let at = self.at;
        let found = self.short(what)?;
        if found == expected { Ok(()) } else { Err(unexpected(at, what, found, expected)) }
    }

    fn expect_u8(&mut self, what: &'static str, expected: u8) -> Result<(), StreamError> {
        let at = self.at;
        let found = self.u8()?;
        if found == expected { Ok(()) } else { Err(unexpected(at, what, found, expected)) }
    }

    fn expect_u32(&mut self, what: &'static str, expected: u32) -> Result<(), StreamError> {
        let at = self.at;
        let found = self.u32()?;
        if found == expected { Ok(()) } else { Err(unexpected(at, what, found, expected)) }
    }

    fn expect_u64(&mut self, what: &'static str, expected: u64) -> Result<(), StreamError> {
        let at = self.at;
        let found = self.u64()?;
        if found == expected { Ok(()) } else { Err(unexpected(at, what, found, expected)) }
    }
}
