//! `livesnap restore`: the stock QEMU command that resumes a snapshot, or running it.
//!
//! Without `--exec` nothing is touched: a shell script goes to standard output. With it, QEMU is started empty and
//! stopped, compared with the manifest, and only then loaded. The guest gets fresh overlays, so that the same
//! snapshot can be restored any number of times.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use snapshot_core::Reason;
use snapshot_core::image::{Manifest, Snapshot};
use snapshot_core::vmm::RunState;
use snapshot_core::vmm::qemu::command_line::{self, CommandLineError, Overlay, Rewritten};
use snapshot_core::vmm::qemu::incoming::{self, IncomingError};
use snapshot_core::vmm::qemu::qmp::Qmp;

use super::child_of;
use crate::{Failure, output};

/// QEMU has opened its QMP socket by then, or something is wrong with it.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks at a QEMU that starts or loads.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

const EXAMPLES: &str = "\
Examples:
  livesnap restore /backup/vm1                    print the commands
  livesnap restore /backup/vm1 | sh               run them
  livesnap restore --exec /backup/vm1             run QEMU here, after comparing it with the snapshot
  livesnap restore --exec /backup/vm1 -- -vnc :7  with arguments of your own

An argument behind -- replaces the recorded one with the same option and the same id or node-name.
The snapshot is not altered and can be restored again, with another --overlay-dir.
With --exec, QEMU ends with livesnap: whatever ends livesnap, kill -9 included, has QEMU shut down.

Exit codes:
  0  printed; with --exec: QEMU ran and ended by itself
  1  it does not fit, or QEMU failed";

/// Resume a snapshot in a new QEMU
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Directory of the snapshot
    dir: PathBuf,
    /// Run QEMU instead of printing the command; stays in the foreground until QEMU ends
    #[arg(long)]
    exec: bool,
    /// New directory for the disks of the restored guest [default: DIR-restored]
    #[arg(long, value_name = "DIR")]
    overlay_dir: Option<PathBuf>,
    /// Restore although the snapshot was taken without disks
    #[arg(long)]
    without_disks: bool,
    /// Arguments for QEMU
    #[arg(last = true, value_name = "QEMU ARGS")]
    qemu_args: Vec<String>,
}

impl From<CommandLineError> for Failure {
    fn from(error: CommandLineError) -> Self {
        let reason = match error {
            CommandLineError::Mismatch { .. } => Reason::Mismatch,
            CommandLineError::None | CommandLineError::Refused { .. } => Reason::BadArgument,
        };
        Self::new(reason, error)
    }
}

impl From<IncomingError> for Failure {
    fn from(error: IncomingError) -> Self {
        Self::new(error.reason(), error)
    }
}

/// Runs the command.
pub fn run(args: Args) -> Result<(), Failure> {
    let dir = fs::canonicalize(&args.dir).map_err(|error| {
        let path = args.dir.display();
        Failure::new(Reason::NotASnapshot, format!("could not open {path}: {error}"))
    })?;
    let snapshot = Snapshot::open(&dir)?;
    snapshot.check_disks()?;
    let manifest = snapshot.manifest();
    if manifest.disks_left_out && !args.without_disks {
        return Err(Failure::new(
            Reason::Mismatch,
            "the snapshot was taken without disks, so the guest would see disks of another time: \
             give --without-disks and, behind --, disks with the content of that time",
        ));
    }
    let overlay_dir = args.overlay_dir.unwrap_or_else(|| {
        let mut name = dir.clone().into_os_string();
        name.push("-restored");
        name.into()
    });
    let overlay_dir = std::path::absolute(&overlay_dir)
        .map_err(|error| failed("find the directory", &overlay_dir, &error))?;
    let plan = Plan::new(&snapshot, overlay_dir, &args.qemu_args)?;
    if args.exec { plan.execute(&snapshot) } else { output::line(plan.script(&snapshot)) }
}

fn failed(operation: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(Reason::Io, format!("could not {operation} {}: {error}", path.display()))
}

/// What is to be done.
struct Plan {
    rewritten: Rewritten,
    overlay_dir: PathBuf,
    working_dir: Option<PathBuf>,
}

impl Plan {
    fn new(
        snapshot: &Snapshot,
        overlay_dir: PathBuf,
        appended: &[String],
    ) -> Result<Self, Failure> {
        let Manifest { machine, ram, disks, .. } = snapshot.manifest();
        let disks: Vec<_> = disks.iter().map(|record| record.disk.clone()).collect();
        let block_bytes: Vec<_> = ram.blocks.iter().map(|block| block.len_bytes).collect();
        let rewritten =
            command_line::rewrite(machine, &disks, &block_bytes, &overlay_dir, appended)?;
        Ok(Self { rewritten, overlay_dir, working_dir: machine.working_dir.clone() })
    }

