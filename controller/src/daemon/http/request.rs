//! What is read of a request: bodies, ids, parameters and headers, each with a problem if it is not usable.

use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::Api;
use super::problem::{Problem, Word};
use crate::json;

/// Characters of an idempotency key.
const KEY_LENGTH_MAX: usize = 255;

/// Read from an object alone.
#[derive(Deserialize)]
#[serde(transparent, bound = "T: DeserializeOwned")]
struct Object<T>(#[serde(deserialize_with = "json::object")] T);

/// A body of JSON.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Api> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        let limit = Duration::from_secs(api.config.http.read_seconds_max);
        match timeout(limit, Json::<Object<T>>::from_request(request, api)).await {
            Ok(Ok(Json(Object(body)))) => Ok(Self(body)),
            Ok(Err(rejection)) => Err(match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => {
                    let max = api.config.http.body_bytes_max;
                    Problem::new(
                        Word::BodyTooLarge,
                        format!(
                            "the body is longer than {max} bytes: leave out what is not needed"
                        ),
                    )
                }
                StatusCode::UNSUPPORTED_MEDIA_TYPE => Problem::new(
                    Word::NotJson,
                    "the body must be JSON: send the header Content-Type: application/json",
                ),
                _ => Problem::new(Word::BadArgument, rejection.body_text()),
            }),
            Err(_) => Err(Problem::new(
                Word::RequestTimeout,
                format!("the body took longer than {limit:?} to arrive: send it again"),
            )),
        }
    }
}

/// The id in the path.
pub struct Id(pub String);

impl FromRequestParts<Api> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Problem> {
        match Path::from_request_parts(parts, api).await {
            Ok(Path(id)) => Ok(Self(id)),
            // What is no text is no id either.
            Err(_) => Err(Problem::unknown_operation(parts.uri.path())),
        }
    }
}

/// The parameters behind the path.
pub struct Parameters<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<Api> for Parameters<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Problem> {
        match Query::from_request_parts(parts, api).await {
            Ok(Query(parameters)) => Ok(Self(parameters)),
            Err(rejection) => Err(Problem::new(Word::BadArgument, rejection.body_text())),
        }
    }
}

/// The idempotency key.
///
/// # Errors
/// If there are several, or it is too long or no visible text.
pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all("idempotency-key").iter();
    let (value, None) = (values.next(), values.next()) else {
        return Err(Problem::new(
            Word::BadArgument,
            "there is more than one Idempotency-Key: send one",
        ));
    };
    let Some(value) = value else { return Ok(None) };
    let is_good = |key: &&str| {
        (1..=KEY_LENGTH_MAX).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic())
    };
    match value.to_str().ok().filter(is_good) {
        Some(key) => Ok(Some(key.into())),
        None => Err(Problem::new(
            Word::BadArgument,
            format!(
                "the Idempotency-Key is not 1 to {KEY_LENGTH_MAX} visible ASCII characters: send such a one"
            ),
        )),
    }
}

/// How long the client prefers to wait (RFC 7240), at most `max`. What is not understood is no preference.
pub fn preferred_wait(headers: &HeaderMap, max: Duration) -> Option<Duration> {
    let values = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    let mut preferences = values.flat_map(|value| value.split(','));
    let seconds = preferences.find_map(|preference| {
        let (name, value) = preference.split(';').next()?.split_once('=')?;
        let value = value.trim().trim_matches('"');
        name.trim().eq_ignore_ascii_case("wait").then(|| value.parse().ok()).flatten()
    })?;
    Some(Duration::from_secs(seconds).min(max))
}

/// Whether the client has what `etag` names (RFC 9110, 13.1.2).
pub fn is_known(headers: &HeaderMap, etag: &str) -> bool {
    let values = headers.get_all(header::IF_NONE_MATCH).iter();
    let mut tags =
        values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    tags.any(|tag| {
        let tag = tag.trim();
        tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use axum::http::HeaderValue;

    use super::*;

    fn headers(name: &'static str, values: &[&str]) -> HeaderMap {
        let values = values.iter().map(|value| HeaderValue::from_str(value).unwrap());
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(name, value);
        }
        headers
    }

    #[test]
    fn keys_are_visible_text() {
        let key = |values: &[&str]| idempotency_key(&headers("idempotency-key", values));
        assert_eq!(key(&[]).unwrap(), None);
        assert_eq!(key(&["a-1"]).unwrap().unwrap(), "a-1");
        for bad in [&[""][..], &["a b"], &["a", "b"], &[&"x".repeat(256)]] {
            assert!(key(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn preferences_are_found_among_others() {
        let wait = |values: &[&str]| {
            let wait = preferred_wait(&headers("prefer", values), Duration::from_secs(60));
            wait.map(|wait| wait.as_secs())
        };
        assert_eq!(wait(&[]), None);
        assert_eq!(wait(&["wait=5"]), Some(5));
        assert_eq!(wait(&["respond-async, Wait = \"7\"; foo=1"]), Some(7));
        assert_eq!(wait(&["return=minimal", "wait=1000000"]), Some(60));
        assert_eq!(wait(&["wait=soon"]), None);
        assert_eq!(wait(&["wait=-1"]), None);
    }

    #[test]
    fn entity_tags_are_compared_weakly() {
        let known = |value: &str| is_known(&headers("if-none-match", &[value]), "\"7-copying\"");
        assert!(known("\"7-copying\"") && known("\"1\", W/\"7-copying\"") && known("*"));
        assert!(!known("\"6-copying\"") && !known("7-copying"));
    }
}
