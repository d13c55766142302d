//! The producing half of a session: a thread that runs one transaction after the other.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::producer::{BaseRecord, DeliveryResult, NoCustomPartitioner, Producer, ProducerContext, ThreadedProducer};
use rdkafka::topic_partition_list::TopicPartitionList;
use tokio::sync::oneshot;

use crate::log::{Commit, LogError};
use crate::model::record::Addressed;

use super::config::{KafkaConfig, TRANSACTION_TIMEOUT};
use super::consume::{Owned, Rebalances};
use super::convert;

/// One call of the transaction API. It can be called again while it answers that it may.
const CALL: Duration = Duration::from_secs(5);
/// How often a decision whose fate is unknown is asked for again: longer than the transaction can live.
const DECISIONS: usize = 6;

/// Looks at the client's queue, 50 µs apart: in all less than what a wrong guess costs.
const QUEUE_LOOKS: usize = 400;

pub type Order = (Arc<Commit>, oneshot::Sender<Result<(), LogError>>);
pub type TransactionalProducer = ThreadedProducer<Receipts>;

/// Counts delivery reports, so that a transaction is decided only when everything in it has been acknowledged.
#[derive(Default)]
pub struct Receipts {
    outstanding: AtomicUsize,
    refused: Mutex<Option<KafkaError>>,
    changed: Condvar,
}

impl Receipts {
    fn expect(&self) {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
    }

    /// Waits until nothing is on its way. The first refusal, if there was one.
    fn settle(&self, patience: Duration) -> Result<(), LogError> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let on_its_way = |_: &mut Option<KafkaError>| self.outstanding.load(Ordering::Acquire) > 0;
        let (mut refused, waited) =
            self.changed.wait_timeout_while(refused, patience, on_its_way).unwrap_or_else(PoisonError::into_inner);
        match refused.take() {
            Some(error) => Err(convert::error(error)),
            None if waited.timed_out() => Err(LogError::transient("the broker has not acknowledged in time")),
            None => Ok(()),
        }
    }
}

impl ClientContext for Receipts {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        convert::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::warn!(%error, reason, "kafka transactional producer");
    }
}

impl ProducerContext<NoCustomPartitioner> for Receipts {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
            refused.get_or_insert_with(|| error.clone());
        }
        if self.outstanding.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Taken and given back, so that a waiter is either before its check or asleep.
            drop(self.refused.lock());
            self.changed.notify_all();
        }
    }
}

/// Ends what an earlier process of this id left open, and fences it.
pub fn begin_life(producer: &TransactionalProducer) -> Result<(), LogError> {
    producer.init_transactions(Duration::from_secs(15)).map_err(convert::error)
}

/// The thread's loop. Ends when the session is dropped.
pub fn run(
    config: &KafkaConfig,
    producer: &TransactionalProducer,
    consumer: &BaseConsumer<Rebalances>,
    topic: &str,
    owned: &Owned,
    orders: &Receiver<Order>,
) {
    while let Ok((commit, done)) = orders.recv() {
        let result = transact(config, producer, consumer, topic, owned, &commit);
        // A session that has stopped waiting is being dropped.
        let _ = done.send(result);
    }
}

fn transact(
    config: &KafkaConfig,
    producer: &TransactionalProducer,
    consumer: &BaseConsumer<Rebalances>,
    topic: &str,
    owned: &Owned,
    commit: &Commit,
) -> Result<(), LogError> {
    producer.begin_transaction().map_err(|error| match convert::error(error) {
        // The last transaction hangs in a state that only a new client leaves.
        LogError::Transient(error) => LogError::Fenced(error),
        other => other,
    })?;
    let filled = fill(config, producer, &commit.outputs)
        .and_then(|()| send_offsets(producer, consumer, topic, owned, commit))
        .and_then(|()| producer.context().settle(TRANSACTION_TIMEOUT))
        .map(|()| empty_queue(producer));
    match filled {
        Ok(()) => decide(producer),
        Err(error @ LogError::Fenced(_)) => Err(error),
        Err(error) => {
            abort(producer)?;
            Err(error)
        }
    }
}

/// Waits until the client's queue is empty. Every record is acknowledged by now, but its report counts as queued until the
/// polling thread has put it away, and `commit_transaction` of the crate waits 100 ms for whatever is queued.
fn empty_queue(producer: &TransactionalProducer) {
    for _ in 0..QUEUE_LOOKS {
        if producer.in_flight_count() == 0 {
            return;
        }
        std::thread::park_timeout(Duration::from_micros(50));
    }
}

