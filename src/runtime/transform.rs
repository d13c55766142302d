//! From topic to topic, exactly once: each input ends in one outcome, and outputs, failures and offsets become visible
//! together. A partition works ahead on its own, chunks of it on all cores; results are put together in input order. After the
//! process has ended over the same records twice they run one by one ([`stops`]).

mod memory;
mod stops;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinHandle;

use crate::clock::Clock;
use crate::log::{Admin, Assignment, Backend, Committed, Guarantee, LogError, Session};
use crate::model::outcome::{Outcome, Reason};
use crate::model::record::{Addressed, Offset, Partition, Record, header};
use crate::model::seen::Identity;
use crate::runtime::driver::{Ask, Changes, Inbox, Work};
use crate::runtime::failure::{Cause, FailureTopic};
use crate::telemetry::events;

pub use memory::Memory;
use memory::Remembered;
use stops::{Alone, Stops};

/// Records that one core works on at a time: small enough that both cores get some, large enough to be worth the hand-over.
const CHUNK: usize = 64;
/// A question that the log did not answer is repeated after this.
const AGAIN: Duration = Duration::from_millis(500);
/// Outputs kept until the next commit. Beyond it the partition takes nothing.
const FINISHED_BYTES: usize = 16 << 20;

/// A stage's logic.
pub trait Transform: Send + Sync + 'static {
    /// One outcome for each record, in their order. No I/O and no waiting.
    fn process(&self, records: &[Record]) -> Vec<Outcome>;

    /// Where failures go.
    fn failures(&self) -> &FailureTopic;

    /// What tells a record from all others, where the stage knows. Within the memory's window it is processed once.
    fn identity(&self, _record: &Record) -> Option<Identity> {
        None
    }

    /// A record has come again and is not processed.
    fn duplicate(&self, _record: &Record) {}

    /// What is written about a chunk beside its outputs, in the same commit: its records with their outcomes, and those that
    /// have come again.
    fn beside(&self, _records: &[Record], _outcomes: &[Outcome], _known: &[Record]) -> Vec<Addressed> {
        Vec::new()
    }
}

/// Runs a [`Transform`].
pub struct TransformWork<B, T> {
    backend: B,
    clock: Clock,
    stage: Arc<T>,
    parallel: usize,
    /// Of this start of this process.
    process: String,
    /// Whose records may run one by one: one partition at a time.
    alone: Arc<Semaphore>,
    memory: Option<Memory>,
}

impl<B: Backend, T: Transform> TransformWork<B, T> {
    /// `parallel` chunks of a partition run at a time. With a memory, records that come again are known.
    pub fn new(backend: B, clock: Clock, stage: T, parallel: usize, memory: Option<Memory>) -> Self {
        let process = uuid::Uuid::new_v4().simple().to_string();
        let (stage, alone) = (Arc::new(stage), Arc::new(Semaphore::new(1)));
        Self { backend, clock, stage, parallel: parallel.max(1), process, alone, memory }
    }

    /// What earlier owners of the partition have processed, where the stage wants to know.
    async fn remember(&self, partition: Partition, start: Offset) -> Result<Option<Remembered>, LogError> {
        let Some(memory) = &self.memory else { return Ok(None) };
        let failures = self.stage.failures();
        loop {
            let restored =
                memory.restore(&self.backend, &self.clock, failures.stage, &failures.input, partition, start);
            match restored.await {
                Err(LogError::Transient(error)) => {
                    // The other partitions of this session go on meanwhile.
                    tracing::warn!(partition = partition.0, %error, "what was seen cannot be read, trying again");
                    self.clock.sleep(AGAIN).await;
                }
                restored => return restored.map(Some),
            }
        }
    }

    /// What the partition's last owner left.
    async fn stops(&self, partition: Partition, committed: Option<&Committed>) -> Result<Stops, LogError> {
        let start = committed.map_or(Offset::START, |committed| committed.offset);
        let mut stops = Stops::new(committed.map(|committed| committed.metadata.as_str()), &self.process);
        if B::Session::GUARANTEE == Guarantee::ExactlyOnce {
            stops.forget_rerun();
        }
        if stops.is_unclean() {
            let (admin, input) = (self.backend.admin()?, &self.stage.failures().input);
            let end = loop {
                match admin.watermarks(input, partition).await {
                    Err(LogError::Transient(error)) => {
                        // The other partitions of this session go on meanwhile.
                        tracing::warn!(partition = partition.0, %error, "where the log ends is not known, asking again");
                        self.clock.sleep(AGAIN).await;
                    }
                    marks => break marks?.end,
                }
            };
            stops.bound(start, end);
        }
        if stops.is_unclean() {
            let alone = stops.alone(start);
            events::unclean_stop(self.stage.failures().stage, partition, stops.count(), alone);
        }
        Ok(stops)
    }
}

