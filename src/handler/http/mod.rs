//! The `http` handler: each message is a request to one URL, with its
//! idempotency key in a header.
//!
//! The promise is at least once, and exactly once where the receiver honours
//! the key: `docs/handlers.md` says what it must do. One connection per worker
//! is kept between requests. Redirects are not followed, and no proxy is used.

mod line;
mod request;
pub mod retry_after;
mod signature;

use std::io::{self, Read};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustls::pki_types::ServerName;
use ureq::http::header::{
    CONTENT_TYPE, DATE, HeaderMap, HeaderName, HeaderValue, InvalidHeaderName, InvalidHeaderValue,
    LOCATION, RETRY_AFTER, USER_AGENT,
};
use ureq::http::{Method, Request, Response, Uri};
use ureq::{Agent, Body};
use url::Url;

use self::line::{Dialler, NoLine, Unresolved, Wish, is_cancelled, rustls_error};
use self::signature::{Signer, webhook_id};
use super::{Keyed, Work};
use crate::config::checked::{self, KeyFormat};
use crate::config::defaults::HTTP_ANSWER_MAX;
use crate::config::format_duration;
use crate::failure::{Class, Failure, HttpFailure};
use crate::identity::idempotency_key;
use crate::stop::Stop;
use crate::trust;

/// Says to the receiver which try this is, from 1.
const ATTEMPT: HeaderName = HeaderName::from_static("ackonce-attempt");

/// Says to the receiver how long its whole answer is waited for.
const TIMEOUT_MS: HeaderName = HeaderName::from_static("ackonce-timeout-ms");

const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// A connection that was idle for longer is not used again: many receivers
/// close theirs after 5 s, and a request that crosses the close is lost.
const IDLE_MAX: Duration = Duration::from_secs(4);

/// Longest text of a failure with what the receiver said, in characters: the
/// journal keeps no more.
const SHOWN_MAX: usize = 2_000;

/// Why no request can be made at all.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The HTTP library does not take the URL. The text holds none of it.
    #[error("failed to read the handler's `url`: {0}; write it like https://HOST/PATH")]
    Url(String),
    /// A header cannot be sent.
    #[error("failed to read the handler's headers: {0}")]
    Header(String),
    /// A secret is not base64.
    #[error("failed to read the handler's signing secrets: not base64")]
    Secret,
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] trust::SetupError),
}

impl From<InvalidHeaderName> for SetupError {
    fn from(error: InvalidHeaderName) -> Self {
        Self::Header(error.to_string())
    }
}

impl From<InvalidHeaderValue> for SetupError {
    fn from(error: InvalidHeaderValue) -> Self {
        Self::Header(error.to_string())
    }
}

/// Sends the messages of one worker.
pub struct HttpHandler {
    agent: Agent,
    wish: Wish,
    consumer: String,
    method: Method,
    uri: Uri,
    /// `HOST:PORT`, for messages.
    place: String,
    timeout: Duration,
    /// What every request has.
    headers: HeaderMap,
    /// The message's headers that go with it, and how they are called there.
    forward: Vec<(HeaderName, String)>,
    key_header: HeaderName,
    key_format: KeyFormat,
    signer: Signer,
}

impl HttpHandler {
    /// A handler of its own for one worker of `consumer`. Connects to nothing.
    ///
    /// # Errors
    ///
    /// [`SetupError`].
    pub fn new(config: &checked::HttpHandler, consumer: &str) -> Result<Self, SetupError> {
        let url = |why: &dyn std::fmt::Display| SetupError::Url(why.to_string());
        let address = Url::parse(config.url.expose()).map_err(|error| url(&error))?;
        let uri: Uri = address.as_str().parse().map_err(|error| url(&error))?;
        let wish = Wish::default();
        let dialler = dialler(config, &address, wish.clone())?;
        let place = dialler.to_string();
        let settings = Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .accept_encoding("identity")
            .max_idle_connections(1)
            .max_idle_connections_per_host(1)
            .max_idle_age(IDLE_MAX)
            .timeout_global(Some(config.timeout))
            .build();
        Ok(Self {
            agent: Agent::with_parts(settings, dialler, Unresolved),
            wish,
            consumer: consumer.to_owned(),
            method: match config.method {
                checked::HttpMethod::Post => Method::POST,
                checked::HttpMethod::Put => Method::PUT,
                checked::HttpMethod::Patch => Method::PATCH,
            },
            uri,
            place,
            timeout: config.timeout,
            headers: fixed_headers(config)?,
            forward: forwarded(&config.forward_headers)?,
            key_header: config.key_header.parse()?,
            key_format: config.key_format,
            signer: Signer::new(&config.signing_secrets).ok_or(SetupError::Secret)?,
        })
    }

