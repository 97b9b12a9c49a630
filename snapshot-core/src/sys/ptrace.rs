//! Making a system call on behalf of a thread of another process.
//!
//! ```text
//! seize ─► interrupt ─► stopped ─► inject × n ─► release: registers and signal mask as found, detach
//! ```
//!
//! Registers are put back exactly as found, `orig_rax` included, so that on detaching the kernel's own
//! restart logic finishes an interrupted system call (arch/x86/kernel/signal.c). The tracer is a
//! thread: when it ends, the kernel lets go of what it traces, but does not put registers back. So
//! whoever calls this must not be killed in between; see [`guard`](crate::vmm::guard).

use std::io;
use std::time::{Duration, Instant};

use rustix::process::Pid;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("system calls are injected through the registers of x86-64 only");

/// Stop reported after `PTRACE_INTERRUPT` (linux/ptrace.h).
const PTRACE_EVENT_STOP: i32 = 128;
/// Bytes of the kernel's signal set.
const SIGSET_BYTES: usize = 8;
/// `cs` of 64-bit user code (asm/segment.h).
const USER_CS_64: u64 = 0x33;
/// Instruction bytes of `syscall`.
pub const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];
/// How long one step of a system call that never blocks may take on a loaded machine.
const STEP_LIMIT: Duration = Duration::from_secs(10);

/// A thread that is stopped, and will be released as it was found.
pub struct StoppedThread {
    tid: Pid,
    registers: libc::user_regs_struct,
    signal_mask: u64,
    altered: bool,
}

impl StoppedThread {
    /// Stops thread `tid`, waiting at most `limit`.
    ///
    /// After a time-out the thread stays seized, and would stop late: the calling thread must then end.
    pub fn seize(tid: Pid, limit: Duration) -> io::Result<Self> {
        request(libc::PTRACE_SEIZE, tid, 0, 0)?;
        request(libc::PTRACE_INTERRUPT, tid, 0, 0)?;
        let deadline = Instant::now() + limit;
        loop {
            match wait(tid, deadline)? {
                Stop::Event => break,
                // Came before our interruption: delivered as if nobody looked.
                Stop::Signal(signal) => request(libc::PTRACE_CONT, tid, 0, u64::from(signal))?,
            }
        }
        let mut thread = Self { tid, registers: empty_registers(), signal_mask: 0, altered: false };
        thread.registers = thread.read_registers()?;
        // SAFETY: data is a live u64 of SIGSET_BYTES bytes, which the kernel fills.
        unsafe {
            raw(
                libc::PTRACE_GETSIGMASK,
                tid,
                SIGSET_BYTES,
                (&raw mut thread.signal_mask).addr() as u64,
            )
        }?;
        if thread.registers.cs != USER_CS_64 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the thread does not run 64-bit code",
            ));
        }
        Ok(thread)
    }

    /// Instruction pointer at which it was found; inside a system call, just behind its instruction.
    pub const fn instruction_pointer(&self) -> u64 {
        self.registers.rip
    }

    /// Makes the thread do one system call that does not block, with the `syscall` instruction at `at`.
    pub fn inject(&mut self, at: u64, number: libc::c_long, args: [u64; 3]) -> io::Result<u64> {
        let mut registers = self.registers;
        registers.rip = at;
        registers.rax = number.cast_unsigned();
        // Not in a system call: nothing for the kernel to restart before this one.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx] = args;
        (registers.r10, registers.r8, registers.r9) = (0, 0, 0);
        self.altered = true;
        self.write_signal_mask(u64::MAX)?;
        self.write_registers(&registers)?;
        let behind = at + SYSCALL_INSTRUCTION.len() as u64;
        let deadline = Instant::now() + STEP_LIMIT;
        let mut signal = 0;
        let result = loop {
            request(libc::PTRACE_SINGLESTEP, self.tid, 0, u64::from(signal))?;
            // Only SIGSTOP is still delivered, and a group stop reported: neither is the step.
            signal = match wait(self.tid, deadline)? {
                Stop::Signal(signal) if signal != libc::SIGTRAP.cast_unsigned() => signal,
                _ => 0,
            };
            let now = self.read_registers()?;
            if now.rip == behind {
                break now.rax.cast_signed();
            }
        };
        match i32::try_from(result) {
            Ok(error @ -4095..=-1) => Err(io::Error::from_raw_os_error(-error)),
            _ => Ok(result.cast_unsigned()),
        }
    }

    /// Puts everything back and lets the thread run on.
    pub fn release(mut self) -> io::Result<()> {
        self.restore()
    }

    fn restore(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.altered) {
            let registers = self.registers;
            self.write_registers(&registers)?;
            self.write_signal_mask(self.signal_mask)?;
        }
        request(libc::PTRACE_DETACH, self.tid, 0, 0)
    }

    fn read_registers(&self) -> io::Result<libc::user_regs_struct> {
        let mut registers = empty_registers();
        // SAFETY: data is a live user_regs_struct, which the kernel fills.
        unsafe { raw(libc::PTRACE_GETREGS, self.tid, 0, (&raw mut registers).addr() as u64) }?;
        Ok(registers)
    }

    fn write_registers(&self, registers: &libc::user_regs_struct) -> io::Result<()> {
        // SAFETY: data is a live user_regs_struct, which the kernel only reads.
        unsafe {
            raw(libc::PTRACE_SETREGS, self.tid, 0, std::ptr::from_ref(registers).addr() as u64)
        }
    }

    fn write_signal_mask(&self, mask: u64) -> io::Result<()> {
        // SAFETY: data is a live u64 of SIGSET_BYTES bytes, which the kernel only reads.
        unsafe {
            raw(libc::PTRACE_SETSIGMASK, self.tid, SIGSET_BYTES, (&raw const mask).addr() as u64)
        }
    }
}

