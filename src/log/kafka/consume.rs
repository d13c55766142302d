//! The consuming half of a session: a thread that polls, hands records on and answers rebalances in line with them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::topic_partition_list::{Offset as RawOffset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;
use tokio::sync::mpsc;

use crate::log::{Assignment, Committed, LogError, Polled};
use crate::model::record::{Epoch, Offset, Partition, Record};

use super::convert;

/// A poll waits so long; a command waits at most so long to be noticed.
const POLL: Duration = Duration::from_millis(50);
/// While the runtime has not taken the last batches, the thread only looks for commands, this often.
const FULL: Duration = Duration::from_millis(2);
/// Requests to the group coordinator made inside a rebalance.
const COORDINATOR: Duration = Duration::from_secs(10);

/// Epochs are given by the process, so that they differ over sessions.
static EPOCHS: AtomicUsize = AtomicUsize::new(1);

pub enum Command {
    Seek(Partition, Offset),
    Pause(Vec<Partition>),
    Resume(Vec<Partition>),
    /// Leave the group; the sender is dropped when that is done.
    Close(tokio::sync::oneshot::Sender<()>),
}

/// The partitions that are ours, and the epoch of each. Held while a commit takes the group's metadata.
pub type Owned = Arc<Mutex<BTreeMap<Partition, Epoch>>>;

pub struct Rebalances {
    topic: String,
    polled: mpsc::Sender<Result<Polled, LogError>>,
    /// What has been polled since the last hand-over: a rebalance must not overtake it.
    batch: Mutex<Vec<Record>>,
    owned: Owned,
    released: Mutex<Receiver<()>>,
    revoke_wait: Duration,
    closing: AtomicBool,
}

impl Rebalances {
    pub fn new(
        topic: String,
        polled: mpsc::Sender<Result<Polled, LogError>>,
        owned: Owned,
        released: Receiver<()>,
        revoke_wait: Duration,
    ) -> Self {
        let (batch, released) = (Mutex::default(), Mutex::new(released));
        Self { topic, polled, batch, owned, released, revoke_wait, closing: AtomicBool::new(false) }
    }

    fn batch(&self) -> MutexGuard<'_, Vec<Record>> {
        self.batch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn owned(&self) -> MutexGuard<'_, BTreeMap<Partition, Epoch>> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over in order. A session that is gone needs nothing any more.
    fn tell(&self, polled: Result<Polled, LogError>) {
        let _ = self.polled.blocking_send(polled);
    }

    fn hand_over(&self) {
        let records = std::mem::take(&mut *self.batch());
        if !records.is_empty() {
            self.tell(Ok(Polled::Records(records)));
        }
    }

    /// Answers at once: assigned with explicit offsets and paused, until the runtime has restored them.
    fn assign(&self, consumer: &BaseConsumer<Self>, given: &TopicPartitionList) -> Result<(), KafkaError> {
        let committed = self.committed(consumer, given)?;
        let mut start = TopicPartitionList::new();
        let mut assignments = Vec::new();
        for element in committed.elements() {
            let position = match element.offset() {
                RawOffset::Offset(raw) => {
                    Some(Committed { offset: convert::offset(raw), metadata: element.metadata().to_owned() })
                }
                _ => None,
            };
            let from = position.as_ref().map_or(RawOffset::Beginning, |position| convert::raw_offset(position.offset));
            start.add_partition_offset(element.topic(), element.partition(), from)?;
            let epoch = Epoch(EPOCHS.fetch_add(1, Ordering::Relaxed) as u64);
            let partition = Partition(element.partition().max(0) as u32);
            assignments.push(Assignment { partition, epoch, committed: position });
        }
        consumer.incremental_assign(&start)?;
        consumer.pause(&start)?;
        self.owned().extend(assignments.iter().map(|given| (given.partition, given.epoch)));
        self.tell(Ok(Polled::Assigned(assignments)));
        Ok(())
    }

    /// Stable offsets only: librdkafka waits for transactions that are about to decide (`require_stable`).
    fn committed(
        &self,
        consumer: &BaseConsumer<Self>,
        of: &TopicPartitionList,
    ) -> Result<TopicPartitionList, KafkaError> {
        loop {
            match consumer.committed_offsets(of.clone(), COORDINATOR) {
                Err(error) if !self.polled.is_closed() => {
                    tracing::warn!(%error, "committed offsets are not to be had yet, asking again");
                }
                answer => return answer,
            }
        }
    }

