//! A snapshot's course as lines of JSON on standard output, for programs that follow it, and limits that such a program
//! changes meanwhile by lines on standard input.
//!
//! ```text
//!   session ─▶ Follower ─▶ Lines ─▶ thread `lines` ─▶ standard output
//!                            ▲
//!                            └─ answers ─ thread `limits` ◀─ standard input
//!                                           └─▶ LiveLimits, of which the control loop takes them
//! ```
//!
//! The session never waits for whoever reads. What has not been written yet is kept as far as it is bounded: changes of
//! phase, and of all progress between them the newest. A reader that has gone away is no error.

pub mod limits;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;
use snapshot_core::{Cancel, Phase, Progress};

use crate::control_loop::{ControlLoop, State};
use crate::disk::Writes;
use crate::measures::Measures;
use crate::output;
use crate::probes::StallsSoFar;

/// Least time between two lines of progress in the same phase.
const INTERVAL: Duration = Duration::from_millis(200);

/// Answers that are kept for a reader that does not read; then no more changes are taken.
const KEPT_MAX: usize = 64;

/// How often it is looked whether a livesnap that waits for its reader shall end.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// How long a reader that does not read is waited for once livesnap was told to end.
const PATIENCE: Duration = Duration::from_secs(2);

/// One line.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// What was forecast before the snapshot was begun.
    Forecast(Value),
    /// Where it is.
    Progress(Box<Course>),
    /// What became of a change of limits.
    Policy(limits::Answer),
    /// What `--json` tells.
    End(Value),
}

/// A snapshot at one moment, with what is measured and done beside it.
#[derive(Debug, Serialize)]
pub struct Course {
    #[serde(flatten)]
    progress: Progress,
    control: Option<State>,
    stalls: Option<StallsSoFar>,
    disk_writes: Option<Writes>,
}

/// Lines on their way to a reader. Clones share it.
#[derive(Clone)]
pub struct Lines(Arc<Shared>);

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    /// To be written, in this order.
    kept: VecDeque<Event>,
    /// To be written after them, unless something newer comes before.
    newest: Option<Event>,
    /// Nothing comes any more.
    is_over: bool,
    /// Nothing is written any more.
    is_done: bool,
}

impl Lines {
    /// Begins to write to standard output.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn to_stdout() -> io::Result<Self> {
        Self::to(io::stdout())
    }

    fn to(writer: impl Write + Send + 'static) -> io::Result<Self> {
        let lines = Self(Arc::default());
        let shared = Arc::clone(&lines.0);
        thread::Builder::new().name("lines".into()).spawn(move || shared.write(writer))?;
        Ok(lines)
    }

    /// An event to be written, whatever comes then.
    pub fn post(&self, event: Event) {
        let mut queue = self.0.lock();
        if !queue.is_over && !queue.is_done {
            queue.kept.push_back(event);
            self.0.changed.notify_all();
        }
    }

    /// Where the snapshot is. What was to be written of this phase before is not any more.
    fn post_progress(&self, course: Course, is_new_phase: bool) {
        let mut queue = self.0.lock();
        let event = Event::Progress(Box::new(course));
        if queue.is_done {
            return;
        }
        if is_new_phase {
            queue.newest = None;
            queue.kept.push_back(event);
        } else {
            queue.newest = Some(event);
        }
        self.0.changed.notify_all();
    }

    /// Waits until there is room for an answer, and tells whether it would still be written.
    fn wait_for_room(&self) -> bool {
        let mut queue = self.0.lock();
        while queue.kept.len() >= KEPT_MAX && !queue.is_done {
            queue = self.0.wait(queue, None);
        }
        !queue.is_over && !queue.is_done
    }

    /// Writes the last line and waits until it is written or the reader has gone away. If livesnap was told to end by
    /// `cancel`, a reader that does not read is waited for no longer than two seconds.
    pub fn end(&self, value: Value, cancel: &Cancel) {
        let mut queue = self.0.lock();
        queue.newest = None;
        queue.kept.push_back(Event::End(value));
        queue.is_over = true;
        self.0.changed.notify_all();
        let mut told_to_end: Option<Instant> = None;
        while !queue.is_done {
            if cancel.is_cancelled() {
                let since = told_to_end.get_or_insert_with(Instant::now);
                if since.elapsed() > PATIENCE {
                    return;
                }
            }
            queue = self.0.wait(queue, Some(LOOK_INTERVAL));
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        queue: MutexGuard<'a, Queue>,
        at_most: Option<Duration>,
    ) -> MutexGuard<'a, Queue> {
        match at_most {
            Some(time) => {
                let waited = self.changed.wait_timeout(queue, time);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// The next event; nothing when there will be none.
    fn next(&self) -> Option<Event> {
        let mut queue = self.lock();
        loop {
            let next = queue.kept.pop_front().or_else(|| queue.newest.take());
            if next.is_some() || queue.is_over {
                self.changed.notify_all();
                return next;
            }
            queue = self.wait(queue, None);
        }
    }

    /// Writes until all is over, or nobody reads any more.
    fn write(&self, mut writer: impl Write) {
        while let Some(event) = self.next() {
            match write_line(&mut writer, &event) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                Err(error) => {
                    output::error(format_args!("could not write to standard output: {error}"));
                    break;
                }
            }
        }
        *self.lock() = Queue { is_over: true, is_done: true, ..Queue::default() };
        self.changed.notify_all();
    }
}

fn write_line(writer: &mut impl Write, event: &Event) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    writer.write_all(&line)?;
    writer.flush()
}

