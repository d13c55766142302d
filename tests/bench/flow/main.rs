//! What the stages cost beside the least that could do their work, on a real broker: each figure stands beside that of a bare
//! loop in the same run, in turns. Figures are lines of JSON.
//!
//! ```text
//! deploy/services up kafka
//! cargo bench --features pulsar --bench flow -- gateway          (single events, then batches of 100; SECONDS=8 PAIRS=3; beside a bare
//!                                               handler, and one that writes the five headers of our format too)
//! cargo bench --features pulsar --bench flow -- processor 500000
//! cargo bench --features pulsar --bench flow -- embedded
//! cargo bench --features pulsar --bench flow -- pulsar 500000       (the processor; deploy/services up pulsar)
//! ```

#![allow(clippy::disallowed_methods, reason = "it measures time")]

mod bare;
mod bare_pulsar;
#[path = "../process.rs"]
mod process;
#[path = "../../waiting.rs"]
mod waiting;

use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use laneway::clock::Clock;
use laneway::log::embedded::{Access, Embedded};
use laneway::log::kafka::{Kafka, KafkaConfig};
use laneway::log::pulsar::{PulsarConfig, PulsarLog};
use laneway::log::topic::Topics;
use laneway::log::{Admin, Backend, Publisher};
use laneway::model::record::{Addressed, Headers, Offset, Partition, Topic};
use laneway::runtime::tally::JobTopic;
use laneway::stages::gateway::request::{Call, Facts, admit};
use laneway::stages::gateway::{Admission, Along};
use serde_json::{Value, json};

use process::{Running, Setting, bootstrap};
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
        (Some("processor"), count) => processor(count.and_then(|text| text.parse().ok()).unwrap_or(500_000)).await,
        (Some("embedded"), _) => embedded().await,
        (Some("pulsar"), count) => on_pulsar(count.and_then(|text| text.parse().ok()).unwrap_or(500_000)).await,
        // The other side of a comparison, in a process of its own.
        (Some("bare-gateway"), Some(topic)) => bare::gateway(GATEWAY, topic, argument(2) == Some("headers")).await,
        (Some("bare-processor"), Some(prefix)) => bare::processor(prefix),
        (Some("bare-pulsar"), Some(prefix)) => {
            let count = argument(2).and_then(|text| text.parse().ok()).expect("how many");
            bare_pulsar::processor(&pulsar_config(prefix), count).await;
        }
        _ => {
            eprintln!("which? gateway, processor, embedded, pulsar (see tests/bench/flow)");
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

/// Fills `events` as the gateway would.
async fn fill<B: Backend>(log: &B, count: u64) {
    let workspace = laneway::control::workspace::Workspace::parse(&workspace().to_string()).expect("a workspace");
    let source = workspace.by_write_key("wk-1").expect("a source");
    let topics = Topics::load(None).expect("topics");
    let placement = topics.get(&Topic::EVENTS).expect("declared").placement();
    let admission = Admission::new(log.publisher().expect("a publisher"), placement, JobTopic(placement));
    let along = Along::default();
    let clock = Clock::system();
    for first in (0..count).step_by(500) {
        let facts = Facts {
            received_at: clock.now(),
            client_ip: "127.0.0.1".into(),
            channel: laneway::model::event::Channel::Http,
            job_run: None,
            task_run: None,
        };
        let body =
            format!("{{\"batch\":[{}]}}", (first..(first + 500).min(count)).map(event).collect::<Vec<_>>().join(","));
        let events = admit(source, Call::Batch, body.as_bytes(), &facts).expect("admitted");
        admission.publish(admission.records(events.iter().map(|event| (event, &along)))).await.expect("published");
    }
}

/// Waits until a group has read everything. Tells how long that took from its first step on, and the CPU.
async fn drained<B: Backend>(log: &B, group: &str, running: &Running) -> (Duration, f64) {
    let admin = log.admin().expect("an admin");
    let is_begun = async || {
        let committed = admin.committed(group, &Topic::EVENTS).await.expect("positions");
        committed.values().any(|it| it.offset > Offset::START)
    };
    let is_done = async || {
        let committed = admin.committed(group, &Topic::EVENTS).await.expect("positions");
        let mut is_done = committed.len() == 12;
        for (partition, at) in &committed {
            let end = admin.watermarks(&Topic::EVENTS, *partition).await.expect("marks").stable;
            is_done &= at.offset.forward(1).max(at.offset) >= end;
        }
        is_done
    };
    eventually("the first events are read", PATIENCE, is_begun).await;
    let (began, cpu) = (Instant::now(), running.cpu());
    eventually("everything is read", PATIENCE, is_done).await;
    (began.elapsed(), running.cpu() - cpu)
}

async fn processor(count: u64) {
    let (mut ours, mut bare, mut our_cpu, mut bare_cpu) = (vec![], vec![], vec![], vec![]);
    for _ in 0..setting("PAIRS", 3) {
        let place = Setting::new(&workspace(), "");
        let log = Kafka::new(KafkaConfig {
            bootstrap_servers: bootstrap(),
            prefix: place.prefix.clone(),
            properties: Default::default(),
        });
        fill(&log, count).await;
        let running = place.start("processor").await;
        let (time, cpu) = drained(&log, "laneway.processor", &running).await;
        ours.push(count as f64 / time.as_secs_f64());
        our_cpu.push(cpu * 1e6 / count as f64);
        drop(running);
        let running = again(&["bare-processor", &place.prefix]);
        let (time, cpu) = drained(&log, "bare", &running).await;
        bare.push(count as f64 / time.as_secs_f64());
        bare_cpu.push(cpu * 1e6 / count as f64);
    }
    let (ours, bare, our_cpu, bare_cpu) = (median(ours), median(bare), median(our_cpu), median(bare_cpu));
    println!(
        "{}",
        json!({"run": "processor", "events_per_second": ours.round(), "bare": bare.round(), "ratio": ours / bare,
            "cpu_us_per_event": our_cpu, "bare_cpu_us_per_event": bare_cpu})
    );
}

/// The test Pulsar.
fn pulsar_config(prefix: &str) -> PulsarConfig {
    let port = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.into());
    PulsarConfig {
        service_url: format!("pulsar://127.0.0.1:{}", port("LANEWAY_PULSAR_PORT", "16650")),
        admin_url: format!("http://127.0.0.1:{}", port("LANEWAY_PULSAR_WEB_PORT", "18080")),
        tenant: "public".into(),
        namespace: "default".into(),
        prefix: prefix.into(),
        ..PulsarConfig::default()
    }
}

