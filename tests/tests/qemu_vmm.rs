//! The product's hands on a real QEMU: attach, pause, device state, disks, and what it must refuse. No
//! RAM is copied here.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use livesnap_tests::qemu::{Aio, Builder, Disk, Format, Load, Machine, Qemu, Ram};
use livesnap_tests::{is_root_or_skip, poll_until};
use serde_json::json;
use snapshot_core::Reason;
use snapshot_core::vmm::qemu::{QemuError, QemuOptions, QemuVmm, survey};
use snapshot_core::vmm::{DeviceState, Outcome, RunState, Vmm, guard};

const BOOT: Duration = Duration::from_secs(120);
const DEADLINE: Duration = Duration::from_secs(60);
/// Far more than a pause needs on a busy machine.
const LONG_PAUSE: Duration = Duration::from_secs(30);

const ROLE: &str = "LIVESNAP_TEST_ROLE";
const SOCKET: &str = "LIVESNAP_TEST_SOCKET";

/// No test by itself: what this binary does when a test starts it anew in a role.
#[test]
fn play_role() {
    let socket = std::env::var_os(SOCKET).map(PathBuf::from);
    match (std::env::var(ROLE).as_deref(), socket) {
        (Ok("guard"), _) => assert_eq!(guard::main(), ExitCode::SUCCESS),
        (Ok("snapshotter"), Some(socket)) => snapshotter(options(socket)),
        _ => {}
    }
}

fn role_arguments() -> [OsString; 4] {
    let exe = std::env::current_exe().unwrap();
    [exe.into(), "--exact".into(), "play_role".into(), "--nocapture".into()]
}

fn options(socket: PathBuf) -> QemuOptions {
    let mut options = QemuOptions::new(socket);
    options.pause_limit = LONG_PAUSE;
    options.guard_command = vec!["/usr/bin/env".into(), format!("{ROLE}=guard").into()];
    options.guard_command.extend(role_arguments());
    options
}

/// Attaches and pauses over and over, saying so, until it is killed.
fn snapshotter(options: QemuOptions) {
    let mut vmm = QemuVmm::attach(options).unwrap();
    loop {
        vmm.userfaultfd().unwrap();
        eprintln!("attached");
        vmm.pause().unwrap();
        eprintln!("paused");
        vmm.device_state().unwrap();
        vmm.resume().unwrap();
        eprintln!("resumed");
    }
}

/// A snapshotter process that is up to `line`.
fn snapshotter_at(qemu: &Qemu, line: &str) -> Child {
    let arguments = role_arguments();
    let mut child = Command::new(&arguments[0])
        .args(&arguments[1..])
        .env(ROLE, "snapshotter")
        .env(SOCKET, qemu.qmp_socket())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let came = lines.any(|found| {
        said.push(found.unwrap());
        said.last().unwrap() == line
    });
    assert!(came, "{line:?} was not said, but {said:#?}");
    child
}

fn attach(qemu: &Qemu) -> QemuVmm {
    QemuVmm::attach(options(qemu.qmp_socket())).unwrap()
}

fn open_descriptors(qemu: &Qemu) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", qemu.pid())).unwrap().count()
}

/// Boots with a disk that the guest writes to.
fn boot_with_disk(builder: Builder, disk: &Disk) -> Qemu {
    let load = Load { disk: true, ..Load::default() };
    let mut qemu = builder.disk(disk.clone()).load(load).start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu.wait_heartbeat(BOOT, |heartbeat| heartbeat.disk > 0).unwrap();
    qemu
}

/// The guest writes RAM and disk, and finds all that it wrote before.
fn goes_on(qemu: &mut Qemu) {
    let seen = qemu.heartbeats().unwrap().last().cloned().unwrap();
    let now = qemu
        .wait_heartbeat(DEADLINE, |now| now.disk > seen.disk && now.workers[0] > seen.workers[0])
        .unwrap();
    assert_eq!(now.inconsistent, 0);
}

fn overlays(dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.to_str().unwrap().contains(".livesnap-")).collect()
}

