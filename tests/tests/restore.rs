//! `livesnap restore` of snapshots taken of running guests: beside the original, again, and only where it fits.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Result, bail};
use livesnap_tests::console::{Console, Heartbeat};
use livesnap_tests::qemu::{Disk, Format, Load, Qemu};
use livesnap_tests::qmp::Qmp;
use livesnap_tests::{is_root_or_skip, livesnap, poll_until};
use serde_json::json;

const BOOT: Duration = Duration::from_secs(120);

/// A busy guest, a snapshot of it, and how far it was before.
struct Taken {
    source: Qemu,
    dir: tempfile::TempDir,
    before: Heartbeat,
    has_disks: bool,
}

impl Taken {
    fn new(format: Format) -> Self {
        Self::with(format, true, &[])
    }

    /// The guest has a disk, and writes it if `has_disks`.
    fn with(format: Format, has_disks: bool, options: &[&str]) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let disk = Disk::create(dir.path().join("disk"), format, 32).unwrap();
        let load = Load { disk: has_disks, ..Load::default() };
        let mut source = Qemu::builder().vcpus(2).disk(disk).load(load).start().unwrap();
        source.wait_ready(BOOT).unwrap();
        let before = source
            .wait_heartbeat(BOOT, |beat| beat.laps >= 1 && (!has_disks || beat.disk > 10))
            .unwrap();
        livesnap::snapshot(&source, &dir.path().join("snapshot"), options).unwrap();
        Self { source, dir, before, has_disks }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `livesnap restore` with `options`, of which the console goes to the file `console`.
    fn restore(&self, options: &[&str], console: &str) -> Command {
        let mut command = livesnap::command(["restore"]).unwrap();
        let chardev = format!("file,id=console,path={}", self.path(console).display());
        command.args(options).arg(self.path("snapshot")).args(["--", "-chardev", &chardev]);
        command.stdin(Stdio::null());
        command
    }

    /// Waits until the restored guest has gone on in memory and on disk, and has found nothing wrong.
    fn expect_progress(&self, running: &mut Running, console: &str) {
        let after = poll_until("the restored guest works", BOOT, || {
            running.check_alive()?;
            let bytes = fs::read(self.path(console)).unwrap_or_default();
            let beat = Console::new(&bytes).heartbeats().pop();
            let is_further = |beat: &Heartbeat| {
                beat.laps > self.before.laps + 2
                    && (beat.disk > self.before.disk || !self.has_disks)
            };
            Ok(beat.filter(|beat| beat.inconsistent > 0 || is_further(beat)))
        })
        .unwrap();
        assert_eq!(after.inconsistent, 0, "{after:?}");
    }

    fn expect_sound(&self) {
        let verified =
            livesnap::command(["verify"]).unwrap().arg(self.path("snapshot")).output().unwrap();
        assert!(verified.status.success(), "{verified:?}");
    }
}

/// A program in whose foreground a restored guest runs; killed when dropped.
struct Running {
    child: Child,
    messages: PathBuf,
}

impl Running {
    fn start(mut command: Command, messages: PathBuf) -> Self {
        let child = command.stderr(File::create(&messages).unwrap()).spawn().unwrap();
        Self { child, messages }
    }

    fn messages(&self) -> String {
        fs::read_to_string(&self.messages).unwrap()
    }

    fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("{status}: {}", self.messages()),
            None => Ok(()),
        }
    }

    /// The program that `livesnap restore --exec` started, in `/proc`: a link that is gone when its process has
    /// ended, also while nobody has taken note of it.
    fn qemu(&mut self) -> PathBuf {
        poll_until("livesnap tells of QEMU", BOOT, || {
            self.check_alive()?;
            let messages = self.messages();
            let rest = messages.split_once("restored: pid ");
            let pid = rest.and_then(|(_, rest)| rest.split_once(','));
            Ok(pid.map(|(pid, _)| Path::new("/proc").join(pid).join("exe")))
        })
        .unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_guest_is_restored_beside_the_original_and_ends_with_livesnap() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let mut taken = Taken::new(Format::Raw);
    let command = taken.restore(&["--exec"], "console");
    let mut running = Running::start(command, taken.path("messages"));
    taken.expect_progress(&mut running, "console");
    assert_eq!(taken.source.wait_laps(1, BOOT).unwrap().inconsistent, 0);

    let qemu = running.qemu();
    assert!(fs::read_link(&qemu).is_ok());
    drop(running);
    poll_until("QEMU ends with livesnap", BOOT, || Ok(fs::read_link(&qemu).is_err().then_some(())))
        .unwrap();
    taken.expect_sound();
}

