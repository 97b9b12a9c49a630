//! The book under every command and every piece of news in every state.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use serde_json::json;

use super::*;

const BOUNDS: Bounds = Bounds {
    running_max: 2,
    queued_max: 3,
    remembered_max: 2,
    budget: Budget { buffer_bytes: None, bandwidth_bytes_per_second: None },
};
const NOW: &str = "2026-01-01T00:00:00.000Z";

fn book() -> Book {
    Book::new(BOUNDS, Vec::new())
}

fn request(vm: &str) -> Request {
    Request { vm: vm.into(), ..Request::default() }
}

fn submit(book: &mut Book, id: &str, vm: &str) -> Result<String, Rejected> {
    let destination = format!("/backup/{vm}/{id}");
    book.submit(id, &request(vm), &destination, None, NOW).map(|taken| taken.id.clone())
}

/// Does what is selected until nothing is; returns what was done.
fn settle(book: &mut Book) -> Vec<Action> {
    let mut done = Vec::new();
    while let Some(action) = book.select() {
        match &action {
            Action::Start(id) => book.start(id, NOW),
            Action::Terminate(id) => book.told(id),
            Action::Share(id, share) => book.share(id, *share),
            Action::Forget(id) => book.forget(id).unwrap(),
            Action::Verify(id) => book.verifying(id),
            Action::Tidy(series) => book.tidying(series),
        }
        done.push(action);
        assert!(done.len() < 100, "no end: {done:?}");
    }
    done
}

fn state(book: &Book, id: &str) -> Option<State> {
    book.get(id).map(|record| record.operation.state)
}

fn failed(reason: Reason) -> Ended {
    let error = OperationError { reason, detail: "as it is".into() };
    Ended::Without { is_given_up: false, error, result: None }
}

fn reason(book: &Book, id: &str) -> Reason {
    book.get(id).unwrap().operation.error.as_ref().unwrap().reason
}

/// A book with one operation in that state.
fn in_state(wanted: State) -> Book {
    let mut book = book();
    submit(&mut book, "1", "vm1").unwrap();
    if wanted == State::Queued {
        return book;
    }
    settle(&mut book);
    match wanted {
        State::Completed => book.end("1", Ended::Completed(json!({})), NOW),
        State::Aborted => book.end("1", failed(Reason::Cancelled), NOW),
        State::Failed => book.end("1", failed(Reason::Io), NOW),
        state => book.note_progress("1", state, Progress::default()),
    }
    assert_eq!(state(&book, "1"), Some(wanted));
    book.take_changes();
    book
}

#[test]
fn every_state_takes_every_event() {
    for from in State::ALL {
        // Progress: only what runs moves, and what is being given up stays so.
        for news in State::ALL.into_iter().filter(|state| state.is_running()) {
            let mut book = in_state(from);
            book.note_progress("1", news, Progress::default());
            let expected = match from {
                State::Aborting => State::Aborting,
                state if state.is_final() => state,
                _ => news,
            };
            assert_eq!(state(&book, "1"), Some(expected), "{from:?} {news:?}");
        }
        // Its end counts once, and whatever was asked for before.
        for (ended, expected) in [
            (Ended::Completed(json!({})), State::Completed),
            (failed(Reason::Cancelled), State::Aborted),
            (failed(Reason::Io), State::Failed),
            (
                Ended::Without {
                    is_given_up: true,
                    error: OperationError { reason: Reason::Deadline, detail: String::new() },
                    result: None,
                },
                State::Aborted,
            ),
        ] {
            let mut book = in_state(from);
            book.end("1", ended, NOW);
            let expected = if from.is_final() { from } else { expected };
            assert_eq!(state(&book, "1"), Some(expected), "{from:?}");
        }
        // Abort, twice.
        let mut book = in_state(from);
        for _ in 0..2 {
            assert!(book.abort("1", NOW));
            let expected = match from {
                State::Queued => State::Aborted,
                state if state.is_final() => state,
                _ => State::Aborting,
            };
            assert_eq!(state(&book, "1"), Some(expected), "{from:?}");
        }
        let is_to_be_told = from.is_running() && from != State::Aborting;
        let told = if is_to_be_told { vec![Action::Terminate("1".into())] } else { vec![] };
        assert_eq!(settle(&mut book), told, "{from:?}");
        // Forget.
        let mut book = in_state(from);
        assert_eq!(book.forget("1").is_ok(), from.is_final(), "{from:?}");
        assert_eq!(state(&book, "1").is_none(), from.is_final(), "{from:?}");
        // A restart.
        let record = in_state(from).get("1").unwrap().clone();
        let version = record.operation.version;
        let mut book = Book::new(BOUNDS, vec![record]);
        if from.is_running() {
            // Its process ends by itself; until then it is one that runs.
            assert_eq!(state(&book, "1"), Some(State::Aborting), "{from:?}");
            assert!(book.get("1").unwrap().operation.version > version + 1_000_000);
            assert_eq!(book.take_changes(), ["1"]);
            assert_eq!(settle(&mut book), [], "{from:?}");
            assert!(matches!(submit(&mut book, "2", "vm1"), Err(Rejected::Busy { .. })));
            book.end("1", failed(Reason::DaemonRestart), NOW);
            assert_eq!(reason(&book, "1"), Reason::DaemonRestart);
        } else {
            assert_eq!(state(&book, "1"), Some(from), "{from:?}");
            assert!(book.take_changes().is_empty());
        }
    }
}

