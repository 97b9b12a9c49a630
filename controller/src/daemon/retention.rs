//! Removing snapshots that a schedule keeps no longer. All of it waits for disks.
//!
//! ```text
//! NAME  ──rename──▶  .NAME.livesnap-removed  ──▶  nothing
//!          what bears the name is whole at any time; a daemon that is killed leaves the rest to the next one
//! ```
//!
//! The newest are looked at first. Once as many good ones have been found as are to be kept, in their places on disk and not
//! only in the book, all older ones go: so the last good one never does. One that cannot be looked at, that somebody has put
//! something of his own into, or that is another than the operation made, stays as it is.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, ResolveFlags, fsync, openat2, renameat, statat, unlinkat,
};
use rustix::io::Errno;
use snapshot_core::image::{
    CHECKSUM_FILE, DEVICE_STATE_FILE, ImageError, MANIFEST_FILE, RAM_FILE, Snapshot,
};

use super::destination::{DIRECTORY, DestinationError, Place};
use super::operation::{Operation, VerificationState, time};

/// All that a snapshot is made of. The manifest goes first: without it, nothing takes the rest for a snapshot.
const FILES: [&str; 4] = [MANIFEST_FILE, CHECKSUM_FILE, DEVICE_STATE_FILE, RAM_FILE];

/// Why a snapshot is left alone.
#[derive(Debug, thiserror::Error)]
enum RemovalError {
    /// It cannot be got at.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// It is none, or damaged.
    #[error("{} is left alone: {source}", path.display())]
    Image { path: PathBuf, source: ImageError },
    /// Another one lies there.
    #[error(
        "{} is left alone: the snapshot there is another than the operation made",
        path.display()
    )]
    Another { path: PathBuf },
    /// Somebody has put something there.
    #[error("{} is left alone: {name:?} in it is no part of a snapshot", path.display())]
    Foreign { path: PathBuf, name: String },
    /// The file system.
    #[error("cannot {operation} {}: {source}", path.display())]
    File { operation: &'static str, path: PathBuf, source: io::Error },
}

/// A snapshot that a schedule had taken.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its operation.
    pub id: String,
    /// Where it lies.
    pub place: Place,
    /// Between when and when it was taken.
    made: Option<(SystemTime, SystemTime)>,
    /// Whether it counts.
    is_good: bool,
    /// Whether it is being read.
    is_held: bool,
}

impl Candidate {
    /// The snapshot of a completed operation.
    pub fn new(operation: &Operation, place: Place) -> Self {
        let made = |operation: &Operation| {
            Some((time(operation.started_at.as_deref()?)?, time(operation.ended_at.as_deref()?)?))
        };
        Self {
            id: operation.id.clone(),
            place,
            made: made(operation),
            is_good: operation.is_good(),
            is_held: operation.is_verified_as(VerificationState::Running),
        }
    }
}

/// Removes those beyond the newest `keep` good ones, or none; `candidates` come newest first. Returns the operations whose
/// snapshots are there no longer.
pub fn tidy(candidates: &[Candidate], keep: Option<usize>) -> Vec<String> {
    let (mut good, mut gone) = (0, Vec::new());
    for candidate in candidates {
        let (operation, path) = (&candidate.id, candidate.place.path());
        let path = path.display();
        let is_enough = keep.is_some_and(|keep| good >= keep);
        let done = match candidate.look() {
            Ok(None) => {
                tracing::info!(operation, %path, "the snapshot is there no longer");
                gone.push(operation.clone());
                continue;
            }
            Ok(Some(_)) if !is_enough => {
                good += usize::from(candidate.is_good);
                continue;
            }
            Ok(Some(_)) if candidate.is_held => continue,
            Ok(Some(directory)) => candidate.remove(&directory),
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => {
                tracing::info!(operation, %path, "an old snapshot is removed");
                gone.push(operation.clone());
            }
            Err(error) => tracing::warn!(operation, %error, "not removed"),
        }
    }
    gone
}

