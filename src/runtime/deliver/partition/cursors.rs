//! The cursors of a partition: where each is, which lanes and keys it serves, and which wait for one.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::record::{Offset, Record};

use super::KeyId;

pub type CursorId = u64;

#[derive(Debug, Default)]
pub struct Cursors {
    pub open: BTreeMap<CursorId, Cursor>,
    pub last_id: CursorId,
    /// One is read at a time, so that live reading keeps its half.
    pub reading: Option<CursorId>,
    /// Whose turn it was.
    pub turn: CursorId,
    pub closed: Vec<CursorId>,
    /// Who may want a cursor.
    pub asking: BTreeSet<Seeker>,
    /// Who wants one and found none.
    pub stuck: BTreeSet<Seeker>,
    pub alarm_set: bool,
}

#[derive(Debug)]
pub struct Cursor {
    pub position: Offset,
    pub lanes: BTreeSet<usize>,
    pub keys: BTreeSet<KeyId>,
    /// Lanes that have to end something before they take more.
    pub full: BTreeSet<usize>,
    /// What has been read and not been handed over: the rest of a stretch in which a lane became full.
    pub ahead: Vec<Record>,
}

/// What a cursor does next.
pub enum Step {
    Read(CursorId, Offset),
    HandOver(CursorId, Vec<Record>),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Seeker {
    Lane(usize),
    Key(KeyId),
}

impl Cursors {
    pub fn ask_lane(&mut self, index: usize) {
        self.asking.insert(Seeker::Lane(index));
    }

    /// It wants to go on, but not before others have had time to end something.
    pub fn ask_lane_later(&mut self, index: usize) {
        self.stuck.insert(Seeker::Lane(index));
    }

    pub fn ask_key_later(&mut self, id: &KeyId) {
        self.stuck.insert(Seeker::Key(id.clone()));
    }

    pub fn ask_key(&mut self, id: &KeyId) {
        self.asking.insert(Seeker::Key(id.clone()));
    }

    pub fn leave_key(&mut self, cursor: CursorId, id: &KeyId) {
        if let Some(open) = self.open.get_mut(&cursor) {
            open.keys.remove(id);
        }
        self.close_if_empty(cursor);
    }

    pub fn leave_lane(&mut self, cursor: CursorId, index: usize) {
        if let Some(open) = self.open.get_mut(&cursor) {
            open.lanes.remove(&index);
            open.full.remove(&index);
        }
        self.close_if_empty(cursor);
    }

    pub fn close_if_empty(&mut self, cursor: CursorId) {
        let is_empty = |open: &Cursor| open.lanes.is_empty() && open.keys.is_empty();
        // One that is being read is closed when that has ended.
        if self.reading != Some(cursor) && self.open.get(&cursor).is_some_and(is_empty) {
            self.open.remove(&cursor);
            self.closed.push(cursor);
        }
    }

    pub fn position(&self, cursor: Option<CursorId>) -> Offset {
        cursor.and_then(|cursor| self.open.get(&cursor)).map_or(Offset::START, |open| open.position)
    }

    pub fn count(&self) -> usize {
        self.open.len()
    }

    /// The lane or key is served by this cursor; or, without one, it has asked for one or waits for one.
    #[cfg(any(test, debug_assertions))]
    pub fn knows_lane(&self, index: usize, cursor: Option<CursorId>) -> bool {
        match cursor.map(|cursor| self.open.get(&cursor)) {
            Some(open) => open.is_some_and(|open| open.lanes.contains(&index)),
            None => self.asks(&Seeker::Lane(index)),
        }
    }

    #[cfg(any(test, debug_assertions))]
    pub fn knows_key(&self, id: &KeyId, cursor: Option<CursorId>) -> bool {
        match cursor.map(|cursor| self.open.get(&cursor)) {
            Some(open) => open.is_some_and(|open| open.keys.contains(id)),
            None => self.asks(&Seeker::Key(id.clone())),
        }
    }

    /// Where each cursor is, whom it serves, and how much of it waits.
    #[cfg(test)]
    pub fn summary(&self) -> String {
        let open = self.open.iter().map(|(id, open)| {
            format!("{id} {} {:?} {:?} {:?} {}", open.position, open.lanes, open.keys, open.full, open.ahead.len())
        });
        let open: Vec<String> = open.collect();
        format!("{open:?} {:?} {} {:?} {:?}", self.reading, self.turn, self.asking, self.stuck)
    }

    #[cfg(any(test, debug_assertions))]
    pub fn asks(&self, seeker: &Seeker) -> bool {
        self.asking.contains(seeker) || self.stuck.contains(seeker)
    }

    /// Members of all cursors.
    #[cfg(any(test, debug_assertions))]
    pub fn members(&self) -> (usize, usize) {
        let count = |open: &Cursor| (open.lanes.len(), open.keys.len());
        self.open.values().map(count).fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1))
    }

    /// The next one that has something to read before `frontier`, and whose members can all take more.
    pub fn next(&mut self, frontier: Offset) -> Option<Step> {
        if self.reading.is_some() {
            return None;
        }
        let can = |(_, open): &(&CursorId, &Cursor)| open.full.is_empty() && open.position < frontier;
        let behind = self.open.range(self.turn + 1..).find(can).map(|(id, _)| *id);
        let id = behind.or_else(|| self.open.range(..=self.turn).find(can).map(|(id, _)| *id))?;
        let open = self.open.get_mut(&id)?;
        self.turn = id;
        if !open.ahead.is_empty() {
            return Some(Step::HandOver(id, std::mem::take(&mut open.ahead)));
        }
        self.reading = Some(id);
        Some(Step::Read(id, open.position))
    }
}
