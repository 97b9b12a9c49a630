//! A run as it can be put through the control core again: `cargo xtask sim --replay FILE`.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use livesnap_control::Policy;
use livesnap_control::record::{Head, Tick};
use serde::Serialize;

/// A record being written. The first error ends it and is kept: no snapshot fails for want of its record.
pub struct Recorder {
    path: PathBuf,
    file: BufWriter<File>,
    error: Option<io::Error>,
}

impl Recorder {
    /// Begins a record at `path`, in place of what may be there.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn create(path: &Path, policy: Policy, vcpus: usize) -> io::Result<Self> {
        let file = BufWriter::new(File::create(path)?);
        let mut recorder = Self { path: path.into(), file, error: None };
        recorder.line(&Head { policy, vcpus });
        Ok(recorder)
    }

    /// Adds a decision.
    pub fn tick(&mut self, tick: &Tick<'_>) {
        self.line(tick);
    }

    /// Completes the record.
    ///
    /// # Errors
    /// The path, and the first error of all.
    pub fn end(mut self) -> Result<(), (PathBuf, io::Error)> {
        match self.error.take().or_else(|| self.file.flush().err()) {
            Some(error) => Err((self.path, error)),
            None => Ok(()),
        }
    }

    fn line(&mut self, value: &impl Serialize) {
        if self.error.is_none() {
            let written = serde_json::to_writer(&mut self.file, value).map_err(io::Error::from);
            self.error = written.and_then(|()| self.file.write_all(b"\n")).err();
        }
    }
}