#[test]
fn nobody_is_surprised_by_what_is_not_there() {
    let mut book = book();
    assert!(!book.abort("1", NOW));
    assert_eq!(book.forget("1"), Err(Unforgettable::Unknown));
    book.start("1", NOW);
    book.told("1");
    book.note_progress("1", State::Copying, Progress::default());
    book.note_forecast("1", json!({}));
    book.end("1", failed(Reason::Io), NOW);
    assert!(book.take_changes().is_empty());
}

#[test]
fn so_many_run_and_wait_as_may() {
    let mut book = book();
    for number in 1..=5 {
        submit(&mut book, &number.to_string(), &format!("vm{number}")).unwrap();
        settle(&mut book);
    }
    let states: Vec<_> = book.operations().map(|known| known.state).collect();
    assert_eq!(states[..2], [State::Preparing; 2]);
    assert_eq!(states[2..], [State::Queued; 3]);
    assert_eq!(submit(&mut book, "6", "vm6"), Err(Rejected::QueueFull { max: 3 }));
    // The oldest that waits is the next.
    book.end("2", failed(Reason::Io), NOW);
    assert_eq!(settle(&mut book), [Action::Start("3".into())]);
    submit(&mut book, "6", "vm6").unwrap();
}

#[test]
fn a_machine_and_a_directory_are_taken_until_the_end() {
    for taken in State::ALL {
        let mut book = in_state(taken);
        let other = book.submit("2", &request("vm2"), "/backup/vm1/1", None, NOW).map(drop);
        let busy = submit(&mut book, "3", "vm1").map(drop);
        if taken.is_final() {
            assert_eq!(other, Ok(()), "{taken:?}");
            assert_eq!(busy, Ok(()), "{taken:?}");
        } else {
            assert_eq!(busy, Err(Rejected::Busy { vm: "vm1".into(), id: "1".into() }), "{taken:?}");
            let destination = "/backup/vm1/1".into();
            assert_eq!(other, Err(Rejected::DestinationTaken { destination, id: "1".into() }));
        }
    }
}

#[test]
fn a_key_stands_for_one_request_as_long_as_it_is_remembered() {
    let mut book = book();
    let take = |book: &mut Book, id: &str, vm: &str| {
        let destination = format!("/backup/{id}");
        let taken = book.submit(id, &request(vm), &destination, Some("key"), NOW);
        taken.map(|taken| taken.id.clone())
    };
    assert_eq!(take(&mut book, "1", "vm1").unwrap(), "1");
    assert_eq!(take(&mut book, "2", "vm1").unwrap(), "1", "although it is busy");
    assert_eq!(take(&mut book, "3", "vm2"), Err(Rejected::KeyReused { id: "1".into() }));
    settle(&mut book);
    book.end("1", failed(Reason::Io), NOW);
    assert_eq!(take(&mut book, "4", "vm1").unwrap(), "1", "although it has ended");
    // A restart changes nothing of it.
    let records = vec![book.get("1").unwrap().clone()];
    let mut book = Book::new(BOUNDS, records);
    assert_eq!(take(&mut book, "5", "vm1").unwrap(), "1");
    book.forget("1").unwrap();
    assert_eq!(take(&mut book, "6", "vm2").unwrap(), "6");
}

