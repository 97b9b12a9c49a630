//! How the plant is seen: the samples that a law gets, some late, some never.

use std::collections::VecDeque;

use livesnap_control::{Sample, Stall, Vcpu};

use crate::plant::Plant;
use crate::random::Random;
use crate::scenario::whole;

/// Samples that a late one may be behind.
const LATE_TICKS: usize = 5;

/// Takes the samples of a run.
#[derive(Debug)]
pub struct Sampler {
    random: Random,
    /// The last samples, youngest first.
    taken: VecDeque<(Sample, Vec<Vcpu>)>,
    before: Counted,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    faults: f64,
    over_limit: f64,
}

impl Sampler {
    /// A sampler as good or bad as the scenario says.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { random: Random::new(seed, 3), taken: VecDeque::new(), before: Counted::default() }
    }

    /// What is seen now, with the counters of the virtual CPUs; nothing if the sample is lost.
    pub fn sample(&mut self, plant: &Plant, limit: f64) -> Option<(Sample, Vec<Vcpu>)> {
        let sampling = plant.scenario.sampling;
        let (lost, late) = (self.random.unit(), self.random.unit());
        let behind = self.random.pick(&[1, 2, 3]);
        self.taken.push_front(self.take(plant, limit));
        self.taken.truncate(LATE_TICKS);
        self.before = Counted { faults: plant.stalls.count(), over_limit: plant.over_limit };
        let is_blind = (sampling.blind_from_s..sampling.blind_until_s).contains(&plant.time_s);
        if lost < sampling.lost || is_blind {
            return None;
        }
        let (mut sample, vcpus) = if late < sampling.late {
            self.taken.get(behind)?.clone()
        } else {
            self.taken.front()?.clone()
        };
        sample.age_ns = whole(plant.time_s * 1e9) - sample.taken_ns;
        Some((sample, vcpus))
    }

    fn take(&self, plant: &Plant, limit: f64) -> (Sample, Vec<Vcpu>) {
        let scenario = plant.scenario;
        let sample = Sample {
            taken_ns: whole(plant.time_s * 1e9),
            age_ns: 0,
            total_bytes: whole(scenario.ram_bytes),
            saved_bytes: whole(scenario.ram_bytes - plant.unsaved()),
            touched_bytes: whole(plant.touched),
            drained_bytes: whole(plant.drained),
            buffer_used_bytes: whole(plant.used),
            buffer_limit_bytes: whole(limit),
            stall: Some(Stall {
                faults: whole(plant.stalls.count() - self.before.faults),
                over_limit: whole(plant.over_limit - self.before.over_limit),
                lost_events: 0,
            }),
            host: None,
        };
        let vcpus =
            plant.vcpu_touched.iter().zip(&plant.vcpu_kept_s).map(|(touched, kept_s)| Vcpu {
                touched_bytes: whole(*touched),
                wanted_ns: whole(plant.time_s * 1e9),
                kept_ns: whole(kept_s * 1e9),
            });
        (sample, vcpus.collect())
    }
}
