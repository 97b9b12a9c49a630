//! The disks at the consistency point: an overlay on each, put there by one transaction in the pause.
//!
//! ```text
//!  guest running            the pause                    afterwards
//!  image ◄─ guest           image                        image: content at the consistency point
//!  overlay file and node    image ◄─ overlay ◄─ guest    image ◄─ overlay ◄─ guest
//! ```
//!
//! All that takes time is done before the pause: the file, QEMU's nodes, flushing. After a failure the
//! overlays are merged back and removed, so that failed attempts leave no chain behind. An overlay that
//! the guest has written to is never removed otherwise.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::QemuOptions;
use super::qmp::{Qmp, QmpError};
use crate::Reason;
use crate::vmm::{Disk, DiskSnapshot, Outcome};

/// Between two looks at a job.
const JOB_POLL_INTERVAL: Duration = Duration::from_millis(2);
/// What our overlays' names have between the image's name and the time.
const OVERLAY_INFIX: &str = ".livesnap-";

/// What went wrong with a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The overlay's file could not be made.
    #[error("cannot create the overlay {path}: {source}: give another overlay directory")]
    Create {
        /// The overlay.
        path: PathBuf,
        /// Errno.
        source: io::Error,
    },
    /// QEMU could not format or open it.
    #[error(
        "QEMU cannot use the overlay {path}: {source}: it must be allowed to read and write there"
    )]
    Open {
        /// The overlay.
        path: PathBuf,
        /// QEMU's answer.
        source: QmpError,
    },
    /// A block job failed.
    #[error("QEMU's job {job} failed: {text}")]
    Job {
        /// Its name.
        job: String,
        /// QEMU's text.
        text: String,
    },
    /// The switch in the pause failed.
    #[error("cannot switch the disks to their overlays: {source}: no disk was switched")]
    Switch {
        /// QEMU's answer.
        source: QmpError,
    },
    /// An overlay could not be merged back: the guest needs it.
    #[error(
        "the guest runs on, with {overlay} upon {image}, which must both be kept: {source}: merge them by QMP block-commit with device {node:?} and base-node {base:?}, then job-complete"
    )]
    Merge {
        /// The overlay in use.
        overlay: PathBuf,
        /// The image under it.
        image: PathBuf,
        /// The overlay's node.
        node: String,
        /// The image's node. QEMU would merge into the lowest image of the chain if none were given.
        base: String,
        /// Why.
        source: Box<Self>,
    },
    /// What was prepared could not be removed.
    #[error("the unused overlay {path} could not be removed ({text}): delete it by hand")]
    Left {
        /// The overlay.
        path: PathBuf,
        /// Why.
        text: String,
    },
    /// QEMU did not answer or refused.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

impl DiskError {
    /// Stable code.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Create { .. } | Self::Open { .. } => Reason::DiskUnfit,
            Self::Job { .. } | Self::Left { .. } => Reason::VmmRefused,
            Self::Switch { source } | Self::Qmp(source) => source.reason(),
            Self::Merge { source, .. } => source.reason(),
        }
    }
}

/// A writable disk as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// How QEMU names the device.
    pub device: String,
    /// Node on top.
    pub node: String,
    /// Image file or block device.
    pub image: PathBuf,
    /// Its format.
    pub format: String,
    /// Files under it, nearest first.
    pub backing_chain: Vec<PathBuf>,
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// How QEMU's cache was set up for it.
    cache: Cache,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cache {
    direct: bool,
    no_flush: bool,
}

/// A disk that cannot take part: its device, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// How QEMU names the device.
    pub device: String,
    /// Why.
    pub why: &'static str,
}

/// The writable, fixed disks of the virtual machine. Removable media and read-only ones do not belong
/// to the snapshot.
///
/// # Errors
/// If QEMU does not answer.
pub fn find(
    qmp: &mut Qmp,
    working_dir: Option<&Path>,
    limit: Duration,
) -> Result<Vec<Result<Found, Unfit>>, QmpError> {
    let list = qmp.execute("query-block", json!({}), limit)?;
    let list = list.as_array().ok_or_else(|| QmpError::lacks("query-block", "list"))?;
    Ok(list.iter().filter_map(|device| examine(device, working_dir)).collect())
}

