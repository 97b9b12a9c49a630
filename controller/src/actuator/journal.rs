//! What was found before anything was changed, in a file, and how it is put back from there.
//!
//! A journal is complete before the first change, and is removed after the last one was undone. Undoing twice does no
//! more than undoing once. A journal whose owner has ended is undone by whoever comes first: the guard of that owner,
//! or the next livesnap. It lies where a reboot clears it, for a reboot clears cgroups too.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::cgroup::{CgroupError, Group, Quota};
use crate::process::{ProcessError, ProcessId};

/// How long a guard waits for the end of a livesnap that has already closed its files.
const END_LIMIT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// How often the removal of a group is tried whose last thread is just leaving, and how long between.
const REMOVALS: u32 = 50;
const REMOVAL_INTERVAL: Duration = Duration::from_millis(10);

/// Something that was changed, and what it was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// The quota of a group that others have made.
    Quota {
        /// That group.
        group: Group,
        /// Its quota before.
        found: Quota,
    },
    /// Groups below this one got quotas of their own.
    LentCpu {
        /// That group.
        group: Group,
    },
    /// Threads went to a group made for them, below the one they were in.
    Moved {
        /// Where they were.
        from: Group,
        /// Where they went.
        to: Group,
    },
}

/// Why a journal could not be kept or undone.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A process could not be looked at.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A file.
    #[error(
        "cannot {operation} {path:?}, where what has to be put back is kept: {source}: name another directory by --state-dir"
    )]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// Another livesnap is at it.
    #[error(
        "{path:?} exists, so another livesnap throttles this virtual machine: wait for its end, or run `livesnap doctor --repair` if there is none"
    )]
    Busy {
        /// The other's journal.
        path: PathBuf,
    },
    /// It is no journal.
    #[error("{path:?} is no journal of livesnap's: {source}: remove it")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A group could not be put back.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// The livesnap that makes the changes.
    owner: ProcessId,
    /// The process whose threads are changed.
    vmm: ProcessId,
    changes: Vec<Change>,
}

/// A journal on disk.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    record: Record,
}

impl Journal {
    /// Writes down, in `directory`, what this process is about to change for the VMM `pid`.
    pub fn write(directory: &Path, pid: i32, changes: Vec<Change>) -> Result<Self, JournalError> {
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        let (owner, vmm) = (ProcessId::of(own)?, ProcessId::of(pid)?);
        let path = directory.join(format!("throttle-{pid}.json"));
        let draft = directory.join(format!(".throttle-{pid}.{own}"));
        let record = Record { owner, vmm, changes };
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| JournalError::File { operation, path, source }
        };
        let text = serde_json::to_vec(&record)
            .map_err(|error| failed("write", &draft)(io::Error::other(error)))?;
        fs::create_dir_all(directory).map_err(failed("create", directory))?;
        fs::write(&draft, text).map_err(failed("write", &draft))?;
        // Whoever finds a journal finds all of it; and unlike a new name, a link never replaces one.
        let linked = fs::hard_link(&draft, &path);
        fs::remove_file(&draft).map_err(failed("remove", &draft))?;
        match linked {
            Ok(()) => Ok(Self { path, record }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(JournalError::Busy { path })
            }
            Err(error) => Err(failed("write", &path)(error)),
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn open(path: PathBuf) -> Result<Self, JournalError> {
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(source) => return Err(JournalError::File { operation: "read", path, source }),
        };
        match serde_json::from_slice(&text) {
            Ok(record) => Ok(Self { path, record }),
            Err(source) => Err(JournalError::Format { path, source }),
        }
    }

    /// Puts everything back, the last change first, and removes the journal if all of it worked.
    pub fn undo(&self) -> Result<(), JournalError> {
        let mut undone = Ok(());
        for change in self.record.changes.iter().rev() {
            // All of them, whatever becomes of one.
            undone = undone.and(self.undo_change(change));
        }
        undone?;
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::File { operation: "remove", path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }

    fn undo_change(&self, change: &Change) -> Result<(), JournalError> {
        match change {
            // After its process a group may have been made anew for another.
            Change::Quota { group, found } if group.exists() && self.record.vmm.runs() => {
                group.set_quota(*found)?;
            }
            Change::LentCpu { group } if group.exists() && !group.has_children()? => {
                group.lend_cpu(false)?;
            }
            // Who is in it was put there by us, or is a child of who was.
            Change::Moved { from, to } if to.exists() => move_back(from, to)?,
            _ => {}
        }
        Ok(())
    }
}

/// Moves all threads of `to` to `from`, and removes `to`.
fn move_back(from: &Group, to: &Group) -> Result<(), CgroupError> {
    let mut tries = 0;
    loop {
        for thread in to.threads()? {
            from.add_thread(thread)?;
        }
        tries += 1;
        match to.remove() {
            Err(CgroupError::File { source, .. })
                if source.kind() == io::ErrorKind::ResourceBusy && tries < REMOVALS =>
            {
                std::thread::sleep(REMOVAL_INTERVAL);
            }
            result => return result,
        }
    }
}

/// Where journals are kept if nobody says otherwise.
pub fn default_directory() -> PathBuf {
    let own = || Some(PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?).join("livesnap"));
    let system = || PathBuf::from("/run/livesnap");
    if rustix::process::geteuid().is_root() { system() } else { own().unwrap_or_else(system) }
}

/// Journals of livesnaps that have ended, and what cannot be read.
pub fn leftovers(directory: &Path) -> Vec<Result<Journal, JournalError>> {
    let is_left = |found: &Result<Journal, _>| {
        found.as_ref().map_or(true, |journal| !journal.record.owner.runs())
    };
    journals(directory).filter(is_left).collect()
}

/// Undoes what livesnaps that have ended left behind; for each of them, whether it worked.
pub fn repair(directory: &Path) -> Vec<Result<Journal, JournalError>> {
    let undo = |journal: Journal| journal.undo().map(|()| journal);
    leftovers(directory).into_iter().map(|found| found.and_then(undo)).collect()
}

/// What became of a repair.
pub fn in_words(repaired: &Result<Journal, JournalError>) -> String {
    match repaired {
        Ok(journal) => format!(
            "gave virtual CPUs of process {} back the CPU time that a livesnap which was killed had taken",
            journal.record.vmm.pid
        ),
        Err(error) => {
            format!("cannot put back what a livesnap which was killed had changed: {error}")
        }
    }
}

/// The same in the guard of `owner`, once that has ended.
pub fn repair_after(directory: &Path, owner: Pid) -> Vec<Result<Journal, JournalError>> {
    let number = owner.as_raw_nonzero().get();
    // Most have nothing to put back, and need not be waited for.
    if journals(directory).flatten().any(|journal| journal.record.owner.pid == number)
        && let Ok(pidfd) = pidfd_open(owner, PidfdFlags::empty())
    {
        // Should this fail, the owner runs, and the journal is not touched.
        let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&END_LIMIT));
    }
    repair(directory)
}

fn journals(directory: &Path) -> impl Iterator<Item = Result<Journal, JournalError>> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("throttle-")
    });
    paths.map(Journal::open)
}
