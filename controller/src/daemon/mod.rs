//! `livesnap serve`: a service that takes snapshots of a host's virtual machines.
//!
//! ```text
//! config        what the operator says; only read at start
//! operation     what is told of a snapshot: data
//! book          all operations, and what is to be done next: pure
//! budget        what all snapshots share: pure
//! policy        limits as they stand in a request
//! destination   where snapshots may lie
//! vms           named and found virtual machines
//! discovery     how they are found
//! look          what is to be seen of one
//! name          what they may be called
//! schedule      when a snapshot is due: pure
//! verification  the process that reads a snapshot again
//! retention     removing old snapshots
//! supervisor    the one task that owns the book
//! child         the process that takes one snapshot
//! lease         whether such a process lives, also if its daemon does not
//! forecast      the one that only tells whether it would keep its limits
//! journal       what of the book survives
//! metrics       what Prometheus is told
//! http/         the API: routes, problems, connections; the live page
//! notify        what the service manager is told
//! ```
//!
//! One thread runs all tasks, so the daemon takes no more than one CPU from guests, and starts all processes, which the
//! kernel ends with it. Whatever may wait for a disk or a virtual machine has a thread of its own for as long.

mod book;
mod budget;
mod child;
mod config;
mod destination;
mod discovery;
mod forecast;
mod http;
mod journal;
mod lease;
mod look;
mod metrics;
mod name;
mod notify;
mod operation;
mod policy;
mod retention;
mod schedule;
mod supervisor;
mod verification;
mod vms;

use std::future::pending;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

pub use book::Shutdown;
pub use config::Config;
use config::Tcp;
#[cfg(test)]
pub use http::problem;
pub use policy::Policy;

use futures_util::FutureExt as _;
use http::Api;
use http::gate::{Gate, TokenError};
use http::listen::{self, ListenError};
use http::tls::{Credentials, TlsError, TlsListener};
use journal::{Journal, JournalError};
use metrics::Metrics;
use notify::Manager;
use operation::{Observer, Operation};
use serde_json::Value;
use supervisor::{Handle, Supervisor};
use vms::Vms;

/// Why the daemon cannot work.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another one is at work, or it cannot be kept what has to be.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A directory for snapshots.
    #[error("cannot use {} for snapshots: {source}: make it, or name another in destinations", path.display())]
    Root {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The token of those who come by TCP.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Certificate and key.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Metrics.
    #[error("cannot make the metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// By a fault of its own.
    #[error("the daemon has failed: its log tells where; start it again")]
    Failed,
    /// The operating system.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Serves until a signal ends it.
///
/// # Errors
/// If it cannot begin.
pub fn run(config: Config) -> Result<(), DaemonError> {
    let system = |what| move |source| DaemonError::System { what, source };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("start"))?;
    runtime.block_on(serve(Arc::new(config)))
}

async fn serve(config: Arc<Config>) -> Result<(), DaemonError> {
    let journal = Journal::open(&config.state_dir)?;
    check_roots(&config)?;
    supervisor::repair(&config.runtime_dir);
    let (earlier, damaged) = journal.load()?;
    for error in damaged {
        tracing::warn!(%error, "left out");
    }
    let turns = journal.load_turns().unwrap_or_else(|error| {
        tracing::warn!(%error, "left out");
        Vec::new()
    });
    let socket = listen::Socket::bind(&config.socket)?;
    let tcp = match &config.tcp {
        Some(tcp) => {
            let credentials = tcp.tls.as_ref().map(Credentials::load).transpose()?;
            Some((Gate::new(tcp)?, credentials, listen::bind_tcp(tcp.listen).await?))
        }
        None => None,
    };
    let vms = Vms::new(&config);
    // What waits for its turn may be of one that has to be found first.
    vms.find(&config.discover);
    let metrics_tcp = match config.metrics_listen {
        Some(listen) => {
            let gate = Gate::new(&Tcp::plain(listen))?;
            Some((gate, listen::bind_tcp(listen).await?))
        }
        None => None,
    };
    let known = earlier.iter().map(|record| &record.operation);
    let metrics = Metrics::new(config.destinations.clone(), &config.schedule, known)?;
    for (name, _) in vms.all() {
        metrics.register(&name);
    }
    let observers: Vec<Box<dyn Observer>> =
        vec![Box::new(Log), Box::new(metrics.clone()), Box::new(LookAfter(vms.clone()))];
    let (supervisor, handle) =
        Supervisor::new(Arc::clone(&config), vms.clone(), journal, earlier, turns, observers);
    let supervisor = tokio::spawn(supervisor.run());
    let interval = Duration::from_secs(config.look_seconds);
    tokio::spawn(vms::watch(vms, config.discover.clone(), interval, metrics.clone()));
    let manager = Manager::from_environment();
    close_on_signal(handle.clone(), config.shutdown, manager.clone())?;
    if let Some((gate, listener)) = metrics_tcp {
        if let Ok(address) = listener.local_addr() {
            tracing::info!(%address, "serving metrics");
        }
        let router = gate.guard(http::metrics_router(metrics.clone()));
        let config = Arc::clone(&config);
        tokio::spawn(
            async move { listen::serve(&listener, router, &config.http, pending()).await },
        );
    }
    let router = http::router(Api::new(handle, Arc::clone(&config), metrics));
    tracing::info!(socket = %config.socket.display(), vms = config.vm.len(), "serving");
    manager.tell(notify::READY);
    tokio::spawn(manager.beat());
    let has_failed = async {
        let failed = supervisor.await.err();
        if let Some(error) = &failed {
            tracing::error!(%error, "the supervisor has failed");
        }
        failed.is_some()
    };
    let has_failed = has_failed.shared();
    let ended = || has_failed.clone().map(drop);
    let by_tcp = async {
        let Some((gate, credentials, listener)) = tcp else { return };
        if let Ok(address) = listener.local_addr() {
            tracing::info!(%address, tls = credentials.is_some(), "serving by TCP");
        }
        let router = gate.guard(router.clone());
        match credentials {
            Some(credentials) => {
                let limit = Duration::from_secs(config.http.read_seconds_max);
                let listener = TlsListener::new(listener, credentials, limit);
                listen::serve(&listener, router, &config.http, ended()).await;
            }
            None => listen::serve(&listener, router, &config.http, ended()).await,
        }
    };
    let by_socket = listen::serve(&socket, router.clone(), &config.http, ended());
    tokio::join!(by_socket, by_tcp);
    if has_failed.await {
        return Err(DaemonError::Failed);
    }
    tracing::info!("ended");
    Ok(())
}

