//! Lanes that live reading does not feed.
//!
//! Detaching a lane moves the cover of its records from the partition's window to one of its own: nothing is forgotten by it.
//! *Forgetting* lets go of what is in memory and not under way; its place in the window stays open, and a cursor brings it
//! back. Attaching needs no cover to be moved back: the keys that still have something unfinished become held, so their marks
//! cover it.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::model::progress::ProgressKey;
use crate::model::record::Offset;
use crate::telemetry::events;

use super::super::window::{Located, Window};
use super::lane::Detached;
use super::{Bounds, KeyId, PartitionState};
use crate::runtime::planted::{Mistake, is_planted};

/// A lane that cannot run keeps no more than this: its records are read again when it can.
const DOWN_BYTES: usize = 1 << 20;
/// A lane that is down keeps so many records for probes, each of another key where there are as many.
const PROBES: usize = 8;

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
    /// What a lane may keep in memory: its bound, and not more than half of what is free for its destination.
    fn lane_limit(&self, index: usize) -> usize {
        let Bounds { lane_bytes, partition_bytes, .. } = self.settings.bounds;
        let lane = self.lanes.at(index);
        if !lane.destination.can_run() {
            return lane_bytes.min(DOWN_BYTES);
        }
        let of_process = (self.account.free() + lane.destination.bytes()) / 2;
        let others = lane.destination.bytes() - lane.bytes.min(lane.destination.bytes());
        let of_partition = (partition_bytes.saturating_sub(self.account.used()) + lane.bytes) / 2;
        lane_bytes.min(of_process.saturating_sub(others)).min(of_partition)
    }

    /// A detached lane has to end something before it takes more.
    pub(super) fn is_lane_full(&self, index: usize) -> bool {
        let lane = self.lanes.at(index);
        let Some(detached) = &lane.detached else { return false };
        let Bounds { holes, window_records, .. } = self.settings.bounds;
        if !lane.destination.can_run() {
            return lane.keys.len() >= PROBES;
        }
        if self.is_short() && (lane.bytes > 0 || self.in_flight > 0 || self.has_ready()) {
            // Others have to end first; what came now would have to go again.
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
        lane.bytes >= limit.max(1) || (is_wide && is_at_end)
    }

    /// Detaches an attached lane that has come over its bound.
    pub(super) fn bound_lane(&mut self, index: usize, now: Timestamp) {
        let lane = self.lanes.at(index);
        if lane.detached.is_none() && lane.unfinished > 1 && lane.bytes > self.lane_limit(index) {
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
            self.lanes.at(index).keys.values().flat_map(|key| &key.queue).for_each(|item| {
                if item.place.is_some() && blank.locate(item.offset) == Located::Ahead {
                    blank.push(item.offset, 0);
                }
            });
            window = blank;
        }
        let scan = if is_planted(Mistake::ForgetFinishedAtDetach) { window.base() } else { window.live() };
        let lane = self.lanes.at_mut(index);
        for item in lane.keys.values_mut().flat_map(|key| &mut key.queue) {
            if item.place.is_some() {
                item.place = match window.locate(item.offset) {
                    Located::Open(place) => Some(place),
                    Located::Finished | Located::Ahead => None,
                };
            }
        }
        let oldest = lane.keys.values().filter_map(|key| key.queue.front()?.record.as_ref());
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

    /// Lets go of what a detached lane keeps and is not under way. Its cursor will bring it back.
    pub(super) fn forget(&mut self, index: usize) {
        self.leave_lane(index);
        let before = self.lanes.at(index).bytes;
        let (mut freed, mut lowest, mut emptied) = (0, None, Vec::new());
        let lane = self.lanes.at_mut(index);
        let mut changed = Vec::new();
        for (user, key) in &mut lane.keys {
            if key.held {
                let was_parked = key.parked.is_some();
                freed += key.forget_followers();
                self.parked += usize::from(!was_parked && key.parked.is_some());
                changed.push(Arc::clone(user));
                continue;
            }
            let kept = key.in_flight;
            for item in key.queue.drain(kept..) {
                lowest = Some(lowest.map_or(item.offset, |lowest: Offset| lowest.min(item.offset)));
                key.bytes -= item.weight().min(key.bytes);
                freed += item.weight();
                lane.unfinished -= 1;
            }
            if kept == 0 {
                emptied.push(Arc::clone(user));
            }
        }
        for user in emptied {
            lane.keys.swap_remove(&user);
        }
        lane.bytes = before - freed;
        lane.destination.sub_bytes(freed);
        self.account.sub(freed);
        if let Some(detached) = &mut lane.detached
            && let Some(lowest) = lowest.filter(|_| !is_planted(Mistake::ForgetForgotten))
        {
            detached.scan = detached.scan.min(lowest);
        }
        self.lanes.clear_ready(index);
        self.push_ready_again(index);
        for user in changed {
            let id = KeyId { lane: index, user };
            self.note_low(&id);
            self.dirty.insert(id.clone());
            if self.lanes.key(&id).is_some_and(|key| key.parked.is_some()) {
                self.cursors.ask_key_later(&id);
            }
        }
        self.cursors.ask_lane_later(index);
    }

    fn push_ready_again(&mut self, index: usize) {
        let ready = |key: &&super::Key| key.activity == super::Activity::Ready;
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
            lane.keys.iter().filter(|(_, key)| !key.held).map(|(user, _)| Arc::clone(user)).collect()
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
        true
    }

    /// Makes room while less than a tenth is free: first held keys' followers, then lanes that cannot run, then the lane with
    /// the most.
    pub fn shed(&mut self, now: Timestamp) {
        let bound = self.settings.bounds.partition_bytes;
        if !self.is_short() || self.account.used() == 0 {
            return;
        }
        let with_bytes = |state: &Self| -> Vec<usize> {
            let mut found: Vec<usize> = (0..state.lanes.len()).filter(|at| state.lanes.at(*at).bytes > 0).collect();
            found.sort_by_key(|at| std::cmp::Reverse(state.lanes.at(*at).bytes));
            found
        };
        for index in with_bytes(self) {
            if self.is_short() {
                self.shed_followers(index);
            }
        }
        for index in with_bytes(self) {
            if self.is_short() && !self.lanes.at(index).destination.can_run() {
                self.detach(index, "down", now);
                self.forget(index);
            }
        }
        for index in with_bytes(self) {
            // What little a lane has is not worth reading again.
            if self.is_short() && self.lanes.at(index).bytes > (64 << 10).min(bound / 10) {
                self.detach(index, "bytes", now);
                self.forget(index);
            }
        }
    }

    /// Less than a tenth is free, of the partition's bound or the process's.
    pub(super) fn is_short(&self) -> bool {
        let bound = self.settings.bounds.partition_bytes;
        self.account.used() > bound - bound / 10 || self.account.process_is_short()
    }

    fn shed_followers(&mut self, index: usize) {
        let lane = self.lanes.at_mut(index);
        let mut freed = 0;
        let mut changed = Vec::new();
        for (user, key) in lane.keys.iter_mut().filter(|(_, key)| key.held && key.bytes > 0) {
            let was_parked = key.parked.is_some();
            freed += key.forget_followers();
            self.parked += usize::from(!was_parked && key.parked.is_some());
            changed.push(Arc::clone(user));
        }
        lane.bytes -= freed;
        lane.destination.sub_bytes(freed);
        self.account.sub(freed);
        self.dirty.extend(changed.into_iter().map(|user| KeyId { lane: index, user }));
    }

    /// After something of a lane has ended, or its destination came back: it may take more, or be attached.
    pub(super) fn reconsider(&mut self, index: usize, now: Timestamp) {
        let mut is_full = self.is_lane_full(index);
        if is_full && self.lanes.at(index).unfinished == 0 {
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
