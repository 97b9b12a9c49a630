//! Where snapshots may lie: below configured roots, whatever a request says.
//!
//! A path is first judged as text: its parts below the root are plain names. Then it is walked from the root by
//! `openat2(2)` with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, so that no link leads anywhere, neither when it is asked for
//! nor when the snapshot begins. The snapshot's process is started in the directory that was opened, and is given only a
//! name in it. Roots themselves are the operator's word, and may be links.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, mkdirat, open, openat2, statat};
use rustix::io::Errno;
use serde_json::Value;
use snapshot_core::image::{Snapshot, Staging};

use super::name::{NAME_RULE, is_name};

/// Directories below a root, the snapshot's own included.
const DEPTH_MAX: usize = 8;
/// How a directory is opened.
pub const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC).union(OFlags::RDONLY);

/// Why a destination is refused. Nothing is told of what lies outside of roots, not even whether it is there.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// It is somewhere else.
    #[error("{path:?} is not below a directory where snapshots may lie: choose one below {roots}")]
    Outside {
        /// What was asked for.
        path: String,
        /// Where they may.
        roots: String,
    },
    /// A part of it is no plain name.
    #[error(
        "{part:?} in {path:?} cannot be the name of a directory of snapshots: use {NAME_RULE}, at most {DEPTH_MAX} deep"
    )]
    Name {
        /// What was asked for.
        path: String,
        /// The part.
        part: String,
    },
    /// A part of it leads elsewhere.
    #[error("{} goes through a symbolic link or what is no directory: choose another", path.display())]
    Link {
        /// What was asked for.
        path: PathBuf,
    },
    /// The file system.
    #[error("cannot open the directory of {}: {source}", path.display())]
    Open {
        /// What was asked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Where one snapshot shall lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    root: PathBuf,
    /// Directories between root and snapshot.
    parents: Vec<String>,
    name: String,
}

/// A directory that is there, above a place.
#[derive(Debug)]
pub struct Nearest {
    /// Opened without following a link.
    pub directory: OwnedFd,
    /// What is to be made in it: the snapshot, or a directory above it.
    pub name: String,
}

/// How far one gets below a root.
#[derive(Debug)]
struct Way {
    directory: OwnedFd,
    /// Parents that were passed.
    depth: usize,
}

impl Place {
    /// The place that `wanted` says, or else `VM/ID` below the first of `roots`. Only judges text.
    ///
    /// # Errors
    /// If it would lie elsewhere.
    pub fn new(
        roots: &[PathBuf],
        wanted: Option<&str>,
        vm: &str,
        id: &str,
    ) -> Result<Self, DestinationError> {
        let own;
        let path = match wanted {
            Some(path) => path,
            None => {
                own = format!("{vm}/{id}");
                &own
            }
        };
        let outside = || {
            let names: Vec<_> = roots.iter().map(|root| root.display().to_string()).collect();
            DestinationError::Outside { path: path.into(), roots: names.join(", ") }
        };
        let mut found = None;
        if Path::new(path).is_absolute() {
            let below =
                |root: &PathBuf| Some((root.clone(), Path::new(path).strip_prefix(root).ok()?));
            found =
                roots.iter().filter_map(below).min_by_key(|(_, rest)| rest.components().count());
        } else if let Some(root) = roots.first() {
            found = Some((root.clone(), Path::new(path)));
        }
        let (root, rest) = found.ok_or_else(outside)?;
        let mut parents = Vec::new();
        for part in rest.components() {
            let text = part.as_os_str().to_string_lossy().into_owned();
            if !matches!(part, Component::Normal(_)) || !is_name(&text) {
                return Err(DestinationError::Name { path: path.into(), part: text });
            }
            parents.push(text);
        }
        match parents.pop() {
            Some(part) if parents.len() >= DEPTH_MAX => {
                Err(DestinationError::Name { path: path.into(), part })
            }
            Some(name) => Ok(Self { root, parents, name }),
            None => Err(outside()),
        }
    }

