//! The API over HTTP.
//!
//! ```text
//! listen    sockets, connections and their limits
//! gate      who is let in over TCP
//! tls       certificate, key and handshake, for those who come from other hosts
//! secret    files that nobody else may read
//! page      the live page
//! routes    what each call does
//! request   what is read of a request
//! events    operations as they change
//! problem   how a call fails: RFC 9457
//! ```
//!
//! Reading calls look at the supervisor's view and never disturb it; only calls that change something go through it.

mod events;
pub mod gate;
pub mod listen;
mod page;
pub mod problem;
mod request;
mod routes;
mod secret;
pub mod tls;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::{Next, from_fn_with_state, map_response};
use axum::response::Response;
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::config::Config;
use super::forecast::Forecaster;
use super::metrics::Metrics;
use super::supervisor::Handle;
use problem::{Problem, Word};

/// What every call works with.
#[derive(Clone, Debug)]
pub struct Api {
    handle: Handle,
    config: Arc<Config>,
    metrics: Metrics,
    forecaster: Forecaster,
}

impl Api {
    /// For the supervisor behind `handle`.
    pub fn new(handle: Handle, config: Arc<Config>, metrics: Metrics) -> Self {
        Self { handle, config, metrics, forecaster: Forecaster::default() }
    }
}

#[derive(utoipa::OpenApi)]
#[openapi(info(
    title = "livesnap",
    description = "Live point-in-time snapshots of running virtual machines. A snapshot is a long-running operation: POST starts it, GET tells how far it is."
))]
struct Document;

/// Every call, with its description for /openapi.json.
fn described() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(routes::submit, routes::list))
        .routes(routes!(routes::plan))
        .routes(routes!(routes::show, routes::forget))
        .routes(routes!(events::events))
        .routes(routes!(routes::abort))
        .routes(routes!(routes::change_policy))
        .routes(routes!(routes::vms))
        .routes(routes!(routes::healthz))
        .routes(routes!(routes::readyz))
        .routes(routes!(routes::metrics))
}

/// Counts an answer, and how long it took: that of a stream of events never ends by itself.
async fn count(State(metrics): State<Metrics>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    let route = route.as_ref().map_or("other", MatchedPath::as_str);
    if !route.ends_with("/events") {
        metrics.answered(route, response.status().as_u16(), began.elapsed());
    }
    response
}

/// What is served to Prometheus over TCP: metrics, and nothing else.
pub fn metrics_router(metrics: Metrics) -> Router {
    let show = async move || routes::show_metrics(metrics.clone()).await;
    Router::new().route("/metrics", axum::routing::get(show))
}

/// All that is served.
pub fn router(api: Api) -> Router {
    let body_bytes_max = api.config.http.body_bytes_max;
    let (router, document) = described().split_for_parts();
    let document = axum::Json(document);
    router
        .merge(page::router())
        .route("/openapi.json", axum::routing::get(async move || document.clone()))
        .fallback(async || {
            Problem::new(
                Word::NotFound,
                "there is nothing of that name: GET /openapi.json tells what there is",
            )
        })
        .method_not_allowed_fallback(async || {
            Problem::new(
                Word::MethodNotAllowed,
                "this cannot be done to it: the header Allow tells what can",
            )
        })
        .layer(DefaultBodyLimit::max(body_bytes_max))
        .layer(map_response(hardened))
        .layer(from_fn_with_state(api.metrics.clone(), count))
        .with_state(api)
}

/// What a browser must not make of an answer: anything but what it says to be, or a part of another site's page.
async fn hardened(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}