/// The processor on Pulsar, beside its client's bare loop: what each takes from the first record to the last.
async fn on_pulsar(count: u64) {
    let (mut ours, mut bare, mut our_cpu, mut bare_cpu) = (vec![], vec![], vec![], vec![]);
    for _ in 0..setting("PAIRS", 3) {
        let config = pulsar_config("");
        let log = vec![
            ("LANEWAY_LOG__BACKEND", "pulsar".into()),
            ("LANEWAY_LOG__PULSAR__SERVICE_URL", config.service_url),
            ("LANEWAY_LOG__PULSAR__ADMIN_URL", config.admin_url),
        ];
        let place = Setting::on(log, &workspace(), "");
        let log = PulsarLog::new(pulsar_config(&place.prefix)).expect("a log");
        fill(&log, count).await;
        let running = place.start("processor").await;
        // To ask a broker for positions costs it much.
        let processed = async || running.metric("laneway_processor_events_total").await;
        eventually("the first events are read", PATIENCE, async || processed().await > 0.0).await;
        let (before, began, cpu) = (processed().await, Instant::now(), running.cpu());
        eventually("everything is read", PATIENCE, async || processed().await >= count as f64).await;
        ours.push((count as f64 - before) / began.elapsed().as_secs_f64());
        our_cpu.push((running.cpu() - cpu) * 1e6 / (count as f64 - before));
        drop(running);
        let program = std::env::current_exe().expect("a path");
        let told = Command::new(program).args(["bare-pulsar", &place.prefix, &count.to_string()]).output();
        let told: Value = serde_json::from_slice(&told.expect("it runs").stdout).expect("JSON");
        let figure = |name: &str| told[name].as_f64().expect("a number");
        bare.push(count as f64 / figure("seconds"));
        bare_cpu.push(figure("cpu") * 1e6 / count as f64);
    }
    let (ours, bare, our_cpu, bare_cpu) = (median(ours), median(bare), median(our_cpu), median(bare_cpu));
    println!(
        "{}",
        json!({"run": "processor on pulsar", "events_per_second": ours.round(), "bare": bare.round(), "ratio": ours / bare,
            "cpu_us_per_event": our_cpu, "bare_cpu_us_per_event": bare_cpu})
    );
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