    fn revoke(&self, consumer: &BaseConsumer<Self>, taken: &TopicPartitionList) -> Result<(), KafkaError> {
        let partitions: Vec<Partition> =
            taken.elements().iter().map(|element| Partition(element.partition().max(0) as u32)).collect();
        let forget = || self.owned().retain(|partition, _| !partitions.contains(partition));
        if self.closing.load(Ordering::Relaxed) || partitions.is_empty() {
            forget();
        } else if consumer.assignment_lost() {
            forget();
            self.tell(Ok(Polled::Lost(partitions.clone())));
        } else {
            self.tell(Ok(Polled::Revoked(partitions.clone())));
            let released = self.released.lock().unwrap_or_else(PoisonError::into_inner);
            if released.recv_timeout(self.revoke_wait) == Err(RecvTimeoutError::Timeout) {
                tracing::warn!(?partitions, "revoked partitions were not released in time");
                forget();
                self.tell(Ok(Polled::Lost(partitions.clone())));
            } else {
                forget();
            }
        }
        consumer.incremental_unassign(taken)
    }
}

impl ClientContext for Rebalances {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        convert::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::warn!(%error, reason, "kafka consumer");
    }
}

impl ConsumerContext for Rebalances {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, event: RDKafkaRespErr, partitions: &mut TopicPartitionList) {
        self.hand_over();
        let answered = match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => self.assign(consumer, partitions),
            _ => self.revoke(consumer, partitions),
        };
        if let Err(error) = answered {
            self.tell(Err(LogError::fenced(format!("a rebalance could not be answered: {error}"))));
        }
    }
}

pub struct Limits {
    pub records: AtomicUsize,
    pub bytes: AtomicUsize,
}

/// The thread's loop. Ends when the session closes or is dropped.
pub fn run(consumer: &BaseConsumer<Rebalances>, commands: &Receiver<Command>, limits: &Limits) {
    let context = std::sync::Arc::clone(consumer.context());
    let mut seeks: BTreeMap<Partition, (Offset, bool)> = BTreeMap::new();
    loop {
        let full = context.polled.capacity() == 0;
        let command = if full {
            commands.recv_timeout(FULL).map_err(|error| error == RecvTimeoutError::Disconnected)
        } else {
            commands.try_recv().map_err(|error| error == TryRecvError::Disconnected)
        };
        match command {
            Ok(Command::Close(done)) => {
                leave(consumer, &context);
                drop(done);
                return;
            }
            Ok(command) => {
                obey(consumer, &context, &mut seeks, command);
                continue;
            }
            Err(true) => {
                context.closing.store(true, Ordering::Relaxed);
                return;
            }
            Err(false) if full => continue,
            Err(false) => {}
        }
        seek_pending(consumer, &context, &mut seeks);
        let wait = if seeks.is_empty() { POLL } else { Duration::from_millis(5) };
        fill_batch(consumer, &context, limits, wait);
        context.hand_over();
    }
}

fn fill_batch(consumer: &BaseConsumer<Rebalances>, context: &Rebalances, limits: &Limits, wait: Duration) {
    let (records, bytes) = (limits.records.load(Ordering::Relaxed), limits.bytes.load(Ordering::Relaxed));
    let (mut count, mut size, mut wait) = (0, 0, wait);
    while count < records && size < bytes {
        match consumer.poll(wait) {
            None => return,
            Some(Ok(message)) => {
                let record = convert::record(&message);
                size += record.weight();
                count += 1;
                context.batch().push(record);
                wait = Duration::ZERO;
            }
            Some(Err(error)) => {
                context.hand_over();
                return report(consumer, context, error);
            }
        }
    }
}

fn report(consumer: &BaseConsumer<Rebalances>, context: &Rebalances, error: KafkaError) {
    match error {
        KafkaError::MessageConsumption(Code::AutoOffsetReset | Code::OffsetOutOfRange) => {
            resume_at_earliest(consumer, &context.topic);
        }
        KafkaError::MessageConsumptionFatal(_) => context.tell(Err(convert::error(error))),
        KafkaError::MessageConsumption(Code::UnknownTopicOrPartition) => {
            context.tell(Err(LogError::fatal(format!("there is no topic {} any more", context.topic))));
        }
        other => match convert::error(other) {
            LogError::Transient(error) => tracing::warn!(%error, "kafka consumer, going on"),
            serious => context.tell(Err(serious)),
        },
    }
}

