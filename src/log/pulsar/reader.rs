//! Reading a partition from any place, without a durable subscription.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use pulsar::consumer::{ConsumerOptions, InitialPosition};
use pulsar::{Consumer, SubType, TokioExecutor};

use crate::log::{Limit, LogError, Read, Reader};
use crate::model::record::{Offset, Partition, Record, Topic};

use super::config::{CALL, Client, apart};
use super::convert;
use super::publisher::exists;

/// A read at the end waits so long for more.
const WAIT: Duration = Duration::from_millis(50);
/// What is there comes within so long.
const SOON: Duration = Duration::from_secs(3);
/// While there is more it waits again, so often.
const LOOKS: usize = 40;
/// So many messages come ahead of the reading.
const AHEAD: u32 = 500;

/// Where reading begins.
#[derive(Clone, Copy, Debug)]
pub enum From {
    At(Offset),
    /// Behind what is there now.
    Latest,
}

/// A partition's records, one after the other.
pub struct Feed {
    consumer: Consumer<Vec<u8>, TokioExecutor>,
    partition: Partition,
    /// What lies before it is passed over: a batch comes as a whole, and all of it again when a connection was lost.
    next: Offset,
}

impl Feed {
    pub async fn open(client: &Client, topic: &Topic, partition: Partition, from: From) -> Result<Self, LogError> {
        exists(client, topic, partition).await?;
        // Of a compacted topic the broker may have deleted what is not in the compacted form any more.
        let mut options =
            ConsumerOptions::default().durable(false).read_compacted(true).with_receiver_queue_size(AHEAD);
        let next = match from {
            From::At(at) => {
                options.start_message_id = Some(convert::entry(at));
                options = options.with_initial_position(InitialPosition::Earliest);
                at
            }
            From::Latest => Offset::START,
        };
        let builder = client
            .get()
            .await?
            .consumer()
            .with_topic(client.config.partition(topic, partition))
            .with_subscription(format!("{}laneway.reader-{}", client.config.prefix, uuid::Uuid::new_v4().simple()))
            .with_subscription_type(SubType::Exclusive)
            .with_batch_size(AHEAD)
            .with_options(options);
        let consumer = apart(builder.build()).await?.map_err(convert::error)?;
        Ok(Self { consumer, partition, next })
    }

    /// The next record. After an error it has to be opened again, where it stands.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Record, LogError>> {
        loop {
            let message = match Pin::new(&mut self.consumer).poll_next(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => {
                    return Poll::Ready(Err(LogError::transient("the connection to the broker is lost")));
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(convert::error(error))),
                Poll::Ready(Some(Ok(message))) => message,
            };
            let (id, payload) = (&message.message_id.id, message.payload);
            if convert::is_compacted_out(id, &payload) {
                continue;
            }
            let record = convert::record(self.partition, id, &payload.metadata, payload.data);
            if record.offset.entry().map(|(ledger, entry, _)| (ledger, entry))
                < self.next.entry().map(|(ledger, entry, _)| (ledger, entry))
            {
                // A connection that was lost begins again where the first one did, however long ago that was.
                return Poll::Ready(Err(LogError::transient("reading has begun again from where it was opened")));
            }
            if record.offset >= self.next {
                self.next = record.offset.just_after();
                return Poll::Ready(Ok(record));
            }
        }
    }

    pub async fn next(&mut self) -> Result<Record, LogError> {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    /// The last record that there is.
    pub async fn last(&mut self) -> Result<Option<Offset>, LogError> {
        // The client asks itself first, and does not answer while it has much to hand over.
        let asked = tokio::time::timeout(CALL, self.consumer.get_last_message_id()).await;
        let last = asked.map_err(LogError::transient)?.map_err(convert::error)?;
        Ok(last.first().filter(|id| i64::try_from(id.entry_id).is_ok()).map(convert::offset))
    }

    /// The next record, where one comes soon.
    pub async fn soon(&mut self) -> Result<Option<Record>, LogError> {
        match tokio::time::timeout(SOON, self.next()).await {
            Ok(record) => record.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Where it reads next.
    pub fn position(&self) -> Offset {
        self.next
    }
}

/// The next record. None: there is none yet.
async fn first(feed: &mut Feed, next: Offset) -> Result<Option<Record>, LogError> {
    for _ in 0..LOOKS {
        if let Ok(record) = tokio::time::timeout(WAIT, feed.next()).await {
            return record.map(Some);
        }
        if feed.last().await?.is_none_or(|last| last < next) {
            return Ok(None);
        }
    }
    Err(LogError::transient("records are there, but do not come"))
}

pub struct PulsarReader {
    client: Arc<Client>,
    topic: Topic,
    partition: Partition,
    feed: Option<Feed>,
    next: Offset,
}

impl PulsarReader {
    pub(super) async fn open(
        client: Arc<Client>,
        topic: &Topic,
        partition: Partition,
        from: Offset,
    ) -> Result<Self, LogError> {
        let feed = Feed::open(&client, topic, partition, From::At(from)).await?;
        Ok(Self { client, topic: topic.clone(), partition, feed: Some(feed), next: from })
    }
}

impl Reader for PulsarReader {
    async fn read(&mut self, limit: Limit) -> Result<Read, LogError> {
        if self.feed.is_none() {
            self.feed = Some(Feed::open(&self.client, &self.topic, self.partition, From::At(self.next)).await?);
        }
        let Some(feed) = &mut self.feed else { return Ok(Read::End) };
        let first = match first(feed, self.next).await {
            Ok(Some(record)) => record,
            Ok(None) => return Ok(Read::End),
            Err(error) => {
                self.feed = None;
                return Err(error);
            }
        };
        let mut bytes = first.weight();
        let mut records = vec![first];
        while records.len() < limit.records && bytes < limit.bytes {
            // What is here already: nothing is waited for.
            match std::future::poll_fn(|context| Poll::Ready(feed.poll(context))).await {
                Poll::Ready(Ok(record)) => {
                    bytes += record.weight();
                    records.push(record);
                }
                Poll::Ready(Err(_)) => {
                    self.feed = None;
                    break;
                }
                Poll::Pending => break,
            }
        }
        if let Some(last) = records.last() {
            self.next = last.offset.just_after();
        }
        Ok(Read::Records(records))
    }

    async fn seek(&mut self, to: Offset) -> Result<(), LogError> {
        // A new one costs less than what the client's own seek waits for.
        self.feed = None;
        self.next = to;
        Ok(())
    }
}
