//! What livesnap refuses, with the real cause present: exit code 3, a reason, a remedy, and nothing touched.
//!
//! Not here, for want of the hardware: devices assigned by VFIO and encrypted guests, whose recognition is
//! tested where it is coded.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use livesnap_tests::livesnap::{Running, binary, snapshot, snapshot_command};
use livesnap_tests::mount::Mount;
use livesnap_tests::qemu::{Builder, Qemu, Ram};
use livesnap_tests::qmp::Qmp;
use livesnap_tests::qmp_proxy::{Answer, QmpProxy};
use livesnap_tests::{is_root_or_skip, livesnap, poll_until};
use rustix::process::Signal;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

/// A VM whose RAM is of no interest to same-page merging, which one of the tests switches on for the host.
fn builder() -> Builder {
    Qemu::builder().arguments(["-machine", "mem-merge=off"])
}

/// A VM, and a directory for what is refused; most refusals need no booted guest.
struct Scene {
    qemu: Qemu,
    dir: tempfile::TempDir,
}

impl Scene {
    fn new(builder: &Builder) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        Self { qemu: builder.start().unwrap(), dir }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("snapshot")
    }

    fn command(&self) -> Command {
        snapshot_command(&self.qemu, &self.out(), &[]).unwrap()
    }

    /// `command` is refused for `reason` with these words, and it was as if it had never been run.
    fn expect_refused(&mut self, command: Command, reason: &str, words: &[&str]) {
        let before = self.state();
        let ended = Running::start(command).unwrap().wait().unwrap();
        ended.expect_failure(3, reason, words).unwrap();
        // QEMU closes the connection in its own time.
        let settled =
            poll_until(
                "QEMU is as it was",
                DEADLINE,
                || Ok((self.state() == before).then_some(())),
            );
        settled.unwrap_or_else(|error| panic!("{error}: {:#?} {before:#?}", self.state()));
    }

    fn expect_snapshot_refused(&mut self, reason: &str, words: &[&str]) {
        self.expect_refused(self.command(), reason, words);
    }

    /// What a snapshot touches first: QEMU's run state, nodes, descriptors, memory; the destination.
    fn state(&mut self) -> (String, Value, usize, bool, Vec<PathBuf>) {
        let nodes = self.qemu.qmp("query-named-block-nodes", json!({})).unwrap();
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.qemu.pid())).unwrap();
        let files = std::fs::read_dir(self.dir.path()).unwrap();
        (
            self.qemu.status().unwrap(),
            nodes,
            descriptors.count(),
            self.qemu.has_userfaultfd().unwrap(),
            files.map(|entry| entry.unwrap().path()).collect(),
        )
    }
}

/// Writes a file of the kernel's, and what it held when dropped.
struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    fn change(path: &'static str, value: &str) -> Self {
        let before = std::fs::read_to_string(path).unwrap();
        std::fs::write(path, value).unwrap();
        Self { path, before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // A test that has failed already is not to be made to abort.
        let _ = std::fs::write(self.path, &self.before);
    }
}

#[test]
fn what_qemu_is_made_of() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let reporting = ["-device", "virtio-balloon-pci,free-page-reporting=on"];
    Scene::new(&builder().arguments(reporting))
        .expect_snapshot_refused("balloon", &["free-page-reporting=off"]);

    let nvme = ["-blockdev", "null-co,node-name=n", "-device", "nvme,serial=1,drive=n"];
    Scene::new(&builder().arguments(nvme))
        .expect_snapshot_refused("not_migratable", &["nvme", "remove the device"]);

    let on_disk = Ram::File("/var/tmp".into());
    Scene::new(&builder().ram(on_disk))
        .expect_snapshot_refused("file_backed_ram", &["memory-backend-memfd"]);

    let mut mergeable = Scene::new(&Qemu::builder());
    let merging = Setting::change("/sys/kernel/mm/ksm/run", "1");
    mergeable.expect_snapshot_refused("ksm", &["/sys/kernel/mm/ksm/run"]);
    drop(merging);
    snapshot(&mergeable.qemu, &mergeable.out(), &[]).unwrap();
}