impl<B: Backend, T: Transform> Work for TransformWork<B, T> {
    async fn run(self: Arc<Self>, assignment: Assignment, mut inbox: Inbox) -> Result<(), LogError> {
        let committed = assignment.committed;
        let start = committed.as_ref().map_or(Offset::START, |committed| committed.offset);
        let remembered = self.remember(assignment.partition, start).await?;
        let mut lane = Running {
            stage: Arc::clone(&self.stage),
            chunks: FuturesOrdered::new(),
            finished: Finished::default(),
            position: start,
            partition: assignment.partition,
            remembered,
            stops: self.stops(assignment.partition, committed.as_ref()).await?,
            turn: None,
            waiting: VecDeque::new(),
            stopped: false,
        };
        let mut turn = Box::pin(Arc::clone(&self.alone).acquire_owned());
        // A driver that is gone does not want the partition any more.
        let _ = inbox.ready.send(start);
        let mut draining: Option<oneshot::Sender<()>> = None;
        loop {
            lane.start();
            if lane.stops.is_news() {
                inbox.bell.ring();
            }
            if lane.stopped && lane.chunks.is_empty() {
                draining.take().map(|done| done.send(()));
            }
            let wants_turn = lane.wants_turn();
            let is_full = lane.chunks.len() >= self.parallel || lane.finished.bytes >= FINISHED_BYTES;
            let room = !lane.stopped && lane.waiting.is_empty() && !is_full;
            tokio::select! {
                biased;
                ask = inbox.asks.recv() => match ask {
                    Some(Ask::Collect(answer)) => drop(answer.send(lane.collect())),
                    Some(Ask::Committed) => lane.committed(),
                    Some(Ask::Drain(done)) => {
                        lane.stopped = true;
                        draining = Some(done);
                        // A turn that is given to who does not take it is nobody's.
                        turn = Box::pin(Arc::clone(&self.alone).acquire_owned());
                    }
                    None => return Ok(()),
                },
                Some(chunk) = lane.chunks.next() => {
                    lane.add(chunk)?;
                    inbox.bell.ring();
                    if lane.finished.bytes >= FINISHED_BYTES {
                        inbox.bell.ring_full();
                    }
                }
                // Kept while it waits: who asks anew goes to the end of the queue.
                given = &mut turn, if wants_turn => {
                    lane.turn = given.ok();
                    turn = Box::pin(Arc::clone(&self.alone).acquire_owned());
                }
                batch = inbox.records.recv(), if room => match batch {
                    Some(batch) => {
                        inbox.bell.ring();
                        lane.waiting.extend(batch);
                    }
                    None => return Ok(()),
                },
            }
        }
    }
}

/// A partition that is being run.
struct Running<T> {
    stage: Arc<T>,
    chunks: FuturesOrdered<JoinHandle<Worked>>,
    finished: Finished,
    /// Everything below is finished.
    position: Offset,
    partition: Partition,
    /// What has come before, where the stage wants to know.
    remembered: Option<Remembered>,
    stops: Stops,
    /// To run records one by one: held until no note of one stands any more.
    turn: Option<OwnedSemaphorePermit>,
    /// What has come and may not run yet.
    waiting: VecDeque<Record>,
    stopped: bool,
}

/// What a partition has finished and not handed to a commit yet.
#[derive(Default)]
struct Finished {
    outputs: Vec<Addressed>,
    bytes: usize,
    /// Whether the position has moved.
    moved: bool,
}

impl<T: Transform> Running<T> {
    /// Starts what has come and may run.
    fn start(&mut self) {
        if self.stopped {
            if self.chunks.is_empty() {
                self.stops.rest();
            }
            return;
        }
        if self.chunks.is_empty() && self.waiting.is_empty() {
            self.stops.ended(self.position);
        }
        while let Some(first) = self.waiting.front().map(|record| record.offset) {
            if self.stops.alone(first).is_some() {
                // One after the other: what has ended is noted with the next.
                if self.turn.is_none() || !self.chunks.is_empty() || !self.start_alone(first) {
                    return;
                }
                continue;
            }
            let Some(last) = self.waiting.back().map(|record| record.offset) else { return };
            if !self.stops.together(last) {
                return;
            }
            let come = self.waiting.drain(..).collect();
            let (new, mut known) = self.unless_known(come);
            let mut chunks = split(new);
            // What was left out is passed with the first chunk that ends behind it.
            let end = chunks.pop().unwrap_or_default();
            for chunk in chunks {
                let until = chunk.last().map_or(Offset::START, |last| last.offset);
                let passed = known.partition_point(|record| record.offset < until);
                let later = known.split_off(passed);
                self.spawn(chunk, std::mem::replace(&mut known, later), None);
            }
            self.spawn(end, known, Some(last.just_after()));
        }
    }

