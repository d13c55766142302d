//! Transactions that nobody will decide any more, and how a session ends those of its own.
//!
//! A broker that comes back after a kill can count a transaction as ended though it has written no marker into some of its
//! partitions: while it starts, its coordinator does not know their leader yet, takes them for deleted and leaves them out.
//! (Kafka 4.4, one node: the coordinator says `CompleteAbort`, `deliveries` and `__consumer_offsets` have no marker.) Whoever
//! reads committed records only stops before such a transaction for ever: other stages, and a partition that is restored.
//!
//! What belongs to a transaction is known by the producer's id, and that stays with the transactional id: the next marker of
//! the same id ends what hangs. So a session ends what its predecessors left before it does anything else:
//! - offsets, with an abort;
//! - records, with a commit: into each partition of an output topic in which something is undecided goes a *filler*, an empty
//!   record that readers pass over.
//!
//! Whether the transaction was to be committed cannot be known by then, nor whether all of it had been written. With its offsets
//! aborted and its records committed inputs may be done twice, with the same ids; progress of a commit that does not count is
//! passed over (`deliver::restore`). What remains: if it was committed, and the filler's own transaction has to be aborted, its
//! records in that partition go with it.
//!
//! A session may also outlive the broker's restart. So it looks now and then: what is undecided for longer than it can be gets
//! a filler once; what still is after that belongs to another instance, and is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset as RawOffset, TopicPartitionList};
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use crate::clock::Clock;
use crate::log::{Commit, LogError};
use crate::model::record::{Addressed, Headers, Partition, Topic, header};
use crate::telemetry::events;

use super::admin::{self, KafkaAdmin};
use super::config::TRANSACTION_TIMEOUT;
use super::convert;
use super::transact::Order;

const CALL: Duration = Duration::from_secs(10);
/// Most transactions of others are decided within this. A filler too many does no harm.
const MOMENT: Duration = Duration::from_millis(250);
/// After so long every transaction has been decided: its time-out, and the broker's search for those that are over it (10 s).
pub const DECIDED: Duration = TRANSACTION_TIMEOUT.saturating_add(Duration::from_secs(10));
/// How often a session looks: what has not moved since the last time should have been decided.
const LOOK: Duration = DECIDED.saturating_add(Duration::from_secs(10));
/// Compacted topics take no record without a key.
const KEY: &[u8] = b"lw-filler";

/// The last stable offsets of partitions in which something is undecided.
type Undecided = BTreeMap<(Topic, Partition), i64>;

/// The partitions in which something is undecided, and was a moment before. Blocks.
pub fn undecided(admin: &KafkaAdmin, topics: &[Topic]) -> Result<Vec<(Topic, Partition)>, LogError> {
    let before = look(admin, topics)?;
    if before.is_empty() {
        return Ok(Vec::new());
    }
    std::thread::park_timeout(MOMENT);
    Ok(unmoved(&before, look(admin, topics)?).into_keys().collect())
}

/// The partitions whose last stable offset has not moved. In a busy partition some transaction is always undecided, another one
/// each time.
fn unmoved(before: &Undecided, mut now: Undecided) -> Undecided {
    now.retain(|of, at| before.get(of) == Some(at));
    now
}

/// Looks after these topics beside the session's work.
pub fn mend(admin: KafkaAdmin, topics: Vec<Topic>, orders: Sender<Order>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let clock = Clock::system();
        let (mut before, mut filled) = (Undecided::new(), BTreeSet::new());
        loop {
            clock.sleep(LOOK).await;
            let (admin, of) = (admin.clone(), topics.clone());
            let Ok(Ok(now)) = tokio::task::spawn_blocking(move || look(&admin, &of)).await else { continue };
            filled.retain(|(of, at)| now.get(of) == Some(at));
            for (of, at) in &unmoved(&before, now.clone()) {
                if !filled.insert((of.clone(), *at)) {
                    events::undecided(&of.0, of.1, at);
                    continue;
                }
                let (done, is_done) = oneshot::channel();
                let outputs = vec![filler(&of.0, of.1)];
                // A session that has ended needs nothing.
                if orders.send((Arc::new(Commit { outputs, ..Commit::default() }), done)).is_err() {
                    return;
                }
                if let Ok(Err(error)) = is_done.await {
                    tracing::warn!(topic = %of.0, partition = of.1.0, %error, "what hangs could not be ended");
                }
            }
            before = now;
        }
    }))
}

/// Blocks. Partitions that cannot be asked are left out.
fn look(admin: &KafkaAdmin, topics: &[Topic]) -> Result<Undecided, LogError> {
    let mut found = Undecided::new();
    for topic in topics {
        let name = admin.name(topic);
        let stable = ends(admin.committed_client(), &name).map_err(convert::error)?;
        for (number, end) in ends(admin.uncommitted_client(), &name).map_err(convert::error)? {
            if let Some(stable) = stable.get(&number).filter(|stable| **stable < end) {
                found.insert((topic.clone(), Partition(number.max(0) as u32)), *stable);
            }
        }
    }
    Ok(found)
}

/// Where each partition ends, as far as this client is told.
fn ends<C: ConsumerContext>(client: &BaseConsumer<C>, topic: &str) -> Result<BTreeMap<i32, i64>, KafkaError> {
    admin::hear(client);
    let metadata = client.fetch_metadata(Some(topic), CALL)?;
    let mut list = TopicPartitionList::new();
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        list.add_partition_offset(topic, partition.id(), RawOffset::End)?;
    }
    let found = client.offsets_for_times(list, CALL)?;
    let end = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match element.offset() {
        RawOffset::Offset(raw) if element.error().is_ok() => Some((element.partition(), raw)),
        _ => None,
    };
    Ok(found.elements().iter().filter_map(end).collect())
}

pub fn filler(topic: &Topic, partition: Partition) -> Addressed {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_partition_is_not_taken_for_one_in_which_a_transaction_hangs() {
        let at = |number| (Topic::DELIVERIES, Partition(number));
        let before = Undecided::from([(at(0), 10), (at(1), 20)]);
        let now = Undecided::from([(at(0), 10), (at(1), 25), (at(2), 30)]);
        assert_eq!(unmoved(&before, now), Undecided::from([(at(0), 10)]));
    }
}
