//! Disk images, and how QEMU is to read and write them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// How QEMU reads and writes an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aio {
    /// A pool of threads.
    Threads,
    /// Linux AIO; implies direct I/O.
    Native,
    /// io_uring.
    IoUring,
}

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Just the blocks.
    Raw,
    /// QEMU's own.
    Qcow2,
}

/// A virtio disk of the VM.
#[derive(Debug, Clone)]
pub struct Disk {
    path: PathBuf,
    format: Format,
    aio: Aio,
    iothread: bool,
}

impl Disk {
    /// Uses an image that exists.
    pub fn existing(path: impl Into<PathBuf>, format: Format) -> Self {
        Self { path: path.into(), format, aio: Aio::Threads, iothread: false }
    }

    /// Creates an empty image.
    pub fn create(path: impl Into<PathBuf>, format: Format, mib: u64) -> Result<Self> {
        let disk = Self::existing(path, format);
        qemu_img(&[
            "create".into(),
            "-q".into(),
            "-f".into(),
            format.name().into(),
            disk.path.clone().into(),
            format!("{mib}M").into(),
        ])?;
        Ok(disk)
    }

    /// How QEMU shall read and write it.
    pub fn aio(self, aio: Aio) -> Self {
        Self { aio, ..self }
    }

    /// Serves it from a thread of its own.
    pub fn iothread(self) -> Self {
        Self { iothread: true, ..self }
    }

    /// Where the image lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new image over this one, which is then only read.
    pub fn overlay(&self, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        qemu_img(&[
            "create".into(),
            "-q".into(),
            "-f".into(),
            "qcow2".into(),
            "-F".into(),
            self.format.name().into(),
            "-b".into(),
            self.path.clone().into(),
            path.clone().into(),
        ])?;
        Ok(Self { path, format: Format::Qcow2, ..self.clone() })
    }

    /// Writes a raw copy, as the checker reads it; only of an image that no QEMU is writing.
    pub fn export_raw(&self, raw: &Path) -> Result<()> {
        let format = self.format.name();
        qemu_img(&[
            "convert".into(),
            "-f".into(),
            format.into(),
            "-O".into(),
            "raw".into(),
            self.path.clone().into(),
            raw.into(),
        ])
    }

    /// What QEMU is started with; the guest sees the disks in the order of `index`.
    pub(crate) fn arguments(&self, index: usize) -> Vec<OsString> {
        let (aio, direct) = match self.aio {
            Aio::Threads => ("threads", "off"),
            Aio::Native => ("native", "on"),
            Aio::IoUring => ("io_uring", "on"),
        };
        let (format, path) = (self.format.name(), self.path.display());
        let mut arguments = vec![
            "-blockdev".into(),
            format!(
                "driver=file,node-name=file{index},filename={path},aio={aio},cache.direct={direct}"
            )
            .into(),
            "-blockdev".into(),
            format!("driver={format},node-name=disk{index},file=file{index},cache.direct={direct}")
                .into(),
        ];
        let mut device = format!("virtio-blk-pci,drive=disk{index},id=vd{index}");
        if self.iothread {
            arguments.extend(["-object".into(), format!("iothread,id=io{index}").into()]);
            device.push_str(&format!(",iothread=io{index}"));
        }
        arguments.extend(["-device".into(), device.into()]);
        arguments
    }
}

impl Format {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

fn qemu_img(arguments: &[OsString]) -> Result<()> {
    let output =
        Command::new("qemu-img").args(arguments).output().context("cannot run qemu-img")?;
    ensure!(
        output.status.success(),
        "qemu-img {arguments:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
