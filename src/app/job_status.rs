//! Whether everything that was counted of a run is in the store.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;

use super::engine::Stage;
use crate::clock::Clock;
use crate::log::partitioner::Placement;
use crate::log::{Admin, Backend, Limit, LogError, Read, Reader};
use crate::model::record::{Offset, Partition, Topic};
use crate::stages::gateway::CaughtUp;
use crate::store::Group;
use crate::store::job_status::JobStatusStore;

/// Who asks for a status waits so long for it.
const PATIENCE: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(100);
const ONE: Limit = Limit { records: 1, bytes: 1 };

/// Whose positions are those of the reporter.
pub fn group() -> Group {
    Group { name: Stage::Reporter.group(), topic: Topic::JOB_STATUS }
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
    // A reader costs a connection: it is opened where something has moved.
    let mut looked_at = None;
    loop {
        let marks = admin.watermarks(&Topic::JOB_STATUS, partition).await?;
        // A store that does not answer says so when it is asked for the counts.
        let at = store.store().position(&group(), partition).await.ok().flatten().unwrap_or(marks.start);
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