    /// The commands, for a shell.
    fn script(&self, snapshot: &Snapshot) -> String {
        let mut lines = vec![
            "#!/bin/sh".to_owned(),
            format!("# Restores the snapshot {}.", snapshot.dir().display()).replace('\n', " "),
        ];
        let changes = self.rewritten.changes.iter();
        lines.extend(changes.map(|change| format!("# {change}").replace('\n', " ")));
        lines.push("set -eu".into());
        if !self.rewritten.overlays.is_empty() {
            lines.push(format!("mkdir -m 700 -- {}", quoted(&self.overlay_dir.display())));
        }
        for overlay in &self.rewritten.overlays {
            let words: Vec<_> = create_overlay(overlay).iter().map(quoted).collect();
            lines.push(words.join(" "));
        }
        if let Some(dir) = &self.working_dir {
            lines.push(format!("cd -- {}", quoted(&dir.display())));
        }
        let incoming = format!("file:{}", snapshot.ram_path().display());
        let load = ["-global", "migration.mapped-ram=on", "-incoming", &incoming];
        let command = self.rewritten.command.iter().map(String::as_str).chain(load);
        let words: Vec<_> = command.map(|word| quoted(&word)).collect();
        lines.push(format!("exec {}", words.join(" ")));
        lines.join("\n")
    }

    /// Creates the overlays, starts QEMU, loads the snapshot, and waits until QEMU ends.
    fn execute(&self, snapshot: &Snapshot) -> Result<(), Failure> {
        for change in &self.rewritten.changes {
            output::note(change);
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&self.overlay_dir)
            .map_err(|error| self.no_overlay_dir(&error))?;
        let mut child = self.start().inspect_err(|_| self.remove_overlays())?;
        if let Err(failure) = self.load(&mut child, snapshot) {
            // It never ran: nothing in the overlays is worth keeping.
            let _ = child.kill();
            let _ = child.wait();
            self.remove_overlays();
            return Err(failure);
        }
        output::note(format_args!(
            "restored: pid {}, QMP socket {}",
            child.id(),
            self.qmp_socket().display()
        ));
        let status = child.wait().map_err(|error| {
            Failure::new(Reason::Io, format!("could not wait for QEMU: {error}"))
        })?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::new(
            Reason::VmmDied,
            format!("QEMU ended with {status}: see its messages above"),
        ))
    }

    fn qmp_socket(&self) -> PathBuf {
        self.overlay_dir.join("qmp.sock")
    }

    fn no_overlay_dir(&self, error: &std::io::Error) -> Failure {
        let path = self.overlay_dir.display();
        let remedy = match error.kind() {
            ErrorKind::AlreadyExists => {
                "it holds the disks of a guest restored before; remove it when that guest is no longer wanted, or give another --overlay-dir"
            }
            _ => "give another --overlay-dir",
        };
        let text = format!("could not create the directory {path}: {error}: {remedy}");
        Failure::new(Reason::BadDestination, text)
    }

    fn remove_overlays(&self) {
        if let Err(error) = fs::remove_dir_all(&self.overlay_dir) {
            output::error(failed("remove", &self.overlay_dir, &error));
        }
    }

    fn start(&self) -> Result<Child, Failure> {
        for overlay in &self.rewritten.overlays {
            let words = create_overlay(overlay);
            let status = Command::new(&words[0]).args(&words[1..]).status();
            let status = status.map_err(|error| failed("run", Path::new(&words[0]), &error))?;
            if !status.success() {
                let image = overlay.image.display();
                let text = format!("qemu-img could not make an overlay over {image}: {status}");
                return Err(Failure::new(Reason::Io, text));
            }
        }
        let (program, arguments) =
            self.rewritten.command.split_first().ok_or(CommandLineError::None)?;
        let qmp = format!("unix:{},server=on,wait=off", escaped(&self.qmp_socket()));
        let mut command = child_of::command(program);
        command.args(arguments).args(["-S", "-incoming", "defer", "-qmp", &qmp]);
        if let Some(dir) = &self.working_dir {
            command.current_dir(dir);
        }
        command.spawn().map_err(|error| failed("run", Path::new(program), &error))
    }

    /// Compares QEMU with the snapshot, loads it, and lets the guest run if it did.
    fn load(&self, child: &mut Child, snapshot: &Snapshot) -> Result<(), Failure> {
        let mut qmp = self.connect(child)?;
        incoming::compare(&mut qmp, snapshot.manifest())?;
        incoming::start(&mut qmp, &snapshot.ram_path())?;
        while !incoming::is_loaded(&mut qmp)? {
            std::thread::sleep(POLL_INTERVAL);
        }
        if snapshot.manifest().run_state == RunState::Running {
            incoming::resume(&mut qmp)?;
        }
        Ok(())
    }

    fn connect(&self, child: &mut Child) -> Result<Qmp, Failure> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match Qmp::connect(&self.qmp_socket(), START_LIMIT) {
                Ok(qmp) => return Ok(qmp),
                Err(error) if Instant::now() > deadline => {
                    return Err(Failure::new(error.reason(), error));
                }
                Err(_) => {}
            }
            if let Ok(Some(status)) = child.try_wait() {
                let text = format!("QEMU did not start ({status}): see its messages above");
                return Err(Failure::new(Reason::VmmDied, text));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

/// The command that creates `overlay`.
fn create_overlay(overlay: &Overlay) -> Vec<String> {
    let mut words: Vec<String> =
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F"].map(Into::into).into();
    words.extend([overlay.image_format.clone(), "-b".into()]);
    words.extend([overlay.image.display().to_string(), overlay.path.display().to_string()]);
    words
}

/// A path as a part of an option: QEMU takes a doubled comma for one.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// `word` as one word of a shell command.
fn quoted(word: &impl ToString) -> String {
    let word = word.to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word;
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}