    /// Connects to the receiver of `config`, and says where that is. Sends no
    /// request.
    ///
    /// # Errors
    ///
    /// Why not, as for a message.
    pub fn probe(config: &checked::HttpHandler) -> Result<String, Failure> {
        let broken =
            |error: &dyn std::fmt::Display| failure(HttpFailure::Connect, error.to_string());
        let address = Url::parse(config.url.expose()).map_err(|error| broken(&error))?;
        let dialler = dialler(config, &address, Wish::default()).map_err(|error| broken(&error))?;
        match dialler.try_out(Instant::now() + config.connect_timeout) {
            Ok(()) => Ok(dialler.to_string()),
            Err(error) => Err(no_line(&error)),
        }
    }

    fn request<'w>(&self, work: &Work<'w>) -> Result<Request<&'w [u8]>, Failure> {
        let unsendable = |why: String| failure(HttpFailure::Header, why);
        let body = work.message.body.as_slice();
        let key = idempotency_key(&self.consumer, work.message_id);
        let mut headers = self.headers.clone();
        if !headers.contains_key(CONTENT_TYPE) {
            request::add_content_type(&mut headers, work.message);
        }
        request::add_properties(&mut headers, work.message);
        request::add_forwarded(&mut headers, &self.forward, work.message).map_err(unsendable)?;
        request::add_traceparent(&mut headers, work.message);
        headers.insert(ATTEMPT, HeaderValue::from(work.attempt));
        let text = |text: &str| {
            HeaderValue::from_str(text)
                .map_err(|_| unsendable("the message's id is no header".to_owned()))
        };
        headers.insert(
            &self.key_header,
            text(&request::key_value(&key, self.key_format))?,
        );
        if self.signer.signs() {
            let id = webhook_id(&key);
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let seconds = now.unwrap_or_default().as_secs().to_string();
            headers.insert(WEBHOOK_ID, text(&id)?);
            headers.insert(WEBHOOK_TIMESTAMP, text(&seconds)?);
            headers.insert(
                WEBHOOK_SIGNATURE,
                text(&self.signer.sign(&id, &seconds, body))?,
            );
        }
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = headers;
        Ok(request)
    }

    /// Why there is no answer.
    fn unanswered(&self, error: ureq::Error) -> Failure {
        match error {
            ureq::Error::Other(error) => match error.downcast_ref() {
                Some(error) => no_line(error),
                None => self.broken(&error),
            },
            ureq::Error::Timeout(_) => self.late(),
            ureq::Error::Io(error) => self.cut_short(error),
            other => self.broken(&other),
        }
    }

    fn cut_short(&self, error: io::Error) -> Failure {
        if is_cancelled(&error) {
            return no_line(&NoLine::Cancelled);
        }
        if let Some(error) = rustls_error(&error) {
            let text = format!(
                "TLS with {} failed: {}",
                self.place,
                trust::explained(error)
            );
            return failure(HttpFailure::Tls, text);
        }
        if error.kind() == io::ErrorKind::TimedOut {
            return self.late();
        }
        match error.downcast::<ureq::Error>() {
            Ok(error) => self.unanswered(error),
            Err(error) => self.broken(&error),
        }
    }

    fn late(&self) -> Failure {
        let within = format_duration(self.timeout);
        let text = format!("no whole answer from {} within {within}", self.place);
        failure(HttpFailure::Timeout, text)
    }

    fn broken(&self, error: &dyn std::fmt::Display) -> Failure {
        let text = format!("no whole answer from {}: {error}", self.place);
        failure(HttpFailure::Broken, text)
    }

    /// What an answer says. One that is not read to its end counts by its
    /// status if that is a failure's; a success must be whole.
    fn judge(&self, mut answer: Response<Body>) -> Result<(), Failure> {
        let mut body = Vec::new();
        let read = answer
            .body_mut()
            .as_reader()
            .take(HTTP_ANSWER_MAX as u64)
            .read_to_end(&mut body);
        if answer.status().is_success() {
            return read.map(drop).map_err(|error| self.cut_short(error));
        }
        let header = |name| answer.headers().get(name)?.to_str().ok();
        // The first line is ours; what the receiver says may quote the message.
        let mut text = format!("{} answered {}", self.place, answer.status());
        let location = header(LOCATION).map(|location| format!("location: {location} "));
        let said = location.unwrap_or_default() + &String::from_utf8_lossy(&body);
        let said = harmless(&said, SHOWN_MAX - 1 - text.chars().count());
        if !said.is_empty() {
            text = format!("{text}\n{said}");
        }
        let mut failed = failure(HttpFailure::Status(answer.status().as_u16()), text);
        failed.retry_after = header(RETRY_AFTER)
            .and_then(|value| retry_after::wait(value, header(DATE), SystemTime::now()));
        Err(failed)
    }
}

impl Keyed for HttpHandler {
    fn kind(&self) -> &'static str {
        "http"
    }

    fn apply(&mut self, work: &Work<'_>, cancelled: &Stop) -> Result<(), Failure> {
        if cancelled.is_set() {
            return Err(no_line(&NoLine::Cancelled));
        }
        let request = self.request(work)?;
        self.wish.become_that_of(Some(cancelled));
        let result = match self.agent.run(request) {
            Ok(answer) => self.judge(answer),
            Err(error) => Err(self.unanswered(error)),
        };
        self.wish.become_that_of(None);
        result
    }
}

