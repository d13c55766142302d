//! The lanes of a partition and whose turn it is: deficit round robin over destinations, in bytes.

use std::collections::{HashMap, VecDeque};

use crate::model::id::DestinationId;
use crate::model::progress::{Lane, Ledger};

use super::super::permits::{Permit, Permits};
use super::KeyId;

/// What a lane may send before it is another's turn.
const QUANTUM: usize = 16 << 10;

#[derive(Default)]
pub struct Lanes {
    all: Vec<LaneState>,
    index: HashMap<Lane, usize>,
    /// Lanes with ready keys, in turn.
    turns: VecDeque<usize>,
}

struct LaneState {
    lane: Lane,
    ready: VecDeque<KeyId>,
    in_turn: bool,
    deficit: usize,
    ledger: Ledger,
    counted: bool,
}

/// Something is ready, but its destination may have no more requests now.
pub struct NoPermit;

impl Lanes {
    pub fn index(&mut self, lane: &Lane) -> usize {
        if let Some(index) = self.index.get(lane) {
            return *index;
        }
        self.all.push(LaneState {
            lane: lane.clone(),
            ready: VecDeque::new(),
            in_turn: false,
            deficit: 0,
            ledger: Ledger::default(),
            counted: false,
        });
        self.index.insert(lane.clone(), self.all.len() - 1);
        self.all.len() - 1
    }

    pub fn restore(&mut self, lane: Lane, ledger: Ledger) {
        let index = self.index(&lane);
        self.all[index].ledger = ledger;
    }

    pub fn lane(&self, index: usize) -> &Lane {
        &self.all[index].lane
    }

    /// A lane's ledger, to be changed.
    pub fn ledger(&mut self, index: usize) -> &mut Ledger {
        self.all[index].counted = true;
        &mut self.all[index].ledger
    }

    pub fn count(&mut self, index: usize, outcome: &str) -> &DestinationId {
        let ledger = self.ledger(index);
        match outcome {
            "delivered" => ledger.delivered += 1,
            "filtered" => ledger.filtered += 1,
            _ => ledger.aborted += 1,
        }
        &self.all[index].lane.destination
    }

    /// The ledgers that changed since this was asked last.
    pub fn take_counted(&mut self) -> Vec<(Lane, Ledger)> {
        let mut counted = Vec::new();
        for state in &mut self.all {
            if std::mem::take(&mut state.counted) {
                counted.push((state.lane.clone(), state.ledger));
            }
        }
        counted
    }

    /// Puts a key into its lane's ready queue.
    pub fn push(&mut self, key: KeyId, first: bool) {
        let index = key.lane;
        let state = &mut self.all[index];
        match first {
            true => state.ready.push_front(key),
            false => state.ready.push_back(key),
        }
        if !std::mem::replace(&mut state.in_turn, true) {
            self.turns.push_back(index);
        }
    }

    /// Takes a key out of its ready queue.
    pub fn take_back(&mut self, key: &KeyId) {
        self.all[key.lane].ready.retain(|ready| ready != key);
    }

    /// The next key that may send, with its permit. `cost` is the weight of its next record.
    pub fn next(
        &mut self,
        cost: impl Fn(&KeyId) -> usize,
        permits: &Permits,
    ) -> Option<Result<(KeyId, Permit), NoPermit>> {
        let mut refused = 0;
        while refused < self.turns.len() {
            let index = *self.turns.front()?;
            let state = &mut self.all[index];
            let Some(key) = state.ready.front() else {
                state.in_turn = false;
                state.deficit = 0;
                self.turns.pop_front();
                continue;
            };
            let cost = cost(key);
            if state.deficit < cost {
                state.deficit += QUANTUM;
                // Whoever is refused may be looked at again on the way: only a whole round of refusals counts.
                refused = 0;
                self.turns.rotate_left(1);
                continue;
            }
            match permits.try_acquire(&state.lane.destination) {
                Some(permit) => {
                    state.deficit -= cost;
                    return state.ready.pop_front().map(|key| Ok((key, permit)));
                }
                None => {
                    refused += 1;
                    self.turns.rotate_left(1);
                }
            }
        }
        (!self.turns.is_empty()).then_some(Err(NoPermit))
    }
}
