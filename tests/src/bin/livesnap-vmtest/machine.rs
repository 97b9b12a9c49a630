//! The VM: boots, passes on what its console says, and judges it.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use livesnap_tests::poll_until;

/// Memory for the largest test, which snapshots 512 MiB, and for the programs.
const MEMORY: &str = "2048M";
/// Disk for its snapshots; sparse.
const DISK_BYTES: u64 = 4 << 30;
/// An oops ends the VM. The pool of huge pages is for tests of memory in it.
const COMMAND_LINE: &str =
    "console=ttyS0 loglevel=4 panic=-1 oops=panic no_timer_check hugepages=64";

/// Boots a kernel with an initramfs, passes the console on, and returns all of it when the VM has ended.
pub fn run(kernel: &Path, initramfs: &[u8], limit: Duration) -> Result<String> {
    let dir = tempfile::Builder::new()
        .prefix("livesnap-vmtest-")
        .tempdir_in("/var/tmp")
        .context("cannot make a directory in /var/tmp")?;
    let path = |name: &str| dir.path().join(name);
    fs::write(path("initramfs"), initramfs).context("cannot write the initramfs")?;
    make_disk(&path("disk"))?;

    let mut command = Command::new("setpriv");
    // It ends with us, whatever becomes of us.
    command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", MEMORY, "-nic", "none"]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(path("initramfs"));
    command.args(["-append", COMMAND_LINE]);
    command.args(["-serial", &format!("file:{}", path("console").display())]);
    let drive = format!("file={},format=raw,if=virtio,cache=unsafe", path("disk").display());
    command.args(["-drive", &drive]).stdin(Stdio::null());
    let mut machine = Machine(command.spawn().context("cannot run setpriv")?);

    let mut console = Console::default();
    let ended = poll_until("the tests end", limit, || {
        let status = machine.0.try_wait().context("cannot wait for QEMU")?;
        console.pass_on(&path("console"))?;
        Ok(status)
    });
    let status = ended.with_context(|| format!("the VM said at last: {}", console.last_line()))?;
    ensure!(status.success(), "QEMU ended with {status}");
    Ok(console.text)
}

/// An ext4 without content.
fn make_disk(path: &Path) -> Result<()> {
    File::create_new(path)
        .and_then(|file| file.set_len(DISK_BYTES))
        .context("cannot create the VM's disk")?;
    let output = Command::new("mkfs.ext4").arg("-q").arg(path).output();
    let output = output.context("cannot run mkfs.ext4")?;
    ensure!(
        output.status.success(),
        "mkfs.ext4 failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// A running QEMU; killed when dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if it has ended already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the VM has said so far.
#[derive(Default)]
struct Console {
    file: Option<File>,
    text: String,
}

impl Console {
    /// Reads what is new and writes it to standard output.
    fn pass_on(&mut self, path: &Path) -> Result<()> {
        if self.file.is_none() {
            self.file = File::open(path).ok();
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).context("cannot read the console")?;
        let new = String::from_utf8_lossy(&bytes).replace('\r', "");
        std::io::stdout().write_all(new.as_bytes()).context("cannot pass the console on")?;
        self.text += &new;
        Ok(())
    }

    fn last_line(&self) -> &str {
        self.text.lines().last().unwrap_or("nothing")
    }
}

/// Whether a console tells that all of `programs` ended well, and how many tests passed. Each must have run one, unless
/// the tests were filtered and so not `complete`.
pub fn judge(console: &str, programs: &[&str], complete: bool) -> Result<u32> {
    if let Some(failure) = console.lines().find(|line| line.starts_with("VMTEST failed")) {
        bail!("{failure}");
    }
    let mut total = 0;
    for &program in programs {
        let (begin, end) = (format!("VMTEST begin {program}\n"), format!("VMTEST end {program} "));
        let told = console.split_once(&begin).and_then(|(_, rest)| rest.split_once(&end));
        let (told, rest) = told.with_context(|| format!("{program} did not end"))?;
        let status = rest.lines().next().unwrap_or_default();
        ensure!(status == "exit status: 0", "{program} ended with {status}");
        let passed = passed(told).with_context(|| format!("{program} does not say its result"))?;
        ensure!(passed > 0 || !complete, "{program} ran no test");
        total += passed;
    }
    ensure!(console.lines().any(|line| line == "VMTEST done"), "the VM did not reach the end");
    ensure!(total > 0, "no test ran");
    Ok(total)
}

/// Number of tests that passed, from libtest's last line: `test result: ok. 5 passed; 0 failed; ...`.
fn passed(told: &str) -> Option<u32> {
    let result = told.lines().find_map(|line| line.strip_prefix("test result: ok. "))?;
    result.split_once(" passed;")?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    const GOOD: &str = "\
VMTEST on Linux 6.1.0
VMTEST begin core/a
test x ... ok
test result: ok. 3 passed; 0 failed; 0 ignored
VMTEST end core/a exit status: 0
VMTEST begin core/b
test result: ok. 0 passed; 0 failed; 0 ignored
VMTEST end core/b exit status: 0
VMTEST done
";

    #[test]
    fn a_good_console_is_counted() {
        assert_eq!(judge(GOOD, &["core/a"], true).unwrap(), 3);
        assert_eq!(judge(GOOD, &["core/a", "core/b"], false).unwrap(), 3);
    }

    #[test]
    fn whatever_is_missing_or_wrong_fails() {
        let refused = |console: &str, programs: &[&str]| {
            format!("{:#}", judge(console, programs, true).unwrap_err())
        };
        assert_eq!(refused(GOOD, &["core/a", "core/b"]), "core/b ran no test");
        assert_eq!(refused(GOOD, &["core/c"]), "core/c did not end");
        let cut = GOOD.replace("VMTEST done\n", "");
        assert_eq!(refused(&cut, &["core/a"]), "the VM did not reach the end");
        let failed = GOOD.replacen("exit status: 0", "exit status: 101", 1);
        assert_eq!(refused(&failed, &["core/a"]), "core/a ended with exit status: 101");
        let silent = GOOD.replacen("test result", "result", 1);
        assert_eq!(refused(&silent, &["core/a"]), "core/a does not say its result");
        let broken = GOOD.replace("VMTEST done", "VMTEST failed cannot mount");
        assert_eq!(refused(&broken, &["core/a"]), "VMTEST failed cannot mount");
    }
}
