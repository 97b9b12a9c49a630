//! Device state of a stopped QEMU, by `xen-save-devices-state`.
//!
//! Despite its name every QEMU has the command. It writes, without RAM, what a migration would:
//!
//! ```text
//! "QEVM" | be32 3 | 04 section of each device, 7e footer ... | 00
//!  0        4       8                                          len-1
//! ```
//!
//! QEMU writes into a memfd of ours, handed over by `add-fd`, so neither its user, its sandbox nor its
//! view of the file system matters. `live` must be false: otherwise QEMU gives up its disks
//! afterwards. The command checks nothing itself; the [preflight](super::preflight) has.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;

use super::qmp::{Qmp, QmpError};

/// `QEMU_VM_FILE_MAGIC`, `QEMU_VM_FILE_VERSION` (migration/savevm.h in QEMU).
const HEADER: [u8; 8] = *b"QEVM\0\0\0\x03";
/// `QEMU_VM_EOF`, `QEMU_VM_SECTION_FULL`, `QEMU_VM_SECTION_FOOTER`.
const END: u8 = 0x00;
const SECTION_FULL: u8 = 0x04;
const SECTION_FOOTER: u8 = 0x7e;
/// Bytes of a footer: its mark and the section's number.
const FOOTER_BYTES: usize = 5;
/// More than any machine has: state of devices, not memory.
const STATE_BYTES_MAX: u64 = 256 << 20;

/// Why there is no device state.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStateError {
    /// QEMU refused or did not answer.
    #[error("cannot save device state: {0}")]
    Qmp(#[from] QmpError),
    /// The buffer failed.
    #[error("cannot provide memory for the device state: {0}")]
    Buffer(#[from] io::Error),
    /// What was saved is not in the known form.
    #[error(
        "QEMU's device state of {len_bytes} bytes {what}: this version of QEMU is not supported"
    )]
    Form {
        /// Its length.
        len_bytes: usize,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// A place for the device state, made before the pause: a memfd that QEMU knows as a descriptor set.
#[derive(Debug)]
pub struct Slot {
    set: u64,
    memory: OwnedFd,
}

impl Slot {
    /// Makes the place.
    ///
    /// # Errors
    /// If QEMU refuses or memory is short.
    pub fn open(qmp: &mut Qmp, limit: Duration) -> Result<Self, DeviceStateError> {
        let memory =
            memfd_create("livesnap-device-state", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
        // QEMU looks for a descriptor of the set whose access mode is exactly the one it wants.
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let write_only = OpenOptions::new().write(true).open(path)?;
        let added = qmp.execute_with_fd("add-fd", json!({}), write_only.as_fd(), limit)?;
        let set =
            added["fdset-id"].as_u64().ok_or_else(|| QmpError::lacks("add-fd", "fdset-id"))?;
        Ok(Self { set, memory })
    }

    /// Saves the device state of the paused virtual machine and returns its sections.
    ///
    /// # Errors
    /// If QEMU refuses, or what it wrote is not framed as it should be.
    pub fn save(&self, qmp: &mut Qmp, limit: Duration) -> Result<Vec<u8>, DeviceStateError> {
        let filename = format!("/dev/fdset/{}", self.set);
        let arguments = json!({"filename": filename, "live": false});
        qmp.execute("xen-save-devices-state", arguments, limit)?;
        let mut state = Vec::new();
        // The writer had an offset of its own: this one is still at the beginning.
        File::from(self.memory.try_clone()?).take(STATE_BYTES_MAX).read_to_end(&mut state)?;
        sections(state)
    }

    /// Takes the descriptor from QEMU. The set is QEMU's to clean up when we disconnect, should it not go now.
    pub fn close(self, qmp: &mut Qmp, limit: Duration) {
        if let Err(error) = qmp.execute("remove-fd", json!({"fdset-id": self.set}), limit) {
            tracing::debug!(%error, "the device state's descriptor stays in QEMU until disconnection");
        }
    }
}

/// Checks the frame and takes it off.
fn sections(mut state: Vec<u8>) -> Result<Vec<u8>, DeviceStateError> {
    let len_bytes = state.len();
    let form = |what| DeviceStateError::Form { len_bytes, what };
    if !state.starts_with(&HEADER) {
        return Err(form("does not begin as stream version 3"));
    }
    if state.pop() != Some(END) {
        return Err(form("is cut off or too large"));
    }
    state.drain(..HEADER.len());
    if state.first() != Some(&SECTION_FULL) {
        return Err(form("does not begin with a device"));
    }
    if state.len() < FOOTER_BYTES || state[state.len() - FOOTER_BYTES] != SECTION_FOOTER {
        return Err(form("has sections without footers"));
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;

    #[test]
    fn the_frame_is_checked_and_taken_off() {
        let body = b"\x04\0\0\0\x01\x05timer\0\0\0\0\0\0\0\x02data\x7e\0\0\0\x01";
        let whole = [&HEADER[..], body, &[END]].concat();
        assert_eq!(sections(whole.clone()).unwrap(), body);
        for broken in [
            Vec::new(),
            whole[..whole.len() - 1].to_vec(),
            whole[1..].to_vec(),
            [&HEADER[..], &[END]].concat(),
            [&HEADER[..], b"\x04data", &[END]].concat(),
            [&HEADER[..], b"\x01data\x7e\0\0\0\x01", &[END]].concat(),
        ] {
            assert!(matches!(sections(broken), Err(DeviceStateError::Form { .. })));
        }
    }
}
