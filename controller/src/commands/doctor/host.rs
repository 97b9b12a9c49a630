//! What is found on the host. Asking and judging are apart: what is judged can be made up in tests.

use std::fmt::{Debug, Display};
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use livesnap_ebpf::disk::{self, DiskError};
use livesnap_ebpf::{Cause, DeviceError, Disk, ProbeError, Probes, Refusal};
use procfs::Current as _;
use procfs::process::Process;
use snapshot_core::host::{self, Access, Userfaultfd};
use snapshot_core::{Reason, image};

use super::Finding;
use crate::commands::target::default_buffer_bytes;
use crate::output;

/// Bit of `CAP_SYS_PTRACE` in a set of capabilities (linux/capability.h).
const CAP_SYS_PTRACE: u32 = 19;
/// A copy buffer below this is soon full when the guest is busy; faults then wait for the disk.
const BUFFER_BYTES_GOOD: u64 = 256 << 20;
/// First major version of QEMU that loads snapshots.
const QEMU_MAJOR_MIN: u32 = 9;
/// The QEMU that restores the guests that are supported.
const QEMU: &str = "qemu-system-x86_64";

const AS_ROOT: &str = "run livesnap as root";
const TO_PROBE: &str = "run livesnap as root, or give it CAP_BPF and CAP_PERFMON";

/// Everything but the destination.
pub fn look() -> Vec<Finding> {
    let capabilities = Process::myself().and_then(|process| process.status());
    let may_trace = capabilities.is_ok_and(|status| status.capeff >> CAP_SYS_PTRACE & 1 == 1);
    vec![
        kernel(read("/proc/sys/kernel/osrelease").as_deref()),
        userfaultfd(&host::userfaultfd()),
        tracing(may_trace, read("/proc/sys/kernel/yama/ptrace_scope").as_deref()),
        map_files(host::map_files()),
        io_uring(host::io_uring()),
        same_page_merging(read("/sys/kernel/mm/ksm/run").as_deref()),
        huge_pages(read("/sys/kernel/mm/transparent_hugepage/enabled").as_deref()),
        memory(
            procfs::Meminfo::current().ok().and_then(|memory| memory.mem_available),
            default_buffer_bytes(),
        ),
        qemu(qemu_version()),
        probes(&Probes::attach(std::process::id(), &[], &livesnap_ebpf::Options::default())),
        disk_probe(&disk::best_tier()),
    ]
}

/// The file system that the directory `out` lies on, or will.
pub fn look_at_destination(out: &Path) -> Vec<Finding> {
    let absolute = std::path::absolute(out).unwrap_or_else(|_| out.to_owned());
    let existing = absolute.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    vec![
        direct_io(existing, host::direct_io(existing)),
        space(existing),
        disks(&Disk::of(existing)),
    ]
}

/// The content of a small file, if there is one.
fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn kernel(release: Option<&str>) -> Finding {
    Finding::ok("kernel", format!("Linux {}", release.unwrap_or("of an unknown release")))
}

fn userfaultfd(found: &io::Result<Userfaultfd>) -> Finding {
    const SUBJECT: &str = "userfaultfd";
    let unfit = |reason, found: String, remedy| Finding::unfit(SUBJECT, reason, found, remedy);
    match found {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => unfit(
            Reason::MissingPrivilege,
            format!("may not be used: {error}"),
            "run livesnap as root, or give it CAP_SYS_PTRACE and access to /dev/userfaultfd",
        ),
        Err(error) => unfit(
            Reason::KernelUnfit,
            format!("is not there: {error}"),
            "use Linux 6.1 or later, built with CONFIG_USERFAULTFD",
        ),
        Ok(Userfaultfd { protects: false, .. }) => unfit(
            Reason::KernelUnfit,
            "cannot write-protect memory".into(),
            "use Linux 6.1 or later on x86-64",
        ),
        Ok(Userfaultfd { access: Access::Syscall, .. }) => unfit(
            Reason::KernelUnfit,
            "has no /dev/userfaultfd, so an unprivileged QEMU cannot be given one".into(),
            "use Linux 6.1 or later, or make the device node visible here",
        ),
        Ok(Userfaultfd { protects_shared: false, .. }) => Finding::degraded(
            SUBJECT,
            "protects anonymous memory only: guests in shared memory or huge page pools are refused",
            "use Linux 5.19 or later",
        ),
        Ok(Userfaultfd { protects_holes: false, .. }) => Finding::degraded(
            SUBJECT,
            "does not protect memory that does not exist yet: a guest's untouched memory is populated first",
            "use Linux 6.4 or later",
        ),
        Ok(Userfaultfd { tracks_writes: false, .. }) => Finding::degraded(
            SUBJECT,
            "does not let writes through and remember them: `livesnap watch` is refused",
            "use Linux 6.7 or later",
        ),
        Ok(_) => Finding::ok(
            SUBJECT,
            "/dev/userfaultfd; protects anonymous, shared, pooled and not yet existing memory",
        ),
    }
}

