//! The producing half of a session: a thread that runs one transaction after the other.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::producer::{DeliveryResult, NoCustomPartitioner, Producer, ProducerContext, ThreadedProducer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::log::{Commit, LogError};
use crate::model::record::{Addressed, Partition, Topic};

use super::admin::KafkaAdmin;
use super::config::{KafkaConfig, TRANSACTION_TIMEOUT};
use super::consume::{Owned, Rebalances};
use super::convert::{self, Names};
use super::hanging;
use super::known::{Acquaintance, Known};

/// One call of the transaction API. It can be called again while it answers that it may.
const CALL: Duration = Duration::from_secs(5);
/// For so long a call is made again. Longer than a transaction can live: who has no answer then gets none.
const PATIENCE: Duration = TRANSACTION_TIMEOUT.saturating_mul(2);

/// So often is tried to end what hangs in a partition when a session begins.
const FILLERS: usize = 2;

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
        convert::told("kafka transactional producer", &error, reason);
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

/// What runs a session's transactions.
pub struct Transactions {
    pub config: KafkaConfig,
    pub producer: TransactionalProducer,
    /// Weak: a consumer lives no longer than the thread that polls it, or it would stay a member beside its successor.
    pub consumer: Weak<BaseConsumer<Rebalances>>,
    pub group: String,
    pub topic: String,
    pub owned: Owned,
    pub known: Known,
    pub names: Names,
    pub admin: KafkaAdmin,
    /// Where it writes.
    pub outputs: Vec<Topic>,
}

impl Transactions {
    /// Fences an earlier process of this id, and ends what it left open, also where the broker believes it ended
    /// ([`super::hanging`]).
    pub fn begin_life(&mut self) -> Result<(), LogError> {
        self.producer.init_transactions(Duration::from_secs(15)).map_err(convert::error)?;
        let began = Clock::system().instant();
        self.let_go_of_offsets().map_err(|error| blame(error, began))?;
        for (topic, partition) in hanging::undecided(&self.admin, &self.outputs)? {
            self.end_hanging(&topic, partition)?;
        }
        Ok(())
    }

    /// A transaction for each partition: were one refused, the abort of it would end what hangs in the others too.
    fn end_hanging(&mut self, topic: &Topic, partition: Partition) -> Result<(), LogError> {
        let commit = Commit { outputs: vec![hanging::filler(topic, partition)], ..Commit::default() };
        for _ in 0..FILLERS {
            match self.transact(&commit) {
                Err(LogError::Transient(error)) => {
                    tracing::warn!(%topic, partition = partition.0, %error, "what hangs could not be ended");
                }
                ended => return ended,
            }
        }
        // The session looks again.
        Ok(())
    }

