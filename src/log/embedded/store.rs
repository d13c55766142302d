//! What holds the bytes beneath the embedded log: a SQLite file or memory. Both do the same things.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use bytes::Bytes;

use crate::clock::Timestamp;
use crate::log::topic::TopicSpec;
use crate::log::{BoxError, Committed, Limit, LogError, Watermarks};
use crate::model::record::{Addressed, Offset, Partition, Record, Topic};

use super::memory::MemoryStore;
use super::sqlite::SqliteStore;

#[derive(Clone)]
pub enum Store {
    Sqlite(SqliteStore),
    Memory(MemoryStore),
}

/// Records of one partition, in order.
pub type Batch = ((Topic, Partition), Vec<Addressed>);

/// A position that a group commits.
#[derive(Clone, Debug)]
pub struct Position {
    pub group: String,
    pub topic: Topic,
    pub partition: Partition,
    pub committed: Committed,
}

/// A topic, with what is set on it.
#[derive(Clone, Debug)]
pub struct StoredTopic {
    pub topic: Topic,
    pub partitions: u32,
    pub config: BTreeMap<String, String>,
}

/// Everything that one transaction writes.
#[derive(Default)]
pub struct Transaction {
    pub batches: Vec<Batch>,
    pub positions: Vec<Position>,
    /// Which commit of which session this holds: what a doubt is settled with.
    pub commits: Vec<(String, u64)>,
}

/// A request names a topic or partition that is not there.
#[derive(Debug, thiserror::Error)]
#[error("there is no topic {topic} with a partition {partition}; `laneway topics apply` creates the topics")]
pub struct NoSuchPartition {
    pub topic: Topic,
    pub partition: Partition,
}

/// The file beneath the log is damaged.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path} is damaged ({error}): stop the engine, copy the folder, and recover what can be read (`sqlite3 log.sqlite .recover`), or begin with an empty folder (log.embedded.data_dir)",
    path = path.display()
)]
pub struct DamagedFile {
    pub path: PathBuf,
    pub error: BoxError,
}

/// What the caller of the log does about an error of the store.
pub fn read_error(error: BoxError) -> LogError {
    match error.is::<DamagedFile>() {
        true => LogError::fatal(error),
        false => LogError::transient(error),
    }
}

/// What is free for the log, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub disk: u64,
    /// In the file: what was deleted is written again.
    pub file: u64,
}

/// The log takes no more events below this. What is left is for commits of what it has, for the WAL, whose content moves into the
/// file, and for deleting, which writes too: a disk that is full to the last byte could not be relieved.
const MIN_FREE_BYTES: u64 = 160 << 20;
/// Of it on the disk itself: the WAL grows there before its content moves.
const MIN_DISK_BYTES: u64 = 80 << 20;

impl Space {
    /// Whether new events are to be refused.
    pub fn is_short(self) -> bool {
        self.disk < MIN_DISK_BYTES || self.disk.saturating_add(self.file) < MIN_FREE_BYTES
    }
}

macro_rules! either {
    ($store:expr, $inner:ident => $call:expr) => {
        match $store {
            Store::Sqlite($inner) => $call.await,
            Store::Memory($inner) => $call.await,
        }
    };
}

impl Store {
    /// Writes all of it or nothing, and tells where the partitions end now.
    pub async fn write(
        &self,
        what: &Transaction,
        at: Timestamp,
    ) -> Result<Vec<((Topic, Partition), Offset)>, BoxError> {
        either!(self, store => store.write(what, at))
    }

    /// The last commit of a session that was written.
    pub async fn last_commit(&self, session: &str) -> Result<Option<u64>, BoxError> {
        either!(self, store => store.last_commit(session))
    }

    /// Records at or above `from`, in order, as many as the limit allows and at least one where there is one.
    pub async fn read(
        &self,
        topic: &Topic,
        partition: Partition,
        from: Offset,
        limit: Limit,
    ) -> Result<Vec<Record>, BoxError> {
        either!(self, store => store.read(topic, partition, from, limit))
    }

