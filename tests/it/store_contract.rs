//! What every store promises, on each of them.

use std::collections::BTreeMap;

use laneway::clock::Timestamp;
use laneway::model::job_status::{Counts, FailedRow, JobKey, JobStatus};
use laneway::model::record::{Offset, Partition, Topic, TopicId};
use laneway::store::job_status::{JobStatusStore, Place};
use laneway::store::{Group, Mismatch, Move, Position, StoreError};

fn group() -> Group {
    Group { name: "laneway.reporter".into(), topic: Topic::JOB_STATUS }
}

fn topic() -> TopicId {
    TopicId::new("a-log/job-status")
}

fn position(offset: u128) -> Option<Position> {
    Some(Position { offset: Offset::new(offset), topic_id: Some(topic()) })
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_millis(seconds * 1_000)
}

fn key(run: &str, source: &str, destination: Option<&str>) -> JobKey {
    JobKey {
        job_run: run.into(),
        task_run: "t".into(),
        source: source.into(),
        destination: destination.map(Into::into),
    }
}

fn failed(records: &[&str]) -> Counts {
    let failed_rows: Vec<FailedRow> =
        records.iter().map(|record| FailedRow { record: (*record).to_owned().into(), code: 400 }).collect();
    Counts { failed: records.len() as u64, failed_rows, ..Counts::default() }
}

fn status(key: JobKey, counts: Counts) -> JobStatus {
    JobStatus { key, counts }
}

fn step(epoch: i64, from: Option<u128>, to: u128) -> [Move; 1] {
    [Move { partition: Partition(3), epoch, from: from.map(Offset::new), to: Offset::new(to) }]
}

async fn prepared(url: &str) -> JobStatusStore {
    let store = JobStatusStore::new(url).expect("a URL of a store");
    store.migrate().await.expect("migrated");
    store
}

async fn tables_are_made_once(url: &str) {
    let store = JobStatusStore::new(url).expect("a URL of a store");
    assert!(matches!(store.counts(&"r".into()).await, Err(StoreError::Unmigrated(_))), "there is nothing yet");
    assert_eq!(store.pending().await.expect("known"), ["counts", "topic_id"]);
    assert_eq!(store.migrate().await.expect("migrated"), ["counts", "topic_id"]);
    assert!(store.migrate().await.expect("migrated").is_empty() && store.pending().await.expect("known").is_empty());
    assert_eq!(store.counts(&"r".into()).await.expect("counts"), BTreeMap::new());
}

async fn counts_and_positions_move_together(url: &str) {
    let store = prepared(url).await;
    let (group, run) = (group(), "run".into());
    let (first, next) = store.store().take_over(&group, Partition(3), &topic()).await.expect("taken over");
    assert_eq!(next, None);
    let both =
        || vec![status(key("run", "s", None), Counts::taken(5)), status(key("run", "s", Some("d")), Counts::passed())];
    store.add(&group, &step(first, None, 7), both(), at(1)).await.expect("added");
    // The same again has no effect, and neither has what does not follow.
    for wrong in [step(first, None, 7), step(first, Some(6), 9), step(first + 1, Some(7), 9)] {
        let added = store.add(&group, &wrong, both(), at(1)).await;
        assert!(matches!(added, Err(StoreError::Stale)), "{wrong:?}");
    }
    store.add(&group, &step(first, Some(7), 9), both(), at(2)).await.expect("added");
    let counts = store.counts(&run).await.expect("counts");
    assert_eq!(counts[&key("run", "s", None)], Counts { taken: 10, ..Counts::default() });
    assert_eq!(counts[&key("run", "s", Some("d"))], Counts { passed: 2, ..Counts::default() });
    assert_eq!(store.store().position(&group, Partition(3)).await.expect("known"), position(9));

    // Who had it before writes nothing more, and another partition or group has nothing to do with it.
    let (second, next) = store.store().take_over(&group, Partition(3), &topic()).await.expect("taken over");
    assert_eq!((second > first, next), (true, position(9)));
    assert!(matches!(store.add(&group, &step(first, Some(9), 10), both(), at(3)).await, Err(StoreError::Stale)));
    store.add(&group, &step(second, Some(9), 10), Vec::new(), at(3)).await.expect("added");
    assert_eq!(store.store().position(&group, Partition(4)).await.expect("known"), None);
    assert_eq!(store.counts(&run).await.expect("counts"), counts);
}

