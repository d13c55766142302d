//! What came of an attempt, and what ends without one.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use crate::clock::Timestamp;
use crate::delivery::verdict::Verdict;
use crate::model::failure::{Try, shorten};
use crate::model::outcome::Reason;
use crate::model::progress::{Drain, ProgressKey, Target};
use crate::model::record::{Headers, Offset, Record, header};
use crate::runtime::failure::Cause;
use crate::runtime::tally::count_delivery;
use crate::telemetry::metrics::metrics;

use super::super::destination::Permit;
use super::super::key::{Activity, Failing};
use super::{Alarm, HELD, KeyId, PartitionState};
use crate::runtime::planted::{Mistake, is_planted};

/// What a dead letter says of a record that the log would have deleted.
const EXPIRED: &str = "the log is about to delete it, and it has not been delivered";

/// Why a record is not sent at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Refusal {
    /// An admin drained it.
    Drained,
    /// The log is about to delete it.
    Expired,
    /// It cannot be sent.
    Unreadable,
}

/// The code of what failed, as a run of reverse ETL sees it.
fn failed(outcome: &str, code: u16) -> Option<u16> {
    (!matches!(outcome, "delivered" | "filtered")).then_some(code)
}

impl PartitionState {
    /// What came of a request with the first records of a key, one verdict for each in order, up to the first that is not
    /// final.
    pub fn settle(&mut self, id: &KeyId, verdicts: Vec<Verdict>, permit: Permit, now: Timestamp) {
        let is_retry = |verdict: &Verdict| matches!(verdict, Verdict::Retry { .. });
        // A refusal for good is an answer: the destination is up.
        let unspent = permit.report(now, xxh3_64(id.user.as_bytes()), verdicts.iter().any(is_retry));
        self.note_breaker(id.lane);
        let Some(key) = self.lanes.key_mut(id) else { return };
        self.changed = true;
        self.in_flight -= 1;
        key.activity = Activity::Idle;
        let count = std::mem::take(&mut key.in_flight);
        for verdict in verdicts.into_iter().take(count) {
            match verdict {
                Verdict::Delivered { .. } => self.finish(id, "delivered", 0),
                Verdict::Filtered { .. } => self.finish(id, "filtered", 0),
                Verdict::Abort { reason, code, message } => {
                    self.abort(id, reason, code, message, now);
                    if let Some(key) = self.lanes.key_mut(id) {
                        key.careful = true;
                    }
                }
                Verdict::Retry { code, message, not_before } => {
                    match unspent {
                        // The breaker is open: the try was not made. Another key is the next probe.
                        true => self.lanes.push(id, false),
                        false => self.retry_later(id, code, message, not_before, now),
                    }
                    break;
                }
            }
        }
        self.go_on(id, now);
    }

    /// Whether the destination counts as down stands in the ledger, where operators read it: also when nothing else of it
    /// changes any more.
    fn note_breaker(&mut self, lane: usize) {
        let it = self.lanes.at(lane);
        let open_since = it.destination.open_since();
        if it.ledger.open_since != open_since {
            self.lanes.ledger(lane).open_since = open_since;
        }
    }

    /// A key that has something to send and waits for nothing goes on; one that has nothing left is forgotten.
    pub(super) fn go_on(&mut self, id: &KeyId, now: Timestamp) {
        // What was under way, or not in front, when it was drained.
        self.drain_front(id, now);
        let bound = self.settings.bounds.key_bytes;
        let Some(key) = self.lanes.key(id) else { return };
        let (is_low, is_parked) = (key.is_low(bound), key.parked.is_some());
        if key.activity == Activity::Idle && !key.queue.is_empty() {
            self.lanes.push(id, false);
        } else if key.queue.is_empty() && !is_parked {
            self.forget_key(id);
        }
        if is_parked && is_low {
            self.cursors.ask_key(id);
        }
        self.reconsider(id.lane, now);
    }

