//! The admin address: `/metrics`, `/livez`, `/readyz` and `/status` over HTTP,
//! read-only and without authentication, for the machine's own eyes.
//!
//! One thread serves it. A slow or silent client has one of a few places for a
//! bounded time, and gives it up to whoever comes when all are taken: a probe
//! never waits for others.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::task::AbortHandle;

use super::Signs;
use super::health::{Health, Report};
use super::metrics::{self, Metrics};
use super::status::Status;

/// Connections served at a time; one more ends the oldest.
const CONNECTIONS_MAX: usize = 256;

/// Longest life of a connection, requests and answers together.
const CONNECTION_WITHIN: Duration = Duration::from_secs(30);

/// Longest wait for the head of a request.
const HEAD_WITHIN: Duration = Duration::from_secs(5);

/// Largest head of a request, in bytes.
const HEAD_MAX: usize = 16 << 10;

/// What is to be said of an address that is not loopback.
pub const OPEN_TO_OTHERS: &str = "the admin address can be reached from other hosts, and asks \
    nobody who they are: names of consumers and errors of servers can be read there";

/// What there is to show. A clone shows the same.
#[derive(Clone)]
pub struct Shown {
    /// For `/metrics`.
    pub metrics: Arc<Metrics>,
    /// For the others.
    pub health: Arc<Health>,
    /// When the daemon began.
    pub since: Instant,
}

impl Shown {
    /// Where the threads of one more consumer write what they do.
    #[must_use]
    pub fn signs(&self, consumer: &str) -> Signs {
        Signs {
            meter: self.metrics.meter(consumer),
            pulse: self.health.pulse(consumer),
        }
    }

    /// Shows nothing of a consumer any more, which has ended.
    pub fn forget(&self, consumer: &str) {
        self.metrics.forget(consumer);
        self.health.forget(consumer);
    }
}

/// Serves `shown` at `address` on a thread of its own, for as long as the
/// process lives. Returns the address, whose port is chosen by the system if
/// it was 0.
///
/// # Errors
///
/// When the address cannot be listened on, or there is no thread to be had.
pub fn start(address: SocketAddr, shown: Shown) -> std::io::Result<SocketAddr> {
    let listener = StdListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let bound = listener.local_addr()?;
    if !bound.ip().is_loopback() {
        log::warn!(address:% = bound; "{OPEN_TO_OTHERS}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    std::thread::Builder::new()
        .name("admin".to_owned())
        .spawn(move || {
            if let Err(error) = runtime.block_on(serve(listener, shown)) {
                log::error!("the admin address is not served any more: {error}");
            }
        })?;
    Ok(bound)
}

async fn serve(listener: StdListener, shown: Shown) -> std::io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let shown = Arc::new(shown);
    let mut places: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: they come back.
                log::warn!("failed to accept a connection at the admin address: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let shown = Arc::clone(&shown);
        places.retain(|connection| !connection.is_finished());
        if places.len() >= CONNECTIONS_MAX
            && let Some(oldest) = places.pop_front()
        {
            oldest.abort();
        }
        let connection = tokio::spawn(async move {
            let answer = service_fn(move |request| {
                let response = answer(&request, &shown);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_WITHIN)
                .max_buf_size(HEAD_MAX)
                .serve_connection(TokioIo::new(stream), answer);
            let ended = tokio::time::timeout(CONNECTION_WITHIN, connection).await;
            // What a client does wrong is its own affair, and so is one that stays.
            if let Ok(Err(error)) = ended {
                log::debug!("a connection to the admin address broke off: {error}");
            }
        });
        places.push_back(connection.abort_handle());
    }
}

fn answer(request: &Request<Incoming>, shown: &Shown) -> Response<Full<Bytes>> {
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "GET only\n".to_owned());
        let allowed = HeaderValue::from_static("GET, HEAD");
        response.headers_mut().insert(ALLOW, allowed);
        return response;
    }
    match request.uri().path() {
        "/metrics" => match shown.metrics.text() {
            Ok(text) => respond(StatusCode::OK, metrics::CONTENT_TYPE, text),
            Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        "/livez" => judged(&shown.health.reports(), Report::is_alive),
        "/readyz" => judged(&shown.health.reports(), Report::is_ready),
        "/status" => match serde_json::to_string(&Status::of(shown, shown.since)) {
            Ok(text) => respond(StatusCode::OK, "application/json", text),
            Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        _ => plain(
            StatusCode::NOT_FOUND,
            "there are /metrics, /livez, /readyz and /status\n".to_owned(),
        ),
    }
}

/// 200 when all are well, 503 otherwise, with a line for each.
fn judged(reports: &[Report], is_well: fn(&Report) -> bool) -> Response<Full<Bytes>> {
    if reports.is_empty() {
        return plain(
            StatusCode::SERVICE_UNAVAILABLE,
            "failed: starting\n".to_owned(),
        );
    }
    let status = match reports.iter().all(is_well) {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let lines = reports.iter().map(|report| {
        let word = if is_well(report) { "ok" } else { "failed" };
        format!("{word} {report}\n")
    });
    plain(status, lines.collect())
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", text)
}

fn respond(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
