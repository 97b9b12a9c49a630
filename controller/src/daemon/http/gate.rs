//! Who is let in over TCP, where every user of the host can connect, and every page that one of them opens.
//!
//! | from | what stops it |
//! | --- | --- |
//! | a page whose name was made to lead here (DNS rebinding) | its browser sends that name as `Host` |
//! | a page of another site that sends requests here (CSRF) | its browser says so by `Origin` or `Sec-Fetch-Site` |
//! | a user who may not take snapshots | the token, if one is configured |
//!
//! Beyond loopback there is a token, and what is sent is encrypted: see `tls`.
//!
//! The Unix socket needs none of this: no browser speaks to it, and its mode says who may.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use subtle::ConstantTimeEq as _;

use super::page;
use super::problem::{Problem, Word};
use super::secret::{SecretError, read_secret};
use crate::daemon::config::Tcp;

/// Least and most characters of a token. 16 random ones cannot be guessed.
const TOKEN_LENGTH: std::ops::RangeInclusive<usize> = 16..=1024;

/// Why a token cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Its file.
    #[error(transparent)]
    File(#[from] SecretError),
    /// It can be guessed, or cannot be sent.
    #[error(
        "the token in {} is not one word of {} to {} visible ASCII characters: write such a one, as `openssl rand -hex 32` does",
        path.display(), TOKEN_LENGTH.start(), TOKEN_LENGTH.end()
    )]
    Text {
        /// The file.
        path: PathBuf,
    },
}

/// Lets in who may.
#[derive(Debug)]
pub struct Gate {
    /// The hosts' names by which the daemon is reached, as they stand in a URL.
    names: Vec<String>,
    token: Option<Token>,
}

/// What callers must know; not shown by any log.
struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Token")
    }
}

impl Gate {
    /// As configured.
    ///
    /// # Errors
    /// If the token cannot be used.
    pub fn new(tcp: &Tcp) -> Result<Self, TokenError> {
        let token = tcp.token_file.as_deref().map(Token::read).transpose()?;
        let names = names(tcp.listen).into_iter().chain(tcp.names.iter().cloned());
        Ok(Self { names: names.collect(), token })
    }

    /// Puts itself in front of all calls.
    pub fn guard(self, router: Router) -> Router {
        router.layer(from_fn_with_state(Arc::new(self), pass))
    }

    fn check(&self, request: &Request) -> Result<(), Problem> {
        let headers = request.headers();
        let host = host(headers).filter(|host| self.is_own(host)).ok_or_else(|| {
            let names = self.names.join(" or ");
            let detail = format!("the header Host does not name this daemon: ask {names}");
            Problem::new(Word::UnknownHost, detail)
        })?;
        // A URL in the place of a path goes before the header (RFC 9112, 3.2.2).
        if request.uri().authority().is_some_and(|authority| *authority != host) {
            let detail = "the request's URL names another host than the header Host: ask one";
            return Err(Problem::new(Word::UnknownHost, detail));
        }
        let changes = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
        if changes && !is_own_page(headers, &host) {
            let detail = "a page of another site asks for a change: use the daemon's own page";
            return Err(Problem::new(Word::ForeignOrigin, detail));
        }
        match &self.token {
            Some(token) if !page::has(request.uri().path()) && !token.is_sent(headers) => {
                let detail = "the token is missing or wrong: send Authorization: Bearer TOKEN";
                Err(Problem::new(Word::Unauthorized, detail))
            }
            _ => Ok(()),
        }
    }

    /// Whatever the port: it may be forwarded.
    fn is_own(&self, host: &Authority) -> bool {
        self.names.iter().any(|name| host.host().eq_ignore_ascii_case(name))
    }
}

async fn pass(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    match gate.check(&request) {
        Ok(()) => next.run(request).await,
        Err(problem) => {
            let reason = problem.reason().as_str();
            tracing::debug!(method = %request.method(), uri = %request.uri(), reason, "not let in");
            problem.into_response()
        }
    }
}

