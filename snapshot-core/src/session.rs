//! A snapshot from its first question to its last `fsync`, in the order that the invariants ask for.
//!
//! ```text
//! preparing   ask the VMM, refuse what cannot work, reserve; nothing of the guest is changed
//! arming      contexts, fault threads, writer; protect RAM in rounds while the guest runs
//! frozen      pause, device state, protect the remainder ── consistency point ── disks, resume
//! copying     sweep and faults save every page
//! draining    RAM is unprotected; the copy buffer goes to disk
//! committing  tables, manifest, sync, rename
//! ```
//!
//! Every way out before the end unprotects RAM, resumes the guest if it was running, and leaves nothing that
//! looks like a snapshot. [`snapshot`] runs on the caller's thread; its own threads end before it returns.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{EventfdFlags, eventfd};

use crate::Reason;
use crate::address::PAGE_BYTES;
use crate::arm::{self, Rounds};
use crate::buffer::{Buffer, EXTENT_BYTES};
use crate::capture::{CaptureError, Engine, Mode};
use crate::footprint::{NoSpace, lacks_space, size_max_bytes};
use crate::image::{FilePlan, ImageError, SnapshotFacts, Staging};
use crate::mappings::{MappingError, MappingKind, RamMapping};
use crate::pace::{BandwidthLimit, Pace};
use crate::pagemap::Pagemap;
use crate::protection::{ProtectedRam, RegisterError};
use crate::ram::RamLayout;
use crate::report::{Captured, Downtime, Phase, Progress, Report};
use crate::storage::{self, Storage};
use crate::sys::uffd::{Context, Features};
use crate::vmm::{DeviceState, DiskSnapshot, MachineDescription, Outcome, RunState, Vmm, VmmError};
use crate::writer::{self, Stored};
use crate::{fault, sweep};

/// How often progress is told and the VMM looked after, while RAM is being copied.
const TICK: Duration = Duration::from_millis(50);

/// Part of the copy buffer, at most half of it, that is made before the pause, so that no fault waits for the
/// kernel to find and clear memory.
const READY_BYTES: u64 = 64 << 20;

/// Least copy buffer: an extent being filled by each fault thread and the sweep, and some being written.
pub const BUFFER_BYTES_MIN: u64 = 16 << 20;

/// What the caller may choose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bound of the copy buffer in bytes, at least [`BUFFER_BYTES_MIN`], and 8 MiB and 4 MiB for each context.
    pub buffer_bytes: u64,
    /// Moves that bound while the session runs.
    pub buffer_limit: BufferLimit,
    /// Most bytes to write a second; nothing means as fast as the disk takes them. What the guest touches has to be
    /// written too: below the rate at which it does, the buffer fills, and then the guest's writes wait.
    pub max_bandwidth: BandwidthLimit,
    /// Userfaultfd contexts, each with a fault thread; nothing means one for every four virtual CPUs.
    pub contexts: Option<usize>,
    /// Longest pause; beyond it the guest is resumed and the session fails.
    pub pause_limit: Duration,
    /// Ways to go wrong, for tests that must be able to fail.
    #[cfg(feature = "controls")]
    pub controls: Controls,
}

/// Defects to order: the controls of the project's tests.
#[cfg(feature = "controls")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Controls {
    /// Saves pages without having protected them.
    pub without_protection: bool,
    /// Behaves as on a kernel before 6.4, which does not protect pages that do not exist.
    pub without_wp_unpopulated: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            buffer_bytes: 256 << 20,
            buffer_limit: BufferLimit::default(),
            max_bandwidth: BandwidthLimit::default(),
            contexts: None,
            pause_limit: Duration::from_secs(2),
            #[cfg(feature = "controls")]
            controls: Controls::default(),
        }
    }
}

impl Options {
    fn is_protecting(&self) -> bool {
        #[cfg(feature = "controls")]
        if self.controls.without_protection {
            return false;
        }
        true
    }

    fn usable(&self, offered: Features) -> Features {
        #[cfg(feature = "controls")]
        if self.controls.without_wp_unpopulated {
            return Features(offered.0 & !Features::UNPOPULATED.0);
        }
        offered
    }
}

/// Moves the copy buffer's bound while a session runs, from `observe` or from another thread.
///
/// Clones move the same bound. A smaller one comes into force as copies reach the disk; it is never less than what is
/// in use, nor than the least that [`Options::buffer_bytes`] may be.
#[derive(Clone, Debug, Default)]
pub struct BufferLimit(Arc<AtomicU64>);

