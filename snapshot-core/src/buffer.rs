//! The copy buffer: bounded memory between the guest's first write to a page and the disk.
//!
//! The buffer is made of [`Extent`]s of 2 MiB. A thread that captures pages fills one extent after the
//! other and hands each full one to the writer, which returns it here once it is on disk. The bound is
//! hard: where no extent is to be had, the thread waits, and with it the virtual CPU whose fault it serves.
//! The sweep leaves a reserve, so that it is the sweep that waits first.
//!
//! The bound can be moved at any time. A smaller one comes into force as extents come home: until then the
//! bound is what is in use, and memory goes back to the kernel with each extent that does.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::address::{PAGE_BYTES, PageRun, as_index};
use crate::chunk::CHUNK_PAGES_MAX;
use crate::sys::memory::{HUGE_BYTES, HugeBuffer};

/// Room that the queue has from the start, for 16 GiB; a longer one grows.
const QUEUE_EXTENTS: usize = 8192;

/// Bytes in an extent.
pub const EXTENT_BYTES: usize = HUGE_BYTES;

const _: () = assert!(EXTENT_BYTES as u64 == CHUNK_PAGES_MAX * PAGE_BYTES);

/// Extents in use up to which the sweep takes more: enough to keep the disk busy. More would bring nothing
/// sooner to the disk, but cost clearing memory, pass by the processor's cache, and leave less for faults.
const SWEEP_EXTENTS_MAX: usize = crate::storage::DEPTH as usize;

/// Extents set aside for faults when the buffer is at its smallest.
const RESERVE_MIN: usize = 2;

/// Captured pages on their way to the disk.
pub struct Extent {
    /// Shared with the writes in flight; with nobody while it is being filled.
    memory: Arc<HugeBuffer>,
    /// What lies in it, one piece behind the other.
    pieces: Vec<PageRun>,
    used_bytes: usize,
}

impl Extent {
    fn new() -> io::Result<Self> {
        let pieces = Vec::with_capacity(as_index(CHUNK_PAGES_MAX));
        Ok(Self { memory: Arc::new(HugeBuffer::new()?), pieces, used_bytes: 0 })
    }

    /// Pages that still fit.
    #[must_use]
    pub const fn room_pages(&self) -> u64 {
        (EXTENT_BYTES - self.used_bytes) as u64 / PAGE_BYTES
    }

    /// Whether nothing is in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.used_bytes == 0
    }

    /// The free part, to copy the next `run` into.
    ///
    /// # Panics
    /// If `run` is longer than [`room_pages`](Self::room_pages), or the extent is being written.
    pub fn space_for(&mut self, run: PageRun) -> &mut [u8] {
        let end = self.used_bytes + as_index(run.bytes());
        let memory = Arc::get_mut(&mut self.memory);
        &mut memory.expect("an extent is filled before it is shared with writes")
            [self.used_bytes..end]
    }

    /// Records that `run` now fills the space that [`space_for`](Self::space_for) gave.
    pub fn push(&mut self, run: PageRun) {
        self.used_bytes += as_index(run.bytes());
        self.pieces.push(run);
    }

    /// What lies in it, each run with its byte offset in the extent.
    pub fn pieces(&self) -> impl Iterator<Item = (PageRun, usize)> + '_ {
        self.pieces.iter().scan(0, |offset, &run| {
            let at = *offset;
            *offset += as_index(run.bytes());
            Some((run, at))
        })
    }

    /// The memory itself, for a write that keeps it alive.
    #[must_use]
    pub fn memory(&self) -> Arc<HugeBuffer> {
        Arc::clone(&self.memory)
    }

    /// All bytes in it.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.memory[..self.used_bytes]
    }
}

/// Who asks for an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A fault: a virtual CPU waits.
    Fault,
    /// The sweep: nobody waits.
    Sweep,
}

#[derive(Default)]
struct Pool {
    free: Vec<Extent>,
    /// Extents that exist, free or not.
    allocated: usize,
    /// Extents that may be in use; never less than are.
    limit: usize,
    /// What `limit` shall be once no more than that are in use.
    limit_wanted: usize,
    /// Filled, for the writer.
    queue: VecDeque<Extent>,
    closed: bool,
}

impl Pool {
    const fn in_use(&self) -> usize {
        self.allocated - self.free.len()
    }