#[test]
fn the_oldest_that_have_ended_are_forgotten() {
    let mut book = book();
    for id in ["1", "2", "3", "4"] {
        submit(&mut book, id, id).unwrap();
        settle(&mut book);
        if id != "1" {
            book.end(id, failed(Reason::Io), NOW);
        }
    }
    assert_eq!(settle(&mut book), [Action::Forget("2".into())]);
    let known: Vec<_> = book.operations().map(|known| known.id.as_str()).collect();
    assert_eq!(known, ["1", "3", "4"]);
}

#[test]
fn a_daemon_that_ends_aborts_or_waits() {
    for shutdown in [Shutdown::Abort, Shutdown::Drain] {
        let mut book = in_state(State::Copying);
        submit(&mut book, "2", "vm2").unwrap();
        book.close(shutdown);
        assert_eq!(submit(&mut book, "3", "vm3"), Err(Rejected::Closing));
        let told = settle(&mut book);
        if shutdown == Shutdown::Abort {
            assert_eq!(told, [Action::Terminate("1".into())]);
            book.end("1", failed(Reason::Cancelled), NOW);
            assert_eq!(reason(&book, "1"), Reason::DaemonRestart);
        } else {
            assert_eq!(told, []);
            assert!(!book.is_closed());
            book.end("1", Ended::Completed(json!({})), NOW);
        }
        assert!(book.is_closed());
        assert_eq!(settle(&mut book), []);
        assert_eq!(state(&book, "2"), Some(State::Queued), "it waits for the next daemon");
    }
    // What somebody aborted before keeps its reason; a second signal aborts what is waited for.
    let mut book = in_state(State::Copying);
    book.abort("1", NOW);
    book.close(Shutdown::Drain);
    book.close(Shutdown::Abort);
    book.end("1", failed(Reason::Cancelled), NOW);
    assert_eq!(reason(&book, "1"), Reason::Cancelled);
}

#[test]
fn each_change_is_told_and_has_a_version_of_its_own() {
    let mut book = book();
    submit(&mut book, "1", "vm1").unwrap();
    let mut versions = vec![book.get("1").unwrap().operation.version];
    assert_eq!(book.take_changes(), ["1"]);
    let changes: [&dyn Fn(&mut Book); 5] = [
        &|book| book.start("1", NOW),
        &|book| book.note_forecast("1", json!({})),
        &|book| book.note_progress("1", State::Copying, Progress::default()),
        &|book| assert!(book.abort("1", NOW)),
        &|book| book.end("1", failed(Reason::Cancelled), NOW),
    ];
    for change in changes {
        change(&mut book);
        assert_eq!(book.take_changes(), ["1"]);
        versions.push(book.get("1").unwrap().operation.version);
    }
    assert!(versions.is_sorted_by(|before, after| before < after), "{versions:?}");
}

const GIB: u64 = 1 << 30;

/// A book whose snapshots share 1 GiB of buffers and 100 bytes a second.
fn book_with_budget() -> Book {
    let bandwidth_bytes_per_second = NonZeroU64::new(100);
    let budget = Budget { buffer_bytes: Some(GIB), bandwidth_bytes_per_second };
    Book::new(Bounds { running_max: 3, budget, ..BOUNDS }, Vec::new())
}

fn submit_with(
    book: &mut Book,
    id: &str,
    buffer_bytes: Option<u64>,
    max_bandwidth_bytes_per_second: Option<u64>,
) -> Result<(), Rejected> {
    let policy = Policy { buffer_bytes, max_bandwidth_bytes_per_second, ..Policy::default() };
    let request = Request { policy, ..request(&format!("vm{id}")) };
    book.submit(id, &request, &format!("/backup/{id}"), None, NOW).map(drop)
}

/// Buffer and bandwidth of an operation.
fn granted(book: &Book, id: &str) -> (Option<u64>, Option<u64>) {
    let granted = book.granted(id);
    (granted.buffer_bytes, granted.max_bandwidth_bytes_per_second.map(NonZeroU64::get))
}

fn change(text: &str) -> Change {
    serde_json::from_str(text).unwrap()
}