impl BufferLimit {
    /// Asks for a bound in bytes; the session follows right after the next call of `observe`.
    pub fn set_bytes(&self, limit_bytes: u64) {
        self.0.store(limit_bytes, Ordering::Release);
    }

    /// What was asked for last, in bytes.
    #[must_use]
    pub fn wanted_bytes(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Acquire)).filter(|&bytes| bytes > 0)
    }
}

/// Lets another thread, or a signal handler, end a session.
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    flag: Arc<AtomicBool>,
    abort: Arc<OnceLock<Abort>>,
}

/// Why another party gives a session up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Abort {
    /// The stable code.
    pub reason: Reason,
    /// One sentence: what cannot be, by what evidence, and what to do.
    pub text: String,
}

impl From<Arc<AtomicBool>> for Cancel {
    /// Ends the session once `flag` is true; signal handlers can set one.
    fn from(flag: Arc<AtomicBool>) -> Self {
        Self { flag, abort: Arc::default() }
    }
}

impl Cancel {
    /// Asks the session to end; it does so within some 50 ms, or within its present request to the VMM.
    pub fn cancel(&self) {
        self.flag.store(true, Ordering::Release);
    }

    /// The same, with a reason of the caller's own. The first reason counts, and none of them once the session was
    /// cancelled without.
    pub fn abort(&self, abort: Abort) {
        if !self.is_cancelled() {
            self.abort.get_or_init(|| abort);
            self.cancel();
        }
    }

    /// Whether it was asked to.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }

    fn cause(&self) -> Cause {
        self.abort.get().map_or(Cause::Cancelled, |abort| Cause::Aborted(abort.clone()))
    }
}

/// Why there is no snapshot. The guest is unprotected, and runs if it was running.
#[derive(Debug, thiserror::Error)]
#[error("{cause}{}", leftover.as_ref().map(|left| format!("; moreover, {left}")).unwrap_or_default())]
pub struct SessionError {
    /// Where the session was.
    pub phase: Phase,
    /// What ended it.
    #[source]
    pub cause: Cause,
    /// What could not be undone.
    pub leftover: Option<VmmError>,
}

impl SessionError {
    /// The stable code.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.cause.reason()
    }
}

/// What ended a session.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// Guest memory or the destination, while pages were saved.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The snapshot's files.
    #[error(transparent)]
    Image(Box<ImageError>),
    /// The VMM process's mappings.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// RAM on a file system whose pages cannot be write-protected.
    #[error(
        "guest RAM at {start} is backed by {path:?}, which cannot be write-protected: back it with anonymous memory, memfd, tmpfs or huge pages"
    )]
    FileBacked {
        /// First address of the mapping.
        start: crate::address::HostVirtAddr,
        /// The file.
        path: Option<PathBuf>,
    },
    /// Pages that take too long to copy.
    #[error(
        "guest RAM at {start} is made of {page_bytes}-byte huge pages, more than the {} bytes that can be copied while a virtual CPU waits: use 2 MiB huge pages",
        EXTENT_BYTES
    )]
    HugePageSize {
        /// First address of the mapping.
        start: crate::address::HostVirtAddr,
        /// Page size of the pool.
        page_bytes: u64,
    },
    /// Registration was refused.
    #[error(
        "{0}: make sure that no other snapshot or migration uses userfaultfd on this virtual machine"
    )]
    Register(#[from] RegisterError),
    /// The kernel has no usable userfaultfd, or does not let us have it.
    #[error(
        "cannot use userfaultfd: {source}: it needs Linux 5.19 or later, and root, CAP_SYS_PTRACE or access to /dev/userfaultfd"
    )]
    Userfaultfd {
        /// `EPERM`, `EACCES`: privilege. Else: support.
        source: io::Error,
    },
    /// The kernel lacks features.
    #[error(
        "this kernel's userfaultfd lacks write protection of {missing}: use Linux 5.19 or later"
    )]
    KernelUnfit {
        /// What is missing.
        missing: &'static str,
    },
    /// There is not enough space.
    #[error(transparent)]
    NoSpace(#[from] NoSpace),
    /// The buffer is too small to work with.
    #[error("a copy buffer of {buffer_bytes} bytes is too small: give at least {least_bytes}")]
    BufferTooSmall {
        /// Asked for.
        buffer_bytes: u64,
        /// Needed.
        least_bytes: u64,
    },
    /// The pause took too long.
    #[error(
        "the pause reached {limit:?} {before}, so the guest was resumed without a snapshot: take it when the host's disks are less busy, or allow a longer pause"
    )]
    PauseTooLong {
        /// The limit.
        limit: Duration,
        /// What had not been done yet.
        before: &'static str,
    },
    /// Somebody asked for it.
    #[error("cancelled: the guest runs on, and nothing is left of the snapshot")]
    Cancelled,
    /// Another party gave it up, for a reason of its own.
    #[error(transparent)]
    Aborted(Abort),
    /// A system call of the session's own failed.
    #[error("cannot {operation}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
}

