//! Cursors: they read the partition again for detached lanes and parked keys.
//!
//! A cursor moves forward only and is shared by all lanes and keys that it passes. A lane that cannot run, and a key that is
//! full, leaves at once. A lane that is full makes its cursor wait; one that makes it wait for more than half of the time moves
//! to a slower cursor. So what is read is at most the backlog times the number of cursors, whatever catches up.
//!
//! The position of a member is the higher one of its own stored position and its cursor's; it is stored when the member leaves
//! the cursor.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::model::record::{Offset, Record};

use super::super::key::{Key, Rest};
use super::super::window::Located;
use super::cursors::{Cursor, CursorId, Seeker, Step};
use super::{Activity, Alarm, KeyId, PartitionState, Reverse, Start, lane_of};
use crate::runtime::planted::{Mistake, is_planted};

/// A lane is judged as slow after so long.
const SLOW: Duration = Duration::from_secs(2);
/// What a new cursor passes may be so many times what those who want it have there …
const WORTH: u64 = 3;
/// … or they have waited for so long for each record that it passes …
const WAIT_EACH: Duration = Duration::from_micros(300);
/// … but no longer than this.
const WAIT_MOST: Duration = Duration::from_secs(30);
/// Cursors that wait, and members without a cursor, are looked at this often.
const LOOK: Duration = Duration::from_millis(200);

impl PartitionState {
    /// What is to be read, or closed, next.
    pub(super) fn next_scan(&mut self, now: Timestamp) -> Option<Start> {
        let (step, until) = loop {
            if let Some(cursor) = self.cursors.closed.pop() {
                return Some(Start::Close { cursor });
            }
            if !self.cursors.asking.is_empty() {
                self.seat(now);
            }
            let until = self.frontier();
            match self.cursors.next(until) {
                Some(Step::HandOver(cursor, records)) => self.scanned(cursor, records, None, now),
                Some(Step::Read(cursor, from)) => break (Some((cursor, from)), until),
                None => break (None, until),
            }
        };
        let is_waiting = !self.cursors.stuck.is_empty() || self.cursors.open.values().any(|open| !open.full.is_empty());
        if is_waiting && !self.cursors.alarm_set {
            self.cursors.alarm_set = true;
            self.alarms.push(Reverse((now.plus(LOOK), Alarm::Seats)));
        }
        step.map(|(cursor, from)| Start::Scan { cursor, from, until })
    }

    /// Moves lanes that hold their cursors up, and lets those who found none ask again.
    pub(super) fn look_again(&mut self, now: Timestamp) {
        self.cursors.alarm_set = false;
        self.cursors.asking.append(&mut self.cursors.stuck);
        let waiting: Vec<usize> = self.cursors.open.values().flat_map(|open| open.full.iter().copied()).collect();
        for index in &waiting {
            self.reconsider(*index, now);
            let Some(detached) = &self.lanes.at(*index).detached else { continue };
            let (blocked, total) = Self::blocked(detached, now);
            let (Some(from), true) = (detached.cursor, total > SLOW && blocked * 2 > total) else { continue };
            let at = self.lane_scan(*index);
            let company = self.cursors.open.get(&from).map_or(0, |open| open.lanes.len() + open.keys.len());
            let slower = self.cursors.open.iter().any(|(id, open)| *id != from && open.position <= at);
            // One place is kept for newcomers.
            if company > 1 && (slower || self.cursors.open.len() + 1 < self.settings.bounds.cursors) {
                self.leave_lane(*index);
                if let Some(detached) = &mut self.lanes.at_mut(*index).detached {
                    detached.moved_from = Some(from);
                }
                self.cursors.ask_lane(*index);
            }
        }
    }

    /// Where a detached lane's reading stands.
    pub(super) fn lane_scan(&self, index: usize) -> Offset {
        let lane = self.lanes.at(index);
        let Some(detached) = &lane.detached else { return self.frontier() };
        detached.scan.max(self.cursors.position(detached.cursor))
    }

    /// Up to where a parked key may look for its records itself, and whether beyond that they come with its lane. Where they
    /// do not, some further on are covered by its mark and some may not be: it waits until its lane has come by.
    pub(super) fn key_frontier(&self, lane: usize) -> (Offset, bool) {
        match &self.lanes.at(lane).detached {
            None => (self.window.live(), self.window.live() >= self.taken_until),
            Some(detached) if is_planted(Mistake::DissolveTooEarly) => (detached.scan, true),
            Some(detached) => {
                let known = self.lane_scan(lane).max(detached.window.live());
                (known, detached.window.known_until() <= known)
            }
        }
    }

