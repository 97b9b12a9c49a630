//! The background pass that saves what the guest does not write: one thread, region by region.

use crate::buffer::Purpose;
use crate::capture::{CaptureError, Engine, PanicReport, Worker};
use crate::chunk::CHUNK_PAGES_MAX;
use crate::priority;

/// Claims and saves every page that nobody else has claimed, then says so; `checks` is false only in the
/// control that saves without protection.
pub fn run(engine: &Engine, checks: bool) {
    let _report = PanicReport { engine, thread: "sweep" };
    priority::lower();
    match sweep(engine, checks) {
        Ok(()) => engine.set_swept(),
        Err(error) => engine.fail(error),
    }
}

fn sweep(engine: &Engine, checks: bool) -> Result<(), CaptureError> {
    let mut worker = Worker::new(engine, Purpose::Sweep, checks);
    for region in engine.ram.regions() {
        for window in region.windows(CHUNK_PAGES_MAX) {
            if worker.make_room(window.count)?.is_none() || engine.is_released() {
                return Ok(());
            }
            worker.capture(region, window, |won| {
                crate::arm::retry(|| engine.ram.unprotect(region, won)).map_err(|source| {
                    let address = region.address_of(won.first);
                    CaptureError::Protection { operation: "unprotect", address, source }
                })
            })?;
        }
    }
    worker.flush();
    Ok(())
}
