//! A partition's whole state, without any I/O: records, verdicts and the time go in; deliveries to start, things to read and
//! progress to write come out.
//!
//! | file | what |
//! |---|---|
//! | `partition` | taking records in, starting deliveries |
//! | `cover` | who covers a record: holding and parking keys |
//! | `restored` | lanes and keys as the last owner left them |
//! | `settle` | what came of an attempt: finished, held, aborted, drained |
//! | `detach` | lanes that live reading does not feed: detaching, forgetting, attaching, shedding |
//! | `scan` | cursors that bring back what is not in memory |
//! | `collect` | what a commit writes |
//! | `lane` | the lanes, and whose turn it is |

mod collect;
mod cover;
mod detach;
mod lane;
mod restored;
mod scan;
mod settle;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;

use bytes::Bytes;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::clock::Timestamp;
use crate::model::id::DestinationId;
use crate::model::job_status::Tally;
use crate::model::outcome::Reason;
use crate::model::progress::{Drain, Lane};
use crate::model::record::{Addressed, Epoch, Headers, Offset, Partition, Record, header};
use crate::telemetry::metrics::metrics;

use super::destination::{Destinations, Permit, Rules};
use super::key::{Activity, Item, Key};
use super::memory::{Account, Memory};
use super::repeats::Repeats;
use super::restore::Restored;
use super::window::{Place, Window};
use super::{Bounds, DeliverSettings, tell_waiting};
use crate::runtime::planted::{Mistake, is_planted};

use lane::{LaneState, Lanes};
use scan::Cursors;

pub use scan::CursorId;

/// Nothing new is started while so many final outcomes wait for a commit: after a crash they would all be repeated.
const UNCOMMITTED: usize = 10_000;
/// Nor while so many bytes of dead letters do: one transaction has to hold them, and memory until then.
const UNCOMMITTED_BYTES: usize = 8 << 20;
/// Single records that are read at a time.
const FETCHES: usize = 64;
/// What a held key costs beside its records: its state, its name, its mark's place in the list of lowest offsets.
const HELD: usize = 512;

/// A user of a lane: what stays in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId {
    lane: usize,
    user: Arc<str>,
}

/// What to do next.
pub enum Start {
    /// Send these, in this order, in one request; then [`PartitionState::settle`].
    Attempt { key: KeyId, records: Vec<Arc<Record>>, permit: Permit },
    /// Read the record at this offset, and give it to [`PartitionState::fetched`].
    Fetch { key: KeyId, offset: Offset },
    /// Read on with this cursor from here, and give what comes to [`PartitionState::scanned`].
    Scan { cursor: CursorId, from: Offset, until: Offset },
    /// This cursor is not needed any more.
    Close { cursor: CursorId },
    /// Something is ready, but no permit is free.
    Starved,
}

/// What a timer is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Alarm {
    Key(KeyId),
    Lane(usize),
    /// Look at the cursors again.
    Seats,
}

pub struct PartitionState {
    partition: Partition,
    epoch: Epoch,
    settings: DeliverSettings,
    destinations: Destinations,
    rules: Arc<dyn Fn(&DestinationId) -> Rules + Send + Sync>,
    account: Account,
    /// What memory covers: the records of attached lanes' keys that are not held.
    window: Window,
    /// What lies in the log twice.
    repeats: Repeats,
    /// Where an operator has put the position.
    floor: Option<Offset>,
    /// Records below it were counted as taken by an earlier owner, and may be finished or marked.
    taken_until: Offset,
    lanes: Lanes,
    cursors: Cursors,
    /// The lowest unfinished offset of each held key, with how many have it.
    lows: BTreeMap<Offset, usize>,
    alarms: BinaryHeap<Reverse<(Timestamp, Alarm)>>,
    /// Keys whose front record has to be read, by where it lies.
    wanted: BTreeMap<Offset, KeyId>,
    /// So many are being read, and where the last of them lies.
    fetching: usize,
    fetched_at: Offset,
    drains: Vec<Drain>,
    /// Some of what they cover is to be ended after the next commit.
    drain_later: bool,
    seq: u64,
    /// Keys and lanes whose progress records are to be written again.
    dirty: BTreeSet<KeyId>,
    dirty_lanes: BTreeSet<usize>,
    outputs: Vec<Addressed>,
    /// Of runs of reverse ETL, since the last commit.
    tally: Tally,
    changed: bool,
    stopped_clean: bool,
    /// Requests under way.
    in_flight: usize,
    uncommitted: usize,
    collected: usize,
    /// Of dead letters.
    uncommitted_bytes: usize,
    collected_bytes: usize,
    waiting: Option<&'static str>,
    random: SmallRng,
    /// For the metrics.
    pending: u64,
    failing: usize,
    parked: usize,
}

