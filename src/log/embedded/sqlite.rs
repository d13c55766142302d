//! The store in a SQLite file, in WAL mode with full sync: what is acknowledged is on disk.
//!
//! A batch's row id is its partition's id and its first offset in one number, so that reading a partition is a range of the
//! one b-tree and appending goes to its end.
//!
//! A row that cannot be decoded is passed over with an error line: its records are lost whatever is done, and a stage that stopped
//! before it would stop everything behind it, too. It stays in the file. A file that SQLite itself finds damaged ends the process:
//! nothing that is read from it can be trusted.

mod maintenance;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Connection, Row, SqlitePool};

use crate::clock::Timestamp;
use crate::log::topic::TopicSpec;
use crate::log::{BoxError, Committed, Limit, Watermarks};
use crate::model::record::{Addressed, Offset, Partition, Record, Topic};
use crate::telemetry::metrics::metrics;
use crate::telemetry::seldom;

use super::frame;
use super::store::{DamagedFile, NoSuchPartition, Position, StoredTopic, Transaction};

/// Bits of a batch id that hold the offset: a partition may hold 10^12 records.
const OFFSET_BITS: u32 = 40;
/// A row is at most so many records: a reader of one record reads its row.
const BATCH_RECORDS: usize = 500;
const BATCH_BYTES: usize = 256 * 1024;
/// Another process that writes is waited for.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// Rows that a reader fetches at a time, at most.
const PAGE_ROWS: usize = 8;
/// Another process that reads may delay a reset of the WAL for this long, and then the reset is given up.
const WAL_RESET_TIMEOUT: Duration = Duration::from_millis(100);
/// Connections that read. Maintenance takes all of them for a moment to reset the WAL.
const READERS: u32 = 3;

const SCHEMA: [&str; 7] = [
    "create table if not exists topics (
        name text primary key, partitions integer not null, config text not null) without rowid",
    "create table if not exists partitions (
        id integer primary key, topic text not null, number integer not null, next_offset integer not null,
        compacted_rows integer not null default 0, unique (topic, number))",
    "create table if not exists batches (
        id integer primary key, last_offset integer not null, at integer not null, bytes integer not null, body blob not null)",
    "create table if not exists positions (
        group_id text not null, topic text not null, number integer not null, next_offset integer not null,
        metadata text not null, primary key (group_id, topic, number)) without rowid",
    "create table if not exists commits (session text primary key, number integer not null) without rowid",
    "create table if not exists log (id text primary key) without rowid",
    "insert into log select lower(hex(randomblob(16))) where not exists (select 1 from log)",
];

#[derive(Clone)]
pub struct SqliteStore {
    readers: SqlitePool,
    /// One connection writes; the writer task is its only user but for topic changes and maintenance.
    writer: SqlitePool,
    /// Moves the WAL into the file beside the writer.
    checkpoints: SqlitePool,
    path: PathBuf,
}

