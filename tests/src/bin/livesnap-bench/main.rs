//! `cargo xtask bench`: livesnap against QEMU's own background-snapshot, on the same guest, in turns.
//!
//! ```text
//! main      which guests, how often
//! measure   one snapshot by one tool, seen from outside and from within the guest
//! report    medians, tables, targets
//! chart     the same as a picture
//! figures   what was measured, in files and pages
//! control   what the controller makes of slow destinations, which is another table
//! ```
//!
//! Run by people. One guest runs at a time, on a machine that should have nothing else to do.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "standard output is what this program is for")]

mod chart;
mod control;
mod figures;
mod measure;
mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use livesnap_tests::interrupt;
use livesnap_tests::qemu::{Load, Qemu, Ram};
use serde::{Deserialize, Serialize};

use crate::figures::Figures;
use crate::measure::{Run, Tool};

/// MiB that the guest rewrites over and over.
const RING_MIB: u32 = 256;
/// RAM of the guest beyond what its program writes: kernel and initramfs, and for each of so many MiB another for
/// `struct page` and page tables.
const OVERHEAD_MIB: u32 = 256;
const OVERHEAD_SHARE: u32 = 32;
/// Pages a second of a worker that is not to keep its CPU busy.
const PACED_RATE: u32 = 5_000;
/// Size of the guest with such a worker, in MiB.
const PACED_MIB: u32 = 2_048;
/// From this size on, [`RUNS_LARGE`].
const LARGE_MIB: u32 = 4_096;
const RUNS: u32 = 5;
const RUNS_LARGE: u32 = 3;
const RUNS_QUICK: u32 = 1;
/// Emulation writes some 100 MiB a second.
const BOOT: Duration = Duration::from_secs(600);

/// Measure livesnap against QEMU's background-snapshot: downtime, total time, and what the guest notices
#[derive(Parser)]
#[command(name = "livesnap-bench", version)]
struct Args {
    /// A first look: 512 MiB and 2 GiB, one snapshot each
    #[arg(long, conflicts_with = "update_docs")]
    quick: bool,
    /// Guest memory that is written before, in MiB [default: 512,2048,4096,8192]
    #[arg(long, value_name = "MIB", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(512..))]
    sizes: Vec<u32>,
    /// What guest RAM is made of
    #[arg(long, value_delimiter = ',', default_values_t = Kind::ALL)]
    ram: Vec<Kind>,
    /// Snapshots by each tool of each guest [default: 5, and 3 from 4 GiB on]
    #[arg(long)]
    runs: Option<u32>,
    /// Where to write all figures as JSON, a line for each guest, after each guest
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure nothing: take the figures from what --json has written
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "sizes", "runs", "json"])]
    from: Option<PathBuf>,
    /// Put table, chart and figures into docs/performance.* below the current directory
    #[arg(long)]
    update_docs: bool,
    #[command(flatten)]
    control: control::ControlArgs,
}

/// What guest RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    /// Private memory in transparent huge pages, where the host has them: QEMU's default.
    Anonymous,
    /// Private memory in 4 KiB pages.
    SmallPages,
    /// A shared memfd.
    Memfd,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Anonymous, Self::SmallPages, Self::Memfd];

    fn ram(self) -> Ram {
        match self {
            Self::Anonymous => Ram::Anonymous,
            Self::SmallPages => Ram::AnonymousSmallPages,
            Self::Memfd => Ram::Memfd,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::SmallPages => "anonymous, 4 KiB pages",
            Self::Memfd => "memfd",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Anonymous => "anonymous",
            Self::SmallPages => "small-pages",
            Self::Memfd => "memfd",
        })
    }
}

/// One guest and all that was measured on it.
#[derive(Debug, Serialize, Deserialize)]
struct Case {
    populated_mib: u32,
    kind: Kind,
    /// Whether the worker keeps to [`PACED_RATE`] instead of writing as fast as it can.
    paced: bool,
    runs: Vec<Run>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let run = if args.control.control { control::run } else { run };
    match interrupt::watch().and_then(|()| run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("livesnap-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let measure = |case| Ok(vec![measure_case(case, args)?]);
    let (from, json) = (args.from.as_deref(), args.json.as_deref());
    let figures = Figures::read_or_measure(from, json, plan(args), measure)?;
    let tables = report::tables(&figures);
    println!("{tables}");
    if args.update_docs {
        let page = Path::new("docs/performance.md");
        figures.put_into(page, &tables)?;
        figures::write(&page.with_extension("svg"), &chart::draw(&figures.cases))?;
    }
    Ok(())
}

/// The guests to measure, small ones first; those of the middle size once more, paced.
fn plan(args: &Args) -> Vec<Case> {
    let sizes = match (&args.sizes[..], args.quick) {
        ([], true) => &[512, 2_048][..],
        ([], false) => &[512, 2_048, 4_096, 8_192],
        (sizes, _) => sizes,
    };
    let case = |populated_mib, kind, paced| Case { populated_mib, kind, paced, runs: Vec::new() };
    let full =
        sizes.iter().flat_map(|&size| args.ram.iter().map(move |&kind| case(size, kind, false)));
    let is_paced = sizes.contains(&PACED_MIB);
    let paced = args.ram.iter().filter(|_| is_paced).map(|&kind| case(PACED_MIB, kind, true));
    full.chain(paced).collect()
}

/// Boots the guest and takes snapshots of it by both tools in turns.
fn measure_case(mut case: Case, args: &Args) -> Result<Case> {
    let default = if case.populated_mib >= LARGE_MIB { RUNS_LARGE } else { RUNS };
    let runs = args.runs.unwrap_or(if args.quick { RUNS_QUICK } else { default });
    let paced = if case.paced { ", paced" } else { "" };
    let name = format!("{} MiB, {}{paced}", case.populated_mib, case.kind.words());
    eprintln!("{name}: booting");
    let dir = tempfile::Builder::new()
        .prefix("livesnap-bench-")
        .tempdir_in("/var/tmp")
        .context("cannot make a directory in /var/tmp")?;
    let load = Load {
        populate_mib: case.populated_mib - RING_MIB,
        ring_mib: RING_MIB,
        rate: if case.paced { PACED_RATE } else { 0 },
        ..Load::default()
    };
    // One vCPU more than workers: else the guest's own scheduling would hide what stalls them.
    let mut guest = Qemu::builder()
        .memory_mib(case.populated_mib + OVERHEAD_MIB + case.populated_mib / OVERHEAD_SHARE)
        .ram(case.kind.ram())
        .vcpus(load.workers + 1)
        .load(load)
        .start()?;
    guest.wait_ready(BOOT)?;
    for _ in 0..runs {
        for tool in [Tool::Livesnap, Tool::Qemu] {
            let run = measure::run(tool, &mut guest, dir.path())
                .with_context(|| format!("{name}: {tool:?}"))?;
            eprintln!("{name}: {}", report::line(&run));
            case.runs.push(run);
        }
    }
    let beat = guest.wait_heartbeat(BOOT, |_| true)?;
    ensure!(beat.inconsistent == 0, "{name}: the guest found {} wrong pages", beat.inconsistent);
    Ok(case)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_makes_sense() {
        Args::command().debug_assert();
        let refused = ["--control --quick", "--control --runs 1", "--limits 20"];
        for words in refused {
            let words = ["livesnap-bench"].into_iter().chain(words.split(' '));
            assert!(Args::try_parse_from(words).is_err());
        }
    }
}
