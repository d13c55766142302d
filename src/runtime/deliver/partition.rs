//! A partition's whole state, without any I/O: records, verdicts and the time go in; deliveries to start, things to read and
//! progress to write come out.
//!
//! | file | what |
//! |---|---|
//! | `partition` | taking records in, starting deliveries |
//! | `cover` | changes of keys: what covers their records, holding, parking |
//! | `restored` | lanes and keys as the last owner left them |
//! | `fetch` | heads that are not in memory are read before they are sent |
//! | `settle` | what came of an attempt: finished, held, aborted, drained |
//! | `detach` | lanes that live reading does not feed: detaching, forgetting, attaching, shedding |
//! | `cursors` | where each cursor is, and which lanes and keys it serves |
//! | `scan` | giving cursors to lanes and keys, and what cursors bring |
//! | `collect` | what a commit writes |
//! | `lane` | the lanes, and whose turn it is |
//! | `check` | the invariants of all of these, for tests and the simulation |

#[cfg(any(test, debug_assertions))]
mod check;
mod collect;
mod cover;
mod cursors;
mod detach;
mod fetch;
mod lane;
mod restored;
mod scan;
mod settle;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::clock::Timestamp;
use crate::model::id::DestinationId;
use crate::model::job_status::Tally;
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

use cursors::Cursors;
use lane::Lanes;

pub use cursors::CursorId;
#[cfg(test)]
pub(super) use tests::test_settings;

/// A key in memory without its records and its name: its state, its entry in the lane.
const KEY_BYTES: usize = 500;
/// A held key in memory without its records and its name: as [`KEY_BYTES`], and its entries in the lists of lowest offsets,
/// timers and progress records to write.
const HELD_KEY_BYTES: usize = 700;

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
    /// Permits of requests whose record is read before: as many heads are in memory as requests may start.
    reading: BTreeMap<Offset, Permit>,
    /// Requests whose record has been read: they start next.
    granted: VecDeque<(KeyId, Permit)>,
    drains: Vec<Drain>,
    /// Job runs whose waiting deliveries are to be tried now, until when: heads that are not in memory are read before.
    retried_runs: Vec<(String, Timestamp)>,
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
    /// The wall clock reads so many microseconds more than the steady one, on which everything here runs. What is stored or shown
    /// has the wall clock's times.
    wall_offset: i64,
    /// Live reading brought what lies below its position.
    has_gone_back: bool,
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
    /// By how many microseconds the wall clock is ahead of the steady one.
    pub wall_offset: i64,
}

impl PartitionState {
    pub fn new(given: Given, restored: Restored, now: Timestamp) -> Self {
        let Given { partition, epoch, settings, memory, destinations, rules, seed, wall_offset } = given;
        destinations.own(partition, true);
        let runs = if is_planted(Mistake::ForgetRunsAtRestore) { Vec::new() } else { restored.runs };
        let mut state = Self {
            partition,
            epoch,
            account: memory.account(&settings.bounds),
            window: Window::new(restored.base, runs),
            repeats: restored.repeats,
            floor: restored.floor,
            taken_until: restored.live,
            lanes: Lanes::new(settings.bounds.turn_bytes),
            cursors: Cursors::default(),
            lows: BTreeMap::new(),
            alarms: BinaryHeap::new(),
            wanted: BTreeMap::new(),
            fetching: 0,
            fetched_at: Offset::START,
            reading: BTreeMap::new(),
            granted: VecDeque::new(),
            drains: restored.drains,
            retried_runs: Vec::new(),
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
            wall_offset,
            has_gone_back: false,
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
        (0..state.lanes.len()).for_each(|index| state.count_deleted(index));
        state
    }

    /// The wall clock reads so many microseconds more than the steady one now.
    pub fn set_wall_offset(&mut self, micros: i64) {
        self.wall_offset = micros;
    }

    /// A steady time as the wall clock has it.
    fn wall(&self, steady: Timestamp) -> Timestamp {
        steady.moved(self.wall_offset)
    }

    /// A time of the wall clock as the steady one has it.
    fn steady(&self, wall: Timestamp) -> Timestamp {
        wall.moved(-self.wall_offset)
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
            let account = self.account.lane(Arc::clone(&destination.memory));
            self.lanes.open(lane.clone(), destination, account)
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
            (0..self.lanes.len()).for_each(|index| {
                self.ask_all(index);
                self.count_deleted(index);
            });
        }
        self.shed(now);
    }

