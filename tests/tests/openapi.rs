//! The API held against its own description, as it is served: schemathesis makes requests of it, good and bad, follows what
//! they lead to, and looks whether each answer is one that is described.
//!
//! `cargo xtask setup` installs it. What it sends comes from a fixed seed.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::process::Command;
use std::time::Duration;

use livesnap_tests::daemon::Daemon;
use livesnap_tests::is_root_or_skip;
use livesnap_tests::qemu::Qemu;
use serde_json::json;

const BOOT: Duration = Duration::from_secs(120);
/// Where it is installed.
const PROGRAM: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../target/livesnap-schemathesis/bin/schemathesis");
/// What it expects besides its defaults.
const CONFIGURATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/schemathesis.toml");

#[test]
fn the_api_is_as_it_describes_itself() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let mut qemu = Qemu::builder().start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let more = "tcp.listen = \"127.0.0.1:0\"";
    let daemon = Daemon::serve(dir.path(), &[("vm1", &qemu)], more).unwrap();
    // One that has ended, for calls that need an operation.
    let request = json!({"vm": "vm1", "policy": {"on_infeasible": "wait"}});
    let taken = daemon.post("/snapshot", &[("Prefer", "wait=60")], &request).unwrap();
    assert_eq!(taken.body["state"], "completed", "{taken:?}");

    let mut command = Command::new(PROGRAM);
    command.args([
        "--config-file",
        CONFIGURATION,
        "run",
        "--checks=all",
        "--seed=1",
        "--max-examples=20",
        "--no-color",
    ]);
    command.args(["--generation-database=none", "--request-timeout=30"]);
    command.arg(format!("http://{}/openapi.json", daemon.tcp().unwrap()));
    let output = command.current_dir(dir.path()).output().expect("run `cargo xtask setup`");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}\n{}", String::from_utf8_lossy(&output.stderr));
    eprintln!("{told}");

    assert_eq!(daemon.get("/healthz").unwrap().status, 200);
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    qemu.wait_unprotected(BOOT).unwrap();
    assert_eq!(qemu.status().unwrap(), "running");
}