fn tracing(may_trace: bool, ptrace_scope: Option<&str>) -> Finding {
    const SUBJECT: &str = "tracing";
    let scope = ptrace_scope.unwrap_or("0");
    match (may_trace, scope) {
        (_, "3") => Finding::unfit(
            SUBJECT,
            Reason::MissingPrivilege,
            "kernel.yama.ptrace_scope is 3: no process may attach to another",
            "set it to 2 or less in /etc/sysctl.d and boot anew",
        ),
        (true, _) => Finding::ok(SUBJECT, "CAP_SYS_PTRACE: may attach to any QEMU"),
        (false, "0") => Finding::degraded(
            SUBJECT,
            "no CAP_SYS_PTRACE: may attach only to a QEMU of the same user",
            AS_ROOT,
        ),
        (false, _) => Finding::unfit(
            SUBJECT,
            Reason::MissingPrivilege,
            format!(
                "no CAP_SYS_PTRACE, and kernel.yama.ptrace_scope is {scope}: may not attach to QEMU"
            ),
            AS_ROOT,
        ),
    }
}

fn map_files(opened: io::Result<()>) -> Finding {
    const SUBJECT: &str = "map_files";
    match opened {
        Ok(()) => Finding::ok(SUBJECT, "/proc/PID/map_files can be opened"),
        Err(error) => Finding::degraded(
            SUBJECT,
            format!("/proc/PID/map_files cannot be opened ({error}): guests in shared memory fail"),
            "run livesnap as root, or give it CAP_CHECKPOINT_RESTORE",
        ),
    }
}

fn io_uring(made: io::Result<()>) -> Finding {
    const SUBJECT: &str = "io_uring";
    match made {
        Ok(()) => Finding::ok(SUBJECT, "is available"),
        Err(error) => Finding::degraded(
            SUBJECT,
            format!("is not available ({error}): snapshots are written one write at a time"),
            "set kernel.io_uring_disabled to 0, and allow it in the container",
        ),
    }
}

fn same_page_merging(run: Option<&str>) -> Finding {
    const SUBJECT: &str = "KSM";
    match run {
        Some("1") => Finding::degraded(
            SUBJECT,
            "merges pages: guests whose memory it may merge are refused",
            "write 0 to /sys/kernel/mm/ksm/run, or start QEMU with -machine mem-merge=off",
        ),
        _ => Finding::ok(SUBJECT, "does not run"),
    }
}

fn huge_pages(enabled: Option<&str>) -> Finding {
    const SUBJECT: &str = "huge pages";
    // The file lists all policies, the one in force in brackets.
    let policy = enabled.and_then(|line| line.split(['[', ']']).nth(1)).unwrap_or("never");
    match policy {
        "never" => Finding::degraded(
            SUBJECT,
            "transparent huge pages are off: protecting a guest's memory takes longer",
            "write madvise to /sys/kernel/mm/transparent_hugepage/enabled before guests start",
        ),
        _ => Finding::ok(SUBJECT, format!("transparent huge pages: {policy}")),
    }
}

fn memory(available_bytes: Option<u64>, buffer_bytes: u64) -> Finding {
    const SUBJECT: &str = "memory";
    let available = available_bytes.map_or("an unknown amount".into(), output::bytes);
    let found =
        format!("{available} available, copy buffer {} by default", output::bytes(buffer_bytes));
    if buffer_bytes >= BUFFER_BYTES_GOOD {
        return Finding::ok(SUBJECT, found);
    }
    Finding::degraded(
        SUBJECT,
        format!("{found}: a busy guest may have to wait for the disk"),
        "free memory, or give --buffer",
    )
}

/// Standard output of `--version`, if the program is there.
fn qemu_version() -> Option<String> {
    let output = Command::new(QEMU).arg("--version").stdin(Stdio::null()).output().ok()?;
    String::from_utf8(output.stdout).ok()
}

