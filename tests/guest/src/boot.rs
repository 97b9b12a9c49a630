//! What an init program has to do before anything else works.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, mount};

/// Mounts the kernel's file systems.
pub fn mount_kernel_file_systems() -> Result<()> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
        mount(kind, target, kind, MountFlags::empty(), None)
            .with_context(|| format!("cannot mount {kind} on {target}"))?;
    }
    Ok(())
}

/// Loads the modules of the initramfs; their names sort by dependency.
pub fn load_modules() -> Result<()> {
    let directory = Path::new("/modules");
    let mut paths = fs::read_dir(directory)
        .with_context(|| format!("cannot list {}", directory.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        let module =
            File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        rustix::system::finit_module(&module, c"", 0)
            .with_context(|| format!("cannot load {}", path.display()))?;
    }
    Ok(())
}

/// Waits until a driver has made a device node.
pub fn wait_for_device(path: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !Path::new(path).exists() {
        ensure!(
            Instant::now() < deadline,
            "{path} did not appear within 30 s: does the VM have that disk?"
        );
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
