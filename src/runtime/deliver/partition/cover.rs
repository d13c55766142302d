//! Who covers a record: how it goes from a window to its key's mark.

use crate::model::record::Offset;

use super::super::key::Activity;
use super::super::window::Place;
use super::{HELD, KeyId, PartitionState};

impl PartitionState {
    /// A held key's mark covers the record, so the window need not.
    pub(super) fn cover_by_mark(&mut self, id: &KeyId, place: Option<Place>) {
        if let Some(place) = place {
            self.release(id.lane, place);
        }
        self.note_low(id);
        self.dirty.insert(id.clone());
    }

    /// The window that covers a record lets it go: it is finished, or its key's mark covers it.
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

    /// From `offset` on nothing more is queued: it will be read again.
    pub(super) fn park(&mut self, id: &KeyId, offset: Offset) {
        let Some(key) = self.lanes.key_mut(id) else { return };
        if key.parked.replace(offset).is_none() {
            self.parked += 1;
        }
        self.hold(id);
        self.cursors.ask_key(id);
    }

    /// From now on the key's mark covers all of its records.
    pub(super) fn hold(&mut self, id: &KeyId) {
        self.dirty.insert(id.clone());
        let lane = self.lanes.at_mut(id.lane);
        let Some(key) = lane.keys.get_mut(&id.user) else { return };
        if key.held {
            return self.note_low(id);
        }
        key.held = true;
        let places: Vec<Place> = key.queue.iter_mut().filter_map(|item| item.place.take()).collect();
        let is_ready = key.activity == Activity::Ready;
        lane.unfinished -= places.len();
        let cost = HELD + id.user.len();
        lane.held_bytes += cost;
        self.account.add_held(cost);
        for place in places {
            self.release(id.lane, place);
        }
        if is_ready {
            // Held keys have a queue of their own.
            self.lanes.push(id, false);
        }
        self.note_low(id);
    }

    /// Keeps the list of held keys' lowest offsets.
    pub(super) fn note_low(&mut self, id: &KeyId) {
        let Some(key) = self.lanes.key_mut(id) else { return };
        let low = key.lowest().filter(|_| key.held);
        let before = std::mem::replace(&mut key.low, low);
        if before == low {
            return;
        }
        if let Some(before) = before {
            self.forget_low(before);
        }
        if let Some(low) = low {
            *self.lows.entry(low).or_default() += 1;
        }
    }

    pub(super) fn forget_low(&mut self, low: Offset) {
        if let Some(count) = self.lows.get_mut(&low) {
            *count -= 1;
            if *count == 0 {
                self.lows.remove(&low);
            }
        }
    }
}
