//! The probes of a snapshot: attached before RAM is protected, read when it is given up, and told in the report.
//!
//! A snapshot never fails for want of them.

use std::fmt::Write as _;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use livesnap_control::Stall;
use livesnap_ebpf::{
    Histogram, Options, ProbeError, Probes, Range, Reading, Refusal, Summary, Tier,
};
use serde::Serialize;
use serde_json::{Value, json};
use snapshot_core::vmm::Vmm;
use snapshot_core::{Phase, Progress};

use crate::progress::nanos;

/// Which probes to attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The best that the kernel lets us have.
    Auto,
    /// None.
    Off,
    /// This one or none.
    Only(Tier),
}

impl Choice {
    /// Reads what stands on the command line.
    pub fn parser() -> impl TypedValueParser<Value = Self> {
        let tiers = Tier::ALL.map(Tier::as_str);
        let words = ["auto", "none"].into_iter().chain(tiers);
        PossibleValuesParser::new(words).map(|word| match word.as_str() {
            "auto" => Self::Auto,
            word => Tier::ALL
                .into_iter()
                .find(|tier| tier.as_str() == word)
                .map_or(Self::Off, Self::Only),
        })
    }
}

/// The probes of one snapshot.
pub enum SnapshotProbes {
    /// Nobody wanted them.
    Off,
    /// They could not be attached.
    Absent(ProbeError),
    /// They count.
    Attached(Box<Attached>),
}

/// Probes that count, and what they have told so far.
pub struct Attached {
    probes: Probes,
    /// What they had counted when RAM was given up.
    reading: Option<Result<Reading, ProbeError>>,
    /// Whether the consistency point was marked.
    mark: Option<Result<(), ProbeError>>,
}

/// Durations so far, for programs that follow a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Durations {
    #[serde(flatten)]
    summary: Summary,
    /// For each bucket that is not empty, in ascending order: its longest duration in nanoseconds, 2^64 - 1 for the last
    /// one, and how many lie in it.
    buckets: Vec<(u64, u64)>,
}

impl Durations {
    /// Those of `histogram`.
    pub fn new(histogram: &Histogram) -> Self {
        let buckets = histogram.buckets().map(|((_, longest_ns), count)| (longest_ns, count));
        Self { summary: histogram.summary(), buckets: buckets.collect() }
    }
}

/// Stalls so far, for programs that follow a snapshot.
#[derive(Clone, Debug, Serialize)]
pub struct StallsSoFar {
    tier: Tier,
    /// Faults that could not be counted.
    lost: u64,
    #[serde(flatten)]
    durations: Durations,
}

impl SnapshotProbes {
    /// Attaches to the process and the RAM of `vmm`.
    pub fn attach(choice: Choice, vmm: &mut dyn Vmm) -> Self {
        let tier = match choice {
            Choice::Off => return Self::Off,
            Choice::Auto => None,
            Choice::Only(tier) => Some(tier),
        };
        // If the VMM does not tell its RAM, the snapshot fails for that.
        let Ok(layout) = vmm.ram_layout() else { return Self::Off };
        let ranges: Vec<Range> = layout
            .blocks()
            .iter()
            .map(|block| Range { start: block.hva.0, len_bytes: block.len_bytes })
            .collect();
        let pid = vmm.pid().as_raw_nonzero().get().unsigned_abs();
        match Probes::attach(pid, &ranges, &Options { tier, ..Options::default() }) {
            Ok(probes) => Self::Attached(Box::new(Attached { probes, reading: None, mark: None })),
            Err(error) => Self::Absent(error),
        }
    }

    /// Follows the snapshot: faults are counted anew from the consistency point on, until RAM is given up.
    pub fn observe(&mut self, progress: &Progress) {
        let Self::Attached(attached) = self else { return };
        let Attached { probes, reading, mark } = &mut **attached;
        if progress.is_consistent && mark.is_none() {
            *mark = Some(probes.mark());
        }
        if progress.phase >= Phase::Draining && reading.is_none() {
            *reading = Some(probes.read());
        }
    }

    /// Stalls since the consistency point so far, and how many of them were longer than `limit_ns`; nothing where they
    /// are not measured.
    pub fn stalls_over(&self, limit_ns: u64) -> Option<Stall> {
        let Self::Attached(attached) = self else { return None };
        let reading = attached.probes.read().ok()?;
        let histogram = reading.stalls.after();
        let over = histogram.buckets().filter(|((shortest_ns, _), _)| *shortest_ns >= limit_ns);
        Some(Stall {
            faults: histogram.count,
            over_limit: over.map(|(_, count)| count).sum(),
            lost_events: reading.stalls.lost.map_full,
        })
    }

