//! When a snapshot is due: by what the configuration says, and by what has become of earlier ones. Pure; callers say what
//! time it is.
//!
//! ```text
//!           since 1970:  k · every + share of the jitter
//!   ───────────┬─────────────┬─────────────┬─────────────┬──────▶
//!              taken         taken         missed        due      one that was missed is taken once, and late
//! ```
//!
//! Turns lie on a grid, so that they do not wander, neither with the time that snapshots take nor over a restart. The share
//! of the jitter is the name's of the virtual machine: always the same, and another for another.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::num::NonZeroUsize;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize};
use snapshot_core::Reason;

use super::name::is_name;
use super::operation::{Operation, State, VerificationState, time};
use super::policy::Policy;
use crate::units::number;

/// How long is waited after the first failure, and after a turn that was left out; twice as long after each further failure.
/// Never longer than the schedule's interval.
const RETRY_FIRST: Duration = Duration::from_secs(60);
/// What was missed while the daemon was away is caught up with in so long.
const CATCH_UP: Duration = Duration::from_secs(600);
/// Share of the interval that the jitter is, where nothing is said of it.
const JITTER_PART: u32 = 20;

/// A schedule, as the configuration has it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Its name, which its snapshots are known by.
    pub name: String,
    /// Whose snapshots.
    pub vms: Vec<Names>,
    /// How often.
    #[serde(deserialize_with = "duration")]
    pub every: Duration,
    /// How far the turns of virtual machines lie apart.
    #[serde(default, deserialize_with = "some_duration")]
    pub jitter: Option<Duration>,
    /// How many good ones of a virtual machine are kept; all if nothing is said.
    #[serde(default)]
    pub keep: Option<NonZeroUsize>,
    /// Whether each is read again when it is completed.
    #[serde(default)]
    pub verify: bool,
    /// Limits, and how they are kept.
    #[serde(default)]
    pub policy: Policy,
}

fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    humantime::parse_duration(&text).map_err(serde::de::Error::custom)
}

fn some_duration<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    duration(from).map(Some)
}

/// Names of virtual machines: one, or with a `*` that stands for anything, also nothing.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Names {
    /// This one.
    One(String),
    /// Those that begin and end so.
    Like(String, String),
}

/// Why names cannot be meant so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither the name of a virtual machine nor one with a single '*' in it")]
pub struct NamesError(String);

impl TryFrom<String> for Names {
    type Error = NamesError;

    fn try_from(text: String) -> Result<Self, NamesError> {
        match text.split_once('*') {
            None if is_name(&text) => Ok(Self::One(text)),
            // With anything in its place it must be a name.
            Some((head, tail)) if is_name(&format!("{head}x{tail}")) => {
                Ok(Self::Like(head.into(), tail.into()))
            }
            _ => Err(NamesError(text)),
        }
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(one) => f.write_str(one),
            Self::Like(head, tail) => write!(f, "{head}*{tail}"),
        }
    }
}

impl Names {
    /// Whether this name is among them.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::One(one) => name == one,
            Self::Like(head, tail) => {
                name.strip_prefix(head.as_str()).is_some_and(|rest| rest.ends_with(tail.as_str()))
            }
        }
    }
}

impl Schedule {
    /// Whether it is this virtual machine's.
    pub fn is_for(&self, vm: &str) -> bool {
        self.vms.iter().any(|names| names.has(vm))
    }

    /// Its name, and how many good ones it keeps; nothing if it keeps all.
    pub fn kept(&self) -> Option<(String, usize)> {
        Some((self.name.clone(), self.keep?.get()))
    }

    fn jitter(&self) -> Duration {
        self.jitter.unwrap_or(self.every / JITTER_PART)
    }

    /// The first turn of `vm` after `taken`.
    fn turn_after(&self, vm: &str, taken: SystemTime) -> SystemTime {
        let first = UNIX_EPOCH + self.jitter().mul_f64(share(vm));
        let Ok(since) = taken.duration_since(first) else { return first };
        let every = self.every.as_nanos().max(1);
        let beyond = nanos(every - since.as_nanos() % every);
        taken + beyond
    }

