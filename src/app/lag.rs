//! How far behind each stage is: what it has not read, since when the oldest of that lies there, and what it has taken and not
//! ended.

use std::collections::BTreeMap;

use futures_util::StreamExt;
use futures_util::stream;

use crate::clock::Timestamp;
use crate::log::{Admin, Backend, Limit, LogError, Read, Reader};
use crate::model::record::{Offset, Partition, Topic};
use crate::store::Mismatch;

use super::engine::Stage;
use super::job_status::Stored;
use super::standing::{Standing, Taken};

/// Partitions that are looked into at a time: each takes a reader.
const AT_A_TIME: usize = 8;
const ONE: Limit = Limit { records: 1, bytes: 1 };

/// One stage's.
pub struct StageLag {
    pub stage: Stage,
    pub topic: Topic,
    pub partitions: BTreeMap<Partition, PartitionLag>,
}

#[derive(Clone, Debug)]
pub struct PartitionLag {
    /// The group's position; none where it never committed one.
    pub committed: Option<Offset>,
    /// Below it everything is decided.
    pub end: Offset,
    /// Offsets from the position to the end; 0 where no record is among them. An upper bound: on Kafka ends of transactions
    /// have offsets too, and a router's position is its lowest unfinished delivery. On Pulsar batches are counted.
    pub behind: u64,
    /// When the record at the position was written.
    pub oldest: Option<Timestamp>,
    /// Of a router: deliveries that it has not ended, taken or not.
    pub pending: Option<u64>,
    /// Why the position says nothing about this log: `behind` counts from the log's beginning then.
    pub problem: Option<String>,
}

impl PartitionLag {
    /// What is to be done yet.
    pub fn work(&self) -> u64 {
        self.pending.unwrap_or(self.behind)
    }
}

/// Asks the log how far behind these stages are. `standing`: what the routers have committed. `stored`: the reporter's positions;
/// none where the store does not tell them, and what the reporter has committed to the log counts.
///
/// # Errors
/// Where the log cannot be read, or a stage's topic is not there.
pub async fn read<B: Backend>(
    log: &B,
    stages: &[Stage],
    standing: &Standing,
    stored: Option<&Stored>,
) -> Result<Vec<StageLag>, LogError> {
    let admin = log.admin()?;
    let topics = admin.topics().await?;
    let mut lags = Vec::new();
    for stage in stages {
        let Some(topic) = stage.input() else { continue };
        let Some(info) = topics.iter().find(|info| info.topic == topic) else {
            return Err(LogError::fatal(format!("there is no topic {topic}; `laneway topics apply` creates it")));
        };
        let committed = admin.committed(&stage.group(), &topic).await?;
        let stored = stored.filter(|_| *stage == Stage::Reporter);
        let looks = (0..info.partitions).map(Partition).map(|partition| {
            let committed = match stored {
                Some(stored) => stored.get(&partition).map(|(position, mismatch)| (position.offset, mismatch.clone())),
                None => committed.get(&partition).map(|committed| (committed.offset, None)),
            };
            let taken = standing.partitions.get(&partition).filter(|_| *stage == Stage::Router);
            look(log, &admin, &topic, partition, committed, taken)
        });
        let mut found = stream::iter(looks).buffer_unordered(AT_A_TIME);
        let mut partitions = BTreeMap::new();
        while let Some(looked) = found.next().await {
            let (partition, lag) = looked?;
            partitions.insert(partition, lag);
        }
        drop(found);
        lags.push(StageLag { stage: *stage, topic, partitions });
    }
    Ok(lags)
}

async fn look<B: Backend>(
    log: &B,
    admin: &B::Admin,
    topic: &Topic,
    partition: Partition,
    position: Option<(Offset, Option<Mismatch>)>,
    taken: Option<&Taken>,
) -> Result<(Partition, PartitionLag), LogError> {
    let marks = admin.watermarks(topic, partition).await?;
    let committed = position.as_ref().map(|(offset, _)| *offset);
    let mismatch = position.and_then(|(at, mismatch)| {
        mismatch.or_else(|| (at > marks.end).then_some(Mismatch::BeyondEnd { at, end: marks.end }))
    });
    let problem = mismatch.map(|mismatch| mismatch.to_string());
    // What was deleted is not behind any more.
    let from = committed.filter(|_| problem.is_none()).unwrap_or(marks.start).max(marks.start);
    let (behind, oldest) = between(log, topic, partition, from, marks.stable).await?;
    let pending = match taken {
        Some(taken) if behind > 0 => {
            let from = taken.live.max(from);
            Some(taken.pending + between(log, topic, partition, from, marks.stable).await?.0)
        }
        Some(taken) => Some(taken.pending),
        None => None,
    };
    Ok((partition, PartitionLag { committed, end: marks.stable, behind, oldest, pending, problem }))
}

/// How many offsets lie there, and when the first record was written; 0 where there is none.
async fn between<B: Backend>(
    log: &B,
    topic: &Topic,
    partition: Partition,
    from: Offset,
    to: Offset,
) -> Result<(u64, Option<Timestamp>), LogError> {
    if from >= to {
        return Ok((0, None));
    }
    let mut reader = log.reader(topic, partition, from).await?;
    let Read::Records(records) = reader.read(ONE).await? else { return Ok((0, None)) };
    let count = log.admin()?.distance(topic, partition, from, to).await?;
    Ok((count, records.first().map(|record| record.timestamp)))
}