impl SqliteStore {
    pub async fn open(path: &Path) -> Result<Self, BoxError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .page_size(16_384)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT)
            .pragma("wal_autocheckpoint", "1000")
            .pragma("cache_size", "-16000");
        let writer = SqlitePoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
        let mut connection = writer.acquire().await?;
        for statement in SCHEMA {
            sqlx::query(statement).execute(&mut *connection).await?;
        }
        drop(connection);
        let checkpoints = SqlitePoolOptions::new().max_connections(1);
        let checkpoints = checkpoints.connect_lazy_with(options.clone().busy_timeout(WAL_RESET_TIMEOUT));
        let readers = SqlitePoolOptions::new().max_connections(READERS).connect_with(options.read_only(true)).await?;
        Ok(Self { readers, writer, checkpoints, path: path.to_owned() })
    }

    pub async fn close(&self) {
        self.readers.close().await;
        self.checkpoints.close().await;
        self.writer.close().await;
    }

    pub async fn write(
        &self,
        what: &Transaction,
        at: Timestamp,
    ) -> Result<Vec<((Topic, Partition), Offset)>, BoxError> {
        let mut connection = self.writer.acquire().await?;
        let mut transaction = connection.begin_with("begin immediate").await?;
        let mut ends = Vec::with_capacity(what.batches.len());
        for ((topic, partition), records) in &what.batches {
            let end = append(&mut transaction, topic, *partition, records, at).await?;
            ends.push(((topic.clone(), *partition), end));
        }
        for position in &what.positions {
            put_position(&mut transaction, position).await?;
        }
        for (session, number) in &what.commits {
            sqlx::query(
                "insert into commits values (?, ?) on conflict (session) do update set number = excluded.number",
            )
            .bind(session)
            .bind(*number as i64)
            .execute(&mut *transaction)
            .await?;
        }
        transaction.commit().await?;
        Ok(ends)
    }

    pub async fn last_commit(&self, session: &str) -> Result<Option<u64>, BoxError> {
        let row = sqlx::query("select number from commits where session = ?")
            .bind(session)
            .fetch_optional(&self.readers)
            .await?;
        Ok(row.map(|row| row.get::<i64, _>(0) as u64))
    }

    pub async fn read(
        &self,
        topic: &Topic,
        partition: Partition,
        from: Offset,
        limit: Limit,
    ) -> Result<Vec<Record>, BoxError> {
        self.read_rows(topic, partition, from, limit).await.map_err(|error| self.judged(error))
    }

    async fn read_rows(
        &self,
        topic: &Topic,
        partition: Partition,
        from: Offset,
        limit: Limit,
    ) -> Result<Vec<Record>, BoxError> {
        let mut connection = self.readers.acquire().await?;
        // One snapshot: compaction may put the records of several rows into one between two statements.
        let mut connection = connection.begin().await?;
        let (id, _) = partition_row(&mut connection, topic, partition).await?;
        let low = batch_id(id, Offset::START);
        let high = batch_id(id + 1, Offset::START);
        let wanted = batch_id(id, from).min(high);
        // The batch that holds `from` may begin before it.
        let start = sqlx::query("select id from batches where id >= ? and id <= ? order by id desc limit 1")
            .bind(low)
            .bind(wanted)
            .fetch_optional(&mut *connection)
            .await?
            .map_or(wanted, |row| row.get::<i64, _>(0));
        // Whoever wants one record gets one row.
        let page = if limit.records <= 1 { 1 } else { (limit.bytes / BATCH_BYTES).clamp(1, PAGE_ROWS) };
        let mut records = Vec::new();
        let mut bytes = 0;
        let mut next = start;
        while records.len() < limit.records && bytes < limit.bytes {
            let rows =
                sqlx::query("select id, body, last_offset from batches where id >= ? and id < ? order by id limit ?")
                    .bind(next)
                    .bind(high)
                    .bind(page as i64)
                    .fetch_all(&mut *connection)
                    .await?;
            let Some(last) = rows.last() else { break };
            next = last.get::<i64, _>(0) + 1;
            for row in rows {
                let (first, last) = (offset(row.get::<i64, _>(0) - low), offset(row.get(2)));
                let Some(batch) = frame::decode(row.get(1), partition, first) else {
                    // What was asked for may lie behind it.
                    if last >= from {
                        passed_over(topic, partition, first, last);
                    }
                    continue;
                };
                for record in batch {
                    if record.offset >= from && records.len() < limit.records && bytes < limit.bytes {
                        bytes += record.weight();
                        records.push(record);
                    }
                }
            }
        }
        Ok(records)
    }

    /// Marks errors that no repetition will mend.
    fn judged(&self, error: BoxError) -> BoxError {
        let code = error.downcast_ref::<sqlx::Error>().and_then(|error| match error {
            sqlx::Error::Database(error) => error.code()?.parse::<u32>().ok(),
            _ => None,
        });
        match code.map(|code| code & 0xFF) {
            Some(11 | 26) => DamagedFile { path: self.path.clone(), error }.into(),
            _ => error,
        }
    }

    pub async fn bounds(&self, topic: &Topic, partition: Partition) -> Result<Watermarks, BoxError> {
        let mut connection = self.readers.acquire().await?;
        let (id, end) = partition_row(&mut connection, topic, partition).await?;
        let low = batch_id(id, Offset::START);
        let first = sqlx::query("select min(id) from batches where id >= ? and id < ?")
            .bind(low)
            .bind(batch_id(id + 1, Offset::START))
            .fetch_one(&mut *connection)
            .await?
            .get::<Option<i64>, _>(0);
        let start = first.map_or(end, |first| Offset::new(u128::from((first - low) as u64)));
        Ok(Watermarks { start, stable: end, end })
    }

    pub async fn ends(&self) -> Result<Vec<((Topic, Partition), Offset)>, BoxError> {
        let rows = sqlx::query("select topic, number, next_offset from partitions").fetch_all(&self.readers).await?;
        Ok(rows
            .iter()
            .map(|row| ((Topic::new(row.get::<String, _>(0)), Partition(row.get::<u32, _>(1))), offset(row.get(2))))
            .collect())
    }

    pub async fn committed(&self, group: &str, topic: &Topic) -> Result<BTreeMap<Partition, Committed>, BoxError> {
        let rows = sqlx::query("select number, next_offset, metadata from positions where group_id = ? and topic = ?")
            .bind(group)
            .bind(topic.as_str())
            .fetch_all(&self.readers)
            .await?;
        let row = |row: &sqlx::sqlite::SqliteRow| {
            (Partition(row.get::<u32, _>(0)), Committed { offset: offset(row.get(1)), metadata: row.get(2) })
        };
        Ok(rows.iter().map(row).collect())
    }

    pub async fn offset_at(&self, topic: &Topic, partition: Partition, at: Timestamp) -> Result<Offset, BoxError> {
        let mut connection = self.readers.acquire().await?;
        let (id, end) = partition_row(&mut connection, topic, partition).await?;
        let row = sqlx::query("select id, body from batches where id >= ? and id < ? and at >= ? order by id limit 1")
            .bind(batch_id(id, Offset::START))
            .bind(batch_id(id + 1, Offset::START))
            .bind(at.micros())
            .fetch_optional(&mut *connection)
            .await?;
        let Some(row) = row else { return Ok(end) };
        let first = offset(row.get::<i64, _>(0) - batch_id(id, Offset::START));
        let records = frame::decode(row.get(1), partition, first).unwrap_or_default();
        Ok(records.iter().find(|record| record.timestamp >= at).map_or(first, |record| record.offset))
    }

    pub async fn topics(&self) -> Result<Vec<StoredTopic>, BoxError> {
        let rows =
            sqlx::query("select name, partitions, config from topics order by name").fetch_all(&self.readers).await?;
        rows.iter()
            .map(|row| {
                let config = serde_json::from_str(&row.get::<String, _>(2))?;
                Ok(StoredTopic { topic: Topic::new(row.get::<String, _>(0)), partitions: row.get(1), config })
            })
            .collect()
    }

    pub async fn create(&self, topic: &TopicSpec) -> Result<(), BoxError> {
        let mut connection = self.writer.acquire().await?;
        let mut transaction = connection.begin_with("begin immediate").await?;
        let added = sqlx::query("insert or ignore into topics values (?, ?, ?)")
            .bind(&topic.name)
            .bind(topic.partitions)
            .bind(serde_json::to_string(&topic.config)?)
            .execute(&mut *transaction)
            .await?;
        if added.rows_affected() > 0 {
            for number in 0..topic.partitions {
                sqlx::query("insert into partitions (topic, number, next_offset) values (?, ?, 0)")
                    .bind(&topic.name)
                    .bind(number)
                    .execute(&mut *transaction)
                    .await?;
            }
        }
        transaction.commit().await?;
        Ok(())
    }

    pub async fn id(&self) -> Result<String, BoxError> {
        Ok(sqlx::query("select id from log").fetch_one(&self.readers).await?.get(0))
    }

    pub async fn configure(&self, topic: &Topic, config: &BTreeMap<String, String>) -> Result<(), BoxError> {
        sqlx::query("update topics set config = json_patch(config, ?) where name = ?")
            .bind(serde_json::to_string(config)?)
            .bind(topic.as_str())
            .execute(&self.writer)
            .await?;
        Ok(())
    }
}

