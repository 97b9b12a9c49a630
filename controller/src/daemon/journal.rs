//! What of the book survives the daemon: a file for each operation, and one for the turns of schedules whose operations
//! were forgotten.
//!
//! ```text
//! STATE_DIR/lock                  held while a daemon lives
//! STATE_DIR/turns.json            which turns were taken last
//! STATE_DIR/operations/ID.json    each written as .ID.json.new, synced, renamed
//! ```
//!
//! Written by the supervisor, on threads that may wait for the disk.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

use super::book::Record;
use super::schedule::Turn;

/// Why the journal cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file.
    #[error("cannot {operation} {}, where operations are kept: {source}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It has an owner.
    #[error(
        "{} is another daemon's: end that one, or give this one a state_dir of its own",
        path.display()
    )]
    Locked {
        /// The directory.
        path: PathBuf,
    },
}

/// The journal of one daemon.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    turns: PathBuf,
    /// Held until the end.
    _lock: File,
}

impl Journal {
    /// Takes possession of `state_dir`, and makes it if it is missing.
    ///
    /// # Errors
    /// If another daemon has it, or the file system refuses.
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let directory = state_dir.join("operations");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(failed("create", &directory))?;
        let path = state_dir.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open", &path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| JournalError::Locked { path: state_dir.into() })?;
        Ok(Self { directory, turns: state_dir.join("turns.json"), _lock: lock })
    }

    /// All that was written, in the order of ids; and what of it cannot be read.
    ///
    /// # Errors
    /// If the directory cannot be listed.
    pub fn load(&self) -> Result<(Vec<Record>, Vec<JournalError>), JournalError> {
        let (mut records, mut damaged) = (Vec::new(), Vec::new());
        let entries = fs::read_dir(&self.directory).map_err(failed("list", &self.directory))?;
        for entry in entries {
            let path = entry.map_err(failed("list", &self.directory))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let read = fs::read(&path).and_then(|text| Ok(serde_json::from_slice(&text)?));
            match read.map_err(failed("read", &path)) {
                Ok(record) => records.push(record),
                Err(error) => damaged.push(error),
            }
        }
        records.sort_by(|a: &Record, b: &Record| a.operation.id.cmp(&b.operation.id));
        Ok((records, damaged))
    }

    /// Writes a record; it is durable afterwards.
    ///
    /// # Errors
    /// If the file system refuses. What was written before is still there then.
    pub fn write(&self, record: &Record) -> Result<(), JournalError> {
        write(&self.path(&record.operation.id), record)
    }

    /// The turns that were [written](Self::write_turns), or none.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn load_turns(&self) -> Result<Vec<Turn>, JournalError> {
        match fs::read(&self.turns).and_then(|text| Ok(serde_json::from_slice(&text)?)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            read => read.map_err(failed("read", &self.turns)),
        }
    }

    /// Writes the turns that were taken, in place of those before; they are durable afterwards.
    ///
    /// # Errors
    /// If the file system refuses. What was written before is still there then.
    pub fn write_turns(&self, turns: &[Turn]) -> Result<(), JournalError> {
        write(&self.turns, turns)
    }

    /// Removes a record, if it is there.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn remove(&self, id: &str) -> Result<(), JournalError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }

    /// For a write that came to no end.
    pub fn interrupted(&self, source: impl Into<io::Error>) -> JournalError {
        failed("write below", &self.directory)(source.into())
    }

    fn path(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }
}

/// Replaces a file by a value; whoever reads it finds one or the other.
fn write<T: Serialize + ?Sized>(path: &Path, value: &T) -> Result<(), JournalError> {
    let name = path.file_name().unwrap_or_default().display();
    let directory = path.parent().unwrap_or(Path::new("/"));
    let draft = directory.join(format!(".{name}.new"));
    let write = || {
        let mut file =
            File::options().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
        file.write_all(&serde_json::to_vec(value)?)?;
        file.sync_all()?;
        fs::rename(&draft, path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(failed("write", path))
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::File { operation, path, source }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use std::time::SystemTime;

    use super::*;
    use crate::daemon::book::{Book, Bounds};
    use crate::daemon::budget::Budget;
    use crate::daemon::operation::Request;

    fn record(id: &str) -> Record {
        let budget = Budget::default();
        let bounds = Bounds { running_max: 1, queued_max: 1, remembered_max: 1, budget };
        let mut book = Book::new(bounds, Vec::new());
        let request = Request { vm: "vm1".into(), ..Request::default() };
        book.submit(id, &request, "/backup/a", Some("key"), "now").unwrap();
        book.get(id).unwrap().clone()
    }

    #[test]
    fn what_is_written_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("state")).unwrap();
        let records = ["07", "08", "09"].map(record);
        for record in records.iter().rev() {
            journal.write(record).unwrap();
            journal.write(record).unwrap();
        }
        journal.remove("08").unwrap();
        journal.remove("08").unwrap();
        let (found, damaged) = journal.load().unwrap();
        assert_eq!(found, [records[0].clone(), records[2].clone()]);
        assert!(damaged.is_empty());
    }

    #[test]
    fn turns_are_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        assert_eq!(journal.load_turns().unwrap(), []);
        let turn =
            |vm: &str| Turn { at: SystemTime::now(), schedule: "daily".into(), vm: vm.into() };
        for turns in [vec![turn("vm1"), turn("vm2")], vec![turn("vm2")]] {
            journal.write_turns(&turns).unwrap();
            assert_eq!(journal.load_turns().unwrap(), turns);
        }
        fs::write(dir.path().join("turns.json"), "[").unwrap();
        let error = journal.load_turns().unwrap_err().to_string();
        assert!(error.contains("turns.json"), "{error}");
    }

    #[test]
    fn a_damaged_record_harms_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.write(&record("07")).unwrap();
        fs::write(dir.path().join("operations/08.json"), "{\"operation\":").unwrap();
        fs::write(dir.path().join("operations/.09.json.new"), "{").unwrap();
        let (found, damaged) = journal.load().unwrap();
        assert_eq!(found, [record("07")]);
        assert_eq!(damaged.len(), 1);
        assert!(damaged[0].to_string().contains("08.json"), "{}", damaged[0]);
    }

    #[test]
    fn a_state_directory_has_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        assert!(matches!(Journal::open(dir.path()), Err(JournalError::Locked { .. })));
        drop(journal);
        Journal::open(dir.path()).unwrap();
    }
}
