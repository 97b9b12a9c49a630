//! The one task that owns the book: takes commands and news, does what the book selects, and shows every change.
//!
//! ```text
//!  API ──commands──▶ ┌────────────┐ ──▶ view        what readers see; they never wait for the supervisor, nor it for them
//!                    │ Supervisor │ ──▶ observers   logs, metrics
//!  processes ─told─▶ └────────────┘ ──▶ journal     what has to survive
//! ```
//!
//! Runs on the daemon's main thread, as every task does. What may wait for a disk is done on other threads.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use humantime::parse_rfc3339;
use snapshot_core::Reason;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until, timeout};

use super::book::{Action, Book, OverBudget, Record, Rejected, Series, Shutdown, Unforgettable};
use super::child::{self, Change, Order, Outlived, Task, Told};
use super::config::Config;
use super::destination::{DestinationError, Place};
use super::journal::{Journal, JournalError};
use super::lease::Lease;
use super::look::Unfit;
use super::operation::{self, Ended, Observer, Operation, Request, State, Verification, timestamp};
use super::retention::{self, Candidate};
use super::schedule::{Agenda, Schedule, Turn};
use super::verification;
use super::vms::{Vm, Vms};
use crate::{actuator, control_loop};

/// Commands and news that wait to be taken; who has more waits too.
const MAILBOX: usize = 64;

/// How long a process may take to answer, which it does with the session's next step.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Orders that wait until a process has been started.
const ORDERS: usize = 8;

/// How often schedules are looked at when nothing is due.
const AGENDA_INTERVAL: Duration = Duration::from_secs(10);

/// What readers see.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// All operations, by id.
    pub operations: BTreeMap<String, Arc<Operation>>,
    /// When the next snapshot of a virtual machine is due, by its name (RFC 3339).
    pub next_at: BTreeMap<String, String>,
    /// Why schedules leave virtual machines out for now, by their names.
    pub left_out: BTreeMap<String, String>,
    /// Whether the daemon is ending.
    pub is_closing: bool,
}

/// Why a request is not taken up.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// There is no such virtual machine.
    #[error("there is no virtual machine named {vm:?}: GET /vms lists them")]
    UnknownVm {
        /// What was asked for.
        vm: String,
    },
    /// It may not lie there.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// The book says no.
    #[error(transparent)]
    Rejected(#[from] Rejected),
    /// It would not survive.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The supervisor has ended.
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// Why a turn of a schedule is left out.
#[derive(Debug, thiserror::Error)]
enum LeftOut {
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error("the last one is still being verified: have them taken less often, or without verify")]
    Unverified,
    #[error(transparent)]
    Rejected(#[from] SubmitError),
}

/// Why limits are not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// There is no such operation.
    #[error("there is no such operation")]
    Unknown,
    /// Nothing is to be changed any more.
    #[error("operation {id} is ending or has ended: its limits cannot be changed any more")]
    Ended {
        /// The operation.
        id: String,
    },
    /// The process says no.
    #[error("the limits are as they were: {detail}")]
    Refused {
        /// Why.
        detail: String,
    },
}

/// The supervisor has ended, and the daemon is about to.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the daemon is ending: ask again when it is back")]
pub struct Gone;

#[derive(Debug)]
enum Command {
    Submit {
        id: String,
        request: Request,
        destination: String,
        key: Option<String>,
        reply: oneshot::Sender<Result<Arc<Operation>, SubmitError>>,
    },
    Abort {
        id: String,
        reply: oneshot::Sender<Option<Arc<Operation>>>,
    },
    Forget {
        id: String,
        reply: oneshot::Sender<Result<(), Unforgettable>>,
    },
    Change {
        id: String,
        change: Change,
        reply: oneshot::Sender<Result<(), ChangeError>>,
    },
    Close(Shutdown),
}

/// What was done beside snapshots.
#[derive(Debug)]
enum Done {
    /// A snapshot was read again.
    Verified(String, Verification),
    /// Old ones were removed: those of these operations are there no longer.
    Tidied(Vec<String>),
}

