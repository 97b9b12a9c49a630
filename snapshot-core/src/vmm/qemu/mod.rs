//! QEMU, driven from outside through its monitor: an unmodified, running, stock QEMU.
//!
//! [`QemuVmm`] implements [`Vmm`]. Everything runs on the session's thread; only the
//! [guard](super::guard) is a process of its own. Commands that stop, start or ask QEMU go through
//! [`qmp`]; what they mean for one concern stands in one module each.

pub mod command_line;
pub mod device_state;
pub mod disks;
pub mod incoming;
pub mod preflight;
pub mod qmp;
pub mod ram_blocks;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::{Value, json};

use self::device_state::{DeviceStateError, Slot};
use self::disks::{DiskError, Disks};
use self::preflight::{Purpose, Refusal, Survey};
use self::qmp::{Event, Qmp, QmpError};
use self::ram_blocks::RamBlocksError;
use super::attach::Source;
use super::fd_passing::wait_for;
use super::guard::{Guard, GuardError};
use super::{DeviceState, DiskSnapshot, MachineDescription, Outcome, RunState, Vmm, VmmError};
use crate::Reason;
use crate::mappings::{MappingError, RamMapping};
use crate::ram::RamLayout;
use crate::sys::uffd::DEVICE;

/// Name under which QEMU keeps our descriptor of it, for a moment.
const FD_NAME: &str = "livesnap-userfaultfd";
/// A dying QEMU's monitor closes so long before the process has ended, at most.
const END_LIMIT: Duration = Duration::from_millis(500);

/// How to reach a QEMU and how to treat it.
#[derive(Clone, Debug)]
pub struct QemuOptions {
    /// A QMP socket that no other program holds.
    pub qmp_socket: PathBuf,
    /// QEMU's process, where it is not the one that made the socket (libvirt makes it itself).
    pub pid: Option<Pid>,
    /// Whether the disks are part of the snapshot.
    pub disks: bool,
    /// Where overlays are put; beside each image by default.
    pub overlay_dir: Option<PathBuf>,
    /// Longest time that the guest may stand still; afterwards it is continued and the snapshot fails.
    pub pause_limit: Duration,
    /// Longest time that QEMU may take for an answer while the guest runs.
    pub command_timeout: Duration,
    /// Longest time for merging overlays back after a failure.
    pub merge_limit: Duration,
    /// What starts a [guard](super::guard) process.
    pub guard_command: Vec<OsString>,
}

impl QemuOptions {
    /// Defaults for the QEMU behind `qmp_socket`.
    #[must_use]
    pub fn new(qmp_socket: PathBuf) -> Self {
        Self {
            qmp_socket,
            pid: None,
            disks: true,
            overlay_dir: None,
            pause_limit: Duration::from_secs(2),
            command_timeout: Duration::from_secs(10),
            merge_limit: Duration::from_mins(2),
            guard_command: Guard::own_command(),
        }
    }
}

