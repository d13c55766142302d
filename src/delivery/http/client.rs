//! One pooled HTTP client for all destinations.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Response;
use hyper::body::Incoming;
use hyper::header::{HeaderMap, LOCATION, RETRY_AFTER};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{CaptureConnection, capture_connection};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::Instant;
use url::Url;

use crate::clock::Clock;
use crate::delivery::verdict::Verdict;
use crate::model::delivery::HttpRequest;
use crate::model::id::DeliveryId;
use crate::model::outcome::Reason;
use crate::telemetry::metrics::metrics;

use super::connection::{Connector, Wire};
use super::guard::{Blocked, Guard};
use super::request::IDEMPOTENCY_KEY;
use super::request::{Prepared, Unbuildable};

/// Of an answer's body this much is read, so that the connection can be used again; of a longer one the connection is closed.
const MAX_BODY_BYTES: usize = 64 << 10;
/// And this much of it is kept as the destination's message.
const MAX_MESSAGE_BYTES: usize = 512;
const MAX_REDIRECTS: usize = 5;
/// Headers of an answer. Of one with more only the status is used.
const MAX_ANSWER_HEADERS: usize = 1_024;
/// Idle connections are closed after this time.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// An HTTP/2 connection with requests on it is checked this often, and closed where the check is not answered in time.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug)]
pub struct ClientSettings {
    /// For a whole request, redirects and body included.
    pub timeout: Duration,
    pub connect_timeout: Duration,
    /// Idle connections kept for each host.
    pub idle_per_host: usize,
    /// Whether HTTP/2 is spoken with destinations that offer it. All requests to a host then share one connection, and wait for each other
    /// where the destination allows fewer at a time than are sent.
    pub http2: bool,
    pub guard: Guard,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            idle_per_host: 1_000,
            http2: false,
            guard: Guard::default(),
        }
    }
}

type Http = legacy::Client<Connector, Full<Bytes>>;

#[derive(Clone)]
pub struct Client {
    pooled: Http,
    /// Opens a connection for each request.
    unpooled: Http,
    settings: ClientSettings,
    clock: Clock,
}

/// Why an attempt has no answer that can be read.
struct Failure {
    /// No byte of an answer came, over a connection that was open before: the destination may never have seen the request, so it is sent
    /// again at once, and this attempt is not counted.
    is_repeatable: bool,
    verdict: Verdict,
}

impl Client {
    /// # Errors
    /// Where the system's certificates cannot be used.
    pub fn new(settings: ClientSettings, clock: Clock) -> std::io::Result<Self> {
        Self::with(settings, clock, false)
    }

    /// `http2_only`: HTTP/2 also without TLS, where nothing is negotiated.
    fn with(settings: ClientSettings, clock: Clock, http2_only: bool) -> std::io::Result<Self> {
        let connector = Connector::new(settings.guard, settings.connect_timeout, settings.http2, clock.clone())?;
        let client = |idle: usize| {
            let mut builder = legacy::Client::builder(TokioExecutor::new());
            builder
                .pool_max_idle_per_host(idle)
                .pool_idle_timeout(IDLE_TIMEOUT)
                .pool_timer(TokioTimer::new())
                .timer(TokioTimer::new())
                // How a destination writes its headers is no reason to send it an event twice.
                .http1_allow_obsolete_multiline_headers_in_responses(true)
                .http1_allow_spaces_after_header_name_in_responses(true)
                .http1_ignore_invalid_headers_in_responses(true)
                .http1_max_headers(MAX_ANSWER_HEADERS)
                .http2_keep_alive_interval(PING_INTERVAL)
                .http2_keep_alive_timeout(PING_TIMEOUT)
                .http2_only(http2_only);
            builder.build(connector.clone())
        };
        Ok(Self { pooled: client(settings.idle_per_host), unpooled: client(0), settings, clock })
    }

