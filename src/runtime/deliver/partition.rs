//! A partition's whole state, without any I/O: records, verdicts and the time go in; deliveries to start and progress to write
//! come out.

mod collect;
mod lane;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::clock::Timestamp;
use crate::delivery::verdict::Verdict;
use crate::model::failure::{Try, shorten};
use crate::model::outcome::Reason;
use crate::model::progress::{Lane, Run};
use crate::model::record::{Addressed, Epoch, Headers, Offset, Partition, Record, header};
use crate::runtime::failure::Cause;
use crate::telemetry::metrics::metrics;

use super::DeliverSettings;
use super::key::{Activity, Cover, Failing, Item, Key};
use super::memory::{Account, Memory};
use super::permits::{Permit, Permits};
use super::restore::Restored;
use super::window::Window;
use super::{Bounds, tell_waiting};

use lane::Lanes;

/// Nothing new is started while so many final outcomes wait for a commit: after a crash they would all be repeated.
const UNCOMMITTED: usize = 10_000;

/// A user of a lane: what stays in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId {
    lane: usize,
    user: Arc<str>,
}

/// What to do next.
pub enum Start {
    Attempt {
        key: KeyId,
        record: Arc<Record>,
        permit: Permit,
    },
    /// Read the record at this offset, and give it to [`PartitionState::fetched`].
    Fetch {
        key: KeyId,
        offset: Offset,
    },
    /// Something is ready, but no permit is free.
    Starved,
}

pub struct PartitionState {
    partition: Partition,
    epoch: Epoch,
    settings: DeliverSettings,
    account: Account,
    window: Window,
    /// Finished stretches of the last owner's window, still ahead of live reading.
    skip: VecDeque<Run>,
    /// Records below it were counted as taken by an earlier owner.
    taken_until: Offset,
    lanes: Lanes,
    keys: HashMap<KeyId, Key>,
    /// Offsets that marks cover.
    marked: BTreeSet<Offset>,
    timers: BinaryHeap<Reverse<(Timestamp, KeyId)>>,
    /// Keys whose front record has to be read.
    wanted: VecDeque<KeyId>,
    seq: u64,
    /// Keys whose progress record is to be written again.
    dirty: HashSet<KeyId>,
    outputs: Vec<Addressed>,
    changed: bool,
    stopped_clean: bool,
    uncommitted: usize,
    collected: usize,
    waiting: Option<&'static str>,
    /// Records taken and not final, and keys whose head fails: for the metrics.
    pending: usize,
    held: usize,
}

impl PartitionState {
    pub fn new(
        partition: Partition,
        epoch: Epoch,
        settings: DeliverSettings,
        memory: Memory,
        restored: Restored,
        now: Timestamp,
    ) -> Self {
        let mut state = Self {
            partition,
            epoch,
            settings,
            account: memory.account(),
            window: Window::new(restored.base),
            skip: restored.runs.into(),
            taken_until: restored.live,
            lanes: Lanes::default(),
            keys: HashMap::new(),
            marked: BTreeSet::new(),
            timers: BinaryHeap::new(),
            wanted: VecDeque::new(),
            seq: restored.seq,
            dirty: HashSet::new(),
            outputs: Vec::new(),
            changed: false,
            stopped_clean: false,
            uncommitted: 0,
            collected: 0,
            waiting: None,
            pending: 0,
            held: 0,
        };
        for key in restored.stale {
            state.outputs.push(state.tombstone(key));
            state.changed = true;
        }
        for (lane, ledger) in restored.ledgers {
            state.lanes.restore(lane, ledger);
        }
        for key in restored.keys {
            state.restore_key(key, now);
        }
        state
    }

    /// Where live reading goes on.
    pub fn live(&self) -> Offset {
        self.window.live()
    }

    fn restore_key(&mut self, stored: crate::model::progress::KeyProgress, now: Timestamp) {
        let lane = self.lanes.index(&stored.lane);
        let id = KeyId { lane, user: stored.user.as_str().into() };
        let mut key = Key::new();
        key.recorded = true;
        let head = stored.head.as_ref().map(|head| head.offset);
        for offset in head.into_iter().chain(stored.followers) {
            self.marked.insert(offset);
            self.pending += 1;
            key.push(Item { offset, cover: Cover::Mark, record: None });
        }
        if let Some(head) = stored.head {
            let first = Try { at: head.first_failed_at, code: head.first_code, message: head.first_message };
            let last = Try { at: now, code: head.last_code, message: head.last_message };
            key.failing = Some(Failing { attempts: head.attempts, first, last, next_try_at: head.next_try_at });
            key.activity = Activity::Waiting;
            self.held += 1;
            self.timers.push(Reverse((head.next_try_at, id.clone())));
        }
        let idle = key.activity == Activity::Idle && !key.queue.is_empty();
        self.keys.insert(id.clone(), key);
        if idle {
            self.make_ready(&id, false);
        }
    }

    /// Takes what live reading brings.
    pub fn admit_all(&mut self, records: Vec<Record>, now: Timestamp) {
        for record in records {
            self.admit(record, now);
        }
    }

