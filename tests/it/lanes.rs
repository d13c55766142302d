//! Destinations that are down, paused or drained, as an operator sees and steers them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::{StatusCode, Uri};
use serde_json::Value;

use crate::support::eventually;
use crate::support::process::{Flow, Process, workspace};

const USERS: usize = 20;
const SOON: Duration = Duration::from_secs(30);
/// A probe may wait for a minute.
const LATER: Duration = Duration::from_secs(120);

/// Two destinations: `good` is always well, `bad` is down when told.
struct Destinations {
    is_down: AtomicBool,
    /// Path, user, number.
    arrived: Mutex<Vec<(String, usize, usize)>>,
}

impl Destinations {
    async fn start(port: u16) -> Arc<Self> {
        let this = Arc::new(Self { is_down: AtomicBool::new(false), arrived: Mutex::default() });
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.expect("a listener");
        let destinations = Arc::clone(&this);
        let take = async move |uri: Uri, body: String| {
            if uri.path() == "/bad" && destinations.is_down.load(Ordering::Relaxed) {
                return StatusCode::SERVICE_UNAVAILABLE;
            }
            let event: Value = serde_json::from_str(&body).expect("JSON");
            let number = |name: &str| event["properties"][name].as_u64().expect("a number") as usize;
            let arrival = (uri.path().to_owned(), number("user"), number("n"));
            destinations.arrived.lock().expect("no poison").push(arrival);
            StatusCode::OK
        };
        tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(take)).await });
        this
    }

    fn count(&self, path: &str) -> usize {
        self.arrived.lock().expect("no poison").iter().filter(|(at, ..)| at == path).count()
    }

    /// What each user's first arrivals were, in order.
    fn is_ordered(&self, path: &str) -> bool {
        let arrived = self.arrived.lock().expect("no poison");
        (0..USERS).all(|user| {
            let numbers: Vec<usize> =
                arrived.iter().filter(|(at, whose, _)| at == path && *whose == user).map(|(.., n)| *n).collect();
            numbers.is_sorted()
        })
    }
}

/// A flow to both of them.
async fn flow(flow: Flow) -> (Flow, Arc<Destinations>) {
    let destinations = Destinations::start(flow.sink).await;
    let url = |path: &str| format!("http://127.0.0.1:{}/{path}", flow.sink);
    let workspace = workspace(&[("good", &url("good")), ("bad", &url("bad"))]);
    std::fs::write(flow.folder.path().join("workspace.json"), workspace).expect("written");
    (flow, destinations)
}

