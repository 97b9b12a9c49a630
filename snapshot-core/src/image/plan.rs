//! Where everything lies in the RAM file, known before the first page is written.
//!
//! Pure arithmetic and encoding; no I/O. The plan is made once per session and then only read, by any
//! thread.

use crate::address::{PAGE_BYTES, PageIndex};
use crate::image::ImageError;
use crate::image::format::{
    BLOCK_HEADER_BYTES, BLOCK_HEADER_VERSION, CAPABILITIES, CAPABILITIES_VERSION, MAGIC,
    MAPPED_RAM, PAGES_ALIGN_BYTES, RAM_FLAG_END, RAM_FLAG_TOTAL, RAM_INSTANCE, RAM_SECTION,
    RAM_SECTION_ID, RAM_VERSION, SECTION_CONFIGURATION, SECTION_DESCRIPTION, SECTION_END,
    SECTION_EOF, SECTION_FOOTER, SECTION_START, STREAM_VERSION, SUBSECTION, bitmap_bytes,
};
use crate::ram::RamLayout;

/// Length fields of one byte hold no longer name.
const NAME_BYTES_MAX: usize = 255;

/// Offsets of the RAM file, in bytes.
#[derive(Clone, Debug)]
pub struct FilePlan {
    /// Everything before the first block.
    header: Vec<u8>,
    blocks: Vec<BlockPlan>,
    trailer_offset: u64,
}

/// Offsets of one block.
#[derive(Clone, Debug)]
struct BlockPlan {
    first_page: u64,
    pages: u64,
    /// Name, length and mapped-ram header; they stand right before the bitmap.
    header: Vec<u8>,
    bitmap_offset: u64,
    pages_offset: u64,
}

impl FilePlan {
    /// Lays out the file for all blocks of `layout`, in its order.
    ///
    /// `machine_type` is the versioned one, such as `pc-q35-10.0`: QEMU refuses a file of another type.
    ///
    /// # Errors
    /// If a name does not fit into its length field, or the RAM not into a file.
    pub fn new(machine_type: &str, layout: &RamLayout) -> Result<Self, ImageError> {
        check_name("machine type", machine_type)?;
        let total_bytes = layout.total_bytes();
        let too_large = || ImageError::TooLarge { total_bytes };
        let header = stream_header(machine_type, total_bytes);
        let mut end = header.len() as u64;
        let mut blocks = Vec::with_capacity(layout.blocks().len());
        for (number, block) in layout.blocks().iter().enumerate() {
            check_name("RAM block", &block.id)?;
            let bitmap_offset = end + 1 + block.id.len() as u64 + 8 + BLOCK_HEADER_BYTES;
            let pages_offset = (bitmap_offset + bitmap_bytes(block.pages()))
                .checked_next_multiple_of(PAGES_ALIGN_BYTES)
                .ok_or_else(too_large)?;
            // What a file offset can be is half of what a u64 can: the additions above never overflow.
            end = pages_offset
                .checked_add(block.len_bytes)
                .filter(|&end| end <= i64::MAX as u64)
                .ok_or_else(too_large)?;
            blocks.push(BlockPlan {
                first_page: layout.block_run(number).first.0,
                pages: block.pages(),
                header: block_header(&block.id, block.len_bytes, bitmap_offset, pages_offset),
                bitmap_offset,
                pages_offset,
            });
        }
        Ok(Self { header, blocks, trailer_offset: end })
    }

    /// Where `page` is stored, a multiple of 4096. `page` must belong to the layout.
    #[must_use]
    pub fn page_offset(&self, page: PageIndex) -> u64 {
        let block = self.blocks.partition_point(|block| block.first_page <= page.0) - 1;
        let block = &self.blocks[block];
        block.pages_offset + (page.0 - block.first_page) * PAGE_BYTES
    }

    /// Where the first page of block number `block` is stored, a multiple of 1 MiB.
    #[must_use]
    pub fn pages_offset(&self, block: usize) -> u64 {
        self.blocks[block].pages_offset
    }

