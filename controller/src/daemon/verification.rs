//! Reading a snapshot again: the process `livesnap verify`, and what it finds. It reads when nobody else wants to.

use std::io;
use std::process::{ExitStatus, Stdio};

use serde::Deserialize;
use snapshot_core::Reason;
use tokio::task::spawn_blocking;

use super::child::idle_command;
use super::destination::{DestinationError, Place};
use super::operation::{OperationError, Verification, VerificationState, timestamp};

/// Why it could not be read again.
#[derive(Debug, thiserror::Error)]
enum VerifyError {
    #[error(transparent)]
    Destination(#[from] DestinationError),
    #[error("cannot run the process that verifies: {0}")]
    Process(#[from] io::Error),
    #[error("the process that verifies ended by itself ({0}): see the log")]
    Unreported(ExitStatus),
}

/// What `livesnap verify --json` tells.
#[derive(Deserialize)]
struct Report {
    sound: bool,
    reason: Option<Reason>,
    #[serde(default)]
    error: String,
}

/// Has the snapshot there read.
///
/// Must be called on the daemon's main thread: the kernel ends the process with the thread that started it.
pub async fn verify(place: Result<Place, DestinationError>) -> Verification {
    let error = read(place).await.unwrap_or_else(|error| {
        Some(OperationError { reason: Reason::Internal, detail: error.to_string() })
    });
    let state = match error {
        None => VerificationState::Sound,
        Some(_) => VerificationState::Failed,
    };
    Verification { state, at: Some(timestamp()), error }
}

/// What is wrong with it.
async fn read(
    place: Result<Place, DestinationError>,
) -> Result<Option<OperationError>, VerifyError> {
    let place = place?;
    let path = place.path();
    let opened = spawn_blocking(move || place.open_snapshot()).await.map_err(io::Error::other)?;
    let Some(directory) = opened? else {
        let detail = format!("{} is not there any more", path.display());
        return Ok(Some(OperationError { reason: Reason::NotASnapshot, detail }));
    };
    let mut command = idle_command(&["verify", "--json", "."], &directory);
    // Whoever reads the log sees of what it died, should it die.
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = command.output().await?;
    let report: Report = serde_json::from_slice(&output.stdout)
        .map_err(|_| VerifyError::Unreported(output.status))?;
    Ok((!report.sound).then(|| OperationError {
        reason: report.reason.unwrap_or(Reason::Internal),
        detail: format!("{}: {}", path.display(), report.error),
    }))
}