/// How others reach the supervisor.
#[derive(Clone, Debug)]
pub struct Handle {
    config: Arc<Config>,
    vms: Vms,
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<Arc<View>>,
    /// The last id that was given.
    ids: Arc<AtomicU64>,
}

impl Handle {
    /// The virtual machines.
    pub const fn vms(&self) -> &Vms {
        &self.vms
    }

    /// What readers see, now and whenever it changes; who is slow sees the newest.
    pub fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    /// The virtual machine of that name, and where a snapshot of it by operation `id` would lie.
    ///
    /// # Errors
    /// If there is no such machine, or it may not lie there.
    pub fn find(
        &self,
        vm: &str,
        destination: Option<&str>,
        id: &str,
    ) -> Result<(Vm, Place), SubmitError> {
        let found = self.vms.get(vm).ok_or_else(|| SubmitError::UnknownVm { vm: vm.into() })?;
        Ok((found, Place::new(&self.config.destinations, destination, vm, id)?))
    }

    /// Takes up a request, or finds the operation that it was taken up as before.
    ///
    /// # Errors
    /// If it cannot be taken up.
    pub async fn submit(
        &self,
        request: Request,
        key: Option<String>,
    ) -> Result<Arc<Operation>, SubmitError> {
        let id = new_id(&self.ids);
        let (_, place) = self.find(&request.vm, request.destination.as_deref(), &id)?;
        let looked_at = place.clone();
        spawn_blocking(move || looked_at.check()).await.map_err(|_| Gone)??;
        let destination = place.path().display().to_string();
        let (reply, answer) = oneshot::channel();
        let command = Command::Submit { id, request, destination, key, reply };
        self.commands.send(command).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)?
    }

    /// Gives an operation up. Nothing if there is no such operation.
    ///
    /// # Errors
    /// If the supervisor has ended.
    pub async fn abort(&self, id: &str) -> Result<Option<Arc<Operation>>, Gone> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Abort { id: id.into(), reply };
        self.commands.send(command).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }

    /// Forgets an ended operation.
    ///
    /// # Errors
    /// If the supervisor has ended.
    pub async fn forget(&self, id: &str) -> Result<Result<(), Unforgettable>, Gone> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Forget { id: id.into(), reply };
        self.commands.send(command).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }

    /// Changes the limits of an operation, and waits until they are in force.
    ///
    /// # Errors
    /// If the supervisor has ended; or why they are not changed.
    pub async fn change(
        &self,
        id: &str,
        policy: control_loop::Change,
    ) -> Result<Result<(), ChangeError>, Gone> {
        let (reply, taken) = oneshot::channel();
        let (answer, answered) = oneshot::channel();
        let change = Change { policy, answer };
        let command = Command::Change { id: id.into(), change, reply };
        self.commands.send(command).await.map_err(|_| Gone)?;
        if let Err(error) = taken.await.map_err(|_| Gone)? {
            return Ok(Err(error));
        }
        Ok(match timeout(ANSWER_LIMIT, answered).await {
            Ok(Ok(answer)) => answer.map_err(|detail| ChangeError::Refused { detail }),
            // It ended instead.
            Ok(Err(_)) => Err(ChangeError::Ended { id: id.into() }),
            Err(_) => {
                let detail = "the snapshot's process does not answer: ask again".into();
                Err(ChangeError::Refused { detail })
            }
        })
    }

    /// Has the supervisor end.
    pub async fn close(&self, shutdown: Shutdown) {
        // It may have done so already.
        let _ = self.commands.send(Command::Close(shutdown)).await;
    }
}

/// An id that sorts behind all before: microseconds since 1970, or one more than the last.
fn new_id(ids: &AtomicU64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
    let last = ids.fetch_max(now, Ordering::Relaxed);
    let id = if now > last { now } else { ids.fetch_add(1, Ordering::Relaxed) + 1 };
    format!("{id:014x}")
}

