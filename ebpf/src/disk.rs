//! Requests on the disks of a directory: how many, how long from issue to completion, how many at a time; those of
//! one process (*ours*) told from all others (*foreign*).
//!
//! A request is ours if a thread of ours put it into the disk's queue; io_uring's workers are threads of ours. What the
//! kernel writes later on our behalf, such as dirty pages of the page cache, comes from the kernel's own threads and is
//! foreign. Times are those of the disk: what a request waits in a queue of the kernel before it is issued is not in
//! them.

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, MapError, PerCpuArray};
use aya::{Ebpf, EbpfLoader};
use livesnap_ebpf_common::HISTOGRAM_WORDS;
use livesnap_ebpf_common::disk::{
    CLASSES, DISKS_MAX, ISSUER_OURS, OPERATION_FLUSH, OPERATION_READ, OPERATION_WRITE,
    RequestWords, TransferWords, class_in, counter, depth, disk_number, offset, record,
};
use serde::Serialize;

use crate::btf::Types;
use crate::device::{DeviceError, Disk};
use crate::objects;
use crate::reading::Histogram;
use crate::tier::{BTF, Cause, Refusal, attach_raw, attach_tracepoint, first_of, join};
use crate::tracefs::Record;

/// The programs, each named as its tracepoint, in the order in which they are attached: completions first, for a request
/// that is seen to be issued must also be seen to complete.
const RAW_PROGRAMS: [&str; 5] = [
    "block_rq_complete",
    "block_rq_merge",
    "block_rq_requeue",
    "block_rq_insert",
    "block_rq_issue",
];

/// The same of tracepoints: index of the record, and name.
const TRACE_PROGRAMS: [(usize, &str); record::TRACEPOINTS] = [
    (record::COMPLETE, "block_rq_complete"),
    (record::FRONT_MERGE, "block_bio_frontmerge"),
    (record::MERGE, "block_rq_merge"),
    (record::REQUEUE, "block_rq_requeue"),
    (record::INSERT, "block_rq_insert"),
    (record::ISSUE, "block_rq_issue"),
];
/// The group of all of them.
const GROUP: &str = "block";

/// A way to see requests; docs/probes.md tells what each misses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// Raw tracepoints, which see the kernel's own structures.
    RawTp,
    /// Tracepoints of tracefs, whose records tell of a request what most often suffices to know it again: needs no BTF.
    Tracepoint,
}

impl Tier {
    /// All of them, best first.
    pub const ALL: [Self; 2] = [Self::RawTp, Self::Tracepoint];

