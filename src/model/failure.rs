//! What lies on `dead-letters` and `proc-errors` (schemas/failure.avsc): why something was given up, and the whole of it.

use bytes::Bytes;

use crate::clock::Timestamp;
use crate::model::id::{DestinationId, SourceId};
use crate::model::outcome::Reason;
use crate::model::record::{Offset, Partition, Topic};

/// One try that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Try {
    pub at: Timestamp,
    /// The HTTP status, or 0 where none came.
    pub code: u16,
    pub message: String,
}

/// Words are kept up to here: they stand in failures, headers and progress, and whoever wrote them may be hostile.
const WORDS: usize = 512;

/// The beginning of a text that is only for people.
pub fn shorten(mut text: String) -> String {
    if text.len() > WORDS {
        text.truncate(text.floor_char_boundary(WORDS));
    }
    text
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub stage: String,
    pub reason: Reason,
    pub attempts: u32,
    pub first: Option<Try>,
    pub last: Option<Try>,
    pub topic: Topic,
    pub partition: Partition,
    pub offset: Offset,
    pub timestamp: Timestamp,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    pub headers: Vec<(String, Bytes)>,
    pub destination: Option<DestinationId>,
    pub source: Option<SourceId>,
}
