//! Lanes that live reading does not feed.
//!
//! Detaching a lane moves the cover of its records from the partition's window to one of its own: nothing is forgotten by it.
//! *Forgetting* lets go of what is in memory and not under way; its place in the window stays open, and a cursor brings it
//! back. Attaching needs no cover to be moved back: the keys that still have something unfinished become held, so their marks
//! cover it.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::model::progress::ProgressKey;
use crate::model::record::Offset;
use crate::telemetry::events;

use super::super::key::{Activity, Key};
use super::super::window::{Located, Window};
use super::lane::Detached;
use super::{Bounds, KeyId, PartitionState};
use crate::runtime::planted::{Mistake, is_planted};

impl Detached {
    pub fn new(window: Window, scan: Offset, now: Timestamp) -> Self {
        Self {
            window,
            scan,
            cursor: None,
            asked_at: None,
            joined_at: now,
            blocked_millis: 0,
            full_since: None,
            moved_from: None,
        }
    }
}

impl PartitionState {
    /// What a lane may keep in memory.
    fn lane_limit(&self, index: usize) -> usize {
        let lane = self.lanes.at(index);
        if lane.destination.can_run() {
            return self.account.lane_limit(&lane.account);
        }
        let Bounds { lane_bytes, down_lane_bytes, .. } = self.settings.bounds;
        lane_bytes.min(down_lane_bytes).min(self.account.lane_limit(&lane.account))
    }

    /// A detached lane has to end something before it takes more.
    pub(super) fn is_lane_full(&self, index: usize) -> bool {
        let lane = self.lanes.at(index);
        // While its destination has used up its memory for held keys, none of its other keys may start.
        let may_start = !lane.destination.can_run() || lane.may_start(&self.account);
        lane.detached.is_some() && (!may_start || self.is_full_of_records(index))
    }

    /// As [`Self::is_lane_full`], for the records of its held keys: these may start.
    pub(super) fn is_full_of_records(&self, index: usize) -> bool {
        let lane = self.lanes.at(index);
        let Some(detached) = &lane.detached else { return false };
        let Bounds { holes, window_records, .. } = self.settings.bounds;
        if !lane.destination.can_run() {
            return lane.keys.len() >= self.settings.bounds.probes;
        }
        if self.is_short() && (lane.account.bytes() > 0 || self.in_flight > 0 || self.has_ready()) {
            // What came now would be shed again: other deliveries have to end first.
            return true;
        }
        let limit = match detached.full_since {
            // Once full it has to become half empty, or the cursor would stop and go with every record.
            Some(_) => self.lane_limit(index) / 2,
            None => self.lane_limit(index),
        };
        // What was let go of comes back whatever holes there are: it closes them.
        let is_at_end = self.lane_scan(index) >= detached.window.live();
        let is_wide = detached.window.holes() >= holes || detached.window.len() >= window_records;
        lane.account.bytes() >= limit.max(1) || (is_wide && is_at_end)
    }

    /// Detaches an attached lane that has come over its bound.
    pub(super) fn bound_lane(&mut self, index: usize, now: Timestamp) {
        let lane = self.lanes.at(index);
        if lane.detached.is_none() && lane.unfinished > 1 && lane.account.bytes() > self.lane_limit(index) {
            let why = if lane.destination.can_run() { "bytes" } else { "down" };
            self.detach(index, why, now);
        }
        if self.window.holes() >= self.settings.bounds.holes {
            let attached = (0..self.lanes.len()).filter(|index| self.lanes.at(*index).detached.is_none());
            if let Some(worst) = attached.max_by_key(|index| self.lanes.at(*index).unfinished) {
                self.detach(worst, "holes", now);
            }
        } else if self.window.len() >= self.settings.bounds.window_records
            && let Some(oldest) = self.window.base_lane()
        {
            self.detach(oldest, "window", now);
        }
    }

