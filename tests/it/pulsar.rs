//! What only Pulsar does.

use std::sync::atomic::Ordering;
use std::time::Duration;

use laneway::log::pulsar::{PulsarConfig, PulsarLog};
use laneway::log::{Admin, Backend, Publisher, Session};
use laneway::model::record::{Addressed, Partition, Topic};

use crate::log_contract::{addressed, member, read_all, spec, topic, value};
use crate::support::process::{Flow, Process};
use crate::support::sink::{Sink, publish};
use crate::support::{eventually, pulsar_config, unique};

const PATIENCE: Duration = Duration::from_secs(30);

/// The broker has compacted what is read, in the middle of batches, and deleted the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_pulsar_has_compacted_is_read_without_what_is_gone() {
    let config = PulsarConfig { prefix: unique("c") + ".", ..pulsar_config() };
    let log = PulsarLog::new(config.clone()).expect("a log");
    let mut compacted = spec("state", 1);
    compacted.config.insert("cleanup.policy".into(), "compact".into());
    log.admin().unwrap().create(&compacted).await.unwrap();
    let topic = topic(&log, "state", 1).await;
    let keyed = |n: usize, value: Option<usize>| {
        let mut record = addressed(&topic, 0, "");
        (record.key, record.value) = (Some(format!("key-{n}").into()), value.map(|value| value.to_string().into()));
        record
    };
    let publisher = log.publisher().unwrap();
    for round in 0..10 {
        publisher.publish((0..5).map(|n| keyed(n, Some(round * 10 + n))).collect()).await.unwrap();
    }
    // The last of a batch whose others are replaced, and one that is gone.
    publisher.publish(vec![keyed(5, Some(95)), keyed(6, Some(96)), keyed(6, None), keyed(0, Some(100))]).await.unwrap();
    let before = read_all(&log, &topic, 0).await;
    let partition =
        format!("{}/admin/v2/persistent/public/default/{}state-partition-0", config.admin_url, config.prefix);
    let client = reqwest::Client::new();
    let text = async |what: &str| {
        let answer = client.get(format!("{partition}/{what}")).send().await.expect("an answer");
        answer.text().await.expect("a body")
    };
    // Nothing of it is left but what is compacted.
    for what in ["compaction", "unload", "trim"] {
        let url = format!("{partition}/{what}");
        let request = if what == "trim" { client.post(url) } else { client.put(url) };
        let answer = request.send().await.expect("an answer");
        assert!(answer.status().is_success(), "{what}: {answer:?}");
        eventually("it is compacted", PATIENCE, async || {
            let state = text("compaction").await;
            state.contains("SUCCESS") || state.contains("NOT_RUN")
        })
        .await;
    }
    let (ledger, ..) = before[0].offset.entry().expect("a place");
    eventually("the ledger is deleted", PATIENCE, async || {
        !text("internalStats").await.contains(&format!("\"ledgers\":[{{\"ledgerId\":{ledger},"))
    })
    .await;
    let after = read_all(&log, &topic, 0).await;
    let values: Vec<usize> = after.iter().filter(|record| record.value.is_some()).map(value).collect();
    assert_eq!(values, [91, 92, 93, 94, 95, 100]);
    assert!(after.iter().all(|record| before.contains(record)), "at the same places");
    let marks = log.admin().unwrap().watermarks(&topic, Partition(0)).await.unwrap();
    assert!(marks.start <= after[0].offset && marks.end == before[before.len() - 1].offset.just_after(), "{marks:?}");
}

/// A namespace may be set up to drop what waits for long, or when much does: not what is ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_kept_whatever_the_namespace_says() {
    let namespace = unique("n");
    let config = PulsarConfig { namespace: namespace.clone(), ..pulsar_config() };
    let (client, at) = (reqwest::Client::new(), format!("{}/admin/v2", config.admin_url));
    let set = async |request: reqwest::RequestBuilder, body: &str| {
        let request = request.header("content-type", "application/json").body(body.to_owned());
        let answer = request.send().await.expect("an answer");
        assert!(answer.status().is_success(), "{answer:?}");
    };
    set(client.put(format!("{at}/namespaces/public/{namespace}")), "").await;
    set(client.post(format!("{at}/namespaces/public/{namespace}/messageTTL")), "100").await;
    let quota = r#"{"limitSize":1000000,"limitTime":60,"policy":"consumer_backlog_eviction"}"#;
    set(client.post(format!("{at}/namespaces/public/{namespace}/backlogQuota")), quota).await;
    let log = PulsarLog::new(config).expect("a log");
    log.admin().unwrap().create(&spec("t", 1)).await.unwrap();
    let joined = log.session(member(&Topic::new("t"), "one")).await.expect("joined");
    for topic in ["t", "__laneway.contract.t"] {
        eventually("it is set", PATIENCE, async || {
            let get = async |what: &str| {
                let url = format!("{at}/persistent/public/{namespace}/{topic}/{what}?applied=true");
                client.get(url).send().await.expect("an answer").text().await.expect("a body")
            };
            let quotas = get("backlogQuotaMap").await;
            get("messageTTL").await == "0" && quotas.matches("\"limitSize\":-1,\"limitTime\":-1").count() == 2
        })
        .await;
    }
    joined.close().await;
}