    /// Stalls since the consistency point so far; nothing before it, or where they are not measured.
    pub fn so_far(&self) -> Option<StallsSoFar> {
        let Self::Attached(attached) = self else { return None };
        attached.mark.as_ref().filter(|mark| mark.is_ok())?;
        let read_now;
        let reading = match &attached.reading {
            Some(reading) => reading,
            None => {
                read_now = attached.probes.read();
                &read_now
            }
        };
        let stalls = &reading.as_ref().ok()?.stalls;
        Some(StallsSoFar {
            tier: attached.probes.tier(),
            lost: stalls.lost.map_full,
            durations: Durations::new(&stalls.after()),
        })
    }

    /// For programs.
    pub fn json(&self) -> Value {
        match self {
            Self::Off => Value::Null,
            Self::Absent(error) => json!({"tier": null, "problem": error.to_string()}),
            Self::Attached(attached) => {
                let mut value = json!({
                    "tier": attached.probes.tier(),
                    "refused": attached.probes.refusals().iter().map(refusal_json).collect::<Vec<_>>(),
                });
                match attached.reading() {
                    Ok(reading) => value["stalls"] = stalls_json(reading),
                    Err(problem) => value["problem"] = problem.into(),
                }
                value
            }
        }
    }

    /// For people: rows of a name and a value.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Off => Vec::new(),
            Self::Absent(error) => vec![("probes", error.to_string())],
            Self::Attached(attached) => {
                let probes = &attached.probes;
                let mut rows = match attached.reading() {
                    Ok(reading) => stalls_in_words(reading),
                    Err(problem) => vec![("stalls", problem)],
                };
                rows.push(("probes", probes.tier().to_string()));
                let refused = probes.refusals().iter();
                rows.extend(refused.map(|refusal| ("", format!("not {refusal}"))));
                rows
            }
        }
    }
}

impl Attached {
    fn reading(&self) -> Result<&Reading, String> {
        if let Some(Err(error)) = &self.mark {
            return Err(error.to_string());
        }
        match &self.reading {
            Some(Ok(reading)) => Ok(reading),
            Some(Err(error)) => Err(error.to_string()),
            None => Err("the snapshot ended before the probes were read".into()),
        }
    }
}

fn refusal_json(refusal: &Refusal) -> Value {
    json!({
        "tier": refusal.tier,
        "why": refusal.cause.to_string(),
        "errno": refusal.cause.errno(),
    })
}

fn stalls_json(reading: &Reading) -> Value {
    let threads = reading.stalls.threads.iter().map(|thread| {
        json!({
            "tid": thread.tid,
            "period": thread.period,
            "mode": thread.mode,
            "kind": thread.kind,
            "faults": thread.histogram.summary(),
        })
    });
    let served = reading.stalls.served();
    json!({
        "served_by_kernel": reading
            .stalls
            .kinds_are_known
            .then(|| json!({"count": served.count, "sum_ns": served.sum_ns})),
        "copy": reading.stalls.after().summary(),
        "arming": reading.stalls.before().summary(),
        "threads": threads.collect::<Vec<_>>(),
        "lost": reading.stalls.lost,
    })
}

fn stalls_in_words(reading: &Reading) -> Vec<(&'static str, String)> {
    let copy = reading.stalls.after().summary();
    let arming = reading.stalls.before().summary();
    let mut text = format!(
        "{} in the copy, {} while arming; whole fault mean {}, p50 {}, p99 {}, max {}",
        copy.count,
        arming.count,
        nanos(copy.mean_ns),
        nanos(copy.p50_ns),
        nanos(copy.p99_ns),
        nanos(copy.max_ns)
    );
    let lost = reading.stalls.lost.map_full;
    if lost > 0 {
        // Writing to a string does not fail.
        let _ = write!(text, "; {lost} more could not be counted");
    }
    let served = reading.stalls.served();
    let mut rows = vec![("stalls", text)];
    if !reading.stalls.kinds_are_known {
        let text = "write faults that the kernel served by itself are among them: without its type information they \
                    cannot be told apart";
        rows.push(("", text.into()));
    } else if served.count > 0 {
        let text = format!(
            "and {} write faults that the kernel served by itself, together {}",
            served.count,
            nanos(served.sum_ns)
        );
        rows.push(("", text));
    }
    rows
}

#[cfg(test)]
mod tests {
    use livesnap_ebpf::Stalls;

    use super::*;

    fn told(kinds_are_known: bool) -> (Value, Vec<(&'static str, String)>) {
        let stalls = Stalls { kinds_are_known, ..Stalls::default() };
        let reading = Reading { stalls };
        (stalls_json(&reading), stalls_in_words(&reading))
    }

    #[test]
    fn it_says_when_kinds_of_faults_cannot_be_told_apart() {
        let (value, rows) = told(false);
        assert!(value["served_by_kernel"].is_null(), "{value}");
        assert!(rows[1].1.contains("cannot be told apart"), "{rows:?}");
    }

    #[test]
    fn of_faults_that_did_not_happen_nothing_is_said() {
        let (value, rows) = told(true);
        assert_eq!(value["served_by_kernel"]["count"], 0, "{value}");
        assert_eq!(rows.len(), 1, "{rows:?}");
    }
}
