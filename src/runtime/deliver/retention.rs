//! What the log is about to delete is given up before it does, so that it ends in a visible outcome: a dead letter.
//!
//! Now and then a partition's lowest unfinished record is looked at. Where the time until the log may delete it is shorter than
//! twice what its backlog will take, that is an alarm; where it is shorter than a margin, everything that old is ended like a
//! drain, with its bytes on `dead-letters`.

use std::time::Duration;

use crate::clock::Timestamp;
use crate::model::progress::{Drain, Target};
use crate::model::record::{Offset, Partition};
use crate::telemetry::events;

/// The oldest record is looked at so often, or 48 times in the time that records are kept.
const LOOK: Duration = Duration::from_secs(60);

/// One partition's.
pub struct Retention {
    partition: Partition,
    /// How long the log keeps a record; none: for ever.
    keep: Option<Duration>,
    looked_at: Timestamp,
    ended: u64,
}

impl Drop for Retention {
    fn drop(&mut self) {
        events::retention_over(self.partition);
    }
}

impl Retention {
    /// `ended`: final outcomes so far.
    pub fn new(partition: Partition, keep: Option<Duration>, ended: u64, now: Timestamp) -> Self {
        Self { partition, keep, looked_at: now, ended }
    }

    /// When to look next.
    pub fn next_look(&self) -> Option<Timestamp> {
        self.keep.map(|keep| self.looked_at.plus(LOOK.min(keep / 48)))
    }

    /// A look begins. `ended`: final outcomes so far. Tells how many have ended per second since the last look.
    pub fn look(&mut self, ended: u64, now: Timestamp) -> f64 {
        let rate = ended.saturating_sub(self.ended) as f64 / now.since(self.looked_at).as_secs_f64().max(0.001);
        (self.looked_at, self.ended) = (now, ended);
        rate
    }

    /// Nothing is unfinished.
    pub fn rest(&self) {
        events::retention_over(self.partition);
    }

    /// The oldest of `pending` unfinished records was written `at`. Tells before when records have to end now.
    pub fn judge(&self, at: Timestamp, pending: u64, rate: f64, now: Timestamp) -> Option<Timestamp> {
        let keep = self.keep?;
        let left = at.plus(keep).since(now);
        // A log deletes whole segments, and late: the margin is for reading them all before.
        let margin = keep / 24;
        let drain = Duration::try_from_secs_f64(pending as f64 / rate).unwrap_or(Duration::MAX);
        events::retention(self.partition, left, drain, left < drain.saturating_mul(2) && left < keep / 2);
        (left < margin).then(|| now.plus(margin).minus(keep))
    }
}

/// Ends everything below `bound`.
pub fn drain(bound: Offset) -> Drain {
    Drain { id: format!("retention/{bound}"), target: Target::Retention, bound }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn records_end_a_margin_before_they_are_deleted() {
        let start = Timestamp::from_millis(0);
        let mut retention = Retention::new(Partition(0), Some(DAY), 0, start);
        assert_eq!(retention.next_look(), Some(start.plus(LOOK)));
        let judge = |retention: &Retention, now| retention.judge(start, 10, 1.0, now);
        assert_eq!(judge(&retention, start.plus(DAY / 2)), None);
        let late = start.plus(DAY - DAY / 24);
        assert_eq!(judge(&retention, late), None);
        let later = late.plus(Duration::from_secs(5));
        assert_eq!(judge(&retention, later), Some(start.plus(Duration::from_secs(5))));
        assert_eq!(retention.look(120, start.plus(LOOK)), 2.0);
        assert_eq!(Retention::new(Partition(0), None, 0, start).next_look(), None, "kept for ever");
    }
}
