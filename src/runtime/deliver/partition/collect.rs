//! What a partition writes at a commit: failures, the marks and ledgers that changed, and its own record last.

use bytes::Bytes;

use crate::log::Committed;
use crate::model::codec;
use crate::model::progress::{KeyProgress, LaneProgress, PartitionProgress, Progress, ProgressKey};
use crate::model::record::{Addressed, Headers, Offset, header};
use crate::runtime::driver::Changes;
use crate::telemetry::metrics::metrics;

use super::super::restore::Note;
use super::{KeyId, PartitionState};
use crate::runtime::planted::{Mistake, is_planted};

impl PartitionState {
    /// Everything that changed since this was asked last; none where nothing did, unless `renew`: then the same position once
    /// more. `clean`: the owner has stopped and has nothing under way.
    pub fn collect(&mut self, clean: bool, renew: bool) -> Option<Changes> {
        let newly_clean = clean && !self.stopped_clean;
        let is_dirty = self.changed || !self.dirty.is_empty() || !self.dirty_lanes.is_empty();
        if !is_dirty && !newly_clean && !renew {
            return None;
        }
        self.changed = false;
        self.stopped_clean = clean;
        let mut outputs = std::mem::take(&mut self.outputs);
        outputs.extend(self.settings.jobs.records(&mut self.tally));
        for id in std::mem::take(&mut self.dirty) {
            outputs.extend(self.key_record(&id));
        }
        for index in std::mem::take(&mut self.dirty_lanes) {
            outputs.extend(self.lane_record(index));
        }
        for index in self.lanes.take_counted() {
            let lane = self.lanes.at(index).lane.clone();
            let mut ledger = self.lanes.at(index).ledger;
            ledger.open_since = ledger.open_since.map(|at| self.wall(at));
            let key = ProgressKey::Ledger(&lane).encode(self.partition);
            outputs.push(self.progress(key, &Progress::Ledger(lane, ledger)));
        }
        self.seq += 1;
        let lowest = self.lowest_unfinished();
        self.drains.retain(|drain| drain.bound > lowest);
        self.repeats.forget_below(lowest);
        let record = PartitionProgress {
            seq: self.seq,
            epoch: self.epoch.0,
            base: self.window.base(),
            runs: self.window.runs(),
            // After a restore the window is behind what the last owner had read: a second crash must not count it again.
            live: self.frontier(),
            clean_stop: clean,
            drains: self.drains.clone(),
        };
        let last = self.progress(ProgressKey::Partition.encode(self.partition), &Progress::Partition(record));
        (self.collected, self.collected_bytes) = (self.uncommitted, self.uncommitted_bytes);
        self.tell();
        let position = Committed { offset: lowest, metadata: Note::text(self.seq, self.floor) };
        Some(Changes { outputs, last: Some(last), position })
    }

    /// The lowest unfinished offset, whoever covers it: what the group commits, so that lag never lies low.
    pub(super) fn lowest_unfinished(&self) -> Offset {
        let lanes = self.lanes.detached.iter().map(|index| self.lane_tail(*index));
        let keys = self.lows.keys().next().copied().filter(|_| !is_planted(Mistake::CommitPastMark));
        lanes.chain(keys).fold(self.window.base(), Offset::min)
    }

    /// The oldest record that a detached lane's mark covers, or where its reading goes on.
    pub(super) fn lane_tail(&self, index: usize) -> Offset {
        let scan = self.lane_scan(index);
        let Some(detached) = &self.lanes.at(index).detached else { return scan };
        match detached.window.is_empty() {
            true => detached.window.live().max(scan),
            false => detached.window.base(),
        }
    }

    fn lane_record(&mut self, index: usize) -> Option<Addressed> {
        let tail = self.lane_tail(index);
        let lane = self.lanes.at_mut(index);
        let detached = lane.detached.as_ref()?;
        lane.recorded = true;
        let record = LaneProgress {
            lane: lane.lane.clone(),
            tail,
            done: detached.window.runs(),
            pending: lane.ledger.pending(),
            pending_bytes: 0,
            oldest: lane.oldest,
        };
        let name = ProgressKey::Lane(&record.lane).encode(self.partition);
        Some(self.progress(name, &Progress::Lane(record)))
    }

    /// A held key's progress record.
    fn key_record(&mut self, id: &KeyId) -> Option<Addressed> {
        let lane = self.lanes.at(id.lane).lane.clone();
        let bounds = self.settings.bounds;
        let key = self.lanes.key_mut(id).filter(|key| key.is_held())?;
        key.recorded = true;
        let (mut head, followers, mut parked) = key.mark(&bounds);
        if let Some(head) = &mut head {
            head.first_failed_at = self.wall(head.first_failed_at);
            head.next_try_at = self.wall(head.next_try_at);
        }
        if is_planted(Mistake::ForgetParkedInMark) {
            parked = None;
        }
        let name = ProgressKey::Key(&lane, &id.user).encode(self.partition);
        let user = id.user.as_ref().into();
        Some(self.progress(name, &Progress::Key(KeyProgress { lane, user, head, followers, parked })))
    }

    fn progress(&self, key: String, value: &Progress) -> Addressed {
        let mut headers = Headers::new();
        headers.push_text(header::CONTENT_TYPE, header::AVRO);
        Addressed {
            topic: self.settings.progress.clone(),
            partition: self.partition,
            key: Some(Bytes::from(key)),
            value: Some(codec::encode(value).into()),
            headers,
        }
    }

    fn tell(&self) {
        let partition = self.partition.to_string();
        let metrics = metrics();
        for (gauge, value) in [
            (&metrics.lane_held, self.failing),
            (&metrics.lane_pending, self.pending as usize),
            (&metrics.lane_bytes, self.account.records() + self.account.held()),
            (&metrics.lane_detached, self.lanes.detached.len()),
            (&metrics.parked, self.parked),
            (&metrics.cursors, self.cursors.count()),
        ] {
            gauge.with_label_values(&[&partition]).set(value as i64);
        }
    }
}
