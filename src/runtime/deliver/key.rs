//! One user of one lane: the queue of deliveries that must go out in order.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::clock::Timestamp;
use crate::model::failure::Try;
use crate::model::progress::Head;
use crate::model::record::{Offset, Record};

use super::window::Place;

/// A mark lists so many bytes of follower offsets: some hundred of them.
const LIST_BYTES: usize = 1_024;

/// Who covers an unfinished record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cover {
    Memory(Place),
    /// The key's own progress record.
    Mark,
}

/// One delivery that waits or is under way.
#[derive(Debug)]
pub struct Item {
    pub offset: Offset,
    pub cover: Cover,
    /// Not in memory after a restore, or where the queue was over its bound.
    pub record: Option<Arc<Record>>,
}

impl Item {
    pub fn weight(&self) -> usize {
        self.record.as_ref().map_or(0, |record| record.weight())
    }

    pub fn is_marked(&self) -> bool {
        self.cover == Cover::Mark
    }
}

/// What a key is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
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
}

#[derive(Debug)]
pub struct Key {
    /// Marked items come first: they are the oldest.
    pub queue: VecDeque<Item>,
    pub activity: Activity,
    pub failing: Option<Failing>,
    /// A progress record of it is in the log.
    pub recorded: bool,
    pub bytes: usize,
}

impl Key {
    pub fn new() -> Self {
        Self { queue: VecDeque::new(), activity: Activity::Idle, failing: None, recorded: false, bytes: 0 }
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

    /// Something of it is covered by its mark, or will be.
    pub fn needs_record(&self) -> bool {
        self.failing.is_some() || self.queue.front().is_some_and(Item::is_marked)
    }

    /// Moves what the mark can list from memory to the mark: the head and, while it fails, its next followers. Tells each
    /// moved item's place and offset.
    pub fn extend_mark(&mut self, mut moved: impl FnMut(Place, Offset)) {
        if self.failing.is_none() {
            return;
        }
        let (mut size, mut last) = (0, 0);
        for (index, item) in self.queue.iter_mut().enumerate() {
            if index > 0 {
                size += leb128_len(item.offset.raw() - last);
                last = item.offset.raw();
            }
            if let Cover::Memory(place) = item.cover {
                if size > LIST_BYTES {
                    return;
                }
                item.cover = Cover::Mark;
                moved(place, item.offset);
            }
        }
    }

    /// Followers that the mark names need not be in memory: beyond `bound` they are forgotten, the latest first. Returns
    /// the bytes that this freed.
    pub fn shed(&mut self, bound: usize) -> usize {
        let mut freed = 0;
        for item in self.queue.iter_mut().skip(1).rev() {
            if self.bytes <= bound {
                break;
            }
            if item.is_marked() {
                let weight = item.weight();
                item.record = None;
                self.bytes -= weight.min(self.bytes);
                freed += weight;
            }
        }
        freed
    }

    /// What the progress record says of it: the head while it fails, and the other marked items.
    pub fn mark(&self) -> (Option<Head>, Vec<Offset>) {
        let mut marked = self.queue.iter().take_while(|item| item.is_marked()).map(|item| item.offset);
        let head = self.failing.as_ref().and_then(|failing| {
            Some(Head {
                offset: marked.next()?,
                attempts: failing.attempts,
                first_failed_at: failing.first.at,
                next_try_at: failing.next_try_at,
                first_code: failing.first.code,
                first_message: failing.first.message.clone(),
                last_code: failing.last.code,
                last_message: failing.last.message.clone(),
            })
        });
        (head, marked.collect())
    }
}

fn leb128_len(value: u128) -> usize {
    (128 - value.leading_zeros() as usize).max(1).div_ceil(7)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::record::{Headers, Partition};
    use crate::runtime::deliver::window::Window;

    fn failing() -> Failing {
        let tried = Try { at: Timestamp::from_millis(1), code: 500, message: "no".into() };
        Failing { attempts: 1, first: tried.clone(), last: tried, next_try_at: Timestamp::from_millis(9) }
    }

    fn key(count: u128) -> (Key, Window) {
        let (mut key, mut window) = (Key::new(), Window::new(Offset::START));
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
            key.push(Item { offset, cover: Cover::Memory(window.push(offset)), record: Some(Arc::new(record)) });
        }
        (key, window)
    }

    #[test]
    fn a_mark_lists_the_head_and_a_kilobyte_of_followers() {
        let (mut key, mut window) = key(3_000);
        key.extend_mark(|_, _| panic!("nothing fails yet"));
        key.failing = Some(failing());
        let mut moved = 0;
        key.extend_mark(|place, _| {
            moved += 1;
            window.finish(place);
        });
        assert!((900..1_100).contains(&moved), "one byte a follower: {moved}");
        let (head, followers) = key.mark();
        assert_eq!(head.map(|head| head.offset), Some(Offset::START));
        assert_eq!(followers.len(), moved - 1);
        assert_eq!(window.base(), Offset::new(moved as u128 * 10), "what does not fit stays covered by memory");
    }

    #[test]
    fn only_marked_followers_are_shed() {
        let (mut key, _window) = key(3_000);
        let all = key.bytes;
        assert_eq!(key.shed(100_000), 0, "nothing is marked");
        key.failing = Some(failing());
        key.extend_mark(|_, _| {});
        let freed = key.shed(100_000);
        assert_eq!(key.bytes, all - freed);
        assert!(key.queue[0].record.is_some(), "the head stays");
        assert!(key.queue.iter().filter(|item| !item.is_marked()).all(|item| item.record.is_some()));
    }

    #[test]
    fn a_key_whose_head_went_through_keeps_its_mark_until_the_listed_are_done() {
        let (mut key, _window) = key(3);
        key.failing = Some(failing());
        key.extend_mark(|_, _| {});
        key.pop();
        key.failing = None;
        assert!(key.needs_record());
        assert_eq!(key.mark(), (None, vec![Offset::new(10), Offset::new(20)]));
    }
}