async fn a_position_carries_its_topic(url: &str) {
    let store = prepared(url).await;
    let (group, other) = (group(), TopicId::new("another-log/job-status"));
    // Nothing was written yet: the position belongs to whatever is written first.
    store.store().take_over(&group, Partition(3), &other).await.expect("taken over");
    let (first, next) = store.store().take_over(&group, Partition(3), &topic()).await.expect("taken over");
    assert_eq!(next, None);
    let one = || vec![status(key("run", "s", None), Counts::taken(1))];
    store.add(&group, &step(first, None, 7), one(), at(1)).await.expect("added");
    let (second, next) = store.store().take_over(&group, Partition(3), &other).await.expect("taken over");
    assert_eq!(next, position(7), "it stays one of the log that it was written for");
    let next = next.expect("a position");
    assert!(matches!(next.mismatch(&other, Offset::new(9)), Some(Mismatch::AnotherTopic { .. })));
    assert_eq!((next.mismatch(&topic(), Offset::new(9)), next.mismatch(&topic(), Offset::new(7))), (None, None));
    assert!(matches!(next.mismatch(&topic(), Offset::new(6)), Some(Mismatch::BeyondEnd { .. })));

    // A reset makes it one of the other log, and its owner writes nothing more.
    let to = BTreeMap::from([(Partition(3), Offset::new(2)), (Partition(4), Offset::new(5))]);
    store.store().reset(&group, &other, &to).await.expect("reset");
    assert!(matches!(store.add(&group, &step(second, Some(7), 9), one(), at(2)).await, Err(StoreError::Stale)));
    let found = store.store().positions(&group).await.expect("known");
    let of_other = |offset| Position { offset: Offset::new(offset), topic_id: Some(other.clone()) };
    assert_eq!(found, BTreeMap::from([(Partition(3), of_other(2)), (Partition(4), of_other(5))]));
    let (third, next) = store.store().take_over(&group, Partition(3), &other).await.expect("taken over");
    assert_eq!(next, Some(of_other(2)));
    store.add(&group, &step(third, Some(2), 3), one(), at(3)).await.expect("added");
    assert_eq!(store.counts(&"run".into()).await.expect("counts")[&key("run", "s", None)].taken, 2);
}

async fn two_owners_at_once_count_once(url: &str) {
    let store = prepared(url).await;
    let group = group();
    let (epoch, _) = store.store().take_over(&group, Partition(3), &topic()).await.expect("taken over");
    let (group, store) = (&group, &store);
    let tries = (0..8).map(|_| async move {
        let one = vec![status(key("run", "s", None), Counts::taken(1))];
        store.add(group, &step(epoch, None, 1), one, at(1)).await
    });
    let all = futures_util::future::join_all(tries).await;
    assert_eq!(all.iter().filter(|added| added.is_ok()).count(), 1, "{all:?}");
    assert!(all.iter().all(|added| matches!(added, Ok(()) | Err(StoreError::Stale | StoreError::Away(_)))), "{all:?}");
    assert_eq!(store.counts(&"run".into()).await.expect("counts")[&key("run", "s", None)].taken, 1);
}