/// The task's state.
pub struct Supervisor {
    config: Arc<Config>,
    vms: Vms,
    book: Book,
    agenda: Agenda,
    /// When it is to be looked at next.
    agenda_at: Instant,
    ids: Arc<AtomicU64>,
    journal: Arc<Journal>,
    observers: Vec<Box<dyn Observer>>,
    view: watch::Sender<Arc<View>>,
    commands: mpsc::Receiver<Command>,
    /// Kept so that the channel stays open; each process has a copy.
    teller: mpsc::Sender<(String, Told)>,
    told: mpsc::Receiver<(String, Told)>,
    /// The same for what is done beside snapshots.
    doer: mpsc::Sender<Done>,
    done: mpsc::Receiver<Done>,
    processes: HashMap<String, Process>,
}

/// How a snapshot's process is reached.
struct Process {
    orders: mpsc::Sender<Order>,
    bandwidth: watch::Sender<Option<NonZeroU64>>,
}

impl Supervisor {
    /// With what an earlier daemon has left: operations, and turns that it had taken.
    pub fn new(
        config: Arc<Config>,
        vms: Vms,
        journal: Journal,
        earlier: Vec<Record>,
        turns: Vec<Turn>,
        observers: Vec<Box<dyn Observer>>,
    ) -> (Self, Handle) {
        let last =
            earlier.iter().filter_map(|record| u64::from_str_radix(&record.operation.id, 16).ok());
        let ids = Arc::new(AtomicU64::new(last.max().unwrap_or(0)));
        let operations = earlier.iter().map(|record| &record.operation);
        let operations =
            operations.map(|known| (known.id.clone(), Arc::new(known.clone()))).collect();
        let keep = config.schedule.iter().filter_map(Schedule::kept).collect();
        let book = Book::new(config.bounds(), earlier).keeping(keep);
        let (view, seen) = watch::channel(Arc::new(View { operations, ..View::default() }));
        let (sender, commands) = mpsc::channel(MAILBOX);
        let (teller, told) = mpsc::channel(MAILBOX);
        let (doer, done) = mpsc::channel(MAILBOX);
        let handle = Handle {
            config: Arc::clone(&config),
            vms: vms.clone(),
            commands: sender,
            view: seen,
            ids: Arc::clone(&ids),
        };
        let agenda = Agenda::new(config.schedule.clone(), turns);
        let supervisor = Self {
            config,
            vms,
            book,
            agenda,
            agenda_at: Instant::now(),
            ids,
            journal: Arc::new(journal),
            observers,
            view,
            commands,
            teller,
            told,
            doer,
            done,
            processes: HashMap::new(),
        };
        (supervisor, handle)
    }

    /// Until it was told to close and nothing runs any more.
    pub async fn run(mut self) {
        // These were running when an earlier daemon ended.
        for id in self.book.changes() {
            self.outlive(id);
        }
        self.publish().await;
        while !self.book.is_closed() {
            while let Some(action) = self.book.select() {
                self.apply(action).await;
            }
            // News first: they free what commands wait for.
            tokio::select! {
                biased;
                Some((id, told)) = self.told.recv() => self.note(&id, told).await,
                Some(done) = self.done.recv() => self.note_done(done),
                () = sleep_until(self.agenda_at), if !self.agenda.is_empty() => self.keep_schedules().await,
                Some(command) = self.commands.recv() => self.obey(command).await,
                else => return,
            }
            self.publish().await;
        }
    }

    /// Does what the book has selected.
    async fn apply(&mut self, action: Action) {
        match action {
            Action::Start(id) => self.start(&id),
            Action::Terminate(id) => {
                self.book.told(&id);
                if let Some(process) = self.processes.get(&id) {
                    // There is room for it; one that has just ended takes none.
                    let _ = process.orders.try_send(Order::Terminate);
                }
            }
            Action::Share(id, share) => {
                self.book.share(&id, share);
                if let Some(process) = self.processes.get(&id) {
                    process.bandwidth.send_replace(Some(share));
                }
            }
            Action::Forget(id) => {
                // It is one that has ended.
                let _ = self.book.forget(&id);
            }
            Action::Verify(id) => self.verify(id),
            Action::Tidy(series) => self.tidy(&series),
        }
        self.publish().await;
    }