/// What a partition is made of.
pub struct Given {
    pub partition: Partition,
    pub epoch: Epoch,
    pub settings: DeliverSettings,
    pub memory: Memory,
    pub destinations: Destinations,
    pub rules: Arc<dyn Fn(&DestinationId) -> Rules + Send + Sync>,
    /// Decides the jitter of retries.
    pub seed: u64,
}

impl PartitionState {
    pub fn new(given: Given, restored: Restored, now: Timestamp) -> Self {
        let Given { partition, epoch, settings, memory, destinations, rules, seed } = given;
        destinations.own(partition, true);
        let runs = if is_planted(Mistake::ForgetRunsAtRestore) { Vec::new() } else { restored.runs };
        let mut state = Self {
            partition,
            epoch,
            account: memory.account(),
            window: Window::new(restored.base, runs),
            repeats: restored.repeats,
            floor: restored.floor,
            taken_until: restored.live,
            lanes: Lanes::default(),
            cursors: Cursors::default(),
            lows: BTreeMap::new(),
            alarms: BinaryHeap::new(),
            wanted: BTreeMap::new(),
            fetching: 0,
            fetched_at: Offset::START,
            drains: restored.drains,
            drain_later: false,
            seq: restored.seq,
            dirty: BTreeSet::new(),
            dirty_lanes: BTreeSet::new(),
            outputs: Vec::new(),
            tally: Tally::default(),
            changed: false,
            stopped_clean: false,
            in_flight: 0,
            uncommitted: 0,
            collected: 0,
            uncommitted_bytes: 0,
            collected_bytes: 0,
            waiting: None,
            random: SmallRng::seed_from_u64(seed),
            pending: 0,
            failing: 0,
            parked: 0,
            settings,
            destinations,
            rules,
        };
        for (key, value) in restored.corrections {
            state.outputs.push(Addressed { value, ..state.tombstone(key) });
            state.changed = true;
        }
        for (lane, ledger) in restored.ledgers {
            if !is_planted(Mistake::ForgetLedger) {
                let index = state.lane(&lane);
                state.pending += ledger.pending();
                state.lanes.at_mut(index).ledger = ledger;
            }
        }
        for lane in restored.lanes {
            state.restore_lane(lane, now);
        }
        for key in restored.keys {
            state.restore_key(key, now);
        }
        state
    }

    /// Where live reading goes on.
    pub fn live(&self) -> Offset {
        self.window.live()
    }

    /// Below it everything has been read by live reading, now or by an earlier owner: cursors may hand it over.
    fn frontier(&self) -> Offset {
        self.window.live().max(self.taken_until)
    }

    /// A lane's index; a new one is opened.
    fn lane(&mut self, lane: &Lane) -> usize {
        self.lanes.find(lane).unwrap_or_else(|| {
            let destination = self.destinations.get(&lane.destination, |id| (self.rules)(id));
            self.lanes.open(lane.clone(), destination)
        })
    }

    /// Takes what live reading brings.
    pub fn admit_all(&mut self, records: Vec<Record>, now: Timestamp) {
        let was_behind = self.window.live() < self.taken_until;
        for record in records {
            self.admit(record, now);
        }
        if was_behind && self.window.live() >= self.taken_until {
            // Lanes and keys that waited for this may go on.
            (0..self.lanes.len()).for_each(|index| self.ask_all(index));
        }
        self.shed(now);
    }

