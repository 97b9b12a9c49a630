//! The only program of a test VM: init, load and judge in one.
//!
//! The harness starts it as `/init` of an initramfs. Workers write pages and disk blocks that prove
//! themselves (`page.rs`); this thread tells on the serial console how it goes:
//!
//! ```text
//! LS ready t_ms=4012
//! LS ok t_ms=4213 w0=51234 w1=50311 laps=3 disk=812 scrubbed=4096 worst_gap_us=410 pages_per_s=24012 inconsistent=0
//! LS INCONSISTENT ring w0 slot=17 expected=50001 found=Ring:w0:17:48001
//! ```
//!
//! A VM that is restored from a snapshot goes on with the same workers, so it checks itself: within a lap
//! every page has been compared with what the guest knows that it wrote.

#![forbid(unsafe_code)]

mod load;
mod params;

use std::fs;
use std::io::Write as _;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use livesnap_guest::boot;
use livesnap_guest::page::Words;
use livesnap_guest::status::Field;

use crate::load::{Disk, Shared};
use crate::params::{Params, Ready};

/// Time between two heartbeats.
const HEARTBEAT: Duration = Duration::from_millis(200);
/// Populated pages that are checked again at each heartbeat.
const SCRUB_PAGES: usize = 256;

static SHARED: Shared = Shared::new();

fn main() {
    // Init must not end: the kernel would panic. It does, and so the VM stops, which the harness sees.
    if let Err(error) = run() {
        console(&format!("LS FAILED {error:#}"));
    }
}

fn run() -> Result<()> {
    boot::mount_kernel_file_systems()?;
    boot::load_modules()?;
    let params =
        Params::parse(&fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?)?;
    let began = Instant::now();
    let pages_of = |mib: usize| mib << 8;

    let status = &SHARED.status;
    let ring_slots = (pages_of(params.ring_mib) / params.workers).max(1);
    status.set(Field::Workers, params.workers as u64);
    status.set(Field::RingSlots, ring_slots as u64);
    status.publish(params.run);

    let populated = load::untouched_pages(pages_of(params.populate_mib));
    load::populate(&SHARED, populated);
    status.set(Field::PopulatePages, populated.len() as u64);

    start_workers(&params, ring_slots)?;
    heartbeats(&params, populated, ring_slots as u64, began)
}

/// Starts one thread a ring, and one for the disk.
fn start_workers(params: &Params, ring_slots: usize) -> Result<()> {
    if let Some(path) = &params.disk {
        boot::wait_for_device(path)?;
        let disk = Disk::open(path, params.disk_mib)?;
        SHARED.status.set(Field::DiskSlots, disk.slots());
        thread::Builder::new().name("disk".into()).spawn(move || {
            if let Err(error) = disk.worker(&SHARED) {
                console(&format!("LS FAILED {error:#}"));
            }
        })?;
    }
    for worker in 0..params.workers {
        let params = params.clone();
        let ring = load::untouched_pages(ring_slots);
        thread::Builder::new()
            .name(format!("ring{worker}"))
            .spawn(move || load::ring_worker(&SHARED, worker, &params, ring))?;
    }
    Ok(())
}

/// Tells how it goes, for ever.
fn heartbeats(params: &Params, populated: &[Words], ring_slots: u64, began: Instant) -> Result<()> {
    let status = &SHARED.status;
    let mut ready = false;
    let mut scrubbed = 0_usize;
    let mut last = (Instant::now(), 0_u64);
    loop {
        let progress = &status.progress()[..params.workers];
        let laps = progress.iter().min().copied().unwrap_or(0) / ring_slots;
        let t_ms = began.elapsed().as_millis();
        if !ready && (params.ready == Ready::Started || laps >= 1) {
            ready = true;
            console(&format!("LS ready t_ms={t_ms}"));
        }
        for report in SHARED
            .reports
            .lock()
            .map(|mut reports| std::mem::take(&mut *reports))
            .unwrap_or_default()
        {
            console(&format!("LS INCONSISTENT {report}"));
        }
        for _ in 0..SCRUB_PAGES.min(populated.len()) {
            let slot = scrubbed % populated.len();
            load::check_populated(&SHARED, slot as u64, &populated[slot]);
            scrubbed += 1;
        }

        let now = Instant::now();
        let pages: u64 = progress.iter().sum();
        let elapsed_ms = u64::try_from((now - last.0).as_millis()).unwrap_or(u64::MAX).max(1);
        let counters: String = progress
            .iter()
            .enumerate()
            .map(|(worker, counter)| format!(" w{worker}={counter}"))
            .collect();
        console(&format!(
            "LS ok t_ms={t_ms}{counters} laps={laps} disk={} scrubbed={scrubbed} worst_gap_us={} pages_per_s={} inconsistent={}",
            status.get(Field::DiskCompleted),
            SHARED.worst_gap_us.swap(0, Ordering::Relaxed),
            (pages - last.1) * 1000 / elapsed_ms,
            status.get(Field::Inconsistencies),
        ));
        last = (now, pages);
        thread::sleep(HEARTBEAT);
    }
}

/// One line on the console, in one write. If the console fails there is nobody left to tell.
fn console(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(format!("{line}\n").as_bytes());
    let _ = out.flush();
}
