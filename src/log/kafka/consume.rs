//! The consuming half of a session: a thread that polls, hands records on and answers rebalances in line with them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::topic_partition_list::{Offset as RawOffset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::log::{Assignment, Committed, LogError, Polled};
use crate::model::record::{Epoch, Offset, Partition, Record};
use crate::telemetry::seldom;

use super::hanging::{self, DECIDED};
use super::{convert, leaders};

/// A poll waits so long; a command waits at most so long to be noticed.
const POLL: Duration = Duration::from_millis(50);
/// While the runtime has not taken the last batches, the thread only looks for commands, this often.
const FULL: Duration = Duration::from_millis(2);
/// Requests to the group coordinator made inside a rebalance.
const COORDINATOR: Duration = Duration::from_secs(10);

/// Epochs are given by the process, so that they differ over sessions.
static EPOCHS: AtomicUsize = AtomicUsize::new(1);

/// Commands name the epoch they are about: one that comes late must not touch a newer assignment.
pub enum Command {
    Seek(Partition, Epoch, Offset),
    Pause(Vec<(Partition, Epoch)>),
    Resume(Vec<(Partition, Epoch)>),
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
    /// Takes the number of the revoke that was released.
    released: Mutex<Receiver<u64>>,
    revokes: AtomicUsize,
    revoke_wait: Duration,
    closing: AtomicBool,
    /// A client of the group that is told of decided offsets only.
    decided: ClientConfig,
}

impl Rebalances {
    pub fn new(
        topic: String,
        polled: mpsc::Sender<Result<Polled, LogError>>,
        owned: Owned,
        released: Receiver<u64>,
        revoke_wait: Duration,
        decided: ClientConfig,
    ) -> Self {
        let (batch, released) = (Mutex::default(), Mutex::new(released));
        let (revokes, closing) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { topic, polled, batch, owned, released, revokes, revoke_wait, closing, decided }
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
            // Always a number: a seek is forgotten while the client is looking up where the log begins.
            let from = match &position {
                Some(position) => convert::raw_offset(position.offset),
                None => {
                    RawOffset::Offset(leaders::watermarks(consumer, &self.topic, element.partition(), COORDINATOR)?.0)
                }
            };
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
    ///
    /// An offset that is not stable after [`DECIDED`] never will be: a broker that was killed can leave a transaction's offsets
    /// without their marker ([`hanging`]). Then what was committed before it counts. Had it been committed after all, its inputs
    /// are done again: repeats are possible, loss is not.
    fn committed(
        &self,
        consumer: &BaseConsumer<Self>,
        of: &TopicPartitionList,
    ) -> Result<TopicPartitionList, KafkaError> {
        // Since when the broker has told what was committed before, but not what is stable. Time in which it is away, or is
        // still reading what it knows of the group, proves nothing.
        let mut undecided: Option<Instant> = None;
        loop {
            match consumer.committed_offsets(of.clone(), COORDINATOR).and_then(all_known) {
                Err(error) if !self.polled.is_closed() => {
                    tracing::warn!(%error, "committed offsets are not to be had yet, asking again");
                }
                answer => return answer,
            }
            let decided: Result<BaseConsumer, _> = self.decided.create();
            match decided.and_then(|client| client.committed_offsets(of.clone(), COORDINATOR)).and_then(all_known) {
                Ok(found) => {
                    let since = *undecided.get_or_insert_with(|| Clock::system().instant());
                    if since.elapsed() >= DECIDED {
                        crate::telemetry::events::hanging_transaction(&self.topic);
                        return Ok(found);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "nor are those committed before");
                    undecided = None;
                }
            }
        }
    }

    /// Waits until the revoke that was just told is released; false where that takes too long. A release of an earlier one,
    /// given after its time was up, does not count.
    fn await_release(&self) -> bool {
        let number = self.revokes.fetch_add(1, Ordering::Relaxed) as u64 + 1;
        let released = self.released.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match released.recv_timeout(self.revoke_wait) {
                Ok(earlier) if earlier < number => {}
                Err(RecvTimeoutError::Timeout) => return false,
                Ok(_) | Err(RecvTimeoutError::Disconnected) => return true,
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
            if !self.await_release() {
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

/// An offset that could not be had is no "never committed": that would read everything again.
fn all_known(offsets: TopicPartitionList) -> Result<TopicPartitionList, KafkaError> {
    offsets.elements().iter().try_for_each(|element| element.error())?;
    Ok(offsets)
}

impl ClientContext for Rebalances {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        convert::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        convert::told("kafka consumer", &error, reason);
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
            self.tell(Err(LogError::broken(format!("a rebalance could not be answered: {error}"))));
        }
    }
}

pub struct Limits {
    pub records: AtomicUsize,
    pub bytes: AtomicUsize,
}

/// What the thread has been told about its partitions.
#[derive(Default)]
struct Reading {
    /// Where to read, and whether to resume then: a seek fails until fetching has started.
    seeks: BTreeMap<Partition, (Offset, bool)>,
    /// Resumed by the runtime; the others are paused, as they are assigned.
    resumed: BTreeSet<Partition>,
    /// Some position lies outside the log.
    outside: bool,
}

/// The thread's loop. Ends when the session closes or is dropped. Counts its polls.
pub fn run(consumer: &BaseConsumer<Rebalances>, commands: &Receiver<Command>, limits: &Limits, polls: &AtomicUsize) {
    let context = Arc::clone(consumer.context());
    let mut reading = Reading::default();
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
                reading.obey(consumer, &context, command);
                continue;
            }
            Err(true) => {
                context.closing.store(true, Ordering::Relaxed);
                return;
            }
            Err(false) if full => continue,
            Err(false) => {}
        }
        reading.seek_pending(consumer, &context);
        reading.resume_at_earliest(consumer, &context);
        let wait = if reading.seeks.is_empty() { POLL } else { Duration::from_millis(5) };
        reading.outside |= fill_batch(consumer, &context, limits, wait);
        polls.fetch_add(1, Ordering::Relaxed);
        context.hand_over();
    }
}

