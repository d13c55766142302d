//! The runtime over the embedded log in memory, with a store in memory that fails on purpose.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard};

use super::*;
use crate::log::embedded::Embedded;
use crate::log::embedded::memory::Faults;
use crate::log::topic::Topics;
use crate::log::{Admin, Member, Publisher};
use crate::model::record::{Addressed, Headers};
use crate::telemetry::server::Readiness;

/// What the store has, by partition: its owner, how far it is, and the values.
#[derive(Default)]
struct Stored {
    owners: BTreeMap<Partition, (i64, Option<Offset>)>,
    /// Which topic the positions belong to.
    topic: Option<TopicId>,
    values: Vec<String>,
    refused: Vec<String>,
    /// What becomes of the next writes.
    faults: Vec<Fault>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Away,
    /// It is written, and the answer is lost.
    Lost,
}

#[derive(Default)]
struct Numbers(Mutex<Stored>);

impl Numbers {
    fn stored(&self) -> MutexGuard<'_, Stored> {
        self.0.lock().expect("no poison")
    }
}

impl Project for Numbers {
    async fn position(&self, partition: Partition) -> Result<Option<Position>, StoreError> {
        let stored = self.stored();
        let offset = stored.owners.get(&partition).and_then(|(_, offset)| *offset);
        Ok(offset.map(|offset| Position { offset, topic_id: stored.topic.clone() }))
    }

    async fn take_over(&self, partition: Partition, topic: &TopicId) -> Result<(i64, Option<Position>), StoreError> {
        let mut stored = self.stored();
        let topic_id = Some(stored.topic.get_or_insert_with(|| topic.clone()).clone());
        let owner = stored.owners.entry(partition).or_insert((0, None));
        owner.0 += 1;
        Ok((owner.0, owner.1.map(|offset| Position { offset, topic_id })))
    }

    async fn write(&self, moves: &[Move], records: &[Record]) -> Result<(), StoreError> {
        let mut stored = self.stored();
        let fault = stored.faults.pop();
        if fault == Some(Fault::Away) {
            return Err(StoreError::Away("not now".into()));
        }
        let is_stale = |it: &Move| stored.owners[&it.partition] != (it.epoch, it.from);
        if moves.iter().any(is_stale) {
            return Err(StoreError::Stale);
        }
        let text = |record: &Record| String::from_utf8_lossy(record.value.as_deref().unwrap_or_default()).into_owned();
        if records.iter().any(|record| text(record).ends_with('7')) {
            return Err(StoreError::Refused("sevens are poisonous".into()));
        }
        stored.values.extend(records.iter().map(text));
        for it in moves {
            stored.owners.insert(it.partition, (it.epoch, Some(it.to)));
        }
        if fault == Some(Fault::Lost) { Err(StoreError::Away("the connection broke".into())) } else { Ok(()) }
    }

    fn refused(&self, record: &Record, _: &StoreError) {
        let text = String::from_utf8_lossy(record.value.as_deref().unwrap_or_default()).into_owned();
        self.stored().refused.push(text);
    }
}

async fn publish(log: &Embedded, numbers: std::ops::Range<u32>) {
    let record = |n: u32| Addressed {
        topic: Topic::JOB_STATUS,
        partition: Partition(n % 3),
        key: None,
        value: Some(n.to_string().into()),
        headers: Headers::new(),
    };
    let publisher = log.publisher().expect("a publisher");
    publisher.publish(numbers.map(record).collect()).await.expect("published");
}

fn start(log: &Embedded, numbers: &Arc<Numbers>) -> (Shutdown, tokio::task::JoinHandle<Result<(), LogError>>) {
    let shutdown = Shutdown::new(Duration::from_secs(5));
    let settings = Settings {
        partitions: u32::MAX,
        member: Member {
            group: "g".into(),
            instance: "one".into(),
            topic: Topic::JOB_STATUS,
            outputs: Vec::new(),
            state: None,
            session_timeout: Duration::from_secs(6),
            revoke_drain: Duration::from_secs(1),
        },
        commit_interval: Duration::from_millis(10),
        stage: "test",
    };
    let running =
        run(log.clone(), Arc::clone(numbers), settings, Clock::system(), shutdown.clone(), Readiness::default().part());
    (shutdown, tokio::spawn(running))
}

async fn until(numbers: &Numbers, count: usize) {
    let clock = Clock::system();
    let deadline = clock.instant() + Duration::from_secs(20);
    while numbers.stored().values.len() < count {
        assert!(clock.instant() < deadline, "{} of {count} are written", numbers.stored().values.len());
        clock.sleep(Duration::from_millis(10)).await;
    }
}

