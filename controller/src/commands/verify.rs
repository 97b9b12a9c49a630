//! `livesnap verify`: is every byte of a snapshot what was written?

use serde_json::json;
use snapshot_core::image::{ImageError, Snapshot, VerifyReport};

use super::ReadArgs;
use crate::{Failure, output};

pub const EXAMPLES: &str = "\
Examples:
  livesnap verify /backup/vm1
  livesnap verify --json /backup/vm1 | jq .sound

Exit codes:
  0  sound
  1  not sound; the first bad page or file is named";

/// Runs the command.
pub fn run(args: &ReadArgs) -> Result<(), Failure> {
    let outcome = verify(args);
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

fn verify(args: &ReadArgs) -> Result<VerifyReport, ImageError> {
    let mut percentage = output::Percentage::new("verifying");
    Snapshot::open(&args.dir)?.verify(&mut |done, total| percentage.show(done, total))
}
