//! What forbids a snapshot of a given QEMU, found out before anything of its guest is touched.
//!
//! Each finding is a [`Refusal`]: a stable reason, what was seen, and the remedy. All are collected, not
//! just the first, so that one look tells everything that has to change. Reads QMP, `/proc` and `/sys`;
//! writes nowhere.
//!
//! On balloons: free page reporting discards pages whenever the guest frees them, so it is refused. A
//! plain balloon discards only while it is being inflated; it is allowed, and inflating it during the
//! snapshot fails the snapshot (by QEMU's event and by the engine's own checks).

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use procfs::process::{MMPermissions, MemoryMaps, Process, all_processes};
use rustix::process::Pid;
use serde_json::{Value, json};

use super::disks::{self, Found};
use super::qmp::{Qmp, QmpError};
use super::{QemuError, QemuOptions, QemuProcess, ram_blocks};
use crate::mappings::{self, MappingKind, RamMapping};
use crate::ram::RamLayout;
use crate::sys::uffd::DEVICE;
use crate::vmm::{MachineDescription, RunState};
use crate::{Reason, host};

/// First major version that loads mapped-ram files.
const QEMU_MAJOR_MIN: u64 = 9;
/// What to do about a run state that cannot be snapshotted.
pub(super) const RUN_STATE_REMEDY: &str = "snapshot it while it runs or is paused";
/// Containers of devices in QEMU's object tree.
const DEVICE_CONTAINERS: [&str; 3] =
    ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"];

/// One thing that forbids a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Refusal {
    /// Stable code.
    pub reason: Reason,
    /// What was found.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

impl Refusal {
    fn new(reason: Reason, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { reason, what: what.into(), remedy: remedy.into() }
    }

    /// Whether it is also in the way of measuring the dirty rate: because memory cannot be protected, or because it is
    /// written to past its protection.
    const fn forbids_measuring(&self) -> bool {
        matches!(
            self.reason,
            Reason::KernelUnfit
                | Reason::MissingPrivilege
                | Reason::AttachFailed
                | Reason::Encrypted
                | Reason::FileBackedRam
                | Reason::HugePageSize
                | Reason::ForeignUserfaultfd
                | Reason::SharedMemory
                | Reason::Vfio
        )
    }
}

/// What a virtual machine is attached to for; decides what forbids it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be snapshotted: everything that is found forbids it.
    Snapshot,
    /// To have its dirty rate measured: its devices, its disks and the age of QEMU do not matter.
    DirtyRate,
}

impl Purpose {
    /// Those of `refusals` that stand in its way.
    pub(super) fn forbidden_by(self, refusals: Vec<Refusal>) -> Vec<Refusal> {
        let matters = |refusal: &Refusal| self == Self::Snapshot || refusal.forbids_measuring();
        refusals.into_iter().filter(matters).collect()
    }
}

/// All of `refusals` in one sentence.
pub(super) fn in_words(purpose: Purpose, refusals: &[Refusal]) -> String {
    let each: Vec<String> =
        refusals.iter().map(|r| format!("{} ({}): {}", r.what, r.reason, r.remedy)).collect();
    let what = match purpose {
        Purpose::Snapshot => "this virtual machine cannot be snapshotted as it is",
        Purpose::DirtyRate => "the dirty rate of this virtual machine cannot be measured as it is",
    };
    format!("{what}: {}", each.join("; "))
}

/// What a QEMU is, and what forbids a snapshot of it.
#[derive(Clone, Debug)]
pub struct Survey {
    /// QEMU's process.
    pub pid: Pid,
    /// The machine.
    pub machine: MachineDescription,
    /// Whether it runs; nothing if it is in neither state.
    pub run_state: Option<RunState>,
    /// The threads that run its virtual CPUs, in the order of the CPUs.
    pub cpu_threads: Vec<Pid>,
    /// Its RAM.
    pub layout: RamLayout,
    /// What backs its RAM.
    pub mappings: Vec<RamMapping>,
    /// The disks that a snapshot would switch to overlays.
    pub disks: Vec<Found>,
    /// Empty if a snapshot can be taken.
    pub refusals: Vec<Refusal>,
}

/// Whether a guest in QEMU's state `status` can be snapshotted, and then whether it runs.
pub(super) fn run_state(status: &str) -> Option<RunState> {
    match status {
        "running" => Some(RunState::Running),
        "paused" => Some(RunState::Paused),
        // Crashed, suspended, migrated away, not yet begun, or stopped by an I/O error that is to be retried.
        _ => None,
    }
}

