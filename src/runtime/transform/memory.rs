//! What a stage has processed lately, so that a record that comes again is known: a client that got no answer sends its events
//! again, and some of them had been stored.
//!
//! A partition remembers its own, since the same event always comes to the same partition. What it has processed it writes down in
//! the transaction that commits it, and a new owner reads that back. A record is known again if the same one was processed at a lower
//! offset: the same record, read again after an offset was put back, is not the same event sent again.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::clock::{Clock, Timestamp};
use crate::log::{Admin, Backend, Limit, LogError, Read, Reader};
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
    used: Arc<AtomicUsize>,
    /// Identities, over all partitions.
    most: usize,
}

impl Memory {
    /// What was seen lies in `topic`, in the partition of the same number. `window`: how long after a record the same one is known,
    /// by their times. `bytes`: for all partitions; what is more is forgotten earlier.
    pub fn new(topic: Topic, window: Duration, bytes: usize) -> Self {
        Self { topic, window, used: Arc::default(), most: (bytes / COST).max(1) }
    }

    fn empty(&self) -> Remembered {
        Remembered { memory: self.clone(), known: HashMap::new(), order: VecDeque::new(), news: VecDeque::new() }
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
        let end = admin.watermarks(&self.topic, partition).await?.end;
        // What waits may be older than what was written since: records are told apart by their own times.
        let from = match backend.reader(input, partition, next).await?.read(ONE).await? {
            Read::Records(records) => records.first().map_or(clock.now(), |record| record.timestamp),
            Read::End => clock.now(),
        };
        let from = admin.offset_at(&self.topic, partition, from.minus(self.window)).await?;
        let mut reader = backend.reader(&self.topic, partition, from).await?;
        let (mut remembered, mut bytes) = (self.empty(), 0);
        loop {
            match reader.read(READ).await? {
                Read::Records(records) => {
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
                }
                Read::End if admin.watermarks(&self.topic, partition).await?.stable >= end => break,
                Read::End if began.elapsed() > PATIENCE => {
                    tracing::warn!(topic = %self.topic, partition = partition.0,
                        "a transaction stays undecided, what it saw may be processed again");
                    break;
                }
                Read::End => clock.sleep(UNDECIDED).await,
            }
        }
        events::restored(stage, partition, bytes, remembered.known.len(), began.elapsed());
        Ok(remembered)
    }
}

/// What a partition remembers.
pub(super) struct Remembered {
    memory: Memory,
    /// Where each was processed.
    known: HashMap<Identity, Offset>,
    /// From the oldest on.
    order: VecDeque<(Timestamp, Identity)>,
    /// Processed, or about to be, and not handed to a commit.
    news: VecDeque<(Identity, Offset, Timestamp)>,
}

impl Drop for Remembered {
    fn drop(&mut self) {
        self.memory.used.fetch_sub(self.known.len(), Ordering::Relaxed);
    }
}

impl Remembered {
    /// Whether a record is to be processed. It is known from now on.
    pub fn is_new(&mut self, identity: Identity, at: Offset, when: Timestamp) -> bool {
        self.forget(when);
        if self.known.get(&identity).is_some_and(|known| *known < at) {
            return false;
        }
        self.note(identity, at, when);
        self.news.push_back((identity, at, when));
        true
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
        self.forget(seen.at);
        for (identity, at) in seen.events {
            self.note(identity, at, seen.at);
        }
    }

    fn note(&mut self, identity: Identity, at: Offset, when: Timestamp) {
        if self.known.insert(identity, at).is_none() {
            self.order.push_back((when, identity));
            self.memory.used.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What is older than the window, and what there is no room for.
    fn forget(&mut self, now: Timestamp) {
        let window = self.memory.window;
        while let Some((_, old)) = self.order.pop_front_if(|(when, _)| when.plus(window) < now) {
            self.drop_one(old);
        }
        let mut early = 0_u64;
        while self.memory.used.load(Ordering::Relaxed) >= self.memory.most {
            let Some((_, oldest)) = self.order.pop_front() else { break };
            self.drop_one(oldest);
            early += 1;
        }
        if early > 0 {
            metrics().forgotten.with_label_values::<&str>(&[]).inc_by(early);
        }
    }

    fn drop_one(&mut self, identity: Identity) {
        if self.known.remove(&identity).is_some() {
            self.memory.used.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    fn memory(most: usize) -> Remembered {
        Memory::new(Topic::EVENTS_SEEN, Duration::from_secs(10), most * COST).empty()
    }

    #[test]
    fn what_comes_again_is_known_within_the_window() {
        let mut it = memory(100);
        let mut is_new = |identity, offset, second| it.is_new(identity, Offset::new(offset), at(second));
        assert!(is_new(1, 5, 100) && is_new(2, 6, 101));
        assert!(!is_new(1, 7, 103) && !is_new(1, 8, 110));
        assert!(is_new(1, 5, 103), "the same record, read again");
        assert!(is_new(1, 9, 111), "eleven seconds later");
        assert!(!is_new(2, 10, 111), "ten seconds later");
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
    fn memory_is_bounded_over_all_partitions() {
        let shared = Memory::new(Topic::EVENTS_SEEN, Duration::from_secs(1_000), 100 * COST);
        let (mut one, mut other) = (shared.empty(), shared.empty());
        for n in 0..80 {
            assert!(one.is_new(n, Offset::new(n), at(0)) && other.is_new(n, Offset::new(n), at(0)));
        }
        assert!(shared.used.load(Ordering::Relaxed) <= 101);
        assert!(!other.is_new(79, Offset::new(100), at(0)) && other.is_new(0, Offset::new(101), at(0)));
        drop((one, other));
        assert_eq!(shared.used.load(Ordering::Relaxed), 0);
    }
}
