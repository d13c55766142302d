//! The HTTP surface.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, BodyDataStream};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::{Bytes, BytesMut};
use flate2::read::MultiGzDecoder;
use futures_util::StreamExt;

use crate::clock::Clock;
use crate::control::Current;
use crate::log::{LogError, Publisher};
use crate::model::event::Channel;
use crate::telemetry::metrics::metrics;
use crate::telemetry::seldom;

use super::request::{Call, Facts, MAX_BODY, Refusal, admit};
use super::{Admission, auth, cors};

/// What a client is told to wait, in seconds, when the log does not take events.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");
/// Of a refused body so much is still taken; a client that sends more has to bear a broken connection.
const DISCARD: usize = 16 << 20;
/// Bodies above it are parsed off the async threads: it would take longer than half a millisecond.
const LARGE: usize = 128 * 1024;

#[derive(Clone, Copy, Debug)]
pub struct GatewaySettings {
    /// Believe `X-Forwarded-For`: right behind a proxy that sets it, wrong in front of clients.
    pub trust_forwarded_for: bool,
}

pub struct Gateway<P> {
    pub admission: Admission<P>,
    pub workspace: Current,
    pub clock: Clock,
    pub settings: GatewaySettings,
}

/// What is answered while the log cannot be had yet: whoever connects is told to come back, instead of waiting.
pub fn unavailable() -> Router {
    Router::new().fallback(|| async { refuse(Refusal::Unavailable) }).layer(middleware::from_fn(cors::layer))
}

pub fn routes<P: Publisher>(gateway: Gateway<P>) -> Router {
    let typed = |kind: &'static str| {
        post(move |State(gateway): State<Arc<Gateway<P>>>, request: Request| async move {
            answer(&gateway, Call::Typed(kind), request).await
        })
    };
    let batch = post(|State(gateway): State<Arc<Gateway<P>>>, request: Request| async move {
        answer(&gateway, Call::Batch, request).await
    });
    let mut routes = Router::new().route("/v1/batch", batch);
    for (path, kind) in [
        ("/v1/identify", "identify"),
        ("/v1/track", "track"),
        ("/v1/page", "page"),
        ("/v1/screen", "screen"),
        ("/v1/group", "group"),
        ("/v1/alias", "alias"),
    ] {
        routes = routes.route(path, typed(kind));
    }
    routes
        .route("/health", get(health::<P>))
        .route("/", get(health::<P>))
        .fallback(|| async { text(StatusCode::NOT_FOUND, "404 page not found") })
        .layer(middleware::from_fn(cors::layer))
        .with_state(Arc::new(gateway))
}

/// Answers an ingest request and counts it.
async fn answer<P: Publisher>(gateway: &Gateway<P>, call: Call, request: Request) -> Response {
    let began = gateway.clock.instant();
    let open = Open::new();
    let result = take(gateway, call, request).await;
    drop(open);
    let response = match result {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], "ok").into_response(),
        Err(refusal) => refuse(refusal),
    };
    metrics().gateway_requests.with_label_values(&[response.status().as_str()]).inc();
    metrics().gateway_seconds.with_label_values::<&str>(&[]).observe(began.elapsed().as_secs_f64());
    response
}

/// Counts a request as open until it is answered, or its client has gone.
struct Open;

impl Open {
    fn new() -> Self {
        metrics().gateway_open.with_label_values::<&str>(&[]).inc();
        Self
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        metrics().gateway_open.with_label_values::<&str>(&[]).dec();
    }
}