    fn start(&mut self, id: &str) {
        let now = timestamp();
        self.book.start(id, &now);
        let Some(record) = self.book.get(id) else { return };
        let Operation { vm, policy, granted, .. } = &record.operation;
        let granted = granted.unwrap_or_default();
        // It may have been taken up by an earlier daemon, by another configuration.
        let task = self.place(&record.operation).map_err(SubmitError::from).and_then(|place| {
            let unknown = || SubmitError::UnknownVm { vm: vm.clone() };
            Ok(Task {
                id: id.into(),
                vm: self.vms.get(vm).ok_or_else(unknown)?,
                place,
                policy: granted.applied_to(policy),
                runtime_dir: self.config.runtime_dir.clone(),
            })
        });
        match task {
            Ok(task) => {
                let (orders, inbox) = mpsc::channel(ORDERS);
                let (bandwidth, share) = watch::channel(granted.max_bandwidth_bytes_per_second);
                self.processes.insert(id.into(), Process { orders, bandwidth });
                tokio::spawn(child::run(task, inbox, share, self.teller.clone()));
            }
            Err(error) => {
                let reason = match error {
                    SubmitError::Destination(_) => Reason::BadDestination,
                    _ => Reason::BadArgument,
                };
                self.book.end(id, child::without(reason, error.to_string()), &now);
            }
        }
    }

    /// Has a snapshot read again.
    fn verify(&mut self, id: String) {
        self.book.verifying(&id);
        let Some(record) = self.book.get(&id) else { return };
        let (place, done) = (self.place(&record.operation), self.doer.clone());
        tokio::spawn(async move {
            let found = verification::verify(place).await;
            // Nobody is left to hear it if this fails.
            let _ = done.send(Done::Verified(id, found)).await;
        });
    }

    /// Has old snapshots removed.
    fn tidy(&mut self, series: &Series) {
        self.book.tidying(series);
        let keep = self.book.keep(series);
        // What an earlier configuration had below other roots is not touched, and does not count.
        let candidate = |known| Some(Candidate::new(known, self.place(known).ok()?));
        let candidates: Vec<_> = self.book.kept(series).filter_map(candidate).collect();
        let done = self.doer.clone();
        tokio::spawn(async move {
            let gone = spawn_blocking(move || retention::tidy(&candidates, keep)).await;
            let _ = done.send(Done::Tidied(gone.unwrap_or_default())).await;
        });
    }

    fn note_done(&mut self, done: Done) {
        match done {
            Done::Verified(id, found) => self.book.verified(&id, found),
            Done::Tidied(gone) => self.book.tidied(&gone, &timestamp()),
        }
    }

    async fn note(&mut self, id: &str, told: Told) {
        match told {
            Told::Forecast(forecast) => self.book.note_forecast(id, forecast),
            Told::Progress(state, progress) => self.book.note_progress(id, state, *progress),
            Told::Changed(Change { policy, answer }, changed) => {
                if changed.is_ok() {
                    self.book.note_policy(id, &policy);
                    // Whoever is answered shall see it.
                    self.publish().await;
                }
                // It may have given up waiting.
                let _ = answer.send(changed);
            }
            Told::Ended(ended) => {
                self.processes.remove(id);
                if matches!(ended, Ended::Without { result: None, .. }) {
                    self.clear(id);
                }
                self.book.end(id, ended, &timestamp());
            }
        }
    }

    /// Where a snapshot shall lie.
    fn place(&self, operation: &Operation) -> Result<Place, DestinationError> {
        let Operation { destination, vm, id, .. } = operation;
        Place::new(&self.config.destinations, Some(destination), vm, id)
    }

