//! Keeps the file small while others write: every step holds the writing connection for one small transaction, and commits of others
//! come between two steps. What is to be done is found on the reading connections.

use sqlx::Row;

use crate::clock::Timestamp;
use crate::log::BoxError;
use crate::model::record::{Offset, Partition, Record, Topic};

use super::super::frame;
use super::super::store::{Newest, Space, StoredTopic};
use super::{
    BATCH_BYTES, BATCH_RECORDS, READERS, SqliteStore, batch_id, insert_batch, offset, partition_row, passed_over,
};

/// A compacted partition is rewritten when it has gained this many rows, and as many as were left the last time: so what is
/// rewritten stays in proportion to what is new.
const COMPACT_ROWS: i64 = 200;
/// Rows that one transaction deletes or replaces, at most. A row is up to 256 KiB, or one record.
const SLICE_ROWS: usize = 64;
/// Bytes that one transaction replaces, at most, beside its last row.
const SLICE_BYTES: usize = 1 << 20;
/// Above this the WAL is reset. Beside continuous readers SQLite never does it by itself.
const WAL_BYTES: u64 = 64 << 20;
/// The rows of one partition.
#[derive(Clone, Copy)]
struct Range {
    id: i64,
    low: i64,
    high: i64,
}

/// One row.
struct Batch {
    row: i64,
    /// None: they cannot be decoded.
    records: Option<Vec<Record>>,
}