/// What went wrong with QEMU.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// On the control socket.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// With the guard or the injection it does.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// With the list of RAM blocks.
    #[error(transparent)]
    RamBlocks(#[from] RamBlocksError),
    /// With the mappings behind them.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// With the device state.
    #[error(transparent)]
    DeviceState(#[from] DeviceStateError),
    /// With a disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The preflight found what forbids a snapshot.
    #[error("{}", preflight::in_words(Purpose::Snapshot, .0))]
    Refused(Vec<Refusal>),
    /// The preflight found what forbids measuring the dirty rate.
    #[error("{}", preflight::in_words(Purpose::DirtyRate, .0))]
    Unmeasurable(Vec<Refusal>),
    /// The kernel does not tell who serves the socket.
    #[error(
        "cannot tell which process serves the QMP socket {path}: it lies outside this PID namespace; give its process id"
    )]
    UnknownProcess {
        /// The socket.
        path: PathBuf,
    },
    /// QEMU's process cannot be looked at.
    #[error(
        "cannot look at QEMU's process {pid}: {source}: check that it runs and that livesnap is root"
    )]
    Process {
        /// The process.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// /dev/userfaultfd cannot be opened.
    #[error(
        "cannot open {DEVICE}: {source}: Linux 6.1 or later and root, or access to it, are needed"
    )]
    NoUserfaultfd {
        /// Errno.
        source: io::Error,
    },
    /// QEMU has taken our descriptor but it is not among its own.
    #[error(
        "QEMU {pid} does not have the descriptor it was sent: the process is not the one behind the QMP socket; give its process id"
    )]
    DescriptorLost {
        /// The process.
        pid: i32,
    },
    /// QEMU ended.
    #[error("QEMU's process {pid} has ended")]
    Died {
        /// The process.
        pid: i32,
    },
    /// The guest was not in a state to be paused, or did not stay paused.
    #[error("the virtual machine is {status:?} {when}: {remedy}")]
    RunState {
        /// QEMU's run state.
        status: String,
        /// At which moment.
        when: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The limit of the pause.
    #[error(
        "the pause took longer than {limit:?} and was ended: allow a longer pause, or snapshot when the host is less busy"
    )]
    PauseTooLong {
        /// The limit.
        limit: Duration,
    },
    /// A call came outside the pause.
    #[error("the virtual machine is not paused by this session")]
    NotPaused,
    /// RAM was plugged or unplugged.
    #[error("guest RAM was plugged, unplugged or resized since the snapshot began: try again")]
    RamChanged,
    /// Something gave pages away.
    #[error(
        "{what} while RAM was being saved, so pages may be lost: leave the balloon and memory devices alone during a snapshot"
    )]
    PagesDiscarded {
        /// What was seen.
        what: String,
    },
}

impl QemuError {
    /// Stable code.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Qmp(error) | Self::DeviceState(DeviceStateError::Qmp(error)) => error.reason(),
            Self::Guard(error) => error.reason(),
            Self::RamBlocks(RamBlocksError::Qmp(error)) => error.reason(),
            Self::RamBlocks(_) | Self::DeviceState(DeviceStateError::Form { .. }) => {
                Reason::VmmRefused
            }
            Self::DeviceState(DeviceStateError::Buffer(_)) | Self::NotPaused => Reason::Internal,
            Self::Disk(error) => error.reason(),
            Self::Refused(refusals) | Self::Unmeasurable(refusals) => {
                refusals.first().map_or(Reason::Internal, |refusal| refusal.reason)
            }
            Self::Mapping(_)
            | Self::UnknownProcess { .. }
            | Self::Process { .. }
            | Self::DescriptorLost { .. } => Reason::NoProcess,
            Self::NoUserfaultfd { source } if source.kind() == io::ErrorKind::NotFound => {
                Reason::KernelUnfit
            }
            Self::NoUserfaultfd { .. } => Reason::MissingPrivilege,
            Self::Died { .. } => Reason::VmmDied,
            Self::RunState { .. } => Reason::BadRunState,
            Self::PauseTooLong { .. } => Reason::PauseTooLong,
            Self::RamChanged | Self::PagesDiscarded { .. } => Reason::PagesDiscarded,
        }
    }
}

impl From<QemuError> for VmmError {
    fn from(error: QemuError) -> Self {
        Self::new(error.reason(), error)
    }
}

/// A pause that this session began.
#[derive(Debug)]
struct Pause {
    found: RunState,
    until: Instant,
}

/// A running QEMU, fit for a snapshot.
#[derive(Debug)]
pub struct QemuVmm {
    options: QemuOptions,
    qmp: Qmp,
    process: QemuProcess,
    guard: Guard,
    machine: MachineDescription,
    layout: RamLayout,
    /// As the preflight saw them.
    mappings: Vec<RamMapping>,
    disks: Disks,
    state_slot: Option<Slot>,
    /// What the balloon left the guest when RAM was protected, in bytes; none without a balloon.
    ballooned_bytes: Option<u64>,
    pause: Option<Pause>,
}

