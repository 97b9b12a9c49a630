//! Writer against reader, on real files: what goes in comes out, and nothing altered gets by.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use proptest::prelude::*;
use tempfile::TempDir;

use super::reader::{Stream, StreamError};
use super::*;
use crate::Reason;
use crate::address::{HostVirtAddr, PAGE_BYTES, PageIndex};
use crate::ram::{RamBlock, RamLayout};
use crate::vmm::{DeviceState, Disk, DiskSnapshot, MachineDescription, RunState};

const MACHINE: &str = "pc-q35-10.0";

/// What a test wants to write.
#[derive(Clone, Debug)]
struct Sample {
    /// Pages of each block, and which of them are stored.
    blocks: Vec<Vec<bool>>,
    device_state: DeviceState,
}

impl Sample {
    fn small() -> Self {
        let stored = (0..70).map(|page| page % 3 == 0).collect();
        let device_state = DeviceState::QemuSections(b"\x04 devices".to_vec());
        Self { blocks: vec![stored, vec![true; 2]], device_state }
    }

    fn layout(&self) -> RamLayout {
        let mut hva = 0x7000_0000_0000;
        let blocks = self.blocks.iter().enumerate().map(|(number, pages)| {
            let block = RamBlock {
                id: format!("block{number}"),
                hva: HostVirtAddr(hva),
                len_bytes: pages.len() as u64 * PAGE_BYTES,
                page_size_bytes: PAGE_BYTES,
                store_zero_pages: pages.iter().all(|&stored| stored),
            };
            hva += block.len_bytes;
            block
        });
        RamLayout::new(blocks.collect()).unwrap()
    }

    /// Pages that are stored.
    fn stored(&self, layout: &RamLayout) -> Vec<PageIndex> {
        let pages = self.blocks.iter().enumerate().flat_map(|(block, pages)| {
            let first = layout.block_run(block).first.0;
            (first..).zip(pages).filter_map(|(page, &stored)| stored.then_some(PageIndex(page)))
        });
        pages.collect()
    }

    /// Writes the sample as the engine would, up to the commit.
    fn commit(&self, destination: &Path, facts: SnapshotFacts) -> Result<Manifest, ImageError> {
        let layout = self.layout();
        let plan = FilePlan::new(MACHINE, &layout).unwrap();
        let staging = Staging::create(destination)?;
        let ram = File::options().write(true).open(staging.ram_path()).unwrap();
        let mut bitmap = vec![0_u64; plan::index(layout.page_slots() / 64)];
        let mut checksums = vec![0_u32; plan::index(layout.page_slots())];
        for page in self.stored(&layout) {
            let content = content(page);
            ram.write_all_at(&content, plan.page_offset(page)).unwrap();
            bitmap[plan::index(page.0 / 64)] |= 1 << (page.0 % 64);
            checksums[plan::index(page.0)] = crc32c::crc32c(&content);
        }
        staging.commit(&layout, &plan, &bitmap, &checksums, &self.device_state, facts)
    }
}

/// A page's content, different from all others'.
fn content(page: PageIndex) -> Vec<u8> {
    page.0.to_le_bytes().repeat(512)
}

fn facts() -> SnapshotFacts {
    SnapshotFacts {
        machine: MachineDescription { machine_type: MACHINE.into(), ..Default::default() },
        run_state: RunState::Running,
        disks: DiskSnapshot::default(),
        taken_at: UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
        report: serde_json::json!({"downtime_ns": 2_100_000}),
    }
}

fn verify(dir: &Path) -> Result<VerifyReport, ImageError> {
    Snapshot::open(dir)?.verify(&mut |_, _| {})
}

/// A committed small sample, and where it is.
fn committed() -> (TempDir, PathBuf) {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("snap");
    Sample::small().commit(&dir, facts()).unwrap();
    (temp, dir)
}

fn flip(path: &Path, bit: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    byte[0] ^= 1 << (bit % 8);
    file.write_all_at(&byte, bit / 8).unwrap();
}