impl From<ImageError> for Cause {
    fn from(error: ImageError) -> Self {
        Self::Image(Box::new(error))
    }
}

impl Cause {
    fn reason(&self) -> Reason {
        match self {
            Self::Vmm(error) => error.reason,
            Self::Capture(error) => error.reason(),
            Self::Image(error) => error.reason(),
            Self::Mapping(_) => Reason::NoProcess,
            Self::FileBacked { .. } => Reason::FileBackedRam,
            Self::HugePageSize { .. } => Reason::HugePageSize,
            Self::Register(RegisterError::Register { source, .. }) => match source.raw_os_error() {
                Some(libc::EBUSY) => Reason::ForeignUserfaultfd,
                Some(libc::EINVAL) => Reason::FileBackedRam,
                _ => Reason::Memory,
            },
            Self::Register(RegisterError::MapFile { .. }) => Reason::MissingPrivilege,
            Self::Userfaultfd { source } => match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => Reason::MissingPrivilege,
                _ => Reason::KernelUnfit,
            },
            Self::KernelUnfit { .. } => Reason::KernelUnfit,
            Self::NoSpace(_) => Reason::NoSpace,
            Self::BufferTooSmall { .. } => Reason::BadArgument,
            Self::PauseTooLong { .. } => Reason::PauseTooLong,
            Self::Cancelled => Reason::Cancelled,
            Self::Aborted(abort) => abort.reason,
            Self::System { .. } => Reason::Internal,
        }
    }
}

fn system(operation: &'static str) -> impl FnOnce(io::Error) -> Cause {
    move |source| Cause::System { operation, source }
}

/// Takes a snapshot of `vmm`'s guest into the directory `destination`, which must not exist or be empty.
///
/// `observe` is called on this thread at every change of phase, at the consistency point, where the guest stands still
/// as long as it takes, and about twenty times a second.
///
/// # Errors
/// If there is no snapshot. The guest is then as it was found, with exceptions named in
/// [`SessionError::leftover`].
pub fn snapshot(
    vmm: &mut dyn Vmm,
    destination: &Path,
    options: &Options,
    cancel: &Cancel,
    observe: &mut dyn FnMut(&Progress),
) -> Result<Report, SessionError> {
    let mut session = Session {
        options,
        cancel,
        observe,
        began: Instant::now(),
        phase: Phase::Preparing,
        is_consistent: false,
        downtime: Downtime::default(),
        rounds: 0,
        remainder_pages: 0,
    };
    match session.run(vmm, destination) {
        Ok(mut report) => {
            if let Err(error) = vmm.finish(Outcome::Completed) {
                report.warnings.push(error.to_string());
            }
            session.enter(Phase::Completed, None);
            Ok(report)
        }
        Err(cause) => {
            let phase = session.phase;
            session.enter(Phase::Aborting, None);
            // The end of the VMM shows in many ways, of which its own is the plainest.
            let cause = match vmm.check() {
                Err(error) if error.reason == Reason::VmmDied => error.into(),
                _ => cause,
            };
            let leftover = vmm.resume().and(vmm.finish(Outcome::Failed)).err();
            session.enter(Phase::Failed, None);
            Err(SessionError { phase, cause, leftover })
        }
    }
}

struct Session<'a> {
    options: &'a Options,
    cancel: &'a Cancel,
    observe: &'a mut dyn FnMut(&Progress),
    began: Instant,
    phase: Phase,
    is_consistent: bool,
    downtime: Downtime,
    rounds: u32,
    remainder_pages: u64,
}

