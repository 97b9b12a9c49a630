//! Reader of QEMU's mapped-ram migration file: where each RAM page lies, and which pages are zero.
//!
//! ```text
//! "QEVM" version                         header
//! 07 machine                             configuration, with its 05 capabilities subsection
//! 01 section "ram", then the RAM blocks  name, length, bitmap, pages at 1 MiB steps
//! ...                                    devices: not read here
//! ```
//!
//! Numbers are big-endian; only the bitmap is little-endian. Written from QEMU's `docs/devel/migration/
//! mapped-ram.rst` and `migration/ram.c` alone, so that files of the product and of QEMU are read alike.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use livesnap_guest::page::PAGE_BYTES;

const RAM_SAVE_FLAG_MEM_SIZE: u64 = 0x04;
/// Enough for the largest name and count that the format can hold.
const NAME_BYTES_MAX: u64 = 255;
/// Pages that are read at once.
const BATCH_PAGES: u64 = 256;

/// An open mapped-ram file.
#[derive(Debug)]
pub struct MappedRam {
    file: File,
    /// Machine type that the file is for.
    pub machine: String,
    /// The RAM blocks, in file order.
    pub blocks: Vec<Block>,
}

/// One RAM block.
#[derive(Debug, Clone)]
pub struct Block {
    /// QEMU's name for it, such as "pc.ram".
    pub name: String,
    /// Its length.
    pub used_bytes: u64,
    /// Where its first page lies in the file.
    pub pages_offset: u64,
    /// Bit i is set if page i is in the file.
    bitmap: Vec<u8>,
}

impl Block {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.used_bytes / PAGE_BYTES as u64
    }

    /// Whether the page is in the file; if not, it is zero.
    pub fn is_present(&self, page: u64) -> bool {
        usize::try_from(page / 8)
            .ok()
            .and_then(|byte| self.bitmap.get(byte))
            .is_some_and(|byte| byte >> (page % 8) & 1 == 1)
    }
}

impl MappedRam {
    /// Reads the headers and bitmaps.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut cursor = Cursor { file: &file, offset: 0 };
        cursor.expect(b"QEVM", "file magic")?;
        ensure!(cursor.be32()? == 3, "not version 3 of the migration stream");

        cursor.expect(&[0x07], "configuration section")?;
        let machine_bytes = cursor.be32()?.into();
        let machine = cursor.string(machine_bytes)?;
        cursor.expect(&[0x05, 26], "capabilities subsection")?;
        cursor.expect(b"configuration/capabilities", "capabilities subsection")?;
        ensure!(cursor.be32()? == 1, "not version 1 of the capabilities subsection");
        let count = cursor.be32()?;
        let mut capabilities = Vec::new();
        for _ in 0..count {
            capabilities.push(cursor.short_string()?);
        }
        ensure!(
            capabilities.iter().any(|name| name == "mapped-ram"),
            "capabilities are {capabilities:?}, without mapped-ram"
        );

