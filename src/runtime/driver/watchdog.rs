//! Notices live reading that stands still although there is something to read.
//!
//! The distance to the end proves nothing: behind the last record there may be transaction markers for ever. So it is read.

use std::time::Duration;

use tokio::time::Instant;

use crate::log::{Admin, Backend, Limit, LogError, Read, Reader};
use crate::model::record::{Offset, Partition, Topic};

/// A position that has not moved for so long is looked into.
pub const STILL: Duration = Duration::from_secs(30);
/// How often is looked.
pub const LOOK: Duration = Duration::from_secs(10);
/// A look takes no longer than this; a log that cannot be asked proves nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where a partition's live reading stands.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    position: Offset,
    moved_at: Instant,
    /// Up to here there was nothing to read when it was looked into last.
    empty_until: Offset,
}

impl Watch {
    pub fn new(position: Offset, now: Instant) -> Self {
        Self { position, moved_at: now, empty_until: Offset::START }
    }

    pub fn moved(&mut self, position: Offset, now: Instant) {
        (self.position, self.moved_at) = (position, now);
    }

    /// It waits on purpose.
    pub fn waits(&mut self, now: Instant) {
        self.moved_at = now;
    }

    pub fn is_still(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.moved_at) >= STILL
    }

    pub fn position(&self) -> Offset {
        self.position
    }

    /// What a look has found: whether reading is stuck.
    pub fn judge(&mut self, found: Found, now: Instant) -> bool {
        match found {
            Found::Nothing(until) => self.empty_until = self.empty_until.max(until),
            Found::Unknown => {}
            // It may have moved while that was read.
            Found::Record(at) => return at >= self.position && self.is_still(now),
        }
        false
    }
}

/// What there is behind a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Record(Offset),
    /// Nothing below this.
    Nothing(Offset),
    Unknown,
}

/// Looks for a record at or behind `watch`'s position.
pub async fn look<B: Backend>(backend: B, topic: Topic, partition: Partition, watch: Watch) -> Found {
    let found = tokio::time::timeout(PATIENCE, find(&backend, &topic, partition, watch)).await;
    match found {
        Ok(Ok(found)) => found,
        Ok(Err(_)) | Err(_) => Found::Unknown,
    }
}

async fn find<B: Backend>(backend: &B, topic: &Topic, partition: Partition, watch: Watch) -> Result<Found, LogError> {
    let stable = backend.admin()?.watermarks(topic, partition).await?.stable;
    if stable <= watch.position || stable <= watch.empty_until {
        return Ok(Found::Nothing(stable));
    }
    let mut reader = backend.reader(topic, partition, watch.position).await?;
    match reader.read(Limit { records: 1, bytes: 1 }).await? {
        Read::Records(records) => Ok(records
            .iter()
            .map(|record| record.offset)
            .find(|offset| *offset >= watch.position)
            .map_or(Found::Unknown, Found::Record)),
        Read::End => Ok(Found::Nothing(stable)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;

    #[test]
    fn only_a_record_behind_a_position_that_stands_still_is_a_stall() {
        let start = Clock::system().instant();
        let late = start + STILL;
        let mut watch = Watch::new(Offset::new(5), start);
        assert!(!watch.is_still(start) && watch.is_still(late));
        assert!(!watch.judge(Found::Unknown, late) && !watch.judge(Found::Nothing(Offset::new(9)), late));
        assert!(!watch.judge(Found::Record(Offset::new(4)), late), "that one has been read");
        assert!(watch.judge(Found::Record(Offset::new(7)), late));
        watch.moved(Offset::new(8), late);
        assert!(!watch.judge(Found::Record(Offset::new(9)), late), "it has moved meanwhile");
    }
}
