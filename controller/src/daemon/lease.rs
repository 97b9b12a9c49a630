//! Whether the process of an operation lives, also if the daemon that started it does not: a lock on a file, which the
//! process inherits, and its guard from it. The kernel frees it with the last of them.
//!
//! ```text
//! RUNTIME_DIR/operations/ID.lock     there while an operation runs, and after a daemon was killed
//! ```
//!
//! It lies where a reboot clears it, which ends all processes too.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::{FdFlags, fcntl_setfd};

/// How often it is looked whether a process has ended whose parent is another.
const LOOK: Duration = Duration::from_millis(50);

/// The lock of one operation; its file is removed with this.
#[derive(Debug)]
pub struct Lease {
    path: PathBuf,
}

impl Lease {
    /// That of operation `id`, whether or not it was ever taken.
    pub fn of(runtime_dir: &Path, id: &str) -> Self {
        Self { path: runtime_dir.join("operations").join(format!("{id}.lock")) }
    }

    /// Takes it. The lock is held until every copy of the descriptor is closed; every process inherits one that is started
    /// before this one is closed.
    ///
    /// # Errors
    /// If somebody holds it, or the file system refuses.
    pub fn take(&self) -> io::Result<OwnedFd> {
        if let Some(directory) = self.path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&self.path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        fcntl_setfd(&file, FdFlags::empty())?;
        Ok(file.into())
    }

    /// Waits until nobody holds it.
    pub async fn ended(&self) {
        while self.is_held() {
            tokio::time::sleep(LOOK).await;
        }
    }

    fn is_held(&self) -> bool {
        let Ok(file) = File::open(&self.path) else { return false };
        flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // One that stays says nothing: nobody holds it.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn it_is_held_as_long_as_the_process_lives() {
        let dir = tempfile::tempdir().unwrap();
        let lease = Lease::of(dir.path(), "07");
        assert!(!lease.is_held());
        let held = lease.take().unwrap();
        assert!(lease.take().is_err());
        let mut process = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        drop(held);
        assert!(lease.is_held());
        process.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        assert!(lease.is_held());
        drop(process.stdin.take());
        process.wait().unwrap();
        assert!(!lease.is_held());
        let path = lease.path.clone();
        drop(lease);
        assert!(!path.exists());
    }
}
