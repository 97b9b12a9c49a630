//! Rewriting the command line of a snapshotted QEMU into one that restores the snapshot beside it.
//!
//! Pure: touches no file. What stays is what the guest can see. What changes is what the original holds or
//! still uses:
//!
//! ```text
//! disk images             a fresh qcow2 overlay over each image of the snapshot
//! memory-backend-file     memory-backend-memfd: the file is the original's RAM
//! machine type            the versioned one of the snapshot
//! chardevs, serial ports  null
//! user-mode network       without forwarded ports
//! no word about displays  none
//! monitors, remote displays, pid file, daemonizing, gdb, logs      dropped
//! ```
//!
//! What cannot be made private for sure is refused. An argument that names an `id` or `node-name` is replaced by one
//! of the caller's with the same option and name, so every refusal of such an argument has a way around it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::vmm::{Disk, MachineDescription};

/// Options without a value; QEMU 10.0, `qemu-options.hx`.
const FLAGS: &[&str] = &[
    "S",
    "daemonize",
    "enable-kvm",
    "full-screen",
    "jitdump",
    "mem-prealloc",
    "no-fd-bootchk",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "only-migratable",
    "perfmap",
    "preconfig",
    "s",
    "semihosting",
    "snapshot",
    "usb",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
];
/// Options that concern the original's surroundings only.
const DROPPED: &[&str] = &[
    "D",
    "S",
    "daemonize",
    "gdb",
    "incoming",
    "mem-path",
    "mon",
    "monitor",
    "pidfile",
    "qmp",
    "qmp-pretty",
    "s",
    "spice",
    "vnc",
];
/// Options that name a disk image and nothing else.
const IMAGES: &[&str] = &["hda", "hdb", "hdc", "hdd", "mtdblock", "pflash", "sd"];
/// Options whose effect cannot be seen from the command line, or cannot be made private.
const REFUSED: &[(&str, &str)] = &[
    ("add-fd", "hands over an open file that only the original's parent has"),
    ("fda", "is a floppy image that the original may write"),
    ("fdb", "is a floppy image that the original may write"),
    ("net", "is not understood: -netdev is"),
    ("readconfig", "reads options from a file"),
    ("snapshot", "keeps disk content in a temporary file that is gone"),
    ("tpmdev", "talks to a TPM that the original uses"),
];
/// Keys of a file-backed memory object that mean nothing to one without a file.
const FILE_MEMORY_KEYS: &[&str] =
    &["align", "discard-data", "mem-path", "offset", "pmem", "readonly", "rom"];

/// Why a command line cannot be rewritten.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandLineError {
    /// The snapshot has none.
    #[error(
        "the snapshot records no command line: start QEMU by hand with the same machine and -incoming defer"
    )]
    None,
    /// An argument that could harm the original or spoil the restored guest.
    #[error("cannot restore with -{option} {value}: it {problem}; {remedy}")]
    Refused {
        /// Option without the dash.
        option: String,
        /// Its value.
        value: String,
        /// What is the matter.
        problem: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The command line does not describe the virtual machine of the snapshot.
    #[error(
        "the recorded command line has {what} {found} but the snapshot {expected}, as after hot-plugging: start QEMU by hand with the devices that were plugged"
    )]
    Mismatch {
        /// Which value.
        what: &'static str,
        /// Its value on the command line.
        found: String,
        /// Its value in the snapshot.
        expected: String,
    },
}

/// Remedy for arguments that can be replaced.
const REPLACE: &str = "give a replacement with the same name behind --";
/// Remedy for all others.
const BY_HAND: &str = "start QEMU by hand without it";

/// An overlay that must be created before the command runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Where.
    pub path: PathBuf,
    /// The image below it, absolute, never written.
    pub image: PathBuf,
    /// Format of that image.
    pub image_format: String,
}

/// A command that restores, less what says where the RAM file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewritten {
    /// Program and arguments.
    pub command: Vec<String>,
    /// What it needs.
    pub overlays: Vec<Overlay>,
    /// What was dropped or replaced, for people.
    pub changes: Vec<String>,
}

