//! The invariants of a partition's state, checked on the state in memory after every step in tests and in the simulation.
//!
//! Coverage itself (each pending record is covered by exactly one of memory, lane and key) needs to know which records are
//! pending; the tests that know it check it beside these.

use std::collections::{BTreeMap, HashSet};

use crate::clock::Timestamp;

use super::super::key::{Activity, Key, Rest};
use super::super::window::Located;
use super::lane::LaneState;
use super::{Alarm, KEY_BYTES, KeyId, PartitionState};

impl PartitionState {
    /// How many keys are in memory.
    pub fn keys(&self) -> usize {
        (0..self.lanes.len()).map(|index| self.lanes.at(index).keys.len()).sum()
    }

    /// # Errors
    /// Names the invariant that does not hold, and where.
    pub fn check(&self) -> Result<(), String> {
        let lanes = 0..self.lanes.len();
        let timers: Timers = self.alarms.iter().filter_map(|alarm| Timers::key(&alarm.0)).collect();
        for index in lanes.clone() {
            self.check_lane(index, self.lanes.at(index), &timers).map_err(|error| format!("lane {index}: {error}"))?;
        }
        let keys = || lanes.clone().flat_map(|index| self.lanes.at(index).keys.values());
        let count = |is: &dyn Fn(&Key) -> bool| keys().filter(|key| is(key)).count();
        same("keys with a parked rest", self.parked, count(&|key| key.rest() != Rest::None))?;
        same("keys whose head fails", self.failing, count(&|key| key.failing().is_some()))?;
        same("attempts in flight", self.in_flight, count(&|key| key.activity() == Activity::InFlight))?;
        let mut lows = BTreeMap::new();
        keys().filter_map(|key| key.low).for_each(|low| *lows.entry(low).or_default() += 1);
        same("the lowest offsets of held keys", &self.lows, &lows)?;
        let (records, held) = lanes
            .clone()
            .map(|index| &self.lanes.at(index).account)
            .fold((0, 0), |sum, lane| (sum.0 + lane.bytes(), sum.1 + lane.held()));
        self.account.check(records, held)?;
        let detached: Vec<usize> = lanes.clone().filter(|index| self.lanes.at(*index).detached.is_some()).collect();
        same("detached lanes", self.lanes.detached.iter().copied().collect::<Vec<_>>(), detached)?;
        let seated =
            lanes.clone().filter(|at| self.lanes.at(*at).detached.as_ref().is_some_and(|it| it.cursor.is_some()));
        let members = (seated.count(), count(&|key| key.rest().cursor().is_some()));
        same("members of cursors", self.cursors.members(), members)?;
        self.check_window()
    }

    /// What the partition's window covers is in the queue of a key of an attached lane.
    fn check_window(&self) -> Result<(), String> {
        for (offset, lane) in self.window.open() {
            let lane = self.lanes.at(lane);
            let is_queued = || lane.keys.values().any(|key| !key.is_held() && key.holds(offset));
            if lane.detached.is_some() || !is_queued() {
                return Err(format!("{offset} of {:?} is in the window and in no queue", lane.lane));
            }
        }
        Ok(())
    }

    fn check_lane(&self, index: usize, lane: &LaneState, timers: &Timers<'_>) -> Result<(), String> {
        for (user, key) in &lane.keys {
            let id = KeyId { lane: index, user: user.clone() };
            key.check()
                .and_then(|()| self.check_key(&id, key, timers))
                .map_err(|error| format!("key {user}: {error}"))?;
        }
        let placed = |key: &Key| key.items().filter(|item| item.place.is_some()).count();
        same("keys whose head fails", lane.failing, lane.keys.values().filter(|key| key.failing().is_some()).count())?;
        same("records in windows", lane.unfinished, lane.keys.values().map(placed).sum())?;
        let cost = |(user, key): (&std::sync::Arc<str>, &Key)| match key.is_held() {
            true => key.bytes(),
            false => key.bytes() + KEY_BYTES + user.len(),
        };
        same("bytes of records and keys", lane.account.bytes(), lane.keys.iter().map(cost).sum())?;
        same("bytes of held keys", lane.account.held(), lane.keys.values().map(Key::held_bytes).sum())?;
        lane.check_turn()?;
        let Some(detached) = &lane.detached else { return Ok(()) };
        let scan = self.lane_scan(index);
        let queued = |offset| lane.keys.values().any(|key| !key.is_held() && key.holds(offset));
        if let Some((offset, _)) = detached.window.open().find(|(offset, _)| *offset < scan && !queued(*offset)) {
            return Err(format!("{offset} is pending below the lane's scan position {scan} and in no queue"));
        }
        if lane.keys.is_empty() && !self.cursors.knows_lane(index, detached.cursor) {
            return Err("nothing of it is in memory, and no cursor is asked for".to_owned());
        }
        match detached.cursor.is_none() || self.cursors.knows_lane(index, detached.cursor) {
            true => Ok(()),
            false => Err(format!("cursor {:?} does not know it", detached.cursor)),
        }
    }

    fn check_key(&self, id: &KeyId, key: &Key, timers: &Timers<'_>) -> Result<(), String> {
        let lane = self.lanes.at(id.lane);
        let window = lane.detached.as_ref().map_or(&self.window, |detached| &detached.window);
        let stray =
            key.items().find(|item| item.place.is_some_and(|place| window.locate(item.offset) != Located::Open(place)));
        if let Some(item) = stray {
            return Err(format!("{} is queued and not in the window that covers it", item.offset));
        }
        let cursor = key.rest().cursor();
        if cursor.is_some() && !self.cursors.knows_key(id, cursor) {
            return Err(format!("cursor {cursor:?} does not know it"));
        }
        match (key.activity(), key.failing()) {
            (Activity::Idle, _) if cursor.is_none() && !self.cursors.knows_key(id, None) => {
                // Before its lane has read what an earlier owner had read, the lane asks for it.
                match self.key_frontier(id.lane) {
                    (_, false) => Ok(()),
                    (_, true) => Err("nothing of it is in memory, and no cursor is asked for".to_owned()),
                }
            }
            (Activity::Waiting, Some(failing)) => match timers.0.contains(&(failing.next_try_at, id)) {
                true => Ok(()),
                false => Err("it waits for its next attempt without a timer".to_owned()),
            },
            (Activity::Fetching, _) => {
                let is_wanted = key.front().is_some_and(|front| self.wanted.get(&front.offset) == Some(id));
                match is_wanted || self.fetching > 0 {
                    true => Ok(()),
                    false => Err("its record is not being read".to_owned()),
                }
            }
            _ => Ok(()),
        }
    }
}

/// When timers of keys are due.
struct Timers<'a>(HashSet<(Timestamp, &'a KeyId)>);

impl Timers<'_> {
    fn key((at, alarm): &(Timestamp, Alarm)) -> Option<(Timestamp, &KeyId)> {
        match alarm {
            Alarm::Key(id) => Some((*at, id)),
            Alarm::Lane(_) | Alarm::Seats => None,
        }
    }
}

impl<'a> FromIterator<(Timestamp, &'a KeyId)> for Timers<'a> {
    fn from_iter<I: IntoIterator<Item = (Timestamp, &'a KeyId)>>(timers: I) -> Self {
        Self(timers.into_iter().collect())
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, counted: T, there: T) -> Result<(), String> {
    if counted == there {
        return Ok(());
    }
    Err(format!("{what}: {counted:?} are counted, {there:?} are there"))
}
