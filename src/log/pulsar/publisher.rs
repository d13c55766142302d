//! Writing: a producer for each partition, since which partition a record goes to is ours to say.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::try_join_all;
use pulsar::{Producer, TokioExecutor};

use crate::log::{LogError, Publisher};
use crate::model::record::{Addressed, Partition, Topic};

use super::config::{Client, apart, batching};
use super::convert;

#[derive(Clone)]
pub struct PulsarPublisher(Arc<Shared>);

/// A producer while there is one that works. Held while a call hands over its records, so that these stay together.
type Slot = Arc<tokio::sync::Mutex<Option<Producer<TokioExecutor>>>>;

struct Shared {
    client: Arc<Client>,
    slots: Mutex<HashMap<(Topic, Partition), Slot>>,
}

impl PulsarPublisher {
    pub(super) fn new(client: Arc<Client>) -> Self {
        Self(Arc::new(Shared { client, slots: Mutex::default() }))
    }

    fn slot(&self, place: (Topic, Partition)) -> Slot {
        let mut slots = self.0.slots.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(slots.entry(place).or_default())
    }

    async fn to(&self, place: (Topic, Partition), records: Vec<&Addressed>) -> Result<(), LogError> {
        let slot = self.slot(place.clone());
        let receipts = {
            let mut producer = slot.lock().await;
            if producer.is_none() {
                *producer = Some(open(&self.0.client, &place).await?);
            }
            let sent = match producer.as_mut() {
                Some(producer) => send(producer, &records).await,
                None => return Ok(()),
            };
            if sent.is_err() {
                *producer = None;
            }
            sent?
        };
        for receipt in receipts {
            if let Err(error) = receipt.await {
                // What is behind it may be stored. The next call begins with a new one.
                *slot.lock().await = None;
                return Err(convert::error(error));
            }
        }
        Ok(())
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

/// Hands records over in their order; their receipts come.
pub(super) async fn send(
    producer: &mut Producer<TokioExecutor>,
    records: &[&Addressed],
) -> Result<Vec<pulsar::producer::SendFuture>, LogError> {
    let mut receipts = Vec::with_capacity(records.len());
    for record in records {
        receipts.push(producer.send_non_blocking(convert::message(record)).await.map_err(convert::error)?);
    }
    Ok(receipts)
}

impl Publisher for PulsarPublisher {
    async fn publish(&self, records: Vec<Addressed>) -> Result<(), LogError> {
        let mut places: Vec<((Topic, Partition), Vec<&Addressed>)> = Vec::new();
        for record in &records {
            let place = (record.topic.clone(), record.partition);
            match places.iter_mut().find(|(known, _)| *known == place) {
                Some((_, all)) => all.push(record),
                None => places.push((place, vec![record])),
            }
        }
        try_join_all(places.into_iter().map(|(place, records)| self.to(place, records))).await.map(drop)
    }
}
