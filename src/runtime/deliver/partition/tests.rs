//! Random runs of a partition's state with crashes at any step, each decided by a seed: nothing is lost, order holds, nothing
//! is repeated but what a crash left in doubt, each unfinished record is covered once by what a commit wrote, the committed
//! offset never passes one, the ledger closes.

mod cover;
mod deleted;
mod exhaustive;
mod judge;
mod repeats;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::delivery::verdict::Verdict;
use crate::log::partitioner::{IsolateBy, Placement};
use crate::log::{Assignment, Committed};
use crate::model::codec;
use crate::model::outcome::Reason;
use crate::model::progress::{Head, KeyProgress, Ledger, Progress, Target};
use crate::model::record::Topic;
use crate::runtime::deliver::backoff::RetryPolicy;
use crate::runtime::deliver::restore::{Found, judge};
use crate::runtime::failure::FailureTopic;
use crate::runtime::tally::JobTopic;

use cover::{Cover, describe};

const RECORDS: usize = 240;
const LANES: usize = 4;

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
            input_name: "deliveries".into(),
            group: "g".into(),
        },
        jobs: JobTopic(placement),
        bounds,
        stage: "router",
        repeats: 0,
        retention: None,
        seed: 0,
    }
}

pub fn test_settings() -> DeliverSettings {
    settings(Bounds::default())
}

fn rules(id: &DestinationId) -> Rules {
    let retry = RetryPolicy { job_run_window: RetryPolicy::default().window, ..RetryPolicy::default() };
    let rules = Rules { retry, ..Rules::default() };
    match id.as_str() {
        "d1" => Rules { batch: 3, ..rules },
        "d2" => Rules { ordered: false, ..rules },
        _ => rules,
    }
}

struct Flight {
    key: KeyId,
    offsets: Vec<Offset>,
    permit: Permit,
}

struct Scan {
    cursor: CursorId,
    from: Offset,
    until: Offset,
}

