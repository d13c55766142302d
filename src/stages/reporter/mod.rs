//! From `job-status` into the store: what the stages have counted of runs of reverse ETL, added up once.

use crate::clock::Clock;
use crate::model::codec;
use crate::model::job_status::JobStatus;
use crate::model::record::{Offset, Partition, Record};
use crate::runtime::project::Project;
use crate::store::job_status::JobStatusStore;
use crate::store::{Group, Move, StoreError};
use crate::telemetry::metrics::metrics;

/// A name that is longer is nobody's: the gateway takes none.
const NAME: usize = 512;

pub struct Reporter {
    pub store: JobStatusStore,
    pub group: Group,
    pub clock: Clock,
}

impl Project for Reporter {
    async fn take_over(&self, partition: Partition) -> Result<(i64, Option<Offset>), StoreError> {
        self.store.store().take_over(&self.group, partition).await
    }

    async fn write(&self, moves: &[Move], records: &[Record]) -> Result<(), StoreError> {
        let all = records.iter().filter_map(status).collect();
        self.store.add(&self.group, moves, all, self.clock.now()).await
    }
}

/// What a record says; it is told where it says nothing that can be counted.
fn status(record: &Record) -> Option<JobStatus> {
    let why = match record.value.as_ref().map(codec::decode::<JobStatus>) {
        None => "it has no value".to_owned(),
        Some(Err(error)) => error.to_string(),
        Some(Ok(status)) => {
            let key = &status.key;
            let names = [key.job_run.as_str(), key.task_run.as_str(), key.source.as_str()];
            if names.into_iter().chain(key.destination.as_ref().map(|id| id.as_str())).all(|name| name.len() <= NAME) {
                return Some(status);
            }
            "a name is too long".to_owned()
        }
    };
    metrics().reporter_unreadable.with_label_values::<&str>(&[]).inc();
    tracing::error!(partition = record.partition.0, offset = %record.offset, why, "a job status cannot be counted");
    None
}