    /// All of it.
    pub fn path(&self) -> PathBuf {
        let mut path = self.root.clone();
        path.extend(&self.parents);
        path.push(&self.name);
        path
    }

    /// The snapshot's name in the directory that [`Place::open`] opens.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Opens the directory above the snapshot, if it is there.
    ///
    /// # Errors
    /// If a link, or something that is no directory, is in the way.
    pub fn parent(&self) -> Result<Option<OwnedFd>, DestinationError> {
        let way = self.walk(false)?;
        Ok((way.depth == self.parents.len()).then_some(way.directory))
    }

    /// Opens the snapshot's own directory, if the one above it has one of that name.
    ///
    /// # Errors
    /// If a link is in the way, or the directory above is missing, as it is with a file system that is not mounted.
    pub fn open_snapshot(&self) -> Result<Option<OwnedFd>, DestinationError> {
        let above = self.parent()?.ok_or_else(|| self.error(Errno::NOENT))?;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        match openat2(above.as_fd(), &self.name, DIRECTORY, Mode::empty(), beneath) {
            Ok(directory) => Ok(Some(directory)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(self.error(errno)),
        }
    }

    /// Whether a snapshot could lie there now. Nothing is made.
    ///
    /// # Errors
    /// If a link, or something that is no directory, is in the way.
    pub fn check(&self) -> Result<(), DestinationError> {
        self.walk(false).map(drop)
    }

    /// Opens the directory that the snapshot is to be made in, and makes it where it is missing.
    ///
    /// # Errors
    /// If a link is in the way, or the file system refuses.
    pub fn open(&self) -> Result<OwnedFd, DestinationError> {
        Ok(self.walk(true)?.directory)
    }

    /// The deepest directory above the snapshot that is there, and what comes below it on the way. Nothing is made.
    ///
    /// # Errors
    /// If a link is in the way, or the file system refuses.
    pub fn nearest(&self) -> Result<Nearest, DestinationError> {
        let way = self.walk(false)?;
        let name = self.parents.get(way.depth).unwrap_or(&self.name).clone();
        Ok(Nearest { directory: way.directory, name })
    }

    /// Removes what a process that was killed has left of a snapshot. One that is being written is left alone.
    pub fn clear(&self) {
        // The partial directory of nobody is taken over, and goes with its new owner.
        if let Ok(Some(directory)) = self.parent() {
            // In the very directory that was checked, wherever its name leads by now.
            let directory = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string());
            drop(Staging::create(&directory.join(self.name())));
        }
    }

    /// What was measured while the snapshot was taken that lies there, if it was taken at `since` or later.
    pub fn committed(&self, since: SystemTime) -> Option<Value> {
        let way = self.walk(false).ok().filter(|way| way.depth == self.parents.len())?;
        let directory = Path::new("/proc/self/fd").join(way.directory.as_raw_fd().to_string());
        let snapshot = Snapshot::open(&directory.join(self.name())).ok()?;
        let manifest = snapshot.manifest();
        let since_ms = since.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        (u128::from(manifest.taken_at_unix_ms) >= since_ms).then(|| manifest.report.clone())
    }

