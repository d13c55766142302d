//! Values in Confluent's wire format, with a real schema registry: of ours and of others, with the registry away.

use std::time::Duration;

use laneway::log::kafka::{Kafka, KafkaConfig};
use laneway::log::pulsar::{PulsarConfig, PulsarLog};
use laneway::log::{Backend, Limit, Publisher, Read, Reader};
use laneway::model::codec;
use laneway::model::event::Event;
use laneway::model::record::{Addressed, Headers, Offset, Partition, Record, Topic, header};
use serde_json::{Value, json};

use crate::support::process::{Flow, Process, number};
use crate::support::registry::Registry;
use crate::support::{eventually, kafka_address, pulsar_config, unique};

const ENOUGH: Limit = Limit { records: 1_000, bytes: 8 << 20 };

/// A flow that writes with this registry, and its topics as they lie in Kafka.
fn with(registry: &Registry) -> (Flow, Kafka) {
    let prefix = unique("r") + ".";
    let settings =
        [("LANEWAY_LOG__TOPIC_PREFIX", prefix.as_str()), ("LANEWAY_LOG__SCHEMA_REGISTRY__URL", &registry.url())];
    let flow = Flow::unapplied(&kafka_address(), &settings);
    flow.apply();
    let config = KafkaConfig { bootstrap_servers: kafka_address(), prefix, properties: Default::default() };
    (flow, Kafka::new(config))
}

/// The same on Pulsar.
fn with_on_pulsar(registry: &Registry) -> (Flow, PulsarLog) {
    let mut flow = Flow::unapplied_on_pulsar(&pulsar_config());
    flow.set("LANEWAY_LOG__SCHEMA_REGISTRY__URL", &registry.url());
    flow.apply();
    let prefix = flow.setting("LANEWAY_LOG__TOPIC_PREFIX").to_owned();
    (flow, PulsarLog::new(PulsarConfig { prefix, ..pulsar_config() }).expect("a log"))
}

/// Everything in a topic, as it is stored.
async fn stored<B: Backend>(log: &B, topic: &Topic) -> Vec<Record> {
    let mut all = Vec::new();
    for partition in 0..12 {
        let mut reader = log.reader(topic, Partition(partition), Offset::START).await.expect("a reader");
        while let Read::Records(records) = reader.read(ENOUGH).await.expect("read") {
            all.extend(records);
        }
    }
    all
}

fn sound(report: &Value, events: u64) {
    assert_eq!(number(report, "accepted"), events, "{report}");
    ["lost", "out_of_order", "foreign"].iter().for_each(|name| assert_eq!(number(report, name), 0, "{name}: {report}"));
}

/// The problems that `check` finds, by what they are about.
fn problems(flow: &Flow) -> Vec<(String, String)> {
    let told = flow.command(&["check", "--output", "json"]);
    let found: Vec<Value> = serde_json::from_slice(&told.stdout).expect("JSON");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    found.iter().filter(|it| it["state"] == "problem").map(|it| (text(&it["subject"]), text(&it["says"]))).collect()
}

fn publish(flow: &Flow, id: &str) -> std::process::Output {
    let file = flow.folder.path().join(unique("events"));
    let event = json!({"type": "track", "event": "e", "userId": "u-1", "messageId": id});
    std::fs::write(&file, event.to_string()).expect("written");
    flow.command(&["publish", "--write-key", "wk-1", &file.display().to_string()])
}

#[tokio::test(flavor = "multi_thread")]
async fn the_flow_writes_with_a_registry_and_reads_either_encoding() {
    let registry = Registry::start();
    either_encoding(&registry, with(&registry)).await;
    either_encoding(&registry, with_on_pulsar(&registry)).await;
}

async fn either_encoding<B: Backend>(registry: &Registry, (mut flow, log): (Flow, B)) {
    let mut running = flow.start_all().await;
    let report = flow.load(&["--events", "2000", "--users", "100"]).report().await;
    sound(&report, 2_000);
    assert_eq!(number(&report, "duplicated_messages"), 0, "{report}");

    let (subjects, prefix) = (registry.subjects().await, flow.setting("LANEWAY_LOG__TOPIC_PREFIX").to_owned());
    for topic in ["events", "control", "deliveries", "progress.router"] {
        assert!(subjects.contains(&format!("{prefix}{topic}-value")), "{topic} in {subjects:?}");
    }
    let events = stored(&log, &Topic::EVENTS).await;
    assert_eq!(events.len(), 2_000);
    for record in &events {
        assert_eq!(record.value.as_deref().and_then(|value| value.first()), Some(&0));
        assert_eq!(record.headers.text(header::CONTENT_TYPE), Some("application/vnd.confluent.avro"));
    }

    // A new owner reads progress that was written so.
    running[2].terminate();
    assert!(running[2].ended(Duration::from_secs(30)).await.success());
    running[2] = flow.start("router", "router-2");
    running[2].ready().await;

    // Of a process that has no registry; and of a foreign producer with a schema of its own.
    flow.set("LANEWAY_LOG__SCHEMA_REGISTRY__URL", "");
    assert!(publish(&flow, "plain").status.success());
    foreign(registry, &log, &format!("{prefix}events-value"), &events[0]).await;
    flow.set("LANEWAY_LOG__SCHEMA_REGISTRY__URL", &registry.url());
    eventually("both are deliveries", Duration::from_secs(30), async || {
        let ids = delivered(&flow);
        ["plain", "foreign"].iter().all(|id| ids.iter().any(|it| it == id))
    })
    .await;
}

