//! The safe commands, each by name, and the decisions on a hand-made plant. How well the law does is for the simulator
//! in `tests/sim` to say.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use alloc::vec::Vec;

use super::*;
use crate::sample::{Host, Stall};

const GIB: u64 = 1 << 30;

fn policy() -> Policy {
    Policy::for_host(64 * GIB)
}

/// A guest that touches at a constant rate while it runs, and a constant disk, by the book.
struct Plant {
    controller: Controller,
    sample: Sample,
    touch_rate: f64,
    drain_rate: f64,
    cpu_ratio: f64,
    /// What is lost to anything but the throttle, beside what a full buffer costs.
    lost_ratio: f64,
    /// The virtual CPUs write alike.
    vcpu: Vcpu,
    /// Whether anybody knows what they do.
    is_measured: bool,
}

impl Plant {
    fn new(policy: Policy, touch_rate: f64, drain_rate: f64) -> Self {
        Self {
            controller: Controller::new(policy, 2).unwrap(),
            sample: Sample {
                taken_ns: 1_000_000_000,
                total_bytes: 64 * GIB,
                buffer_limit_bytes: policy.buffer_bytes_max,
                ..Sample::default()
            },
            touch_rate,
            drain_rate,
            cpu_ratio: 1.0,
            lost_ratio: 0.0,
            vcpu: Vcpu::default(),
            is_measured: true,
        }
    }

    fn advance(&mut self) {
        let sample = &mut self.sample;
        let wanted = count(self.touch_rate * self.cpu_ratio * TICK_S);
        let room =
            sample.buffer_limit_bytes - sample.buffer_used_bytes + count(self.drain_rate * TICK_S);
        let touched = wanted.min(room);
        let waited_ratio = number(wanted - touched) / number(wanted.max(1));
        let kept_ratio = self.cpu_ratio * (1.0 - waited_ratio) * (1.0 - self.lost_ratio);
        self.vcpu.touched_bytes += touched / 2;
        self.vcpu.wanted_ns += count(TICK_S * NS_PER_S);
        self.vcpu.kept_ns += count(kept_ratio * TICK_S * NS_PER_S);
        let swept = (32_u64 << 20).saturating_sub(sample.buffer_used_bytes + touched);
        let drained =
            count(self.drain_rate * TICK_S).min(sample.buffer_used_bytes + touched + swept);
        sample.taken_ns += 50_000_000;
        sample.touched_bytes += touched;
        sample.saved_bytes += touched + swept;
        sample.drained_bytes += drained;
        sample.buffer_used_bytes = sample.buffer_used_bytes + touched + swept - drained;
    }

    fn tick(&mut self) -> Command {
        self.advance();
        let sample = self.sample;
        self.give(Some(&sample))
    }

    fn give(&mut self, sample: Option<&Sample>) -> Command {
        let vcpus = [self.vcpu; 2];
        let vcpus: &[Vcpu] = if self.is_measured { &vcpus } else { &[] };
        let command = self.controller.step(sample, vcpus, TICK_S);
        self.cpu_ratio = command.cpu_ratio;
        self.sample.buffer_limit_bytes = command.buffer_limit_bytes.max(BUFFER_BYTES_MIN);
        command
    }

    fn ticks(&mut self, count: u32) -> Command {
        let mut command = self.tick();
        for _ in 1..count {
            command = self.tick();
        }
        command
    }

    /// Until the guest is being throttled.
    fn throttled(mut self) -> Self {
        let deadline = 400;
        for _ in 0..deadline {
            if self.tick().cpu_ratio < 0.9 {
                return self;
            }
        }
        panic!("not throttled within {deadline} ticks: {:?}", self.controller.command);
    }
}

#[test]
fn a_guest_that_fits_is_left_alone() {
    let mut plant = Plant::new(policy(), 200e6, 400e6);
    let command = plant.ticks(100);
    assert_eq!((command.because, command.cpu_ratio), (Because::Fits, 1.0));
    assert!(command.forecast.full_after_s.is_none(), "{command:?}");
}

#[test]
fn a_guest_that_is_too_fast_comes_to_rest_at_the_pace_of_the_disk() {
    for is_measured in [true, false] {
        let mut plant = Plant { is_measured, ..Plant::new(policy(), 600e6, 400e6) };
        let command = plant.ticks(600);
        assert_eq!(command.abort, None);
        assert!((command.cpu_ratio - 2.0 / 3.0).abs() < 0.05, "{command:?}");
        let used = number(plant.sample.buffer_used_bytes) / number(plant.sample.buffer_limit_bytes);
        assert!(used > 0.2 && used < HELD_UP_RATIO, "{used} of the buffer is in use");
    }
}

