//! The ways to measure, best first, and why one is refused.
//!
//! Whether a kernel lets a program of some kind be loaded does not tell whether it can be attached, and what it
//! says when it is asked is not to be trusted. So a tier is a function that loads *and* attaches.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use aya::programs::perf_event::{PerfEventConfig, PerfEventScope, SamplePolicy, SoftwareEvent};
use aya::programs::{BtfTracePoint, PerfEvent, Program, ProgramError};
use aya::util::online_cpus;
use aya::{Btf, Ebpf, EbpfError, EbpfLoader};
use serde::Serialize;

use crate::objects;
use crate::ranges::RangeWords;

/// The kernel's type information.
pub(crate) const BTF: &str = "/sys/kernel/btf/vmlinux";

/// A way to measure stalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// BTF tracepoints at the exception, the start kept in the thread's own storage.
    TpBtf,
}

impl Tier {
    /// All of them, best first.
    pub const ALL: [Self; 1] = [Self::TpBtf];

    /// The word for people and programs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TpBtf => "tp-btf",
        }
    }

    /// Loads and attaches.
    pub(crate) fn attach(self, request: &Request<'_>) -> Result<Ebpf, Cause> {
        match self {
            Self::TpBtf => tp_btf(request),
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
pub struct Refusal {
    /// Which one.
    pub tier: Tier,
    /// Why.
    #[source]
    pub cause: Cause,
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
        /// What aya found.
        source: Box<aya::BtfError>,
    },
    /// The object as a whole.
    #[error("the maps of the programs cannot be made: {}", innermost(source))]
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
}

impl Request<'_> {
    fn btf(&self) -> Result<Btf, Cause> {
        match self.btf {
            None => Btf::from_sys_fs(),
            Some(path) => Btf::parse_file(path, aya::Endianness::default()),
        }
        .map_err(|source| Cause::NoBtf {
            path: self.btf.unwrap_or(Path::new(BTF)).to_owned(),
            source: Box::new(source),
        })
    }

    /// An object with its maps, its programs not loaded yet.
    fn object(&self, bytes: &[u8], btf: Option<&Btf>) -> Result<Ebpf, Cause> {
        if bytes.is_empty() {
            return Err(Cause::NotBuilt);
        }
        EbpfLoader::new()
            .btf(btf)
            // Task storage, which aya has no type for; only the programs use it.
            .allow_unsupported_maps()
            .override_global("TGID", &self.tgid, true)
            .override_global("RANGES", &self.ranges, true)
            .load(bytes)
            .map_err(|source| Cause::Load { source: Box::new(source) })
    }
}

fn tp_btf(request: &Request<'_>) -> Result<Ebpf, Cause> {
    let btf = request.btf()?;
    let mut object = request.object(objects::STALL_TP_BTF, Some(&btf))?;
    // The ends first: a start that no end can follow would stay.
    attach_page_fault_ends(&mut object)?;
    for name in ["page_fault_user", "page_fault_kernel"] {
        let program: &mut BtfTracePoint = program(&mut object, name)?;
        program.load(name, &btf).map_err(refused_load(name))?;
        program.attach().map_err(refused_attach(name))?;
    }
    Ok(object)
}

/// Has `page_fault_end` run whenever a page fault is done. The kernel counts one that had to wait as major or as
/// minor, depending on its version, so both. For each CPU: an event of a task costs at every context switch.
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
