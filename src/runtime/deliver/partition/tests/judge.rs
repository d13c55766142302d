//! What has to hold of a partition at any time, by what the world outside knows of it.

use super::*;

impl World {
    /// Records that a drain may have ended: they are final without having been sent.
    pub(super) fn note_drained(&mut self, state: &PartitionState) {
        let ended = |index| state.lanes.at(index).ledger.drained + state.lanes.at(index).ledger.aborted;
        let drained: u64 = (0..state.lanes.len()).map(ended).sum();
        if drained == self.drained {
            return;
        }
        self.drained = drained;
        let unfinished: BTreeSet<Offset> = self.unfinished_in(state);
        for record in self.log.iter().filter(|record| record.offset < state.frontier()) {
            let lane = lane_of(record);
            let (user, run) = (record.headers.text(header::USER), record.headers.text(header::JOB_RUN));
            let covers = |drain: &Drain| drain.target.covers(lane.destination.as_str(), user, run);
            let is_covered = self.drains.iter().any(|drain| record.offset < drain.bound && covers(drain));
            if is_covered && !unfinished.contains(&record.offset) {
                self.finals.entry(record.offset).or_insert(1);
                self.final_here.insert(record.offset);
            }
        }
    }

    /// What the state itself takes for unfinished, by its covers.
    pub(super) fn unfinished_in(&self, state: &PartitionState) -> BTreeSet<Offset> {
        let counts = self.log.iter().zip(self.cover_counts(state));
        counts.filter(|(_, count)| *count > 0).map(|(record, _)| record.offset).collect()
    }

    /// How many cover each record of the log that has been taken.
    pub(super) fn cover_counts(&self, state: &PartitionState) -> Vec<usize> {
        let (mut memory, mut lanes, mut keys) = (state.window.base(), BTreeMap::new(), BTreeMap::new());
        memory = memory.min(state.window.live());
        let runs = state.window.runs();
        for index in 0..state.lanes.len() {
            let lane = state.lanes.at(index);
            if let Some(detached) = &lane.detached {
                lanes.insert(lane.lane.clone(), (state.lane_tail(index), detached.window.runs()));
            }
            for (user, key) in lane.keys.iter().filter(|(_, key)| key.is_held()) {
                keys.insert((lane.lane.clone(), user.to_string()), key.mark(&self.settings.bounds));
            }
        }
        let cover = Cover { base: memory, read: state.window.live(), runs, lanes, keys };
        let is_taken = |record: &Record| record.offset < state.frontier();
        self.log.iter().map(|record| if is_taken(record) { cover.count(record) } else { 0 }).collect()
    }

    /// The state in memory keeps its invariants, and covers each pending record once.
    pub(super) fn verify(&self, state: &PartitionState) {
        let checked = state.check();
        assert!(checked.is_ok(), "seed {}: {checked:?}; {}", self.seed, describe(state));
    }

    /// What was committed covers each unfinished record once, and nothing else.
    pub(super) fn check_cover(&self) {
        let (cover, live) = self.stored_cover();
        for record in self.log.iter().filter(|record| record.offset < live) {
            let is_final = self.final_committed.contains(&record.offset);
            let (count, seed) = (cover.count(record), self.seed);
            let key = Self::key_of(record);
            let expected = usize::from(!is_final);
            let why = || {
                let lane = cover.lanes.get(&lane_of(record));
                let mark = key.as_ref().and_then(|key| cover.keys.get(key));
                let (at, base, runs) = (record.offset, cover.base, &cover.runs);
                format!("seed {seed}: what covers {at} of {key:?}; base {base} {runs:?}, lane {lane:?}, key {mark:?}")
            };
            assert_eq!(count, expected, "{}", why());
        }
    }

    pub(super) fn stored_cover(&self) -> (Cover, Offset) {
        let mut cover = Cover { read: self.read_committed, ..Cover::default() };
        let mut live = Offset::START;
        for value in self.stored.values() {
            match codec::decode(value).expect("readable") {
                Progress::Partition(partition) => {
                    (cover.base, cover.runs, live) = (partition.base, partition.runs, partition.live);
                }
                Progress::Lane(lane) => drop(cover.lanes.insert(lane.lane, (lane.tail, lane.done))),
                Progress::Key(key) => {
                    let mark = (key.head, key.followers, key.parked);
                    cover.keys.insert((key.lane, key.user.as_str().to_owned()), mark);
                }
                Progress::Ledger(..) => {}
            }
        }
        (cover, live)
    }

    pub(super) fn ledger(&self) -> Ledger {
        let mut sum = Ledger::default();
        for value in self.stored.values() {
            if let Progress::Ledger(_, ledger) = codec::decode(value).expect("readable") {
                sum.taken += ledger.taken;
                sum.delivered += ledger.delivered;
                sum.aborted += ledger.aborted;
                sum.drained += ledger.drained;
            }
        }
        sum
    }
}
