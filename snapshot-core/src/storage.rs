//! Where captured pages are written: the snapshot's RAM file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::sys::uring::{Write, WriteRing};

/// Writes in flight at most.
pub const DEPTH: u32 = 16;

/// A place for pages at fixed offsets.
pub trait Storage: Send {
    /// Starts a write.
    ///
    /// # Errors
    /// The operating system's. A write's own error may also come with its completion.
    fn submit(&mut self, write: Write) -> io::Result<()>;

    /// Takes out one completed write, waiting for it if `wait`; nothing if none is in flight, or none is
    /// complete and `wait` is false.
    ///
    /// # Errors
    /// The operating system's.
    fn complete(&mut self, wait: bool) -> io::Result<Option<u64>>;

    /// Writes in flight.
    fn in_flight(&self) -> usize;

    /// How it writes, for the report.
    fn name(&self) -> &'static str;
}

/// Opens the RAM file at `path`, `len_bytes` long, by the best way that this host and file system offer:
/// io_uring with `O_DIRECT`, io_uring through the page cache, or plain writes.
///
/// # Errors
/// The operating system's.
pub fn open(path: &Path, len_bytes: u64) -> io::Result<Box<dyn Storage>> {
    let file = OpenOptions::new().create(true).truncate(true).write(true).open(path)?;
    // A write behind the end of file would take the inode's lock alone: give the file its length first.
    file.set_len(len_bytes)?;
    let direct = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path);
    let (file, is_direct) = match direct {
        Ok(direct) => (direct, true),
        // The file system has no direct I/O.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (file, false),
        Err(error) => return Err(error),
    };
    Ok(match WriteRing::new(DEPTH) {
        Ok(ring) => Box::new(RingStorage { file, ring, is_direct }),
        Err(error) => {
            tracing::info!(%error, "io_uring is not available, writing synchronously");
            Box::new(PlainStorage { file, done: Vec::new() })
        }
    })
}

struct RingStorage {
    file: File,
    ring: WriteRing,
    is_direct: bool,
}

impl Storage for RingStorage {
    fn submit(&mut self, write: Write) -> io::Result<()> {
        self.ring.submit(self.file.as_fd(), write)
    }

    fn complete(&mut self, wait: bool) -> io::Result<Option<u64>> {
        let Some((token, result)) = self.ring.complete(self.file.as_fd(), wait)? else {
            return Ok(None);
        };
        result.map(|()| Some(token))
    }

    fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }

    fn name(&self) -> &'static str {
        if self.is_direct { "io_uring, O_DIRECT" } else { "io_uring, page cache" }
    }
}

/// For hosts that forbid io_uring.
struct PlainStorage {
    file: File,
    done: Vec<u64>,
}

impl Storage for PlainStorage {
    fn submit(&mut self, write: Write) -> io::Result<()> {
        self.file.write_all_at(&write.memory[write.range], write.file_offset)?;
        self.done.push(write.token);
        Ok(())
    }

    fn complete(&mut self, _wait: bool) -> io::Result<Option<u64>> {
        Ok(self.done.pop())
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn name(&self) -> &'static str {
        "synchronous writes"
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::sys::memory::HugeBuffer;
    use std::ops::Range;
    use std::sync::Arc;

    fn write_and_read_back(make: impl FnOnce(&Path) -> Box<dyn Storage>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        let mut storage = make(&path);
        let mut memory = HugeBuffer::new().unwrap();
        memory.fill(5);
        let memory = Arc::new(memory);
        let mut submit = |token, range, file_offset| {
            let memory = Arc::clone(&memory);
            storage.submit(Write { token, memory, range, file_offset }).unwrap();
        };
        submit(1, 0..8192, 4096);
        submit(2, 8192..16384, 1 << 20);
        while storage.in_flight() > 0 {
            assert!(storage.complete(true).unwrap().is_some());
        }
        assert!(storage.complete(true).unwrap().is_none());
        let written = std::fs::read(&path).unwrap();
        assert_eq!(written.len(), 2 << 20);
        let fives = |range: Range<usize>| written[range].iter().all(|&byte| byte == 5);
        assert!(fives(4096..12288) && fives(1 << 20..(1 << 20) + 8192));
        assert_eq!(written.iter().filter(|&&byte| byte == 5).count(), 16384);
    }

    #[test]
    fn the_best_way_writes_what_it_is_given() {
        write_and_read_back(|path| open(path, 2 << 20).unwrap());
    }

    #[test]
    fn plain_writes_write_what_they_are_given() {
        write_and_read_back(|path| {
            let file = File::create(path).unwrap();
            file.set_len(2 << 20).unwrap();
            Box::new(PlainStorage { file, done: Vec::new() })
        });
    }
}
