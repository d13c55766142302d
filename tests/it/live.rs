//! Recent events for people who look at them: only theirs, only while they look, and never at anybody's cost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use axum::http::Uri;
use reqwest::Client;
use serde_json::{Value, json};

use crate::support::process::Flow;
use crate::support::{eventually, sink};

const SOON: Duration = Duration::from_secs(60);

/// A control plane that people look at events in.
#[derive(Default)]
struct Plane {
    config: Mutex<String>,
    uploads: Mutex<Vec<(String, Value)>>,
    /// It takes uploads and never answers.
    hangs: AtomicBool,
}

impl Plane {
    async fn start() -> (Arc<Self>, String) {
        let plane = Arc::new(Self::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let routes = axum::Router::new().fallback(answer).with_state(Arc::clone(&plane));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        (plane, url)
    }

    /// The events of a write key that were uploaded, by their names.
    fn shown(&self, key: &str) -> Vec<String> {
        let uploads = self.uploads.lock().expect("whole");
        let events = uploads.iter().flat_map(|(_, body)| body[key].as_array().cloned().unwrap_or_default());
        events.map(|event| event["eventName"].as_str().expect("a name").to_owned()).collect()
    }
}

async fn answer(State(plane): State<Arc<Plane>>, uri: Uri, body: String) -> String {
    if uri.path() != "/dataplane/v2/eventUploads" {
        return plane.config.lock().expect("whole").clone();
    }
    let body = serde_json::from_str(&body).expect("JSON");
    plane.uploads.lock().expect("whole").push((uri.to_string(), body));
    if plane.hangs.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
    String::new()
}

/// Two sources, of which each may be looked at.
fn config(flow: &Flow, first: bool, second: bool) -> String {
    let source = |n: u32, is_watched: bool| {
        json!({"id": format!("src-{n}"), "name": "s", "writeKey": format!("wk-{n}"), "config": {"eventUpload": is_watched},
            "destinations": [{"id": "hook", "name": "hook", "destinationDefinition": {"name": "WEBHOOK", "displayName": "Webhook"},
                "config": {"webhookUrl": format!("http://127.0.0.1:{}/", flow.sink), "webhookMethod": "POST"}}]})
    };
    json!({"workspaceId": "ws-1", "sources": [source(1, first), source(2, second)]}).to_string()
}

async fn track(flow: &Flow, key: &str, name: &str) {
    let request = Client::new().post(format!("{}/v1/track", flow.url())).basic_auth(key, Some(""));
    let answer = request.body(json!({"userId": "u", "event": name}).to_string()).send().await.expect("an answer");
    assert_eq!(answer.status(), 200);
}

async fn is_shown_to_who_looks(mut flow: Flow) {
    let (plane, url) = Plane::start().await;
    for (name, value) in [
        ("LANEWAY_CONTROL__URL", url.as_str()),
        ("LANEWAY_CONTROL__TOKEN", "t"),
        ("LANEWAY_CONTROL__REGION", "EU"),
        ("LANEWAY_CONTROL__POLL_INTERVAL", "200ms"),
    ] {
        flow.set(name, value);
    }
    *plane.config.lock().expect("whole") = config(&flow, false, false);
    let mut arrivals = sink(flow.sink).await;
    let mut running = flow.start_all().await;
    if running.len() > 1 {
        running.push(flow.start("live", "live-1"));
        running.last_mut().expect("there").ready().await;
    }
    track(&flow, "wk-1", "before").await;
    track(&flow, "wk-2", "other").await;
    arrivals.recv().await.expect("an arrival");
    arrivals.recv().await.expect("an arrival");
    // Somebody begins to look: at what was, and at what comes.
    *plane.config.lock().expect("whole") = config(&flow, true, false);
    eventually("what was is shown", SOON, async || plane.shown("wk-1") == ["before"]).await;
    track(&flow, "wk-2", "other").await;
    track(&flow, "wk-1", "now").await;
    eventually("what comes is shown", SOON, async || plane.shown("wk-1") == ["before", "now"]).await;
    assert!(plane.shown("wk-2").is_empty(), "nobody looks at it");
    assert!(plane.uploads.lock().expect("whole")[0].0.ends_with("?region=EU"));

    // Whatever becomes of the upload, deliveries go on.
    plane.hangs.store(true, Ordering::Relaxed);
    while arrivals.try_recv().is_ok() {}
    for n in 0..300 {
        track(&flow, "wk-1", &format!("n{n}")).await;
    }
    for _ in 0..300 {
        tokio::time::timeout(SOON, arrivals.recv()).await.expect("in time").expect("an arrival");
    }
    let tail = flow.command(&["tail", "--source", "src-2", "--from-start", "--until-end", "--output", "json"]);
    let lines = String::from_utf8_lossy(&tail.stdout).into_owned();
    assert_eq!(lines.lines().count(), 2, "{lines}");
    assert!(lines.lines().all(|line| line.contains("\\\"other\\\"")), "{lines}");
    for process in &mut running {
        process.terminate();
        assert!(process.ended(SOON).await.success(), "{}", process.said());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_shown_to_who_looks_embedded() {
    is_shown_to_who_looks(Flow::embedded()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_shown_to_who_looks_on_kafka() {
    is_shown_to_who_looks(Flow::on_kafka()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_shown_to_who_looks_on_pulsar() {
    is_shown_to_who_looks(Flow::on_pulsar()).await;
}