fn qemu(version: Option<String>) -> Finding {
    const SUBJECT: &str = "QEMU";
    let remedy = "install QEMU 9.0 or later where snapshots are restored";
    // "QEMU emulator version 10.0.2 (Debian ...)"
    let version = version.as_deref().and_then(|text| text.split_whitespace().nth(3));
    let Some(version) = version else {
        return Finding::degraded(
            SUBJECT,
            format!("{QEMU} is not here: nothing can be restored"),
            remedy,
        );
    };
    let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
    if major.is_none_or(|major| major < QEMU_MAJOR_MIN) {
        let found = format!("{QEMU} {version} cannot load snapshots");
        return Finding::degraded(SUBJECT, found, remedy);
    }
    Finding::ok(SUBJECT, format!("{QEMU} {version}"))
}

fn probes(attached: &Result<Probes, ProbeError>) -> Finding {
    const SUBJECT: &str = "probes";
    match attached {
        Ok(probes) => tier(SUBJECT, probes.tier(), probes.refusals()),
        Err(ProbeError::Refused { refusals }) => {
            no_tier(SUBJECT, refusals, "the time that the guest's threads waited")
        }
        Err(error) => Finding::degraded(SUBJECT, error.to_string(), TO_PROBE),
    }
}

fn disk_probe(best: &Result<(disk::Tier, Vec<Refusal<disk::Tier>>), DiskError>) -> Finding {
    const SUBJECT: &str = "disk probe";
    match best {
        Ok((best, refusals)) => tier(SUBJECT, *best, refusals),
        Err(DiskError::Refused { refusals }) => no_tier(SUBJECT, refusals, "what the disk did"),
        Err(error) => Finding::degraded(SUBJECT, error.to_string(), TO_PROBE),
    }
}

/// The tier that there is, and why no better one.
fn tier<T: Debug + Display>(subject: &'static str, tier: T, refusals: &[Refusal<T>]) -> Finding {
    let found = match refusals {
        [] => tier.to_string(),
        _ => format!("{tier}; not {}", livesnap_ebpf::join(refusals)),
    };
    Finding::ok(subject, found)
}

/// None, so that reports lack what it would have told.
fn no_tier<T: Debug + Display>(
    subject: &'static str,
    refusals: &[Refusal<T>],
    lacking: &str,
) -> Finding {
    if refusals.iter().all(|refusal| matches!(refusal.cause, Cause::NotBuilt)) {
        let found = format!("livesnap was built without BPF programs: reports lack {lacking}");
        return Finding::degraded(subject, found, "run `cargo xtask setup`, and build it again");
    }
    let found = format!("{}: reports lack {lacking}", livesnap_ebpf::join(refusals));
    Finding::degraded(subject, found, TO_PROBE)
}

fn disks(found: &Result<Vec<Disk>, DeviceError>) -> Finding {
    const SUBJECT: &str = "disks";
    match found {
        Ok(disks) => {
            let names: Vec<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
            Finding::ok(SUBJECT, names.join(", "))
        }
        Err(error) => Finding::ok(SUBJECT, format!("{error}: reports do not tell of it")),
    }
}

fn direct_io(dir: &Path, found: io::Result<bool>) -> Finding {
    const SUBJECT: &str = "direct I/O";
    let dir = dir.display();
    match found {
        Ok(true) => Finding::ok(SUBJECT, format!("works in {dir}")),
        Ok(false) => Finding::degraded(
            SUBJECT,
            format!("does not work in {dir}: the snapshot displaces the page cache"),
            "choose a destination on ext4, XFS or Btrfs",
        ),
        Err(error) if is_denied(&error) => Finding::unfit(
            SUBJECT,
            Reason::BadDestination,
            format!("no file can be created in {dir}: {error}"),
            "choose a destination that livesnap may write to",
        ),
        Err(error) => Finding::degraded(
            SUBJECT,
            format!("cannot be tried in {dir}: {error}"),
            "choose a destination on ext4, XFS or Btrfs",
        ),
    }
}

