//! What an owner writes down about a partition of `deliveries`, so that its successor goes on where it stood
//! (schemas/progress.avsc). One record per thing that can change; the record key says which.

use std::time::Duration;

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
    pub target: Target,
    pub bound: Offset,
}

/// What an admin's command is about. As text: `destination/<id>`, `user/<destination>/<user>`, `job-run/<id>`; `retention/all` is
/// what the log is about to delete.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    Destination(DestinationId),
    User(DestinationId, User),
    JobRun(String),
    Retention,
}

impl Target {
    /// Whether a delivery of this destination, user and job run is meant.
    pub fn covers(&self, destination: &str, user: Option<&str>, job_run: Option<&str>) -> bool {
        match self {
            Target::Destination(id) => id.as_str() == destination,
            Target::User(id, of) => id.as_str() == destination && user == Some(of.as_str()),
            Target::JobRun(run) => job_run == Some(run.as_str()),
            Target::Retention => true,
        }
    }

    /// Whether deliveries of this destination may be meant.
    pub fn concerns(&self, destination: &str) -> bool {
        match self {
            Target::Destination(id) | Target::User(id, _) => id.as_str() == destination,
            Target::JobRun(_) | Target::Retention => true,
        }
    }

    pub fn parse(text: &str) -> Option<Target> {
        let (kind, rest) = text.split_once('/').filter(|(_, rest)| !rest.is_empty())?;
        match kind {
            "destination" => Some(Target::Destination(rest.into())),
            "user" => rest.split_once('/').map(|(id, user)| Target::User(id.into(), user.into())),
            "job-run" => Some(Target::JobRun(rest.to_owned())),
            "retention" if rest == "all" => Some(Target::Retention),
            _ => None,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Destination(id) => write!(f, "destination/{id}"),
            Target::User(id, user) => write!(f, "user/{id}/{}", user.as_str()),
            Target::JobRun(run) => write!(f, "job-run/{run}"),
            Target::Retention => write!(f, "retention/all"),
        }
    }
}

/// `l/<partition>/<lane>`: a detached lane, which live reading does not feed. It covers all of the lane's unfinished records
/// but those of held keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneProgress {
    pub lane: Lane,
    /// The oldest unfinished record of the lane, or where its reading goes on.
    pub tail: Offset,
    /// What is finished, or covered by its keys' marks, at or above `tail`.
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
    /// How much of the retry window is used up. Time in which nothing could be tried (an open breaker, a pause, no owner) is
    /// not in it.
    pub spent: Duration,
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

impl KeyProgress {
    /// The lowest offset that the mark covers.
    pub fn lowest(&self) -> Option<Offset> {
        let head = self.head.as_ref().map(|head| head.offset);
        head.into_iter().chain(self.followers.first().copied()).chain(self.parked).min()
    }
}

/// `c/<partition>/<lane>`: the ledger. taken = delivered + filtered + aborted + drained + pending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Ledger {
    pub taken: u64,
    pub delivered: u64,
    pub filtered: u64,
    pub aborted: u64,
    pub drained: u64,
    /// The owner's breaker for the destination is open since then.
    pub open_since: Option<Timestamp>,
}

impl Ledger {
    /// Taken and not final.
    pub fn pending(&self) -> u64 {
        self.taken.saturating_sub(self.ended())
    }

    /// Final, whatever the outcome.
    pub fn ended(&self) -> u64 {
        self.delivered + self.filtered + self.aborted + self.drained
    }
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
