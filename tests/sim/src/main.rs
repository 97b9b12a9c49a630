//! `livesnap-sim`: runs a series of seeds and prints the table, or one seed with its trace. Run by `cargo xtask sim`.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{BufReader, BufWriter, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use livesnap_control::record::Head;
use livesnap_sim::judge::{Judged, Variant, judge};
use livesnap_sim::law::{Controlled, Until, run};
use livesnap_sim::record;
use livesnap_sim::scenario::Scenario;
use livesnap_sim::series;
use livesnap_sim::table::Table;

/// Judges the control core on simulated guests and disks; exit 1 if a target is missed.
#[derive(Debug, Parser)]
struct Arguments {
    /// Number of scenarios.
    #[arg(long, default_value_t = 5000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1_000_000)]
    first: u64,
    /// One scenario only, with a line for each tick.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// With --seed: record the run in this file.
    #[arg(long, requires = "seed")]
    record: Option<PathBuf>,
    /// Put a recorded run through the control core again.
    #[arg(long, exclusive = true)]
    replay: Option<PathBuf>,
    /// Keep the first-touch counters from it: this must miss targets.
    #[arg(long)]
    blindfold: bool,
    /// Only those scenarios whose guest is of this kind, such as "small ring".
    #[arg(long)]
    guest: Option<String>,
    /// Also list the seeds that were given up falsely, missed, or broke a limit.
    #[arg(long)]
    list: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let variant = if arguments.blindfold { Variant::Blindfolded } else { Variant::Whole };
    let mut out = std::io::stdout().lock();
    if let Some(path) = arguments.replay {
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let ticks = record::replay(BufReader::new(file))?;
        writeln!(out, "{ticks} ticks, every command as recorded")?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(seed) = arguments.seed {
        return trace(&mut out, seed, variant, arguments.record).map(|()| ExitCode::SUCCESS);
    }
    let mut judged = series::judge_all(arguments.first, arguments.seeds, variant)?;
    if let Some(kind) = &arguments.guest {
        judged.retain(|case| case.scenario.guest == kind);
    }
    if arguments.list {
        list(&mut out, &judged)?;
    }
    let table = Table::of(&judged);
    write!(out, "{table}")?;
    Ok(if table.missed().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn list(out: &mut impl std::io::Write, judged: &[Judged]) -> Result<()> {
    for case in judged {
        let words = [
            (case.is_false_abort(), "false abort"),
            (case.is_missed_abort(), "missed abort"),
            (case.is_broken(), "limit broken"),
            (case.stalls_more_than_waiting(), "stalls"),
        ];
        for (_, word) in words.into_iter().filter(|(holds, _)| *holds) {
            let Scenario { seed, guest, disk, .. } = &case.scenario;
            writeln!(out, "{seed}: {guest} on {disk}: {word}; {:?}", case.controlled)?;
        }
    }
    Ok(())
}

/// One scenario: what it is, each tick, and how it came out.
fn trace(
    out: &mut impl std::io::Write,
    seed: u64,
    variant: Variant,
    to: Option<PathBuf>,
) -> Result<()> {
    let scenario = Scenario::new(seed);
    let mut law = Controlled::recorded(&scenario)?;
    run(&scenario, &mut law, f64::INFINITY, Until::Over);
    let ticks = law.into_record();
    writeln!(out, "{scenario:#?}")?;
    for tick in &ticks {
        let Some(sample) = tick.sample else {
            writeln!(out, "         lost      {:?}", tick.command.because)?;
            continue;
        };
        writeln!(
            out,
            "{:8.2} s  buffer {:5} of {:5} MiB  unsaved {:6} MiB  touched {:6} MiB  cpu {:4.2}  {:?}  full in {:.2?} s",
            std::time::Duration::from_nanos(sample.taken_ns).as_secs_f64(),
            sample.buffer_used_bytes >> 20,
            sample.buffer_limit_bytes >> 20,
            (sample.total_bytes - sample.saved_bytes) >> 20,
            sample.touched_bytes >> 20,
            tick.command.cpu_ratio,
            tick.command.because,
            tick.command.forecast.full_after_s,
        )?;
    }
    if let Some(abort) = ticks.last().and_then(|tick| tick.command.abort) {
        writeln!(out, "{abort:#?}")?;
    }
    let judged = judge(seed, variant)?;
    writeln!(out, "oracle {:#?}", judged.oracle)?;
    writeln!(out, "controlled {:#?}\nwaiting {:#?}", judged.controlled, judged.waiting)?;
    if let Some(path) = to {
        let file =
            File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let head = Head { policy: scenario.policy, vcpus: scenario.vcpus.len() };
        record::write(&mut BufWriter::new(file), &head, &ticks)?;
    }
    Ok(())
}