async fn failed_rows_are_kept_once_and_told_in_pages(url: &str) {
    let store = prepared(url).await;
    let (group, run) = (group(), "run".into());
    let (epoch, _) = store.store().take_over(&group, Partition(3), &topic()).await.expect("taken over");
    let long = format!("\"{}\"", "x".repeat(4_000));
    let all = vec![
        status(key("run", "s", Some("d")), failed(&["1", "2", "2", &long])),
        status(key("run", "s", None), failed(&["\"a\0b\""])),
        status(key("run", "r", Some("d")), failed(&["3", "{\"id\":1}"])),
        status(key("other", "s", Some("d")), failed(&["9"])),
    ];
    store.add(&group, &step(epoch, None, 1), all, at(1)).await.expect("added");
    let again = Counts { failed_rows: vec![FailedRow { record: "1".into(), code: 500 }], ..Counts::default() };
    store
        .add(&group, &step(epoch, Some(1), 2), vec![status(key("run", "s", Some("d")), again)], at(2))
        .await
        .expect("added");
    let (mut behind, mut seen) = (Place::default(), Vec::new());
    loop {
        let page = store.failed_rows(&run, &behind, 2).await.expect("rows");
        let Some(last) = page.last() else { break };
        assert!(page.len() <= 2);
        behind = last.place.clone();
        seen.extend(page.into_iter().map(|row| {
            let to = row.key.destination.map_or_else(String::new, |id| id.to_string());
            (row.key.source.to_string(), to, String::from_utf8_lossy(&row.row.record).into_owned(), row.row.code)
        }));
    }
    let sources: Vec<(&str, &str)> = seen.iter().map(|row| (row.0.as_str(), row.1.as_str())).collect();
    assert_eq!(sources, [("r", "d"), ("r", "d"), ("s", ""), ("s", "d"), ("s", "d"), ("s", "d")], "{seen:?}");
    seen.sort();
    let records: Vec<&str> = seen.iter().map(|row| row.2.as_str()).collect();
    assert_eq!(records, ["3", "{\"id\":1}", "\"a\u{FFFD}b\"", long.as_str(), "1", "2"]);
    assert!(seen.iter().all(|row| row.3 == 400), "the first code stays: {seen:?}");

    assert_eq!(store.keys_of_failed_rows(&run).await.expect("keys").len(), 3);
    store.forget_rows(&run, &[key("run", "s", Some("d"))]).await.expect("forgotten");
    assert_eq!(store.failed_rows(&run, &Place::default(), 10).await.expect("rows").len(), 3);
    store.forget(&[key("run", "s", Some("d"))]).await.expect("forgotten");
    let left: Vec<JobKey> = store.counts(&run).await.expect("counts").into_keys().collect();
    assert_eq!(left, [key("run", "r", Some("d")), key("run", "s", None)]);
    assert_eq!(store.counts(&"other".into()).await.expect("counts").len(), 1);
}

async fn old_runs_are_forgotten_as_a_whole(url: &str) {
    let store = prepared(url).await;
    let group = group();
    let (epoch, _) = store.store().take_over(&group, Partition(3), &topic()).await.expect("taken over");
    let all = |run: &str| {
        vec![status(key(run, "s", None), Counts::taken(1)), status(key(run, "s", Some("d")), failed(&["1"]))]
    };
    store.add(&group, &step(epoch, None, 1), all("old"), at(10)).await.expect("added");
    store.add(&group, &step(epoch, Some(1), 2), all("young"), at(10)).await.expect("added");
    let news = vec![status(key("young", "s", None), Counts::passed())];
    store.add(&group, &step(epoch, Some(2), 3), news, at(20)).await.expect("added");
    assert_eq!(store.expire(at(15)).await.expect("expired"), 3, "the old one's two counts and its row");
    assert!(store.counts(&"old".into()).await.expect("counts").is_empty());
    assert_eq!(store.counts(&"young".into()).await.expect("counts").len(), 2);
    // Its row is as old as the other's; the run is not.
    assert_eq!(store.failed_rows(&"young".into(), &Place::default(), 9).await.expect("rows").len(), 1);
    assert_eq!(store.expire(at(25)).await.expect("expired"), 3);
}

macro_rules! contract {
    ($($name:ident)*) => {
        mod on_sqlite {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    let folder = tempfile::tempdir().expect("a folder");
                    super::$name(&format!("sqlite:{}", folder.path().join("store.sqlite").display())).await;
                }
            )*
        }

        mod on_postgres {
            use crate::support::postgres;

            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    super::$name(&postgres::database().await).await;
                }
            )*
        }
    };
}

contract! {
    tables_are_made_once
    counts_and_positions_move_together
    a_position_carries_its_topic
    two_owners_at_once_count_once
    failed_rows_are_kept_once_and_told_in_pages
    old_runs_are_forgotten_as_a_whole
}

/// What somebody holds for a while is waited for, and is no fault of the data.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_locked_in_postgres_is_not_refused() {
    use sqlx::{Connection, Executor};
    let url = crate::support::postgres::database().await;
    let store = prepared(&url).await;
    let (epoch, _) = store.store().take_over(&group(), Partition(3), &topic()).await.expect("taken over");
    let mut other = sqlx::PgConnection::connect(&url).await.expect("connected");
    other.execute("begin").await.expect("begun");
    other.execute("lock table job_status.counts in exclusive mode").await.expect("locked");
    let one = || vec![status(key("run", "s", None), Counts::taken(1))];
    let added = store.add(&group(), &step(epoch, None, 1), one(), at(1)).await;
    assert!(matches!(added, Err(StoreError::Away(_))), "{added:?}");
    other.execute("rollback").await.expect("ended");
    store.add(&group(), &step(epoch, None, 1), one(), at(1)).await.expect("added");
}
