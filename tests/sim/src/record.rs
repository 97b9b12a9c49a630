//! Recorded runs: a line of JSON for each tick, with what was seen and what was commanded, so that any run can be put
//! through the control core again.

use std::io::{BufRead, Write};

use anyhow::{Context, Result, ensure};
use livesnap_control::Controller;
use livesnap_control::record::{Head, Tick};

/// Writes a run.
///
/// # Errors
/// When `to` does not take it.
pub fn write(to: &mut impl Write, head: &Head, ticks: &[Tick<'_>]) -> Result<()> {
    serde_json::to_writer(&mut *to, head)?;
    for tick in ticks {
        to.write_all(b"\n")?;
        serde_json::to_writer(&mut *to, tick)?;
    }
    to.write_all(b"\n")?;
    Ok(())
}

/// Reads a run and puts it through a fresh control core; returns the number of ticks.
///
/// # Errors
/// When it is no record, or the core commands something else than was recorded.
pub fn replay(from: impl BufRead) -> Result<usize> {
    let mut lines = from.lines();
    let head = lines.next().context("the record is empty; it begins with a line of limits")??;
    let head: Head = serde_json::from_str(&head).context("line 1 of the record is no head")?;
    let mut controller = Controller::new(head.policy, head.vcpus)?;
    let mut count = 0;
    for (line, number) in lines.zip(2..) {
        let recorded: Tick<'_> = serde_json::from_str(&line?)
            .with_context(|| format!("line {number} of the record is no tick"))?;
        if let Some(policy) = recorded.policy {
            controller.set_policy(policy)?;
        }
        let sample = recorded.sample.as_ref();
        let command = controller.step(sample, &recorded.vcpus, recorded.dt_s);
        ensure!(
            command == recorded.command && recorded.shares == controller.vcpu_shares(),
            "line {number}: the control core now commands {command:?}, not {:?}",
            recorded.command
        );
        count += 1;
    }
    Ok(count)
}
