//! Which virtual machine, and where its snapshot shall be: what `snapshot` and `plan` are given alike.

use std::path::PathBuf;

use bytesize::ByteSize;
use rustix::process::Pid;
use snapshot_core::BUFFER_BYTES_MIN;
use snapshot_core::vmm::qemu::QemuOptions;

/// The virtual machine, the destination, and what of the one goes to the other.
#[derive(clap::Args)]
pub struct TargetArgs {
    /// QMP socket of the running QEMU, one that no other program is connected to
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// Directory that the snapshot becomes; must not exist yet, or be empty
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// QEMU's process id, where another process (such as libvirt) made the socket
    #[arg(long, value_parser = parse_pid)]
    pid: Option<Pid>,
    /// Bound of the copy buffer; below 64MiB nothing can be forecast, and a snapshot goes as with --no-control [default: a
    /// tenth of available memory, at most 1GiB]
    #[arg(long, value_name = "SIZE")]
    buffer: Option<ByteSize>,
    /// Leave the disks out: memory and device state only
    #[arg(long)]
    no_disks: bool,
}

impl TargetArgs {
    /// How to attach to the virtual machine.
    pub fn qemu_options(&self) -> QemuOptions {
        let disks = !self.no_disks;
        QemuOptions { pid: self.pid, disks, ..QemuOptions::new(self.qmp.clone()) }
    }

    /// Bound of the copy buffer, in bytes.
    pub fn buffer_bytes(&self) -> u64 {
        self.buffer.map_or_else(default_buffer_bytes, |size| size.as_u64())
    }
}

/// A tenth of what the host has available, between the least that works and 1 GiB.
pub fn default_buffer_bytes() -> u64 {
    use procfs::Current as _;
    let available = procfs::Meminfo::current().ok().and_then(|memory| memory.mem_available);
    (available.unwrap_or(0) / 10).clamp(4 * BUFFER_BYTES_MIN, 1 << 30)
}

/// A process id.
pub fn parse_pid(text: &str) -> Result<Pid, String> {
    let number = text.parse().map_err(|_| "not a process id")?;
    Ok(Pid::from_raw(number).filter(|_| number > 0).ok_or("not a process id")?)
}
