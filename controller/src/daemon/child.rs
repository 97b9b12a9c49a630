//! The process that takes one snapshot: `livesnap snapshot --json-lines`, and what it tells.
//!
//! ```text
//! supervisor ──orders──▶ run ──SIGTERM──▶ livesnap snapshot ──lines──▶ read ──told──▶ supervisor
//! ```
//!
//! A process of its own, because what is proven of the command then holds for the daemon: its guard, its signals, and that
//! the guest runs on however it ends. It is told to end when the daemon does, by the kernel.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::Value;
use snapshot_core::{Phase, Reason};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::{oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::destination::Place;
use super::lease::Lease;
use super::operation::{Ended, OperationError, Progress, State};
use super::policy::Policy;
use super::vms::{Turn, Vm};
use crate::commands::child_of;
use crate::control_loop;

/// Bytes of a line: the report of a guest with thousands of threads.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// How long what a process has told may take to arrive after its end.
const LAST_LINES_LIMIT: Duration = Duration::from_secs(5);
/// Changes of limits that wait for their answer, and how long a process may take to read one.
const CHANGES_MAX: usize = 16;
const LINE_LIMIT: Duration = Duration::from_secs(1);
/// Why limits are not changed by a process that has not taken earlier changes yet.
pub const BUSY: &str = "the snapshot's process is busy with other changes: ask again";
/// What a process tells of a snapshot that is there.
const COMPLETED: &str = "completed";
/// This program, also if its file was replaced meanwhile.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// What a snapshot's process is given.
#[derive(Clone, Debug)]
pub struct Task {
    /// The operation.
    pub id: String,
    /// The virtual machine.
    pub vm: Vm,
    /// Where the snapshot shall lie.
    pub place: Place,
    /// Limits.
    pub policy: Policy,
    /// Where it is kept what has to be put back.
    pub runtime_dir: PathBuf,
}

/// What the supervisor wants of it.
#[derive(Debug)]
pub enum Order {
    /// It shall end.
    Terminate,
    /// It shall keep other limits.
    Change(Change),
}

/// Other limits, and who wants to know what became of them; the supervisor answers.
#[derive(Debug)]
pub struct Change {
    /// What changes.
    pub policy: control_loop::Change,
    /// Told whether they are in force now, or why not; dropped if the process ends before.
    pub answer: oneshot::Sender<Result<(), String>>,
}

/// The process's share of the disk, if there is a budget; only the newest counts.
pub type Bandwidth = watch::Receiver<Option<NonZeroU64>>;

/// What it tells the supervisor.
#[derive(Debug)]
pub enum Told {
    /// What was forecast.
    Forecast(Value),
    /// How far it is.
    Progress(State, Box<Progress>),
    /// Other limits are in force, or why not.
    Changed(Change, Result<(), String>),
    /// It has ended; nothing comes after that.
    Ended(Ended),
}

/// Runs a snapshot from beginning to end.
///
/// Must be called on the daemon's main thread: the kernel ends the process with the thread that started it.
pub async fn run(
    task: Task,
    mut orders: Receiver<Order>,
    mut bandwidth: Bandwidth,
    told: Sender<(String, Told)>,
) {
    let (id, place) = (task.id.clone(), task.place.clone());
    let _turn = task.vm.turn.clone().lock_owned().await;
    let lease = Lease::of(&task.runtime_dir, &id);
    let began = SystemTime::now();
    let ended = match start(task, &lease).await {
        Ok(child) => match follow(&id, child, &mut orders, &mut bandwidth, &told).await {
            Followed::Told(ended) => ended,
            // It may have died behind its last step.
            Followed::Silent(ended) => committed(place, began).await.unwrap_or(ended),
        },
        Err(error) => without(Reason::BadDestination, error.to_string()),
    };
    // Nobody is left to hear it if this fails.
    let _ = told.send((id, Told::Ended(ended))).await;
}

/// A process that an earlier daemon has started, and that nobody follows any more.
#[derive(Debug)]
pub struct Outlived {
    /// The operation.
    pub id: String,
    /// Tells whether it lives.
    pub lease: Lease,
    /// Whose turn it is to talk to its virtual machine, if that is still known.
    pub turn: Option<Turn>,
    /// Where its snapshot shall lie, if that is still allowed.
    pub place: Option<Place>,
    /// When it was started.
    pub began: SystemTime,
}

/// Waits for its end, and tells what has become of its snapshot: it may have been past its last step when the daemon ended.
pub async fn outlive(outlived: Outlived, told: Sender<(String, Told)>) {
    let Outlived { id, lease, turn, place, began } = outlived;
    let _turn = match turn {
        Some(turn) => Some(turn.lock_owned().await),
        None => None,
    };
    lease.ended().await;
    let found = match place {
        Some(place) => committed(place, began).await,
        None => None,
    };
    let ended = found.unwrap_or_else(|| {
        let detail = "the daemon ended before the snapshot was complete: take it again".into();
        let error = OperationError { reason: Reason::DaemonRestart, detail };
        Ended::Without { is_given_up: true, error, result: None }
    });
    let _ = told.send((id, Told::Ended(ended))).await;
}

/// The end of a process that has committed its snapshot without telling.
async fn committed(place: Place, began: SystemTime) -> Option<Ended> {
    let directory = place.path();
    let found = spawn_blocking(move || place.committed(began)).await.ok()??;
    tracing::info!(directory = %directory.display(), "there is a snapshot, though its process did not tell");
    Some(Ended::Completed(serde_json::json!({
        "outcome": COMPLETED, "directory": directory, "report": found,
    })))
}

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Destination(#[from] super::destination::DestinationError),
    #[error("cannot start the snapshot's process: {0}")]
    Spawn(#[from] io::Error),
}

async fn start(task: Task, lease: &Lease) -> Result<Child, StartError> {
    let place = task.place.clone();
    let directory = spawn_blocking(move || place.open()).await.map_err(io::Error::other)??;
    // It lies in memory, and nothing else is started before this process is: no other inherits it.
    let _held = lease.take()?;
    Ok(snapshot(&task, &directory).spawn()?)
}

fn snapshot(task: &Task, directory: &OwnedFd) -> Command {
    let mut command = command(&["snapshot", "--json-lines", "--policy-updates"], directory);
    command.arg("--qmp").arg(&task.vm.qmp).arg("--out").arg(task.place.name());
    command.arg("--state-dir").arg(&task.runtime_dir).args(task.policy.arguments());
    command.stdin(Stdio::piped());
    command
}

/// This program with `arguments`, at work in `directory`, whose standard output is read; it is told to end when the thread
/// that starts it does.
pub fn command(arguments: &[&str], directory: &OwnedFd) -> Command {
    prepared(child_of::command(OWN_PROGRAM), arguments, directory)
}

/// The same, with only what nobody else wants of processors and disks.
pub fn idle_command(arguments: &[&str], directory: &OwnedFd) -> Command {
    prepared(child_of::idle_command(OWN_PROGRAM), arguments, directory)
}

fn prepared(
    mut command: std::process::Command,
    arguments: &[&str],
    directory: &OwnedFd,
) -> Command {
    command.args(arguments);
    // The very directory that was checked, wherever its name leads by now.
    command.current_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    command.stdout(Stdio::piped());
    let mut command = Command::from(command);
    // Ctrl-C is for the daemon, which decides what it means for the process.
    command.process_group(0);
    command
}

/// How a process has ended.
enum Followed {
    /// As it has told.
    Told(Ended),
    /// It has told nothing; this is to be said of it if there is no snapshot.
    Silent(Ended),
}

/// Until its end.
async fn follow(
    id: &str,
    mut child: Child,
    orders: &mut Receiver<Order>,
    bandwidth: &mut Bandwidth,
    told: &Sender<(String, Told)>,
) -> Followed {
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
    let (Some(stdout), Some(mut stdin)) = (child.stdout.take(), child.stdin.take()) else {
        let detail = "the snapshot's process has no input or output".into();
        return Followed::Silent(without(Reason::Internal, detail));
    };
    let (asked, changes) = channel(CHANGES_MAX);
    let mut reader = tokio::spawn(read(id.to_owned(), stdout, changes, told.clone()));
    let mut is_told = false;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            Some(order) = orders.recv() => match order {
                Order::Terminate => {
                    is_told = true;
                    // It was not waited for, so the number is not another's.
                    if let Some(Err(errno)) = pid.map(|pid| kill_process(pid, Signal::TERM)) {
                        tracing::error!(operation = id, %errno, "cannot tell the snapshot's process to end");
                    }
                }
                Order::Change(change) => {
                    let wire = within(&change.policy, *bandwidth.borrow());
                    // Answers come in the order of lines. A process that takes none has enough to read for now.
                    if let Err(refused) = asked.try_send(Some(change)) {
                        if let Some(change) = refused.into_inner() {
                            let _ = change.answer.send(Err(BUSY.into()));
                        }
                    } else {
                        tell(id, &mut stdin, &wire).await;
                    }
                }
            },
            Ok(()) = bandwidth.changed(), if asked.capacity() > 0 => {
                let share = *bandwidth.borrow_and_update();
                let max_bandwidth_bytes_per_second = Some(share);
                let wire = control_loop::Change { max_bandwidth_bytes_per_second, ..Default::default() };
                if asked.try_send(None).is_ok() {
                    tell(id, &mut stdin, &wire).await;
                }
            }
        }
    };
    // Its guard shares the pipe and may live a little longer.
    let last = match timeout(LAST_LINES_LIMIT, &mut reader).await {
        Ok(last) => last.unwrap_or_default(),
        Err(_) => {
            reader.abort();
            None
        }
    };
    last.map_or_else(|| Followed::Silent(unreported(status, is_told)), Followed::Told)
}