/// Polls until the batch is full or nothing is there; true where a position lies outside the log.
fn fill_batch(consumer: &BaseConsumer<Rebalances>, context: &Rebalances, limits: &Limits, wait: Duration) -> bool {
    let (records, bytes) = (limits.records.load(Ordering::Relaxed), limits.bytes.load(Ordering::Relaxed));
    let (mut count, mut size, mut wait) = (0, 0, wait);
    while count < records && size < bytes {
        match consumer.poll(wait) {
            None => return false,
            Some(Ok(message)) if hanging::is_filler(&message) => {}
            Some(Ok(message)) => {
                let record = convert::record(&message);
                size += record.weight();
                count += 1;
                context.batch().push(record);
                wait = Duration::ZERO;
            }
            Some(Err(error)) => {
                context.hand_over();
                return report(context, error);
            }
        }
    }
    false
}

fn report(context: &Rebalances, error: KafkaError) -> bool {
    match error {
        KafkaError::MessageConsumption(Code::AutoOffsetReset | Code::OffsetOutOfRange) => return true,
        KafkaError::MessageConsumptionFatal(_) => context.tell(Err(convert::error(error))),
        other => match convert::error(other) {
            LogError::Transient(error) => {
                if let Some(left_out) = seldom::due("kafka consumer, going on", &error.to_string()) {
                    tracing::warn!(%error, left_out, "kafka consumer, going on");
                }
            }
            serious => context.tell(Err(serious)),
        },
    }
    false
}

impl Reading {
    fn obey(&mut self, consumer: &BaseConsumer<Rebalances>, context: &Rebalances, command: Command) {
        let current = |(partition, epoch): &(Partition, Epoch)| {
            (context.owned().get(partition) == Some(epoch)).then_some(*partition)
        };
        match command {
            Command::Seek(partition, epoch, to) => {
                if current(&(partition, epoch)).is_some() {
                    self.seeks.insert(partition, (to, false));
                }
            }
            Command::Pause(partitions) => {
                let partitions: Vec<Partition> = partitions.iter().filter_map(current).collect();
                for partition in &partitions {
                    self.resumed.remove(partition);
                    if let Some((_, resume)) = self.seeks.get_mut(partition) {
                        *resume = false;
                    }
                }
                switch(consumer, context, &partitions, false);
            }
            Command::Resume(partitions) => {
                // A partition that is still to be sought is resumed after that.
                let mut now = Vec::new();
                for partition in partitions.iter().filter_map(current) {
                    self.resumed.insert(partition);
                    match self.seeks.get_mut(&partition) {
                        Some((_, resume)) => *resume = true,
                        None => now.push(partition),
                    }
                }
                switch(consumer, context, &now, true);
            }
            Command::Close(_) => {}
        }
    }

    /// A seek fails until fetching has started: it is tried again until it succeeds or the partition is gone.
    fn seek_pending(&mut self, consumer: &BaseConsumer<Rebalances>, context: &Rebalances) {
        self.seeks.retain(|partition, _| context.owned().contains_key(partition));
        let mut done = Vec::new();
        for (partition, (to, resume)) in &self.seeks {
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
            self.seeks.remove(&partition);
        }
    }

    /// A position outside the log: what lay there was deleted before it was read. An alarm; reading goes on at the earliest
    /// record, never silently at the end. The client has stopped fetching the partition, so it is assigned anew.
    fn resume_at_earliest(&mut self, consumer: &BaseConsumer<Rebalances>, context: &Rebalances) {
        if !self.outside {
            return;
        }
        let (Ok(positions), Ok(assigned)) = (consumer.position(), consumer.assignment()) else { return };
        let topic = &context.topic;
        let mut unclear = false;
        for element in assigned.elements() {
            let number = element.partition();
            let Ok((low, high)) = leaders::watermarks(consumer, topic, number, COORDINATOR) else {
                unclear = true;
                continue;
            };
            // Where nothing was read yet it stands where it was assigned.
            let read = positions.find_partition(topic, number).map(|found| found.offset());
            let at = match (read, element.offset()) {
                (Some(RawOffset::Offset(at)), _) | (_, RawOffset::Offset(at)) => at,
                _ => continue,
            };
            if at >= low && at <= high {
                continue;
            }
            match at > high {
                true => tracing::error!(
                    topic,
                    partition = number,
                    at,
                    low,
                    high,
                    "the position lies beyond the end of the log: the topic was created again, or has lost records"
                ),
                false => {
                    tracing::error!(topic, partition = number, at, low, "records were deleted before they were read")
                }
            }
            let partition = Partition(number.max(0) as u32);
            unclear |= self.reassign(consumer, context, partition, RawOffset::Offset(low)).is_err();
        }
        self.outside = unclear;
    }

    /// Reads a partition from another offset where the client has stopped fetching it: a seek would fail for ever.
    fn reassign(
        &self,
        consumer: &BaseConsumer<Rebalances>,
        context: &Rebalances,
        partition: Partition,
        from: RawOffset,
    ) -> Result<(), KafkaError> {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&context.topic, convert::partition(partition), from)?;
        consumer.incremental_unassign(&list)?;
        consumer.incremental_assign(&list)?;
        match self.resumed.contains(&partition) {
            true => consumer.resume(&list),
            false => consumer.pause(&list),
        }
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
    pub released: Sender<u64>,
    pub polled: mpsc::Receiver<Result<Polled, LogError>>,
}