    /// When the next snapshot of `vm`, which is known `since` then, is to be asked for, after what has become of earlier ones.
    pub fn due(&self, vm: &str, now: SystemTime, since: SystemTime, past: &Past) -> SystemTime {
        // A clock that was put back must not keep it from its turn.
        let taken = past.taken.map(|taken| taken.min(now));
        let turn = taken.map_or(UNIX_EPOCH, |taken| self.turn_after(vm, taken));
        // Those of a host are not all begun in the moment that its daemon is.
        let catch_up = since + self.jitter().min(CATCH_UP).mul_f64(share(vm));
        let due = if turn < since { catch_up } else { turn };
        past.failed.map_or(due, |failed| due.max(failed.min(now) + self.retry(past.failures)))
    }

    /// How long is waited after so many failures.
    fn retry(&self, failures: u32) -> Duration {
        let times = 1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
        RETRY_FIRST.saturating_mul(times).min(self.every)
    }
}

fn nanos(count: u128) -> Duration {
    Duration::from_nanos(u64::try_from(count).unwrap_or(u64::MAX))
}

/// A number from 0 to 1 that is the name's own, and is spread evenly over names (FNV-1a, and the end of splitmix64, for names
/// that differ in their last character only).
fn share(name: &str) -> f64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in name.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^= hash >> 31;
    number(hash >> 11) / number(1 << 53)
}

/// What has become of a schedule's snapshots of a virtual machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// When the last one was begun that need not be taken again.
    pub taken: Option<SystemTime>,
    /// How many have failed since then.
    pub failures: u32,
    /// When the last of them did.
    pub failed: Option<SystemTime>,
}

impl Past {
    fn note(&mut self, operation: &Operation) {
        let begun = operation.started_at.as_ref().unwrap_or(&operation.created_at);
        let is_unwanted = operation.state == State::Aborted
            && operation.error.as_ref().is_some_and(|error| error.reason == Reason::Cancelled);
        let is_damaged = operation.is_verified_as(VerificationState::Failed);
        let is_taken = operation.state == State::Completed && !is_damaged;
        if !operation.state.is_final() || is_taken || is_unwanted {
            *self = Self { taken: time(begun), ..Self::default() };
        } else {
            self.failures = self.failures.saturating_add(1);
            let verified = operation.verification.as_ref().and_then(|found| found.at.as_deref());
            self.failed = verified.or(operation.ended_at.as_deref()).and_then(time);
        }
    }
}

/// A snapshot that a schedule wants, or that was taken for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// When.
    pub at: SystemTime,
    /// The schedule's name.
    pub schedule: String,
    /// The virtual machine's.
    pub vm: String,
}

/// A turn that was left out.
#[derive(Clone, Debug)]
struct LeftOut {
    until: SystemTime,
    why: String,
}

/// All schedules, and what has to be remembered of them.
#[derive(Debug)]
pub struct Agenda {
    schedules: Vec<Schedule>,
    /// Since when virtual machines are known.
    since: HashMap<String, SystemTime>,
    /// When the last ones were begun, should their operations be forgotten; by schedule and virtual machine.
    taken: HashMap<(String, String), SystemTime>,
    /// Turns that were left out are not looked at again before then, by schedule and virtual machine.
    left_out: HashMap<(String, String), LeftOut>,
}

impl Agenda {
    /// With these schedules, and the turns that are known to be [taken](Self::all_taken).
    pub fn new(schedules: Vec<Schedule>, taken: Vec<Turn>) -> Self {
        let taken = taken.into_iter().map(|turn| ((turn.schedule, turn.vm), turn.at)).collect();
        Self { schedules, since: HashMap::new(), taken, left_out: HashMap::new() }
    }

    /// The last turn of each schedule and virtual machine that was taken, also if nothing else tells of it any more.
    pub fn all_taken(&self) -> Vec<Turn> {
        let turn = |((schedule, vm), at): (&(String, String), &SystemTime)| Turn {
            at: *at,
            schedule: schedule.clone(),
            vm: vm.clone(),
        };
        self.taken.iter().map(turn).collect()
    }

    /// The schedule of that name.
    pub fn get(&self, name: &str) -> Option<&Schedule> {
        self.schedules.iter().find(|schedule| schedule.name == name)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.schedules.is_empty()
    }