async fn log_of(numbers: std::ops::Range<u32>) -> Embedded {
    let log = Embedded::in_memory(Faults::none(), Clock::system()).await.expect("a log");
    for spec in Topics::load(None).expect("the topics").iter() {
        log.admin().expect("an admin").create(spec).await.expect("created");
    }
    publish(&log, numbers).await;
    log
}

async fn topic_id(log: &Embedded) -> TopicId {
    log.admin().expect("an admin").topic_id(&Topic::JOB_STATUS).await.expect("an id")
}

/// Positions 4, 4 and 3 of a first log meet a second one that is longer, or shorter: nothing of it is written until they are set.
async fn waits_for_its_positions(records: u32, is_known: bool) {
    let numbers = Arc::new(Numbers::default());
    let first = log_of(0..6).await;
    let (shutdown, running) = start(&first, &numbers);
    until(&numbers, 6).await;
    shutdown.begin();
    running.await.expect("no panic").expect("no error");

    let second = log_of(100..100 + records).await;
    if !is_known {
        // It was stored before topics were.
        numbers.stored().topic = None;
    }
    let (shutdown, running) = start(&second, &numbers);
    let held = || metrics().projected_held.with_label_values(&["test"]).get();
    // Partitions without a position are taken over.
    let owners = || {
        let mut owners = numbers.stored().owners.clone();
        owners.retain(|_, (_, position)| position.is_some());
        owners
    };
    let (clock, before) = (Clock::system(), owners());
    let deadline = clock.instant() + Duration::from_secs(20);
    while held() < 3 {
        assert!(clock.instant() < deadline, "{} partitions are held", held());
        clock.sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(numbers.stored().values.len(), 6, "nothing is written");
    assert_eq!(owners(), before, "a held partition is not taken over");
    let committed = second.admin().expect("an admin").committed("g", &Topic::JOB_STATUS).await.expect("an answer");
    assert!(committed.is_empty(), "positions of another log are not told to this one: {committed:?}");

    // An operator sets them.
    let id = topic_id(&second).await;
    {
        let mut stored = numbers.stored();
        stored.topic = Some(id);
        for owner in stored.owners.values_mut().filter(|(_, position)| position.is_some()) {
            *owner = (owner.0 + 1, Some(Offset::START));
        }
    }
    let count = 6 + (100..100 + records).filter(|n| n % 10 != 7).count();
    until(&numbers, count).await;
    assert_eq!((numbers.stored().values.len(), held()), (count, 0));
    shutdown.begin();
    running.await.expect("no panic").expect("no error");
}

#[tokio::test(flavor = "multi_thread")]
async fn positions_of_another_log_hold_their_partitions() {
    // A longer log, which hides that the positions are not its own; then a shorter one, with and without a stored topic.
    waits_for_its_positions(60, true).await;
    waits_for_its_positions(3, true).await;
    waits_for_its_positions(3, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_record_is_written_once_whatever_the_store_answers() {
    let log = Embedded::in_memory(Faults::none(), Clock::system()).await.expect("a log");
    for spec in Topics::load(None).expect("the topics").iter() {
        log.admin().expect("an admin").create(spec).await.expect("created");
    }
    let numbers = Arc::new(Numbers::default());
    numbers.stored().faults = vec![Fault::Away, Fault::Lost, Fault::Away];
    publish(&log, 0..300).await;
    let (shutdown, running) = start(&log, &numbers);
    until(&numbers, 270).await;
    // Answers are lost while more comes.
    for part in 3..10 {
        numbers.stored().faults = vec![Fault::Lost];
        publish(&log, part * 100..(part + 1) * 100).await;
        until(&numbers, (part as usize + 1) * 90).await;
    }
    shutdown.begin();
    running.await.expect("no panic").expect("no error");
    // The next one goes on where the store is; the log had been told.
    publish(&log, 1_000..1_100).await;
    let committed = log.admin().expect("an admin").committed("g", &Topic::JOB_STATUS).await.expect("an answer");
    assert_eq!(committed.len(), 3, "{committed:?}");
    let (shutdown, running) = start(&log, &numbers);
    until(&numbers, 990).await;
    shutdown.begin();
    running.await.expect("no panic").expect("no error");
    let stored = numbers.stored();
    let once: BTreeSet<u32> = stored.values.iter().map(|value| value.parse().expect("a number")).collect();
    assert_eq!((once.len(), stored.values.len()), (990, 990));
    let sevens: BTreeSet<u32> = stored.refused.iter().map(|value| value.parse().expect("a number")).collect();
    assert_eq!((sevens.len(), stored.refused.len()), (110, 110), "each is told once");
}