    /// The next record is to run alone, and another partition may be at that.
    fn wants_turn(&self) -> bool {
        let first = self.waiting.front().map(|record| record.offset);
        self.turn.is_none() && !self.stopped && first.is_some_and(|first| self.stops.alone(first).is_some())
    }

    fn committed(&mut self) {
        self.stops.committed();
        if !self.stops.is_alone() {
            self.turn = None;
        }
    }

    /// True: the record is under way, or has ended.
    fn start_alone(&mut self, at: Offset) -> bool {
        match self.stops.one(at) {
            Alone::Note => return false,
            Alone::Run => {
                let Some(record) = self.waiting.pop_front() else { return false };
                let upto = record.offset.just_after();
                let (new, known) = self.unless_known(vec![record]);
                self.spawn(new, known, Some(upto));
            }
            Alone::Poison => {
                let Some(record) = self.waiting.pop_front() else { return false };
                let upto = Some(record.offset.just_after());
                // Its copies are as deadly: they are known from here on.
                let (mut new, known) = self.unless_known(vec![record]);
                let Some(record) = new.pop() else {
                    self.finish((beside(&*self.stage, &[], &[], &known), upto, Vec::new()));
                    return true;
                };
                let failures = self.stage.failures();
                let message = "the process ended while the stage ran this record, again and again";
                events::poison(failures.stage, record.partition, &record.offset);
                let key = record.key.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
                let failure = failures.record(&record, &Cause::untried(Reason::Panicked, message, &key));
                let (reason, records) = (Reason::Panicked, [record]);
                let outcomes = [Outcome::Failed { reason, failure }];
                let mut outputs = beside(&*self.stage, &records, &outcomes, &[]);
                outputs.extend(outcomes.into_iter().filter_map(Outcome::failure));
                self.finish((outputs, upto, Vec::new()));
            }
        }
        true
    }

    /// What is new, and what has come before.
    fn unless_known(&mut self, records: Vec<Record>) -> (Vec<Record>, Vec<Record>) {
        let Some(remembered) = &mut self.remembered else { return (records, Vec::new()) };
        let stage = &self.stage;
        let (new, known): (Vec<Record>, Vec<Record>) = records.into_iter().partition(|record| {
            let identity = stage.identity(record);
            identity.is_none_or(|it| remembered.is_new(it, record.offset, record.timestamp))
        });
        known.iter().for_each(|record| stage.duplicate(record));
        (new, known)
    }

    /// Runs a chunk; all below `upto` is done then.
    fn spawn(&mut self, chunk: Vec<Record>, known: Vec<Record>, upto: Option<Offset>) {
        let stage = Arc::clone(&self.stage);
        self.chunks.push_back(tokio::task::spawn_blocking(move || work(&*stage, &chunk, &known, upto)));
    }

    fn add(&mut self, chunk: Result<Worked, tokio::task::JoinError>) -> Result<(), LogError> {
        self.finish(chunk.map_err(|error| LogError::transient(format!("a chunk crashed: {error}")))?);
        Ok(())
    }

    fn finish(&mut self, (mut outputs, position, failed): Worked) {
        if let Some(rerun) = self.stops.rerun() {
            let deliveries = outputs.iter_mut().filter(|output| output.headers.text(header::DELIVERY_ID).is_some());
            deliveries.for_each(|output| output.headers.push_text(header::RERUN, rerun));
        }
        if let Some(remembered) = &mut self.remembered {
            remembered.failed(&failed);
        }
        self.finished.bytes += outputs.iter().map(Addressed::size).sum::<usize>();
        self.finished.outputs.extend(outputs);
        self.position = position.unwrap_or(self.position);
        self.finished.moved = true;
    }

    fn collect(&mut self) -> Option<Changes> {
        let finished = std::mem::take(&mut self.finished);
        if !finished.moved && !self.stops.is_news() {
            return None;
        }
        let position = Committed { offset: self.position, metadata: self.stops.hand_over() };
        let mut outputs = finished.outputs;
        outputs.extend(self.remembered.as_mut().and_then(|it| it.hand_over(self.partition, self.position)));
        Some(Changes { outputs, last: None, position })
    }
}

