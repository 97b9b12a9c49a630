//! Starts a QEMU that runs the self-verifying guest, and ends it with the test.
//!
//! QEMU runs by TCG, so that a machine without KVM can run every test. It is started through `setpriv`,
//! which has it killed with the thread that started it, whatever becomes of the test: keep [`Qemu`] on
//! the thread that made it.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::disable_transparent_huge_pages;
use serde_json::{Value, json};
use tempfile::TempDir;

pub use crate::disk::{Aio, Disk, Format};
pub use crate::huge_pages::HugePages;
pub use crate::load::Load;

use crate::console::{Console, Heartbeat};
use crate::initramfs::GuestImage;
use crate::poll_until;
use crate::qmp::Qmp;

/// The program that is tested against.
const QEMU: &str = "qemu-system-x86_64";
/// User and group "nobody" and "nogroup" of Debian.
const NOBODY: u32 = 65534;
/// A QEMU that does not answer for so long is stuck; 2 busy cores and emulation can take seconds.
const QMP_TIMEOUT: Duration = Duration::from_secs(60);

/// Machine type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// PCI Express chipset.
    Q35,
    /// i440FX chipset.
    Pc,
}

/// What guest RAM is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ram {
    /// Private anonymous memory; in huge pages unless the host's policy is "never", for QEMU asks for them.
    Anonymous,
    /// The same in 4 KiB pages, whatever the host's policy is.
    AnonymousSmallPages,
    /// The same, shared.
    SharedAnonymous,
    /// A memfd.
    Memfd,
    /// A memfd of 2 MiB huge pages, which the host must have (see [`HugePages`]).
    HugetlbMemfd,
    /// A file in this directory, which should be a tmpfs.
    File(PathBuf),
}

/// A VM to be started.
#[derive(Debug, Clone)]
pub struct Builder {
    machine: Machine,
    memory_mib: u32,
    ram: Ram,
    vcpus: u32,
    disks: Vec<Disk>,
    load: Load,
    sandbox: bool,
    nobody: bool,
    incoming: bool,
    extra: Vec<OsString>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            machine: Machine::Q35,
            memory_mib: 256,
            ram: Ram::Anonymous,
            vcpus: 1,
            disks: Vec::new(),
            load: Load::default(),
            sandbox: false,
            nobody: false,
            incoming: false,
            extra: Vec::new(),
        }
    }
}

impl Builder {
    /// Machine type; q35 unless told.
    pub fn machine(self, machine: Machine) -> Self {
        Self { machine, ..self }
    }

    /// RAM size; 256 MiB unless told.
    pub fn memory_mib(self, memory_mib: u32) -> Self {
        Self { memory_mib, ..self }
    }

    /// What RAM is made of; anonymous memory unless told.
    pub fn ram(self, ram: Ram) -> Self {
        Self { ram, ..self }
    }

    /// Number of vCPUs; 1 unless told.
    pub fn vcpus(self, vcpus: u32) -> Self {
        Self { vcpus, ..self }
    }

    /// One more disk; the first is the guest's /dev/vda.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// What the guest does.
    pub fn load(self, load: Load) -> Self {
        Self { load, ..self }
    }

    /// Runs QEMU under its own seccomp filter.
    pub fn sandbox(self) -> Self {
        Self { sandbox: true, ..self }
    }

    /// Runs QEMU as user nobody; needs root.
    pub fn nobody(self) -> Self {
        Self { nobody: true, ..self }
    }

    /// Starts it empty, for [`Qemu::load_mapped_ram`].
    pub fn incoming(self) -> Self {
        Self { incoming: true, ..self }
    }