#[test]
fn cpu_time_is_given_back_at_once_where_there_is_room_to_be_wrong() {
    let mut plant = Plant::new(policy(), 1e9, 400e6).throttled();
    plant.ticks(100);
    plant.touch_rate = 10e6;
    let before = plant.cpu_ratio;
    plant.sample.buffer_used_bytes = 32 << 20;
    let after = (0..10).map(|_| plant.tick().cpu_ratio).fold(0.0, f64::max);
    assert!(before < 0.6 && after >= 1.0, "from {before} to {after}");
}

#[test]
fn cpu_time_is_given_back_slowly_where_much_of_the_buffer_is_in_use() {
    let mut plant = Plant::new(policy(), 1e9, 400e6).throttled();
    plant.ticks(100);
    plant.touch_rate = 100e6;
    let before = plant.cpu_ratio;
    let mut last = before;
    for _ in 0..60 {
        plant.sample.buffer_used_bytes = GIB / 10 * 6;
        let command = plant.tick();
        assert!(command.cpu_ratio <= last + RELEASE_PER_S * TICK_S + 1e-9, "{command:?}");
        last = command.cpu_ratio;
    }
    assert!(before < 0.6 && last >= 1.0, "from {before} to {last}");
}

#[test]
fn the_buffer_grows_before_the_guest_is_throttled() {
    let mut plant = Plant::new(policy(), 600e6, 400e6);
    plant.sample.buffer_limit_bytes = 256 << 20;
    let command = plant.ticks(5);
    assert_eq!(command.buffer_limit_bytes, policy().buffer_bytes_max);
    assert_eq!(command.cpu_ratio, 1.0);
}

#[test]
fn the_buffer_leaves_the_host_its_memory_and_shrinks_under_pressure() {
    let mut plant = Plant::new(policy(), 600e6, 400e6);
    plant.sample.buffer_limit_bytes = 256 << 20;
    plant.sample.host = Some(Host { available_bytes: 400 << 20, memory_pressure_ratio: 0.0 });
    let command = plant.ticks(3);
    assert!(command.buffer_limit_bytes <= (256 + 300) << 20, "{command:?}");
    let before = command.buffer_limit_bytes;
    plant.touch_rate = 0.0;
    plant.sample.host = Some(Host { available_bytes: 400 << 20, memory_pressure_ratio: 0.3 });
    let command = plant.ticks(20);
    assert!(command.buffer_limit_bytes < before, "{command:?}");
    assert!(command.buffer_limit_bytes >= BUFFER_BYTES_MIN, "{command:?}");
}

#[test]
fn what_cannot_be_kept_is_given_up_before_the_buffer_is_full() {
    let policy = Policy { buffer_bytes_max: 4 * GIB, ..policy() };
    let mut plant = Plant::new(policy, 3e9, 400e6);
    let abort = (0..200).find_map(|_| plant.tick().abort).unwrap();
    assert_eq!(abort.reason, AbortReason::BufferOverflow);
    assert!(abort.evidence_s >= EVIDENCE_S - 1e-6, "{abort:?}");
    assert!(abort.touch_rate > 2.5e9 && abort.drain_rate < 0.5e9, "{abort:?}");
    assert!(plant.sample.buffer_used_bytes < 4 * GIB * 95 / 100, "{:?}", plant.sample);
}

#[test]
fn with_wait_it_goes_on_and_takes_no_more_than_waiting_does() {
    let waits = Policy { on_infeasible: OnInfeasible::Wait, ..policy() };
    let command = Plant::new(waits, 4e9, 400e6).ticks(100);
    assert_eq!((command.because, command.abort), (Because::Infeasible, None));
    assert!((command.cpu_ratio - 1.0).abs() < 1e-9, "{command:?}");
}

#[test]
fn a_guest_that_gets_too_little_for_a_second_is_given_up_whatever_the_forecast_says() {
    let mut plant = Plant::new(policy(), 200e6, 400e6);
    plant.ticks(40);
    plant.lost_ratio = 0.8;
    assert_eq!(plant.ticks(10).abort, None);
    let abort = (0..20).find_map(|_| plant.tick().abort);
    assert_eq!(abort.map(|abort| abort.reason), Some(AbortReason::MinCpu));
}

