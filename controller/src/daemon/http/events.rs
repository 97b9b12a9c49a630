//! Server-sent events: an operation as it changes.
//!
//! A reader is shown the newest there is whenever it can take something; what came between is left out. So one that is slow,
//! or reads nothing at all, holds nobody up and fills no memory: it only keeps its connection.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use tokio::sync::watch;
use utoipa::ToSchema;

use super::Api;
use super::problem::Problem;
use super::request::Id;
use crate::daemon::supervisor::View;

/// An event, each field a line or more of it.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its description is wanted")]
struct OperationEvent {
    /// Always `operation`.
    event: String,
    /// The operation's version.
    id: String,
    /// The operation as it is then, in JSON.
    data: String,
}

/// Follows an operation.
///
/// Each event is named `operation`, has the operation's version as its id, and the operation as its data. The last one is
/// that of its end, or of its verification's. A client that comes again with `Last-Event-ID` is told nothing twice, and 204 once there is nothing more.
#[utoipa::path(
    get,
    path = "/snapshot/{id}/events",
    tag = "snapshot",
    params(
        ("id" = String, Path, description = "The operation"),
        ("Last-Event-ID" = Option<String>, Header, description = "The last event that the client has seen"),
    ),
    responses(
        (status = 200, description = "Events", body = OperationEvent, content_type = "text/event-stream"),
        (status = 204, description = "It has ended, and the client knows"),
        (status = "default", description = "It cannot be followed", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn events(
    Shared(api): Shared<Api>,
    Id(id): Id,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let view = api.handle.view();
    let now = view.borrow().operations.get(&id).map(Arc::clone);
    let now = now.ok_or_else(|| Problem::unknown_operation(&id))?;
    let seen = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    if now.is_settled() && seen == Some(now.version) {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let reader = Reader { view, id, seen, is_over: false };
    Ok(Sse::new(unfold(reader, Reader::next)).keep_alive(KeepAlive::default()).into_response())
}

/// One client.
struct Reader {
    view: watch::Receiver<Arc<View>>,
    id: String,
    /// The last version that it was sent.
    seen: Option<u64>,
    is_over: bool,
}

impl Reader {
    /// The next event; nothing after the operation's end, or the daemon's.
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        if self.is_over {
            return None;
        }
        let (id, seen) = (&self.id, self.seen);
        let is_new =
            |view: &Arc<View>| view.operations.get(id).is_none_or(|now| Some(now.version) != seen);
        // Gone if it was forgotten.
        let now = self.view.wait_for(is_new).await.ok()?.operations.get(id).map(Arc::clone)?;
        let event = Event::default().event("operation").id(now.version.to_string());
        let event = event.json_data(&*now).ok()?;
        self.seen = Some(now.version);
        self.is_over = now.is_settled();
        Some((Ok(event), self))
    }
}