    /// Further arguments for QEMU.
    pub fn arguments<I: IntoIterator<Item = impl Into<OsString>>>(mut self, arguments: I) -> Self {
        self.extra.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Starts QEMU.
    pub fn start(&self) -> Result<Qemu> {
        self.start_through([QEMU])
    }

    /// Starts QEMU through another program, which gets QEMU's arguments behind `program` and must
    /// replace itself by QEMU.
    pub fn start_through<I: IntoIterator<Item = impl Into<OsString>>>(
        &self,
        program: I,
    ) -> Result<Qemu> {
        let dir = tempfile::Builder::new()
            .prefix("livesnap-vm-")
            .tempdir_in("/var/tmp")
            .context("cannot make a directory in /var/tmp")?;
        let mut image = GuestImage::get()?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if self.nobody {
            image = self.hand_over_to_nobody(dir.path(), &image)?;
            command.args([
                "--reuid",
                &NOBODY.to_string(),
                "--regid",
                &NOBODY.to_string(),
                "--clear-groups",
            ]);
        }
        let log =
            fs::File::create(dir.path().join("log")).context("cannot create the log of QEMU")?;
        command
            .arg("--")
            .args(program.into_iter().map(Into::into))
            .args(self.qemu_arguments(dir.path(), &image))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share the log of QEMU")?)
            .stderr(log);
        let child = spawn(&mut command, self.ram != Ram::AnonymousSmallPages)?;
        let mut qemu = Qemu { child, dir, qmp: None };
        let socket = qemu.dir().join("harness.qmp");
        let qmp = poll_until("QEMU's QMP socket answers", QMP_TIMEOUT, || {
            qemu.check_alive()?;
            Ok(Qmp::connect(&socket, QMP_TIMEOUT).ok())
        })?;
        qemu.qmp = Some(qmp);
        Ok(qemu)
    }

    /// Nobody may read neither the source tree nor our files: it gets copies, and what it writes.
    fn hand_over_to_nobody(&self, dir: &Path, image: &GuestImage) -> Result<GuestImage> {
        let image_of = |from: &Path, name: &str| -> Result<PathBuf> {
            let to = dir.join(name);
            fs::copy(from, &to)
                .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
            fs::set_permissions(&to, Permissions::from_mode(0o644))
                .with_context(|| format!("cannot open up {}", to.display()))?;
            Ok(to)
        };
        let copies = GuestImage {
            kernel: image_of(&image.kernel, "vmlinuz")?,
            initramfs: image_of(&image.initramfs, "initramfs.cpio")?,
        };
        for path in self.disks.iter().map(Disk::path).chain([dir]) {
            chown(path, Some(NOBODY), Some(NOBODY))
                .with_context(|| format!("cannot give {} to nobody", path.display()))?;
        }
        Ok(copies)
    }

    fn qemu_arguments(&self, dir: &Path, image: &GuestImage) -> Vec<OsString> {
        let machine = match self.machine {
            Machine::Q35 => "q35",
            Machine::Pc => "pc",
        };
        let size = self.memory_mib;
        let mut arguments: Vec<OsString> = [
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]
        .map(Into::into)
        .to_vec();
        let mut add = |option: &str, value: String| arguments.extend([option.into(), value.into()]);
        // The block is called as QEMU itself would call it, whatever it is made of.
        let backend = match &self.ram {
            Ram::Anonymous | Ram::AnonymousSmallPages => "memory-backend-ram".to_owned(),
            Ram::SharedAnonymous => "memory-backend-ram,share=on".to_owned(),
            Ram::Memfd => "memory-backend-memfd,share=on".to_owned(),
            Ram::HugetlbMemfd => {
                "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M".to_owned()
            }
            Ram::File(directory) => {
                format!("memory-backend-file,share=on,mem-path={}", directory.display())
            }
        };
        add(
            "-object",
            format!("{backend},id=pc.ram,size={size}M,x-use-canonical-path-for-ramblock-id=off"),
        );
        add("-machine", format!("{machine},memory-backend=pc.ram"));
        add("-m", format!("{size}M"));
        add("-smp", self.vcpus.to_string());
        add("-kernel", image.kernel.display().to_string());
        add("-initrd", image.initramfs.display().to_string());
        add("-append", self.load.command_line());
        add("-chardev", format!("file,id=console,path={}", dir.join("console").display()));
        add("-serial", "chardev:console".to_owned());
        for name in ["harness", "product", "other"] {
            let socket = dir.join(name).with_extension("qmp");
            add("-qmp", format!("unix:{},server=on,wait=off", socket.display()));
        }
        if self.sandbox {
            add("-sandbox", "on".to_owned());
        }
        if self.incoming {
            add("-incoming", "defer".to_owned());
        }
        for (index, disk) in self.disks.iter().enumerate() {
            arguments.extend(disk.arguments(index));
        }
        arguments.extend_from_slice(&self.extra);
        arguments
    }
}

/// Starts a process, with or without transparent huge pages.
fn spawn(command: &mut Command, huge_pages: bool) -> Result<Child> {
    // A process can only be told so by inheritance, so for that moment it holds for this one too: no
    // other VM may be started meanwhile.
    static INHERITED: Mutex<()> = Mutex::new(());
    let _guard = INHERITED.lock().unwrap_or_else(PoisonError::into_inner);
    disable_transparent_huge_pages(!huge_pages).context("cannot switch transparent huge pages")?;
    let child = command.spawn();
    disable_transparent_huge_pages(false).context("cannot switch transparent huge pages")?;
    child.context("cannot run setpriv")
}

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    dir: TempDir,
    qmp: Option<Qmp>,
}

