//! One user of one lane: the queue of deliveries that must go out in order.
//!
//! A key is *held* while its mark (its own progress record) covers all of its pending records: its head failed and waits, its
//! queue went over its bound, or some of its followers are not in memory. A key finishes in order, so the mark is short: the
//! head, the offsets of the next followers, and the offset from which on the rest is read again ([`Rest`]).
//!
//! All fields are private. Each transition keeps the invariants that [`Key::check`] names.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::model::failure::Try;
use crate::model::progress::Head;
use crate::model::record::{Offset, Record};

use super::memory::{Bounds, Charge, HeldCharge, InFlightCharge};
use super::window::Place;

/// One pending delivery of a key.
#[derive(Debug)]
pub struct Item {
    pub offset: Offset,
    /// The place in the window that covers the record; none where the key's mark does.
    pub place: Option<Place>,
    /// None after a restore or after shedding: the record is read when its turn comes.
    kept: Option<Kept>,
}

/// A record in memory with the bytes that it is charged for.
#[derive(Debug)]
struct Kept {
    record: Arc<Record>,
    charge: Charge,
}

impl Item {
    /// A record in memory. `charge` is released with it.
    pub fn new(record: Arc<Record>, place: Option<Place>, charge: Charge) -> Self {
        Self { offset: record.offset, place, kept: Some(Kept { record, charge }) }
    }

    /// A record of which only the offset is known.
    pub fn listed(offset: Offset) -> Self {
        Self { offset, place: None, kept: None }
    }

    pub fn record(&self) -> Option<&Arc<Record>> {
        self.kept.as_ref().map(|kept| &kept.record)
    }

    pub fn weight(&self) -> usize {
        self.kept.as_ref().map_or(0, |kept| kept.charge.bytes())
    }
}

/// What a key is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Nothing of it can be sent now: it is empty, or the rest of it has to be read by a cursor first.
    Idle,
    /// In its lane's ready queue.
    Ready,
    InFlight,
    /// Its head failed and waits for its next attempt.
    Waiting,
    /// Its front record is being read.
    Fetching,
}

/// The failed attempts of a key's head.
#[derive(Clone, Debug)]
pub struct Failing {
    pub attempts: u32,
    pub first: Try,
    pub last: Try,
    pub next_try_at: Timestamp,
    /// Of the retry window.
    pub spent: Duration,
}

/// What of a key is not in its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing.
    None,
    /// All records of the key from this offset on.
    Parked(Offset),
    /// As `Parked(from)`, and a cursor reads them. The cursor has handed over every record of the key that it has passed, so
    /// `from` may only rise. To make it lower the key has to leave the cursor before.
    Scanning { cursor: u64, from: Offset },
}

impl Rest {
    /// The offset from which on the records are not in the queue.
    pub fn parked(self) -> Option<Offset> {
        match self {
            Rest::None => None,
            Rest::Parked(from) | Rest::Scanning { from, .. } => Some(from),
        }
    }

    pub fn cursor(self) -> Option<u64> {
        match self {
            Rest::Scanning { cursor, .. } => Some(cursor),
            Rest::None | Rest::Parked(_) => None,
        }
    }
}

/// What the key costs beside its records.
#[derive(Debug)]
enum Cost {
    /// Its records are covered by a window.
    Free(#[expect(dead_code, reason = "it is released when it is dropped")] Charge),
    /// Its mark covers its records.
    Held(HeldCharge),
}

#[derive(Debug)]
pub struct Key {
    queue: VecDeque<Item>,
    activity: Activity,
    /// Records at the front that are being sent.
    in_flight: usize,
    /// Counts their bytes.
    sending: Option<InFlightCharge>,
    started_at: Timestamp,
    failing: Option<Failing>,
    cost: Cost,
    rest: Rest,
    /// Of the records in the queue.
    bytes: usize,
    /// A progress record of the key is in the log.
    pub recorded: bool,
    /// After an abort one record is sent at a time, until one is delivered.
    pub careful: bool,
    /// The offset under which the partition's list of lowest offsets knows the key.
    pub low: Option<Offset>,
}

impl Key {
    /// A key that is not held.
    pub fn new(cost: Charge) -> Self {
        Self::with_cost(Cost::Free(cost))
    }