    fn admit(&mut self, record: Record, now: Timestamp) {
        let offset = record.offset;
        if offset < self.window.live() {
            // A position before what was taken: the log was reset under us, or the seek is still on its way.
            return;
        }
        self.changed = true;
        let is_repeat = self.repeats.pass(&record);
        let index = self.lane(&lane_of(&record));
        if offset >= self.taken_until {
            self.lanes.ledger(index).taken += 1;
            self.pending += 1;
        }
        // Finished already, or covered by a mark that came with the restore.
        let Some(place) = self.window.push(offset, index as u32) else { return };
        if is_repeat {
            self.repeats.keep(offset);
        }
        if self.lanes.at(index).detached.is_some() {
            self.window.finish(place);
            return self.cursors.ask_lane(index);
        }
        let id = self.key_of(index, &record);
        self.hand(&id, record, Some(place), now);
        self.bound_lane(index, now);
    }

    fn key_of(&self, lane: usize, record: &Record) -> KeyId {
        let user = record.headers.text(header::USER).filter(|_| self.lanes.at(lane).destination.rules.ordered);
        let user: Arc<str> = match user {
            Some(user) => user.into(),
            // Nobody to keep in order: the record is a key of its own.
            None => format!("#{}", record.offset).into(),
        };
        KeyId { lane, user }
    }

    /// Gives a record to its key. `place`: in the window that covers it; none where the key's mark does, since it comes from
    /// the key's own scan.
    fn hand(&mut self, id: &KeyId, record: Record, place: Option<Place>, now: Timestamp) {
        let offset = record.offset;
        let parked = self.lanes.key(id).and_then(|key| key.parked);
        if parked.is_some_and(|parked| parked <= offset) && place.is_some() {
            // Its own scan will bring it.
            self.cursors.ask_key(id);
            return self.cover_by_mark(id, place);
        }
        let is_repeat = self.repeats.is_kept(offset);
        let reason = if is_repeat { None } else { self.refusal(id, &record) };
        if is_repeat || reason.is_some() {
            if let Some(place) = place {
                self.release(id.lane, place);
            }
            return match reason {
                Some(reason) => self.refuse(id.lane, &record, reason, now),
                None => self.end_repeat(id.lane, offset),
            };
        }
        let (weight, bound) = (record.weight(), self.settings.bounds.key_bytes);
        let lane = self.lanes.at_mut(id.lane);
        let key = lane.keys.entry(Arc::clone(&id.user)).or_insert_with(Key::new);
        if key.is_full(weight, bound) {
            self.park(id, offset);
            return self.cover_by_mark(id, place);
        }
        let held = key.held;
        key.push(Item { offset, place: place.filter(|_| !held), record: Some(Arc::new(record)) });
        let idle = key.activity == Activity::Idle;
        lane.bytes += weight;
        lane.unfinished += usize::from(!held);
        lane.destination.add_bytes(weight);
        self.account.add(weight);
        if held {
            self.cover_by_mark(id, place);
        }
        if idle {
            self.lanes.push(id, false);
        }
    }

    /// What may start now, if anything. `may_send`: this owner may start requests.
    pub fn next_start(&mut self, now: Timestamp, may_send: bool) -> Option<Start> {
        if self.owes_much() {
            return None;
        }
        if let Some(start) = self.next_reading(now) {
            return Some(start);
        }
        if !may_send {
            return None;
        }
        loop {
            let bounds = self.settings.bounds;
            let full = self.account.held_is_full() || self.account.held() >= bounds.partition_bytes / 2;
            let alarms = &mut self.alarms;
            let next = self.lanes.next(
                now,
                |lane| full || lane.held_bytes >= bounds.held_bytes,
                |lane, at| alarms.push(Reverse((at, Alarm::Lane(lane)))),
            );
            let (id, permit) = match next? {
                Ok(next) => next,
                Err(lane::NoPermit) => return Some(Start::Starved),
            };
            if let Some(records) = self.take_batch(&id, now) {
                return Some(Start::Attempt { key: id, records, permit });
            }
            if let Some(start) = self.next_reading(now) {
                return Some(start);
            }
        }
    }