    fn admit(&mut self, record: Record, now: Timestamp) {
        if record.offset < self.window.live() {
            // A position before what was taken: the log was reset under us, or the seek is still on its way.
            return;
        }
        self.changed = true;
        let offset = record.offset;
        let place = self.window.push(offset);
        while self.skip.front().is_some_and(|run| run.last < offset) {
            self.skip.pop_front();
        }
        if self.skip.front().is_some_and(|run| run.first <= offset) {
            return self.window.finish(place);
        }
        let lane = lane_of(&record);
        let index = self.lanes.index(&lane);
        if offset >= self.taken_until {
            self.lanes.ledger(index).taken += 1;
        }
        let user: Arc<str> = match record.headers.text(header::USER) {
            Some(user) => user.into(),
            // Nobody to keep in order: the record is a key of its own.
            None => format!("#{offset}").into(),
        };
        let id = KeyId { lane: index, user };
        let item = Item { offset, cover: Cover::Memory(place), record: Some(Arc::new(record)) };
        self.account.add(item.weight());
        self.pending += 1;
        let key = self.keys.entry(id.clone()).or_insert_with(Key::new);
        key.push(item);
        if key.failing.is_some() {
            self.dirty.insert(id.clone());
        }
        if key.activity == Activity::Idle {
            self.make_ready(&id, false);
        }
        if lane.destination.as_str().is_empty() {
            let message = "the record names no destination (header lw-destination)".to_owned();
            self.lanes.take_back(&id);
            self.settle(&id, Verdict::Abort { reason: Reason::Unreadable, code: 0, message }, now);
        }
    }

    fn make_ready(&mut self, id: &KeyId, first: bool) {
        if let Some(key) = self.keys.get_mut(id) {
            key.activity = Activity::Ready;
            self.lanes.push(id.clone(), first);
        }
    }

    /// What may start now, if anything. `can_fetch`: a record that is not in memory can be read now.
    pub fn next_start(&mut self, permits: &Permits, can_fetch: bool) -> Option<Start> {
        while can_fetch && let Some(id) = self.wanted.pop_front() {
            if let Some(front) = self.keys.get(&id).and_then(|key| key.queue.front()) {
                return Some(Start::Fetch { offset: front.offset, key: id });
            }
        }
        if self.uncommitted >= UNCOMMITTED {
            return None;
        }
        loop {
            let keys = &self.keys;
            let cost = |id: &KeyId| keys.get(id).and_then(|key| key.queue.front()).map_or(0, Item::weight);
            let (id, permit) = match self.lanes.next(cost, permits)? {
                Ok(next) => next,
                Err(lane::NoPermit) => return Some(Start::Starved),
            };
            let Some(key) = self.keys.get_mut(&id) else { continue };
            match key.queue.front().map(|front| front.record.clone()) {
                Some(Some(record)) => {
                    key.activity = Activity::InFlight;
                    return Some(Start::Attempt { key: id, record, permit });
                }
                Some(None) => {
                    // Reading it takes a while; the others do not wait for that.
                    key.activity = Activity::Fetching;
                    self.wanted.push_back(id);
                    if can_fetch && self.wanted.len() == 1 {
                        return self.next_start(permits, can_fetch);
                    }
                }
                None => {}
            }
        }
    }

    /// A record that was to be read; none where the log has deleted it.
    pub fn fetched(&mut self, id: &KeyId, record: Option<Record>, now: Timestamp) {
        let Some(key) = self.keys.get_mut(id).filter(|key| key.activity == Activity::Fetching) else { return };
        match (record, key.queue.front_mut()) {
            (Some(record), Some(front)) => {
                front.record = Some(Arc::new(record));
                let weight = front.weight();
                key.bytes += weight;
                self.account.add(weight);
                self.make_ready(id, true);
            }
            _ => {
                let message = "the log had deleted it before it could be delivered".to_owned();
                self.settle(id, Verdict::Abort { reason: Reason::Retention, code: 0, message }, now);
            }
        }
    }

    /// What came of an attempt.
    pub fn settle(&mut self, id: &KeyId, verdict: Verdict, now: Timestamp) {
        let Some(key) = self.keys.get_mut(id) else { return };
        self.changed = true;
        match verdict {
            Verdict::Delivered { .. } => self.finish(id, "delivered"),
            Verdict::Filtered { .. } => self.finish(id, "filtered"),
            Verdict::Abort { reason, code, message } => {
                let last = Try { at: now, code, message: shorten(message) };
                let failing = key.failing.clone();
                let attempts = failing.as_ref().map_or(0, |failing| failing.attempts) + u32::from(code != 0);
                let first = failing.map_or_else(|| last.clone(), |failing| failing.first);
                self.abort(id, reason, attempts, first, last);
            }
            Verdict::Retry { code, message, not_before } => {
                let last = Try { at: now, code, message: shorten(message) };
                let (attempts, first) = match &key.failing {
                    Some(failing) => (failing.attempts + 1, failing.first.clone()),
                    None => (1, last.clone()),
                };
                let front = key.queue.front().and_then(|item| item.record.as_ref());
                let is_job_run = front.is_some_and(|record| record.headers.text(header::JOB_RUN).is_some());
                let retry = &self.settings.retry;
                if retry.is_exhausted(attempts, first.at, now, is_job_run) {
                    return self.abort(id, Reason::RetriesExhausted, attempts, first, last);
                }
                let next_try_at = now.plus(retry.wait(attempts, not_before));
                self.held += usize::from(key.failing.is_none());
                key.failing = Some(Failing { attempts, first, last, next_try_at });
                key.activity = Activity::Waiting;
                self.timers.push(Reverse((next_try_at, id.clone())));
                self.dirty.insert(id.clone());
            }
        }
    }

