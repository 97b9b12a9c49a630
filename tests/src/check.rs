//! Judges whether RAM pages and disk blocks of the self-verifying guest are of one instant.
//!
//! At any true instant, of each worker: the newest `slots` counters are there, each once, without a gap;
//! at most the page in the making is torn; the status page names the newest page or the one before; and
//! no page knows of another worker's page, or of a disk block, that is not there yet.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use livesnap_guest::page::{Header, Kind, MAGIC, PAGE_BYTES, Page, WORKERS_MAX, words_from_bytes};
use livesnap_guest::status::{Field, StatusImage};

use crate::mapped_ram::MappedRam;

/// What a consistent image holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowReport {
    /// The boot that wrote it.
    pub run: u64,
    /// Newest page of each worker.
    pub newest: Vec<u64>,
    /// Ring pages with the right checksum.
    pub ring_pages: u64,
    /// Ring pages in the making.
    pub torn: u64,
    /// Populated pages.
    pub populated: u64,
    /// Newest block on the disk, if the disk was looked at.
    pub disk_newest: Option<u64>,
    /// Inconsistencies that the guest itself had counted by then.
    pub inconsistent: u64,
}

/// Collects pages and blocks in any order, then judges.
#[derive(Debug, Default)]
pub struct Checker {
    status: Vec<StatusImage>,
    ram: Vec<Page>,
    disk: Option<Vec<Page>>,
}

/// Checks the RAM of a mapped-ram file and, if there is one, a raw disk image.
pub fn check_files(mapped_ram: &Path, raw_disk: Option<&Path>) -> Result<WindowReport> {
    let mut checker = Checker::default();
    MappedRam::open(mapped_ram)
        .with_context(|| format!("{} is not a mapped-ram file", mapped_ram.display()))?
        .for_each_page(|_, _, bytes| checker.ram_page(bytes))?;
    if let Some(path) = raw_disk {
        checker.disk_image(path)?;
    }
    checker.finish()
}

impl Checker {
    /// Takes a page of RAM; what is not ours is skipped.
    pub fn ram_page(&mut self, bytes: &[u8]) {
        if !bytes.starts_with(&MAGIC.to_le_bytes()) {
            return;
        }
        let Some(words) = words_from_bytes(bytes) else { return };
        if let Some(status) = StatusImage::read(&words) {
            self.status.push(status);
        } else {
            self.ram.extend(Page::read(&words));
        }
    }

    /// Takes a block of the disk.
    pub fn disk_block(&mut self, bytes: &[u8]) {
        let page = words_from_bytes(bytes).and_then(|words| Page::read(&words));
        self.disk.get_or_insert_default().extend(page);
    }

    /// Takes all blocks of a raw disk image.
    pub fn disk_image(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let blocks = file.metadata().context("cannot tell the size of the disk image")?.len()
            / PAGE_BYTES as u64;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let mut block = [0; PAGE_BYTES];
        for index in 0..blocks {
            reader
                .read_exact(&mut block)
                .with_context(|| format!("cannot read block {index} of {}", path.display()))?;
            self.disk_block(&block);
        }
        Ok(())
    }

    /// Judges; the error says what contradicts one instant.
    pub fn finish(self) -> Result<WindowReport> {
        let status = match self.status[..] {
            [status] => status,
            ref found => bail!("{} status pages instead of one", found.len()),
        };
        let run = status.get(Field::Run);
        let pages: Vec<Page> =
            self.ram.into_iter().filter(|page| page.header().run == run).collect();

        let mut newest = [0; WORKERS_MAX];
        let mut report = WindowReport {
            run,
            newest: Vec::new(),
            ring_pages: 0,
            torn: 0,
            populated: check_populated(&pages, status.get(Field::PopulatePages))?,
            disk_newest: None,
            inconsistent: status.get(Field::Inconsistencies),
        };
        let workers = usize::try_from(status.get(Field::Workers))?;
        ensure!(workers <= WORKERS_MAX, "the status page speaks of {workers} workers");
        for (worker, newest) in newest.iter_mut().enumerate().take(workers) {
            let ring = pages_of(&pages, Kind::Ring, worker);
            let window = Window::of(&ring, status.get(Field::RingSlots))
                .with_context(|| format!("ring of worker {worker}"))?;
            window
                .check_published(status.progress(worker))
                .with_context(|| format!("ring of worker {worker}"))?;
            *newest = window.newest;
            report.newest.push(window.newest);
            report.ring_pages += window.whole;
            report.torn += u64::from(window.torn);
        }
        let mut disk_completed = status.get(Field::DiskCompleted);
        if let Some(blocks) = self.disk {
            let blocks: Vec<Page> =
                blocks.into_iter().filter(|page| page.header().run == run).collect();
            let blocks = pages_of(&blocks, Kind::Disk, 0);
            disk_completed = check_disk(&blocks, &status)?;
            check_known(&blocks, &newest, disk_completed)
                .context("a disk block is ahead of RAM")?;
            report.disk_newest = Some(disk_completed);
        }
        check_known(&pages, &newest, disk_completed)?;
        Ok(report)
    }
}