#[test]
fn a_session_takes_device_state_and_disks_and_leaves_nothing_in_qemu() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    // None with an iothread: under TCG, QEMU 10.0 loses virtio-blk requests there at a bare stop and cont.
    let unprivileged = Qemu::builder().ram(Ram::Memfd).sandbox().nobody();
    for (builder, format, aio) in [
        (Qemu::builder(), Format::Raw, Aio::Threads),
        (Qemu::builder().machine(Machine::Pc), Format::Qcow2, Aio::Native),
        (unprivileged, Format::Raw, Aio::IoUring),
    ] {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let disk = Disk::create(dir.path().join("disk"), format, 32).unwrap().aio(aio);
        let mut qemu = boot_with_disk(builder, &disk);
        let descriptors = open_descriptors(&qemu);

        let mut vmm = attach(&qemu);
        let machine = vmm.describe().unwrap();
        assert!(machine.machine_type.starts_with("pc-"), "{machine:?}");
        assert_eq!((machine.vmm.as_str(), machine.cpus), ("qemu", 1));
        assert!(machine.command_line.len() > 5);
        for _ in 0..10 {
            let fd = vmm.userfaultfd().unwrap();
            let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let name = std::fs::read_link(link).unwrap();
            assert_eq!(name.to_str(), Some("anon_inode:[userfaultfd]"));
        }
        assert_eq!(open_descriptors(&qemu), descriptors + 1, "QEMU has the new connection only");

        vmm.prepare_disks().unwrap();
        assert_eq!(vmm.pause().unwrap(), RunState::Running);
        assert_eq!(qemu.status().unwrap(), "paused");
        let DeviceState::QemuSections(sections) = vmm.device_state().unwrap() else {
            panic!("QEMU has sections");
        };
        assert!(sections.len() > 10_000, "{}", sections.len());
        let disks = vmm.switch_disks().unwrap();
        let image = disk.path().metadata().unwrap();
        vmm.resume().unwrap();
        vmm.resume().unwrap();
        assert_eq!(qemu.status().unwrap(), "running");
        vmm.check().unwrap();
        goes_on(&mut qemu);
        vmm.finish(Outcome::Completed).unwrap();
        drop(vmm);
        goes_on(&mut qemu);

        assert_eq!(disks.disks.len(), 1);
        let taken = &disks.disks[0];
        assert_eq!((taken.image.as_path(), taken.size_bytes), (disk.path(), 32 << 20));
        assert_eq!(overlays(dir.path()), std::slice::from_ref(&taken.overlay));
        let now = disk.path().metadata().unwrap();
        assert_eq!((now.mtime(), now.mtime_nsec()), (image.mtime(), image.mtime_nsec()));
        assert!(taken.overlay.metadata().unwrap().len() > 256 << 10);

        // The next snapshot finds the overlay, and puts another one upon it.
        let again = survey(&options(qemu.qmp_socket())).unwrap();
        assert_eq!(again.refusals, []);
        assert_eq!(again.disks[0].image, taken.overlay);
        assert_eq!(again.disks[0].backing_chain, [disk.path()]);
    }
}

#[test]
fn a_failed_session_merges_the_disk_back() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let disk = Disk::create(dir.path().join("disk"), Format::Qcow2, 32).unwrap();
    let mut qemu = boot_with_disk(Qemu::builder(), &disk);
    let nodes = qemu.qmp("query-named-block-nodes", json!({})).unwrap();
    let nodes = nodes.as_array().unwrap().len();
    for switched in [false, true] {
        let mut vmm = attach(&qemu);
        vmm.prepare_disks().unwrap();
        vmm.pause().unwrap();
        if switched {
            vmm.switch_disks().unwrap();
        }
        vmm.resume().unwrap();
        goes_on(&mut qemu);
        assert_eq!(overlays(dir.path()).len(), 1);
        vmm.finish(Outcome::Failed).unwrap();
        assert_eq!(overlays(dir.path()).len(), 0, "switched: {switched}");
        goes_on(&mut qemu);
        let left = qemu.qmp("query-named-block-nodes", json!({})).unwrap();
        assert_eq!(left.as_array().unwrap().len(), nodes, "switched: {switched}");
        assert_eq!(qemu.qmp("query-jobs", json!({})).unwrap(), json!([]));
    }
}

