//! The ways to measure, best first, and why one is refused.
//!
//! Whether a kernel lets a program of some kind be loaded does not tell whether it can be attached, and what it
//! says when it is asked is not to be trusted. So a tier is a function that loads *and* attaches.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::programs::perf_event::{PerfEventConfig, PerfEventScope, SamplePolicy, SoftwareEvent};
use aya::programs::{
    BtfTracePoint, FEntry, FExit, KProbe, PerfEvent, Program, ProgramError, RawTracePoint,
    TracePoint,
};
use aya::util::online_cpus;
use aya::{Btf, Ebpf, EbpfError, EbpfLoader};
use serde::Serialize;

use crate::btf::Types;
use crate::objects;
use crate::ranges::RangeWords;
use crate::tracefs::Record;

/// The kernel's type information.
pub(crate) const BTF: &str = "/sys/kernel/btf/vmlinux";
/// The kernel's function in which a thread waits for a userfaultfd.
const HANDLE_USERFAULT: &str = "handle_userfault";
/// The tracepoints of page faults in user mode and in the kernel, of the group `exceptions`.
const PAGE_FAULTS: [&str; 2] = ["page_fault_user", "page_fault_kernel"];
/// The tracepoints of virtual CPUs' faults, of the group `kvm`: the two kinds of ends first.
const KVM: [&str; 3] = ["kvm_userspace_exit", "kvm_entry", "kvm_page_fault"];
/// What `/proc/PID/fd` has for a virtual machine of KVM's.
const KVM_VM: &str = "anon_inode:kvm-vm";

/// A way to measure stalls; docs/probes.md tells what each sees, and which have been compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// Entry to and exit from the kernel's `handle_userfault`: sees every wait, also in the kernel's own accesses
    /// and those of KVM, and nothing else; not the way from the exception and back to the thread.
    Fentry,
    /// BTF tracepoints at the exception, the start kept in the thread's own storage; perf's events at the end.
    TpBtf,
    /// As `Fentry`, by breakpoints: on some kernels only a few threads at a time are seen to return.
    Kprobe,
    /// As `TpBtf`, by raw tracepoints, the start kept by thread id: needs no BTF.
    RawTp,
    /// As `RawTp`, by tracepoints of tracefs.
    Tracepoint,
}

impl Tier {
    /// All of them, best first.
    pub const ALL: [Self; 5] =
        [Self::Fentry, Self::TpBtf, Self::Kprobe, Self::RawTp, Self::Tracepoint];