/// So many events of each user, numbered from `from`.
async fn send(flow: &Flow, from: usize, count: usize) {
    let client = reqwest::Client::new();
    for n in from..from + count {
        for user in 0..USERS {
            let event = format!(r#"{{"userId":"u{user}","event":"e","properties":{{"user":{user},"n":{n}}}}}"#);
            let request = client.post(format!("{}/v1/track", flow.url())).basic_auth("wk-1", Some("")).body(event);
            assert_eq!(request.send().await.expect("an answer").status(), 200);
        }
    }
}

/// What `laneway lanes` says of a destination.
fn lane(flow: &Flow, id: &str) -> Value {
    let listed = flow.command(&["lanes", "list", "--over", "0", "--output", "json"]);
    let rows: Vec<Value> = serde_json::from_slice(&listed.stdout).unwrap_or_default();
    rows.into_iter().find(|row| row["destination"] == id).unwrap_or_default()
}

fn steer(flow: &Flow, args: &[&str]) -> Value {
    let told = flow.command(&[&["lanes"], args, &["--output", "json"]].concat());
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    serde_json::from_slice(&told.stdout).expect("JSON")
}

async fn metric(process: &Process, line: &str) -> bool {
    let url = format!("http://127.0.0.1:{}/metrics", process.admin);
    let Ok(answer) = reqwest::get(url).await else { return false };
    answer.text().await.is_ok_and(|page| page.lines().any(|it| it == line))
}

/// A dead destination with a backlog, through a kill of whoever delivers.
async fn dead_and_back(given: Flow, part: &str) {
    let (flow, destinations) = flow(given).await;
    let mut running = flow.start_all().await;
    destinations.is_down.store(true, Ordering::Relaxed);
    send(&flow, 0, 5).await;
    eventually("the other has everything", SOON, async || destinations.count("/good") == 5 * USERS).await;
    eventually("it counts as down", SOON, async || lane(&flow, "bad")["breaker_open_since"].is_string()).await;
    let (bad, good) = (lane(&flow, "bad"), lane(&flow, "good"));
    assert_eq!((&bad["pending"], &good["pending"]), (&Value::from(5 * USERS), &Value::from(0)), "{bad} {good}");
    let shown = steer(&flow, &["show", "bad"]);
    let blocked = shown["blocked"].as_array().expect("a list");
    assert!(blocked.iter().any(|user| user["last_code"] == 503 && user["attempts"].as_u64() > Some(0)), "{shown}");

    let last = running.len() - 1;
    running[last].kill();
    running[last] = flow.start(part, &format!("{part}-1"));
    running[last].ready().await;
    send(&flow, 5, 2).await;
    eventually("the other goes on", SOON, async || destinations.count("/good") == 7 * USERS).await;
    assert_eq!(destinations.count("/bad"), 0);

    destinations.is_down.store(false, Ordering::Relaxed);
    eventually("everything arrives", LATER, async || destinations.count("/bad") == 7 * USERS).await;
    eventually("nothing is pending", SOON, async || lane(&flow, "bad")["pending"] == 0).await;
    let bad = lane(&flow, "bad");
    assert_eq!((&bad["ledger"]["delivered"], &bad["state"]), (&Value::from(7 * USERS), &Value::from("ok")), "{bad}");
    assert!(destinations.is_ordered("/bad") && destinations.is_ordered("/good"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_destination_delays_nobody_and_comes_back_in_order_embedded() {
    dead_and_back(Flow::embedded(), "all").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_destination_delays_nobody_and_comes_back_in_order_on_kafka() {
    dead_and_back(Flow::on_kafka(), "router").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_destination_delays_nobody_and_comes_back_in_order_on_pulsar() {
    dead_and_back(Flow::on_pulsar(), "router").await;
}

/// A pause makes the router meet a destination before the workspace has it: its type, and the type's rules, come later.
#[tokio::test(flavor = "multi_thread")]
async fn rules_of_a_type_hold_for_a_destination_that_was_met_before_it() {
    let mut flow = Flow::embedded();
    flow.set("LANEWAY_ROUTER__DESTINATIONS__WEBHOOK__RETRY_WINDOW", "1s");
    let running = flow.start_all().await;
    steer(&flow, &["pause", "late", "--unknown"]);
    let paused = r#"laneway_router_paused{destination="late"} 1"#;
    eventually("the pause holds", SOON, async || metric(&running[0], paused).await).await;
    steer(&flow, &["resume", "late"]);
    let nobody = format!("http://127.0.0.1:{}/", crate::support::process::free_port());
    let workspace = crate::support::process::workspace(&[("late", &nobody)]);
    std::fs::write(flow.folder.path().join("workspace.json"), workspace).expect("written");
    let is_in_force = async || running[0].said().contains("workspace configuration changed");
    eventually("the workspace is in force", SOON, is_in_force).await;
    crate::support::sink::publish(&flow, 1);
    eventually("it is given up within its window", SOON, async || lane(&flow, "late")["ledger"]["aborted"] == 1).await;

    // What the router knows needs no workspace; of others nothing can be told without one.
    std::fs::write(flow.folder.path().join("workspace.json"), "{").expect("written");
    steer(&flow, &["pause", "late"]);
    let unknown = flow.command(&["lanes", "pause", "other"]);
    let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(!unknown.status.success() && said.contains("the workspace cannot be read"), "{said}");
    assert!(!said.contains("there is no destination"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_pauses_resumes_and_drains() {
    let (flow, destinations) = flow(Flow::embedded()).await;
    let mut running = flow.start_all().await;
    for typo in [&["pause", "bda"][..], &["retry", "bda"], &["drain", "bda"], &["drain", "bda", "--execute"]] {
        let refused = flow.command(&[&["lanes"], typo].concat());
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(2) && said.contains("the nearest is bad"), "{typo:?}: {said}");
    }
    let told = steer(&flow, &["pause", "bad"]);
    assert!(told["id"].is_string() && told["by"].is_string() && told["action"] == "pause", "{told}");
    let paused = r#"laneway_router_paused{destination="bad"} 1"#;
    eventually("the pause holds", SOON, async || metric(&running[0], paused).await).await;
    send(&flow, 0, 2).await;
    eventually("the other has everything", SOON, async || destinations.count("/good") == 2 * USERS).await;
    eventually("all of it is pending", SOON, async || lane(&flow, "bad")["pending"] == 2 * USERS).await;
    assert_eq!((lane(&flow, "bad")["state"].as_str(), destinations.count("/bad")), (Some("paused"), 0));

    steer(&flow, &["resume", "bad"]);
    eventually("it goes on", SOON, async || destinations.count("/bad") == 2 * USERS).await;

    destinations.is_down.store(true, Ordering::Relaxed);
    send(&flow, 2, 2).await;
    eventually("all of it is pending", SOON, async || lane(&flow, "bad")["pending"] == 2 * USERS).await;
    let would = steer(&flow, &["drain", "bad"]);
    assert_eq!((&would["pending"], &would["executed"]), (&Value::from(2 * USERS), &Value::from(false)));
    steer(&flow, &["drain", "bad", "--execute"]);
    eventually("it is drained", SOON, async || lane(&flow, "bad")["ledger"]["drained"] == 2 * USERS).await;

    // A restart reads `control` again; what comes after the command is not drained.
    destinations.is_down.store(false, Ordering::Relaxed);
    running[0].kill();
    running[0] = flow.start("all", "all-1");
    running[0].ready().await;
    send(&flow, 4, 1).await;
    eventually("new deliveries arrive", LATER, async || destinations.count("/bad") == 3 * USERS).await;
    let ledger = lane(&flow, "bad")["ledger"].clone();
    assert_eq!((&ledger["drained"], &ledger["taken"]), (&Value::from(2 * USERS), &Value::from(5 * USERS)), "{ledger}");
    assert!(destinations.is_ordered("/bad"));
}
