//! From a topic to the outside world: in order per user and destination, without one user blocking another.
//!
//! A partition's state (`partition`) is pure: records and verdicts go in, deliveries to start and progress to write come out.
//! This module runs it: it spawns attempts, keeps timers, reads what is not in memory, answers the driver.
//!
//! Each unfinished record is covered by **exactly one** of two (a third, the lane's mark, belongs to detached lanes):
//!
//! - **memory**: it counts as unfinished in the partition's `window`; the partition's progress record names the lowest such
//!   offset (`base`) and what is finished above it (`runs`), so a successor reads it again;
//! - **its key's mark**: the key is *held* (its head failed and waits). The head and as many followers as fit into a kilobyte
//!   stand in the key's own progress record and count as finished in the window. So a user who fails for hours holds nothing
//!   back.
//!
//! After a crash: the progress record with the number (`seq`) in the committed offset's metadata is the last one, since both
//! are in one transaction. Live reading starts at `base` and skips `runs`; held keys come with their marks and read their
//! records at their offsets. What was in flight and not yet committed is sent again, with the same delivery id: nothing else.
//!
//! Where memory (or the 1,000 holes of the partition record) is full, the partition takes nothing until there is room, and says
//! so in a metric and a log line.

mod backoff;
mod key;
mod memory;
mod partition;
mod permits;
mod restore;
mod window;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::clock::Clock;
use crate::delivery::verdict::Verdict;
use crate::log::{Assignment, Backend, Limit, LogError, Read, Reader};
use crate::model::outcome::Reason;
use crate::model::record::{Offset, Partition, Record, Topic};
use crate::runtime::driver::{Ask, Inbox, Work};
use crate::runtime::failure::FailureTopic;
use crate::telemetry::events;

pub use backoff::RetryPolicy;
pub use memory::{Bounds, Memory};
pub use permits::Permits;

use partition::{KeyId, PartitionState, Start};

/// What failed for the moment is tried again after this.
const AGAIN: Duration = Duration::from_millis(500);

/// A stage's logic: one attempt.
pub trait Deliver: Send + Sync + 'static {
    /// Sends one delivery once and says what came of it. `record` is as it lies in the log.
    fn attempt(&self, record: Arc<Record>) -> impl Future<Output = Verdict> + Send;
}

/// What the runtime needs to know beside the stage.
#[derive(Clone, Debug)]
pub struct DeliverSettings {
    pub input: Topic,
    pub progress: Topic,
    pub failures: FailureTopic,
    pub retry: RetryPolicy,
    pub bounds: Bounds,
    pub stage: &'static str,
}

/// Runs a [`Deliver`] stage on a log.
pub struct DeliverWork<B: Backend, D> {
    backend: B,
    admin: B::Admin,
    stage: Arc<D>,
    settings: DeliverSettings,
    permits: Permits,
    memory: Memory,
    clock: Clock,
}

impl<B: Backend, D: Deliver> DeliverWork<B, D> {
    /// # Errors
    /// Where the log cannot be asked.
    pub fn new(
        backend: B,
        stage: D,
        settings: DeliverSettings,
        permits: Permits,
        clock: Clock,
    ) -> Result<Self, LogError> {
        let memory = Memory::new(settings.bounds.process_bytes);
        let admin = backend.admin()?;
        Ok(Self { backend, admin, stage: Arc::new(stage), settings, permits, memory, clock })
    }
}

impl<B: Backend, D: Deliver> Work for DeliverWork<B, D> {
    async fn run(self: Arc<Self>, assignment: Assignment, inbox: Inbox) -> Result<(), LogError> {
        let restored = loop {
            match restore::restore(&self.backend, &self.admin, &self.settings, &assignment, &self.clock).await {
                Err(LogError::Transient(error)) => {
                    // The other partitions of this session go on meanwhile.
                    tracing::warn!(partition = assignment.partition.0, %error, "restore failed, trying again");
                    self.clock.sleep(AGAIN).await;
                }
                restored => break restored?,
            }
        };
        let state = PartitionState::new(
            assignment.partition,
            assignment.epoch,
            self.settings.clone(),
            self.memory.clone(),
            restored,
            self.clock.now(),
        );
        let from = state.live();
        let (fetch, fetches) = mpsc::channel(1);
        let (fetched_in, fetched) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        let (backend, input, clock) = (self.backend.clone(), self.settings.input.clone(), self.clock.clone());
        tasks.spawn(read_single(backend, input, assignment.partition, clock, fetches, fetched_in));
        let Inbox { records, asks, ready, bell } = inbox;
        // A driver that is gone does not want the partition any more.
        let _ = ready.send(from);
        let runner = Runner {
            work: Arc::clone(&self),
            state,
            attempts: JoinSet::new(),
            draining: None,
            stopped: false,
            starved: false,
            fetch,
            bell,
        };
        runner.run(records, asks, fetched).await
    }
}

/// A worker's moving parts.
struct Runner<B: Backend, D> {
    work: Arc<DeliverWork<B, D>>,
    state: PartitionState,
    attempts: JoinSet<(KeyId, Verdict)>,
    draining: Option<oneshot::Sender<()>>,
    stopped: bool,
    /// A delivery was ready, but no permit was free.
    starved: bool,
    fetch: mpsc::Sender<(KeyId, Offset)>,
    bell: Arc<crate::runtime::driver::Bell>,
}

