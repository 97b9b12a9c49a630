//! What clients of the daemon cost a guest that is being snapshotted: `cargo xtask bench --api`.
//!
//! Snapshots of one guest are taken through the API in turns, alone and while `wrk` asks for the list of operations over 200
//! connections as fast as it is answered. Told is what the guest's threads waited for their write faults, as probes in the
//! kernel saw it: the time that 99 in 100 of all rounds did not exceed, and beside that the ratios of single rounds, which
//! tell how much is chance. The histograms have steps of an eighth; times are interpolated within a step.
//!
//! Clients are on other hosts, so `wrk` gets only CPU time that nobody else wants, and if the guest then waits more than
//! [`RATIO_MAX`] times as long it fails. What `wrk` costs with an ordinary share of the CPUs is told for comparison.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement that fails shall stop")]

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use livesnap_tests::daemon::Daemon;
use livesnap_tests::qemu::{Load, Qemu};
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(120);
const CONNECTIONS: &str = "--connections=200";
/// How much longer 99 in 100 of the guest's writes may wait at most.
const RATIO_MAX: f64 = 1.1;
/// Unless the first argument says another number.
const ROUNDS: usize = 20;
/// All of it is written all the time, so each extent of it has a fault.
const RING_MIB: u32 = 768;
/// Slow enough that a snapshot takes seconds, and clients have begun before its first fault.
const BANDWIDTH: u64 = 256 << 20;

/// Who asks while a snapshot is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    /// Nobody.
    Alone,
    /// Clients that take no CPU time from anybody.
    FromElsewhere,
    /// Clients that take their share.
    FromHere,
}

/// Clients at work; killed when dropped.
struct Clients(Child);

