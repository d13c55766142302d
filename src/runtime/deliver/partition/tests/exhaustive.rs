//! Every interleaving of a few inputs: records, verdicts, what cursors and direct reads bring, memory that becomes short,
//! timers, commits and crashes, for a few records of two lanes and two users with bounds of none to three, to a stated depth.
//! States that were seen before are not explored again. In each state the invariants hold, each pending record is covered
//! exactly once, and the order of each key holds; from a part of the states everything ends.
//!
//! `EXHAUSTIVE_DEPTH=N cargo test --release --lib every_interleaving -- --nocapture` goes deeper than CI does.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_128;

use super::*;
use crate::runtime::deliver::memory::{Charge, LaneAccount};

/// In CI: some seconds in a debug build.
const MAX_DEPTH: usize = 5;
/// From one state in this many it is tried whether everything ends.
const REST_EVERY: u128 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Read,
    /// The oldest attempt ends, as delivered or to be tried again.
    Settle(usize, bool),
    /// The cursor that reads gets its next record.
    Bring,
    Fetched(usize),
    /// Another partition takes memory, and gives it back.
    Squeeze,
    Release,
    Wake,
    Commit,
    Crash,
}

type Is = fn(&Step) -> bool;

/// How often a path may do what would make the search endless.
const MOST: [(Is, usize); 5] = [
    (|step| matches!(step, Step::Settle(_, false)), 2),
    (|step| matches!(step, Step::Squeeze), 1),
    (|step| matches!(step, Step::Wake), 2),
    (|step| matches!(step, Step::Commit), 2),
    (|step| matches!(step, Step::Crash), 1),
];

struct Small {
    world: World,
    state: PartitionState,
    other: LaneAccount,
    pressure: Option<Charge>,
}

impl Small {
    /// `keys`: lane and user of each record.
    fn new(keys: &[(usize, usize)]) -> Self {
        let mut world = World::new(0, small());
        for (record, (lane, user)) in world.log.iter_mut().zip(keys) {
            record.headers = Headers::new();
            record.headers.push_text(header::DESTINATION, ["d0", "d3"][*lane]);
            record.headers.push_text(header::USER, &format!("u{user}"));
        }
        world.log.truncate(keys.len());
        let (state, other) = Self::restore(&mut world);
        let mut small = Self { world, state, other, pressure: None };
        small.start();
        small
    }

    fn restore(world: &mut World) -> (PartitionState, LaneAccount) {
        let memory = Memory::new(&world.settings.bounds);
        let other = memory.account(&world.settings.bounds).lane(Arc::default());
        (world.restore_in(memory), other)
    }

    /// As a worker does after each of its steps.
    fn start(&mut self) {
        let before = |world: &World| (world.in_flight.len(), world.fetch.len(), world.scan.is_some());
        loop {
            let now = before(&self.world);
            self.world.start(&mut self.state);
            if before(&self.world) == now {
                return;
            }
        }
    }

    fn enabled(&self, path: &[Step]) -> Vec<Step> {
        let world = &self.world;
        let mut steps = Vec::new();
        let has_more = world.log.last().is_some_and(|last| self.state.live() <= last.offset);
        steps.extend(has_more.then_some(Step::Read));
        for at in 0..world.in_flight.len() {
            steps.extend([Step::Settle(at, true), Step::Settle(at, false)]);
        }
        steps.extend(world.scan.is_some().then_some(Step::Bring));
        steps.extend((0..world.fetch.len()).map(Step::Fetched));
        steps.push(if self.pressure.is_some() { Step::Release } else { Step::Squeeze });
        steps.extend(self.state.next_timer().map(|_| Step::Wake));
        steps.extend([Step::Commit, Step::Crash]);
        steps.retain(|step| {
            MOST.iter().all(|(is, most)| !is(step) || path.iter().filter(|done| is(done)).count() < *most)
        });
        steps
    }

    fn take(&mut self, step: Step) {
        let Self { world, state, .. } = self;
        match step {
            Step::Read if state.has_room() => {
                let next = world.log.partition_point(|record| record.offset < state.live());
                let batch = world.log[next..].iter().take(1).cloned().collect();
                state.admit_all(batch, world.now);
            }
            Step::Read => state.shed(world.now),
            Step::Settle(at, delivered) => world.settle_one(state, at, |_| match delivered {
                true => Verdict::Delivered { code: 200 },
                false => Verdict::Retry { code: 500, message: "no".into(), not_before: None },
            }),
            Step::Bring => world.bring_scan(state, 1),
            Step::Fetched(at) => {
                let (key, offset) = world.fetch.remove(at);
                let record = world.log.iter().find(|record| record.offset == offset).cloned();
                state.fetched(&key, offset, record, world.now);
            }
            Step::Squeeze => {
                self.pressure = Some(self.other.charge(world.settings.bounds.process_bytes));
                state.shed(world.now);
            }
            Step::Release => self.pressure = None,
            Step::Wake => {
                world.now = world.now.max(state.next_timer().unwrap_or_default());
                state.wake(world.now);
            }
            Step::Commit => world.commit(state, true),
            Step::Crash => {
                world.crashes += 1;
                self.pressure = None;
                (self.state, self.other) = Self::restore(&mut self.world);
            }
        }
        self.start();
    }

