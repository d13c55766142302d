//! The reporter's positions: whether everything that was counted of a run is in the store, and whether they are of this log.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;

use super::engine::Stage;
use crate::clock::Clock;
use crate::log::partitioner::Placement;
use crate::log::{Admin, Backend, Limit, LogError, Read, Reader};
use crate::model::record::{Offset, Partition, Topic};
use crate::stages::gateway::CaughtUp;
use crate::store::job_status::JobStatusStore;
use crate::store::{Group, Mismatch, Position, StoreError};

/// Who asks for a status waits so long for it.
const PATIENCE: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(100);
const ONE: Limit = Limit { records: 1, bytes: 1 };

/// Whose positions are those of the reporter.
pub fn group() -> Group {
    Group { name: Stage::Reporter.group(), topic: Topic::JOB_STATUS }
}

/// The reporter's stored positions, each with the reason why it is none of this log. A position without a topic counts as one of
/// this log.
pub type Stored = BTreeMap<Partition, (Position, Option<Mismatch>)>;

/// Why the stored positions are not known.
#[derive(Debug, thiserror::Error)]
pub enum StoredError {
    #[error("the store (store.url): {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Log(#[from] LogError),
}

/// Reads the reporter's positions, and compares them with the log.
///
/// # Errors
/// [`StoredError`].
pub async fn stored<B: Backend>(log: &B, store: &JobStatusStore) -> Result<Stored, StoredError> {
    let (admin, topic) = (log.admin()?, Topic::JOB_STATUS);
    let topic_id = admin.topic_id(&topic).await?;
    let mut found = Stored::new();
    for (partition, position) in store.store().positions(&group()).await? {
        // Asked for after the position, which the reporter moves on as the log grows.
        let end = admin.watermarks(&topic, partition).await?.end;
        let mismatch = position.mismatch(&topic_id, end);
        found.insert(partition, (position, mismatch));
    }
    Ok(found)
}

/// Asks the log and the store. `placement`: of `job-status`.
pub fn caught_up<B: Backend>(log: B, store: JobStatusStore, placement: Placement, clock: Clock) -> CaughtUp {
    Arc::new(move |run| {
        let (log, store, clock) = (log.clone(), store.clone(), clock.clone());
        let partition = placement.place("", run.as_str());
        async move {
            let waiting = tokio::time::timeout(PATIENCE * 2, waited(&log, &store, partition, &clock));
            matches!(waiting.await, Ok(Ok(true)))
        }
        .boxed()
    })
}

async fn waited<B: Backend>(
    log: &B,
    store: &JobStatusStore,
    partition: Partition,
    clock: &Clock,
) -> Result<bool, LogError> {
    let (admin, until) = (log.admin()?, clock.instant() + PATIENCE);
    let end = admin.watermarks(&Topic::JOB_STATUS, partition).await?.end;
    let topic_id = admin.topic_id(&Topic::JOB_STATUS).await?;
    // A reader costs a connection: it is opened where something has moved.
    let mut looked_at = None;
    loop {
        // A store that does not answer says so when it is asked for the counts.
        let position = store.store().position(&group(), partition).await.ok().flatten();
        let marks = admin.watermarks(&Topic::JOB_STATUS, partition).await?;
        if position.as_ref().is_some_and(|position| position.mismatch(&topic_id, marks.end).is_some()) {
            // Nothing of this log is counted until an operator sets the position.
            return Ok(false);
        }
        let at = position.map_or(marks.start, |position| position.offset);
        let is_decided = marks.stable >= end;
        if is_decided && at >= end {
            return Ok(true);
        }
        if is_decided && looked_at != Some(at) {
            looked_at = Some(at);
            if nothing_between(log, partition, at, end).await? {
                return Ok(true);
            }
        }
        if clock.instant() > until {
            return Ok(false);
        }
        clock.sleep(AGAIN).await;
    }
}

/// Ends of transactions have offsets, too.
async fn nothing_between<B: Backend>(
    log: &B,
    partition: Partition,
    from: Offset,
    to: Offset,
) -> Result<bool, LogError> {
    let mut reader = log.reader(&Topic::JOB_STATUS, partition, from).await?;
    match reader.read(ONE).await? {
        Read::Records(records) => Ok(records.first().is_none_or(|first| first.offset >= to)),
        Read::End => Ok(true),
    }
}
