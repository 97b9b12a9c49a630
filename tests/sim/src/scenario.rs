//! What a seed stands for: a guest, a disk, what happens to them, and how well they are seen.

use livesnap_control::policy::BUFFER_BYTES_MIN;
use livesnap_control::{OnInfeasible, Policy};

use crate::random::Random;

/// A gibibyte.
pub const GIB: f64 = (1_u64 << 30) as f64;
const MIB: f64 = (1_u64 << 20) as f64;

/// Kinds of guests, beside [`SMALL_RING`].
const GUESTS: [&str; 7] =
    ["idle", "sequential", "uniform", "zipf", "hot set", "phases", "fork bomb"];
/// A small guest that writes the same memory over and over, to a slow disk: soon all of it has been touched.
pub const SMALL_RING: &str = "small ring";
/// Share of scenarios that are of that kind.
const SMALL_RING_RATIO: f64 = 0.125;
/// Kinds of disks.
const DISKS: [&str; 5] = ["steady", "ssd cache", "hdd", "shared", "stalling"];

/// How a part of RAM is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Anywhere.
    Random,
    /// From beginning to end, again and again.
    Sequential,
}

/// A part of RAM, spread over all of it, that is written alike.
#[derive(Clone, Debug)]
pub struct Class {
    /// Its length in bytes.
    pub bytes: f64,
    /// Bytes of pages written per second of CPU time, first touches or not.
    pub rate: f64,
    /// In which order.
    pub order: Order,
    /// The event that begins the writing; from the start if none.
    pub begins: Option<usize>,
    /// The event at whose start it ends.
    pub ends: Option<usize>,
}

/// Something that changes at one moment and could not be foreseen.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// When, in seconds from the consistency point.
    pub start_s: f64,
    /// Until when.
    pub end_s: f64,
    /// What the disk is left with meanwhile.
    pub disk_ratio: f64,
}

/// How the plant is seen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Probability that a sample is lost.
    pub lost: f64,
    /// Probability that one comes late.
    pub late: f64,
    /// Nothing is seen from then.
    pub blind_from_s: f64,
    /// Until then.
    pub blind_until_s: f64,
}

/// All that follows from a seed.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The number that it is made from.
    pub seed: u64,
    /// The kind of guest.
    pub guest: &'static str,
    /// The kind of disk.
    pub disk: &'static str,
    /// Length of RAM in bytes.
    pub ram_bytes: f64,
    /// Parts of RAM that are written.
    pub classes: Vec<Class>,
    /// What happens, in the order of time.
    pub events: Vec<Event>,
    /// Bandwidth of the disk in bytes per second, before events and noise.
    pub disk_rate: f64,
    /// Its noise, as a share of that.
    pub disk_noise: f64,
    /// Share of all writes that each virtual CPU does.
    pub vcpus: Vec<f64>,
    /// How it is seen.
    pub sampling: Sampling,
    /// The limits.
    pub policy: Policy,
    /// The buffer at first, in bytes.
    pub buffer_bytes: f64,
}