#[test]
fn a_committed_snapshot_opens_verifies_and_is_private() {
    let (temp, dir) = committed();
    let snapshot = Snapshot::open(&dir).unwrap();
    let mut calls = Vec::new();
    let report = snapshot.verify(&mut |done, total| calls.push((done, total))).unwrap();
    assert_eq!(report.pages, 24 + 2);
    assert_eq!(calls.first(), Some(&(0, 26 * PAGE_BYTES)));
    assert_eq!(calls.last(), Some(&(26 * PAGE_BYTES, 26 * PAGE_BYTES)));
    assert_eq!(snapshot.manifest().taken_at_unix_ms, 1_700_000_000_123);
    assert_eq!(snapshot.manifest().ram.total_bytes(), 72 * PAGE_BYTES);
    let names: Vec<_> =
        fs::read_dir(temp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["snap"], "nothing but the snapshot stays behind");
    assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
    for entry in fs::read_dir(&dir).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().mode() & 0o777, 0o600);
    }
}

#[test]
fn an_empty_directory_becomes_the_snapshot_and_anything_else_is_refused() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("snap");
    fs::create_dir(&dir).unwrap();
    Sample::small().commit(&dir, facts()).unwrap();
    verify(&dir).unwrap();
    let file = temp.path().join("file");
    fs::write(&file, "").unwrap();
    for occupied in [dir.as_path(), &file, Path::new("/"), &temp.path().join("no/such")] {
        let error = Staging::create(occupied).unwrap_err();
        assert_eq!(error.reason(), Reason::BadDestination, "{error}");
    }
}

#[test]
fn what_appears_meanwhile_is_not_overwritten() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("snap");
    let layout = Sample::small().layout();
    let plan = FilePlan::new(MACHINE, &layout).unwrap();
    let staging = Staging::create(&dir).unwrap();
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("precious"), "data").unwrap();
    // Block 1 must be stored whole.
    let (bitmap, checksums) = ([0, 0, 3], [0; 192]);
    let state = DeviceState::QemuSections(vec![]);
    let error = staging.commit(&layout, &plan, &bitmap, &checksums, &state, facts()).unwrap_err();
    assert_eq!(error.reason(), Reason::BadDestination);
    assert_eq!(fs::read(dir.join("precious")).unwrap(), b"data");
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1, "the partial directory is removed");
}

#[test]
fn a_live_partial_is_respected_and_a_stale_one_removed() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("snap");
    let staging = Staging::create(&dir).unwrap();
    assert!(matches!(Staging::create(&dir), Err(ImageError::Busy { .. })));
    drop(staging);
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    let stale = temp.path().join(".snap.livesnap-partial");
    fs::create_dir(&stale).unwrap();
    fs::write(stale.join(MANIFEST_FILE), "{").unwrap();
    let staging = Staging::create(&dir).unwrap();
    assert!(!stale.join(MANIFEST_FILE).exists());
    assert_eq!(fs::metadata(staging.ram_path()).unwrap().len(), 0);
}

#[test]
fn tables_that_contradict_the_layout_are_refused() {
    let temp = TempDir::new().unwrap();
    let layout = Sample::small().layout();
    let plan = FilePlan::new(MACHINE, &layout).unwrap();
    let state = DeviceState::QemuSections(vec![]);
    let commit = |bitmap: &[u64], checksums: &[u32]| {
        let staging = Staging::create(&temp.path().join("snap")).unwrap();
        staging.commit(&layout, &plan, bitmap, checksums, &state, facts())
    };
    let refused = [
        commit(&[0, 0], &[0; 192]),
        commit(&[0, 0, 3], &[0; 191]),
        commit(&[0, 1 << 6, 3], &[0; 192]),
        commit(&[0, 0, 1], &[0; 192]),
    ];
    for result in refused {
        assert!(matches!(result, Err(ImageError::Inconsistent { .. })), "{result:?}");
    }
    commit(&[0, 0, 3], &[0; 192]).unwrap();
}