/// An event as another program writes it: its schema has one field more and another name.
async fn foreign<B: Backend>(registry: &Registry, log: &B, subject: &str, like: &Record) {
    let mut schema: Value = serde_json::from_str(include_str!("../../schemas/event.avsc")).expect("JSON");
    schema["name"] = json!("click");
    schema["fields"].as_array_mut().expect("fields").push(json!({"name": "more", "type": "string", "default": ""}));
    let id = registry.register(subject, &schema.to_string()).await;
    let plain = stored(log, &Topic::EVENTS).await;
    let single = plain.iter().filter_map(|record| record.value.as_ref()).find(|value| value[0] == 0xC3);
    let mut event: Event = codec::decode(single.expect("the plain one")).expect("an event");
    event.message_id = "foreign".into();
    let mut value = vec![0];
    value.extend(id.to_be_bytes());
    value.extend(&codec::encode(&event)[codec::HEADER..]);
    value.extend([4, b'h', b'i']);
    let mut headers = Headers::new();
    for name in [header::SOURCE, header::WORKSPACE] {
        headers.push_text(name, like.headers.text(name).expect("each event has it"));
    }
    headers.push_text(header::MESSAGE_ID, "foreign");
    headers.push_text(header::CONTENT_TYPE, "application/vnd.confluent.avro");
    let (partition, key) = (like.partition, like.key.clone());
    let record = Addressed { topic: Topic::EVENTS, partition, key, value: Some(value.into()), headers };
    log.publisher().expect("a publisher").publish(vec![record]).await.expect("stored");
}

/// Message ids of what has become a delivery, as `tail` tells them.
fn delivered(flow: &Flow) -> Vec<String> {
    let told = flow.command(&["tail", "deliveries", "--from-start", "--until-end", "--output", "json"]);
    let said = String::from_utf8(told.stdout).expect("text");
    let id = |line: &str| {
        let record: Value = serde_json::from_str(line).expect("JSON");
        record["value"]["message_id"].as_str().unwrap_or_else(|| panic!("a message id in {line}")).to_owned()
    };
    said.lines().map(id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_away_costs_time_and_nothing_else() {
    let registry = Registry::away();
    let (flow, _) = with(&registry);
    let start = |part: &str| flow.start(part, &format!("{part}-1"));
    let mut all: Vec<Process> = ["gateway", "processor", "router"].map(start).into();
    eventually("all say what is missing", Duration::from_secs(30), async || {
        all.iter().all(|process| process.said().contains(&format!("schema registry {}", registry.url())))
    })
    .await;
    let answer = reqwest::Client::new().post(flow.url() + "/v1/track").body("{}").send().await.expect("an answer");
    assert_eq!((answer.status().as_u16(), answer.headers().contains_key("retry-after")), (503, true));
    registry.come();
    for process in &mut all {
        process.ready().await;
    }
    let load = flow.load(&["--events", "6000", "--rate", "150", "--users", "100", "--patience", "120"]);
    all[0].takes(1_500.0).await;

    // What is known by now is enough for those that run; a new one has to ask.
    registry.freeze();
    all[0].takes(300.0).await;
    all[2].kill();
    all[2] = flow.start("router", "router-1");
    eventually("the router says what is missing", Duration::from_secs(60), async || {
        all[2].said().contains("a schema is not to be had yet")
    })
    .await;
    registry.thaw();
    all[2].ready().await;
    sound(&load.report().await, 6_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registry_refuses_is_told_before_and_when_it_happens() {
    let registry = Registry::away();
    let (flow, _) = with(&registry);
    let [(subject, says)] = &problems(&flow)[..] else { panic!("one problem: {:?}", problems(&flow)) };
    assert!(subject == "schema registry" && says.contains(&registry.url()), "{subject}: {says}");

    registry.come();
    assert_eq!(problems(&flow), []);
    registry.wants("BACKWARD").await;
    let told = publish(&flow, "m-1");
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let subjects = registry.subjects().await;
    assert_eq!(subjects.len(), 1, "check registers nothing: {subjects:?}");
    let mut other = flow;
    // Another prefix, whose subject somebody has taken for something else.
    let prefix = unique("taken") + ".";
    let taken = format!("{prefix}events-value");
    other.set("LANEWAY_LOG__TOPIC_PREFIX", &prefix);
    registry.register(&taken, r#"{"type":"record","name":"x","fields":[{"name":"a","type":"int"}]}"#).await;
    other.apply();
    let found = problems(&other);
    let [(subject, says)] = &found[..] else { panic!("one problem: {found:?}") };
    assert!(subject == "schema of topic events" && says.contains(&taken), "{subject}: {says}");
    let told = publish(&other, "m-1");
    let said = String::from_utf8_lossy(&told.stderr);
    assert!(!told.status.success() && said.contains(&taken), "{said}");
}