    /// The next turn of each schedule for each of `vms`, the earliest first; `operations` are known, the oldest first.
    pub fn turns<'a>(
        &mut self,
        now: SystemTime,
        vms: &[String],
        operations: impl Iterator<Item = &'a Operation>,
    ) -> Vec<Turn> {
        self.since.retain(|vm, _| vms.contains(vm));
        self.taken.retain(|(_, vm), _| vms.contains(vm));
        self.left_out.retain(|(_, vm), _| vms.contains(vm));
        for vm in vms {
            self.since.entry(vm.clone()).or_insert(now);
        }
        let mut past: BTreeMap<(&str, &str), Past> = BTreeMap::new();
        for operation in operations {
            if let Some(schedule) = &operation.schedule {
                past.entry((schedule, &operation.vm)).or_default().note(operation);
            }
        }
        let mut turns = Vec::new();
        for schedule in &self.schedules {
            for vm in vms.iter().filter(|vm| schedule.is_for(vm)) {
                let key = (schedule.name.clone(), vm.clone());
                let mut past =
                    past.remove(&(schedule.name.as_str(), vm.as_str())).unwrap_or_default();
                let known = self.taken.get(&key).copied();
                // Those that failed before one that is forgotten are not tried again.
                if past.failures == 0 || known > past.failed {
                    past = Past { taken: past.taken.max(known), ..Past::default() };
                    self.taken.extend(past.taken.map(|taken| (key.clone(), taken)));
                }
                let due = schedule.due(vm, now, self.since[vm], &past);
                let at = self.left_out.get(&key).map_or(due, |left_out| due.max(left_out.until));
                turns.push(Turn { at, schedule: schedule.name.clone(), vm: vm.clone() });
            }
        }
        turns.sort_by_key(|turn| turn.at);
        turns
    }

    /// A turn is left out, and looked at again after a while; returns whether it was not for the same reason before.
    pub fn leave_out(&mut self, turn: &Turn, why: &str, now: SystemTime) -> bool {
        let retry = self.get(&turn.schedule).map_or(RETRY_FIRST, |schedule| schedule.retry(1));
        let until = now + retry;
        let left_out = LeftOut { until, why: why.into() };
        let before = self.left_out.insert((turn.schedule.clone(), turn.vm.clone()), left_out);
        before.is_none_or(|before| before.why != why)
    }

    /// A turn is taken.
    pub fn taken(&mut self, turn: &Turn) {
        self.left_out.remove(&(turn.schedule.clone(), turn.vm.clone()));
    }

    /// Why turns are left out, by virtual machine.
    pub fn left_out(&self) -> BTreeMap<String, String> {
        let reason =
            |((_, vm), left_out): (&(String, String), &LeftOut)| (vm.clone(), left_out.why.clone());
        self.left_out.iter().map(reason).collect()
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;
    use crate::daemon::operation::{OperationError, Verification, at};

    const HOUR: Duration = Duration::from_secs(3600);
    const MINUTE: Duration = Duration::from_secs(60);

    fn schedule(text: &str) -> Schedule {
        toml::from_str(&format!("name = 'hourly'\nvms = ['*']\nevery = '1h'\n{text}")).unwrap()
    }

    /// So long after the beginning of some hour.
    fn clock(minutes: u32) -> SystemTime {
        UNIX_EPOCH + 400_000 * HOUR + minutes * MINUTE
    }

    #[test]
    fn turns_lie_on_a_grid_and_what_was_missed_is_taken_once() {
        let exact = schedule("jitter = '0s'");
        let minutes = |time: SystemTime| time.duration_since(clock(0)).unwrap().as_secs() / 60;
        // Times in minutes: known since, taken, now, due.
        for (since, taken, now, due) in [
            // One that was never taken is due at once; jitter spreads it.
            (5, None, 5, 5),
            (5, None, 90, 5),
            // Late ones do not make the next ones late.
            (0, Some(0), 10, 60),
            (0, Some(3), 10, 60),
            (0, Some(59), 59, 60),
            (0, Some(60), 60, 120),
            // Missed by a busy daemon: due since then, and after that at the next turn.
            (0, Some(3), 200, 60),
            (0, Some(200), 200, 240),
            // Missed by one that was away: due when it is back.
            (200, Some(3), 200, 200),
            (200, Some(3), 230, 200),
            // Not missed by one that was away.
            (30, Some(3), 30, 60),
            // A clock that was put back.
            (0, Some(1000), 10, 60),
        ] {
            let past = Past { taken: taken.map(clock), ..Past::default() };
            let found = exact.due("vm1", clock(now), clock(since), &past);
            assert_eq!(minutes(found), due, "{since} {taken:?} {now}");
        }
    }

    #[test]
    fn the_next_turn_is_after_the_last_and_never_more_than_an_interval_away() {
        for (every, jitter) in
            [("1s", "0s"), ("7m", "3m"), ("1h", "1h"), ("1d", "2h"), ("90d", "1d")]
        {
            let schedule = schedule("");
            let every = humantime::parse_duration(every).unwrap();
            let jitter = humantime::parse_duration(jitter).ok();
            let schedule = Schedule { every, jitter, ..schedule };
            for number in 0..200_u32 {
                let vm = format!("vm{number}");
                let taken = clock(0) + every.mul_f64(f64::from(number) / 37.0);
                let past = Past { taken: Some(taken), ..Past::default() };
                let due = |now| schedule.due(&vm, now, clock(0), &past);
                assert!(due(taken) > taken && due(taken) <= taken + every, "{schedule:?} {vm}");
                assert_eq!(due(taken), due(taken + 9 * every), "it stays what it was");
                let on_grid = Past { taken: Some(due(taken)), ..Past::default() };
                let next = schedule.due(&vm, due(taken), clock(0), &on_grid);
                assert_eq!(next, due(taken) + every);
            }
        }
    }

    #[test]
    fn a_host_does_not_begin_all_at_once() {
        let wide = schedule("jitter = '1h'");
        let names: Vec<_> = (0..100).map(|number| format!("web-{number}")).collect();
        for past in [Past::default(), Past { taken: Some(clock(0)), ..Past::default() }] {
            for since in [0, 300] {
                let due = |vm: &String| wide.due(vm, clock(since), clock(since), &past);
                let mut times: Vec<_> = names.iter().map(due).collect();
                times.sort();
                let span = times[99].duration_since(times[0]).unwrap();
                assert!(span > 8 * MINUTE, "{span:?}");
                // No tenth of the time has more than a third of them.
                let crowd = |from: SystemTime| {
                    times.iter().filter(|time| (from..from + span / 10).contains(time)).count()
                };
                assert!(times.iter().all(|time| crowd(*time) < 33), "{times:?}");
            }
        }
        assert_eq!(share("vm1"), share("vm1"));
    }

    #[test]
    fn a_failed_one_is_tried_again_later_and_later() {
        let exact = schedule("jitter = '0s'");
        let wait = |failures| {
            let past = Past { taken: Some(clock(0)), failures, failed: Some(clock(100)) };
            let due = exact.due("vm1", clock(100), clock(0), &past);
            due.duration_since(clock(100)).unwrap()
        };
        assert_eq!(
            [1, 2, 3, 4, 5, 6].map(wait).map(|wait| wait / 60),
            [1, 2, 4, 8, 16, 32].map(Duration::from_secs)
        );
        assert_eq!([7, 33, u32::MAX].map(wait), [HOUR; 3]);
        // Not before its turn.
        let early = Past { taken: Some(clock(0)), failures: 1, failed: Some(clock(1)) };
        assert_eq!(exact.due("vm1", clock(2), clock(0), &early), clock(60));
    }

    /// An operation of the schedule `hourly`, begun and ended at these minutes.
    fn operation(state: State, begun: u32, ended: u32, reason: Option<Reason>) -> Operation {
        Operation {
            vm: "vm1".into(),
            schedule: Some("hourly".into()),
            state,
            created_at: at(clock(begun)),
            started_at: Some(at(clock(begun))),
            ended_at: state.is_final().then(|| at(clock(ended))),
            error: reason.map(|reason| OperationError { reason, detail: String::new() }),
            ..Operation::default()
        }
    }

    #[test]
    fn what_has_become_of_earlier_ones_is_known_from_operations() {
        let vms = ["vm1".to_owned(), "vm2".to_owned()];
        let completed = |begun| operation(State::Completed, begun, begun + 1, None);
        let failed = |begun| operation(State::Failed, begun, begun + 1, Some(Reason::Io));
        let aborted = |reason| operation(State::Aborted, 180, 181, Some(reason));
        let verified = |begun, state| {
            let verification = Verification { state, at: Some(at(clock(begun + 5))), error: None };
            Operation { verification: Some(verification), ..completed(begun) }
        };
        let by_client = Operation { schedule: None, ..completed(179) };
        for (operations, due) in [
            (vec![completed(60), completed(120)], 180),
            (vec![completed(60), by_client], 120),
            (vec![completed(60), failed(120)], 122),
            (vec![completed(60), failed(120), failed(122)], 125),
            (vec![failed(60), completed(120)], 180),
            (vec![completed(60), verified(120, VerificationState::Sound)], 180),
            (vec![completed(60), verified(120, VerificationState::Running)], 180),
            (vec![completed(60), verified(120, VerificationState::Failed)], 126),
            // It is at it.
            (vec![completed(60), operation(State::Copying, 120, 0, None)], 180),
            // Somebody did not want it.
            (vec![completed(60), aborted(Reason::Cancelled)], 240),
            // Nobody is to blame for that but the daemon.
            (vec![completed(60), aborted(Reason::DaemonRestart)], 182),
        ] {
            let mut agenda = Agenda::new(vec![schedule("jitter = '0s'")], Vec::new());
            // All are known since then.
            assert_eq!(agenda.turns(clock(0), &vms, [].iter()).len(), 2);
            let turns = agenda.turns(clock(190), &vms, operations.iter());
            let own = turns.iter().find(|turn| turn.vm == "vm1").unwrap();
            assert_eq!(own.at, clock(due), "{operations:?}");
        }
    }

    #[test]
    fn a_turn_that_is_left_out_comes_again() {
        let mut agenda = Agenda::new(vec![schedule("jitter = '0s'")], Vec::new());
        let vms = ["vm1".to_owned()];
        let next = |agenda: &mut Agenda, now| agenda.turns(clock(now), &vms, [].iter()).remove(0);
        let turn = next(&mut agenda, 7);
        assert_eq!(turn.at, clock(7));
        assert!(agenda.leave_out(&turn, "gone", clock(7)));
        assert!(agenda.leave_out(&turn, "busy", clock(8)));
        assert!(!agenda.leave_out(&turn, "busy", clock(8)));
        assert_eq!(next(&mut agenda, 8).at, clock(9));
        assert_eq!(next(&mut agenda, 9).at, clock(9));
        assert_eq!(agenda.left_out()["vm1"], "busy");
        agenda.taken(&turn);
        assert!(agenda.left_out().is_empty());
        // What was taken is not taken again because nobody remembers it.
        let taken = operation(State::Completed, 10, 11, None);
        assert_eq!(agenda.turns(clock(12), &vms, [taken].iter())[0].at, clock(60));
        assert_eq!(next(&mut agenda, 13).at, clock(60));
        // Nor by another daemon, and not for what had failed before.
        let failed = operation(State::Failed, 5, 6, Some(Reason::Io));
        let mut next_agenda = Agenda::new(vec![schedule("jitter = '0s'")], agenda.all_taken());
        assert_eq!(next_agenda.turns(clock(14), &vms, [failed].iter())[0].at, clock(60));
        // But what failed since then is tried again.
        let failed = operation(State::Failed, 60, 61, Some(Reason::Io));
        assert_eq!(next_agenda.turns(clock(61), &vms, [failed].iter())[0].at, clock(62));
        // One that was gone is a new one when it is back.
        assert_eq!(agenda.turns(clock(10), &[], [].iter()), []);
        assert_eq!(next(&mut agenda, 11).at, clock(11));
    }

    #[test]
    fn names_may_have_one_star() {
        let names = |text: &str| Names::try_from(text.to_owned());
        for (text, name, is_meant) in [
            ("vm1", "vm1", true),
            ("vm1", "vm11", false),
            ("*", "vm1", true),
            ("web-*", "web-1", true),
            ("web-*", "web-", true),
            ("web-*", "db-1", false),
            ("*-db", "a-db", true),
            ("a*a", "a", false),
            ("a*a", "aa", true),
        ] {
            assert_eq!(names(text).unwrap().has(name), is_meant, "{text} {name}");
        }
        for bad in ["", "*/*", "**", "a b", ".*", "-*", "a*b*c", "/run/*"] {
            assert!(names(bad).is_err(), "{bad:?}");
        }
    }
}