    /// Brings the bound as near to the wanted one as what is in use allows, and takes out the free extents
    /// beyond it.
    fn settle(&mut self) -> Vec<Extent> {
        self.limit = self.limit_wanted.max(self.in_use());
        let surplus = self.allocated.saturating_sub(self.limit).min(self.free.len());
        self.allocated -= surplus;
        self.free.split_off(self.free.len() - surplus)
    }
}

/// The pool of extents and the queue to the writer.
pub struct Buffer {
    pool: Mutex<Pool>,
    /// An extent became free, or the buffer was closed.
    freed: Condvar,
    /// An extent was queued, or the buffer was closed.
    queued: Condvar,
    /// Length of the queue, to look at without the lock.
    queue_len: AtomicUsize,
    in_use: AtomicUsize,
    in_use_max: AtomicUsize,
    /// Bytes of pages that were in extents which came home.
    drained_bytes: AtomicU64,
}

impl Buffer {
    /// A buffer of at most `limit_bytes`, of which `ready_bytes` are made at once, so that nobody waits for them.
    ///
    /// # Errors
    /// When there is no memory for that part.
    pub fn new(limit_bytes: u64, ready_bytes: u64) -> io::Result<Self> {
        let extents = |bytes: u64| as_index(bytes) / EXTENT_BYTES;
        let limit = extents(limit_bytes);
        let ready = extents(ready_bytes).min(limit / 2);
        let free = (0..ready).map(|_| Extent::new()).collect::<io::Result<Vec<_>>>()?;
        let pool = Pool {
            free,
            allocated: ready,
            limit,
            limit_wanted: limit,
            queue: VecDeque::with_capacity(limit.min(QUEUE_EXTENTS)),
            closed: false,
        };
        Ok(Self {
            pool: Mutex::new(pool),
            freed: Condvar::new(),
            queued: Condvar::new(),
            queue_len: AtomicUsize::new(0),
            in_use: AtomicUsize::new(0),
            in_use_max: AtomicUsize::new(0),
            drained_bytes: AtomicU64::new(0),
        })
    }

    /// The bound in force, in bytes.
    #[must_use]
    pub fn limit_bytes(&self) -> u64 {
        (self.lock().limit * EXTENT_BYTES) as u64
    }

    /// Moves the bound to `limit_bytes`: at once if no more than that is in use, and otherwise as extents
    /// come home.
    pub fn set_limit_bytes(&self, limit_bytes: u64) {
        let limit = as_index(limit_bytes) / EXTENT_BYTES;
        let mut pool = self.lock();
        if pool.limit_wanted == limit {
            return;
        }
        pool.limit_wanted = limit;
        let surplus = pool.settle();
        drop(pool);
        self.freed.notify_all();
        // Unmapping takes its time: not under the lock, for which a fault may be waiting.
        drop(surplus);
    }

    /// Bytes of pages that have left the buffer since it was made.
    #[must_use]
    pub fn drained_bytes(&self) -> u64 {
        self.drained_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of extents in use: being filled, queued, or being written.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        (self.in_use.load(Ordering::Relaxed) * EXTENT_BYTES) as u64
    }

    /// The most that [`used_bytes`](Self::used_bytes) has been.
    #[must_use]
    pub fn used_bytes_max(&self) -> u64 {
        (self.in_use_max.load(Ordering::Relaxed) * EXTENT_BYTES) as u64
    }

    /// Whether the writer has nothing waiting, so that a half-filled extent would not wait either.
    #[must_use]
    pub fn writer_is_idle(&self) -> bool {
        self.queue_len.load(Ordering::Relaxed) == 0
    }

    /// Share of the buffer that is free, in percent.
    #[must_use]
    pub fn headroom_percent(&self) -> u64 {
        let limit = self.limit_bytes().max(1);
        100 - (self.used_bytes() * 100 / limit).min(100)
    }

