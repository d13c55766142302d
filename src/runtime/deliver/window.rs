//! The live window of a partition: every record between the lowest one that memory covers and live reading, and which of them
//! are finished (or covered by a mark, which counts the same here).

use std::collections::{BTreeMap, VecDeque};

use crate::model::progress::Run;
use crate::model::record::Offset;

/// A record's place in the window: a running number, not an offset. Neighbours have neighbouring numbers whatever gaps the
/// offsets have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place(u64);

pub struct Window {
    /// Offsets of the records from `front` on.
    offsets: VecDeque<Offset>,
    front: u64,
    live: Offset,
    /// Finished stretches, by first and last place.
    runs: BTreeMap<u64, u64>,
}

impl Window {
    pub fn new(live: Offset) -> Self {
        Self { offsets: VecDeque::new(), front: 0, live, runs: BTreeMap::new() }
    }

    /// Takes the next record in. Offsets rise.
    pub fn push(&mut self, offset: Offset) -> Place {
        let place = self.front + self.offsets.len() as u64;
        self.offsets.push_back(offset);
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
            self.front = last + 1;
            // A burst leaves no memory behind.
            if self.offsets.capacity() > 4_096 && self.offsets.len() * 4 < self.offsets.capacity() {
                self.offsets.shrink_to(self.offsets.len() * 2);
            }
        }
    }

    /// The lowest unfinished offset; where there is none, where live reading goes on.
    pub fn base(&self) -> Offset {
        self.offsets.front().copied().unwrap_or(self.live)
    }

    pub fn live(&self) -> Offset {
        self.live
    }

    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    /// How many stretches the progress record has to name.
    pub fn holes(&self) -> usize {
        self.runs.len()
    }

    /// The finished stretches above `base`, by offsets, both ends included.
    pub fn runs(&self) -> Vec<Run> {
        let offset = |place: u64| self.offsets[(place - self.front) as usize];
        self.runs.iter().map(|(first, last)| Run { first: offset(*first), last: offset(*last) }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offsets(runs: Vec<Run>) -> Vec<(u128, u128)> {
        runs.into_iter().map(|run| (run.first.raw(), run.last.raw())).collect()
    }

    #[test]
    fn base_follows_the_lowest_unfinished_record_over_gaps() {
        let mut window = Window::new(Offset::new(10));
        assert_eq!(window.base(), Offset::new(10), "nothing taken yet");
        let places: Vec<Place> = [10, 11, 15, 16, 40].map(|offset| window.push(Offset::new(offset))).into();
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
            let mut window = Window::new(Offset::START);
            let mut places: Vec<Place> = (0..100_u128).map(|n| window.push(Offset::new(n * 3))).collect();
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
}