impl Qemu {
    /// A q35 VM with 256 MiB and 1 vCPU, to be changed.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Process id of QEMU.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Directory of this VM's files; removed with it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A QMP socket that the harness does not use.
    pub fn qmp_socket(&self) -> PathBuf {
        self.dir().join("product.qmp")
    }

    /// Another one, for a second program that wants something of this VM at the same time.
    pub fn other_qmp_socket(&self) -> PathBuf {
        self.dir().join("other.qmp")
    }

    /// Runs a QMP command on the harness's own connection.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.check_alive()?;
        self.qmp.as_mut().context("not connected to QMP")?.execute(command, arguments)
    }

    /// Runs a monitor command for humans.
    pub fn human(&mut self, line: &str) -> Result<String> {
        self.qmp.as_mut().context("not connected to QMP")?.human(line)
    }

    /// State of the VM, such as "running" or "paused".
    pub fn status(&mut self) -> Result<String> {
        let status = self.qmp("query-status", json!({}))?;
        Ok(status["status"].as_str().context("query-status tells no status")?.to_owned())
    }

    /// The threads that run virtual CPUs.
    pub fn vcpu_threads(&mut self) -> Result<Vec<i64>> {
        let cpus = self.qmp("query-cpus-fast", json!({}))?;
        let threads = cpus.as_array().into_iter().flatten().map(|cpu| cpu["thread-id"].as_i64());
        threads.collect::<Option<_>>().context("query-cpus-fast tells no threads")
    }

    /// How long each pause lasted that has ended since this was last asked, by QEMU's own clock.
    pub fn take_pauses(&mut self) -> Result<Vec<Duration>> {
        // Events come ahead of the answer to a later command, so none is left behind.
        self.status()?;
        let events = self.qmp.as_mut().context("not connected to QMP")?.take_events();
        pauses(&events)
    }

    /// The guest's console so far.
    pub fn console(&self) -> Result<Console> {
        match fs::read(self.dir().join("console")) {
            Ok(bytes) => Ok(Console::new(&bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Console::default()),
            Err(error) => Err(error).context("cannot read the console"),
        }
    }

    /// All heartbeats so far.
    pub fn heartbeats(&self) -> Result<Vec<Heartbeat>> {
        Ok(self.console()?.heartbeats())
    }

    /// Waits until the guest has populated its RAM and works.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<()> {
        self.wait_console("the guest is ready", timeout, |console| console.is_ready().then_some(()))
    }

    /// Waits until the newest heartbeat fulfils `wanted`, and returns it.
    pub fn wait_heartbeat(
        &mut self,
        timeout: Duration,
        wanted: impl Fn(&Heartbeat) -> bool,
    ) -> Result<Heartbeat> {
        self.wait_console("the guest's heartbeat is as expected", timeout, |console| {
            console.heartbeats().pop().filter(&wanted)
        })
    }

    /// Waits until every page has been overwritten, and so checked, `laps` times from now on. Fails if any was wrong.
    pub fn wait_laps(&mut self, laps: u64, timeout: Duration) -> Result<Heartbeat> {
        let first = self.wait_heartbeat(timeout, |_| true)?;
        // One more than asked: the lap that is under way has checked only its rest.
        let last = self.wait_heartbeat(timeout, |heartbeat| {
            heartbeat.inconsistent > 0 || heartbeat.laps > first.laps + laps
        })?;
        ensure!(
            last.inconsistent == 0,
            "the guest found wrong pages:\n{}",
            self.console()?.inconsistencies().join("\n")
        );
        Ok(last)
    }

    fn wait_console<T>(
        &mut self,
        what: &str,
        timeout: Duration,
        answer: impl Fn(&Console) -> Option<T>,
    ) -> Result<T> {
        poll_until(what, timeout, || {
            self.check_alive()?;
            let console = self.console()?;
            if let Some(failure) = console.failure() {
                bail!("the guest has failed: {failure}");
            }
            Ok(answer(&console))
        })
        .with_context(|| format!("console:\n{}", self.console().unwrap_or_default().text()))
    }

    /// Pauses the VM and has QEMU itself write a mapped-ram file.
    pub fn save_mapped_ram(&mut self, path: &Path) -> Result<()> {
        self.qmp("stop", json!({}))?;
        self.migrate("migrate", path)
    }

    /// Loads a mapped-ram file into a VM that was built with [`Builder::incoming`].
    pub fn load_mapped_ram(&mut self, path: &Path) -> Result<()> {
        self.migrate("migrate-incoming", path)
    }

    fn migrate(&mut self, command: &str, path: &Path) -> Result<()> {
        let capabilities = json!({"capabilities": [{"capability": "mapped-ram", "state": true}]});
        self.qmp("migrate-set-capabilities", capabilities)?;
        self.qmp("migrate-set-parameters", json!({"max-bandwidth": 0}))?;
        self.qmp(command, json!({"uri": format!("file:{}", path.display())}))?;
        poll_until("the migration completes", QMP_TIMEOUT, || {
            let state = self.qmp("query-migrate", json!({}))?;
            match state["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some("failed") => bail!("{command} failed: {}", state["error-desc"]),
                _ => Ok(None),
            }
        })
    }

    /// Waits for QEMU to end by itself.
    pub fn wait_exit(&mut self, timeout: Duration) -> Result<ExitStatus> {
        poll_until("QEMU ends", timeout, || self.child.try_wait().context("cannot wait for QEMU"))
    }

    /// Sends QEMU a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("no process id")?, signal).context("cannot signal QEMU")
    }

    /// Whether QEMU holds a userfaultfd, or any of its memory is under one, whoever holds it.
    pub fn has_userfaultfd(&self) -> Result<bool> {
        let directory = format!("/proc/{}/fd", self.pid());
        let mut links = fs::read_dir(&directory)
            .with_context(|| format!("cannot list {directory}"))?
            .flatten()
            // One that is closed meanwhile is none.
            .filter_map(|entry| fs::read_link(entry.path()).ok());
        if links.any(|link| link == Path::new("anon_inode:[userfaultfd]")) {
            return Ok(true);
        }
        let path = format!("/proc/{}/smaps", self.pid());
        let smaps = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        // proc(5), VmFlags: uw and um are userfaultfd's write-protect and missing tracking.
        Ok(smaps
            .lines()
            .filter_map(|line| line.strip_prefix("VmFlags:"))
            .any(|flags| flags.split(' ').any(|flag| matches!(flag, "uw" | "um"))))
    }

    /// Waits until it has none, for the kernel takes down a killed process's in its own time.
    pub fn wait_unprotected(&self, timeout: Duration) -> Result<()> {
        poll_until("memory is given up", timeout, || Ok((!self.has_userfaultfd()?).then_some(())))
    }

    /// Kibibytes of RAM in anonymous 2 MiB huge pages.
    pub fn anon_huge_kib(&self) -> Result<u64> {
        let path = format!("/proc/{}/smaps_rollup", self.pid());
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("AnonHugePages:"))
            .context("no AnonHugePages in smaps_rollup")?;
        line.trim()
            .trim_end_matches(" kB")
            .parse()
            .with_context(|| format!("AnonHugePages is {line}"))
    }

    fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait().context("cannot wait for QEMU")? {
            let log = fs::read_to_string(self.dir().join("log")).unwrap_or_default();
            let console = self.console().unwrap_or_default();
            bail!("QEMU has ended with {status}; it said:\n{log}\nconsole:\n{}", console.text());
        }
        Ok(())
    }
}