#[test]
fn a_snapshot_is_restored_again_by_the_printed_commands() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let taken = Taken::new(Format::Qcow2);
    let image = fs::read(taken.path("disk")).unwrap();
    let mut running =
        Running::start(taken.restore(&["--exec"], "first"), taken.path("first.messages"));
    taken.expect_progress(&mut running, "first");
    let mut qmp = Qmp::connect(&taken.path("snapshot-restored/qmp.sock"), BOOT).unwrap();
    qmp.execute("quit", json!({})).unwrap();
    assert_eq!(running.child.wait().unwrap().code(), Some(0), "{}", running.messages());

    let again = taken.restore(&["--exec"], "again").output().unwrap();
    let text = String::from_utf8(again.stderr).unwrap();
    assert_eq!(again.status.code(), Some(1), "{text}");
    assert!(text.contains("--overlay-dir"), "the disks of the first one are kept: {text}");

    let overlays = taken.path("second");
    let option = format!("--overlay-dir={}", overlays.display());
    let printed = taken.restore(&[&option], "second.console").output().unwrap();
    assert!(printed.status.success(), "{printed:?}");
    assert!(!overlays.exists());
    let script = taken.path("script");
    fs::write(&script, printed.stdout).unwrap();
    let mut shell = Command::new("sh");
    shell.arg(&script).stdin(Stdio::null());
    let mut running = Running::start(shell, taken.path("second.messages"));
    taken.expect_progress(&mut running, "second.console");
    drop(running);
    assert!(fs::read(taken.path("disk")).unwrap() == image, "the snapshot's image was written to");
    taken.expect_sound();
}

#[test]
fn a_snapshot_without_disks_gets_them_from_the_caller() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let taken = Taken::with(Format::Raw, false, &["--no-disks"]);
    for (options, expected) in [
        (&["--exec"][..], "give --without-disks"),
        (&["--exec", "--without-disks"], "is writable but no disk of the snapshot"),
    ] {
        let output = taken.restore(options, "console").output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(expected), "{text}");
    }
    let copy = taken.path("copy");
    fs::copy(taken.path("disk"), &copy).unwrap();
    let mut command = taken.restore(&["--exec", "--without-disks"], "console");
    let replacement = format!("driver=file,node-name=file0,filename={}", copy.display());
    command.args(["-blockdev", &replacement]);
    let mut running = Running::start(command, taken.path("messages"));
    taken.expect_progress(&mut running, "console");
}

#[test]
fn a_virtual_machine_with_other_cpus_or_ram_is_refused() {
    if !is_root_or_skip("a snapshot").unwrap() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let snapshot = dir.path().join("snapshot");
    let mut source =
        Qemu::builder().arguments(["-device", "VGA,id=card,vgamem_mb=8"]).start().unwrap();
    source.wait_ready(BOOT).unwrap();
    livesnap::snapshot(&source, &snapshot, &[]).unwrap();
    drop(source);
    let refuse = |option: &str, value: &str, expected: &str| {
        let mut command = livesnap::command(["restore", "--exec"]).unwrap();
        command.arg(&snapshot).args(["--", option, value]).stdin(Stdio::null());
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(expected), "{text}");
        assert!(!dir.path().join("snapshot-restored").exists());
    };
    refuse("-smp", "3", "a number of CPUs of 3 but the snapshot has 1");
    refuse(
        "-device",
        "VGA,id=card,vgamem_mb=16",
        "vga.vram\" of a length of 16777216 but the snapshot has 8388608",
    );
    refuse("-device", "secondary-vga,id=other", "16777216 but the snapshot has none");
}
