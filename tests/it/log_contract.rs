//! What every log backend promises (`src/log/mod.rs`), run against each of them: Kafka, the embedded file, memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use laneway::clock::{Clock, Timestamp};
use laneway::log::embedded::memory::Faults;
use laneway::log::embedded::{Access, Embedded};
use laneway::log::kafka::{Kafka, KafkaConfig};
use laneway::log::partitioner::IsolateBy;
use laneway::log::pulsar::{PulsarConfig, PulsarLog};
use laneway::log::topic::TopicSpec;
use laneway::log::{
    Admin, Assignment, Backend, Commit, Committed, Limit, LogError, Member, Polled, Publisher, Read, Reader, Session,
};
use laneway::model::record::{Addressed, Epoch, Headers, Offset, Partition, Record, Topic};

use crate::support::{eventually, kafka_address, pulsar_config, unique};

const PATIENCE: Duration = Duration::from_secs(30);
const LIMIT: Limit = Limit { records: 500, bytes: 1 << 20 };

fn kafka() -> Kafka {
    Kafka::new(KafkaConfig {
        bootstrap_servers: kafka_address(),
        prefix: unique("c") + ".",
        properties: BTreeMap::new(),
    })
}

fn pulsar() -> PulsarLog {
    PulsarLog::new(PulsarConfig { prefix: unique("c") + ".", ..pulsar_config() }).expect("a log")
}

async fn embedded() -> (Embedded, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let log = Embedded::open(folder.path(), Access::Engine, Clock::system()).await.expect("an embedded log");
    (log, folder)
}

async fn memory() -> Embedded {
    Embedded::in_memory(Faults::none(), Clock::system()).await.expect("a memory log")
}

/// One test for each promise and backend.
macro_rules! contract {
    ($($name:ident)*) => {
        mod on_kafka { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name(super::kafka()).await; })* }
        mod on_pulsar { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name(super::pulsar()).await; })* }
        mod on_embedded { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() {
            let (log, _folder) = super::embedded().await;
            super::$name(log.clone()).await;
            log.close().await;
        })* }
        mod on_memory { $(#[tokio::test] async fn $name() { super::$name(super::memory().await).await; })* }
    };
}

contract! {
    records_come_in_order_and_once
    keys_values_headers_and_tombstones_survive
    a_commit_is_visible_as_a_whole
    what_was_not_committed_comes_again
    a_newer_session_of_an_instance_fences_the_older
    two_members_share_and_hand_over_without_repeats
    a_member_that_leaves_hands_over_at_once
    a_paused_partition_is_silent_and_a_seek_moves_it
    a_reader_reads_from_anywhere_and_tells_the_end
    offsets_are_found_by_time
    a_compacted_topic_keeps_the_last_value_of_each_key
    a_topic_that_is_not_there_is_a_clear_error
    topics_are_created_once_and_configured
    a_topic_has_an_id_that_stays
    many_publishers_write_at_once
    positions_are_reset_where_nobody_is_in_the_group
}

pub fn spec(name: &str, partitions: u32) -> TopicSpec {
    TopicSpec {
        name: name.into(),
        partitions,
        replication: None,
        config: BTreeMap::new(),
        key: "any".into(),
        value: "any".into(),
        isolate_by: IsolateBy::None,
        spread: None,
        written_by: vec![],
        read_by: vec![],
        why: "a test".into(),
    }
}

pub async fn topic<B: Backend>(log: &B, name: &str, partitions: u32) -> Topic {
    log.admin().unwrap().create(&spec(name, partitions)).await.expect("created");
    let topic = Topic::new(name);
    // A broker tells its creation before every part of it knows.
    let until = Instant::now() + PATIENCE;
    while log.admin().unwrap().watermarks(&topic, Partition(partitions - 1)).await.is_err() {
        assert!(Instant::now() < until, "the topic does not come up");
    }
    topic
}

pub fn addressed(topic: &Topic, partition: u32, value: impl Into<String>) -> Addressed {
    Addressed {
        topic: topic.clone(),
        partition: Partition(partition),
        key: Some(Bytes::from_static(b"k")),
        value: Some(Bytes::from(value.into())),
        headers: Headers::new(),
    }
}

pub fn member(topic: &Topic, instance: &str) -> Member {
    Member {
        group: "laneway.contract".into(),
        instance: instance.into(),
        topic: topic.clone(),
        outputs: Vec::new(),
        state: None,
        session_timeout: Duration::from_secs(6),
        revoke_drain: Duration::from_secs(1),
    }
}

