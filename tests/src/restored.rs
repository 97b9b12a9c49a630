//! A VM that `livesnap restore --exec` runs; ended when dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::console::{Console, Heartbeat};
use crate::qmp::Qmp;
use crate::{livesnap, poll_until};

/// A QEMU that is told to quit does so by then.
const QUIT_LIMIT: Duration = Duration::from_secs(10);

/// The command, and the QEMU that it has started.
#[derive(Debug)]
pub struct Restored {
    child: Child,
    /// Of its console, its messages and its disks.
    dir: PathBuf,
}

impl Restored {
    /// Restores `snapshot` into a new QEMU that keeps its files below `dir`.
    pub fn start(snapshot: &Path, dir: &Path) -> Result<Self> {
        let log = File::create(dir.join("log")).context("cannot create the log of the restore")?;
        let chardev = format!("file,id=console,path={}", dir.join("console").display());
        let mut command: Command = livesnap::command(["restore", "--exec", "--overlay-dir"])?;
        command.arg(dir.join("disks")).arg(snapshot).args(["--", "-chardev", &chardev]);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot run livesnap restore")?;
        Ok(Self { child, dir: dir.to_owned() })
    }

    /// Waits until the newest heartbeat since the restore fulfils `wanted`, and returns it.
    pub fn wait_heartbeat(
        &mut self,
        timeout: Duration,
        wanted: impl Fn(&Heartbeat) -> bool,
    ) -> Result<Heartbeat> {
        poll_until("the restored guest's heartbeat is as expected", timeout, || {
            if let Some(status) = self.child.try_wait().context("cannot wait for the restore")? {
                let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                bail!("livesnap restore has ended with {status}; it said:\n{log}");
            }
            // There is none before QEMU has opened it.
            let Ok(bytes) = fs::read(self.dir.join("console")) else { return Ok(None) };
            Ok(Console::new(&bytes).heartbeats().pop().filter(&wanted))
        })
    }

    fn quit(&mut self) -> Result<()> {
        let mut qmp = Qmp::connect(&self.dir.join("disks/qmp.sock"), QUIT_LIMIT)?;
        qmp.execute("quit", json!({}))?;
        self.child.wait().context("cannot wait for the restore")?;
        Ok(())
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        // Fails if QEMU has ended or never began, and then there is only the command to end.
        if self.quit().is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