    /// From now on a cursor feeds the lane.
    pub(super) fn detach(&mut self, index: usize, why: &'static str, now: Timestamp) {
        if self.lanes.at(index).detached.is_some() {
            return;
        }
        let mut window = self.window.split(index as u32);
        if is_planted(Mistake::ForgetFinishedAtDetach) {
            let mut blank = Window::new(window.base(), Vec::new());
            self.lanes.at(index).keys.values().flat_map(Key::items).for_each(|item| {
                if item.place.is_some() && blank.locate(item.offset) == Located::Ahead {
                    blank.push(item.offset, 0);
                }
            });
            window = blank;
        }
        let scan = if is_planted(Mistake::ForgetFinishedAtDetach) { window.base() } else { window.live() };
        let lane = self.lanes.at_mut(index);
        let moved = |offset| match window.locate(offset) {
            Located::Open(place) => Some(place),
            Located::Finished | Located::Ahead => None,
        };
        lane.keys.values_mut().for_each(|key| key.move_places(moved));
        let oldest = lane.keys.values().filter_map(|key| key.front()?.record());
        lane.oldest = oldest.map(|record| record.timestamp).min().unwrap_or(lane.oldest).max(lane.oldest);
        lane.detached = Some(Detached::new(window, scan, now));
        self.lanes.detached.insert(index);
        self.dirty_lanes.insert(index);
        self.changed = true;
        events::lane_detached(self.partition, self.lanes.at(index).lane.destination.as_str(), why);
        if !self.lanes.at(index).destination.can_run() {
            self.forget(index);
        }
        self.cursors.ask_lane(index);
    }

    /// Removes the records of a detached lane that are not in flight from memory. Its cursor brings them back.
    pub(super) fn forget(&mut self, index: usize) {
        self.leave_lane(index);
        let users: Vec<Arc<str>> = self.lanes.at(index).keys.keys().cloned().collect();
        let mut lowest: Option<Offset> = None;
        for user in users {
            let id = KeyId { lane: index, user };
            if self.lanes.key(&id).is_some_and(Key::is_held) {
                self.shed_key(&id);
                self.cursors.ask_key_later(&id);
                continue;
            }
            let removed = self.change_key(&id, |key| key.forget().collect::<Vec<_>>()).unwrap_or_default();
            self.lanes.at_mut(index).unfinished -= removed.len();
            lowest = removed.first().copied().into_iter().chain(lowest).min();
            if self.lanes.key(&id).is_some_and(Key::is_empty) {
                self.remove_key(&id);
            }
        }
        if let Some(detached) = &mut self.lanes.at_mut(index).detached
            && let Some(lowest) = lowest.filter(|_| !is_planted(Mistake::ForgetForgotten))
        {
            detached.scan = detached.scan.min(lowest);
        }
        self.lanes.clear_ready(index);
        self.push_ready_again(index);
        self.cursors.ask_lane_later(index);
    }

    fn push_ready_again(&mut self, index: usize) {
        let ready = |key: &&Key| key.activity() == Activity::Ready;
        let lane = self.lanes.at(index);
        let users: Vec<Arc<str>> =
            lane.keys.iter().filter(|(_, key)| ready(key)).map(|(user, _)| Arc::clone(user)).collect();
        for user in users {
            self.lanes.push(&KeyId { lane: index, user }, false);
        }
    }

    /// Everything below live reading has been handed to the lane: live reading feeds it again. False where too much of it is
    /// unfinished for that.
    pub(super) fn attach(&mut self, index: usize) -> bool {
        let lane = self.lanes.at(index);
        // One that is down would only be detached again, unless nothing of it is left.
        let may_stay = lane.destination.can_run() || lane.keys.is_empty();
        if lane.detached.is_none() || lane.unfinished >= self.settings.bounds.attach || !may_stay {
            return false;
        }
        self.leave_lane(index);
        let unfinished: Vec<Arc<str>> = {
            let lane = self.lanes.at(index);
            lane.keys.iter().filter(|(_, key)| !key.is_held()).map(|(user, _)| Arc::clone(user)).collect()
        };
        for user in unfinished {
            let id = KeyId { lane: index, user };
            self.hold(&id);
            if is_planted(Mistake::LoseTailAtAttach) {
                self.dirty.remove(&id);
            }
        }
        let lane = self.lanes.at_mut(index);
        lane.detached = None;
        let was_recorded = std::mem::take(&mut lane.recorded);
        self.lanes.detached.remove(&index);
        self.dirty_lanes.remove(&index);
        self.changed = true;
        let lane = self.lanes.at(index).lane.clone();
        if was_recorded {
            let name = ProgressKey::Lane(&lane).encode(self.partition);
            self.outputs.push(self.tombstone(name.into()));
        }
        events::lane_attached(self.partition, lane.destination.as_str());
        self.count_deleted(index);
        true
    }

