//! The image on disk against QEMU's own: same layout, and QEMU loads what livesnap composes.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use livesnap_tests::is_root_or_skip;
use livesnap_tests::mapped_ram::MappedRam;
use livesnap_tests::qemu::{Load, Machine, Qemu};
use serde_json::json;
use snapshot_core::address::{HostVirtAddr, PAGE_BYTES, PageIndex};
use snapshot_core::image::reader::Stream;
use snapshot_core::image::{FilePlan, Snapshot, SnapshotFacts, Staging};
use snapshot_core::ram::{RamBlock, RamLayout};
use snapshot_core::vmm::{DeviceState, DiskSnapshot, MachineDescription, RunState};

const BOOT: Duration = Duration::from_secs(120);
/// Blocks below this are ROMs and tables, which QEMU does not zero before it loads them.
const STORED_WHOLE_BELOW_BYTES: u64 = 32 << 20;
/// Where the section id of RAM, the one thing that livesnap chooses for itself, stands behind the machine type.
const SECTION_ID_AFTER_MACHINE_TYPE: usize = 0x30;

/// A stopped guest, as QEMU saved it.
struct Native {
    dir: tempfile::TempDir,
    stream: Stream,
    sections: Vec<u8>,
}

impl Native {
    fn ram(&self) -> PathBuf {
        self.dir.path().join("native")
    }

    fn save(source: &mut Qemu) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let ram = dir.path().join("native");
        source.save_mapped_ram(&ram).unwrap();
        let devices = dir.path().join("devices");
        source.qmp("xen-save-devices-state", json!({"filename": devices, "live": false})).unwrap();
        let devices = fs::read(devices).unwrap();
        let sections = devices[8..devices.len() - 1].to_vec();
        let file = File::open(&ram).unwrap();
        let stream = Stream::read(&file, file.metadata().unwrap().len()).unwrap();
        Self { dir, stream, sections }
    }

    fn layout(&self) -> RamLayout {
        let mut hva = 0x1000;
        let blocks = self.stream.blocks.iter().map(|block| {
            let out = RamBlock {
                id: block.id.clone(),
                hva: HostVirtAddr(hva),
                len_bytes: block.len_bytes,
                page_size_bytes: PAGE_BYTES,
                store_zero_pages: block.len_bytes < STORED_WHOLE_BELOW_BYTES,
            };
            hva += block.len_bytes;
            out
        });
        RamLayout::new(blocks.collect()).unwrap()
    }

    /// Writes the same guest as livesnap does.
    fn compose(&self, destination: &Path, run_state: RunState) {
        let layout = self.layout();
        let plan = FilePlan::new(&self.stream.machine_type, &layout).unwrap();
        let staging = Staging::create(destination).unwrap();
        let to = File::options().write(true).open(staging.ram_path()).unwrap();
        let from = MappedRam::open(&self.ram()).unwrap();
        let file = File::open(self.ram()).unwrap();
        let slots = usize::try_from(layout.page_slots()).unwrap();
        let (mut stored, mut checksums) = (vec![0_u64; slots / 64], vec![0_u32; slots]);
        for (number, block) in from.blocks.iter().enumerate() {
            let whole = layout.blocks()[number].store_zero_pages;
            let first = layout.block_run(number).first.0;
            for page in (0..block.pages()).filter(|&page| whole || block.is_present(page)) {
                let mut content = [0; livesnap_guest::page::PAGE_BYTES];
                if block.is_present(page) {
                    file.read_exact_at(&mut content, block.pages_offset + page * PAGE_BYTES)
                        .unwrap();
                }
                let slot = usize::try_from(first + page).unwrap();
                to.write_all_at(&content, plan.page_offset(PageIndex(first + page))).unwrap();
                stored[slot / 64] |= 1 << (slot % 64);
                checksums[slot] = crc32c::crc32c(&content);
            }
        }
        // Nothing but the machine's type matters here.
        let machine_type = self.stream.machine_type.clone();
        let facts = SnapshotFacts {
            machine: MachineDescription { machine_type, ..MachineDescription::default() },
            run_state,
            disks: DiskSnapshot::default(),
            taken_at: SystemTime::now(),
            report: json!({}),
        };
        let state = DeviceState::QemuSections(self.sections.clone());
        staging.commit(&layout, &plan, &stored, &checksums, &state, facts).unwrap();
    }
}

#[test]
fn a_composed_file_has_qemus_layout_and_qemu_goes_on_from_it() {
    for machine in [Machine::Q35, Machine::Pc] {
        let builder = Qemu::builder().machine(machine).vcpus(2).load(Load::default());
        let mut source = builder.start().unwrap();
        source.wait_ready(BOOT).unwrap();
        source.wait_heartbeat(BOOT, |heartbeat| heartbeat.laps >= 1).unwrap();
        let native = Native::save(&mut source);
        drop(source);
        let running = native.dir.path().join("running");
        native.compose(&running, RunState::Running);
        let paused = native.dir.path().join("paused");
        native.compose(&paused, RunState::Paused);

        let snapshot = Snapshot::open(&running).unwrap();
        snapshot.verify(&mut |_, _| {}).unwrap();
        compare_layout(&native, &snapshot);

        let builder = builder.incoming();
        let mut restored = builder.start().unwrap();
        restored.load_mapped_ram(&snapshot.ram_path()).unwrap();
        assert_eq!(restored.status().unwrap(), "running");
        restored.wait_laps(1, BOOT).unwrap();
        drop(restored);

        let mut restored = builder.start().unwrap();
        restored.load_mapped_ram(&Snapshot::open(&paused).unwrap().ram_path()).unwrap();
        assert_eq!(restored.status().unwrap(), "paused");
        restored.qmp("cont", json!({})).unwrap();
        restored.wait_laps(1, BOOT).unwrap();
    }
}

