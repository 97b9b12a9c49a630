//! `livesnap demo`: a snapshot under load without any virtual machine, and the proof that it is of one instant.
//!
//! ```text
//! mod     the steps, and what is told of them
//! guest   the process that plays the guest
//! vmm     that process as the engine sees it
//! ```

pub mod guest;
mod vmm;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use serde::Serialize;
use serde_json::json;
use snapshot_core::address::{PAGE_BYTES, as_index};
use snapshot_core::image::Snapshot;
use snapshot_core::vmm::Vmm as _;
use snapshot_core::workload::count_strays;
use snapshot_core::{Cancel, Options, Reason, Report};

use self::guest::Request;
use self::vmm::{GuestError, GuestProcess};
use super::snapshot::{Attempt, cancel_on_signal};
use super::target::default_buffer_bytes;
use crate::{Failure, output, progress};

/// One for each virtual CPU of a small guest.
const WRITERS: usize = 2;
/// Pages that are read at once when memory is judged.
const PAGES_PER_READ: u64 = 256;

const EXAMPLES: &str = "\
Examples:
  livesnap demo
  livesnap demo --memory 2GiB --dir /backup
  livesnap demo --json | jq .demo.report.downtime

Needs no QEMU and no set-up, but root: a process of livesnap's own plays the guest. Its files are removed at the end.

Exit codes:
  0    the snapshot is of one instant, and the control is not
  1    failed, or not so
  2    wrong usage
  3    this host cannot do it; the remedy is told
  130  interrupted";

/// Show what livesnap does, on a guest of its own
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Memory of the guest; as much must be free in --dir
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = parse_memory)]
    memory: ByteSize,
    /// Where the snapshot lies while the demo runs
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Report as JSON on standard output
    #[arg(long)]
    json: bool,
}

/// A copy of the guest's memory, judged.
#[derive(Serialize)]
struct Judged {
    pages: u64,
    /// Pages that are not of the expected instant.
    strays: u64,
}

/// What the demo has shown.
#[derive(Serialize)]
struct Shown {
    report: Report,
    /// Pages that the guest wrote between the snapshot's instant and its completion.
    pages_written_meanwhile: u64,
    snapshot: Judged,
    control: Judged,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    let shown = show(args);
    if args.json {
        output::json(&match &shown {
            Ok(shown) => json!({"outcome": "completed", "demo": shown}),
            Err(failure) => failure.json(),
        })?;
    }
    shown.map(drop)
}

/// Takes the steps, and tells of them as they come.
fn show(args: &Args) -> Result<Shown, Failure> {
    let say = |text: &str| if args.json { Ok(()) } else { output::line(text) };
    let cancel = cancel_on_signal()?;
    let pages = as_index(args.memory.as_u64() / PAGE_BYTES);
    let size = guest::Args { writers: WRITERS, pages_per_writer: pages / WRITERS };
    say(&format!(
        "A process plays the guest: {WRITERS} threads overwrite {} of memory, page by page, without rest.\n\
         Every page carries a number that tells when it was written.\n",
        output::bytes(size.ram_bytes())
    ))?;
    let mut guest = GuestProcess::start(&size)?;
    let scratch = Scratch::create(&args.dir)?;

    say("livesnap attaches to it from outside and takes a snapshot while it goes on writing.\n")?;
    let (report, pages_written_meanwhile) = take_snapshot(&mut guest, &scratch, &cancel)?;
    say(&format!(
        "{}\n\nThe guest stood still for {}, and overwrote {} while its memory was being saved.\n",
        progress::summary(&report, &[]),
        progress::nanos(report.downtime.total_ns),
        output::bytes(pages_written_meanwhile * PAGE_BYTES)
    ))?;

    let snapshot = judge_snapshot(&scratch.snapshot(), guest.counters_at_pause())?;
    say(&format!("The snapshot's checksums are right. {}\n", in_words(&snapshot)))?;
    if snapshot.strays > 0 {
        return Err(Failure::new(
            Reason::Corrupt,
            "the snapshot mixes several instants, which must never happen: please report it, with what `livesnap doctor --json` tells",
        ));
    }
    let control = control(&mut guest)?;
    say(&format!(
        "For comparison, the same memory is copied without livesnap while the guest writes. {}",
        in_words(&control)
    ))?;
    if control.strays == 0 {
        return Err(Failure::new(
            Reason::Internal,
            "the comparison came out right too, so the demo has proved nothing: the guest wrote too slowly; give more --memory, or try on a less busy host",
        ));
    }
    Ok(Shown { report, pages_written_meanwhile, snapshot, control })
}

