//! A control plane over HTTP: followed, kept in the log, and not needed for a start.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::process::{Flow, Process, workspace};

const TOKEN: &str = "control-secret-5";

/// RudderStack's API, as far as it is asked.
#[derive(Default)]
struct ControlPlane {
    text: Mutex<String>,
    is_down: AtomicBool,
    /// Answers with the configuration, and those that say that it is the same.
    whole: AtomicUsize,
    same: AtomicUsize,
    asked: Mutex<String>,
}

impl ControlPlane {
    async fn start(text: String) -> (Arc<Self>, String) {
        let plane = Arc::new(Self { text: Mutex::new(text), ..Self::default() });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let routes = axum::Router::new().fallback(answer).with_state(Arc::clone(&plane));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        (plane, url)
    }

    fn set(&self, text: String) {
        *self.text.lock().expect("whole") = text;
    }

    fn is_down(&self, is_down: bool) {
        self.is_down.store(is_down, Ordering::Relaxed);
    }
}

async fn answer(State(plane): State<Arc<ControlPlane>>, uri: Uri, headers: HeaderMap) -> Response {
    *plane.asked.lock().expect("whole") = uri.to_string();
    if plane.is_down.load(Ordering::Relaxed) {
        return (StatusCode::BAD_GATEWAY, "not now").into_response();
    }
    let known = format!("Basic {}", BASE64_STANDARD.encode(format!("{TOKEN}:")));
    if headers.get("authorization").is_none_or(|given| given.as_bytes() != known.as_bytes()) {
        return (StatusCode::UNAUTHORIZED, "who are you").into_response();
    }
    let text = plane.text.lock().expect("whole").clone();
    let tag = format!("\"{:x}\"", text.bytes().fold(7_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into())));
    if headers.get("if-none-match").is_some_and(|given| given.as_bytes() == tag.as_bytes()) {
        plane.same.fetch_add(1, Ordering::Relaxed);
        return StatusCode::NOT_MODIFIED.into_response();
    }
    plane.whole.fetch_add(1, Ordering::Relaxed);
    ([("etag", tag)], text).into_response()
}

fn follow(flow: &mut Flow, url: &str, more: &[(&str, &str)]) {
    flow.set("LANEWAY_CONTROL__URL", url);
    flow.set("LANEWAY_CONTROL__TOKEN", "${LANEWAY_TEST_TOKEN}");
    flow.set("LANEWAY_TEST_TOKEN", TOKEN);
    flow.set("LANEWAY_CONTROL__POLL_INTERVAL", "500ms");
    more.iter().for_each(|(name, value)| flow.set(name, value));
    std::fs::remove_file(flow.folder.path().join("workspace.json")).expect("there is no file");
}