#[test]
fn who_got_too_little_gets_all_until_that_is_made_good() {
    let mut plant = Plant::new(policy(), 4e9, 400e6).throttled();
    // Short of what it must get, but not by so much that the limit is broken.
    plant.lost_ratio = 0.75;
    let gets_all = (0..60).any(|_| {
        let before = plant.cpu_ratio;
        let after = plant.tick().cpu_ratio;
        before < 0.9 && after >= 1.0
    });
    assert!(gets_all && plant.controller.is_owed, "{:?}", plant.controller);
    (plant.lost_ratio, plant.drain_rate) = (0.0, 8e9);
    plant.ticks(20);
    assert!(!plant.controller.is_owed, "{:?}", plant.controller);
}

#[test]
fn what_is_owed_is_owed_until_it_is_made_good_in_full() {
    let mut controller = Controller::new(policy(), 1).unwrap();
    let mut kept = |share| {
        (0..20).for_each(|_| controller.kept.see(TICK_S, share, 0.5));
        controller.notice_owed();
        (controller.is_owed, controller.least())
    };
    let (is_owed, least) = kept(0.285);
    assert!(!is_owed && (least - 0.3 / 0.57).abs() < 0.01, "within what can be measured: {least}");
    assert_eq!(kept(0.25), (true, 1.0));
    assert_eq!(kept(0.285), (true, 1.0));
    controller.command.cpu_ratio = 0.4;
    controller.move_to(0.4, false, TICK_S);
    assert_eq!((controller.command.because, controller.command.cpu_ratio), (Because::Release, 1.0));
    (0..20).for_each(|_| controller.kept.see(TICK_S, 0.301, 0.5));
    controller.notice_owed();
    assert!(!controller.is_owed);
}

#[test]
fn a_limit_that_is_broken_for_two_ticks_is_no_reason_to_give_up() {
    let mut plant = Plant::new(policy(), 200e6, 400e6);
    plant.ticks(40);
    let mut broken = 0;
    let abort = (0..60).find_map(|_| {
        // Such that the last second is short of the limit for two ticks, and then no more.
        plant.lost_ratio = if broken < 2 { 0.8 } else { 0.0 };
        let abort = plant.tick().abort;
        let kept = plant.controller.kept.in_window().unwrap();
        broken += u32::from(kept < plant.controller.policy.kept_ratio_min());
        abort
    });
    assert!(abort.is_none() && broken == 2, "{abort:?} after {broken}");
}

#[test]
fn a_deadline_that_the_disk_cannot_keep_is_given_up_early() {
    let late = Policy { deadline_ns: Some(60_000_000_000), ..policy() };
    let abort = (0..40).find_map(|_| Plant::new(late, 10e6, 400e6).ticks(40).abort).unwrap();
    assert_eq!(abort.reason, AbortReason::Deadline);
}

#[test]
fn stalls_over_the_limit_cut_the_share_and_then_end_the_snapshot() {
    let mut plant = Plant::new(policy(), 200e6, 400e6);
    plant.ticks(40);
    plant.sample.stall = Some(Stall { faults: 1000, over_limit: 50, lost_events: 0 });
    let command = plant.ticks(10);
    assert_eq!(command.because, Because::Stalls);
    assert!(command.cpu_ratio < 0.8, "{command:?}");
    let abort = (0..100).find_map(|_| plant.tick().abort).unwrap();
    assert_eq!(abort.reason, AbortReason::StallLimit);
}

#[test]
fn a_lost_sample_holds_what_is_in_force_and_many_give_it_back() {
    let mut plant = Plant::new(policy(), 1e9, 400e6).throttled();
    let before = plant.cpu_ratio;
    let command = plant.give(None);
    assert_eq!((command.because, command.cpu_ratio), (Because::SampleLost, before));
    for _ in 0..60 {
        plant.give(None);
    }
    let command = plant.give(None);
    assert_eq!((command.because, command.cpu_ratio), (Because::Blind, 1.0));
}

#[test]
fn a_sample_that_is_old_or_comes_twice_is_stale() {
    let mut plant = Plant::new(policy(), 1e9, 400e6).throttled();
    let before = plant.cpu_ratio;
    let twice = plant.sample;
    let command = plant.give(Some(&twice));
    assert_eq!((command.because, command.cpu_ratio), (Because::SampleStale, before));
    plant.advance();
    let old = Sample { age_ns: crate::sample::AGE_NS_MAX + 1, ..plant.sample };
    let command = plant.give(Some(&old));
    assert_eq!((command.because, command.cpu_ratio), (Because::SampleStale, before));
}