    /// So much has ended since the last commit that nothing more is to be read or sent before the next one.
    pub fn owes_much(&self) -> bool {
        self.uncommitted >= UNCOMMITTED || self.uncommitted_bytes >= UNCOMMITTED_BYTES
    }

    /// The records of the key's next request; none where the first one has to be read before.
    fn take_batch(&mut self, id: &KeyId, now: Timestamp) -> Option<Vec<Arc<Record>>> {
        let batch = self.lanes.at(id.lane).destination.rules.batch;
        let key = self.lanes.key_mut(id)?;
        let most = if key.careful || key.failing.is_some() { 1 } else { batch.max(1) };
        let mut records: Vec<Arc<Record>> =
            key.queue.iter().take(most).map_while(|item| item.record.as_ref().map(Arc::clone)).collect();
        if records.is_empty() {
            if let Some(front) = key.queue.front() {
                // Reading it takes a while; the others do not wait for that.
                key.activity = Activity::Fetching;
                self.wanted.insert(front.offset, id.clone());
            }
            return None;
        }
        // A drained one behind the front is ended when its turn comes.
        if records.len() > 1
            && !self.drains.is_empty()
            && let Some(first) = records.iter().skip(1).position(|record| self.refusal(id, record).is_some())
        {
            records.truncate(first + 1);
        }
        let key = self.lanes.key_mut(id)?;
        key.activity = Activity::InFlight;
        self.in_flight += 1;
        key.in_flight = records.len();
        key.started_at = now;
        Some(records)
    }

    fn next_reading(&mut self, now: Timestamp) -> Option<Start> {
        let may_fetch = self.fetching < FETCHES && (self.fetching == 0 || !self.is_short());
        while may_fetch && let Some((offset, id)) = self.next_wanted() {
            let front = self.lanes.key(&id).filter(|key| key.activity == Activity::Fetching);
            if front.and_then(|key| key.queue.front()).is_some_and(|front| front.offset == offset) {
                self.fetching += 1;
                metrics().fetched.with_label_values::<&str>(&[]).inc();
                return Some(Start::Fetch { offset, key: id });
            }
        }
        self.next_scan(now)
    }

    /// Single records are read in the order of the log, again and again from its beginning: neighbours with one look.
    fn next_wanted(&mut self) -> Option<(Offset, KeyId)> {
        let ahead = self.wanted.range(self.fetched_at..).next();
        let offset = *ahead.or_else(|| self.wanted.first_key_value())?.0;
        self.fetched_at = offset;
        self.wanted.remove_entry(&offset)
    }

    /// A record that was to be read at `offset`; none where the log has deleted it.
    pub fn fetched(&mut self, id: &KeyId, offset: Offset, record: Option<Record>, now: Timestamp) {
        self.fetching -= 1;
        let lane = self.lanes.at_mut(id.lane);
        let is_meant = |key: &&mut Key| {
            key.activity == Activity::Fetching && key.queue.front().is_some_and(|front| front.offset == offset)
        };
        let Some(key) = lane.keys.get_mut(&id.user).filter(is_meant) else { return };
        key.activity = Activity::Idle;
        let Some(record) = record else {
            let message = "the log had deleted it before it could be delivered".to_owned();
            self.abort(id, Reason::Retention, 0, message, now);
            return self.go_on(id, now);
        };
        let Some(front) = key.queue.front_mut() else { return };
        let weight = record.weight();
        front.record = Some(Arc::new(record));
        key.bytes += weight;
        lane.bytes += weight;
        lane.destination.add_bytes(weight);
        self.account.add(weight);
        let record = self.lanes.key(id).and_then(|key| key.queue.front()?.record.clone());
        if let Some(reason) = record.and_then(|record| self.refusal(id, &record)) {
            self.give_up_front(id, reason, now);
            return self.go_on(id, now);
        }
        let waits = |key: &Key| key.failing.as_ref().map(|failing| failing.next_try_at).filter(|at| *at > now);
        match self.lanes.key_mut(id).and_then(|key| Some((waits(key)?, key))) {
            // It was read for a drain that does not mean it.
            Some((at, key)) => {
                key.activity = Activity::Waiting;
                self.alarms.push(Reverse((at, Alarm::Key(id.clone()))));
            }
            None => self.lanes.push(id, true),
        }
    }

