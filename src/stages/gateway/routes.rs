//! The HTTP surface: from the table of endpoints to answers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post, put};
use bytes::Bytes;

use crate::clock::Clock;
use crate::control::Current;
use crate::control::suppression::Suppressed;
use crate::control::workspace::Source;
use crate::delivery::warehouse::Warehouse;
use crate::log::{LogError, Publisher};
use crate::model::command::{Action as Wanted, Command};
use crate::model::event::{Channel, Event};
use crate::model::progress::Target;
use crate::model::record::Addressed;
use crate::telemetry::metrics::metrics;
use crate::telemetry::seldom;

use super::auth::{Auth, Speaker, speaker_of_body};
use super::client::TrustedProxies;
use super::cors::{self, Origins};
use super::endpoints::{Action, Endpoint, INTERNAL, Ingest, Kind, PUBLIC};
use super::intake::{Held, Intake};
use super::job_status::JobStatusApi;
use super::limit::RateLimits;
use super::publish::Along;
use super::reply::{self, Verdict};
use super::request::{Call, Facts, MAX_TRACE, Refusal, admit, admit_each, write_key};
use super::suppress::{is_suppressed, without_suppressed};
use super::webhook::{Failed, Made, Webhooks, request_of};
use super::{Admission, messages, openapi, pixel, source_config};

/// Bodies above it are parsed off the async threads: it would take longer than half a millisecond.
const LARGE: usize = 128 * 1024;
/// While nothing is taken.
const TURNING_AWAY: Duration = Duration::from_secs(2);

pub struct Gateway<P> {
    pub admission: Admission<P>,
    pub workspace: Current,
    pub clock: Clock,
    pub proxies: TrustedProxies,
    pub origins: Origins,
    pub intake: Arc<Intake>,
    pub limits: RateLimits,
    /// Requests at a time.
    pub most: usize,
    /// What opens the internal routes.
    pub token: String,
    pub open: AtomicUsize,
    /// None: there is no service that knows what webhooks mean.
    pub webhooks: Option<Webhooks>,
    /// Where there is an internal listener.
    pub jobs: Option<JobStatusApi>,
    pub suppressed: Suppressed,
    /// None: there is no warehouse service.
    pub warehouse: Option<Warehouse>,
}

/// What is answered while the log cannot be had yet: whoever connects is told to come back, instead of waiting.
pub fn unavailable(origins: Origins) -> Router {
    let intake = Intake::new(0, TURNING_AWAY);
    let refuse = move |request: Request| {
        let intake = Arc::clone(&intake);
        async move {
            intake.discard(request.into_body()).await;
            reply::refuse(Refusal::Unavailable)
        }
    };
    Router::new().fallback(refuse).layer(middleware::from_fn_with_state(origins, cors::layer))
}

/// What everybody may ask.
pub fn public<P: Publisher>(gateway: Arc<Gateway<P>>) -> Router {
    let origins = gateway.origins.clone();
    routes(gateway, &PUBLIC).layer(middleware::from_fn_with_state(origins, cors::layer))
}

/// What only who has the token may ask.
pub fn internal<P: Publisher>(gateway: Arc<Gateway<P>>) -> Router {
    let own = Arc::clone(&gateway);
    routes(gateway, &INTERNAL).layer(middleware::from_fn(move |request: Request, next: middleware::Next| {
        let gateway = Arc::clone(&own);
        async move {
            if reply::knows(request.headers(), &gateway.token) {
                return next.run(request).await;
            }
            gateway.intake.discard(request.into_body()).await;
            reply::text(StatusCode::UNAUTHORIZED, "invalid token")
        }
    }))
}

