//! One user of one lane: the queue of deliveries that must go out in order.
//!
//! A key is *held* while its mark, its own progress record, covers all of its unfinished records: its head failed and waits,
//! or its queue went over its bound, or followers of it are not in memory. Since a key finishes in order, the mark is short:
//! the head, the offsets of the next followers, and from where on everything of the key is still to come (`parked`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::model::failure::Try;
use crate::model::progress::Head;
use crate::model::record::{Offset, Record};

use super::window::Place;

/// A mark lists so many bytes of follower offsets: some hundred of them.
const LIST_BYTES: usize = 1_024;
/// Under pressure so many followers are kept as offsets, to be read one by one; the rest is found by a scan.
const LISTED: usize = 256;
/// More than these are not queued, however small they are.
const QUEUE: usize = 4_096;

/// One delivery that waits or is under way.
#[derive(Debug)]
pub struct Item {
    pub offset: Offset,
    /// In the window that covers it; none where the key's mark does.
    pub place: Option<Place>,
    /// None after a restore, or where memory was short: to be read when it is its turn.
    pub record: Option<Arc<Record>>,
}

impl Item {
    pub fn weight(&self) -> usize {
        self.record.as_ref().map_or(0, |record| record.weight())
    }
}

/// What a key is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Nothing of it can be sent now: it is empty, or the rest of it is still to be found by a scan.
    Idle,
    /// In its lane's ready queue.
    Ready,
    InFlight,
    /// Its head failed and waits for its next try.
    Waiting,
    /// Its front record is being read.
    Fetching,
}

/// How the head fares.
#[derive(Clone, Debug)]
pub struct Failing {
    pub attempts: u32,
    pub first: Try,
    pub last: Try,
    pub next_try_at: Timestamp,
    /// Of the retry window.
    pub spent: Duration,
}

#[derive(Debug)]
pub struct Key {
    pub queue: VecDeque<Item>,
    pub activity: Activity,
    /// Of the front, so many are under way.
    pub in_flight: usize,
    pub started_at: Timestamp,
    pub failing: Option<Failing>,
    pub held: bool,
    /// Everything of this key from here on is not in the queue.
    pub parked: Option<Offset>,
    /// The cursor that looks for what is parked.
    pub cursor: Option<u64>,
    /// A progress record of it is in the log.
    pub recorded: bool,
    /// After an abort one record goes at a time, until one goes through.
    pub careful: bool,
    pub bytes: usize,
    /// What the partition's committed offset knows of it.
    pub low: Option<Offset>,
}

