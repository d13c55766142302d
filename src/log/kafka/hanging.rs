//! Transactions that nobody will decide any more, and how a session ends those of its own.
//!
//! A broker that comes back after a kill can count a transaction as ended though it has written no marker into some of its
//! partitions: while it starts, its coordinator does not know their leader yet, takes them for deleted and leaves them out.
//! (Kafka 4.4, one node: the coordinator says `CompleteAbort`, `deliveries` and `__consumer_offsets` have no marker.) Whoever
//! reads committed records only stops before such a transaction for ever: other stages, and a partition that is restored.
//!
//! What belongs to a transaction is known by the producer's id, and that stays with the transactional id: the next marker of
//! the same id ends what hangs. So a session's start ends what its predecessors left:
//! - offsets, at once, with an abort (`transact`);
//! - records, with a commit: into each partition of an output topic that has not got any further for a moment goes a *filler*,
//!   an empty record that readers pass over.
//!
//! Whether the transaction was to be committed cannot be known by then. With its offsets aborted and its records committed
//! inputs may be done twice, with the same ids, and nothing is lost. What still hangs after that belongs to an instance that
//! is gone; it is told, and ended with Kafka's own tools.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset as RawOffset, TopicPartitionList};
use tokio::sync::oneshot;

use crate::clock::Clock;
use crate::log::{Commit, LogError};
use crate::model::record::{Addressed, Headers, Partition, Topic, header};
use crate::telemetry::events;

use super::admin::KafkaAdmin;
use super::config::TRANSACTION_TIMEOUT;
use super::transact::Order;

const CALL: Duration = Duration::from_secs(10);
/// Others' transactions are decided within this, as long as nothing is wrong. A filler too many does no harm.
const MOMENT: Duration = Duration::from_secs(2);
/// After so long every transaction has been decided: its time-out, and the broker's search for those that are over it (10 s).
pub const DECIDED: Duration = TRANSACTION_TIMEOUT.saturating_add(Duration::from_secs(10));
/// Compacted topics take no record without a key.
const KEY: &[u8] = b"lw-filler";

/// The last stable offsets of partitions in which something is undecided.
type Undecided = BTreeMap<(Topic, Partition), i64>;

/// Ends when the session does.
pub struct Mending(tokio::task::AbortHandle);

impl Drop for Mending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Ends what hangs in these topics, as far as it is this session's to end, beside its work.
pub fn mend(admin: KafkaAdmin, topics: Vec<Topic>, orders: Sender<Order>) -> Mending {
    let mending = tokio::spawn(async move {
        // Whatever else is wrong is the session's to tell.
        while let Err(LogError::Transient(error)) = look(&admin, &topics, &orders).await {
            tracing::warn!(%error, "whether transactions hang could not be found out, trying again");
            Clock::system().sleep(MOMENT).await;
        }
    });
    Mending(mending.abort_handle())
}

async fn look(admin: &KafkaAdmin, topics: &[Topic], orders: &Sender<Order>) -> Result<(), LogError> {
    let clock = Clock::system();
    let first = undecided(admin, topics).await?;
    if first.is_empty() {
        return Ok(());
    }
    clock.sleep(MOMENT).await;
    let stuck = unmoved(first, &undecided(admin, topics).await?);
    if stuck.is_empty() {
        return Ok(());
    }
    let outputs = stuck.keys().map(|(topic, partition)| filler(topic, *partition)).collect();
    let (done, is_done) = oneshot::channel();
    // A session that has ended needs nothing, and the next one looks again.
    if orders.send((Arc::new(Commit { outputs, ..Commit::default() }), done)).is_err() {
        return Ok(());
    }
    is_done.await.map_err(LogError::transient)??;
    clock.sleep(DECIDED).await;
    for ((topic, partition), at) in unmoved(stuck, &undecided(admin, topics).await?) {
        events::hanging_records(&topic, partition, at);
    }
    Ok(())
}

fn unmoved(mut before: Undecided, now: &Undecided) -> Undecided {
    before.retain(|of, at| now.get(of) == Some(at));
    before
}

async fn undecided(admin: &KafkaAdmin, topics: &[Topic]) -> Result<Undecided, LogError> {
    let mut found = Undecided::new();
    for topic in topics {
        let name = admin.name(topic);
        let of_all = name.clone();
        let stable = admin.ask_committed(move |client| ends(client, &of_all)).await?;
        let ends = admin.ask_uncommitted(move |client| ends(client, &name)).await?;
        for (number, end) in ends {
            let stable = stable.get(&number).copied().unwrap_or(end);
            if stable < end {
                found.insert((topic.clone(), Partition(number.max(0) as u32)), stable);
            }
        }
    }
    Ok(found)
}

/// Where each partition ends, as far as this client is told.
fn ends(client: &BaseConsumer, topic: &str) -> Result<BTreeMap<i32, i64>, KafkaError> {
    let metadata = client.fetch_metadata(Some(topic), CALL)?;
    let mut list = TopicPartitionList::new();
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        list.add_partition_offset(topic, partition.id(), RawOffset::End)?;
    }
    let found = client.offsets_for_times(list, CALL)?;
    found.elements().iter().try_for_each(|element| element.error())?;
    let end = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match element.offset() {
        RawOffset::Offset(raw) => Some((element.partition(), raw)),
        _ => None,
    };
    Ok(found.elements().iter().filter_map(end).collect())
}

fn filler(topic: &Topic, partition: Partition) -> Addressed {
    let mut headers = Headers::new();
    headers.push_text(header::FILLER, "1");
    Addressed { topic: topic.clone(), partition, key: Some(KEY.into()), value: None, headers }
}

/// Whether a record only ends a transaction.
pub fn is_filler(message: &rdkafka::message::BorrowedMessage<'_>) -> bool {
    use rdkafka::Message;
    use rdkafka::message::Headers as _;
    message.key() == Some(KEY)
        && message.payload().is_none()
        && message.headers().is_some_and(|headers| headers.iter().any(|found| found.key == header::FILLER))
}