fn routes<P: Publisher>(gateway: Arc<Gateway<P>>, endpoints: &[Endpoint]) -> Router {
    let mut routes = Router::new();
    for endpoint in endpoints {
        routes = routes.route(endpoint.path, route(endpoint));
    }
    // Browsers' SDKs ask for it with a slash behind it.
    if endpoints.iter().any(|endpoint| endpoint.action == Action::SourceConfig) {
        routes = routes.route("/sourceConfig/", get(config::<P>));
    }
    routes.fallback(|| async { reply::text(StatusCode::NOT_FOUND, "404 page not found") }).with_state(gateway)
}

fn route<P: Publisher>(endpoint: &Endpoint) -> MethodRouter<Arc<Gateway<P>>> {
    type At<P> = State<Arc<Gateway<P>>>;
    match endpoint.action {
        Action::Ingest(ingest) => post(move |State(gateway): At<P>, request: Request| async move {
            counted(&gateway, request, async |request| take(&gateway, ingest, request).await).await
        }),
        Action::Pixel(kind) => get(move |State(gateway): At<P>, request: Request| async move {
            // Whoever only asks whether there is a picture has not seen it.
            if request.method() != Method::HEAD {
                counted(&gateway, request, async |request| look(&gateway, kind, request).await).await;
            }
            reply::gif(&pixel::GIF)
        }),
        Action::Webhook => {
            let take = |State(gateway): At<P>, request: Request| async move {
                counted(&gateway, request, async |request| take_webhook(&gateway, request).await).await
            };
            if endpoint.method == "get" { get(take) } else { post(take) }
        }
        Action::Messages => post(|State(gateway): At<P>, request: Request| async move {
            counted(&gateway, request, async |request| take_messages(&gateway, request).await).await
        }),
        Action::DrainJob => put(drain_job::<P>),
        Action::JobStatus(about) => {
            let tell = move |State(gateway): At<P>, Path(run): Path<String>, request: Request| async move {
                let is_delete = request.method() == Method::DELETE;
                let query = request.uri().query().unwrap_or_default();
                match &gateway.jobs {
                    Some(jobs) => jobs.answer(about, is_delete, &run, query).await,
                    None => reply::refuse(Refusal::Unavailable),
                }
            };
            if endpoint.method == "delete" { delete(tell) } else { get(tell) }
        }
        Action::Warehouse => {
            let pass = |State(gateway): At<P>, request: Request| async move { pass_on(&gateway, request).await };
            if endpoint.method == "get" { get(pass) } else { post(pass) }
        }
        Action::SourceConfig => get(config::<P>),
        Action::Settings => get(|State(gateway): At<P>, Path(key): Path<String>| async move {
            match speaker_of_body(Some(&key), &gateway.workspace.get()) {
                Ok(speaker) => reply::json(StatusCode::OK, &source_config::segment(&speaker.source)),
                Err(refusal) => reply::refuse(refusal),
            }
        }),
        Action::Health => get(health::<P>),
        Action::Version => get(|| async { reply::json(StatusCode::OK, &version()) }),
        Action::Robots => get(|| async { "User-agent: * \nDisallow: / \n" }),
        Action::Docs(listener) => get(move || async move { reply::html(openapi::page(listener)) }),
        Action::OpenApi(listener) => {
            get(move || async move { reply::json(StatusCode::OK, &openapi::document(listener)) })
        }
    }
}

/// Counts a request as open until it is answered, or its client has gone. One too many is turned away before it costs anything.
struct Open<'g>(&'g AtomicUsize);

impl<'g> Open<'g> {
    fn new(open: &'g AtomicUsize) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        metrics().gateway_open.with_label_values::<&str>(&[]).inc();
        Self(open)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
        metrics().gateway_open.with_label_values::<&str>(&[]).dec();
    }
}