/// Takes the snapshot; returns also how many pages the guest wrote from its instant until it was complete.
fn take_snapshot(
    guest: &mut GuestProcess,
    scratch: &Scratch,
    cancel: &Cancel,
) -> Result<(Report, u64), Failure> {
    let options = Options { buffer_bytes: default_buffer_bytes(), ..Options::default() };
    let report = Attempt::new(None).take(guest, &scratch.snapshot(), &options, cancel)?;
    let now = guest.ask(Request::Look)?;
    let written = now.iter().zip(guest.counters_at_pause()).map(|(now, then)| now - then).sum();
    Ok((report, written))
}

/// Verifies the snapshot as `livesnap verify` does, and judges every page of it.
fn judge_snapshot(dir: &Path, counters: &[u64]) -> Result<Judged, Failure> {
    let snapshot = Snapshot::open(dir)?;
    snapshot.verify(&mut |_, _| {})?;
    let block = snapshot.manifest().ram.blocks.first();
    let block =
        block.ok_or_else(|| Failure::new(Reason::Internal, "the demo's snapshot is empty"))?;
    let path = snapshot.ram_path();
    File::open(&path)
        .and_then(|ram| judge(&ram, block.pages_offset, block.len_bytes / PAGE_BYTES, counters))
        .map_err(|error| failed("read", &path, &error))
}

/// Judges what anybody gets who reads the running guest's memory, by the counters of a pause just before.
fn control(guest: &mut GuestProcess) -> Result<Judged, Failure> {
    let path = PathBuf::from(format!("/proc/{}/mem", guest.pid()));
    let counters = guest.ask(Request::Pause)?;
    guest.ask(Request::Resume)?;
    let block = guest.ram();
    File::open(&path)
        .and_then(|memory| judge(&memory, block.hva.0, block.len_bytes / PAGE_BYTES, &counters))
        .map_err(|error| failed("read", &path, &error))
}

/// Reads `pages` of `file` from `offset` on and counts those that are not of the instant of `counters`.
fn judge(file: &File, offset: u64, pages: u64, counters: &[u64]) -> io::Result<Judged> {
    let mut strays = 0;
    for first in (0..pages).step_by(as_index(PAGES_PER_READ)) {
        let mut bytes = vec![0; as_index((pages - first).min(PAGES_PER_READ) * PAGE_BYTES)];
        file.read_exact_at(&mut bytes, offset + first * PAGE_BYTES)?;
        strays += count_strays(&bytes, first, pages, counters);
    }
    Ok(Judged { pages, strays })
}

fn in_words(judged: &Judged) -> String {
    let Judged { pages, strays } = judged;
    match strays {
        0 => format!("All of its {pages} pages are of one instant."),
        _ => format!("{strays} of its {pages} pages are of another instant than the rest."),
    }
}

/// A directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn create(parent: &Path) -> Result<Self, Failure> {
        let path = parent.join(format!("livesnap-demo-{}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| failed("create the directory", &path, &error))?;
        Ok(Self(path))
    }

    fn snapshot(&self) -> PathBuf {
        self.0.join("snapshot")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            output::error(failed("remove", &self.0, &error));
        }
    }
}

impl From<GuestError> for Failure {
    fn from(error: GuestError) -> Self {
        Self::new(error.reason(), error)
    }
}

fn failed(operation: &str, path: &Path, error: &io::Error) -> Failure {
    let path = path.display();
    Failure::new(Reason::Io, format!("could not {operation} {path}: {error}; see --dir"))
}

/// Less is over before anything can be seen; more than a host has is for `GuestError::Lost` to tell.
fn parse_memory(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse()?;
    let allowed = ByteSize::mib(16)..=ByteSize::tib(1);
    if allowed.contains(&size) { Ok(size) } else { Err("give 16MiB to 1TiB".into()) }
}