/// The disk in one entry of `query-block`, if it belongs to the snapshot.
fn examine(entry: &Value, working_dir: Option<&Path>) -> Option<Result<Found, Unfit>> {
    let inserted = &entry["inserted"];
    let is = |value: &Value| value == &json!(true);
    if !inserted.is_object() || is(&inserted["ro"]) || is(&entry["removable"]) {
        return None;
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let device = match text(&entry["device"]) {
        name if name.is_empty() => text(&entry["qdev"]),
        name => name,
    };
    let unfit = |why| Some(Err(Unfit { device: device.clone(), why }));
    let path = |value: &Value| {
        let name = value.as_str().unwrap_or_default();
        match working_dir {
            Some(directory) => directory.join(name),
            None => PathBuf::from(name),
        }
    };
    let image = path(&inserted["image"]["filename"]);
    if is(&inserted["encrypted"]) {
        return unfit("it is encrypted by QEMU");
    }
    // Network disks and filters go by a URL or by json:{...}.
    let Ok(kind) = image.metadata().map(|file| file.file_type()) else {
        return unfit("its image is no file that livesnap can see under the same path as QEMU");
    };
    if !kind.is_file() && !kind.is_block_device() {
        return unfit("its image is neither a file nor a block device");
    }
    let (Some(node), Some(size_bytes)) =
        (inserted["node-name"].as_str(), inserted["image"]["virtual-size"].as_u64())
    else {
        return unfit("QEMU does not tell its node and size");
    };
    let mut backing_chain = Vec::new();
    let mut lower = &inserted["image"]["backing-image"];
    while lower.is_object() {
        backing_chain.push(path(&lower["filename"]));
        lower = &lower["backing-image"];
    }
    Some(Ok(Found {
        node: node.into(),
        image,
        format: text(&inserted["drv"]),
        backing_chain,
        size_bytes,
        cache: Cache {
            direct: is(&inserted["cache"]["direct"]),
            no_flush: is(&inserted["cache"]["no-flush"]),
        },
        device,
    }))
}

/// How far the overlay of a disk has come; decides what undoing it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Its file exists.
    File,
    /// QEMU has the file open.
    Protocol,
    /// QEMU has its qcow2 node.
    Node,
    /// The guest writes to it.
    Active,
}

#[derive(Debug)]
struct Overlay {
    disk: Disk,
    /// QEMU's name for the qcow2 node; that of the file node is longer by `-file`.
    node: String,
    stage: Stage,
    /// The image, for flushing.
    image: File,
}

/// The disks of one session.
#[derive(Debug)]
pub(super) struct Disks {
    found: Vec<Found>,
    left_out: bool,
    overlay_dir: Option<PathBuf>,
    limit: Duration,
    merge_limit: Duration,
    overlays: Vec<Overlay>,
}

impl Disks {
    pub(super) fn new(found: Vec<Found>, options: &QemuOptions) -> Self {
        Self {
            left_out: !options.disks && !found.is_empty(),
            found: if options.disks { found } else { Vec::new() },
            overlay_dir: options.overlay_dir.clone(),
            limit: options.command_timeout,
            merge_limit: options.merge_limit,
            overlays: Vec::new(),
        }
    }