/// Answers an ingest request and counts it.
async fn counted<P>(
    gateway: &Gateway<P>,
    request: Request,
    take: impl AsyncFnOnce(Request) -> Result<Response, Refusal>,
) -> Response {
    let began = gateway.clock.instant();
    let open = Open::new(&gateway.open);
    let result = if gateway.open.load(Ordering::Relaxed) > gateway.most {
        gateway.intake.discard(request.into_body()).await;
        Err(Refusal::Unavailable)
    } else {
        take(request).await
    };
    drop(open);
    let response = result.unwrap_or_else(reply::refuse);
    metrics().gateway_requests.with_label_values(&[response.status().as_str()]).inc();
    metrics().gateway_seconds.with_label_values::<&str>(&[]).observe(began.elapsed().as_secs_f64());
    response
}

async fn take<P: Publisher>(gateway: &Gateway<P>, ingest: Ingest, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let (speaker, is_backfill, body, held) = identified(gateway, ingest, &parts, body).await?;
    let channel = if ingest.kind == Kind::Replay { Channel::Replay } else { Channel::Http };
    let facts = facts(gateway, &parts, channel, &speaker.source);
    let along = along(&parts.headers, &speaker);
    let source = speaker.source;
    // Runs of reverse ETL are as fast as they are; whoever only says so is not believed.
    let is_exempt =
        is_backfill && (ingest.auth == Auth::SourceId || ingest.kind == Kind::Replay || source.is_backfill());
    let suppressed = gateway.suppressed.clone();
    if wants_verdicts(&parts) {
        let own = Arc::clone(&source);
        let (judged, held) =
            worked(gateway, held, body.len(), move || admit_each(&own, ingest.call, &body, &facts)).await?;
        let mut good = Vec::with_capacity(judged.len());
        let mut verdicts = Vec::with_capacity(judged.len());
        for it in judged {
            verdicts.push(match &it {
                Ok(event) => Verdict::Accepted(event.message_id.clone()),
                Err(refusal) => Verdict::Refused(*refusal),
            });
            good.extend(it);
        }
        let charged = if is_exempt { 0 } else { good.len() };
        let good = without_suppressed(&suppressed, good);
        store(gateway, &source, good, held, &along, charged).await?;
        return Ok(reply::verdicts(&verdicts));
    }
    let own = Arc::clone(&source);
    let bytes = body.len();
    let work = move || Ok(without_suppressed(&suppressed, admit(&own, ingest.call, &body, &facts)?));
    let (events, held) = worked(gateway, held, bytes, work).await?;
    let charged = if is_exempt { 0 } else { events.len() };
    store(gateway, &source, events, held, &along, charged).await?;
    Ok(reply::ok())
}

/// Whom a request speaks for, whether it can come later, and its body.
async fn identified<P>(
    gateway: &Gateway<P>,
    ingest: Ingest,
    parts: &Parts,
    body: Body,
) -> Result<(Speaker, bool, Bytes, Held), Refusal> {
    let can_wait = ingest.kind != Kind::Live;
    if ingest.auth.needs_body(parts) {
        let (body, held) = gateway.intake.take(body, &parts.headers, can_wait).await?;
        let own = body.clone();
        let (key, held) = worked(gateway, held, body.len(), move || Ok(write_key(ingest.call, &own))).await?;
        let speaker = speaker_of_body(key.as_deref(), &gateway.workspace.get())?;
        let is_backfill = can_wait || speaker.source.is_backfill();
        return Ok((speaker, is_backfill, body, held));
    }
    let speaker = match ingest.auth.speaker(parts, &gateway.workspace.get()) {
        Ok(speaker) => speaker,
        Err(refusal) => {
            gateway.intake.discard(body).await;
            return Err(refusal);
        }
    };
    let is_backfill = can_wait || speaker.source.is_backfill();
    let (body, held) = gateway.intake.take(body, &parts.headers, is_backfill).await?;
    Ok((speaker, is_backfill, body, held))
}

/// Works on a body of so many bytes, off the async threads where it is large.
async fn worked<P, T: Send + 'static>(
    gateway: &Gateway<P>,
    held: Held,
    bytes: usize,
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<(T, Held), Refusal> {
    match bytes <= LARGE {
        true => Ok((work()?, held)),
        false => gateway.intake.work(held, work).await,
    }
}

