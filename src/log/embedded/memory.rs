//! The store in memory, pure Rust: for tests, and for runs whose faults a seed decides.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::clock::Timestamp;
use crate::log::topic::TopicSpec;
use crate::log::{BoxError, Committed, Limit, Watermarks};
use crate::model::record::{Offset, Partition, Record, Topic};

use super::store::{NoSuchPartition, StoredTopic, Transaction, compacted};

/// What goes wrong, how often (0 to 1), by which seed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub seed: u64,
    /// A write is refused and nothing of it is stored.
    pub write_refused: f64,
    /// A write is stored, but its caller is told that it failed.
    pub write_in_doubt: f64,
    pub read_refused: f64,
    /// An offset is left out, as transaction markers do on a broker.
    pub gap: f64,
    /// What a write brought is not decided for a while: it is there, but not to be read.
    pub late: f64,
}

impl Faults {
    pub fn none() -> Self {
        Self::default()
    }
}

#[derive(Clone)]
pub struct MemoryStore(Arc<Mutex<State>>);

struct State {
    topics: BTreeMap<String, StoredTopic>,
    partitions: HashMap<(Topic, Partition), Kept>,
    positions: HashMap<(String, Topic), BTreeMap<Partition, Committed>>,
    commits: HashMap<String, u64>,
    faults: Faults,
    random: StdRng,
    id: String,
}

#[derive(Default)]
struct Kept {
    next: u128,
    records: Vec<Record>,
    /// From here on nothing is decided yet, for so many more looks.
    undecided: Option<(u128, u32)>,
}

impl Kept {
    /// What may be read. Each look brings a decision nearer.
    fn stable(&mut self) -> Offset {
        match &mut self.undecided {
            Some((from, looks)) if *looks > 0 => {
                *looks -= 1;
                Offset::new(*from)
            }
            _ => {
                self.undecided = None;
                Offset::new(self.next)
            }
        }
    }
}

impl MemoryStore {
    pub fn new(faults: Faults) -> Self {
        Self(Arc::new(Mutex::new(State {
            topics: BTreeMap::new(),
            partitions: HashMap::new(),
            positions: HashMap::new(),
            commits: HashMap::new(),
            faults,
            random: StdRng::seed_from_u64(faults.seed),
            id: uuid::Uuid::new_v4().simple().to_string(),
        })))
    }

