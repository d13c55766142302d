//! What an owner writes down about a partition of `deliveries`, so that its successor goes on where it stood
//! (schemas/progress.avsc). One record per thing that can change; the record key says which.

use crate::clock::Timestamp;
use crate::model::id::{DestinationId, User};
use crate::model::record::{Offset, Partition};

/// An inclusive span of offsets of which every record is finished or covered by a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub first: Offset,
    pub last: Offset,
}

/// `p/<partition>`: the partition itself.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct PartitionProgress {
    /// Rises by one with each commit; the committed offset's metadata carries the same number.
    pub seq: u64,
    /// The epoch of the owner that wrote it, for reading traces.
    pub epoch: u64,
    /// The lowest offset that memory covers and that is unfinished; `live` where there is none.
    pub base: Offset,
    /// What is finished, or covered by marks, at or above `base`.
    pub runs: Vec<Run>,
    /// Where the owner reads next.
    pub live: Offset,
    /// The owner stopped in an orderly way and had nothing in flight.
    pub clean_stop: bool,
    pub drains: Vec<Drain>,
}

/// An admin's drain, as far as the owner has bound it: everything of `target` below `bound` is drained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drain {
    pub id: String,
    pub target: String,
    pub bound: Offset,
}

/// `l/<partition>/<lane>`: a lane that live reading does not feed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneProgress {
    pub tail: Offset,
    pub done: Vec<Run>,
    pub pending: u64,
    pub pending_bytes: u64,
    pub oldest: Timestamp,
}

/// The record that a held key waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub offset: Offset,
    pub attempts: u32,
    pub first_failed_at: Timestamp,
    pub next_try_at: Timestamp,
    pub first_code: u16,
    pub first_message: String,
    pub last_code: u16,
    pub last_message: String,
}

/// `k/<partition>/<lane>/<user>`: a held key and what follows its head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyProgress {
    pub lane: Lane,
    pub user: User,
    pub head: Option<Head>,
    /// Offsets of the records behind the head that this mark covers, rising.
    pub followers: Vec<Offset>,
    /// Everything of this key from here on is covered by this mark too.
    pub parked: Option<Offset>,
}

/// `c/<partition>/<lane>`: the ledger. taken = delivered + filtered + aborted + drained + pending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Ledger {
    pub taken: u64,
    pub delivered: u64,
    pub filtered: u64,
    pub aborted: u64,
    pub drained: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    Partition(PartitionProgress),
    Lane(LaneProgress),
    Key(KeyProgress),
    Ledger(Lane, Ledger),
}

/// All deliveries of one destination, or of one replay to it, inside a partition.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lane {
    pub destination: DestinationId,
    pub replay: Option<String>,
}

impl Lane {
    /// `<destination>` or `<destination>@<replay id>`.
    pub fn name(&self) -> String {
        match &self.replay {
            None => self.destination.to_string(),
            Some(replay) => format!("{}@{replay}", self.destination),
        }
    }
}

/// The key of a progress record. Over 512 bytes it is replaced by its XXH3-128 in hex; the value holds the text.
#[derive(Clone, Copy, Debug)]
pub enum ProgressKey<'a> {
    Partition,
    Lane(&'a Lane),
    Key(&'a Lane, &'a str),
    Ledger(&'a Lane),
}

impl ProgressKey<'_> {
    pub fn encode(&self, partition: Partition) -> String {
        let text = match self {
            ProgressKey::Partition => format!("p/{partition}"),
            ProgressKey::Lane(lane) => format!("l/{partition}/{}", lane.name()),
            ProgressKey::Key(lane, user) => format!("k/{partition}/{}/{user}", lane.name()),
            ProgressKey::Ledger(lane) => format!("c/{partition}/{}", lane.name()),
        };
        if text.len() <= 512 {
            return text;
        }
        let kind = &text[..1];
        format!("{kind}/{partition}/{:032x}", xxhash_rust::xxh3::xxh3_128(text.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_keys_are_as_documented() {
        let lane = Lane { destination: "d1".into(), replay: None };
        let replay = Lane { destination: "d1".into(), replay: Some("r7".into()) };
        let p = Partition(3);
        assert_eq!(ProgressKey::Partition.encode(p), "p/3");
        assert_eq!(ProgressKey::Lane(&replay).encode(p), "l/3/d1@r7");
        assert_eq!(ProgressKey::Key(&lane, "u/1").encode(p), "k/3/d1/u/1");
        assert_eq!(ProgressKey::Ledger(&lane).encode(p), "c/3/d1");
        let long = ProgressKey::Key(&lane, &"u".repeat(600)).encode(p);
        assert_eq!(long.len(), "k/3/".len() + 32);
    }
}