fn pages_of(pages: &[Page], kind: Kind, worker: usize) -> Vec<Page> {
    pages
        .iter()
        .filter(|page| (page.header().kind, page.header().worker) == (kind, worker))
        .copied()
        .collect()
}

/// The run of counters that a ring holds.
#[derive(Debug)]
struct Window {
    newest: u64,
    whole: u64,
    torn: bool,
}

impl Window {
    fn of(pages: &[Page], slots: u64) -> Result<Self> {
        let mut counters: BTreeMap<u64, u64> = BTreeMap::new();
        let mut seen = HashSet::new();
        let mut torn = false;
        for page in pages {
            let Header { slot, counter, .. } = *page.header();
            ensure!(slot < slots, "slot {slot} of a ring with {slots} slots");
            ensure!(seen.insert(slot), "slot {slot} is there twice");
            match page {
                Page::Whole(_) => {
                    if let Some(other) = counters.insert(counter, slot) {
                        bail!("counter {counter} is both in slot {other} and in slot {slot}");
                    }
                }
                Page::Torn(_) if torn => bail!("a second torn page, in slot {slot}"),
                Page::Torn(_) => torn = true,
            }
        }
        let whole = counters.len() as u64;
        let (Some((&oldest, _)), Some((&newest, _))) =
            (counters.first_key_value(), counters.last_key_value())
        else {
            return Ok(Self { newest: 0, whole, torn });
        };
        ensure!(
            newest - oldest + 1 == whole,
            "counters from {oldest} to {newest} in {whole} pages: not one contiguous window"
        );
        // The page in the making replaces the oldest, once the ring is full.
        let expected = if torn { newest.min(slots - 1) } else { newest.min(slots) };
        ensure!(
            whole == expected,
            "{whole} pages up to counter {newest} instead of {expected}, torn: {torn}"
        );
        Ok(Self { newest, whole, torn })
    }

    /// A page is published when it is whole, so at most the newest is not published yet.
    fn check_published(&self, published: u64) -> Result<()> {
        let ahead = u64::from(!self.torn);
        ensure!(
            (published..=published + ahead).contains(&self.newest),
            "newest page is {}, but {published} was published, torn: {}",
            self.newest,
            self.torn
        );
        Ok(())
    }
}

fn check_populated(pages: &[Page], expected: u64) -> Result<u64> {
    let pages = pages_of(pages, Kind::Populate, 0);
    let mut slots = HashSet::new();
    for page in &pages {
        let Page::Whole(header) = page else {
            bail!("populated page {} is damaged", page.header().slot)
        };
        ensure!(slots.insert(header.slot), "populated page {} is there twice", header.slot);
    }
    let found = slots.len() as u64;
    // 0 is published until all are written.
    ensure!(expected == 0 || found == expected, "{found} populated pages instead of {expected}");
    Ok(found)
}

/// Returns the newest block on the disk.
fn check_disk(blocks: &[Page], status: &StatusImage) -> Result<u64> {
    let window = Window::of(blocks, status.get(Field::DiskSlots)).context("disk")?;
    ensure!(!window.torn, "a disk block is damaged");
    let (completed, submitted) =
        (status.get(Field::DiskCompleted), status.get(Field::DiskSubmitted));
    ensure!(
        (completed..=submitted).contains(&window.newest),
        "newest block on the disk is {}, but RAM says {completed} completed and {submitted} submitted",
        window.newest
    );
    Ok(window.newest)
}

