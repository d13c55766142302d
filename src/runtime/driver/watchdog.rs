//! Notices live reading that stands still although there is something to read.
//!
//! The distance to the end proves nothing: behind the last record there may be transaction markers for ever. So it is read.
//! Where nothing more may be read since a transaction is not decided, and that lasts, it is told.

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
    /// Where something was undecided when it was looked into, and since when that is so.
    undecided: Option<(Offset, Instant)>,
}

/// What a look means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    Fine,
    /// Reading is stuck.
    Stuck,
    /// Reading stands before a transaction from here on, which should have been decided long ago.
    Overdue(Offset),
}

impl Watch {
    pub fn new(position: Offset, now: Instant) -> Self {
        Self { position, moved_at: now, empty_until: Offset::START, undecided: None }
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

    /// What a look has found.
    pub fn judge(&mut self, found: Found, now: Instant) -> Judgement {
        let before = self.undecided.take();
        match found {
            Found::Nothing(until) => self.empty_until = self.empty_until.max(until),
            Found::Unknown => self.undecided = before,
            Found::Undecided(at) => {
                let since = before.filter(|(before, _)| *before == at).map_or(now, |(_, since)| since);
                let is_overdue = now.saturating_duration_since(since) >= STILL;
                self.undecided = Some((at, if is_overdue { now } else { since }));
                if is_overdue {
                    return Judgement::Overdue(at);
                }
            }
            // It may have moved while that was read.
            Found::Record(at) if at >= self.position && self.is_still(now) => return Judgement::Stuck,
            Found::Record(_) => {}
        }
        Judgement::Fine
    }
}

/// What there is behind a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Record(Offset),
    /// Nothing below this.
    Nothing(Offset),
    /// Nothing that may be read yet: from here on a transaction is not decided.
    Undecided(Offset),
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
    let marks = backend.admin()?.watermarks(topic, partition).await?;
    let stable = marks.stable;
    if stable <= watch.position || stable <= watch.empty_until {
        return Ok(if stable < marks.end { Found::Undecided(stable) } else { Found::Nothing(stable) });
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
        for found in [Found::Unknown, Found::Nothing(Offset::new(9)), Found::Record(Offset::new(4))] {
            assert_eq!(watch.judge(found, late), Judgement::Fine, "{found:?}");
        }
        assert_eq!(watch.judge(Found::Record(Offset::new(7)), late), Judgement::Stuck);
        watch.moved(Offset::new(8), late);
        assert_eq!(watch.judge(Found::Record(Offset::new(9)), late), Judgement::Fine, "it has moved meanwhile");
    }

    #[test]
    fn a_transaction_that_stays_undecided_is_told_again_and_again() {
        let start = Clock::system().instant();
        let mut watch = Watch::new(Offset::new(5), start);
        let at = Offset::new(5);
        let mut seen = |after: u32, found| watch.judge(found, start + LOOK * after);
        assert_eq!(seen(0, Found::Undecided(at)), Judgement::Fine);
        assert_eq!(seen(1, Found::Unknown), Judgement::Fine);
        assert_eq!(seen(2, Found::Undecided(at)), Judgement::Fine);
        assert_eq!(seen(3, Found::Undecided(at)), Judgement::Overdue(at));
        assert_eq!(seen(5, Found::Undecided(at)), Judgement::Fine);
        assert_eq!(seen(6, Found::Undecided(at)), Judgement::Overdue(at));
        assert_eq!(seen(8, Found::Undecided(Offset::new(9))), Judgement::Fine, "another one");
        assert_eq!(seen(9, Found::Nothing(Offset::new(9))), Judgement::Fine);
        assert_eq!(seen(20, Found::Undecided(Offset::new(9))), Judgement::Fine);
    }
}