        let blocks = read_blocks(&mut cursor)?;
        Ok(Self { file, machine, blocks })
    }

    /// Calls `visit` with each page in the file: block, page index, content.
    pub fn for_each_page(&self, mut visit: impl FnMut(&Block, u64, &[u8])) -> Result<()> {
        let mut buffer = vec![0; usize::try_from(BATCH_PAGES)? * PAGE_BYTES];
        for block in &self.blocks {
            for first in (0..block.pages()).step_by(usize::try_from(BATCH_PAGES)?) {
                let batch = first..(first + BATCH_PAGES).min(block.pages());
                if !batch.clone().any(|page| block.is_present(page)) {
                    continue;
                }
                let bytes = &mut buffer[..usize::try_from(batch.end - batch.start)? * PAGE_BYTES];
                self.file
                    .read_exact_at(bytes, block.pages_offset + first * PAGE_BYTES as u64)
                    .with_context(|| format!("cannot read pages {batch:?} of {}", block.name))?;
                for (page, content) in batch.zip(bytes.chunks_exact(PAGE_BYTES)) {
                    if block.is_present(page) {
                        visit(block, page, content);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Alters a byte of the last page that is in the file, which is the guest's and not of what QEMU keeps beside RAM.
pub fn damage(path: &Path) -> Result<()> {
    let ram = MappedRam::open(path)?;
    let block = ram.blocks.iter().max_by_key(|block| block.used_bytes).context("no RAM block")?;
    let page = (0..block.pages()).rev().find(|page| block.is_present(*page));
    let at = block.pages_offset + page.context("no page is in the file")? * PAGE_BYTES as u64;
    let file = File::options().read(true).write(true).open(path);
    let file = file.with_context(|| format!("cannot open {} to write", path.display()))?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).context("cannot read a page")?;
    file.write_all_at(&[!byte[0]], at).context("cannot write a page")
}

fn read_blocks(cursor: &mut Cursor<'_>) -> Result<Vec<Block>> {
    cursor.expect(&[0x01], "start of a section")?;
    let section = cursor.be32()?;
    ensure!(section != 0, "section id 0 belongs to the timer");
    ensure!(cursor.short_string()? == "ram", "the first section is not ram");
    cursor.be32()?;
    ensure!(cursor.be32()? == 4, "not version 4 of the ram section");
    let total = cursor.be64()?;
    ensure!(
        total & 0xfff == RAM_SAVE_FLAG_MEM_SIZE,
        "flags of the ram section are {:#x}",
        total & 0xfff
    );

    let mut left = total & !0xfff;
    let mut blocks = Vec::new();
    while left > 0 {
        let name = cursor.short_string()?;
        let used_bytes = cursor.be64()?;
        ensure!(
            used_bytes > 0 && used_bytes <= left,
            "block {name} has {used_bytes} bytes of {left} that are left"
        );
        ensure!(cursor.be32()? == 1, "not version 1 of the header of block {name}");
        ensure!(cursor.be64()? == PAGE_BYTES as u64, "the pages of block {name} are not of 4 KiB");
        let bitmap_offset = cursor.be64()?;
        let pages_offset = cursor.be64()?;
        ensure!(
            pages_offset.is_multiple_of(1 << 20),
            "the pages of block {name} begin at {pages_offset:#x}, not at a whole MiB"
        );
        let bitmap_bytes = (used_bytes / PAGE_BYTES as u64).div_ceil(64) * 8;
        cursor.offset = bitmap_offset;
        let bitmap = cursor.bytes(bitmap_bytes)?;
        ensure!(cursor.offset <= pages_offset, "the bitmap of block {name} overlaps its pages");
        cursor.offset = pages_offset + used_bytes;
        left -= used_bytes;
        blocks.push(Block { name, used_bytes, pages_offset, bitmap });
    }
    ensure!(cursor.be64()? == 0x10, "there is no end-of-section flag behind the last block");
    Ok(blocks)
}

/// Reads big-endian numbers one after another.
struct Cursor<'a> {
    file: &'a File,
    offset: u64,
}

impl Cursor<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.file
            .read_exact_at(&mut bytes, self.offset)
            .with_context(|| format!("file ends at offset {:#x}", self.offset))?;
        self.offset += N as u64;
        Ok(bytes)
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(count)?];
        self.file
            .read_exact_at(&mut bytes, self.offset)
            .with_context(|| format!("file ends within {count} bytes at {:#x}", self.offset))?;
        self.offset += count;
        Ok(bytes)
    }

    fn be32(&mut self) -> Result<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn be64(&mut self) -> Result<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn string(&mut self, bytes: u64) -> Result<String> {
        ensure!(bytes <= NAME_BYTES_MAX, "a name of {bytes} bytes at {:#x}", self.offset);
        String::from_utf8(self.bytes(bytes)?).context("a name is not UTF-8")
    }

    fn short_string(&mut self) -> Result<String> {
        let [bytes] = self.array()?;
        self.string(bytes.into())
    }

    fn expect(&mut self, wanted: &[u8], what: &str) -> Result<()> {
        let at = self.offset;
        let found = self.bytes(wanted.len() as u64)?;
        if found != wanted {
            bail!("no {what} at offset {at:#x}: found {found:02x?}");
        }
        Ok(())
    }
}