fn split(batch: Vec<Record>) -> Vec<Vec<Record>> {
    let mut rest = batch;
    let mut chunks = Vec::with_capacity(rest.len().div_ceil(CHUNK));
    while rest.len() > CHUNK {
        let tail = rest.split_off(CHUNK);
        chunks.push(std::mem::replace(&mut rest, tail));
    }
    chunks.push(rest);
    chunks
}

/// Outputs, what is done up to, and which records failed.
type Worked = (Vec<Addressed>, Option<Offset>, Vec<Offset>);

fn work<T: Transform>(stage: &T, records: &[Record], known: &[Record], upto: Option<Offset>) -> Worked {
    let outcomes = process(stage, records);
    let beside = beside(stage, records, &outcomes, known);
    let (mut outputs, mut failed) = (Vec::with_capacity(records.len() + beside.len()), Vec::new());
    for (record, outcome) in records.iter().zip(outcomes) {
        match outcome {
            Outcome::Produced(produced) => outputs.extend(produced),
            Outcome::Filtered(_) => {}
            Outcome::Failed { failure, .. } => {
                outputs.push(failure);
                failed.push(record.offset);
            }
        }
    }
    outputs.extend(beside);
    (outputs, upto.or_else(|| records.last().map(|record| record.offset.just_after())), failed)
}

/// Without it where the stage panics: it must not cost what it is beside.
fn beside<T: Transform>(stage: &T, records: &[Record], outcomes: &[Outcome], known: &[Record]) -> Vec<Addressed> {
    let written = catch_unwind(AssertUnwindSafe(|| stage.beside(records, outcomes, known)));
    written.unwrap_or_else(|_| {
        tracing::error!(stage = stage.failures().stage, "the stage panicked on what it writes beside its outputs");
        Vec::new()
    })
}

/// Runs the stage on a chunk. Where it panics the chunk is halved until the record that makes it panic stands alone: one
/// poisonous event never costs another.
fn process<T: Transform>(stage: &T, records: &[Record]) -> Vec<Outcome> {
    let outcomes = catch_unwind(AssertUnwindSafe(|| stage.process(records)));
    match outcomes {
        Ok(outcomes) if outcomes.len() == records.len() => outcomes,
        _ if records.len() > 1 => {
            let (left, right) = records.split_at(records.len() / 2);
            let mut outcomes = process(stage, left);
            outcomes.extend(process(stage, right));
            outcomes
        }
        _ => records.iter().map(|record| poisonous(stage, record)).collect(),
    }
}

