//! `livesnap demo`, as a user runs it.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;

const LIVESNAP: &str = env!("CARGO_BIN_EXE_livesnap");
/// User "nobody" of most distributions.
const NOBODY: u32 = 65534;

/// Whether this process is root; where not, says so loudly, and fails where nothing may be skipped.
fn is_root() -> bool {
    let is_root = geteuid().is_root();
    if !is_root {
        assert_ne!(std::env::var("REQUIRE_PRIVILEGED").as_deref(), Ok("1"), "root is required");
        eprintln!("SKIPPED: the demo needs root");
    }
    is_root
}

fn demo(dir: &Path, memory: &str) -> Command {
    let mut command = Command::new(LIVESNAP);
    command.args(["demo", "--json", "--memory", memory, "--dir"]).arg(dir);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).unwrap().next().is_none()
}

#[test]
fn the_snapshot_is_of_one_instant_and_the_control_is_not() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let output = demo(dir.path(), "64MiB").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let demo = &told["demo"];
    assert_eq!(demo["snapshot"]["pages"], 64 << 8, "{told:#}");
    assert_eq!(demo["snapshot"]["strays"], 0, "{told:#}");
    assert!(demo["control"]["strays"].as_u64() > Some(0), "{told:#}");
    assert!(demo["pages_written_meanwhile"].as_u64() > Some(0), "{told:#}");
    assert!(is_empty(dir.path()));
}

/// Starts a demo whose snapshot is just beginning.
fn begin(dir: &Path) -> Child {
    let child = demo(dir, "512MiB").spawn().unwrap();
    wait_until("the demo begins", || !is_empty(dir));
    child
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn an_interrupted_demo_leaves_nothing_behind() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let child = begin(dir.path());
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(130), "{told:#}");
    assert_eq!(told["reason"], "cancelled");
    assert!(is_empty(dir.path()));
}

#[test]
fn a_killed_demo_takes_its_processes_along() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut child = begin(dir.path());
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let children = fs::read_to_string(children).unwrap();
    let pids: Vec<_> = children.split_whitespace().collect();
    assert_eq!(pids.len(), 2, "the guard and the guest: {children}");
    child.kill().unwrap();
    child.wait().unwrap();
    // Also while nobody has taken note of its end, it has no program any more.
    let has_ended = |pid: &&str| fs::read_link(format!("/proc/{pid}/exe")).is_err();
    wait_until("they end", || pids.iter().all(has_ended));
}

#[test]
fn without_privilege_it_is_refused_with_a_remedy() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
    // Where the program was built, not everybody may read.
    let program = dir.path().join("livesnap");
    fs::copy(LIVESNAP, &program).unwrap();
    let output = Command::new(&program)
        .args(["demo", "--memory", "16MiB", "--dir"])
        .arg(dir.path())
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("root, CAP_SYS_PTRACE or access to /dev/userfaultfd"), "{text}");
    fs::remove_file(program).unwrap();
    assert!(is_empty(dir.path()));
}
