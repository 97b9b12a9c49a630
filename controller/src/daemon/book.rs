//! The book of all operations: who is busy with what, whose turn it is, what is remembered. Pure: time and names come
//! from outside, and nothing is started or written here.
//!
//! Commands and news change it by its methods; [`Book::select`] tells what is to be done next, and each [`Action`] has a
//! method that notes it as done. Every change of an operation is in [`Book::take_changes`].

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;

use livesnap_control::policy::BUFFER_BYTES_DEFAULT;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use snapshot_core::Reason;

use super::budget::{Budget, Grant, divide};
use super::operation::{
    Ended, Operation, OperationError, Progress, Request, State, Verification, VerificationState,
};
use super::policy::Policy;
use crate::control_loop::Change;

/// Added to the version of what a restart changes. Not every version is kept on disk, and none may come twice.
const RESTART_LEAP: u64 = 1 << 32;

/// How much is allowed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Operations that run.
    pub running_max: usize,
    /// Operations that wait.
    pub queued_max: usize,
    /// Ended operations that are remembered; the oldest are forgotten.
    pub remembered_max: usize,
    /// What those that run share.
    pub budget: Budget,
}

impl Bounds {
    /// What a snapshot within `policy` has if it is the only one.
    pub fn alone(&self, policy: &Policy) -> Grant {
        let wish = policy.max_bandwidth_bytes_per_second;
        Grant {
            buffer_bytes: self.buffer(policy),
            max_bandwidth_bytes_per_second: self
                .budget
                .bandwidth_bytes_per_second
                .and_then(|total| divide(total, &[wish]).first().copied()),
        }
    }

    /// The buffer of a snapshot within `policy`, if there is a budget: what it asks for, or an even share.
    fn buffer(&self, policy: &Policy) -> Option<u64> {
        let total = self.budget.buffer_bytes?;
        let even = (total / self.running_max.max(1) as u64).min(BUFFER_BYTES_DEFAULT);
        // The budget may have been a greater one when it was asked for.
        Some(policy.buffer_bytes.unwrap_or(even).min(total))
    }
}

/// An operation with what it was asked by, as it is kept over a restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What everybody may see.
    pub operation: Operation,
    /// What was asked for.
    pub request: Request,
    /// Stands for the request if it comes again.
    pub idempotency_key: Option<String>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Its turn has come: [`Book::start`], then start its process.
    Start(String),
    /// Its process is to end: [`Book::told`], then tell it so.
    Terminate(String),
    /// Its process may write so many bytes a second now: [`Book::share`], then tell it so.
    Share(String, NonZeroU64),
    /// It is beyond what is remembered: [`Book::forget`].
    Forget(String),
    /// Its snapshot is to be read again: [`Book::verifying`], then do so.
    Verify(String),
    /// Old ones of these are to be removed: [`Book::tidying`], then do so.
    Tidy(Series),
}

/// The snapshots of a virtual machine that a schedule wants.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Series {
    /// The schedule's name.
    pub schedule: String,
    /// The virtual machine's.
    pub vm: String,
}

impl Series {
    /// What an operation is of, if a schedule wanted it.
    fn of(operation: &Operation) -> Option<Self> {
        Some(Self { schedule: operation.schedule.clone()?, vm: operation.vm.clone() })
    }
}

/// What becomes of operations that run when the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shutdown {
    /// They are aborted.
    Abort,
    /// The daemon waits for their end.
    Drain,
}