/// The same change, with no more than its share of the disk: what that becomes by the change is told afterwards.
fn within(change: &control_loop::Change, share: Option<NonZeroU64>) -> control_loop::Change {
    let Some(share) = share else { return *change };
    let bounded = |wish: Option<NonZeroU64>| Some(wish.map_or(share, |wish| wish.min(share)));
    control_loop::Change {
        max_bandwidth_bytes_per_second: change.max_bandwidth_bytes_per_second.map(bounded),
        ..*change
    }
}

/// Has a process keep other limits.
async fn tell(id: &str, stdin: &mut ChildStdin, change: &control_loop::Change) {
    let line = line(change);
    let written = timeout(LINE_LIMIT, stdin.write_all(line.as_bytes())).await;
    if !matches!(written, Ok(Ok(()))) {
        tracing::warn!(operation = id, "the snapshot's process takes no other limits");
    }
}

/// A change of limits as the process reads it.
fn line(change: &control_loop::Change) -> String {
    format!("{}\n", serde_json::json!(change))
}

/// Passes on what a process tells; returns how it says to have ended.
async fn read(
    id: String,
    stdout: ChildStdout,
    mut changes: Receiver<Option<Change>>,
    told: Sender<(String, Told)>,
) -> Option<Ended> {
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return None,
            Ok(_) => {}
        }
        match parse(&line) {
            Ok(News::Told(Told::Ended(ended))) => return Some(ended),
            // As long as the supervisor is busy it tells nothing more: the process keeps the newest for itself.
            Ok(News::Told(news)) => told.send((id.clone(), news)).await.ok()?,
            Ok(News::Answer(answer)) => match (changes.try_recv(), answer) {
                (Ok(Some(change)), answer) => {
                    told.send((id.clone(), Told::Changed(change, answer))).await.ok()?;
                }
                (_, Err(detail)) => {
                    tracing::warn!(operation = id, detail, "its share of the disk is not taken");
                }
                (_, Ok(())) => {}
            },
            Ok(News::Other) => {}
            Err(error) => tracing::warn!(operation = id, %error, "not understood"),
        }
    }
}

