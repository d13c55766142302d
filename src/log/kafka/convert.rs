//! Between librdkafka's types and ours, and what its errors mean for the caller.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rdkafka::Message;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::{BorrowedMessage, Header, Headers as _, OwnedHeaders};
use rdkafka::producer::BaseRecord;
use rdkafka::topic_partition_list::Offset as RawOffset;
use rdkafka::util::IntoOpaque;
use tokio::time::Instant;

use crate::clock::{Clock, Timestamp};
use crate::log::{LogError, Misconfigured};
use crate::model::record::{Addressed, Headers, Offset, Partition, Record, Topic, header};
use crate::telemetry::seldom;

use super::config::KafkaConfig;

pub fn record(message: &BorrowedMessage<'_>) -> Record {
    let mut headers = Headers::new();
    if let Some(raw) = message.headers() {
        for given in raw.iter() {
            headers.push(header::named(given.key), Bytes::copy_from_slice(given.value.unwrap_or_default()));
        }
    }
    Record {
        partition: Partition(message.partition().max(0) as u32),
        offset: offset(message.offset()),
        timestamp: Timestamp::from_millis(message.timestamp().to_millis().unwrap_or(0)),
        key: message.key().map(Bytes::copy_from_slice),
        value: message.payload().map(Bytes::copy_from_slice),
        headers,
    }
}

pub fn headers(headers: &Headers) -> OwnedHeaders {
    let mut out = OwnedHeaders::new_with_capacity(headers.len());
    for (key, value) in headers.iter() {
        out = out.insert(Header { key, value: Some(value.as_ref()) });
    }
    out
}

/// A record as librdkafka takes it; `opaque` comes back with its delivery report.
pub fn message<'a, O: IntoOpaque>(name: &'a str, record: &'a Addressed, opaque: O) -> BaseRecord<'a, [u8], [u8], O> {
    let mut message = BaseRecord::with_opaque_to(name, opaque)
        .partition(partition(record.partition))
        .headers(headers(&record.headers));
    if let Some(key) = &record.key {
        message = message.key(key.as_ref());
    }
    if let Some(value) = &record.value {
        message = message.payload(value.as_ref());
    }
    message
}

/// The names that topics have in the cluster, each made once.
#[derive(Default)]
pub struct Names(Vec<(Topic, String)>);

impl Names {
    pub fn of(&mut self, topic: &Topic, config: &KafkaConfig) -> &str {
        let known = self.0.iter().position(|(known, _)| known == topic);
        let known = known.unwrap_or_else(|| {
            self.0.push((topic.clone(), config.topic(topic)));
            self.0.len() - 1
        });
        &self.0[known].1
    }
}

pub fn offset(raw: i64) -> Offset {
    Offset::new(raw.max(0) as u128)
}

pub fn raw_offset(offset: Offset) -> RawOffset {
    match i64::try_from(offset.raw()) {
        Ok(raw) => RawOffset::Offset(raw),
        Err(_) => RawOffset::End,
    }
}

pub fn partition(number: Partition) -> i32 {
    i32::try_from(number.0).unwrap_or(i32::MAX)
}

/// What a failed call means for the caller.
pub fn error(error: KafkaError) -> LogError {
    let code = match &error {
        KafkaError::Transaction(failed) => Some(failed.code()),
        other => other.rdkafka_error_code(),
    };
    let fatal = match &error {
        KafkaError::Transaction(failed) => failed.is_fatal(),
        KafkaError::MessageConsumptionFatal(_) => true,
        _ => false,
    };
    if let KafkaError::ClientConfig(_, description, key, value) = &error {
        // The value may be a secret, and librdkafka repeats it.
        let description =
            if value.is_empty() { description.clone() } else { description.replace(value.as_str(), "…") };
        return LogError::fatal(Misconfigured(format!("log.kafka.properties: {key}: {description}")));
    }
    if let KafkaError::ClientCreation(description) = &error {
        return LogError::fatal(Misconfigured(format!("log.kafka.properties: {description}")));
    }
    match code {
        Some(Code::Authentication) if has_handshake_broken() => LogError::transient(error),
        Some(code) if is_refusal(code) => LogError::fatal(format!("the broker refuses us: {error}")),
        Some(Code::FencedInstanceId | Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch) => {
            LogError::fenced(error)
        }
        // Whatever else is fatal to a client can be mended by a new one.
        _ if fatal => LogError::broken(error),
        _ => LogError::transient(error),
    }
}