    /// A drain has not come to all that it covers.
    fn is_draining(&self, lane: usize, from: Offset) -> bool {
        let destination = self.lanes.at(lane).lane.destination.as_str();
        self.drains.iter().any(|drain| from < drain.bound && drain.target.concerns(destination))
    }

    /// The cursor of a full lane goes on for a drain: refused records end, the keys of others are parked, as far as there is
    /// memory for held keys.
    fn may_pass_full(&self, lane: usize, from: Offset) -> bool {
        !self.drains.is_empty() && self.is_draining(lane, from) && self.account.may_hold(&self.lanes.at(lane).account)
    }

    fn wants_lane(&self, index: usize) -> bool {
        let lane = self.lanes.at(index);
        if lane.detached.is_none() {
            return false;
        }
        let draining = self.may_pass_full(index, self.lane_scan(index));
        let may_start = !lane.destination.is_paused() && lane.may_start_many(&self.account);
        draining || (may_start && !self.is_lane_full(index))
    }

    fn wants_key(&self, id: &KeyId) -> bool {
        let Some(key) = self.lanes.key(id) else { return false };
        let Rest::Parked(parked) = key.rest() else { return false };
        if !key.is_low(&self.settings.bounds) {
            return false;
        }
        let can_run = key.failing().is_none() && self.lanes.at(id.lane).destination.can_run();
        // While it cannot run, only what is refused at its front ends: a queue keeps that from being reached.
        if !can_run && !key.is_empty() {
            return false;
        }
        if self.is_short() && (!key.is_empty() || self.in_flight > 0 || self.has_ready()) {
            return false;
        }
        can_run || (!self.drains.is_empty() && self.is_draining(id.lane, parked))
    }

    /// Gives those who ask a cursor, the lowest first, so that those above can share it.
    fn seat(&mut self, now: Timestamp) {
        let asking = std::mem::take(&mut self.cursors.asking);
        let mut seekers: Vec<(Offset, Seeker)> = Vec::new();
        for seeker in asking {
            match &seeker {
                Seeker::Lane(index) => {
                    let is_seated = self.lanes.at(*index).detached.as_ref().is_none_or(|d| d.cursor.is_some());
                    if !is_seated && self.wants_lane(*index) {
                        seekers.push((self.lane_scan(*index), seeker));
                        continue;
                    }
                    // While memory is short it goes on waiting: one with little pending would never have waited long enough.
                    if (is_seated || !self.is_short())
                        && let Some(detached) = &mut self.lanes.at_mut(*index).detached
                    {
                        detached.asked_at = None;
                    }
                    let lane = self.lanes.at(*index);
                    let may_start = lane.destination.can_run() && lane.may_start_many(&self.account);
                    if !is_seated && (self.is_short() || !may_start) {
                        // Nothing in this partition tells when that changes.
                        self.cursors.stuck.insert(seeker);
                    }
                }
                Seeker::Key(id) if self.wants_key(id) => {
                    let at = self.lanes.key(id).and_then(|key| key.rest().parked()).unwrap_or_default();
                    seekers.push((at, seeker));
                }
                Seeker::Key(id) => {
                    let parked = self.lanes.key(id).is_some_and(|key| matches!(key.rest(), Rest::Parked(_)));
                    if parked && (self.is_short() || !self.lanes.at(id.lane).destination.can_run()) {
                        self.cursors.stuck.insert(seeker);
                    }
                }
            }
        }
        seekers.sort();
        // Records that new cursors may pass for these.
        let mut budget: u64 = seekers.iter().map(|(_, seeker)| self.pending_of(seeker)).sum::<u64>() * WORTH;
        for (at, seeker) in seekers {
            if self.arrive(&seeker, at, now) {
                continue;
            }
            let ahead = self.frontier().distance_from(at);
            let may_open = budget >= ahead || self.is_owed(&seeker, ahead, now);
            let opened = self.cursors.last_id;
            match self.find_seat(&seeker, at, may_open) {
                Some(cursor) => self.join(seeker, cursor, now),
                None => drop(self.cursors.stuck.insert(seeker)),
            }
            if self.cursors.last_id > opened {
                budget = budget.saturating_sub(ahead);
            }
        }
    }

    /// What a new cursor would bring whom it is opened for.
    fn pending_of(&self, seeker: &Seeker) -> u64 {
        match seeker {
            Seeker::Lane(index) => self.lanes.at(*index).ledger.pending(),
            Seeker::Key(_) => 0,
        }
    }