    /// From now on these go wrong.
    pub fn set(&self, faults: Faults) {
        let mut state = self.state();
        state.random = StdRng::seed_from_u64(faults.seed);
        state.faults = faults;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub async fn write(
        &self,
        what: &Transaction,
        at: Timestamp,
    ) -> Result<Vec<((Topic, Partition), Offset)>, BoxError> {
        let mut state = self.state();
        if state.strikes(|faults| faults.write_refused) {
            return Err("injected: the write was refused".into());
        }
        for ((topic, partition), _) in &what.batches {
            state.kept(topic, *partition)?;
        }
        let mut ends = Vec::new();
        for ((topic, partition), records) in &what.batches {
            let late = state.strikes(|faults| faults.late).then(|| state.random.random_range(1..6));
            let gaps: Vec<bool> = records.iter().map(|_| state.strikes(|faults| faults.gap)).collect();
            let kept = state.kept(topic, *partition)?;
            if let Some(looks) = late {
                let from = kept.undecided.map_or(kept.next, |(from, _)| from);
                kept.undecided = Some((from, looks));
            }
            for (record, gap) in records.iter().zip(gaps) {
                kept.next += u128::from(gap);
                kept.records.push(Record {
                    partition: *partition,
                    offset: Offset::new(kept.next),
                    timestamp: at,
                    key: record.key.clone(),
                    value: record.value.clone(),
                    headers: record.headers.clone(),
                });
                kept.next += 1;
            }
            ends.push(((topic.clone(), *partition), Offset::new(kept.next)));
        }
        for position in &what.positions {
            let of_group = state.positions.entry((position.group.clone(), position.topic.clone())).or_default();
            of_group.insert(position.partition, position.committed.clone());
        }
        for (session, number) in &what.commits {
            state.commits.insert(session.clone(), *number);
        }
        if state.strikes(|faults| faults.write_in_doubt) {
            return Err("injected: the write was stored, but nobody was told".into());
        }
        Ok(ends)
    }

    pub async fn last_commit(&self, session: &str) -> Result<Option<u64>, BoxError> {
        Ok(self.state().commits.get(session).copied())
    }

    pub async fn read(
        &self,
        topic: &Topic,
        partition: Partition,
        from: Offset,
        limit: Limit,
    ) -> Result<Vec<Record>, BoxError> {
        let mut state = self.state();
        if state.strikes(|faults| faults.read_refused) {
            return Err("injected: the read was refused".into());
        }
        let kept = state.kept(topic, partition)?;
        let stable = kept.stable();
        let start = kept.records.partition_point(|record| record.offset < from);
        let stop = kept.records.partition_point(|record| record.offset < stable).max(start);
        let mut bytes = 0;
        let fits = |record: &&Record| {
            let before = bytes;
            bytes += record.weight();
            before < limit.bytes
        };
        Ok(kept.records[start..stop].iter().take(limit.records).take_while(fits).cloned().collect())
    }

    pub async fn bounds(&self, topic: &Topic, partition: Partition) -> Result<Watermarks, BoxError> {
        let mut state = self.state();
        let kept = state.kept(topic, partition)?;
        let end = Offset::new(kept.next);
        let start = kept.records.first().map_or(end, |record| record.offset);
        Ok(Watermarks { start, stable: kept.stable(), end })
    }

    pub async fn ends(&self) -> Result<Vec<((Topic, Partition), Offset)>, BoxError> {
        Ok(self.state().partitions.iter().map(|(key, kept)| (key.clone(), Offset::new(kept.next))).collect())
    }

    pub async fn committed(&self, group: &str, topic: &Topic) -> Result<BTreeMap<Partition, Committed>, BoxError> {
        Ok(self.state().positions.get(&(group.to_owned(), topic.clone())).cloned().unwrap_or_default())
    }

    pub async fn offset_at(&self, topic: &Topic, partition: Partition, at: Timestamp) -> Result<Offset, BoxError> {
        let mut state = self.state();
        let kept = state.kept(topic, partition)?;
        Ok(kept
            .records
            .iter()
            .find(|record| record.timestamp >= at)
            .map_or(Offset::new(kept.next), |record| record.offset))
    }

    pub async fn topics(&self) -> Result<Vec<StoredTopic>, BoxError> {
        Ok(self.state().topics.values().cloned().collect())
    }

    pub async fn create(&self, spec: &TopicSpec) -> Result<(), BoxError> {
        let mut state = self.state();
        if state.topics.contains_key(&spec.name) {
            return Ok(());
        }
        let info = StoredTopic { topic: spec.topic(), partitions: spec.partitions, config: spec.config.clone() };
        state.topics.insert(spec.name.clone(), info);
        for number in 0..spec.partitions {
            state.partitions.insert((spec.topic(), Partition(number)), Kept::default());
        }
        Ok(())
    }

    pub async fn id(&self) -> Result<String, BoxError> {
        Ok(self.state().id.clone())
    }

    pub async fn configure(&self, topic: &Topic, config: &BTreeMap<String, String>) -> Result<(), BoxError> {
        if let Some(info) = self.state().topics.get_mut(topic.as_str()) {
            info.config.extend(config.clone());
        }
        Ok(())
    }

    pub async fn maintain(&self, now: Timestamp) -> Result<(), BoxError> {
        let mut state = self.state();
        let topics: Vec<StoredTopic> = state.topics.values().cloned().collect();
        for info in topics {
            let setting = |name: &str| info.config.get(name).and_then(|text| text.parse::<i64>().ok());
            let horizon = |keep: i64| Timestamp::from_millis(now.millis() - keep);
            let compact = info.config.get("cleanup.policy").is_some_and(|policy| policy.contains("compact"));
            for number in 0..info.partitions {
                let kept = state.kept(&info.topic, Partition(number))?;
                if compact {
                    let before = horizon(setting("delete.retention.ms").unwrap_or(900_000));
                    kept.records = compacted(std::mem::take(&mut kept.records), before);
                } else if let Some(keep) = setting("retention.ms").filter(|keep| *keep >= 0) {
                    kept.records.retain(|record| record.timestamp >= horizon(keep));
                }
            }
        }
        Ok(())
    }
}

impl State {
    fn strikes(&mut self, chance: impl Fn(&Faults) -> f64) -> bool {
        let chance = chance(&self.faults);
        chance > 0.0 && self.random.random_bool(chance)
    }

    fn kept(&mut self, topic: &Topic, partition: Partition) -> Result<&mut Kept, NoSuchPartition> {
        self.partitions
            .get_mut(&(topic.clone(), partition))
            .ok_or_else(|| NoSuchPartition { topic: topic.clone(), partition })
    }
}
