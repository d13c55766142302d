//! How a record ends: one outcome from a closed list, with a reason from a closed list.

use crate::model::record::Addressed;

/// Why something was not delivered. The texts are part of the interface: metrics, headers and failures carry them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// The record's value could not be decoded.
    Unreadable,
    /// The stage itself failed on it.
    Panicked,
    /// Its source is not in the workspace configuration.
    UnknownSource,
    /// Its destination is not in the workspace configuration, or is switched off.
    DestinationGone,
    /// No enabled destination wants it (`integrations`, connections).
    NoDestination,
    /// It was processed before: an event of the same source with the same message id.
    Duplicate,
    /// The destination does not take this type of event.
    MessageType,
    /// The destination's transform refused it.
    Transform,
    /// No request could be built from it.
    BadRequest,
    /// The address is one that is never connected to.
    BlockedAddress,
    /// The destination refused it for good.
    Rejected,
    /// The destination did not take it within the retry window.
    RetriesExhausted,
    /// The log had deleted it before it could be delivered.
    Retention,
    /// The source's transform refused the request, or did not know what to say.
    SourceTransform,
    /// The source's transform could not be had.
    TransformerAway,
    /// What the source's transform made of the request cannot be taken.
    NotAdmitted,
    /// Its run of reverse ETL was drained.
    Drained,
}

impl Reason {
    pub const ALL: [Reason; 17] = [
        Reason::Unreadable,
        Reason::Panicked,
        Reason::UnknownSource,
        Reason::DestinationGone,
        Reason::NoDestination,
        Reason::Duplicate,
        Reason::MessageType,
        Reason::Transform,
        Reason::BadRequest,
        Reason::BlockedAddress,
        Reason::Rejected,
        Reason::RetriesExhausted,
        Reason::Retention,
        Reason::SourceTransform,
        Reason::TransformerAway,
        Reason::NotAdmitted,
        Reason::Drained,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Unreadable => "unreadable",
            Reason::Panicked => "panicked",
            Reason::UnknownSource => "unknown_source",
            Reason::DestinationGone => "destination_gone",
            Reason::NoDestination => "no_destination",
            Reason::Duplicate => "duplicate",
            Reason::MessageType => "message_type",
            Reason::Transform => "transform",
            Reason::BadRequest => "bad_request",
            Reason::BlockedAddress => "blocked_address",
            Reason::Rejected => "rejected",
            Reason::RetriesExhausted => "retries_exhausted",
            Reason::Retention => "retention",
            Reason::SourceTransform => "source_transform",
            Reason::TransformerAway => "transformer_away",
            Reason::NotAdmitted => "not_admitted",
            Reason::Drained => "drained",
        }
    }
}

/// How one input of a transform stage ended. There is no variant for "nothing happened".
#[must_use]
#[derive(Debug)]
pub enum Outcome {
    /// It became these records: deliveries, and failures of single destinations.
    Produced(Vec<Addressed>),
    /// Nobody wants it, for this reason. Not a failure.
    Filtered(Reason),
    /// It could not be processed: `failure` goes to `proc-errors`.
    Failed { reason: Reason, failure: Addressed },
}

impl Outcome {
    pub fn failure(self) -> Option<Addressed> {
        match self {
            Outcome::Failed { failure, .. } => Some(failure),
            Outcome::Produced(_) | Outcome::Filtered(_) => None,
        }
    }
}
