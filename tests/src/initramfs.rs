//! The test guest's initramfs: our static `/init`, the kernel modules it loads, and `/dev/console`.
//!
//! `cargo xtask setup` unpacks the kernel below `target/livesnap-guest/kernel`; the rest is made here, on
//! first use in a process, so that the guest under test is always the one in the source tree.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

use crate::cpio::Cpio;
use crate::kernel::Kernel;

/// Drivers that a test may want; what they depend on comes along.
const MODULES: [&str; 5] =
    ["virtio_pci", "virtio_blk", "virtio_balloon", "virtio_mem", "virtio_net"];

/// A kernel and an initramfs to boot.
#[derive(Debug, Clone)]
pub struct GuestImage {
    /// The kernel, as QEMU's `-kernel` takes it.
    pub kernel: PathBuf,
    /// The initramfs, as QEMU's `-initrd` takes it.
    pub initramfs: PathBuf,
}

impl GuestImage {
    /// The guest of this source tree; built once a process.
    pub fn get() -> Result<Self> {
        static IMAGE: Mutex<Option<GuestImage>> = Mutex::new(None);
        // Tests of one process run in parallel: one builds, the others wait for it. What is left behind by
        // one that panicked is none, so it is good to go on with.
        let mut image = IMAGE.lock().unwrap_or_else(PoisonError::into_inner);
        if image.is_none() {
            *image = Some(Self::build()?);
        }
        image.clone().context("the guest image has just been built")
    }

    fn build() -> Result<Self> {
        let target = guest_directory()?;
        let kernel = Kernel::unpacked(&target.join("kernel")).context("run `cargo xtask setup`")?;

        let mut archive = with_init("livesnap-guest")?;
        kernel.add_modules(&MODULES, &mut archive)?;

        // Several test processes may do this at once: each its own file, the last rename stands.
        let initramfs = target.join("initramfs.cpio");
        let partial = target.join(format!("initramfs.{}.partial", std::process::id()));
        fs::write(&partial, archive.finish())
            .with_context(|| format!("cannot write {}", partial.display()))?;
        fs::rename(&partial, &initramfs)
            .with_context(|| format!("cannot rename {}", partial.display()))?;
        Ok(Self { kernel: kernel.image, initramfs })
    }
}

/// Where kernels are unpacked and the guest's programs are built.
pub fn guest_directory() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    Ok(root.context("the tests package has no parent")?.join("target/livesnap-guest"))
}

/// An archive with a program of the guest package as `/init`, a console, and where to mount the kernel's file systems.
pub fn with_init(program: &str) -> Result<Cpio> {
    let mut archive = Cpio::default();
    for directory in ["dev", "proc", "sys"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    let init = build_guest(&guest_directory()?.join("build"))?.join(program);
    let init = fs::read(&init).with_context(|| format!("cannot read {}", init.display()))?;
    archive.file("init", 0o755, &init);
    Ok(archive)
}

/// Builds the guest's programs, static and into their own target directory: the outer cargo holds the usual one.
/// Returns where they are.
fn build_guest(target: &Path) -> Result<PathBuf> {
    const TRIPLE: &str = "x86_64-unknown-linux-gnu";
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            "livesnap-guest",
            "--target",
            TRIPLE,
            "--target-dir",
        ])
        .arg(target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C panic=abort")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .output()
        .context("cannot run cargo to build the guest")?;
    ensure!(
        output.status.success(),
        "the guest does not build:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(target.join(TRIPLE).join("release"))
}
