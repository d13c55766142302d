//! What the stages cost beside the least that could do their work, on a real broker: each figure stands beside that of a bare
//! loop in the same run, in turns. Figures are lines of JSON.
//!
//! ```text
//! deploy/services up kafka
//! cargo bench --features pulsar --bench flow -- gateway          (single events, then batches of 100; SECONDS=8 PAIRS=3; beside a bare
//!                                               handler, and one that writes the five headers of our format too)
//! cargo bench --features pulsar --bench flow -- processor 300000    (on each log, in one table; deploy/services up pulsar; or on one: kafka, pulsar, embedded)
//! cargo bench --features pulsar --bench flow -- embedded            (the embedded log alone)
//! ```

#![allow(clippy::disallowed_methods, reason = "it measures time")]

mod bare;
mod bare_pulsar;
#[path = "../process.rs"]
mod process;
mod processors;
#[path = "../../waiting.rs"]
mod waiting;

use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use laneway::clock::Clock;
use laneway::log::embedded::{Access, Embedded};
use laneway::log::topic::Topics;
use laneway::log::{Admin, Backend, Publisher};
use laneway::model::record::{Addressed, Headers, Partition, Topic};
use serde_json::{Value, json};

use process::{Running, Setting};
use waiting::eventually;

/// What takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(300);
/// Requests under way at a time.
const CONNECTIONS: usize = 64;
const GATEWAY: u16 = 28_080;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let argument = |index: usize| arguments.get(index).map(String::as_str);
    match (argument(0), argument(1)) {
        (Some("gateway"), _) => gateway().await,
        (Some("processor"), count) => {
            processors::compare(count.and_then(|text| text.parse().ok()).unwrap_or(300_000), argument(2)).await;
        }
        (Some("embedded"), _) => embedded().await,
        // The other side of a comparison, in a process of its own.
        (Some("bare-gateway"), Some(topic)) => bare::gateway(GATEWAY, topic, argument(2) == Some("headers")).await,
        (Some("side"), Some(side)) => processors::side(side, &arguments[2..]).await,
        _ => {
            eprintln!("which? gateway, processor, embedded (see tests/bench/flow)");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn workspace() -> Value {
    let webhook = json!({"id": "d", "enabled": true, "config": {"webhookUrl": "http://127.0.0.1:9/", "webhookMethod": "POST"},
        "destinationDefinition": {"name": "WEBHOOK", "displayName": "Webhook", "config": {}}});
    json!({"workspaceId": "ws-1", "sources": [{"id": "src-1", "writeKey": "wk-1", "enabled": true, "destinations": [webhook]}]})
}

/// An event of about 1 KB.
fn event(number: u64) -> String {
    let user = number.wrapping_mul(7_919) % 100_000;
    let padding = "x".repeat(700);
    format!(
        r#"{{"type":"track","userId":"user-{user}","event":"Order Completed","messageId":"message-{number}","properties":{{"total":{number},"note":"{padding}"}},"context":{{"library":{{"name":"bench"}}}}}}"#
    )
}

fn again(args: &[&str]) -> Running {
    let program = std::env::current_exe().expect("a path");
    let child = Command::new(program).args(args).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    Running::of(child.expect("it starts"))
}

/// Events a second that a gateway takes from so many connections, and what one costs it in microseconds of CPU.
async fn flat_out(url: &str, batch: u64, process: &Running) -> (f64, f64) {
    let client = reqwest::Client::new();
    let (number, taken) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    // The first requests open connections and create what is created once.
    let warm = Instant::now() + Duration::from_secs(1);
    let until = warm + Duration::from_secs(setting("SECONDS", 8));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..CONNECTIONS {
        let (client, url, number, taken) = (client.clone(), url.to_owned(), Arc::clone(&number), Arc::clone(&taken));
        tasks.spawn(async move {
            while Instant::now() < until {
                let first = number.fetch_add(batch, Ordering::Relaxed);
                let body = match batch {
                    1 => event(first),
                    _ => format!("{{\"batch\":[{}]}}", (first..first + batch).map(event).collect::<Vec<_>>().join(",")),
                };
                let sent = client.post(&url).basic_auth("wk-1", Some("")).body(body).send().await.expect("an answer");
                assert_eq!(sent.status(), 200);
                if Instant::now() >= warm {
                    taken.fetch_add(batch, Ordering::Relaxed);
                }
            }
        });
    }
    tokio::time::sleep_until(warm.into()).await;
    let cpu = process.cpu();
    while tasks.join_next().await.is_some() {}
    let (taken, cpu) = (taken.load(Ordering::Relaxed) as f64, process.cpu() - cpu);
    (taken / warm.elapsed().as_secs_f64(), cpu * 1e6 / taken)
}

async fn gateway() {
    let place = Setting::new(&workspace(), &format!("[gateway]\nlisten = \"127.0.0.1:{GATEWAY}\"\n"));
    let url = format!("http://127.0.0.1:{GATEWAY}");
    for (name, path, batch) in [("single", "v1/track", 1), ("batches of 100", "v1/batch", 100)] {
        let url_of = format!("{url}/{path}");
        let (mut ours, mut bare, mut with_headers, mut peak) = (Side::default(), Side::default(), Side::default(), 0);
        for _ in 0..setting("PAIRS", 3) {
            let running = place.start("gateway").await;
            ours.add(flat_out(&url_of, batch, &running).await);
            peak = peak.max(running.peak_memory());
            let taken = running.metric("laneway_gateway_events_total").await;
            assert!(taken >= median(ours.rates.clone()), "it says itself that it took {taken}");
            drop(running);
            for (side, headers) in [(&mut bare, ""), (&mut with_headers, "headers")] {
                let running = again(&["bare-gateway", &format!("{}events", place.prefix), headers]);
                eventually("the bare one listens", PATIENCE, async || reqwest::get(&url).await.is_ok()).await;
                side.add(flat_out(&url_of, batch, &running).await);
            }
        }
        let (rate, cpu) = ours.median();
        let of = |side: Side| {
            let (bare, bare_cpu) = side.median();
            json!({"events_per_second": bare.round(), "cpu_us_per_event": bare_cpu, "ratio": rate / bare})
        };
        println!(
            "{}",
            json!({"run": format!("gateway, {name}"), "events_per_second": rate.round(), "cpu_us_per_event": cpu,
                "peak_mb": peak, "bare": of(bare), "bare_with_headers": of(with_headers)})
        );
    }
}

/// What one of the compared did, turn by turn.
#[derive(Default)]
struct Side {
    rates: Vec<f64>,
    cpu: Vec<f64>,
}

impl Side {
    fn add(&mut self, (rate, cpu): (f64, f64)) {
        self.rates.push(rate);
        self.cpu.push(cpu);
    }

    fn median(self) -> (f64, f64) {
        (median(self.rates), median(self.cpu))
    }
}

/// Durable records a second: many publishers with 100 records of 1 KB each, against one writer of the same batches.
async fn embedded() {
    let (mut ours, mut bare) = (vec![], vec![]);
    for _ in 0..setting("PAIRS", 3) {
        let folder = tempfile::tempdir().expect("a folder");
        let log = Embedded::open(folder.path(), Access::Engine, Clock::system()).await.expect("a log");
        let topics = Topics::load(None).expect("topics");
        log.admin().expect("an admin").create(topics.get(&Topic::EVENTS).expect("declared")).await.expect("created");
        let until = Instant::now() + Duration::from_secs(setting("SECONDS", 8));
        let (began, written) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let mut tasks = tokio::task::JoinSet::new();
        for task in 0..CONNECTIONS as u32 {
            let (publisher, written) = (log.publisher().expect("a publisher"), Arc::clone(&written));
            tasks.spawn(async move {
                let record = |n: u32| Addressed {
                    topic: Topic::EVENTS,
                    partition: Partition((task + n) % 12),
                    key: Some("wk-1".into()),
                    value: Some(vec![b'x'; 1_000].into()),
                    headers: Headers::new(),
                };
                while Instant::now() < until {
                    publisher.publish((0..100).map(record).collect()).await.expect("published");
                    written.fetch_add(100, Ordering::Relaxed);
                }
            });
        }
        while tasks.join_next().await.is_some() {}
        ours.push(written.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64());
        log.close().await;
        bare.push(bare::sqlite(&folder.path().join("bare.sqlite"), Duration::from_secs(setting("SECONDS", 8))).await);
    }
    let (ours, bare) = (median(ours), median(bare));
    println!(
        "{}",
        json!({"run": "embedded", "records_per_second": ours.round(), "bare": bare.round(), "ratio": ours / bare})
    );
}