    /// The word for people and programs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RawTp => "raw-tp",
            Self::Tracepoint => "tracepoint",
        }
    }

    /// Loads and attaches.
    fn attach(self, disks: &[Disk], ours: u32) -> Result<Ebpf, Cause> {
        match self {
            Self::RawTp => raw_tp(disks, ours),
            Self::Tracepoint => tracepoint(disks, ours),
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// Why there is no probe, or no figures.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No disk to look at.
    #[error(transparent)]
    NoDisk(#[from] DeviceError),
    /// Not one tier could be attached.
    #[error("requests on disks cannot be seen: {}", join(refusals))]
    Refused {
        /// Why not, for each that was tried.
        refusals: Vec<Refusal<Tier>>,
    },
    /// A map cannot be read.
    #[error("the map {map} of the disk probe cannot be read: {source}")]
    Map {
        /// Its name.
        map: &'static str,
        /// What aya found.
        source: MapError,
    },
}

/// The tier that disks would be looked at with here, and why each better one would not.
///
/// # Errors
/// [`DiskError::Refused`] if there is none.
pub fn best_tier() -> Result<(Tier, Vec<Refusal<Tier>>), DiskError> {
    let found = first_of(Tier::ALL, |tier| tier.attach(&[], 0));
    let (tier, _, refusals) = found.map_err(|refusals| DiskError::Refused { refusals })?;
    Ok((tier, refusals))
}

/// The probe of some disks; dropping it detaches it.
pub struct DiskProbe {
    object: Ebpf,
    tier: Tier,
    disks: Vec<Disk>,
    since: Instant,
}

impl DiskProbe {
    /// Attaches to the disks that `path` lies on, a directory or a block device. Requests of the process `ours` are told
    /// from others.
    ///
    /// # Errors
    /// [`DiskError::NoDisk`] if they are not known, [`DiskError::Refused`] if no tier can be attached.
    pub fn attach(path: &Path, ours: u32) -> Result<Self, DiskError> {
        Self::attach_any(path, ours, &Tier::ALL)
    }

    /// As [`attach`](Self::attach), by this tier only.
    ///
    /// # Errors
    /// The same.
    pub fn attach_tier(path: &Path, ours: u32, tier: Tier) -> Result<Self, DiskError> {
        Self::attach_any(path, ours, &[tier])
    }

    fn attach_any(path: &Path, ours: u32, tiers: &[Tier]) -> Result<Self, DiskError> {
        let disks = Disk::of(path)?;
        let tiers = tiers.iter().copied();
        let (tier, object, _) = first_of(tiers, |tier| tier.attach(&disks, ours))
            .map_err(|refusals| DiskError::Refused { refusals })?;
        Ok(Self { object, tier, disks, since: Instant::now() })
    }

    /// The tier that is attached.
    #[must_use]
    pub const fn tier(&self) -> Tier {
        self.tier
    }

    /// The disks that are looked at.
    #[must_use]
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// What was counted so far.
    ///
    /// # Errors
    /// [`DiskError::Map`].
    pub fn read(&self) -> Result<DiskReading, DiskError> {
        let classes = self.classes()?;
        let lengths_ns = self.in_flight_ns()?;
        let elapsed = self.since.elapsed();
        let requests = classes.into_iter().zip(lengths_ns).enumerate().map(
            |(class, (words, in_flight_ns))| Requests::from_words(class, &words, in_flight_ns),
        );
        Ok(DiskReading {
            elapsed_ns: u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX),
            requests: requests.collect(),
            depth: self.depth()?,
            irregular: self.irregular()?,
        })
    }

    fn classes(&self) -> Result<Vec<TransferWords>, DiskError> {
        const NAME: &str = "TRANSFERS";
        let map = self.object.map(NAME).ok_or_else(|| missing(NAME))?;
        let map = PerCpuArray::<_, TransferWords>::try_from(map).map_err(unusable(NAME))?;
        let class = |class| {
            let cpus = map.get(&class, 0).map_err(unusable(NAME))?;
            Ok(cpus.iter().fold([0; _], added))
        };
        (0..u32::try_from(CLASSES).unwrap_or(u32::MAX)).map(class).collect()
    }

    /// How long the requests of each class have been in flight that still are.
    fn in_flight_ns(&self) -> Result<[u64; CLASSES], DiskError> {
        const NAME: &str = "REQUESTS";
        let map = self.object.map(NAME).ok_or_else(|| missing(NAME))?;
        let map = HashMap::<_, u64, RequestWords>::try_from(map).map_err(unusable(NAME))?;
        let now_ns = monotonic_ns();
        let mut sums = [0; CLASSES];
        for entry in map.iter() {
            let (_, [issued_ns, class]) = entry.map_err(unusable(NAME))?;
            if let Some(sum) = sums.get_mut(class_in(class)).filter(|_| issued_ns != 0) {
                *sum += now_ns.saturating_sub(issued_ns);
            }
        }
        Ok(sums)
    }

    fn depth(&self) -> Result<Depth, DiskError> {
        const NAME: &str = "DEPTHS";
        let map = self.object.map(NAME).ok_or_else(|| missing(NAME))?;
        let map = Array::<_, u64>::try_from(map).map_err(unusable(NAME))?;
        let now = |index| map.get(&index, 0).map_err(unusable(NAME));
        let max = |index| Ok::<_, DiskError>(self.counter(index)?.into_iter().max().unwrap_or(0));
        Ok(Depth {
            now: now(depth::ALL)?,
            max: max(counter::DEPTH_MAX)?,
            ours_now: now(depth::OURS)?,
            ours_max: max(counter::DEPTH_MAX_OURS)?,
        })
    }

    fn irregular(&self) -> Result<Irregular, DiskError> {
        let sum = |index| Ok::<_, DiskError>(self.counter(index)?.into_iter().sum());
        Ok(Irregular {
            map_full: sum(counter::MAP_FULL)?,
            completion_without_issue: sum(counter::COMPLETION_WITHOUT_ISSUE)?,
            issue_without_completion: sum(counter::ISSUE_WITHOUT_COMPLETION)?,
            requeued: sum(counter::REQUEUED)?,
            partial: sum(counter::PARTIAL)?,
            failed: sum(counter::FAILED)?,
        })
    }

    /// A figure of each CPU.
    fn counter(&self, index: u32) -> Result<Vec<u64>, DiskError> {
        const NAME: &str = "DISK_COUNTERS";
        let map = self.object.map(NAME).ok_or_else(|| missing(NAME))?;
        let map = PerCpuArray::<_, u64>::try_from(map).map_err(unusable(NAME))?;
        Ok(map.get(&index, 0).map_err(unusable(NAME))?.to_vec())
    }
}

fn missing(map: &'static str) -> DiskError {
    DiskError::Map { map, source: MapError::ElementNotFound }
}

fn unusable(map: &'static str) -> impl Fn(MapError) -> DiskError {
    move |source| DiskError::Map { map, source }
}

/// The clock of the programs.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::try_from(now).map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

/// All words are sums but the histogram's third, the maximum.
fn added(mut sum: TransferWords, other: &TransferWords) -> TransferWords {
    for (index, (sum, other)) in sum.iter_mut().zip(other).enumerate() {
        *sum = if index == 2 { *other.max(sum) } else { *sum + other };
    }
    sum
}

fn raw_tp(disks: &[Disk], ours: u32) -> Result<Ebpf, Cause> {
    let bytes = fs::read(BTF).map_err(|source| Cause::NoBtf { path: BTF.into(), source })?;
    let types = Types::parse(&bytes).ok_or(Cause::BadBtf { path: BTF.into() })?;
    let mut object = object(objects::DISK_RAW_TP, disks, ours, ("OFFSETS", &offsets(&types)?))?;
    for name in RAW_PROGRAMS {
        attach_raw(&mut object, name, name)?;
    }
    Ok(object)
}

fn tracepoint(disks: &[Disk], ours: u32) -> Result<Ebpf, Cause> {
    let mut object = object(objects::DISK_TRACEPOINT, disks, ours, ("RECORDS", &records()?))?;
    for (_, name) in TRACE_PROGRAMS {
        attach_tracepoint(&mut object, name, GROUP, name)?;
    }
    Ok(object)
}

/// An object with its maps, its programs not loaded yet. What differs between kernels is told by `layout`, the name of a
/// static and what it is to be.
fn object(bytes: &[u8], disks: &[Disk], ours: u32, layout: (&str, &[u32])) -> Result<Ebpf, Cause> {
    if bytes.is_empty() {
        return Err(Cause::NotBuilt);
    }
    let mut numbers = [0; DISKS_MAX];
    for (number, disk) in numbers.iter_mut().zip(disks) {
        *number = disk_number(disk.major, disk.minor);
    }
    EbpfLoader::new()
        // Nothing to relocate.
        .btf(None)
        .override_global("OUR_TGID", &ours, true)
        .override_global("DISKS", &numbers, true)
        .override_global(layout.0, layout.1, true)
        .load(bytes)
        .map_err(|source| Cause::Load { source: Box::new(source) })
}

/// Where this kernel's tracepoints have in their records what the programs read.
fn records() -> Result<[u32; record::COUNT], Cause> {
    let mut offsets = [0; record::COUNT];
    for (index, name) in TRACE_PROGRAMS {
        let record = Record::of(GROUP, name)?;
        let fields = &mut offsets[index * record::FIELDS..][..record::FIELDS];
        fields[record::DISK] = record.offset_of("dev", 4)?;
        fields[record::SECTOR] = record.offset_of("sector", 8)?;
        fields[record::SECTORS] = record.offset_of("nr_sector", 4)?;
        fields[record::OPERATION] = record.offset_of("rwbs", 2)?;
        if index == record::COMPLETE {
            fields[record::ERROR] = record.offset_of("error", 4)?;
        }
    }
    Ok(offsets)
}

/// Where this kernel has what the programs read.
fn offsets(types: &Types<'_>) -> Result<[u32; offset::COUNT], Cause> {
    let find = |structure, member, field| {
        types.offset_of(structure, member).ok_or(Cause::NoField { field })
    };
    // Until Linux 5.10 the queue comes before the request; the first parameter is the probe's own.
    let parameters = types
        .parameters_of("btf_trace_block_rq_issue")
        .ok_or(Cause::NoField { field: "tracepoint block_rq_issue" })?;
    // Until Linux 5.15 a request points to its disk.
    let of_request = types.offset_of("request", "rq_disk");
    let mut offsets = [0; offset::COUNT];
    offsets[offset::REQUEST_ARGUMENT] = u32::from(parameters > 2);
    offsets[offset::FLAGS] = find("request", "cmd_flags", "request.cmd_flags")?;
    offsets[offset::LEFT] = find("request", "__data_len", "request.__data_len")?;
    (offsets[offset::QUEUE_OR_DISK], offsets[offset::DISK]) = match of_request {
        Some(disk) => (disk, offset::NONE),
        None => (
            find("request", "q", "request.q")?,
            find("request_queue", "disk", "request_queue.disk")?,
        ),
    };
    offsets[offset::MAJOR] = find("gendisk", "major", "gendisk.major")?;
    offsets[offset::MINOR] = find("gendisk", "first_minor", "gendisk.first_minor")?;
    Ok(offsets)
}

/// All that was counted up to one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiskReading {
    /// Time since the probe was attached, in nanoseconds.
    pub elapsed_ns: u64,
    /// Requests by what they do and whose they are; each combination once.
    pub requests: Vec<Requests>,
    /// How many were in flight at a time.
    pub depth: Depth,
    /// What was not as usual.
    pub irregular: Irregular,
}