/// Reports a batch that cannot be decoded.
fn passed_over(topic: &Topic, partition: Partition, first: Offset, last: Offset) {
    metrics().log_damaged.with_label_values(&[topic.as_str()]).inc();
    if let Some(left_out) = seldom::due("a damaged batch", &format!("{topic}/{partition}/{first}")) {
        tracing::error!(
            %topic, partition = partition.0, %first, %last, left_out,
            "a batch of the embedded log is damaged, its records are lost and are passed over; it stays in the file"
        );
    }
}

async fn append(
    connection: &mut SqliteConnection,
    topic: &Topic,
    partition: Partition,
    records: &[Addressed],
    at: Timestamp,
) -> Result<Offset, BoxError> {
    let row = sqlx::query(
        "update partitions set next_offset = next_offset + ? where topic = ? and number = ? returning id, next_offset",
    )
    .bind(records.len() as i64)
    .bind(topic.as_str())
    .bind(partition.0)
    .fetch_optional(&mut *connection)
    .await?
    .ok_or_else(|| NoSuchPartition { topic: topic.clone(), partition })?;
    let (id, end): (i64, i64) = (row.get(0), row.get(1));
    let mut first = end - records.len() as i64;
    let mut rest = records;
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |record: &&Addressed| {
            bytes += record.size();
            bytes <= BATCH_BYTES
        };
        let count = rest.iter().take(BATCH_RECORDS).take_while(fits).count().max(1);
        let (chunk, more) = rest.split_at(count);
        let last = first + count as i64 - 1;
        insert_batch(connection, batch_id(id, offset(first)), offset(last), at, frame::encode(chunk, at)).await?;
        first = last + 1;
        rest = more;
    }
    Ok(offset(end))
}