#[test]
fn huge_pages_of_1_gib() {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
    if !is_root_or_skip("a pool of huge pages").unwrap() {
        return;
    }
    let _pool = Setting::change(POOL, "1");
    if std::fs::read_to_string(POOL).unwrap().trim() == "0" {
        eprintln!("SKIPPED: this host has no contiguous gibibyte to spare for a huge page");
        return;
    }
    let memory = "memory-backend-memfd,id=huge,size=1G,share=on,hugetlb=on,hugetlbsize=1G";
    let device = "pc-dimm,memdev=huge";
    let more = ["-m", "256M,slots=1,maxmem=4G", "-object", memory, "-device", device];
    Scene::new(&builder().arguments(more))
        .expect_snapshot_refused("huge_page_size", &["2 MiB huge pages"]);
}

#[test]
fn what_else_is_done_to_qemu() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let mut scene = Scene::new(&builder());
    let file = scene.qemu.dir().join("migration");
    let slowly = json!({"max-bandwidth": 4096});
    scene.qemu.qmp("migrate-set-parameters", slowly).unwrap();
    scene.qemu.qmp("migrate", json!({"uri": format!("file:{}", file.display())})).unwrap();
    wait_migration(&mut scene.qemu, "active");
    scene.expect_snapshot_refused("migration_active", &["wait for its end, or cancel it"]);
    scene.qemu.qmp("migrate_cancel", json!({})).unwrap();
    wait_migration(&mut scene.qemu, "cancelled");
    snapshot(&scene.qemu, &scene.out(), &[]).unwrap();

    // Two snapshots at once, by two monitors: the second finds the first one's userfaultfd.
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut scene = Scene::new(&builder());
    let other = dir.path().join("other");
    let mut first = Running::start(snapshot_command(&scene.qemu, &other, &[]).unwrap()).unwrap();
    first.reach("arming").unwrap();
    first.signal(Signal::STOP).unwrap();
    let mut command = livesnap::command(["snapshot", "--json", "--qmp"]).unwrap();
    command.arg(scene.qemu.other_qmp_socket()).arg("--out").arg(scene.out());
    scene.expect_refused(command, "foreign_userfaultfd", &["end the other snapshot"]);
    first.signal(Signal::CONT).unwrap();
    assert!(first.wait().unwrap().status.success());
    snapshot(&scene.qemu, &scene.out(), &[]).unwrap();
}

fn wait_migration(qemu: &mut Qemu, wanted: &str) {
    poll_until("the migration is in its state", DEADLINE, || {
        let state = qemu.qmp("query-migrate", json!({}))?;
        Ok((state["status"] == wanted).then_some(()))
    })
    .unwrap();
}

/// A process that ends with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only if it has ended already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_vhost_user_device_before_and_after_its_start() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let socket = dir.path().join("vhost");
    let daemon = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &format!("file,node-name=f,filename={}", image.display())])
        .args([
            "--export",
            &format!(
                "vhost-user-blk,id=e,addr.type=unix,addr.path={},node-name=f,writable=on",
                socket.display()
            ),
        ])
        .spawn()
        .unwrap();
    let daemon = Daemon(daemon);
    poll_until("the back end listens", DEADLINE, || Ok(socket.exists().then_some(()))).unwrap();
    let chardev = format!("socket,id=v,path={}", socket.display());
    let device = "vhost-user-blk-pci,chardev=v";
    let builder =
        builder().ram(Ram::Memfd).arguments(["-S", "-chardev", &chardev, "-device", device]);
    let mut scene = Scene::new(&builder);
    let is_mapped = || {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", daemon.0.id())).unwrap();
        maps.contains("memfd:memory-backend-memfd")
    };
    // A driver may start it at any moment, also amid a snapshot.
    assert!(!is_mapped());
    scene.qemu.qmp("cont", json!({})).unwrap();
    scene.qemu.qmp("stop", json!({})).unwrap();
    scene.expect_snapshot_refused("shared_memory", &["vhost-user", "unplug"]);
    scene.qemu.qmp("cont", json!({})).unwrap();
    poll_until("the back end has mapped guest RAM", DEADLINE, || Ok(is_mapped().then_some(())))
        .unwrap();
    scene.expect_snapshot_refused("shared_memory", &["qemu-storage-da", "has guest RAM mapped"]);
}

