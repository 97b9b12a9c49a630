//! What the guest is told on the kernel command line: `ls.KEY=VALUE`, everything else is the kernel's.

use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use livesnap_guest::page::WORKERS_MAX;

/// The load to put on this VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// `ls.run`: marks the pages of this boot.
    pub run: u64,
    /// `ls.populate`, MiB written once and then only read.
    pub populate_mib: usize,
    /// `ls.ring`, MiB rewritten over and over, by all workers together.
    pub ring_mib: usize,
    /// `ls.workers`: number of threads that share the ring.
    pub workers: usize,
    /// `ls.rate`: pages a second of each worker, 0 for as many as it can.
    pub rate: u64,
    /// `ls.pattern`: the order in which a worker goes through its slots.
    pub pattern: Pattern,
    /// `ls.disk`: block device to write to.
    pub disk: Option<String>,
    /// `ls.disk_mib`: MiB of it that are rewritten over and over.
    pub disk_mib: u64,
    /// `ls.ready`: when the guest says that it is ready.
    pub ready: Ready,
}

/// The order in which a worker goes through its slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// One after another.
    Sequential,
    /// Far apart, yet each once a lap.
    Random,
}

/// When the guest says that it is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// When each worker has been through its ring once.
    Lap,
    /// When the workers have started: the first lap then touches memory that was never touched before.
    Started,
}

impl Params {
    /// Reads the command line; a key of ours that is unknown is an error.
    pub fn parse(command_line: &str) -> Result<Self> {
        let mut params = Self {
            run: 1,
            populate_mib: 0,
            ring_mib: 16,
            workers: 1,
            rate: 0,
            pattern: Pattern::Sequential,
            disk: None,
            disk_mib: 16,
            ready: Ready::Lap,
        };
        for (key, value) in command_line
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("ls.")?.split_once('='))
        {
            match key {
                "run" => params.run = number(key, value)?,
                "populate" => params.populate_mib = number(key, value)?,
                "ring" => params.ring_mib = number(key, value)?,
                "workers" => params.workers = number(key, value)?,
                "rate" => params.rate = number(key, value)?,
                "disk" => params.disk = Some(value.to_owned()),
                "disk_mib" => params.disk_mib = number(key, value)?,
                "pattern" => {
                    params.pattern = match value {
                        "seq" => Pattern::Sequential,
                        "random" => Pattern::Random,
                        _ => bail!("ls.pattern={value} is neither seq nor random"),
                    }
                }
                "ready" => {
                    params.ready = match value {
                        "lap" => Ready::Lap,
                        "started" => Ready::Started,
                        _ => bail!("ls.ready={value} is neither lap nor started"),
                    }
                }
                _ => bail!("ls.{key}={value} is not known to this guest"),
            }
        }
        ensure!(
            (1..=WORKERS_MAX).contains(&params.workers),
            "ls.workers={} is not in 1..={WORKERS_MAX}",
            params.workers
        );
        ensure!(params.ring_mib >= 1, "ls.ring must be at least 1 (MiB)");
        Ok(params)
    }
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    value.parse().with_context(|| format!("ls.{key}={value} is not a number that fits"))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    #[test]
    fn keys_of_the_kernel_are_left_alone() {
        let params =
            Params::parse("console=ttyS0 panic=-1 ls.ring=64 ls.workers=2 ls.disk=/dev/vda quiet")
                .unwrap();
        assert_eq!(
            (params.ring_mib, params.workers, params.disk.as_deref()),
            (64, 2, Some("/dev/vda"))
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["ls.rings=1", "ls.ring=x", "ls.ring=0", "ls.workers=9", "ls.pattern=zigzag"] {
            assert!(Params::parse(bad).is_err(), "{bad}");
        }
    }
}