#[test]
fn a_paused_guest_is_marked_as_paused() {
    let mut sections =
        b"\x04\0\0\0\x07\x0bglobalstate\0\0\0\0\0\0\0\x01\0\0\0\x08running\0".to_vec();
    sections.extend([0; 97]);
    let sample = Sample { device_state: DeviceState::QemuSections(sections), ..Sample::small() };
    let temp = TempDir::new().unwrap();
    for (name, state, text) in
        [("r", RunState::Running, "running\0"), ("p", RunState::Paused, "paused\0\0")]
    {
        let dir = temp.path().join(name);
        sample.commit(&dir, SnapshotFacts { run_state: state, ..facts() }).unwrap();
        let bytes = fs::read(dir.join(RAM_FILE)).unwrap();
        let at = plan::index(Snapshot::open(&dir).unwrap().stream.devices_offset) + 5 + 12 + 8 + 4;
        assert_eq!(&bytes[at..at + 8], text.as_bytes());
    }
}

#[test]
fn missing_cut_and_foreign_files_are_named() {
    for name in [RAM_FILE, CHECKSUM_FILE, MANIFEST_FILE] {
        let (_temp, dir) = committed();
        let path = dir.join(name);
        let len = fs::metadata(&path).unwrap().len();
        // The manifest's last byte is a line feed, which nobody misses.
        File::options().write(true).open(&path).unwrap().set_len(len - 2).unwrap();
        let error = Snapshot::open(&dir).unwrap_err();
        assert_eq!(error.reason(), Reason::Corrupt, "{error}");
        assert!(error.to_string().contains(name), "{error}");
        fs::remove_file(&path).unwrap();
        let error = Snapshot::open(&dir).unwrap_err();
        let reason = if name == MANIFEST_FILE { Reason::NotASnapshot } else { Reason::Corrupt };
        assert_eq!(error.reason(), reason, "{error}");
        fs::create_dir(&path).unwrap();
        assert!(Snapshot::open(&dir).is_err(), "a directory is no file");
    }
    assert!(matches!(Snapshot::open(Path::new("/no/such")), Err(ImageError::NotASnapshot { .. })));
}

#[test]
fn a_later_format_is_refused_by_name() {
    let (_temp, dir) = committed();
    fs::write(dir.join(MANIFEST_FILE), r#"{"format": 2, "unknown": {}}"#).unwrap();
    let error = Snapshot::open(&dir).unwrap_err();
    assert!(matches!(error, ImageError::UnknownFormat { format: 2, .. }), "{error}");
}

#[test]
fn the_first_bad_page_is_named() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("snap");
    // More than one piece, so that several workers meet bad pages.
    let blocks = vec![vec![true; 40_000]];
    let sample = Sample { blocks, ..Sample::small() };
    sample.commit(&dir, facts()).unwrap();
    let offset =
        |page: u64| Snapshot::open(&dir).unwrap().stream.blocks[0].pages_offset + page * 4096;
    for page in [39_999, 20_000, 12_345] {
        flip(&dir.join(RAM_FILE), (offset(page) + 17) * 8);
    }
    let error = verify(&dir).unwrap_err();
    let (expected_offset, path) = (offset(12_345), dir.join(RAM_FILE));
    assert!(
        matches!(&error, ImageError::BadPage { page: 12_345, offset, block, path: at, .. }
            if *offset == expected_offset && block == "block0" && *at == path),
        "{error}"
    );
}

