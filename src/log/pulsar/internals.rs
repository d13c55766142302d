//! What a broker says of the ledgers behind a partition.

use serde::Deserialize;

use crate::model::record::Offset;

#[derive(Deserialize)]
pub struct Internals {
    #[serde(rename = "lastConfirmedEntry")]
    pub last_confirmed: String,
    #[serde(rename = "currentLedgerEntries")]
    pub current_entries: i64,
    pub ledgers: Vec<Ledger>,
    #[serde(rename = "compactedLedger")]
    pub compacted: Ledger,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ledger {
    pub ledger_id: i64,
    pub entries: i64,
}

impl Internals {
    /// The first entry that is still there.
    pub fn start(&self) -> Option<Offset> {
        // What is kept of older ledgers has the places that it had there.
        if self.compacted.entries > 0 {
            return Some(Offset::of_entry(0, 0, 0));
        }
        let last = self.ledgers.last().map(|ledger| ledger.ledger_id);
        let is_filled =
            |ledger: &&Ledger| ledger.entries > 0 || (Some(ledger.ledger_id) == last && self.current_entries > 0);
        self.ledgers.iter().find(is_filled).map(|ledger| Offset::of_entry(ledger.ledger_id.unsigned_abs(), 0, 0))
    }

    /// How many entries lie before a place.
    pub fn before(&self, at: Offset) -> u64 {
        let Some((ledger, entry, index)) = at.entry() else { return 0 };
        let filled = self
            .ledgers
            .iter()
            .filter(|it| it.ledger_id.unsigned_abs() < ledger)
            .map(|it| it.entries.max(0).unsigned_abs());
        filled.sum::<u64>() + entry + u64::from(index > 0)
    }

    /// Before everything that will be written.
    pub fn empty(&self) -> Offset {
        let mut parts = self.last_confirmed.split(':').map(|part| part.parse::<i64>().unwrap_or(-1));
        let (ledger, entry) = (parts.next().unwrap_or(-1), parts.next().unwrap_or(-1));
        match u64::try_from(ledger) {
            Ok(ledger) => Offset::of_entry(ledger, u64::try_from(entry + 1).unwrap_or(0), 0),
            Err(_) => Offset::START,
        }
    }

    /// Whether there is nothing but what is compacted.
    pub fn is_compacted_only(&self) -> bool {
        self.compacted.entries > 0 && self.current_entries <= 0 && self.ledgers.iter().all(|it| it.entries <= 0)
    }

    /// A place some entries before this one, over the ends of ledgers.
    pub fn back(&self, ledger: u64, entry: u64, count: u64) -> Offset {
        let (mut at, mut missing) = ((ledger, entry), count);
        for older in self.ledgers.iter().rev().filter(|it| it.ledger_id.unsigned_abs() < ledger && it.entries > 0) {
            if at.1 >= missing {
                break;
            }
            missing -= at.1;
            at = (older.ledger_id.unsigned_abs(), older.entries.unsigned_abs());
        }
        Offset::of_entry(at.0, at.1.saturating_sub(missing), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn internals(ledgers: &[(i64, i64)], current: i64, compacted: i64) -> Internals {
        let ledger = |(ledger_id, entries): &(i64, i64)| Ledger { ledger_id: *ledger_id, entries: *entries };
        Internals {
            last_confirmed: "9:4".into(),
            current_entries: current,
            ledgers: ledgers.iter().map(ledger).collect(),
            compacted: Ledger { ledger_id: -1, entries: compacted },
        }
    }

    #[test]
    fn places_are_counted_over_the_ends_of_ledgers() {
        let of = Offset::of_entry;
        // The open ledger's entries stand beside the list.
        let some = internals(&[(2, 4), (3, 10), (5, 0), (9, 0)], 5, -1);
        assert_eq!((some.start(), some.empty()), (Some(of(2, 0, 0)), of(9, 5, 0)));
        assert_eq!((some.before(of(3, 4, 0)), some.before(of(9, 2, 0)), some.before(of(9, 2, 7))), (8, 16, 17));
        assert_eq!(
            (some.back(9, 4, 3), some.back(9, 1, 3), some.back(3, 1, 3), some.back(9, 2, 13), some.back(9, 2, 99)),
            (of(9, 1, 0), of(3, 8, 0), of(2, 2, 0), of(2, 3, 0), of(2, 0, 0))
        );
        assert!(!some.is_compacted_only());
        assert_eq!(internals(&[(9, 0)], 0, -1).start(), None);
        let compacted = internals(&[(9, 0)], 0, 3);
        assert!(compacted.is_compacted_only() && compacted.start() == Some(of(0, 0, 0)));
    }
}