    /// An empty extent; waits for one when the buffer is exhausted. Nothing once the buffer is closed.
    ///
    /// # Errors
    /// When the kernel has no memory although the bound allows more, and nothing is in use that could
    /// come back.
    pub fn take(&self, purpose: Purpose) -> io::Result<Option<Extent>> {
        let mut pool = self.lock();
        loop {
            if pool.closed {
                return Ok(None);
            }
            let in_use = pool.in_use();
            let bound = match purpose {
                Purpose::Fault => pool.limit,
                Purpose::Sweep => {
                    let reserve = (pool.limit / 4).max(RESERVE_MIN);
                    pool.limit.saturating_sub(reserve).min(SWEEP_EXTENTS_MAX)
                }
            };
            if in_use < bound {
                if let Some(extent) = pool.free.pop() {
                    self.count_use(in_use + 1);
                    return Ok(Some(extent));
                }
                // Making one takes the kernel up to milliseconds: not under the lock, for which a fault may be
                // waiting.
                pool.allocated += 1;
                self.count_use(in_use + 1);
                drop(pool);
                let error = match Extent::new() {
                    Ok(extent) => return Ok(Some(extent)),
                    Err(error) => error,
                };
                pool = self.lock();
                pool.allocated -= 1;
                self.count_use(pool.in_use());
                // The host is short of memory: make do with what is ready or has come back meanwhile, and
                // otherwise with what is in use and will come back.
                if let Some(extent) = pool.free.pop() {
                    self.count_use(pool.in_use());
                    return Ok(Some(extent));
                }
                if pool.allocated == 0 {
                    return Err(error);
                }
            }
            pool = self.freed.wait(pool).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Hands a filled extent to the writer.
    pub fn submit(&self, extent: Extent) {
        let mut pool = self.lock();
        pool.queue.push_back(extent);
        self.queue_len.store(pool.queue.len(), Ordering::Relaxed);
        self.queued.notify_one();
    }

    /// The next filled extent; if `wait`, waits until there is one or the buffer is closed.
    pub fn next_filled(&self, wait: bool) -> Option<Extent> {
        let mut pool = self.lock();
        loop {
            if let Some(extent) = pool.queue.pop_front() {
                self.queue_len.store(pool.queue.len(), Ordering::Relaxed);
                return Some(extent);
            }
            if pool.closed || !wait {
                return None;
            }
            pool = self.queued.wait(pool).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Returns an extent whose pages are on disk or not wanted any more.
    pub fn recycle(&self, mut extent: Extent) {
        self.drained_bytes.fetch_add(extent.used_bytes as u64, Ordering::Relaxed);
        extent.pieces.clear();
        extent.used_bytes = 0;
        let mut pool = self.lock();
        pool.free.push(extent);
        let surplus = pool.settle();
        self.in_use.store(pool.in_use(), Ordering::Relaxed);
        drop(pool);
        // The sweep may be among the waiters and not be satisfied: wake all.
        self.freed.notify_all();
        drop(surplus);
    }

    /// No more extents are given out; whoever waits is woken. What is queued can still be fetched.
    pub fn close(&self) {
        self.lock().closed = true;
        self.freed.notify_all();
        self.queued.notify_all();
    }

    fn count_use(&self, in_use: usize) {
        self.in_use.store(in_use, Ordering::Relaxed);
        self.in_use_max.fetch_max(in_use, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        // The pool is consistent between any two statements that can panic.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::address::PageIndex;

    const EXTENT: u64 = EXTENT_BYTES as u64;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first: PageIndex(first), count }
    }

    #[test]
    fn an_extent_remembers_what_lies_where() {
        let mut extent = Extent::new().unwrap();
        for piece in [run(7, 2), run(100, 1)] {
            extent.space_for(piece).fill(u8::try_from(piece.first.0).unwrap());
            extent.push(piece);
        }
        assert_eq!(extent.room_pages(), CHUNK_PAGES_MAX - 3);
        assert_eq!(extent.pieces().collect::<Vec<_>>(), [(run(7, 2), 0), (run(100, 1), 8192)]);
        assert_eq!((extent.bytes()[0], extent.bytes()[8192]), (7, 100));
    }

    #[test]
    fn the_bound_holds_and_the_sweep_leaves_a_reserve() {
        let buffer = Buffer::new(8 * EXTENT, EXTENT).unwrap();
        let swept: Vec<_> = (0..6).map(|_| buffer.take(Purpose::Sweep).unwrap().unwrap()).collect();
        assert_eq!(buffer.used_bytes(), 6 * EXTENT);
        std::thread::scope(|scope| {
            let sweep = scope.spawn(|| buffer.take(Purpose::Sweep).unwrap());
            let fault = [(); 2].map(|()| buffer.take(Purpose::Fault).unwrap().unwrap());
            assert_eq!(buffer.used_bytes_max(), 8 * EXTENT);
            assert!(!sweep.is_finished(), "the reserve is for faults");
            for extent in fault.into_iter().chain(swept) {
                buffer.recycle(extent);
            }
            assert!(sweep.join().unwrap().is_some());
        });
        assert_eq!(buffer.used_bytes_max(), 8 * EXTENT);
    }

    #[test]
    fn the_sweep_leaves_faults_half_of_what_is_ready() {
        let ready = 2 * SWEEP_EXTENTS_MAX;
        let buffer = Buffer::new(4 * ready as u64 * EXTENT, ready as u64 * EXTENT).unwrap();
        let swept: Vec<_> =
            (0..SWEEP_EXTENTS_MAX).map(|_| buffer.take(Purpose::Sweep).unwrap().unwrap()).collect();
        std::thread::scope(|scope| {
            let sweep = scope.spawn(|| buffer.take(Purpose::Sweep).unwrap());
            let faults: Vec<_> =
                (swept.len()..ready).map(|_| buffer.take(Purpose::Fault).unwrap()).collect();
            let pool = buffer.lock();
            assert_eq!((pool.free.len(), pool.allocated), (0, ready), "nothing was made anew");
            drop(pool);
            assert!(!sweep.is_finished());
            swept.into_iter().chain(faults.into_iter().flatten()).for_each(|e| buffer.recycle(e));
            assert!(sweep.join().unwrap().is_some());
        });
    }

    #[test]
    fn a_larger_bound_lets_those_who_wait_go_on() {
        let buffer = Buffer::new(2 * EXTENT, 0).unwrap();
        let taken = [(); 2].map(|()| buffer.take(Purpose::Fault).unwrap().unwrap());
        std::thread::scope(|scope| {
            let fault = scope.spawn(|| buffer.take(Purpose::Fault).unwrap());
            assert!(!fault.is_finished());
            buffer.set_limit_bytes(3 * EXTENT);
            assert!(fault.join().unwrap().is_some());
        });
        assert_eq!((buffer.limit_bytes(), buffer.used_bytes()), (3 * EXTENT, 3 * EXTENT));
        drop(taken);
    }

    #[test]
    fn a_smaller_bound_comes_with_the_extents_that_come_home() {
        let buffer = Buffer::new(6 * EXTENT, 3 * EXTENT).unwrap();
        let mut taken: Vec<_> =
            (0..4).map(|_| buffer.take(Purpose::Fault).unwrap().unwrap()).collect();
        buffer.set_limit_bytes(2 * EXTENT);
        assert_eq!(buffer.limit_bytes(), 4 * EXTENT, "what is in use is not taken away");
        for left in [3, 2, 2, 2] {
            buffer.recycle(taken.pop().unwrap());
            assert_eq!(buffer.limit_bytes(), left * EXTENT);
        }
        assert_eq!(buffer.lock().allocated, 2, "memory beyond the bound is given back");
        buffer.set_limit_bytes(EXTENT);
        assert_eq!(buffer.lock().allocated, 1, "free memory is given back at once");
    }

    #[test]
    fn what_has_left_is_counted_by_what_was_in_it() {
        let buffer = Buffer::new(4 * EXTENT, 0).unwrap();
        let mut extent = buffer.take(Purpose::Fault).unwrap().unwrap();
        extent.push(run(7, 3));
        buffer.recycle(extent);
        assert_eq!(buffer.drained_bytes(), 3 * PAGE_BYTES);
    }

    #[test]
    fn a_bound_beyond_all_memory_costs_nothing() {
        let buffer = Buffer::new(u64::MAX, 0).unwrap();
        assert!(buffer.take(Purpose::Fault).unwrap().is_some());
    }

    #[test]
    fn closing_wakes_who_waits_and_keeps_what_is_queued() {
        let buffer = Buffer::new(EXTENT, 0).unwrap();
        let extent = buffer.take(Purpose::Fault).unwrap().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| buffer.take(Purpose::Fault).unwrap());
            buffer.submit(extent);
            buffer.close();
            assert!(waiting.join().unwrap().is_none());
        });
        assert!(buffer.next_filled(true).is_some());
        assert!(buffer.next_filled(true).is_none());
    }
}
