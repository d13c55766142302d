//! Between the client's types and ours, and what its errors mean for the caller.
//!
//! A record's headers are message properties under their own names. Properties are texts, each there once and in no order, so a record
//! with headers that repeat or are no text says how to read them in one property more ([`SHAPE`]).

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use pulsar::error::{ConnectionError, ConsumerError, ProducerError, ServiceDiscoveryError};
use pulsar::message::proto::{MessageIdData, MessageMetadata, ServerError};
use pulsar::producer::Message;
use pulsar::{Error, Payload};

use crate::clock::Timestamp;
use crate::log::LogError;
use crate::model::record::{Addressed, Headers, Offset, Partition, Record, header};

use super::identity::refused;

/// A list in JSON: the properties that are headers, in their order, each with the header's name and whether its value is base64.
const SHAPE: &str = "lw-headers";
/// Of a value of no bytes: without it that is a tombstone, as compaction takes it.
const EMPTY: &str = "lw-empty";

/// -1, as both parts of a place.
const EARLIEST: u64 = u64::MAX;

/// The place of a message. Without a batch it is the only one of its entry.
pub fn offset(id: &MessageIdData) -> Offset {
    Offset::of_entry(id.ledger_id, id.entry_id, u32::try_from(id.batch_index.unwrap_or(0)).unwrap_or(0))
}

/// Where reading begins so that a place is among what comes: with its whole entry.
pub fn entry(at: Offset) -> MessageIdData {
    // With an index, the broker begins at this entry; without, behind it. Its name for the earliest makes it begin with what it has compacted.
    let (ledger_id, entry_id, batch_index) = match at.entry() {
        Some((ledger, entry, _)) => (ledger, entry, Some(0)),
        None => (EARLIEST, EARLIEST, None),
    };
    MessageIdData { ledger_id, entry_id, batch_index, ..MessageIdData::default() }
}

pub fn message(record: &Addressed) -> Message {
    let mut properties = HashMap::with_capacity(record.headers.len() + 1);
    let mut shape = Vec::new();
    let mut is_plain = true;
    for (name, value) in record.headers.iter() {
        let (text, is_base64) = match std::str::from_utf8(value) {
            Ok(text) => (text.to_owned(), false),
            Err(_) => (BASE64.encode(value), true),
        };
        let mut property = name.to_owned();
        if properties.contains_key(name) {
            property = format!("{name}#{}", shape.len());
        }
        is_plain &= !is_base64 && property == name;
        shape.push((property.clone(), name, is_base64));
        properties.insert(property, text);
    }
    if !is_plain {
        properties.insert(SHAPE.into(), serde_json::json!(shape).to_string());
    }
    if record.value.as_ref().is_some_and(Bytes::is_empty) {
        properties.insert(EMPTY.into(), "1".into());
    }
    let (partition_key, encoded) = match record.key.as_deref().map(|key| (std::str::from_utf8(key), key)) {
        Some((Ok(text), _)) => (Some(text.to_owned()), false),
        Some((Err(_), raw)) => (Some(BASE64.encode(raw)), true),
        None => (None, false),
    };
    Message {
        payload: record.value.as_ref().map(|value| value.to_vec()).unwrap_or_default(),
        properties,
        partition_key,
        partition_key_b64_encoded: encoded.then_some(true),
        ..Message::default()
    }
}

/// What compaction leaves of a message in a batch of which it keeps others: no key, no properties, no bytes. The client does not tell.
pub fn is_compacted_out(id: &MessageIdData, payload: &Payload) -> bool {
    let metadata = &payload.metadata;
    let is_batched = id.batch_index.is_some_and(|index| index >= 0);
    is_batched && metadata.partition_key.is_none() && metadata.properties.is_empty() && payload.data.is_empty()
}

pub fn record(partition: Partition, id: &MessageIdData, metadata: &MessageMetadata, data: Vec<u8>) -> Record {
    let key = metadata.partition_key.as_ref().map(|key| match metadata.partition_key_b64_encoded {
        Some(true) => BASE64.decode(key).map_or_else(|_| Bytes::from(key.clone()), Bytes::from),
        _ => Bytes::from(key.clone()),
    });
    let is_empty = data.is_empty() && metadata.properties.iter().all(|property| property.key != EMPTY);
    Record {
        partition,
        offset: offset(id),
        timestamp: Timestamp::from_millis(i64::try_from(metadata.publish_time).unwrap_or(i64::MAX)),
        key,
        value: (!is_empty).then(|| data.into()),
        headers: headers(metadata),
    }
}

fn headers(metadata: &MessageMetadata) -> Headers {
    let mut headers = Headers::with_capacity(metadata.properties.len());
    let shape = metadata.properties.iter().find(|property| property.key == SHAPE);
    let shape: Option<Vec<(String, String, bool)>> = shape.and_then(|it| serde_json::from_str(&it.value).ok());
    let Some(shape) = shape else {
        let mut plain: Vec<_> = metadata.properties.iter().filter(|it| it.key != EMPTY && it.key != SHAPE).collect();
        plain.sort_by(|a, b| a.key.cmp(&b.key));
        for property in plain {
            headers.push(header::named(&property.key), property.value.clone());
        }
        return headers;
    };
    for (property, name, is_base64) in shape {
        let Some(found) = metadata.properties.iter().find(|it| it.key == property) else { continue };
        let decoded = if is_base64 { BASE64.decode(&found.value).ok() } else { None };
        headers.push(name, decoded.map_or_else(|| Bytes::from(found.value.clone()), Bytes::from));
    }
    headers
}

/// What went wrong with a connection, wherever it was wanted.
fn connection(error: &Error) -> Option<&ConnectionError> {
    match error {
        Error::Connection(error)
        | Error::Producer(ProducerError::Connection(error))
        | Error::Consumer(ConsumerError::Connection(error))
        | Error::ServiceDiscovery(ServiceDiscoveryError::Connection(error)) => Some(error),
        Error::Producer(ProducerError::Batch(error)) => connection(error),
        _ => None,
    }
}

/// What the broker gave as the reason.
fn reason(error: &Error) -> Option<ServerError> {
    match error {
        Error::ServiceDiscovery(ServiceDiscoveryError::Query(kind, _)) => *kind,
        Error::Producer(ProducerError::Batch(error)) => reason(error),
        _ => match connection(error)? {
            ConnectionError::PulsarError(kind, _) => *kind,
            _ => None,
        },
    }
}

/// Somebody else writes there alone.
pub fn is_taken(error: &Error) -> bool {
    matches!(reason(error), Some(ServerError::ProducerFenced | ServerError::ProducerBusy))
}

/// What a failed call means for the caller.
pub fn error(error: Error) -> LogError {
    if let Some(ConnectionError::Authentication(reason)) = connection(&error) {
        return refused(reason);
    }
    match reason(&error) {
        Some(ServerError::AuthenticationError | ServerError::AuthorizationError) => {
            LogError::fatal(format!("the broker refuses us: {error}"))
        }
        // Nothing will take what is sent there.
        Some(ServerError::NotAllowedError | ServerError::TopicTerminatedError | ServerError::IncompatibleSchema) => {
            LogError::fatal(error)
        }
        Some(ServerError::ProducerFenced) => LogError::fenced(error),
        _ => LogError::transient(error),
    }
}

/// There is no such topic.
pub fn is_unknown(error: &Error) -> bool {
    matches!(reason(error), Some(ServerError::TopicNotFound))
        || matches!(error, Error::ServiceDiscovery(ServiceDiscoveryError::NotFound))
}
