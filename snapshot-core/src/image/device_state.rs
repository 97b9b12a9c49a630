//! What livesnap changes in QEMU's device state: whether the guest was running.
//!
//! QEMU saves the state while the machine is stopped for the snapshot and records "running" in its
//! `globalstate` section even for a guest that its owner had paused. QEMU's loader obeys that record.
//!
//! Source: QEMU 10.0, `migration/global_state.c`:
//! `04 be32 SID, u8 11 "globalstate", be32 0, be32 1`, then `be32 length, char[32] state, ...`.

use crate::image::ImageError;
use crate::image::format::SECTION_FULL;

/// Name with its length, instance 0, version 1.
const HEADER: &[u8] = b"\x0bglobalstate\0\0\0\0\0\0\0\x01";
/// Section type and id stand before the name.
const BEFORE_NAME_BYTES: usize = 5;
/// Length of the state's text, with its end mark, and the text in its buffer.
const LENGTH_BYTES: usize = 4;
const TEXT_BYTES: usize = 32;
const PAUSED: &[u8] = b"paused\0";

/// `sections` with the guest marked as paused.
///
/// # Errors
/// If there is not exactly one section to mark.
pub fn mark_paused(sections: &[u8]) -> Result<Vec<u8>, ImageError> {
    let positions: Vec<usize> = sections
        .windows(HEADER.len())
        .enumerate()
        .filter(|&(at, window)| window == HEADER && is_section(sections, at))
        .map(|(at, _)| at + HEADER.len())
        .collect();
    let &[payload] = positions.as_slice() else {
        return Err(ImageError::GlobalState { found: positions.len() });
    };
    let mut out = sections.to_vec();
    let mut value = [0_u8; LENGTH_BYTES + TEXT_BYTES];
    value[LENGTH_BYTES - 1] = 7;
    value[LENGTH_BYTES..LENGTH_BYTES + PAUSED.len()].copy_from_slice(PAUSED);
    out[payload..payload + value.len()].copy_from_slice(&value);
    Ok(out)
}

/// Whether the name at `at` is that of a full section with a plausible payload, not a device's data.
fn is_section(sections: &[u8], at: usize) -> bool {
    let payload = at + HEADER.len();
    let Some(length) = sections.get(payload..payload + LENGTH_BYTES) else { return false };
    let fits = sections.len() >= payload + LENGTH_BYTES + TEXT_BYTES;
    let plausible = length[..3] == [0; 3] && usize::from(length[3]) <= TEXT_BYTES;
    let full = at.checked_sub(BEFORE_NAME_BYTES).map(|start| sections[start]);
    full == Some(SECTION_FULL) && fits && plausible
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;

    fn section() -> Vec<u8> {
        let mut out =
            b"\x04\0\0\0\x07\x0bglobalstate\0\0\0\0\0\0\0\x01\0\0\0\x08running\0".to_vec();
        out.extend([0; 24 + 68]);
        out.extend(b"\x7e\0\0\0\x07");
        out
    }

    #[test]
    fn a_running_state_becomes_paused_and_nothing_else_changes() {
        let mut sections = b"timer globalstate".to_vec();
        sections.extend(section());
        let marked = mark_paused(&sections).unwrap();
        let expected = sections.clone();
        let text = 17 + 5 + HEADER.len();
        assert_eq!(&marked[text..text + 12], b"\0\0\0\x07paused\0\0");
        assert_eq!(marked[..text], expected[..text]);
        assert_eq!(marked[text + 12..], expected[text + 12..]);
    }

    #[test]
    fn no_section_two_sections_and_a_cut_one_are_refused() {
        let twice = [section(), section()].concat();
        assert!(matches!(mark_paused(b""), Err(ImageError::GlobalState { found: 0 })));
        assert!(matches!(mark_paused(&twice), Err(ImageError::GlobalState { found: 2 })));
        let cut = &section()[..40];
        assert!(matches!(mark_paused(cut), Err(ImageError::GlobalState { found: 0 })));
    }
}
