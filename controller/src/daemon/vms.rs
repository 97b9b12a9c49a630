//! The virtual machines: those that the configuration names, and those that are found by their QMP sockets. Each is looked
//! at now and then, for what would refuse a snapshot of it.
//!
//! A QMP socket serves one client at a time, so whoever wants to talk to a machine takes its turn first: a snapshot's
//! process waits for it, who only looks comes again later.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};
use utoipa::ToSchema;

use super::config::Config;
use super::discovery::{Pattern, find};
use super::look::{Seen, look};
use super::metrics::Metrics;

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

/// All virtual machines that are known, by name. Clones share them.
#[derive(Clone, Debug)]
pub struct Vms(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    vms: Mutex<BTreeMap<String, Vm>>,
    /// Those that somebody wants to be looked at, and that there are some.
    wanted: Mutex<BTreeSet<String>>,
    woken: Notify,
}

impl Vms {
    /// Those that the configuration names.
    pub fn new(config: &Config) -> Self {
        let named = config
            .vm
            .iter()
            .map(|vm| (vm.name.clone(), Vm::new(vm.qmp.clone(), Source::Configured)));
        Self(Arc::new(Known { vms: Mutex::new(named.collect()), ..Known::default() }))
    }

    /// The one of that name.
    pub fn get(&self, name: &str) -> Option<Vm> {
        self.lock().get(name).cloned()
    }

    /// All of them, by name.
    pub fn all(&self) -> Vec<(String, Vm)> {
        self.lock().iter().map(|(name, vm)| (name.clone(), vm.clone())).collect()
    }

    /// Looks for further ones, which may wait for a file system.
    pub fn find(&self, patterns: &[Pattern]) {
        self.found(&find(patterns));
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

    /// Has one looked at soon.
    pub fn look_soon(&self, name: &str) {
        self.wanted().insert(name.to_owned());
        self.0.woken.notify_one();
    }

    fn seen(&self, name: &str, seen: Seen) {
        if let Some(vm) = self.lock().get_mut(name) {
            vm.seen = Some(Arc::new(seen));
        }
    }

    /// Looks at one, unless somebody talks to it: one that is being snapshotted is known to live.
    async fn look_at(&self, name: &str, metrics: &Metrics) {
        let Some(vm) = self.get(name) else { return };
        let Ok(turn) = vm.turn.try_lock_owned() else { return };
        let looked = spawn_blocking(move || {
            let seen = look(&vm.qmp, vm.seen.as_deref());
            drop(turn);
            seen
        });
        if let Ok(seen) = looked.await {
            metrics.looked(name, &seen);
            self.seen(name, seen);
        }
    }

    fn wanted(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Looks for machines, and at each of them, again and again, and at one whenever that is wanted; metrics tell what was seen.
pub async fn watch(vms: Vms, patterns: Vec<Pattern>, interval: Duration, metrics: Metrics) {
    loop {
        let (seeker, patterns) = (vms.clone(), patterns.clone());
        // It goes on with those that are known if this fails.
        let _ = spawn_blocking(move || seeker.find(&patterns)).await;
        for (name, _) in vms.all() {
            metrics.register(&name);
        }
        for (name, _) in vms.all() {
            vms.look_at(&name, &metrics).await;
        }
        let next = Instant::now() + interval;
        while timeout_at(next, vms.0.woken.notified()).await.is_ok() {
            let wanted = std::mem::take(&mut *vms.wanted());
            for name in wanted {
                vms.look_at(&name, &metrics).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use std::fs;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::daemon::config;
    use crate::daemon::look::VmState;

    #[test]
    fn sockets_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let pattern = format!("{}/*.qmp", dir.path().display());
        let patterns = [Pattern::try_from(pattern).unwrap()];
        let named = config::Vm { name: "named".into(), qmp: path("known.qmp") };
        let vms = Vms::new(&Config { vm: vec![named], ..Config::default() });
        let names = || {
            vms.find(&patterns);
            vms.all().into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        let _sockets =
            ["known.qmp", "a.qmp", "named.qmp"].map(|name| UnixListener::bind(path(name)).unwrap());
        fs::write(path("file.qmp"), "").unwrap();
        assert_eq!(names(), ["a", "named"]);
        assert_eq!(vms.get("named").unwrap().qmp, path("known.qmp"));
        fs::remove_file(path("a.qmp")).unwrap();
        assert_eq!(names(), ["named"]);
        let seen = look(&path("a.qmp"), None);
        assert_eq!((seen.state, seen.protected_bytes), (VmState::Unreachable, None));
    }

    #[tokio::test]
    async fn only_the_one_that_is_wanted_is_looked_at() {
        let named = ["a", "b"].map(|name| config::Vm { name: name.into(), qmp: name.into() });
        let vms = Vms::new(&Config { vm: named.into(), ..Config::default() });
        let metrics = Metrics::new(Vec::new(), &[], std::iter::empty()).unwrap();
        let hour = Duration::from_secs(3600);
        tokio::spawn(watch(vms.clone(), Vec::new(), hour, metrics));
        let seen = |name| vms.get(name).unwrap().seen;
        while seen("b").is_none() {
            tokio::task::yield_now().await;
        }
        let first = ["a", "b"].map(|name| seen(name).unwrap());
        vms.look_soon("b");
        while Arc::ptr_eq(&seen("b").unwrap(), &first[1]) {
            tokio::task::yield_now().await;
        }
        // Whoever looks at all begins with this one.
        assert!(Arc::ptr_eq(&seen("a").unwrap(), &first[0]));
    }
}