    /// The word for people and programs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fentry => "fentry",
            Self::TpBtf => "tp-btf",
            Self::Kprobe => "kprobe",
            Self::RawTp => "raw-tp",
            Self::Tracepoint => "tracepoint",
        }
    }

    /// Loads and attaches.
    pub(crate) fn attach(self, request: &Request<'_>) -> Result<Attached, Cause> {
        match self {
            Self::Fentry => fentry(request),
            Self::TpBtf => tp_btf(request),
            Self::Kprobe => kprobe(request),
            Self::RawTp => raw_tp(request),
            Self::Tracepoint => tracepoint(request),
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// Why a tier cannot be used here.
#[derive(Debug, thiserror::Error)]
#[error("{tier}: {cause}")]
pub struct Refusal<T: fmt::Debug + fmt::Display = Tier> {
    /// Which one.
    pub tier: T,
    /// Why.
    #[source]
    pub cause: Cause,
}

/// A tier, what attaching it has made, and why each better one was refused.
pub type First<T, A> = (T, A, Vec<Refusal<T>>);

/// Attaches the first of `tiers` that can be; if none can, tells why.
pub fn first_of<T: Copy + fmt::Debug + fmt::Display, A>(
    tiers: impl IntoIterator<Item = T>,
    attach: impl Fn(T) -> Result<A, Cause>,
) -> Result<First<T, A>, Vec<Refusal<T>>> {
    let mut refusals = Vec::new();
    for tier in tiers {
        match attach(tier) {
            Ok(attached) => return Ok((tier, attached, refusals)),
            Err(cause) => {
                tracing::debug!(%tier, error = ?cause, "a tier is refused");
                refusals.push(Refusal { tier, cause });
            }
        }
    }
    Err(refusals)
}

/// All of them in one line; a cause that several share is told once.
pub fn join<T: fmt::Debug + fmt::Display>(refusals: &[Refusal<T>]) -> String {
    let mut causes: Vec<(String, String)> = Vec::new();
    for Refusal { tier, cause } in refusals {
        let cause = cause.to_string();
        match causes.iter_mut().find(|(_, known)| *known == cause) {
            Some((tiers, _)) => *tiers += &format!(", {tier}"),
            None => causes.push((tier.to_string(), cause)),
        }
    }
    let texts: Vec<String> =
        causes.into_iter().map(|(tiers, cause)| format!("{tiers}: {cause}")).collect();
    texts.join("; ")
}

/// What stood against it.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// There was no compiler for them.
    #[error("livesnap was built without BPF programs: run `cargo xtask setup`, and build it again")]
    NotBuilt,
    /// A kernel without BTF.
    #[error("the kernel's type information cannot be read from {path}: {source}")]
    NoBtf {
        /// Where it should be.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// BTF that is none.
    #[error("the kernel's type information in {path} is not understood")]
    BadBtf {
        /// Where it was read.
        path: PathBuf,
    },
    /// The object as a whole.
    #[error("the maps of the programs cannot be made: {}{}", innermost(source), advice(source))]
    Load {
        /// What aya found.
        source: Box<EbpfError>,
    },
    /// The kernel does not take a program.
    #[error("the kernel refuses to load {program}: {}{}", innermost(source), advice(source))]
    LoadProgram {
        /// The program's name.
        program: &'static str,
        /// What aya found.
        source: Box<ProgramError>,
    },
    /// The kernel does not let a program see events.
    #[error("{program} cannot be attached: {}{}", innermost(source), advice(source))]
    Attach {
        /// The program's name.
        program: &'static str,
        /// What aya found.
        source: Box<ProgramError>,
    },
    /// A program that the object does not have, or of another kind.
    #[error("the object has no program {program} of its kind")]
    NoProgram {
        /// The program's name.
        program: &'static str,
    },
    /// Another kernel than we know.
    #[error("the kernel's type information knows no {field}")]
    NoField {
        /// What was looked for.
        field: &'static str,
    },
    /// Another kernel than we know, or no tracefs.
    #[error(
        "the format of the tracepoint {group}/{name} cannot be read: {source}; mount tracefs on /sys/kernel/tracing"
    )]
    NoTracepoint {
        /// Its group.
        group: &'static str,
        /// Its name.
        name: &'static str,
        /// What the operating system says.
        source: io::Error,
    },
    /// Another kernel than we know.
    #[error("the tracepoint {group}/{name} has no field {field}, or a smaller one")]
    NoRecordField {
        /// Its group.
        group: &'static str,
        /// Its name.
        name: &'static str,
        /// What was looked for.
        field: &'static str,
    },
    /// The list of CPUs.
    #[error("cannot read which CPUs are online: {source}")]
    Cpus {
        /// What the operating system says.
        source: io::Error,
    },
}

impl Cause {
    /// The operating system's error number, if it was that.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        io_error(self)?.raw_os_error()
    }
}

/// The innermost error of a chain that is the operating system's.
fn io_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.filter_map(|error| error.downcast_ref::<io::Error>()).last()
}

/// The text of the innermost error: those around it only repeat it, or bring the verifier's log.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.last().map(ToString::to_string).unwrap_or_default()
}

