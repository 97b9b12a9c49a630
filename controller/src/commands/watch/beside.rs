//! What `livesnap watch` tells beside the dirty rate: what the virtual CPUs got of the host's, page faults, and the disk
//! that a snapshot would be written to.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use livesnap_ebpf::disk::{DiskError, DiskProbe, DiskReading, Issuer};
use procfs::process::Process;
use rustix::process::Pid;
use serde::Serialize;
use serde_json::Value;

use crate::progress::nanos;
use crate::scheduling::{Account, Quotas, ThreadAccount, Threads};
use crate::{disk, output};

/// Everything that is followed.
pub struct Beside {
    vcpus: Threads,
    quotas: Quotas,
    process: Option<Process>,
    page_faults: Option<u64>,
    disk: Option<(DiskProbe, DiskReading)>,
    asked: Instant,
}

/// One interval of it.
#[derive(Serialize)]
pub struct Told {
    /// For each virtual CPU, the share of the interval in which its thread had a CPU of the host.
    vcpu_shares: Vec<f64>,
    vcpus: Vec<ThreadAccount>,
    /// How long quotas held virtual CPUs back; nothing where there are none.
    throttled_ns: Option<u64>,
    /// Of all threads of QEMU, without and with waiting for a disk; not those of a guest under KVM.
    page_faults: Option<u64>,
    disk: Option<Value>,
    #[serde(skip)]
    elapsed: Duration,
    #[serde(skip)]
    disk_in_words: Option<String>,
}

impl Beside {
    /// Of the process `pid` with virtual CPUs in the threads `vcpus`.
    pub fn new(pid: Pid, vcpus: &[Pid]) -> Self {
        let process = Process::new(pid.as_raw_pid()).ok();
        Self {
            vcpus: Threads::new(pid, vcpus),
            quotas: Quotas::of(vcpus),
            page_faults: process.as_ref().and_then(page_faults),
            process,
            disk: None,
            asked: Instant::now(),
        }
    }

    /// Follows the disk of the directory `out` as well. The requests of the process `pid` are told from others.
    ///
    /// # Errors
    /// Where that cannot be seen.
    pub fn add_disk(&mut self, out: &Path, pid: Pid) -> Result<(), DiskError> {
        let probe = DiskProbe::attach(out, pid.as_raw_nonzero().get().unsigned_abs())?;
        let reading = probe.read()?;
        self.disk = Some((probe, reading));
        Ok(())
    }

    /// What came since this was last asked.
    ///
    /// # Errors
    /// If the disk probe cannot be read.
    pub fn take(&mut self) -> Result<Told, DiskError> {
        let elapsed = std::mem::replace(&mut self.asked, Instant::now()).elapsed();
        let vcpus = self.vcpus.take();
        let page_faults = self.process.as_ref().and_then(page_faults);
        let before = std::mem::replace(&mut self.page_faults, page_faults);
        let mut told = Told {
            vcpu_shares: vcpus.iter().map(|vcpu| share(vcpu.account.run_ns, elapsed)).collect(),
            vcpus,
            throttled_ns: self.quotas.take_throttled_ns(),
            page_faults: page_faults.zip(before).map(|(now, then)| now.saturating_sub(then)),
            disk: None,
            elapsed,
            disk_in_words: None,
        };
        if let Some((probe, last)) = &mut self.disk {
            let now = probe.read()?;
            let interval = now.since(last);
            *last = now;
            told.disk = Some(disk::reading_json(&interval));
            told.disk_in_words = Some(disk_in_words(probe, &interval));
        }
        Ok(told)
    }
}

impl Told {
    /// For people, on one line.
    pub fn in_words(&self) -> String {
        let percent = |share: &f64| format!("{:.0} %", share * 100.0);
        let shares: Vec<_> = self.vcpu_shares.iter().map(percent).collect();
        let sum = Account::sum(&self.vcpus);
        let mut text = format!("vCPUs {}", shares.join(" "));
        // Writing to a string does not fail.
        let _ = write!(text, " (waiting {})", percent(&share(sum.wait_ns, self.elapsed)));
        if let Some(ns) = self.throttled_ns.filter(|ns| *ns > 0) {
            let _ = write!(text, " (throttled {})", percent(&share(ns, self.elapsed)));
        }
        if let Some(faults) = self.page_faults {
            let _ = write!(text, "   {} page faults", faults);
        }
        if let Some(disk) = &self.disk_in_words {
            let _ = write!(text, "   {disk}");
        }
        text
    }
}

fn disk_in_words(probe: &DiskProbe, interval: &DiskReading) -> String {
    let names: Vec<&str> = probe.disks().iter().map(|disk| disk.name.as_str()).collect();
    let words = |issuer| {
        let (bytes, latency) = disk::sum(interval, issuer, |_| true);
        if latency.count == 0 {
            return "nothing".to_owned();
        }
        let mean = nanos(latency.mean_ns());
        format!("{} in {} requests of {mean}", output::bytes(bytes), latency.count)
    };
    format!(
        "{}: the VM {}; others {}",
        names.join(", "),
        words(Issuer::Ours),
        words(Issuer::Foreign)
    )
}

/// Of the whole process, since it began.
fn page_faults(process: &Process) -> Option<u64> {
    let stat = process.stat().ok()?;
    Some(stat.minflt + stat.majflt)
}

fn share(ns: u64, elapsed: Duration) -> f64 {
    Duration::from_nanos(ns).as_secs_f64() / elapsed.as_secs_f64().max(1e-9)
}