/// Rewrites `machine`'s command line.
///
/// `disks` are those of the snapshot, `block_bytes` the lengths of its RAM blocks. Overlays are put into
/// `overlay_dir`, which should be absolute. `appended` are the caller's own arguments.
///
/// # Errors
/// If an argument cannot be made private, or the command line does not fit the snapshot.
pub fn rewrite(
    machine: &MachineDescription,
    disks: &[Disk],
    block_bytes: &[u64],
    overlay_dir: &Path,
    appended: &[String],
) -> Result<Rewritten, CommandLineError> {
    let (program, arguments) = machine.command_line.split_first().ok_or(CommandLineError::None)?;
    let arguments = parse(arguments);
    check_size(machine, &arguments, block_bytes)?;
    let given = parse(appended);
    let names: Vec<_> = given.iter().filter_map(Argument::name).collect();
    let is_kept = |argument: &&Argument| argument.name().is_none_or(|name| !names.contains(&name));
    let kept: Vec<_> = arguments.iter().filter(is_kept).cloned().collect();
    let read_only_nodes = read_only_files(&arguments);
    let named = |disk| (disk, name_of(machine, disk, &arguments, &read_only_nodes));
    let disks: Vec<_> = disks.iter().map(named).collect();
    let mut rewriter = Rewriter {
        machine,
        disks: &disks,
        overlay_dir,
        given,
        private_nodes: private_files(machine, &disks, &kept),
        read_only_nodes,
        used_nodes: HashSet::new(),
        out: Rewritten { command: vec![program.clone()], overlays: vec![], changes: vec![] },
    };
    for argument in &arguments {
        rewriter.argument(argument)?;
    }
    rewriter.finish(&arguments)?;
    let Rewriter { mut out, given, .. } = rewriter;
    out.command.extend(given.into_iter().flat_map(Argument::words));
    Ok(out)
}

/// An option with its value; no option for a bare image name.
#[derive(Clone, Debug)]
struct Argument {
    option: String,
    value: Option<String>,
}

impl Argument {
    fn value(&self) -> &str {
        self.value.as_deref().unwrap_or_default()
    }

    /// The option and the name by which other arguments refer to this one.
    fn name(&self) -> Option<(String, String)> {
        let keys = Keys::parse(self.value());
        let name = keys.get("id").or_else(|| keys.get("node-name"))?;
        Some((self.option.clone(), name.into()))
    }

    /// As it stands on a command line.
    fn words(self) -> impl Iterator<Item = String> {
        std::iter::once(format!("-{}", self.option)).chain(self.value)
    }

    fn refused(&self, problem: impl Into<String>, remedy: &'static str) -> CommandLineError {
        CommandLineError::Refused {
            option: self.option.clone(),
            value: self.value().into(),
            problem: problem.into(),
            remedy,
        }
    }
}

fn parse(arguments: &[String]) -> Vec<Argument> {
    let mut out = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let parsed = match argument.strip_prefix('-') {
            // A bare image is the first disk.
            None => Argument { option: "hda".into(), value: Some(argument.clone()) },
            Some(option) => {
                let option = option.strip_prefix('-').unwrap_or(option).to_owned();
                let value =
                    if FLAGS.contains(&option.as_str()) { None } else { rest.next().cloned() };
                Argument { option, value }
            }
        };
        out.push(parsed);
    }
    out
}

/// A value of the form `first,key=value,...`, or a JSON object as its dotted keys.
#[derive(Clone, Debug)]
struct Keys(Vec<(String, String)>);

impl Keys {
    fn parse(value: &str) -> Self {
        if value.starts_with('{')
            && let Ok(json) = serde_json::from_str::<Value>(value)
        {
            let mut out = Vec::new();
            flatten("", &json, &mut out);
            return Self(out);
        }
        // A doubled comma stands for one.
        let parts = value.replace(",,", "\0");
        let parts = parts.split(',').filter(|part| !part.is_empty());
        Self(
            parts
                .map(|part| part.replace('\0', ","))
                .map(|part| match part.split_once('=') {
                    Some((key, value)) => (key.to_owned(), value.to_owned()),
                    None => (String::new(), part),
                })
                .collect(),
        )
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The first part if it has no key, else the value of `key`.
    fn first_or(&self, key: &str) -> Option<&str> {
        match self.0.first() {
            Some((name, value)) if name.is_empty() => Some(value),
            _ => self.get(key),
        }
    }

    fn is_on(&self, key: &str) -> bool {
        matches!(self.get(key), Some("on" | "yes" | "true"))
    }

    fn set(&mut self, key: &str, value: &str) {
        self.remove(key);
        self.0.push((key.into(), value.into()));
    }

    fn remove(&mut self, key: &str) {
        self.0.retain(|(name, _)| name != key);
    }
}

impl std::fmt::Display for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, (key, value)) in self.0.iter().enumerate() {
            let comma = if number == 0 { "" } else { "," };
            let equals = if key.is_empty() { "" } else { "=" };
            write!(f, "{comma}{key}{equals}{}", value.replace(',', ",,"))?;
        }
        Ok(())
    }
}