#[test]
fn what_cannot_be_true_is_named_and_changes_nothing() {
    type Spoil = fn(&mut Sample);
    let cases: [(Absurdity, Spoil); 10] = [
        (Absurdity::TimeBackwards, |sample| sample.taken_ns -= 1_000_000_000),
        (Absurdity::CounterBackwards, |sample| sample.touched_bytes = 0),
        (Absurdity::CounterBackwards, |sample| sample.drained_bytes = 0),
        (Absurdity::CounterBackwards, |sample| sample.saved_bytes = 0),
        (Absurdity::CounterJump, |sample| sample.touched_bytes = u64::MAX),
        (Absurdity::CounterJump, |sample| sample.saved_bytes = sample.total_bytes + 1),
        (Absurdity::Buffer, |sample| sample.buffer_used_bytes = u64::MAX),
        (Absurdity::Buffer, |sample| sample.buffer_limit_bytes = 0),
        (Absurdity::Ratio, |sample| {
            sample.host = Some(Host { available_bytes: 0, memory_pressure_ratio: f64::NAN });
        }),
        (Absurdity::Ratio, |sample| {
            sample.host = Some(Host { available_bytes: 0, memory_pressure_ratio: -0.5 });
        }),
    ];
    for (absurdity, spoil) in cases {
        let mut plant = Plant::new(policy(), 1e9, 400e6).throttled();
        let before = plant.cpu_ratio;
        plant.advance();
        let mut spoilt = plant.sample;
        spoil(&mut spoilt);
        let command = plant.give(Some(&spoilt));
        assert_eq!(command.because, Because::SampleAbsurd(absurdity));
        assert_eq!((command.cpu_ratio, command.abort), (before, None), "{absurdity:?}");
        let next = plant.tick().because;
        assert!(matches!(next, Because::Throttle | Because::Release), "{absurdity:?}: {next:?}");
    }
}

#[test]
fn a_period_that_is_none_is_absurd() {
    for dt_s in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e9] {
        let mut plant = Plant::new(policy(), 1e9, 400e6).throttled();
        plant.advance();
        let command = plant.controller.step(Some(&plant.sample.clone()), &[], dt_s);
        assert_eq!(command.because, Because::SampleAbsurd(Absurdity::Period), "{dt_s}");
    }
}

#[test]
fn counters_that_begin_anew_are_followed_after_a_while() {
    let mut plant = Plant::new(policy(), 200e6, 400e6);
    plant.ticks(20);
    plant.sample.touched_bytes = 0;
    let seen: Vec<_> = (0..6).map(|_| plant.tick().because).collect();
    assert_eq!(seen[0], Because::SampleAbsurd(Absurdity::CounterBackwards));
    assert_eq!(seen[5], Because::Fits);
}

#[test]
fn virtual_cpus_that_do_not_write_keep_their_time() {
    let mut plant = Plant::new(policy(), 1e9, 400e6);
    for _ in 0..200 {
        plant.advance();
        let sample = plant.sample;
        let writer = Vcpu { touched_bytes: 2 * plant.vcpu.touched_bytes, ..plant.vcpu };
        let idle = Vcpu { kept_ns: plant.vcpu.wanted_ns, touched_bytes: 0, ..plant.vcpu };
        let command = plant.controller.step(Some(&sample), &[writer, idle], TICK_S);
        plant.cpu_ratio = command.cpu_ratio;
    }
    let shares = plant.controller.vcpu_shares();
    assert!(shares[0] < 0.6, "{shares:?}");
    assert!((shares[1] - 1.0).abs() < 1e-9, "{shares:?}");
}

#[test]
fn virtual_cpus_are_cut_by_what_they_would_write_and_not_by_what_is_left_of_it() {
    let mut plant = Plant::new(policy(), 800e6, 400e6);
    let mut vcpus = [Vcpu::default(); 2];
    for _ in 0..400 {
        let shares: [f64; 2] = plant.controller.vcpu_shares().try_into().unwrap();
        let writes = [0.75 * shares[0], 0.25 * shares[1]];
        plant.cpu_ratio = writes.iter().sum();
        plant.advance();
        for ((vcpu, part), share) in vcpus.iter_mut().zip(writes).zip(shares) {
            vcpu.touched_bytes += count(plant.touch_rate * part * TICK_S);
            vcpu.wanted_ns += count(TICK_S * NS_PER_S);
            vcpu.kept_ns += count(share * TICK_S * NS_PER_S);
        }
        let sample = plant.sample;
        plant.controller.step(Some(&sample), &vcpus, TICK_S);
    }
    let cuts: Vec<f64> = plant.controller.vcpu_shares().iter().map(|share| 1.0 - share).collect();
    assert!(cuts[1] > 0.1 && (cuts[0] / cuts[1] - 3.0).abs() < 0.2, "{cuts:?}");
}