    fn admit(&mut self, record: Record, now: Timestamp) {
        let offset = record.offset;
        if offset < self.window.live() {
            // Taken already: the seek is still on its way, or the log has lost records and gives others their places.
            self.has_gone_back = true;
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

    /// Whether live reading has brought what lies below its position since this was asked last.
    pub fn take_gone_back(&mut self) -> bool {
        std::mem::take(&mut self.has_gone_back)
    }

    fn key_of(&self, lane: usize, record: &Record) -> KeyId {
        let user = record.headers.text(header::USER).filter(|_| self.lanes.at(lane).destination.is_ordered());
        let user: Arc<str> = match user {
            Some(user) => user.into(),
            // Nobody to keep in order: the record is a key of its own.
            None => format!("#{}", record.offset).into(),
        };
        KeyId { lane, user }
    }

    /// Gives a record to its key. `place`: in the window that covers it; none where the key's mark does, since its own cursor
    /// brings it.
    fn hand(&mut self, id: &KeyId, record: Record, place: Option<Place>, now: Timestamp) {
        let offset = record.offset;
        let parked = self.lanes.key(id).and_then(|key| key.rest().parked());
        if let Some(place) = place.filter(|_| parked.is_some_and(|parked| parked <= offset)) {
            // Its own cursor brings it; the key's mark covers it.
            self.cursors.ask_key(id);
            return self.release(id.lane, place);
        }
        // A key ends in order, so that its mark can say what is pending. What is refused behind others ends in its turn.
        if self.lanes.key(id).is_none_or(Key::is_empty)
            && let Some(refusal) = self.refusal(id, &record)
        {
            if let Some(place) = place {
                self.release(id.lane, place);
            }
            return self.refuse(id.lane, &record, refusal, now);
        }
        self.queue(id, record, place);
    }

    /// Appends a record to the queue of its key, or parks the key from there on.
    fn queue(&mut self, id: &KeyId, record: Record, place: Option<Place>) {
        let (offset, weight, bounds) = (record.offset, record.weight(), self.settings.bounds);
        let key = self.open_key(id);
        if key.is_full(weight, &bounds) {
            self.park(id, offset);
            if let Some(place) = place {
                self.release(id.lane, place);
            }
            return;
        }
        let (is_held, is_idle) = (key.is_held(), key.activity() == Activity::Idle);
        let lane = self.lanes.at_mut(id.lane);
        lane.unfinished += usize::from(!is_held);
        let charge = lane.account.charge(weight);
        let item = Item::new(Arc::new(record), place.filter(|_| !is_held), charge);
        self.change_key(id, |key| key.push(item));
        if let Some(place) = place.filter(|_| is_held) {
            self.release(id.lane, place);
        }
        if is_idle {
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
        while let Some((id, permit)) = self.granted.pop_front() {
            let is_ready = self.lanes.key(&id).is_some_and(|key| key.activity() == Activity::Ready);
            match if is_ready { self.take_batch(&id, now) } else { None } {
                Some(records) => return Some(Start::Attempt { key: id, records, permit }),
                None => permit.give_back(),
            }
        }
        loop {
            let (account, alarms) = (&self.account, &mut self.alarms);
            let next = self.lanes.next(now, account, |lane, at| alarms.push(Reverse((at, Alarm::Lane(lane)))));
            let (id, permit) = match next? {
                Ok(next) => next,
                Err(lane::NoPermit) => return Some(Start::Starved),
            };
            match self.take_batch(&id, now) {
                Some(records) => return Some(Start::Attempt { key: id, records, permit }),
                // Its record has to be read before, and the permit is kept for it.
                None => match self.lanes.key(&id).and_then(Key::front).map(|front| front.offset) {
                    Some(offset) => drop(self.reading.insert(offset, permit)),
                    None => permit.give_back(),
                },
            }
            if let Some(start) = self.next_reading(now) {
                return Some(start);
            }
        }
    }

    /// So much has ended since the last commit that nothing more is to be read or sent before the next one.
    pub fn owes_much(&self) -> bool {
        let Bounds { uncommitted, uncommitted_bytes, .. } = self.settings.bounds;
        self.uncommitted >= uncommitted || self.uncommitted_bytes >= uncommitted_bytes
    }

    /// The records of the key's next request; none where the first one has to be read before.
    fn take_batch(&mut self, id: &KeyId, now: Timestamp) -> Option<Vec<Arc<Record>>> {
        let batch = self.lanes.at(id.lane).destination.rules().batch;
        let key = self.lanes.key(id)?;
        let most = if key.careful || key.failing().is_some() { 1 } else { batch.max(1) };
        let mut records: Vec<Arc<Record>> =
            key.items().take(most).map_while(|item| item.record().map(Arc::clone)).collect();
        if records.is_empty() {
            // Reading it takes a while; the others do not wait for that.
            self.fetch_front(id);
            return None;
        }
        // A refused one behind the front ends in its turn.
        if records.len() > 1
            && self.refuses_any()
            && let Some(first) = records.iter().skip(1).position(|record| self.refusal(id, record).is_some())
        {
            records.truncate(first + 1);
        }
        self.in_flight += 1;
        let bytes = records.iter().map(|record| record.weight()).sum();
        let sending = self.lanes.at(id.lane).account.charge_in_flight(bytes);
        self.change_key(id, |key| key.start(records.len(), sending, now));
        Some(records)
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
                        key.activity() == Activity::Waiting
                            && key.failing().is_some_and(|failing| failing.next_try_at == at)
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

    /// Other partitions of the process need memory.
    pub fn has_others_short(&self) -> bool {
        self.account.has_others_short()
    }

    /// Whether more may be taken from live reading; tells when that changes.
    pub fn has_room(&mut self) -> bool {
        let reason = (!self.account.has_room()).then_some("memory");
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
