//! Which partitions know a producer. The first record in one that does not goes alone.
//!
//! A leader that has nothing of a producer takes whatever sequence number comes first. If the first batch fails because the
//! leader is just moving, and the second, sent right behind it, is taken, librdkafka concludes from the second's success
//! that the first is stored, and acknowledges it: its records are lost. Seen when a broker came back after kill -9. A leader
//! that knows the producer refuses such a gap, and what failed is sent again.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::record::{Addressed, Partition, Topic};

/// Brokers forget a producer that wrote nothing for `producer.id.expiration.ms`: a day, unless somebody makes that shorter.
const REMEMBERED: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquaintance {
    Unknown,
    /// Its first record is under way.
    Introduced,
    /// Something was sent then, after a first acknowledgement.
    Known(Instant),
}

/// What one producer has sent where.
#[derive(Debug, Default)]
pub struct Known(HashMap<Topic, Vec<Acquaintance>>);

impl Known {
    /// Of the partition that a record is about to be sent to.
    pub fn of(&mut self, record: &Addressed, now: Instant) -> Acquaintance {
        let Some(found) = self.0.get_mut(&record.topic).and_then(|all| all.get_mut(record.partition.0 as usize)) else {
            return Acquaintance::Unknown;
        };
        if let Acquaintance::Known(since) = found {
            let is_fresh = now.saturating_duration_since(*since) < REMEMBERED;
            *found = if is_fresh { Acquaintance::Known(now) } else { Acquaintance::Unknown };
        }
        *found
    }

    pub fn set(&mut self, topic: &Topic, partition: Partition, to: Acquaintance) {
        let all = self.0.entry(topic.clone()).or_default();
        let index = partition.0 as usize;
        if all.len() <= index {
            all.resize(index + 1, Acquaintance::Unknown);
        }
        all[index] = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::model::record::Headers;

    #[test]
    fn a_partition_is_known_while_it_is_written_to() {
        let headers = Headers::new();
        let record = Addressed { topic: Topic::EVENTS, partition: Partition(3), key: None, value: None, headers };
        let other = Addressed { partition: Partition(9), ..record.clone() };
        let (mut known, start) = (Known::default(), Clock::system().instant());
        assert_eq!(known.of(&record, start), Acquaintance::Unknown);
        known.set(&Topic::EVENTS, Partition(3), Acquaintance::Introduced);
        assert_eq!(known.of(&record, start), Acquaintance::Introduced);
        known.set(&Topic::EVENTS, Partition(3), Acquaintance::Known(start));
        let later = start + REMEMBERED / 2;
        assert_eq!(known.of(&record, later), Acquaintance::Known(later));
        let later = later + REMEMBERED / 2;
        assert_eq!(known.of(&record, later), Acquaintance::Known(later));
        assert_eq!(known.of(&record, later + REMEMBERED), Acquaintance::Unknown);
        assert_eq!(known.of(&other, later), Acquaintance::Unknown);
    }
}
