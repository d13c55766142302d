//! `laneway lag`: what waits where, on a log and in a router.

use std::ops::Range;
use std::time::Duration;

use serde_json::Value;

use crate::support::eventually;
use crate::support::process::Flow;

const SOON: Duration = Duration::from_secs(30);
/// A probe may wait for a minute.
const LATER: Duration = Duration::from_secs(120);

/// What is said of a stage as a whole.
fn lag(flow: &Flow, stage: &str) -> Value {
    let told = flow.command(&["lag", stage, "--over", "0", "--output", "json"]);
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let rows: Vec<Value> = serde_json::from_slice(&told.stdout).expect("JSON");
    assert_eq!(rows.len(), 1, "{rows:?}");
    rows.into_iter().next().unwrap_or_default()
}

fn publish(flow: &Flow, events: usize) {
    let event = |n: usize| format!("{{\"type\":\"track\",\"userId\":\"u{n}\",\"event\":\"e\"}}\n");
    std::fs::write(flow.folder.path().join("events"), (0..events).map(event).collect::<String>()).expect("written");
    let published = flow.command(&["publish", "--write-key", "wk-1", "events"]);
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
}

/// A destination that takes everything.
async fn sink(port: u16) {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.expect("a listener");
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(async || "ok")).await });
}

async fn is_pending(flow: &Flow, deliveries: u64) {
    eventually("the router has what waits", SOON, async || lag(flow, "router")["pending"] == deliveries).await;
    let (processor, router) = (lag(flow, "processor"), lag(flow, "router"));
    assert_eq!((&processor["behind"], &processor["oldest_seconds"]), (&Value::from(0), &Value::Null), "{processor}");
    assert!(router["oldest_seconds"].as_f64() > Some(0.0) && router["behind"].as_u64() >= Some(1), "{router}");
}

async fn drains(flow: &Flow) {
    sink(flow.sink).await;
    eventually("nothing waits any more", LATER, async || {
        let router = lag(flow, "router");
        router["pending"] == 0 && router["behind"] == 0 && router["oldest_seconds"].is_null()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_told_where_it_waits_on_kafka() {
    is_told(Flow::on_kafka(), 7..8).await;
}

/// Batches are counted there, and how many records one holds depends on when they come.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_told_where_it_waits_on_pulsar() {
    is_told(Flow::on_pulsar(), 1..8).await;
}

async fn is_told(flow: Flow, behind: Range<u64>) {
    publish(&flow, 7);
    let (processor, router) = (lag(&flow, "processor"), lag(&flow, "router"));
    let told = (processor["behind"].as_u64().expect("a number"), router["behind"].as_u64());
    assert!(behind.contains(&told.0) && told.1 == Some(0), "nobody has read it: {processor} {router}");
    assert!(processor["oldest_seconds"].is_number() && router["oldest_seconds"].is_null(), "{processor} {router}");
    let (mut processor, mut router) = (flow.start("processor", "processor-1"), flow.start("router", "router-1"));
    processor.ready().await;
    router.ready().await;
    is_pending(&flow, 7).await;
    let told = flow.command(&["lag", "--over", "1", "--partitions"]);
    let table = String::from_utf8_lossy(&told.stdout).into_owned();
    assert_eq!(table.lines().count(), 1 + 3 + 36, "a head, three stages, their partitions:\n{table}");
    let whole = table.lines().find(|line| line.starts_with("router") && line.contains(" all ")).expect("the router");
    assert!(whole.contains("+0/s") && whole.ends_with("never, at this rate"), "{table}");
    drains(&flow).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_told_where_it_waits_embedded() {
    let flow = Flow::embedded();
    let _running = flow.start_all().await;
    publish(&flow, 7);
    is_pending(&flow, 7).await;
    drains(&flow).await;
}
