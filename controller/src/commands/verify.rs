//! `livesnap verify`: is every byte of a snapshot what was written?

use std::path::PathBuf;

use serde_json::json;
use snapshot_core::image::{ImageError, Snapshot, VerifyReport};

use crate::{Failure, output};

const EXAMPLES: &str = "\
Examples:
  livesnap verify /backup/vm1
  livesnap verify --json /backup/vm1 | jq .sound

Exit codes:
  0  sound
  1  not sound; the first bad page or file is named";

/// Check a snapshot's checksums and structure, and that its disk images are unchanged
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Directory of the snapshot
    dir: PathBuf,
    /// Report as JSON on standard output
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<(), Failure> {
    let outcome = verify(&args);
    if args.json {
        output::json(&match &outcome {
            Ok(report) => json!({"sound": true, "report": report}),
            Err(error) => {
                json!({"sound": false, "reason": error.reason(), "error": error.to_string()})
            }
        })?;
    }
    let report = outcome?;
    if !args.json {
        output::line(format_args!(
            "sound: {} pages ({} of {} RAM), {} disk files unchanged",
            report.pages,
            output::bytes(report.page_bytes),
            output::bytes(report.ram_bytes),
            report.disk_files
        ))?;
        for path in report.disk_files_unchecked {
            output::line(format_args!("not checked: {} is no regular file", path.display()))?;
        }
    }
    Ok(())
}

fn verify(args: &Args) -> Result<VerifyReport, ImageError> {
    let mut percentage = output::Percentage::new("verifying");
    Snapshot::open(&args.dir)?.verify(&mut |done, total| percentage.show(done, total))
}