    /// Makes room while less than a tenth is free: first the followers of held keys, then lanes that cannot run, then the lanes
    /// with the most above the part that is never shed.
    pub fn shed(&mut self, now: Timestamp) {
        if !self.is_short() || self.account.records() == 0 {
            return;
        }
        let mut lanes: Vec<usize> = (0..self.lanes.len()).filter(|at| self.lane_bytes(*at) > 0).collect();
        lanes.sort_by_key(|at| Reverse(self.lane_bytes(*at)));
        for index in &lanes {
            if self.is_short() {
                self.shed_followers(*index);
            }
        }
        for index in &lanes {
            // The few records for probes are not worth reading again.
            let is_down = !self.lanes.at(*index).destination.can_run();
            if self.is_short() && is_down && self.lane_bytes(*index) > self.account.lane_floor() {
                self.detach(*index, "down", now);
                self.forget(*index);
            }
        }
        for index in lanes {
            // What little a lane has is not worth reading again. What is in flight cannot be removed, and a single record is
            // sent at once: a lane that keeps up is not made to wait for a cursor.
            let lane = self.lanes.at(index);
            let removable = lane.account.bytes() - lane.account.in_flight().min(lane.account.bytes());
            if self.is_short() && lane.unfinished > 1 && removable > self.account.lane_floor() {
                self.detach(index, "bytes", now);
                self.forget(index);
            }
        }
    }

    fn lane_bytes(&self, index: usize) -> usize {
        self.lanes.at(index).account.bytes()
    }

    /// Less than a tenth is free, of the partition's bound or the process's.
    pub(super) fn is_short(&self) -> bool {
        self.account.is_short()
    }

    fn shed_followers(&mut self, index: usize) {
        let held = self.lanes.at(index).keys.iter().filter(|(_, key)| key.is_held() && key.bytes() > 0);
        let ids: Vec<KeyId> = held.map(|(user, _)| KeyId { lane: index, user: Arc::clone(user) }).collect();
        ids.iter().for_each(|id| self.shed_key(id));
    }

    /// Removes the followers of a held key from memory. One that a cursor serves leaves it first, where offsets are to be
    /// parked that the cursor has passed.
    fn shed_key(&mut self, id: &KeyId) {
        let bounds = self.settings.bounds;
        if self.lanes.key(id).is_some_and(|key| key.sheds_offsets(&bounds)) {
            self.leave_key(id);
        }
        self.change_key(id, |key| key.shed(&bounds));
    }

    /// After something of a lane has ended, or its destination came back: it may take more, or be attached.
    pub(super) fn reconsider(&mut self, index: usize, now: Timestamp) {
        let mut is_full = self.is_lane_full(index);
        if self.is_full_of_records(index) && self.lanes.at(index).unfinished == 0 {
            // Users who fail must not keep the others out.
            self.shed_followers(index);
            is_full = self.is_lane_full(index);
        }
        let Some(detached) = &mut self.lanes.at_mut(index).detached else { return };
        match (is_full, detached.full_since) {
            (true, None) => detached.full_since = Some(now),
            (false, Some(since)) => {
                detached.full_since = None;
                detached.blocked_millis += now.since(since).as_millis() as u64;
            }
            _ => {}
        }
        if !is_full && detached.cursor.is_none() {
            self.cursors.ask_lane(index);
        }
        self.note_full(index, is_full);
    }

    /// How long a lane has made its cursor wait, of how long it has been there.
    pub(super) fn blocked(detached: &Detached, now: Timestamp) -> (Duration, Duration) {
        let open = detached.full_since.map_or(0, |since| now.since(since.max(detached.joined_at)).as_millis() as u64);
        (Duration::from_millis(detached.blocked_millis + open), now.since(detached.joined_at))
    }
}
