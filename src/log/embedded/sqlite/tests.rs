//! The file under maintenance and with damage.

use bytes::Bytes;

use super::super::store::read_error;
use super::*;
use crate::log::LogError;
use crate::log::partitioner::IsolateBy;
use crate::model::record::Headers;

const PARTITION: Partition = Partition(0);
const ALL: Limit = Limit { records: usize::MAX, bytes: usize::MAX };

fn topic() -> Topic {
    Topic::new("t")
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_millis(seconds * 1_000)
}

async fn store(folder: &Path, config: &[(&str, &str)]) -> SqliteStore {
    let store = SqliteStore::open(&folder.join("log.sqlite")).await.expect("a store");
    let spec = TopicSpec {
        name: "t".into(),
        partitions: 1,
        replication: None,
        config: config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        key: "any".into(),
        value: "any".into(),
        isolate_by: IsolateBy::None,
        spread: None,
        written_by: Vec::new(),
        read_by: Vec::new(),
        why: "a test".into(),
    };
    store.create(&spec).await.expect("created");
    store
}

/// One row of these records: keys, and values where there are some.
async fn write(store: &SqliteStore, records: &[(&str, Option<&str>)], seconds: i64) {
    let addressed = |(key, value): &(&str, Option<&str>)| Addressed {
        topic: topic(),
        partition: PARTITION,
        key: Some(Bytes::copy_from_slice(key.as_bytes())),
        value: value.map(|value| Bytes::copy_from_slice(value.as_bytes())),
        headers: Headers::new(),
    };
    let batch = ((topic(), PARTITION), records.iter().map(addressed).collect());
    let what = Transaction { batches: vec![batch], ..Transaction::default() };
    store.write(&what, at(seconds)).await.expect("written");
}

async fn read(store: &SqliteStore, from: u128) -> Vec<(u128, String)> {
    let records = store.read(&topic(), PARTITION, Offset::new(from), ALL).await.expect("read");
    let text = |record: &Record| String::from_utf8_lossy(record.value.as_deref().unwrap_or(b"-")).into_owned();
    records.iter().map(|record| (record.offset.raw(), text(record))).collect()
}

async fn rows(store: &SqliteStore) -> i64 {
    sqlx::query("select count(*) from batches").fetch_one(&store.readers).await.expect("counted").get(0)
}

/// What happens to the row that begins at this offset.
async fn spoil(store: &SqliteStore, first: u128) {
    let spoiled = sqlx::query("update batches set body = x'ff00' where id & 1099511627775 = ?");
    let spoiled = spoiled.bind(first as i64).execute(&store.writer).await.expect("spoiled");
    assert_eq!(spoiled.rows_affected(), 1);
}

#[tokio::test]
async fn compaction_in_slices_leaves_the_last_value_of_each_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = store(folder.path(), &[("cleanup.policy", "compact"), ("delete.retention.ms", "0")]).await;
    for n in 0..199 {
        write(&store, &[("a", Some(&format!("a{n}"))), ("gone", Some("x")), (&format!("k{n}"), Some("once"))], 1).await;
    }
    store.maintain(at(10)).await.expect("maintained");
    assert_eq!(rows(&store).await, 199, "it is not worth it yet");
    write(&store, &[("gone", None), ("a", Some("last"))], 1).await;
    store.maintain(at(10)).await.expect("maintained");
    // Of the last row everything but the tombstone; of each other one the key that came once.
    let found = read(&store, 0).await;
    assert_eq!(found.len(), 199 + 1, "{found:?}");
    assert_eq!(found.last(), Some(&(598, "last".to_owned())));
    assert!(found[..199].iter().zip(0..).all(|(it, n)| *it == (3 * n + 2, "once".to_owned())), "{found:?}");
    assert_eq!(read(&store, 300).await[0].0, 302);
    let left = rows(&store).await;
    assert!(left <= 5, "{left} rows");
    assert_eq!(store.bounds(&topic(), PARTITION).await.expect("known").end, Offset::new(599));

    // Nothing is rewritten for a few rows, and rows that are well packed stay as they are.
    write(&store, &[("a", Some("later"))], 1).await;
    store.maintain(at(10)).await.expect("maintained");
    assert_eq!(rows(&store).await, left + 1);
    store.close().await;
}

