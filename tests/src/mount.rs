//! File systems that a test can fill, shrink and break; needs root.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FallocateFlags, fallocate, statvfs};

/// A mounted file system; unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    path: PathBuf,
}

impl Mount {
    /// A tmpfs on the new directory `path`, with options such as "size=10M".
    pub fn tmpfs(path: &Path, options: &str) -> Result<Self> {
        Self::mount_at(path, ["-t", "tmpfs", "-o", options, "tmpfs"].map(OsStr::new))
    }

    /// An ext4 of `mib` MiB in the new file `image`, on the new directory `path`.
    pub fn ext4(path: &Path, image: &Path, mib: u64) -> Result<Self> {
        let file = File::create_new(image)
            .with_context(|| format!("cannot create {}", image.display()))?;
        file.set_len(mib << 20).context("cannot give the image its size")?;
        // Nothing is left to be initialised later, nor reserved for root.
        let options = ["-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
        run(Command::new("mkfs.ext4").args(options).arg(image))?;
        Self::mount_at(path, [OsStr::new("-o"), OsStr::new("loop"), image.as_os_str()])
    }

    fn mount_at<'a>(path: &Path, arguments: impl IntoIterator<Item = &'a OsStr>) -> Result<Self> {
        fs::create_dir(path).with_context(|| format!("cannot create {}", path.display()))?;
        run(Command::new("mount").args(arguments).arg(path))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Cuts off the disk of an ext4 behind its first `mib` MiB: writes there fail with EIO.
    pub fn cut_off(&self, image: &Path, mib: u64) -> Result<()> {
        let file = File::options().write(true).open(image).context("cannot open the image")?;
        file.set_len(mib << 20).context("cannot cut off the image")?;
        let listed = Command::new("losetup")
            .args(["--noheadings", "--output", "NAME"])
            .arg("--associated")
            .arg(image)
            .output()
            .context("cannot run losetup")?;
        let device = String::from_utf8_lossy(&listed.stdout);
        run(Command::new("losetup").arg("--set-capacity").arg(device.trim()))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes its options, such as "ro" or, for a tmpfs, "size=4M".
    pub fn remount(&self, options: &str) -> Result<()> {
        run(Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.path))
    }

    /// Takes all but some 8 MiB of its free space for the new file `filler`.
    pub fn fill(&self, filler: &Path) -> Result<()> {
        let space = statvfs(&self.path).context("cannot tell the free space")?;
        let bytes = (space.f_bavail * space.f_frsize).saturating_sub(8 << 20);
        let file = File::create_new(filler)
            .with_context(|| format!("cannot create {}", filler.display()))?;
        fallocate(&file, FallocateFlags::empty(), 0, bytes).context("cannot take up the space")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a loop device under a broken file system may be busy failing. Nobody is left to tell.
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {told}");
    Ok(())
}
