//! Random runs of a partition's state with crashes at any step, each decided by a seed: nothing is lost, order holds, the
//! committed offset never passes an unfinished record, the ledger closes.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::log::partitioner::{IsolateBy, Placement};
use crate::log::{Assignment, Committed};
use crate::model::codec;
use crate::model::progress::{Ledger, Progress};
use crate::model::record::Topic;
use crate::runtime::deliver::backoff::RetryPolicy;
use crate::runtime::deliver::restore::judge;
use crate::runtime::failure::FailureTopic;

const RECORDS: usize = 160;

fn settings(bounds: Bounds) -> DeliverSettings {
    let placement = Placement { isolate_by: IsolateBy::None, spread: None, partitions: 1 };
    DeliverSettings {
        input: Topic::DELIVERIES,
        progress: Topic::PROGRESS_ROUTER,
        failures: FailureTopic {
            topic: Topic::DEAD_LETTERS,
            placement,
            stage: "router",
            input: Topic::DELIVERIES,
            group: "g".into(),
        },
        retry: RetryPolicy::default(),
        bounds,
        stage: "router",
    }
}

/// Everything outside the state: the log, what is committed, what the destinations have seen.
struct World {
    random: StdRng,
    seed: u64,
    settings: DeliverSettings,
    log: Vec<Record>,
    stored: BTreeMap<Bytes, Bytes>,
    committed: Option<Committed>,
    pending: Vec<Addressed>,
    position: Option<Committed>,
    dead_letters: usize,
    finals: BTreeMap<Offset, usize>,
    in_flight: Vec<(KeyId, Offset, Permit)>,
    permits: Permits,
    now: Timestamp,
    crashes: usize,
}

impl World {
    fn new(seed: u64, bounds: Bounds) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut offset = 0_u128;
        let log = (0..RECORDS)
            .map(|_| {
                // Transaction markers leave gaps.
                offset += 1 + u128::from(random.random_bool(0.2)) * random.random_range(1..4);
                let mut headers = Headers::new();
                headers.push_text(header::DESTINATION, &format!("d{}", random.random_range(0..3)));
                if random.random_bool(0.9) {
                    headers.push_text(header::USER, &format!("u{}", random.random_range(0..4)));
                }
                Record {
                    partition: Partition(0),
                    offset: Offset::new(offset),
                    timestamp: Timestamp::default(),
                    key: None,
                    value: Some(vec![0; 200].into()),
                    headers,
                }
            })
            .collect();
        Self {
            random,
            seed,
            settings: settings(bounds),
            log,
            stored: BTreeMap::new(),
            committed: None,
            pending: Vec::new(),
            position: None,
            dead_letters: 0,
            finals: BTreeMap::new(),
            in_flight: Vec::new(),
            permits: Permits::new(50, 50),
            now: Timestamp::from_millis(1_000_000),
            crashes: 0,
        }
    }

    fn restore(&mut self) -> PartitionState {
        self.in_flight.clear();
        self.pending.clear();
        self.position = None;
        let assignment = Assignment { partition: Partition(0), epoch: Epoch(1), committed: self.committed.clone() };
        let restored = judge(self.stored.clone(), &assignment, &self.settings).expect("readable progress");
        let memory = Memory::new(self.settings.bounds.process_bytes);
        PartitionState::new(Partition(0), Epoch(1), self.settings.clone(), memory, restored, self.now)
    }

    fn read(&mut self, state: &mut PartitionState) {
        if !state.has_room() {
            return;
        }
        let next = self.log.partition_point(|record| record.offset < state.live());
        let count = self.random.random_range(1..12);
        let batch: Vec<Record> = self.log[next..].iter().take(count).cloned().collect();
        state.admit_all(batch, self.now);
    }

    fn start(&mut self, state: &mut PartitionState) {
        let can_fetch = self.random.random_bool(0.7);
        match state.next_start(&self.permits, can_fetch) {
            Some(Start::Attempt { key, record, permit }) => {
                self.check_order(&record);
                self.in_flight.push((key, record.offset, permit));
            }
            Some(Start::Fetch { key, offset }) => {
                let record = self.log.iter().find(|record| record.offset == offset).cloned();
                assert!(record.is_some(), "seed {}: there is no record at {offset}", self.seed);
                state.fetched(&key, record, self.now);
            }
            Some(Start::Starved) | None => {}
        }
    }

    /// Whoever is sent now has every predecessor of its key behind it, and none beside it.
    fn check_order(&self, record: &Record) {
        let key = |record: &Record| (lane_of(record), record.headers.text(header::USER).map(str::to_owned));
        let own = key(record);
        if own.1.is_none() {
            return;
        }
        for earlier in self.log.iter().filter(|other| other.offset < record.offset && key(other) == own) {
            let is_final = self.finals.contains_key(&earlier.offset);
            assert!(is_final, "seed {}: {} is sent before {} is final", self.seed, record.offset, earlier.offset);
        }
        let beside = self
            .in_flight
            .iter()
            .any(|(_, offset, _)| self.log.iter().any(|other| other.offset == *offset && key(other) == own));
        assert!(!beside, "seed {}: two of a key at a time", self.seed);
    }

    fn settle(&mut self, state: &mut PartitionState, calm: bool) {
        if self.in_flight.is_empty() {
            return;
        }
        let index = self.random.random_range(0..self.in_flight.len());
        let (key, offset, permit) = self.in_flight.swap_remove(index);
        drop(permit);
        let verdict = match self.random.random_range(0..100) {
            _ if calm => Verdict::Delivered { code: 200 },
            0..60 => Verdict::Delivered { code: 200 },
            60..92 => Verdict::Retry { code: 500, message: "no".into(), not_before: None },
            _ => Verdict::Abort { reason: Reason::Rejected, code: 400, message: "never".into() },
        };
        if !matches!(verdict, Verdict::Retry { .. }) {
            *self.finals.entry(offset).or_default() += 1;
        }
        state.settle(&key, verdict, self.now);
    }

    fn commit(&mut self, state: &mut PartitionState, succeeds: bool) {
        if let Some(changes) = state.collect(false) {
            self.pending.extend(changes.outputs);
            self.pending.extend(changes.last);
            self.position = Some(changes.position);
        }
        if !succeeds {
            return;
        }
        for output in self.pending.drain(..) {
            let key = output.key.expect("everything that is written has a key");
            match (output.topic == Topic::PROGRESS_ROUTER, output.value) {
                (false, _) => self.dead_letters += 1,
                (true, Some(value)) => drop(self.stored.insert(key, value)),
                (true, None) => drop(self.stored.remove(&key)),
            }
        }
        if let Some(position) = self.position.take() {
            let below = self.log.iter().filter(|record| record.offset < position.offset);
            let unfinished: BTreeSet<Offset> =
                below.map(|record| record.offset).filter(|offset| !self.finals.contains_key(offset)).collect();
            assert!(unfinished.is_empty(), "seed {}: {} is committed past {unfinished:?}", self.seed, position.offset);
            self.committed = Some(position);
            state.committed();
        }
    }

    fn run(&mut self) {
        let mut state = self.restore();
        for _ in 0..2_500 {
            match self.random.random_range(0..100) {
                0..15 => self.read(&mut state),
                15..50 => self.start(&mut state),
                50..80 => self.settle(&mut state, false),
                80..88 => {
                    self.now = self.now.plus(std::time::Duration::from_millis(self.random.random_range(1..2_000)));
                    state.wake(self.now);
                }
                88..98 => {
                    let succeeds = self.random.random_bool(0.8);
                    self.commit(&mut state, succeeds);
                }
                _ => {
                    self.crashes += 1;
                    state = self.restore();
                }
            }
        }
        for _ in 0..20_000 {
            self.read(&mut state);
            self.start(&mut state);
            self.settle(&mut state, true);
            self.now = self.now.plus(std::time::Duration::from_secs(400));
            state.wake(self.now);
            if self.finals.len() == RECORDS && state.pending == 0 {
                break;
            }
        }
        self.commit(&mut state, true);
        assert_eq!(state.pending, 0, "seed {}: it comes to rest", self.seed);
        assert_eq!((state.held, state.account.used()), (0, 0), "seed {}", self.seed);
    }

    fn ledger(&self) -> Ledger {
        let mut sum = Ledger::default();
        for value in self.stored.values() {
            if let Progress::Ledger(_, ledger) = codec::decode(value).expect("readable") {
                sum.taken += ledger.taken;
                sum.delivered += ledger.delivered;
                sum.aborted += ledger.aborted;
            }
        }
        sum
    }
}