/// Everything on `deliveries` once more, as a processor leaves it that dies before its position is written.
async fn written_twice(log: &PulsarLog) -> usize {
    let mut all = Vec::new();
    for partition in (0..12).map(Partition) {
        let copy = |record: laneway::model::record::Record| Addressed {
            topic: Topic::DELIVERIES,
            partition,
            key: record.key,
            value: record.value,
            headers: record.headers,
        };
        all.extend(read_all(log, &Topic::DELIVERIES, partition.0).await.into_iter().map(copy));
    }
    let count = all.len();
    log.publisher().expect("a publisher").publish(all).await.expect("published");
    count
}

/// Deliveries that were ended as repeats.
async fn repeated(router: &Process) -> f64 {
    router.metric_with("laneway_router_outcomes_total", "outcome=\"repeated\"").await.unwrap_or(0.0)
}

/// Whether the first one was sent by this owner, by the one before it, or waits for a destination that is down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_in_the_log_twice_is_sent_once() {
    let flow = Flow::on_pulsar();
    let prefix = flow.setting("LANEWAY_LOG__TOPIC_PREFIX").to_owned();
    let log = PulsarLog::new(PulsarConfig { prefix, ..pulsar_config() }).expect("a log");
    let sink = Sink::start(flow.sink).await;
    let mut running = flow.start_all().await;
    publish(&flow, 50);
    eventually("all arrive", PATIENCE, async || sink.counts() == (50, 50)).await;
    assert_eq!(written_twice(&log).await, 50);
    eventually("they are known", PATIENCE, async || repeated(&running[2]).await == 50.0).await;

    // A new owner looks at what lies just before.
    stopped(&mut running[2]).await;
    running[2] = flow.start("router", "router-1");
    running[2].ready().await;
    assert_eq!(written_twice(&log).await, 100);
    eventually("the new owner knows them", PATIENCE, async || repeated(&running[2]).await == 100.0).await;

    sink.is_down.store(true, Ordering::Relaxed);
    publish(&flow, 20);
    let pending = async || {
        let listed = flow.command(&["lanes", "list", "--output", "json"]);
        let rows: Vec<serde_json::Value> = serde_json::from_slice(&listed.stdout).unwrap_or_default();
        rows.iter().filter_map(|row| row["pending"].as_u64()).sum::<u64>()
    };
    eventually("they wait", PATIENCE, async || pending().await == 20).await;
    assert_eq!(written_twice(&log).await, 220);
    sink.is_down.store(false, Ordering::Relaxed);
    eventually("nothing waits", PATIENCE * 2, async || pending().await == 0 && sink.counts().0 == 70).await;
    eventually("all are known", PATIENCE, async || repeated(&running[2]).await == 320.0).await;
    assert_eq!(sink.counts(), (70, 70));

    // What an operator has passed over is nobody's first, for the next owner nor for the one after it.
    sink.is_down.store(true, Ordering::Relaxed);
    publish(&flow, 5);
    eventually("they wait", PATIENCE, async || pending().await == 5).await;
    stopped(&mut running[2]).await;
    assert!(flow.command(&["offsets", "reset", "router", "--to-latest", "--execute"]).status.success());
    sink.is_down.store(false, Ordering::Relaxed);
    for (round, arrived) in [145, 145].into_iter().enumerate() {
        running[2] = flow.start("router", "router-1");
        running[2].ready().await;
        let copies = written_twice(&log).await;
        eventually("each is sent once more", PATIENCE, async || sink.counts() == (75, arrived)).await;
        if round == 1 {
            eventually("all are known", PATIENCE, async || repeated(&running[2]).await == copies as f64).await;
        }
        eventually("nothing waits", PATIENCE, async || pending().await == 0).await;
        stopped(&mut running[2]).await;
    }
    assert_eq!(sink.counts(), (75, 145));
}

async fn stopped(process: &mut Process) {
    process.terminate();
    assert!(process.ended(PATIENCE).await.success());
}
