//! What each call does.

use std::time::Duration;

use axum::Json;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::problem::{Problem, Word, link};
use super::request::{Body, Id, Parameters, idempotency_key, is_known, preferred_wait};
use crate::control_loop::Change;
use crate::daemon::book::Rejected;
use crate::daemon::forecast::Forecast;
use crate::daemon::look::Seen;
use crate::daemon::metrics::Metrics;
use crate::daemon::operation::{Operation, Request, State};
use crate::daemon::policy::Policy;
use crate::daemon::supervisor::SubmitError;
use crate::daemon::vms::{Source, Vm};

/// Operations in a list, unless fewer are asked for, and at most.
const PAGE: usize = 50;
const PAGE_MAX: usize = 500;
/// What a snapshot that is only forecast is called where its id would be.
const PLANNED: &str = "planned";
/// Prometheus' text format.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Takes a snapshot.
///
/// Answered at once; the snapshot is taken meanwhile. The same idempotency key with the same body leads to the same operation.
#[utoipa::path(
    post,
    path = "/snapshot",
    tag = "snapshot",
    params(
        ("Idempotency-Key" = Option<String>, Header, pattern = "^[!-~]{1,255}$", description = "Stands for this request, should it be sent again"),
        ("Prefer" = Option<String>, Header, description = "wait=SECONDS: answer when it has ended, but no later than that"),
    ),
    request_body = Request,
    responses(
        (status = 202, description = "It was taken up", body = Operation, headers(("Location" = String))),
        (status = 200, description = "It has ended, and was verified if that was asked for, as was waited for", body = Operation, headers(("Location" = String))),
        (status = "default", description = "It was not taken up", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn submit(
    Shared(api): Shared<Api>,
    headers: HeaderMap,
    Body(request): Body<Request>,
) -> Result<Response, Problem> {
    request.policy.check()?;
    let key = idempotency_key(&headers)?;
    let mut operation = api.handle.submit(request, key).await?;
    let max = Duration::from_secs(api.config.http.wait_seconds_max);
    let wait = preferred_wait(&headers, max);
    if let Some(wait) = wait {
        let mut view = api.handle.view();
        let id = operation.id.clone();
        let has_ended = |known: Option<&std::sync::Arc<Operation>>| {
            known.is_none_or(|known| known.is_settled())
        };
        let ended = view.wait_for(|view| has_ended(view.operations.get(&id)));
        if let Ok(Ok(view)) = tokio::time::timeout(wait, ended).await
            && let Some(ended) = view.operations.get(&id)
        {
            operation = ended.clone();
        }
    }
    let status = if operation.is_settled() { StatusCode::OK } else { StatusCode::ACCEPTED };
    let mut response =
        (status, [(header::LOCATION, link(&operation.id))], tagged(&operation)).into_response();
    if wait.is_some() {
        response.headers_mut().insert("preference-applied", HeaderValue::from_static("wait"));
    }
    Ok(response)
}

/// Forecasts whether a snapshot would keep its limits.
///
/// Nothing of the guest is changed. It is watched, and the destination written to, for some seconds.
#[utoipa::path(
    post,
    path = "/snapshot/plan",
    tag = "snapshot",
    request_body = Request,
    responses(
        (status = 200, description = "The forecast, also if it is that a snapshot would be refused", body = Forecast),
        (status = "default", description = "Nothing was forecast", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn plan(
    Shared(api): Shared<Api>,
    Body(request): Body<Request>,
) -> Result<Json<Forecast>, Problem> {
    let Request { vm: name, destination, policy, .. } = request;
    policy.check()?;
    let (vm, place) = api.handle.find(&name, destination.as_deref(), PLANNED)?;
    let view = api.handle.view().borrow().clone();
    let mut operations = view.operations.values();
    if let Some(busy) = operations.find(|known| known.vm == name && !known.state.is_final()) {
        let busy = Rejected::Busy { vm: name, id: busy.id.clone() };
        return Err(SubmitError::from(busy).into());
    }
    let policy = api.config.bounds().alone(&policy).applied_to(&policy);
    Ok(Json(api.forecaster.forecast(&name, vm, place, policy).await?))
}

/// Which operations are wanted.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Filter {
    /// Operations at most.
    #[param(minimum = 1, maximum = 500, default = 50)]
    limit: Option<usize>,
    /// Only operations before this one.
    before: Option<String>,
    /// Only of this virtual machine.
    vm: Option<String>,
    /// Only in this state.
    state: Option<State>,
}

/// A page of operations.
#[derive(Debug, Serialize, ToSchema)]
pub struct Page {
    /// The newest first, without their results.
    operations: Vec<Operation>,
    /// Where the list goes on, if it does.
    next: Option<String>,
}

/// Lists operations, the newest first.
#[utoipa::path(
    get,
    path = "/snapshot",
    tag = "snapshot",
    params(Filter),
    responses(
        (status = 200, description = "A page of operations", body = Page),
        (status = "default", description = "It cannot be listed", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn list(
    Shared(api): Shared<Api>,
    Parameters(filter): Parameters<Filter>,
) -> Result<Json<Page>, Problem> {
    let limit = filter.limit.unwrap_or(PAGE);
    if !(1..=PAGE_MAX).contains(&limit) {
        let detail = format!("limit is {limit}: ask for 1 to {PAGE_MAX}");
        return Err(Problem::new(Word::BadArgument, detail));
    }
    let view = api.handle.view().borrow().clone();
    let is_meant = |known: &&std::sync::Arc<Operation>| {
        filter.before.as_ref().is_none_or(|before| known.id < *before)
            && filter.vm.as_ref().is_none_or(|vm| known.vm == *vm)
            && filter.state.is_none_or(|state| known.state == state)
    };
    let mut found = view.operations.values().rev().filter(is_meant);
    let brief = |known: &std::sync::Arc<Operation>| Operation { result: None, ..(**known).clone() };
    let operations: Vec<_> = found.by_ref().take(limit).map(brief).collect();
    let next = found.next().and(operations.last()).map(|last| {
        let mut next = format!("/snapshot?limit={limit}&before={}", last.id);
        if let Some(vm) = operations.first().filter(|_| filter.vm.is_some()).map(|first| &first.vm)
        {
            next.push_str(&format!("&vm={vm}"));
        }
        if let Some(state) = filter.state {
            next.push_str(&format!("&state={}", state.as_str()));
        }
        next
    });
    Ok(Json(Page { operations, next }))
}

/// Tells of an operation.
#[utoipa::path(
    get,
    path = "/snapshot/{id}",
    tag = "snapshot",
    params(
        ("id" = String, Path, description = "The operation"),
        ("If-None-Match" = Option<String>, Header, description = "Answer only if it is another than this entity tag says"),
    ),
    responses(
        (status = 200, description = "The operation; one that failed has an error", body = Operation, headers(("ETag" = String))),
        (status = 304, description = "It is as the client knows it"),
        (status = "default", description = "It cannot be told", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn show(
    Shared(api): Shared<Api>,
    Id(id): Id,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let view = api.handle.view().borrow().clone();
    let operation = view.operations.get(&id).ok_or_else(|| Problem::unknown_operation(&id))?;
    let tag = entity_tag(operation);
    if is_known(&headers, &tag) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response());
    }
    Ok(tagged(operation).into_response())
}

/// Gives an operation up.
///
/// The guest runs on, and nothing is left of the snapshot. One that has ended stays as it is.
#[utoipa::path(
    post,
    path = "/snapshot/{id}/abort",
    tag = "snapshot",
    params(("id" = String, Path, description = "The operation")),
    responses(
        (status = 202, description = "It is being given up, or has ended", body = Operation),
        (status = "default", description = "It cannot be given up", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn abort(Shared(api): Shared<Api>, Id(id): Id) -> Result<Response, Problem> {
    let operation = api.handle.abort(&id).await?.ok_or_else(|| Problem::unknown_operation(&id))?;
    Ok((StatusCode::ACCEPTED, tagged(&operation)).into_response())
}

/// Changes the limits of an operation that waits or runs.
///
/// Answered when they are in force. What is not named stays as it is.
#[utoipa::path(
    patch,
    path = "/snapshot/{id}/policy",
    tag = "snapshot",
    params(("id" = String, Path, description = "The operation")),
    request_body = Change,
    responses(
        (status = 200, description = "They are in force", body = Operation),
        (status = "default", description = "They are as they were", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn change_policy(
    Shared(api): Shared<Api>,
    Id(id): Id,
    Body(change): Body<Change>,
) -> Result<Response, Problem> {
    Policy::default().changed(&change).check()?;
    api.handle.change(&id, change).await?.map_err(|error| Problem::unchangeable(&error, &id))?;
    let view = api.handle.view().borrow().clone();
    let operation = view.operations.get(&id).ok_or_else(|| Problem::unknown_operation(&id))?;
    Ok(tagged(operation).into_response())
}

/// Forgets an operation that has ended. The snapshot stays.
#[utoipa::path(
    delete,
    path = "/snapshot/{id}",
    tag = "snapshot",
    params(("id" = String, Path, description = "The operation")),
    responses(
        (status = 204, description = "It is forgotten"),
        (status = "default", description = "It is not forgotten", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn forget(Shared(api): Shared<Api>, Id(id): Id) -> Result<StatusCode, Problem> {
    let forgotten = api.handle.forget(&id).await?;
    forgotten.map_err(|why| Problem::unforgettable(why, &id))?;
    Ok(StatusCode::NO_CONTENT)
}

/// A virtual machine.
#[derive(Debug, Serialize, ToSchema)]
pub struct VmEntry {
    /// Its name.
    name: String,
    /// Its QMP socket.
    qmp: String,
    /// How it came to be known.
    source: Source,
    /// The operation that waits or runs, if one does.
    operation: Option<String>,
    /// When its last good snapshot was completed, of those that are remembered.
    last_completed_at: Option<String>,
    /// When its next snapshot is due, by schedules.
    next_at: Option<String>,
    /// Why a schedule leaves it out for now.
    left_out: Option<String>,
    /// What was seen of it last, but not while it is being snapshotted.
    seen: Option<Seen>,
}

/// The virtual machines.
#[derive(Debug, Serialize, ToSchema)]
pub struct VmList {
    /// By name.
    vms: Vec<VmEntry>,
}

/// Lists the virtual machines, with what would refuse a snapshot of each.
#[utoipa::path(
    get,
    path = "/vms",
    tag = "host",
    responses((status = 200, description = "The virtual machines", body = VmList)),
)]
pub async fn vms(Shared(api): Shared<Api>) -> Json<VmList> {
    let view = api.handle.view().borrow().clone();
    let entry = |(name, vm): (String, Vm)| {
        let own = || view.operations.values().rev().filter(|known| known.vm == name);
        let unfinished = own().find(|known| !known.state.is_final());
        let completed = own().find(|known| known.is_good());
        VmEntry {
            qmp: vm.qmp.display().to_string(),
            source: vm.source,
            operation: unfinished.map(|known| link(&known.id)),
            last_completed_at: completed.and_then(|known| known.ended_at.clone()),
            next_at: view.next_at.get(&name).cloned(),
            left_out: view.left_out.get(&name).cloned(),
            seen: vm.seen.map(|seen| (*seen).clone()),
            name,
        }
    };
    Json(VmList { vms: api.handle.vms().all().into_iter().map(entry).collect() })
}

/// How the daemon is.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// In a word.
    status: &'static str,
}

/// Whether the daemon lives.
#[utoipa::path(
    get,
    path = "/healthz",
    tag = "host",
    responses((status = 200, description = "It does", body = Health)),
)]
pub async fn healthz() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// Whether the daemon takes up snapshots.
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "host",
    responses(
        (status = 200, description = "It does", body = Health),
        (status = "default", description = "It does not", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn readyz(Shared(api): Shared<Api>) -> Result<Json<Health>, Problem> {
    if api.handle.view().borrow().is_closing {
        return Err(Problem::new(Word::Closing, "the daemon is ending: ask again when it is back"));
    }
    Ok(Json(Health { status: "ready" }))
}

/// Tells Prometheus what it counts and measures.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "host",
    responses(
        (status = 200, description = "All series; docs/metrics.md has them", body = String, content_type = "text/plain; version=0.0.4"),
        (status = "default", description = "They cannot be told", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn metrics(Shared(api): Shared<Api>) -> Result<Response, Problem> {
    show_metrics(api.metrics).await
}

/// All series as text.
///
/// # Errors
/// If they do not fit together.
pub async fn show_metrics(metrics: Metrics) -> Result<Response, Problem> {
    // It looks at file systems, which may take their time.
    let text = spawn_blocking(move || metrics.text()).await;
    let failed = |error: String| Problem::new(Word::Io, format!("cannot tell metrics: {error}"));
    let text = text.map_err(|error| failed(error.to_string()))?;
    let text = text.map_err(|error| failed(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response())
}

/// Names what an operation looks like. Its version alone does not: what was not kept may get a number anew.
fn entity_tag(operation: &Operation) -> String {
    format!("\"{}-{}\"", operation.version, operation.state.as_str())
}

fn tagged(operation: &Operation) -> impl IntoResponse + use<> {
    ([(header::ETAG, entity_tag(operation))], Json(operation.clone()))
}
