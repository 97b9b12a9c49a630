//! How a call fails: problem details (RFC 9457) with a word that programs can rely on.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::daemon::book::{Rejected, Unforgettable};
use crate::daemon::forecast::ForecastError;
use crate::daemon::policy::PolicyError;
use crate::daemon::supervisor::{ChangeError, Gone, SubmitError};

/// When it is worth asking again, in seconds.
const RETRY_AFTER: &str = "5";

macro_rules! words {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:tt, $status:ident;)+) => {
        /// Why a call failed. Where a snapshot can fail for the same reason, the word is the same.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
        pub enum Word {
            $($(#[doc = $doc])+ #[serde(rename = $word)] $name,)+
        }

        impl Word {
            /// Every word, in the order of the documentation.
            #[cfg(test)]
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The word itself.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word,)+ }
            }

            /// What it means, in one sentence.
            #[cfg(test)]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)+ }
            }

            /// The status that it comes with.
            pub const fn status(self) -> StatusCode {
                match self { $(Self::$name => StatusCode::$status,)+ }
            }
        }
    };
}

words! {
    /// The body, a header or a parameter is not usable.
    BadArgument = "bad_argument", BAD_REQUEST;
    /// The destination is not below a configured root, or a link is in its way.
    BadDestination = "bad_destination", UNPROCESSABLE_ENTITY;
    /// There is no virtual machine of that name.
    UnknownVm = "unknown_vm", NOT_FOUND;
    /// There is no operation of that id, or it was forgotten.
    UnknownOperation = "unknown_operation", NOT_FOUND;
    /// The header Host does not name this daemon.
    UnknownHost = "unknown_host", MISDIRECTED_REQUEST;
    /// A page of another site asks for a change.
    ForeignOrigin = "foreign_origin", FORBIDDEN;
    /// The token is missing or wrong.
    Unauthorized = "unauthorized", UNAUTHORIZED;
    /// There is nothing at that path.
    NotFound = "not_found", NOT_FOUND;
    /// The path does not take that method.
    MethodNotAllowed = "method_not_allowed", METHOD_NOT_ALLOWED;
    /// The body took too long to arrive.
    RequestTimeout = "request_timeout", REQUEST_TIMEOUT;
    /// Another snapshot of that virtual machine waits or runs.
    Busy = "busy", CONFLICT;
    /// Another snapshot is to become that directory.
    DestinationTaken = "destination_taken", CONFLICT;
    /// The operation has not ended.
    NotEnded = "not_ended", CONFLICT;
    /// The operation has ended, or is about to.
    Ended = "ended", CONFLICT;
    /// More is asked for than all snapshots of the host may have together.
    OverBudget = "over_budget", UNPROCESSABLE_ENTITY;
    /// The snapshot's process does not take these limits, or the host's budget has no room for them.
    LimitsRefused = "limits_refused", UNPROCESSABLE_ENTITY;
    /// The body is larger than is taken.
    BodyTooLarge = "body_too_large", PAYLOAD_TOO_LARGE;
    /// The body is not said to be JSON.
    NotJson = "not_json", UNSUPPORTED_MEDIA_TYPE;
    /// The idempotency key was used for another request.
    KeyReused = "key_reused", UNPROCESSABLE_ENTITY;
    /// What is asked for could not be kept on disk, or the host does not do what it takes.
    Io = "io", INTERNAL_SERVER_ERROR;
    /// Another forecast is being made.
    PlanBusy = "plan_busy", SERVICE_UNAVAILABLE;
    /// As many operations wait as may.
    QueueFull = "queue_full", SERVICE_UNAVAILABLE;
    /// The daemon is ending.
    Closing = "closing", SERVICE_UNAVAILABLE;
}

/// Problem details.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Problem {
    /// Always `about:blank`: `reason` says more.
    r#type: &'static str,
    /// The status in words.
    title: &'static str,
    /// The status.
    status: u16,
    /// Stable word.
    reason: Word,
    /// What failed, on what, why, and what to do.
    detail: String,
    /// The operation that is in the way.
    #[serde(skip_serializing_if = "Option::is_none")]
    operation: Option<String>,
}

impl Problem {
    /// A problem in general.
    pub fn new(reason: Word, detail: impl Into<String>) -> Self {
        let status = reason.status();
        Self {
            r#type: "about:blank",
            title: status.canonical_reason().unwrap_or_default(),
            status: status.as_u16(),
            reason,
            detail: detail.into(),
            operation: None,
        }
    }