    pub async fn bounds(&self, topic: &Topic, partition: Partition) -> Result<Watermarks, BoxError> {
        either!(self, store => store.bounds(topic, partition))
    }

    pub async fn ends(&self) -> Result<Vec<((Topic, Partition), Offset)>, BoxError> {
        either!(self, store => store.ends())
    }

    pub async fn committed(&self, group: &str, topic: &Topic) -> Result<BTreeMap<Partition, Committed>, BoxError> {
        either!(self, store => store.committed(group, topic))
    }

    pub async fn offset_at(&self, topic: &Topic, partition: Partition, at: Timestamp) -> Result<Offset, BoxError> {
        either!(self, store => store.offset_at(topic, partition, at))
    }

    pub async fn topics(&self) -> Result<Vec<StoredTopic>, BoxError> {
        either!(self, store => store.topics())
    }

    pub async fn create(&self, topic: &TopicSpec) -> Result<(), BoxError> {
        either!(self, store => store.create(topic))
    }

    /// What tells this log from every other one.
    pub async fn id(&self) -> Result<String, BoxError> {
        either!(self, store => store.id())
    }

    pub async fn configure(&self, topic: &Topic, config: &BTreeMap<String, String>) -> Result<(), BoxError> {
        either!(self, store => store.configure(topic, config))
    }

    /// Deletes what is past its retention and compacts compacted topics.
    pub async fn maintain(&self, now: Timestamp) -> Result<(), BoxError> {
        either!(self, store => store.maintain(now))
    }

    /// Keeps what was written and is not yet in its place within bounds. False: it could not be done now.
    pub async fn bound_wal(&self) -> Result<bool, BoxError> {
        match self {
            Store::Sqlite(store) => store.bound_wal().await,
            Store::Memory(_) => Ok(true),
        }
    }

    /// None: it has no bound.
    pub async fn space(&self) -> Result<Option<Space>, BoxError> {
        match self {
            Store::Sqlite(store) => store.space().await.map(Some),
            Store::Memory(_) => Ok(None),
        }
    }

    pub async fn close(&self) {
        if let Store::Sqlite(store) = self {
            store.close().await;
        }
    }
}

/// What compaction leaves of a partition: the last record of each key and the records without one, without tombstones written before
/// a horizon.
#[derive(Default)]
pub struct Newest {
    last: HashMap<Bytes, Offset>,
    end: Option<Offset>,
}

impl Newest {
    /// Takes in a record; they come in their order.
    pub fn note(&mut self, record: &Record) {
        self.end = Some(record.offset);
        let Some(key) = &record.key else { return };
        match self.last.get_mut(key) {
            Some(last) => *last = record.offset,
            // A copy: the key would keep its whole batch in memory.
            None => drop(self.last.insert(Bytes::copy_from_slice(key), record.offset)),
        }
    }

    /// Whether a record stays.
    pub fn keeps(&self, record: &Record, horizon: Timestamp) -> bool {
        // The last record stays whatever it is, so that the partition keeps its end.
        if Some(record.offset) == self.end {
            return true;
        }
        let is_newest = record.key.as_ref().is_none_or(|key| self.last.get(key) == Some(&record.offset));
        is_newest && (record.value.is_some() || record.timestamp >= horizon)
    }
}

/// What compaction leaves of these records.
pub fn compacted(mut records: Vec<Record>, horizon: Timestamp) -> Vec<Record> {
    let mut newest = Newest::default();
    records.iter().for_each(|record| newest.note(record));
    records.retain(|record| newest.keeps(record, horizon));
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_refused_while_commits_and_deleting_still_have_room() {
        let is_short = |disk: u64, file: u64| Space { disk: disk << 20, file: file << 20 }.is_short();
        assert_eq!((is_short(1_000, 0), is_short(160, 0), is_short(159, 0)), (false, false, true));
        // What was deleted counts, but the WAL needs the disk.
        assert_eq!((is_short(100, 60), is_short(100, 59), is_short(79, 10_000)), (false, true, true));
    }
}
