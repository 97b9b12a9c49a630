//! What the guest is told to do, by its kernel command line.

/// What the guest shall do; see `guest/src/params.rs`.
#[derive(Debug, Clone)]
pub struct Load {
    /// MiB written once and then only read.
    pub populate_mib: u32,
    /// MiB rewritten over and over, by all workers together.
    pub ring_mib: u32,
    /// Threads that share the ring.
    pub workers: u32,
    /// Pages a second of each worker; 0 is as many as it can.
    pub rate: u32,
    /// Far apart instead of one after another.
    pub random: bool,
    /// Whether a worker writes the first disk.
    pub disk: bool,
    /// Ready before the first lap: the rest of it touches memory that was never touched before.
    pub ready_early: bool,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            populate_mib: 16,
            ring_mib: 16,
            workers: 1,
            rate: 0,
            random: false,
            disk: false,
            ready_early: false,
        }
    }
}

impl Load {
    /// The guest's kernel command line.
    pub(crate) fn command_line(&self) -> String {
        let mut words = vec![
            "console=ttyS0,115200 quiet loglevel=1 panic=-1".to_owned(),
            // A page that the guest kernel moves leaves a copy behind, which the checker would find.
            "transparent_hugepage=never".to_owned(),
            // An emulated timer on a busy host is too late for the kernel's test of it, which then gives up booting.
            "no_timer_check".to_owned(),
            format!("ls.run={}", fresh_run()),
            format!("ls.populate={}", self.populate_mib),
            format!("ls.ring={}", self.ring_mib),
            format!("ls.workers={}", self.workers),
            format!("ls.rate={}", self.rate),
        ];
        words.extend(self.random.then(|| "ls.pattern=random".to_owned()));
        words.extend(self.disk.then(|| "ls.disk=/dev/vda".to_owned()));
        words.extend(self.ready_early.then(|| "ls.ready=started".to_owned()));
        words.join(" ")
    }
}

/// A number that no earlier boot had, so that leftovers on a disk are never taken for this one's.
fn fresh_run() -> u128 {
    std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_nanos() & u128::from(u64::MAX))
}