/// Gives events to the log. Their records are held as long as it takes. `charged`: so many of them count for the limits.
async fn store<P: Publisher>(
    gateway: &Gateway<P>,
    source: &Source,
    events: Vec<Event>,
    mut held: Held,
    along: &Along,
    charged: usize,
) -> Result<(), Refusal> {
    if events.is_empty() {
        return Ok(());
    }
    let count = events.len();
    if charged > 0 {
        gateway.limits.admit(source, charged)?;
    }
    let records = gateway.admission.records(events.into_iter().map(|event| (event, along)));
    held.grow(records.iter().map(Addressed::size).sum())?;
    stored(gateway.admission.publish(records).await)?;
    metrics().gateway_events.with_label_values(&[source.id.as_str()]).inc_by(count as u64);
    Ok(())
}

/// What the client is told of trouble with the log.
fn stored(result: Result<(), LogError>) -> Result<(), Refusal> {
    let Err(error) = result else { return Ok(()) };
    if let Some(left_out) = seldom::due("events not stored", &error.to_string()) {
        match error {
            LogError::Transient(error) => {
                tracing::warn!(%error, left_out, "events not stored, the client is told to retry");
            }
            other => tracing::error!(error = %other, left_out, "events not stored, the client is told to retry"),
        }
    }
    Err(Refusal::Unavailable)
}

/// An event from the address of an image.
async fn look<P: Publisher>(gateway: &Gateway<P>, kind: &'static str, request: Request) -> Result<Response, Refusal> {
    let (parts, _) = request.into_parts();
    let speaker = Auth::QueryKey.speaker(&parts, &gateway.workspace.get())?;
    let agent = parts.headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok());
    let query = parts.uri.query().unwrap_or_default();
    let Some(body) = pixel::event(kind, query, agent, gateway.clock.now()) else { return Ok(reply::ok()) };
    let facts = facts(gateway, &parts, Channel::Pixel, &speaker.source);
    let events = admit(&speaker.source, Call::Typed(kind), body.as_bytes(), &facts)?;
    let events = without_suppressed(&gateway.suppressed, events);
    let along = along(&parts.headers, &speaker);
    store(gateway, &speaker.source, events, gateway.intake.hold(), &along, 1).await?;
    Ok(reply::ok())
}

async fn take_messages<P: Publisher>(gateway: &Gateway<P>, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let (body, held) = gateway.intake.take(body, &parts.headers, false).await?;
    let workspace = gateway.workspace.get();
    let (suppressed, known) = (gateway.suppressed.clone(), Arc::clone(&workspace));
    let work = move || {
        let mut events = messages::admit(&known, &body)?;
        events.retain(|(event, _)| suppressed.is_empty() || !is_suppressed(&suppressed, event));
        Ok(events)
    };
    let (events, mut held) = gateway.intake.work(held, work).await?;
    let records = gateway.admission.records(events.iter().map(|(event, along)| (event, along)));
    held.grow(records.iter().map(Addressed::size).sum())?;
    stored(gateway.admission.publish(records).await)?;
    for (event, _) in &events {
        // Ids of unknown sources must not become series of metrics.
        let source = if workspace.source(&event.source).is_some() { event.source.as_str() } else { "unknown" };
        metrics().gateway_events.with_label_values(&[source]).inc();
    }
    Ok(reply::ok())
}

