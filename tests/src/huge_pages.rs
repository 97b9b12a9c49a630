//! The host's pool of 2 MiB huge pages.

use std::fs;

use anyhow::{Context, Result, ensure};

/// 2 MiB huge pages of the host, given back when dropped.
#[derive(Debug)]
pub struct HugePages {
    count: u64,
}

impl HugePages {
    const FILE: &str = "/proc/sys/vm/nr_hugepages";

    /// Adds `mib` MiB of huge pages to the host's pool; needs root.
    pub fn reserve(mib: u64) -> Result<Self> {
        let before = Self::read()?;
        let pages = Self { count: mib.div_ceil(2) };
        Self::write(before + pages.count)?;
        let now = Self::read()?;
        ensure!(
            now >= before + pages.count,
            "the host gave {} huge pages instead of {}",
            now - before,
            pages.count
        );
        Ok(pages)
    }

    fn read() -> Result<u64> {
        let text = fs::read_to_string(Self::FILE)
            .with_context(|| format!("cannot read {}", Self::FILE))?;
        text.trim().parse().with_context(|| format!("{} holds {text}", Self::FILE))
    }

    fn write(count: u64) -> Result<()> {
        fs::write(Self::FILE, count.to_string())
            .with_context(|| format!("cannot write {}", Self::FILE))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Nobody is left to tell; the pages stay reserved, which harms no result.
        let _ = Self::read().and_then(|now| Self::write(now.saturating_sub(self.count)));
    }
}
