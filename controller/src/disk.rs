//! The destination's disk during a snapshot: what it did for us and for others, as the report tells it.
//!
//! A snapshot never fails for want of it.

use std::fmt::Write as _;
use std::path::Path;

use livesnap_ebpf::disk::{DiskError, DiskProbe, DiskReading, Issuer, Operation, Tier};
use livesnap_ebpf::{Disk, Histogram};
use serde::Serialize;
use serde_json::{Map, Value, json};
use snapshot_core::{Phase, Progress};

use crate::output;
use crate::probes::Durations;
use crate::progress::nanos;

/// The probe of the destination's disk.
pub enum SnapshotDisk {
    /// Nobody wanted it.
    Off,
    /// It could not be attached.
    Absent(DiskError),
    /// It counts.
    Attached(Box<Attached>),
}

/// A probe that counts.
pub struct Attached {
    probe: DiskProbe,
    /// What it had counted when the snapshot was complete.
    reading: Option<Result<DiskReading, DiskError>>,
}

/// Writes so far, for programs that follow a snapshot.
#[derive(Clone, Debug, Serialize)]
pub struct Writes {
    tier: Tier,
    /// Requests that could not be counted.
    lost: u64,
    livesnap: Durations,
    others: Durations,
}

impl SnapshotDisk {
    /// Attaches to the disks of the directory that `destination` is to be made in.
    pub fn attach(destination: &Path) -> Self {
        let parent = destination.parent().filter(|parent| !parent.as_os_str().is_empty());
        match DiskProbe::attach(parent.unwrap_or(Path::new(".")), std::process::id()) {
            Ok(probe) => Self::Attached(Box::new(Attached { probe, reading: None })),
            Err(error) => Self::Absent(error),
        }
    }

    /// Follows the snapshot until all of it is on disk.
    pub fn observe(&mut self, progress: &Progress) {
        if let Self::Attached(attached) = self
            && progress.phase == Phase::Completed
        {
            attached.reading = Some(attached.probe.read());
        }
    }

    /// How long writes have taken so far; nothing where that is not measured.
    pub fn writes(&self) -> Option<Writes> {
        let Self::Attached(attached) = self else { return None };
        let read_now;
        let reading = match &attached.reading {
            Some(reading) => reading,
            None => {
                read_now = attached.probe.read();
                &read_now
            }
        };
        let reading = reading.as_ref().ok()?;
        let of = |issuer| {
            let (_, writes) = sum(reading, issuer, |operation| operation == Operation::Write);
            Durations::new(&writes)
        };
        let irregular = &reading.irregular;
        Some(Writes {
            tier: attached.probe.tier(),
            lost: irregular.map_full + irregular.issue_without_completion,
            livesnap: of(Issuer::Ours),
            others: of(Issuer::Foreign),
        })
    }

    /// For programs.
    pub fn json(&self) -> Value {
        match self {
            Self::Off => Value::Null,
            Self::Absent(error) => json!({"tier": null, "problem": error.to_string()}),
            Self::Attached(attached) => match attached.reading() {
                Ok(reading) => {
                    let mut value = reading_json(reading);
                    value["tier"] = json!(attached.probe.tier());
                    value["disks"] = json!(attached.probe.disks());
                    value
                }
                Err(problem) => json!({"tier": attached.probe.tier(), "problem": problem}),
            },
        }
    }

    /// For people: a row of a name and a value.
    pub fn row(&self) -> Option<(&'static str, String)> {
        let text = match self {
            Self::Off => return None,
            Self::Absent(error) => error.to_string(),
            Self::Attached(attached) => match attached.reading() {
                Ok(reading) => in_words(attached.probe.disks(), reading),
                Err(problem) => problem,
            },
        };
        Some(("disk", text))
    }
}

impl Attached {
    fn reading(&self) -> Result<&DiskReading, String> {
        match &self.reading {
            Some(Ok(reading)) => Ok(reading),
            Some(Err(error)) => Err(error.to_string()),
            None => Err("the snapshot ended before the probe was read".into()),
        }
    }
}

/// A reading for programs.
pub fn reading_json(reading: &DiskReading) -> Value {
    let mut value = json!({
        "elapsed_ns": reading.elapsed_ns,
        "depth": reading.depth,
        "irregular": reading.irregular,
    });
    value["depth"]["mean"] = reading.mean_depth(None).into();
    value["depth"]["ours_mean"] = reading.mean_depth(Some(Issuer::Ours)).into();
    for (name, issuer) in [("ours", Issuer::Ours), ("foreign", Issuer::Foreign)] {
        let of_issuer = reading.requests.iter().filter(|requests| requests.issuer == issuer);
        let by_operation: Map<String, Value> = of_issuer
            .map(|requests| {
                let figures =
                    json!({"bytes": requests.bytes, "latency": requests.latency.summary()});
                (requests.operation.as_str().to_owned(), figures)
            })
            .collect();
        value[name] = by_operation.into();
    }
    value
}

/// A reading for people.
fn in_words(disks: &[Disk], reading: &DiskReading) -> String {
    let names: Vec<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
    let (bytes, writes) = sum(reading, Issuer::Ours, |operation| operation == Operation::Write);
    let latency = writes.summary();
    let mut text = format!(
        "{}: {} in {} writes, mean {}, p99 {}; {:.1} at a time, at most {}",
        names.join(", "),
        output::bytes(bytes),
        latency.count,
        nanos(latency.mean_ns),
        nanos(latency.p99_ns),
        reading.mean_depth(Some(Issuer::Ours)),
        reading.depth.ours_max
    );
    let (bytes, others) = sum(reading, Issuer::Foreign, |_| true);
    // Writing to a string does not fail.
    let _ = write!(text, "; others {} in {} requests", output::bytes(bytes), others.count);
    if others.count > 0 {
        let _ = write!(text, ", mean {}", nanos(others.mean_ns()));
    }
    let lost = reading.irregular.map_full + reading.irregular.issue_without_completion;
    if lost > 0 {
        let _ = write!(text, "; {lost} more could not be counted");
    }
    text
}

/// Bytes and latencies of the requests of `issuer` that do what is `wanted`.
pub fn sum(
    reading: &DiskReading,
    issuer: Issuer,
    wanted: impl Fn(Operation) -> bool,
) -> (u64, Histogram) {
    let (mut bytes, mut latency) = (0, Histogram::default());
    let of_issuer = reading.requests.iter().filter(|requests| requests.issuer == issuer);
    for requests in of_issuer.filter(|requests| wanted(requests.operation)) {
        bytes += requests.bytes;
        latency.add(&requests.latency);
    }
    (bytes, latency)
}