#[test]
fn trifles_are_not_given_back_and_the_rest_at_once_only_where_room_lasts() {
    let mut controller = Controller::new(policy(), 1).unwrap();
    controller.command.cpu_ratio = 0.5;
    let slow = 0.5 + RELEASE_PER_S * TICK_S;
    let steps = [(0.52, true, 0.5), (0.6, false, slow), (0.4, true, 0.4), (0.8, true, 0.8)];
    for (free, room_lasts, after) in steps {
        controller.move_to(free, room_lasts, TICK_S);
        assert!((controller.command.cpu_ratio - after).abs() < 1e-9, "{free}: {controller:?}");
    }
}

#[test]
fn an_old_sample_and_a_long_regime_call_for_more_room() {
    // Even the least share is more than this disk takes.
    let mut plant = Plant::new(policy(), 1.5e9, 400e6);
    plant.ticks(8);
    plant.controller.command.cpu_ratio = 1.0;
    let from = position(32 * GIB, GIB / 16);
    let free = |plant: &Plant, age_s| plant.controller.free_ratio(from, number(GIB), age_s);
    let before = free(&plant, 0.0);
    assert!(free(&plant, 0.1) < before - 0.1);
    for _ in 0..60 {
        plant.sample.buffer_used_bytes = GIB / 16;
        plant.tick();
    }
    let after = free(&plant, 0.0);
    assert!(after < before - 0.1, "{after} and {before}");
}

#[test]
fn the_deadline_counts_from_the_first_sample() {
    let mut plant =
        Plant::new(Policy { deadline_ns: Some(200_000_000_000), ..policy() }, 10e6, 400e6);
    assert_eq!(plant.ticks(2000).abort, None);
    // What is left would take 140 s. There are 100 s, of 200.
    plant.drain_rate = 200e6;
    let abort = (0..1200).find_map(|_| plant.tick().abort).unwrap();
    assert_eq!(abort.reason, AbortReason::Deadline);
}

#[test]
fn what_a_full_buffer_takes_from_writers_breaks_the_limit() {
    let mut plant = Plant::new(policy(), 400e6, 400e6);
    plant.ticks(40);
    plant.drain_rate = 4e6;
    let abort = (0..400).find_map(|_| plant.tick().abort).unwrap();
    assert_eq!(abort.reason, AbortReason::MinCpu);
}

#[test]
fn what_fits_anyway_is_left_alone_although_more_is_in_use_than_is_planned_with() {
    let mut plant = Plant::new(policy(), 1e9, 400e6);
    for _ in 0..40 {
        // A hot set of which half is taken in a second at first.
        plant.touch_rate *= 1.0 - 0.5 * plant.cpu_ratio * TICK_S;
        plant.tick();
    }
    let (from, limit) = (position(60 * GIB, GIB / 2), number(GIB));
    assert!(from.buffer_used_bytes > useful_bytes(limit));
    assert!(plant.controller.free_ratio(from, limit, 0.0) >= 1.0);
}

#[test]
fn the_largest_share_that_holds_is_found() {
    for most in [0.3, 0.55, 0.8] {
        let found = largest_share(0.3, |share| share <= most);
        assert!(found <= most && most - found < 0.03, "{found} instead of {most}");
    }
    assert!((largest_share(0.3, |_| false) - 0.3).abs() < 1e-9);
    assert!((largest_share(0.3, |_| true) - 1.0).abs() < 1e-9);
}

#[test]
fn room_that_the_guest_would_use_up_within_a_second_is_not_enough_to_give_it_all() {
    let mut plant = Plant::new(policy(), 800e6, 400e6);
    plant.ticks(20);
    let lasts =
        |share| plant.controller.room_lasts(position(60 * GIB, 40 << 20), number(GIB), share);
    assert!(lasts(0.5) && !lasts(1.0));
}

