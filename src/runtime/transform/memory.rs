//! What a stage has processed lately, so that a record that comes again is known: a client that got no answer sends its events
//! again, and some of them had been stored.
//!
//! A partition remembers its own, since the same event always comes to the same partition. What it has processed it writes down in
//! the transaction that commits it, and a new owner reads that back. A record is known again if the same one was processed at a lower
//! offset: the same record, read again after an offset was put back, is not the same event sent again. One that failed is not
//! remembered: it may come again when what was wrong has been mended. (One that ended the process is: its copies would end it too.)

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::clock::{Clock, Timestamp};
use crate::log::{Admin, Backend, Limit, LogError, Read, Reader, Watermarks};
use crate::model::codec;
use crate::model::record::{Addressed, Headers, Offset, Partition, Topic, header};
use crate::model::seen::{Identity, Seen};
use crate::telemetry::events;
use crate::telemetry::metrics::metrics;

const READ: Limit = Limit { records: 1_000, bytes: 4 << 20 };
const ONE: Limit = Limit { records: 1, bytes: 1 };
/// What one identity takes in memory: 32 bytes in the map with its slack, 24 in the queue with its.
const COST: usize = 96;
/// The last owner's transaction may be undecided for a while; longer than transactions live it is not waited for.
const PATIENCE: Duration = Duration::from_secs(20);
const UNDECIDED: Duration = Duration::from_millis(50);

/// How a process remembers. Clones share the bound.
#[derive(Clone)]
pub struct Memory {
    topic: Topic,
    window: Duration,
    /// Partitions that remember: each has an equal share.
    partitions: Arc<AtomicUsize>,
    /// Identities, over all partitions.
    most: usize,
}

impl Memory {
    /// What was seen lies in `topic`, in the partition of the same number. `window`: how long after a record the same one is known,
    /// by their times. `bytes`: for all partitions; what is more is forgotten earlier.
    pub fn new(topic: Topic, window: Duration, bytes: usize) -> Self {
        Self { topic, window, partitions: Arc::default(), most: (bytes / COST).max(1) }
    }

    fn empty(&self, clock: Clock) -> Remembered {
        self.partitions.fetch_add(1, Ordering::Relaxed);
        Remembered {
            memory: self.clone(),
            clock,
            known: HashMap::new(),
            order: VecDeque::new(),
            news: VecDeque::new(),
            latest: Timestamp::from_micros(0),
        }
    }

    /// What earlier owners of a partition have processed. `next`: where the owner goes on.
    ///
    /// # Errors
    /// Where the log cannot be read.
    pub(super) async fn restore<B: Backend>(
        &self,
        backend: &B,
        clock: &Clock,
        stage: &'static str,
        input: &Topic,
        partition: Partition,
        next: Offset,
    ) -> Result<Remembered, LogError> {
        let began = clock.instant();
        let admin = backend.admin()?;
        let Watermarks { start, end, .. } = admin.watermarks(&self.topic, partition).await?;
        if start >= end {
            return Ok(self.empty(clock.clone()));
        }
        // The last owner's last commit may be undecided yet, and is not to be missed.
        while admin.watermarks(&self.topic, partition).await?.stable < end {
            if began.elapsed() > PATIENCE {
                tracing::warn!(topic = %self.topic, partition = partition.0,
                    "a transaction stays undecided, what it saw may be processed again");
                break;
            }
            clock.sleep(UNDECIDED).await;
        }
        // What waits may be older than what was written since: records are told apart by their own times.
        // A reader costs a connection, so there is none where nothing waits.
        let waiting = match admin.watermarks(input, partition).await?.stable > next {
            true => backend.reader(input, partition, next).await?.read(ONE).await?,
            false => Read::End,
        };
        let waiting = match waiting {
            Read::Records(records) => records.first().map(|record| record.timestamp),
            Read::End => None,
        };
        let now = clock.now();
        let from = waiting.map_or(now, |waiting| waiting.min(now)).minus(self.window).max(Timestamp::from_micros(0));
        let from = admin.offset_at(&self.topic, partition, from).await?;
        let mut reader = backend.reader(&self.topic, partition, from).await?;
        let (mut remembered, mut bytes) = (self.empty(clock.clone()), 0);
        while let Read::Records(records) = reader.read(READ).await? {
            for record in records {
                bytes += record.weight();
                match record.value.as_ref().map(codec::decode::<Seen>) {
                    Some(Ok(seen)) => remembered.add(seen),
                    Some(Err(error)) => {
                        tracing::error!(topic = %self.topic, partition = partition.0, offset = %record.offset, %error,
                            "what was seen cannot be read, events may be processed again");
                    }
                    None => {}
                }
            }
            // Others have something to do meanwhile.
            tokio::task::yield_now().await;
        }
        events::restored(stage, partition, bytes, remembered.known.len(), began.elapsed());
        Ok(remembered)
    }
}

