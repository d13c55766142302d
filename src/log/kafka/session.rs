//! A group member on Kafka: the async face of the two threads.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use crate::log::{Assignment, Commit, Committer, Guarantee, Limit, LogError, Member, Polled, Session};
use crate::model::record::{Epoch, Offset, Partition};

use super::admin::KafkaAdmin;
use super::config::KafkaConfig;
use super::consume::{self, Command, Limits, Owned, Rebalances};
use super::hanging::{self, DECIDED};
use super::known::Known;
use super::membership::{self, Watched};
use super::transact::{Order, Receipts, TransactionalProducer, Transactions};
use super::{convert, thread};

/// Batches that wait for the runtime: with librdkafka's own queue behind them, more would only be memory.
const BATCHES: usize = 2;

/// A poll without anything to tell ends after so long.
const IDLE: Duration = Duration::from_millis(200);

/// So long a commit may take. The broker has ended its transaction by then, if it has begun: its time-out, and the broker's search
/// for those that are over it. librdkafka's call that sends offsets waits for ever where the group's coordinator has moved and the old one stays away (2.12:
/// the time-out of its look for coordinators is set and never looked at). The thread in it is left behind, with its client, until
/// the call comes back; a new session fences it.
const ANSWER: Duration = DECIDED.saturating_add(Duration::from_secs(5));
/// The same for the first transaction of a session's life, and what comes before it.
const START: Duration = Duration::from_secs(60);

/// Leaving the group takes a moment.
const LEAVE: Duration = Duration::from_secs(5);

pub struct KafkaSession {
    ends: consume::Ends,
    /// What looks after it.
    watches: [AbortOnDropHandle<()>; 2],
    orders: Sender<Order>,
    limits: Arc<Limits>,
    /// Which epoch of a partition this session has been told of: what a command is about.
    epochs: BTreeMap<Partition, Epoch>,
    /// Where each partition was assigned, until it is sought or read.
    starts: BTreeMap<Partition, Offset>,
    /// How often partitions were revoked; the next poll says that the last of these are released.
    revokes: u64,
    owes_release: bool,
}

impl KafkaSession {
    pub(super) async fn join(config: &KafkaConfig, admin: KafkaAdmin, member: Member) -> Result<Self, LogError> {
        let (polled_in, polled) = mpsc::channel(BATCHES);
        let (released, released_in) = channel();
        let (commands, commands_in) = channel();
        let (orders, orders_in) = channel();
        let owned = Owned::default();
        let topic = config.topic(&member.topic);
        let wait = member.release_timeout();
        let decided = config.observer(&member.group, "read_uncommitted");
        let tell = polled_in.downgrade();
        let context = Rebalances::new(topic.clone(), polled_in, Arc::clone(&owned), released_in, wait, decided);
        let consumer: BaseConsumer<Rebalances> =
            config.consumer(&member).create_with_context(context).map_err(convert::error)?;
        let producer: TransactionalProducer =
            config.transactional(&member).create_with_context(Receipts::default()).map_err(convert::error)?;
        let consumer = Arc::new(consumer);
        let limits = Arc::new(Limits { records: AtomicUsize::new(500), bytes: AtomicUsize::new(1 << 20) });

        let transactions = Transactions {
            config: config.clone(),
            producer,
            consumer: Arc::downgrade(&consumer),
            group: member.group.clone(),
            topic: topic.clone(),
            owned: Arc::clone(&owned),
            known: Known::default(),
            names: convert::Names::default(),
            admin: admin.clone(),
            outputs: member.outputs.clone(),
        };
        launch("kafka-transact", transactions, Transactions::begin_life, move |it| it.run(&orders_in)).await?;

        let bounds = Arc::clone(&limits);
        let polls = Arc::new(AtomicUsize::new(0));
        let watched = Watched {
            admin: admin.clone(),
            group: config.group(&member.group),
            topic: topic.clone(),
            instance: KafkaConfig::member(&member),
            owned,
            polls: Arc::clone(&polls),
            polled: tell,
        };
        let subscribe =
            move |consumer: &mut Arc<BaseConsumer<_>>| consumer.subscribe(&[&topic]).map_err(convert::error);
        let consume = move |consumer: Arc<_>| consume::run(&consumer, &commands_in, &bounds, &polls);
        launch("kafka-consume", consumer, subscribe, consume).await?;
        let ends = consume::Ends { commands, released, polled };
        Ok(Self {
            ends,
            watches: [hanging::mend(admin, member.outputs, orders.clone()), membership::watch(watched)],
            orders,
            limits,
            epochs: BTreeMap::new(),
            starts: BTreeMap::new(),
            revokes: 0,
            owes_release: false,
        })
    }