/// What the pause brings forth.
struct Frozen {
    taken_at: SystemTime,
    run_state: RunState,
    device_state: DeviceState,
    disks: DiskSnapshot,
}

/// When the stages of a session ended.
struct Times {
    prepared: Instant,
    armed: Instant,
    consistent: Instant,
    saved: Instant,
}

impl Session<'_> {
    fn run(&mut self, vmm: &mut dyn Vmm, destination: &Path) -> Result<Report, Cause> {
        self.enter(Phase::Preparing, None);
        let machine = vmm.describe()?;
        let layout = vmm.ram_layout()?;
        let mappings = vmm.ram_mappings(&layout)?;
        check_mappings(&mappings)?;
        let staging = Staging::create(destination)?;
        let needed_bytes = size_max_bytes(vmm.pid(), &layout, &mappings);
        if let Some(lacking) = lacks_space(staging.destination(), needed_bytes)? {
            return Err(lacking.into());
        }
        let plan = FilePlan::new(&machine.machine_type, &layout)?;
        let storage = storage::open(&staging.ram_path(), plan.trailer_offset())
            .map_err(|source| CaptureError::Storage { stage: "opening it", source })?;
        let engine = self.engine(vmm, layout, &mappings, machine.cpus)?;
        self.give_up_if_cancelled()?;
        vmm.prepare_disks()?;
        self.save(vmm, &engine, storage, &plan, staging, machine)
    }

    /// Contexts, buffer, page map: all that the threads share.
    fn engine(
        &self,
        vmm: &mut dyn Vmm,
        layout: RamLayout,
        mappings: &[RamMapping],
        cpus: u32,
    ) -> Result<Engine, Cause> {
        let count = self.options.contexts.unwrap_or((cpus as usize).div_ceil(4)).clamp(1, 16);
        let least_bytes = least_buffer_bytes(count);
        if self.options.buffer_bytes < least_bytes {
            let buffer_bytes = self.options.buffer_bytes;
            return Err(Cause::BufferTooSmall { buffer_bytes, least_bytes });
        }
        let features = self.features(mappings)?;
        let contexts = (0..count)
            .map(|_| {
                let fd = vmm.userfaultfd()?;
                Context::new(fd, features).map_err(|source| Cause::Userfaultfd { source })
            })
            .collect::<Result<Vec<_>, Cause>>()?;
        let pid = vmm.pid();
        let buffer = Buffer::new(self.options.buffer_bytes, READY_BYTES)
            .map_err(|source| CaptureError::NoMemory { source })?;
        let pagemap = Pagemap::open(pid).map_err(system("open the page map of the VMM"))?;
        let ram = ProtectedRam::register(pid, layout, mappings, contexts)?;
        let engine = Engine::new(pid, ram, buffer, pagemap);
        if !features.contains(Features::UNPOPULATED) && self.options.is_protecting() {
            engine.populate_holes()?;
        }
        Ok(engine)
    }

    fn features(&self, mappings: &[RamMapping]) -> Result<Features, Cause> {
        let offered = Features::of_this_kernel().map_err(|source| Cause::Userfaultfd { source })?;
        let usable = self.options.usable(offered);
        if !usable.contains(Features::REQUIRED) {
            return Err(Cause::KernelUnfit { missing: "memory" });
        }
        let has_shared = mappings.iter().any(|mapping| mapping.kind != MappingKind::Anonymous);
        if has_shared && !usable.contains(Features::SHARED) {
            return Err(Cause::KernelUnfit { missing: "shared memory and huge pages" });
        }
        Ok(usable)
    }

    /// Runs the threads around the pause and the copying; they have all ended when this returns.
    fn save(
        &mut self,
        vmm: &mut dyn Vmm,
        engine: &Engine,
        mut storage: Box<dyn Storage>,
        plan: &FilePlan,
        staging: Staging,
        machine: MachineDescription,
    ) -> Result<Report, Cause> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| system("make an eventfd")(error.into()))?;
        let storage_name = storage.name();
        let (frozen, stored, times) = std::thread::scope(|scope| {
            let pace = Pace::new(self.options.max_bandwidth.clone(), Instant::now());
            let write = || writer::run(engine, &mut *storage, plan, pace);
            let threads = Threads::start(scope, engine, &stop, write)?;
            let prepared = Instant::now();
            self.arm(vmm, engine)?;
            let armed = Instant::now();
            let frozen = self.freeze(vmm, engine)?;
            let consistent = Instant::now();
            self.copy(vmm, scope, engine)?;
            let saved = Instant::now();
            vmm.check_saved()?;
            let stored = self.drain(engine, threads)?;
            Ok::<_, Cause>((frozen, stored, Times { prepared, armed, consistent, saved }))
        })?;
        drop(storage);
        self.enter(Phase::Committing, Some(engine));
        self.give_up_if_cancelled()?;
        let mut report = self.report(engine, &times, &frozen, storage_name);
        let facts = SnapshotFacts {
            machine,
            run_state: frozen.run_state,
            disks: frozen.disks,
            taken_at: frozen.taken_at,
            report: serde_json::to_value(&report).unwrap_or_default(),
        };
        let layout = &engine.ram.layout;
        staging.commit(
            layout,
            plan,
            &stored.bitmap,
            &stored.checksums,
            &frozen.device_state,
            facts,
        )?;
        report.finish(self.began, times.consistent, times.saved);
        Ok(report)
    }

    /// Protects RAM while the guest runs, until little is left for the pause.
    fn arm(&mut self, vmm: &mut dyn Vmm, engine: &Engine) -> Result<(), Cause> {
        self.enter(Phase::Arming, Some(engine));
        if !self.options.is_protecting() {
            return Ok(vmm.prepare_pause()?);
        }
        let protect = |source| protect_failed(engine, source);
        arm::protect_all(&engine.ram).map_err(protect)?;
        // Before the rounds: meanwhile the guest writes.
        vmm.prepare_pause()?;
        let mut rounds = Rounds::default();
        loop {
            self.give_up_if_cancelled()?;
            give_up_if_failed(engine)?;
            let pages = arm::protect_marked(&engine.ram, &engine.marks).map_err(protect)?;
            if !rounds.go_on(pages) {
                self.rounds = rounds.done();
                return Ok(());
            }
        }
    }

    /// The pause. The guest is resumed whatever happens in it.
    fn freeze(&mut self, vmm: &mut dyn Vmm, engine: &Engine) -> Result<Frozen, Cause> {
        self.enter(Phase::Frozen, Some(engine));
        let began = Instant::now();
        let mut pause = Pause { vmm, is_over: false };
        let frozen = self.take_state(&mut pause, engine, began);
        let resuming = Instant::now();
        let resumed = pause.end();
        self.downtime.resume_ns = nanos(resuming.elapsed());
        self.downtime.stood_still_ns = vmm.stood_still().map(nanos);
        self.downtime.total_ns = nanos(began.elapsed());
        let frozen = frozen?;
        resumed?;
        self.check_pause(began, "until the guest ran again")?;
        Ok(frozen)
    }

    fn take_state(
        &mut self,
        pause: &mut Pause<'_>,
        engine: &Engine,
        began: Instant,
    ) -> Result<Frozen, Cause> {
        let mut lap = Lap(began);
        let run_state = pause.vmm.pause()?;
        self.downtime.pause_ns = lap.nanos();
        self.check_pause(began, "before device state was saved")?;
        let device_state = pause.vmm.device_state()?;
        self.downtime.device_state_ns = lap.nanos();
        self.check_pause(began, "before RAM was protected")?;
        let taken_at = self.make_consistent(engine)?;
        self.is_consistent = true;
        self.tell(Some(engine));
        self.downtime.protect_ns = lap.nanos();
        self.check_pause(began, "before the disks were switched")?;
        let disks = pause.vmm.switch_disks()?;
        self.downtime.disks_ns = lap.nanos();
        Ok(Frozen { taken_at, run_state, device_state, disks })
    }

    /// The consistency point: while no fault is being let through, protects what is marked and turns faults
    /// into captures. Device state comes before, because saving it may write guest RAM.
    fn make_consistent(&mut self, engine: &Engine) -> Result<SystemTime, Cause> {
        let mut mode = engine.mode.write().unwrap_or_else(PoisonError::into_inner);
        give_up_if_failed(engine)?;
        if self.options.is_protecting() {
            self.remainder_pages = arm::protect_marked(&engine.ram, &engine.marks)
                .map_err(|source| protect_failed(engine, source))?;
        }
        *mode = Mode::Capturing;
        Ok(SystemTime::now())
    }

    fn check_pause(&self, began: Instant, before: &'static str) -> Result<(), Cause> {
        self.give_up_if_cancelled()?;
        let limit = self.options.pause_limit;
        if began.elapsed() > limit { Err(Cause::PauseTooLong { limit, before }) } else { Ok(()) }
    }

    /// Until every page is saved.
    fn copy<'scope>(
        &mut self,
        vmm: &mut dyn Vmm,
        scope: &'scope Scope<'scope, '_>,
        engine: &'scope Engine,
    ) -> Result<(), Cause> {
        self.enter(Phase::Copying, Some(engine));
        let checks = self.options.is_protecting();
        spawn(scope, "sweep", move || sweep::run(engine, checks))?;
        loop {
            let swept = engine.wait_swept(TICK);
            give_up_if_failed(engine)?;
            self.give_up_if_cancelled()?;
            vmm.check()?;
            self.tell(Some(engine));
            if swept && engine.all_saved() {
                return Ok(());
            }
            if swept {
                // A fault thread has claimed some last pages; it takes microseconds.
                std::thread::yield_now();
            }
        }
    }

    /// All RAM is saved: lets go of the guest and waits for the disk.
    fn drain(&mut self, engine: &Engine, threads: Threads<'_, '_>) -> Result<Stored, Cause> {
        self.enter(Phase::Draining, Some(engine));
        let writer = threads.let_go();
        engine.buffer.close();
        while !writer.is_finished() {
            if self.cancel.is_cancelled() {
                // Else the writer would first write out all that is queued.
                engine.release();
                return Err(self.cancel.cause());
            }
            self.tell(Some(engine));
            std::thread::park_timeout(TICK / 10);
        }
        let stored = writer.join().map_err(|_| CaptureError::Panicked { thread: "writer" })?;
        give_up_if_failed(engine)?;
        Ok(stored)
    }

    fn report(&self, engine: &Engine, times: &Times, frozen: &Frozen, storage: &str) -> Report {
        let counters = &engine.counters;
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let bytes = |counter| load(counter) * PAGE_BYTES;
        let mut report = Report {
            ram_bytes: engine.ram.layout.total_bytes(),
            stored_bytes: load(&counters.stored_bytes),
            captured: Captured {
                by_fault_bytes: bytes(&counters.fault_pages),
                by_sweep_bytes: bytes(&counters.sweep_pages),
                hole_bytes: bytes(&counters.hole_pages),
            },
            downtime: self.downtime,
            total_ns: 0,
            arming_ns: nanos(times.armed - times.prepared),
            copying_ns: nanos(times.saved - times.consistent),
            committing_ns: 0,
            arming_rounds: self.rounds,
            remainder_pages: self.remainder_pages,
            arming_faults: load(&counters.arming_faults),
            faults: load(&counters.faults),
            first_touches: counters.first_touches.get(),
            buffer_waits: load(&counters.buffer_waits),
            service: counters.service.summary(),
            buffer_peak_bytes: engine.buffer.used_bytes_max(),
            buffer_limit_bytes: engine.buffer.limit_bytes(),
            throughput_bytes_per_second: 0,
            storage: storage.into(),
            contexts: u32::try_from(engine.ram.contexts.len()).unwrap_or(u32::MAX),
            overlays: frozen.disks.disks.iter().map(|disk| disk.overlay.clone()).collect(),
            warnings: Vec::new(),
        };
        report.finish(self.began, times.consistent, times.saved);
        report
    }

    fn enter(&mut self, phase: Phase, engine: Option<&Engine>) {
        self.phase = phase;
        tracing::debug!(phase = phase.as_str(), "session");
        self.tell(engine);
    }

    fn tell(&mut self, engine: Option<&Engine>) {
        let progress = engine.map_or_else(Progress::default, Engine::progress);
        let elapsed_ns = nanos(self.began.elapsed());
        let is_consistent = self.is_consistent;
        (self.observe)(&Progress { phase: self.phase, is_consistent, elapsed_ns, ..progress });
        if let (Some(engine), Some(bytes)) = (engine, self.options.buffer_limit.wanted_bytes()) {
            engine.buffer.set_limit_bytes(bytes.max(least_buffer_bytes(engine.ram.contexts.len())));
        }
    }

    fn give_up_if_cancelled(&self) -> Result<(), Cause> {
        if self.cancel.is_cancelled() { Err(self.cancel.cause()) } else { Ok(()) }
    }
}

