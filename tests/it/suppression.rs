//! Suppressed users: their events are not taken, whatever has become of who says so.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use reqwest::Client;
use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::process::{Flow, Process, free_port};

const TOKEN: &str = "control-secret-6";
const SOON: Duration = Duration::from_secs(60);
const PAGE: usize = 2;

/// A list that grows, told in pages of two; its tokens are positions in it.
#[derive(Default)]
struct Plane {
    items: Mutex<Vec<Value>>,
    is_down: AtomicBool,
    asked: AtomicUsize,
    address: Mutex<String>,
}

impl Plane {
    async fn start(is_down: bool) -> (Arc<Self>, String) {
        let plane = Arc::new(Self { is_down: AtomicBool::new(is_down), ..Self::default() });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let routes = axum::Router::new().fallback(answer).with_state(Arc::clone(&plane));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        (plane, url)
    }

    fn say(&self, user: &str, canceled: bool, sources: &[&str]) {
        let item = json!({"workspaceId": "ws-1", "userId": user, "canceled": canceled, "sourceIds": sources,
            "createdAt": "2026-01-01T00:00:00Z"});
        self.items.lock().expect("whole").push(item);
    }
}

async fn answer(State(plane): State<Arc<Plane>>, uri: Uri, headers: HeaderMap) -> Response {
    plane.asked.fetch_add(1, Ordering::Relaxed);
    *plane.address.lock().expect("whole") = uri.to_string();
    let known = format!("Basic {}", BASE64_STANDARD.encode(format!("{TOKEN}:")));
    if plane.is_down.load(Ordering::Relaxed)
        || headers.get("authorization").is_none_or(|it| it.as_bytes() != known.as_bytes())
    {
        return (StatusCode::BAD_GATEWAY, "not now").into_response();
    }
    let query = uri.query().unwrap_or_default();
    let from: usize = query.split('&').find_map(|it| it.strip_prefix("pageToken=at")?.parse().ok()).unwrap_or(0);
    let items = plane.items.lock().expect("whole");
    let page: Vec<Value> = items.iter().skip(from).take(PAGE).cloned().collect();
    json!({"token": format!("at{}", from + page.len()), "items": page}).to_string().into_response()
}

fn suppressing(mut flow: Flow, url: &str) -> Flow {
    for (name, value) in [
        ("LANEWAY_CONTROL__SUPPRESSION__URL", url),
        ("LANEWAY_CONTROL__SUPPRESSION__POLL_INTERVAL", "200ms"),
        ("LANEWAY_CONTROL__SUPPRESSION__PAGE_SIZE", &PAGE.to_string()),
        ("LANEWAY_CONTROL__TOKEN", TOKEN),
    ] {
        flow.set(name, value);
    }
    flow
}

async fn post(flow: &Flow, users: &[&str]) -> u16 {
    let events: Vec<Value> =
        users.iter().map(|user| json!({"type": "track", "userId": user, "anonymousId": "a"})).collect();
    let request = Client::new().post(format!("{}/v1/batch", flow.url())).header("authorization", "Basic d2stMTo=");
    match request.body(json!({"batch": events}).to_string()).send().await {
        Ok(answer) => answer.status().as_u16(),
        Err(_) => 0,
    }
}

/// The users of the stored events, in no order.
fn stored(flow: &Flow) -> Vec<String> {
    let tail = flow.command(&["tail", "events", "--from-start", "--until-end", "--output", "json"]);
    assert!(tail.status.success(), "{tail:?}");
    let user = |line: &str| {
        let record: Value = serde_json::from_str(line).expect("JSON");
        let payload: Value = serde_json::from_str(record["value"]["payload"].as_str().expect("text")).expect("JSON");
        payload["userId"].as_str().expect("a user").to_owned()
    };
    let mut users: Vec<String> = String::from_utf8_lossy(&tail.stdout).lines().map(user).collect();
    users.sort();
    users
}

