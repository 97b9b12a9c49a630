//! Loading a snapshot into a QEMU that was started with `-incoming defer`, after a look at whether it fits.
//!
//! QEMU compares neither the lengths of RAM blocks nor the number of CPUs with the file: memory of
//! another size loads without a word, and the guest breaks later. So that is done here, first.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError};
use super::ram_blocks::{self, RamBlocksError};
use crate::Reason;
use crate::image::Manifest;

/// Longest wait for an answer; the load itself runs in the background.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Why a QEMU did not take a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// QEMU could not be asked.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU's RAM is not known.
    #[error(transparent)]
    RamBlocks(#[from] RamBlocksError),
    /// The virtual machine is another one.
    #[error(
        "the new virtual machine has {what} {found} but the snapshot has {expected}, and loading would break the guest: use the arguments that the original was started with"
    )]
    Mismatch {
        /// Which property.
        what: String,
        /// Its value in the new virtual machine.
        found: String,
        /// Its value in the snapshot.
        expected: String,
    },
    /// QEMU gave up.
    #[error("QEMU could not load the snapshot ({description}): see its messages above")]
    Failed {
        /// QEMU's text.
        description: String,
    },
}

impl IncomingError {
    /// The stable reason code.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Qmp(error) => error.reason(),
            Self::RamBlocks(_) | Self::Failed { .. } => Reason::VmmRefused,
            Self::Mismatch { .. } => Reason::Mismatch,
        }
    }
}

/// Checks that the virtual machine behind `qmp` has the machine type, CPUs and RAM blocks of `manifest`.
///
/// # Errors
/// With the first thing that differs, or if QEMU does not answer.
pub fn compare(qmp: &mut Qmp, manifest: &Manifest) -> Result<(), IncomingError> {
    let property = json!({"path": "/machine", "property": "type"});
    let kind = qmp.execute("qom-get", property, ANSWER_LIMIT)?;
    let kind = kind.as_str().unwrap_or_default();
    let machine_type = kind.strip_suffix("-machine").unwrap_or(kind);
    same("the machine type", &machine_type, &manifest.machine.machine_type.as_str())?;
    let cpus = qmp.execute("query-cpus-fast", json!({}), ANSWER_LIMIT)?;
    let cpus = cpus.as_array().map_or(0, Vec::len) as u64;
    same("a number of CPUs of", &cpus, &u64::from(manifest.machine.cpus))?;

    let layout = ram_blocks::query(qmp, ANSWER_LIMIT)?;
    for expected in &manifest.ram.blocks {
        let found = layout.blocks().iter().find(|block| block.id == expected.id);
        let what = format!("RAM block {:?} of a length of", expected.id);
        match found {
            Some(found) => same(&what, &found.len_bytes, &expected.len_bytes)?,
            None => same(&what, &"nothing", &expected.len_bytes.to_string().as_str())?,
        }
    }
    for found in layout.blocks() {
        if manifest.ram.blocks.iter().all(|expected| expected.id != found.id) {
            let what = format!("RAM block {:?} of a length of", found.id);
            same(&what, &found.len_bytes.to_string().as_str(), &"none")?;
        }
    }
    Ok(())
}

fn same<T: PartialEq + ToString>(what: &str, found: &T, expected: &T) -> Result<(), IncomingError> {
    if found == expected {
        return Ok(());
    }
    Err(IncomingError::Mismatch {
        what: what.into(),
        found: found.to_string(),
        expected: expected.to_string(),
    })
}

/// Starts loading the RAM file `ram`, which must be an absolute path; [`is_loaded`] tells when it is done.
///
/// # Errors
/// If QEMU refuses.
pub fn start(qmp: &mut Qmp, ram: &Path) -> Result<(), IncomingError> {
    let capability = json!({"capability": "mapped-ram", "state": true});
    let capabilities = json!({"capabilities": [capability]});
    qmp.execute("migrate-set-capabilities", capabilities, ANSWER_LIMIT)?;
    let uri = format!("file:{}", ram.display());
    qmp.execute("migrate-incoming", json!({"uri": uri}), ANSWER_LIMIT)?;
    Ok(())
}

/// Whether everything is loaded. The virtual machine is then stopped, if QEMU was started with `-S`.
///
/// # Errors
/// If loading failed or QEMU has ended.
pub fn is_loaded(qmp: &mut Qmp) -> Result<bool, IncomingError> {
    let state = qmp.execute("query-migrate", json!({}), ANSWER_LIMIT)?;
    match state["status"].as_str() {
        Some("completed") => Ok(true),
        Some("failed" | "cancelled") => {
            let description = state["error-desc"].as_str().unwrap_or("no reason given").into();
            Err(IncomingError::Failed { description })
        }
        _ => Ok(false),
    }
}

/// Lets the guest run on.
///
/// # Errors
/// If QEMU refuses.
pub fn resume(qmp: &mut Qmp) -> Result<Value, IncomingError> {
    Ok(qmp.execute("cont", json!({}), ANSWER_LIMIT)?)
}