#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Line {
    Forecast(Value),
    Progress {
        phase: Phase,
        #[serde(flatten)]
        progress: Box<Progress>,
    },
    Policy {
        accepted: bool,
        #[serde(default)]
        detail: String,
    },
    End(Value),
    #[serde(other)]
    Other,
}

/// What a line says.
#[derive(Debug)]
enum News {
    /// Something for the supervisor.
    Told(Told),
    /// What became of other limits.
    Answer(Result<(), String>),
    /// Nothing that is of use here.
    Other,
}

fn parse(line: &[u8]) -> Result<News, serde_json::Error> {
    Ok(match serde_json::from_slice(line)? {
        Line::Forecast(forecast) => News::Told(Told::Forecast(forecast)),
        Line::Progress { phase, progress } => {
            News::Told(Told::Progress(State::of(phase), progress))
        }
        Line::Policy { accepted: true, .. } => News::Answer(Ok(())),
        Line::Policy { detail, .. } => News::Answer(Err(detail)),
        Line::End(result) => News::Told(Told::Ended(ended(result))),
        Line::Other => News::Other,
    })
}

/// What `livesnap snapshot --json` tells at its end.
fn ended(result: Value) -> Ended {
    let outcome = result["outcome"].as_str().unwrap_or_default();
    if outcome == COMPLETED {
        return Ended::Completed(result);
    }
    let reason = serde_json::from_value(result["reason"].clone()).unwrap_or(Reason::Internal);
    let detail = result["error"].as_str().unwrap_or("the snapshot's process does not say why");
    let error = OperationError { reason, detail: detail.into() };
    Ended::Without { is_given_up: outcome == "aborted", error, result: Some(result) }
}

