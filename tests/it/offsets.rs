//! `laneway offsets`: a stage that does not run is put elsewhere, and goes on from there.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::Value;

use crate::support::eventually;
use crate::support::process::{Flow, Process};
use crate::support::sink::{Sink, publish};

const SOON: Duration = Duration::from_secs(60);
const EVENTS: usize = 20;

fn offsets(flow: &Flow, args: &[&str]) -> Vec<Value> {
    let told = flow.command(&[&["offsets"], args, &["--output", "json"]].concat());
    assert!(told.status.success(), "{args:?}: {}", String::from_utf8_lossy(&told.stderr));
    serde_json::from_slice(&told.stdout).expect("JSON")
}

async fn stopped(processes: Vec<Process>) {
    for mut process in processes {
        process.terminate();
        assert!(process.ended(SOON).await.success());
    }
}

fn pending(flow: &Flow) -> u64 {
    offsets(flow, &["list", "router"]).iter().filter_map(|row| row["pending"].as_u64()).sum()
}

async fn goes_where_it_is_put(flow: Flow) {
    let sink = Sink::start(flow.sink).await;
    let running = flow.start_all().await;
    publish(&flow, EVENTS);
    eventually("everything arrives", SOON, async || sink.counts() == (EVENTS, EVENTS)).await;
    let refused = flow.command(&["offsets", "reset", "processor", "--to-earliest", "--execute"]);
    assert_eq!(refused.status.code(), Some(1), "it runs: {}", String::from_utf8_lossy(&refused.stdout));
    stopped(running).await;

    let would = offsets(&flow, &["reset", "processor", "--to-earliest"]);
    // Below 0 Kafka's protocol has words of its own for times.
    for early in ["1960-01-01T00:00:00Z", "1969-12-31T23:59:59.999Z", "1970-01-01T00:00:00Z", "99999999d"] {
        assert_eq!(offsets(&flow, &["reset", "processor", "--to-time", early]), would, "{early}");
    }
    let before = offsets(&flow, &["list", "processor"]);
    let start =
        |partition: &Value| before.iter().find(|it| it["partition"] == *partition).expect("listed")["start"].clone();
    let moves = |row: &&Value| row["from"].is_string() && row["from"] != start(&row["partition"]);
    assert!(would.iter().filter(moves).count() > 0, "{would:?}");
    assert!(would.iter().all(|row| row["to"] == start(&row["partition"]) && row["executed"] == false), "{would:?}");
    let moved = |row: &Value| row["committed"].is_string() && row["committed"] != row["start"];
    assert!(before.iter().any(moved), "nothing was changed");
    offsets(&flow, &["reset", "processor", "--to-earliest", "--execute"]);
    assert!(offsets(&flow, &["list", "processor"]).iter().all(|row| row["committed"] == row["start"]));
    let running = flow.start_all().await;
    eventually("everything arrives again", SOON, async || sink.counts() == (EVENTS, 2 * EVENTS)).await;

    // A router that is put to the end forgets what it had not ended.
    sink.is_down.store(true, Ordering::Relaxed);
    publish(&flow, 5);
    eventually("five are pending", SOON, async || pending(&flow) == 5).await;
    stopped(running).await;
    let told = flow.command(&["offsets", "reset", "router", "--to-latest"]);
    assert!(String::from_utf8_lossy(&told.stdout).contains("of 5 pending deliveries"), "{told:?}");
    offsets(&flow, &["reset", "router", "--to-latest", "--execute"]);
    sink.is_down.store(false, Ordering::Relaxed);
    let running = flow.start_all().await;
    publish(&flow, 3);
    eventually("what is new arrives", SOON, async || sink.counts().0 == EVENTS + 3).await;
    eventually("nothing is pending", SOON, async || pending(&flow) == 0).await;
    assert_eq!(sink.counts(), (EVENTS + 3, 2 * EVENTS + 3), "what was pending was forgotten");
    stopped(running).await;

    let usage = |args: &[&str]| flow.command(&[&["offsets", "reset", "router"], args].concat()).status.code();
    assert_eq!((usage(&[]), usage(&["--to-earliest", "--to-latest"])), (Some(2), Some(2)));
    let is_place = offsets(&flow, &["list", "router"])[0]["start"].as_str().is_some_and(|start| start.contains(':'));
    assert_eq!(usage(&["--to-offset", if is_place { "5" } else { "1:2:3" }]), Some(2), "of another log");
    assert_eq!((usage(&["--to-offset", "x"]), usage(&["--to-latest", "--partition", "99"])), (Some(2), Some(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_stage_goes_where_it_is_put_on_kafka() {
    goes_where_it_is_put(Flow::on_kafka()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_stage_goes_where_it_is_put_on_pulsar() {
    goes_where_it_is_put(Flow::on_pulsar()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_stage_goes_where_it_is_put_embedded() {
    goes_where_it_is_put(Flow::embedded()).await;
}
