//! Who goes first where the engine's threads and the virtual CPUs want the same processors. Each thread of the
//! engine says what it is when it starts; on Linux, a nice value is a thread's own.

use crate::sys::io_priority;

/// Nice value of fault threads: a virtual CPU waits for them.
const RAISED: i32 = -15;

/// By how much sweep and writer are nicer than their caller: beside a busy virtual CPU they get a tenth of a
/// processor. Not less, for a page that is just being saved has to be finished before the guest can
/// write to it.
const NICER: i32 = 10;

/// By how much it is nicer whom nobody waits for: as much as there is.
const NICEST: i32 = 19;

/// The calling thread goes before others, as far as its privileges allow.
pub fn raise() {
    if let Err(error) = rustix::process::setpriority_process(None, RAISED) {
        tracing::debug!(%error, "fault threads run at the usual priority");
    }
}

/// The calling thread, for which nobody waits, lets others go first.
pub fn lower() {
    if let Err(error) = rustix::process::nice(NICER) {
        tracing::debug!(%error, "sweep and writer run at the usual priority");
    }
}

/// The calling thread, and whatever it becomes or starts, takes only what nobody else wants of processors and disks; of disks
/// where the scheduler of the device goes by that.
pub fn stand_back() {
    if let Err(error) = rustix::process::nice(NICEST) {
        tracing::debug!(%error, "it runs at the usual priority");
    }
    if let Err(error) = io_priority::set_idle() {
        tracing::debug!(%error, "it reads at the usual priority");
    }
}