    /// Makes an overlay for each disk, up to the point where one command puts it in place.
    pub(super) fn prepare(&mut self, qmp: &mut Qmp) -> Result<(), DiskError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for (number, found) in self.found.iter().enumerate() {
            let path = overlay_path(&found.image, self.overlay_dir.as_deref(), now);
            let image = create_like(&found.image, &path)
                .map_err(|source| DiskError::Create { path: path.clone(), source })?;
            let disk = Disk {
                device: found.device.clone(),
                node: found.node.clone(),
                image: found.image.clone(),
                image_format: found.format.clone(),
                backing_chain: found.backing_chain.clone(),
                size_bytes: found.size_bytes,
                overlay: path,
            };
            // QEMU allows 31 bytes, and no node may have had that name before.
            let node = format!("livesnap-{}-{number}", now.as_millis());
            self.overlays.push(Overlay { disk, node, stage: Stage::File, image });
            if let Some(overlay) = self.overlays.last_mut() {
                overlay.open(qmp, found.cache, self.limit)?;
            }
        }
        self.flush();
        Ok(())
    }

    /// Writes out what the guest has written so far, so that `stop` finds little to flush.
    pub(super) fn flush(&self) {
        for overlay in &self.overlays {
            if let Err(error) = overlay.image.sync_data() {
                // QEMU meets the same error in the pause, and says what it does about it.
                tracing::warn!(image = %overlay.disk.image.display(), %error, "cannot flush");
            }
        }
    }

    /// Puts all overlays in place at once.
    pub(super) fn switch(
        &mut self,
        qmp: &mut Qmp,
        limit: Duration,
    ) -> Result<DiskSnapshot, DiskError> {
        if !self.overlays.is_empty() {
            let action = |overlay: &Overlay| {
                let data = json!({"node": overlay.disk.node, "overlay": overlay.node});
                json!({"type": "blockdev-snapshot", "data": data})
            };
            let actions: Vec<Value> = self.overlays.iter().map(action).collect();
            let result = qmp.execute("transaction", json!({"actions": actions}), limit);
            // Without an answer it may have happened: then nothing of it may be deleted.
            if !matches!(result, Err(QmpError::Refused { .. })) {
                for overlay in &mut self.overlays {
                    overlay.stage = Stage::Active;
                }
            }
            result.map_err(|source| DiskError::Switch { source })?;
        }
        let disks = self.overlays.iter().map(|overlay| overlay.disk.clone()).collect();
        Ok(DiskSnapshot { left_out: self.left_out, disks })
    }

    /// Removes what is not needed: overlays never used, and after a failure, by merging, also those in use.
    /// Carries on after an error and returns the first.
    pub(super) fn finish(&mut self, qmp: &mut Qmp, outcome: Outcome) -> Result<(), DiskError> {
        let mut result = Ok(());
        for mut overlay in self.overlays.drain(..) {
            let undone = match (overlay.stage, outcome) {
                (Stage::Active, Outcome::Completed) => Ok(()),
                (Stage::Active, Outcome::Failed) => overlay
                    .merge(qmp, self.limit, self.merge_limit)
                    .and_then(|()| overlay.remove(qmp, self.limit)),
                _ => overlay.remove(qmp, self.limit),
            };
            result = result.and(undone);
        }
        result
    }
}

impl Overlay {
    fn file_node(&self) -> String {
        format!("{}-f", self.node)
    }

    /// Formats the file and opens it in QEMU, with no backing node: that is what the switch gives it.
    fn open(&mut self, qmp: &mut Qmp, cache: Cache, limit: Duration) -> Result<(), DiskError> {
        let path = self.disk.overlay.clone();
        let refused = |source| DiskError::Open { path: path.clone(), source };
        let cache = json!({"direct": cache.direct, "no-flush": cache.no_flush});
        let file = json!({
            "driver": "file", "node-name": self.file_node(), "filename": path, "cache": cache,
        });
        qmp.execute("blockdev-add", file, limit).map_err(refused)?;
        self.stage = Stage::Protocol;
        let format = json!({
            "driver": "qcow2", "file": self.file_node(), "size": self.disk.size_bytes,
            "backing-file": self.disk.image, "backing-fmt": self.backing_format(),
        });
        let create = json!({"job-id": self.node, "options": format});
        qmp.execute("blockdev-create", create, limit).map_err(refused)?;
        wait_for_job(qmp, &self.node, "concluded", limit)?;
        dismiss_job(qmp, &self.node, limit)?;
        let node = json!({
            "driver": "qcow2", "node-name": self.node, "file": self.file_node(),
            "backing": null, "cache": cache, "discard": "unmap",
        });
        qmp.execute("blockdev-add", node, limit).map_err(refused)?;
        self.stage = Stage::Node;
        Ok(())
    }

    /// The format under which the image is to be opened again: drivers for a file or a device as such
    /// are no formats.
    fn backing_format(&self) -> &str {
        match self.disk.image_format.as_str() {
            "file" | "host_device" => "raw",
            format => format,
        }
    }