/// Everything outside the state: the log, what is committed, what the destinations have seen.
struct World {
    random: StdRng,
    seed: u64,
    settings: DeliverSettings,
    log: Vec<Record>,
    /// The last progress of each key, and all of it in the order in which it was written.
    stored: BTreeMap<Bytes, Bytes>,
    story: Vec<(Bytes, Option<Bytes>)>,
    committed: Option<Committed>,
    pending: Vec<Addressed>,
    position: Option<Committed>,
    /// Final as this owner knows it, at its last collection, and at the last commit.
    final_here: BTreeSet<Offset>,
    final_collected: BTreeSet<Offset>,
    final_committed: BTreeSet<Offset>,
    /// Where the owner read next, at its last collection and at the last commit.
    read_collected: Offset,
    read_committed: Offset,
    dead_letters: usize,
    finals: BTreeMap<Offset, usize>,
    in_flight: Vec<Flight>,
    scan: Option<Scan>,
    fetch: Vec<(KeyId, Offset)>,
    destinations: Destinations,
    down: BTreeSet<usize>,
    drains: Vec<Drain>,
    now: Timestamp,
    drained: u64,
    crashes: usize,
    repeats: usize,
    detached: usize,
    parked: usize,
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
                headers.push_text(header::DESTINATION, &format!("d{}", random.random_range(0..LANES)));
                if random.random_bool(0.95) {
                    headers.push_text(header::USER, &format!("u{}", random.random_range(0..5)));
                }
                if random.random_bool(0.3) {
                    headers.push_text(header::JOB_RUN, "j1");
                }
                Record {
                    partition: Partition(0),
                    offset: Offset::new(offset),
                    timestamp: Timestamp::from_millis(offset as i64),
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
            story: Vec::new(),
            committed: None,
            pending: Vec::new(),
            position: None,
            final_here: BTreeSet::new(),
            final_collected: BTreeSet::new(),
            final_committed: BTreeSet::new(),
            read_collected: Offset::START,
            read_committed: Offset::START,
            dead_letters: 0,
            finals: BTreeMap::new(),
            in_flight: Vec::new(),
            scan: None,
            fetch: Vec::new(),
            destinations: Self::destinations(),
            down: BTreeSet::new(),
            drains: Vec::new(),
            now: Timestamp::from_millis(1_000_000),
            drained: 0,
            crashes: 0,
            repeats: 0,
            detached: 0,
            parked: 0,
        }
    }

    fn destinations() -> Destinations {
        Destinations::new(50, 50, Placement { isolate_by: IsolateBy::None, spread: None, partitions: 1 })
    }

    fn store(&mut self, key: Bytes, value: Option<Bytes>) {
        self.story.push((key.clone(), value.clone()));
        match value {
            Some(value) => drop(self.stored.insert(key, value)),
            None => drop(self.stored.remove(&key)),
        }
    }

    fn read_story(&self, assignment: &Assignment) -> Found {
        let mut found = Found::new(assignment);
        self.story.iter().cloned().for_each(|(key, value)| found.take(key, value, self.now));
        found
    }

    /// A log may show the records of a commit whose offset does not count, or some of them.
    fn show_some(&mut self) {
        let written = self.random.random_range(0..=self.pending.len());
        for output in self.pending.drain(..).take(written).collect::<Vec<_>>() {
            if output.topic == Topic::PROGRESS_ROUTER {
                self.store(output.key.expect("a key"), output.value);
            }
        }
    }

    fn restore(&mut self) -> PartitionState {
        let memory = Memory::new(&self.settings.bounds);
        self.restore_in(memory)
    }

    fn restore_in(&mut self, memory: Memory) -> PartitionState {
        self.in_flight.clear();
        self.pending.clear();
        (self.position, self.scan, self.fetch) = (None, None, Vec::new());
        self.final_here = self.final_committed.clone();
        self.drained = u64::MAX;
        let assignment = Assignment { partition: Partition(0), epoch: Epoch(1), committed: self.committed.clone() };
        let restored = judge(self.read_story(&assignment), &assignment, &self.settings).expect("readable progress");
        self.destinations = Self::destinations();
        let given = Given {
            partition: Partition(0),
            epoch: Epoch(1),
            settings: self.settings.clone(),
            memory,
            destinations: self.destinations.clone(),
            rules: Arc::new(rules),
            seed: self.seed,
            wall_offset: 0,
        };
        PartitionState::new(given, restored, self.now)
    }

    fn read(&mut self, state: &mut PartitionState) {
        if !state.has_room() {
            return state.shed(self.now);
        }
        let next = self.log.partition_point(|record| record.offset < state.live());
        let count = self.random.random_range(1..12);
        let batch: Vec<Record> = self.log[next..].iter().take(count).cloned().collect();
        state.admit_all(batch, self.now);
    }

    fn start(&mut self, state: &mut PartitionState) {
        let next = state.next_start(self.now, true);
        self.note_drained(state);
        match next {
            Some(Start::Attempt { key, records, permit }) => {
                let offsets: Vec<Offset> = records.iter().map(|record| record.offset).collect();
                for record in &records {
                    self.check_order(record, &offsets);
                    let ended = state.refusal(&key, record);
                    assert!(ended.is_none(), "seed {}: {} is sent although it is {ended:?}", self.seed, record.offset);
                    let repeated = self.finals.contains_key(&record.offset);
                    self.repeats += usize::from(repeated);
                    let settled = self.final_committed.contains(&record.offset);
                    assert!(!settled, "seed {}: {} is sent although it is final", self.seed, record.offset);
                    assert!(!repeated || self.crashes > 0, "seed {}: {} is sent twice", self.seed, record.offset);
                }
                self.in_flight.push(Flight { key, offsets, permit });
            }
            Some(Start::Fetch { key, offset }) => {
                self.fetch.push((key, offset));
            }
            Some(Start::Scan { cursor, from, until }) => {
                assert!(self.scan.replace(Scan { cursor, from, until }).is_none(), "one at a time");
            }
            Some(Start::Close { .. } | Start::Starved) | None => {}
        }
    }

    /// What was to be read comes.
    fn bring(&mut self, state: &mut PartitionState) {
        let brought = self.random.random_range(0..=self.fetch.len());
        for (key, offset) in self.fetch.drain(..brought).collect::<Vec<_>>() {
            let record = self.log.iter().find(|record| record.offset == offset).cloned();
            let is_deleted = self.log.first().is_some_and(|first| offset < first.offset);
            assert!(record.is_some() || is_deleted, "seed {}: there is no record at {offset}", self.seed);
            state.fetched(&key, offset, record, self.now);
        }
        let count = self.random.random_range(1..20);
        self.bring_scan(state, count);
        self.detached = self.detached.max(state.lanes.detached.len());
        self.parked += state.parked;
    }

    /// The cursor that reads gets this many records.
    fn bring_scan(&mut self, state: &mut PartitionState, count: usize) {
        if let Some(Scan { cursor, from, until }) = self.scan.take() {
            let next = self.log.partition_point(|record| record.offset < from);
            let records: Vec<Record> = self.log[next..].iter().take(count).cloned().collect();
            let passed = records.is_empty().then_some(until);
            state.scanned(cursor, records, passed, self.now);
        }
    }

    fn key_of(record: &Record) -> Option<(Lane, String)> {
        let lane = lane_of(record);
        let user = record.headers.text(header::USER).filter(|_| rules(&lane.destination).ordered)?;
        Some((lane, user.to_owned()))
    }

    /// Whoever is sent now has every predecessor of its key behind it (or in the same request), and none beside it.
    fn check_order(&self, record: &Record, together: &[Offset]) {
        let Some(own) = Self::key_of(record) else { return };
        let same = |other: &&Record| Self::key_of(other).as_ref() == Some(&own);
        for earlier in self.log.iter().filter(|other| other.offset < record.offset).filter(same) {
            let is_before = self.finals.contains_key(&earlier.offset) || together.contains(&earlier.offset);
            assert!(is_before, "seed {}: {} is sent before {} is final", self.seed, record.offset, earlier.offset);
        }
        let flying = self.in_flight.iter().flat_map(|flight| &flight.offsets);
        let beside =
            flying.filter_map(|offset| self.log.iter().find(|other| other.offset == *offset)).any(|o| same(&o));
        assert!(!beside, "seed {}: two requests of a key at a time", self.seed);
    }

    fn verdict(&mut self, lane: usize, calm: bool) -> Verdict {
        let retry = || Verdict::Retry { code: 500, message: "no".into(), not_before: None };
        match self.random.random_range(0..100) {
            _ if calm => Verdict::Delivered { code: 200 },
            0..97 if self.down.contains(&lane) => retry(),
            0..80 => Verdict::Delivered { code: 200 },
            80..96 => retry(),
            _ => Verdict::Abort { reason: Reason::Rejected, code: 400, message: "never".into() },
        }
    }

    fn settle(&mut self, state: &mut PartitionState, calm: bool) {
        if self.in_flight.is_empty() {
            return;
        }
        let index = self.random.random_range(0..self.in_flight.len());
        let lane = state.lanes.at(self.in_flight[index].key.lane).lane.destination.as_str()[1..].parse();
        let lane = lane.expect("a number");
        self.settle_one(state, index, |world| world.verdict(lane, calm));
    }

    fn settle_one(&mut self, state: &mut PartitionState, index: usize, verdict: impl Fn(&mut Self) -> Verdict) {
        let Flight { key, offsets, permit } = self.in_flight.swap_remove(index);
        let mut verdicts = Vec::new();
        for offset in offsets {
            let verdict = verdict(self);
            let is_final = !matches!(verdict, Verdict::Retry { .. });
            verdicts.push(verdict);
            if !is_final {
                break;
            }
            *self.finals.entry(offset).or_default() += 1;
            self.final_here.insert(offset);
        }
        state.settle(&key, verdicts, permit, self.now);
    }

    fn drain(&mut self, state: &mut PartitionState) {
        let lane = format!("d{}", self.random.random_range(0..LANES));
        let target = match self.random.random_range(0..6) {
            0 | 1 => Target::Destination(lane.as_str().into()),
            2 | 3 => Target::User(lane.as_str().into(), "u1".into()),
            4 => Target::JobRun("j1".into()),
            _ => Target::Retention,
        };
        let drain = Drain { id: self.drains.len().to_string(), target, bound: state.live() };
        self.drains.push(drain.clone());
        state.drain(vec![drain], self.now);
    }

    fn commit(&mut self, state: &mut PartitionState, succeeds: bool) {
        self.note_drained(state);
        if let Some(changes) = state.collect(false, false) {
            self.pending.extend(changes.outputs);
            self.pending.extend(changes.last);
            self.position = Some(changes.position);
            self.final_collected = self.final_here.clone();
            self.read_collected = state.window.live();
        }
        if !succeeds {
            return;
        }
        for output in std::mem::take(&mut self.pending) {
            let key = output.key.expect("everything that is written has a key");
            if output.topic == Topic::PROGRESS_ROUTER {
                self.store(key, output.value);
            } else {
                self.dead_letters += usize::from(output.topic == Topic::DEAD_LETTERS);
            }
        }
        if let Some(position) = self.position.take() {
            self.final_committed = self.final_collected.clone();
            self.read_committed = self.read_collected;
            let below = self.log.iter().filter(|record| record.offset < position.offset);
            let unfinished: BTreeSet<Offset> =
                below.map(|record| record.offset).filter(|offset| !self.final_committed.contains(offset)).collect();
            assert!(unfinished.is_empty(), "seed {}: {} is committed past {unfinished:?}", self.seed, position.offset);
            self.committed = Some(position);
            self.check_cover();
            state.committed(self.now);
        }
    }

    fn run(&mut self) {
        let mut state = self.restore();
        for _ in 0..3_000 {
            match self.random.random_range(0..200) {
                0..24 => self.read(&mut state),
                24..90 => self.start(&mut state),
                90..120 => self.bring(&mut state),
                120..170 => self.settle(&mut state, false),
                170..180 => {
                    self.now = self.now.plus(Duration::from_millis(self.random.random_range(1..3_000)));
                    state.wake(self.now);
                }
                180..196 => {
                    let succeeds = self.random.random_bool(0.8);
                    self.commit(&mut state, succeeds);
                }
                196 => {
                    let lane = self.random.random_range(0..LANES);
                    if !self.down.remove(&lane) {
                        self.down.insert(lane);
                    }
                }
                197 if self.random.random_bool(0.1) => self.drain(&mut state),
                197 | 198 => {}
                _ => {
                    self.crashes += 1;
                    if self.random.random_bool(0.4) {
                        let succeeds = false;
                        self.commit(&mut state, succeeds);
                        self.show_some();
                    }
                    state = self.restore();
                }
            }
            self.verify(&state);
        }
        self.rest(&mut state);
    }

    /// The faults stop; everything has to end.
    fn rest(&mut self, state: &mut PartitionState) {
        self.down.clear();
        for step in 0..60_000 {
            self.read(state);
            (0..4).for_each(|_| self.start(state));
            self.bring(state);
            self.settle(state, true);
            if step % 20 == 0 {
                self.now = self.now.plus(Duration::from_secs(100));
                self.commit(state, true);
            }
            state.wake(self.now);
            if state.pending == 0 && self.log.last().is_some_and(|last| state.live() > last.offset) {
                break;
            }
        }
        self.commit(state, true);
        assert_eq!(state.pending, 0, "seed {}: it comes to rest: {}", self.seed, describe(state));
        for _ in 0..100 {
            // Lanes that are still detached are attached when their cursor has come to the end.
            self.start(state);
            self.bring(state);
            self.now = self.now.plus(Duration::from_secs(1));
            state.wake(self.now);
        }
        self.commit(state, true);
        assert_eq!(
            (state.failing, state.parked, state.account.records(), state.account.held()),
            (0, 0, 0, 0),
            "seed {}",
            self.seed
        );
        assert!(state.lows.is_empty() && state.lanes.detached.is_empty(), "seed {}: {}", self.seed, describe(state));
    }
}