/// No retry helps against these; a person has to give rights or mend the configuration.
fn is_refusal(code: Code) -> bool {
    matches!(
        code,
        Code::TopicAuthorizationFailed
            | Code::GroupAuthorizationFailed
            | Code::ClusterAuthorizationFailed
            | Code::TransactionalIdAuthorizationFailed
            | Code::SaslAuthenticationFailed
            | Code::Authentication
            | Code::InvalidGroupId
            | Code::MessageSizeTooLarge
            | Code::InvalidTransactionTimeout
            | Code::UnsupportedFeature
    )
}

/// A client says that a handshake broke before it says what came of that, which is an authentication failure as well.
static HANDSHAKE_BROKE_AT: Mutex<Option<Instant>> = Mutex::new(None);
const HANDSHAKE_TOLD: Duration = Duration::from_secs(10);

fn has_handshake_broken() -> bool {
    let broke_at = *HANDSHAKE_BROKE_AT.lock().unwrap_or_else(PoisonError::into_inner);
    broke_at.is_some_and(|at| at.elapsed() < HANDSHAKE_TOLD)
}

/// librdkafka calls it an authentication failure too where the connection broke, or no answer came, during the handshake: nobody has
/// refused anything.
fn is_broken_handshake(error: &KafkaError, reason: &str) -> bool {
    error.rdkafka_error_code() == Some(Code::Authentication)
        && ["Local: Broker transport failure", "Local: Timed out"].iter().any(|cause| reason.contains(cause))
}

/// What a client says of itself beside its answers.
pub fn told(client: &'static str, error: &KafkaError, reason: &str) {
    if is_broken_handshake(error, reason) {
        *HANDSHAKE_BROKE_AT.lock().unwrap_or_else(PoisonError::into_inner) = Some(Clock::system().instant());
    }
    if let Some(left_out) = seldom::due(client, &error.to_string()) {
        tracing::warn!(%error, reason, left_out, "{client}");
    }
}

/// librdkafka's own log lines, in ours.
pub fn log(level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
    use rdkafka::config::RDKafkaLogLevel as Level;
    let is_error = matches!(level, Level::Emerg | Level::Alert | Level::Critical | Level::Error);
    if !is_error && !matches!(level, Level::Warning) {
        return tracing::debug!(facility, "{message}");
    }
    // A line begins with the thread that says it: a broker's, mostly.
    let thread = message.split(']').next().unwrap_or_default();
    match seldom::due("librdkafka", &format!("{facility} {thread}")) {
        Some(left_out) if is_error => tracing::error!(facility, left_out, "{message}"),
        Some(left_out) => tracing::warn!(facility, left_out, "{message}"),
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_breaks_during_the_handshake_is_no_refusal() {
        let failed = || KafkaError::Global(Code::Authentication);
        let consumed = || KafkaError::MessageConsumption(Code::Authentication);
        let refused = "SASL authentication error: Authentication failed due to invalid credentials";
        told("test", &failed(), refused);
        assert!(matches!(error(consumed()), LogError::Fatal(_)));
        let broken =
            "mechanism handshake failed: Local: Broker transport failure: broker's supported mechanisms: (n/a)";
        told("test", &failed(), broken);
        assert!(matches!(error(consumed()), LogError::Transient(_)));
        assert!(!is_broken_handshake(&KafkaError::Global(Code::BrokerTransportFailure), broken));
    }
}
