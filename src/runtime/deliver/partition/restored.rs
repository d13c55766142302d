//! Lanes and keys as the last owner stored them.

use std::cmp::Reverse;

use crate::clock::Timestamp;
use crate::delivery::verdict::RETRY_AFTER_CAP;
use crate::model::failure::Try;
use crate::model::progress::{Head, KeyProgress, LaneProgress};

use super::super::key::{Failing, Key};
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
        let mut offsets = Vec::with_capacity(stored.followers.len() + 1);
        offsets.extend(stored.head.as_ref().map(|head| head.offset));
        offsets.extend(stored.followers);
        let has_items = !offsets.is_empty();
        let failing = stored.head.map(|head| {
            // The last owner's clock may have been ahead: no wait is longer than the longest one that is ever begun.
            let longest = self.lanes.at(lane).destination.rules().retry.cap.max(RETRY_AFTER_CAP);
            let next_try_at = self.steady(head.next_try_at).min(now.plus(longest));
            let first_at = self.steady(head.first_failed_at);
            let first = Try { at: first_at, code: head.first_code, message: head.first_message };
            let last = Try { at: now, code: head.last_code, message: head.last_message };
            let Head { attempts, spent, .. } = head;
            Failing { attempts, first, last, next_try_at, spent }
        });
        let due = failing.as_ref().map(|failing| failing.next_try_at);
        let charge = self.lanes.at(lane).account.charge_held(Self::held_cost(&id));
        self.insert_held(&id, Key::restored(offsets, failing, stored.parked, charge));
        if let Some(due) = due {
            self.alarms.push(Reverse((due, Alarm::Key(id.clone()))));
        } else if has_items {
            self.lanes.push(&id, false);
        }
        if stored.parked.is_some() {
            self.cursors.ask_key(&id);
        }
    }
}