/// What the error number means here.
fn advice(error: &(dyn std::error::Error + 'static)) -> &'static str {
    match io_error(error).map(io::Error::kind) {
        Some(io::ErrorKind::PermissionDenied) => {
            "; CAP_BPF and CAP_PERFMON are missing, or a security module forbids it"
        }
        _ => "",
    }
}

/// What a tier needs to know.
pub struct Request<'a> {
    /// The process.
    pub tgid: u32,
    /// Its addresses that count.
    pub ranges: RangeWords,
    /// Where to read BTF instead of from the kernel.
    pub btf: Option<&'a Path>,
    /// Whether to attach what sees the ends.
    pub has_ends: bool,
}

/// Programs that run as long as this is kept.
pub struct Attached {
    /// The programs and their maps.
    pub object: Ebpf,
    /// Whether waits are told apart from faults that the kernel serves by itself.
    pub kinds_are_known: bool,
}

/// Where members of the kernel's structures lie, in bytes; 0 for those that the programs do without.
#[derive(Default)]
struct Offsets {
    vm_fault_address: u32,
    vm_fault_flags: u32,
    /// `task_struct::nvcsw`, with `nivcsw` behind it.
    task_switches: u32,
    /// The error code in the record of `kvm_page_fault`.
    kvm_error_code: u32,
}

impl Offsets {
    /// Whether it can be told which faults waited.
    const fn tell_waits(&self) -> bool {
        self.task_switches != 0
    }
}

/// The kernel's type information, for us and for aya.
struct KernelTypes {
    btf: Btf,
    bytes: Vec<u8>,
}

impl KernelTypes {
    /// What is needed where a wait is seen as such.
    fn of_waits(&self) -> Result<Offsets, Cause> {
        let types = Types::parse(&self.bytes);
        let offset = |member, field| {
            let found = types.as_ref().and_then(|types| types.offset_of("vm_fault", member));
            found.ok_or(Cause::NoField { field })
        };
        Ok(Offsets {
            vm_fault_address: offset("address", "vm_fault.address")?,
            vm_fault_flags: offset("flags", "vm_fault.flags")?,
            ..Offsets::default()
        })
    }

    /// What is needed to tell waits among all faults. A kernel without it is not refused for that.
    fn of_faults(&self) -> Offsets {
        let types = Types::parse(&self.bytes);
        let offset = |member| types.as_ref()?.offset_of("task_struct", member);
        let counts = offset("nvcsw").zip(offset("nivcsw"));
        let task_switches = match counts {
            Some((voluntary, involuntary)) if voluntary + 8 == involuntary => voluntary,
            _ => 0,
        };
        Offsets { task_switches, ..Offsets::default() }
    }
}

impl Request<'_> {
    fn kernel_types(&self) -> Result<KernelTypes, Cause> {
        let path = self.btf.unwrap_or(Path::new(BTF)).to_owned();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(source) => return Err(Cause::NoBtf { path, source }),
        };
        // aya takes anything for BTF.
        let btf =
            Types::parse(&bytes).and_then(|_| Btf::parse(&bytes, aya::Endianness::default()).ok());
        match btf {
            Some(btf) => Ok(KernelTypes { btf, bytes }),
            None => Err(Cause::BadBtf { path }),
        }
    }

    /// Whether faults of virtual CPUs under KVM are to be seen where they raise no exception. Every other fault of theirs
    /// is none that waited, so it must be known which did. Entries of guests are frequent on the whole machine: the
    /// programs are attached only for a process that has a virtual machine.
    fn wants_kvm(&self, offsets: &Offsets) -> bool {
        let Ok(mut files) = fs::read_dir(format!("/proc/{}/fd", self.tgid)) else {
            return offsets.tell_waits();
        };
        let is_vm = |file: fs::DirEntry| {
            fs::read_link(file.path()).is_ok_and(|target| target == Path::new(KVM_VM))
        };
        offsets.tell_waits() && files.any(|file| file.is_ok_and(is_vm))
    }

    /// An object with its maps, its programs not loaded yet.
    fn object(&self, bytes: &[u8], offsets: &Offsets) -> Result<Ebpf, Cause> {
        if bytes.is_empty() {
            return Err(Cause::NotBuilt);
        }
        EbpfLoader::new()
            // Nothing to relocate.
            .btf(None)
            // Task storage, which aya has no type for; only the programs use it.
            .allow_unsupported_maps()
            .override_global("TGID", &self.tgid, true)
            .override_global("RANGES", &self.ranges, true)
            .override_global("VM_FAULT_ADDRESS", &offsets.vm_fault_address, false)
            .override_global("VM_FAULT_FLAGS", &offsets.vm_fault_flags, false)
            .override_global("TASK_SWITCHES", &offsets.task_switches, true)
            .override_global("KVM_ERROR_CODE", &offsets.kvm_error_code, false)
            .load(bytes)
            .map_err(|source| Cause::Load { source: Box::new(source) })
    }
}