async fn numbers<B: Backend>(log: &B, topic: &Topic, partitions: u32, count: usize) {
    let records = (0..count).map(|n| addressed(topic, n as u32 % partitions, n.to_string())).collect();
    log.publisher().unwrap().publish(records).await.expect("published");
}

pub fn value(record: &Record) -> usize {
    std::str::from_utf8(record.value.as_ref().expect("a value")).unwrap().parse().expect("a number")
}

/// A session with what it owns, polled by a test.
struct Tester<B: Backend> {
    session: B::Session,
    owned: BTreeMap<Partition, Epoch>,
    positions: BTreeMap<Partition, Offset>,
    seen: Vec<(Partition, usize)>,
}

impl<B: Backend> Tester<B> {
    async fn join(log: &B, topic: &Topic, instance: &str) -> Self {
        let session = log.session(member(topic, instance)).await.expect("joined");
        Self { session, owned: BTreeMap::new(), positions: BTreeMap::new(), seen: Vec::new() }
    }

    /// Polls for a moment, taking over what it is given and committing what is revoked. Only the poll may be cut off.
    async fn step(&mut self, patience: Duration) -> Result<(), LogError> {
        let Ok(polled) = tokio::time::timeout(patience, self.session.poll(LIMIT)).await else { return Ok(()) };
        match polled? {
            Polled::Records(records) => {
                for record in &records {
                    assert!(self.owned.contains_key(&record.partition), "a record of a partition that is not ours");
                    self.positions.insert(record.partition, record.offset.just_after());
                    self.seen.push((record.partition, value(record)));
                }
            }
            Polled::Assigned(given) => {
                for Assignment { partition, epoch, committed } in given {
                    self.owned.insert(partition, epoch);
                    if let Some(committed) = committed {
                        assert!(committed.metadata.starts_with("seq"), "metadata comes back: {committed:?}");
                        self.positions.insert(partition, committed.offset);
                    }
                    self.session.resume(&[partition]).unwrap();
                }
            }
            Polled::Revoked(taken) => {
                self.commit().await?;
                for partition in taken {
                    self.owned.remove(&partition);
                    self.positions.remove(&partition);
                }
            }
            Polled::Lost(gone) => self.owned.retain(|partition, _| !gone.contains(partition)),
            Polled::Idle => {}
        }
        Ok(())
    }

    async fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < until, "did not happen: {what}; owned {:?}, seen {}", self.owned, self.seen.len());
            self.step(Duration::from_millis(300)).await.expect("a poll");
        }
    }

    fn offsets(&self) -> BTreeMap<Partition, (Epoch, Committed)> {
        let position = |(partition, offset): (&Partition, &Offset)| {
            let committed = Committed { offset: *offset, metadata: format!("seq{offset}") };
            self.owned.get(partition).map(|epoch| (*partition, (*epoch, committed)))
        };
        self.positions.iter().filter_map(position).collect()
    }

    async fn commit(&mut self) -> Result<(), LogError> {
        let commit = Commit { outputs: vec![], offsets: self.offsets() };
        self.session.commit(Arc::new(commit)).await
    }
}

pub async fn read_all<B: Backend>(log: &B, topic: &Topic, partition: u32) -> Vec<Record> {
    let mut reader = log.reader(topic, Partition(partition), Offset::START).await.expect("a reader");
    let mut records = Vec::new();
    loop {
        match reader.read(LIMIT).await.expect("read") {
            Read::Records(more) => records.extend(more),
            Read::End => return records,
        }
    }
}

/// Where the records of a partition lie.
async fn offsets_of<B: Backend>(log: &B, topic: &Topic, partition: u32) -> Vec<Offset> {
    read_all(log, topic, partition).await.iter().map(|record| record.offset).collect()
}

async fn records_come_in_order_and_once<B: Backend>(log: B) {
    let topic = topic(&log, "in", 3).await;
    numbers(&log, &topic, 3, 3_000).await;
    let mut tester = Tester::join(&log, &topic, "a").await;
    tester.until("all records", |tester| tester.seen.len() >= 3_000).await;
    for partition in 0..3 {
        let seen: Vec<usize> = tester.seen.iter().filter(|(p, _)| p.0 == partition).map(|(_, n)| *n).collect();
        let expected: Vec<usize> = (0..3_000).filter(|n| n % 3 == partition as usize).collect();
        assert_eq!(seen, expected);
    }
}

