//! Deliveries that lie in the log twice.
//!
//! Where a log has no transactions, a processor that dies between its outputs and its position leaves outputs that its successor
//! writes again, under the same delivery ids. The owner of a partition remembers the ids that live reading has passed, and a
//! record whose id is among them is ended without being sent: the first one counts, also where the configuration was changed
//! between the two.
//!
//! Only live reading judges. What it finds is kept by its offset until somebody hands the record over: at once, or later a
//! cursor, where the lane is detached or the key parked. Until then the record is covered like any other, so forgetting (a
//! restart does) means that it is sent twice, never that something is missing.

use std::collections::{BTreeSet, HashSet, VecDeque};

use xxhash_rust::xxh3::Xxh3;

use crate::log::{Admin, Backend, Limit, LogError, Read, Reader};
use crate::model::record::{Offset, Partition, Record, Topic, header};
use crate::runtime::planted::{Mistake, is_planted};

/// So many offsets or entries before the place where live reading begins are looked through for ids. Where a processor and a router
/// have died together, what is written again lies just before: since the processor's last commit.
const LOOK_BACK: u64 = 128;
/// At most so many records of those that wait for a cursor are known.
const WAITING: usize = 65_536;
const READ: Limit = Limit { records: 1_000, bytes: 4 << 20 };

/// What a partition's owner knows of what it has passed. A window of 0 knows nothing, and costs nothing.
#[derive(Debug, Default)]
pub struct Repeats {
    window: usize,
    /// Oldest first, each once.
    order: VecDeque<u128>,
    ids: HashSet<u128>,
    /// What lies in the log again and has not been handed over.
    waiting: BTreeSet<Offset>,
}

impl Repeats {
    /// Remembers the last `window` deliveries.
    pub fn new(window: usize) -> Self {
        Self { window, ..Self::default() }
    }

    /// Takes up the ids before `base`, from `floor` on: what lies below an operator has passed over, so it ends nothing.
    ///
    /// # Errors
    /// Where the log cannot be asked.
    pub async fn look_back<B: Backend>(
        &mut self,
        (backend, admin): (&B, &B::Admin),
        (topic, partition): (&Topic, Partition),
        floor: Option<Offset>,
        base: Offset,
    ) -> Result<(), LogError> {
        if self.window == 0 || floor.unwrap_or_default() >= base || is_planted(Mistake::ForgetLookBack) {
            return Ok(());
        }
        let from = admin.before(topic, partition, base, LOOK_BACK).await?.max(floor.unwrap_or_default());
        let mut reader = backend.reader(topic, partition, from).await?;
        while let Read::Records(records) = reader.read(READ).await? {
            for record in records {
                if record.offset >= base {
                    return Ok(());
                }
                self.is_repeat(&record);
            }
        }
        Ok(())
    }

    /// Live reading passes a record. True: its delivery lies before it.
    pub fn pass(&mut self, record: &Record) -> bool {
        self.window > 0 && self.is_repeat(record)
    }

    fn is_repeat(&mut self, record: &Record) -> bool {
        let Some(id) = identity(record) else { return false };
        if !self.ids.insert(id) {
            return true;
        }
        // First, or the queue would grow to twice what it needs.
        if self.order.len() >= self.window
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        self.order.push_back(id);
        false
    }

    /// The record at this place is a repeat.
    pub fn keep(&mut self, at: Offset) {
        if self.waiting.len() < WAITING {
            self.waiting.insert(at);
        }
    }

    pub fn has_kept(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub fn is_kept(&self, at: Offset) -> bool {
        !self.waiting.is_empty() && self.waiting.contains(&at)
    }

    /// It has ended.
    pub fn forget(&mut self, at: Offset) {
        self.waiting.remove(&at);
    }

    /// Everything below has ended.
    pub fn forget_below(&mut self, lowest: Offset) {
        while self.waiting.first().is_some_and(|first| *first < lowest) {
            self.waiting.pop_first();
        }
    }
}

/// What a delivery and its repeat have in common. One that was asked for is none: a replay, or what a processor makes of events
/// again after its position was reset.
fn identity(record: &Record) -> Option<u128> {
    let id = record.headers.text(header::DELIVERY_ID).filter(|id| !id.is_empty())?;
    let mut hash = Xxh3::new();
    for part in [Some(id), record.headers.text(header::REPLAY_ID), record.headers.text(header::RERUN)] {
        let part = part.unwrap_or_default();
        hash.update(&(part.len() as u32).to_le_bytes());
        hash.update(part.as_bytes());
    }
    Some(hash.digest128())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock, Timestamp};
    use crate::log::Publisher;
    use crate::log::embedded::Embedded;
    use crate::log::embedded::memory::Faults;
    use crate::log::topic::Topics;
    use crate::model::record::{Addressed, Headers};