impl Key {
    pub fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            activity: Activity::Idle,
            in_flight: 0,
            started_at: Timestamp::default(),
            failing: None,
            held: false,
            parked: None,
            cursor: None,
            recorded: false,
            careful: false,
            bytes: 0,
            low: None,
        }
    }

    pub fn push(&mut self, item: Item) {
        self.bytes += item.weight();
        self.queue.push_back(item);
    }

    pub fn pop(&mut self) -> Option<Item> {
        let item = self.queue.pop_front()?;
        self.bytes -= item.weight().min(self.bytes);
        Some(item)
    }

    /// One more record of this weight would be too many.
    pub fn is_full(&self, weight: usize, bound: usize) -> bool {
        !self.queue.is_empty() && (self.bytes + weight > bound || self.queue.len() >= QUEUE)
    }

    /// So little is queued that a scan should bring more.
    pub fn is_low(&self, bound: usize) -> bool {
        self.bytes <= bound / 2 && self.queue.len() <= QUEUE / 2
    }

    pub fn holds(&self, offset: Offset) -> bool {
        self.queue.binary_search_by(|item| item.offset.cmp(&offset)).is_ok()
    }

    /// The lowest unfinished offset of a held key.
    pub fn lowest(&self) -> Option<Offset> {
        self.queue.front().map(|item| item.offset).or(self.parked)
    }

    /// Forgets the records of a held key that are not under way, its head too while that waits: the next followers stay as
    /// offsets, the rest is parked.
    /// Returns the bytes that this freed.
    pub fn forget_followers(&mut self) -> usize {
        let before = self.bytes;
        let kept = if self.activity == Activity::Waiting { 0 } else { self.in_flight.max(1) };
        for item in self.queue.iter_mut().skip(kept) {
            self.bytes -= item.weight().min(self.bytes);
            item.record = None;
        }
        if let Some(first) = self.queue.get(kept + LISTED) {
            self.parked = Some(first.offset);
            self.queue.truncate(kept + LISTED);
        }
        before - self.bytes
    }

    /// What the progress record says of a held key: the head while it fails, the next followers, and from where on the rest
    /// is to be found.
    pub fn mark(&self) -> (Option<Head>, Vec<Offset>, Option<Offset>) {
        let mut items = self.queue.iter().map(|item| item.offset);
        let head = self.failing.as_ref().and_then(|failing| {
            Some(Head {
                offset: items.next()?,
                attempts: failing.attempts,
                spent: failing.spent,
                first_failed_at: failing.first.at,
                next_try_at: failing.next_try_at,
                first_code: failing.first.code,
                first_message: failing.first.message.clone(),
                last_code: failing.last.code,
                last_message: failing.last.message.clone(),
            })
        });
        let (mut followers, mut size, mut last) = (Vec::new(), 0, 0);
        for offset in items {
            size += leb128_len(offset.raw() - last);
            if size > LIST_BYTES {
                return (head, followers, Some(offset));
            }
            last = offset.raw();
            followers.push(offset);
        }
        (head, followers, self.parked)
    }
}

fn leb128_len(value: u128) -> usize {
    (128 - value.leading_zeros() as usize).max(1).div_ceil(7)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::record::{Headers, Partition};

    fn failing() -> Failing {
        let tried = Try { at: Timestamp::from_millis(1), code: 500, message: "no".into() };
        let next_try_at = Timestamp::from_millis(9);
        Failing { attempts: 1, first: tried.clone(), last: tried, next_try_at, spent: Duration::ZERO }
    }

    fn key(count: u128) -> Key {
        let mut key = Key::new();
        for n in 0..count {
            let offset = Offset::new(n * 10);
            let record = Record {
                partition: Partition(0),
                offset,
                timestamp: Timestamp::default(),
                key: None,
                value: Some(vec![0; 1_000].into()),
                headers: Headers::new(),
            };
            key.push(Item { offset, place: None, record: Some(Arc::new(record)) });
        }
        key
    }

    #[test]
    fn a_mark_lists_the_head_a_kilobyte_of_followers_and_where_the_rest_begins() {
        let mut key = key(3_000);
        key.parked = Some(Offset::new(99_999));
        key.failing = Some(failing());
        let (head, followers, parked) = key.mark();
        assert_eq!(head.map(|head| head.offset), Some(Offset::START));
        assert!((900..1_100).contains(&followers.len()), "one byte a follower: {}", followers.len());
        assert_eq!(parked, followers.last().map(|last| Offset::new(last.raw() + 10)));
        key.queue.truncate(3);
        assert_eq!(key.mark().1, [Offset::new(10), Offset::new(20)]);
        assert_eq!(key.mark().2, Some(Offset::new(99_999)));
        key.failing = None;
        assert_eq!(key.mark().1.len(), 3);
    }

    #[test]
    fn followers_become_offsets_and_the_rest_is_parked() {
        let mut key = key(3_000);
        let all = key.bytes;
        let freed = key.forget_followers();
        assert_eq!(key.bytes, all - freed);
        assert!(key.queue[0].record.is_some(), "the head stays");
        assert!(key.queue.iter().skip(1).all(|item| item.record.is_none()));
        assert_eq!((key.queue.len(), key.parked), (LISTED + 1, Some(Offset::new((LISTED as u128 + 1) * 10))));
        assert!(key.holds(Offset::new(20)) && !key.holds(Offset::new(21)));
    }
}
