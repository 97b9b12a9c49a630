//! `cargo xtask bench --control`: what the controller makes of real guests and slow destinations, beside the same without it.
//!
//! ```text
//! mod     which guests, which destinations
//! cell    one snapshot: how it ended, and what it cost
//! table   as Markdown
//! ```
//!
//! Each writer's guest is booted once; its snapshots with and without control come in turns.

mod cell;
mod table;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use livesnap_tests::interrupt;
use livesnap_tests::qemu::{Load, Qemu};
use serde::{Deserialize, Serialize};

use crate::BOOT;
use crate::figures::Figures;
use cell::Cell;

/// RAM of each guest, of which its program writes [`WRITTEN_MIB`].
const MEMORY_MIB: u32 = 384;
const WRITTEN_MIB: u32 = 256;
/// Less than the guests write over and over, so that what is written does not fit.
const BUFFER: &str = "64MiB";
/// A million bytes.
const MB: u64 = 1_000_000;

/// What the controller makes of real guests.
#[derive(clap::Args)]
#[command(next_help_heading = "The controller on real guests")]
pub struct ControlArgs {
    /// Measure what the controller makes of slow destinations instead, and the same without it; --update-docs is then
    /// for docs/controller.*
    #[arg(long, conflicts_with_all = ["quick", "sizes", "ram", "runs"])]
    pub control: bool,
    /// What the guests do
    #[arg(long, requires = "control", value_delimiter = ',', default_values_t = Writer::ALL)]
    writers: Vec<Writer>,
    /// What destinations take, in MB/s
    #[arg(long, requires = "control", value_name = "RATE", value_delimiter = ',', default_values_t = [20, 50, 100, 400])]
    limits: Vec<u64>,
}

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Writer {
    /// 64 pages a second, of 1 MiB.
    Idle,
    /// 192 MiB over and over, one page after another.
    Sequential,
    /// 192 MiB over and over, each page far from the one before.
    Random,
    /// 48 MiB over and over, each page far from the one before: less than the buffer.
    HotSet,
}

impl Writer {
    const ALL: [Self; 4] = [Self::Idle, Self::Sequential, Self::Random, Self::HotSet];

    fn load(self) -> Load {
        let (ring_mib, random, rate) = match self {
            Self::Idle => (1, false, 64),
            Self::Sequential => (192, false, 0),
            Self::Random => (192, true, 0),
            Self::HotSet => (48, true, 0),
        };
        let populate_mib = WRITTEN_MIB - ring_mib;
        Load { populate_mib, ring_mib, random, rate, ..Load::default() }
    }

    const fn words(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Sequential => "sequential",
            Self::Random => "random",
            Self::HotSet => "hot set",
        }
    }
}

impl std::fmt::Display for Writer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::HotSet => "hot-set",
            other => other.words(),
        })
    }
}

/// Measures, or takes figures from a file, and tells them. A snapshot that fails leaves a row out, and no others.
///
/// # Errors
/// If a guest cannot be had, a snapshot failed, or the file cannot be read or written.
pub fn run(args: &crate::Args) -> Result<()> {
    let ControlArgs { writers, limits, .. } = &args.control;
    let mut failures = 0_u32;
    let measure = |&writer| measure_writer(writer, limits, &mut failures);
    let (from, json) = (args.from.as_deref(), args.json.as_deref());
    let figures = Figures::read_or_measure(from, json, writers, measure)?;
    let table = table::table(&figures);
    println!("{table}");
    if args.update_docs {
        figures.put_into(Path::new("docs/controller.md"), &table)?;
    }
    ensure!(failures == 0, "not in the table, as they failed: {failures}");
    Ok(())
}

/// Boots the guest and takes snapshots of it with and without control in turns, to each destination; counts those that
/// fail.
fn measure_writer(writer: Writer, limits: &[u64], failures: &mut u32) -> Result<Vec<Cell>> {
    eprintln!("{writer}: booting");
    let dir = tempfile::Builder::new()
        .prefix("livesnap-bench-")
        .tempdir_in("/var/tmp")
        .context("cannot make a directory in /var/tmp")?;
    let load = writer.load();
    // One vCPU more than workers: else the guest's own scheduling would hide what stalls them.
    let vcpus = load.workers + 1;
    let mut guest = Qemu::builder().memory_mib(MEMORY_MIB).vcpus(vcpus).load(load).start()?;
    guest.wait_ready(BOOT)?;
    let mut cells = Vec::new();
    for &limit_mb_s in limits {
        for is_controlled in [true, false] {
            let plan = cell::Plan { writer, limit_mb_s, is_controlled };
            match plan.measure(&mut guest, dir.path()) {
                Ok(cell) => {
                    eprintln!("{}", table::row(&cell).trim_end());
                    cells.push(cell);
                }
                Err(error) => {
                    interrupt::check()?;
                    let control = if is_controlled { "on" } else { "off" };
                    eprintln!("{writer}, {limit_mb_s} MB/s, control {control}: failed: {error:#}");
                    *failures += 1;
                }
            }
        }
    }
    let beat = guest.wait_heartbeat(BOOT, |_| true)?;
    ensure!(beat.inconsistent == 0, "{writer}: the guest found {} wrong pages", beat.inconsistent);
    Ok(cells)
}
