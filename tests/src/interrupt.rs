//! Ctrl-C and `kill` as an error, so that VMs and files are cleaned up as after any other.
//!
//! Demo, soak and bench call [`watch`] once; whatever waits asks [`check`]. Tests do not: the test runner ends
//! as it likes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, ensure};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on these signals no longer end the process but make [`check`] fail.
pub fn watch() -> Result<()> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(flag))
            .with_context(|| format!("cannot handle signal {signal}"))?;
    }
    Ok(())
}

/// Fails if a signal has come.
pub fn check() -> Result<()> {
    let has_come = INTERRUPTED.get().is_some_and(|flag| flag.load(Ordering::Relaxed));
    ensure!(!has_come, "interrupted");
    Ok(())
}