    fn with_cost(cost: Cost) -> Self {
        Self {
            queue: VecDeque::new(),
            activity: Activity::Idle,
            in_flight: 0,
            sending: None,
            started_at: Timestamp::default(),
            failing: None,
            cost,
            rest: Rest::None,
            bytes: 0,
            recorded: false,
            careful: false,
            low: None,
        }
    }

    /// A held key as its mark describes it: nothing of it is in memory.
    pub fn restored(
        followers: Vec<Offset>,
        failing: Option<Failing>,
        parked: Option<Offset>,
        held: HeldCharge,
    ) -> Self {
        let activity = if failing.is_some() { Activity::Waiting } else { Activity::Idle };
        Self {
            queue: followers.into_iter().map(Item::listed).collect(),
            activity,
            failing,
            rest: parked.map_or(Rest::None, Rest::Parked),
            recorded: true,
            ..Self::with_cost(Cost::Held(held))
        }
    }

    pub fn activity(&self) -> Activity {
        self.activity
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub fn started_at(&self) -> Timestamp {
        self.started_at
    }

    pub fn failing(&self) -> Option<&Failing> {
        self.failing.as_ref()
    }

    pub fn is_held(&self) -> bool {
        matches!(self.cost, Cost::Held(_))
    }

    pub fn rest(&self) -> Rest {
        self.rest
    }

    pub fn front(&self) -> Option<&Item> {
        self.queue.front()
    }

    pub fn items(&self) -> impl DoubleEndedIterator<Item = &Item> + ExactSizeIterator {
        self.queue.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What it costs as a held key.
    #[cfg(any(test, debug_assertions))]
    pub fn held_bytes(&self) -> usize {
        match &self.cost {
            Cost::Held(held) => held.bytes(),
            Cost::Free(_) => 0,
        }
    }

    /// What the process stores of it: where it changes, the progress record of a held key has to be written again.
    pub fn state_of_mark(&self) -> impl PartialEq + use<> {
        let failing = self.failing.as_ref().map(|failing| (failing.attempts, failing.next_try_at, failing.spent));
        let ends = (self.queue.front().map(|item| item.offset), self.queue.back().map(|item| item.offset));
        (self.is_held(), self.queue.len(), ends, failing, self.rest.parked())
    }

    /// One more record of this weight would exceed the key's bounds.
    pub fn is_full(&self, weight: usize, bounds: &Bounds) -> bool {
        !self.queue.is_empty() && (self.bytes + weight > bounds.key_bytes || self.queue.len() >= bounds.key_records)
    }

    /// A cursor should bring more records: at most half of the bounds is used.
    pub fn is_low(&self, bounds: &Bounds) -> bool {
        self.bytes <= bounds.key_bytes / 2 && self.queue.len() <= bounds.key_records / 2
    }

    pub fn holds(&self, offset: Offset) -> bool {
        self.queue.binary_search_by(|item| item.offset.cmp(&offset)).is_ok()
    }

    /// The lowest pending offset.
    pub fn lowest(&self) -> Option<Offset> {
        self.queue.front().map(|item| item.offset).or(self.rest.parked())
    }

    /// Appends the key's next record.
    pub fn push(&mut self, item: Item) {
        debug_assert!(self.queue.back().is_none_or(|last| last.offset < item.offset), "records of a key come in order");
        debug_assert!(self.rest.parked().is_none_or(|from| item.offset < from), "a parked record is read by a cursor");
        debug_assert_eq!(item.place.is_none(), self.is_held(), "a record is covered by the mark or by a window");
        self.bytes += item.weight();
        self.queue.push_back(item);
    }

    /// Removes the front, which is final.
    pub fn pop(&mut self) -> Option<Item> {
        let item = self.queue.pop_front()?;
        self.bytes -= item.weight();
        self.failing = None;
        Some(item)
    }

    /// Puts the record of the front into memory.
    pub fn fill_front(&mut self, record: Arc<Record>, charge: Charge) {
        if let Some(front) = self.queue.front_mut() {
            self.bytes = self.bytes - front.weight() + charge.bytes();
            front.kept = Some(Kept { record, charge });
        }
    }

    /// Moves each record that a window covers to its place in another window.
    pub fn move_places(&mut self, to: impl Fn(Offset) -> Option<Place>) {
        for item in self.queue.iter_mut().filter(|item| item.place.is_some()) {
            item.place = to(item.offset);
        }
    }

    /// From now on the key's mark covers its records. Returns the places where windows covered them. None where the key was
    /// held before.
    pub fn hold(&mut self, charge: HeldCharge) -> Option<Vec<Place>> {
        if self.is_held() {
            return None;
        }
        self.cost = Cost::Held(charge);
        Some(self.queue.iter_mut().filter_map(|item| item.place.take()).collect())
    }

    /// From `offset` on nothing more is queued: the records are read again. `offset` is above everything in the queue. A key
    /// that a cursor serves has to leave it before ([`Key::leave_cursor`]).
    pub fn park(&mut self, offset: Offset) {
        debug_assert!(self.rest.cursor().is_none(), "a cursor has passed what would be parked");
        debug_assert!(self.queue.back().is_none_or(|last| last.offset < offset), "what is queued is not parked");
        self.rest = Rest::Parked(offset);
    }

    /// Every record below the frontier is in the queue: the next ones come with the lane.
    pub fn unpark(&mut self) {
        debug_assert!(self.rest.cursor().is_none(), "the key has left its cursor");
        self.rest = Rest::None;
    }

    /// A cursor at or below the parked offset reads for the key from now on.
    pub fn join_cursor(&mut self, cursor: u64) {
        if let Rest::Parked(from) = self.rest {
            self.rest = Rest::Scanning { cursor, from };
        }
    }

    /// The key's cursor hands `offset` over: the record goes into the queue, or is final.
    pub fn pass(&mut self, offset: Offset) {
        if let Rest::Scanning { from, .. } = &mut self.rest {
            *from = offset.just_after().max(*from);
        }
    }

    /// The key leaves its cursor, which is at `position`. `refused`: the record that the cursor has just handed over and for
    /// which the queue has no room; it is parked again.
    pub fn leave_cursor(&mut self, position: Offset, refused: Option<Offset>) {
        if let Rest::Scanning { from, .. } = self.rest {
            self.rest = Rest::Parked(refused.unwrap_or(from.max(position)));
        }
    }

    /// Whether shedding would park records that are in the queue now.
    pub fn sheds_offsets(&self, bounds: &Bounds) -> bool {
        self.queue.len() > self.listed_by_shedding(bounds)
    }

    /// Offsets that stay in the queue: those in flight, or the head, and the next followers.
    fn listed_by_shedding(&self, bounds: &Bounds) -> usize {
        self.in_flight.max(1) + bounds.listed_followers
    }

    /// Removes the records of a held key from memory, except those in flight: the next followers stay as offsets, the rest is
    /// parked. A key that a cursor serves keeps all of its offsets, since the cursor has passed them.
    pub fn shed(&mut self, bounds: &Bounds) {
        debug_assert!(self.is_held(), "the mark covers what is removed");
        // The head is sent next, unless it waits for its next attempt.
        let kept = if self.activity == Activity::Waiting { 0 } else { self.in_flight.max(1) };
        for item in self.queue.iter_mut().skip(kept) {
            self.bytes -= item.weight();
            item.kept = None;
        }
        if self.rest.cursor().is_none()
            && let Some(first) = self.queue.get(self.listed_by_shedding(bounds)).map(|item| item.offset)
        {
            self.queue.truncate(self.listed_by_shedding(bounds));
            self.park(first);
        }
    }

    /// Removes everything that is not in flight from a key that is not held. Returns what was removed; the window still covers
    /// it.
    pub fn forget(&mut self) -> impl Iterator<Item = Offset> {
        debug_assert!(!self.is_held(), "a window covers what is removed");
        let removed: Vec<Item> = self.queue.drain(self.in_flight..).collect();
        self.bytes -= removed.iter().map(Item::weight).sum::<usize>();
        removed.into_iter().map(|item| item.offset)
    }

    /// Nothing is sent or read for the key at the moment.
    pub fn rest_idle(&mut self) {
        self.activity = Activity::Idle;
    }

    /// The key is in its lane's ready queue.
    pub fn make_ready(&mut self) {
        self.activity = Activity::Ready;
    }

    /// The record of the front is being read.
    pub fn fetch(&mut self) {
        self.activity = Activity::Fetching;
    }

    /// The first `count` records are being sent.
    pub fn start(&mut self, count: usize, sending: InFlightCharge, now: Timestamp) {
        self.sending = Some(sending);
        (self.activity, self.in_flight, self.started_at) = (Activity::InFlight, count, now);
    }

    /// The attempt has ended. Returns how many records were in flight.
    pub fn settle(&mut self) -> usize {
        (self.activity, self.sending) = (Activity::Idle, None);
        std::mem::take(&mut self.in_flight)
    }

    /// The head has failed and waits for its next attempt. The key is held, or becomes so in the same step.
    pub fn wait(&mut self, failing: Failing) {
        (self.activity, self.failing) = (Activity::Waiting, Some(failing));
    }

    /// The head still waits for its next attempt, which it was read before. Returns when that is.
    pub fn wait_on(&mut self, now: Timestamp) -> Option<Timestamp> {
        let at = self.failing.as_ref().map(|failing| failing.next_try_at).filter(|at| *at > now)?;
        self.activity = Activity::Waiting;
        Some(at)
    }

    /// A planted mistake ([`crate::runtime::planted`]): the second record goes before the failed one.
    pub fn swap_front(&mut self) {
        if self.queue.len() > 1 && self.in_flight == 0 {
            self.queue.swap(0, 1);
        }
    }

    /// The head's next attempt is due now.
    pub fn hurry(&mut self, now: Timestamp) {
        if let Some(failing) = &mut self.failing {
            failing.next_try_at = failing.next_try_at.min(now);
        }
    }

    /// The progress record of a held key: the head while it fails, the next followers, and the offset from which on the rest
    /// is read again.
    pub fn mark(&self, bounds: &Bounds) -> (Option<Head>, Vec<Offset>, Option<Offset>) {
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
            if size > bounds.mark_bytes {
                return (head, followers, Some(offset));
            }
            last = offset.raw();
            followers.push(offset);
        }
        (head, followers, self.rest.parked())
    }

    /// What contradicts the invariants of a key.
    #[cfg(any(test, debug_assertions))]
    pub fn check(&self) -> Result<(), String> {
        let ordered = self.queue.iter().zip(self.queue.iter().skip(1)).all(|(one, next)| one.offset < next.offset);
        let last = self.queue.back().map(|item| item.offset);
        let weight: usize = self.queue.iter().map(Item::weight).sum();
        let rules = [
            ("the queue is in the order of the log", ordered),
            (
                "what is parked is above the queue",
                self.rest.parked().is_none_or(|from| last.is_none_or(|last| last < from)),
            ),
            ("only a held key has a parked rest", self.is_held() || self.rest == Rest::None),
            ("a record is covered by the mark or by a window", {
                self.queue.iter().all(|item| item.place.is_none() == self.is_held())
            }),
            ("a key in flight has records in flight", (self.activity == Activity::InFlight) == (self.in_flight > 0)),
            ("records in flight are in the queue and in memory", {
                self.in_flight <= self.queue.len()
                    && self.queue.iter().take(self.in_flight).all(|item| item.record().is_some())
            }),
            ("a waiting key is held and its head has failed", {
                self.activity != Activity::Waiting
                    || (self.is_held() && self.failing.is_some() && !self.queue.is_empty())
            }),
            ("a ready key has something to send", self.activity != Activity::Ready || !self.queue.is_empty()),
            ("an idle key has nothing in its queue", self.activity != Activity::Idle || self.queue.is_empty()),
            ("a key without records is forgotten", !self.queue.is_empty() || self.rest != Rest::None),
            ("bytes are those of the records", weight == self.bytes),
            ("the list of lowest offsets knows it", self.low == self.lowest().filter(|_| self.is_held())),
        ];
        match rules.iter().find(|(_, holds)| !holds) {
            None => Ok(()),
            Some((rule, _)) => Err(format!("{rule}: {self:?}")),
        }
    }
}

fn leb128_len(value: u128) -> usize {
    (128 - value.leading_zeros() as usize).max(1).div_ceil(7)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::record::{Headers, Partition};
    use crate::runtime::deliver::memory::{LaneAccount, Memory};

    fn failing() -> Failing {
        let tried = Try { at: Timestamp::from_millis(1), code: 500, message: "no".into() };
        let next_try_at = Timestamp::from_millis(9);
        Failing { attempts: 1, first: tried.clone(), last: tried, next_try_at, spent: Duration::ZERO }
    }

    fn key(count: u128) -> (Key, LaneAccount) {
        let lane = LaneAccount::for_tests(&Memory::new(&Bounds::default()));
        let mut key = Key::new(lane.charge(0));
        key.hold(lane.charge_held(100));
        for n in 0..count {
            let record = Record {
                partition: Partition(0),
                offset: Offset::new(n * 10),
                timestamp: Timestamp::default(),
                key: None,
                value: Some(vec![0; 1_000].into()),
                headers: Headers::new(),
            };
            let charge = lane.charge(record.weight());
            key.push(Item::new(Arc::new(record), None, charge));
        }
        (key, lane)
    }

    #[test]
    fn a_mark_lists_the_head_a_kilobyte_of_followers_and_where_the_rest_begins() {
        let bounds = Bounds::default();
        let (mut key, _lane) = key(3_000);
        key.park(Offset::new(99_999));
        key.wait(failing());
        let (head, followers, parked) = key.mark(&bounds);
        assert_eq!(head.map(|head| head.offset), Some(Offset::START));
        assert!((900..1_100).contains(&followers.len()), "one byte a follower: {}", followers.len());
        assert_eq!(parked, followers.last().map(|last| Offset::new(last.raw() + 10)));
        key.queue.truncate(3);
        assert_eq!(key.mark(&bounds).1, [Offset::new(10), Offset::new(20)]);
        assert_eq!(key.mark(&bounds).2, Some(Offset::new(99_999)));
        key.failing = None;
        assert_eq!(key.mark(&bounds).1.len(), 3);
    }

    #[test]
    fn followers_become_offsets_and_the_rest_is_parked() {
        let bounds = Bounds::default();
        let (mut key, lane) = key(3_000);
        let all = lane.bytes();
        key.shed(&bounds);
        assert_eq!(key.bytes, lane.bytes());
        assert!(lane.bytes() * 2_000 < all, "one of three thousand records is left: {}", lane.bytes());
        assert!(key.queue[0].record().is_some(), "the head stays");
        assert!(key.queue.iter().skip(1).all(|item| item.record().is_none()));
        let listed = bounds.listed_followers;
        assert_eq!((key.queue.len(), key.rest), (listed + 1, Rest::Parked(Offset::new((listed as u128 + 1) * 10))));
        assert!(key.holds(Offset::new(20)) && !key.holds(Offset::new(21)));
    }

    #[test]
    fn a_key_on_a_cursor_keeps_the_offsets_that_the_cursor_has_passed() {
        let bounds = Bounds { listed_followers: 1, ..Bounds::default() };
        let (mut key, _lane) = key(5);
        key.park(Offset::new(50));
        key.join_cursor(7);
        assert!(key.sheds_offsets(&bounds));
        key.shed(&bounds);
        assert_eq!((key.queue.len(), key.rest), (5, Rest::Scanning { cursor: 7, from: Offset::new(50) }));
        key.leave_cursor(Offset::new(90), None);
        assert_eq!(key.rest, Rest::Parked(Offset::new(90)), "the cursor had nothing of it in between");
        key.shed(&bounds);
        assert_eq!((key.queue.len(), key.rest), (2, Rest::Parked(Offset::new(20))));
    }
}