/// No page may know of something that had not happened yet.
fn check_known(pages: &[Page], newest: &[u64; WORKERS_MAX], disk_completed: u64) -> Result<()> {
    for page in pages {
        let Page::Whole(header) = page else { continue };
        for (worker, (known, newest)) in header.peers.iter().zip(newest).enumerate() {
            ensure!(
                known <= newest,
                "{:?} page {} of worker {} knows of page {known} of worker {worker}, whose newest is {newest}",
                header.kind,
                header.counter,
                header.worker
            );
        }
        ensure!(
            header.disk_completed <= disk_completed,
            "{:?} page {} of worker {} knows of disk block {}, but the newest is {disk_completed}",
            header.kind,
            header.counter,
            header.worker,
            header.disk_completed
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use livesnap_guest::page::{PAGE_WORDS, Words, words_to_bytes};

    use super::*;

    const SLOTS: u64 = 8;

    /// A guest of one worker and a disk, to be looked at, and damaged, at any instant.
    struct Guest {
        ring: Vec<Words>,
        disk: Vec<Words>,
        progress: u64,
        disk_counter: u64,
        submitted: u64,
    }

    impl Guest {
        fn at(counter: u64) -> Self {
            let empty = vec![[0; PAGE_WORDS]; usize::try_from(SLOTS).unwrap()];
            let mut guest = Self {
                ring: empty.clone(),
                disk: empty,
                progress: 0,
                disk_counter: 0,
                submitted: 0,
            };
            for _ in 0..counter {
                guest.write_page();
                guest.write_block();
            }
            guest
        }

        fn header(&self, kind: Kind, counter: u64) -> Header {
            let mut peers = [0; WORKERS_MAX];
            peers[0] = self.progress;
            Header {
                kind,
                worker: 0,
                run: 3,
                slot: (counter - 1) % SLOTS,
                counter,
                peers,
                disk_completed: self.disk_counter,
            }
        }

        fn slot(counter: u64) -> usize {
            usize::try_from((counter - 1) % SLOTS).unwrap()
        }

        fn write_page(&mut self) {
            let counter = self.progress + 1;
            self.header(Kind::Ring, counter).write(&mut self.ring[Self::slot(counter)]);
            self.progress = counter;
        }

        fn write_block(&mut self) {
            let counter = self.disk_counter + 1;
            self.submitted = counter;
            self.header(Kind::Disk, counter).write(&mut self.disk[Self::slot(counter)]);
            self.disk_counter = counter;
        }

        fn check(&self) -> Result<WindowReport> {
            let mut checker = Checker::default();
            let fields = [
                (Field::Run, 3),
                (Field::Workers, 1),
                (Field::RingSlots, SLOTS),
                (Field::DiskSlots, SLOTS),
                (Field::DiskSubmitted, self.submitted),
                (Field::DiskCompleted, self.disk_counter),
            ];
            let status = StatusImage::from_fields(&fields, &[self.progress]);
            let mut bytes = [0; PAGE_BYTES];
            for words in [status.words()].into_iter().chain(&self.ring) {
                words_to_bytes(words, &mut bytes);
                checker.ram_page(&bytes);
            }
            for words in &self.disk {
                words_to_bytes(words, &mut bytes);
                checker.disk_block(&bytes);
            }
            checker.finish()
        }
    }

    fn failure(guest: &Guest) -> String {
        format!("{:#}", guest.check().unwrap_err())
    }

    #[test]
    fn any_true_instant_passes() {
        for counter in [0, 1, 5, 8, 9, 100] {
            let report = Guest::at(counter).check().unwrap();
            assert_eq!(
                (report.newest[0], report.disk_newest, report.torn),
                (counter, Some(counter), 0)
            );
            assert_eq!(report.ring_pages, counter.min(SLOTS));
        }
    }

    #[test]
    fn the_page_in_the_making_may_be_torn_or_unpublished() {
        let mut guest = Guest::at(20);
        guest.write_page();
        guest.progress -= 1;
        assert_eq!(guest.check().unwrap().newest, [21]);
        guest.ring[Guest::slot(21)][100] ^= 1;
        assert_eq!(guest.check().unwrap().torn, 1);
    }

    #[test]
    fn a_later_page_among_older_ones_is_found() {
        let (mut early, late) = (Guest::at(20), Guest::at(23));
        early.ring[Guest::slot(22)] = late.ring[Guest::slot(22)];
        assert!(failure(&early).contains("not one contiguous window"), "{}", failure(&early));
    }

    #[test]
    fn a_status_page_of_another_instant_is_found() {
        let mut guest = Guest::at(20);
        guest.progress = 22;
        assert!(failure(&guest).contains("22 was published"), "{}", failure(&guest));
    }

    #[test]
    fn a_second_torn_page_is_found() {
        let mut guest = Guest::at(20);
        guest.ring[0][100] ^= 1;
        guest.ring[1][100] ^= 1;
        assert!(failure(&guest).contains("second torn"), "{}", failure(&guest));
    }

    #[test]
    fn a_lost_page_is_found() {
        let mut guest = Guest::at(20);
        guest.ring[Guest::slot(13)] = [0; PAGE_WORDS];
        assert!(
            failure(&guest).contains("7 pages up to counter 20 instead of 8"),
            "{}",
            failure(&guest)
        );
    }

    #[test]
    fn a_disk_of_another_instant_is_found() {
        let (mut guest, late, early) = (Guest::at(20), Guest::at(21), Guest::at(19));
        guest.disk = late.disk;
        assert!(failure(&guest).contains("newest block on the disk is 21"), "{}", failure(&guest));
        guest.disk = early.disk;
        assert!(failure(&guest).contains("newest block on the disk is 19"), "{}", failure(&guest));
    }

    #[test]
    fn a_page_that_knows_the_future_is_found() {
        let mut guest = Guest::at(20);
        let mut header = guest.header(Kind::Ring, 20);
        header.peers[0] = 21;
        header.write(&mut guest.ring[Guest::slot(20)]);
        assert!(failure(&guest).contains("knows of page 21"), "{}", failure(&guest));
    }
}
