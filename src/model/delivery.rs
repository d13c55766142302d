//! One event made ready for one destination, as it lies on `deliveries` (schemas/delivery.avsc), and its id.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_128;

use crate::clock::Timestamp;
use crate::model::id::{DeliveryId, DestinationId, DestinationType, JobRunId, MessageId, SourceId, User, WorkspaceId};
use crate::model::record::{Offset, Partition, Topic};

/// Where the destination's transform ran or will run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransformAt {
    Processor,
    Router,
    Nowhere,
}

impl TransformAt {
    pub const ALL: [TransformAt; 3] = [TransformAt::Processor, TransformAt::Router, TransformAt::Nowhere];

    /// Its symbol in the schema, and its word in a destination definition.
    pub fn as_str(self) -> &'static str {
        match self {
            TransformAt::Processor => "processor",
            TransformAt::Router => "router",
            TransformAt::Nowhere => "none",
        }
    }
}

/// How the body bytes of a request are to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFormat {
    None,
    Json,
    JsonArray,
    Xml,
    Form,
    Gzip,
}

impl BodyFormat {
    pub const ALL: [BodyFormat; 6] = [
        BodyFormat::None,
        BodyFormat::Json,
        BodyFormat::JsonArray,
        BodyFormat::Xml,
        BodyFormat::Form,
        BodyFormat::Gzip,
    ];

    /// Its symbol in the schema.
    pub fn as_str(self) -> &'static str {
        match self {
            BodyFormat::None => "none",
            BodyFormat::Json => "json",
            BodyFormat::JsonArray => "json_array",
            BodyFormat::Xml => "xml",
            BodyFormat::Form => "form",
            BodyFormat::Gzip => "gzip",
        }
    }
}

/// An HTTP request ready to be sent. Headers and params keep their order and repeats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRequest {
    pub method: String,
    pub url: String,
    pub headers: Vec<(String, String)>,
    pub params: Vec<(String, String)>,
    pub body_format: BodyFormat,
    pub body: Bytes,
}

/// What the destination gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    Request(HttpRequest),
    /// The event's JSON, for destinations whose transform runs later or nowhere.
    Event(Bytes),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    pub delivery_id: DeliveryId,
    pub workspace: WorkspaceId,
    pub source: SourceId,
    pub destination: DestinationId,
    pub destination_type: DestinationType,
    pub user: Option<User>,
    pub message_id: MessageId,
    pub event_type: String,
    pub event_name: Option<String>,
    pub received_at: Timestamp,
    pub job_run: Option<JobRunId>,
    pub task_run: Option<JobRunId>,
    pub record_id: Option<Bytes>,
    pub transform_at: TransformAt,
    pub payload: Payload,
}

/// Where the event of a delivery was read.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    pub topic: &'a Topic,
    pub partition: Partition,
    pub offset: Offset,
}

impl DeliveryId {
    /// The id of the `index`-th output for `destination` of the event read at `origin`: 32 hex digits of XXH3-128 over the
    /// parts, each as its length (u32, little-endian) and its bytes. The same after any restart, retry or re-read.
    pub fn of(origin: Origin<'_>, destination: &DestinationId, message: &MessageId, index: usize) -> Self {
        let mut input = Vec::with_capacity(160);
        let (partition, offset) = (origin.partition.to_string(), origin.offset.to_string());
        let index = index.to_string();
        for part in [origin.topic.as_str(), &partition, &offset, destination.as_str(), message.as_str(), &index] {
            input.extend_from_slice(&(part.len() as u32).to_le_bytes());
            input.extend_from_slice(part.as_bytes());
        }
        DeliveryId::new(format!("{:032x}", xxh3_128(&input)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(partition: u32, offset: u128, destination: &str, message: &str, index: usize) -> String {
        let origin = Origin { topic: &Topic::EVENTS, partition: Partition(partition), offset: Offset::new(offset) };
        DeliveryId::of(origin, &destination.into(), &message.into(), index).to_string()
    }

    /// Golden: other implementations of the flow must compute the same (tests/fixtures/delivery_ids.json).
    #[test]
    fn delivery_ids_are_the_golden_ones() {
        let golden: Vec<(u32, u64, String, String, usize, String)> =
            serde_json::from_str(include_str!("../../tests/fixtures/delivery_ids.json")).expect("a readable fixture");
        assert!(golden.len() >= 4);
        for (partition, offset, destination, message, index, expected) in golden {
            assert_eq!(id(partition, offset.into(), &destination, &message, index), expected);
        }
    }

    #[test]
    fn every_part_counts() {
        let base = id(0, 12, "d", "m", 0);
        for other in [id(1, 12, "d", "m", 0), id(0, 1, "2d", "m", 0), id(0, 12, "d", "m2", 0), id(0, 12, "d", "m", 1)] {
            assert_ne!(base, other);
        }
    }
}
