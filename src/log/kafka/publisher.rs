//! Writing to Kafka without reading: idempotent, acknowledged by all replicas.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rdkafka::client::ClientContext;
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseRecord, DeliveryResult, NoCustomPartitioner, ProducerContext, ThreadedProducer};
use tokio::sync::oneshot;

use crate::log::{LogError, Publisher};
use crate::model::record::Addressed;

use super::config::KafkaConfig;
use super::convert;

#[derive(Clone)]
pub struct KafkaPublisher {
    producer: Arc<ThreadedProducer<Acknowledgements>>,
    prefix: Arc<str>,
}

/// The records of one call: whoever acknowledges the last one answers.
pub struct Waiting {
    outstanding: AtomicUsize,
    answer: Mutex<Answer>,
}

#[derive(Default)]
struct Answer {
    first_refusal: Option<KafkaError>,
    to: Option<oneshot::Sender<Result<(), LogError>>>,
}

impl Waiting {
    fn one_less(&self, error: Option<KafkaError>) {
        let mut answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        if error.is_some() && answer.first_refusal.is_none() {
            answer.first_refusal = error;
        }
        if self.outstanding.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(done) = answer.to.take()
        {
            // The client of a request that was given up does not wait any more.
            let _ = done.send(answer.first_refusal.take().map_or(Ok(()), |error| Err(convert::error(error))));
        }
    }
}

pub struct Acknowledgements;

impl ClientContext for Acknowledgements {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        convert::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::warn!(%error, reason, "kafka publisher");
    }
}

impl ProducerContext<NoCustomPartitioner> for Acknowledgements {
    type DeliveryOpaque = Box<Arc<Waiting>>;

    fn delivery(&self, result: &DeliveryResult<'_>, waiting: Box<Arc<Waiting>>) {
        waiting.one_less(result.as_ref().err().map(|(error, _)| error.clone()));
    }
}

impl KafkaPublisher {
    pub(super) fn new(config: &KafkaConfig) -> Result<Self, LogError> {
        let producer = config.publisher().create_with_context(Acknowledgements).map_err(convert::error)?;
        Ok(Self { producer: Arc::new(producer), prefix: config.prefix.as_str().into() })
    }

    fn send(&self, record: &Addressed, waiting: &Arc<Waiting>) -> Result<(), KafkaError> {
        let topic = format!("{}{}", self.prefix, record.topic);
        let mut message: BaseRecord<'_, [u8], [u8], Box<Arc<Waiting>>> =
            BaseRecord::with_opaque_to(&topic, Box::new(Arc::clone(waiting)))
                .partition(convert::partition(record.partition))
                .headers(convert::headers(&record.headers));
        if let Some(key) = &record.key {
            message = message.key(key);
        }
        if let Some(value) = &record.value {
            message = message.payload(value);
        }
        self.producer.send(message).map_err(|(error, _)| error)
    }
}

impl Publisher for KafkaPublisher {
    async fn publish(&self, records: Vec<Addressed>) -> Result<(), LogError> {
        if records.is_empty() {
            return Ok(());
        }
        let (done, answer) = oneshot::channel();
        // One more than there are records, so that it cannot end before all are on their way.
        let outstanding = AtomicUsize::new(records.len() + 1);
        let waiting =
            Arc::new(Waiting { outstanding, answer: Mutex::new(Answer { first_refusal: None, to: Some(done) }) });
        for record in &records {
            if let Err(error) = self.send(record, &waiting) {
                waiting.one_less(Some(error));
            }
        }
        waiting.one_less(None);
        answer.await.unwrap_or_else(|_| Err(LogError::transient("the kafka client ended")))
    }
}