async fn insert_batch(
    connection: &mut SqliteConnection,
    id: i64,
    last: Offset,
    at: Timestamp,
    body: Vec<u8>,
) -> Result<(), BoxError> {
    sqlx::query("insert into batches values (?, ?, ?, ?, ?)")
        .bind(id)
        .bind(last.raw() as i64)
        .bind(at.micros())
        .bind(body.len() as i64)
        .bind(body)
        .execute(connection)
        .await?;
    Ok(())
}

async fn put_position(connection: &mut SqliteConnection, position: &Position) -> Result<(), BoxError> {
    sqlx::query(
        "insert into positions values (?, ?, ?, ?, ?) on conflict (group_id, topic, number)
         do update set next_offset = excluded.next_offset, metadata = excluded.metadata",
    )
    .bind(&position.group)
    .bind(position.topic.as_str())
    .bind(position.partition.0)
    .bind(position.committed.offset.raw() as i64)
    .bind(&position.committed.metadata)
    .execute(connection)
    .await?;
    Ok(())
}

async fn partition_row(
    connection: &mut SqliteConnection,
    topic: &Topic,
    partition: Partition,
) -> Result<(i64, Offset), BoxError> {
    let row = sqlx::query("select id, next_offset from partitions where topic = ? and number = ?")
        .bind(topic.as_str())
        .bind(partition.0)
        .fetch_optional(connection)
        .await?
        .ok_or_else(|| NoSuchPartition { topic: topic.clone(), partition })?;
    Ok((row.get(0), offset(row.get(1))))
}

fn batch_id(partition: i64, offset: Offset) -> i64 {
    let capped = offset.raw().min((1 << OFFSET_BITS) - 1) as i64;
    (partition << OFFSET_BITS) | capped
}

fn offset(raw: i64) -> Offset {
    Offset::new(raw.max(0) as u128)
}

#[cfg(test)]
mod tests;