#[test]
fn a_changed_or_missing_disk_image_is_noticed() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("snap");
    let image = temp.path().join("disk.img");
    fs::write(&image, "disk").unwrap();
    let disk = Disk {
        device: "virtio0".into(),
        node: "node0".into(),
        image: "disk.img".into(),
        image_format: "raw".into(),
        backing_chain: vec!["/dev/null".into()],
        size_bytes: 4,
        overlay: "overlay.qcow2".into(),
    };
    let mut facts = facts();
    facts.machine.working_dir = Some(temp.path().into());
    facts.disks.disks = vec![disk];
    Sample::small().commit(&dir, facts).unwrap();
    let report = verify(&dir).unwrap();
    assert_eq!((report.disk_files, report.disk_files_unchecked), (1, vec!["/dev/null".into()]));

    let then = fs::metadata(&image).unwrap().modified().unwrap();
    let file = File::options().write(true).open(&image).unwrap();
    file.set_modified(then + Duration::from_nanos(1)).unwrap();
    assert!(matches!(verify(&dir), Err(ImageError::DiskChanged { .. })));
    file.set_len(5).unwrap();
    file.set_modified(then).unwrap();
    assert!(verify(&dir).unwrap_err().to_string().contains("5 bytes long, not 4"));
    file.set_len(4).unwrap();
    file.set_modified(then).unwrap();
    verify(&dir).unwrap();
    fs::remove_file(&image).unwrap();
    assert!(verify(&dir).unwrap_err().to_string().contains("missing"));
}

#[test]
fn a_full_disk_is_no_space_and_other_errors_are_io() {
    let path = Path::new("x");
    let full = ImageError::io("write to", path, std::io::Error::from(ErrorKind::StorageFull));
    assert_eq!(full.reason(), Reason::NoSpace);
    let other = ImageError::io("write to", path, rustix::io::Errno::IO);
    assert_eq!(other.reason(), Reason::Io);
    assert!(free_bytes(Path::new("/")).unwrap() > 0);
}

fn sample() -> impl Strategy<Value = Sample> {
    let block = prop_oneof![
        prop::collection::vec(any::<bool>(), 1..200),
        (1_usize..200).prop_map(|pages| vec![true; pages]),
    ];
    let state = prop::collection::vec(any::<u8>(), 0..300);
    (prop::collection::vec(block, 1..5), state, any::<bool>()).prop_map(|(blocks, bytes, qemu)| {
        let device_state =
            if qemu { DeviceState::QemuSections(bytes) } else { DeviceState::Opaque(bytes) };
        Sample { blocks, device_state }
    })
}

/// Every byte that a restore depends on: files, and the ranges of their bytes.
fn vouched_for(dir: &Path, sample: &Sample) -> Vec<(PathBuf, std::ops::Range<u64>)> {
    let snapshot = Snapshot::open(dir).unwrap();
    let stream = &snapshot.stream;
    let ram = snapshot.ram_path();
    let mut out = vec![(ram.clone(), 0..stream.blocks[0].header_offset)];
    for (block, pages) in stream.blocks.iter().zip(&sample.blocks) {
        out.push((ram.clone(), block.header_offset..block.bitmap_offset + block.bitmap_bytes()));
        for (page, _) in (0_u64..).zip(pages).filter(|&(_, &stored)| stored) {
            let offset = block.pages_offset + page * PAGE_BYTES;
            out.push((ram.clone(), offset..offset + PAGE_BYTES));
        }
    }
    out.push((ram, stream.trailer_offset..snapshot.manifest().files.ram.len_bytes));
    for name in [CHECKSUM_FILE, DEVICE_STATE_FILE, MANIFEST_FILE] {
        if let Ok(metadata) = fs::metadata(dir.join(name)) {
            out.push((dir.join(name), 0..metadata.len()));
        }
    }
    out.retain(|(_, range)| !range.is_empty());
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_written_is_read(sample in sample()) {
        let temp = TempDir::new().unwrap();
        let dir = temp.path().join("snap");
        let manifest = sample.commit(&dir, facts()).unwrap();
        let snapshot = Snapshot::open(&dir).unwrap();
        prop_assert_eq!(snapshot.manifest(), &manifest);
        let layout = sample.layout();
        let report = snapshot.verify(&mut |_, _| {}).unwrap();
        prop_assert_eq!(report.pages, sample.stored(&layout).len() as u64);
        let ram = File::open(snapshot.ram_path()).unwrap();
        for (block, pages) in snapshot.stream.blocks.iter().zip(&sample.blocks) {
            let mut bitmap = vec![0; plan::index(block.bitmap_bytes())];
            ram.read_exact_at(&mut bitmap, block.bitmap_offset).unwrap();
            for (page, &stored) in pages.iter().enumerate() {
                prop_assert_eq!(bitmap[page >> 3] >> (page & 7) & 1 == 1, stored);
            }
        }
        for page in sample.stored(&layout) {
            let block = layout.block_of(page);
            let within = page.0 - layout.block_run(block).first.0;
            let mut found = vec![0; 4096];
            let offset = snapshot.stream.blocks[block].pages_offset + within * PAGE_BYTES;
            ram.read_exact_at(&mut found, offset).unwrap();
            prop_assert!(found == content(page));
        }
    }

    #[test]
    fn any_flipped_bit_is_found(
        sample in sample(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 32),
    ) {
        let temp = TempDir::new().unwrap();
        let dir = temp.path().join("snap");
        sample.commit(&dir, facts()).unwrap();
        let regions = vouched_for(&dir, &sample);
        for (region, bit) in flips {
            let (path, range) = region.get(&regions);
            let bits = plan::index((range.end - range.start) * 8);
            let bit = range.start * 8 + bit.index(bits) as u64;
            flip(path, bit);
            prop_assert!(verify(&dir).is_err(), "bit {} of {}", bit, path.display());
            flip(path, bit);
        }
        prop_assert!(verify(&dir).is_ok());
    }

    #[test]
    fn any_flipped_bit_of_the_manifest_is_found(bit in any::<prop::sample::Index>()) {
        let (_temp, dir) = committed();
        let path = dir.join(MANIFEST_FILE);
        let bits = plan::index(fs::metadata(&path).unwrap().len() * 8);
        flip(&path, bit.index(bits) as u64);
        prop_assert!(verify(&dir).is_err());
    }
}