async fn keys_values_headers_and_tombstones_survive<B: Backend>(log: B) {
    let topic = topic(&log, "in", 1).await;
    let mut headers = Headers::new();
    headers.push_text("lw-user", "ünï");
    headers.push("bin", Bytes::from_static(&[0, 255]));
    headers.push_text("lw-user", "again");
    let mut tombstone = addressed(&topic, 0, "");
    tombstone.value = None;
    tombstone.headers = headers.clone();
    let mut bare = addressed(&topic, 0, "");
    bare.key = None;
    let before = Clock::system().now();
    log.publisher().unwrap().publish(vec![tombstone, bare]).await.unwrap();
    let records = read_all(&log, &topic, 0).await;
    assert_eq!(records.len(), 2);
    assert_eq!((records[0].key.as_deref(), &records[0].value), (Some(&b"k"[..]), &None));
    assert_eq!(records[0].headers, headers);
    assert_eq!((&records[1].key, records[1].value.as_deref()), (&None, Some(&b""[..])));
    assert!(records[0].timestamp.millis() >= before.millis() && records[0].offset < records[1].offset);
}

async fn a_commit_is_visible_as_a_whole<B: Backend>(log: B) {
    let topic = topic(&log, "in", 1).await;
    let out = self::topic(&log, "out", 2).await;
    numbers(&log, &topic, 1, 10).await;
    let mut tester = Tester::<B>::join(&log, &topic, "a").await;
    tester.until("records", |tester| tester.seen.len() == 10).await;
    let outputs = (0..500).map(|n| addressed(&out, n % 2, n.to_string())).collect();
    let commit = Commit { outputs, offsets: tester.offsets() };
    tester.session.commit(Arc::new(commit)).await.expect("committed");
    assert_eq!(read_all(&log, &out, 0).await.len() + read_all(&log, &out, 1).await.len(), 500);
    let committed = log.admin().unwrap().committed("laneway.contract", &topic).await.unwrap();
    assert_eq!(committed[&Partition(0)].offset, tester.positions[&Partition(0)]);
    assert!(committed[&Partition(0)].metadata.starts_with("seq"));
}

async fn what_was_not_committed_comes_again<B: Backend>(log: B) {
    let topic = topic(&log, "in", 1).await;
    numbers(&log, &topic, 1, 20).await;
    let mut tester = Tester::<B>::join(&log, &topic, "a").await;
    tester.until("records", |tester| tester.seen.len() == 20).await;
    let tenth = offsets_of(&log, &topic, 0).await[10];
    tester.positions.insert(Partition(0), tenth);
    tester.commit().await.expect("committed");
    drop(tester.session);
    let mut again = Tester::<B>::join(&log, &topic, "a").await;
    again.until("the rest", |tester| tester.seen.len() >= 10).await;
    assert_eq!(again.seen[0].1, 10);
    assert_eq!(again.seen.len(), 10);
}

async fn a_newer_session_of_an_instance_fences_the_older<B: Backend>(log: B) {
    let topic = topic(&log, "in", 1).await;
    let out = self::topic(&log, "out", 1).await;
    numbers(&log, &topic, 1, 5).await;
    let mut old = Tester::<B>::join(&log, &topic, "a").await;
    old.until("records", |tester| tester.seen.len() == 5).await;
    let mut new = Tester::<B>::join(&log, &topic, "a").await;
    let commit = Arc::new(Commit { outputs: vec![addressed(&out, 0, "1")], offsets: old.offsets() });
    let refused = old.session.commit(commit).await.expect_err("the old session must not commit");
    assert!(matches!(refused, LogError::Fenced(_) | LogError::Transient(_)), "{refused}");
    new.until("the same records", |tester| tester.seen.len() == 5).await;
    new.commit().await.expect("the new one commits");
    assert!(read_all(&log, &out, 0).await.is_empty(), "nothing of the old one's commit is visible");
}