    fn with_epochs(&self, partitions: &[Partition]) -> Vec<(Partition, Epoch)> {
        partitions.iter().filter_map(|partition| Some((*partition, *self.epochs.get(partition)?))).collect()
    }

    fn command(&self, command: Command) -> Result<(), LogError> {
        self.ends.commands.send(command).map_err(|_| LogError::broken("the kafka consumer has ended"))
    }
}

/// Starts a thread, and waits until what it runs has started well.
async fn launch<T: Send + 'static>(
    name: &str,
    mut what: T,
    start: impl FnOnce(&mut T) -> Result<(), LogError> + Send + 'static,
    run: impl FnOnce(T) + Send + 'static,
) -> Result<(), LogError> {
    let (started, has_started) = oneshot::channel();
    thread(name, move || {
        let outcome = start(&mut what);
        let is_well = outcome.is_ok();
        let _ = started.send(outcome);
        if is_well {
            run(what);
        }
    })?;
    let hangs = |_| LogError::transient("the kafka client does not start");
    tokio::time::timeout(START, has_started)
        .await
        .map_err(hangs)?
        .map_err(|_| LogError::transient("the kafka client ended"))?
}

/// To the thread that runs a session's transactions.
pub struct KafkaCommitter(Sender<Order>);

impl Committer for KafkaCommitter {
    async fn commit(&mut self, commit: Arc<Commit>) -> Result<(), LogError> {
        let (done, answer) = oneshot::channel();
        let ended = || LogError::broken("the kafka producer has ended");
        self.0.send((commit, done)).map_err(|_| ended())?;
        let hangs = |_| LogError::broken("the kafka client does not come back from a transaction");
        tokio::time::timeout(ANSWER, answer).await.map_err(hangs)?.map_err(|_| ended())?
    }
}

impl Session for KafkaSession {
    const GUARANTEE: Guarantee = Guarantee::ExactlyOnce;
    type Committer = KafkaCommitter;

    async fn poll(&mut self, limit: Limit) -> Result<Polled, LogError> {
        if std::mem::take(&mut self.owes_release) {
            // The consumer has given up waiting, or ended: either is told in line.
            let _ = self.ends.released.send(self.revokes);
        }
        self.limits.records.store(limit.records, Ordering::Relaxed);
        self.limits.bytes.store(limit.bytes, Ordering::Relaxed);
        let Ok(polled) = tokio::time::timeout(IDLE, self.ends.polled.recv()).await else { return Ok(Polled::Idle) };
        let polled = polled.unwrap_or_else(|| Err(LogError::broken("the kafka consumer has ended")))?;
        match &polled {
            Polled::Assigned(given) => {
                for Assignment { partition, epoch, committed } in given {
                    self.epochs.insert(*partition, *epoch);
                    let start = committed.as_ref().map_or(Offset::START, |committed| committed.offset);
                    self.starts.insert(*partition, start);
                }
            }
            Polled::Revoked(_) => {
                self.revokes += 1;
                self.owes_release = true;
            }
            Polled::Lost(gone) => self.epochs.retain(|partition, _| !gone.contains(partition)),
            Polled::Records(_) | Polled::Idle => {}
        }
        Ok(polled)
    }

    fn seek(&mut self, partition: Partition, to: Offset) -> Result<(), LogError> {
        // It was assigned there: nothing is to be done, and nothing can go wrong.
        if self.starts.remove(&partition) == Some(to) {
            return Ok(());
        }
        self.epochs.get(&partition).map_or(Ok(()), |epoch| self.command(Command::Seek(partition, *epoch, to)))
    }

    fn pause(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.command(Command::Pause(self.with_epochs(partitions)))
    }

    fn resume(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.command(Command::Resume(self.with_epochs(partitions)))
    }

    fn committer(&self) -> KafkaCommitter {
        KafkaCommitter(self.orders.clone())
    }

    async fn close(self) {
        let consume::Ends { commands, released, polled } = self.ends;
        // Nobody takes what is still told: a thread that waits to tell it must not wait for ever.
        drop((self.watches, self.orders, released, polled));
        let (done, closed) = oneshot::channel();
        if commands.send(Command::Close(done)).is_ok() {
            // Dropped, not sent, when the group has been left. Without a broker there is nobody to tell.
            let _ = tokio::time::timeout(LEAVE, closed).await;
        }
    }
}