    /// Where the last page's bytes end and the trailer begins.
    #[must_use]
    pub const fn trailer_offset(&self) -> u64 {
        self.trailer_offset
    }

    /// Where the bitmap of block number `block` lies.
    pub(crate) fn bitmap_offset(&self, block: usize) -> u64 {
        self.blocks[block].bitmap_offset
    }

    /// Number of blocks.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Everything that is neither padding, nor page, nor trailer: byte strings and their offsets, ascending.
    ///
    /// `stored` has one bit for each page slot of the layout.
    pub(crate) fn metadata<'a>(
        &'a self,
        stored: &'a [u64],
    ) -> impl Iterator<Item = (u64, Vec<u8>)> + 'a {
        let header = (0, self.header.clone());
        std::iter::once(header).chain(self.blocks.iter().map(|block| {
            let mut bytes = block.header.clone();
            let offset = block.bitmap_offset - bytes.len() as u64;
            // A word of the table is a word of the bitmap: blocks start at multiples of 64 slots.
            let words = stored.iter().skip(index(block.first_page / 64));
            for word in words.take(index(block.pages.div_ceil(64))) {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            (offset, bytes)
        }))
    }

    /// The bytes at [`trailer_offset`](Self::trailer_offset), up to the end of the file.
    pub(crate) fn trailer(device_sections: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(device_sections.len() + 64);
        let footer = |out: &mut Vec<u8>| {
            out.extend_from_slice(&RAM_FLAG_END.to_be_bytes());
            out.push(SECTION_FOOTER);
            out.extend_from_slice(&RAM_SECTION_ID.to_be_bytes());
        };
        footer(&mut out);
        out.push(SECTION_END);
        out.extend_from_slice(&RAM_SECTION_ID.to_be_bytes());
        footer(&mut out);
        out.extend_from_slice(device_sections);
        out.push(SECTION_EOF);
        out.push(SECTION_DESCRIPTION);
        out.extend_from_slice(&2_u32.to_be_bytes());
        out.extend_from_slice(b"{}");
        out
    }
}

/// A table index from a page or word number; tables of that size exist, so it fits.
#[expect(clippy::cast_possible_truncation, reason = "livesnap runs on 64-bit hosts only")]
pub(super) const fn index(number: u64) -> usize {
    number as usize
}

fn check_name(what: &'static str, name: &str) -> Result<(), ImageError> {
    if name.len() > NAME_BYTES_MAX {
        return Err(ImageError::NameTooLong { what, name: name.into(), limit: NAME_BYTES_MAX });
    }
    Ok(())
}

/// Appends a string after its length in one byte.
#[expect(clippy::cast_possible_truncation, reason = "names are checked, or are constants")]
fn push_short(out: &mut Vec<u8>, text: &str) {
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
}

#[expect(clippy::cast_possible_truncation, reason = "the machine type's length is checked")]
fn stream_header(machine_type: &str, total_bytes: u64) -> Vec<u8> {
    let mut out = Vec::from(MAGIC);
    out.extend_from_slice(&STREAM_VERSION.to_be_bytes());
    out.push(SECTION_CONFIGURATION);
    out.extend_from_slice(&(machine_type.len() as u32).to_be_bytes());
    out.extend_from_slice(machine_type.as_bytes());
    out.push(SUBSECTION);
    push_short(&mut out, CAPABILITIES);
    out.extend_from_slice(&CAPABILITIES_VERSION.to_be_bytes());
    out.extend_from_slice(&1_u32.to_be_bytes());
    push_short(&mut out, MAPPED_RAM);
    out.push(SECTION_START);
    out.extend_from_slice(&RAM_SECTION_ID.to_be_bytes());
    push_short(&mut out, RAM_SECTION);
    out.extend_from_slice(&RAM_INSTANCE.to_be_bytes());
    out.extend_from_slice(&RAM_VERSION.to_be_bytes());
    out.extend_from_slice(&(total_bytes | RAM_FLAG_TOTAL).to_be_bytes());
    out
}