    fn record(offset: u128, headers: &[(&'static str, &str)]) -> Record {
        let mut all = Headers::new();
        headers.iter().for_each(|(name, value)| all.push_text(name, value));
        let (partition, timestamp) = (Partition(0), Timestamp::default());
        Record { partition, offset: Offset::new(offset), timestamp, key: None, value: None, headers: all }
    }

    #[test]
    fn an_id_is_known_as_long_as_the_window_reaches() {
        let mut repeats = Repeats::new(2);
        let id = |id| [(header::DELIVERY_ID, id)];
        let passed: Vec<bool> = ["a", "b", "a", "c", "b", "a", "a"]
            .into_iter()
            .enumerate()
            .map(|(at, name)| repeats.pass(&record(at as u128, &id(name))))
            .collect();
        assert_eq!(passed, [false, false, true, false, true, false, true], "c pushes a out, not b");
    }

    #[tokio::test]
    async fn a_new_owner_looks_back_but_not_past_what_an_operator_has_passed_over() {
        let clock = Clock::system();
        let log = Embedded::in_memory(Faults::none(), clock).await.expect("a log");
        let topics = Topics::load(None).expect("topics").with_partitions(1);
        let admin = log.admin().expect("an admin");
        admin.create(topics.get(&Topic::DELIVERIES).expect("declared")).await.expect("created");
        let addressed = |n: u128| {
            let Record { partition, key, value, headers, .. } = record(n, &[(header::DELIVERY_ID, &n.to_string())]);
            Addressed { topic: Topic::DELIVERIES, partition, key, value, headers }
        };
        log.publisher().expect("a publisher").publish((0..300).map(addressed).collect()).await.expect("published");
        let known = async |floor: Option<u128>, base: u128| {
            let mut repeats = Repeats::new(1_000);
            let (at, floor) = ((&Topic::DELIVERIES, Partition(0)), floor.map(Offset::new));
            repeats.look_back((&log, &admin), at, floor, Offset::new(base)).await.expect("looked back");
            let knows = |n: &u128| {
                repeats.ids.contains(&identity(&record(*n, &[(header::DELIVERY_ID, &n.to_string())])).expect("an id"))
            };
            let all: Vec<u128> = (0..300).filter(knows).collect();
            (all.first().copied(), all.len())
        };
        assert_eq!(known(None, 290).await, (Some(162), 128));
        assert_eq!(known(None, 10).await, (Some(0), 10));
        assert_eq!(known(Some(280), 290).await, (Some(280), 10));
        assert_eq!((known(Some(290), 290).await, known(None, 0).await), ((None, 0), (None, 0)));
    }

    #[test]
    fn what_was_asked_for_is_no_repeat() {
        let mut repeats = Repeats::new(10);
        let id = (header::DELIVERY_ID, "a");
        assert!(!repeats.pass(&record(0, &[id])));
        assert!(!repeats.pass(&record(1, &[id, (header::REPLAY_ID, "r")])));
        assert!(!repeats.pass(&record(2, &[id, (header::RERUN, "r")])));
        assert!(repeats.pass(&record(3, &[id, (header::RERUN, "r")])));
        assert!(repeats.pass(&record(4, &[id])));
    }

    #[test]
    fn without_an_id_or_a_window_nothing_is_known() {
        let mut repeats = Repeats::new(10);
        assert!(!repeats.pass(&record(0, &[])) && !repeats.pass(&record(1, &[])));
        let mut none = Repeats::new(0);
        let id = [(header::DELIVERY_ID, "a")];
        assert!(!none.pass(&record(0, &id)) && !none.pass(&record(1, &id)) && none.ids.is_empty());
    }

    #[test]
    fn what_waits_is_forgotten_when_it_has_ended() {
        let mut repeats = Repeats::new(1);
        for at in [3, 5, 9] {
            repeats.keep(Offset::new(at));
        }
        repeats.forget(Offset::new(5));
        repeats.forget_below(Offset::new(4));
        let kept = [3, 5, 9].map(|at| repeats.is_kept(Offset::new(at)));
        assert_eq!(kept, [false, false, true]);
    }
}