    fn retry_later(&mut self, id: &KeyId, code: u16, message: String, not_before: Option<Duration>, now: Timestamp) {
        let retry = self.lanes.at(id.lane).destination.rules.retry;
        let Some(key) = self.lanes.key_mut(id) else { return };
        let last = Try { at: now, code, message: shorten(message) };
        let trying = now.since(key.started_at);
        let (attempts, first, spent) = match &key.failing {
            Some(failing) if is_planted(Mistake::SpendWhileOpen) => {
                (failing.attempts + 1, failing.first.clone(), now.since(failing.first.at))
            }
            // Only what it waited on purpose counts, not what a breaker, a pause or a missing owner added.
            Some(failing) => {
                let waited = failing.next_try_at.since(failing.last.at);
                (failing.attempts + 1, failing.first.clone(), failing.spent + waited + trying)
            }
            None => (1, last.clone(), Duration::ZERO),
        };
        let front = key.queue.front().and_then(|item| item.record.as_ref());
        let is_job_run = front.is_some_and(|record| record.headers.text(header::JOB_RUN).is_some());
        if retry.is_exhausted(attempts, spent, is_job_run) {
            let first = Some(first);
            return self.give_up(id, Reason::RetriesExhausted, attempts, first, last);
        }
        let next_try_at = now.plus(retry.wait(attempts, not_before, &mut self.random));
        self.failing += usize::from(key.failing.is_none());
        key.failing = Some(Failing { attempts, first, last, next_try_at, spent });
        key.activity = Activity::Waiting;
        // Who cannot run does not keep a cursor.
        self.leave_key(id);
        let Some(key) = self.lanes.key_mut(id) else { return };
        if is_planted(Mistake::FreeKeyTooEarly) && key.queue.len() > 1 && key.in_flight == 0 {
            key.queue.swap(0, 1);
        }
        self.alarms.push(Reverse((next_try_at, Alarm::Key(id.clone()))));
        self.hold(id);
    }

    /// Gives the front up after a try that said never.
    pub(super) fn abort(&mut self, id: &KeyId, reason: Reason, code: u16, message: String, now: Timestamp) {
        let last = Try { at: now, code, message: shorten(message) };
        let failing = self.lanes.key(id).and_then(|key| key.failing.clone());
        let attempts = failing.as_ref().map_or(0, |failing| failing.attempts) + u32::from(code != 0);
        let first = failing.map_or_else(|| last.clone(), |failing| failing.first);
        self.give_up(id, reason, attempts, Some(first), last);
    }

    fn give_up(&mut self, id: &KeyId, reason: Reason, attempts: u32, first: Option<Try>, last: Try) {
        let Some(front) = self.lanes.key(id).and_then(|key| key.queue.front()) else { return };
        let original = front.record.as_deref().cloned().unwrap_or_else(|| self.missing(front.offset));
        let code = last.code;
        self.dead_letter(id.lane, &original, reason, attempts, first, last);
        self.finish(id, "aborted", code);
    }

    /// What stands for a record that the log has deleted.
    fn missing(&self, offset: Offset) -> Record {
        let (partition, timestamp) = (self.partition, Timestamp::default());
        Record { partition, offset, timestamp, key: None, value: None, headers: Headers::new() }
    }

    fn dead_letter(
        &mut self,
        lane: usize,
        original: &Record,
        reason: Reason,
        attempts: u32,
        first: Option<Try>,
        last: Try,
    ) {
        let destination = self.lanes.at(lane).lane.destination.clone();
        let cause = Cause {
            reason,
            message: last.message.clone(),
            attempts,
            first,
            last: Some(last),
            key: destination.to_string(),
            source: original.headers.text(header::SOURCE).map(Into::into),
            destination: Some(destination.clone()),
        };
        let letter = self.settings.failures.record(original, &cause);
        self.uncommitted_bytes += letter.size();
        self.outputs.push(letter);
        metrics().router_aborted.with_label_values(&[destination.as_str(), reason.as_str()]).inc();
    }

    /// Whether a record is not to be sent.
    pub(super) fn refusal(&self, id: &KeyId, record: &Record) -> Option<Refusal> {
        let lane = self.lanes.at(id.lane);
        if lane.lane.destination.as_str().is_empty() {
            return Some(Refusal::Unreadable);
        }
        let user = record.headers.text(header::USER);
        let job_run = record.headers.text(header::JOB_RUN);
        let destination = lane.lane.destination.as_str();
        self.ended_by(record.offset, |target| target.covers(destination, user, job_run))
    }

    /// What ends a record at this place; an operator's word first.
    fn ended_by(&self, at: Offset, covers: impl Fn(&Target) -> bool) -> Option<Refusal> {
        let ends = self.drains.iter().filter(|drain| at < drain.bound && covers(&drain.target));
        ends.map(|drain| if drain.target == Target::Retention { Refusal::Expired } else { Refusal::Drained }).min()
    }

