//! `livesnap watch`: how fast a running QEMU's guest dirties its memory, without a snapshot.

mod beside;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytesize::ByteSize;
use rustix::process::Pid;
use serde::Serialize;
use snapshot_core::Reason;
use snapshot_core::dirty_rate::{Sampler, SamplerOptions, Window};
use snapshot_core::vmm::Vmm as _;
use snapshot_core::vmm::qemu::{QemuOptions, QemuVmm};

use self::beside::{Beside, Told};
use super::snapshot::cancel_on_signal;
use super::target::parse_pid;
use crate::{Failure, output};

const EXAMPLES: &str = "\
Examples:
  livesnap watch --qmp /run/vm1/qmp.sock
  livesnap watch --qmp /run/vm1/qmp.sock --interval 10s --count 6
  livesnap watch --qmp /run/vm1/qmp.sock --json | jq .bytes_per_second

A random sample of guest memory, other chunks in each interval, is watched for first writes. The rate is that of all
memory, with a 95 % confidence interval: bytes of pages first written to in the interval, per second. A page that is
written to again and again counts once an interval. In huge pages a write counts as the whole huge page, as it would
for a snapshot. The guest is not paused; a page costs it a microsecond or so when it first writes to it, a huge page
some tens. The QMP socket is only needed at the beginning. Needs Linux 6.7.

Exit codes:
  0  done, or ended by Ctrl-C or SIGTERM
  1  failed, for example because QEMU ended or a snapshot began; the guest runs on
  2  wrong usage
  3  refused before anything was touched; every reason and its remedy is told";

/// Show how fast a running virtual machine writes to its memory
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// QMP socket of the running QEMU, one that no other program is connected to
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// QEMU's process id, where another process (such as libvirt) made the socket
    #[arg(long, value_parser = parse_pid)]
    pid: Option<Pid>,
    /// Time between two lines
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_interval)]
    interval: Duration,
    /// End after so many lines [default: with Ctrl-C]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Memory that is watched at a time: more is more exact and costs the guest more
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    sample: ByteSize,
    /// Tell of the disk of this directory as well, where a snapshot would go
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Report as JSON, one line for each interval
    #[arg(long)]
    json: bool,
}

/// One interval.
#[derive(Serialize)]
struct Line<'a> {
    /// When it ended.
    at_unix_ms: u64,
    #[serde(flatten)]
    window: &'a Window,
    #[serde(flatten)]
    beside: Told,
}

/// Runs the command.
pub fn run(args: Args) -> Result<(), Failure> {
    let as_json = args.json;
    let outcome = watch(args);
    if let (true, Err(failure)) = (as_json, &outcome) {
        output::line(output::json_line(&failure.json())?)?;
    }
    outcome
}

fn watch(args: Args) -> Result<(), Failure> {
    let cancel = cancel_on_signal()?;
    let qemu = QemuOptions { pid: args.pid, ..QemuOptions::new(args.qmp) };
    let options = SamplerOptions::new(args.sample.as_u64(), unix_ms());
    let (mut sampler, mut beside) = attach(qemu, &options, args.out.as_deref())?;
    let mut lines_left = args.count;
    while lines_left != Some(0)
        && let Some(window) = sampler.window(args.interval, &cancel)?
    {
        let beside = beside.take().map_err(|error| Failure::new(Reason::Internal, error))?;
        let line = Line { at_unix_ms: unix_ms(), window: &window, beside };
        let text = if args.json { output::json_line(&line)? } else { in_words(&line) };
        if !output::heard_line(text)? {
            break;
        }
        lines_left = lines_left.map(|left| left - 1);
    }
    Ok(())
}

/// Takes from QEMU what is needed, and lets its control socket go.
fn attach(
    qemu: QemuOptions,
    options: &SamplerOptions,
    out: Option<&Path>,
) -> Result<(Sampler, Beside), Failure> {
    let refused =
        |error: snapshot_core::vmm::qemu::QemuError| Failure::refused(error.reason(), error);
    let mut vmm = QemuVmm::attach_to_measure(qemu).map_err(refused)?;
    let threads = vmm.cpu_threads().map_err(refused)?;
    let sampler = Sampler::attach(&mut vmm, options)
        .map_err(|error| Failure::refused(error.reason(), error))?;
    let mut beside = Beside::new(vmm.pid(), &threads);
    if let Some(Err(error)) = out.map(|out| beside.add_disk(out, vmm.pid())) {
        output::error(format_args!("warning: {error}"));
    }
    Ok((sampler, beside))
}

fn in_words(line: &Line<'_>) -> String {
    let window = line.window;
    let rate = window.rate;
    let percent = window.sampled_bytes * 100 / window.ram_bytes.max(1);
    format!(
        "{:>8.1} MiB/s ± {:<7.1} seen in {percent} % of {}{}   {}",
        mib(rate.bytes_per_second),
        mib(rate.error_bytes_per_second),
        output::bytes(window.ram_bytes),
        if window.sampled_huge_bytes > 0 { ", by huge pages" } else { "" },
        line.beside.in_words()
    )
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A duration in which something can be seen.
pub fn parse_interval(text: &str) -> Result<Duration, String> {
    const MIN: Duration = Duration::from_millis(10);
    let interval = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if interval < MIN { Err("must be at least 10ms".into()) } else { Ok(interval) }
}
