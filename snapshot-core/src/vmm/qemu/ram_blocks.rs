//! Guest RAM as QEMU lists it, in the text of `x-query-ramblock`:
//!
//! ```text
//!               Block Name    PSize              Offset               Used              Total                HVA  RO
//!                   pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007f8e0fe00000  rw
//! ```

use std::time::Duration;

use serde_json::json;

use super::qmp::{Qmp, QmpError};
use crate::address::{HostVirtAddr, PAGE_BYTES};
use crate::ram::{LayoutError, RamBlock, RamLayout};

/// Smaller blocks are ROMs, tables and device buffers rather than the guest's RAM.
const MAIN_RAM_BYTES_MIN: u64 = 16 << 20;
/// Columns to the right of the name, `PSize` counting for its number and its unit.
const FIELDS: usize = 7;

/// Why QEMU's RAM is not known.
#[derive(Debug, thiserror::Error)]
pub enum RamBlocksError {
    /// QEMU could not be asked.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The list has another form than expected.
    #[error(
        "cannot read this line of QEMU's list of RAM blocks: {line:?}: this version of QEMU is not supported"
    )]
    Line {
        /// The line.
        line: String,
    },
    /// The blocks make no sense.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// Asks QEMU for its RAM blocks.
///
/// # Errors
/// If QEMU does not answer, or with what this module does not understand.
pub fn query(qmp: &mut Qmp, limit: Duration) -> Result<RamLayout, RamBlocksError> {
    let (answer, text) = match qmp.execute("x-query-ramblock", json!({}), limit) {
        Err(error) if error.is_unknown_command() => {
            let arguments = json!({"command-line": "info ramblock"});
            let answer = qmp.execute("human-monitor-command", arguments, limit)?;
            let text = answer.as_str().map(str::to_owned);
            (answer, text)
        }
        answer => {
            let answer = answer?;
            let text = answer["human-readable-text"].as_str().map(str::to_owned);
            (answer, text)
        }
    };
    let text = text.ok_or_else(|| RamBlocksError::Line { line: answer.to_string() })?;
    parse(&text)
}

fn parse(text: &str) -> Result<RamLayout, RamBlocksError> {
    let bad = |line: &str| RamBlocksError::Line { line: line.trim().into() };
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let header = lines.next().unwrap_or_default();
    let titles: Vec<&str> = header.split_whitespace().collect();
    if titles != ["Block", "Name", "PSize", "Offset", "Used", "Total", "HVA", "RO"] {
        return Err(bad(header));
    }
    let mut blocks = Vec::new();
    for line in lines {
        if let Some(block) = parse_block(line).ok_or_else(|| bad(line))? {
            blocks.push(block);
        }
    }
    Ok(RamLayout::new(blocks)?)
}

/// The block in `line`, nothing inside if it holds no memory; nothing outside if it is no such line.
fn parse_block(line: &str) -> Option<Option<RamBlock>> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let name_fields = fields.len().checked_sub(FIELDS)?;
    let id = fields[..name_fields].join(" ");
    let [size, unit, _offset, used, _total, hva, access] = fields[name_fields..] else {
        return None;
    };
    let unit_bytes = match unit {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    let page_size_bytes = size.parse::<u64>().ok()?.checked_mul(unit_bytes)?;
    let used_bytes = hex(used)?;
    // Blocks without a name do not migrate, and resizable ones may be empty.
    if id.is_empty() || used_bytes == 0 {
        return Some(None);
    }
    Some(Some(RamBlock {
        store_zero_pages: !is_main_ram(&id, used_bytes, access == "rw"),
        id,
        hva: HostVirtAddr(hex(hva)?),
        // QEMU maps and migrates whole pages, and so do we.
        len_bytes: used_bytes.checked_next_multiple_of(PAGE_BYTES)?,
        page_size_bytes,
    }))
}

/// Whether a loading QEMU has nothing but zeros there: RAM of the board, of memory back ends and of
/// memory devices. Blocks of other devices are named `DEVICE/BLOCK`, firmware's `/rom@...`; those are
/// filled before the load. Wrongly denied costs some zeros in the file, wrongly affirmed corrupts.
fn is_main_ram(id: &str, used_bytes: u64, writable: bool) -> bool {
    let of_a_device = id.contains('/') && !id.starts_with("/objects/");
    writable && used_bytes >= MAIN_RAM_BYTES_MIN && !of_a_device
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;

    const HEADER: &str = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n";

    #[test]
    fn a_list_of_qemu_10_is_read() {
        let text = HEADER.to_owned()
            + "                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007f8e0fe00000  rw\r\n\
               /objects/mem 1    2 MiB  0x0000000010000000 0x0000000002000000 0x0000000002000000 0x00007f8e70000000  rw\r\n\
    0000:00:02.0/vga.vram    4 KiB  0x0000000008080000 0x0000000001000000 0x0000000001000000 0x00007f8e64400000  rw\r\n\
    /rom@etc/acpi/tables    4 KiB  0x00000000088c0000 0x0000000000020000 0x0000000000200000 0x00007f8e0fa00000  ro\r\n\
                            4 KiB  0x0000000009000000 0x0000000000020000 0x0000000000200000 0x00007f8e0fb00000  rw\r\n\
                   empty    4 KiB  0x0000000009000000 0x0000000000000000 0x0000000000200000 0x00007f8e0fc00000  rw\r\n\
                 pc.bios    4 KiB  0x0000000008000000 0x0000000000040000 0x0000000000040000 0x00007f8e67000000  ro\r\n";
        let layout = parse(&text).unwrap();
        let seen: Vec<(&str, u64, u64, bool)> = layout
            .blocks()
            .iter()
            .map(|b| (b.id.as_str(), b.len_bytes >> 10, b.page_size_bytes, b.store_zero_pages))
            .collect();
        assert_eq!(
            seen,
            [
                ("pc.ram", 128 << 10, 4096, false),
                ("/objects/mem 1", 32 << 10, 2 << 20, false),
                ("0000:00:02.0/vga.vram", 16 << 10, 4096, true),
                ("/rom@etc/acpi/tables", 128, 4096, true),
                ("pc.bios", 256, 4096, true),
            ]
        );
        assert_eq!(layout.blocks()[0].hva, HostVirtAddr(0x7f8e_0fe0_0000));
    }

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "",
            "Block Name PSize Offset Used Total\n",
            &(HEADER.to_owned() + "pc.ram 4 KiB 0x0 0x1000 0x1000 rw\n"),
            &(HEADER.to_owned() + "pc.ram 4 XiB 0x0 0x1000 0x1000 0x1000 rw\n"),
            &(HEADER.to_owned() + "pc.ram 4 KiB 0x0 0xffffffffffffffff 0x1000 0x1000 rw\n"),
            &(HEADER.to_owned() + "pc.ram 99999999999999999 GiB 0x0 0x1000 0x1000 0x1000 rw\n"),
            &(HEADER.to_owned() + "pc.ram 4 KiB 0x0 4096 0x1000 0x1000 rw\n"),
        ] {
            assert!(matches!(parse(text), Err(RamBlocksError::Line { .. })), "{text:?}");
        }
        assert!(matches!(parse(HEADER), Err(RamBlocksError::Layout(_))));
    }
}