async fn take<P: Publisher>(gateway: &Gateway<P>, call: Call, request: Request) -> Result<(), Refusal> {
    let (parts, body) = request.into_parts();
    let source = match auth::source(&parts.headers, &gateway.workspace.get()) {
        Ok(source) => source,
        Err(refusal) => {
            discard(body.into_data_stream()).await;
            return Err(refusal);
        }
    };
    let body = read_body(body, &parts.headers).await?;
    let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(peer)| *peer);
    let run = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok()).filter(|id| !id.is_empty());
    let facts = Facts {
        received_at: gateway.clock.now(),
        client_ip: client_ip(&parts.headers, peer, gateway.settings.trust_forwarded_for),
        channel: Channel::Http,
        job_run: run("x-rudder-job-run-id").map(Into::into),
        task_run: run("x-rudder-task-run-id").map(Into::into),
    };
    let events = if body.len() <= LARGE {
        admit(&source, call, &body, &facts)?
    } else {
        let source = Arc::clone(&source);
        let admitted = tokio::task::spawn_blocking(move || admit(&source, call, &body, &facts)).await;
        admitted.map_err(|_| Refusal::Unavailable)??
    };
    let trace = parts.headers.get("traceparent").and_then(|value| value.to_str().ok());
    match gateway.admission.publish(&events, trace).await {
        Ok(()) => {
            metrics().gateway_events.with_label_values(&[source.id.as_str()]).inc_by(events.len() as u64);
            Ok(())
        }
        Err(error) => {
            if let Some(left_out) = seldom::due("events not stored", &error.to_string()) {
                match error {
                    LogError::Transient(error) => {
                        tracing::warn!(%error, left_out, "events not stored, the client is told to retry");
                    }
                    other => {
                        tracing::error!(error = %other, left_out, "events not stored, the client is told to retry")
                    }
                }
            }
            Err(Refusal::Unavailable)
        }
    }
}

/// The body, inflated where it is compressed; never more of it in memory than is allowed.
async fn read_body(body: Body, headers: &HeaderMap) -> Result<Bytes, Refusal> {
    let mut raw = BytesMut::new();
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| Refusal::UnreadableBody)?;
        if raw.len() + chunk.len() > MAX_BODY {
            discard(chunks).await;
            return Err(Refusal::TooLarge);
        }
        raw.extend_from_slice(&chunk);
    }
    let raw = raw.freeze();
    match headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes) {
        Some(encoding) if encoding.eq_ignore_ascii_case(b"gzip") => {
            if raw.len() <= LARGE / 8 {
                return inflate(&raw);
            }
            tokio::task::spawn_blocking(move || inflate(&raw)).await.map_err(|_| Refusal::UnreadableBody)?
        }
        _ => Ok(raw),
    }
}

/// Takes the rest of a body that nobody wants. A client that is still sending when the connection closes sees a broken
/// connection in place of the answer, and sends everything again.
async fn discard(mut rest: BodyDataStream) {
    let mut left = DISCARD;
    while let Some(Ok(chunk)) = rest.next().await
        && left > chunk.len()
    {
        left -= chunk.len();
    }
}

fn inflate(raw: &[u8]) -> Result<Bytes, Refusal> {
    use std::io::Read;
    let mut inflated = Vec::with_capacity((raw.len() * 4).min(MAX_BODY));
    let mut limited = MultiGzDecoder::new(raw).take(MAX_BODY as u64 + 1);
    limited.read_to_end(&mut inflated).map_err(|_| Refusal::UnreadableBody)?;
    if inflated.len() > MAX_BODY { Err(Refusal::TooLarge) } else { Ok(inflated.into()) }
}

fn client_ip(headers: &HeaderMap, peer: Option<SocketAddr>, trust: bool) -> String {
    let forwarded = headers.get("x-forwarded-for").filter(|_| trust).and_then(|value| value.to_str().ok());
    let first = forwarded.and_then(|list| list.split(',').next()).map(|first| first.replace(' ', ""));
    first
        .filter(|first| !first.is_empty())
        .unwrap_or_else(|| peer.map(|peer| peer.ip().to_canonical().to_string()).unwrap_or_default())
}

fn refuse(refusal: Refusal) -> Response {
    let status = StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = text(status, &refusal.to_string());
    if refusal == Refusal::Unavailable {
        response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
    }
    response
}

fn text(status: StatusCode, message: &str) -> Response {
    let headers = [(header::CONTENT_TYPE, "text/plain; charset=utf-8"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (status, headers, format!("{message}\n")).into_response()
}

async fn health<P: Publisher>(State(gateway): State<Arc<Gateway<P>>>) -> Response {
    let sources = gateway.workspace.get().sources().count();
    let body = serde_json::json!({
        "appType": "GATEWAY", "server": "UP", "acceptingEvents": "TRUE", "mode": "NORMAL",
        "backendConfigMode": "JSON", "sources": sources,
    });
    ([(header::CONTENT_TYPE, "application/json; charset=utf-8")], body.to_string()).into_response()
}