impl Candidate {
    /// Opens the snapshot, if it is there and the operation's own. What a daemon was removing that has ended meanwhile is
    /// gone afterwards.
    fn look(&self) -> Result<Option<OwnedFd>, RemovalError> {
        let path = self.place.path();
        self.finish()?;
        let Some(directory) = self.place.open_snapshot()? else { return Ok(None) };
        let inside = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string());
        let snapshot = Snapshot::open(&inside)
            .map_err(|source| RemovalError::Image { path: path.clone(), source })?;
        let committed = Duration::from_millis(snapshot.manifest().committed_at_unix_ms);
        let made = |(begun, ended)| (begun..=ended).contains(&(UNIX_EPOCH + committed));
        if !self.made.is_some_and(made) {
            return Err(RemovalError::Another { path });
        }
        Ok(Some(directory))
    }

    /// Removes the snapshot in `directory`, which was looked at.
    fn remove(&self, directory: &OwnedFd) -> Result<(), RemovalError> {
        let missing = || self.failed("open the directory above")(Errno::NOENT);
        let above = self.place.parent()?.ok_or_else(missing)?;
        for entry in Dir::read_from(directory).map_err(self.failed("list"))? {
            let name =
                entry.map_err(self.failed("list"))?.file_name().to_string_lossy().into_owned();
            if !matches!(name.as_str(), "." | "..") && !is_part(directory, &name) {
                return Err(RemovalError::Foreign { path: self.place.path(), name });
            }
        }
        renameat(&above, self.place.name(), &above, self.hidden())
            .map_err(self.failed("rename"))?;
        // Or else a loss of power could bring back the name, of what is a snapshot no longer.
        fsync(&above).map_err(self.failed("sync the directory above"))?;
        self.empty(&above, directory)
    }

    /// Ends a removal that was begun, if one was.
    fn finish(&self) -> Result<(), RemovalError> {
        let Some(above) = self.place.parent()? else { return Ok(()) };
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        match openat2(above.as_fd(), self.hidden(), DIRECTORY, Mode::empty(), beneath) {
            Ok(directory) => self.empty(&above, &directory),
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.failed("open what is left of")(errno)),
        }
    }

    /// Removes the hidden directory and its files.
    fn empty(&self, above: &OwnedFd, directory: &OwnedFd) -> Result<(), RemovalError> {
        for name in FILES {
            match unlinkat(directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(self.failed("remove a file of")(errno)),
            }
        }
        unlinkat(above, self.hidden(), AtFlags::REMOVEDIR)
            .map_err(self.failed("remove what is left of"))
    }

    fn hidden(&self) -> String {
        format!(".{}.livesnap-removed", self.place.name())
    }

    fn failed(&self, operation: &'static str) -> impl FnOnce(Errno) -> RemovalError {
        let path = self.place.path();
        move |errno| RemovalError::File { operation, path, source: errno.into() }
    }
}