/// A QEMU whose owner has paused it, and a session that has its device state.
fn in_the_pause_of_a_paused_guest() -> (Qemu, QemuVmm) {
    let mut qemu = Qemu::builder().start().unwrap();
    qemu.qmp("stop", json!({})).unwrap();
    let mut vmm = attach(&qemu);
    assert_eq!(vmm.pause().unwrap(), RunState::Paused);
    vmm.device_state().unwrap();
    (qemu, vmm)
}

#[test]
fn a_guest_that_was_paused_stays_paused() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let (mut qemu, mut vmm) = in_the_pause_of_a_paused_guest();
    vmm.resume().unwrap();
    vmm.finish(Outcome::Failed).unwrap();
    drop(vmm);
    assert_eq!(qemu.status().unwrap(), "paused");
}

#[test]
fn a_guest_that_its_owner_continues_in_the_pause_fails_the_session() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let (mut qemu, mut vmm) = in_the_pause_of_a_paused_guest();
    qemu.qmp("cont", json!({})).unwrap();
    assert_eq!(vmm.resume().unwrap_err().reason, Reason::BadRunState);
    vmm.resume().unwrap();
    vmm.finish(Outcome::Failed).unwrap();
    drop(vmm);
    assert_eq!(qemu.status().unwrap(), "running");
}

#[test]
fn a_pause_over_its_limit_ends_by_itself_and_fails_the_session() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let mut qemu = Qemu::builder().start().unwrap();
    let mut slow = options(qemu.qmp_socket());
    slow.pause_limit = Duration::from_millis(300);
    let mut vmm = QemuVmm::attach(slow).unwrap();
    vmm.pause().unwrap();
    // Nobody calls resume.
    is_running(&mut qemu);
    assert_eq!(vmm.device_state().unwrap_err().reason, Reason::PauseTooLong);
    assert_eq!(vmm.resume().unwrap_err().reason, Reason::PauseTooLong);
    vmm.resume().unwrap();
    assert_eq!(qemu.status().unwrap(), "running");
}

#[test]
fn a_guest_continued_by_somebody_else_in_the_pause_fails_the_session() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let mut qemu = Qemu::builder().start().unwrap();
    let mut vmm = attach(&qemu);
    vmm.pause().unwrap();
    qemu.qmp("cont", json!({})).unwrap();
    assert_eq!(vmm.resume().unwrap_err().reason, Reason::BadRunState);
    assert_eq!(qemu.status().unwrap(), "running");
}

fn is_running(qemu: &mut Qemu) {
    poll_until(
        "the guest runs again",
        DEADLINE,
        || Ok((qemu.status()? == "running").then_some(())),
    )
    .unwrap();
}

#[test]
fn killing_the_snapshotter_at_any_point_leaves_a_running_guest() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let disk = Disk::create(dir.path().join("disk"), Format::Raw, 32).unwrap();
    let mut qemu = boot_with_disk(Qemu::builder(), &disk);
    for round in 0..24_u32 {
        let line = ["paused", "attached", "resumed"][round as usize % 3];
        let mut child = snapshotter_at(&qemu, line);
        // A little later each time: into the next command, and the one after it.
        let until = Instant::now() + Duration::from_micros(u64::from(round / 3) * 150);
        while Instant::now() < until {}
        child.kill().unwrap();
        child.wait().unwrap();
        is_running(&mut qemu);
    }
    goes_on(&mut qemu);
}

