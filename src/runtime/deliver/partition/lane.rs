//! The lanes of a partition and whose turn it is: deficit round robin over destinations, in bytes.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use indexmap::IndexMap;

use crate::clock::Timestamp;
use crate::model::progress::{Lane, Ledger};
use crate::model::record::Offset;

use super::super::destination::{Destination, Permit, Refused};
use super::super::key::{Activity, Item, Key};
use super::super::memory::{Account, LaneAccount};
use super::super::window::Window;
use super::KeyId;

/// A lane whose destination has used up its memory for held keys is asked again after this: the end of held keys in other
/// partitions wakes nobody here.
const HELD_RETRY_INTERVAL: Duration = Duration::from_millis(500);

pub struct Lanes {
    /// Bytes that a lane may send before it is another's turn.
    turn_bytes: usize,
    all: Vec<LaneState>,
    index: HashMap<Lane, usize>,
    /// Lanes with ready keys, in turn.
    turns: VecDeque<usize>,
    /// Lanes whose ledger changed.
    counted: BTreeSet<usize>,
    pub detached: BTreeSet<usize>,
}

/// What is known of one lane.
pub struct LaneState {
    pub lane: Lane,
    pub destination: Arc<Destination>,
    /// In the order in which they came, so that equal runs go equal ways.
    pub keys: IndexMap<Arc<str>, Key>,
    /// Keys that may send: held ones, and others. They take turns, so that neither has to wait for all of the other.
    ready: [VecDeque<Arc<str>>; 2],
    next_ready: usize,
    in_turn: bool,
    /// Refused until an alarm.
    pub shut: bool,
    deficit: usize,
    pub ledger: Ledger,
    /// Of its records and keys in memory.
    pub account: LaneAccount,
    /// Keys whose head has failed.
    pub failing: usize,
    /// Records in queues of keys that are not held: in the window, and in memory.
    pub unfinished: usize,
    pub detached: Option<Detached>,
    /// A progress record of it is in the log.
    pub recorded: bool,
    /// When the oldest known unfinished record was written, or one before it.
    pub oldest: Timestamp,
}

/// A lane that a cursor feeds.
pub struct Detached {
    /// Covers all unfinished records of the lane but those of held keys.
    pub window: Window,
    /// Everything below has been handed over.
    pub scan: Offset,
    pub cursor: Option<u64>,
    /// Since when it could go on and has no cursor.
    pub asked_at: Option<Timestamp>,
    pub joined_at: Timestamp,
    /// So long it has made its cursor wait, and since when it does.
    pub blocked_millis: u64,
    pub full_since: Option<Timestamp>,
    /// The cursor that it held up, and left for a slower one.
    pub moved_from: Option<u64>,
}

/// Something is ready, but its destination may have no more requests now.
pub struct NoPermit;

impl Lanes {
    pub fn new(turn_bytes: usize) -> Self {
        Self {
            turn_bytes,
            all: Vec::new(),
            index: HashMap::new(),
            turns: VecDeque::new(),
            counted: BTreeSet::new(),
            detached: BTreeSet::new(),
        }
    }

    pub fn find(&self, lane: &Lane) -> Option<usize> {
        self.index.get(lane).copied()
    }