/// A position outside the log: what lay there was deleted before it was read. An alarm; reading goes on at the earliest
/// record, never silently at the end.
fn resume_at_earliest(consumer: &BaseConsumer<Rebalances>, topic: &str) {
    let Ok(positions) = consumer.position() else { return };
    let Ok(assigned) = consumer.assignment() else { return };
    for element in assigned.elements() {
        let Ok((low, high)) = consumer.fetch_watermarks(topic, element.partition(), COORDINATOR) else { continue };
        let at = positions.find_partition(topic, element.partition()).map(|found| found.offset());
        let at = match at {
            Some(RawOffset::Offset(at)) => at,
            // Nothing was read yet, so it stands where it was assigned.
            _ => match element.offset() {
                RawOffset::Offset(at) => at,
                _ => continue,
            },
        };
        if at < low || at > high {
            tracing::error!(
                topic,
                partition = element.partition(),
                at,
                low,
                "records were deleted before they were read"
            );
            if let Err(error) = consumer.seek(topic, element.partition(), RawOffset::Offset(low), COORDINATOR) {
                tracing::error!(%error, "no seek to the earliest record");
            }
        }
    }
}

fn obey(
    consumer: &BaseConsumer<Rebalances>,
    context: &Rebalances,
    seeks: &mut BTreeMap<Partition, (Offset, bool)>,
    command: Command,
) {
    match command {
        Command::Seek(partition, to) => drop(seeks.insert(partition, (to, false))),
        Command::Pause(partitions) => {
            for partition in &partitions {
                if let Some((_, resume)) = seeks.get_mut(partition) {
                    *resume = false;
                }
            }
            switch(consumer, context, &partitions, false);
        }
        Command::Resume(partitions) => {
            // A partition that is still to be sought is resumed after that.
            let (later, now): (Vec<_>, Vec<_>) = partitions.into_iter().partition(|p| seeks.contains_key(p));
            for partition in later {
                if let Some((_, resume)) = seeks.get_mut(&partition) {
                    *resume = true;
                }
            }
            switch(consumer, context, &now, true);
        }
        Command::Close(_) => {}
    }
}

/// A seek fails until fetching has started: it is tried again until it succeeds or the partition is gone.
fn seek_pending(
    consumer: &BaseConsumer<Rebalances>,
    context: &Rebalances,
    seeks: &mut BTreeMap<Partition, (Offset, bool)>,
) {
    seeks.retain(|partition, _| context.owned().contains_key(partition));
    let mut done = Vec::new();
    for (partition, (to, resume)) in seeks.iter() {
        let number = convert::partition(*partition);
        match consumer.seek(&context.topic, number, convert::raw_offset(*to), Duration::from_millis(500)) {
            Ok(()) => {
                if *resume {
                    switch(consumer, context, &[*partition], true);
                }
                done.push(*partition);
            }
            Err(error) => tracing::debug!(%error, partition = number, "seek is not possible yet"),
        }
    }
    for partition in done {
        seeks.remove(&partition);
    }
}

fn switch(consumer: &BaseConsumer<Rebalances>, context: &Rebalances, partitions: &[Partition], on: bool) {
    let mut list = TopicPartitionList::new();
    let owned = context.owned().clone();
    for partition in partitions.iter().filter(|partition| owned.contains_key(partition)) {
        list.add_partition(&context.topic, convert::partition(*partition));
    }
    if list.count() == 0 {
        return;
    }
    let switched = if on { consumer.resume(&list) } else { consumer.pause(&list) };
    if let Err(error) = switched {
        tracing::warn!(%error, on, "partitions could not be switched");
    }
}

/// Leaves the group for good. Unsubscribing comes before closing, since a static member that only closes stays a member
/// until its session times out.
fn leave(consumer: &BaseConsumer<Rebalances>, context: &Rebalances) {
    context.closing.store(true, Ordering::Relaxed);
    consumer.unsubscribe();
    for _ in 0..40 {
        // Serves the revoke that unsubscribing brings.
        let _ = consumer.poll(Duration::from_millis(50));
        if consumer.assignment().is_ok_and(|left| left.count() == 0) {
            break;
        }
    }
}

/// The thread's end of the channels.
pub struct Ends {
    pub commands: Sender<Command>,
    pub released: Sender<()>,
    pub polled: mpsc::Receiver<Result<Polled, LogError>>,
}