/// Least copy buffer for so many contexts, in bytes.
fn least_buffer_bytes(contexts: usize) -> u64 {
    BUFFER_BYTES_MIN.max(2 * (contexts as u64 + 2) * EXTENT_BYTES as u64)
}

fn give_up_if_failed(engine: &Engine) -> Result<(), Cause> {
    match engine.take_failure() {
        Some(error) => Err(error.into()),
        None if engine.is_released() => Err(Cause::Cancelled),
        None => Ok(()),
    }
}

fn protect_failed(engine: &Engine, source: io::Error) -> Cause {
    let address = engine.ram.regions()[0].hva;
    let error = CaptureError::Protection { operation: "write-protect", address, source };
    // RAM that a failed thread has given up cannot be protected either: that thread tells why.
    engine.take_failure().unwrap_or(error).into()
}

/// Resumes the guest when it goes out of scope, so that a panic does not leave it paused.
struct Pause<'v> {
    vmm: &'v mut dyn Vmm,
    is_over: bool,
}

impl Pause<'_> {
    fn end(mut self) -> Result<(), VmmError> {
        self.is_over = true;
        self.vmm.resume()
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        if !self.is_over
            && let Err(error) = self.vmm.resume()
        {
            tracing::error!(%error, "the guest could not be resumed");
        }
    }
}

