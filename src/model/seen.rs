//! Which events of a partition have been processed (schemas/seen.avsc).

use crate::clock::Timestamp;
use crate::model::record::Offset;

/// What tells an event from all others: 128 bits of what it is by.
pub type Identity = u128;

/// Events of one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub at: Timestamp,
    /// In the order of their offsets.
    pub events: Vec<(Identity, Offset)>,
}
