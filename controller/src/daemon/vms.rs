//! The virtual machines: those that the configuration names, and those that are found by their QMP sockets. Each is looked
//! at now and then, for what would refuse a snapshot of it.
//!
//! A QMP socket serves one client at a time, so whoever wants to talk to a machine takes its turn first: a snapshot's
//! process waits for it, who only looks comes again later.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::Pid;
use serde::Serialize;
use snapshot_core::Reason;
use snapshot_core::vmm::RunState;
use snapshot_core::vmm::qemu::preflight::Survey;
use snapshot_core::vmm::qemu::{QemuError, QemuOptions, survey};
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use utoipa::ToSchema;

use super::config::{Config, is_name};
use super::metrics::Metrics;
use super::operation::OperationError;
use super::supervisor::timestamp;
use crate::actuator;
use crate::units::number;

/// A machine that does not answer for so long is not waited for when it is only looked at.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

/// Whose turn it is to talk to a machine.
pub type Turn = Arc<tokio::sync::Mutex<()>>;

/// A virtual machine.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// How it came to be known.
    pub source: Source,
    /// What was seen of it last.
    pub seen: Option<Arc<Seen>>,
    /// Taken by whoever talks to it.
    pub turn: Turn,
}

/// How a virtual machine came to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// It is named in the configuration.
    Configured,
    /// Its QMP socket was found.
    Discovered,
}

/// What was seen of a virtual machine.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Seen {
    /// When (RFC 3339).
    pub at: String,
    /// Its state.
    pub state: VmState,
    /// What it is, if it answered.
    pub machine: Option<Machine>,
    /// What would refuse a snapshot, and what to do about it.
    pub refusals: Vec<Hindrance>,
    /// Guest memory under userfaultfd, in bytes. As no snapshot of the daemon's was running, it is another program's, or was
    /// left behind.
    pub protected_bytes: u64,
    /// Share of their CPU time that livesnap's quotas withhold from the virtual CPUs, on an average; the same holds.
    pub throttle_ratio: f64,
    /// Why it could not be asked.
    pub error: Option<OperationError>,
}

/// A virtual machine's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Its virtual CPUs run.
    Running,
    /// Somebody has paused it.
    Paused,
    /// Neither: it cannot be snapshotted now.
    Other,
    /// It does not answer.
    Unreachable,
}

/// What a virtual machine is.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Machine {
    /// Machine type with its version.
    machine_type: String,
    /// Version of QEMU.
    qemu_version: String,
    /// Process id of QEMU.
    pid: i32,
    /// Virtual CPUs.
    cpus: u32,
    /// RAM in bytes.
    memory_bytes: u64,
    /// Disks that a snapshot would switch to overlays.
    disks: usize,
}

/// Something that would refuse a snapshot.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Hindrance {
    /// Stable word.
    #[schema(value_type = String)]
    reason: Reason,
    /// What was found.
    what: String,
    /// What to do about it.
    remedy: String,
}

/// All virtual machines that are known, by name. Clones share them.
#[derive(Clone, Debug)]
pub struct Vms(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    vms: Mutex<BTreeMap<String, Vm>>,
    /// Somebody wants them to be looked at.
    wanted: Notify,
}

impl Vms {
    /// Those that the configuration names.
    pub fn new(config: &Config) -> Self {
        let named = config
            .vm
            .iter()
            .map(|vm| (vm.name.clone(), Vm::new(vm.qmp.clone(), Source::Configured)));
        Self(Arc::new(Known { vms: Mutex::new(named.collect()), wanted: Notify::new() }))
    }

    /// The one of that name.
    pub fn get(&self, name: &str) -> Option<Vm> {
        self.lock().get(name).cloned()
    }

    /// All of them, by name.
    pub fn all(&self) -> Vec<(String, Vm)> {
        self.lock().iter().map(|(name, vm)| (name.clone(), vm.clone())).collect()
    }

    /// Takes up those that were found, and drops those that are not found any more. A name that the configuration gives
    /// stays with it.
    fn found(&self, sockets: &BTreeMap<String, PathBuf>) {
        let mut vms = self.lock();
        vms.retain(|name, vm| {
            vm.source == Source::Configured || sockets.get(name).is_some_and(|qmp| *qmp == vm.qmp)
        });
        for (name, qmp) in sockets {
            let is_named = vms.values().any(|vm| vm.qmp == *qmp);
            if !is_named && !vms.contains_key(name) {
                tracing::info!(vm = name, qmp = %qmp.display(), "found");
                vms.insert(name.clone(), Vm::new(qmp.clone(), Source::Discovered));
            }
        }
    }

    /// Has them looked at soon.
    pub fn look_soon(&self) {
        self.0.wanted.notify_one();
    }

