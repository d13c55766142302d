//! Writing to Kafka without reading: idempotent, acknowledged by all replicas.
//!
//! An idempotent producer that loses its broker at the wrong moment may never send again, though the broker is back. So a
//! producer whose records timed out while it got nothing acknowledged is replaced.
//!
//! A partition's first record is acknowledged before others follow it ([`super::known`]).

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rdkafka::client::ClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::producer::{DeliveryResult, NoCustomPartitioner, ProducerContext, ThreadedProducer};
use tokio::sync::{Notify, oneshot};

use crate::clock::Clock;
use crate::log::{LogError, Publisher};
use crate::model::record::{Addressed, Partition, Topic};
use crate::telemetry::events;

use super::config::KafkaConfig;
use super::convert::{self, Names};
use super::known::{Acquaintance, Known};

/// So many bytes may wait for first records: as many as the client's own queue takes.
const WAITING: usize = 64 << 20;

#[derive(Clone)]
pub struct KafkaPublisher(Arc<Shared>);

struct Shared {
    config: KafkaConfig,
    current: Mutex<Arc<Client>>,
}

/// One producer. Whoever waits for it holds it.
struct Client {
    config: KafkaConfig,
    producer: Option<ThreadedProducer<Acknowledgements>>,
    shared: Arc<Reports>,
}

/// What delivery reports say of a producer.
#[derive(Default)]
struct Reports {
    /// Records that the broker has acknowledged.
    acknowledged: AtomicU64,
    known: Mutex<Known>,
    /// The first record of some partition has been answered for.
    met: Notify,
    /// How many of them were refused, and the last one's reason.
    refusals: AtomicU64,
    refusal: Mutex<Option<KafkaError>>,
    /// Of records that wait for others' first ones.
    waiting_bytes: AtomicUsize,
}

/// The records of one call: whoever acknowledges the last one answers.
pub struct Waiting {
    outstanding: AtomicUsize,
    answer: Mutex<Answer>,
    /// The record is the first one there.
    first: Option<(Topic, Partition)>,
}

#[derive(Default)]
struct Answer {
    first_refusal: Option<KafkaError>,
    to: Option<oneshot::Sender<Result<(), KafkaError>>>,
}

impl Waiting {
    /// Waits for so many records, and for one more answer: it cannot end before all are on their way.
    fn new(
        records: usize,
        first: Option<(Topic, Partition)>,
    ) -> (Arc<Self>, oneshot::Receiver<Result<(), KafkaError>>) {
        let (done, answer) = oneshot::channel();
        let outstanding = AtomicUsize::new(records + 1);
        let waiting = Self { outstanding, answer: Mutex::new(Answer { first_refusal: None, to: Some(done) }), first };
        (Arc::new(waiting), answer)
    }

    fn one_less(&self, error: Option<KafkaError>) {
        if let Some(error) = error {
            self.answer().first_refusal.get_or_insert(error);
        }
        if self.outstanding.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let mut answer = self.answer();
        if let Some(done) = answer.to.take() {
            // The client of a request that was given up does not wait any more.
            let _ = done.send(answer.first_refusal.take().map_or(Ok(()), Err));
        }
    }

    fn answer(&self) -> MutexGuard<'_, Answer> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct Acknowledgements(Arc<Reports>);

impl Reports {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refusal(&self) -> KafkaError {
        let refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        refusal.clone().unwrap_or(KafkaError::Canceled)
    }

    fn is_known(&self, records: &[Addressed]) -> bool {
        let (now, mut known) = (Clock::system().instant(), self.known());
        records.iter().all(|record| matches!(known.of(record, now), Acquaintance::Known(_)))
    }

    /// Which of these are to be sent alone now, by this call, and whether others have to wait for a first one.
    fn look(&self, records: &[Addressed]) -> (Vec<usize>, bool) {
        let (mut mine, mut waits) = (Vec::new(), false);
        let now = Clock::system().instant();
        let mut known = self.known();
        for (index, record) in records.iter().enumerate() {
            match known.of(record, now) {
                Acquaintance::Known(_) => {}
                Acquaintance::Introduced => waits = true,
                Acquaintance::Unknown => {
                    known.set(&record.topic, record.partition, Acquaintance::Introduced);
                    mine.push(index);
                }
            }
        }
        (mine, waits)
    }

    fn meet(&self, (topic, partition): &(Topic, Partition), refusal: Option<&KafkaError>) {
        if let Some(error) = refusal {
            *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
            self.refusals.fetch_add(1, Ordering::Release);
        }
        let now = Acquaintance::Known(Clock::system().instant());
        self.known().set(topic, *partition, if refusal.is_none() { now } else { Acquaintance::Unknown });
        self.met.notify_waiters();
    }
}

/// What waits for others' first records, outside of the client's own queue: bounded as that is.
struct Room<'a> {
    reports: &'a Reports,
    bytes: usize,
}

impl<'a> Room<'a> {
    fn take(reports: &'a Reports, records: &[Addressed]) -> Result<Self, KafkaError> {
        let bytes = records.iter().map(Addressed::size).sum();
        let room = Self { reports, bytes };
        match reports.waiting_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > WAITING {
            true => Err(KafkaError::MessageProduction(Code::QueueFull)),
            false => Ok(room),
        }
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.reports.waiting_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl ClientContext for Acknowledgements {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        convert::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        convert::told("kafka publisher", &error, reason);
    }
}

impl ProducerContext<NoCustomPartitioner> for Acknowledgements {
    type DeliveryOpaque = Arc<Waiting>;