/// Why a request is not taken up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// One at a time.
    #[error(
        "virtual machine {vm} is being snapshotted by operation {id}: wait for its end or abort it"
    )]
    Busy {
        /// The machine.
        vm: String,
        /// What it is busy with.
        id: String,
    },
    /// Two snapshots cannot become the same directory.
    #[error("{destination} is the destination of operation {id}: choose another")]
    DestinationTaken {
        /// The directory.
        destination: String,
        /// Whose it is.
        id: String,
    },
    /// A key stands for one request.
    #[error("the idempotency key was used for another request, operation {id}: use a new key")]
    KeyReused {
        /// What it was used for.
        id: String,
    },
    /// It would wait forever.
    #[error(
        "policy.buffer_bytes is {bytes}, and the buffers of all snapshots together may have {total}: ask for less"
    )]
    OverBudget {
        /// What was asked for.
        bytes: u64,
        /// What there is.
        total: u64,
    },
    /// The queue has a limit.
    #[error("{max} operations wait for their turn, which is the limit: ask again later")]
    QueueFull {
        /// The limit.
        max: usize,
    },
    /// The daemon ends.
    #[error("the daemon is ending and takes up nothing new: ask again when it is back")]
    Closing,
}

/// A buffer does not fit beside those of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a buffer of {bytes} bytes does not fit beside those of others into the host's budget of {total}: ask for less, or wait for their end"
)]
pub struct OverBudget {
    /// What was asked for.
    bytes: u64,
    /// What all have together.
    total: u64,
}

/// Why an operation cannot be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unforgettable {
    /// There is no such operation.
    Unknown,
    /// It has not ended.
    NotEnded,
}

/// An operation, and what only the book knows of it.
#[derive(Debug)]
struct Entry {
    record: Record,
    /// Whether somebody asked for its abort.
    is_unwanted: bool,
    /// Whether its process was told to end.
    is_told: bool,
    /// Whether its snapshot is being read again.
    is_verifying: bool,
}

impl Entry {
    const fn new(record: Record) -> Self {
        Self { record, is_unwanted: false, is_told: false, is_verifying: false }
    }
}

/// All operations that are known.
#[derive(Debug)]
pub struct Book {
    bounds: Bounds,
    entries: BTreeMap<String, Entry>,
    closing: Option<Shutdown>,
    changes: Vec<String>,
    /// How many good snapshots schedules keep, of those that do not keep all.
    keep: BTreeMap<String, usize>,
    /// Where old ones may have to be removed.
    untidy: BTreeSet<Series>,
    is_tidying: bool,
}

impl Book {
    /// With the operations of an earlier daemon. Those that ran are being ended by its end, which somebody has to wait for:
    /// they are the changes. Those that waited still do.
    pub fn new(bounds: Bounds, earlier: Vec<Record>) -> Self {
        let mut book = Self {
            bounds,
            entries: BTreeMap::new(),
            closing: None,
            changes: Vec::new(),
            keep: BTreeMap::new(),
            untidy: BTreeSet::new(),
            is_tidying: false,
        };
        for mut record in earlier {
            let operation = &mut record.operation;
            let id = operation.id.clone();
            let was_running = operation.state.is_running();
            if was_running {
                operation.version += RESTART_LEAP;
                operation.state = State::Aborting;
                book.changes.push(id.clone());
            }
            // What an earlier daemon was removing is still to be removed.
            if operation.state == State::Completed && operation.removed_at.is_none() {
                book.untidy.extend(Series::of(operation));
            }
            // Its process was told to end by the kernel.
            book.entries.insert(id, Entry { is_told: was_running, ..Entry::new(record) });
        }
        book
    }

    /// With schedules, by name, that keep only so many good snapshots of a virtual machine.
    pub fn keeping(self, keep: BTreeMap<String, usize>) -> Self {
        Self { keep, ..self }
    }

    /// How many good snapshots of these are kept; all if nothing is said.
    pub fn keep(&self, series: &Series) -> Option<usize> {
        self.keep.get(&series.schedule).copied()
    }

    /// The operations of these whose snapshots are there, as far as is known, the newest first.
    pub fn kept(&self, series: &Series) -> impl Iterator<Item = &Operation> {
        self.entries.values().rev().map(|entry| &entry.record.operation).filter(|known| {
            let is_there = known.state == State::Completed && known.removed_at.is_none();
            is_there && Series::of(known).as_ref() == Some(series)
        })
    }

    /// All, oldest first.
    pub fn operations(&self) -> impl Iterator<Item = &Operation> {
        self.entries.values().map(|entry| &entry.record.operation)
    }

