//! Making the record for something given up: the whole original, why, and the headers that existing tools read
//! (topics/README.md, "Failures").

use bytes::Bytes;

use crate::log::partitioner::Placement;
use crate::model::codec;
use crate::model::failure::{Failure, Try, shorten};
use crate::model::id::{DestinationId, SourceId};
use crate::model::outcome::Reason;
use crate::model::record::{Addressed, Headers, Record, Topic, header};

/// Of an original value so much is kept. What the gateway takes is far smaller; a foreign producer's record may be as large as
/// the topic allows, and with everything around it the failure would not fit any more.
pub const ORIGINAL: usize = 4 << 20;

/// Where failures of a stage go, and what it is called.
#[derive(Clone, Debug)]
pub struct FailureTopic {
    pub topic: Topic,
    pub placement: Placement,
    pub stage: &'static str,
    /// The stage's input.
    pub input: Topic,
    /// As other tools know it: with the log's prefix, as the group is.
    pub input_name: String,
    pub group: String,
}

/// Why, and what was tried.
#[derive(Clone, Debug)]
pub struct Cause {
    pub reason: Reason,
    /// For people.
    pub message: String,
    pub attempts: u32,
    pub first: Option<Try>,
    pub last: Option<Try>,
    /// The record key of the failure: the write key or destination id. Failures of one key stay together.
    pub key: String,
    pub destination: Option<DestinationId>,
    pub source: Option<SourceId>,
}

impl Cause {
    /// A cause that came without any try.
    pub fn untried(reason: Reason, message: impl Into<String>, key: &str) -> Self {
        Self {
            reason,
            message: shorten(message.into()),
            attempts: 0,
            first: None,
            last: None,
            key: key.to_owned(),
            destination: None,
            source: None,
        }
    }
}

impl FailureTopic {
    /// The record that keeps `original`.
    pub fn record(&self, original: &Record, cause: &Cause) -> Addressed {
        let failure = Failure {
            stage: self.stage.to_owned(),
            reason: cause.reason,
            attempts: cause.attempts,
            first: cause.first.clone(),
            last: cause.last.clone(),
            topic: self.input.clone(),
            partition: original.partition,
            offset: original.offset,
            timestamp: original.timestamp,
            key: original.key.clone(),
            value: original.value.as_ref().map(|value| value.slice(..value.len().min(ORIGINAL))),
            headers: original.headers.iter().map(|(name, value)| (name.to_owned(), value.clone())).collect(),
            destination: cause.destination.clone(),
            source: cause.source.clone(),
        };
        Addressed {
            topic: self.topic.clone(),
            partition: self.placement.place("", &cause.key),
            key: Some(Bytes::copy_from_slice(cause.key.as_bytes())),
            value: Some(codec::encode(&failure).into()),
            headers: self.headers(original, cause),
        }
    }

    fn headers(&self, original: &Record, cause: &Cause) -> Headers {
        let mut headers = Headers::new();
        for name in [header::DESTINATION, header::DELIVERY_ID, header::MESSAGE_ID, header::JOB_RUN, header::TRACEPARENT]
        {
            if let Some(value) = original.headers.text(name) {
                headers.push_text(name, value);
            }
        }
        headers.push_text(header::CONTENT_TYPE, header::AVRO);
        headers.push_text(header::STAGE, self.stage);
        headers.push_text(header::REASON, cause.reason.as_str());
        headers.push_text(header::CODE, &cause.last.as_ref().map_or(0, |last| last.code).to_string());
        headers.push_text(header::ATTEMPTS, &cause.attempts.to_string());
        for (name, tried) in [(header::FIRST_FAILED_AT, &cause.first), (header::LAST_FAILED_AT, &cause.last)] {
            if let Some(tried) = tried {
                headers.push_text(name, &tried.at.rfc3339_millis());
            }
        }
        let (partition, offset) = (original.partition.to_string(), original.offset.to_string());
        let class = format!("dev.laneway.{}", cause.reason.as_str());
        for (name, value) in [
            ("__connect.errors.topic", self.input_name.as_str()),
            ("__connect.errors.partition", &partition),
            ("__connect.errors.offset", &offset),
            ("__connect.errors.connector.name", "laneway"),
            ("__connect.errors.task.id", "0"),
            ("__connect.errors.stage", self.stage),
            ("__connect.errors.class.name", "dev.laneway"),
            ("__connect.errors.exception.class.name", &class),
            ("__connect.errors.exception.message", &cause.message),
            ("__connect.errors.exception.stacktrace", ""),
            ("kafka_dlt-original-topic", &self.input_name),
            ("kafka_dlt-original-timestamp-type", "CREATE_TIME"),
            ("kafka_dlt-original-consumer-group", &self.group),
            ("kafka_dlt-exception-fqcn", &class),
            ("kafka_dlt-exception-message", &cause.message),
        ] {
            headers.push_text(name, value);
        }
        let offset = i64::try_from(original.offset.raw()).unwrap_or(i64::MAX);
        let binary = |bytes: &[u8]| Bytes::copy_from_slice(bytes);
        headers.push("kafka_dlt-original-partition", binary(&original.partition.0.to_be_bytes()));
        headers.push("kafka_dlt-original-offset", binary(&offset.to_be_bytes()));
        headers.push("kafka_dlt-original-timestamp", binary(&original.timestamp.millis().to_be_bytes()));
        headers
    }
}