    /// Copies what the guest wrote back into the image and lets the guest go on there.
    fn merge(
        &mut self,
        qmp: &mut Qmp,
        limit: Duration,
        merge_limit: Duration,
    ) -> Result<(), DiskError> {
        // A switch that was never confirmed may not have happened.
        if !self.is_in_use(qmp, limit)? {
            self.stage = Stage::Node;
            return Ok(());
        }
        let merged = self.commit(qmp, limit, merge_limit);
        if merged.is_ok() {
            self.stage = Stage::Node;
        } else {
            // Running on, it would go on taking the guest's disk bandwidth.
            let cancel = json!({"device": self.node, "force": true});
            let _ = qmp.execute("block-job-cancel", cancel, limit);
        }
        merged.map_err(|source| DiskError::Merge {
            overlay: self.disk.overlay.clone(),
            image: self.disk.image.clone(),
            node: self.node.clone(),
            base: self.disk.node.clone(),
            source: Box::new(source),
        })
    }

    fn commit(
        &self,
        qmp: &mut Qmp,
        limit: Duration,
        merge_limit: Duration,
    ) -> Result<(), DiskError> {
        let arguments = json!({
            "job-id": self.node, "device": self.node, "base-node": self.disk.node,
            "auto-dismiss": false,
        });
        qmp.execute("block-commit", arguments, limit)?;
        wait_for_job(qmp, &self.node, "ready", merge_limit)?;
        qmp.execute("job-complete", json!({"id": self.node}), limit)?;
        wait_for_job(qmp, &self.node, "concluded", merge_limit)?;
        dismiss_job(qmp, &self.node, limit)
    }

    fn is_in_use(&self, qmp: &mut Qmp, limit: Duration) -> Result<bool, QmpError> {
        let list = qmp.execute("query-block", json!({}), limit)?;
        let devices = list.as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(devices.iter().any(|device| device["inserted"]["node-name"] == json!(self.node)))
    }

    /// Takes an overlay without content of its own out of QEMU, and deletes its file.
    fn remove(&self, qmp: &mut Qmp, limit: Duration) -> Result<(), DiskError> {
        let left = |text: String| DiskError::Left { path: self.disk.overlay.clone(), text };
        let nodes = match self.stage {
            // In use: whoever calls for that has a bug, the guest shall not pay for it.
            Stage::Active => return Err(left("the guest is using it".into())),
            Stage::Node => vec![self.node.clone(), self.file_node()],
            Stage::Protocol => vec![self.file_node()],
            Stage::File => vec![],
        };
        for node in nodes {
            qmp.execute("blockdev-del", json!({"node-name": node}), limit)
                .map_err(|error| left(error.to_string()))?;
        }
        std::fs::remove_file(&self.disk.overlay).map_err(|error| left(error.to_string()))
    }
}

/// Waits until the job has come to `wanted`; an error if it ended without success.
fn wait_for_job(qmp: &mut Qmp, job: &str, wanted: &str, limit: Duration) -> Result<(), DiskError> {
    let failed = |text: String| DiskError::Job { job: job.into(), text };
    let deadline = Instant::now() + limit;
    loop {
        let jobs = qmp.execute("query-jobs", json!({}), limit)?;
        let jobs = jobs.as_array().map(Vec::as_slice).unwrap_or_default();
        let Some(found) = jobs.iter().find(|entry| entry["id"] == json!(job)) else {
            return Err(failed("it is gone".into()));
        };
        if let Some(error) = found["error"].as_str() {
            let text = error.to_owned();
            // Without effect if it has not concluded yet; nothing depends on it.
            let _ = dismiss_job(qmp, job, limit);
            return Err(failed(text));
        }
        match found["status"].as_str() {
            Some(status) if status == wanted => return Ok(()),
            Some("concluded") => return Err(failed("it ended too early".into())),
            _ if Instant::now() >= deadline => {
                return Err(failed(format!("it was not {wanted} within {limit:?}")));
            }
            _ => std::thread::sleep(JOB_POLL_INTERVAL),
        }
    }
}

fn dismiss_job(qmp: &mut Qmp, job: &str, limit: Duration) -> Result<(), DiskError> {
    qmp.execute("job-dismiss", json!({"id": job}), limit)?;
    Ok(())
}