    /// Whether a seeker gets a cursor though it is not worth what that passes: it has waited for long, or it will not go all
    /// the way. A key stops where it is full, and a lane that is down after a few records.
    fn is_owed(&mut self, seeker: &Seeker, ahead: u64, now: Timestamp) -> bool {
        let Seeker::Lane(index) = seeker else { return true };
        let lane = self.lanes.at_mut(*index);
        let is_up = lane.destination.can_run();
        let Some(detached) = lane.detached.as_mut() else { return true };
        let since = *detached.asked_at.get_or_insert(now);
        let wait = WAIT_EACH.saturating_mul(u32::try_from(ahead).unwrap_or(u32::MAX)).min(WAIT_MOST);
        !is_up || now.since(since) >= wait
    }

    /// A cursor that will come by, or a new one where that may be.
    fn find_seat(&mut self, seeker: &Seeker, at: Offset, may_open: bool) -> Option<CursorId> {
        let (bounds, frontier) = (self.settings.bounds, self.frontier());
        let avoid = match seeker {
            Seeker::Lane(index) => self.lanes.at(*index).detached.as_ref().and_then(|detached| detached.moved_from),
            Seeker::Key(_) => None,
        };
        let behind = self.cursors.open.iter().filter(|(id, open)| Some(**id) != avoid && open.position <= at);
        let nearest = behind.max_by_key(|(_, open)| open.position).map(|(id, open)| (*id, open.position));
        // One that has to come half of the way that another would go is near too.
        let ahead = frontier.distance_from(at);
        if let Some((id, position)) = nearest
            && at.distance_from(position) <= bounds.near.max(ahead / 2)
        {
            return Some(id);
        }
        let most = bounds.cursors - usize::from(avoid.is_some());
        if may_open && self.cursors.open.len() < most && self.account.open_cursor(self.cursors.open.is_empty()) {
            self.cursors.last_id += 1;
            let (lanes, keys, full) = Default::default();
            let cursor = Cursor { position: at, lanes, keys, full, ahead: Vec::new() };
            self.cursors.open.insert(self.cursors.last_id, cursor);
            return Some(self.cursors.last_id);
        }
        nearest.map(|(id, _)| id)
    }

    fn join(&mut self, seeker: Seeker, cursor: CursorId, now: Timestamp) {
        let Some(open) = self.cursors.open.get_mut(&cursor) else { return };
        match seeker {
            Seeker::Lane(index) => {
                open.lanes.insert(index);
                if let Some(detached) = &mut self.lanes.at_mut(index).detached {
                    (detached.cursor, detached.asked_at) = (Some(cursor), None);
                    (detached.joined_at, detached.blocked_millis, detached.full_since) = (now, 0, None);
                }
            }
            Seeker::Key(id) => {
                open.keys.insert(id.clone());
                self.change_key(&id, |key| key.join_cursor(cursor));
            }
        }
    }

    /// True where nothing is left to be read for this member: a lane is attached if it can be, a key dissolves into its lane.
    fn arrive(&mut self, seeker: &Seeker, at: Offset, now: Timestamp) -> bool {
        match seeker {
            Seeker::Lane(index) => {
                let early = is_planted(Mistake::AttachTooEarly) && self.window.live() >= self.taken_until;
                let is_there = at >= self.frontier() || early;
                if is_there && self.window.live() >= self.taken_until && !self.attach(*index) {
                    // It stays where it is until less of it is unfinished, or it can run again.
                    self.leave_lane(*index);
                    self.cursors.ask_lane_later(*index);
                }
                is_there
            }
            Seeker::Key(id) => {
                let (frontier, dissolves) = self.key_frontier(id.lane);
                let is_there = at >= frontier;
                if is_there {
                    self.leave_key(id);
                }
                if is_there && dissolves {
                    self.change_key(id, Key::unpark);
                    self.go_on(id, now);
                }
                is_there
            }
        }
    }

    pub(super) fn leave_lane(&mut self, index: usize) {
        let scan = self.lane_scan(index);
        let Some(detached) = &mut self.lanes.at_mut(index).detached else { return };
        if let Some(cursor) = detached.cursor.take() {
            detached.scan = scan;
            detached.window.read_until(scan);
            (detached.full_since, detached.blocked_millis, detached.moved_from) = (None, 0, None);
            self.dirty_lanes.insert(index);
            self.cursors.leave_lane(cursor, index);
            self.account.close_cursors(self.cursors.count());
        }
    }

    pub(super) fn leave_key(&mut self, id: &KeyId) {
        self.leave_cursor_of_key(id, None);
    }

