//! A broker that forgets to end a transaction: what a session does about it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use laneway::log::kafka::{Kafka, KafkaConfig};
use laneway::log::partitioner::IsolateBy;
use laneway::log::topic::TopicSpec;
use laneway::log::{
    Admin, Backend, Commit, Committed, Limit, Member, Polled, Publisher, Read, Reader, Session, Watermarks,
};
use laneway::model::record::{Addressed, Headers, Offset, Partition, Topic};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::topic_partition_list::TopicPartitionList;

use crate::support::broker::Broker;
use crate::support::eventually;

const LIMIT: Limit = Limit { records: 500, bytes: 1 << 20 };
const CALL: Duration = Duration::from_secs(30);

fn member() -> Member {
    Member {
        group: "g".into(),
        instance: "one".into(),
        topic: Topic::EVENTS,
        outputs: vec![Topic::DELIVERIES],
        state: None,
        session_timeout: Duration::from_secs(6),
        revoke_drain: Duration::from_secs(1),
    }
}

fn record(topic: Topic, value: &'static str) -> Addressed {
    Addressed { topic, partition: Partition(0), key: None, value: Some(value.into()), headers: Headers::new() }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
}

/// What the coordinator has written down about transactions.
fn coordinator(data: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(data).expect("the broker's data").map(|entry| entry.expect("an entry").path());
    let is_its = |path: &PathBuf| path.file_name().is_some_and(|it| it.to_string_lossy().starts_with("__transaction_"));
    entries.filter(is_its).collect()
}

async fn assigned(session: &mut impl Session) -> Option<Committed> {
    loop {
        if let Polled::Assigned(given) = session.poll(LIMIT).await.expect("polled") {
            return given[0].committed.clone();
        }
    }
}

async fn commit(session: &mut impl Session, value: &'static str, offset: u128) {
    let (epoch, metadata) = loop {
        match session.poll(LIMIT).await.expect("polled") {
            Polled::Assigned(given) => break (given[0].epoch, offset.to_string()),
            _ => continue,
        }
    };
    let position = Committed { offset: Offset::new(offset), metadata };
    let offsets = BTreeMap::from([(Partition(0), (epoch, position))]);
    let outputs = vec![record(Topic::DELIVERIES, value)];
    session.commit(std::sync::Arc::new(Commit { outputs, offsets })).await.expect("committed");
}

/// A producer that can begin a transaction as the member would, or another one.
fn producer(address: &str, id: &str) -> BaseProducer {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", address).set("transactional.id", id).set("transaction.timeout.ms", "10000");
    let producer: BaseProducer = config.create().expect("a producer");
    producer.init_transactions(CALL).expect("a life begins");
    producer
}

/// Begins a transaction with one record, and leaves it open.
fn begin(producer: &BaseProducer, topic: &str) {
    producer.begin_transaction().expect("begun");
    let record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic).partition(0).payload(b"hung");
    producer.send(record).map_err(|(error, _)| error).expect("sent");
    producer.flush(CALL).expect("acknowledged");
}

fn add_offsets(address: &str, producer: &BaseProducer) {
    let mut offsets = TopicPartitionList::new();
    offsets.add_partition_offset("events", 0, rdkafka::Offset::Offset(2)).expect("an offset");
    let mut config = ClientConfig::new();
    let consumer: BaseConsumer =
        config.set("bootstrap.servers", address).set("group.id", "g").create().expect("a consumer");
    let metadata = consumer.group_metadata().expect("the group");
    producer.send_offsets_to_transaction(&offsets, &metadata, CALL).expect("sent");
}

async fn create_topics(admin: &impl Admin) {
    for topic in [Topic::EVENTS, Topic::DELIVERIES] {
        let (name, key, value) = (topic.to_string(), "any".into(), "any".into());
        let (isolate_by, config) = (IsolateBy::None, BTreeMap::new());
        let (written_by, read_by, why) = (vec![], vec![], "a test".into());
        let (partitions, replication, spread) = (1, None, None);
        let spec = TopicSpec {
            name,
            partitions,
            replication,
            config,
            key,
            value,
            isolate_by,
            spread,
            written_by,
            read_by,
            why,
        };
        admin.create(&spec).await.expect("created");
    }
}