async fn status(flow: &Flow, key: &str) -> u16 {
    let post = reqwest::Client::new().post(format!("{}/v1/track", flow.url())).basic_auth(key, Some(""));
    post.body(r#"{"userId":"u"}"#).send().await.map_or(0, |answer| answer.status().as_u16())
}

async fn takes(flow: &Flow, key: &str) {
    eventually(&format!("{key} is known"), Duration::from_secs(20), async || status(flow, key).await == 200).await;
}

async fn started(flow: &Flow, stage: &str, instance: &str) -> Process {
    let mut process = flow.start(stage, instance);
    process.ready().await;
    process
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_control_plane_says_is_in_force_everywhere_and_stays_when_it_is_away() {
    let mut flow = Flow::on_kafka();
    let hook = format!("http://127.0.0.1:{}/", flow.sink);
    let (plane, url) = ControlPlane::start(workspace(&[("dst-1", &hook)])).await;
    follow(&mut flow, &url, &[]);
    let mut gateway = started(&flow, "gateway", "gateway-1").await;
    let processor = started(&flow, "processor", "processor-1").await;
    let _router = started(&flow, "router", "router-1").await;
    assert_eq!(*plane.asked.lock().expect("whole"), "/workspaceConfig?fetchAll=true");
    let report = flow.load(&["--events", "500", "--users", "50"]).report().await;
    assert_eq!((&report["delivered"], &report["lost"]), (&json!(500), &json!(0)), "{report}");

    // Another destination, and another source, in all processes.
    let changed = workspace(&[("dst-1", &hook), ("dst-2", &hook)]).replace("wk-off", "wk-2").replace("false", "true");
    plane.set(changed);
    takes(&flow, "wk-2").await;
    let made = async || {
        assert_eq!(status(&flow, "wk-1").await, 200);
        processor
            .metric("laneway_processor_deliveries_total{destination=\"dst-2\"}")
            .await
            .is_some_and(|made| made > 0.0)
    };
    eventually("the processor knows the new destination", Duration::from_secs(20), made).await;
    assert!(plane.same.load(Ordering::Relaxed) > 0, "requests are conditional");

    // What cannot be used changes nothing.
    plane.set("{\"sources\": [".into());
    let refused = || gateway.said().contains("not usable, the last good one stays in force");
    eventually("it is told", Duration::from_secs(20), async || refused()).await;
    assert_eq!(status(&flow, "wk-2").await, 200);

    // Away: everything goes on, and a process that starts has what was in force.
    plane.is_down(true);
    gateway.kill();
    gateway = started(&flow, "gateway", "gateway-1").await;
    assert_eq!(status(&flow, "wk-2").await, 200);
    assert!(gateway.said().contains("going on with the workspace configuration that was in force last"));
    assert!(gateway.said().contains("502 Bad Gateway: not now") && !gateway.said().contains(TOKEN));
    plane.set(workspace(&[("dst-1", &hook)]).replace("wk-1", "wk-3"));
    plane.is_down(false);
    takes(&flow, "wk-3").await;
    assert_eq!(status(&flow, "wk-2").await, 401);

    let checked = flow.command(&["check", "--output", "json"]);
    let found: Vec<Value> = serde_json::from_slice(&checked.stdout).expect("JSON");
    assert!(
        found.iter().any(|it| it["subject"] == "workspace" && it["says"] == "2 sources, 1 connected destinations"),
        "{found:?}"
    );
    let shown = flow.command(&["config", "show"]);
    assert!(!String::from_utf8_lossy(&shown.stdout).contains(TOKEN));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_without_anything_waits_for_the_control_plane() {
    let mut flow = Flow::embedded();
    let (plane, url) = ControlPlane::start(workspace(&[])).await;
    plane.is_down(true);
    follow(&mut flow, &url, &[]);
    let mut process = flow.start("all", "all-1");
    eventually("clients are told to come back", Duration::from_secs(20), async || status(&flow, "wk-1").await == 503)
        .await;
    let told = async || process.said().contains("the control plane cannot be asked");
    eventually("it says why", Duration::from_secs(20), told).await;
    assert!(!process.has_ended(), "{}", process.said());
    plane.is_down(false);
    takes(&flow, "wk-1").await;
    process.terminate();
    assert!(process.ended(Duration::from_secs(30)).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_of_many_sources_is_there_soon_and_a_change_at_once() {
    let (sources, destinations) = (5_000, 20);
    let destination = |source: u32, n: u32| {
        json!({"id": format!("d-{source}-{n}"), "name": "Hook", "enabled": true,
            "destinationDefinition": {"name": "WEBHOOK", "displayName": "Webhook"},
            "config": {"webhookUrl": "http://127.0.0.1:9/", "webhookMethod": "POST"}})
    };
    let source = |n: u32| {
        let all: Vec<Value> = (0..destinations).map(|d| destination(n, d)).collect();
        json!({"id": format!("s-{n}"), "name": "Web", "writeKey": format!("k-{n}"), "enabled": true, "destinations": all})
    };
    let all: Vec<Value> = (0..sources).map(source).collect();
    let text = json!({"ws-1": {"sources": &all[1..]}, "ws-2": {"sources": &all[..1]}, "ws-3": null}).to_string();
    let mut flow = Flow::embedded();
    let (plane, url) = ControlPlane::start(text.clone()).await;
    follow(&mut flow, &url, &[("LANEWAY_CONTROL__NAMESPACE", "free")]);
    let began = Instant::now();
    let _process = started(&flow, "all", "all-1").await;
    let start = began.elapsed();
    assert_eq!(*plane.asked.lock().expect("whole"), "/data-plane/v1/namespaces/free/config");
    for key in ["k-0", "k-4999"] {
        takes(&flow, key).await;
    }
    plane.set(text.replace("\"k-4999\"", "\"k-new\""));
    let changed = Instant::now();
    takes(&flow, "k-new").await;
    // Told, not asserted: machines are noisy, and this is the slow build.
    eprintln!("{} MB: ready after {start:?}, changed after {:?}", text.len() >> 20, changed.elapsed());
}