fn prove(bounds: Bounds, seeds: std::ops::Range<u64>) -> [usize; 4] {
    let mut seen = [0; 4];
    for seed in seeds {
        let mut world = World::new(seed, bounds);
        world.run();
        assert_eq!(world.finals.len(), RECORDS, "seed {seed}: nothing is lost");
        let ledger = world.ledger();
        let ended = ledger.delivered + ledger.aborted + ledger.drained;
        assert_eq!((ledger.taken, ended), (RECORDS as u64, RECORDS as u64), "seed {seed}: {ledger:?}");
        assert_eq!(world.dead_letters as u64, ledger.aborted, "seed {seed}");
        let marks = world.stored.keys().filter(|key| key.starts_with(b"k/") || key.starts_with(b"l/")).count();
        assert_eq!(marks, 0, "seed {seed}: no mark outlives what it is about");
        let end = world.log.last().map(|record| record.offset.just_after());
        assert_eq!(world.committed.map(|committed| committed.offset), end, "seed {seed}: all of it is committed");
        for (sum, seen) in seen.iter_mut().zip([world.crashes, world.detached, world.parked, world.repeats]) {
            *sum += seen;
        }
    }
    seen
}

fn near() -> Bounds {
    Bounds {
        key_bytes: 1_500,
        key_records: 6,
        listed_followers: 2,
        mark_bytes: 4,
        lane_bytes: 4_000,
        down_lane_bytes: 2_000,
        probes: 2,
        lane_floor_bytes: 1_000,
        partition_bytes: 16_000,
        process_bytes: 24_000,
        held_bytes: 4_000,
        held_reserve_keys: 1,
        holes: 6,
        attach: 3,
        window_records: 60,
        cursors: 3,
        process_cursors: 2,
        near: 10,
        uncommitted: 20,
        uncommitted_bytes: 3_000,
        fetches: 2,
        turn_bytes: 500,
    }
}