fn flatten(prefix: &str, value: &Value, out: &mut Vec<(String, String)>) {
    let key = |name: &str| {
        if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
    };
    match value {
        Value::Object(members) => {
            members.iter().for_each(|(name, value)| flatten(&key(name), value, out));
        }
        Value::Array(items) => {
            let numbered = items.iter().enumerate();
            numbered.for_each(|(number, value)| flatten(&key(&number.to_string()), value, out));
        }
        Value::Bool(on) => out.push((prefix.into(), if *on { "on" } else { "off" }.into())),
        Value::String(text) => out.push((prefix.into(), text.clone())),
        other => out.push((prefix.into(), other.to_string())),
    }
}

/// A disk of the manifest, and the file by which the command line names it.
type NamedDisk<'a> = (&'a Disk, PathBuf);

/// The disk that the command line names `filename`.
fn disk_of<'a>(
    machine: &MachineDescription,
    disks: &[NamedDisk<'a>],
    filename: &str,
) -> Option<&'a Disk> {
    let wanted = file_path(machine, filename);
    disks.iter().find(|(_, name)| *name == wanted).map(|(disk, _)| *disk)
}

/// A file of the command line, absolute.
fn file_path(machine: &MachineDescription, filename: &str) -> PathBuf {
    absolute(machine, Path::new(filename.strip_prefix("file:").unwrap_or(filename)))
}

fn absolute(machine: &MachineDescription, path: &Path) -> PathBuf {
    match &machine.working_dir {
        Some(dir) => dir.join(path),
        None => path.to_owned(),
    }
}

/// The file by which the command line names a disk: its image, or the nearest one below that is named as a disk to write to.
/// Earlier snapshots of the same QEMU have put overlays on that.
fn name_of(
    machine: &MachineDescription,
    disk: &Disk,
    arguments: &[Argument],
    read_only_nodes: &HashSet<String>,
) -> PathBuf {
    let written: Vec<_> = arguments
        .iter()
        .filter_map(|argument| written_file(argument, read_only_nodes))
        .map(|filename| file_path(machine, &filename))
        .collect();
    let below = disk.backing_chain.iter().map(|path| absolute(machine, path));
    let image = absolute(machine, &disk.image);
    let mut files = std::iter::once(image.clone()).chain(below);
    files.find(|path| written.contains(path)).unwrap_or(image)
}

/// The file that an argument gives to a disk to write to, if it does.
fn written_file(argument: &Argument, read_only_nodes: &HashSet<String>) -> Option<String> {
    let option = argument.option.as_str();
    if IMAGES.contains(&option) {
        return argument.value.clone();
    }
    let keys = Keys::parse(argument.value());
    let is_below_read_only =
        || keys.get("node-name").is_some_and(|name| read_only_nodes.contains(name));
    let is_read_only = keys.is_on("readonly")
        || keys.is_on("read-only")
        || keys.get("media") == Some("cdrom")
        || is_below_read_only();
    let key = match option {
        "drive" if keys.get("file").is_some() => Some("file"),
        "drive" | "blockdev" => filename_key(&keys),
        _ => None,
    };
    keys.get(key.filter(|_| !is_read_only)?).map(str::to_owned)
}

/// Key of `-blockdev` or `-drive` that holds a file's name.
fn filename_key(keys: &Keys) -> Option<&'static str> {
    ["filename", "file.filename"].into_iter().find(|key| keys.get(key).is_some())
}

/// Nodes that only read-only nodes stand on.
fn read_only_files(arguments: &[Argument]) -> HashSet<String> {
    let blockdevs = arguments.iter().filter(|argument| argument.option == "blockdev");
    blockdevs
        .map(|argument| Keys::parse(argument.value()))
        .filter(|keys| keys.is_on("read-only"))
        .filter_map(|keys| keys.get("file").map(str::to_owned))
        .collect()
}

