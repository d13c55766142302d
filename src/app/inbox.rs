//! The built-in inbox of `dev`: a webhook destination to look into. `POST /inbox/<name>` keeps the last requests and prints a
//! line for each, `GET /inbox/<name>` shows them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::HeaderMap;
use axum::response::IntoResponse;
use axum::routing::post;
use bytes::Bytes;
use serde_json::value::RawValue;

use crate::clock::{Clock, Timestamp};
use crate::model::json::{Object, text_of};
use crate::telemetry::terminal::plain;

/// Requests kept for each inbox.
const KEPT: usize = 1_000;
/// Inboxes that are kept. A request to another one is printed, and not kept.
const MAX_INBOXES: usize = 100;
/// As large as a delivery may be.
const MAX_BODY_BYTES: usize = 5 << 20;

#[derive(Clone)]
pub struct Inbox {
    kept: Arc<Mutex<BTreeMap<String, VecDeque<Kept>>>>,
    clock: Clock,
    /// Print as JSON, one object a line.
    json: bool,
}

#[derive(Clone, serde::Serialize)]
struct Kept {
    at: String,
    delivery_id: String,
    headers: BTreeMap<String, String>,
    /// As it came, where it is JSON.
    body: Box<RawValue>,
}

impl Inbox {
    pub fn new(clock: Clock, json: bool) -> Self {
        Self { kept: Arc::default(), clock, json }
    }

    pub fn routes(self) -> Router {
        Router::new()
            .route("/inbox/{name}", post(take).get(show))
            .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
            .with_state(self)
    }

    fn print(&self, name: &str, body: &str, now: Timestamp) {
        let Ok(event) = Object::parse(body) else {
            return tell(&format!("{name}  {} bytes that are no event", body.len()));
        };
        let user = match event.text_of("anonymousId") {
            anonymous if anonymous.is_empty() => event.text_of("userId"),
            anonymous => anonymous,
        };
        let (kind, label) = (event.text_of("type"), event.get("event").or_else(|| event.get("name")).map(text_of));
        let label = label.unwrap_or_default();
        let received = Timestamp::parse(&event.text_of("receivedAt"));
        let latency = received.map_or(0, |received| now.since(received).as_millis());
        let line = match self.json {
            true => serde_json::json!({
                "destination": name, "user": user, "type": kind, "event": label, "latency_ms": latency
            })
            .to_string(),
            false => format!("{name}  {user}  {kind} {label}  {latency} ms"),
        };
        tell(&line);
    }
}

/// Whether anybody reads the lines is no concern of the engine's.
fn tell(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout().lock(), "{}", plain(line));
}

async fn take(State(inbox): State<Inbox>, Path(name): Path<String>, headers: HeaderMap, body: Bytes) -> &'static str {
    let now = inbox.clock.now();
    let text = String::from_utf8_lossy(&body);
    inbox.print(&name, &text, now);
    let quoted = || RawValue::from_string(serde_json::Value::from(text.as_ref()).to_string());
    let Ok(body) = RawValue::from_string(text.clone().into_owned()).or_else(|_| quoted()) else { return "ok" };
    let text_of = |value: &axum::http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let kept = Kept {
        at: now.rfc3339_millis(),
        delivery_id: headers.get("idempotency-key").map(text_of).unwrap_or_default(),
        headers: headers.iter().map(|(name, value)| (name.to_string(), text_of(value))).collect(),
        body,
    };
    let mut all = inbox.kept.lock().unwrap_or_else(PoisonError::into_inner);
    if all.len() >= MAX_INBOXES && !all.contains_key(&name) {
        return "ok";
    }
    let list = all.entry(name).or_default();
    list.push_back(kept);
    if list.len() > KEPT {
        list.pop_front();
    }
    "ok"
}

async fn show(State(inbox): State<Inbox>, Path(name): Path<String>) -> impl IntoResponse {
    let kept = inbox.kept.lock().unwrap_or_else(PoisonError::into_inner).get(&name).cloned().unwrap_or_default();
    let body = serde_json::to_string_pretty(&kept).unwrap_or_default();
    ([(axum::http::header::CONTENT_TYPE, "application/json")], body)
}