    /// The stable word.
    pub const fn reason(&self) -> Word {
        self.reason
    }

    /// There is no such operation.
    pub fn unknown_operation(id: &str) -> Self {
        Self::new(
            Word::UnknownOperation,
            format!("there is no operation {id:?}, or it was forgotten: GET /snapshot lists them"),
        )
    }

    /// Why limits are not changed.
    pub fn unchangeable(error: &ChangeError, id: &str) -> Self {
        match error {
            ChangeError::Unknown => Self::unknown_operation(id),
            ChangeError::Ended { .. } => Self::new(Word::Ended, error.to_string()),
            ChangeError::Refused { .. } => Self::new(Word::LimitsRefused, error.to_string()),
        }
    }

    /// Why an operation is not forgotten.
    pub fn unforgettable(why: Unforgettable, id: &str) -> Self {
        match why {
            Unforgettable::Unknown => Self::unknown_operation(id),
            Unforgettable::NotEnded => {
                let detail = format!("operation {id} has not ended: abort it first");
                Self { operation: Some(link(id)), ..Self::new(Word::NotEnded, detail) }
            }
        }
    }
}

/// Where an operation is told of.
pub fn link(id: &str) -> String {
    format!("/snapshot/{id}")
}

impl From<SubmitError> for Problem {
    fn from(error: SubmitError) -> Self {
        let (word, operation) = match &error {
            SubmitError::UnknownVm { .. } => (Word::UnknownVm, None),
            SubmitError::Destination(_) => (Word::BadDestination, None),
            SubmitError::Rejected(rejected) => match rejected {
                Rejected::Busy { id, .. } => (Word::Busy, Some(link(id))),
                Rejected::DestinationTaken { id, .. } => (Word::DestinationTaken, Some(link(id))),
                Rejected::KeyReused { id } => (Word::KeyReused, Some(link(id))),
                Rejected::OverBudget { .. } => (Word::OverBudget, None),
                Rejected::QueueFull { .. } => (Word::QueueFull, None),
                Rejected::Closing => (Word::Closing, None),
            },
            SubmitError::Journal(_) => (Word::Io, None),
            SubmitError::Gone(_) => (Word::Closing, None),
        };
        Self { operation, ..Self::new(word, error.to_string()) }
    }
}

impl From<PolicyError> for Problem {
    fn from(error: PolicyError) -> Self {
        Self::new(Word::BadArgument, error.to_string())
    }
}

impl From<ForecastError> for Problem {
    fn from(error: ForecastError) -> Self {
        let word = match &error {
            ForecastError::Busy { .. } => Word::PlanBusy,
            ForecastError::Destination(_) => Word::BadDestination,
            ForecastError::Process(_) | ForecastError::Answer { .. } => Word::Io,
        };
        Self::new(word, error.to_string())
    }
}

impl From<Gone> for Problem {
    fn from(gone: Gone) -> Self {
        Self::new(Word::Closing, gone.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = self.reason.status();
        let link = self
            .operation
            .as_ref()
            .and_then(|path| HeaderValue::from_str(&format!("<{path}>; rel=\"related\"")).ok());
        let mut response = (status, axum::Json(self)).into_response();
        let headers = response.headers_mut();
        let kind = HeaderValue::from_static("application/problem+json");
        headers.insert(header::CONTENT_TYPE, kind);
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(link) = link {
            headers.insert(header::LINK, link);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_snapshots_where_they_mean_the_same() {
        for word in Word::ALL {
            assert_eq!(serde_json::json!(word), word.as_str());
            assert!(word.status().is_client_error() || word.status().is_server_error());
            assert!(word.meaning().ends_with('.'), "{word:?}");
        }
        let shared = ["bad_argument", "bad_destination", "io"];
        for reason in snapshot_core::Reason::ALL {
            let is_here = Word::ALL.iter().any(|word| word.as_str() == reason.as_str());
            assert_eq!(is_here, shared.contains(&reason.as_str()), "{reason}");
        }
    }

    #[test]
    fn a_busy_machine_is_told_with_a_link() {
        let busy = Rejected::Busy { vm: "vm1".into(), id: "07".into() };
        let response = Problem::from(SubmitError::from(busy)).into_response();
        assert_eq!(response.status(), StatusCode::CONFLICT);
        assert_eq!(response.headers()["link"], "</snapshot/07>; rel=\"related\"");
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        let response =
            Problem::from(SubmitError::from(Rejected::QueueFull { max: 1 })).into_response();
        assert_eq!(response.headers()["retry-after"], RETRY_AFTER);
    }
}