    /// Offsets whose marker a broker has lost are pending for ever, and nobody else may read the group's until they are
    /// decided. The next marker of this producer decides them: it aborts.
    fn let_go_of_offsets(&self) -> Result<(), LogError> {
        let observer: BaseConsumer =
            self.config.observer(&self.group, "read_uncommitted").create().map_err(convert::error)?;
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.topic, 0);
        let committed = observer.committed_offsets(list, Duration::from_secs(15)).map_err(convert::error)?;
        let mut offsets = TopicPartitionList::new();
        let found = committed.find_partition(&self.topic, 0);
        // What is committed already, since what is to be aborted must do no harm should it ever not be.
        let (at, metadata) = match &found {
            Some(found) if matches!(found.offset(), Offset::Offset(_)) => (found.offset(), found.metadata()),
            _ => (Offset::Offset(0), ""),
        };
        offsets.add_partition_offset(&self.topic, 0, at).map_err(convert::error)?;
        if let Some(mut element) = offsets.find_partition(&self.topic, 0) {
            element.set_metadata(metadata);
        }
        let metadata = observer.group_metadata().ok_or_else(|| LogError::transient("the group is not known yet"))?;
        self.producer.begin_transaction().map_err(convert::error)?;
        let sent = repeat(|| self.producer.send_offsets_to_transaction(&offsets, &metadata, CALL));
        match sent {
            Ok(()) => abort(&self.producer),
            // The offsets were refused, but their partition is in the transaction: the abort reaches it.
            Err(LogError::Transient(error)) if requires_abort(&error) => abort(&self.producer),
            Err(error) => {
                abort(&self.producer)?;
                Err(error)
            }
        }
    }

    /// The thread's loop. Ends when the session is dropped.
    pub fn run(mut self, orders: &Receiver<Order>) {
        while let Ok((commit, done)) = orders.recv() {
            // Who has given up waiting has told that nothing is known of it: it must not begin now.
            if done.is_closed() {
                return;
            }
            let result = self.transact(&commit);
            // A session that has stopped waiting is being dropped.
            let _ = done.send(result);
        }
    }

    fn transact(&mut self, commit: &Commit) -> Result<(), LogError> {
        let began = Clock::system().instant();
        self.run_through(commit).map_err(|error| blame(error, began))
    }

    fn run_through(&mut self, commit: &Commit) -> Result<(), LogError> {
        self.producer.begin_transaction().map_err(|error| match convert::error(error) {
            // The last transaction hangs in a state that only a new client leaves.
            LogError::Transient(error) => LogError::Broken(error),
            other => other,
        })?;
        let filled = self
            .fill(&commit.outputs)
            .and_then(|()| self.send_offsets(commit))
            .and_then(|()| self.producer.context().settle(TRANSACTION_TIMEOUT))
            .map(|()| empty_queue(&self.producer));
        match filled {
            Ok(()) => decide(&self.producer),
            Err(error @ (LogError::Fenced(_) | LogError::Broken(_))) => Err(error),
            Err(error) => {
                abort(&self.producer)?;
                Err(error)
            }
        }
    }

    fn fill(&mut self, outputs: &[Addressed]) -> Result<(), LogError> {
        let firsts = self.introduce(outputs)?;
        for output in outputs.iter().enumerate().filter(|(index, _)| !firsts.contains(index)).map(|(_, output)| output)
        {
            self.send(output)?;
        }
        Ok(())
    }

    /// Sends the first records of partitions that do not know the producer, and waits for them ([`super::known`]); which
    /// they are.
    fn introduce(&mut self, outputs: &[Addressed]) -> Result<BTreeSet<usize>, LogError> {
        let mut firsts = BTreeSet::new();
        let now = Clock::system().instant();
        for (index, output) in outputs.iter().enumerate() {
            if self.known.of(output, now) == Acquaintance::Unknown {
                self.known.set(&output.topic, output.partition, Acquaintance::Introduced);
                firsts.insert(index);
            }
        }
        if firsts.is_empty() {
            return Ok(firsts);
        }
        let sent = firsts.iter().try_for_each(|index| self.send(&outputs[*index]));
        let met = sent.and_then(|()| self.producer.context().settle(TRANSACTION_TIMEOUT));
        let after = met.as_ref().map_or(Acquaintance::Unknown, |()| Acquaintance::Known(now));
        for index in &firsts {
            self.known.set(&outputs[*index].topic, outputs[*index].partition, after);
        }
        met.map(|()| firsts)
    }

    fn send(&mut self, output: &Addressed) -> Result<(), LogError> {
        let mut record = convert::message(self.names.of(&output.topic, &self.config), output, ());
        self.producer.context().expect();
        loop {
            match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(Code::QueueFull), again)) => {
                    record = again;
                    std::thread::park_timeout(Duration::from_millis(1));
                }
                Err((error, _)) => {
                    self.producer.context().outstanding.fetch_sub(1, Ordering::AcqRel);
                    return Err(convert::error(error));
                }
            }
        }
    }

    fn send_offsets(&self, commit: &Commit) -> Result<(), LogError> {
        if commit.offsets.is_empty() {
            return Ok(());
        }
        let mut offsets = TopicPartitionList::new();
        for (partition, (_, committed)) in &commit.offsets {
            let number = convert::partition(*partition);
            let raw = i64::try_from(committed.offset.raw()).unwrap_or(i64::MAX);
            let set = offsets.add_partition_offset(&self.topic, number, Offset::Offset(raw));
            set.map_err(convert::error)?;
            if let Some(mut element) = offsets.find_partition(&self.topic, number) {
                element.set_metadata(committed.metadata.as_str());
            }
        }
        // Before the lock: were this the last one to let go of it, it would end here, and answer a rebalance under the lock.
        let consumer = self.consumer.upgrade().ok_or_else(|| LogError::broken("the kafka consumer has ended"))?;
        let metadata = {
            // A member that lost a partition and has joined again would be believed for it: the metadata is taken while what
            // is ours cannot change.
            let owned = self.owned.lock().unwrap_or_else(PoisonError::into_inner);
            let gone = commit.offsets.iter().find(|(partition, (epoch, _))| owned.get(partition) != Some(epoch));
            if let Some((partition, _)) = gone {
                return Err(LogError::transient(format!("partition {partition} has been taken away")));
            }
            consumer.group_metadata()
        };
        let metadata = metadata.ok_or_else(|| LogError::transient("not a member of the group yet"))?;
        repeat(|| self.producer.send_offsets_to_transaction(&offsets, &metadata, CALL))
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

/// Commits. While its fate is unknown it is asked for again, never aborted.
fn decide(producer: &TransactionalProducer) -> Result<(), LogError> {
    match repeat(|| producer.commit_transaction(CALL)) {
        Ok(()) => Ok(()),
        Err(LogError::Transient(error)) => match requires_abort(&error) {
            true => {
                abort(producer)?;
                Err(LogError::Transient(error))
            }
            false => Err(LogError::broken(format!("the fate of a transaction is unknown: {error}"))),
        },
        Err(error) => Err(error),
    }
}

fn abort(producer: &TransactionalProducer) -> Result<(), LogError> {
    let aborted = repeat(|| producer.abort_transaction(CALL));
    // Reports of purged records come after it; they say nothing new.
    let _ = producer.context().settle(CALL);
    aborted.map_err(|error| match error {
        LogError::Transient(error) => LogError::broken(format!("a transaction could not be aborted: {error}")),
        other => other,
    })
}

/// A broker fences whoever's transaction lives too long: nobody else has its id then.
fn blame(error: LogError, began: Instant) -> LogError {
    match error {
        LogError::Fenced(error) if began.elapsed() >= TRANSACTION_TIMEOUT => LogError::Broken(error),
        other => other,
    }
}

/// Calls again as long as the client says that it may.
fn repeat(mut call: impl FnMut() -> Result<(), KafkaError>) -> Result<(), LogError> {
    let began = Clock::system().instant();
    loop {
        match call() {
            Ok(()) => return Ok(()),
            Err(KafkaError::Transaction(error)) if error.is_retriable() && began.elapsed() < PATIENCE => {}
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
