//! A thousand scenarios, replays, and the controls that show that the targets can be missed. The whole series is
//! `cargo xtask sim`.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use livesnap_control::record::Head;
use livesnap_sim::judge::{Judged, Variant, judge};
use livesnap_sim::law::{Controlled, Until, run};
use livesnap_sim::record;
use livesnap_sim::scenario::{SMALL_RING, Scenario};
use livesnap_sim::series::judge_all;
use livesnap_sim::table::Table;

const FIRST: u64 = 1_000_000;
const SEEDS: u64 = 1000;
const CPU_LEFT: &str = "CPU left, share of the oracle's";
const TIME_LOST: &str = "writers' time lost to a full buffer";

fn thousand(variant: Variant) -> Vec<Judged> {
    judge_all(FIRST, SEEDS, variant).unwrap()
}

/// Targets that are missed.
fn missed(judged: &[Judged]) -> Vec<&'static str> {
    let table = Table::of(judged);
    eprintln!("{table}");
    table.missed().iter().map(|row| row.what).collect()
}

#[test]
fn the_controller_spares_the_guest_and_a_full_buffer() {
    let mut judged = thousand(Variant::Whole);
    let missed_by_all = missed(&judged);
    assert!(missed_by_all.is_empty(), "{missed_by_all:?}");
    judged.retain(|case| case.scenario.guest == SMALL_RING);
    assert!(judged.len() > 50 && !missed(&judged).contains(&CPU_LEFT));
}

#[test]
fn without_a_forecast_the_buffer_fills() {
    assert!(missed(&thousand(Variant::Blindfolded)).contains(&TIME_LOST));
}

#[test]
fn a_seed_is_the_same_run_every_time() {
    for seed in FIRST..FIRST + 5 {
        let twice = [0; 2].map(|_| format!("{:?}", judge(seed, Variant::Whole).unwrap()));
        assert_eq!(twice[0], twice[1], "seed {seed}");
    }
}

fn recorded(seed: u64) -> Vec<u8> {
    let scenario = Scenario::new(seed);
    let mut law = Controlled::recorded(&scenario).unwrap();
    run(&scenario, &mut law, f64::INFINITY, Until::Over);
    let head = Head { policy: scenario.policy, vcpus: scenario.vcpus.len() };
    let mut lines = Vec::new();
    record::write(&mut lines, &head, &law.into_record()).unwrap();
    lines
}

#[test]
fn a_recorded_run_gives_the_same_commands_again() {
    for seed in FIRST..FIRST + 20 {
        let lines = recorded(seed);
        let ticks = record::replay(lines.as_slice()).unwrap();
        assert!(ticks > 10, "seed {seed}: only {ticks} ticks");
    }
}

#[test]
fn a_record_that_was_altered_does_not() {
    let lines = String::from_utf8(recorded(FIRST)).unwrap();
    let altered = lines.replacen("\"cpu_ratio\":1.0", "\"cpu_ratio\":0.5", 1);
    assert_ne!(lines, altered);
    record::replay(altered.as_bytes()).unwrap_err();
}