/// The time from each STOP event to the RESUME that ends it.
fn pauses(events: &[Value]) -> Result<Vec<Duration>> {
    let mut pauses = Vec::new();
    let mut stopped = None;
    for event in events {
        let part = |key: &str| {
            event["timestamp"][key].as_u64().with_context(|| format!("no timestamp: {event}"))
        };
        let at =
            Duration::from_secs(part("seconds")?) + Duration::from_micros(part("microseconds")?);
        match event["event"].as_str() {
            Some("STOP") => stopped = Some(at),
            Some("RESUME") => {
                pauses.extend(stopped.take().map(|stopped| at.saturating_sub(stopped)))
            }
            _ => {}
        }
    }
    Ok(pauses)
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    #[test]
    fn a_pause_lasts_from_stop_to_resume() {
        let event = |name: &str, seconds: u64, microseconds: u64| json!({"event": name, "timestamp": {"seconds": seconds, "microseconds": microseconds}});
        let events = [
            event("RESUME", 1, 0),
            event("STOP", 7, 999_000),
            event("BLOCK_JOB_READY", 8, 0),
            event("RESUME", 8, 1_500),
            event("STOP", 9, 0),
        ];
        assert_eq!(pauses(&events).unwrap(), [Duration::from_micros(2_500)]);
        assert!(pauses(&[json!({"event": "STOP"})]).is_err());
    }
}
