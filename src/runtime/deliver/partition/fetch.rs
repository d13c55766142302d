//! Heads of keys that are not in memory: read, in the order of the log, before they are sent.

use std::cmp::Reverse;
use std::sync::Arc;

use crate::clock::Timestamp;
use crate::model::outcome::Reason;
use crate::model::record::{Offset, Record};
use crate::telemetry::metrics::metrics;

use super::super::key::{Activity, Key};
use super::{Alarm, KeyId, PartitionState, Start};

impl PartitionState {
    /// The record of the front is to be read.
    pub(super) fn fetch_front(&mut self, id: &KeyId) {
        let Some(front) = self.lanes.key(id).and_then(|key| key.front()).map(|front| front.offset) else { return };
        self.change_key(id, Key::fetch);
        self.wanted.insert(front, id.clone());
    }

    pub(super) fn next_reading(&mut self, now: Timestamp) -> Option<Start> {
        let may_fetch = self.fetching < self.settings.bounds.fetches && (self.fetching == 0 || !self.is_short());
        while may_fetch && let Some((offset, id)) = self.next_wanted() {
            let front = self.lanes.key(&id).filter(|key| key.activity() == Activity::Fetching);
            if front.and_then(Key::front).is_some_and(|front| front.offset == offset) {
                self.fetching += 1;
                metrics().fetched.with_label_values::<&str>(&[]).inc();
                return Some(Start::Fetch { offset, key: id });
            }
            // The key does not want it any more.
            if let Some(permit) = self.reading.remove(&offset) {
                permit.give_back();
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
        let permit = self.reading.remove(&offset);
        self.fill(id, offset, record, now);
        let is_ready = self.lanes.key(id).is_some_and(|key| {
            key.activity() == Activity::Ready && key.front().is_some_and(|front| front.offset == offset)
        });
        match permit {
            Some(permit) if is_ready => self.granted.push_back((id.clone(), permit)),
            Some(permit) => permit.give_back(),
            None => {}
        }
    }

    fn fill(&mut self, id: &KeyId, offset: Offset, record: Option<Record>, now: Timestamp) {
        let is_meant = |key: &&Key| {
            key.activity() == Activity::Fetching && key.front().is_some_and(|front| front.offset == offset)
        };
        if self.lanes.key(id).filter(is_meant).is_none() {
            return;
        }
        let Some(record) = record else {
            self.change_key(id, Key::rest_idle);
            let message = "the log had deleted it before it could be delivered".to_owned();
            self.abort(id, Reason::Retention, 0, message, now);
            return self.go_on(id, now);
        };
        let charge = self.lanes.at(id.lane).account.charge(record.weight());
        let record = Arc::new(record);
        let front = Arc::clone(&record);
        self.change_key(id, |key| {
            key.rest_idle();
            key.fill_front(front, charge);
        });
        if let Some(reason) = self.refusal(id, &record) {
            self.give_up_front(id, reason, now);
            return self.go_on(id, now);
        }
        if self.is_retried_now(id, &record, now) {
            self.change_key(id, |key| key.hurry(now));
        }
        // Before its next attempt it was read for a command that does not mean it.
        match self.change_key(id, |key| key.wait_on(now)).flatten() {
            Some(at) => self.alarms.push(Reverse((at, Alarm::Key(id.clone())))),
            None => self.lanes.push(id, true),
        }
    }
}