/// File nodes that get an overlay; the node that stands on one must become qcow2.
fn private_files(
    machine: &MachineDescription,
    disks: &[NamedDisk<'_>],
    arguments: &[Argument],
) -> HashSet<String> {
    let blockdevs = arguments.iter().filter(|argument| argument.option == "blockdev");
    blockdevs
        .map(|argument| Keys::parse(argument.value()))
        .filter(|keys| {
            keys.get("filename").is_some_and(|name| disk_of(machine, disks, name).is_some())
        })
        .filter_map(|keys| keys.get("node-name").map(str::to_owned))
        .collect()
}

struct Rewriter<'a> {
    machine: &'a MachineDescription,
    disks: &'a [NamedDisk<'a>],
    overlay_dir: &'a Path,
    /// What the caller gives and has not taken the place of a recorded argument.
    given: Vec<Argument>,
    read_only_nodes: HashSet<String>,
    private_nodes: HashSet<String>,
    /// Those of `private_nodes` that a format node stands on.
    used_nodes: HashSet<String>,
    out: Rewritten,
}

impl Rewriter<'_> {
    fn argument(&mut self, argument: &Argument) -> Result<(), CommandLineError> {
        let option = argument.option.as_str();
        let value = argument.value();
        if let Some(name) = argument.name()
            && let Some(at) =
                self.given.iter().position(|given| given.name().as_ref() == Some(&name))
        {
            // In the same place, for QEMU wants what is referred to first.
            let given = self.given.remove(at);
            self.out.command.extend(given.words());
            self.change(format!("-{option} {}: replaced", name.1));
            return Ok(());
        }
        if let Some((_, problem)) = REFUSED.iter().find(|(refused, _)| *refused == option) {
            return Err(argument.refused(*problem, BY_HAND));
        }
        if DROPPED.contains(&option) {
            self.change(format!("-{option} {value}: dropped").replace(" :", ":"));
            return Ok(());
        }
        if IMAGES.contains(&option) {
            let overlay = self
                .overlay(value)
                .ok_or_else(|| argument.refused("is no disk of the snapshot", BY_HAND))?;
            self.push(option, &overlay);
            return Ok(());
        }
        match option {
            "M" | "machine" => self.machine_type(value),
            "nographic" => self.push_changed(argument, "display", "none"),
            "display" if value.starts_with("vnc") || value.starts_with("spice") => {
                self.push_changed(argument, "display", "none");
            }
            "serial" | "parallel" | "debugcon"
                if !value.starts_with("chardev:") && value != "none" =>
            {
                self.push_changed(argument, option, "null");
            }
            "chardev" => self.chardev(argument),
            "netdev" | "nic" => self.network(argument)?,
            "object" => self.object(argument),
            "drive" => self.drive(argument)?,
            "blockdev" => self.blockdev(argument)?,
            _ => self.out.command.extend(argument.clone().words()),
        }
        Ok(())
    }

    /// What can only be said once all arguments are seen.
    fn finish(&mut self, arguments: &[Argument]) -> Result<(), CommandLineError> {
        let unused = |argument: &&Argument| {
            argument.option == "blockdev"
                && argument.name().is_some_and(|(_, name)| {
                    self.private_nodes.contains(&name) && !self.used_nodes.contains(&name)
                })
        };
        if let Some(argument) = arguments.iter().find(unused) {
            let problem = "is used without a format node, which an overlay needs";
            return Err(argument.refused(problem, REPLACE));
        }
        if !arguments.iter().any(|argument| matches!(argument.option.as_str(), "M" | "machine")) {
            self.machine_type("");
        }
        // Without a word about displays, QEMU opens a window or a VNC server that asks nobody for a password.
        if !arguments
            .iter()
            .any(|argument| matches!(argument.option.as_str(), "display" | "nographic"))
        {
            self.push("display", "none");
        }
        for (disk, _) in self.disks {
            if !self.out.overlays.iter().any(|overlay| overlay.path == self.overlay_path(disk)) {
                self.change(format!(
                    "disk {} ({}): not on the command line, so it must be given behind --",
                    disk.device,
                    disk.image.display()
                ));
            }
        }
        Ok(())
    }

    fn machine_type(&mut self, value: &str) {
        let mut keys = Keys::parse(value);
        keys.0.retain(|(key, _)| !key.is_empty() && key != "type");
        keys.0.insert(0, (String::new(), self.machine.machine_type.clone()));
        self.push("machine", &keys.to_string());
    }

    fn chardev(&mut self, argument: &Argument) {
        let old = Keys::parse(argument.value());
        let mut keys = Keys(vec![(String::new(), "null".into())]);
        for key in ["id", "mux"] {
            if let Some(value) = old.get(key) {
                keys.set(key, value);
            }
        }
        self.push_changed(argument, "chardev", &keys.to_string());
    }

    /// A user-mode network is private, but for the ports it listens on; any other is the original's.
    fn network(&mut self, argument: &Argument) -> Result<(), CommandLineError> {
        let mut keys = Keys::parse(argument.value());
        match keys.first_or("type") {
            Some("none" | "hubport") => self.push(&argument.option, argument.value()),
            Some("user") => {
                keys.0.retain(|(key, _)| {
                    !["hostfwd", "guestfwd", "smb"].iter().any(|prefix| key.starts_with(prefix))
                });
                self.push_changed(argument, &argument.option, &keys.to_string());
            }
            _ => {
                let remedy = if argument.option == "netdev" { REPLACE } else { BY_HAND };
                let problem = "would join the network with the original's address";
                return Err(argument.refused(problem, remedy));
            }
        }
        Ok(())
    }

    fn object(&mut self, argument: &Argument) {
        let mut keys = Keys::parse(argument.value());
        if keys.first_or("qom-type") != Some("memory-backend-file") {
            self.push("object", argument.value());
            return;
        }
        keys.0.retain(|(key, _)| {
            !key.is_empty() && key != "qom-type" && !FILE_MEMORY_KEYS.contains(&key.as_str())
        });
        keys.0.insert(0, (String::new(), "memory-backend-memfd".into()));
        self.push_changed(argument, "object", &keys.to_string());
    }

    fn drive(&mut self, argument: &Argument) -> Result<(), CommandLineError> {
        let mut keys = Keys::parse(argument.value());
        let read_only = keys.is_on("readonly") || keys.is_on("read-only");
        if keys.is_on("snapshot") {
            return Err(argument.refused("keeps disk content in a temporary file", REPLACE));
        }
        let key = if keys.get("file").is_some() { Some("file") } else { filename_key(&keys) };
        let Some((key, name)) = key.and_then(|key| Some((key, keys.get(key)?))) else {
            // A drive without a medium.
            self.push("drive", argument.value());
            return Ok(());
        };
        if let Some(overlay) = self.overlay(name) {
            if keys.get("driver").is_some_and(|driver| driver != "raw" && driver != "qcow2")
                || keys.0.iter().any(|(key, _)| key.starts_with("encrypt") || key == "offset")
            {
                return Err(
                    argument.refused("has options that an overlay cannot take over", REPLACE)
                );
            }
            keys.set(key, &overlay);
            keys.remove("driver");
            keys.remove("file.driver");
            keys.set("format", "qcow2");
            self.push_changed(argument, "drive", &keys.to_string());
        } else if read_only || keys.get("media") == Some("cdrom") {
            self.push("drive", argument.value());
        } else {
            return Err(argument.refused("is writable but no disk of the snapshot", REPLACE));
        }
        Ok(())
    }

    fn blockdev(&mut self, argument: &Argument) -> Result<(), CommandLineError> {
        let mut keys = Keys::parse(argument.value());
        let on_private = keys.get("file").filter(|node| self.private_nodes.contains(*node));
        let on_private = on_private.map(str::to_owned);
        let key = filename_key(&keys);
        let overlay = key.and_then(|key| keys.get(key)).map(str::to_owned);
        let overlay = overlay.and_then(|name| self.overlay(&name));
        let becomes_qcow2 = on_private.is_some() || (overlay.is_some() && key != Some("filename"));
        if becomes_qcow2 {
            let foreign = |key: &str| {
                key.starts_with("encrypt") || key == "offset" || key == "size" || key == "data-file"
            };
            let driver = keys.get("driver");
            if !matches!(driver, Some("raw" | "qcow2"))
                || keys.0.iter().any(|(key, _)| foreign(key))
            {
                return Err(
                    argument.refused("has options that an overlay cannot take over", REPLACE)
                );
            }
            keys.set("driver", "qcow2");
            // The overlay itself names the image below it.
            keys.0.retain(|(key, _)| key != "backing" && !key.starts_with("backing."));
            self.used_nodes.extend(on_private);
        }
        if let (Some(key), Some(overlay)) = (key, &overlay) {
            keys.set(key, overlay);
            // What was a block device is an ordinary file now.
            keys.set(if key == "filename" { "driver" } else { "file.driver" }, "file");
        }
        if becomes_qcow2 || overlay.is_some() {
            self.push_changed(argument, "blockdev", &keys.to_string());
            return Ok(());
        }
        let below_read_only =
            keys.get("node-name").is_some_and(|name| self.read_only_nodes.contains(name));
        let private = keys.is_on("read-only") || below_read_only;
        // A node upon another is as private as that one; null devices hold nothing.
        let upon = keys.get("file").is_some();
        let empty = keys.get("driver").is_some_and(|driver| driver.starts_with("null-"));
        if !private && !upon && !empty {
            return Err(argument.refused("is writable but no disk of the snapshot", REPLACE));
        }
        self.push("blockdev", argument.value());
        Ok(())
    }

    /// The overlay over the image `filename`, if that is a disk of the snapshot.
    fn overlay(&mut self, filename: &str) -> Option<String> {
        let disk = disk_of(self.machine, self.disks, filename)?;
        let path = self.overlay_path(disk);
        let image = absolute(self.machine, &disk.image);
        let text = path.display().to_string();
        let overlay = Overlay { path, image, image_format: disk.image_format.clone() };
        if !self.out.overlays.contains(&overlay) {
            self.out.overlays.push(overlay);
        }
        Some(text)
    }

    /// Numbered, for names of devices are no file names.
    fn overlay_path(&self, disk: &Disk) -> PathBuf {
        let number = self.disks.iter().position(|(other, _)| *other == disk).unwrap_or_default();
        self.overlay_dir.join(format!("disk{number}.qcow2"))
    }

    fn push(&mut self, option: &str, value: &str) {
        self.out.command.extend([format!("-{option}"), value.to_owned()]);
    }

    /// Pushes an argument and, if it is not what it was, says so.
    fn push_changed(&mut self, old: &Argument, option: &str, value: &str) {
        if old.option != option || old.value() != value {
            self.change(format!("-{} {}: now -{option} {value}", old.option, old.value()));
        }
        self.push(option, value);
    }

    fn change(&mut self, text: String) {
        self.out.changes.push(text);
    }
}