/// Snapshots must have somewhere to lie.
fn check_roots(config: &Config) -> Result<(), DaemonError> {
    for path in &config.destinations {
        let listed = std::fs::read_dir(path);
        listed.map_err(|source| DaemonError::Root { path: path.clone(), source })?;
    }
    Ok(())
}

/// Has the supervisor end on a signal; on a second one it aborts what it waits for.
fn close_on_signal(handle: Handle, first: Shutdown, manager: Manager) -> Result<(), DaemonError> {
    let system = |source| DaemonError::System { what: "handle signals", source };
    let mut terminate = signal(SignalKind::terminate()).map_err(system)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system)?;
    tokio::spawn(async move {
        for shutdown in [first, Shutdown::Abort] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!(?shutdown, "told to end");
            manager.tell(notify::STOPPING);
            handle.close(shutdown).await;
        }
    });
    Ok(())
}

/// A virtual machine is looked at when a snapshot of it has ended: what was left in it shall show.
struct LookAfter(Vms);

impl Observer for LookAfter {
    fn changed(&mut self, before: Option<&Operation>, now: Option<&Operation>) {
        let had_ended = before.is_some_and(|before| before.state.is_final());
        if let Some(now) = now.filter(|now| now.state.is_final() && !had_ended) {
            self.0.look_soon(&now.vm);
        }
    }
}

/// A line in the log for each change of state, and for each decision of the controller.
struct Log;

impl Observer for Log {
    fn changed(&mut self, before: Option<&Operation>, now: Option<&Operation>) {
        let Some(now) = now else { return };
        let (operation, vm, state) = (&now.id, &now.vm, now.state.as_str());
        let in_force = |known: &Operation| control(known)["action"].as_str().map(str::to_owned);
        let action = in_force(now).unwrap_or_else(|| "none".into());
        if action != before.and_then(in_force).unwrap_or_else(|| "none".into()) {
            let (cpu_ratio, forecast) = (&control(now)["cpu_ratio_min"], &control(now)["forecast"]);
            tracing::info!(operation, vm, action, %cpu_ratio, %forecast, "decided");
        }
        if let Some(before) = before.filter(|before| before.state == now.state) {
            if before.verification != now.verification {
                log_verification(now);
            }
            return;
        }
        match &now.error {
            Some(error) => {
                let reason = error.reason.as_str();
                tracing::warn!(operation, vm, state, reason, error = error.detail);
            }
            None => tracing::info!(operation, vm, state, destination = now.destination),
        }
    }
}

/// What the controller does; null if there is none.
fn control(operation: &Operation) -> &Value {
    let control = operation.progress.as_ref().and_then(|progress| progress.control.as_ref());
    control.unwrap_or(&Value::Null)
}

fn log_verification(operation: &Operation) {
    let Some(found) = &operation.verification else { return };
    let (id, vm, state) = (&operation.id, &operation.vm, found.state.as_str());
    match &found.error {
        Some(error) => {
            let reason = error.reason.as_str();
            tracing::warn!(operation = id, vm, verification = state, reason, error = error.detail);
        }
        None => tracing::info!(operation = id, vm, verification = state),
    }
}
