//! Which partition a record goes to: one pure function, the same on every backend and for producers in other languages
//! (topics/README.md; golden vectors in tests/fixtures/partitions.json).
//!
//! The isolation key picks the partitions it may use by rendezvous hashing over all of them, the user picks one of those, by
//! rendezvous too. So one user of one destination is always in one partition, a noisy tenant reaches only its own shard, and
//! another partition moves only the users that it wins.

use xxhash_rust::xxh64::xxh64;

use crate::model::delivery::Delivery;
use crate::model::id::User;
use crate::model::record::Partition;

/// What shares partitions with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IsolateBy {
    None,
    Workspace,
    Source,
    Destination,
}

/// How the records of a topic are placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Placement {
    pub isolate_by: IsolateBy,
    /// How many partitions one isolation key may use; `None` is all.
    pub spread: Option<u32>,
    pub partitions: u32,
}

impl Placement {
    /// The partition of `user`'s records under the isolation key (empty for [`IsolateBy::None`]).
    pub fn place(&self, isolation_key: &str, user: &str) -> Partition {
        let key = if self.isolate_by == IsolateBy::None { "" } else { isolation_key };
        match self.spread {
            Some(spread) if spread < self.partitions && self.isolate_by != IsolateBy::None => {
                best(&[key, user], self.shard(key, spread).into_iter())
            }
            _ => best(&[key, user], 0..self.partitions),
        }
    }

    /// The partition of a delivery: that of its user, or of its event where it has none.
    pub fn of_delivery(&self, delivery: &Delivery) -> Partition {
        let isolation_key = match self.isolate_by {
            IsolateBy::None => "",
            IsolateBy::Workspace => delivery.workspace.as_str(),
            IsolateBy::Source => delivery.source.as_str(),
            IsolateBy::Destination => delivery.destination.as_str(),
        };
        self.place(isolation_key, delivery.user.as_ref().map_or(delivery.message_id.as_str(), User::as_str))
    }

    /// All partitions that records under the isolation key may go to.
    pub fn shard_of(&self, isolation_key: &str) -> Vec<Partition> {
        let numbers = match self.spread {
            Some(spread) if spread < self.partitions && self.isolate_by != IsolateBy::None => {
                self.shard(isolation_key, spread)
            }
            _ => (0..self.partitions).collect(),
        };
        numbers.into_iter().map(Partition).collect()
    }

    fn shard(&self, key: &str, spread: u32) -> Vec<u32> {
        let mut input = prefix(&[key]);
        let mut ranked: Vec<(u64, u32)> = (0..self.partitions).map(|p| (score(&mut input, p), p)).collect();
        ranked.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        ranked.truncate(spread.max(1) as usize);
        ranked.into_iter().map(|(_, p)| p).collect()
    }
}

/// The candidate with the highest score; the lower one of two equals.
fn best(parts: &[&str], candidates: impl Iterator<Item = u32>) -> Partition {
    let mut input = prefix(parts);
    let mut winner = None;
    for p in candidates {
        let score = score(&mut input, p);
        if winner.is_none_or(|(high, holder)| score > high || (score == high && p < holder)) {
            winner = Some((score, p));
        }
    }
    Partition(winner.map_or(0, |(_, p)| p))
}

fn prefix(parts: &[&str]) -> Vec<u8> {
    let mut input = Vec::with_capacity(96);
    for part in parts {
        push(&mut input, part.as_bytes());
    }
    input
}

fn score(prefix: &mut Vec<u8>, partition: u32) -> u64 {
    let length = prefix.len();
    let mut digits = [0_u8; 10];
    let mut at = digits.len();
    let mut rest = partition;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    push(prefix, &digits[at..]);
    let hash = xxh64(prefix, 0);
    prefix.truncate(length);
    hash
}

fn push(input: &mut Vec<u8>, part: &[u8]) {
    input.extend_from_slice(&(part.len() as u32).to_le_bytes());
    input.extend_from_slice(part);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(isolate_by: IsolateBy, spread: Option<u32>, partitions: u32) -> Placement {
        Placement { isolate_by, spread, partitions }
    }

    /// Golden: producers in other languages compute the same.
    #[test]
    fn partitions_are_the_golden_ones() {
        #[derive(serde::Deserialize)]
        struct Vector {
            isolate_by: IsolateBy,
            spread: Option<u32>,
            partitions: u32,
            key: String,
            user: String,
            partition: u32,
        }
        let golden: Vec<Vector> =
            serde_json::from_str(include_str!("../../tests/fixtures/partitions.json")).expect("a readable fixture");
        assert!(golden.len() >= 10);
        for vector in golden {
            let found = placement(vector.isolate_by, vector.spread, vector.partitions).place(&vector.key, &vector.user);
            assert_eq!(found.0, vector.partition, "{} {}", vector.key, vector.user);
        }
    }

    #[test]
    fn users_are_spread_evenly() {
        let place = placement(IsolateBy::Destination, None, 12);
        let mut counts = [0_u32; 12];
        for user in 0..120_000 {
            counts[place.place("dst-1", &format!("user-{user}")).0 as usize] += 1;
        }
        for count in counts {
            assert!((9_500..10_500).contains(&count), "10,000 were expected: {counts:?}");
        }
    }

    #[test]
    fn another_partition_moves_only_the_users_it_wins() {
        let (before, after) = (placement(IsolateBy::None, None, 12), placement(IsolateBy::None, None, 13));
        let mut moved = 0;
        for user in 0..26_000 {
            let user = format!("user-{user}");
            let (old, new) = (before.place("", &user), after.place("", &user));
            if old != new {
                assert_eq!(new.0, 12, "users move to the new partition only");
                moved += 1;
            }
        }
        assert!((1_700..2_300).contains(&moved), "a thirteenth of them, 2,000, was expected: {moved}");
    }

    #[test]
    fn a_tenant_stays_inside_its_shard_and_shards_differ() {
        let place = placement(IsolateBy::Source, Some(3), 12);
        let shard = |key: &str| {
            let mut used: Vec<u32> = (0..500).map(|user| place.place(key, &user.to_string()).0).collect();
            used.sort_unstable();
            used.dedup();
            used
        };
        assert_eq!(shard("a").len(), 3);
        assert!((0..50).any(|tenant| shard(&tenant.to_string()) != shard("a")));
    }

    #[test]
    fn without_isolation_the_key_does_not_matter() {
        let place = placement(IsolateBy::None, None, 12);
        assert_eq!(place.place("a", "u"), place.place("b", "u"));
    }
}
