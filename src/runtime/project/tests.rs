//! The runtime over the embedded log in memory, with a store in memory that fails on purpose.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard};

use super::*;
use crate::log::embedded::Embedded;
use crate::log::embedded::memory::Faults;
use crate::log::topic::Topics;
use crate::log::{Member, Publisher};
use crate::model::record::{Addressed, Headers};
use crate::telemetry::server::Readiness;

/// What the store has, by partition: its owner, how far it is, and the values.
#[derive(Default)]
struct Stored {
    owners: BTreeMap<Partition, (i64, Option<Offset>)>,
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
    async fn take_over(&self, partition: Partition) -> Result<(i64, Option<Offset>), StoreError> {
        let mut stored = self.stored();
        let owner = stored.owners.entry(partition).or_insert((0, None));
        owner.0 += 1;
        Ok(*owner)
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
