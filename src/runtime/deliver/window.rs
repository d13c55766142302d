//! Which records between the lowest unfinished one and the place of reading are finished. A partition has one for what live
//! reading brings, a detached lane one of its own for what its cursor brings.
//!
//! A record that a key's mark covers counts as finished here.

use std::collections::{BTreeMap, VecDeque};

use crate::model::progress::Run;
use crate::model::record::Offset;

/// A record's place in the window: a running number, not an offset. Neighbours have neighbouring numbers whatever gaps the
/// offsets have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place(u64);

/// Where a record stands in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Located {
    Finished,
    Open(Place),
    /// The window has not come to it yet.
    Ahead,
}

pub struct Window {
    /// Offsets and lanes of the records from `front` on. Two lists, since together they would cost 32 bytes instead of 20.
    offsets: VecDeque<Offset>,
    lanes: VecDeque<u32>,
    front: u64,
    live: Offset,
    /// Finished stretches, by first and last place.
    runs: BTreeMap<u64, u64>,
    /// Stretches that were finished before, still ahead.
    skip: VecDeque<Run>,
}

impl Window {
    /// A window that begins at `live`, passing over `skip`.
    pub fn new(live: Offset, skip: Vec<Run>) -> Self {
        let (offsets, lanes) = (VecDeque::new(), VecDeque::new());
        Self { offsets, lanes, front: 0, live, runs: BTreeMap::new(), skip: skip.into() }
    }

    /// Takes the next record in; none where it is finished already. Offsets rise.
    pub fn push(&mut self, offset: Offset, lane: u32) -> Option<Place> {
        let place = self.append(offset, lane);
        while self.skip.front().is_some_and(|run| run.last < offset) {
            self.skip.pop_front();
        }
        if self.skip.front().is_some_and(|run| run.first <= offset) {
            self.finish(place);
            return None;
        }
        Some(place)
    }

    fn append(&mut self, offset: Offset, lane: u32) -> Place {
        let place = self.front + self.offsets.len() as u64;
        self.offsets.push_back(offset);
        self.lanes.push_back(lane);
        self.live = offset.just_after();
        Place(place)
    }

    pub fn finish(&mut self, place: Place) {
        let (mut first, mut last) = (place.0, place.0);
        if let Some((&start, &end)) = self.runs.range(..place.0).next_back()
            && end + 1 == place.0
        {
            first = start;
        }
        if let Some(&end) = self.runs.get(&(place.0 + 1)) {
            last = end;
            self.runs.remove(&(place.0 + 1));
        }
        self.runs.insert(first, last);
        self.advance();
    }

    /// Forgets the finished stretch at the front.
    fn advance(&mut self) {
        if let Some(last) = self.runs.remove(&self.front) {
            let count = (last + 1 - self.front) as usize;
            self.offsets.drain(..count);
            self.lanes.drain(..count);
            self.front = last + 1;
            // A burst leaves no memory behind.
            if self.offsets.capacity() > 4_096 && self.offsets.len() * 4 < self.offsets.capacity() {
                self.offsets.shrink_to(self.offsets.len() * 2);
                self.lanes.shrink_to(self.lanes.len() * 2);
            }
        }
    }

    /// Nothing more of this window's will come below `to`.
    pub fn read_until(&mut self, to: Offset) {
        self.live = self.live.max(to);
    }

    pub fn locate(&self, offset: Offset) -> Located {
        if offset >= self.live {
            return Located::Ahead;
        }
        match self.offsets.binary_search(&offset) {
            Ok(index) => {
                let place = self.front + index as u64;
                if self.is_finished(place) { Located::Finished } else { Located::Open(Place(place)) }
            }
            Err(_) => Located::Finished,
        }
    }

    fn is_finished(&self, place: u64) -> bool {
        self.runs.range(..=place).next_back().is_some_and(|(_, last)| *last >= place)
    }

    /// Takes a lane's records out into a window of their own. Here they count as finished from now on.
    pub fn split(&mut self, lane: u32) -> Window {
        let mut own = Window::new(self.live, self.skip.iter().copied().collect());
        let mut open = Vec::new();
        for (index, of) in self.lanes.iter().enumerate() {
            if *of != lane {
                continue;
            }
            let place = self.front + index as u64;
            let finished = self.is_finished(place);
            if finished && own.is_empty() {
                continue;
            }
            let own_place = own.append(self.offsets[index], 0);
            match finished {
                true => own.finish(own_place),
                false => open.push(Place(place)),
            }
        }
        own.live = self.live;
        for place in open {
            self.finish(place);
        }
        own
    }

    /// The lowest unfinished offset; where there is none, where reading goes on.
    pub fn base(&self) -> Offset {
        self.offsets.front().copied().unwrap_or(self.live)
    }

    /// The lane of the lowest unfinished record.
    pub fn base_lane(&self) -> Option<usize> {
        self.lanes.front().map(|lane| *lane as usize)
    }

    pub fn live(&self) -> Offset {
        self.live
    }