/// QEMU's process.
#[derive(Debug)]
pub(crate) struct QemuProcess {
    pub(crate) pid: Pid,
    /// Keeps the number from being taken for another process's.
    pidfd: OwnedFd,
}

impl QemuProcess {
    fn of(qmp: &Qmp, options: &QemuOptions) -> Result<Self, QemuError> {
        let peer = || {
            let credentials = rustix::net::sockopt::socket_peercred(qmp.socket()).ok()?;
            // 0 stands for a process that is not visible from here.
            (credentials.pid.as_raw_nonzero().get() > 0).then_some(credentials.pid)
        };
        let pid = options
            .pid
            .or_else(peer)
            .ok_or_else(|| QemuError::UnknownProcess { path: options.qmp_socket.clone() })?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| QemuError::Process {
            pid: pid.as_raw_nonzero().get(),
            source: errno.into(),
        })?;
        Ok(Self { pid, pidfd })
    }

    pub(crate) fn number(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    pub(crate) fn failed(&self, source: impl Into<io::Error>) -> QemuError {
        QemuError::Process { pid: self.number(), source: source.into() }
    }

    fn ends_within(&self, limit: Duration) -> bool {
        wait_for(&self.pidfd, PollFlags::IN, Some(Instant::now() + limit)).unwrap_or(true)
    }
}

/// Everything that can be learned of a QEMU without touching its guest, for forecasts and reports.
///
/// # Errors
/// If QEMU cannot be asked. What forbids a snapshot is no error but part of the answer.
pub fn survey(options: &QemuOptions) -> Result<Survey, QemuError> {
    let mut qmp = Qmp::connect(&options.qmp_socket, options.command_timeout)?;
    let process = QemuProcess::of(&qmp, options)?;
    preflight::survey(&mut qmp, &process, options)
}

impl QemuVmm {
    /// Connects, checks everything that can forbid a snapshot, and starts the guard. Nothing of the guest
    /// is touched.
    ///
    /// # Errors
    /// [`QemuError::Refused`] with all that the preflight found, or if QEMU cannot be asked.
    pub fn attach(options: QemuOptions) -> Result<Self, QemuError> {
        Self::attach_for(options, Purpose::Snapshot)
    }

    /// Connects, checks everything that can forbid measuring the [dirty rate](crate::dirty_rate), and starts the
    /// guard. Nothing of the guest is touched.
    ///
    /// # Errors
    /// [`QemuError::Unmeasurable`] with all that the preflight found, or if QEMU cannot be asked.
    pub fn attach_to_measure(options: QemuOptions) -> Result<Self, QemuError> {
        Self::attach_for(options, Purpose::DirtyRate)
    }

    fn attach_for(options: QemuOptions, purpose: Purpose) -> Result<Self, QemuError> {
        let mut qmp = Qmp::connect(&options.qmp_socket, options.command_timeout)?;
        let process = QemuProcess::of(&qmp, &options)?;
        let Survey { machine, layout, mappings, disks, refusals, .. } =
            preflight::survey(&mut qmp, &process, &options)?;
        let refusals = purpose.forbidden_by(refusals);
        if !refusals.is_empty() {
            return Err(match purpose {
                Purpose::Snapshot => QemuError::Refused(refusals),
                Purpose::DirtyRate => QemuError::Unmeasurable(refusals),
            });
        }
        let guard = Guard::start(&options.guard_command)?;
        guard.watch(qmp.socket())?;
        let disks = Disks::new(disks, &options);
        Ok(Self {
            options,
            qmp,
            process,
            guard,
            machine,
            layout,
            mappings,
            disks,
            state_slot: None,
            ballooned_bytes: None,
            pause: None,
        })
    }