    /// Sends a request and says what came of it. Never fails: whatever happens is a verdict.
    pub async fn send(&self, request: &HttpRequest, delivery: &DeliveryId) -> Verdict {
        let mut prepared = match Prepared::new(request, delivery) {
            Ok(prepared) => prepared,
            Err(Unbuildable(message)) => {
                return Verdict::Abort { reason: Reason::BadRequest, code: 0, message };
            }
        };
        // For all hops together.
        let until = self.clock.instant() + self.settings.timeout;
        for _ in 0..=MAX_REDIRECTS {
            if let Err(blocked) = self.settings.guard.check(&prepared.url) {
                return Verdict::Abort { reason: Reason::BlockedAddress, code: 0, message: blocked.to_string() };
            }
            let answer = match self.exchange(&prepared, until).await {
                Ok(answer) => answer,
                Err(verdict) => return verdict,
            };
            let code = answer.status().as_u16();
            let next = match code {
                307 | 308 => location(answer.headers(), &prepared.url),
                _ => None,
            };
            let Some(next) = next else { return self.judge(answer, until).await };
            if let Err(Unbuildable(message)) = prepared.redirect(next) {
                return Verdict::Abort { reason: Reason::Rejected, code, message };
            }
        }
        let message = format!("redirected more than {MAX_REDIRECTS} times");
        Verdict::Abort { reason: Reason::Rejected, code: 308, message }
    }

    async fn exchange(&self, prepared: &Prepared, until: Instant) -> Result<Response<Incoming>, Verdict> {
        match self.attempt(&self.pooled, prepared, until).await {
            Err(failure) if failure.is_repeatable => {
                metrics().router_resends.with_label_values::<&str>(&[]).inc();
                self.attempt(&self.unpooled, prepared, until).await.map_err(|failure| failure.verdict)
            }
            answer => answer.map_err(|failure| failure.verdict),
        }
    }