/// Whether a file in a directory is one that snapshots have.
fn is_part(directory: &OwnedFd, name: &str) -> bool {
    let is_file =
        |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    FILES.contains(&name) && statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(is_file)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use std::fs;
    use std::os::unix::fs::symlink;

    use snapshot_core::address::{HostVirtAddr, PAGE_BYTES};
    use snapshot_core::image::{FilePlan, SnapshotFacts, Staging};
    use snapshot_core::ram::{RamBlock, RamLayout};
    use snapshot_core::vmm::{DeviceState, DiskSnapshot, MachineDescription, RunState};

    use super::*;
    use crate::daemon::operation::{State, Verification, at};

    /// Commits a snapshot of a page, which is not stored.
    fn snapshot(path: &Path) {
        let block = RamBlock {
            id: "pc.ram".into(),
            hva: HostVirtAddr(0x1000),
            len_bytes: PAGE_BYTES,
            page_size_bytes: PAGE_BYTES,
            store_zero_pages: false,
        };
        let layout = RamLayout::new(vec![block]).unwrap();
        let machine_type = "pc-q35-10.0";
        let plan = FilePlan::new(machine_type, &layout).unwrap();
        let facts = SnapshotFacts {
            machine: MachineDescription {
                machine_type: machine_type.into(),
                ..MachineDescription::default()
            },
            run_state: RunState::Running,
            disks: DiskSnapshot::default(),
            taken_at: SystemTime::now(),
            report: serde_json::json!({}),
        };
        let state = DeviceState::QemuSections(vec![]);
        let staging = Staging::create(path).unwrap();
        staging.commit(&layout, &plan, &[0], &[0; 64], &state, facts).unwrap();
    }

    /// A directory for snapshots.
    struct Host {
        dir: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("vm1")).unwrap();
            Self { dir }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join("vm1").join(name)
        }

        fn candidate(&self, operation: &Operation) -> Candidate {
            let place = Place::new(&[self.dir.path().into()], None, "vm1", &operation.id).unwrap();
            Candidate::new(operation, place)
        }

        /// The operation of a snapshot that is taken.
        fn take(&self, id: &str) -> Operation {
            let begun = at(SystemTime::now());
            snapshot(&self.path(id));
            Operation {
                id: id.into(),
                state: State::Completed,
                started_at: Some(begun),
                ended_at: Some(at(SystemTime::now())),
                ..Operation::default()
            }
        }

        /// The same of several, with how each was verified.
        fn take_all<const N: usize>(
            &self,
            all: [(&str, Option<VerificationState>); N],
        ) -> [Candidate; N] {
            all.map(|(id, state)| {
                let verification = state.map(|state| Verification { state, at: None, error: None });
                self.candidate(&Operation { verification, ..self.take(id) })
            })
        }

        fn left(&self) -> Vec<String> {
            let entries = fs::read_dir(self.dir.path().join("vm1")).unwrap();
            let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
            let mut names: Vec<_> =
                entries.map(|entry| name(entry).into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn the_newest_good_ones_are_kept() {
        use VerificationState::{Failed, Running, Sound};
        let cases = [
            // What is there, newest first; how many are kept; what is left.
            (vec![], Some(1), vec![]),
            (vec![("3", None), ("2", None), ("1", None)], Some(2), vec!["2", "3"]),
            (vec![("3", None), ("2", None), ("1", None)], Some(9), vec!["1", "2", "3"]),
            (vec![("3", None), ("2", None), ("1", None)], None, vec!["1", "2", "3"]),
            // The last good one stays, however old, and so does what is newer.
            (
                vec![("3", Some(Failed)), ("2", Some(Failed)), ("1", None)],
                Some(1),
                vec!["1", "2", "3"],
            ),
            (vec![("3", Some(Running)), ("2", Some(Sound)), ("1", None)], Some(1), vec!["2", "3"]),
            // Damaged ones go when they are old.
            (vec![("3", Some(Sound)), ("2", Some(Failed)), ("1", None)], Some(1), vec!["3"]),
            // One that is being read does not go.
            (vec![("3", None), ("2", Some(Running)), ("1", None)], Some(1), vec!["2", "3"]),
        ];
        for (all, keep, left) in cases {
            let host = Host::new();
            let made = all.iter().flat_map(|made| host.take_all([*made])).collect::<Vec<_>>();
            let gone = tidy(&made, keep);
            assert_eq!(host.left(), left, "{all:?} {keep:?}");
            assert_eq!(gone.len() + left.len(), all.len());
            assert_eq!(tidy(&made, None).len(), gone.len(), "nothing else is missing");
        }
    }

    #[test]
    fn what_is_missing_does_not_count() {
        let host = Host::new();
        let made = host.take_all([("3", None), ("2", None), ("1", None)]);
        let elsewhere = host.dir.path().join("elsewhere");
        // A file system that is not there tells nothing.
        fs::rename(host.dir.path().join("vm1"), &elsewhere).unwrap();
        assert_eq!(tidy(&made, Some(1)), Vec::<String>::new());
        fs::rename(&elsewhere, host.dir.path().join("vm1")).unwrap();

        fs::rename(host.path("3"), &elsewhere).unwrap();
        assert_eq!(tidy(&made, Some(1)), ["3", "1"]);
        assert_eq!(host.left(), ["2"]);
    }

    #[test]
    fn what_is_not_its_own_is_left_alone() {
        let host = Host::new();
        let elsewhere = host.dir.path().join("elsewhere");
        let old =
            host.take_all(["link", "file", "noted", "damaged", "linked"].map(|id| (id, None)));
        fs::rename(host.path("link"), &elsewhere).unwrap();
        symlink(&elsewhere, host.path("link")).unwrap();
        fs::remove_dir_all(host.path("file")).unwrap();
        fs::write(host.path("file"), "").unwrap();
        fs::write(host.path("noted").join("keep"), "").unwrap();
        fs::remove_file(host.path("damaged").join(MANIFEST_FILE)).unwrap();
        symlink(&elsewhere, host.path("linked").join(DEVICE_STATE_FILE)).unwrap();
        let long_ago = Some("2020-01-01T00:00:00.000Z".to_owned());
        let operation = host.take("another");
        let operation = Operation { started_at: long_ago.clone(), ended_at: long_ago, ..operation };
        let another = host.candidate(&operation);
        let [new] = host.take_all([("new", None)]);
        let made = [&[new, another], &old[..]].concat();
        let before = host.left();
        assert_eq!(tidy(&made, Some(1)), Vec::<String>::new());
        assert_eq!(host.left(), before);
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 3);
    }

    #[test]
    fn a_removal_that_was_broken_off_is_finished() {
        let host = Host::new();
        let made = host.take_all([("2", None), ("1", None)]);
        let hidden = host.path(".1.livesnap-removed");
        for file in FILES {
            fs::rename(host.path("1"), &hidden).unwrap_or(());
            if hidden.join(file).exists() {
                fs::remove_file(hidden.join(file)).unwrap();
            }
        }
        // Also of a schedule that keeps all by now.
        assert_eq!(tidy(&made, None), ["1"]);
        assert_eq!(host.left(), ["2"]);

        // Nobody is led out of it.
        let elsewhere = host.dir.path().join("elsewhere");
        snapshot(&elsewhere);
        symlink(&elsewhere, &hidden).unwrap();
        assert_eq!(tidy(&made, None), Vec::<String>::new());
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 3);
    }
}