async fn take_webhook<P: Publisher>(gateway: &Arc<Gateway<P>>, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let speaker = Auth::AnyKey.speaker(&parts, &gateway.workspace.get());
    let is_webhook = |it: Speaker| if it.source.is_webhook() { Ok(it) } else { Err(Refusal::InvalidWriteKey) };
    let refusal = match (speaker.and_then(is_webhook), &gateway.webhooks) {
        (Ok(speaker), Some(webhooks)) => return take_of_webhook(gateway, webhooks, speaker, parts, body).await,
        (Ok(speaker), None) => {
            if let Some(left_out) = seldom::due("no transformer", speaker.source.id.as_str()) {
                let source = speaker.source.id.as_str();
                tracing::error!(source, left_out, "a webhook cannot be taken: transformer.url is not set");
            }
            Refusal::Unavailable
        }
        (Err(refusal), _) => refusal,
    };
    gateway.intake.discard(body).await;
    Err(refusal)
}

async fn take_of_webhook<P: Publisher>(
    gateway: &Arc<Gateway<P>>,
    webhooks: &Webhooks,
    speaker: Speaker,
    parts: Parts,
    body: Body,
) -> Result<Response, Refusal> {
    // Tools look whether somebody is there.
    if parts.method != Method::POST && !(parts.method == Method::GET && webhooks.takes_get(&speaker.source)) {
        return Ok(StatusCode::OK.into_response());
    }
    // They wait for another service with their bodies: what does not is to have its half of the memory.
    let (body, held) = gateway.intake.take(body, &parts.headers, true).await?;
    gateway.limits.admit(&speaker.source, 1)?;
    let (facts, along) = (facts(gateway, &parts, Channel::Webhook, &speaker.source), along(&parts.headers, &speaker));
    let (source, bytes) = (Arc::clone(&speaker.source), body.len());
    let (request, mut held) = worked(gateway, held, bytes, move || request_of(&parts, body, &source)).await?;
    held.grow(request.len())?;
    // Goes on where the tool has hung up: it may never come again.
    let own = Arc::clone(gateway);
    let settling =
        webhooks.tasks.spawn(async move { settle_webhook(&own, &speaker.source, request, &facts, &along, held).await });
    settling.await.unwrap_or(Err(Refusal::Unavailable))
}