/// Fault threads and writer. Dropping it, on any early way out, makes all of them end and lets go of the
/// guest.
struct Threads<'scope, 'env> {
    engine: &'env Engine,
    stop: &'env OwnedFd,
    faults: Vec<ScopedJoinHandle<'scope, ()>>,
    writer: Option<ScopedJoinHandle<'scope, Stored>>,
}

impl<'scope, 'env> Threads<'scope, 'env> {
    fn start(
        scope: &'scope Scope<'scope, 'env>,
        engine: &'env Engine,
        stop: &'env OwnedFd,
        write: impl FnOnce() -> Stored + Send + 'scope,
    ) -> Result<Self, Cause> {
        let mut threads = Self { engine, stop, faults: Vec::new(), writer: None };
        for context in 0..engine.ram.contexts.len() {
            let run = move || fault::run(engine, context, stop.as_fd());
            threads.faults.push(spawn(scope, "fault", run)?);
        }
        threads.writer = Some(spawn(scope, "writer", write)?);
        Ok(threads)
    }

    /// Once all of RAM is saved: ends the fault threads, which by then have made the last pages writable, then
    /// lets go of RAM, and hands over the writer.
    fn let_go(mut self) -> ScopedJoinHandle<'scope, Stored> {
        self.end_faults();
        self.engine.ram.unregister_writable();
        self.writer.take().expect("the writer is taken once, here")
    }

    fn end_faults(&mut self) {
        // The counter of an eventfd that nobody reads takes this once.
        if let Err(error) = rustix::io::write(self.stop, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "the fault threads could not be told to stop");
        }
        for thread in self.faults.drain(..) {
            if thread.join().is_err() {
                self.engine.fail(CaptureError::Panicked { thread: "fault" });
            }
        }
    }
}

impl Drop for Threads<'_, '_> {
    fn drop(&mut self) {
        // Nothing is left after `let_go`; after a failed start perhaps only some of the fault threads.
        if self.writer.is_some() || !self.faults.is_empty() {
            self.engine.release();
            self.end_faults();
        }
    }
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    run: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, Cause> {
    Builder::new().name(name.into()).spawn_scoped(scope, run).map_err(system("start a thread"))
}

fn check_mappings(mappings: &[RamMapping]) -> Result<(), Cause> {
    for mapping in mappings {
        if mapping.kind == MappingKind::File {
            return Err(Cause::FileBacked { start: mapping.start, path: mapping.path.clone() });
        }
        let page_bytes = mapping.page_size_bytes;
        if mapping.kind == MappingKind::Hugetlb && page_bytes > EXTENT_BYTES as u64 {
            return Err(Cause::HugePageSize { start: mapping.start, page_bytes });
        }
    }
    Ok(())
}

struct Lap(Instant);

impl Lap {
    /// Time since the last call, or since the beginning.
    fn nanos(&mut self) -> u64 {
        let now = Instant::now();
        nanos(now - std::mem::replace(&mut self.0, now))
    }
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
