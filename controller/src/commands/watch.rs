//! `livesnap watch`: how fast a running QEMU's guest dirties its memory, without a snapshot.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytesize::ByteSize;
use procfs::process::Process;
use rustix::process::Pid;
use serde::Serialize;
use snapshot_core::dirty_rate::{Sampler, SamplerOptions, Window};
use snapshot_core::vmm::Vmm as _;
use snapshot_core::vmm::qemu::{QemuOptions, QemuVmm};

use super::snapshot::{cancel_on_signal, parse_pid};
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
    #[arg(long, value_name = "SIZE", default_value = "128MiB")]
    sample: ByteSize,
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
    /// For each virtual CPU, the share of the interval in which its thread had a CPU of the host.
    vcpu_shares: &'a [f64],
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
    let (mut sampler, mut cpus) = attach(qemu, &options)?;
    let mut lines_left = args.count;
    while lines_left != Some(0)
        && let Some(window) = sampler.window(args.interval, &cancel)?
    {
        let line = Line { at_unix_ms: unix_ms(), window: &window, vcpu_shares: &cpus.shares() };
        let text = if args.json { output::json_line(&line)? } else { in_words(&line) };
        if !output::heard_line(text)? {
            break;
        }
        lines_left = lines_left.map(|left| left - 1);
    }
    Ok(())
}

/// Takes from QEMU what is needed, and lets its control socket go.
fn attach(qemu: QemuOptions, options: &SamplerOptions) -> Result<(Sampler, CpuClocks), Failure> {
    let refused =
        |error: snapshot_core::vmm::qemu::QemuError| Failure::refused(error.reason(), error);
    let mut vmm = QemuVmm::attach_to_measure(qemu).map_err(refused)?;
    let threads = vmm.cpu_threads().map_err(refused)?;
    let sampler = Sampler::attach(&mut vmm, options)
        .map_err(|error| Failure::refused(error.reason(), error))?;
    Ok((sampler, CpuClocks::new(vmm.pid(), &threads)))
}

fn in_words(line: &Line<'_>) -> String {
    let window = line.window;
    let rate = window.rate;
    let percent = window.sampled_bytes * 100 / window.ram_bytes.max(1);
    let cpus: Vec<_> =
        line.vcpu_shares.iter().map(|share| format!("{:.0} %", share * 100.0)).collect();
    format!(
        "{:>8.1} MiB/s ± {:<7.1} seen in {percent} % of {}{}   vCPUs {}",
        mib(rate.bytes_per_second),
        mib(rate.error_bytes_per_second),
        output::bytes(window.ram_bytes),
        if window.sampled_huge_bytes > 0 { ", by huge pages" } else { "" },
        cpus.join(" ")
    )
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

/// The CPU time of a process's virtual CPUs.
struct CpuClocks {
    tasks: Vec<Option<procfs::process::Task>>,
    /// Of each, in nanoseconds, when it was last asked.
    last_ns: Vec<Option<u64>>,
    asked: Instant,
}

impl CpuClocks {
    fn new(pid: Pid, threads: &[Pid]) -> Self {
        let process = Process::new(pid.as_raw_pid()).ok();
        let task = |thread: &Pid| process.as_ref()?.task_from_tid(thread.as_raw_pid()).ok();
        let tasks = threads.iter().map(task).collect();
        let mut clocks = Self { tasks, last_ns: vec![None; threads.len()], asked: Instant::now() };
        clocks.shares();
        clocks
    }

    /// The share of a host CPU that each had since this was last asked; nothing of threads that are gone.
    fn shares(&mut self) -> Vec<f64> {
        let elapsed = std::mem::replace(&mut self.asked, Instant::now()).elapsed();
        let mut shares = Vec::with_capacity(self.tasks.len());
        for (task, last_ns) in self.tasks.iter().zip(&mut self.last_ns) {
            let now_ns =
                task.as_ref().and_then(|task| Some(task.schedstat().ok()?.sum_exec_runtime));
            let used_ns = now_ns.zip(*last_ns).map(|(now, last)| now.saturating_sub(last));
            *last_ns = now_ns;
            let share = used_ns
                .map(|ns| Duration::from_nanos(ns).as_secs_f64() / elapsed.as_secs_f64().max(1e-9));
            shares.push(share.unwrap_or(0.0));
        }
        shares
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A duration in which something can be seen.
fn parse_interval(text: &str) -> Result<Duration, String> {
    const MIN: Duration = Duration::from_millis(10);
    let interval = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if interval < MIN { Err("must be at least 10ms".into()) } else { Ok(interval) }
}