async fn has(process: &Process, users: f64) {
    eventually("the list is in force", SOON, async || {
        process.metric("laneway_control_suppressed_users").await == Some(users)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_taken_before_there_is_a_list_and_the_kept_one_holds() {
    let (plane, url) = Plane::start(true).await;
    let mut flow = suppressing(Flow::embedded(), &url);
    let internal = free_port();
    flow.set("LANEWAY_GATEWAY__INTERNAL__LISTEN", &format!("127.0.0.1:{internal}"));
    flow.set("LANEWAY_GATEWAY__INTERNAL__TOKEN", TOKEN);
    plane.say("gone", false, &[]);
    plane.say("here only", false, &["src-1"]);
    plane.say("elsewhere", false, &["src-9"]);
    let mut running = flow.start("all", "all-1");
    eventually("it asks, and takes nothing", SOON, async || {
        plane.asked.load(Ordering::Relaxed) > 4 && post(&flow, &["gone"]).await == 503
    })
    .await;
    let inside =
        reqwest::get(format!("http://127.0.0.1:{internal}/internal/v2/job-status/x")).await.expect("an answer");
    assert_eq!(inside.status(), 503, "at both doors");
    plane.is_down.store(false, Ordering::Relaxed);
    running.ready().await;
    has(&running, 3.0).await;
    let address = plane.address.lock().expect("whole").clone();
    assert!(address.starts_with("/dataplane/workspaces/ws-1/regulations/suppressions?pageSize=2"), "{address}");
    assert_eq!(post(&flow, &["gone", "here only", "elsewhere", " gone ", "nobody"]).await, 200);
    assert_eq!(post(&flow, &["gone"]).await, 200, "nobody is told");
    assert_eq!(stored(&flow), ["elsewhere", "nobody"]);
    assert_eq!(running.metric("laneway_gateway_suppressed_events_total").await, Some(4.0));

    // What comes later, and what ends.
    plane.say("gone", true, &[]);
    plane.say("late", false, &[]);
    eventually("the change is in force", SOON, async || {
        running.metric("laneway_control_suppressed_users").await == Some(3.0)
            && plane.address.lock().expect("whole").contains("at5")
    })
    .await;
    let before = stored(&flow).len();
    assert_eq!(post(&flow, &["late", "gone"]).await, 200);
    assert_eq!(stored(&flow).len(), before + 1);

    // The names are nowhere.
    let topic = flow.command(&["tail", "suppressions", "--from-start", "--until-end", "--output", "json"]);
    assert!(!String::from_utf8_lossy(&topic.stdout).contains("late") && !topic.stdout.is_empty());

    // Without who says so the list holds, also for a start.
    plane.is_down.store(true, Ordering::Relaxed);
    running.terminate();
    assert!(running.ended(SOON).await.success());
    let mut again = flow.start("all", "all-1");
    again.ready().await;
    has(&again, 3.0).await;
    let before = stored(&flow).len();
    assert_eq!(post(&flow, &["late", "here only"]).await, 200);
    assert_eq!(stored(&flow).len(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_gateways_have_one_list() {
    for flow in [Flow::on_kafka(), Flow::on_pulsar()] {
        have_one_list(flow).await;
    }
}

async fn have_one_list(flow: Flow) {
    let (plane, url) = Plane::start(false).await;
    let mut flow = suppressing(flow, &url);
    (0..5).for_each(|n| plane.say(&format!("u{n}"), false, &[]));
    let mut first = flow.start("gateway", "gateway-1");
    flow.set("LANEWAY_GATEWAY__LISTEN", "127.0.0.1:0");
    let mut second = flow.start("gateway", "gateway-2");
    first.ready().await;
    second.ready().await;
    has(&first, 5.0).await;
    has(&second, 5.0).await;
    // One of them asks; where it is gone, the other does.
    first.kill();
    plane.say("u5", false, &[]);
    has(&second, 6.0).await;
    let mut first = flow.start("gateway", "gateway-1");
    first.ready().await;
    has(&first, 6.0).await;
    // Who asked goes on asking when another one comes.
    plane.say("u6", false, &[]);
    has(&second, 7.0).await;
    has(&first, 7.0).await;
    second.kill();
    plane.say("u0", true, &[]);
    has(&first, 6.0).await;
    first.terminate();
    assert!(first.ended(SOON).await.success(), "{}", first.said());
}