fn block_header(id: &str, len_bytes: u64, bitmap_offset: u64, pages_offset: u64) -> Vec<u8> {
    let mut out = Vec::new();
    push_short(&mut out, id);
    out.extend_from_slice(&len_bytes.to_be_bytes());
    out.extend_from_slice(&BLOCK_HEADER_VERSION.to_be_bytes());
    out.extend_from_slice(&PAGE_BYTES.to_be_bytes());
    out.extend_from_slice(&bitmap_offset.to_be_bytes());
    out.extend_from_slice(&pages_offset.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::address::HostVirtAddr;
    use crate::ram::RamBlock;

    fn layout(blocks: &[(&str, u64)]) -> RamLayout {
        let mut hva = 0x1_0000_0000;
        let blocks = blocks.iter().map(|&(id, pages)| {
            let block = RamBlock {
                id: id.into(),
                hva: HostVirtAddr(hva),
                len_bytes: pages * PAGE_BYTES,
                page_size_bytes: PAGE_BYTES,
                store_zero_pages: false,
            };
            hva += block.len_bytes;
            block
        });
        RamLayout::new(blocks.collect()).unwrap()
    }

    #[test]
    fn header_bytes_are_those_of_qemu() {
        let layout = layout(&[("pc.ram", 3), ("pc.bios", 65)]);
        let plan = FilePlan::new("pc-q35-10.0", &layout).unwrap();
        let mut stored = vec![0_u64; 3];
        stored[0] = 0b101;
        stored[2] = 1;
        let metadata: Vec<_> = plan.metadata(&stored).collect();

        let mut header = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0".to_vec();
        header.extend(b"\x05\x1aconfiguration/capabilities\0\0\0\x01");
        header.extend(b"\0\0\0\x01\x0amapped-ram");
        header.extend(b"\x01lsnp\x03ram\0\0\0\0\0\0\0\x04");
        header.extend(b"\0\0\0\0\0\x04\x40\x04");
        assert_eq!(header.len(), 0x60);
        assert_eq!(metadata[0], (0, header));

        let mut ram = b"\x06pc.ram\0\0\0\0\0\0\x30\0".to_vec();
        ram.extend(b"\0\0\0\x01\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x8b\0\0\0\0\0\x10\0\0");
        ram.extend(b"\x05\0\0\0\0\0\0\0");
        assert_eq!(metadata[1], (0x60, ram));

        let mut bios = b"\x07pc.bios\0\0\0\0\0\x04\x10\0".to_vec();
        bios.extend(b"\0\0\0\x01\0\0\0\0\0\0\x10\0\0\0\0\0\0\x10\x30\x2c\0\0\0\0\0\x20\0\0");
        bios.extend(b"\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0");
        assert_eq!(metadata[2], (0x10_3000, bios));

        assert_eq!(plan.page_offset(PageIndex(2)), 0x10_2000);
        assert_eq!(plan.page_offset(PageIndex(64 + 64)), 0x24_0000);
        assert_eq!(plan.trailer_offset(), 0x20_0000 + 65 * 4096);
    }

    #[test]
    fn trailer_bytes_are_those_of_qemu() {
        let mut expected = b"\0\0\0\0\0\0\0\x10\x7elsnp".to_vec();
        expected.extend(b"\x03lsnp\0\0\0\0\0\0\0\x10\x7elsnp");
        expected.extend(b"device\0\x06\0\0\0\x02{}");
        assert_eq!(FilePlan::trailer(b"device"), expected);
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        let long = "x".repeat(256);
        let refused = FilePlan::new("pc", &layout(&[(&long, 1)]));
        assert!(matches!(refused, Err(ImageError::NameTooLong { what: "RAM block", .. })));
        let refused = FilePlan::new(&long, &layout(&[("pc.ram", 1)]));
        assert!(matches!(refused, Err(ImageError::NameTooLong { what: "machine type", .. })));
    }
}
