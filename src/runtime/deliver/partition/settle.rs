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
use crate::telemetry::events;
use crate::telemetry::metrics::metrics;

use super::super::destination::Permit;
use super::super::key::{Activity, Failing, Key, Rest};
use super::{Alarm, KeyId, PartitionState};
use crate::runtime::planted::{Mistake, is_planted};

/// What a dead letter says of a record that the log would have deleted.
const EXPIRED: &str = "the log is about to delete it, and it has not been delivered";

/// Why a record is not sent at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Refusal {
    /// The log has it twice, and the other one is delivered.
    Repeated,
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
        // A refusal for good is an answer: the destination is up.
        let failed = verdicts.iter().find_map(|verdict| match verdict {
            Verdict::Retry { not_before, .. } => Some(*not_before),
            Verdict::Delivered { .. } | Verdict::Filtered { .. } | Verdict::Abort { .. } => None,
        });
        let unspent = permit.report(now, xxh3_64(id.user.as_bytes()), failed.is_some(), failed.flatten());
        self.note_breaker(id.lane);
        let Some(count) = self.change_key(id, Key::settle) else { return };
        self.changed = true;
        self.in_flight -= 1;
        for verdict in verdicts.into_iter().take(count) {
            match verdict {
                Verdict::Delivered { .. } => self.finish(id, "delivered", 0),
                Verdict::Filtered { .. } => self.finish(id, "filtered", 0),
                Verdict::Abort { reason, code, message } => {
                    self.abort(id, reason, code, message, now);
                    self.change_key(id, |key| key.careful = true);
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
        let Some(key) = self.lanes.key(id) else { return };
        let (is_low, is_parked) = (key.is_low(&self.settings.bounds), key.rest() != Rest::None);
        if key.activity() == Activity::Idle && !key.is_empty() {
            self.lanes.push(id, false);
        } else if key.is_empty() && !is_parked {
            self.forget_key(id);
        }
        if is_parked && is_low {
            self.cursors.ask_key(id);
        }
        self.reconsider(id.lane, now);
    }

    fn retry_later(&mut self, id: &KeyId, code: u16, message: String, not_before: Option<Duration>, now: Timestamp) {
        let retry = self.lanes.at(id.lane).destination.rules().retry;
        let Some(key) = self.lanes.key(id) else { return };
        let last = Try { at: now, code, message: shorten(message) };
        let trying = now.since(key.started_at());
        let (attempts, first, spent) = match key.failing() {
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
        let front = key.front().and_then(|item| item.record());
        let is_job_run = front.is_some_and(|record| record.headers.text(header::JOB_RUN).is_some());
        if retry.is_exhausted(attempts, spent, is_job_run) {
            let first = Some(first);
            return self.give_up(id, Reason::RetriesExhausted, attempts, first, last);
        }
        let next_try_at = now.plus(retry.wait(attempts, not_before, &mut self.random));
        self.hold(id);
        self.change_key(id, |key| key.wait(Failing { attempts, first, last, next_try_at, spent }));
        // A key that cannot run does not keep a cursor.
        self.leave_key(id);
        if is_planted(Mistake::FreeKeyTooEarly) {
            self.change_key(id, Key::swap_front);
        }
        self.alarms.push(Reverse((next_try_at, Alarm::Key(id.clone()))));
    }

    /// Gives the front up after a try that said never.
    pub(super) fn abort(&mut self, id: &KeyId, reason: Reason, code: u16, message: String, now: Timestamp) {
        let last = Try { at: now, code, message: shorten(message) };
        let failing = self.lanes.key(id).and_then(|key| key.failing().cloned());
        let attempts = failing.as_ref().map_or(0, |failing| failing.attempts) + u32::from(code != 0);
        let first = failing.map_or_else(|| last.clone(), |failing| failing.first);
        self.give_up(id, reason, attempts, Some(first), last);
    }

    fn give_up(&mut self, id: &KeyId, reason: Reason, attempts: u32, first: Option<Try>, last: Try) {
        let Some(front) = self.lanes.key(id).and_then(Key::front) else { return };
        let original = front.record().map(|record| Record::clone(record)).unwrap_or_else(|| self.missing(front.offset));
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
        let shown = |tried: Try| Try { at: self.wall(tried.at), ..tried };
        let cause = Cause {
            reason,
            message: last.message.clone(),
            attempts,
            first: first.map(shown),
            last: Some(shown(last)),
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
        if self.repeats.is_kept(record.offset) {
            return Some(Refusal::Repeated);
        }
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
        if refusal != Refusal::Repeated {
            count_delivery(&mut self.tally, record, Some(0));
        }
        match refusal {
            Refusal::Repeated => {
                self.repeats.forget(record.offset);
                self.count(lane, "repeated");
            }
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

    /// Ends the front of a key without sending it.
    pub(super) fn give_up_front(&mut self, id: &KeyId, refusal: Refusal, now: Timestamp) {
        match refusal {
            Refusal::Repeated => {
                if let Some(offset) = self.lanes.key(id).and_then(Key::front).map(|front| front.offset) {
                    self.repeats.forget(offset);
                }
                self.finish(id, "repeated", 0);
            }
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
        let popped = self.change_key(id, |key| {
            key.careful &= outcome != "delivered";
            key.pop()
        });
        let Some(item) = popped.flatten() else { return };
        let lane = self.lanes.at_mut(id.lane);
        if let Some(record) = item.record() {
            lane.oldest = lane.oldest.max(record.timestamp);
            if outcome != "repeated" {
                count_delivery(&mut self.tally, record, failed(outcome, code));
            }
        }
        if let Some(place) = item.place {
            lane.unfinished -= 1;
            self.release(id.lane, place);
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

    /// A lane of which nothing is unfinished, while its ledger has deliveries pending: the log deleted them before they were read.
    /// Nothing is left of them that could be sent or become a dead letter; they are counted as aborted, and told.
    pub(super) fn count_deleted(&mut self, index: usize) {
        let lane = self.lanes.at(index);
        // Until live reading is where the last owner's was, there may be more of it.
        let is_whole = self.window.live() >= self.taken_until;
        let count = lane.ledger.pending();
        if !is_whole || lane.detached.is_some() || !lane.keys.is_empty() || count == 0 {
            return;
        }
        self.lanes.ledger(index).aborted += count;
        self.pending = self.pending.saturating_sub(count);
        self.changed = true;
        events::deliveries_deleted(self.partition, self.lanes.at(index).lane.destination.as_str(), count);
    }

    /// Nothing of the key is unfinished any more.
    pub(super) fn forget_key(&mut self, id: &KeyId) {
        let Some(key) = self.remove_key(id) else { return };
        if key.is_held() {
            self.lanes.rouse(id.lane);
        }
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

    /// Ends what is refused at the front of keys: by a drain from this one on, and, from the first one on, as a repeat.
    pub(super) fn drain_all(&mut self, first: usize, now: Timestamp) {
        for index in 0..self.lanes.len() {
            let destination = self.lanes.at(index).lane.destination.as_str();
            let is_refused = first == 0 && self.repeats.has_kept();
            if !is_refused && !self.drains[first..].iter().any(|drain| drain.target.concerns(destination)) {
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

    /// Deliveries of the target that wait for their next attempt are tried now. Those of a job run whose records are not in
    /// memory are read before, until `until` by the wall clock.
    pub fn retry_now(&mut self, target: &Target, now: Timestamp, until: Timestamp) {
        let until = self.steady(until);
        self.retried_runs.retain(|(_, until)| *until > now);
        if let Target::JobRun(run) = target {
            self.retried_runs.push((run.clone(), until));
        }
        for index in 0..self.lanes.len() {
            let lane = self.lanes.at(index);
            let destination = lane.lane.destination.as_str();
            let (mut due, mut unread) = (Vec::new(), Vec::new());
            for (user, key) in lane.keys.iter().filter(|(_, key)| key.activity() == Activity::Waiting) {
                let record = key.front().and_then(|item| item.record());
                let job_run = record.and_then(|record| record.headers.text(header::JOB_RUN));
                let id = || KeyId { lane: index, user: Arc::clone(user) };
                if target.covers(destination, Some(user.as_ref()), job_run) {
                    due.push(id());
                } else if record.is_none() && matches!(target, Target::JobRun(_)) {
                    unread.push(id());
                }
            }
            for id in due {
                self.change_key(&id, |key| key.hurry(now));
                let due = self.lanes.key(&id).and_then(Key::failing).map(|failing| failing.next_try_at);
                self.alarms.push(Reverse((due.unwrap_or(now), Alarm::Key(id))));
            }
            unread.iter().for_each(|id| self.fetch_front(id));
        }
    }

    /// A command wants the job run of this record, whose head waits, to be tried now.
    pub(super) fn is_retried_now(&self, id: &KeyId, record: &Record, now: Timestamp) -> bool {
        let is_waiting = self.lanes.key(id).is_some_and(|key| key.failing().is_some());
        let run = record.headers.text(header::JOB_RUN);
        is_waiting && self.retried_runs.iter().any(|(retried, until)| *until > now && run == Some(retried.as_str()))
    }

    /// Ends the refused records at the front of a key that has nothing in flight; true where there was one.
    fn drain_front(&mut self, id: &KeyId, now: Timestamp) -> bool {
        let mut any = false;
        if !self.refuses_any() {
            return any;
        }
        while !self.owes_much()
            && let Some(key) = self.lanes.key(id)
            && key.in_flight() == 0
            && key.activity() != Activity::Fetching
            && let Some(front) = key.front()
        {
            let (offset, record) = (front.offset, front.record().map(Arc::clone));
            let refusal = match &record {
                Some(record) => self.refusal(id, record),
                None => self.refusal_unread(id, offset),
            };
            match (refusal, &record) {
                (Some(Refusal::Repeated), _) => self.give_up_front(id, Refusal::Repeated, now),
                (Some(refusal @ (Refusal::Drained | Refusal::Expired)), Some(_)) => {
                    self.give_up_front(id, refusal, now);
                }
                // A dead letter holds the whole record, and what is drained is counted for its run.
                (Some(Refusal::Drained | Refusal::Expired), None) => {
                    self.fetch_front(id);
                    break;
                }
                // Its job run is known when it has been read.
                (None, None) if self.drains_a_run(offset) => {
                    self.fetch_front(id);
                    break;
                }
                (Some(Refusal::Unreadable) | None, _) => break,
            }
            any = true;
            self.change_key(id, Key::rest_idle);
        }
        // What exceeds one commit ends after it; nothing starts before.
        self.drain_later |= self.owes_much();
        any
    }

    /// Some records are not to be sent.
    pub(super) fn refuses_any(&self) -> bool {
        !self.drains.is_empty() || self.repeats.has_kept()
    }

    fn drains_a_run(&self, at: Offset) -> bool {
        self.drains.iter().any(|drain| at < drain.bound && matches!(drain.target, Target::JobRun(_)))
    }

    /// Of a record that is only known by its offset, its lane and its user.
    fn refusal_unread(&self, id: &KeyId, offset: Offset) -> Option<Refusal> {
        if self.repeats.is_kept(offset) {
            return Some(Refusal::Repeated);
        }
        let destination = self.lanes.at(id.lane).lane.destination.as_str();
        let user = Some(id.user.as_ref()).filter(|user| !user.starts_with('#'));
        self.ended_by(offset, |target| target.covers(destination, user, None))
    }
}
