//! What only Pulsar does.

use std::time::Duration;

use laneway::log::pulsar::{PulsarConfig, PulsarLog};
use laneway::log::{Admin, Backend, Publisher};
use laneway::model::record::Partition;

use crate::log_contract::{addressed, read_all, spec, topic, value};
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