impl Clients {
    fn start(daemon: &Daemon, niceness: &str) -> Self {
        let url = format!("http://{}/snapshot", daemon.tcp().unwrap());
        let mut command = Command::new("nice");
        command.args(["-n", niceness, "wrk", "--threads=1", CONNECTIONS, "--duration=600s", &url]);
        Self(command.stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        // Both fail only if they have ended already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How many stalls lasted how long, by the longest time of a step of the histogram, in nanoseconds.
#[derive(Clone, Debug, Default)]
struct Stalls(BTreeMap<u64, u64>);

impl Stalls {
    fn count(&self) -> u64 {
        self.0.values().sum()
    }

    fn add(&mut self, other: &Self) {
        for (longest, count) in &other.0 {
            *self.0.entry(*longest).or_default() += count;
        }
    }

    fn p50_us(&self) -> f64 {
        self.quantile_us(0.5)
    }

    fn p99_us(&self) -> f64 {
        self.quantile_us(0.99)
    }

    /// What this share of them did not exceed, in microseconds.
    #[expect(clippy::cast_precision_loss, reason = "counts and times are far below 2^53")]
    fn quantile_us(&self, share: f64) -> f64 {
        let mut left = self.count() as f64 * share;
        for (&longest, &count) in &self.0 {
            if left <= count as f64 {
                // 8 steps for each power of two.
                let width = 1_u64 << longest.ilog2().saturating_sub(3);
                let shortest = longest - (width - 1);
                return (shortest as f64 + width as f64 * left / count as f64) / 1e3;
            }
            left -= count as f64;
        }
        0.0
    }
}

fn snapshot(daemon: &Daemon) -> Stalls {
    let policy = json!({"on_infeasible": "wait", "force": true, "max_bandwidth_bytes_per_second": BANDWIDTH});
    let request = json!({"vm": "vm1", "policy": policy});
    let taken = daemon.post("/snapshot", &[("Prefer", "wait=120")], &request).unwrap().body;
    assert_eq!(taken["state"], "completed", "{taken:#}");
    fs::remove_dir_all(taken["destination"].as_str().unwrap()).unwrap();
    let buckets = &taken["progress"]["stalls"]["buckets"];
    let buckets: Vec<(u64, u64)> = serde_json::from_value(buckets.clone()).unwrap();
    let stalls = Stalls(buckets.into_iter().collect());
    // It was told after the last fault.
    let total = taken.pointer("/result/probes/stalls/copy/count").and_then(Value::as_u64);
    assert_eq!(Some(stalls.count()), total, "{taken:#}");
    stalls
}

/// Requests that the daemon has answered so far.
fn answered(daemon: &Daemon) -> f64 {
    let metrics = daemon.metrics().unwrap();
    let counts = metrics.lines().filter(|line| {
        line.starts_with("livesnap_http_request_duration_seconds_count")
            && line.contains("route=\"/snapshot\"")
    });
    counts.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

/// A snapshot, and answers to clients a second meanwhile.
fn snapshot_while(asked: Asked, daemon: &Daemon) -> (Stalls, f64) {
    let niceness = match asked {
        Asked::Alone => return (snapshot(daemon), 0.0),
        Asked::FromElsewhere => "19",
        Asked::FromHere => "0",
    };
    let (before, began) = (answered(daemon), Instant::now());
    let clients = Clients::start(daemon, niceness);
    let stalls = snapshot(daemon);
    drop(clients);
    let rate = (answered(daemon) - before) / began.elapsed().as_secs_f64();
    assert!(rate > 200.0, "clients were answered {rate} times a second");
    (stalls, rate)
}

fn main() {
    let rounds = std::env::args().nth(1).map_or(ROUNDS, |text| text.parse().unwrap());
    let load = Load { ring_mib: RING_MIB, random: true, ..Load::default() };
    let mut guest = Qemu::builder().memory_mib(RING_MIB + 256).load(load).start().unwrap();
    guest.wait_ready(BOOT).unwrap();
    guest.wait_heartbeat(BOOT, |beat| beat.laps >= 1).unwrap();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    // So few operations that the list is soon as long as it gets.
    let more = "remembered_max = 5\ntcp.listen = \"127.0.0.1:0\"";
    let daemon = Daemon::serve(dir.path(), &[("vm1", &guest)], more).unwrap();
    // The first one finds everything cold.
    snapshot(&daemon);
    let mut taken: BTreeMap<Asked, Vec<Stalls>> = BTreeMap::new();
    for round in 0..rounds {
        let mut order = [Asked::Alone, Asked::FromElsewhere, Asked::FromHere];
        // What comes later may find more done.
        order.rotate_left(round % 3);
        for asked in order {
            let (stalls, rate) = snapshot_while(asked, &daemon);
            let (p99_us, count) = (stalls.p99_us(), stalls.count());
            println!("{asked:?}: p99 {p99_us:.0} us of {count} stalls, {rate:.0} answers a second");
            taken.entry(asked).or_default().push(stalls);
        }
    }
    let alone = &taken[&Asked::Alone];
    let mut costs = BTreeMap::new();
    for (asked, snapshots) in &taken {
        let all = together(snapshots);
        let ratio = all.p99_us() / together(alone).p99_us();
        let [low, median, high] = quartiles(snapshots, alone);
        println!(
            "{asked:?}: p50 {:.0} us, p99 {:.0} us of all {} stalls, times {ratio:.3}; median of {rounds} ratios {median:.3} (quartiles {low:.3} and {high:.3})",
            all.p50_us(),
            all.p99_us(),
            all.count(),
        );
        costs.insert(asked, ratio);
    }
    let beat = guest.wait_laps(1, BOOT).unwrap();
    assert_eq!(beat.inconsistent, 0);
    assert!(costs[&Asked::FromElsewhere] <= RATIO_MAX, "clients cost the guest too much");
}

/// Those of all of them.
fn together(snapshots: &[Stalls]) -> Stalls {
    let mut all = Stalls::default();
    snapshots.iter().for_each(|stalls| all.add(stalls));
    all
}

/// Of the ratios of snapshots to those `alone` of the same rounds.
fn quartiles(snapshots: &[Stalls], alone: &[Stalls]) -> [f64; 3] {
    let pairs = snapshots.iter().zip(alone);
    let mut ratios: Vec<_> = pairs.map(|(asked, alone)| asked.p99_us() / alone.p99_us()).collect();
    ratios.sort_unstable_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| ratios[ratios.len() * quarter / 4])
}
