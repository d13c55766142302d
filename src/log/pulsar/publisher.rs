//! Writing: a producer for each partition, since which partition a record goes to is ours to say.
//!
//! The client goes on with its next batch when one has failed, which would turn records around. So one batch of a partition is under way
//! at a time, and nothing follows one that failed. Calls that come meanwhile wait, and go out together in the next.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::try_join_all;
use pulsar::message::proto::MessageIdData;
use pulsar::{Producer, TokioExecutor};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use crate::log::{LogError, Publisher};
use crate::model::record::{Addressed, Partition, Topic};

use super::config::{BATCH, Client, apart, batching};
use super::convert;

#[derive(Clone)]
pub struct PulsarPublisher(Arc<Shared>);

struct Shared {
    client: Arc<Client>,
    slots: Mutex<HashMap<(Topic, Partition), Arc<Slot>>>,
}

#[derive(Default)]
struct Slot {
    waiting: Mutex<Vec<Call>>,
    /// A producer while there is one that works.
    producer: tokio::sync::Mutex<Option<Producer<TokioExecutor>>>,
}

/// The records of a call for one partition.
struct Call {
    records: Vec<Addressed>,
    done: oneshot::Sender<Result<(), LogError>>,
}

impl PulsarPublisher {
    pub(super) fn new(client: Arc<Client>) -> Self {
        Self(Arc::new(Shared { client, slots: Mutex::default() }))
    }

    fn slot(&self, place: &(Topic, Partition)) -> Arc<Slot> {
        let mut slots = self.0.slots.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(slots.entry(place.clone()).or_default())
    }

    async fn to(&self, place: (Topic, Partition), records: Vec<Addressed>) -> Result<(), LogError> {
        let slot = self.slot(&place);
        let waiting = || slot.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let (done, mut answer) = oneshot::channel();
        waiting().push(Call { records, done });
        let mut kept = slot.producer.lock().await;
        match answer.try_recv() {
            // It went out with another call's.
            Ok(answer) => return answer,
            Err(TryRecvError::Closed) => return Err(LogError::transient("the call that sent it was given up")),
            Err(TryRecvError::Empty) => {}
        }
        let calls = std::mem::take(&mut *waiting());
        // Not kept while it is in use: whoever gives up in the middle leaves nothing in it.
        let producer = kept.take();
        let all: Vec<&Addressed> = calls.iter().flat_map(|call| &call.records).collect();
        let sent = self.send(&place, producer, &all).await;
        let result = sent.map(|producer| *kept = Some(producer));
        for call in calls {
            // Who has given up does not listen.
            let _ = call.done.send(result.as_ref().copied().map_err(copy));
        }
        result
    }

    /// With a new producer where there is none. It comes back where it can be used again.
    async fn send(
        &self,
        place: &(Topic, Partition),
        producer: Option<Producer<TokioExecutor>>,
        records: &[&Addressed],
    ) -> Result<Producer<TokioExecutor>, LogError> {
        let mut producer = match producer {
            Some(producer) => producer,
            None => open(&self.0.client, place).await?,
        };
        write(&mut producer, records).await?;
        Ok(producer)
    }
}

/// The same for another call.
fn copy(error: &LogError) -> LogError {
    let text = error.to_string();
    match error {
        LogError::Transient(_) => LogError::transient(text),
        LogError::Broken(_) => LogError::broken(text),
        LogError::Fenced(_) => LogError::fenced(text),
        LogError::Fatal(_) => LogError::fatal(text),
    }
}

async fn open(client: &Client, (topic, partition): &(Topic, Partition)) -> Result<Producer<TokioExecutor>, LogError> {
    exists(client, topic, *partition).await?;
    let name = client.config.partition(topic, *partition);
    let builder = client.get().await?.producer().with_topic(name).with_options(batching());
    apart(builder.build()).await?.map_err(convert::error)
}

/// Refuses a partition that is not there: many a broker would make a topic of its name.
pub(super) async fn exists(client: &Client, topic: &Topic, partition: Partition) -> Result<(), LogError> {
    let count = partitions(client, topic).await?;
    if partition.0 < count {
        return Ok(());
    }
    let name = client.config.name(topic);
    Err(LogError::transient(match count {
        0 => format!("there is no partitioned topic {name}"),
        _ => format!("topic {name} has {count} partitions, no {partition}"),
    }))
}

/// How many it has; zero where there is no such partitioned topic.
pub(super) async fn partitions(client: &Client, topic: &Topic) -> Result<u32, LogError> {
    let (tenant, namespace) = (&client.config.tenant, &client.config.namespace);
    let name = format!("persistent://{tenant}/{namespace}/{}", client.config.name(topic));
    let pulsar = client.get().await?.clone();
    let found = apart(async move { pulsar.lookup_partitioned_topic_number(name).await });
    match found.await? {
        Ok(count) => Ok(count),
        Err(error) if convert::is_unknown(&error) => Ok(0),
        Err(error) => Err(convert::error(error)),
    }
}

/// Writes records in their order, a batch after the other. The place of the last. After an error the producer is of no use: what it still
/// has may go out yet.
pub(super) async fn write(
    producer: &mut Producer<TokioExecutor>,
    records: &[&Addressed],
) -> Result<Option<MessageIdData>, LogError> {
    let (mut rest, mut last) = (records, None);
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |record: &&&Addressed| {
            bytes += record.size();
            bytes <= BATCH.1
        };
        let count = rest.iter().take(BATCH.0).take_while(fits).count().max(1);
        let (batch, more) = rest.split_at(count);
        let mut receipts = Vec::with_capacity(count);
        for record in batch {
            receipts.push(producer.send_non_blocking(convert::message(record)).await.map_err(convert::error)?);
        }
        producer.send_batch().await.map_err(convert::error)?;
        for receipt in receipts {
            last = receipt.await.map_err(convert::error)?.message_id;
        }
        rest = more;
    }
    Ok(last)
}

impl Publisher for PulsarPublisher {
    async fn publish(&self, records: Vec<Addressed>) -> Result<(), LogError> {
        let mut places: Vec<((Topic, Partition), Vec<Addressed>)> = Vec::new();
        for record in records {
            let place = places
                .iter_mut()
                .find(|((topic, partition), _)| *partition == record.partition && *topic == record.topic);
            match place {
                Some((_, all)) => all.push(record),
                None => places.push(((record.topic.clone(), record.partition), vec![record])),
            }
        }
        try_join_all(places.into_iter().map(|(place, records)| self.to(place, records))).await.map(drop)
    }
}
