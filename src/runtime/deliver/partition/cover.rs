//! The one place where keys are changed, and where the cover of a record goes from a window to the mark of its key.

use std::sync::Arc;

use crate::model::record::Offset;

use super::super::key::{Key, Rest};
use super::super::window::Place;
use super::{HELD_KEY_BYTES, KEY_BYTES, KeyId, PartitionState};

impl PartitionState {
    /// Changes a key. Afterwards the list of lowest offsets, the counts and the set of progress records to write agree with
    /// it. None where there is no such key.
    pub(super) fn change_key<T>(&mut self, id: &KeyId, change: impl FnOnce(&mut Key) -> T) -> Option<T> {
        let key = self.lanes.key_mut(id)?;
        let (mark, was_parked, was_failing) = (key.state_of_mark(), key.rest() != Rest::None, key.failing().is_some());
        let result = change(key);
        let is_held = key.is_held();
        let low = key.lowest().filter(|_| is_held);
        let (is_parked, is_failing) = (key.rest() != Rest::None, key.failing().is_some());
        let has_changed = is_held && key.state_of_mark() != mark;
        let before = std::mem::replace(&mut key.low, low);
        self.parked = self.parked + usize::from(is_parked) - usize::from(was_parked);
        self.failing = self.failing + usize::from(is_failing) - usize::from(was_failing);
        let lane = self.lanes.at_mut(id.lane);
        lane.failing = lane.failing + usize::from(is_failing) - usize::from(was_failing);
        self.move_low(before, low);
        if has_changed {
            self.changed = true;
            self.dirty.insert(id.clone());
        }
        Some(result)
    }

    /// The key; one without records is made where there is none.
    pub(super) fn open_key(&mut self, id: &KeyId) -> &mut Key {
        let lane = self.lanes.at_mut(id.lane);
        let cost = KEY_BYTES + id.user.len();
        let account = &lane.account;
        lane.keys.entry(Arc::clone(&id.user)).or_insert_with(|| Key::new(account.charge(cost)))
    }

    /// Takes in a key that is held, as a mark describes it.
    pub(super) fn insert_held(&mut self, id: &KeyId, mut key: Key) {
        key.low = key.lowest();
        self.move_low(None, key.low);
        self.parked += usize::from(key.rest() != Rest::None);
        self.failing += usize::from(key.failing().is_some());
        self.lanes.at_mut(id.lane).failing += usize::from(key.failing().is_some());
        self.lanes.at_mut(id.lane).keys.insert(Arc::clone(&id.user), key);
    }

    /// Removes a key of which nothing is pending.
    pub(super) fn remove_key(&mut self, id: &KeyId) -> Option<Key> {
        let key = self.lanes.at_mut(id.lane).keys.swap_remove(&id.user)?;
        debug_assert!(key.is_empty() && key.rest() == Rest::None && key.failing().is_none());
        self.move_low(key.low, None);
        self.dirty.remove(id);
        self.count_deleted(id.lane);
        Some(key)
    }

    /// What a held key costs in memory beside its records.
    pub(super) fn held_cost(id: &KeyId) -> usize {
        HELD_KEY_BYTES + id.user.len()
    }

    /// The window that covers a record releases it: the record is final, or the mark of its key covers it.
    pub(super) fn release(&mut self, lane: usize, place: Place) {
        match &mut self.lanes.at_mut(lane).detached {
            Some(detached) => {
                detached.window.finish(place);
                self.dirty_lanes.insert(lane);
            }
            None => self.window.finish(place),
        }
        self.changed = true;
    }

    /// From `offset` on nothing more of the key is queued: the records are read again.
    pub(super) fn park(&mut self, id: &KeyId, offset: Offset) {
        self.open_key(id);
        self.leave_cursor_of_key(id, Some(offset));
        self.hold(id);
        self.change_key(id, |key| key.park(offset));
        self.cursors.ask_key(id);
    }

    /// From now on the key's mark covers all of its records.
    pub(super) fn hold(&mut self, id: &KeyId) {
        let Some(key) = self.lanes.key(id).filter(|key| !key.is_held()) else { return };
        let is_ready = key.activity() == super::Activity::Ready;
        let charge = self.lanes.at(id.lane).account.charge_held(Self::held_cost(id));
        let places = self.change_key(id, |key| key.hold(charge)).flatten().unwrap_or_default();
        self.lanes.at_mut(id.lane).unfinished -= places.len();
        for place in places {
            self.release(id.lane, place);
        }
        if is_ready {
            // Held keys have a ready queue of their own.
            self.lanes.push(id, false);
        }
    }

    fn move_low(&mut self, before: Option<Offset>, now: Option<Offset>) {
        if before == now {
            return;
        }
        if let Some(count) = before.and_then(|before| self.lows.get_mut(&before)) {
            *count -= 1;
        }
        if let Some(before) = before
            && self.lows.get(&before) == Some(&0)
        {
            self.lows.remove(&before);
        }
        if let Some(now) = now {
            *self.lows.entry(now).or_default() += 1;
        }
    }
}