/// The reasons why `builder`'s machine is refused.
fn refusals(builder: &Builder, prepare: impl FnOnce(&mut Qemu)) -> Vec<Reason> {
    let mut qemu = builder.start().unwrap();
    prepare(&mut qemu);
    let found = survey(&options(qemu.qmp_socket())).unwrap().refusals;
    let reasons = found.iter().map(|refusal| refusal.reason).collect();
    match QemuVmm::attach(options(qemu.qmp_socket())) {
        Err(QemuError::Refused(again)) => assert_eq!(again, found),
        Err(other) => panic!("{other}"),
        Ok(_) => assert_eq!(found, []),
    }
    reasons
}

#[test]
fn what_cannot_be_snapshotted_is_refused_by_name() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let with = |arguments: &[&str]| {
        refusals(&Qemu::builder().arguments(arguments.iter().copied()), |_| {})
    };
    assert_eq!(with(&[]), []);
    assert_eq!(with(&["-device", "virtio-balloon-pci"]), []);
    assert_eq!(
        with(&["-device", "virtio-balloon-pci,id=b,free-page-reporting=on"]),
        [Reason::Balloon]
    );
    assert_eq!(with(&["-S"]), [Reason::BadRunState]);
    assert_eq!(
        with(&["-blockdev", "null-co,node-name=n", "-device", "virtio-blk-pci,drive=n"]),
        [Reason::DiskUnfit]
    );
    let memory = "memory-backend-ram,id=m,size=1M,share=on";
    let device = "ivshmem-plain,memdev=m,master=off";
    assert_eq!(with(&["-object", memory, "-device", device]), [Reason::NotMigratable]);
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let file = dir.path().join("ram").display().to_string();
    let memory = format!("memory-backend-file,id=f,size=32M,share=on,mem-path={file}");
    assert_eq!(
        with(&["-object", &memory, "-device", "ivshmem-plain,memdev=f,master=on"]),
        [Reason::FileBackedRam]
    );
    let snapshotting = |qemu: &mut Qemu| {
        let capability =
            json!({"capabilities": [{"capability": "background-snapshot", "state": true}]});
        qemu.qmp("migrate-set-capabilities", capability).unwrap();
        // Slow enough to be under way while we look.
        qemu.qmp("migrate-set-parameters", json!({"max-bandwidth": 4096})).unwrap();
        qemu.qmp("migrate", json!({"uri": format!("file:{file}")})).unwrap();
        // It is called active before it has protected RAM.
        poll_until("the background snapshot has a userfaultfd", DEADLINE, || {
            let refusals = survey(&options(qemu.qmp_socket()))?.refusals;
            let found = refusals.iter().any(|r| r.reason == Reason::ForeignUserfaultfd);
            Ok(found.then_some(()))
        })
        .unwrap();
    };
    let found = refusals(&Qemu::builder(), snapshotting);
    assert_eq!(found[0], Reason::MigrationActive);
    assert!(found[1..].iter().all(|&reason| reason == Reason::ForeignUserfaultfd), "{found:?}");
}

#[test]
fn a_held_monitor_and_a_wrong_process_are_told() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let qemu = Qemu::builder().start().unwrap();
    let mut wrong = options(qemu.qmp_socket());
    wrong.command_timeout = Duration::from_secs(2);
    wrong.pid = Some(rustix::process::getpid());
    assert_eq!(QemuVmm::attach(wrong.clone()).unwrap_err().reason(), Reason::NoProcess);
    wrong.pid = None;
    let first = QemuVmm::attach(options(qemu.qmp_socket())).unwrap();
    let second = QemuVmm::attach(wrong).unwrap_err();
    assert_eq!(second.reason(), Reason::VmmUnreachable);
    assert!(second.to_string().contains("second -qmp socket"), "{second}");
    drop(first);
}

#[test]
fn the_end_of_qemu_is_noticed() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let mut qemu = Qemu::builder().start().unwrap();
    let mut vmm = attach(&qemu);
    vmm.check().unwrap();
    qemu.qmp("quit", json!({})).unwrap();
    qemu.wait_exit(DEADLINE).unwrap();
    assert_eq!(vmm.check().unwrap_err().reason, Reason::VmmDied);
    assert_eq!(vmm.pause().unwrap_err().reason, Reason::VmmUnreachable);
    drop(qemu);
}