async fn two_members_share_and_hand_over_without_repeats<B: Backend>(log: B) {
    let topic = topic(&log, "in", 4).await;
    numbers(&log, &topic, 4, 400).await;
    let mut first = Tester::<B>::join(&log, &topic, "a").await;
    first.until("records", |tester| tester.seen.len() == 400).await;
    let mut second = Tester::<B>::join(&log, &topic, "b").await;
    let until = Instant::now() + PATIENCE;
    while first.owned.len() != 2 || second.owned.len() != 2 {
        assert!(Instant::now() < until, "not shared: {:?} {:?}", first.owned, second.owned);
        for tester in [&mut first, &mut second] {
            tester.step(Duration::from_millis(50)).await.expect("a poll");
        }
    }
    numbers(&log, &topic, 4, 400).await;
    let until = Instant::now() + PATIENCE;
    while first.seen.len() + second.seen.len() < 800 {
        assert!(Instant::now() < until, "{} + {}", first.seen.len(), second.seen.len());
        for tester in [&mut first, &mut second] {
            tester.step(Duration::from_millis(50)).await.expect("a poll");
        }
    }
    let partitions: BTreeSet<Partition> = first.owned.keys().chain(second.owned.keys()).copied().collect();
    assert_eq!(partitions.len(), 4, "each partition has one owner");
    assert_eq!(first.seen.len() + second.seen.len(), 800, "nothing came twice");
}

async fn a_member_that_leaves_hands_over_at_once<B: Backend>(log: B) {
    let topic = topic(&log, "in", 2).await;
    let mut first = Tester::<B>::join(&log, &topic, "a").await;
    first.until("both partitions", |tester| tester.owned.len() == 2).await;
    let left = Instant::now();
    first.session.close().await;
    let mut second = Tester::<B>::join(&log, &topic, "b").await;
    second.until("both partitions", |tester| tester.owned.len() == 2).await;
    // Well below the session time-out, which a member that vanishes would cost.
    assert!(left.elapsed() < Duration::from_secs(5), "took {:?}", left.elapsed());
}

async fn a_paused_partition_is_silent_and_a_seek_moves_it<B: Backend>(log: B) {
    let topic = topic(&log, "in", 2).await;
    numbers(&log, &topic, 2, 100).await;
    let thirtieth = offsets_of(&log, &topic, 1).await[30];
    let mut session = log.session(member(&topic, "a")).await.unwrap();
    let mut values = BTreeMap::<u32, Vec<usize>>::new();
    let mut assigned = 0;
    let until = Instant::now() + PATIENCE;
    while assigned < 2 || values.get(&1).is_none_or(|seen| seen.len() < 20) {
        assert!(Instant::now() < until, "{values:?}");
        match tokio::time::timeout(Duration::from_secs(5), session.poll(LIMIT)).await.expect("something").unwrap() {
            Polled::Assigned(given) => {
                if given.iter().any(|given| given.partition == Partition(1)) {
                    session.seek(Partition(1), thirtieth).unwrap();
                    session.resume(&[Partition(1)]).unwrap();
                }
                assigned += given.len();
            }
            Polled::Records(records) => {
                for record in records {
                    values.entry(record.partition.0).or_default().push(value(&record));
                }
            }
            _ => {}
        }
    }
    assert!(assigned == 2 && !values.contains_key(&0), "partition 0 was never resumed");
    assert_eq!(values[&1][0], 61, "reading begins where it was sought to");
    session.resume(&[Partition(0)]).unwrap();
    let until = Instant::now() + PATIENCE;
    while values.get(&0).is_none_or(|seen| seen.len() < 50) {
        assert!(Instant::now() < until, "{values:?}");
        if let Polled::Records(records) = session.poll(LIMIT).await.unwrap() {
            for record in records {
                values.entry(record.partition.0).or_default().push(value(&record));
            }
        }
    }
    assert_eq!(values[&0][0], 0);
}

async fn a_reader_reads_from_anywhere_and_tells_the_end<B: Backend>(log: B) {
    let topic = topic(&log, "in", 1).await;
    let mut reader = log.reader(&topic, Partition(0), Offset::START).await.unwrap();
    assert!(matches!(reader.read(LIMIT).await.unwrap(), Read::End));
    assert!(matches!(reader.read(LIMIT).await.unwrap(), Read::End), "and again");
    numbers(&log, &topic, 1, 50).await;
    let mut count = 0;
    let until = Instant::now() + PATIENCE;
    while count < 50 {
        assert!(Instant::now() < until);
        if let Read::Records(records) = reader.read(Limit { records: 7, bytes: 1 << 20 }).await.unwrap() {
            assert!(records.len() <= 7 && value(&records[0]) == count);
            count += records.len();
        }
    }
    let offsets = offsets_of(&log, &topic, 0).await;
    reader.seek(offsets[20]).await.unwrap();
    let mut records = Vec::new();
    while records.is_empty() {
        assert!(Instant::now() < until);
        match reader.read(LIMIT).await.unwrap() {
            Read::Records(more) => records.extend(more),
            Read::End => panic!("records were expected"),
        }
    }
    assert_eq!(value(&records[0]), 20);
    let marks = log.admin().unwrap().watermarks(&topic, Partition(0)).await.unwrap();
    assert_eq!((marks.start, marks.end, marks.stable), (offsets[0], offsets[49].just_after(), marks.end));
    let before = async |count| log.admin().unwrap().before(&topic, Partition(0), offsets[49], count).await.unwrap();
    let (near, far) = (before(1).await, before(10_000).await);
    assert!((offsets[0]..offsets[49]).contains(&near) && far <= offsets[0], "{near} {far}");
    reader.seek(far).await.unwrap();
    let Read::Records(records) = reader.read(LIMIT).await.unwrap() else { panic!("records were expected") };
    assert_eq!(value(&records[0]), 0);
}