/// What is to be said of a process that has ended without saying how.
fn unreported(status: io::Result<ExitStatus>, is_told: bool) -> Ended {
    match status {
        Ok(status) if is_told && status.signal() == Some(Signal::TERM.as_raw()) => {
            without(Reason::Cancelled, "it was aborted before it began".into())
        }
        Ok(status) => {
            let detail = format!("the snapshot's process ended by itself ({status}): see the log");
            without(Reason::Internal, detail)
        }
        Err(error) => {
            let detail = format!("cannot tell how the snapshot's process ended: {error}");
            without(Reason::Internal, detail)
        }
    }
}

/// An end without a snapshot and without a report.
pub fn without(reason: Reason, detail: String) -> Ended {
    let error = OperationError { reason, detail };
    Ended::Without { is_given_up: false, error, result: None }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn lines_are_understood_with_whatever_else_they_say() {
        let line = br#"{"event":"progress","phase":"copying","is_consistent":true,"total_bytes":7,
            "first_touches":[],"control":{"action":"none"},"stalls":null,"saved_bytes":3}"#;
        let progress = Progress {
            total_bytes: 7,
            saved_bytes: 3,
            control: Some(serde_json::json!({"action": "none"})),
            ..Progress::default()
        };
        let News::Told(Told::Progress(State::Copying, told)) = parse(line).unwrap() else {
            panic!("no progress")
        };
        assert_eq!(*told, progress);
        assert!(matches!(parse(br#"{"event":"news","is":"unknown"}"#), Ok(News::Other)));
        let forecast = parse(br#"{"event":"forecast","verdict":"fits"}"#).unwrap();
        assert!(matches!(forecast, News::Told(Told::Forecast(it)) if it["verdict"] == "fits"));
        let accepted = parse(br#"{"event":"policy","accepted":true,"policy":{}}"#).unwrap();
        assert!(matches!(accepted, News::Answer(Ok(()))));
        let refused = parse(br#"{"event":"policy","accepted":false,"detail":"no"}"#).unwrap();
        assert!(matches!(refused, News::Answer(Err(detail)) if detail == "no"));
        for bad in [&b""[..], b"livesnap: hello", b"{}", br#"{"event":"progress","phase":"x"}"#] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_change_names_only_what_changes() {
        let text = r#"{"deadline_seconds":null,"min_cpu_ratio":0.5}"#;
        let change: control_loop::Change = serde_json::from_str(text).unwrap();
        let line = line(&change);
        assert!(line.ends_with('\n'), "{line:?}");
        let told: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(told, serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn no_change_asks_for_more_than_the_share_of_the_disk() {
        let told = |text: &str, share| {
            let change: control_loop::Change = serde_json::from_str(text).unwrap();
            serde_json::json!(within(&change, NonZeroU64::new(share))).to_string()
        };
        for (wish, told_then) in [("9", "7"), ("5", "5"), ("null", "7")] {
            let text = |value: &str| format!(r#"{{"max_bandwidth_bytes_per_second":{value}}}"#);
            assert_eq!(told(&text(wish), 7), text(told_then));
            assert_eq!(told(&text(wish), 0), text(wish), "there is no budget");
        }
        assert_eq!(told(r#"{"buffer_bytes":9}"#, 7), r#"{"buffer_bytes":9}"#);
    }

    #[test]
    fn ends_are_understood() {
        let end = |text: &str| match parse(text.as_bytes()).unwrap() {
            News::Told(Told::Ended(ended)) => ended,
            other => panic!("{other:?}"),
        };
        let completed = end(r#"{"event":"end","outcome":"completed","report":{}}"#);
        assert!(matches!(completed, Ended::Completed(result) if result["report"].is_object()));
        let aborted =
            end(r#"{"event":"end","outcome":"aborted","reason":"deadline","error":"no"}"#);
        let Ended::Without { is_given_up: true, error, .. } = aborted else {
            panic!("{aborted:?}")
        };
        assert_eq!(error, OperationError { reason: Reason::Deadline, detail: "no".into() });
        let odd = end(r#"{"event":"end","outcome":"failed","reason":"a word of the future"}"#);
        let Ended::Without { is_given_up: false, error, .. } = odd else { panic!("{odd:?}") };
        assert_eq!(error.reason, Reason::Internal);
    }

    #[test]
    fn a_process_that_dies_without_a_word_is_told_of() {
        let reason = |raw, is_told| match unreported(Ok(ExitStatus::from_raw(raw)), is_told) {
            Ended::Without { error, .. } => error.reason,
            Ended::Completed(_) => panic!("{raw}"),
        };
        assert_eq!(reason(15, true), Reason::Cancelled);
        assert_eq!(reason(15, false), Reason::Internal);
        assert_eq!(reason(9, true), Reason::Internal);
        assert_eq!(reason(0, true), Reason::Internal);
    }
}