fn fentry(request: &Request<'_>) -> Result<Attached, Cause> {
    const ENTRY: &str = "fentry_handle_userfault";
    const EXIT: &str = "fexit_handle_userfault";
    let types = request.kernel_types()?;
    let mut object = request.object(objects::STALL, &types.of_waits()?)?;
    // The ends first: a start that no end can follow would stay.
    if request.has_ends {
        let exit: &mut FExit = program(&mut object, EXIT)?;
        exit.load(HANDLE_USERFAULT, &types.btf).map_err(refused_load(EXIT))?;
        exit.attach().map_err(refused_attach(EXIT))?;
    }
    let entry: &mut FEntry = program(&mut object, ENTRY)?;
    entry.load(HANDLE_USERFAULT, &types.btf).map_err(refused_load(ENTRY))?;
    entry.attach().map_err(refused_attach(ENTRY))?;
    Ok(Attached { object, kinds_are_known: true })
}

fn tp_btf(request: &Request<'_>) -> Result<Attached, Cause> {
    let types = request.kernel_types()?;
    let offsets = types.of_faults();
    let mut object = request.object(objects::STALL_TP_BTF, &offsets)?;
    if request.has_ends {
        attach_page_fault_ends(&mut object)?;
        attach_raw_kvm(&mut object, request.wants_kvm(&offsets))?;
    }
    for name in PAGE_FAULTS {
        let program: &mut BtfTracePoint = program(&mut object, name)?;
        program.load(name, &types.btf).map_err(refused_load(name))?;
        program.attach().map_err(refused_attach(name))?;
    }
    Ok(Attached { object, kinds_are_known: offsets.tell_waits() })
}

fn kprobe(request: &Request<'_>) -> Result<Attached, Cause> {
    let types = request.kernel_types()?;
    let mut object = request.object(objects::STALL, &types.of_waits()?)?;
    let exit = request.has_ends.then_some("kretprobe_handle_userfault");
    for name in exit.into_iter().chain(["kprobe_handle_userfault"]) {
        let program: &mut KProbe = program(&mut object, name)?;
        program.load().map_err(refused_load(name))?;
        program.attach(HANDLE_USERFAULT, 0).map_err(refused_attach(name))?;
    }
    Ok(Attached { object, kinds_are_known: true })
}

fn raw_tp(request: &Request<'_>) -> Result<Attached, Cause> {
    let offsets = request.kernel_types().map(|types| types.of_faults()).unwrap_or_default();
    let mut object = request.object(objects::STALL, &offsets)?;
    if request.has_ends {
        attach_page_fault_ends(&mut object)?;
        attach_raw_kvm(&mut object, request.wants_kvm(&offsets))?;
    }
    for (name, event) in
        ["raw_page_fault_user", "raw_page_fault_kernel"].into_iter().zip(PAGE_FAULTS)
    {
        attach_raw(&mut object, name, event)?;
    }
    Ok(Attached { object, kinds_are_known: offsets.tell_waits() })
}

fn tracepoint(request: &Request<'_>) -> Result<Attached, Cause> {
    let mut offsets = request.kernel_types().map(|types| types.of_faults()).unwrap_or_default();
    let has_kvm = request.has_ends && request.wants_kvm(&offsets);
    if has_kvm {
        offsets.kvm_error_code = Record::of("kvm", "kvm_page_fault")?.offset_of("error_code", 8)?;
    }
    let mut object = request.object(objects::STALL, &offsets)?;
    if request.has_ends {
        attach_page_fault_ends(&mut object)?;
    }
    if has_kvm {
        let names = ["trace_kvm_userspace_exit", "trace_kvm_entry", "trace_kvm_page_fault"];
        for (name, event) in names.into_iter().zip(KVM) {
            attach_tracepoint(&mut object, name, "kvm", event)?;
        }
    }
    for (name, event) in
        ["trace_page_fault_user", "trace_page_fault_kernel"].into_iter().zip(PAGE_FAULTS)
    {
        attach_tracepoint(&mut object, name, "exceptions", event)?;
    }
    Ok(Attached { object, kinds_are_known: offsets.tell_waits() })
}

