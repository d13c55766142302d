//! What a group has committed, and who owns a partition: one small topic for each group and input, a partition for each of the
//! input's.
//!
//! The last record of a partition says where the group reads next, with the text that belongs to it. Who holds the only producer there
//! owns the input's partition: the broker lets nobody else write. Each owner counts the term up, so that a record of an owner that was
//! cut off, came back to an empty place after a broker's restart and did not know better, is told from the true ones: its term is lower.

use std::sync::Arc;

use pulsar::{Producer, TokioExecutor};

use crate::log::{Committed, LogError};
use crate::model::record::{Addressed, Headers, Offset, Partition, Record, Topic};

use super::config::{Alone, Client, apart};
use super::internals::Internals;
use super::publisher::{exists, write};
use super::reader::{Feed, From};
use super::rest::Rest;
use super::{convert, floor};

const TERM: &str = "lw-term";
const OFFSET: &str = "lw-offset";
const INSTANCE: &str = "lw-instance";
/// So many of the last records are looked at: those of an owner that does not know that it is none are few.
const LOOK_BACK: u64 = 32;

/// The topic with a group's positions in another.
pub fn topic(group: &str, input: &Topic) -> Topic {
    Topic::new(format!("__{group}.{input}"))
}

/// A group and what it reads.
#[derive(Clone)]
pub struct Place {
    pub client: Arc<Client>,
    pub rest: Rest,
    pub group: String,
    pub input: Topic,
}

/// What stands in a partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    pub term: u64,
    pub committed: Option<Committed>,
}

impl Kept {
    fn of(record: &Record) -> Option<Self> {
        let term = record.headers.text(TERM)?.parse().ok()?;
        let offset = record.headers.text(OFFSET).and_then(Offset::parse);
        let metadata =
            record.value.as_ref().map(|value| String::from_utf8_lossy(value).into_owned()).unwrap_or_default();
        Some(Self { term, committed: offset.map(|offset| Committed { offset, metadata }) })
    }

    fn record(&self, topic: Topic, partition: Partition, instance: &str) -> Addressed {
        let mut headers = Headers::with_capacity(3);
        headers.push_text(TERM, &self.term.to_string());
        headers.push_text(INSTANCE, instance);
        let mut value = String::new();
        if let Some(committed) = &self.committed {
            headers.push_text(OFFSET, &committed.offset.to_string());
            value.clone_from(&committed.metadata);
        }
        Addressed { topic, partition, key: None, value: Some(value.into()), headers }
    }
}

/// A partition that is ours.
pub struct Lock {
    positions: Producer<TokioExecutor>,
    /// To what only a partition's owner writes.
    state: Option<Producer<TokioExecutor>>,
    pub kept: Kept,
    /// Where that stands.
    pub at: Offset,
}

impl Place {
    pub fn topic(&self) -> Topic {
        topic(&self.group, &self.input)
    }

    /// Makes what is not there. A subscription keeps the last position of a partition however long nobody writes; it is moved along, so
    /// that the older ones are deleted.
    pub async fn prepare(&self, partitions: u32) -> Result<(), LogError> {
        let path = self.rest.topic(&self.topic());
        if !self.rest.put(&format!("{path}/partitions"), &partitions).await?
            && super::publisher::partitions(&self.client, &self.topic()).await? < partitions
        {
            self.rest.post(&format!("{path}/partitions"), &partitions).await?;
        }
        self.rest.keep_all(&self.topic()).await?;
        floor::prepare(self, &self.topic()).await
    }

    /// What was committed last, by the last owner.
    pub async fn last(&self, partition: Partition) -> Result<Kept, LogError> {
        let topic = self.topic();
        let path = format!("{}/lastMessageId", self.rest.partition(&topic, partition));
        let last: Option<LastMessage> = self.rest.get(&path).await?;
        let Some(last) = last.filter(|last| last.entry_id >= 0) else { return Ok(Kept::default()) };
        let (ledger, entry) = (last.ledger_id.unsigned_abs(), last.entry_id.unsigned_abs());
        let path = format!("{}/internalStats", self.rest.partition(&topic, partition));
        let internals: Option<Internals> = self.rest.get(&path).await?;
        let from = internals.map_or(Offset::START, |internals| internals.back(ledger, entry, LOOK_BACK));
        let mut feed = Feed::open(&self.client, &topic, partition, From::At(from)).await?;
        let end = feed.last().await?;
        let mut kept = Kept::default();
        while end.is_some_and(|end| feed.position() <= end) {
            let record =
                feed.soon().await?.ok_or_else(|| LogError::transient("a position is there, but does not come"))?;
            if let Some(found) = Kept::of(&record).filter(|found| found.term >= kept.term) {
                kept = found;
            }
        }
        Ok(kept)
    }

    async fn producer(
        &self,
        topic: &Topic,
        partition: Partition,
        alone: Alone,
    ) -> Result<Option<Producer<TokioExecutor>>, LogError> {
        exists(&self.client, topic, partition).await?;
        let name = self.client.config.partition(topic, partition);
        let builder = self.client.get().await?.producer().with_topic(name);
        if alone == Alone::Fencing {
            // Not kept: its client would cut off whoever comes after it when its connection was lost.
            let fencing = apart(builder.clone().with_options(alone.options()).build());
            fencing.await?.map_err(convert::error)?.close().await.map_err(convert::error)?;
        }
        match apart(builder.with_options(Alone::IfFree.options()).build()).await? {
            Ok(producer) => Ok(Some(producer)),
            Err(error) if convert::is_taken(&error) => Ok(None),
            Err(error) => Err(convert::error(error)),
        }
    }

    /// Takes a partition. None: somebody else has it.
    pub async fn acquire(
        &self,
        partition: Partition,
        state: Option<&Topic>,
        alone: Alone,
        instance: &str,
    ) -> Result<Option<Lock>, LogError> {
        let Some(positions) = self.producer(&self.topic(), partition, alone).await? else { return Ok(None) };
        let state = match state {
            Some(topic) => match self.producer(topic, partition, alone).await? {
                Some(producer) => Some(producer),
                None => return Ok(None),
            },
            None => None,
        };
        let mut kept = self.last(partition).await?;
        kept.term += 1;
        let mut lock = Lock { positions, state, kept: kept.clone(), at: Offset::START };
        self.keep(&mut lock, partition, kept, instance).await?;
        Ok(Some(lock))
    }

    /// Writes a position.
    pub async fn keep(
        &self,
        lock: &mut Lock,
        partition: Partition,
        kept: Kept,
        instance: &str,
    ) -> Result<(), LogError> {
        let record = kept.record(self.topic(), partition, instance);
        let at = write(&mut lock.positions, &[&record]).await?;
        lock.at = at.as_ref().map_or(lock.at, convert::offset);
        lock.kept = kept;
        Ok(())
    }
}

impl Lock {
    /// Writes what only the owner writes.
    pub async fn write(&mut self, records: &[&Addressed]) -> Result<(), LogError> {
        let Some(producer) = &mut self.state else { return Ok(()) };
        write(producer, records).await.map(drop)
    }

    /// Lets go of it, so that the next owner need not wait.
    pub async fn close(mut self) {
        // Whoever comes next finds it free a little later.
        let _ = self.positions.close().await;
        if let Some(state) = &mut self.state {
            let _ = state.close().await;
        }
    }
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastMessage {
    pub ledger_id: i64,
    pub entry_id: i64,
    pub batch_index: Option<i64>,
}