#[test]
fn a_monitor_that_is_not_to_be_used() {
    if !is_root_or_skip("attaching to QEMU").unwrap() {
        return;
    }
    let mut scene = Scene::new(&builder());
    let towards = |scene: &Scene, socket: &Path| {
        let mut command = livesnap::command(["snapshot", "--json", "--qmp"]).unwrap();
        command.arg(socket).arg("--out").arg(scene.out());
        command
    };
    let nowhere = towards(&scene, Path::new("/nonexistent/qmp"));
    scene.expect_refused(nowhere, "vmm_unreachable", &["/nonexistent/qmp", "check the path"]);

    let sockets = tempfile::tempdir_in("/var/tmp").unwrap();
    let silent = sockets.path().join("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    let command = towards(&scene, &silent);
    scene.expect_refused(command, "vmm_unreachable", &["no greeting", "second -qmp socket"]);

    let held = Qmp::connect(&scene.qemu.qmp_socket(), DEADLINE).unwrap();
    scene.expect_snapshot_refused("vmm_unreachable", &["another program holds it"]);
    drop(held);

    let old = |command: &str, answer: Vec<u8>| {
        if command != "query-version" {
            return Answer::Other(answer);
        }
        let mut answer: Value = serde_json::from_slice(&answer).unwrap();
        answer["return"]["qemu"]["major"] = json!(8);
        Answer::Other(format!("{answer}\r\n").into_bytes())
    };
    let proxy = QmpProxy::start(&scene.qemu, old).unwrap();
    let command = proxy.snapshot_command(&scene.out()).unwrap();
    scene.expect_refused(command, "qemu_too_old", &["QEMU 8.", "QEMU 9.0 or later"]);
    snapshot(&scene.qemu, &scene.out(), &[]).unwrap();
}

#[test]
fn a_destination_or_a_user_that_will_not_do() {
    if !is_root_or_skip("starting a QEMU as nobody").unwrap() {
        return;
    }
    // Its memory exists from the start, so that a snapshot needs room.
    let mut scene = Scene::new(&builder().arguments(["-overcommit", "mem-lock=on"]));
    std::fs::create_dir(scene.out()).unwrap();
    std::fs::write(scene.out().join("file"), "").unwrap();
    scene.expect_snapshot_refused("bad_destination", &["is never overwritten", "choose another"]);
    std::fs::remove_file(scene.out().join("file")).unwrap();

    let tiny = Mount::tmpfs(&scene.dir.path().join("tiny"), "size=8M").unwrap();
    let command = snapshot_command(&scene.qemu, &tiny.path().join("snapshot"), &[]).unwrap();
    scene.expect_refused(command, "no_space", &["free space there or choose another"]);
    assert_eq!(std::fs::read_dir(tiny.path()).unwrap().count(), 0);

    let missing = scene.out().join("missing/snapshot");
    let command = snapshot_command(&scene.qemu, &missing, &[]).unwrap();
    scene.expect_refused(command, "bad_destination", &["does not exist: create it"]);
    snapshot(&scene.qemu, &scene.out(), &[]).unwrap();

    let mut scene = Scene::new(&builder().nobody());
    // Where nobody can read it.
    let copy = scene.qemu.dir().join("livesnap");
    std::fs::copy(binary().unwrap(), &copy).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]).arg(&copy);
    command.args(["snapshot", "--json", "--qmp"]).arg(scene.qemu.qmp_socket());
    command.arg("--out").arg(scene.out());
    scene.expect_refused(command, "missing_privilege", &["/dev/userfaultfd", "CAP_SYS_PTRACE"]);
}