/// Everything up to the device sections stands where QEMU put it, and the headers are the same bytes.
fn compare_layout(native: &Native, snapshot: &Snapshot) {
    let ours = File::open(snapshot.ram_path()).unwrap();
    let theirs = File::open(native.ram()).unwrap();
    let stream = Stream::read(&ours, ours.metadata().unwrap().len()).unwrap();
    assert_eq!(stream.blocks, native.stream.blocks);
    assert_eq!(stream.trailer_offset, native.stream.trailer_offset);
    let read = |file: &File, from: u64, to: u64| {
        let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
        file.read_exact_at(&mut bytes, from).unwrap();
        bytes
    };
    let end = stream.blocks[0].header_offset;
    let id_at = 0x0d + stream.machine_type.len() + SECTION_ID_AFTER_MACHINE_TYPE;
    let header = |file: &File| {
        let mut bytes = read(file, 0, end);
        bytes[id_at..id_at + 4].fill(0);
        bytes
    };
    assert_eq!(header(&ours), header(&theirs));
    for block in &stream.blocks {
        let bytes = |file: &File| read(file, block.header_offset, block.bitmap_offset);
        assert_eq!(bytes(&ours), bytes(&theirs));
    }
}

/// Device sections by name and instance: `04 id name instance version body 7e id`, one behind the other.
fn device_sections(ram_file: &Path) -> BTreeMap<(String, u32), Vec<u8>> {
    let file = File::open(ram_file).unwrap();
    let stream = Stream::read(&file, file.metadata().unwrap().len()).unwrap();
    let mut bytes =
        vec![0; usize::try_from(file.metadata().unwrap().len() - stream.devices_offset).unwrap()];
    file.read_exact_at(&mut bytes, stream.devices_offset).unwrap();
    let be32 = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut sections = BTreeMap::new();
    let mut at = 0;
    while bytes[at] == 0x04 {
        let name_end = at + 6 + usize::from(bytes[at + 5]);
        let name = String::from_utf8(bytes[at + 6..name_end].to_vec()).unwrap();
        let footer = [&[0x7e], &bytes[at + 1..at + 5]].concat();
        let body = name_end + 8;
        // Bodies do not tell their length: the next footer of this id that a section or the end follows.
        let len = (0..)
            .find(|len| {
                bytes[body + len..].starts_with(&footer)
                    && matches!(bytes[body + len + 5], 0x04 | 0x00)
            })
            .unwrap();
        sections.insert((name, be32(name_end)), bytes[body..body + len].to_vec());
        at = body + len + footer.len();
    }
    assert_eq!(bytes[at], 0x00, "the sections end with the end mark");
    sections
}

/// Checksums of all pages that are not zero.
fn pages(ram: &MappedRam) -> BTreeMap<(String, u64), u32> {
    let mut pages = BTreeMap::new();
    ram.for_each_page(|block, page, content| {
        if content.iter().any(|&byte| byte != 0) {
            pages.insert((block.name.clone(), page), crc32c::crc32c(content));
        }
    })
    .unwrap();
    pages
}

#[test]
fn a_snapshot_of_a_stopped_guest_is_what_qemu_saves_but_for_the_clock() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    for machine in [Machine::Q35, Machine::Pc] {
        let mut source = Qemu::builder().machine(machine).vcpus(2).start().unwrap();
        source.wait_ready(BOOT).unwrap();
        source.qmp("stop", json!({})).unwrap();
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        livesnap_tests::livesnap::snapshot(&source, &ours, &[]).unwrap();
        let ours = ours.join("ram.mapped-ram");
        source.save_mapped_ram(&theirs).unwrap();

        let (our_ram, their_ram) =
            (MappedRam::open(&ours).unwrap(), MappedRam::open(&theirs).unwrap());
        let place = |ram: &MappedRam| -> Vec<_> {
            let blocks = ram.blocks.iter();
            blocks.map(|block| (block.name.clone(), block.used_bytes, block.pages_offset)).collect()
        };
        assert_eq!(place(&our_ram), place(&their_ram));
        let (our_pages, their_pages) = (pages(&our_ram), pages(&their_ram));
        assert!(our_pages.len() > 4096, "{}", our_pages.len());
        assert!(our_pages == their_pages, "RAM differs");

        let (ours, theirs) = (device_sections(&ours), device_sections(&theirs));
        assert!(ours.len() >= 20, "{:?}", ours.keys());
        assert!(ours.keys().eq(theirs.keys()), "{:?} {:?}", ours.keys(), theirs.keys());
        let different: Vec<_> =
            ours.keys().filter(|key| ours[*key] != theirs[*key]).map(|(name, _)| name).collect();
        // The clock goes on while the guest stands still; globalstate also tells how it came to stand still.
        assert!(
            different.iter().all(|name| ["mc146818rtc", "globalstate"].contains(&name.as_str())),
            "{different:?} of {}",
            ours.len()
        );
    }
}