    fn seen(&self, name: &str, seen: Seen) {
        if let Some(vm) = self.lock().get_mut(name) {
            vm.seen = Some(Arc::new(seen));
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vm>> {
        self.0.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vm {
    fn new(qmp: PathBuf, source: Source) -> Self {
        Self { qmp, source, seen: None, turn: Turn::default() }
    }
}

/// Looks for machines, and at each of them, again and again, and whenever that is wanted; metrics tell what was seen.
pub async fn watch(vms: Vms, patterns: Vec<Pattern>, interval: Duration, metrics: Metrics) {
    loop {
        let patterns = patterns.clone();
        if let Ok(sockets) = spawn_blocking(move || find(&patterns)).await {
            vms.found(&sockets);
        }
        for (name, _) in vms.all() {
            metrics.register(&name);
        }
        for (name, vm) in vms.all() {
            // One that is being snapshotted is known to live.
            let Ok(turn) = vm.turn.try_lock_owned() else { continue };
            let looked = spawn_blocking(move || {
                let seen = look(&vm.qmp);
                drop(turn);
                seen
            });
            if let Ok(seen) = looked.await {
                metrics.looked(&name, &seen);
                vms.seen(&name, seen);
            }
        }
        // Either is as good.
        let _ = timeout(interval, vms.0.wanted.notified()).await;
    }
}

/// Where there is no cpu controller, or a thread has just ended, nothing is withheld.
fn throttle_ratio(threads: &[Pid]) -> f64 {
    let ratios = threads.iter().map(|thread| actuator::withheld_ratio(*thread).unwrap_or(0.0));
    ratios.sum::<f64>() / number(threads.len().max(1) as u64)
}

fn look(qmp: &Path) -> Seen {
    let options =
        QemuOptions { command_timeout: LOOK_LIMIT, ..QemuOptions::new(qmp.to_path_buf()) };
    Seen::from(survey(&options))
}

impl From<Result<Survey, QemuError>> for Seen {
    fn from(surveyed: Result<Survey, QemuError>) -> Self {
        let at = timestamp();
        let survey = match surveyed {
            Ok(survey) => survey,
            Err(error) => {
                let reason = error.reason();
                let error = Some(OperationError { reason, detail: error.to_string() });
                let state = VmState::Unreachable;
                return Self {
                    at,
                    state,
                    machine: None,
                    refusals: Vec::new(),
                    protected_bytes: 0,
                    throttle_ratio: 0.0,
                    error,
                };
            }
        };
        let machine = Machine {
            machine_type: survey.machine.machine_type,
            qemu_version: survey.machine.version,
            pid: survey.pid.as_raw_pid(),
            cpus: survey.machine.cpus,
            memory_bytes: survey.layout.total_bytes(),
            disks: survey.disks.len(),
        };
        let protected = survey.mappings.iter().filter(|mapping| mapping.has_userfaultfd);
        let protected_bytes = protected.map(|mapping| mapping.len_bytes).sum();
        let throttle_ratio = throttle_ratio(&survey.cpu_threads);
        let refusals = survey.refusals.into_iter().map(|refusal| Hindrance {
            reason: refusal.reason,
            what: refusal.what,
            remedy: refusal.remedy,
        });
        Self {
            at,
            state: match survey.run_state {
                Some(RunState::Running) => VmState::Running,
                Some(RunState::Paused) => VmState::Paused,
                None => VmState::Other,
            },
            machine: Some(machine),
            refusals: refusals.collect(),
            protected_bytes,
            throttle_ratio,
            error: None,
        }
    }
}

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
fn find(patterns: &[Pattern]) -> BTreeMap<String, PathBuf> {
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

    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::daemon::config;

    fn pattern(text: &str) -> Pattern {
        Pattern::try_from(text.to_owned()).unwrap()
    }

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
            assert_eq!(pattern(text).name(entry), name, "{text} {entry}");
        }
        for text in ["", "*", "run/*", "/run/vm1", "/run/*/*.sock"] {
            assert!(Pattern::try_from(text.to_owned()).is_err(), "{text}");
        }
    }

    #[test]
    fn sockets_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let patterns = [pattern(&format!("{}/*.qmp", dir.path().display()))];
        let named = config::Vm { name: "named".into(), qmp: path("known.qmp") };
        let vms = Vms::new(&Config { vm: vec![named], ..Config::default() });
        let names = || {
            vms.found(&find(&patterns));
            vms.all().into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        let _sockets =
            ["known.qmp", "a.qmp", "named.qmp"].map(|name| UnixListener::bind(path(name)).unwrap());
        fs::write(path("file.qmp"), "").unwrap();
        assert_eq!(names(), ["a", "named"]);
        assert_eq!(vms.get("named").unwrap().qmp, path("known.qmp"));
        fs::remove_file(path("a.qmp")).unwrap();
        assert_eq!(names(), ["named"]);
        let seen = look(&path("a.qmp"));
        assert_eq!(seen.state, VmState::Unreachable);
    }
}