#[test]
fn nothing_is_lost_or_reordered_over_random_crashes() {
    let [crashes, ..] = prove(Bounds::default(), 0..100);
    assert!(crashes > 500, "the runs do crash: {crashes}");
}

#[test]
fn the_same_holds_where_every_bound_is_near() {
    let [_, detached, parked, repeats] = prove(near(), 0..200);
    assert!(detached > 100 && parked > 500 && repeats > 10, "{detached} {parked} {repeats}");
}

#[test]
fn progress_that_does_not_fit_the_committed_offset_is_not_believed() {
    let mut world = World::new(1, Bounds::default());
    let mut state = world.restore();
    world.read(&mut state);
    world.commit(&mut state, true);
    let kept = world.committed.clone().expect("committed");
    assert!(world.restore().pending > 0, "the progress fits");
    for metadata in ["", "99", "x"] {
        world.committed = Some(Committed { offset: kept.offset, metadata: metadata.into() });
        let state = world.restore();
        assert_eq!(state.live(), kept.offset, "{metadata:?}: reading goes on at the committed offset");
        assert_eq!(state.pending, 0, "{metadata:?}");
    }
}

/// A state of one destination with this many held users, none of whose records is in memory.
fn unread(users: u128, requests: usize) -> PartitionState {
    let lane = Lane { destination: "d0".into(), replay: None };
    let held = |n: u128| KeyProgress {
        lane: lane.clone(),
        user: format!("u{n}").as_str().into(),
        head: None,
        followers: vec![Offset::new(n)],
        parked: None,
    };
    let (base, settings) = (Offset::new(1_000), settings(Bounds::default()));
    let restored = Restored { base, live: base, keys: (0..users).map(held).collect(), ..Restored::default() };
    let placement = Placement { isolate_by: IsolateBy::None, spread: None, partitions: 1 };
    let given = Given {
        partition: Partition(0),
        epoch: Epoch(1),
        memory: Memory::new(&settings.bounds),
        settings,
        destinations: Destinations::new(requests, requests, placement),
        rules: Arc::new(rules),
        seed: 1,
        wall_offset: 0,
    };
    PartitionState::new(given, restored, Timestamp::default())
}

#[test]
fn heads_are_read_only_as_far_as_requests_may_start() {
    let (now, mut state) = (Timestamp::default(), unread(100, 8));
    let mut fetches = Vec::new();
    while let Some(start) = state.next_start(now, true) {
        match start {
            Start::Fetch { key, offset } => fetches.push((key, offset)),
            Start::Starved => break,
            Start::Attempt { .. } | Start::Scan { .. } | Start::Close { .. } => {}
        }
    }
    assert_eq!(fetches.len(), 4, "half of the requests that are free");
    let mut records = World::new(0, Bounds::default()).log;
    let mut started = 0;
    for (key, offset) in fetches {
        let record = Record { offset, ..records.pop().expect("a record") };
        state.fetched(&key, offset, Some(record), now);
        assert_eq!(state.check(), Ok(()));
        started += usize::from(matches!(state.next_start(now, true), Some(Start::Attempt { .. })));
    }
    assert_eq!(started, 4, "each starts with the permit that it was read for");
}