    /// One of them, as it is to be kept.
    pub fn get(&self, id: &str) -> Option<&Record> {
        self.entries.get(id).map(|entry| &entry.record)
    }

    /// Whether the daemon ends, and nothing runs any more.
    pub fn is_closed(&self) -> bool {
        self.closing.is_some() && self.count(State::is_running) == 0
    }

    /// The operations that were changed since [`Book::take_changes`].
    pub fn changes(&self) -> &[String] {
        &self.changes
    }

    /// The operations that were changed, taken up or forgotten since this was last asked, in that order.
    pub fn take_changes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.changes)
    }

    /// Takes a request up as operation `id`, or finds the one that it was taken up as before.
    ///
    /// # Errors
    /// If it cannot be taken up.
    pub fn submit(
        &mut self,
        id: &str,
        request: &Request,
        destination: &str,
        key: Option<&str>,
        now: &str,
    ) -> Result<&Operation, Rejected> {
        let id = match self.find_by_key(key, request)? {
            Some(known) => known,
            None => {
                self.may_submit(request, destination)?;
                let record = Record {
                    operation: Operation {
                        id: id.into(),
                        vm: request.vm.clone(),
                        destination: destination.into(),
                        policy: request.policy.clone(),
                        granted: None,
                        schedule: None,
                        state: State::Queued,
                        version: 1,
                        created_at: now.into(),
                        started_at: None,
                        ended_at: None,
                        progress: None,
                        forecast: None,
                        error: None,
                        verification: None,
                        removed_at: None,
                        result: None,
                    },
                    request: request.clone(),
                    idempotency_key: key.map(Into::into),
                };
                self.changes.push(id.into());
                self.entries.insert(id.into(), Entry::new(record));
                id.to_owned()
            }
        };
        Ok(&self.entries[&id].record.operation)
    }

    /// Takes up what a schedule wants.
    ///
    /// # Errors
    /// If it cannot be taken up.
    pub fn submit_scheduled(
        &mut self,
        id: &str,
        request: &Request,
        destination: &str,
        schedule: &str,
        now: &str,
    ) -> Result<(), Rejected> {
        self.submit(id, request, destination, None, now)?;
        if let Some(entry) = self.entries.get_mut(id) {
            entry.record.operation.schedule = Some(schedule.into());
        }
        Ok(())
    }

    /// The operation that this key stands for.
    fn find_by_key(
        &self,
        key: Option<&str>,
        request: &Request,
    ) -> Result<Option<String>, Rejected> {
        let Some(key) = key else { return Ok(None) };
        let mut records = self.entries.values().map(|entry| &entry.record);
        match records.find(|record| record.idempotency_key.as_deref() == Some(key)) {
            Some(known) if known.request == *request => Ok(Some(known.operation.id.clone())),
            Some(known) => Err(Rejected::KeyReused { id: known.operation.id.clone() }),
            None => Ok(None),
        }
    }

    fn may_submit(&self, request: &Request, destination: &str) -> Result<(), Rejected> {
        let Request { vm, policy, .. } = request;
        let unfinished = || self.operations().filter(|known| !known.state.is_final());
        if self.closing.is_some() {
            return Err(Rejected::Closing);
        }
        if let Some(busy) = unfinished().find(|known| known.vm == *vm) {
            return Err(Rejected::Busy { vm: vm.clone(), id: busy.id.clone() });
        }
        if let Some(taken) = unfinished().find(|known| known.destination == destination) {
            let (destination, id) = (destination.into(), taken.id.clone());
            return Err(Rejected::DestinationTaken { destination, id });
        }
        if let (Some(total), Some(bytes)) = (self.bounds.budget.buffer_bytes, policy.buffer_bytes)
            && bytes > total
        {
            return Err(Rejected::OverBudget { bytes, total });
        }
        if self.count(|state| state == State::Queued) >= self.bounds.queued_max {
            return Err(Rejected::QueueFull { max: self.bounds.queued_max });
        }
        Ok(())
    }

    /// What is to be done next, until nothing is.
    pub fn select(&self) -> Option<Action> {
        let of = |is_meant: &dyn Fn(&Entry) -> bool| {
            let mut entries = self.entries.iter();
            entries.find(|(_, entry)| is_meant(entry)).map(|(id, _)| id.clone())
        };
        let state = |entry: &Entry| entry.record.operation.state;
        if let Some(id) = of(&|entry| state(entry) == State::Aborting && !entry.is_told) {
            return Some(Action::Terminate(id));
        }
        if self.count(State::is_final) > self.bounds.remembered_max
            && let Some(id) = self.forgettable()
        {
            return Some(Action::Forget(id));
        }
        if self.closing.is_none() && self.count(State::is_running) < self.bounds.running_max {
            // One that needs much is not overtaken by those that need less, or its turn might never come.
            let next = of(&|entry| state(entry) == State::Queued);
            if let Some(id) = next.filter(|id| self.has_buffer_for(id)) {
                return Some(Action::Start(id));
            }
        }
        let mut shares = self.shares().into_iter();
        shares
            .find(|(id, share)| self.granted(id).max_bandwidth_bytes_per_second != Some(*share))
            .map(|(id, share)| Action::Share(id.to_owned(), share))
            .or_else(|| self.select_upkeep())
    }

    /// What is to be done with snapshots that there are.
    fn select_upkeep(&self) -> Option<Action> {
        if self.closing.is_some() {
            return None;
        }
        // One at a time: each is a lot to read.
        if !self.entries.values().any(|entry| entry.is_verifying) {
            let is_meant = |known: &&Operation| known.is_verified_as(VerificationState::Running);
            if let Some(known) = self.operations().find(is_meant) {
                return Some(Action::Verify(known.id.clone()));
            }
        }
        (!self.is_tidying).then(|| self.untidy.first().cloned().map(Action::Tidy)).flatten()
    }

    /// The oldest ended operation that nobody needs. Schedules go by the last good one of each series, and remove in time what
    /// they do not keep.
    fn forgettable(&self) -> Option<String> {
        let good = self.operations().filter(|known| known.is_good());
        let last: BTreeMap<_, _> =
            good.filter_map(|known| Some((Series::of(known)?, &known.id))).collect();
        let is_needed = |known: &Operation| {
            let is_there = known.state == State::Completed && known.removed_at.is_none();
            Series::of(known).is_some_and(|series| {
                last.get(&series) == Some(&&known.id) || is_there && self.keep(&series).is_some()
            })
        };
        let mut known = self.operations();
        known.find(|known| known.is_settled() && !is_needed(known)).map(|known| known.id.clone())
    }

    fn granted(&self, id: &str) -> Grant {
        self.get(id).and_then(|record| record.operation.granted).unwrap_or_default()
    }

    /// Whether the buffer of a snapshot that waits, or that it would get instead, fits beside those of the others that run.
    fn has_buffer_for(&self, id: &str) -> bool {
        let wanted = self.get(id).and_then(|known| self.bounds.buffer(&known.operation.policy));
        self.has_room(id, wanted)
    }

    fn has_room(&self, id: &str, wanted: Option<u64>) -> bool {
        let (Some(total), Some(wanted)) = (self.bounds.budget.buffer_bytes, wanted) else {
            return true;
        };
        let others = self.operations().filter(|known| known.state.is_running() && known.id != id);
        let taken: u64 = others.filter_map(|known| known.granted?.buffer_bytes).sum();
        taken.saturating_add(wanted) <= total
    }

    /// What each operation that may write has of the disk's budget; empty without one.
    fn shares(&self) -> Vec<(&str, NonZeroU64)> {
        let Some(total) = self.bounds.budget.bandwidth_bytes_per_second else { return Vec::new() };
        let is_writing = |state: State| state.is_running() && state != State::Aborting;
        let writing = || self.operations().filter(|known| is_writing(known.state));
        let wishes: Vec<_> =
            writing().map(|known| known.policy.max_bandwidth_bytes_per_second).collect();
        writing().map(|known| known.id.as_str()).zip(divide(total, &wishes)).collect()
    }

    /// Its process is being started.
    pub fn start(&mut self, id: &str, now: &str) {
        let bounds = self.bounds;
        self.change(id, |entry| {
            let operation = &mut entry.record.operation;
            operation.state = State::Preparing;
            operation.started_at = Some(now.into());
            let buffer_bytes = bounds.buffer(&operation.policy);
            operation.granted = Some(Grant { buffer_bytes, ..Grant::default() });
        });
        let share =
            self.shares().into_iter().find(|(known, _)| *known == id).map(|(_, share)| share);
        if let Some(share) = share {
            self.share(id, share);
        }
    }

    /// It may write so many bytes a second.
    pub fn share(&mut self, id: &str, share: NonZeroU64) {
        self.change(id, |entry| {
            let granted = entry.record.operation.granted.get_or_insert_default();
            granted.max_bandwidth_bytes_per_second = Some(share);
        });
    }

    /// Whether limits may be changed as far as others are concerned.
    ///
    /// # Errors
    /// If its buffer would not fit beside those of others.
    pub fn may_change(&self, id: &str, change: &Change) -> Result<(), OverBudget> {
        let (Some(bytes), Some(total)) = (change.buffer_bytes, self.bounds.budget.buffer_bytes)
        else {
            return Ok(());
        };
        let is_running = self.get(id).is_some_and(|known| known.operation.state.is_running());
        if bytes > total || is_running && !self.has_room(id, Some(bytes)) {
            return Err(OverBudget { bytes, total });
        }
        Ok(())
    }

    /// Its process was told to end.
    pub fn told(&mut self, id: &str) {
        if let Some(entry) = self.entries.get_mut(id) {
            entry.is_told = true;
        }
    }

    /// Notes what was forecast.
    pub fn note_forecast(&mut self, id: &str, forecast: Value) {
        self.change(id, |entry| entry.record.operation.forecast = Some(forecast));
    }

    /// Notes how far an operation is.
    pub fn note_progress(&mut self, id: &str, state: State, progress: Progress) {
        self.change(id, |entry| {
            let operation = &mut entry.record.operation;
            // Whoever asked for the abort shall not see it go on. What its process gives up by itself need not be told to end.
            if operation.state != State::Aborting {
                operation.state = state;
                entry.is_told |= state == State::Aborting;
            }
            operation.progress = Some(progress);
        });
    }

    /// Notes that limits are others.
    pub fn note_policy(&mut self, id: &str, change: &Change) {
        self.change(id, |entry| {
            let operation = &mut entry.record.operation;
            operation.policy = operation.policy.changed(change);
            if let (Some(granted), Some(bytes)) = (&mut operation.granted, change.buffer_bytes) {
                granted.buffer_bytes = granted.buffer_bytes.map(|_| bytes);
            }
        });
    }

    /// Notes how an operation ended.
    pub fn end(&mut self, id: &str, ended: Ended, now: &str) {
        let is_closing = self.closing.is_some();
        self.change(id, |entry| {
            let operation = &mut entry.record.operation;
            match ended {
                Ended::Completed(result) => {
                    close(operation, State::Completed, now);
                    operation.result = Some(result);
                    operation.verification = entry.record.request.verify.then(Verification::begun);
                }
                Ended::Without { is_given_up, mut error, result } => {
                    let is_cancelled = error.reason == Reason::Cancelled;
                    if is_cancelled && is_closing && !entry.is_unwanted {
                        error.reason = Reason::DaemonRestart;
                        error.detail =
                            "the daemon was told to end, and aborted the snapshot: take it again"
                                .into();
                    }
                    let is_aborted = is_cancelled || is_given_up;
                    close(operation, if is_aborted { State::Aborted } else { State::Failed }, now);
                    operation.error = Some(error);
                    operation.result = result;
                }
            }
        });
        self.note_good(id);
    }

    /// Gives an operation up; one that has ended stays as it is. False if there is no such operation.
    pub fn abort(&mut self, id: &str, now: &str) -> bool {
        let Some(entry) = self.entries.get_mut(id) else { return false };
        if entry.record.operation.state.is_running() {
            entry.is_unwanted = true;
        }
        match entry.record.operation.state {
            State::Queued => {
                let detail = "it was aborted before its turn came".into();
                let error = OperationError { reason: Reason::Cancelled, detail };
                self.end(id, Ended::Without { is_given_up: false, error, result: None }, now);
            }
            State::Aborting | State::Completed | State::Aborted | State::Failed => {}
            State::Preparing
            | State::Arming
            | State::Frozen
            | State::Copying
            | State::Draining
            | State::Committing => {
                self.change(id, |entry| entry.record.operation.state = State::Aborting);
            }
        }
        true
    }

    /// Its snapshot is being read again.
    pub fn verifying(&mut self, id: &str) {
        if let Some(entry) = self.entries.get_mut(id) {
            entry.is_verifying = true;
        }
    }

    /// Notes what was found of a snapshot.
    pub fn verified(&mut self, id: &str, found: Verification) {
        self.annotate(id, |entry| {
            entry.is_verifying = false;
            entry.record.operation.verification = Some(found);
        });
    }

    /// Old ones of these are being removed.
    pub fn tidying(&mut self, series: &Series) {
        self.untidy.remove(series);
        self.is_tidying = true;
    }

    /// Old snapshots were removed: those of these operations are there no longer.
    pub fn tidied(&mut self, gone: &[String], now: &str) {
        self.is_tidying = false;
        for id in gone {
            self.annotate(id, |entry| entry.record.operation.removed_at = Some(now.into()));
        }
    }

    /// Forgets an ended operation; the snapshot stays.
    ///
    /// # Errors
    /// If there is none.
    pub fn forget(&mut self, id: &str) -> Result<(), Unforgettable> {
        let entry = self.entries.get(id).ok_or(Unforgettable::Unknown)?;
        if !entry.record.operation.state.is_final() {
            return Err(Unforgettable::NotEnded);
        }
        self.withdraw(id);
        Ok(())
    }

    /// Takes an operation out that could not be kept.
    pub fn withdraw(&mut self, id: &str) {
        self.entries.remove(id);
        self.changes.push(id.into());
    }

    /// Takes up and starts nothing any more. Told to abort, it does so with what runs, also if it was told to drain before.
    pub fn close(&mut self, shutdown: Shutdown) {
        self.closing = Some(shutdown);
        if shutdown == Shutdown::Abort {
            let running = self.operations().filter(|known| known.state.is_running());
            let ids: Vec<_> = running.map(|known| known.id.clone()).collect();
            for id in ids {
                self.change(&id, |entry| entry.record.operation.state = State::Aborting);
            }
        }
    }

    /// Changes an operation that has not ended.
    fn change(&mut self, id: &str, make: impl FnOnce(&mut Entry)) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        if entry.record.operation.state.is_final() {
            return;
        }
        make(entry);
        entry.record.operation.version += 1;
        self.changes.push(id.into());
    }

    /// Notes what becomes of the snapshot of an operation that was completed.
    fn annotate(&mut self, id: &str, make: impl FnOnce(&mut Entry)) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        make(entry);
        entry.record.operation.version += 1;
        self.changes.push(id.into());
        self.note_good(id);
    }

    /// One more good snapshot may be one too many.
    fn note_good(&mut self, id: &str) {
        let Some(entry) = self.entries.get(id) else { return };
        let operation = &entry.record.operation;
        if operation.is_good() && operation.removed_at.is_none() {
            let series = Series::of(operation).filter(|series| self.keep(series).is_some());
            self.untidy.extend(series);
        }
    }

    fn count(&self, is_meant: impl Fn(State) -> bool) -> usize {
        self.operations().filter(|known| is_meant(known.state)).count()
    }
}

fn close(operation: &mut Operation, state: State, now: &str) {
    operation.state = state;
    operation.ended_at = Some(now.into());
}