impl Scenario {
    /// The scenario of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed, 1);
        if Random::new(seed, 4).chance(SMALL_RING_RATIO) {
            return Self::small_ring(seed, &mut random);
        }
        let disk_rate = random.log_between(100e6, 3e9);
        let lasts_s = random.log_between(6.0, 90.0);
        let ram_bytes = (disk_rate * lasts_s).clamp(GIB, 128.0 * GIB);
        let lasts_s = ram_bytes / disk_rate;
        let policy = policy(&mut random, lasts_s);
        let mut scenario = Self {
            seed,
            guest: random.pick(&GUESTS),
            disk: random.pick(&DISKS),
            ram_bytes,
            classes: Vec::new(),
            events: Vec::new(),
            disk_rate,
            disk_noise: 0.03,
            vcpus: vcpus(&mut random),
            sampling: sampling(&mut random, lasts_s),
            policy,
            buffer_bytes: (256.0 * MIB).min(bytes(policy.buffer_bytes_max)),
        };
        scenario.add_guest(&mut random, lasts_s);
        scenario.add_disk(&mut random, lasts_s);
        scenario
    }

    /// Like the guests on which `cargo xtask bench --control` measures the controller.
    fn small_ring(seed: u64, random: &mut Random) -> Self {
        let ram_bytes = random.log_between(256.0 * MIB, 2.0 * GIB);
        let lasts_s = random.log_between(2.0, 40.0);
        let disk_rate = ram_bytes / lasts_s;
        let buffer_bytes_max = whole(ram_bytes * random.log_between(0.1, 0.4));
        let policy = Policy {
            buffer_bytes_max: buffer_bytes_max.max(BUFFER_BYTES_MIN),
            ..policy(random, lasts_s)
        };
        let mut scenario = Self {
            seed,
            guest: SMALL_RING,
            disk: random.pick(&["steady", "stalling"]),
            ram_bytes,
            classes: Vec::new(),
            events: Vec::new(),
            disk_rate,
            disk_noise: 0.03,
            vcpus: vcpus(random),
            sampling: sampling(random, lasts_s),
            policy,
            buffer_bytes: bytes(policy.buffer_bytes_max),
        };
        let ring = ram_bytes * random.between(0.05, 0.7);
        let order = random.pick(&[Order::Random, Order::Sequential]);
        scenario.add(ring, disk_rate * random.log_between(0.5, 20.0), order, None, None);
        let rest = random.log_between(0.1e6, 2e6);
        scenario.add(ram_bytes - ring, rest, Order::Random, None, None);
        scenario.add_disk(random, lasts_s);
        scenario
    }

    /// An event, which keeps its number; [`Scenario::known_at`] sorts.
    fn event(&mut self, start_s: f64, end_s: f64, disk_ratio: f64) -> usize {
        self.events.push(Event { start_s, end_s, disk_ratio });
        self.events.len() - 1
    }

    fn add_guest(&mut self, random: &mut Random, lasts_s: f64) {
        match self.guest {
            "phases" => {
                let mut begins = None;
                let kinds = ["idle", "sequential", "uniform", "zipf", "hot set"];
                let changes = random.pick(&[1, 2, 3]);
                for change in 0..=changes {
                    let ends = (change < changes).then(|| {
                        let part = lasts_s / f64::from(changes + 1);
                        let at = part * (f64::from(change) + random.between(0.5, 1.4));
                        self.event(at, f64::INFINITY, 1.0)
                    });
                    let kind = random.pick(&kinds);
                    self.add_work(kind, random, begins, ends);
                    begins = ends;
                }
            }
            "fork bomb" => {
                let kind = random.pick(&["idle", "hot set"]);
                self.add_work(kind, random, None, None);
                let start_s = lasts_s * random.between(0.05, 0.7);
                let length_s =
                    if random.chance(0.5) { f64::INFINITY } else { random.log_between(0.3, 6.0) };
                let begins = self.event(start_s, start_s + length_s, 1.0);
                let rate = self.disk_rate * random.log_between(3.0, 20.0);
                self.add(self.ram_bytes, rate, Order::Random, Some(begins), None);
            }
            kind => self.add_work(kind, random, None, None),
        }
    }

    fn add_work(
        &mut self,
        kind: &str,
        random: &mut Random,
        begins: Option<usize>,
        ends: Option<usize>,
    ) {
        let ram = self.ram_bytes;
        let rate = self.disk_rate * random.log_between(0.3, 10.0);
        let mut add = |bytes, rate, order| self.add(bytes, rate, order, begins, ends);
        match kind {
            "idle" => add(ram, random.log_between(1e6, 20e6), Order::Random),
            "sequential" => add(ram * random.log_between(0.05, 1.0), rate, Order::Sequential),
            "uniform" => add(ram, rate, Order::Random),
            "zipf" => {
                let exponent = random.between(0.6, 1.4);
                let weight = |rank: u32| f64::from(rank).powf(-exponent);
                let ranks = 12;
                // Ranks by powers of two: the first part is small and hot, the last half of RAM.
                let mass: f64 =
                    (0..ranks).map(|rank| weight(1 << rank) * f64::from(1 << rank)).sum();
                for rank in 0..ranks {
                    let part = f64::from(1 << rank);
                    let share = weight(1 << rank) * part / mass;
                    add(ram * part / f64::from(1 << ranks), rate * share, Order::Random);
                }
            }
            "hot set" => {
                let hot = ram * random.log_between(0.01, 0.5);
                add(hot, rate, Order::Random);
                add(ram - hot, rate * random.log_between(0.01, 0.3), Order::Random);
            }
            other => unreachable!("no kind of work is called {other}"),
        }
    }

    fn add(
        &mut self,
        bytes: f64,
        rate: f64,
        order: Order,
        begins: Option<usize>,
        ends: Option<usize>,
    ) {
        self.classes.push(Class { bytes, rate, order, begins, ends });
    }

    fn add_disk(&mut self, random: &mut Random, lasts_s: f64) {
        match self.disk {
            "ssd cache" => {
                let start_s = lasts_s * random.between(0.1, 0.9);
                self.event(start_s, f64::INFINITY, random.between(0.15, 0.7));
            }
            "hdd" => {
                self.disk_rate = self.disk_rate.min(250e6);
                self.disk_noise = 0.25;
            }
            "shared" => {
                let mut at_s = random.between(0.0, 5.0);
                while at_s < lasts_s * 1.5 && self.events.len() < 12 {
                    let length_s = random.log_between(0.3, 6.0);
                    self.event(at_s, at_s + length_s, random.between(0.3, 0.8));
                    at_s += length_s + random.log_between(0.5, 10.0);
                }
            }
            "stalling" => {
                let mut at_s = random.between(0.5, 6.0);
                while at_s < lasts_s * 1.5 && self.events.len() < 12 {
                    let length_s = random.log_between(0.05, 1.5);
                    self.event(at_s, at_s + length_s, 0.02);
                    at_s += length_s + random.log_between(1.0, 20.0);
                }
            }
            _ => {}
        }
    }

    /// Moments at which something begins that could not be foreseen, in order; the first is the start.
    #[must_use]
    pub fn known_at(&self) -> Vec<f64> {
        let mut moments = vec![0.0];
        moments.extend(self.events.iter().map(|event| event.start_s));
        moments.sort_by(f64::total_cmp);
        moments
    }
}