/// Has virtual CPUs' faults seen by raw tracepoints, if that is `wanted`.
fn attach_raw_kvm(object: &mut Ebpf, wanted: bool) -> Result<(), Cause> {
    let names = ["raw_kvm_userspace_exit", "raw_kvm_entry", "raw_kvm_page_fault"];
    let mut pairs = names.into_iter().zip(KVM).filter(|_| wanted);
    pairs.try_for_each(|(name, event)| attach_raw(object, name, event))
}

/// Loads a program and attaches it to a raw tracepoint.
pub(crate) fn attach_raw(object: &mut Ebpf, name: &'static str, event: &str) -> Result<(), Cause> {
    let program: &mut RawTracePoint = program(object, name)?;
    program.load().map_err(refused_load(name))?;
    program.attach(event).map_err(refused_attach(name))?;
    Ok(())
}

/// Loads a program and attaches it to a tracepoint of tracefs.
pub(crate) fn attach_tracepoint(
    object: &mut Ebpf,
    name: &'static str,
    group: &str,
    event: &str,
) -> Result<(), Cause> {
    let program: &mut TracePoint = program(object, name)?;
    program.load().map_err(refused_load(name))?;
    program.attach(group, event).map_err(refused_attach(name))?;
    Ok(())
}

/// Has `page_fault_end` run whenever a page fault is done. The kernel counts one that had to wait as major, since it
/// waits under the lock of its mapping alone (6.6) as minor, so both. Before the starts: one that no end can follow would
/// stay. For each CPU: an event of a task costs at every context switch.
fn attach_page_fault_ends(object: &mut Ebpf) -> Result<(), Cause> {
    const NAME: &str = "page_fault_end";
    let cpus = online_cpus().map_err(|(_, source)| Cause::Cpus { source })?;
    let program: &mut PerfEvent = program(object, NAME)?;
    program.load().map_err(refused_load(NAME))?;
    for event in [SoftwareEvent::PageFaultsMin, SoftwareEvent::PageFaultsMaj] {
        for &cpu in &cpus {
            let scope = PerfEventScope::AllProcessesOneCpu { cpu };
            let config = PerfEventConfig::Software(event);
            program
                .attach(config, scope, SamplePolicy::Period(1), false)
                .map_err(refused_attach(NAME))?;
        }
    }
    Ok(())
}

/// A program of an object.
pub(crate) fn program<'a, P>(
    object: &'a mut Ebpf,
    program: &'static str,
) -> Result<&'a mut P, Cause>
where
    &'a mut P: TryFrom<&'a mut Program>,
{
    let found = object.program_mut(program).and_then(|found| found.try_into().ok());
    found.ok_or(Cause::NoProgram { program })
}

/// What a program that the kernel does not take is reported as.
pub(crate) fn refused_load(program: &'static str) -> impl FnOnce(ProgramError) -> Cause {
    move |source| Cause::LoadProgram { program, source: Box::new(source) }
}

/// What a program that the kernel does not attach is reported as.
pub(crate) fn refused_attach(program: &'static str) -> impl FnOnce(ProgramError) -> Cause {
    move |source| Cause::Attach { program, source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_tiers_share_is_told_once() {
        let refusal = |tier, cause| Refusal { tier, cause };
        let field = Cause::NoField { field: "vm_fault.flags" };
        let refusals = [
            refusal(Tier::Fentry, Cause::NotBuilt),
            refusal(Tier::TpBtf, field),
            refusal(Tier::RawTp, Cause::NotBuilt),
        ];
        let text = join(&refusals);
        assert!(text.starts_with("fentry, raw-tp: livesnap was built without"), "{text}");
        assert!(text.ends_with("; tp-btf: the kernel's type information knows no vm_fault.flags"));
    }
}
