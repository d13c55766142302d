//! The log deletes what has not been read again: what nobody can send any more is counted, and nothing waits for it.

use super::*;

const STEPS: usize = 400;

impl World {
    fn step(&mut self, state: &mut PartitionState) {
        match self.random.random_range(0..100) {
            0..25 => self.read(state),
            25..50 => self.start(state),
            50..65 => self.bring(state),
            65..85 => self.settle(state, false),
            85..90 => {
                self.now = self.now.plus(Duration::from_millis(self.random.random_range(1..3_000)));
                state.wake(self.now);
            }
            90..98 => self.commit(state, true),
            _ => {
                let lane = self.random.random_range(0..LANES);
                if !self.down.remove(&lane) {
                    self.down.insert(lane);
                }
            }
        }
        self.verify(state);
    }

    /// The log keeps the second half.
    fn delete(&mut self) {
        let first = self.log[RECORDS / 2].offset;
        self.log.retain(|record| record.offset >= first);
    }
}

fn deletes(is_owner_new: bool) -> u64 {
    let mut deleted = 0;
    for seed in 0..100 {
        let mut world = World::new(seed, near());
        let mut state = world.restore();
        (0..STEPS).for_each(|_| world.step(&mut state));
        world.commit(&mut state, true);
        world.delete();
        if is_owner_new {
            world.crashes += 1;
            state = world.restore();
        }
        world.rest(&mut state);
        let ledger = world.ledger();
        assert_eq!(ledger.pending(), 0, "seed {seed}: {ledger:?}");
        assert_eq!(ledger.taken, ledger.ended(), "seed {seed}: {ledger:?}");
        let lost: Vec<_> = world.log.iter().filter(|record| !world.finals.contains_key(&record.offset)).collect();
        assert!(lost.is_empty(), "seed {seed}: {lost:?}");
        let without_letter = ledger.aborted.checked_sub(world.dead_letters as u64);
        deleted += without_letter.expect("no more letters than aborted ones");
        let end = world.log.last().map(|record| record.offset.just_after());
        assert_eq!(world.committed.map(|committed| committed.offset), end, "seed {seed}: the position is held back");
    }
    deleted
}

#[test]
fn what_was_deleted_while_no_owner_was_there_ends_as_aborted() {
    assert!(deletes(true) > 100);
}

#[test]
fn what_was_deleted_under_an_owner_ends_as_aborted() {
    assert!(deletes(false) > 100);
}
