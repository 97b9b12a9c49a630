//! How a command fails: one sentence for people, one word for programs.

use serde_json::json;
use snapshot_core::dirty_rate::DirtyRateError;
use snapshot_core::image::ImageError;
use snapshot_core::{Phase, Reason, SessionError};

/// It was tried and did not work.
pub const FAILED: u8 = 1;
/// It was not tried.
pub const REFUSED: u8 = 3;
/// Given up, or not begun, because the operator's limits cannot be kept.
pub const GIVEN_UP: u8 = 4;
/// Interrupted by a signal, as shells tell it.
pub const CANCELLED: u8 = 130;

/// A command's error; `main` prints it and exits with its code.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct Failure {
    /// Stable code.
    pub reason: Reason,
    /// The process's exit code.
    pub exit_code: u8,
    /// What failed, on what, why, and what to do.
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl Failure {
    /// A failure whose text is `source`'s.
    pub fn new(
        reason: Reason,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let exit_code = match reason {
            Reason::Cancelled => CANCELLED,
            reason if reason.is_given_up() => GIVEN_UP,
            _ => FAILED,
        };
        Self { reason, exit_code, source: source.into() }
    }

    /// A refusal: nothing was touched.
    pub fn refused(
        reason: Reason,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { exit_code: REFUSED, ..Self::new(reason, source) }
    }

    /// What takes the place of a report.
    pub fn json(&self) -> serde_json::Value {
        let outcome = if self.exit_code == GIVEN_UP { "aborted" } else { "failed" };
        json!({"outcome": outcome, "reason": self.reason, "error": self.to_string()})
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        let reason = error.reason();
        if error.phase == Phase::Preparing && reason != Reason::Cancelled {
            Self::refused(reason, error)
        } else {
            Self::new(reason, error)
        }
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self::new(error.reason(), error)
    }
}

impl From<DirtyRateError> for Failure {
    fn from(error: DirtyRateError) -> Self {
        Self::new(error.reason(), error)
    }
}