    fn delivery(&self, result: &DeliveryResult<'_>, waiting: Arc<Waiting>) {
        if result.is_ok() {
            self.0.acknowledged.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(first) = &waiting.first {
            self.0.meet(first, result.as_ref().err().map(|(error, _)| error));
        }
        waiting.one_less(result.as_ref().err().map(|(error, _)| error.clone()));
    }
}

impl Client {
    fn new(config: &KafkaConfig) -> Result<Self, LogError> {
        let shared = Arc::default();
        let context = Acknowledgements(Arc::clone(&shared));
        let producer = config.publisher().create_with_context(context).map_err(convert::error)?;
        Ok(Self { config: config.clone(), producer: Some(producer), shared })
    }

    async fn publish(&self, records: Vec<Addressed>) -> Result<(), KafkaError> {
        let mut names = Names::default();
        let firsts = self.introduce(&mut names, &records).await?;
        let (waiting, answer) = Waiting::new(records.len() - firsts.len(), None);
        // What comes behind one that is not taken is not sent: it would overtake it.
        let mut refused: Option<KafkaError> = None;
        for record in records.iter().enumerate().filter(|(index, _)| !firsts.contains(index)).map(|(_, record)| record)
        {
            if refused.is_none() {
                refused = self.send(&mut names, record, &waiting).err();
            }
            if let Some(error) = &refused {
                waiting.one_less(Some(error.clone()));
            }
        }
        waiting.one_less(None);
        // The client has copies. Freed now, the next call finds this memory still in the cache.
        drop(records);
        // The producer answers for every record before it ends.
        answer.await.unwrap_or(Err(KafkaError::Canceled))
    }

    /// Sends the first records of partitions that do not know the producer, and waits for them; which they are. Who waits for
    /// another call's first record shares its fate: one after the other they would wait for ever while the broker is away.
    async fn introduce(&self, names: &mut Names, records: &[Addressed]) -> Result<Vec<usize>, KafkaError> {
        let mut sent = Vec::new();
        // Since it waits: how many had been refused by then, and its room.
        let mut since: Option<(u64, Room<'_>)> = None;
        loop {
            // Asked for before looking, so that no notice is missed.
            let met = self.shared.met.notified();
            let refusals = self.shared.refusals.load(Ordering::Acquire);
            if let Some((before, _)) = &since
                && *before != refusals
                && !self.shared.is_known(records)
            {
                return Err(self.shared.refusal());
            }
            let (mine, waits) = self.shared.look(records);
            let mut answers = Vec::new();
            for index in &mine {
                let record = &records[*index];
                let first = (record.topic.clone(), record.partition);
                let (waiting, answer) = Waiting::new(1, Some(first.clone()));
                if let Err(error) = self.send(names, record, &waiting) {
                    self.shared.meet(&first, Some(&error));
                    waiting.one_less(Some(error));
                }
                waiting.one_less(None);
                answers.push(answer);
            }
            if mine.is_empty() && !waits {
                return Ok(sent);
            }
            if mine.is_empty() {
                if since.is_none() {
                    since = Some((refusals, Room::take(&self.shared, records)?));
                }
                met.await;
                continue;
            }
            let mut refused = None;
            for answer in answers {
                if let Err(error) = answer.await.unwrap_or(Err(KafkaError::Canceled)) {
                    refused.get_or_insert(error);
                }
            }
            match refused {
                Some(error) => return Err(error),
                None => sent.extend(mine),
            }
        }
    }

    fn send(&self, names: &mut Names, record: &Addressed, waiting: &Arc<Waiting>) -> Result<(), KafkaError> {
        let producer = self.producer.as_ref().ok_or(KafkaError::Canceled)?;
        let message = convert::message(names.of(&record.topic, &self.config), record, Arc::clone(waiting));
        producer.send(message).map_err(|(error, _)| error)
    }
}

impl Drop for Client {
    /// Ending a producer waits for its thread, so it is done on another one.
    fn drop(&mut self) {
        let producer = self.producer.take();
        // Without a thread it ends here.
        let _ = super::thread("kafka-producer-end", move || drop(producer));
    }
}

impl KafkaPublisher {
    pub(super) fn new(config: &KafkaConfig) -> Result<Self, LogError> {
        let current = Mutex::new(Arc::new(Client::new(config)?));
        Ok(Self(Arc::new(Shared { config: config.clone(), current })))
    }

    fn current(&self) -> Arc<Client> {
        Arc::clone(&self.0.current.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts a new producer in `old`'s place, unless somebody has done so. Those who wait for the old one are answered by it.
    fn replace(&self, old: &Arc<Client>, error: &KafkaError) {
        let mut current = self.0.current.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&current, old) {
            return;
        }
        events::publisher_replaced(error);
        match Client::new(&self.0.config) {
            Ok(client) => *current = Arc::new(client),
            Err(error) => tracing::error!(%error, "no new kafka publisher"),
        }
    }
}

impl Publisher for KafkaPublisher {
    async fn publish(&self, records: Vec<Addressed>) -> Result<(), LogError> {
        if records.is_empty() {
            return Ok(());
        }
        let client = self.current();
        let acknowledged = || client.shared.acknowledged.load(Ordering::Relaxed);
        let before = acknowledged();
        let Err(error) = client.publish(records).await else { return Ok(()) };
        let is_idle = acknowledged() == before;
        let is_stuck = error.rdkafka_error_code() == Some(Code::MessageTimedOut) && is_idle;
        if is_stuck || error.rdkafka_error_code() == Some(Code::Fatal) {
            self.replace(&client, &error);
        }
        Err(convert::error(error))
    }
}
