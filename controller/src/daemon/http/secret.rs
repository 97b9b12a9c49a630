//! Files with what nobody else may know.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Why a secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// Its file.
    #[error("cannot read the {what} in {}: {source}", path.display())]
    Read {
        /// What it is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others can read it.
    #[error("the {what} in {} can be read by others, for its mode is {mode:04o}: set it to 0600", path.display())]
    Mode {
        /// What it is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
}

/// Reads a secret's file, or the beginning of it, if only its owner may.
///
/// # Errors
/// If others may too, or it cannot be read.
pub fn read_secret(
    what: &'static str,
    path: &Path,
    bytes_max: usize,
) -> Result<Vec<u8>, SecretError> {
    let failed = |source| SecretError::Read { what, path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(SecretError::Mode { what, path: path.into(), mode });
    }
    let mut bytes = Vec::new();
    file.take(bytes_max as u64).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