    /// Has waited for the end of a process that an earlier daemon has started.
    fn outlive(&self, id: &str) {
        let Some(record) = self.book.get(id) else { return };
        let operation = &record.operation;
        let began = operation.started_at.as_deref();
        let outlived = Outlived {
            id: id.into(),
            lease: Lease::of(&self.config.runtime_dir, id),
            turn: self.vms.get(&operation.vm).map(|vm| vm.turn),
            place: self.place(operation).ok(),
            began: began.and_then(|text| parse_rfc3339(text).ok()).unwrap_or_else(SystemTime::now),
        };
        tokio::spawn(child::outlive(outlived, self.teller.clone()));
    }

    /// Has removed what a process may have left that could not end by itself.
    fn clear(&self, id: &str) {
        let Some(record) = self.book.get(id) else { return };
        let place = self.place(&record.operation);
        let runtime_dir = self.config.runtime_dir.clone();
        spawn_blocking(move || {
            repair(&runtime_dir);
            if let Ok(place) = place {
                place.clear();
            }
        });
    }

    async fn obey(&mut self, command: Command) {
        // Whoever does not wait for the answer any more need not have it.
        match command {
            Command::Submit { id, request, destination, key, reply } => {
                let answer = self.submit(&id, &request, &destination, key.as_deref()).await;
                let _ = reply.send(answer);
            }
            Command::Abort { id, reply } => {
                let is_known = self.book.abort(&id, &timestamp());
                self.publish().await;
                let operation = is_known.then(|| self.operation(&id)).flatten();
                let _ = reply.send(operation);
            }
            Command::Forget { id, reply } => {
                let forgotten = self.book.forget(&id);
                self.publish().await;
                let _ = reply.send(forgotten);
            }
            Command::Change { id, change, reply } => {
                let taken = self.change(&id, change).await;
                let _ = reply.send(taken);
            }
            Command::Close(shutdown) => {
                self.book.close(shutdown);
                self.view.send_modify(|view| Arc::make_mut(view).is_closing = true);
            }
        }
    }

    /// Changes the limits of what waits, or asks the process of what runs to do so.
    async fn change(&mut self, id: &str, change: Change) -> Result<(), ChangeError> {
        let state = self.book.get(id).ok_or(ChangeError::Unknown)?.operation.state;
        let ended = || ChangeError::Ended { id: id.into() };
        let refused = |error: OverBudget| ChangeError::Refused { detail: error.to_string() };
        self.book.may_change(id, &change.policy).map_err(refused)?;
        if state == State::Queued {
            self.book.note_policy(id, &change.policy);
            self.publish().await;
            let _ = change.answer.send(Ok(()));
            return Ok(());
        }
        if state == State::Aborting {
            return Err(ended());
        }
        let process = self.processes.get(id).ok_or_else(ended)?;
        let busy = || ChangeError::Refused { detail: child::BUSY.into() };
        // The last room is for the order to end, which must not be lost.
        if process.orders.capacity() < 2 {
            return Err(busy());
        }
        process.orders.try_send(Order::Change(change)).map_err(|_| busy())
    }

    async fn submit(
        &mut self,
        id: &str,
        request: &Request,
        destination: &str,
        key: Option<&str>,
    ) -> Result<Arc<Operation>, SubmitError> {
        let now = timestamp();
        let known = self.book.submit(id, request, destination, key, &now)?.id.clone();
        // Whoever is told that it was taken up may rely on that.
        if known == id
            && let Some(error) = self.publish().await
        {
            self.book.withdraw(id);
            return Err(error.into());
        }
        Ok(self.operation(&known).ok_or(Gone)?)
    }