impl Drop for StoppedThread {
    fn drop(&mut self) {
        // After `release` the thread is not ours any more and this fails with ESRCH, as it does when
        // the process has ended.
        let _ = self.restore();
    }
}

enum Stop {
    /// `PTRACE_EVENT_STOP`: interrupted, or stopped with its whole process.
    Event,
    /// About to take this signal.
    Signal(u32),
}

/// Waits for the next stop of `tid`.
fn wait(tid: Pid, deadline: Instant) -> io::Result<Stop> {
    let mut rounds = 0_u32;
    loop {
        let mut status = 0;
        // SAFETY: status is a live int, which the kernel fills.
        let found = unsafe {
            libc::waitpid(tid.as_raw_nonzero().get(), &raw mut status, libc::__WALL | libc::WNOHANG)
        };
        if found == -1 {
            return Err(io::Error::last_os_error());
        }
        if found != 0 {
            if !libc::WIFSTOPPED(status) {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            return Ok(if status >> 16 == PTRACE_EVENT_STOP {
                Stop::Event
            } else {
                Stop::Signal(libc::WSTOPSIG(status).cast_unsigned())
            });
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // A stop comes within microseconds as a rule, and the thread stands still meanwhile.
        rounds += 1;
        if rounds < 1000 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// A request whose data is a plain number.
fn request(request: libc::c_uint, tid: Pid, address: usize, data: u64) -> io::Result<()> {
    debug_assert!(matches!(
        request,
        libc::PTRACE_SEIZE
            | libc::PTRACE_INTERRUPT
            | libc::PTRACE_CONT
            | libc::PTRACE_SINGLESTEP
            | libc::PTRACE_DETACH
    ));
    // SAFETY: none of these requests takes data for an address in this process.
    unsafe { raw(request, tid, address, data) }
}

/// # Safety
/// Where `request` takes `data` for an address of this process, it must be valid for what the request does.
unsafe fn raw(request: libc::c_uint, tid: Pid, address: usize, data: u64) -> io::Result<()> {
    // SAFETY: the caller vouches for data; the rest are numbers.
    let result = unsafe {
        libc::syscall(libc::SYS_ptrace, request, tid.as_raw_nonzero().get(), address, data)
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

const fn empty_registers() -> libc::user_regs_struct {
    // SAFETY: the struct consists of integers only.
    unsafe { std::mem::zeroed() }
}