/// Looks at everything.
pub(super) fn survey(
    qmp: &mut Qmp,
    process: &QemuProcess,
    options: &QemuOptions,
) -> Result<Survey, QemuError> {
    let limit = options.command_timeout;
    let machine = super::describe(qmp, process, limit)?;
    let cpu_threads = super::cpu_threads(qmp, limit)?;
    let layout = ram_blocks::query(qmp, limit)?;
    // Fails also where the process is not the one behind the socket.
    let mappings = mappings::covering(process.pid, &layout)?;
    let status = qmp.execute("query-status", json!({}), limit)?;
    let status = status["status"].as_str().unwrap_or_default();

    let mut refusals = Vec::new();
    refusals.extend(kernel(&mappings));
    refusals.extend(privilege(process));
    refusals.extend(version(&machine.version));
    if run_state(status).is_none() {
        let what = format!("the virtual machine is {status:?}");
        refusals.push(Refusal::new(Reason::BadRunState, what, RUN_STATE_REMEDY));
    }
    refusals.extend(migration(qmp, limit)?);
    refusals.extend(encryption(qmp, limit)?);
    refusals.extend(memory_devices(qmp, limit)?);
    refusals.extend(backing(&mappings));
    let ksm_runs = std::fs::read_to_string("/sys/kernel/mm/ksm/run");
    refusals.extend(ksm(ksm_runs.is_ok_and(|run| run.trim() == "1"), &mappings));
    refusals.extend(sharers(process.pid, &mappings));
    refusals.extend(assigned_devices(process));
    let disks = disks(qmp, &machine, options, &mut refusals)?;
    let (pid, run_state) = (process.pid, run_state(status));
    Ok(Survey { pid, machine, run_state, cpu_threads, layout, mappings, disks, refusals })
}

fn kernel(mappings: &[RamMapping]) -> Option<Refusal> {
    if !Path::new(DEVICE).exists() {
        let what = format!("this host has no {DEVICE}");
        return Some(Refusal::new(Reason::KernelUnfit, what, "use Linux 6.1 or later"));
    }
    // An error is a matter of privilege.
    let offered = host::userfaultfd().ok()?;
    let is_shared = mappings.iter().any(|mapping| mapping.kind != MappingKind::Anonymous);
    let is_fit = offered.protects && (offered.protects_shared || !is_shared);
    (!is_fit).then(|| {
        let what = "the kernel cannot write-protect this kind of RAM by userfaultfd";
        Refusal::new(Reason::KernelUnfit, what, "use Linux 6.1 or later on x86-64")
    })
}

fn privilege(process: &QemuProcess) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut check = |path: &str, purpose: &str| {
        if let Err(error) = File::options().read(true).write(true).open(path)
            && error.kind() == io::ErrorKind::PermissionDenied
        {
            let what = format!("{path} may not be opened, which is needed to {purpose}");
            let remedy = "run livesnap as root, or with CAP_SYS_PTRACE and access to it";
            refusals.push(Refusal::new(Reason::MissingPrivilege, what, remedy));
        }
    };
    check(DEVICE, "protect guest RAM");
    // The kernel asks for the same as when tracing the process: ptrace(2), PTRACE_MODE_ATTACH.
    check(&format!("/proc/{}/mem", process.number()), "attach to QEMU");
    let status = Process::new(process.number()).and_then(|process| process.status());
    if let Ok(tracer) = status.map(|status| status.tracerpid)
        && tracer != 0
    {
        let what = format!("QEMU is being traced by process {tracer}");
        refusals.push(Refusal::new(Reason::AttachFailed, what, "end the debugger or strace"));
    }
    refusals
}

fn version(version: &str) -> Option<Refusal> {
    let major = version.split('.').next().and_then(|major| major.parse::<u64>().ok());
    (major.unwrap_or(0) < QEMU_MAJOR_MIN).then(|| {
        let what = format!("QEMU {version} cannot load mapped-ram snapshots");
        Refusal::new(Reason::QemuTooOld, what, "run the guest in QEMU 9.0 or later")
    })
}

fn migration(qmp: &mut Qmp, limit: Duration) -> Result<Vec<Refusal>, QmpError> {
    let target = qmp.execute("query-target", json!({}), limit)?;
    let mut refusals = Vec::new();
    // The file's page size and layout are these targets'.
    if !matches!(target["arch"].as_str(), Some("x86_64" | "i386")) {
        let what = format!("the guest's architecture is {}", target["arch"]);
        refusals.push(Refusal::new(Reason::NotMigratable, what, "only x86 guests are supported"));
    }
    let state = qmp.execute("query-migrate", json!({}), limit)?;
    refusals.extend(migration_state(&state));
    Ok(refusals)
}