async fn settle_webhook<P: Publisher>(
    gateway: &Gateway<P>,
    source: &Arc<Source>,
    request: String,
    facts: &Facts,
    along: &Along,
    held: Held,
) -> Result<Response, Refusal> {
    let Some(webhooks) = &gateway.webhooks else { return Err(Refusal::Unavailable) };
    match webhooks.make(source, request.clone(), facts).await {
        Made::Full => Err(Refusal::Unavailable),
        Made::Failed(failed) => {
            let record = webhooks.failure(source, request, facts, &failed);
            keep(gateway, source, &failed, record).await?;
            let status = StatusCode::from_u16(failed.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            Ok(reply::text(status, &failed.message))
        }
        Made::Events(events, said) => {
            let events = without_suppressed(&gateway.suppressed, events);
            // The first was counted before. The others are not refused: the service has worked, and a tool may never come again.
            gateway.limits.charge(source, events.len().saturating_sub(1));
            store(gateway, source, events, held, along, 0).await?;
            Ok(said.map_or_else(reply::ok, |said| reply::raw(said.body, &said.content_type)))
        }
    }
}

/// Keeps a webhook request that became nothing.
async fn keep<P: Publisher>(
    gateway: &Gateway<P>,
    source: &Source,
    failed: &Failed,
    record: Addressed,
) -> Result<(), Refusal> {
    stored(gateway.admission.publish(vec![record]).await)?;
    metrics().gateway_webhook_failures.with_label_values(&[source.id.as_str(), failed.reason.as_str()]).inc();
    if let Some(left_out) = seldom::due("webhook failed", source.id.as_str()) {
        let (source, reason, error) = (source.id.as_str(), failed.reason.as_str(), failed.detail.as_str());
        tracing::warn!(source, reason, error, left_out, "a webhook request became nothing, it is kept in proc-errors");
    }
    Ok(())
}

async fn pass_on<P>(gateway: &Gateway<P>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let Some(warehouse) = &gateway.warehouse else {
        gateway.intake.discard(body).await;
        return reply::refuse(Refusal::Unavailable);
    };
    let (body, _held) = match gateway.intake.take(body, &parts.headers, true).await {
        Ok(taken) => taken,
        Err(refusal) => return reply::refuse(refusal),
    };
    let (path, query) = (parts.uri.path(), parts.uri.query());
    match warehouse.pass_on(parts.method, path, query, &parts.headers, body).await {
        Ok(answer) => {
            let mut response = (answer.status, answer.body).into_response();
            if let Some(kind) = answer.content_type {
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
            }
            response
        }
        Err(error) => {
            if let Some(left_out) = seldom::due("warehouse", &error.to_string()) {
                tracing::warn!(%error, left_out, "the warehouse service does not answer");
            }
            reply::refuse(Refusal::Unavailable)
        }
    }
}

async fn drain_job<P: Publisher>(State(gateway): State<Arc<Gateway<P>>>, Path(run): Path<String>) -> Response {
    if run.trim().is_empty() {
        return reply::text(StatusCode::BAD_REQUEST, "job_run_id not found");
    }
    let command = Command {
        id: uuid::Uuid::new_v4().to_string(),
        action: Wanted::Drain,
        target: Target::JobRun(run.as_str().into()),
        at: gateway.clock.now(),
        by: "gateway".into(),
        ends: Default::default(),
    };
    match stored(gateway.admission.command(&command).await) {
        Ok(()) => StatusCode::CREATED.into_response(),
        Err(refusal) => reply::refuse(refusal),
    }
}

async fn config<P: Publisher>(State(gateway): State<Arc<Gateway<P>>>, request: Request) -> Response {
    let (parts, _) = request.into_parts();
    match Auth::AnyKey.speaker(&parts, &gateway.workspace.get()) {
        Ok(speaker) => reply::json(StatusCode::OK, &source_config::of(&speaker.source, gateway.clock.now())),
        Err(refusal) => reply::refuse(refusal),
    }
}

fn facts<P>(gateway: &Gateway<P>, parts: &Parts, channel: Channel, source: &Source) -> Facts {
    let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(peer)| *peer);
    let run = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok()).filter(|id| !id.is_empty());
    Facts {
        received_at: gateway.clock.now(),
        client_ip: gateway.proxies.client(&parts.headers, peer),
        channel,
        names_runs: source.is_backfill() || parts.uri.path().starts_with("/internal/"),
        job_run: run("x-rudder-job-run-id").map(Into::into),
        task_run: run("x-rudder-task-run-id").map(Into::into),
    }
}

fn along(headers: &HeaderMap, speaker: &Speaker) -> Along {
    let trace = headers.get("traceparent").and_then(|value| value.to_str().ok());
    let trace = trace.filter(|trace| trace.len() <= MAX_TRACE);
    Along { traceparent: trace.map(str::to_owned), only: speaker.only.clone(), replay: None }
}

/// `?verdicts=1`: the good events of a request are kept, and the answer says what became of each.
fn wants_verdicts(parts: &Parts) -> bool {
    let query = parts.uri.query().unwrap_or_default();
    !query.is_empty()
        && url::form_urlencoded::parse(query.as_bytes()).any(|(name, value)| name == "verdicts" && value == "1")
}

fn version() -> serde_json::Value {
    serde_json::json!({"Version": env!("CARGO_PKG_VERSION"), "Commit": "", "BuildDate": "", "BuiltBy": "", "Features": ""})
}

async fn health<P: Publisher>(State(gateway): State<Arc<Gateway<P>>>) -> Response {
    let sources = gateway.workspace.get().sources().count();
    let body = serde_json::json!({
        "appType": "GATEWAY", "server": "UP", "acceptingEvents": "TRUE", "mode": "NORMAL",
        "backendConfigMode": "JSON", "sources": sources,
    });
    reply::json(StatusCode::OK, &body)
}
