//! `livesnap inspect`: what is in a snapshot.

use std::time::{Duration, UNIX_EPOCH};

use snapshot_core::image::{Manifest, Snapshot};
use snapshot_core::vmm::RunState;

use super::ReadArgs;
use crate::{Failure, output};

pub const EXAMPLES: &str = "\
Examples:
  livesnap inspect /backup/vm1
  livesnap inspect --json /backup/vm1 | jq .machine.machine_type

Exit codes:
  0  shown
  1  no snapshot, or its files are incomplete or contradict each other";

/// From here on RFC 3339 has no notation, and formatting panics.
const YEAR_10000_UNIX_MS: u64 = 253_402_300_800_000;

/// Runs the command.
pub fn run(args: &ReadArgs) -> Result<(), Failure> {
    let snapshot = Snapshot::open(&args.dir)?;
    let manifest = snapshot.manifest();
    if args.json {
        return output::json(manifest);
    }
    output::line(format_args!("snapshot  {}", snapshot.dir().display()))?;
    output::line(summary(manifest))
}

/// A line for each thing that an operator asks for.
fn summary(manifest: &Manifest) -> String {
    let machine = &manifest.machine;
    let state = match manifest.run_state {
        RunState::Running => "running",
        RunState::Paused => "paused",
    };
    let ram = &manifest.ram;
    let took_ms = manifest.committed_at_unix_ms.saturating_sub(manifest.taken_at_unix_ms);
    let mut lines = vec![
        format!(
            "taken     {}, committed {} later",
            time(manifest.taken_at_unix_ms),
            humantime::format_duration(Duration::from_millis(took_ms))
        ),
        format!("by        livesnap {}", manifest.livesnap_version),
        format!(
            "machine   {}, {} CPUs, {state}; {} {}",
            machine.machine_type, machine.cpus, machine.vmm, machine.version
        ),
        format!(
            "RAM       {} in {} blocks, {} stored, the rest is zero",
            output::bytes(ram.total_bytes()),
            ram.blocks.len(),
            output::bytes(ram.stored_bytes())
        ),
    ];
    for block in &ram.blocks {
        let stored = block.stored_pages.saturating_mul(ram.page_bytes);
        lines.push(format!(
            "          {:>10} {:>10}  {}",
            output::bytes(block.len_bytes),
            output::bytes(stored),
            block.id
        ));
    }
    if manifest.disks_left_out {
        lines.push("disks     left out on request: RAM and disks do not fit together".into());
    } else if manifest.disks.is_empty() {
        lines.push("disks     none".into());
    }
    for record in &manifest.disks {
        let disk = &record.disk;
        lines.push(format!(
            "disk      {}: {} ({}, {})",
            disk.device,
            disk.image.display(),
            disk.image_format,
            output::bytes(disk.size_bytes)
        ));
    }
    lines.join("\n")
}

/// A time for people, in UTC.
fn time(unix_ms: u64) -> String {
    let time = UNIX_EPOCH.checked_add(Duration::from_millis(unix_ms));
    match time.filter(|_| unix_ms < YEAR_10000_UNIX_MS) {
        Some(time) => humantime::format_rfc3339_millis(time).to_string(),
        None => format!("{unix_ms} ms after 1970"),
    }
}