#[test]
fn a_rest_that_fits_into_the_buffer_needs_no_throttle() {
    let mut plant = Plant::new(policy(), 3e9, 400e6);
    plant.ticks(10);
    let free = |rest| plant.controller.free_ratio(position(rest, GIB / 2), number(GIB), 0.0);
    assert!(free(GIB / 2) >= 1.0 && free(GIB) < 1.0);
}

#[test]
fn a_snapshot_is_given_up_with_how_sure_its_forecast_is() {
    let policy = Policy { buffer_bytes_max: 4 * GIB, ..policy() };
    let mut plant = Plant::new(policy, 3e9, 400e6);
    let abort = (0..200).find_map(|_| plant.tick().abort).unwrap();
    assert!(abort.forecast.confidence_ratio >= 0.75, "{abort:?}");
}

#[test]
fn who_writes_nothing_is_not_given_up_although_the_buffer_is_nearly_full() {
    let mut plant = Plant::new(policy(), 600e6, 400e6);
    plant.ticks(40);
    for _ in 0..60 {
        plant.touch_rate = 0.0;
        plant.drain_rate = 20e6;
        plant.sample.buffer_used_bytes = GIB / 10 * 8;
        assert_eq!(plant.tick().abort, None);
    }
}

#[test]
fn the_bound_never_goes_below_what_is_in_use() {
    let mut plant = Plant::new(policy(), 2e9, 400e6);
    plant.ticks(20);
    plant.drain_rate = 0.0;
    plant.sample.host = Some(Host { available_bytes: 0, memory_pressure_ratio: 0.9 });
    for _ in 0..20 {
        let used = plant.sample.buffer_used_bytes;
        assert!(plant.tick().buffer_limit_bytes >= used.min(plant.sample.buffer_limit_bytes));
    }
}

#[test]
fn a_few_absurd_samples_that_do_not_follow_each_other_are_no_new_beginning() {
    let mut plant = Plant::new(policy(), 200e6, 400e6);
    plant.ticks(20);
    for _ in 0..10 {
        plant.advance();
        let absurd = Sample { touched_bytes: 0, ..plant.sample };
        let seen = plant.give(Some(&absurd)).because;
        assert_eq!(seen, Because::SampleAbsurd(Absurdity::CounterBackwards));
        assert_eq!(plant.tick().because, Because::Fits);
    }
}

#[test]
fn nothing_that_it_is_given_makes_it_panic_or_leave_its_limits() {
    let mut seed = 1_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        // Small, large and extreme numbers alike.
        seed >> (seed % 64)
    };
    let mut controller = Controller::new(policy(), 2).unwrap();
    for _ in 0..200_000 {
        let sample = Sample {
            taken_ns: next(),
            age_ns: next(),
            total_bytes: next(),
            saved_bytes: next(),
            touched_bytes: next(),
            drained_bytes: next(),
            buffer_used_bytes: next(),
            buffer_limit_bytes: next(),
            stall: Some(Stall { faults: next(), over_limit: next(), lost_events: next() }),
            host: Some(Host {
                available_bytes: next(),
                memory_pressure_ratio: f64::from_bits(next()),
            }),
        };
        let vcpus =
            [(); 2].map(|()| Vcpu { touched_bytes: next(), wanted_ns: next(), kept_ns: next() });
        let command = controller.step(Some(&sample), &vcpus, f64::from_bits(next()));
        assert!((0.3..=1.0).contains(&command.cpu_ratio), "{sample:?}: {command:?}");
        assert!(controller.vcpu_shares().iter().all(|share| (0.3..=1.0).contains(share)));
    }
}

#[test]
fn limits_that_change_count_from_then_on() {
    let mut plant = Plant::new(policy(), 1e8, 2e8);
    for _ in 0..40 {
        assert_eq!(plant.tick().abort, None);
    }
    let fit = plant.controller.fit().unwrap();
    assert!((fit.drain_rate - 2e8).abs() < 2e7, "{fit:?}");
    let absurd = Policy { min_cpu_ratio: 0.0, ..policy() };
    assert_eq!(plant.controller.set_policy(absurd), Err(PolicyError::MinCpu { ratio: 0.0 }));
    assert_eq!(plant.tick().abort, None);
    // All of it takes minutes.
    let late = Policy { deadline_ns: Some(10_000_000_000), ..policy() };
    plant.controller.set_policy(late).unwrap();
    let abort = (0..20).find_map(|_| plant.tick().abort).unwrap();
    assert_eq!(abort.reason, AbortReason::Deadline);
}