proptest! {
    #[test]
    fn random_bytes_are_no_stream(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        prop_assert!(Stream::read(bytes.as_slice(), bytes.len() as u64).is_err());
    }

    #[test]
    fn an_altered_header_neither_panics_nor_allocates_by_its_word(
        changes in prop::collection::vec((0_usize..0x100, any::<u8>()), 1..8),
        len_bytes in any::<u64>(),
    ) {
        let layout = Sample::small().layout();
        let plan = FilePlan::new(MACHINE, &layout).unwrap();
        let mut bytes = vec![0; plan::index(plan.trailer_offset())];
        for (offset, part) in plan.metadata(&[0, 0, 0]) {
            bytes[plan::index(offset)..][..part.len()].copy_from_slice(&part);
        }
        bytes.extend(FilePlan::trailer(&[]));
        prop_assert!(Stream::read(bytes.as_slice(), bytes.len() as u64).is_ok());
        for (at, value) in changes {
            bytes[at] = value;
        }
        let _ = Stream::read(bytes.as_slice(), len_bytes);
    }

    #[test]
    fn random_manifests_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        prop_assert!(Manifest::decode(Path::new("m"), &bytes).is_err());
    }
}

#[test]
fn lengths_that_no_file_has_are_refused() {
    let mut bytes =
        b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x05\x1aconfiguration/capabilities\0\0\0\x01".to_vec();
    bytes.extend(b"\0\0\0\x01\x0amapped-ram\x01lsnp\x03ram\0\0\0\0\0\0\0\x04");
    bytes.extend(b"\xff\xff\xff\xff\xff\xff\xf0\x04\x01x\xff\xff\xff\xff\xff\xff\xf0\0");
    bytes.extend(b"\0\0\0\x01\0\0\0\0\0\0\x10\0");
    let bitmap_offset = bytes.len() as u64 + 16;
    bytes.extend(bitmap_offset.to_be_bytes());
    let bitmap_bytes = (u64::MAX / PAGE_BYTES).div_ceil(64) * 8;
    bytes.extend((bitmap_offset + bitmap_bytes).next_multiple_of(1 << 20).to_be_bytes());
    let error = Stream::read(bytes.as_slice(), i64::MAX as u64).unwrap_err();
    assert!(matches!(error, StreamError::Truncated { .. }), "{error}");
}
