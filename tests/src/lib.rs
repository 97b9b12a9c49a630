//! What tests against the real thing are built from.
//!
//! ```text
//! initramfs   the guest: kernel, static init, modules          (guest/ is its program; with kernel, cpio)
//! qemu        starts a VM that runs it, reads its console      (with disk, load, huge_pages)
//! qmp         talks to that VM
//! qmp_proxy   spoils what QEMU answers                         (livesnap runs through it)
//! mount       file systems to fill and to break
//! mapped_ram  reads a snapshot's RAM file
//! check       judges whether RAM and disk are of one instant
//! browser     a headless Chromium, for what people see
//! daemon      the product as a service, and a client of it
//! monitoring  Prometheus and Alertmanager, and one who is told
//! cpu_time    what quotas withhold from threads
//! slow_disk   a destination as slow as is wanted
//! traces      what a snapshot may leave behind
//! restored    a VM that the product has brought back
//! interrupt   lets Ctrl-C end demo, soak and bench as an error does
//! ```
//!
//! Nothing here uses the product's code: a test must not judge the product by the product.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod browser;
pub mod check;
pub mod console;
pub mod cpio;
pub mod cpu_time;
pub mod daemon;
mod disk;
mod huge_pages;
pub mod initramfs;
pub mod interrupt;
pub mod kernel;
pub mod livesnap;
mod load;
pub mod mapped_ram;
pub mod monitoring;
pub mod mount;
pub mod qemu;
pub mod qmp;
pub mod qmp_proxy;
pub mod restored;
pub mod slow_disk;
pub mod traces;

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

/// Whether this process is root. If not, tells what is skipped, and fails where nothing may be skipped
/// (REQUIRE_PRIVILEGED=1, as CI sets it).
pub fn is_root_or_skip(what: &str) -> Result<bool> {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        ensure!(
            !std::env::var("REQUIRE_PRIVILEGED").is_ok_and(|value| value == "1"),
            "{what} needs root, and REQUIRE_PRIVILEGED=1 forbids to skip it"
        );
        eprintln!("SKIPPED: {what} needs root");
    }
    Ok(is_root)
}

/// Asks again and again until there is an answer; an error of `probe` ends it at once.
pub fn poll_until<T>(
    what: &str,
    timeout: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        interrupt::check()?;
        if let Some(answer) = probe()? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("waited {timeout:?} in vain: {what}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}