/// Whether `-smp` and `-m` say what the snapshot is.
fn check_size(
    machine: &MachineDescription,
    arguments: &[Argument],
    block_bytes: &[u64],
) -> Result<(), CommandLineError> {
    let last = |option: &str| arguments.iter().rev().find(|argument| argument.option == option);
    let cpus = last("smp").map_or(Some(1), |argument| cpus(&Keys::parse(argument.value())));
    if let Some(cpus) = cpus.filter(|&cpus| cpus != u64::from(machine.cpus)) {
        return Err(CommandLineError::Mismatch {
            what: "-smp",
            found: cpus.to_string(),
            expected: machine.cpus.to_string(),
        });
    }
    // With NUMA nodes, RAM is made of several blocks.
    let memory = last("m").and_then(|argument| memory_bytes(&Keys::parse(argument.value())));
    let numa = last("numa").is_some();
    if let Some(bytes) = memory.filter(|bytes| !numa && !block_bytes.contains(bytes)) {
        return Err(CommandLineError::Mismatch {
            what: "-m",
            found: format!("{bytes} bytes"),
            expected: "has no such RAM block".into(),
        });
    }
    Ok(())
}

/// Number of CPUs, if it can be told.
fn cpus(keys: &Keys) -> Option<u64> {
    if let Some(cpus) = keys.first_or("cpus") {
        return cpus.parse().ok();
    }
    let levels = ["drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads"];
    levels.iter().try_fold(1_u64, |product, level| {
        product.checked_mul(keys.get(level).map_or(Some(1), |count| count.parse().ok())?)
    })
}

