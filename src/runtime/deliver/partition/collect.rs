//! What a partition writes at a commit: failures, the marks and ledgers that changed, and its own record last.

use bytes::Bytes;

use crate::log::Committed;
use crate::model::codec;
use crate::model::progress::{KeyProgress, Lane, PartitionProgress, Progress, ProgressKey, Run};
use crate::model::record::{Addressed, Headers, Offset, header};
use crate::runtime::driver::Changes;
use crate::telemetry::metrics::metrics;

use super::super::key::Activity;
use super::{KeyId, PartitionState};

impl PartitionState {
    /// Everything that changed since this was asked last; none where nothing did. `clean`: the owner has stopped and has
    /// nothing under way.
    pub fn collect(&mut self, clean: bool) -> Option<Changes> {
        let newly_clean = clean && !self.stopped_clean;
        if !self.changed && self.dirty.is_empty() && !newly_clean {
            return None;
        }
        self.changed = false;
        self.stopped_clean = clean;
        let mut outputs = std::mem::take(&mut self.outputs);
        for id in std::mem::take(&mut self.dirty) {
            outputs.extend(self.key_record(&id));
        }
        for (lane, ledger) in self.lanes.take_counted() {
            let key = ProgressKey::Ledger(&lane).encode(self.partition);
            outputs.push(self.progress(key, &Progress::Ledger(lane, ledger)));
        }
        self.seq += 1;
        let record = PartitionProgress {
            seq: self.seq,
            epoch: self.epoch.0,
            base: self.window.base(),
            runs: self.runs(),
            // After a restore the window is behind what the last owner had read: a second crash must not count it again.
            live: self.window.live().max(self.taken_until),
            clean_stop: clean,
            drains: Vec::new(),
        };
        let last = self.progress(ProgressKey::Partition.encode(self.partition), &Progress::Partition(record));
        self.collected = self.uncommitted;
        self.tell();
        let position = Committed { offset: self.lowest_unfinished(), metadata: self.seq.to_string() };
        Some(Changes { outputs, last: Some(last), position })
    }

    /// What is finished or marked: in the window, and of the last owner's runs what live reading has not passed yet. Leaving
    /// those out would let a second crash read records again that a mark covers.
    fn runs(&self) -> Vec<Run> {
        let mut runs = self.window.runs();
        let live = self.window.live();
        let ahead = self.skip.iter().filter(|run| run.last >= live);
        runs.extend(ahead.map(|run| Run { first: run.first.max(live), last: run.last }));
        runs
    }

    /// The lowest unfinished offset, whoever covers it: what the group commits, so that lag never lies low.
    fn lowest_unfinished(&self) -> Offset {
        let base = self.window.base();
        self.marked.first().map_or(base, |marked| base.min(*marked))
    }

    /// A key's progress record as it is to be now: its mark, or a tombstone.
    fn key_record(&mut self, id: &KeyId) -> Option<Addressed> {
        let key = self.keys.get_mut(id)?;
        let lane: Lane = self.lanes.lane(id.lane).clone();
        if !key.needs_record() {
            let was_recorded = std::mem::take(&mut key.recorded);
            if key.queue.is_empty() && key.activity == Activity::Idle {
                self.keys.remove(id);
            }
            let name = ProgressKey::Key(&lane, &id.user).encode(self.partition);
            return was_recorded.then(|| self.tombstone(name.into()));
        }
        let (window, marked) = (&mut self.window, &mut self.marked);
        key.extend_mark(|place, offset| {
            window.finish(place);
            marked.insert(offset);
        });
        let freed = key.shed(self.settings.bounds.key_bytes);
        self.account.sub(freed);
        key.recorded = true;
        let (head, followers) = key.mark();
        let name = ProgressKey::Key(&lane, &id.user).encode(self.partition);
        let user = id.user.as_ref().into();
        let record = Progress::Key(KeyProgress { lane, user, head, followers, parked: None });
        Some(self.progress(name, &record))
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
        metrics().lane_held.with_label_values(&[&partition]).set(self.held as i64);
        metrics().lane_pending.with_label_values(&[&partition]).set(self.pending as i64);
        metrics().lane_bytes.with_label_values(&[&partition]).set(self.account.used() as i64);
    }
}