fn poisonous<T: Transform>(stage: &T, record: &Record) -> Outcome {
    let failures = stage.failures();
    events::panicked(failures.stage, record.partition, &record.offset);
    let key = record.key.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
    let cause = Cause::untried(Reason::Panicked, "the stage panicked on this record", &key);
    Outcome::Failed { reason: Reason::Panicked, failure: failures.record(record, &cause) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::log::embedded::Embedded;
    use crate::log::embedded::memory::Faults;
    use crate::log::partitioner::{IsolateBy, Placement};
    use crate::log::topic::Topics;
    use crate::log::{Limit, Member, Publisher, Read, Reader};
    use crate::model::record::{Headers, Topic};
    use crate::runtime::driver;
    use crate::runtime::shutdown::Shutdown;
    use crate::telemetry::server::Readiness;

    struct Picky(FailureTopic);

    impl Transform for Picky {
        fn process(&self, records: &[Record]) -> Vec<Outcome> {
            records
                .iter()
                .map(|record| {
                    assert_ne!(record.offset.raw() % 10, 7, "sevens are poisonous");
                    Outcome::Produced(vec![Addressed {
                        topic: Topic::DELIVERIES,
                        partition: Partition(0),
                        key: None,
                        value: Some(record.offset.to_string().into()),
                        headers: Headers::new(),
                    }])
                })
                .collect()
        }

        fn failures(&self) -> &FailureTopic {
            &self.0
        }
    }

    /// Ends the process at `poison`, as native code would: the record's thread never comes back.
    struct Deadly {
        failures: FailureTopic,
        died: tokio::sync::mpsc::UnboundedSender<()>,
        is_over: Arc<std::sync::atomic::AtomicBool>,
    }

    impl Transform for Deadly {
        fn process(&self, records: &[Record]) -> Vec<Outcome> {
            let outcome = |record: &Record| {
                if record.value.as_deref() == Some(b"poison") {
                    self.died.send(()).expect("somebody counts");
                    while !self.is_over.load(std::sync::atomic::Ordering::Relaxed) {
                        std::thread::park_timeout(std::time::Duration::from_millis(1));
                    }
                }
                Outcome::Produced(vec![Addressed {
                    topic: Topic::DELIVERIES,
                    partition: Partition(0),
                    key: None,
                    value: record.value.clone(),
                    headers: Headers::new(),
                }])
            };
            records.iter().map(outcome).collect()
        }

        fn failures(&self) -> &FailureTopic {
            &self.failures
        }
    }

    fn failure_topic() -> FailureTopic {
        let placement = Placement { isolate_by: IsolateBy::None, spread: None, partitions: 1 };
        FailureTopic {
            topic: Topic::PROC_ERRORS,
            placement,
            stage: "test",
            input: Topic::EVENTS,
            input_name: "p.events".into(),
            group: "p.g".into(),
        }
    }

    async fn read_all(log: &Embedded, topic: &Topic) -> Vec<Record> {
        let mut reader = log.reader(topic, Partition(0), Offset::START).await.expect("a reader");
        let mut found = Vec::new();
        while let Read::Records(records) = reader.read(Limit { records: 1_000, bytes: 1 << 20 }).await.expect("read") {
            found.extend(records);
        }
        found
    }

    #[tokio::test]
    async fn a_record_that_ends_the_process_is_isolated_and_everything_else_goes_through() {
        let clock = Clock::system();
        let log = Embedded::in_memory(Faults::none(), clock.clone()).await.expect("a log");
        for spec in Topics::load(None).expect("topics").with_partitions(1).iter() {
            log.admin().expect("an admin").create(spec).await.expect("created");
        }
        let event = |n: u32| {
            let value = if n == 120 { "poison".to_owned() } else { n.to_string() };
            let (topic, partition, headers) = (Topic::EVENTS, Partition(0), Headers::new());
            Addressed { topic, partition, key: None, value: Some(value.into()), headers }
        };
        log.publisher().expect("a publisher").publish((0..200).map(event).collect()).await.expect("published");
        let (died, mut deaths) = tokio::sync::mpsc::unbounded_channel();
        let mut count = 0;
        loop {
            let is_over = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let stage = Deadly { failures: failure_topic(), died: died.clone(), is_over: Arc::clone(&is_over) };
            let settings = driver::Settings {
                partitions: 1,
                member: Member {
                    group: "g".into(),
                    instance: "one".into(),
                    topic: Topic::EVENTS,
                    outputs: vec![Topic::DELIVERIES],
                    state: None,
                    session_timeout: std::time::Duration::from_secs(6),
                    revoke_drain: std::time::Duration::from_secs(1),
                },
                commit_interval: std::time::Duration::from_millis(1),
                stage: "test",
            };
            let work = Arc::new(TransformWork::new(log.clone(), clock.clone(), stage, 2, None));
            let (shutdown, ready) = (Shutdown::new(std::time::Duration::from_secs(1)), Readiness::default().part());
            let process = tokio::spawn(driver::run(log.clone(), work, settings, clock.clone(), shutdown, ready));
            let all_through = async {
                while read_all(&log, &Topic::DELIVERIES).await.len() < 199 {
                    clock.sleep(std::time::Duration::from_millis(5)).await;
                }
            };
            let has_died = tokio::select! {
                _ = deaths.recv() => true,
                () = all_through => false,
            };
            process.abort();
            assert!(process.await.is_err_and(|error| error.is_cancelled()), "the driver does not end by itself");
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            if !has_died {
                break;
            }
            count += 1;
            assert!(count < 10, "it is not isolated");
        }
        assert_eq!(count, 4, "twice together, twice alone");
        let values: Vec<String> = read_all(&log, &Topic::DELIVERIES)
            .await
            .iter()
            .map(|record| String::from_utf8_lossy(record.value.as_deref().unwrap_or_default()).into_owned())
            .collect();
        let expected: Vec<String> = (0..200).filter(|n| *n != 120).map(|n| n.to_string()).collect();
        assert_eq!(values, expected, "each once, in order");
        assert_eq!(read_all(&log, &Topic::PROC_ERRORS).await.len(), 1);
    }

    #[test]
    fn a_poisonous_record_costs_no_other() {
        let stage = Picky(failure_topic());
        let records: Vec<Record> = (0..64)
            .map(|n| Record {
                partition: Partition(0),
                offset: Offset::new(n),
                timestamp: Timestamp::default(),
                key: None,
                value: None,
                headers: Headers::new(),
            })
            .collect();
        let (outputs, position, _) = work(&stage, &records, &[], None);
        assert_eq!(position, Some(Offset::new(64)));
        assert_eq!(outputs.len(), 64);
        let failed: Vec<usize> = (0..64).filter(|n| outputs[*n].topic == Topic::PROC_ERRORS).collect();
        assert_eq!(failed, [7, 17, 27, 37, 47, 57], "in their places");
    }
}