/// Size of RAM in bytes, if it can be told; a bare number counts mebibytes.
fn memory_bytes(keys: &Keys) -> Option<u64> {
    let text = keys.first_or("size")?;
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..)?.to_ascii_uppercase().as_str() {
        "B" => 0,
        "K" => 10,
        "" | "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;

    const IMAGE: &str = "/images/disk,1.raw";

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn try_rewrite(line: &str, appended: &str) -> Result<Rewritten, CommandLineError> {
        let machine = MachineDescription {
            machine_type: "pc-q35-10.0".into(),
            cpus: 2,
            command_line: words(&format!("qemu -display none -smp 2 -m 256 {line}")),
            working_dir: Some("/images".into()),
            ..MachineDescription::default()
        };
        let disk = Disk {
            device: "virtio0".into(),
            node: "node0".into(),
            image: IMAGE.into(),
            image_format: "raw".into(),
            backing_chain: vec!["/images/below.raw".into(), "base.raw".into()],
            size_bytes: 1 << 20,
            overlay: "/images/overlay.qcow2".into(),
        };
        rewrite(&machine, &[disk], &[256 << 20], Path::new("/new"), &words(appended))
    }

    /// What becomes of `line`, less what is always there.
    fn rewritten(line: &str) -> String {
        let command = try_rewrite(line, "").unwrap().command.join(" ");
        let command = command.strip_prefix("qemu -display none -smp 2 -m 256").unwrap();
        command.strip_suffix(" -machine pc-q35-10.0").unwrap_or(command).trim_start().to_owned()
    }

    #[test]
    fn every_way_to_name_an_image_gets_the_overlay() {
        for (line, expected) in [
            ("-hda disk,1.raw", "-hda /new/disk0.qcow2"),
            ("/images/disk,1.raw", "-hda /new/disk0.qcow2"),
            (
                "-drive file=/images/disk,,1.raw,format=raw,if=virtio",
                "-drive if=virtio,file=/new/disk0.qcow2,format=qcow2",
            ),
            (
                "-blockdev driver=file,node-name=f,filename=disk,,1.raw -blockdev driver=raw,node-name=d,file=f",
                "-blockdev node-name=f,filename=/new/disk0.qcow2,driver=file -blockdev node-name=d,file=f,driver=qcow2",
            ),
            (
                "-blockdev driver=raw,node-name=d,file.driver=host_device,file.filename=disk,,1.raw",
                "-blockdev node-name=d,driver=qcow2,file.filename=/new/disk0.qcow2,file.driver=file",
            ),
            (
                r#"-blockdev {"driver":"qcow2","node-name":"d","backing":null,"file":{"driver":"file","filename":"disk,1.raw"}}"#,
                "-blockdev node-name=d,driver=qcow2,file.filename=/new/disk0.qcow2,file.driver=file",
            ),
        ] {
            assert_eq!(rewritten(line), expected);
            let overlays = try_rewrite(line, "").unwrap().overlays;
            assert_eq!(overlays.len(), 1);
            assert_eq!(overlays[0].image, Path::new(IMAGE));
        }
    }

    #[test]
    fn what_the_original_holds_is_dropped_or_made_private() {
        for (line, expected) in [
            ("-qmp unix:/q,server=on -monitor stdio -S -daemonize -pidfile p -vnc :1 -s", ""),
            ("-incoming defer --no-reboot", "-no-reboot"),
            (
                "-serial mon:stdio -serial chardev:c -serial none",
                "-serial null -serial chardev:c -serial none",
            ),
            ("-chardev socket,id=c,path=/s,server=on,mux=on", "-chardev null,id=c,mux=on"),
            ("-nographic", "-display none"),
            ("-netdev user,id=n,hostfwd=tcp::22-:22", "-netdev user,id=n"),
            (
                "-object memory-backend-file,id=m,size=1G,mem-path=/dev/shm/m,share=on",
                "-object memory-backend-memfd,id=m,size=1G,share=on",
            ),
            ("-object iothread,id=io", "-object iothread,id=io"),
            (
                "-drive file=/iso,media=cdrom -cdrom /iso2",
                "-drive file=/iso,media=cdrom -cdrom /iso2",
            ),
            ("-machine q35,accel=tcg", "-machine pc-q35-10.0,accel=tcg"),
            ("-M type=q35,usb=off", "-machine pc-q35-10.0,usb=off"),
        ] {
            assert_eq!(rewritten(line), expected);
        }
    }

    #[test]
    fn what_cannot_be_made_private_is_refused() {
        for line in [
            "-drive file=/other.raw,format=raw",
            "-drive file=disk,,1.raw,snapshot=on",
            "-hdb /other.raw",
            "-fda /floppy",
            "-snapshot",
            "-readconfig x",
            "-add-fd fd=3,set=1",
            "-netdev tap,id=n",
            "-nic tap",
            "-tpmdev emulator,id=t,chardev=c",
            "-blockdev driver=file,node-name=f,filename=/other.raw",
            "-blockdev driver=nbd,node-name=f,server.type=unix,server.path=/s",
            // The guest sees the file itself: an overlay's bytes are not the disk's.
            "-blockdev driver=file,node-name=f,filename=disk,,1.raw -device virtio-blk,drive=f",
            "-blockdev driver=raw,offset=4096,node-name=d,file.driver=file,file.filename=disk,,1.raw",
        ] {
            assert!(
                matches!(try_rewrite(line, ""), Err(CommandLineError::Refused { .. })),
                "{line}"
            );
        }
    }

    #[test]
    fn an_image_that_has_got_overlays_since_stands_for_the_uppermost() {
        for (line, expected) in [
            ("-hda /images/below.raw", "-hda /new/disk0.qcow2"),
            ("-drive file=base.raw,format=raw", "-drive file=/new/disk0.qcow2,format=qcow2"),
            (
                "-blockdev driver=file,node-name=f,filename=base.raw -blockdev driver=raw,node-name=d,file=f",
                "-blockdev node-name=f,filename=/new/disk0.qcow2,driver=file -blockdev node-name=d,file=f,driver=qcow2",
            ),
            // The nearest one that is written to; the others below it are only read, by this guest and others.
            (
                "-drive file=below.raw,format=raw -drive file=base.raw,readonly=on",
                "-drive file=/new/disk0.qcow2,format=qcow2 -drive file=base.raw,readonly=on",
            ),
            (
                "-drive file=disk,,1.raw,format=raw -drive file=base.raw,readonly=on",
                "-drive file=/new/disk0.qcow2,format=qcow2 -drive file=base.raw,readonly=on",
            ),
        ] {
            assert_eq!(rewritten(line), expected);
            let overlays = try_rewrite(line, "").unwrap().overlays;
            assert_eq!(overlays[0].image, Path::new(IMAGE), "{line}");
            assert_eq!(overlays.len(), 1, "{line}");
        }
        // One that is named for nothing but reading is not the guest's disk.
        let line = "-drive file=base.raw,readonly=on";
        assert_eq!(rewritten(line), line);
        // Two names for one disk are one too many.
        let both = "-drive file=disk,,1.raw,format=raw -drive file=base.raw,format=raw";
        assert!(matches!(try_rewrite(both, ""), Err(CommandLineError::Refused { .. })));
    }

    #[test]
    fn a_base_image_below_a_read_only_node_stays() {
        let line = "-blockdev driver=file,node-name=b,filename=base.raw,auto-read-only=on \
                    -blockdev driver=qcow2,node-name=bf,file=b,read-only=on";
        let words = line.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(rewritten(line), words);
    }

    #[test]
    fn the_callers_argument_of_the_same_name_takes_the_place() {
        let line = "-netdev tap,id=n -device e1000,netdev=n";
        let out = try_rewrite(line, "-vnc :2 -netdev user,id=n").unwrap();
        let command = out.command.join(" ");
        let expected = "-netdev user,id=n -device e1000,netdev=n -machine pc-q35-10.0 -vnc :2";
        assert!(!command.contains("tap") && command.ends_with(expected), "{command}");
        // An image of the caller's own is no overlay.
        let file = "-blockdev driver=file,node-name=f,filename=/mine";
        let format = "-blockdev driver=raw,node-name=d,file=f";
        let line = format!("{} {format}", file.replace("/mine", "disk,,1.raw"));
        let command = try_rewrite(&line, file).unwrap().command.join(" ");
        assert!(command.ends_with(&format!("{file} {format} -machine pc-q35-10.0")), "{command}");
    }

    #[test]
    fn a_command_line_of_another_size_is_refused() {
        for line in ["-smp 4", "-smp sockets=2,cores=2", "-m 1G", "-m size=512M"] {
            assert!(
                matches!(try_rewrite(line, ""), Err(CommandLineError::Mismatch { .. })),
                "{line}"
            );
        }
        for line in ["-smp cores=2,sockets=1", "-smp 2,maxcpus=4", "-m 262144K", "-m 1G -numa node"]
        {
            assert!(try_rewrite(line, "").is_ok(), "{line}");
        }
    }

    #[test]
    fn no_display_is_opened_that_nobody_asked_for() {
        let machine = MachineDescription {
            machine_type: "pc-q35-10.0".into(),
            cpus: 1,
            command_line: words("qemu -vnc :1"),
            ..MachineDescription::default()
        };
        let out = rewrite(&machine, &[], &[], Path::new("/new"), &words("-vnc :2")).unwrap();
        assert_eq!(out.command.join(" "), "qemu -machine pc-q35-10.0 -display none -vnc :2");
    }

    #[test]
    fn no_command_line_is_an_error() {
        let machine = MachineDescription::default();
        let out = rewrite(&machine, &[], &[], Path::new("/new"), &[]);
        assert_eq!(out, Err(CommandLineError::None));
    }
}
