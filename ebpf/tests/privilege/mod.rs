//! What the tests need root for.

use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const TRACEFS: &str = "/sys/kernel/tracing";

/// Whether the test may go on: says so and fails where REQUIRE_PRIVILEGED=1 if we are not root. Its thread, and those that
/// this one starts, then see tracefs.
pub fn is_root(what: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        see_tracefs();
        return true;
    }
    assert_ne!(std::env::var("REQUIRE_PRIVILEGED").as_deref(), Ok("1"), "{what} needs root");
    eprintln!("SKIPPED: {what} needs root");
    false
}

/// Mounts tracefs where nobody has: for this thread alone, so that the machine stays as it is.
fn see_tracefs() {
    const NONE: Option<&str> = None;
    if Path::new(TRACEFS).join("events").exists() {
        return;
    }
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    let mounted = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(NONE, "/", NONE, private, NONE))
        .and_then(|()| mount(Some("tracefs"), TRACEFS, Some("tracefs"), MsFlags::empty(), NONE));
    if let Err(errno) = mounted {
        eprintln!("tracefs cannot be mounted ({errno}): tiers that need it are refused");
    }
}