async fn offsets_are_found_by_time<B: Backend>(log: B) {
    let topic = topic(&log, "in", 1).await;
    numbers(&log, &topic, 1, 10).await;
    let between = Clock::system().now();
    eventually("the clock goes on", PATIENCE, async || Clock::system().now() > between.plus(Duration::from_millis(1)))
        .await;
    numbers(&log, &topic, 1, 10).await;
    let admin = log.admin().unwrap();
    let offsets = offsets_of(&log, &topic, 0).await;
    let at = |time| admin.offset_at(&topic, Partition(0), time);
    assert_eq!(at(Timestamp::from_millis(0)).await.unwrap(), offsets[0]);
    assert_eq!(at(between.plus(Duration::from_millis(1))).await.unwrap(), offsets[10]);
    let late = at(between.plus(Duration::from_secs(3_600))).await.unwrap();
    assert_eq!(late, offsets[19].just_after(), "nothing so late: the end");
}

async fn a_compacted_topic_keeps_the_last_value_of_each_key<B: Backend>(log: B) {
    let mut compacted = spec("state", 1);
    for (key, setting) in [
        ("cleanup.policy", "compact"),
        ("segment.ms", "500"),
        ("min.cleanable.dirty.ratio", "0.01"),
        ("max.compaction.lag.ms", "500"),
        ("delete.retention.ms", "100"),
    ] {
        compacted.config.insert(key.into(), setting.into());
    }
    let admin = log.admin().unwrap();
    admin.create(&compacted).await.unwrap();
    let topic = topic(&log, "state", 1).await;
    let publisher = log.publisher().unwrap();
    for round in 0..30 {
        let mut records: Vec<Addressed> = (0..5).map(|n| addressed(&topic, 0, (round * 10 + n).to_string())).collect();
        for (n, record) in records.iter_mut().enumerate() {
            record.key = Some(Bytes::from(format!("key-{n}")));
        }
        publisher.publish(records).await.unwrap();
    }
    let records = read_all(&log, &topic, 0).await;
    let last: BTreeMap<&Bytes, usize> = records.iter().map(|r| (r.key.as_ref().unwrap(), value(r))).collect();
    assert_eq!(last.values().copied().collect::<Vec<_>>(), [290, 291, 292, 293, 294]);
    assert!(records.windows(2).all(|pair| pair[0].offset < pair[1].offset));
}

async fn a_topic_that_is_not_there_is_a_clear_error<B: Backend>(log: B) {
    let missing = Topic::new("missing");
    let error =
        match tokio::time::timeout(PATIENCE, log.publisher().unwrap().publish(vec![addressed(&missing, 0, "1")])).await
        {
            Ok(answer) => answer.expect_err("there is no such topic"),
            Err(_) => panic!("publishing to a topic that is not there hangs"),
        };
    assert!(!error.to_string().is_empty());
}

async fn topics_are_created_once_and_configured<B: Backend>(log: B) {
    let admin = log.admin().unwrap();
    let mut declared = spec("t", 3);
    declared.config.insert("retention.ms".into(), "1000000".into());
    admin.create(&declared).await.unwrap();
    topic(&log, "t", 3).await;
    let more: BTreeMap<String, String> = [("max.message.bytes".to_owned(), "2000000".to_owned())].into();
    admin.configure(&Topic::new("t"), &more).await.unwrap();
    let until = Instant::now() + PATIENCE;
    loop {
        let found = admin.topics().await.unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].partitions, 3);
        let config = admin.topic_config(&Topic::new("t")).await.unwrap();
        assert_eq!(config.own["retention.ms"], "1000000");
        if config.get("max.message.bytes") == Some("2000000") {
            return;
        }
        assert!(Instant::now() < until, "{config:?}");
    }
}

