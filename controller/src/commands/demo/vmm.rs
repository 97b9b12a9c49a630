//! The demo's guest as the engine sees it: another process, attached to from outside.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::Pid;
use snapshot_core::Reason;
use snapshot_core::address::{HostVirtAddr, PAGE_BYTES};
use snapshot_core::ram::{RamBlock, RamLayout};
use snapshot_core::vmm::attach::Source;
use snapshot_core::vmm::guard::{Guard, GuardError};
use snapshot_core::vmm::{
    DeviceState, DiskSnapshot, MachineDescription, Outcome, RunState, Vmm, VmmError,
};

use super::guest::{self, Answer, Request};
use crate::commands::child_of;

/// Longest wait for an answer of the guest: it fills its memory before the first, on a host that may be busy.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// What can go wrong with the demo's guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// It could not be started.
    #[error("cannot start the demo's guest process: {0}: check the limit of processes")]
    Start(#[source] io::Error),
    /// It does not answer.
    #[error(
        "the demo's guest process does not answer ({0}): it was killed, or the host has too little memory; try a smaller --memory"
    )]
    Lost(#[source] io::Error),
    /// The guard could not attach to it.
    #[error(transparent)]
    Guard(#[from] GuardError),
}

impl GuestError {
    /// Stable code.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Start(_) => Reason::Internal,
            Self::Lost(_) => Reason::VmmDied,
            Self::Guard(error) => error.reason(),
        }
    }
}

impl From<GuestError> for VmmError {
    fn from(error: GuestError) -> Self {
        Self::new(error.reason(), error)
    }
}

/// The running guest; ended when dropped. It also ends, and so never stays paused, when this process ends.
pub struct GuestProcess {
    child: Child,
    socket: BufReader<UnixStream>,
    guard: Guard,
    ram: RamBlock,
    writers: u32,
    /// The counters in the last pause.
    at_pause: Vec<u64>,
}

impl GuestProcess {
    /// Starts it and waits until its memory is ready.
    pub fn start(size: &guest::Args) -> Result<Self, GuestError> {
        let guard = Guard::start(&Guard::own_command())?;
        let (ours, theirs) = UnixStream::pair().map_err(GuestError::Start)?;
        ours.set_read_timeout(Some(ANSWER_LIMIT)).map_err(GuestError::Start)?;
        let child = child_of::command("/proc/self/exe")
            .arg("demo-guest")
            .args(["--writers", &size.writers.to_string()])
            .args(["--pages-per-writer", &size.pages_per_writer.to_string()])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            // Ctrl-C is for livesnap, which then ends the guest.
            .process_group(0)
            .spawn()
            .map_err(GuestError::Start)?;
        let ram = RamBlock {
            id: "ram".into(),
            hva: HostVirtAddr(0),
            len_bytes: size.ram_bytes(),
            page_size_bytes: PAGE_BYTES,
            store_zero_pages: false,
        };
        let writers = u32::try_from(size.writers).unwrap_or(u32::MAX);
        let socket = BufReader::new(ours);
        let mut guest = Self { child, socket, guard, ram, writers, at_pause: Vec::new() };
        guest.ram.hva = HostVirtAddr(guest.answer()?.hva);
        Ok(guest)
    }

    /// Its memory.
    pub fn ram(&self) -> &RamBlock {
        &self.ram
    }

    /// The counters in the last pause.
    pub fn counters_at_pause(&self) -> &[u64] {
        &self.at_pause
    }

    /// Asks the guest; returns its counters.
    pub fn ask(&mut self, request: Request) -> Result<Vec<u64>, GuestError> {
        let send = || -> io::Result<()> {
            let line = serde_json::to_string(&request)?;
            writeln!(self.socket.get_ref(), "{line}")
        };
        send().map_err(GuestError::Lost)?;
        Ok(self.answer()?.counters)
    }

    fn answer(&mut self) -> Result<Answer, GuestError> {
        let mut line = String::new();
        let mut read = || -> io::Result<Answer> {
            self.socket.read_line(&mut line)?;
            Ok(serde_json::from_str(&line)?)
        };
        read().map_err(GuestError::Lost)
    }
}

impl Drop for GuestProcess {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vmm for GuestProcess {
    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn describe(&mut self) -> Result<MachineDescription, VmmError> {
        Ok(MachineDescription {
            vmm: "livesnap-demo".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            machine_type: "demo".into(),
            cpus: self.writers,
            ..MachineDescription::default()
        })
    }

    fn ram_layout(&mut self) -> Result<RamLayout, VmmError> {
        RamLayout::new(vec![self.ram.clone()])
            .map_err(|error| VmmError::new(Reason::Internal, error))
    }

    fn userfaultfd(&mut self) -> Result<OwnedFd, VmmError> {
        let made = self.guard.userfaultfd(self.pid(), Source::Syscall);
        Ok(made.map_err(GuestError::from)?)
    }

    fn prepare_disks(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<RunState, VmmError> {
        self.at_pause = self.ask(Request::Pause)?;
        Ok(RunState::Running)
    }

    fn device_state(&mut self) -> Result<DeviceState, VmmError> {
        let bytes = self.at_pause.iter().flat_map(|counter| counter.to_le_bytes());
        Ok(DeviceState::Opaque(bytes.collect()))
    }

    fn switch_disks(&mut self) -> Result<DiskSnapshot, VmmError> {
        Ok(DiskSnapshot::default())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.ask(Request::Resume)?;
        Ok(())
    }

    fn check(&mut self) -> Result<(), VmmError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(GuestError::Lost(io::Error::other(status.to_string())).into()),
            Err(error) => Err(GuestError::Lost(error).into()),
        }
    }

    fn finish(&mut self, _outcome: Outcome) -> Result<(), VmmError> {
        Ok(())
    }
}