fn dialler(
    config: &checked::HttpHandler,
    address: &Url,
    wish: Wish,
) -> Result<Dialler, SetupError> {
    let missing = || SetupError::Url("it names no host".to_owned());
    let host = address.host().ok_or_else(missing)?.to_owned();
    let tls = match address.scheme() {
        "https" => {
            let tls = trust::Renewed::new(&config.tls)?;
            Some((tls, server_name(&host)?))
        }
        _ => None,
    };
    Ok(Dialler {
        host,
        port: address.port_or_known_default().ok_or_else(missing)?,
        tls,
        within: config.connect_timeout,
        wish,
        lookup: Mutex::default(),
    })
}

fn server_name(host: &url::Host<String>) -> Result<ServerName<'static>, SetupError> {
    match host {
        url::Host::Domain(name) => ServerName::try_from(name.clone())
            .map_err(|_| SetupError::Url("its host cannot stand in a certificate".to_owned())),
        url::Host::Ipv4(ip) => Ok(std::net::IpAddr::from(*ip).into()),
        url::Host::Ipv6(ip) => Ok(std::net::IpAddr::from(*ip).into()),
    }
}

fn fixed_headers(config: &checked::HttpHandler) -> Result<HeaderMap, SetupError> {
    let mut headers = HeaderMap::new();
    headers.insert(
        USER_AGENT,
        HeaderValue::from_static(concat!("ackonce/", env!("CARGO_PKG_VERSION"))),
    );
    let timeout = u64::try_from(config.timeout.as_millis()).unwrap_or(u64::MAX);
    headers.insert(TIMEOUT_MS, HeaderValue::from(timeout));
    if let Some(content_type) = &config.content_type {
        headers.insert(CONTENT_TYPE, content_type.parse()?);
    }
    for (name, value) in &config.headers {
        let mut value: HeaderValue = value.expose().parse()?;
        value.set_sensitive(true);
        headers.insert(name.parse::<HeaderName>()?, value);
    }
    Ok(headers)
}

fn forwarded(names: &[String]) -> Result<Vec<(HeaderName, String)>, SetupError> {
    let pair = |name: &String| Ok((name.parse()?, name.clone()));
    names.iter().map(pair).collect()
}

fn failure(kind: HttpFailure, text: String) -> Failure {
    Failure {
        class: kind.class(),
        code: Some(kind.code()),
        text,
        retry_after: None,
    }
}

fn no_line(error: &NoLine) -> Failure {
    let kind = match error {
        NoLine::Resolve(_) => HttpFailure::Resolve,
        NoLine::Connect(_) => HttpFailure::Connect,
        NoLine::Tls(_) => HttpFailure::Tls,
        // Whoever cancelled does not count it.
        NoLine::Cancelled => {
            return Failure {
                class: Class::Transient,
                code: None,
                text: "the answer could not be waited for any longer".to_owned(),
                retry_after: None,
            };
        }
    };
    failure(kind, error.to_string())
}

/// `text` on one line of at most `most` characters, without characters that act on a terminal or on
/// the order of others.
fn harmless(text: &str, most: usize) -> String {
    let mut out = String::new();
    let mut space = true;
    for character in text.chars() {
        let shown = match character {
            c if c.is_whitespace() => ' ',
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                char::REPLACEMENT_CHARACTER
            }
            c if c.is_control() => char::REPLACEMENT_CHARACTER,
            c => c,
        };
        if shown != ' ' || !space {
            out.push(shown);
        }
        space = shown == ' ';
    }
    let out = out.trim_end();
    match out.char_indices().nth(most.saturating_sub(1)) {
        Some((at, _)) if out[at..].chars().nth(1).is_some() => format!("{}…", &out[..at]),
        _ => out.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_a_receiver_says_stands_on_one_line_and_does_nothing() {
        assert_eq!(
            harmless("  no\r\n\tsuch \u{1b}[31morder\0 \n", SHOWN_MAX),
            "no such \u{fffd}[31morder\u{fffd}"
        );
        assert_eq!(harmless("a\u{202e}b", SHOWN_MAX), "a\u{fffd}b");
        assert_eq!(
            harmless(&"ü".repeat(SHOWN_MAX), SHOWN_MAX).chars().count(),
            SHOWN_MAX
        );
        let cut = harmless(&"ü".repeat(SHOWN_MAX + 1), SHOWN_MAX);
        assert_eq!(cut.chars().count(), SHOWN_MAX);
        assert!(cut.ends_with('…'));
    }

    proptest! {
        #[test]
        fn no_answer_breaks_a_line_or_the_bound(text in any::<String>()) {
            let shown = harmless(&text, SHOWN_MAX);
            prop_assert!(shown.chars().count() <= SHOWN_MAX);
            prop_assert!(!shown.chars().any(char::is_control));
        }
    }
}