    pub fn open(&mut self, lane: Lane, destination: Arc<Destination>, account: LaneAccount) -> usize {
        self.all.push(LaneState {
            lane: lane.clone(),
            destination,
            keys: IndexMap::new(),
            ready: Default::default(),
            next_ready: 0,
            in_turn: false,
            shut: false,
            deficit: 0,
            ledger: Ledger::default(),
            account,
            failing: 0,
            unfinished: 0,
            detached: None,
            recorded: false,
            oldest: Timestamp::default(),
        });
        self.index.insert(lane, self.all.len() - 1);
        self.all.len() - 1
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn has_turns(&self) -> bool {
        !self.turns.is_empty()
    }

    pub fn at(&self, index: usize) -> &LaneState {
        &self.all[index]
    }

    pub fn at_mut(&mut self, index: usize) -> &mut LaneState {
        &mut self.all[index]
    }

    pub fn key(&self, id: &KeyId) -> Option<&Key> {
        self.all[id.lane].keys.get(&id.user)
    }

    /// For [`super::PartitionState::change_key`] and the ready queues only.
    pub fn key_mut(&mut self, id: &KeyId) -> Option<&mut Key> {
        self.all[id.lane].keys.get_mut(&id.user)
    }

    /// A lane's ledger, to be changed.
    pub fn ledger(&mut self, index: usize) -> &mut Ledger {
        self.counted.insert(index);
        &mut self.all[index].ledger
    }

    /// The lanes whose ledgers changed since this was asked last.
    pub fn take_counted(&mut self) -> BTreeSet<usize> {
        std::mem::take(&mut self.counted)
    }

    /// Puts a key into its lane's ready queue.
    pub fn push(&mut self, id: &KeyId, first: bool) {
        let lane = &mut self.all[id.lane];
        let Some(key) = lane.keys.get_mut(&id.user) else { return };
        key.make_ready();
        let ready = &mut lane.ready[usize::from(!key.is_held())];
        match first {
            true => ready.push_front(Arc::clone(&id.user)),
            false => ready.push_back(Arc::clone(&id.user)),
        }
        self.rouse(id.lane);
    }

    /// Forgets who is ready: those that are left are pushed again.
    pub fn clear_ready(&mut self, index: usize) {
        self.all[index].ready = Default::default();
    }

    /// The lane joins the round if it has a ready key and is not shut.
    pub fn rouse(&mut self, index: usize) {
        let lane = &mut self.all[index];
        if lane.shut || lane.in_turn || lane.ready.iter().all(VecDeque::is_empty) {
            return;
        }
        lane.in_turn = true;
        self.turns.push_back(index);
    }

    /// The next key that may send, with its permit, as far as there is memory for what it may come to need. Lanes that
    /// may not send for a while leave the round and are told by `shut`, with the time when they are to be roused.
    pub fn next(
        &mut self,
        now: Timestamp,
        memory: &Account,
        mut shut: impl FnMut(usize, Timestamp),
    ) -> Option<Result<(KeyId, Permit), NoPermit>> {
        let mut refused = 0;
        while refused < self.turns.len() {
            let index = *self.turns.front()?;
            let lane = &mut self.all[index];
            let Some((queue, cost)) = lane.next_ready(!lane.may_start(memory)) else {
                let waits = lane.ready.iter().any(|ready| !ready.is_empty());
                self.leave_turn(index);
                if waits {
                    self.all[index].shut = true;
                    shut(index, now.plus(HELD_RETRY_INTERVAL));
                }
                continue;
            };
            if lane.deficit < cost {
                lane.deficit += self.turn_bytes;
                // Whoever is refused may be looked at again on the way: only a whole round of refusals counts.
                refused = 0;
                self.turns.rotate_left(1);
                continue;
            }
            if !memory.may_send(&lane.account) {
                refused += 1;
                self.turns.rotate_left(1);
                continue;
            }
            match lane.destination.try_start(now) {
                Ok(permit) => {
                    lane.deficit -= cost;
                    lane.next_ready = 1 - queue;
                    return lane.ready[queue].pop_front().map(|user| Ok((KeyId { lane: index, user }, permit)));
                }
                Err(Refused::Permits) => {
                    refused += 1;
                    self.turns.rotate_left(1);
                }
                Err(Refused::Until(at)) => {
                    self.leave_turn(index);
                    self.all[index].shut = true;
                    shut(index, at);
                }
            }
        }
        (!self.turns.is_empty()).then_some(Err(NoPermit))
    }

    /// The lane in front leaves the round.
    fn leave_turn(&mut self, index: usize) {
        self.all[index].in_turn = false;
        self.all[index].deficit = 0;
        self.turns.pop_front();
    }
}

impl LaneState {
    /// Keys that are not held may start. Where none of its keys fails, the held ones may wait for the lane to come by: they must
    /// not keep it from that.
    pub fn may_start(&self, memory: &Account) -> bool {
        self.failing == 0 || memory.may_hold(&self.account)
    }

    /// As [`Self::may_start`], and for many: it is worth reading for.
    pub fn may_start_many(&self, memory: &Account) -> bool {
        self.failing == 0 || memory.may_hold_many(&self.account)
    }

    /// Which ready queue is next, and the weight of the record in front of it. Keys that were forgotten since are dropped.
    fn next_ready(&mut self, only_held: bool) -> Option<(usize, usize)> {
        for queue in [self.next_ready, 1 - self.next_ready] {
            if queue == 1 && only_held {
                continue;
            }
            while let Some(user) = self.ready[queue].front() {
                match self.keys.get(user).filter(|key| key.activity() == Activity::Ready) {
                    Some(key) => return Some((queue, key.front().map_or(0, Item::weight))),
                    None => drop(self.ready[queue].pop_front()),
                }
            }
        }
        None
    }

    /// A ready key is in a ready queue, and a lane with ready keys is in the round or shut.
    #[cfg(any(test, debug_assertions))]
    pub fn check_turn(&self) -> Result<(), String> {
        for (user, key) in self.keys.iter().filter(|(_, key)| key.activity() == Activity::Ready) {
            if !self.ready[usize::from(!key.is_held())].contains(user) {
                return Err(format!("key {user} is ready and in no ready queue"));
            }
            if !self.in_turn && !self.shut {
                return Err("it has ready keys, and has no turn".to_owned());
            }
        }
        Ok(())
    }
}