    /// `refused`: the record that the cursor has just handed over and that does not go into the queue.
    pub(super) fn leave_cursor_of_key(&mut self, id: &KeyId, refused: Option<Offset>) {
        let Some(cursor) = self.lanes.key(id).and_then(|key| key.rest().cursor()) else { return };
        let position = self.cursors.position(Some(cursor)).min(self.key_frontier(id.lane).0);
        self.change_key(id, |key| key.leave_cursor(position, refused));
        self.cursors.leave_key(cursor, id);
        self.account.close_cursors(self.cursors.count());
    }

    /// What a cursor has read. `passed`: the log has nothing more below the place up to which was to be read.
    pub fn scanned(&mut self, cursor: CursorId, records: Vec<Record>, passed: Option<Offset>, now: Timestamp) {
        self.cursors.reading = None;
        let frontier = match is_planted(Mistake::ScanPastLive) {
            true => Offset::new(u128::MAX),
            false => self.frontier(),
        };
        let mut touched = BTreeSet::new();
        let mut records = records.into_iter();
        while let Some(record) = records.next() {
            let position = self.cursors.position(Some(cursor));
            if record.offset < position {
                continue;
            }
            if record.offset >= frontier {
                break;
            }
            self.skip_deleted(cursor, record.offset);
            let behind = record.offset.just_after();
            let taker = self.pass(cursor, record, now);
            if let Some(open) = self.cursors.open.get_mut(&cursor) {
                open.position = behind;
            }
            if let Some(lane) = taker {
                touched.insert(lane);
                let is_member = self.lanes.at(lane).detached.as_ref().is_some_and(|it| it.cursor == Some(cursor));
                let is_full = if is_member { self.is_lane_full(lane) } else { self.is_full_of_records(lane) };
                if is_full && !self.may_pass_full(lane, behind) {
                    // What is left of the stretch would only have to be let go of again: it waits until there is room.
                    if let Some(open) = self.cursors.open.get_mut(&cursor) {
                        open.ahead = records.collect();
                    }
                    break;
                }
            }
        }
        if let Some(passed) = passed {
            self.skip_deleted(cursor, passed);
            if let Some(open) = self.cursors.open.get_mut(&cursor) {
                open.position = open.position.max(passed);
            }
        }
        for lane in touched {
            self.reconsider(lane, now);
        }
        self.let_go(cursor, now);
        self.cursors.close_if_empty(cursor);
        self.account.close_cursors(self.cursors.count());
        self.shed(now);
    }

    /// The log has nothing from the cursor's position up to `to`: what its lanes have pending there, and not in memory, has been
    /// deleted. The window lets go of it; [`PartitionState::count_deleted`] counts it.
    fn skip_deleted(&mut self, cursor: CursorId, to: Offset) {
        let Some(open) = self.cursors.open.get(&cursor).filter(|open| open.position < to) else { return };
        let position = open.position;
        let forgotten = |index: &&usize| {
            self.lanes.at(**index).detached.as_ref().is_some_and(|detached| detached.window.live() > position)
        };
        for index in open.lanes.iter().filter(forgotten).copied().collect::<Vec<_>>() {
            let lane = self.lanes.at_mut(index);
            let Some(detached) = &mut lane.detached else { continue };
            for (offset, place) in detached.window.open_between(position.max(detached.scan), to) {
                if !lane.keys.values().any(|key| key.holds(offset)) {
                    detached.window.finish(place);
                    self.dirty_lanes.insert(index);
                    self.changed = true;
                }
            }
        }
    }

    /// Members of a cursor that have arrived leave it.
    fn let_go(&mut self, cursor: CursorId, now: Timestamp) {
        let Some(open) = self.cursors.open.get(&cursor) else { return };
        let position = open.position;
        let keys: Vec<KeyId> = open.keys.iter().cloned().collect();
        let early = is_planted(Mistake::AttachTooEarly);
        let lanes: Vec<usize> = match position >= self.frontier() || early {
            true => open.lanes.iter().copied().collect(),
            false => Vec::new(),
        };
        for id in keys {
            let parked = self.lanes.key(&id).and_then(|key| key.rest().parked()).unwrap_or_default();
            self.arrive(&Seeker::Key(id), parked.max(position), now);
        }
        for index in lanes {
            self.arrive(&Seeker::Lane(index), self.lane_scan(index), now);
        }
    }