    /// Asks for the snapshots whose turn has come.
    async fn keep_schedules(&mut self) {
        self.agenda_at = Instant::now() + AGENDA_INTERVAL;
        if self.view.borrow().is_closing {
            return;
        }
        let now = SystemTime::now();
        for turn in self.turns(now).into_iter().take_while(|turn| turn.at <= now) {
            let (schedule, vm) = (&turn.schedule, &turn.vm);
            match self.take_turn(&turn).await {
                Ok(()) => self.agenda.taken(&turn),
                Err(why) => {
                    let why = why.to_string();
                    if self.agenda.leave_out(&turn, &why, now) {
                        tracing::warn!(schedule, vm, why, "a turn is left out");
                    }
                }
            }
        }
        let turns = self.turns(now);
        let next = turns.first().and_then(|turn| turn.at.duration_since(now).ok());
        // Looked at before that for machines that come, and for clocks that are put.
        self.agenda_at = Instant::now() + next.unwrap_or_default().min(AGENDA_INTERVAL);
        let (mut next_at, left_out) = (BTreeMap::new(), self.agenda.left_out());
        for turn in turns {
            next_at.entry(turn.vm).or_insert(operation::at(turn.at));
        }
        self.view.send_if_modified(|view| {
            let is_new = view.next_at != next_at || view.left_out != left_out;
            if is_new {
                let view = Arc::make_mut(view);
                (view.next_at, view.left_out) = (next_at, left_out);
            }
            is_new
        });
    }

    fn turns(&mut self, now: SystemTime) -> Vec<Turn> {
        let names: Vec<_> = self.vms.all().into_iter().map(|(name, _)| name).collect();
        self.agenda.turns(now, &names, self.book.operations())
    }

    /// Asks for a snapshot that is due.
    async fn take_turn(&mut self, turn: &Turn) -> Result<(), LeftOut> {
        let Some(schedule) = self.agenda.get(&turn.schedule) else { return Ok(()) };
        let request = Request {
            vm: turn.vm.clone(),
            destination: None,
            policy: schedule.policy.clone(),
            verify: schedule.verify,
        };
        let unknown = || SubmitError::UnknownVm { vm: turn.vm.clone() };
        let seen = self.vms.get(&turn.vm).ok_or_else(unknown)?.seen;
        if let Some(unfit) = seen.and_then(|seen| seen.unfit(schedule.policy.no_disks)) {
            return Err(unfit.into());
        }
        // Or those that nobody has read yet would become ever more, and none is removed for them.
        let series = Series { schedule: turn.schedule.clone(), vm: turn.vm.clone() };
        if self.book.kept(&series).any(|known| !known.is_settled()) {
            return Err(LeftOut::Unverified);
        }
        let id = new_id(&self.ids);
        let place = Place::new(&self.config.destinations, None, &turn.vm, &id);
        let place = place.map_err(SubmitError::from)?;
        let destination = place.path().display().to_string();
        let now = timestamp();
        let taken = self.book.submit_scheduled(&id, &request, &destination, &turn.schedule, &now);
        taken.map_err(SubmitError::from)?;
        if let Some(error) = self.publish().await {
            self.book.withdraw(&id);
            return Err(SubmitError::from(error).into());
        }
        Ok(())
    }

    fn operation(&self, id: &str) -> Option<Arc<Operation>> {
        self.view.borrow().operations.get(id).cloned()
    }

