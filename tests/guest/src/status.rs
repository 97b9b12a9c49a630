//! The one page in which the guest publishes how far each worker is.
//!
//! It changes all the time, so it has no checksum; each word is published by one writer. At any true
//! instant the newest page of a worker is the published one or the next, and the newest block on the
//! disk lies between the completed and the submitted one.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::page::{Kind, MAGIC, PAGE_WORDS, WORKERS_MAX, Words};

/// A number in the status page; the value is its word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Field {
    /// [`MAGIC`].
    Magic = 0,
    /// [`Kind::Status`].
    Kind = 1,
    /// Which boot this is.
    Run = 2,
    /// Number of workers.
    Workers = 3,
    /// Slots of each worker's ring.
    RingSlots = 4,
    /// Populated pages, once all are written.
    PopulatePages = 5,
    /// Slots on the disk, 0 without a disk worker.
    DiskSlots = 6,
    /// Blocks handed to the disk; published before the write.
    DiskSubmitted = 7,
    /// Blocks that the disk has acknowledged; published after the write.
    DiskCompleted = 8,
    /// Pages or blocks that did not hold what they should.
    Inconsistencies = 9,
    /// Pages finished by worker 0; those of the others follow.
    Progress = 16,
}

/// The live status page of the guest; page-aligned, so that it is one page of guest RAM.
#[repr(C, align(4096))]
pub struct Status([AtomicU64; PAGE_WORDS]);

impl Status {
    /// A status page that says nothing yet.
    #[expect(clippy::new_without_default, reason = "it is made once, in a static")]
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; PAGE_WORDS])
    }

    /// Makes the page recognisable.
    pub fn publish(&self, run: u64) {
        self.set(Field::Run, run);
        self.set(Field::Kind, Kind::Status.number() << 32);
        self.set(Field::Magic, MAGIC);
    }

    /// Reads a field.
    pub fn get(&self, field: Field) -> u64 {
        self.0[field as usize].load(Ordering::Acquire)
    }

    /// Publishes a field.
    pub fn set(&self, field: Field, value: u64) {
        self.0[field as usize].store(value, Ordering::Release);
    }

    /// Counts one more in a field.
    pub fn add_one(&self, field: Field) {
        self.0[field as usize].fetch_add(1, Ordering::AcqRel);
    }

    /// Pages finished by each worker.
    pub fn progress(&self) -> [u64; WORKERS_MAX] {
        std::array::from_fn(|worker| {
            self.0[Field::Progress as usize + worker].load(Ordering::Acquire)
        })
    }

    /// Publishes that a worker has finished its page `counter`.
    pub fn set_progress(&self, worker: usize, counter: u64) {
        self.0[Field::Progress as usize + worker].store(counter, Ordering::Release);
    }
}

/// A status page as found in a snapshot.
#[derive(Debug, Clone, Copy)]
pub struct StatusImage(Words);

impl StatusImage {
    /// Recognises a status page.
    pub fn read(words: &Words) -> Option<Self> {
        (words[Field::Magic as usize] == MAGIC
            && words[Field::Kind as usize] == Kind::Status.number() << 32)
            .then_some(Self(*words))
    }

    /// Builds one from fields, for tests of the checker.
    pub fn from_fields(fields: &[(Field, u64)], progress: &[u64]) -> Self {
        let mut words = [0; PAGE_WORDS];
        words[Field::Magic as usize] = MAGIC;
        words[Field::Kind as usize] = Kind::Status.number() << 32;
        for &(field, value) in fields {
            words[field as usize] = value;
        }
        words[Field::Progress as usize..][..progress.len()].copy_from_slice(progress);
        Self(words)
    }

    /// The page itself.
    pub fn words(&self) -> &Words {
        &self.0
    }

    /// Reads a field.
    pub fn get(&self, field: Field) -> u64 {
        self.0[field as usize]
    }

    /// Pages that `worker` had finished.
    pub fn progress(&self, worker: usize) -> u64 {
        self.0[Field::Progress as usize + worker]
    }
}
