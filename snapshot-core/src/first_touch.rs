//! Who made the engine save pages: the threads of the VMM, virtual CPUs for the most part, that wrote to them first.
//!
//! Fault threads add, the session's thread reads. A lock that is held for some nanoseconds: no thread of the
//! guest ever holds it.

use std::sync::{Mutex, MutexGuard, PoisonError};

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
}

/// First touches by thread.
pub struct FirstTouches(Mutex<Vec<FirstTouch>>);

impl Default for FirstTouches {
    fn default() -> Self {
        // Never grows: a fault does not wait for memory.
        Self(Mutex::new(Vec::with_capacity(THREADS_MAX + 1)))
    }
}

impl FirstTouches {
    /// Counts a fault of `thread` for which `pages` were saved.
    pub fn add(&self, thread: u32, pages: u64) {
        let mut touches = self.lock();
        let known = touches.iter().position(|touch| touch.thread == thread);
        let index = known.unwrap_or_else(|| {
            let thread = if touches.len() < THREADS_MAX { thread } else { 0 };
            let other = touches.iter().position(|touch| touch.thread == thread);
            other.unwrap_or_else(|| {
                touches.push(FirstTouch { thread, faults: 0, bytes: 0 });
                touches.len() - 1
            })
        });
        touches[index].faults += 1;
        touches[index].bytes += pages * PAGE_BYTES;
    }

    /// As it is now, in the order in which threads came.
    #[must_use]
    pub fn get(&self) -> Vec<FirstTouch> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<FirstTouch>> {
        // Consistent between any two statements that can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_has_its_own_and_too_many_share_one() {
        let touches = FirstTouches::default();
        for thread in [7, 9, 7] {
            touches.add(thread, 16);
        }
        let told = |thread, faults, pages| FirstTouch { thread, faults, bytes: pages * PAGE_BYTES };
        assert_eq!(touches.get(), [told(7, 2, 32), told(9, 1, 16)]);
        (10_000..20_000).for_each(|thread| touches.add(thread, 1));
        let all = touches.get();
        assert_eq!(all.len(), THREADS_MAX + 1);
        assert_eq!(all.iter().map(|touch| touch.faults).sum::<u64>(), 10_003);
        assert_eq!(all.last().map(|touch| touch.thread), Some(0));
    }
}
