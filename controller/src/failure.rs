//! How a command fails: one sentence for people, one word for programs.

use snapshot_core::Reason;
use snapshot_core::image::ImageError;

/// A command's error; `main` prints it and exits with 1.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct Failure {
    /// Stable code.
    pub reason: Reason,
    /// What failed, on what, why, and what to do.
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl Failure {
    /// A failure whose text is `source`'s.
    pub fn new(
        reason: Reason,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { reason, source: source.into() }
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self::new(error.reason(), error)
    }
}