    /// The threads that run the virtual CPUs, in the order of the CPUs.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn cpu_threads(&mut self) -> Result<Vec<Pid>, QemuError> {
        cpu_threads(&mut self.qmp, self.options.command_timeout)
    }

    /// Runs a command that belongs to no pause.
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QemuError> {
        Ok(self.qmp.execute(command, arguments, self.options.command_timeout)?)
    }

    fn create_userfaultfd(&mut self) -> Result<OwnedFd, QemuError> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open(DEVICE)
            .map_err(|source| QemuError::NoUserfaultfd { source })?;
        let limit = self.options.command_timeout;
        self.qmp.execute_with_fd("getfd", json!({"fdname": FD_NAME}), device.as_fd(), limit)?;
        let created = self.find_device(&device).and_then(|number| {
            Ok(self.guard.userfaultfd(self.process.pid, Source::DevFd(number))?)
        });
        let closed = self.execute("closefd", json!({"fdname": FD_NAME}));
        let created = created?;
        closed?;
        Ok(created)
    }

    /// The number under which QEMU has `device` open; which of several does not matter.
    fn find_device(&self, device: &std::fs::File) -> Result<i32, QemuError> {
        let wanted = device.metadata().map_err(|error| self.process.failed(error))?.rdev();
        let directory = format!("/proc/{}/fd", self.process.number());
        let entries = std::fs::read_dir(directory).map_err(|error| self.process.failed(error))?;
        entries
            .flatten()
            .filter(|entry| std::fs::metadata(entry.path()).is_ok_and(|file| file.rdev() == wanted))
            .find_map(|entry| entry.file_name().to_str()?.parse().ok())
            .ok_or(QemuError::DescriptorLost { pid: self.process.number() })
    }

    fn status(&mut self, limit: Duration) -> Result<String, QemuError> {
        let status = self.qmp.execute("query-status", json!({}), limit)?;
        Ok(status["status"]
            .as_str()
            .ok_or_else(|| QmpError::lacks("query-status", "status"))?
            .to_owned())
    }

    fn shorten_pause(&mut self) -> Result<(), QemuError> {
        let limit = self.options.command_timeout;
        if ram_blocks::query(&mut self.qmp, limit)?.blocks() != self.layout.blocks() {
            return Err(QemuError::RamChanged);
        }
        self.state_slot = Some(Slot::open(&mut self.qmp, limit)?);
        self.ballooned_bytes = self.ask_balloon()?;
        // What `stop` need not flush any more does not count for the pause.
        self.disks.flush();
        Ok(())
    }

    fn close_state_slot(&mut self) {
        if let Some(slot) = self.state_slot.take() {
            slot.close(&mut self.qmp, self.options.command_timeout);
        }
    }

    fn begin_pause(&mut self) -> Result<RunState, QemuError> {
        let limit = self.options.command_timeout;
        let status = self.status(limit)?;
        let found = preflight::run_state(&status).ok_or(QemuError::RunState {
            status,
            when: "before the pause",
            remedy: preflight::RUN_STATE_REMEDY,
        })?;
        let until = Instant::now() + self.options.pause_limit;
        if found == RunState::Running {
            self.guard.arm(self.options.pause_limit)?;
            // `cont` has time to be answered behind a `stop` that still flushes disks; with what comes after it, no more.
            self.qmp.give_up_at(Some(until + limit));
        }
        self.pause = Some(Pause { found, until });
        if found == RunState::Running
            && let Err(error) = self.stop()
        {
            // It may have stopped all the same.
            self.end_pause()?;
            return Err(error);
        }
        Ok(found)
    }

    fn stop(&mut self) -> Result<(), QemuError> {
        let limit = self.pause_left()?;
        self.qmp.execute("stop", json!({}), limit)?;
        Ok(())
    }

    /// What was saved is of one instant only if nobody else continued it meanwhile.
    fn expect_paused(&mut self) -> Result<(), QemuError> {
        let limit = self.pause_left()?;
        let status = self.status(limit)?;
        if preflight::run_state(&status) == Some(RunState::Paused) {
            return Ok(());
        }
        let remedy = "another program stops and continues it; let only one at a time";
        Err(QemuError::RunState { status, when: "at the end of the pause", remedy })
    }

    /// What is left of the pause; an error when nothing is.
    fn pause_left(&self) -> Result<Duration, QemuError> {
        let pause = self.pause.as_ref().ok_or(QemuError::NotPaused)?;
        match (pause.found, pause.until.saturating_duration_since(Instant::now())) {
            // Nobody waits for a guest that stood still before.
            (RunState::Paused, _) => Ok(self.options.command_timeout),
            (RunState::Running, Duration::ZERO) => {
                Err(QemuError::PauseTooLong { limit: self.options.pause_limit })
            }
            (RunState::Running, left) => Ok(left),
        }
    }

    fn end_pause(&mut self) -> Result<(), QemuError> {
        let Some(pause) = &self.pause else { return Ok(()) };
        let found = pause.found;
        let still_paused = self.expect_paused();
        if found == RunState::Paused {
            self.pause = None;
            return still_paused;
        }
        // Whatever else went wrong: this is the command that counts. Should it fail, the guard is armed.
        self.execute("cont", json!({}))?;
        self.qmp.give_up_at(None);
        self.pause = None;
        match self.guard.disarm() {
            Ok(false) => still_paused,
            Ok(true) => Err(QemuError::PauseTooLong { limit: self.options.pause_limit }),
            // The guest runs: there is nothing left to guard.
            Err(error) => {
                tracing::warn!(%error, "the guard was lost in the pause");
                still_paused
            }
        }
    }

    /// From QEMU's last STOP to the RESUME that followed it, both of which came before the answer to `cont`.
    fn last_pause(&self) -> Option<Duration> {
        let mut events = self.qmp.pending_events().rev();
        let resumed = events.find(|event| event.name == "RESUME")?.time()?;
        let stopped = events.find(|event| event.name == "STOP")?.time()?;
        resumed.checked_sub(stopped)
    }

    fn look(&mut self) -> Result<(), QemuError> {
        self.close_state_slot();
        let died = || QemuError::Died { pid: self.process.number() };
        if self.process.ends_within(Duration::ZERO) {
            return Err(died());
        }
        let events = self.qmp.take_events().map_err(|error| match error {
            QmpError::Closed { .. } if self.process.ends_within(END_LIMIT) => died(),
            error => error.into(),
        })?;
        match events.into_iter().find(discards_pages) {
            Some(event) => {
                Err(QemuError::PagesDiscarded { what: format!("QEMU reported {}", event.name) })
            }
            None => Ok(()),
        }
    }

    /// How much the balloon leaves the guest, in bytes.
    fn ask_balloon(&mut self) -> Result<Option<u64>, QemuError> {
        match self.execute("query-balloon", json!({})) {
            Ok(balloon) => Ok(balloon["actual"].as_u64()),
            // There is none.
            Err(QemuError::Qmp(QmpError::Refused { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// QEMU tells of a balloon's changes once a second at most, so the last ones may not have been told.
    fn look_at_balloon(&mut self) -> Result<(), QemuError> {
        let Some(before) = self.ballooned_bytes else { return Ok(()) };
        match self.ask_balloon()? {
            Some(now) if now != before => Err(QemuError::PagesDiscarded {
                what: format!("the balloon went from {before} to {now} bytes left to the guest"),
            }),
            _ => Ok(()),
        }
    }
}

/// Whether `event` tells that guest pages were given back to the host.
fn discards_pages(event: &Event) -> bool {
    matches!(event.name.as_str(), "BALLOON_CHANGE" | "MEMORY_DEVICE_SIZE_CHANGE")
}

impl Vmm for QemuVmm {
    fn pid(&self) -> Pid {
        self.process.pid
    }

    fn describe(&mut self) -> Result<MachineDescription, VmmError> {
        Ok(self.machine.clone())
    }

    fn ram_layout(&mut self) -> Result<RamLayout, VmmError> {
        Ok(self.layout.clone())
    }

    fn ram_mappings(&mut self, _layout: &RamLayout) -> Result<Vec<RamMapping>, MappingError> {
        Ok(self.mappings.clone())
    }

    fn userfaultfd(&mut self) -> Result<OwnedFd, VmmError> {
        Ok(self.create_userfaultfd()?)
    }

    fn prepare_disks(&mut self) -> Result<(), VmmError> {
        Ok(self.disks.prepare(&mut self.qmp).map_err(QemuError::from)?)
    }

    fn prepare_pause(&mut self) -> Result<(), VmmError> {
        Ok(self.shorten_pause()?)
    }

    fn pause(&mut self) -> Result<RunState, VmmError> {
        Ok(self.begin_pause()?)
    }

    fn device_state(&mut self) -> Result<DeviceState, VmmError> {
        let limit = self.pause_left()?;
        let slot = match self.state_slot.take() {
            Some(slot) => slot,
            None => Slot::open(&mut self.qmp, limit).map_err(QemuError::from)?,
        };
        let saved = slot.save(&mut self.qmp, limit).map_err(QemuError::from);
        // Taken from QEMU when the guest runs again.
        self.state_slot = Some(slot);
        let sections = saved?;
        Ok(DeviceState::QemuSections(sections))
    }

    fn switch_disks(&mut self) -> Result<DiskSnapshot, VmmError> {
        let limit = self.pause_left()?;
        Ok(self.disks.switch(&mut self.qmp, limit).map_err(QemuError::from)?)
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        Ok(self.end_pause()?)
    }

    fn stood_still(&self) -> Option<Duration> {
        self.last_pause()
    }

    fn check(&mut self) -> Result<(), VmmError> {
        Ok(self.look()?)
    }

    fn check_saved(&mut self) -> Result<(), VmmError> {
        self.look_at_balloon()?;
        Ok(self.look()?)
    }

    fn finish(&mut self, outcome: Outcome) -> Result<(), VmmError> {
        // Should the session have gone wrong before it resumed.
        let resumed = self.end_pause();
        self.close_state_slot();
        self.disks.finish(&mut self.qmp, outcome).map_err(QemuError::from)?;
        Ok(resumed?)
    }
}

/// The threads that run the virtual CPUs, in the order of the CPUs.
fn cpu_threads(qmp: &mut Qmp, limit: Duration) -> Result<Vec<Pid>, QemuError> {
    let cpus = qmp.execute("query-cpus-fast", json!({}), limit)?;
    let cpus = cpus.as_array().ok_or_else(|| QmpError::lacks("query-cpus-fast", "list"))?;
    let thread = |cpu: &Value| Pid::from_raw(i32::try_from(cpu["thread-id"].as_i64()?).ok()?);
    cpus.iter()
        .map(|cpu| {
            thread(cpu).ok_or_else(|| QmpError::lacks("query-cpus-fast", "thread-id").into())
        })
        .collect()
}

/// The machine as QEMU and its process describe it.
fn describe(
    qmp: &mut Qmp,
    process: &QemuProcess,
    limit: Duration,
) -> Result<MachineDescription, QemuError> {
    let version = qmp.execute("query-version", json!({}), limit)?;
    let number = |part: &str| version["qemu"][part].as_u64().unwrap_or_default();
    let kind = qmp.execute("qom-get", json!({"path": "/machine", "property": "type"}), limit)?;
    let kind = kind.as_str().ok_or_else(|| QmpError::lacks("qom-get", "machine type"))?;
    let cpus = qmp.execute("query-cpus-fast", json!({}), limit)?;
    let cpus = cpus.as_array().ok_or_else(|| QmpError::lacks("query-cpus-fast", "list"))?.len();
    // Not by procfs, which drops empty arguments.
    let arguments = std::fs::read(format!("/proc/{}/cmdline", process.number()))
        .map_err(|error| process.failed(error))?;
    let arguments = arguments.strip_suffix(b"\0").unwrap_or(&arguments);
    Ok(MachineDescription {
        vmm: "qemu".into(),
        version: format!("{}.{}.{}", number("major"), number("minor"), number("micro")),
        machine_type: kind.strip_suffix("-machine").unwrap_or(kind).into(),
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        command_line: arguments
            .split(|&byte| byte == 0)
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect(),
        working_dir: std::fs::read_link(format!("/proc/{}/cwd", process.number())).ok(),
    })
}