    /// Ends a record that has not come to its key yet, without sending it.
    pub(super) fn refuse(&mut self, lane: usize, record: &Record, refusal: Refusal, now: Timestamp) {
        self.changed = true;
        count_delivery(&mut self.tally, record, Some(0));
        match refusal {
            Refusal::Drained => self.count(lane, "drained"),
            Refusal::Expired => {
                let last = Try { at: now, code: 0, message: EXPIRED.to_owned() };
                self.dead_letter(lane, record, Reason::Retention, 0, None, last);
                self.count(lane, "aborted");
            }
            Refusal::Unreadable => {
                let message = "the record names no destination (header lw-destination)".to_owned();
                let last = Try { at: now, code: 0, message };
                self.dead_letter(lane, record, Reason::Unreadable, 0, None, last);
                self.count(lane, "aborted");
            }
        }
    }

    /// Ends a record that lies in the log before: no delivery of its own.
    pub(super) fn end_repeat(&mut self, lane: usize, at: Offset) {
        self.changed = true;
        self.repeats.forget(at);
        self.count(lane, "repeated");
    }

    /// Ends the front of a key without sending it.
    pub(super) fn give_up_front(&mut self, id: &KeyId, refusal: Refusal, now: Timestamp) {
        match refusal {
            Refusal::Drained => self.finish(id, "drained", 0),
            Refusal::Expired => self.abort(id, Reason::Retention, 0, EXPIRED.to_owned(), now),
            Refusal::Unreadable => {
                let message = "the record names no destination (header lw-destination)".to_owned();
                self.abort(id, Reason::Unreadable, 0, message, now);
            }
        }
    }

    /// The front of a key is final. `code`: of the last answer, where it was given up.
    pub(super) fn finish(&mut self, id: &KeyId, outcome: &'static str, code: u16) {
        let lane = self.lanes.at_mut(id.lane);
        let Some(key) = lane.keys.get_mut(&id.user) else { return };
        let Some(item) = key.pop() else { return };
        let weight = item.weight();
        lane.bytes -= weight;
        lane.destination.sub_bytes(weight);
        if let Some(record) = &item.record {
            lane.oldest = lane.oldest.max(record.timestamp);
            count_delivery(&mut self.tally, record, failed(outcome, code));
        }
        self.account.sub(weight);
        let was_failing = key.failing.take().is_some();
        if outcome == "delivered" {
            key.careful = false;
        }
        let held = key.held;
        self.failing -= usize::from(was_failing);
        match item.place {
            Some(place) => {
                lane.unfinished -= 1;
                self.release(id.lane, place);
            }
            None => {
                debug_assert!(held, "a record is covered by its key's mark or by a window");
                self.note_low(id);
                self.dirty.insert(id.clone());
            }
        }
        self.changed = true;
        self.count(id.lane, outcome);
    }

    /// Counts a final outcome.
    fn count(&mut self, lane: usize, outcome: &'static str) {
        let ledger = self.lanes.ledger(lane);
        match outcome {
            "delivered" => ledger.delivered += 1,
            "filtered" => ledger.filtered += 1,
            "drained" => ledger.drained += 1,
            // It was counted before it was known.
            "repeated" if is_planted(Mistake::CountRepeats) => {}
            "repeated" => ledger.taken = ledger.taken.saturating_sub(1),
            _ => ledger.aborted += 1,
        }
        self.pending = self.pending.saturating_sub(1);
        self.uncommitted += 1;
        let destination = self.lanes.at(lane).lane.destination.as_str();
        metrics().router_outcomes.with_label_values(&[destination, outcome]).inc();
    }

    /// Nothing of the key is unfinished any more.
    pub(super) fn forget_key(&mut self, id: &KeyId) {
        let lane = self.lanes.at_mut(id.lane);
        let Some(key) = lane.keys.swap_remove(&id.user) else { return };
        debug_assert!(key.queue.is_empty() && key.parked.is_none() && key.failing.is_none());
        if key.held {
            let cost = HELD + id.user.len();
            lane.held_bytes -= cost;
            self.account.sub_held(cost);
            if let Some(low) = key.low {
                self.forget_low(low);
            }
            self.lanes.rouse(id.lane);
        }
        if let Some(cursor) = key.cursor {
            self.cursors.leave_key(cursor, id);
        }
        self.dirty.remove(id);
        if key.recorded && !is_planted(Mistake::KeepMarks) {
            let name = ProgressKey::Key(&self.lanes.at(id.lane).lane, &id.user).encode(self.partition);
            self.outputs.push(self.tombstone(name.into()));
            self.changed = true;
        }
    }