    /// One record, for those members whom it concerns. Tells the lane that took it.
    fn pass(&mut self, cursor: CursorId, record: Record, now: Timestamp) -> Option<usize> {
        let index = self.lanes.find(&lane_of(&record))?;
        let id = self.key_of(index, &record);
        let Some(record) = self.pass_lane(cursor, &id, record, now) else { return Some(index) };
        self.pass_key(cursor, &id, record, now).then_some(index)
    }

    /// Gives the record to its lane if that is a member; back it comes where the lane has no use for it.
    fn pass_lane(&mut self, cursor: CursorId, id: &KeyId, record: Record, now: Timestamp) -> Option<Record> {
        let offset = record.offset;
        let lane = self.lanes.at_mut(id.lane);
        let Some(detached) = lane.detached.as_mut().filter(|d| d.cursor == Some(cursor) && d.scan <= offset) else {
            return Some(record);
        };
        let was_ahead = detached.window.known_until() > detached.window.live();
        let place = match detached.window.locate(offset) {
            Located::Finished => None,
            Located::Open(place) => Some(place),
            Located::Ahead => detached.window.push(offset, 0),
        };
        let is_clear = was_ahead && detached.window.known_until() <= detached.window.live();
        let key = lane.keys.get(&id.user);
        let is_here = key.is_some_and(|key| key.holds(offset));
        let is_held = key.is_some_and(Key::is_held);
        let is_parked = key.and_then(|key| key.rest().parked()).is_some_and(|parked| parked <= offset);
        if is_clear {
            // Keys that waited for this may go on.
            self.ask_all(id.lane);
        }
        match place {
            None => Some(record),
            // It is under way, covered as it is; or its mark came with a restore.
            Some(place) if is_here => {
                if is_held {
                    self.release(id.lane, place);
                }
                None
            }
            Some(place) if is_parked => {
                // From here on its mark covers it.
                self.release(id.lane, place);
                self.cursors.ask_key(id);
                Some(record)
            }
            Some(place) if !is_here && self.is_lane_full(id.lane) && self.refusal(id, &record).is_none() => {
                // The cursor only goes on for records that are refused; this one is read again when there is room.
                self.park(id, offset);
                self.release(id.lane, place);
                None
            }
            Some(place) => {
                self.hand(id, record, Some(place), now);
                None
            }
        }
    }

    /// Gives the record to its key if that looks for it. True: it took it, or left.
    fn pass_key(&mut self, cursor: CursorId, id: &KeyId, record: Record, now: Timestamp) -> bool {
        let offset = record.offset;
        let frontier = self.key_frontier(id.lane).0;
        let rest = self.lanes.key(id).map_or(Rest::None, Key::rest);
        if rest.cursor() != Some(cursor) || offset >= frontier || rest.parked().is_none_or(|parked| parked > offset) {
            return false;
        }
        self.change_key(id, |key| key.pass(offset));
        if is_planted(Mistake::SkipParked) {
            self.leave_key(id);
            return false;
        }
        let lane = self.lanes.at(id.lane);
        // The lane had let go of it before the key was parked: the key's mark takes it over.
        if let Some(Located::Open(place)) = lane.detached.as_ref().map(|detached| detached.window.locate(offset)) {
            self.release(id.lane, place);
        }
        self.hand(id, record, None, now);
        true
    }

    /// A lane of a cursor became full, or is not any more. A full lane that cannot start its keys leaves the cursor.
    pub(super) fn note_full(&mut self, index: usize, is_full: bool) {
        let Some(cursor) = self.lanes.at(index).detached.as_ref().and_then(|detached| detached.cursor) else { return };
        // What is drained takes no room, so the cursor goes on whatever the lane holds.
        let is_full = is_full && !self.may_pass_full(index, self.lane_scan(index));
        let lane = self.lanes.at(index);
        // One whose destination has used up its memory for held keys waits for these, and they may need the cursor.
        if is_full && (!lane.destination.can_run() || !lane.may_start(&self.account)) {
            self.leave_lane(index);
            return self.cursors.ask_lane_later(index);
        }
        if let Some(open) = self.cursors.open.get_mut(&cursor) {
            match is_full {
                true => open.full.insert(index),
                false => open.full.remove(&index),
            };
        }
    }

    /// A destination can run again: its lane, and its keys that have something parked, go on.
    pub(super) fn ask_all(&mut self, index: usize) {
        self.cursors.ask_lane(index);
        let lane = self.lanes.at(index);
        let wants = |key: &Key| key.rest() != Rest::None && key.activity() != Activity::Waiting;
        let parked = lane.keys.iter().filter(|(_, key)| wants(key));
        for (user, _) in parked {
            self.cursors.ask_key(&KeyId { lane: index, user: user.clone() });
        }
    }
}