    async fn attempt(&self, http: &Http, prepared: &Prepared, until: Instant) -> Result<Response<Incoming>, Failure> {
        let mut request = prepared.request();
        let captured = capture_connection(&mut request);
        let id = request.headers().get(IDEMPOTENCY_KEY).cloned();
        let id = id.as_ref().map_or(&b""[..], |id| id.as_bytes());
        let began = self.clock.instant();
        match tokio::time::timeout(until.saturating_duration_since(began), http.request(request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(failed(&error, &captured, id, began)),
            Err(_) => {
                let late = match connection(&captured) {
                    Some((wire, _)) => wire.status(id).map(of_unreadable),
                    None => None,
                };
                let message = format!("timed out: no answer within {:?}", self.settings.timeout);
                Err(Failure { is_repeatable: false, verdict: late.unwrap_or_else(|| Verdict::of_silence(message)) })
            }
        }
    }

    async fn judge(&self, answer: Response<Incoming>, until: Instant) -> Verdict {
        let code = answer.status().as_u16();
        let retry_after = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let mut words = Vec::new();
        let mut body = answer.into_body();
        let reading = async {
            let mut read = 0;
            // A body that breaks, or is late, does not change what the status says.
            while let (true, Some(Ok(frame))) = (read < MAX_BODY_BYTES, body.frame().await) {
                let Ok(chunk) = frame.into_data() else { continue };
                read += chunk.len();
                let room = MAX_MESSAGE_BYTES.saturating_sub(words.len()).min(chunk.len());
                words.extend_from_slice(&chunk[..room]);
            }
        };
        let left = until.saturating_duration_since(self.clock.instant());
        let _ = tokio::time::timeout(left, reading).await;
        let words = String::from_utf8_lossy(&words).into_owned();
        Verdict::of_status(code, words, retry_after.as_deref(), self.clock.now())
    }
}

/// Where a redirect leads. None: nowhere that a request can be sent to.
fn location(headers: &HeaderMap, from: &Url) -> Option<Url> {
    let place = String::from_utf8_lossy(headers.get(LOCATION)?.as_bytes()).trim().to_owned();
    // An empty one would be the same URL again.
    let next = from.join(Some(place.as_str()).filter(|place| !place.is_empty())?).ok()?;
    matches!(next.scheme(), "http" | "https").then_some(next)
}

/// The connection that a request was sent on, and whether it speaks HTTP/2.
fn connection(captured: &CaptureConnection) -> Option<(Wire, bool)> {
    let metadata = captured.connection_metadata();
    let connected = metadata.as_ref()?;
    let mut extras = hyper::http::Extensions::new();
    connected.get_extras(&mut extras);
    Some((extras.remove::<Wire>()?, connected.is_negotiated_h2()))
}

fn of_unreadable(code: u16) -> Verdict {
    Verdict::of_status(code, "the rest of the answer cannot be read".to_owned(), None, Default::default())
}

fn failed(error: &legacy::Error, captured: &CaptureConnection, id: &[u8], began: Instant) -> Failure {
    let (mut cause, mut is_refused): (&dyn std::error::Error, bool) = (error, false);
    loop {
        if cause.is::<Blocked>() {
            let verdict = Verdict::Abort { reason: Reason::BlockedAddress, code: 0, message: cause.to_string() };
            return Failure { is_repeatable: false, verdict };
        }
        is_refused |= cause.downcast_ref::<h2::Error>().is_some_and(is_unprocessed);
        match cause.source() {
            Some(next) => cause = next,
            None => break,
        }
    }
    let what = if error.is_connect() { "no connection" } else { "no answer" };
    let verdict = Verdict::of_silence(format!("{what}: {cause}"));
    match connection(captured) {
        // A request that found no connection was not sent on the one that it was given before.
        Some((wire, is_http2)) if !error.is_connect() => {
            let is_repeatable = is_refused || wire.was_reused_and_silent(id, began, is_http2);
            Failure { is_repeatable, verdict: wire.status(id).map_or(verdict, of_unreadable) }
        }
        Some(_) | None => Failure { is_repeatable: is_refused, verdict },
    }
}

/// The destination says that it has done nothing about the request (RFC 9113, section 8.7).
fn is_unprocessed(error: &h2::Error) -> bool {
    let is_going = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
    let is_refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
    error.is_remote() && (is_going || is_refused)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::model::delivery::BodyFormat;

    /// A server of HTTP/2 that refuses this many streams first.
    async fn refusing(refusals: usize, reason: h2::Reason) -> (HttpRequest, Arc<AtomicUsize>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let url = format!("http://{}/", listener.local_addr().expect("an address"));
        let asked = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let seen = Arc::clone(&seen);
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(stream).await.expect("HTTP/2");
                    while let Some(Ok((_, mut respond))) = connection.accept().await {
                        if seen.fetch_add(1, Ordering::Relaxed) < refusals {
                            respond.send_reset(reason);
                        } else {
                            respond.send_response(Response::new(()), true).expect("sent");
                        }
                    }
                });
            }
        });
        let (method, headers, params) = ("POST".to_owned(), Vec::new(), Vec::new());
        let body = Bytes::from_static(b"{}");
        (HttpRequest { method, url, headers, params, body_format: BodyFormat::Json, body }, asked)
    }

    #[tokio::test]
    async fn a_refused_stream_is_sent_again_once_and_a_failed_one_is_not() {
        let client = Client::with(ClientSettings::default(), Clock::system(), true).expect("a client");
        let (request, asked) = refusing(1, h2::Reason::REFUSED_STREAM).await;
        assert_eq!(client.send(&request, &"d-1".into()).await, Verdict::Delivered { code: 200 });
        assert_eq!(asked.load(Ordering::Relaxed), 2);
        let (request, asked) = refusing(9, h2::Reason::REFUSED_STREAM).await;
        let verdict = client.send(&request, &"d-1".into()).await;
        assert!(matches!(verdict, Verdict::Retry { code: 0, .. }), "{verdict:?}");
        assert_eq!(asked.load(Ordering::Relaxed), 2, "a destination that refuses all is not asked for ever");
        let (request, asked) = refusing(1, h2::Reason::INTERNAL_ERROR).await;
        let verdict = client.send(&request, &"d-1".into()).await;
        assert!(matches!(verdict, Verdict::Retry { code: 0, .. }), "{verdict:?}");
        assert_eq!(asked.load(Ordering::Relaxed), 1, "it may have acted on it");
    }
}