/// What a partition remembers.
pub(super) struct Remembered {
    memory: Memory,
    clock: Clock,
    /// Where each was processed, and the time of that record.
    known: HashMap<Identity, (Offset, Timestamp)>,
    /// From the oldest on. One that is not as `known` says has been replaced.
    order: VecDeque<(Timestamp, Identity)>,
    /// Processed, or about to be, and not handed to a commit: in the order of their offsets.
    news: VecDeque<(Identity, Offset, Timestamp)>,
    /// Of all records so far.
    latest: Timestamp,
}

impl Drop for Remembered {
    fn drop(&mut self) {
        self.memory.partitions.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Remembered {
    /// Whether a record is to be processed. It is known from now on.
    pub fn is_new(&mut self, identity: Identity, at: Offset, when: Timestamp) -> bool {
        let when = self.time(when);
        self.forget();
        if self.known.get(&identity).is_some_and(|(known, _)| *known < at) {
            return false;
        }
        // Reading has gone back: what lies behind it comes again.
        while self.news.pop_back_if(|(_, later, _)| *later >= at).is_some() {}
        self.note(identity, at, when);
        self.news.push_back((identity, at, when));
        true
    }

    /// These were not processed after all.
    pub fn failed(&mut self, offsets: &[Offset]) {
        for failed in offsets {
            if let Ok(index) = self.news.binary_search_by(|(_, at, _)| at.cmp(failed))
                && let Some((identity, at, _)) = self.news.remove(index)
                && self.known.get(&identity).is_some_and(|(known, _)| *known == at)
            {
                self.known.remove(&identity);
            }
        }
    }

    /// The record that says what was processed below `position` since the last one. None: nothing.
    pub fn hand_over(&mut self, partition: Partition, position: Offset) -> Option<Addressed> {
        let mut seen = Seen { at: Timestamp::from_micros(0), events: Vec::new() };
        while let Some((identity, at, when)) = self.news.pop_front_if(|(_, at, _)| *at < position) {
            seen.at = seen.at.max(when);
            seen.events.push((identity, at));
        }
        if seen.events.is_empty() {
            return None;
        }
        let mut headers = Headers::new();
        headers.push_text(header::CONTENT_TYPE, header::AVRO);
        Some(Addressed {
            topic: self.memory.topic.clone(),
            partition,
            key: Some(partition.to_string().into()),
            value: Some(codec::encode(&seen).into()),
            headers,
        })
    }

    fn add(&mut self, seen: Seen) {
        let when = self.time(seen.at);
        self.forget();
        for (identity, at) in seen.events {
            self.note(identity, at, when);
        }
    }

    /// A record's time, as it counts here: none is ahead of now, and none goes back.
    fn time(&mut self, when: Timestamp) -> Timestamp {
        self.latest = self.latest.max(when.min(self.clock.now()));
        self.latest
    }

    fn note(&mut self, identity: Identity, at: Offset, when: Timestamp) {
        self.known.insert(identity, (at, when));
        self.order.push_back((when, identity));
    }

    /// What is older than the window, and what there is no room for.
    fn forget(&mut self) {
        let (window, now) = (self.memory.window, self.latest);
        while let Some((when, old)) = self.order.pop_front_if(|(when, _)| when.plus(window) < now) {
            self.drop_one(old, when);
        }
        let share = (self.memory.most / self.memory.partitions.load(Ordering::Relaxed).max(1)).max(1);
        let mut early = 0_u64;
        while self.order.len() >= share {
            let Some((when, oldest)) = self.order.pop_front() else { break };
            early += u64::from(self.drop_one(oldest, when));
        }
        if early > 0 {
            metrics().forgotten.with_label_values::<&str>(&[]).inc_by(early);
        }
    }

    fn drop_one(&mut self, identity: Identity, when: Timestamp) -> bool {
        let is_it = self.known.get(&identity).is_some_and(|(_, known)| *known == when);
        is_it && self.known.remove(&identity).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    fn memory(most: usize) -> Remembered {
        Memory::new(Topic::EVENTS_SEEN, Duration::from_secs(10), most * COST).empty(Clock::system())
    }

    #[test]
    fn what_comes_again_is_known_within_the_window() {
        let mut it = memory(100);
        let mut is_new = |identity, offset, second| it.is_new(identity, Offset::new(offset), at(second));
        assert!(is_new(1, 5, 100) && is_new(2, 6, 101));
        assert!(!is_new(1, 7, 103) && !is_new(1, 8, 110));
        assert!(is_new(1, 5, 103), "the same record, read again");
        assert!(!is_new(2, 10, 111), "ten seconds later");
        assert!(is_new(2, 11, 112) && is_new(1, 12, 121), "eleven seconds later");
    }

    #[test]
    fn only_what_is_finished_is_written_down_and_a_new_owner_knows_it() {
        let mut it = memory(100);
        for (identity, offset) in [(1_u128, 5_u128), (2, 6), (3, 9)] {
            assert!(it.is_new(identity, Offset::new(offset), at(100 + offset as i64)));
        }
        assert_eq!(it.hand_over(Partition(3), Offset::new(5)), None);
        let record = it.hand_over(Partition(3), Offset::new(7)).expect("two are finished");
        assert_eq!((record.partition, record.topic), (Partition(3), Topic::EVENTS_SEEN));
        let seen: Seen = codec::decode(&record.value.expect("a value")).expect("readable");
        assert_eq!(seen, Seen { at: at(106), events: vec![(1, Offset::new(5)), (2, Offset::new(6))] });
        let mut next = memory(100);
        next.add(seen);
        assert!(!next.is_new(1, Offset::new(10), at(116)) && next.is_new(3, Offset::new(9), at(109)));
        assert_eq!(it.hand_over(Partition(3), Offset::new(7)), None);
    }

    #[test]
    fn what_failed_may_come_again() {
        let mut it = memory(100);
        let offsets = [5, 6, 7].map(Offset::new);
        offsets.iter().zip(1..).for_each(|(at, identity)| assert!(it.is_new(identity, *at, at_second())));
        it.failed(&[offsets[1]]);
        let record = it.hand_over(Partition(0), Offset::new(100)).expect("two were processed");
        let seen: Seen = codec::decode(&record.value.expect("a value")).expect("readable");
        assert_eq!(seen.events, [(1, offsets[0]), (3, offsets[2])]);
        assert!(it.is_new(2, Offset::new(8), at_second()) && !it.is_new(3, Offset::new(9), at_second()));
    }

    fn at_second() -> Timestamp {
        at(100)
    }

    #[test]
    fn a_record_from_the_future_empties_nothing() {
        let mut it = memory(100);
        assert!(it.is_new(1, Offset::new(1), Clock::system().now()));
        assert!(it.is_new(2, Offset::new(2), Timestamp::from_millis(i64::MAX / 10_000)));
        assert!(!it.is_new(1, Offset::new(3), Clock::system().now()) && !it.is_new(2, Offset::new(4), at(0)));
    }

    #[test]
    fn each_partition_has_its_share() {
        let shared = Memory::new(Topic::EVENTS_SEEN, Duration::from_secs(1_000), 100 * COST);
        let mut one = shared.empty(Clock::system());
        let fill = |it: &mut Remembered, from: u128| {
            (from..from + 90).for_each(|n| assert!(it.is_new(n, Offset::new(n), at(0))));
        };
        fill(&mut one, 0);
        assert_eq!(one.known.len(), 90);
        let mut other = shared.empty(Clock::system());
        fill(&mut other, 0);
        fill(&mut one, 1_000);
        assert_eq!((one.known.len(), other.known.len()), (50, 50));
        assert!(!other.is_new(89, Offset::new(2_000), at(0)) && other.is_new(0, Offset::new(2_001), at(0)));
        drop((one, other));
        assert_eq!(shared.partitions.load(Ordering::Relaxed), 0);
    }
}
