//! The live page: what `page/` has, as it is.
//!
//! It asks the API as any client does. Its policy lets nothing in that did not come from the daemon, and no other page
//! around it.

use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;

/// The page's parts: path, type and content. Nothing in them is secret.
const PARTS: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/app.js", "text/javascript; charset=utf-8", include_str!("page/app.js")),
    ("/style.css", "text/css; charset=utf-8", include_str!("page/style.css")),
    ("/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
];
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Serves the page.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    PARTS.into_iter().fold(Router::new(), |router, (path, kind, content)| {
        router.route(path, get(async move || part(kind, content)))
    })
}

/// Whether `path` is a part of the page, which says nothing of the host.
pub fn has(path: &str) -> bool {
    PARTS.iter().any(|(part, ..)| *part == path)
}

fn part(kind: &'static str, content: &'static str) -> impl IntoResponse {
    let headers = [
        (header::CONTENT_TYPE, kind),
        // It is small, and must fit the daemon that serves it.
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, content)
}
