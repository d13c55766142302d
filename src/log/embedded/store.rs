//! What holds the bytes beneath the embedded log: a SQLite file or memory. Both do the same things.

use std::collections::BTreeMap;

use crate::clock::Timestamp;
use crate::log::topic::TopicSpec;
use crate::log::{BoxError, Committed, Limit, Watermarks};
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

    pub async fn close(&self) {
        if let Store::Sqlite(store) = self {
            store.close().await;
        }
    }
}

/// The last record of each key and the records without one, without tombstones written before `horizon`: what compaction
/// leaves of a partition.
pub fn compacted(records: Vec<Record>, horizon: Timestamp) -> Vec<Record> {
    let mut last: BTreeMap<bytes::Bytes, Offset> = BTreeMap::new();
    for record in &records {
        if let Some(key) = &record.key {
            last.insert(key.clone(), record.offset);
        }
    }
    let end = records.last().map(|record| record.offset);
    let stays = |record: &Record| {
        // The last record stays whatever it is, so that the partition keeps its end.
        if Some(record.offset) == end {
            return true;
        }
        let newest = record.key.as_ref().is_none_or(|key| last.get(key) == Some(&record.offset));
        newest && (record.value.is_some() || record.timestamp >= horizon)
    };
    records.into_iter().filter(stays).collect()
}
