//! Lanes and keys as the last owner left them.

use std::cmp::Reverse;
use std::sync::Arc;

use crate::clock::Timestamp;
use crate::model::failure::Try;
use crate::model::progress::{Head, KeyProgress, LaneProgress};

use super::super::key::{Activity, Failing, Item, Key};
use super::super::window::Window;
use super::lane::Detached;
use super::{Alarm, KeyId, PartitionState};
use crate::runtime::planted::{Mistake, is_planted};

impl PartitionState {
    pub(super) fn restore_lane(&mut self, stored: LaneProgress, now: Timestamp) {
        let index = self.lane(&stored.lane);
        let mut tail = stored.tail;
        if is_planted(Mistake::RestoreLaneBehindRuns) {
            tail = stored.done.last().map_or(tail, |run| run.last.just_after());
        }
        let lane = self.lanes.at_mut(index);
        lane.recorded = true;
        lane.oldest = stored.oldest;
        lane.detached = Some(Detached::new(Window::new(tail, stored.done), tail, now));
        self.lanes.detached.insert(index);
        self.cursors.ask_lane(index);
    }

    pub(super) fn restore_key(&mut self, stored: KeyProgress, now: Timestamp) {
        let lane = self.lane(&stored.lane);
        let id = KeyId { lane, user: stored.user.as_str().into() };
        let mut key = Key::new();
        key.recorded = true;
        key.parked = stored.parked;
        let head = stored.head.as_ref().map(|head| head.offset);
        for offset in head.into_iter().chain(stored.followers) {
            key.push(Item { offset, place: None, record: None });
        }
        if let Some(head) = stored.head {
            let first = Try { at: head.first_failed_at, code: head.first_code, message: head.first_message };
            let last = Try { at: now, code: head.last_code, message: head.last_message };
            let Head { attempts, spent, next_try_at, .. } = head;
            key.failing = Some(Failing { attempts, first, last, next_try_at, spent });
            key.activity = Activity::Waiting;
            self.failing += 1;
            self.alarms.push(Reverse((next_try_at, Alarm::Key(id.clone()))));
        }
        let (is_failing, is_parked, has_items) = (key.failing.is_some(), key.parked.is_some(), !key.queue.is_empty());
        self.parked += usize::from(is_parked);
        self.lanes.at_mut(lane).keys.insert(Arc::clone(&id.user), key);
        self.hold(&id);
        self.dirty.remove(&id);
        if !is_failing && has_items {
            self.lanes.push(&id, false);
        }
        if is_parked {
            self.cursors.ask_key(&id);
        }
    }
}
