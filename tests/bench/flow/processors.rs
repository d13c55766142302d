//! The processor on each log, beside the least that could do its work with that log's client: a process of its own each, from the first event on.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use laneway::app::engine::{self, Listeners, Parts, Stage, StoreCell};
use laneway::clock::Clock;
use laneway::config::Layers;
use laneway::control::Current;
use laneway::control::workspace::Workspace;
use laneway::log::embedded::{Access, Embedded};
use laneway::log::kafka::{Kafka, KafkaConfig};
use laneway::log::pulsar::PulsarLog;
use laneway::log::topic::Topics;
use laneway::log::{Admin, Backend};
use laneway::model::event::Channel;
use laneway::model::record::Topic;
use laneway::runtime::shutdown::Shutdown;
use laneway::runtime::tally::JobTopic;
use laneway::stages::gateway::request::{Call, Facts, admit};
use laneway::stages::gateway::{Admission, Along};
use serde_json::Value;

use crate::process::{Running, Setting, bootstrap, pulsar};
use crate::waiting::eventually;
use crate::{PATIENCE, Side, bare, bare_pulsar, event, setting, workspace};

const LOGS: [&str; 3] = ["kafka", "pulsar", "embedded"];
/// Where the processor on the embedded log tells of itself.
const ADMIN: u16 = 28_081;

/// Prints a table.
pub async fn compare(count: u64, only: Option<&str>) {
    println!(
        "| the processor on | events/s | µs of CPU | its client's bare loop | µs of CPU | ratio |\n|---|---|---|---|---|---|"
    );
    for log in LOGS.into_iter().filter(|log| only.is_none_or(|only| only == *log)) {
        let (mut ours, mut bare) = (Side::default(), Side::default());
        for _ in 0..setting("PAIRS", 3) {
            let (our, bare_one) = match log {
                "kafka" => on_kafka(count).await,
                "pulsar" => on_pulsar(count).await,
                _ => embedded(count).await,
            };
            ours.add(our);
            bare.add(bare_one);
        }
        let ((rate, cpu), (bare, bare_cpu)) = (ours.median(), bare.median());
        println!("| {log} | {rate:.0} | {cpu:.1} | {bare:.0} | {bare_cpu:.1} | {:.2} |", rate / bare);
    }
}

/// What a side of a comparison runs, in a process of its own.
pub async fn side(side: &str, arguments: &[String]) {
    let count = |index: usize| arguments[index].parse::<u64>().expect("how many");
    match side {
        "kafka" => bare::processor(&arguments[0], count(1)),
        "pulsar" => bare_pulsar::processor(&pulsar(&arguments[0]), count(1)).await,
        "sqlite" => bare::sqlite_processor(Path::new(&arguments[0]), count(1)).await,
        "embedded" => processor_on(Path::new(&arguments[0])).await,
        _ => panic!("no side {side}"),
    }
}

/// Events a second, and what one costs in microseconds of CPU.
type Figures = (f64, f64);

/// Of a bare loop, which tells by itself.
fn told(side: &str, at: &str, count: u64) -> Figures {
    let program = std::env::current_exe().expect("a path");
    let output = Command::new(program).args(["side", side, at, &count.to_string()]).output().expect("it runs");
    let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{side}: {output:?}"));
    let figure = |name: &str| told[name].as_f64().expect("a number");
    (count as f64 / figure("seconds"), figure("cpu") * 1e6 / count as f64)
}

/// Of a processor: it counts, and asking it costs less than asking a broker for positions.
async fn processed(running: Running, count: u64) -> Figures {
    let events = async || running.metric("laneway_processor_events_total").await;
    eventually("the first events are read", PATIENCE, async || events().await > 0.0).await;
    let (before, began, cpu) = (events().await, Instant::now(), running.cpu());
    eventually("everything is read", PATIENCE, async || events().await >= count as f64).await;
    let events = count as f64 - before;
    (events / began.elapsed().as_secs_f64(), (running.cpu() - cpu) * 1e6 / events)
}

async fn on_kafka(count: u64) -> (Figures, Figures) {
    let place = Setting::new(&workspace(), "");
    let (bootstrap_servers, prefix) = (bootstrap(), place.prefix.clone());
    let log = Kafka::new(KafkaConfig { bootstrap_servers, prefix, properties: Default::default() });
    fill(&log, count).await;
    (processed(place.start("processor").await, count).await, told("kafka", &place.prefix, count))
}

async fn on_pulsar(count: u64) -> (Figures, Figures) {
    let place = Setting::on_pulsar(&workspace(), "");
    let log = PulsarLog::new(pulsar(&place.prefix)).expect("a log");
    fill(&log, count).await;
    (processed(place.start("processor").await, count).await, told("pulsar", &place.prefix, count))
}

async fn embedded(count: u64) -> (Figures, Figures) {
    let folder = tempfile::tempdir().expect("a folder");
    let log = Embedded::open(folder.path(), Access::Engine, Clock::system()).await.expect("a log");
    for spec in Topics::load(None).expect("topics").iter() {
        log.admin().expect("an admin").create(spec).await.expect("created");
    }
    fill(&log, count).await;
    log.close().await;
    // Its folder is free then.
    drop(log);
    let at = folder.path().to_str().expect("a path in UTF-8");
    let program = std::env::current_exe().expect("a path");
    let child = Command::new(program).args(["side", "embedded", at]).stdin(Stdio::null()).spawn().expect("it starts");
    let ours = processed(Running::telling_at(child, ADMIN), count).await;
    let bare = folder.path().join("bare.sqlite");
    (ours, told("sqlite", bare.to_str().expect("a path in UTF-8"), count))
}

/// `laneway run` gives the embedded log to all stages only: here it is the processor alone.
async fn processor_on(folder: &Path) {
    let clock = Clock::system();
    let listen = format!("[admin]\nlisten = \"127.0.0.1:{ADMIN}\"\n");
    let file = folder.join("laneway.toml");
    std::fs::write(&file, listen).expect("written");
    let layers = Layers::read(Some(&file), std::iter::empty(), &[], &[]).expect("readable");
    let config = layers.config().expect("a configuration");
    let log = Embedded::open(folder, Access::Engine, clock.clone()).await.expect("a log");
    let listeners = Listeners::bind(&config, &[Stage::Processor]).await.expect("a free port");
    let parts = Parts {
        log,
        topics: Topics::load(None).expect("topics"),
        workspace: Current::fixed(Workspace::parse(&workspace().to_string()).expect("a workspace")),
        control_plane: None,
        instance: "bench".into(),
        clock,
        shutdown: Shutdown::new(config.runtime.drain_timeout),
        break_order: false,
        store: StoreCell::default(),
        config,
    };
    engine::run(parts, &[Stage::Processor], listeners, axum::Router::new()).await.expect("it runs");
}

/// Fills `events` as the gateway would.
async fn fill<B: Backend>(log: &B, count: u64) {
    let workspace = Workspace::parse(&workspace().to_string()).expect("a workspace");
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
            channel: Channel::Http,
            names_runs: false,
            job_run: None,
            task_run: None,
        };
        let body =
            format!("{{\"batch\":[{}]}}", (first..(first + 500).min(count)).map(event).collect::<Vec<_>>().join(","));
        let events = admit(source, Call::Batch, body.as_bytes(), &facts).expect("admitted");
        admission.publish(admission.records(events.iter().map(|event| (event, &along)))).await.expect("published");
    }
}