async fn a_topic_has_an_id_that_stays<B: Backend>(log: B) {
    let (one, two) = (topic(&log, "one", 1).await, topic(&log, "two", 1).await);
    let admin = log.admin().unwrap();
    let id = admin.topic_id(&one).await.unwrap();
    assert_ne!(id, admin.topic_id(&two).await.unwrap());
    // Neither a second creation nor other settings change it.
    admin.create(&spec("one", 1)).await.unwrap();
    let more: BTreeMap<String, String> = [("retention.ms".to_owned(), "2000000".to_owned())].into();
    admin.configure(&one, &more).await.unwrap();
    log.publisher().unwrap().publish(vec![addressed(&one, 0, "a")]).await.expect("published");
    assert_eq!(log.admin().unwrap().topic_id(&one).await.unwrap(), id);
}

async fn many_publishers_write_at_once<B: Backend>(log: B) {
    let topic = topic(&log, "in", 2).await;
    let publisher = log.publisher().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..50_usize {
        let (publisher, topic) = (publisher.clone(), topic.clone());
        tasks.spawn(async move {
            for n in 0..20 {
                let record = addressed(&topic, n % 2, (task * 100 + n as usize).to_string());
                publisher.publish(vec![record]).await.expect("published");
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let mut seen: Vec<usize> = Vec::new();
    for partition in 0..2 {
        let values: Vec<usize> = read_all(&log, &topic, partition).await.iter().map(value).collect();
        for task in 0..50 {
            let own: Vec<usize> = values.iter().copied().filter(|n| n / 100 == task).collect();
            assert!(own.is_sorted(), "one publisher's records keep their order");
        }
        seen.extend(values);
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 1_000);
}

/// What lay there was deleted before it was read: reading goes on at the earliest record, never silently at the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_outside_the_log_resumes_at_the_earliest_record_on_kafka() {
    let config =
        KafkaConfig { bootstrap_servers: kafka_address(), prefix: unique("c") + ".", properties: BTreeMap::new() };
    let log = Kafka::new(config.clone());
    let topic = topic(&log, "in", 1).await;
    numbers(&log, &topic, 1, 20).await;
    let mut tester = Tester::<Kafka>::join(&log, &topic, "a").await;
    tester.until("records", |tester| tester.seen.len() == 20).await;
    tester.positions.insert(Partition(0), Offset::new(5));
    tester.commit().await.expect("committed");
    tester.session.close().await;

    let admin: rdkafka::admin::AdminClient<rdkafka::client::DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", &config.bootstrap_servers).create().unwrap();
    let mut before = rdkafka::TopicPartitionList::new();
    before.add_partition_offset(&format!("{}in", config.prefix), 0, rdkafka::Offset::Offset(10)).unwrap();
    admin.delete_records(&before, &rdkafka::admin::AdminOptions::new()).await.expect("deleted");

    let mut again = Tester::<Kafka>::join(&log, &topic, "a").await;
    again.until("what is left", |tester| tester.seen.len() >= 10).await;
    let seen: Vec<usize> = again.seen.iter().map(|(_, n)| *n).collect();
    assert_eq!(seen, (10..20).collect::<Vec<_>>());
}

async fn positions_are_reset_where_nobody_is_in_the_group<B: Backend>(log: B) {
    let topic = topic(&log, "in", 2).await;
    let admin = log.admin().unwrap();
    numbers(&log, &topic, 2, 20).await;
    let third = offsets_of(&log, &topic, 1).await[3];
    let to = BTreeMap::from([(Partition(1), third)]);
    let mut member = Tester::join(&log, &topic, "a").await;
    member.until("everything is read", |it| it.seen.len() == 20).await;
    member.commit().await.unwrap();
    let before = admin.committed("laneway.contract", &topic).await.unwrap();
    let refused = admin.reset("laneway.contract", &topic, &to).await;
    assert!(matches!(refused, Err(LogError::Fatal(_))), "{refused:?}");
    assert_eq!(admin.committed("laneway.contract", &topic).await.unwrap(), before, "a refused one changes nothing");
    member.session.close().await;
    admin.reset("laneway.contract", &topic, &to).await.unwrap();
    let found = admin.committed("laneway.contract", &topic).await.unwrap();
    assert_eq!(found[&Partition(1)], Committed { offset: third, metadata: String::new() });
    assert_eq!(found[&Partition(0)], before[&Partition(0)], "only what was named");
}