fn policy(random: &mut Random, lasts_s: f64) -> Policy {
    let deadline_s = random.chance(0.25).then(|| lasts_s * random.between(0.7, 3.0));
    Policy {
        buffer_bytes_max: whole(random.log_between(128.0 * MIB, 2.0 * GIB)),
        min_cpu_ratio: random.pick(&[0.2, 0.3, 0.5]),
        deadline_ns: deadline_s.map(|seconds| whole(seconds * 1e9)),
        on_infeasible: OnInfeasible::Abort,
        ..Policy::for_host(u64::MAX)
    }
}

fn vcpus(random: &mut Random) -> Vec<f64> {
    let count = random.pick(&[1, 2, 4, 8, 16]);
    let all_write = random.chance(0.5);
    let weights: Vec<f64> = (0..count)
        .map(|index| {
            let writes = index == 0 || all_write || random.chance(0.5);
            if writes { random.log_between(0.2, 1.0) } else { 0.0 }
        })
        .collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

fn sampling(random: &mut Random, lasts_s: f64) -> Sampling {
    let blind_from_s =
        if random.chance(0.1) { random.between(0.0, lasts_s) } else { f64::INFINITY };
    Sampling {
        lost: random.pick(&[0.0, 0.02, 0.1]),
        late: random.pick(&[0.0, 0.05]),
        blind_from_s,
        blind_until_s: blind_from_s + random.between(0.3, 2.0),
    }
}

/// Share of all writes that these shares of the virtual CPUs leave.
#[must_use]
pub fn weighted(scenario: &Scenario, shares: &[f64]) -> f64 {
    scenario.vcpus.iter().zip(shares).map(|(weight, share)| weight * share).sum()
}

/// A number of bytes as a count.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, and bytes are not negative"
)]
pub fn whole(number: f64) -> u64 {
    number as u64
}

/// A count of bytes as a number.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "exact up to 8 PiB")]
pub fn bytes(count: u64) -> f64 {
    count as f64
}