/// `IMAGE.livesnap-MILLISECONDS.qcow2`, where IMAGE loses what an earlier snapshot appended.
fn overlay_path(image: &Path, directory: Option<&Path>, now: Duration) -> PathBuf {
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.split_once(OVERLAY_INFIX).map_or(&*name, |(stem, _)| stem);
    let name = format!("{stem}{OVERLAY_INFIX}{}.qcow2", now.as_millis());
    directory.or_else(|| image.parent()).unwrap_or_else(|| Path::new(".")).join(name)
}

/// Creates an empty `overlay` that who may use `image` may use too; returns `image`, opened for flushing.
fn create_like(image: &Path, overlay: &Path) -> io::Result<File> {
    let image = File::open(image)?;
    let like = image.metadata()?;
    let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(overlay)?;
    let result = fchown(&created, Some(like.uid()), Some(like.gid()))
        .and_then(|()| created.set_permissions(PermissionsExt::from_mode(like.mode() & 0o666)));
    match result {
        Ok(()) => Ok(image),
        Err(error) => {
            // Empty and ours: nothing is lost with it.
            let _ = std::fs::remove_file(overlay);
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
    use super::*;

    fn entry(image: &Path, change: impl FnOnce(&mut Value)) -> Value {
        let mut entry = json!({
            "device": "", "qdev": "/machine/peripheral/disk0/virtio-backend", "removable": false,
            "inserted": {
                "ro": false, "drv": "qcow2", "node-name": "#block1", "encrypted": false,
                "cache": {"direct": true, "no-flush": false, "writeback": true},
                "image": {"filename": image, "virtual-size": 4096, "backing-image": {
                    "filename": "base.raw", "backing-image": {"filename": "/lowest.raw"}}},
            },
        });
        change(&mut entry);
        entry
    }

    #[test]
    fn only_writable_fixed_disks_with_local_images_take_part() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let seen =
            |change: fn(&mut Value)| examine(&entry(file.path(), change), Some(Path::new("/work")));
        let found = seen(|_| {}).unwrap().unwrap();
        assert_eq!(found.device, "/machine/peripheral/disk0/virtio-backend");
        assert_eq!(found.image, file.path());
        assert_eq!(found.backing_chain, [Path::new("/work/base.raw"), Path::new("/lowest.raw")]);
        assert_eq!(found.cache, Cache { direct: true, no_flush: false });
        assert_eq!(seen(|e| e["removable"] = json!(true)), None);
        assert_eq!(seen(|e| e["inserted"]["ro"] = json!(true)), None);
        assert_eq!(seen(|e| e["inserted"] = json!(null)), None);
        let unfit: [fn(&mut Value); 4] = [
            |e| e["inserted"]["image"]["filename"] = json!("json:{\"driver\":\"raw\"}"),
            |e| e["inserted"]["image"]["filename"] = json!("/dev/null"),
            |e| e["inserted"]["encrypted"] = json!(true),
            |e| e["inserted"]["node-name"] = json!(3),
        ];
        for change in unfit {
            assert!(matches!(seen(change), Some(Err(_))));
        }
    }

    #[test]
    fn overlay_names_do_not_pile_up() {
        let now = Duration::from_millis(1_700_000_000_123);
        let first = overlay_path(Path::new("/images/a.qcow2"), None, now);
        assert_eq!(first, Path::new("/images/a.qcow2.livesnap-1700000000123.qcow2"));
        let second = overlay_path(&first, Some(Path::new("/other")), Duration::from_millis(5));
        assert_eq!(second, Path::new("/other/a.qcow2.livesnap-5.qcow2"));
    }

    #[test]
    fn an_overlay_gets_the_images_owner_and_mode_and_never_replaces_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let (image, overlay) = (dir.path().join("image"), dir.path().join("overlay"));
        std::fs::write(&image, "x").unwrap();
        std::fs::set_permissions(&image, PermissionsExt::from_mode(0o640)).unwrap();
        create_like(&image, &overlay).unwrap();
        assert_eq!(overlay.metadata().unwrap().mode() & 0o777, 0o640);
        let error = create_like(&image, &overlay).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(overlay.exists());
    }
}