    /// Above it nothing is known to be finished.
    pub fn known_until(&self) -> Offset {
        self.skip.back().map_or(self.live, |run| self.live.max(run.last.just_after()))
    }

    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// The pending records, with the lane that each was pushed for.
    #[cfg(any(test, debug_assertions))]
    pub fn open(&self) -> impl Iterator<Item = (Offset, usize)> {
        let places = self.offsets.iter().zip(&self.lanes).zip(self.front..);
        places.filter(|(_, place)| !self.is_finished(*place)).map(|((offset, lane), _)| (*offset, *lane as usize))
    }

    /// The pending records from `from` up to `to`, without it.
    pub fn open_between(&self, from: Offset, to: Offset) -> Vec<(Offset, Place)> {
        let first = self.offsets.partition_point(|offset| *offset < from);
        let places = (self.front + first as u64..).zip(self.offsets.range(first..));
        let within = places.take_while(|(_, offset)| **offset < to);
        within.filter(|(place, _)| !self.is_finished(*place)).map(|(place, offset)| (*offset, Place(place))).collect()
    }

    /// How many stretches the progress record has to name.
    pub fn holes(&self) -> usize {
        self.runs.len()
    }

    /// The finished stretches above `base`, by offsets, both ends included; those still ahead too, or a second crash would
    /// have their records read again.
    pub fn runs(&self) -> Vec<Run> {
        let offset = |place: u64| self.offsets[(place - self.front) as usize];
        let mut runs: Vec<Run> =
            self.runs.iter().map(|(first, last)| Run { first: offset(*first), last: offset(*last) }).collect();
        let ahead = self.skip.iter().filter(|run| run.last >= self.live);
        runs.extend(ahead.map(|run| Run { first: run.first.max(self.live), last: run.last }));
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offsets(runs: Vec<Run>) -> Vec<(u128, u128)> {
        runs.into_iter().map(|run| (run.first.raw(), run.last.raw())).collect()
    }

    fn push(window: &mut Window, offset: u128) -> Place {
        window.push(Offset::new(offset), 0).expect("not skipped")
    }

    #[test]
    fn base_follows_the_lowest_unfinished_record_over_gaps() {
        let mut window = Window::new(Offset::new(10), Vec::new());
        assert_eq!(window.base(), Offset::new(10), "nothing taken yet");
        let places: Vec<Place> = [10, 11, 15, 16, 40].map(|offset| push(&mut window, offset)).into();
        window.finish(places[1]);
        window.finish(places[2]);
        window.finish(places[4]);
        assert_eq!((window.base().raw(), offsets(window.runs())), (10, vec![(11, 15), (40, 40)]));
        window.finish(places[0]);
        assert_eq!((window.base().raw(), offsets(window.runs())), (16, vec![(40, 40)]));
        window.finish(places[3]);
        assert_eq!((window.base().raw(), window.len(), window.holes()), (41, 0, 0));
    }

    #[test]
    fn any_order_of_finishing_ends_empty() {
        for seed in 0..50_u64 {
            let mut window = Window::new(Offset::START, Vec::new());
            let mut places: Vec<Place> = (0..100_u128).map(|n| push(&mut window, n * 3)).collect();
            let mut state = seed;
            while !places.is_empty() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let place = places.swap_remove((state >> 33) as usize % places.len());
                window.finish(place);
                let unfinished = places.iter().map(|place| u128::from(place.0) * 3).min();
                assert_eq!(window.base().raw(), unfinished.unwrap_or(298));
            }
            assert_eq!(window.holes(), 0);
        }
    }

    #[test]
    fn what_was_finished_before_is_passed_over_and_told_on() {
        let runs = vec![
            Run { first: Offset::new(2), last: Offset::new(3) },
            Run { first: Offset::new(6), last: Offset::new(9) },
        ];
        let mut window = Window::new(Offset::new(1), runs);
        assert_eq!(window.known_until(), Offset::new(10));
        push(&mut window, 1);
        assert_eq!(window.push(Offset::new(2), 0), None);
        push(&mut window, 4);
        assert_eq!(offsets(window.runs()), [(2, 2), (6, 9)]);
        assert_eq!(window.push(Offset::new(7), 0), None);
        assert_eq!(offsets(window.runs()), [(2, 2), (7, 7), (8, 9)]);
    }

    #[test]
    fn a_lane_leaves_with_what_is_finished_and_what_is_not() {
        let mut window = Window::new(Offset::START, vec![Run { first: Offset::new(50), last: Offset::new(51) }]);
        let places: Vec<Place> = [(1, 0), (2, 1), (3, 0), (4, 1), (5, 1), (6, 0)]
            .map(|(offset, lane)| window.push(Offset::new(offset), lane).expect("open"))
            .into();
        window.finish(places[1]);
        window.finish(places[4]);
        let own = window.split(1);
        assert_eq!((own.base().raw(), own.len(), offsets(own.runs())), (4, 2, vec![(5, 5), (50, 51)]));
        assert_eq!(own.locate(Offset::new(2)), Located::Finished);
        assert!(matches!(own.locate(Offset::new(4)), Located::Open(_)));
        assert_eq!(own.locate(Offset::new(5)), Located::Finished);
        assert_eq!(own.locate(Offset::new(7)), Located::Ahead);
        assert_eq!(own.live(), window.live());
        assert_eq!(offsets(window.runs()), [(2, 2), (4, 5), (50, 51)], "only the other lane holds the base back");
    }
}