impl SqliteStore {
    /// Expires and compacts. What fails for one partition keeps no other from its turn.
    ///
    /// # Errors
    /// The first one.
    pub async fn maintain(&self, now: Timestamp) -> Result<(), BoxError> {
        let mut failed = None;
        for info in self.topics().await? {
            for number in 0..info.partitions {
                if let Err(error) = self.maintain_partition(&info, Partition(number), now).await {
                    failed.get_or_insert_with(|| format!("{}/{number}: {error}", info.topic).into());
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn maintain_partition(&self, info: &StoredTopic, number: Partition, now: Timestamp) -> Result<(), BoxError> {
        let setting = |name: &str| info.config.get(name).and_then(|text| text.parse::<i64>().ok());
        if info.config.get("cleanup.policy").is_some_and(|policy| policy.contains("compact")) {
            let keep = setting("delete.retention.ms").unwrap_or(900_000);
            return self.compact(&info.topic, number, Timestamp::from_millis(now.millis() - keep)).await;
        }
        match setting("retention.ms").filter(|keep| *keep >= 0) {
            Some(keep) => self.expire(&info.topic, number, Timestamp::from_millis(now.millis() - keep)).await,
            None => Ok(()),
        }
    }

    async fn range(&self, topic: &Topic, partition: Partition) -> Result<Range, BoxError> {
        let (id, _) = partition_row(&mut *self.readers.acquire().await?, topic, partition).await?;
        Ok(Range { id, low: batch_id(id, Offset::START), high: batch_id(id + 1, Offset::START) })
    }

    /// Deletes rows from the partition's beginning on, up to the first that is young enough. A younger row before it keeps an older
    /// one, as in a segment of a broker.
    async fn expire(&self, topic: &Topic, partition: Partition, horizon: Timestamp) -> Result<(), BoxError> {
        let range = self.range(topic, partition).await?;
        loop {
            let rows = sqlx::query("select id, at from batches where id >= ? and id < ? order by id limit ?")
                .bind(range.low)
                .bind(range.high)
                .bind(SLICE_ROWS as i64)
                .fetch_all(&self.readers)
                .await?;
            let expired = rows.iter().take_while(|row| row.get::<i64, _>(1) < horizon.micros());
            let Some(last) = expired.map(|row| row.get::<i64, _>(0)).last() else { return Ok(()) };
            sqlx::query("delete from batches where id >= ? and id <= ?")
                .bind(range.low)
                .bind(last)
                .execute(&self.writer)
                .await?;
        }
    }

    /// Leaves the last record of each key. Slices go from the oldest rows to the newest, so a reader between two of them sees every key's
    /// last value, and a tombstone goes after what it deletes.
    async fn compact(&self, topic: &Topic, partition: Partition, horizon: Timestamp) -> Result<(), BoxError> {
        let range = self.range(topic, partition).await?;
        if !self.is_worth_compacting(range).await? {
            return Ok(());
        }
        let (mut newest, mut end, mut next) = (Newest::default(), range.low, range.low);
        while let Some(batch) = self.next_batch(range, &mut next, topic, partition).await? {
            batch.records.iter().flatten().for_each(|record| newest.note(record));
            end = batch.row;
        }
        // What came since then is none of the first reading's.
        let range = Range { high: end + 1, ..range };
        let (mut slice, mut kept_rows, mut next) = (Slice::default(), 0, range.low);
        while let Some(Batch { row, records }) = self.next_batch(range, &mut next, topic, partition).await? {
            let Some(records) = records else {
                // It stays where it is, and no new row may reach over it: a reader looks for the row before its offset.
                kept_rows += 1 + self.replace(range, std::mem::take(&mut slice)).await?;
                continue;
            };
            slice.all += records.len();
            slice.rows.push(row);
            for record in records.into_iter().filter(|record| newest.keeps(record, horizon)) {
                slice.bytes += record.weight();
                slice.kept.push(record);
            }
            if slice.bytes >= SLICE_BYTES || slice.rows.len() >= SLICE_ROWS {
                kept_rows += self.replace(range, std::mem::take(&mut slice)).await?;
            }
        }
        kept_rows += self.replace(range, slice).await?;
        sqlx::query("update partitions set compacted_rows = ? where id = ?")
            .bind(kept_rows as i64)
            .bind(range.id)
            .execute(&self.writer)
            .await?;
        Ok(())
    }

    /// Counts rows without reading them, no more of them than it takes to decide.
    async fn is_worth_compacting(&self, range: Range) -> Result<bool, BoxError> {
        let before: i64 = sqlx::query("select compacted_rows from partitions where id = ?")
            .bind(range.id)
            .fetch_one(&self.readers)
            .await?
            .get(0);
        let enough = before + before.max(COMPACT_ROWS);
        let count: i64 = sqlx::query("select count(*) from (select 1 from batches where id >= ? and id < ? limit ?)")
            .bind(range.low)
            .bind(range.high)
            .bind(enough)
            .fetch_one(&self.readers)
            .await?
            .get(0);
        Ok(count >= enough)
    }

    /// Reads the first row at or above `next`, and moves that on. One that cannot be decoded is left as it is.
    async fn next_batch(
        &self,
        range: Range,
        next: &mut i64,
        topic: &Topic,
        partition: Partition,
    ) -> Result<Option<Batch>, BoxError> {
        let row = sqlx::query("select id, body, last_offset from batches where id >= ? and id < ? order by id limit 1")
            .bind(*next)
            .bind(range.high)
            .fetch_optional(&self.readers)
            .await?;
        let Some(row) = row else { return Ok(None) };
        let (id, last) = (row.get::<i64, _>(0), row.get::<i64, _>(2));
        *next = (range.low + last).max(id) + 1;
        let first = offset(id - range.low);
        let records = frame::decode(row.get(1), partition, first);
        if records.is_none() {
            passed_over(topic, partition, first, offset(last));
        }
        Ok(Some(Batch { row: id, records }))
    }

    /// Puts what is kept of some rows in their place. How many rows there are then.
    async fn replace(&self, range: Range, slice: Slice) -> Result<usize, BoxError> {
        let packs = packed(&slice.kept);
        if slice.kept.len() == slice.all && packs.len() >= slice.rows.len() {
            return Ok(slice.rows.len());
        }
        let mut connection = self.writer.acquire().await?;
        let mut transaction = sqlx::Connection::begin_with(&mut *connection, "begin immediate").await?;
        for row in &slice.rows {
            sqlx::query("delete from batches where id = ?").bind(row).execute(&mut *transaction).await?;
        }
        for pack in &packs {
            let (first, last) = (pack[0].offset, &pack[pack.len() - 1]);
            let body = frame::encode_sparse(pack, first);
            insert_batch(&mut transaction, batch_id(range.id, first), last.offset, last.timestamp, body).await?;
        }
        transaction.commit().await?;
        Ok(packs.len())
    }

    /// Resets the WAL where it has grown beyond its bound. False: somebody else's reading kept it from it.
    ///
    /// # Errors
    /// Where the file cannot be read or written.
    pub async fn bound_wal(&self) -> Result<bool, BoxError> {
        let mut wal = self.path.clone().into_os_string();
        wal.push("-wal");
        if std::fs::metadata(&wal).map_or(0, |found| found.len()) < WAL_BYTES {
            return Ok(true);
        }
        self.reset_wal().await
    }

    pub(super) async fn reset_wal(&self) -> Result<bool, BoxError> {
        // Most of the work, while others read and write.
        sqlx::query("pragma wal_checkpoint(passive)").fetch_one(&self.checkpoints).await?;
        // The readers of this process pause: each has its connection for one short read.
        let mut readers = Vec::new();
        for _ in 0..READERS {
            readers.push(self.readers.acquire().await?);
        }
        let reset = sqlx::query("pragma wal_checkpoint(truncate)").fetch_one(&self.checkpoints).await?;
        Ok(reset.get::<i64, _>(0) == 0)
    }

    /// What is free for the log: on the disk, and in the file.
    ///
    /// # Errors
    /// Where the file system or the file cannot be asked.
    pub async fn space(&self) -> Result<Space, BoxError> {
        let disk = rustix::fs::statvfs(&self.path)?;
        let row = sqlx::query("select freelist_count * page_size from pragma_freelist_count(), pragma_page_size()");
        let file: i64 = row.fetch_one(&self.readers).await?.get(0);
        Ok(Space { disk: disk.f_bavail * disk.f_frsize, file: file.max(0).unsigned_abs() })
    }
}

/// Rows that one transaction replaces.
#[derive(Default)]
struct Slice {
    rows: Vec<i64>,
    /// Records that were in them.
    all: usize,
    kept: Vec<Record>,
    bytes: usize,
}

/// Records as they are put into rows.
fn packed(records: &[Record]) -> Vec<&[Record]> {
    let mut packs = Vec::new();
    let mut rest = records;
    while let Some(first) = rest.first() {
        let mut bytes = 0;
        let fits = |record: &&Record| {
            bytes += record.weight();
            bytes <= BATCH_BYTES && record.offset.raw() - first.offset.raw() < 1_000_000
        };
        let count = rest.iter().take(BATCH_RECORDS).take_while(fits).count().max(1);
        let (pack, more) = rest.split_at(count);
        packs.push(pack);
        rest = more;
    }
    packs
}