    /// Shows every change to readers and observers, and keeps what has to survive. Returns why the last one was not kept.
    async fn publish(&mut self) -> Option<JournalError> {
        let mut problem = None;
        for id in self.book.take_changes() {
            let record = self.book.get(&id);
            let before = self.operation(&id);
            let now = record.map(|record| Arc::new(record.operation.clone()));
            let journal = Arc::clone(&self.journal);
            let kept = match record {
                Some(record) if !is_worth_keeping(before.as_deref(), &record.operation) => {
                    Ok(Ok(()))
                }
                Some(record) => {
                    // What has become of one may make the next one due.
                    self.agenda_at = Instant::now();
                    let record = record.clone();
                    spawn_blocking(move || journal.write(&record)).await
                }
                None => {
                    let id = id.clone();
                    // What a schedule took is not taken again because nobody remembers it.
                    let is_scheduled =
                        before.as_ref().is_some_and(|known| known.schedule.is_some());
                    let turns = is_scheduled.then(|| self.agenda.all_taken());
                    spawn_blocking(move || {
                        turns.map_or(Ok(()), |turns| journal.write_turns(&turns))?;
                        journal.remove(&id)
                    })
                    .await
                }
            };
            if let Err(error) = kept.unwrap_or_else(|error| Err(self.journal.interrupted(error))) {
                tracing::error!(operation = id, %error, "not kept");
                problem = Some(error);
            }
            for observer in &mut self.observers {
                observer.changed(before.as_deref(), now.as_deref());
            }
            self.view.send_modify(|view| {
                let operations = &mut Arc::make_mut(view).operations;
                match now {
                    Some(now) => operations.insert(id, now),
                    None => operations.remove(&id),
                };
            });
        }
        problem
    }
}

/// Whether a restart must know of it: that it was asked for, that it runs, how it ended, its
/// limits, and what has become of its snapshot. How far it is need not survive.
fn is_worth_keeping(before: Option<&Operation>, now: &Operation) -> bool {
    // Only compared: this is asked with each progress.
    fn stage(known: &Operation) -> impl PartialEq {
        let Operation { state, policy, verification, removed_at, .. } = known;
        (state.is_running(), state.is_final(), policy, verification, removed_at)
    }
    before.is_none_or(|before| stage(before) != stage(now))
}

/// Puts back what livesnaps that were killed had changed.
pub fn repair(runtime_dir: &Path) {
    for leftover in actuator::repair(runtime_dir) {
        let repaired = actuator::in_words(&leftover);
        tracing::warn!(repaired);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;
    use crate::daemon::operation::VerificationState;

    /// A supervisor that has yet to run, of a machine whose schedule is due and had operation 1.
    fn supervisor(dir: &Path, last: Operation) -> (Supervisor, Handle) {
        let text = "vm = [{ name = 'vm1', qmp = '/nobody' }]
            schedule = [{ name = 'often', vms = ['vm1'], every = '1s', jitter = '0s', verify = true }]";
        let config: Config = toml::from_str(text).unwrap();
        let config = Config { destinations: vec![dir.into()], ..config };
        let earlier =
            Record { operation: last, request: Request::default(), idempotency_key: None };
        let (vms, journal) = (Vms::new(&config), Journal::open(dir).unwrap());
        Supervisor::new(Arc::new(config), vms, journal, vec![earlier], Vec::new(), Vec::new())
    }

    #[test]
    fn a_turn_is_left_out_while_the_last_snapshot_is_being_verified() {
        let dir = tempfile::tempdir().unwrap();
        let last = Operation {
            id: "1".into(),
            vm: "vm1".into(),
            schedule: Some("often".into()),
            state: State::Completed,
            started_at: Some("2020-01-01T00:00:00.000Z".into()),
            verification: Some(Verification::begun()),
            ..Operation::default()
        };
        let (mut supervisor, handle) = supervisor(dir.path(), last);
        let look = async |supervisor: &mut Supervisor| {
            supervisor.keep_schedules().await;
            let view = handle.view().borrow().clone();
            (view.operations.len(), view.left_out.get("vm1").cloned())
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            supervisor.publish().await;
            let (operations, left_out) = look(&mut supervisor).await;
            assert_eq!((operations, left_out), (1, Some(LeftOut::Unverified.to_string())));

            // It is looked at again after a while; then there is nothing to wait for.
            let turn = supervisor.turns(SystemTime::now()).remove(0);
            let sound = Verification { state: VerificationState::Sound, ..Verification::begun() };
            supervisor.note_done(Done::Verified("1".into(), sound));
            supervisor.agenda.taken(&turn);
            assert_eq!(look(&mut supervisor).await, (2, None));
        });
    }
}
