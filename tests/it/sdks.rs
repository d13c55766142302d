//! The official SDKs, as their registries have them, against the edge: every call, with answers that fail in between. What each of
//! them sends arrives once and in order.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::process::Command;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::support::process::Flow;
use crate::support::sink;

/// What stands before the gateway and fails at times.
struct Flaky {
    gateway: String,
    posts: AtomicUsize,
    /// Whether an answer may be lost of events that were stored: an SDK that gives them no ids cannot be helped then.
    loses_answers: bool,
}

impl Flaky {
    async fn before(flow: &Flow, loses_answers: bool) -> String {
        let flaky = Arc::new(Self { gateway: flow.url(), posts: AtomicUsize::new(0), loses_answers });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("bound"));
        let routes = axum::Router::new().fallback(pass).with_state(flaky);
        tokio::spawn(async move { axum::serve(listener, routes).await });
        address
    }
}

/// Every fourth post is turned away, and every fourth is passed on and its answer lost.
async fn pass(State(flaky): State<Arc<Flaky>>, method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let turn = if method == Method::POST { flaky.posts.fetch_add(1, Ordering::Relaxed) % 4 } else { 0 };
    if turn == 1 {
        // A browser reads the answer only where its page may.
        let allowed = [("access-control-allow-origin", "*"), ("retry-after", "0")];
        return (StatusCode::SERVICE_UNAVAILABLE, allowed, "service unavailable\n").into_response();
    }
    let mut request = reqwest::Client::new().request(method, format!("{}{uri}", flaky.gateway)).body(body);
    for (name, value) in
        headers.iter().filter(|(name, _)| !["host", "content-length", "connection"].contains(&name.as_str()))
    {
        request = request.header(name, value);
    }
    let answer = request.send().await.expect("the gateway answers");
    let (mut status, said) = (answer.status(), answer.headers().clone());
    if turn == 3 && flaky.loses_answers {
        assert_eq!(status, StatusCode::OK);
        status = StatusCode::SERVICE_UNAVAILABLE;
    }
    let mut response = (status, answer.bytes().await.expect("a body")).into_response();
    for (name, value) in
        said.iter().filter(|(name, _)| !["content-length", "transfer-encoding", "connection"].contains(&name.as_str()))
    {
        response.headers_mut().insert(name, value.clone());
    }
    response
}

async fn next(arrivals: &mut UnboundedReceiver<(String, String)>) -> Option<Value> {
    let arrived = tokio::time::timeout(Duration::from_secs(60), arrivals.recv()).await.ok()?;
    let (_, body) = arrived.expect("the sink runs");
    Some(serde_json::from_str(&body).expect("JSON"))
}

fn installed(path: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/sdks").join(path);
    assert!(path.exists(), "{} is missing: deploy/services fetch sdks", path.display());
    path
}

/// Every call of an SDK, in the order in which it was made.
fn calls(last: &[&str]) -> Vec<String> {
    let steps = (0..20).map(|n| format!("track {n}"));
    ["identify".to_owned()].into_iter().chain(steps).chain(last.iter().map(|kind| (*kind).to_owned())).collect()
}

async fn sends(program: PathBuf, args: &[&str], loses_answers: bool, expected: Vec<String>) {
    let flow = Flow::embedded();
    let _running = flow.start_all().await;
    let mut arrivals = sink(flow.sink).await;
    let edge = Flaky::before(&flow, loses_answers).await;
    let mut child = Command::new(program)
        .args(args)
        .args([edge.as_str(), "wk-1"])
        .env("HOME", flow.folder.path())
        .stdin(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("it starts");
    let mut arrived = Vec::new();
    while arrived.len() < expected.len() {
        let event = next(&mut arrivals).await.unwrap_or_else(|| panic!("only these arrived: {arrived:?}"));
        assert!(event["messageId"].as_str().is_some_and(|id| !id.is_empty()), "{event}");
        let kind = event["type"].as_str().expect("a type").to_owned();
        arrived.push(if kind == "track" { format!("track {}", event["properties"]["n"]) } else { kind });
    }
    drop(child.stdin.take());
    let ended = tokio::time::timeout(Duration::from_secs(60), child.wait()).await.expect("in time").expect("it ends");
    assert!(ended.success(), "{ended}");
    assert_eq!(arrived, expected);
    // What was sent twice would have arrived by the time at which an event that is sent now arrives.
    let last = r#"{"userId":"u1","event":"last","properties":{"n":-1}}"#;
    let post =
        reqwest::Client::new().post(format!("{}/v1/track", flow.url())).header("authorization", "Basic d2stMTo=");
    assert_eq!(post.body(last).send().await.expect("an answer").status(), 200);
    let event = next(&mut arrivals).await.expect("in time");
    assert_eq!(event["event"], "last", "something arrived twice: {event}");
}

const SERVER: [&str; 4] = ["page", "screen", "group", "alias"];

#[tokio::test(flavor = "multi_thread")]
async fn rudderstacks_node_sdk() {
    let script = installed("node/rudder.mjs").display().to_string();
    installed("node/node_modules");
    sends("node".into(), &[&script], true, calls(&SERVER)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn segments_node_sdk() {
    let script = installed("node/segment.mjs").display().to_string();
    sends("node".into(), &[&script], true, calls(&SERVER)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rudderstacks_browser_sdk() {
    let script = installed("node/browser.mjs").display().to_string();
    sends("node".into(), &[&script], true, calls(&["page", "group", "alias"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rudderstacks_python_sdk() {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/sdks/python/send.py").display().to_string();
    sends(installed("python/bin/python"), &[&script, "rudder"], true, calls(&SERVER)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn segments_python_sdk() {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/sdks/python/send.py").display().to_string();
    sends(installed("python/bin/python"), &[&script, "segment"], true, calls(&SERVER)).await;
}

/// It gives its events no ids, so an answer that is lost means two events.
#[tokio::test(flavor = "multi_thread")]
async fn rudderstacks_rust_sdk() {
    sends(installed("rust/debug/laneway-sdk-test"), &[], false, calls(&SERVER)).await;
}