    /// Everything that decides what can happen next.
    fn fingerprint(&self) -> u128 {
        let (world, state) = (&self.world, &self.state);
        let mut text = describe(state);
        let open = |window: &Window| (window.base(), window.live(), window.runs(), window.open().collect::<Vec<_>>());
        text += &format!("{:?} {:?}", open(&state.window), state.cursors.summary());
        for index in 0..state.lanes.len() {
            let lane = state.lanes.at(index);
            let detached =
                lane.detached.as_ref().map(|it| (open(&it.window), it.scan, it.cursor, it.full_since.is_some()));
            text += &format!("{detached:?} {} {}", lane.shut, lane.recorded);
            for key in lane.keys.values() {
                let items: Vec<_> = key.items().map(|item| (item.place.is_some(), item.record().is_some())).collect();
                text += &format!("{items:?} {} {} {} {}", key.is_held(), key.recorded, key.careful, key.in_flight());
            }
        }
        let flights: Vec<_> = world.in_flight.iter().map(|flight| &flight.offsets).collect();
        let scan = world.scan.as_ref().map(|scan| (scan.cursor, scan.from, scan.until));
        let fetches: Vec<Offset> = world.fetch.iter().map(|(_, offset)| *offset).collect();
        text += &format!("{flights:?} {scan:?} {fetches:?} {:?} {:?}", self.pressure.is_some(), world.committed);
        text += &format!("{:?} {:?} {:?}", world.final_here, world.final_committed, world.stored);
        xxh3_128(text.as_bytes())
    }

    fn verify(&self) -> Result<(), String> {
        self.state.check()?;
        let pending = self.world.cover_counts(&self.state);
        for (record, count) in self.world.log.iter().zip(pending) {
            let is_pending = record.offset < self.state.frontier() && !self.world.final_here.contains(&record.offset);
            if count != usize::from(is_pending) {
                return Err(format!("{} is covered {count} times; pending: {is_pending}", record.offset));
            }
        }
        Ok(())
    }

    /// Without further faults everything ends.
    fn rest(&mut self) -> Result<(), String> {
        self.pressure = None;
        for _ in 0..400 {
            for step in [Step::Read, Step::Bring, Step::Fetched(0), Step::Settle(0, true), Step::Wake, Step::Commit] {
                if self.enabled(&[]).contains(&step) {
                    self.take(step);
                }
            }
            let is_read = self.world.log.last().is_some_and(|last| self.state.live() > last.offset);
            if self.state.pending == 0 && is_read {
                return Ok(());
            }
        }
        Err(format!("it does not come to rest: {}", describe(&self.state)))
    }
}

fn small() -> Bounds {
    Bounds {
        key_bytes: 10_000,
        key_records: 2,
        listed_followers: 0,
        mark_bytes: 2,
        lane_bytes: 4_000,
        down_lane_bytes: 4_000,
        probes: 2,
        lane_floor_bytes: 0,
        partition_bytes: 40_000,
        process_bytes: 60_000,
        held_bytes: 4_000,
        held_reserve_keys: 1,
        holes: 2,
        attach: 2,
        window_records: 5,
        cursors: 2,
        process_cursors: 1,
        near: 2,
        uncommitted: 3,
        uncommitted_bytes: 3_000,
        fetches: 1,
        turn_bytes: 500,
    }
}

/// Explores what follows `path`. Returns an error with the path that leads to it.
fn explore(keys: &[(usize, usize)], path: &mut Vec<Step>, depth: usize, seen: &mut HashMap<u128, usize>) {
    let mut here = Small::new(keys);
    path.iter().for_each(|step| here.take(*step));
    let verified = here.verify();
    assert!(verified.is_ok(), "{keys:?} {path:?}: {verified:?}\n{}", describe(&here.state));
    let fingerprint = here.fingerprint();
    if seen.get(&fingerprint).is_some_and(|left| *left >= depth) {
        return;
    }
    let steps = here.enabled(path);
    if seen.insert(fingerprint, depth).is_none() && fingerprint.is_multiple_of(REST_EVERY) {
        let rested = here.rest();
        assert!(rested.is_ok(), "{keys:?} {path:?}: {rested:?}");
    }
    drop(here);
    if depth == 0 {
        return;
    }
    for step in steps {
        path.push(step);
        explore(keys, path, depth - 1, seen);
        path.pop();
    }
}

#[test]
fn every_interleaving_of_a_few_inputs_keeps_the_invariants() {
    let depth = std::env::var("EXHAUSTIVE_DEPTH").ok().and_then(|depth| depth.parse().ok()).unwrap_or(MAX_DEPTH);
    let layouts: [(&[(usize, usize)], usize); 3] = [
        // One user's hot queue has few interleavings, and its states lie deep.
        (&[(0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0)], depth + 3),
        (&[(0, 0), (0, 1), (0, 0), (1, 0), (0, 0), (0, 1)], depth),
        (&[(0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 0)], depth),
    ];
    let mut states = 0;
    for (keys, depth) in layouts {
        let mut seen = HashMap::new();
        explore(keys, &mut Vec::new(), depth, &mut seen);
        println!("{keys:?}: {} states to a depth of {depth}", seen.len());
        states += seen.len();
    }
    assert!(states > 1_000, "the search goes somewhere: {states}");
}
