//! Writes through io_uring from buffers that the operation owns until it is complete.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, types};

use crate::sys::memory::HugeBuffer;

/// A write, which owns what it writes until it is complete.
pub struct Write {
    /// What its completion will carry.
    pub token: u64,
    /// Where the bytes are.
    pub memory: Arc<HugeBuffer>,
    /// Which of them.
    pub range: Range<usize>,
    /// Where in the file they go.
    pub file_offset: u64,
}

/// A ring that writes to one file at a time.
pub struct WriteRing {
    ring: IoUring,
    /// Operations in flight. Their buffers live here, so the kernel never writes from freed memory.
    pending: HashMap<u64, Write>,
    next_id: u64,
}

impl WriteRing {
    /// A ring for at most `depth` operations in flight.
    ///
    /// # Errors
    /// `ENOSYS` or `EPERM` where io_uring is absent or forbidden.
    pub fn new(depth: u32) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(depth)?;
        Ok(Self { ring, pending: HashMap::with_capacity(depth as usize), next_id: 0 })
    }

    /// Operations in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Starts a write to `file`.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` when the ring is full.
    pub fn submit(&mut self, file: BorrowedFd<'_>, write: Write) -> io::Result<()> {
        let bytes = &write.memory[write.range.clone()];
        let len =
            u32::try_from(bytes.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let id = self.next_id;
        let entry = opcode::Write::new(types::Fd(file.as_raw_fd()), bytes.as_ptr(), len)
            .offset(write.file_offset)
            .build()
            .user_data(id);
        {
            let mut queue = self.ring.submission();
            // SAFETY: the entry points into `memory`, whose mapping never moves and which `pending` keeps
            // alive until its completion has been seen; an `Arc` gives nobody leave to write to it.
            unsafe { queue.push(&entry) }
                .map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
        }
        self.next_id += 1;
        self.pending.insert(id, write);
        match self.ring.submit() {
            // The entry stays queued; waiting for completions submits it.
            Err(error) if is_transient(&error) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Takes one completed write out, waiting for it if `wait`; nothing if there is none.
    ///
    /// A short write is continued here and not reported until it is whole.
    ///
    /// # Errors
    /// That of the ring itself; a write's own error comes with its token.
    pub fn complete(
        &mut self,
        file: BorrowedFd<'_>,
        wait: bool,
    ) -> io::Result<Option<(u64, io::Result<()>)>> {
        loop {
            if self.pending.is_empty() {
                return Ok(None);
            }
            let Some(entry) = self.ring.completion().next() else {
                if !wait {
                    return Ok(None);
                }
                match self.ring.submit_and_wait(1) {
                    Err(error) if is_transient(&error) => {}
                    result => drop(result?),
                }
                continue;
            };
            let Some(mut write) = self.pending.remove(&entry.user_data()) else {
                continue;
            };
            let written = match usize::try_from(entry.result()) {
                Ok(0) if !write.range.is_empty() => {
                    return Ok(Some((write.token, Err(io::ErrorKind::WriteZero.into()))));
                }
                Ok(written) => written,
                Err(_) => {
                    let error = io::Error::from_raw_os_error(-entry.result());
                    return Ok(Some((write.token, Err(error))));
                }
            };
            if written >= write.range.len() {
                return Ok(Some((write.token, Ok(()))));
            }
            write.range.start += written;
            write.file_offset += written as u64;
            self.submit(file, write)?;
        }
    }
}

/// Whether `io_uring_enter` can simply be called again: interrupted, or short of memory or of room for
/// completions at this moment.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

impl Drop for WriteRing {
    fn drop(&mut self) {
        // The kernel may still be reading from the buffers: wait, or else leak them.
        while !self.pending.is_empty() {
            match self.ring.submit_and_wait(1) {
                Err(error) if !is_transient(&error) => {
                    std::mem::forget(std::mem::take(&mut self.pending));
                    return;
                }
                _ => {}
            }
            for entry in self.ring.completion() {
                self.pending.remove(&entry.user_data());
            }
        }
    }
}