    /// Ends what these cover, without sending it: what is in memory now, unless it is under way; the rest when it comes. One
    /// that is known already changes nothing.
    pub fn drain(&mut self, drains: Vec<Drain>, now: Timestamp) {
        let (known, lowest) = (self.drains.len(), self.lowest_unfinished());
        for drain in drains {
            // Nothing is left of what an old one covers.
            if drain.bound > lowest && !self.drains.iter().any(|known| known.id == drain.id) {
                self.drains.push(drain);
            }
        }
        if self.drains.len() == known {
            return;
        }
        self.changed = true;
        self.drain_all(known, now);
    }

    /// Ends what lies in front of keys and is covered by a drain from this one on.
    pub(super) fn drain_all(&mut self, first: usize, now: Timestamp) {
        for index in 0..self.lanes.len() {
            let destination = self.lanes.at(index).lane.destination.as_str();
            if !self.drains[first..].iter().any(|drain| drain.target.concerns(destination)) {
                continue;
            }
            self.ask_all(index);
            let users: Vec<Arc<str>> = self.lanes.at(index).keys.keys().cloned().collect();
            for user in users {
                let id = KeyId { lane: index, user };
                if self.drain_front(&id, now) {
                    self.go_on(&id, now);
                }
            }
        }
    }

    /// What waits for its next try and is meant tries now.
    pub fn retry_now(&mut self, target: &Target, now: Timestamp) {
        for index in 0..self.lanes.len() {
            let lane = self.lanes.at_mut(index);
            let destination = lane.lane.destination.as_str();
            let mut due = Vec::new();
            for (user, key) in lane.keys.iter_mut().filter(|(_, key)| key.activity == Activity::Waiting) {
                let job_run = key.queue.front().and_then(|item| item.record.as_ref()?.headers.text(header::JOB_RUN));
                if let Some(failing) = &mut key.failing
                    && target.covers(destination, Some(user.as_ref()), job_run)
                {
                    failing.next_try_at = now;
                    due.push(KeyId { lane: index, user: Arc::clone(user) });
                }
            }
            self.alarms.extend(due.into_iter().map(|id| Reverse((now, Alarm::Key(id)))));
        }
    }

    /// Ends the drained records at the front of a key that has nothing under way; true where there was one.
    fn drain_front(&mut self, id: &KeyId, now: Timestamp) -> bool {
        let mut any = false;
        if self.drains.is_empty() {
            return any;
        }
        // Beyond what one commit may hold the rest is ended after it; nothing is sent before.
        self.drain_later |= self.owes_much();
        while !self.owes_much()
            && let Some(key) = self.lanes.key(id)
            && key.in_flight == 0
            && key.activity != Activity::Fetching
            && let Some(front) = key.queue.front()
        {
            let offset = front.offset;
            let refusal = match front.record.clone() {
                Some(record) => self.refusal(id, &record),
                None => self.refusal_unread(id, offset),
            };
            let is_read = self.lanes.key(id).and_then(|key| key.queue.front()).is_some_and(|it| it.record.is_some());
            match refusal {
                Some(refusal @ (Refusal::Drained | Refusal::Expired)) if is_read => {
                    self.give_up_front(id, refusal, now)
                }
                Some(Refusal::Drained | Refusal::Expired) => {
                    // A dead letter holds the whole record, and what is drained is counted for its run.
                    if let Some(key) = self.lanes.key_mut(id) {
                        key.activity = Activity::Fetching;
                    }
                    self.wanted.insert(offset, id.clone());
                    break;
                }
                // Whose run it is of has to be read.
                None if !is_read && self.drains_a_run(offset) => {
                    if let Some(key) = self.lanes.key_mut(id) {
                        key.activity = Activity::Fetching;
                    }
                    self.wanted.insert(offset, id.clone());
                    break;
                }
                Some(Refusal::Unreadable) | None => break,
            }
            any = true;
            if let Some(key) = self.lanes.key_mut(id) {
                key.activity = Activity::Idle;
            }
        }
        any
    }

    fn drains_a_run(&self, at: Offset) -> bool {
        self.drains.iter().any(|drain| at < drain.bound && matches!(drain.target, Target::JobRun(_)))
    }

    /// Of a record that is only known by its offset, its lane and its user.
    fn refusal_unread(&self, id: &KeyId, offset: Offset) -> Option<Refusal> {
        let destination = self.lanes.at(id.lane).lane.destination.as_str();
        let user = Some(id.user.as_ref()).filter(|user| !user.starts_with('#'));
        self.ended_by(offset, |target| target.covers(destination, user, None))
    }
}
