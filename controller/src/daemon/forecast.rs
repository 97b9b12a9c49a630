//! A forecast before anything is begun: `livesnap plan`, which arms nothing, and what it tells.
//!
//! A process of its own like a snapshot's, ended with the daemon. It measures a machine and a disk for some seconds, so
//! there is only one at a time, and it runs to its end even if nobody waits for it any more.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use snapshot_core::Reason;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use utoipa::ToSchema;

use super::child;
use super::destination::{DestinationError, Place};
use super::operation::OperationError;
use super::policy::Policy;
use super::vms::Vm;

/// How long a forecast waits for another one, and for the machine's turn.
const TURN_LIMIT: Duration = Duration::from_secs(20);

/// Would a snapshot keep its limits?
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Forecast {
    /// Name of the virtual machine.
    pub vm: String,
    /// Whether a snapshot would be begun.
    pub is_feasible: bool,
    /// What `livesnap plan --json` tells, if it came to a verdict.
    #[schema(value_type = Option<Object>)]
    pub forecast: Option<Value>,
    /// Why a snapshot would not be begun, or why nothing can be said.
    pub error: Option<OperationError>,
}

/// Why nothing was forecast.
#[derive(Debug, thiserror::Error)]
pub enum ForecastError {
    /// One at a time.
    #[error("another forecast is being made, or {vm} is being talked to: ask again later")]
    Busy {
        /// The machine.
        vm: String,
    },
    /// It may not lie there.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// The process did not work.
    #[error("cannot run the forecast's process: {0}")]
    Process(#[from] io::Error),
    /// It did not tell what it should.
    #[error("cannot understand the forecast of {vm}: {source}; the daemon's log may tell more")]
    Answer {
        /// The machine.
        vm: String,
        /// Why.
        source: serde_json::Error,
    },
}

/// Makes forecasts, one after the other. Clones take the same turns.
#[derive(Clone, Debug, Default)]
pub struct Forecaster(Arc<Mutex<()>>);

impl Forecaster {
    /// Forecasts a snapshot of `vm`, which is called `name`, to `place` within `policy`.
    ///
    /// Must be called on the daemon's main thread: the kernel ends the process with the thread that started it.
    ///
    /// # Errors
    /// If it cannot be made. That a snapshot would be refused is a forecast.
    pub async fn forecast(
        &self,
        name: &str,
        vm: Vm,
        place: Place,
        policy: Policy,
    ) -> Result<Forecast, ForecastError> {
        let busy = |_| ForecastError::Busy { vm: name.into() };
        let turns = async { (self.0.clone().lock_owned().await, vm.turn.lock_owned().await) };
        let turns = timeout(TURN_LIMIT, turns).await.map_err(busy)?;
        // Not by the caller's task, which ends with its connection: the turns are given back when the process has ended.
        let run = tokio::spawn(async move {
            let text = run(&vm.qmp, place, &policy).await;
            drop(turns);
            text
        });
        let text = run.await.map_err(io::Error::other)??;
        let answer = |source| ForecastError::Answer { vm: name.into(), source };
        Ok(read(name, serde_json::from_slice(&text).map_err(answer)?))
    }
}

/// What `livesnap plan` says.
async fn run(qmp: &Path, place: Place, policy: &Policy) -> Result<Vec<u8>, ForecastError> {
    let nearest = spawn_blocking(move || place.nearest()).await.map_err(io::Error::other)??;
    let mut command = child::command(&["plan", "--json"], &nearest.directory);
    command.arg("--qmp").arg(qmp).arg("--out").arg(&nearest.name).args(policy.limits());
    command.stdin(Stdio::null());
    Ok(command.output().await?.stdout)
}

fn read(vm: &str, told: Value) -> Forecast {
    let error = told["error"].as_str().map(|detail| OperationError {
        reason: serde_json::from_value(told["reason"].clone()).unwrap_or(Reason::Internal),
        detail: detail.into(),
    });
    let has_verdict = told["verdict"].is_string();
    Forecast {
        vm: vm.into(),
        is_feasible: has_verdict && error.is_none(),
        forecast: has_verdict.then_some(told),
        error,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_verdict_is_told_with_what_is_in_the_way() {
        let fits = read("vm1", json!({"verdict": "fits", "reason": null, "error": null}));
        assert!(fits.is_feasible && fits.forecast.is_some() && fits.error.is_none());
        let uncertain = read("vm1", json!({"verdict": "uncertain", "reason": "buffer_full"}));
        assert!(uncertain.is_feasible && uncertain.error.is_none());
        let late =
            read("vm1", json!({"verdict": "infeasible", "reason": "deadline", "error": "no"}));
        assert!(!late.is_feasible && late.forecast.is_some());
        assert_eq!(late.error.map(|error| error.reason), Some(Reason::Deadline));
        let refused =
            read("vm1", json!({"outcome": "failed", "reason": "no_space", "error": "no"}));
        assert!(!refused.is_feasible && refused.forecast.is_none());
        assert_eq!(refused.error.map(|error| error.reason), Some(Reason::NoSpace));
        assert!(!read("vm1", json!({})).is_feasible, "nothing was said");
    }
}