    /// The lowest unfinished record that has been taken, with how many are pending.
    pub fn oldest(&self) -> Option<(Offset, u64)> {
        let lowest = self.lowest_unfinished();
        (lowest < self.frontier()).then_some((lowest, self.pending))
    }

    /// Final outcomes so far.
    pub fn ended(&self) -> u64 {
        (0..self.lanes.len()).map(|index| self.lanes.at(index).ledger.ended()).sum()
    }

    /// When something is due.
    pub fn next_timer(&self) -> Option<Timestamp> {
        self.alarms.peek().map(|Reverse((at, _))| *at)
    }

    /// Lets what is due go on.
    pub fn wake(&mut self, now: Timestamp) {
        while let Some(Reverse((at, _))) = self.alarms.peek()
            && *at <= now
        {
            let Some(Reverse((at, alarm))) = self.alarms.pop() else { return };
            match alarm {
                Alarm::Key(id) => {
                    let due = |key: &Key| {
                        key.activity == Activity::Waiting
                            && key.failing.as_ref().is_some_and(|failing| failing.next_try_at == at)
                    };
                    if id.lane < self.lanes.len() && self.lanes.key(&id).is_some_and(due) {
                        self.lanes.push(&id, true);
                    }
                }
                Alarm::Lane(index) => {
                    self.lanes.at_mut(index).shut = false;
                    self.lanes.rouse(index);
                    self.ask_all(index);
                }
                Alarm::Seats => self.look_again(now),
            }
        }
    }

    /// Whether more may be taken from live reading; tells when that changes.
    pub fn has_room(&mut self) -> bool {
        let Bounds { partition_bytes, .. } = self.settings.bounds;
        let used = self.account.used();
        // A partition that keeps nothing may always take a batch: another one's memory must not shut it out.
        let is_full = used >= partition_bytes || (used > 0 && self.account.process_is_short());
        let reason = is_full.then_some("memory");
        tell_waiting(self.settings.stage, self.partition, self.waiting, reason);
        self.waiting = reason;
        reason.is_none()
    }

    /// What was collected last is committed.
    pub fn committed(&mut self, now: Timestamp) {
        self.uncommitted -= std::mem::take(&mut self.collected).min(self.uncommitted);
        self.uncommitted_bytes -= std::mem::take(&mut self.collected_bytes).min(self.uncommitted_bytes);
        if std::mem::take(&mut self.drain_later) {
            self.drain_all(0, now);
        }
    }

    /// Something waits for its turn to be sent.
    pub fn has_ready(&self) -> bool {
        self.lanes.has_turns()
    }

    fn tombstone(&self, key: Bytes) -> Addressed {
        Addressed {
            topic: self.settings.progress.clone(),
            partition: self.partition,
            key: Some(key),
            value: None,
            headers: Headers::new(),
        }
    }
}

impl Drop for PartitionState {
    fn drop(&mut self) {
        self.destinations.own(self.partition, false);
        for index in 0..self.lanes.len() {
            let lane: &LaneState = self.lanes.at(index);
            lane.destination.sub_bytes(lane.bytes);
        }
        tell_waiting(self.settings.stage, self.partition, self.waiting, None);
        let partition = self.partition.to_string();
        let metrics = metrics();
        for gauge in [
            &metrics.lane_held,
            &metrics.lane_pending,
            &metrics.lane_bytes,
            &metrics.lane_detached,
            &metrics.parked,
            &metrics.cursors,
        ] {
            // Absent where nothing was ever collected.
            let _ = gauge.remove_label_values(&[&partition]);
        }
    }
}

fn lane_of(record: &Record) -> Lane {
    let destination = record.headers.text(header::DESTINATION).unwrap_or_default();
    Lane { destination: destination.into(), replay: record.headers.text(header::REPLAY_ID).map(str::to_owned) }
}