fn migration_state(state: &Value) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let status = state["status"].as_str().unwrap_or("none");
    if !matches!(status, "none" | "completed" | "failed" | "cancelled") {
        let what = format!("a migration or snapshot of QEMU's own is {status:?}");
        refusals.push(Refusal::new(
            Reason::MigrationActive,
            what,
            "wait for its end, or cancel it",
        ));
    }
    for blocker in state["blocked-reasons"].as_array().into_iter().flatten() {
        let what = format!("QEMU cannot save its state: {}", blocker.as_str().unwrap_or("unknown"));
        let remedy = "remove the device or option that it names";
        refusals.push(Refusal::new(Reason::NotMigratable, what, remedy));
    }
    refusals
}

/// A property of an object, nothing if there is no such object or property.
fn property(
    qmp: &mut Qmp,
    path: &str,
    name: &str,
    limit: Duration,
) -> Result<Option<Value>, QmpError> {
    match qmp.execute("qom-get", json!({"path": path, "property": name}), limit) {
        Ok(value) => Ok(Some(value)),
        Err(QmpError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn encryption(qmp: &mut Qmp, limit: Duration) -> Result<Option<Refusal>, QmpError> {
    let support = property(qmp, "/machine", "confidential-guest-support", limit)?;
    let support = support.as_ref().and_then(Value::as_str).unwrap_or_default();
    Ok((!support.is_empty()).then(|| {
        let what = format!("guest memory is encrypted by {support}");
        Refusal::new(Reason::Encrypted, what, "its content cannot be read from outside")
    }))
}

/// Devices that give guest pages back to the host, or have them written to past their protection.
fn memory_devices(qmp: &mut Qmp, limit: Duration) -> Result<Vec<Refusal>, QmpError> {
    let mut refusals = Vec::new();
    for container in DEVICE_CONTAINERS {
        let children = match qmp.execute("qom-list", json!({"path": container}), limit) {
            Ok(children) => children,
            // Containers come into being with their first child.
            Err(QmpError::Refused { .. }) => continue,
            Err(error) => return Err(error),
        };
        for child in children.as_array().into_iter().flatten() {
            let (Some(name), Some(kind)) = (child["name"].as_str(), child["type"].as_str()) else {
                continue;
            };
            let path = format!("{container}/{name}");
            if kind.starts_with("child<virtio-balloon") {
                let reporting = property(qmp, &path, "free-page-reporting", limit)?;
                if reporting == Some(json!(true)) {
                    let what = format!("the balloon {path} has free page reporting on");
                    let remedy = "start QEMU with free-page-reporting=off for it";
                    refusals.push(Refusal::new(Reason::Balloon, what, remedy));
                }
            } else if kind.starts_with("child<virtio-mem") {
                let size = property(qmp, &path, "size", limit)?;
                if size != property(qmp, &path, "requested-size", limit)? {
                    let what = format!("the memory device {path} is being resized");
                    let remedy = "wait until its size is the requested one";
                    refusals.push(Refusal::new(Reason::Balloon, what, remedy));
                }
            } else if kind.starts_with("child<vfio-") {
                let what = format!("the device {path} is assigned by VFIO");
                refusals.push(Refusal::new(Reason::Vfio, what, "unplug it during the snapshot"));
            } else if kind.starts_with("child<vhost-user-") {
                // Its back end maps guest RAM only when a driver starts it, which may be amid the snapshot.
                let what = format!("the vhost-user device {path} is served by another process");
                let remedy = "unplug it during the snapshot";
                refusals.push(Refusal::new(Reason::SharedMemory, what, remedy));
            }
        }
    }
    Ok(refusals)
}

fn backing(mappings: &[RamMapping]) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    for mapping in mappings {
        let place = || match &mapping.path {
            Some(path) => format!("guest RAM in {}", path.display()),
            None => format!("guest RAM at {}", mapping.start),
        };
        if mapping.kind == MappingKind::File {
            let what = format!("{} lies on a file system that cannot be write-protected", place());
            let remedy = "use memory-backend-memfd, or a file on tmpfs or hugetlbfs";
            refusals.push(Refusal::new(Reason::FileBackedRam, what, remedy));
        }
        // Once: whoever watches memory cuts it into many mappings.
        let is_told = |refusal: &Refusal| refusal.reason == Reason::ForeignUserfaultfd;
        if mapping.has_userfaultfd && !refusals.iter().any(is_told) {
            let what = format!("{} is under another userfaultfd", place());
            let remedy = "end the other snapshot, `livesnap watch` or post-copy migration first";
            refusals.push(Refusal::new(Reason::ForeignUserfaultfd, what, remedy));
        }
    }
    refusals
}

fn ksm(runs: bool, mappings: &[RamMapping]) -> Option<Refusal> {
    let at_work = |mapping: &RamMapping| mapping.mergeable || mapping.merged_bytes > 0;
    (runs && mappings.iter().any(at_work)).then(|| {
        let what = "kernel same-page merging works on guest RAM";
        let remedy = "write 0 to /sys/kernel/mm/ksm/run for the time of the snapshot, or start QEMU with -machine mem-merge=off";
        Refusal::new(Reason::Ksm, what, remedy)
    })
}

/// Other processes that can write to guest RAM past its protection.
fn sharers(own: Pid, mappings: &[RamMapping]) -> Vec<Refusal> {
    let shared: Vec<_> = mappings
        .iter()
        .filter(|mapping| mapping.shared && mapping.inode != 0)
        .map(|mapping| (mapping.device, mapping.inode))
        .collect();
    if shared.is_empty() {
        return Vec::new();
    }
    let own = own.as_raw_nonzero().get();
    // Processes that end meanwhile share nothing any more.
    let others = all_processes().into_iter().flatten().flatten().filter(|p| p.pid() != own);
    others
        .filter(|process| process.maps().is_ok_and(|maps| shares(&maps, &shared)))
        .map(|process| {
            let name = process.stat().map(|stat| stat.comm).unwrap_or_default();
            let what = format!("process {} ({name}) has guest RAM mapped writable", process.pid());
            let remedy = "unplug the vhost-user device that it serves, or end it";
            Refusal::new(Reason::SharedMemory, what, remedy)
        })
        .collect()
}

/// Whether `maps` has one of `files`, by device and inode, so mapped that writes are seen by all.
fn shares(maps: &MemoryMaps, files: &[((i32, i32), u64)]) -> bool {
    let writable = MMPermissions::WRITE | MMPermissions::SHARED;
    maps.iter().any(|map| map.perms.contains(writable) && files.contains(&(map.dev, map.inode)))
}

/// Devices whose DMA does not go through QEMU's page tables, by the files QEMU has open.
fn assigned_devices(process: &QemuProcess) -> Option<Refusal> {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", process.number())).ok()?;
    let assigned = entries.flatten().find_map(|entry| {
        let target = std::fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned();
        is_assigned_device(&target).then_some(target)
    })?;
    let what = format!("QEMU has {assigned} open: an assigned device writes to guest RAM by DMA");
    Some(Refusal::new(Reason::Vfio, what, "unplug the device during the snapshot"))
}

fn is_assigned_device(target: &str) -> bool {
    ["/dev/vfio/", "/dev/iommu", "/dev/vhost-vdpa", "anon_inode:[vfio"]
        .iter()
        .any(|prefix| target.starts_with(prefix))
}

fn disks(
    qmp: &mut Qmp,
    machine: &MachineDescription,
    options: &QemuOptions,
    refusals: &mut Vec<Refusal>,
) -> Result<Vec<Found>, QmpError> {
    let limit = options.command_timeout;
    let leave_out = "leave the disks out of the snapshot, or change its configuration";
    let found = disks::find(qmp, machine.working_dir.as_deref(), limit)?;
    let mut disks = Vec::new();
    for disk in found {
        match disk {
            Ok(disk) => disks.push(disk),
            Err(_) if !options.disks => {}
            Err(unfit) => {
                let what = format!("the disk {} cannot take part: {}", unfit.device, unfit.why);
                refusals.push(Refusal::new(Reason::DiskUnfit, what, leave_out));
            }
        }
    }
    if !options.disks || disks.is_empty() {
        return Ok(disks);
    }
    let in_dev = disks.iter().find(|disk| disk.image.starts_with("/dev"));
    if let (Some(disk), None) = (in_dev, &options.overlay_dir) {
        let what = format!("the disk {} is the block device {}", disk.device, disk.image.display());
        let remedy = "give a directory for its overlay";
        refusals.push(Refusal::new(Reason::DiskUnfit, what, remedy));
    }
    let jobs = qmp.execute("query-block-jobs", json!({}), limit)?;
    if jobs.as_array().is_some_and(|jobs| !jobs.is_empty()) {
        let what = "QEMU runs a block job, such as a backup or a mirror";
        refusals.push(Refusal::new(Reason::DiskUnfit, what, "wait for its end, or cancel it"));
    }
    Ok(disks)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;
    use crate::address::HostVirtAddr;
    use procfs::FromBufRead;

    fn mapping() -> RamMapping {
        RamMapping::anonymous(HostVirtAddr(0x1000), 4096)
    }

    fn reasons(refusals: impl IntoIterator<Item = Refusal>) -> Vec<Reason> {
        refusals.into_iter().map(|refusal| refusal.reason).collect()
    }

    #[test]
    fn versions_before_9_are_refused() {
        assert_eq!(reasons(version("8.2.9")), [Reason::QemuTooOld]);
        assert_eq!(reasons(version("nonsense")), [Reason::QemuTooOld]);
        assert_eq!(version("9.0.0"), None);
        assert_eq!(version("10.0.2"), None);
    }

    #[test]
    fn only_a_running_or_paused_guest_is_taken() {
        assert_eq!(run_state("running"), Some(RunState::Running));
        assert_eq!(run_state("paused"), Some(RunState::Paused));
        for other in ["prelaunch", "inmigrate", "postmigrate", "io-error", "guest-panicked", ""] {
            assert_eq!(run_state(other), None, "{other}");
        }
    }

    #[test]
    fn migrations_under_way_and_blockers_are_all_told() {
        assert_eq!(migration_state(&json!({})), []);
        assert_eq!(migration_state(&json!({"status": "completed"})), []);
        let state = json!({"status": "active", "blocked-reasons": ["disk", "device"]});
        let found = migration_state(&state);
        assert!(found[2].what.contains("device"));
        let expected = [Reason::MigrationActive, Reason::NotMigratable, Reason::NotMigratable];
        assert_eq!(reasons(found), expected);
    }

    #[test]
    fn ram_that_cannot_be_protected_is_refused() {
        assert_eq!(backing(&[mapping()]), []);
        let file = RamMapping { kind: MappingKind::File, ..mapping() };
        let foreign = RamMapping { has_userfaultfd: true, ..mapping() };
        assert_eq!(
            reasons(backing(&[file, foreign.clone(), foreign])),
            [Reason::FileBackedRam, Reason::ForeignUserfaultfd]
        );
    }

    #[test]
    fn measuring_is_forbidden_by_what_concerns_memory_only() {
        let found = [Reason::DiskUnfit, Reason::ForeignUserfaultfd, Reason::QemuTooOld];
        let found = found.map(|reason| Refusal::new(reason, "what", "remedy")).to_vec();
        assert_eq!(Purpose::Snapshot.forbidden_by(found.clone()), found);
        let left = Purpose::DirtyRate.forbidden_by(found);
        assert!(in_words(Purpose::DirtyRate, &left).contains("measured"));
        assert_eq!(reasons(left), [Reason::ForeignUserfaultfd]);
    }

    #[test]
    fn same_page_merging_is_refused_where_it_works_on_guest_ram() {
        let mergeable = RamMapping { mergeable: true, ..mapping() };
        let merged = RamMapping { merged_bytes: 4096, ..mapping() };
        assert_eq!(ksm(true, &[mapping()]), None);
        assert_eq!(ksm(false, std::slice::from_ref(&mergeable)), None);
        assert_eq!(reasons(ksm(true, &[mapping(), mergeable])), [Reason::Ksm]);
        assert_eq!(reasons(ksm(true, &[merged])), [Reason::Ksm]);
    }

    #[test]
    fn a_process_shares_ram_if_it_has_the_same_file_mapped_shared_and_writable() {
        let maps = |text: &str| MemoryMaps::from_buf_read(text.as_bytes()).unwrap();
        let ram = [((0, 5), 77)];
        for (line, expected) in [
            ("1000-2000 rw-s 00000000 00:05 77 /memfd:ram (deleted)\n", true),
            ("1000-2000 r--s 00000000 00:05 77 /memfd:ram (deleted)\n", false),
            ("1000-2000 rw-p 00000000 00:05 77 /memfd:ram (deleted)\n", false),
            ("1000-2000 rw-s 00000000 00:05 78 /memfd:other (deleted)\n", false),
            ("1000-2000 rw-s 00000000 00:06 77 /dev/shm/other\n", false),
        ] {
            assert_eq!(shares(&maps(line), &ram), expected, "{line}");
        }
    }

    #[test]
    fn files_of_assigned_devices_are_known() {
        for target in ["/dev/vfio/12", "/dev/vhost-vdpa-0", "anon_inode:[vfio-device]"] {
            assert!(is_assigned_device(target), "{target}");
        }
        assert!(!is_assigned_device("/dev/vhost-net"));
    }
}