fn prove(bounds: Bounds) {
    let mut crashes = 0;
    for seed in 0..200 {
        let mut world = World::new(seed, bounds);
        world.run();
        assert_eq!(world.finals.len(), RECORDS, "seed {seed}: nothing is lost");
        let ledger = world.ledger();
        let records = RECORDS as u64;
        assert_eq!((ledger.taken, ledger.delivered + ledger.aborted), (records, records), "seed {seed}: {ledger:?}");
        assert_eq!(world.dead_letters as u64, ledger.aborted, "seed {seed}");
        let marks = world.stored.keys().filter(|key| key.starts_with(b"k/")).count();
        assert_eq!(marks, 0, "seed {seed}: no mark outlives its key");
        let end = world.log.last().map(|record| record.offset.just_after());
        assert_eq!(world.committed.map(|committed| committed.offset), end, "seed {seed}: all of it is committed");
        if world.crashes == 0 {
            assert!(world.finals.values().all(|count| *count == 1), "seed {seed}: nothing is repeated without a crash");
        }
        crashes += world.crashes;
    }
    assert!(crashes > 500, "the runs do crash: {crashes}");
}

#[test]
fn nothing_is_lost_or_reordered_over_random_crashes() {
    prove(Bounds::default());
}

#[test]
fn the_same_holds_where_every_bound_is_near() {
    prove(Bounds { key_bytes: 300, partition_bytes: 4_000, process_bytes: 8_000, holes: 4, window_records: 30 });
}

#[test]
fn progress_that_does_not_fit_the_committed_offset_is_not_believed() {
    let mut world = World::new(1, Bounds::default());
    let mut state = world.restore();
    world.read(&mut state);
    world.commit(&mut state, true);
    let kept = world.committed.clone().expect("committed");
    for metadata in ["", "99", "x"] {
        world.committed = Some(Committed { offset: kept.offset, metadata: metadata.into() });
        let state = world.restore();
        assert_eq!(state.live(), kept.offset, "{metadata:?}: reading goes on at the committed offset");
        assert_eq!(state.pending, 0);
    }
}