    /// Goes as far towards the snapshot as there are directories, or makes them.
    fn walk(&self, make: bool) -> Result<Way, DestinationError> {
        let failed = |errno| self.error(errno);
        let mut directory = open(&self.root, DIRECTORY, Mode::empty()).map_err(failed)?;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        for (depth, part) in self.parents.iter().enumerate() {
            let at = directory.as_fd();
            if make {
                // A snapshot holds the guest's memory: nobody else looks.
                match mkdirat(at, part, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(failed(errno)),
                }
            }
            let below = match openat2(at, part, DIRECTORY, Mode::empty(), beneath) {
                Ok(below) => below,
                Err(Errno::NOENT) if !make => return Ok(Way { directory, depth }),
                Err(errno) => return Err(failed(errno)),
            };
            directory = below;
        }
        match statat(&directory, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) != FileType::Directory => {
                Err(failed(Errno::NOTDIR))
            }
            Ok(_) | Err(Errno::NOENT) => Ok(Way { directory, depth: self.parents.len() }),
            Err(errno) => Err(failed(errno)),
        }
    }

    fn error(&self, errno: Errno) -> DestinationError {
        let path = self.path();
        match errno {
            // openat2(2): a link is ELOOP, what leads out EXDEV.
            Errno::LOOP | Errno::XDEV | Errno::NOTDIR => DestinationError::Link { path },
            _ => DestinationError::Open { path, source: errno.into() },
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn roots() -> Vec<PathBuf> {
        vec!["/backup".into(), "/backup/fast".into()]
    }

    #[test]
    fn places_are_below_a_root_by_their_text() {
        let path = |wanted| Place::new(&roots(), wanted, "vm1", "07").map(|place| place.path());
        for (wanted, expected) in [
            (None, "/backup/vm1/07"),
            (Some("monday"), "/backup/monday"),
            (Some("vm1/monday"), "/backup/vm1/monday"),
            (Some("/backup/vm1/monday"), "/backup/vm1/monday"),
            (Some("/backup//vm1/./monday/"), "/backup/vm1/monday"),
            (Some("/backup/fast/monday"), "/backup/fast/monday"),
        ] {
            assert_eq!(path(wanted).unwrap(), Path::new(expected), "{wanted:?}");
        }
        let deep = "a/".repeat(DEPTH_MAX + 1);
        for wanted in [
            "",
            "/",
            "/backup",
            "/backup/",
            "/backup/fast",
            "/backups/a",
            "/etc/a",
            "..",
            "../a",
            "a/../b",
            "/backup/../etc/a",
            "/backup/vm1/..",
            "a/.hidden",
            "-a",
            "a b",
            "a\n",
            "a\0",
            "a/%2e%2e/b",
            &deep,
        ] {
            assert!(path(Some(wanted)).is_err(), "{wanted:?}");
        }
        assert!(Place::new(&[], None, "vm1", "07").is_err(), "there is no root");
    }

    #[test]
    fn no_link_leads_out_of_a_root() {
        let dir = tempfile::tempdir().unwrap();
        let (root, elsewhere) = (dir.path().join("root"), dir.path().join("elsewhere"));
        fs::create_dir_all(root.join("vm1")).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, root.join("link")).unwrap();
        symlink("vm1", root.join("inside")).unwrap();
        symlink(&elsewhere, root.join("vm1/link")).unwrap();
        symlink("/proc/self/root", root.join("magic")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        let roots = [root.clone()];
        let place = |wanted| Place::new(&roots, Some(wanted), "vm1", "07").unwrap();
        for wanted in
            ["link/a", "inside/a", "vm1/link/a", "link", "magic/tmp", "vm1/link", "file/a", "file"]
        {
            for refused in [place(wanted).check(), place(wanted).open().map(drop)] {
                assert!(
                    matches!(refused, Err(DestinationError::Link { .. })),
                    "{wanted}: {refused:?}"
                );
            }
        }
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);

        assert_eq!(place("new/er/snapshot").nearest().unwrap().name, "new");
        assert_eq!(place("vm1/er/snapshot").nearest().unwrap().name, "er");
        assert_eq!(place("vm1/snapshot").nearest().unwrap().name, "snapshot");
        place("new/er/snapshot").check().unwrap();
        assert!(!root.join("new").exists(), "a check makes nothing");
        place("new/er/snapshot").open().unwrap();
        assert!(root.join("new/er").is_dir() && !root.join("new/er/snapshot").exists());
        place("vm1/a").open().unwrap();
        fs::remove_dir_all(&root).unwrap();
        assert!(matches!(place("vm1/a").open(), Err(DestinationError::Open { .. })));
    }

    #[test]
    fn a_root_may_be_a_link() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("disk")).unwrap();
        symlink("disk", dir.path().join("root")).unwrap();
        let place = Place::new(&[dir.path().join("root")], Some("a/b"), "vm1", "07").unwrap();
        place.open().unwrap();
        assert!(dir.path().join("disk/a").is_dir());
    }
}