/// Requests of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Requests {
    /// What they do.
    pub operation: Operation,
    /// Whose they are.
    pub issuer: Issuer,
    /// Bytes that they moved. Of requests that are not complete, those that are done.
    pub bytes: u64,
    /// From issue to completion, of those that are complete.
    pub latency: Histogram,
    /// How long all of them were in flight, those that still are included, in nanoseconds.
    pub busy_ns: u64,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// It makes the disk empty its cache.
    Flush,
    /// Anything else, such as to discard or to write zeroes.
    Other,
}

impl Operation {
    /// The word for people and programs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Other => "other",
        }
    }
}

/// Whose a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Issuer {
    /// A thread's of the process that was named.
    Ours,
    /// Anybody else's, or the kernel's own.
    Foreign,
}

/// Requests in flight: issued and not complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Depth {
    /// Now.
    pub now: u64,
    /// The most there were.
    pub max: u64,
    /// Now, ours.
    pub ours_now: u64,
    /// The most of ours.
    pub ours_max: u64,
}

/// Events that did not go by the book.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Irregular {
    /// Requests that are not counted, for the map had no room.
    pub map_full: u64,
    /// Completions of requests whose issue was not seen: mostly those in flight when the probe was attached. Not
    /// counted elsewhere.
    pub completion_without_issue: u64,
    /// Requests whose completion was not seen. Not counted elsewhere.
    pub issue_without_completion: u64,
    /// Times that a disk could not take a request, which was issued again and counts from then.
    pub requeued: u64,
    /// Completions of parts of requests; each request is counted when all of it is complete.
    pub partial: u64,
    /// Requests that failed; they are counted, without bytes.
    pub failed: u64,
}