/// Tells of a session's progress as it comes.
pub struct Follower {
    lines: Lines,
    last: Option<(Instant, Progress)>,
}

impl Follower {
    /// Nothing is told yet.
    pub const fn new(lines: Lines) -> Self {
        Self { lines, last: None }
    }

    /// Takes what is worth a line.
    pub fn observe(&mut self, progress: &Progress, measures: &Measures, control: &ControlLoop) {
        let last = self.last.as_ref();
        let is_new_phase = last.is_none_or(|(_, last)| last.phase != progress.phase);
        let is_time = last.is_none_or(|(at, _)| at.elapsed() >= INTERVAL);
        // In the pause every moment counts.
        if !is_new_phase && (!is_time || progress.phase == Phase::Frozen) {
            return;
        }
        let progress = self.with_counts(progress);
        self.last = Some((Instant::now(), progress.clone()));
        let course = Course {
            progress,
            control: control.state(),
            stalls: measures.stalls(),
            disk_writes: measures.disk_writes(),
        };
        self.lines.post_progress(course, is_new_phase);
    }

    /// When the engine is gone, so are its counts: the last ones hold on.
    fn with_counts(&self, progress: &Progress) -> Progress {
        match &self.last {
            Some((_, last)) if progress.phase >= Phase::Completed => {
                let Progress { phase, is_consistent, elapsed_ns, .. } = *progress;
                Progress { phase, is_consistent, elapsed_ns, ..last.clone() }
            }
            _ => progress.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

    use std::sync::mpsc::{Receiver, Sender, channel};

    use serde_json::json;

    use super::*;

    /// A reader that takes a line whenever it is allowed to, and goes away when nobody allows it any more.
    struct Reader {
        allowed: Receiver<()>,
        lines: Sender<Value>,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.allowed.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
            self.lines.send(serde_json::from_slice(bytes)?).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines() -> (Lines, Sender<()>, Receiver<Value>) {
        let ((allow, allowed), (lines, read)) = (channel(), channel());
        (Lines::to(Reader { allowed, lines }).unwrap(), allow, read)
    }

    fn follow(follower: &mut Follower, phase: Phase, saved_bytes: u64) {
        let progress = Progress { phase, saved_bytes, ..Progress::default() };
        follower.observe(&progress, &Measures::none(), &ControlLoop::Off);
    }

    fn progress(lines: &Lines, saved_bytes: u64) {
        let progress = Progress { phase: Phase::Copying, saved_bytes, ..Progress::default() };
        let course = Course { progress, control: None, stalls: None, disk_writes: None };
        lines.post_progress(course, false);
    }

    #[test]
    fn a_slow_reader_gets_every_phase_and_the_newest_progress() {
        let (lines, allow, read) = lines();
        let mut follower = Follower::new(lines.clone());
        lines.post(Event::Forecast(json!({"verdict": "fits"})));
        for phase in [Phase::Preparing, Phase::Arming, Phase::Frozen, Phase::Copying] {
            follow(&mut follower, phase, 0);
        }
        // Nobody reads meanwhile: if this waited for anybody, the test would not end.
        for saved in 1..=10_000 {
            progress(&lines, saved);
        }
        let ended = thread::spawn({
            let lines = lines.clone();
            move || lines.end(json!({"outcome": "completed"}), &Cancel::default())
        });
        while !lines.0.lock().is_over {
            thread::yield_now();
        }
        for _ in 0..5 {
            allow.send(()).unwrap();
        }
        let told: Vec<Value> = read.iter().take(5).collect();
        assert_eq!(told[0], json!({"event": "forecast", "verdict": "fits"}));
        let phases: Vec<_> = told[1..].iter().map(|line| line["phase"].as_str().unwrap()).collect();
        assert_eq!(phases, ["preparing", "arming", "frozen", "copying"]);
        allow.send(()).unwrap();
        let last = read.recv().unwrap();
        assert_eq!(last, json!({"event": "end", "outcome": "completed"}));
        ended.join().unwrap();
    }

    #[test]
    fn of_progress_the_newest_is_told() {
        let (lines, allow, read) = lines();
        let mut follower = Follower::new(lines.clone());
        follow(&mut follower, Phase::Copying, 1);
        for saved in 2..=1_000 {
            progress(&lines, saved);
        }
        allow.send(()).unwrap();
        assert_eq!(read.recv().unwrap()["saved_bytes"], 1);
        allow.send(()).unwrap();
        let second = read.recv().unwrap();
        assert_eq!(second["saved_bytes"], 1_000, "{second:#}");
        assert_eq!((&second["event"], &second["control"]), (&json!("progress"), &Value::Null));
        // The counts of a session that has ended are those that it had.
        follow(&mut follower, Phase::Completed, 0);
        allow.send(()).unwrap();
        assert_eq!(read.recv().unwrap()["saved_bytes"], 1);
    }

    #[test]
    fn progress_of_one_phase_is_told_five_times_a_second() {
        let (lines, allow, read) = lines();
        let mut follower = Follower::new(lines.clone());
        for _ in 0..100 {
            allow.send(()).unwrap();
        }
        let began = Instant::now();
        while began.elapsed() < INTERVAL * 3 {
            follow(&mut follower, Phase::Copying, 1);
        }
        lines.end(json!({}), &Cancel::default());
        drop((follower, lines));
        // The first, three more at most, and the end.
        let told = read.iter().count();
        assert!((2..=5).contains(&told), "{told}");
    }

    #[test]
    fn a_reader_that_has_gone_away_is_nobodys_business() {
        let (lines, allow, read) = lines();
        drop(allow);
        let mut follower = Follower::new(lines.clone());
        for phase in [Phase::Preparing, Phase::Arming, Phase::Completed] {
            follow(&mut follower, phase, 0);
            progress(&lines, 1);
        }
        lines.end(json!({}), &Cancel::default());
        assert!(read.iter().next().is_none());
        assert!(!lines.wait_for_room(), "changes of limits would still be taken");
    }

    #[test]
    fn whoever_is_told_to_end_waits_no_longer_for_a_reader() {
        let (lines, allow, _read) = lines();
        let cancel = Cancel::default();
        cancel.cancel();
        let began = Instant::now();
        lines.end(json!({}), &cancel);
        assert!(began.elapsed() >= PATIENCE, "{:?}", began.elapsed());
        drop(allow);
    }
}