#[test]
fn buffers_that_do_not_fit_wait_in_order() {
    let mut book = book_with_budget();
    submit_with(&mut book, "1", Some(GIB / 2), None).unwrap();
    submit_with(&mut book, "2", Some(GIB / 2 + 1), None).unwrap();
    submit_with(&mut book, "3", Some(1), None).unwrap();
    settle(&mut book);
    let states = |book: &Book| ["1", "2", "3"].map(|id| state(book, id).unwrap());
    let waiting = [State::Preparing, State::Queued, State::Queued];
    assert_eq!(states(&book), waiting, "the little one does not overtake");
    // Less is asked for, while it waits.
    let less = change(&format!(r#"{{"buffer_bytes": {}}}"#, GIB / 4));
    book.may_change("2", &less).unwrap();
    book.note_policy("2", &less);
    settle(&mut book);
    assert_eq!(states(&book), [State::Preparing; 3]);
    assert_eq!(granted(&book, "2").0, Some(GIB / 4));
    // What runs may have what is left, and no more.
    let most = change(&format!(r#"{{"buffer_bytes": {}}}"#, GIB / 2 - 1));
    book.may_change("2", &most).unwrap();
    book.note_policy("2", &most);
    assert_eq!(granted(&book, "2").0, Some(GIB / 2 - 1));
    assert!(book.may_change("3", &change(r#"{"buffer_bytes": 2}"#)).is_err());
    book.may_change("3", &change(r#"{"min_cpu_ratio": 0.5}"#)).unwrap();
}

#[test]
fn what_could_never_have_its_turn_is_refused() {
    let mut book = book_with_budget();
    let refused = submit_with(&mut book, "1", Some(GIB + 1), None);
    assert_eq!(refused, Err(Rejected::OverBudget { bytes: GIB + 1, total: GIB }));
    submit_with(&mut book, "1", None, None).unwrap();
    assert!(book.may_change("1", &change(&format!(r#"{{"buffer_bytes": {}}}"#, GIB + 1))).is_err());
    settle(&mut book);
    assert_eq!(granted(&book, "1").0, Some(GIB / 3), "an even share");
    // An earlier daemon had more to give.
    let mut record = book.get("1").unwrap().clone();
    record.operation.state = State::Queued;
    record.operation.policy.buffer_bytes = Some(9 * GIB);
    let mut book = Book::new(book.bounds, vec![record]);
    settle(&mut book);
    assert_eq!(granted(&book, "1").0, Some(GIB));
}

#[test]
fn the_disk_is_shared_by_those_that_write() {
    let mut book = book_with_budget();
    submit_with(&mut book, "1", Some(1), None).unwrap();
    settle(&mut book);
    assert_eq!(granted(&book, "1").1, Some(100));
    submit_with(&mut book, "2", Some(1), Some(10)).unwrap();
    submit_with(&mut book, "3", Some(1), None).unwrap();
    let done = settle(&mut book);
    let shares = |book: &Book| ["1", "2", "3"].map(|id| granted(book, id).1.unwrap());
    assert_eq!(shares(&book), [45, 10, 45], "{done:?}");
    book.note_policy("2", &change(r#"{"max_bandwidth_bytes_per_second": null}"#));
    settle(&mut book);
    assert_eq!(shares(&book), [33, 33, 34]);
    // One that is being given up writes no more, and what has ended keeps what it had.
    book.abort("3", NOW);
    settle(&mut book);
    assert_eq!(shares(&book), [50, 50, 34]);
    book.end("2", Ended::Completed(json!({})), NOW);
    settle(&mut book);
    assert_eq!(shares(&book), [100, 50, 34]);
}

fn series(schedule: &str, vm: &str) -> Series {
    Series { schedule: schedule.into(), vm: vm.into() }
}

/// A book whose schedule `daily` keeps one, and `weekly` all.
fn keeping_book(earlier: Vec<Record>) -> Book {
    let bounds = Bounds { remembered_max: 3, ..BOUNDS };
    Book::new(bounds, earlier).keeping(BTreeMap::from([("daily".into(), 1)]))
}

/// Has a schedule's snapshot taken, to be verified or not; returns what is done until it is complete.
fn take(book: &mut Book, id: &str, schedule: &str, verify: bool) {
    let request = Request { verify, ..request("vm1") };
    book.submit_scheduled(id, &request, &format!("/backup/{id}"), schedule, NOW).unwrap();
    settle(book);
    book.end(id, Ended::Completed(json!({})), NOW);
}

fn found(state: VerificationState) -> Verification {
    Verification { state, at: Some(NOW.into()), error: None }
}

#[test]
fn old_snapshots_are_removed_once_the_new_one_is_good() {
    let mut book = keeping_book(Vec::new());
    take(&mut book, "1", "daily", false);
    assert_eq!(settle(&mut book), [Action::Tidy(series("daily", "vm1"))]);
    // One at a time.
    take(&mut book, "2", "daily", false);
    assert_eq!(settle(&mut book), []);
    book.tidied(&[], NOW);
    assert_eq!(settle(&mut book), [Action::Tidy(series("daily", "vm1"))]);
    let kept = |book: &Book, schedule: &str| {
        let series = series(schedule, "vm1");
        book.kept(&series).map(|known| known.id.clone()).collect::<Vec<_>>()
    };
    assert_eq!(kept(&book, "daily"), ["2", "1"]);
    book.tidied(&["1".into()], NOW);
    assert_eq!(kept(&book, "daily"), ["2"]);
    assert_eq!(book.get("1").unwrap().operation.removed_at.as_deref(), Some(NOW));

    // Before it is known whether the new one is sound, and if it is not, nothing goes.
    take(&mut book, "3", "daily", true);
    assert_eq!(settle(&mut book), [Action::Verify("3".into())]);
    book.verified("3", found(VerificationState::Failed));
    take(&mut book, "4", "daily", true);
    let forgotten = Action::Forget("1".into());
    assert_eq!(settle(&mut book), [forgotten, Action::Verify("4".into())]);
    book.verified("4", found(VerificationState::Sound));
    assert_eq!(settle(&mut book), [Action::Tidy(series("daily", "vm1"))]);
    assert_eq!(kept(&book, "daily"), ["4", "3", "2"]);
    book.tidied(&[], NOW);

    // A schedule that keeps all has nothing removed.
    take(&mut book, "5", "weekly", false);
    assert_eq!(settle(&mut book), []);
    assert_eq!(kept(&book, "weekly"), ["5"]);
}

#[test]
fn what_schedules_need_is_remembered() {
    let mut book = keeping_book(Vec::new());
    for id in ["1", "2", "3", "4", "5", "6"] {
        take(&mut book, id, if id < "4" { "daily" } else { "weekly" }, false);
    }
    let ids =
        |book: &Book| book.operations().map(|known| known.id.clone()).collect::<Vec<_>>().join(" ");
    // Snapshots that are still to be removed, and of those that are kept for ever the last.
    settle(&mut book);
    assert_eq!(ids(&book), "1 2 3 6");
    book.tidied(&["1".into(), "2".into()], NOW);
    settle(&mut book);
    assert_eq!(ids(&book), "2 3 6");
}

#[test]
fn what_an_earlier_daemon_was_at_is_taken_up_again() {
    let mut book = keeping_book(Vec::new());
    take(&mut book, "1", "weekly", false);
    take(&mut book, "2", "daily", true);
    settle(&mut book);
    let records = book.operations().map(|known| book.get(&known.id).unwrap().clone()).collect();
    let mut book = keeping_book(records);
    assert_eq!(
        settle(&mut book),
        [
            Action::Verify("2".into()),
            // Also where all are kept: by now, perhaps.
            Action::Tidy(series("daily", "vm1")),
        ]
    );
    book.tidied(&[], NOW);
    assert_eq!(settle(&mut book), [Action::Tidy(series("weekly", "vm1"))]);
    // One that ends takes up nothing.
    let records = book.operations().map(|known| book.get(&known.id).unwrap().clone()).collect();
    let mut book = keeping_book(records);
    book.close(Shutdown::Drain);
    assert_eq!(settle(&mut book), []);
    assert!(book.is_closed());
}

#[test]
fn what_is_found_of_a_snapshot_is_beside_its_state() {
    let mut book = in_state(State::Completed);
    let version = book.get("1").unwrap().operation.version;
    book.verified("1", found(VerificationState::Failed));
    let operation = &book.get("1").unwrap().operation;
    assert_eq!((operation.state, operation.version), (State::Completed, version + 1));
    assert!(operation.is_settled() && !operation.is_good());
    assert_eq!(book.take_changes(), ["1"]);
    // One that was forgotten meanwhile is no matter.
    book.forget("1").unwrap();
    book.take_changes();
    book.verified("1", found(VerificationState::Sound));
    book.tidied(&["1".into()], NOW);
    assert_eq!(book.take_changes(), [""; 0]);
}