impl Requests {
    fn from_words(class: usize, words: &TransferWords, in_flight_ns: u64) -> Self {
        let class = u32::try_from(class).unwrap_or(u32::MAX);
        let [histogram @ .., bytes] = words;
        let mut of_latency = [0; HISTOGRAM_WORDS];
        of_latency.copy_from_slice(histogram);
        let latency = Histogram::from_words(of_latency);
        Self {
            operation: match class >> 1 {
                OPERATION_READ => Operation::Read,
                OPERATION_WRITE => Operation::Write,
                OPERATION_FLUSH => Operation::Flush,
                _ => Operation::Other,
            },
            issuer: if class & 1 == ISSUER_OURS { Issuer::Ours } else { Issuer::Foreign },
            bytes: *bytes,
            busy_ns: latency.sum_ns + in_flight_ns,
            latency,
        }
    }

    fn since(&self, earlier: &Self) -> Self {
        Self {
            operation: self.operation,
            issuer: self.issuer,
            bytes: self.bytes.saturating_sub(earlier.bytes),
            latency: self.latency.since(&earlier.latency),
            busy_ns: self.busy_ns.saturating_sub(earlier.busy_ns),
        }
    }
}

impl Irregular {
    const fn since(self, earlier: Self) -> Self {
        Self {
            map_full: self.map_full.saturating_sub(earlier.map_full),
            completion_without_issue: self
                .completion_without_issue
                .saturating_sub(earlier.completion_without_issue),
            issue_without_completion: self
                .issue_without_completion
                .saturating_sub(earlier.issue_without_completion),
            requeued: self.requeued.saturating_sub(earlier.requeued),
            partial: self.partial.saturating_sub(earlier.partial),
            failed: self.failed.saturating_sub(earlier.failed),
        }
    }
}

impl DiskReading {
    /// Requests of one kind.
    #[must_use]
    pub fn of(&self, operation: Operation, issuer: Issuer) -> Option<&Requests> {
        self.requests
            .iter()
            .find(|requests| requests.operation == operation && requests.issuer == issuer)
    }

    /// What came after `earlier`, which was read before from the same probe. The maxima of the depth stay those since the
    /// probe was attached.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let elapsed_ns = self.elapsed_ns.saturating_sub(earlier.elapsed_ns);
        let pairs = self.requests.iter().zip(&earlier.requests);
        Self {
            elapsed_ns,
            requests: pairs.map(|(now, then)| now.since(then)).collect(),
            depth: self.depth,
            irregular: self.irregular.since(earlier.irregular),
        }
    }

    /// How many requests of `issuer`, or of all, were in flight on average over the time since the probe was attached.
    ///
    /// By Little's law: the sum of the times in flight is the number in flight, summed over time.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "15 digits are more than anybody needs")]
    pub fn mean_depth(&self, issuer: Option<Issuer>) -> f64 {
        let wanted = self
            .requests
            .iter()
            .filter(|requests| issuer.is_none_or(|issuer| requests.issuer == issuer));
        let busy_ns: u64 = wanted.map(|requests| requests.busy_ns).sum();
        busy_ns as f64 / self.elapsed_ns.max(1) as f64
    }
}