fn is_denied(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

fn space(dir: &Path) -> Finding {
    const SUBJECT: &str = "space";
    match image::free_bytes(dir) {
        Ok(bytes) => {
            Finding::ok(SUBJECT, format!("{} free in {}", output::bytes(bytes), dir.display()))
        }
        Err(error) => {
            let remedy = "choose another destination";
            Finding::unfit(SUBJECT, error.reason(), error.to_string(), remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Verdict::{self, Degraded, Ok as Fit, Unfit};

    const FULL: Userfaultfd = Userfaultfd {
        access: Access::Device,
        protects: true,
        protects_shared: true,
        protects_holes: true,
        tracks_writes: true,
    };

    /// Whatever is not ok has a remedy, and whatever is unfit a reason.
    fn verdict(finding: &Finding) -> Verdict {
        assert_eq!(finding.remedy.is_some(), finding.verdict != Fit, "{finding:?}");
        assert_eq!(finding.reason.is_some(), finding.verdict == Unfit, "{finding:?}");
        finding.verdict
    }

    #[test]
    fn userfaultfd_is_judged_by_what_is_missing() {
        for (found, expected) in [
            (Ok(FULL), Fit),
            (Ok(Userfaultfd { tracks_writes: false, ..FULL }), Degraded),
            (Ok(Userfaultfd { protects_holes: false, ..FULL }), Degraded),
            (Ok(Userfaultfd { protects_shared: false, ..FULL }), Degraded),
            (Ok(Userfaultfd { protects: false, ..FULL }), Unfit),
            (Ok(Userfaultfd { access: Access::Syscall, ..FULL }), Unfit),
            (Err(io::ErrorKind::PermissionDenied.into()), Unfit),
            (Err(io::ErrorKind::Unsupported.into()), Unfit),
        ] {
            assert_eq!(verdict(&userfaultfd(&found)), expected, "{found:?}");
        }
    }

    #[test]
    fn tracing_is_judged_by_capability_and_yama() {
        for (may_trace, scope, expected) in [
            (true, None, Fit),
            (true, Some("2"), Fit),
            (true, Some("3"), Unfit),
            (false, None, Degraded),
            (false, Some("0"), Degraded),
            (false, Some("1"), Unfit),
        ] {
            assert_eq!(verdict(&tracing(may_trace, scope)), expected, "{may_trace} {scope:?}");
        }
    }

    #[test]
    fn qemu_is_judged_by_its_version() {
        let text = |version: &str| Some(format!("QEMU emulator version {version}\nCopyright"));
        assert_eq!(verdict(&qemu(text("10.0.2 (Debian 1:10.0.2)"))), Fit);
        assert_eq!(verdict(&qemu(text("9.0.0"))), Fit);
        assert_eq!(verdict(&qemu(text("8.2.1"))), Degraded);
        assert_eq!(verdict(&qemu(None)), Degraded);
    }

    #[test]
    fn memory_policies_are_read() {
        assert_eq!(verdict(&huge_pages(Some("always [madvise] never"))), Fit);
        assert_eq!(verdict(&huge_pages(Some("always madvise [never]"))), Degraded);
        assert_eq!(verdict(&same_page_merging(Some("1"))), Degraded);
        assert_eq!(verdict(&same_page_merging(Some("0"))), Fit);
        assert_eq!(verdict(&memory(Some(32 << 30), 1 << 30)), Fit);
        assert_eq!(verdict(&memory(Some(640 << 20), 64 << 20)), Degraded);
    }

    #[test]
    fn missing_programs_are_told_once_with_their_own_remedy() {
        let refusal = |tier, cause| Refusal { tier, cause };
        let all = livesnap_ebpf::Tier::ALL.map(|tier| refusal(tier, Cause::NotBuilt));
        let finding = no_tier("probes", &all, "all");
        assert_eq!(verdict(&finding), Degraded);
        assert_eq!(finding.found.matches("without BPF programs").count(), 1, "{finding:?}");
        assert_ne!(finding.remedy.as_deref(), Some(TO_PROBE));
        let one = [refusal(livesnap_ebpf::Tier::Fentry, Cause::NoField { field: "a.b" })];
        assert_eq!(no_tier("probes", &one, "all").remedy.as_deref(), Some(TO_PROBE));
        assert_eq!(verdict(&tier("probes", livesnap_ebpf::Tier::TpBtf, &one)), Fit);
    }

    #[test]
    fn a_destination_is_judged_by_what_can_be_written_there() {
        let dir = Path::new("/backup");
        assert_eq!(verdict(&direct_io(dir, Ok(true))), Fit);
        assert_eq!(verdict(&direct_io(dir, Ok(false))), Degraded);
        assert_eq!(verdict(&direct_io(dir, Err(io::ErrorKind::Unsupported.into()))), Degraded);
        assert_eq!(verdict(&direct_io(dir, Err(io::ErrorKind::ReadOnlyFilesystem.into()))), Unfit);
    }
}