/// Everything in a topic is decided.
async fn is_decided(admin: &impl Admin, topic: &Topic) -> bool {
    admin.watermarks(topic, Partition(0)).await.is_ok_and(|marks| marks.stable == marks.end)
}

/// Makes the coordinator forget a transaction of the member: its own log is put back to where that had not begun. Where
/// `deliveries` stands when a broker would have ended it.
async fn hang(broker: &Broker, admin: &impl Admin) -> Watermarks {
    let address = broker.address();
    let blocking = |work: Box<dyn FnOnce(&str) -> BaseProducer + Send>| {
        let address = address.clone();
        async move { tokio::task::spawn_blocking(move || work(&address)).await.expect("it ends") }
    };
    let member = blocking(Box::new(|address| producer(address, "g.one"))).await;
    let kept = tempfile::tempdir().expect("a folder");
    for folder in coordinator(&broker.data()) {
        copy(&folder, &kept.path().join(folder.file_name().expect("a name")));
    }
    let _member = blocking(Box::new(move |address| {
        begin(&member, "deliveries");
        add_offsets(address, &member);
        member
    }))
    .await;
    broker.kill();
    for folder in coordinator(&broker.data()) {
        std::fs::remove_dir_all(&folder).expect("removed");
        copy(&kept.path().join(folder.file_name().expect("a name")), &folder);
    }
    broker.start_again();
    // One that begins later, and may live as long, is ended by the broker: then so would be the other one.
    let _later = blocking(Box::new(|address| {
        let later = producer(address, "later");
        begin(&later, "events");
        later
    }))
    .await;
    assert!(!is_decided(admin, &Topic::EVENTS).await, "the later one is open");
    eventually("the later one is ended", Duration::from_secs(60), async || is_decided(admin, &Topic::EVENTS).await)
        .await;
    admin.watermarks(&Topic::DELIVERIES, Partition(0)).await.expect("told")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_broker_left_undecided_is_ended_by_the_next_session_of_the_instance() {
    let broker = Broker::start();
    let address = broker.address();
    let (bootstrap_servers, prefix, properties) = (address.clone(), String::new(), BTreeMap::new());
    let log = Kafka::new(KafkaConfig { bootstrap_servers, prefix, properties });
    let admin = log.admin().expect("an admin");
    create_topics(&admin).await;
    let publisher = log.publisher().expect("a publisher");
    publisher.publish(["a", "b", "c"].map(|value| record(Topic::EVENTS, value)).into()).await.expect("published");
    let mut session = log.session(member()).await.expect("a session");
    commit(&mut session, "first", 1).await;
    session.close().await;

    let before = hang(&broker, &admin).await;
    assert!(before.stable < before.end, "the transaction hangs: {before:?}");
    let mut session = log.session(member()).await.expect("a session");
    let committed = assigned(&mut session).await.expect("a position");
    assert_eq!(committed.offset, Offset::new(1), "what was not committed does not count");
    eventually("what hung is ended", CALL, async || is_decided(&admin, &Topic::DELIVERIES).await).await;
    let passed_over = laneway::telemetry::metrics::metrics().hanging.with_label_values(&["events"]).get();
    assert_eq!(passed_over, 0, "the offsets were decided before anybody asked for them");
    session.close().await;
    let mut reader = log.reader(&Topic::DELIVERIES, Partition(0), Offset::START).await.expect("a reader");
    let mut found = Vec::new();
    while let Read::Records(records) = reader.read(LIMIT).await.expect("read") {
        found.extend(records.into_iter().filter_map(|record| record.value));
    }
    assert_eq!(found, ["first", "hung"], "nothing is lost, and what ended it is not seen");
}
