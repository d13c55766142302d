//! What has been collected and not committed yet.

use std::collections::BTreeMap;

use crate::log::{Commit, Committed};
use crate::model::record::{Addressed, Epoch, Partition};

use crate::runtime::planted::{Mistake, is_planted};

use super::Changes;

#[derive(Default)]
pub struct Pending(BTreeMap<Partition, Collected>);

struct Collected {
    epoch: Epoch,
    outputs: Vec<Addressed>,
    last: Option<Addressed>,
    position: Committed,
}

impl Pending {
    /// Adds changes behind what is there of the partition.
    pub fn add(&mut self, partition: Partition, epoch: Epoch, changes: Changes) {
        let Changes { outputs, last, position } = changes;
        match self.0.get_mut(&partition).filter(|collected| collected.epoch == epoch) {
            Some(collected) => {
                collected.outputs.extend(outputs);
                collected.last = last.or(collected.last.take());
                collected.position = position;
            }
            None => drop(self.0.insert(partition, Collected { epoch, outputs, last, position })),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The partition is assigned: what an earlier assignment left is not committed any more.
    pub fn begin(&mut self, partition: Partition, epoch: Epoch) {
        match self.0.get_mut(&partition) {
            Some(collected) if is_planted(Mistake::ForgetEpoch) => collected.epoch = epoch,
            _ => self.forget(&[partition]),
        }
    }

    pub fn forget(&mut self, partitions: &[Partition]) {
        if !is_planted(Mistake::ForgetEpoch) {
            self.0.retain(|partition, _| !partitions.contains(partition));
        }
    }

    pub fn partitions(&self) -> Vec<Partition> {
        self.0.keys().copied().collect()
    }

    /// One transaction of all of it: outputs first, each partition's own record last.
    pub fn commit(&self) -> Commit {
        let mut commit = Commit::default();
        for (partition, collected) in &self.0 {
            commit.outputs.extend(collected.outputs.iter().cloned());
            commit.offsets.insert(*partition, (collected.epoch, collected.position.clone()));
        }
        commit.outputs.extend(self.0.values().filter_map(|collected| collected.last.clone()));
        commit
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::record::{Headers, Offset, Topic};

    fn output(value: &'static str) -> Addressed {
        let value = Some(bytes::Bytes::from_static(value.as_bytes()));
        Addressed { topic: Topic::DELIVERIES, partition: Partition(0), key: None, value, headers: Headers::new() }
    }

    fn changes(outputs: &[&'static str], last: Option<&'static str>, offset: u128) -> Changes {
        Changes {
            outputs: outputs.iter().map(|value| output(value)).collect(),
            last: last.map(output),
            position: Committed { offset: Offset::new(offset), metadata: String::new() },
        }
    }

    #[test]
    fn repeated_collections_join_in_order_with_the_newest_record_last() {
        let mut pending = Pending::default();
        pending.add(Partition(1), Epoch(1), changes(&["a"], Some("p1"), 5));
        pending.add(Partition(0), Epoch(2), changes(&["x"], None, 1));
        pending.add(Partition(1), Epoch(1), changes(&["b"], Some("p2"), 9));
        let commit = pending.commit();
        let values: Vec<&[u8]> = commit.outputs.iter().filter_map(|output| output.value.as_deref()).collect();
        assert_eq!(values, [&b"x"[..], b"a", b"b", b"p2"]);
        assert_eq!(commit.offsets[&Partition(1)].1.offset, Offset::new(9));
    }

    #[test]
    fn changes_of_an_older_epoch_do_not_survive_a_new_assignment() {
        let mut pending = Pending::default();
        pending.add(Partition(1), Epoch(1), changes(&["old"], None, 5));
        pending.add(Partition(1), Epoch(2), changes(&["new"], None, 3));
        assert_eq!(pending.commit().outputs, [output("new")]);
        pending.forget(&[Partition(1)]);
        assert!(pending.is_empty());
    }
}