    fn abort(&mut self, id: &KeyId, reason: Reason, attempts: u32, first: Try, last: Try) {
        let lane = self.lanes.lane(id.lane).clone();
        let front = self.keys.get(id).and_then(|key| key.queue.front());
        let Some(front) = front else { return };
        let original = front.record.as_deref().cloned().unwrap_or_else(|| Record {
            partition: self.partition,
            offset: front.offset,
            timestamp: Timestamp::default(),
            key: None,
            value: None,
            headers: Headers::new(),
        });
        let destination = lane.destination.clone();
        let cause = Cause {
            reason,
            message: last.message.clone(),
            attempts,
            first: Some(first),
            last: Some(last),
            key: destination.to_string(),
            source: original.headers.text(header::SOURCE).map(Into::into),
            destination: Some(destination),
        };
        self.outputs.push(self.settings.failures.record(&original, &cause));
        metrics().router_aborted.with_label_values(&[lane.destination.as_str(), reason.as_str()]).inc();
        self.finish(id, "aborted");
    }

    /// The front of a key is final: its next may go.
    fn finish(&mut self, id: &KeyId, outcome: &'static str) {
        let Some(key) = self.keys.get_mut(id) else { return };
        let Some(item) = key.pop() else { return };
        self.account.sub(item.weight());
        match item.cover {
            Cover::Memory(place) => self.window.finish(place),
            Cover::Mark => {
                self.marked.remove(&item.offset);
            }
        }
        self.held -= usize::from(key.failing.take().is_some());
        self.pending -= 1;
        if key.recorded || item.is_marked() {
            self.dirty.insert(id.clone());
        }
        if !key.queue.is_empty() {
            self.make_ready(id, false);
        } else if key.recorded || self.dirty.contains(id) {
            key.activity = Activity::Idle;
        } else {
            self.keys.remove(id);
        }
        self.uncommitted += 1;
        let destination = self.lanes.count(id.lane, outcome);
        metrics().router_outcomes.with_label_values(&[destination.as_str(), outcome]).inc();
    }

    /// When the next held key is due.
    pub fn next_timer(&self) -> Option<Timestamp> {
        self.timers.peek().map(|Reverse((at, _))| *at)
    }

    /// Lets the held keys that are due try again.
    pub fn wake(&mut self, now: Timestamp) {
        while let Some(Reverse((at, _))) = self.timers.peek()
            && *at <= now
        {
            let Some(Reverse((at, id))) = self.timers.pop() else { return };
            let due = |key: &Key| {
                key.activity == Activity::Waiting
                    && key.failing.as_ref().is_some_and(|failing| failing.next_try_at == at)
            };
            if self.keys.get(&id).is_some_and(due) {
                self.make_ready(&id, true);
            }
        }
    }

    /// Whether more may be taken from live reading; tells when that changes.
    pub fn has_room(&mut self) -> bool {
        let Bounds { partition_bytes, holes, window_records, .. } = self.settings.bounds;
        let used = self.account.used();
        // A partition that keeps nothing may always take a batch: another one's memory must not shut it out.
        let reason = if used >= partition_bytes || (used > 0 && self.account.process_is_full()) {
            Some("memory")
        } else if self.window.holes() >= holes {
            Some("holes")
        } else if self.window.len() >= window_records {
            Some("window")
        } else {
            None
        };
        tell_waiting(self.settings.stage, self.partition, self.waiting, reason);
        self.waiting = reason;
        reason.is_none()
    }

    /// What was collected last is committed.
    pub fn committed(&mut self) {
        self.uncommitted -= self.collected.min(self.uncommitted);
        self.collected = 0;
    }

    fn tombstone(&self, key: Bytes) -> Addressed {
        Addressed {
            topic: self.settings.progress.clone(),
            partition: self.partition,
            key: Some(key),
            value: None,
            headers: Headers::new(),
        }
    }
}

impl Drop for PartitionState {
    fn drop(&mut self) {
        tell_waiting(self.settings.stage, self.partition, self.waiting, None);
        let partition = self.partition.to_string();
        for gauge in [&metrics().lane_held, &metrics().lane_pending, &metrics().lane_bytes] {
            // Absent where nothing was ever collected.
            let _ = gauge.remove_label_values(&[&partition]);
        }
    }
}

fn lane_of(record: &Record) -> Lane {
    let destination = record.headers.text(header::DESTINATION).unwrap_or_default();
    Lane { destination: destination.into(), replay: record.headers.text(header::REPLAY_ID).map(str::to_owned) }
}