/// Under which names an address is reached.
fn names(address: SocketAddr) -> Vec<String> {
    let own = match address.ip() {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    vec![own, "localhost".into()]
}

/// The one host that a request says to be for.
fn host(headers: &HeaderMap) -> Option<Authority> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (host, None) = (hosts.next()?, hosts.next()) else { return None };
    Authority::try_from(host.as_bytes()).ok()
}

/// Whether no browser says that another site's page has sent it. Programs that are no browsers say nothing.
fn is_own_page(headers: &HeaderMap, host: &Authority) -> bool {
    let is_origin = |origin: &[u8]| {
        let origin = origin.strip_prefix(b"http://").or(origin.strip_prefix(b"https://"));
        origin.is_some_and(|origin| origin.eq_ignore_ascii_case(host.as_str().as_bytes()))
    };
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let mut sites = headers.get_all("sec-fetch-site").iter();
    origins.all(|origin| is_origin(origin.as_bytes()))
        && sites.all(|site| [b"same-origin", &b"none"[..]].contains(&site.as_bytes()))
}

impl Token {
    fn read(path: &Path) -> Result<Self, TokenError> {
        let text = read_secret("token", path, 2 * TOKEN_LENGTH.end())?;
        let token = std::str::from_utf8(&text).unwrap_or_default().trim();
        if !TOKEN_LENGTH.contains(&token.len())
            || !token.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(TokenError::Text { path: path.into() });
        }
        Ok(Self(token.into()))
    }

    /// Whether a request has it. The time that this takes tells nothing but a token's length.
    fn is_sent(&self, headers: &HeaderMap) -> bool {
        let mut sent = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(sent), None) = (sent.next(), sent.next()) else { return false };
        let Some((scheme, sent)) = sent.to_str().ok().and_then(|sent| sent.split_once(' ')) else {
            return false;
        };
        scheme.eq_ignore_ascii_case("bearer")
            && bool::from(sent.as_bytes().ct_eq(self.0.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use axum::body::Body;

    use super::*;

    const TOKEN: &str = "0123456789abcdef";

    fn gate(listen: &str, token: Option<&str>) -> Gate {
        let token = token.map(|token| Token(token.into()));
        Gate { names: names(listen.parse().unwrap()), token }
    }

    /// What becomes of a request with these headers.
    fn word(gate: &Gate, line: &str, headers: &[(&str, &str)]) -> &'static str {
        let (method, uri) = line.split_once(' ').unwrap();
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        match gate.check(&request.body(Body::empty()).unwrap()) {
            Ok(()) => "let in",
            Err(problem) => problem.reason().as_str(),
        }
    }

    #[test]
    fn who_asks_by_another_name_is_not_let_in() {
        let v4 = gate("127.0.0.1:9464", None);
        let v6 = gate("[::1]:9464", None);
        for (gate, hosts, expected) in [
            (&v4, &["127.0.0.1:9464"][..], "let in"),
            (&v4, &["localhost"], "let in"),
            (&v4, &["LocalHost:8080"], "let in"),
            (&v6, &["[::1]:9464"], "let in"),
            (&v6, &["127.0.0.1:9464"], "unknown_host"),
            (&v4, &["[::1]:9464"], "unknown_host"),
            (&v4, &["rebound.example:9464"], "unknown_host"),
            (&v4, &["localhost.rebound.example"], "unknown_host"),
            (&v4, &["127.0.0.1.rebound.example:9464"], "unknown_host"),
            (&v4, &["localhost", "rebound.example"], "unknown_host"),
            (&v4, &["localhost", "localhost"], "unknown_host"),
            (&v4, &[""], "unknown_host"),
            (&v4, &["local host"], "unknown_host"),
            (&v4, &[], "unknown_host"),
        ] {
            let headers: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            assert_eq!(word(gate, "GET /vms", &headers), expected, "{hosts:?}");
        }
        let host = [("host", "localhost")];
        assert_eq!(word(&v4, "GET http://localhost/vms", &host), "let in");
        assert_eq!(word(&v4, "GET http://rebound.example/vms", &host), "unknown_host");
    }

    #[test]
    fn pages_of_other_sites_change_nothing() {
        let gate = gate("127.0.0.1:9464", None);
        for (name, value, expected) in [
            ("accept", "*/*", "let in"),
            ("origin", "http://localhost:9464", "let in"),
            ("origin", "https://localhost:9464", "let in"),
            ("origin", "http://localhost:8000", "foreign_origin"),
            ("origin", "http://localhost", "foreign_origin"),
            ("origin", "http://other.example", "foreign_origin"),
            ("origin", "null", "foreign_origin"),
            ("origin", "", "foreign_origin"),
            ("sec-fetch-site", "same-origin", "let in"),
            ("sec-fetch-site", "none", "let in"),
            ("sec-fetch-site", "same-site", "foreign_origin"),
            ("sec-fetch-site", "cross-site", "foreign_origin"),
        ] {
            let headers = [("host", "localhost:9464"), (name, value)];
            for line in
                ["POST /snapshot/07/abort", "DELETE /snapshot/07", "PATCH /snapshot/07/policy"]
            {
                assert_eq!(word(&gate, line, &headers), expected, "{line} {name}: {value}");
            }
            // What is read there is not shown to them by their browser.
            assert_eq!(word(&gate, "GET /snapshot", &headers), "let in", "{name}: {value}");
        }
        let own_but = [
            ("host", "localhost:9464"),
            ("origin", "http://localhost:9464"),
            ("sec-fetch-site", "cross-site"),
        ];
        assert_eq!(word(&gate, "POST /snapshot", &own_but), "foreign_origin");
    }

    #[test]
    fn only_the_page_is_shown_without_the_token() {
        let gate = gate("127.0.0.1:9464", Some(TOKEN));
        let host = ("host", "localhost");
        for (path, sent, expected) in [
            ("/", None, "let in"),
            ("/app.js", None, "let in"),
            ("/vms", None, "unauthorized"),
            ("//", None, "unauthorized"),
            ("/%2e/", None, "unauthorized"),
            ("/vms", Some("Bearer 0123456789abcdef"), "let in"),
            ("/vms", Some("bearer 0123456789abcdef"), "let in"),
            ("/vms", Some("Bearer 0123456789abcdeF"), "unauthorized"),
            ("/vms", Some("Bearer 0123456789abcde"), "unauthorized"),
            ("/vms", Some("Bearer 0123456789abcdef0"), "unauthorized"),
            ("/vms", Some("Bearer"), "unauthorized"),
            ("/vms", Some("Bearer "), "unauthorized"),
            ("/vms", Some("Basic 0123456789abcdef"), "unauthorized"),
        ] {
            let sent = sent.map(|sent| ("authorization", sent));
            let headers: Vec<_> = sent.into_iter().chain([host]).collect();
            assert_eq!(word(&gate, &format!("GET {path}"), &headers), expected, "{path} {sent:?}");
        }
        let right = ("authorization", "Bearer 0123456789abcdef");
        assert_eq!(word(&gate, "GET /vms", &[host, right, right]), "unauthorized");
        assert!(!format!("{gate:?}").contains(TOKEN), "it would stand in logs");
    }

    #[test]
    fn a_token_is_a_secret_word() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let token = |text: &str, mode| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            Token::read(&path).map(|token| token.0).map_err(|error| error.to_string())
        };
        assert_eq!(token(&format!("{TOKEN}\n"), 0o600).unwrap(), TOKEN);
        assert_eq!(token(TOKEN, 0o400).unwrap(), TOKEN);
        for (text, mode, word) in [
            (TOKEN, 0o640, "0640"),
            (TOKEN, 0o604, "0604"),
            ("", 0o600, "visible"),
            ("short", 0o600, "visible"),
            ("0123456789abcdef 0123456789", 0o600, "visible"),
            ("0123456789abcdef\u{e9}", 0o600, "visible"),
            (&TOKEN.repeat(65), 0o600, "visible"),
        ] {
            let error = token(text, mode).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        fs::remove_file(&path).unwrap();
        assert!(matches!(Token::read(&path), Err(TokenError::File(_))));
    }
}