impl<B: Backend, D: Deliver> Runner<B, D> {
    async fn run(
        mut self,
        mut records: mpsc::Receiver<Vec<Record>>,
        mut asks: mpsc::UnboundedReceiver<Ask>,
        mut fetched: mpsc::Receiver<(KeyId, Result<Option<Record>, LogError>)>,
    ) -> Result<(), LogError> {
        let mut freed = self.work.permits.subscribe();
        let clock = self.work.clock.clone();
        loop {
            self.start_what_may();
            let room = !self.stopped && self.state.has_room();
            let wake = self.state.next_timer().map(|at| clock.instant() + at.since(clock.now()));
            let wake = wake.unwrap_or_else(|| clock.instant() + Duration::from_secs(3_600));
            tokio::select! {
                biased;
                ask = asks.recv() => match ask {
                    Some(ask) => self.answer(ask),
                    None => return Ok(()),
                },
                Some(attempt) = self.attempts.join_next(), if !self.attempts.is_empty() => self.settle(attempt)?,
                Some((key, record)) = fetched.recv() => {
                    self.state.fetched(&key, record?, clock.now());
                    self.bell.ring();
                }
                _ = freed.changed(), if self.starved => {}
                batch = records.recv(), if room => match batch {
                    Some(batch) => {
                        self.state.admit_all(batch, clock.now());
                        self.bell.ring();
                    }
                    None => return Ok(()),
                },
                () = clock.sleep_until(wake), if !self.stopped => self.state.wake(clock.now()),
                // Room may come from another partition's memory, which rings nobody here.
                () = clock.sleep(Duration::from_millis(100)), if !room && !self.stopped => {}
            }
        }
    }

    fn start_what_may(&mut self) {
        self.starved = false;
        if self.stopped {
            if self.attempts.is_empty()
                && let Some(done) = self.draining.take()
            {
                // Whoever asked has given up waiting; the drain is over all the same.
                let _ = done.send(());
            }
            return;
        }
        while let Some(start) = self.state.next_start(&self.work.permits, self.fetch.capacity() > 0) {
            match start {
                Start::Attempt { key, record, permit } => {
                    let stage = Arc::clone(&self.work.stage);
                    self.attempts.spawn(async move {
                        let attempt = AssertUnwindSafe(stage.attempt(record)).catch_unwind().await;
                        let verdict = attempt.unwrap_or_else(|_| Verdict::Abort {
                            reason: Reason::Panicked,
                            code: 0,
                            message: "the stage panicked on this record".into(),
                        });
                        drop(permit);
                        (key, verdict)
                    });
                }
                Start::Fetch { key, offset } => {
                    // There is room: this is the only sender. A reader that has ended takes the worker down when it is joined.
                    let _ = self.fetch.try_send((key, offset));
                }
                Start::Starved => {
                    self.starved = true;
                    return;
                }
            }
        }
    }

    fn settle(&mut self, attempt: Result<(KeyId, Verdict), tokio::task::JoinError>) -> Result<(), LogError> {
        let (key, verdict) = attempt.map_err(|error| LogError::transient(format!("an attempt crashed: {error}")))?;
        self.state.settle(&key, verdict, self.work.clock.now());
        self.bell.ring();
        Ok(())
    }

    fn answer(&mut self, ask: Ask) {
        match ask {
            Ask::Collect(answer) => {
                let clean = self.stopped && self.attempts.is_empty();
                let changes = self.state.collect(clean);
                // A driver that does not wait any more has lost the partition, and drops this worker.
                let _ = answer.send(changes);
            }
            Ask::Committed => self.state.committed(),
            Ask::Drain(done) => {
                self.stopped = true;
                self.draining = Some(done);
            }
        }
    }
}

/// Reads single records at their offsets, one after the other, through a reader that is opened when it is first needed.
async fn read_single<B: Backend>(
    backend: B,
    topic: Topic,
    partition: Partition,
    clock: Clock,
    mut wanted: mpsc::Receiver<(KeyId, Offset)>,
    found: mpsc::Sender<(KeyId, Result<Option<Record>, LogError>)>,
) {
    let mut reader: Option<B::Reader> = None;
    while let Some((key, offset)) = wanted.recv().await {
        let record = loop {
            match read_at(&backend, &topic, partition, &mut reader, offset).await {
                Err(LogError::Transient(error)) => {
                    tracing::warn!(partition = partition.0, %error, "a delivery could not be read, trying again");
                    clock.sleep(AGAIN).await;
                }
                record => break record,
            }
        };
        if found.send((key, record)).await.is_err() {
            return;
        }
    }
}

async fn read_at<B: Backend>(
    backend: &B,
    topic: &Topic,
    partition: Partition,
    reader: &mut Option<B::Reader>,
    offset: Offset,
) -> Result<Option<Record>, LogError> {
    let open = match reader.take() {
        Some(mut open) => {
            open.seek(offset).await?;
            open
        }
        None => backend.reader(topic, partition, offset).await?,
    };
    let open = reader.insert(open);
    loop {
        let Read::Records(records) = open.read(Limit { records: 1, bytes: 1 }).await? else {
            // The end before it: a replica that took over does not show it yet.
            return Err(LogError::transient(format!("nothing is to be read at {topic}/{partition}/{offset} yet")));
        };
        match records.into_iter().find(|record| record.offset >= offset) {
            Some(record) if record.offset == offset => return Ok(Some(record)),
            // What follows stands in its place: the log has deleted it.
            Some(_) => return Ok(None),
            None => {}
        }
    }
}

/// Tells when a partition begins or ends waiting.
fn tell_waiting(stage: &str, partition: Partition, before: Option<&'static str>, now: Option<&'static str>) {
    if before == now {
        return;
    }
    if let Some(reason) = before {
        events::waiting(stage, partition, reason, false);
    }
    if let Some(reason) = now {
        events::waiting(stage, partition, reason, true);
    }
}
