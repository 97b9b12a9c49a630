//! Who made the engine save pages: the threads of the VMM, virtual CPUs for the most part, that wrote to them first; and how
//! long they waited for it.
//!
//! Fault threads add, the session's thread reads. A lock that is held for some nanoseconds: no thread of the
//! guest ever holds it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::address::PAGE_BYTES;

/// Threads that are told apart; far more than a machine has virtual CPUs.
const THREADS_MAX: usize = 1024;

/// What was saved because one thread wrote to it first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstTouch {
    /// The thread's id in its own PID namespace; 0 stands for all threads after the first 1024.
    pub thread: u32,
    /// Faults of it since the consistency point.
    pub faults: u64,
    /// Bytes saved for them, with what was captured around.
    pub bytes: u64,
    /// How long it waited for them, in nanoseconds, with what it waits now: from when a fault thread looked for faults for
    /// the last time and found none of it. Being woken, and the kernel's own time, are not in it.
    pub wait_ns: u64,
}

/// First touches by thread.
pub struct FirstTouches(Mutex<Vec<Waiting>>);

/// A thread of the VMM.
#[derive(Clone, Copy)]
struct Waiting {
    so_far: FirstTouch,
    /// Since when it waits; a thread waits for one fault at a time.
    since: Option<Instant>,
}

impl Waiting {
    const fn new(thread: u32) -> Self {
        Self { so_far: FirstTouch { thread, faults: 0, bytes: 0, wait_ns: 0 }, since: None }
    }

    /// As it is at `now`, the present wait included.
    fn at(&self, now: Instant) -> FirstTouch {
        let waits = self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let waits_ns = u64::try_from(waits.as_nanos()).unwrap_or(u64::MAX);
        FirstTouch { wait_ns: self.so_far.wait_ns.saturating_add(waits_ns), ..self.so_far }
    }
}

impl Default for FirstTouches {
    fn default() -> Self {
        // Never grows: a fault does not wait for memory.
        Self(Mutex::new(Vec::with_capacity(THREADS_MAX + 1)))
    }
}

impl FirstTouches {
    /// A fault of `thread` is being served, which may have waited since `since`.
    pub fn begin(&self, thread: u32, since: Instant) {
        let mut touches = self.lock();
        entry(&mut touches, thread).since.get_or_insert(since);
    }

    /// The fault of `thread` was served; `pages` were saved for it.
    pub fn end(&self, thread: u32, pages: u64) {
        let mut touches = self.lock();
        let touch = entry(&mut touches, thread);
        // By a clock that is read under the lock, so that nobody has been told of more than this.
        touch.so_far = touch.at(Instant::now());
        touch.since = None;
        touch.so_far.faults += 1;
        touch.so_far.bytes += pages * PAGE_BYTES;
    }

    /// As it is now, in the order in which threads came.
    #[must_use]
    pub fn get(&self) -> Vec<FirstTouch> {
        let touches = self.lock();
        let now = Instant::now();
        touches.iter().map(|touch| touch.at(now)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Waiting>> {
        // Consistent between any two statements that can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// That of `thread`, or the one that all share who come too late.
fn entry(touches: &mut Vec<Waiting>, thread: u32) -> &mut Waiting {
    let find = |touches: &[Waiting], thread| {
        touches.iter().position(|touch| touch.so_far.thread == thread)
    };
    let index = find(touches, thread).unwrap_or_else(|| {
        let thread = if touches.len() < THREADS_MAX { thread } else { 0 };
        find(touches, thread).unwrap_or_else(|| {
            touches.push(Waiting::new(thread));
            touches.len() - 1
        })
    });
    &mut touches[index]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(touches: &FirstTouches, thread: u32, pages: u64, waited: Duration) {
        touches.begin(thread, Instant::now() - waited);
        touches.end(thread, pages);
    }

    #[test]
    fn each_thread_has_its_own_and_too_many_share_one() {
        let touches = FirstTouches::default();
        for thread in [7, 9, 7] {
            fault(&touches, thread, 16, Duration::ZERO);
        }
        let told: Vec<_> = touches
            .get()
            .iter()
            .map(|touch| (touch.thread, touch.faults, touch.bytes / PAGE_BYTES))
            .collect();
        assert_eq!(told, [(7, 2, 32), (9, 1, 16)]);
        (10_000..20_000).for_each(|thread| fault(&touches, thread, 1, Duration::ZERO));
        let all = touches.get();
        assert_eq!(all.len(), THREADS_MAX + 1);
        assert_eq!(all.iter().map(|touch| touch.faults).sum::<u64>(), 10_003);
        assert_eq!(all.last().map(|touch| touch.thread), Some(0));
    }

    #[test]
    fn who_waits_now_is_told_so_and_of_no_less_afterwards() {
        const LONG: Duration = Duration::from_secs(100);
        let touches = FirstTouches::default();
        let waited = || Duration::from_nanos(touches.get()[0].wait_ns);
        fault(&touches, 7, 1, LONG);
        let first = waited();
        assert!(first >= LONG && first < LONG * 2, "{first:?}");
        assert_eq!(waited(), first, "nobody waits");

        touches.begin(7, Instant::now() - LONG);
        let meanwhile = waited();
        assert!(meanwhile >= first + LONG && touches.get()[0].faults == 1, "{meanwhile:?}");
        touches.end(7, 1);
        assert!(waited() >= meanwhile && waited() < first + LONG * 2, "{:?}", waited());
    }
}