fn fill(config: &KafkaConfig, producer: &TransactionalProducer, outputs: &[Addressed]) -> Result<(), LogError> {
    let mut names: Vec<(&str, String)> = Vec::new();
    for output in outputs {
        let known = names.iter().position(|(topic, _)| *topic == output.topic.as_str());
        let known = known.unwrap_or_else(|| {
            names.push((output.topic.as_str(), config.topic(&output.topic)));
            names.len() - 1
        });
        let mut record: BaseRecord<'_, [u8], [u8], ()> = BaseRecord::to(&names[known].1)
            .partition(convert::partition(output.partition))
            .headers(convert::headers(&output.headers));
        if let Some(key) = &output.key {
            record = record.key(key);
        }
        if let Some(value) = &output.value {
            record = record.payload(value);
        }
        producer.context().expect();
        loop {
            match producer.send(record) {
                Ok(()) => break,
                Err((KafkaError::MessageProduction(Code::QueueFull), again)) => {
                    record = again;
                    std::thread::park_timeout(Duration::from_millis(1));
                }
                Err((error, _)) => {
                    producer.context().outstanding.fetch_sub(1, Ordering::AcqRel);
                    return Err(convert::error(error));
                }
            }
        }
    }
    Ok(())
}

fn send_offsets(
    producer: &TransactionalProducer,
    consumer: &BaseConsumer<Rebalances>,
    topic: &str,
    owned: &Owned,
    commit: &Commit,
) -> Result<(), LogError> {
    if commit.offsets.is_empty() {
        return Ok(());
    }
    let mut offsets = TopicPartitionList::new();
    for (partition, (_, committed)) in &commit.offsets {
        let number = convert::partition(*partition);
        let raw = i64::try_from(committed.offset.raw()).unwrap_or(i64::MAX);
        let set = offsets.add_partition_offset(topic, number, rdkafka::Offset::Offset(raw));
        set.map_err(convert::error)?;
        if let Some(mut element) = offsets.find_partition(topic, number) {
            element.set_metadata(committed.metadata.as_str());
        }
    }
    let metadata = {
        // A member that lost a partition and has joined again would be believed for it: the metadata is taken while what is
        // ours cannot change.
        let owned = owned.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = commit.offsets.iter().find(|(partition, (epoch, _))| owned.get(partition) != Some(epoch));
        if let Some((partition, _)) = gone {
            return Err(LogError::transient(format!("partition {partition} has been taken away")));
        }
        consumer.group_metadata()
    };
    let metadata = metadata.ok_or_else(|| LogError::transient("not a member of the group yet"))?;
    repeat(|| producer.send_offsets_to_transaction(&offsets, &metadata, CALL))
}

/// Commits. While its fate is unknown it is asked for again, never aborted.
fn decide(producer: &TransactionalProducer) -> Result<(), LogError> {
    match repeat(|| producer.commit_transaction(CALL)) {
        Ok(()) => Ok(()),
        Err(LogError::Transient(error)) => match requires_abort(&error) {
            true => {
                abort(producer)?;
                Err(LogError::Transient(error))
            }
            false => Err(LogError::fenced(format!("the fate of a transaction is unknown: {error}"))),
        },
        Err(error) => Err(error),
    }
}

fn abort(producer: &TransactionalProducer) -> Result<(), LogError> {
    let aborted = repeat(|| producer.abort_transaction(CALL));
    // Reports of purged records come after it; they say nothing new.
    let _ = producer.context().settle(CALL);
    aborted.map_err(|error| match error {
        LogError::Transient(error) => LogError::fenced(format!("a transaction could not be aborted: {error}")),
        other => other,
    })
}

/// Calls again as long as the client says that it may.
fn repeat(mut call: impl FnMut() -> Result<(), KafkaError>) -> Result<(), LogError> {
    let mut left = DECISIONS;
    loop {
        match call() {
            Ok(()) => return Ok(()),
            Err(KafkaError::Transaction(error)) if error.is_retriable() && left > 0 => left -= 1,
            Err(error) => return Err(convert::error(error)),
        }
    }
}

fn requires_abort(error: &crate::log::BoxError) -> bool {
    match error.downcast_ref::<KafkaError>() {
        Some(KafkaError::Transaction(error)) => error.txn_requires_abort(),
        _ => false,
    }
}
