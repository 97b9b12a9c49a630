//! Attaching, reading, detaching.

use std::path::PathBuf;

use aya::maps::{Array, HashMap, MapError, PerCpuArray};
use livesnap_ebpf_common::{HistogramWords, PERIOD_AFTER};

use crate::ranges::{self, Range};
use crate::reading::{Lost, Reading, Stalls, ThreadStalls};
use crate::tier::{Attached, Refusal, Request, Tier, first_of, join};

/// What the caller may choose.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only this tier; else the first of [`Tier::ALL`] that can be attached.
    pub tier: Option<Tier>,
    /// Type information of the kernel, where it is not at its usual place.
    pub btf: Option<PathBuf>,
    /// Ways to go wrong, for tests that must be able to fail.
    #[cfg(feature = "controls")]
    pub controls: Controls,
}

/// Defects to order: the controls of the project's tests.
#[cfg(feature = "controls")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Controls {
    /// Starts only: no end is seen.
    pub without_ends: bool,
}

impl Options {
    const fn has_ends(&self) -> bool {
        #[cfg(feature = "controls")]
        if self.controls.without_ends {
            return false;
        }
        true
    }
}

/// Probes of one process; dropping them detaches them.
pub struct Probes {
    attached: Attached,
    tier: Tier,
    refusals: Vec<Refusal>,
}

/// Why there are no probes, or no figures.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Not one tier could be attached.
    #[error("no probe can be attached: {}", join(refusals))]
    Refused {
        /// Why not, for each that was tried.
        refusals: Vec<Refusal>,
    },
    /// A map cannot be read or written.
    #[error("the map {map} of the probes cannot be used: {source}")]
    Map {
        /// Its name.
        map: &'static str,
        /// What aya found.
        source: MapError,
    },
}

impl Probes {
    /// Attaches to all threads of the process `pid`, present and to come, for write-protect faults in `ranges`, of
    /// which up to 16 are told apart; see `ranges`.
    ///
    /// # Errors
    /// [`ProbeError::Refused`] if no tier can be attached.
    pub fn attach(pid: u32, ranges: &[Range], options: &Options) -> Result<Self, ProbeError> {
        let request = Request {
            tgid: pid,
            ranges: ranges::words(ranges),
            btf: options.btf.as_deref(),
            has_ends: options.has_ends(),
        };
        let tiers =
            Tier::ALL.into_iter().filter(|tier| options.tier.is_none_or(|only| only == *tier));
        let (tier, attached, refusals) = first_of(tiers, |tier| tier.attach(&request))
            .map_err(|refusals| ProbeError::Refused { refusals })?;
        Ok(Self { attached, tier, refusals })
    }

    /// The tier that is attached.
    #[must_use]
    pub const fn tier(&self) -> Tier {
        self.tier
    }

    /// Why each better one is not.
    #[must_use]
    pub fn refusals(&self) -> &[Refusal] {
        &self.refusals
    }

    /// From now on faults that begin are counted as [`Period::After`](crate::Period::After). Takes a microsecond.
    ///
    /// # Errors
    /// [`ProbeError::Map`].
    pub fn mark(&mut self) -> Result<(), ProbeError> {
        const NAME: &str = "PERIOD";
        let map = self.attached.object.map_mut(NAME).ok_or_else(|| missing(NAME))?;
        let mut period = Array::<_, u32>::try_from(map).map_err(unusable(NAME))?;
        period.set(0, PERIOD_AFTER, 0).map_err(unusable(NAME))
    }

    /// What was counted so far. Faults that go on meanwhile may be counted in part of the figures.
    ///
    /// # Errors
    /// [`ProbeError::Map`].
    pub fn read(&self) -> Result<Reading, ProbeError> {
        let kinds_are_known = self.attached.kinds_are_known;
        let (threads, lost) = (self.threads()?, self.lost()?);
        Ok(Reading { stalls: Stalls { threads, kinds_are_known, lost } })
    }

    fn threads(&self) -> Result<Vec<ThreadStalls>, ProbeError> {
        const NAME: &str = "HISTOGRAMS";
        let map = self.attached.object.map(NAME).ok_or_else(|| missing(NAME))?;
        let map = HashMap::<_, [u32; 2], HistogramWords>::try_from(map).map_err(unusable(NAME))?;
        let entries = map.iter().map(|entry| entry.map_err(unusable(NAME)));
        let mut threads = entries
            .map(|entry| entry.map(|(key, value)| ThreadStalls::from_words(key, value)))
            .collect::<Result<Vec<_>, _>>()?;
        threads.sort_by_key(|thread| (thread.tid, thread.period, thread.mode, thread.kind));
        Ok(threads)
    }

    fn lost(&self) -> Result<Lost, ProbeError> {
        const NAME: &str = "COUNTERS";
        let map = self.attached.object.map(NAME).ok_or_else(|| missing(NAME))?;
        let map = PerCpuArray::<_, u64>::try_from(map).map_err(unusable(NAME))?;
        Lost::from_counters(|counter| {
            let values = map.get(&counter, 0).map_err(unusable(NAME))?;
            Ok(values.iter().sum())
        })
    }
}

fn missing(map: &'static str) -> ProbeError {
    ProbeError::Map { map, source: MapError::ElementNotFound }
}

fn unusable(map: &'static str) -> impl Fn(MapError) -> ProbeError {
    move |source| ProbeError::Map { map, source }
}