#[tokio::test]
async fn expiry_goes_up_to_the_first_young_row_in_small_steps() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = store(folder.path(), &[("retention.ms", "5000")]).await;
    for n in 0..300 {
        write(&store, &[("k", Some("v"))], if n < 200 { 1 } else { 8 }).await;
    }
    store.maintain(at(6)).await.expect("maintained");
    assert_eq!(rows(&store).await, 300, "each is young enough");
    store.maintain(at(7)).await.expect("maintained");
    assert_eq!((rows(&store).await, read(&store, 0).await[0].0), (100, 200));
    store.maintain(at(20)).await.expect("maintained");
    let marks = store.bounds(&topic(), PARTITION).await.expect("known");
    assert_eq!((rows(&store).await, marks.start, marks.end), (0, Offset::new(300), Offset::new(300)));
    store.close().await;
}

#[tokio::test]
async fn a_damaged_batch_is_passed_over_and_left_in_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = store(folder.path(), &[("cleanup.policy", "compact"), ("delete.retention.ms", "0")]).await;
    for n in 0..200 {
        write(&store, &[("k", Some("v")), (&format!("k{n}"), Some("once"))], 1).await;
    }
    spoil(&store, 100).await;
    let found = read(&store, 96).await;
    assert_eq!(found.iter().map(|it| it.0).take(6).collect::<Vec<u128>>(), [96, 97, 98, 99, 102, 103]);
    let one = Limit { records: 1, bytes: 1 };
    let next = store.read(&topic(), PARTITION, Offset::new(101), one).await.expect("read");
    assert_eq!(next[0].offset, Offset::new(102), "a reader that stands in it goes on behind it");
    store.maintain(at(10)).await.expect("it keeps nothing from being maintained");
    assert_eq!(read(&store, 0).await.len(), 200, "the key that came last, and 199 others");
    for (from, first) in [(100, 103), (102, 103), (99, 99), (1, 1)] {
        assert_eq!(read(&store, from).await[0].0, first, "from {from}");
    }
    let spoiled = sqlx::query("select count(*) from batches where body = x'ff00'").fetch_one(&store.readers);
    assert_eq!(spoiled.await.expect("counted").get::<i64, _>(0), 1);
    store.close().await;
}

#[tokio::test]
async fn a_damaged_file_ends_the_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = store(folder.path(), &[]).await;
    write(&first, &[("k", Some("v"))], 1).await;
    let page = sqlx::query("select rootpage from sqlite_master where name = 'batches'").fetch_one(&first.readers);
    let page = page.await.expect("a table").get::<i64, _>(0) as usize;
    assert!(first.reset_wal().await.expect("reset"));
    first.close().await;
    let path = folder.path().join("log.sqlite");
    let mut bytes = std::fs::read(&path).expect("a file");
    bytes[(page - 1) * 16_384..page * 16_384].fill(0xFF);
    std::fs::write(&path, bytes).expect("written");

    let store = SqliteStore::open(&path).await.expect("the rest of it is sound");
    let error = store.read(&topic(), PARTITION, Offset::START, ALL).await.expect_err("it is damaged");
    let error = read_error(error);
    assert!(matches!(error, LogError::Fatal(_)) && error.to_string().contains("log.sqlite is damaged"), "{error}");
    store.close().await;
}

#[tokio::test]
async fn the_wal_is_reset_as_soon_as_no_other_process_reads() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = store(folder.path(), &[]).await;
    write(&store, &[("k", Some(&"v".repeat(100_000)))], 1).await;
    let path = folder.path().join("log.sqlite");
    let mut other = SqliteConnection::connect(&format!("sqlite:{}", path.display())).await.expect("connected");
    sqlx::query("begin").execute(&mut other).await.expect("begun");
    sqlx::query("select count(*) from batches").fetch_one(&mut other).await.expect("counted");
    write(&store, &[("k", Some(&"v".repeat(100_000)))], 1).await;
    assert!(!store.reset_wal().await.expect("tried"), "somebody reads what is in it");
    write(&store, &[("k", Some("v"))], 1).await;
    sqlx::query("rollback").execute(&mut other).await.expect("ended");
    assert!(store.reset_wal().await.expect("tried"));
    let wal = std::fs::metadata(folder.path().join("log.sqlite-wal")).map_or(0, |found| found.len());
    assert_eq!((wal, read(&store, 0).await.len()), (0, 3));
    let space = store.space().await.expect("known");
    assert!(space.disk > 0);
    other.close().await.expect("closed");
    store.close().await;
}
