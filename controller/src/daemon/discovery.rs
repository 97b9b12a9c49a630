//! Virtual machines that are found by their QMP sockets.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;

use super::name::is_name;

/// Where QMP sockets are looked for: a path with one `*` in it, which stands for the machine's name.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern {
    /// The directory in which something varies.
    directory: PathBuf,
    /// What stands before and behind the name in there.
    before: String,
    behind: String,
    /// The path below, if the name is a directory's.
    below: PathBuf,
}

/// Why a pattern cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no absolute path with one '*' in it, which stands for the name of a virtual machine"
)]
pub struct PatternError(String);

impl TryFrom<String> for Pattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, PatternError> {
        let parse = || {
            let (head, tail) = text.split_once('*')?;
            let (directory, before) = head.rsplit_once('/')?;
            let (behind, below) = tail.split_once('/').unwrap_or((tail, ""));
            let is_good = head.starts_with('/') && !tail.contains('*');
            is_good.then(|| Self {
                directory: format!("{directory}/").into(),
                before: before.into(),
                behind: behind.into(),
                below: below.into(),
            })
        };
        parse().ok_or(PatternError(text.clone()))
    }
}

impl Pattern {
    /// The name of the machine whose entry in the directory is called so.
    fn name<'a>(&self, entry: &'a str) -> Option<&'a str> {
        let name = entry.strip_prefix(&self.before)?.strip_suffix(self.behind.as_str())?;
        is_name(name).then_some(name)
    }
}

/// All sockets that are found now, by the names of their machines; of two of a name the one of the earlier pattern.
pub fn find(patterns: &[Pattern]) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    for pattern in patterns {
        for entry in fs::read_dir(&pattern.directory).into_iter().flatten().flatten() {
            let entry_name = entry.file_name();
            let Some(name) = entry_name.to_str().and_then(|entry| pattern.name(entry)) else {
                continue;
            };
            let mut path = entry.path();
            if !pattern.below.as_os_str().is_empty() {
                path.push(&pattern.below);
            }
            if fs::metadata(&path).is_ok_and(|found| found.file_type().is_socket()) {
                found.entry(name.to_owned()).or_insert(path);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn a_pattern_names_machines() {
        for (text, entry, name) in [
            ("/run/*/qmp.sock", "vm1", Some("vm1")),
            ("/run/vm/*.qmp", "web-1.qmp", Some("web-1")),
            ("/run/vm/qmp-*.sock", "qmp-a.sock", Some("a")),
            ("/run/vm/qmp-*.sock", "qmp-.sock", None),
            ("/run/vm/qmp-*.sock", "other.sock", None),
            ("/run/vm/*", ".hidden", None),
            ("/run/vm/*", "a b", None),
        ] {
            assert_eq!(
                Pattern::try_from(text.to_owned()).unwrap().name(entry),
                name,
                "{text} {entry}"
            );
        }
        for text in ["", "*", "run/*", "/run/vm1", "/run/*/*.sock"] {
            assert!(Pattern::try_from(text.to_owned()).is_err(), "{text}");
        }
    }
}
