//! From `job-status` into the store: what the stages have counted of runs of reverse ETL, added up once.

use crate::clock::Clock;
use crate::model::codec;
use crate::model::job_status::JobStatus;
use crate::model::record::{Partition, Record, TopicId};
use crate::runtime::project::Project;
use crate::store::job_status::JobStatusStore;
use crate::store::{Group, Move, Position, StoreError};
use crate::telemetry::metrics::metrics;

/// A name that is longer is not counted: no index would take it.
const NAME: usize = 512;

pub struct Reporter {
    pub store: JobStatusStore,
    pub group: Group,
    pub clock: Clock,
}

impl Project for Reporter {
    async fn position(&self, partition: Partition) -> Result<Option<Position>, StoreError> {
        self.store.store().position(&self.group, partition).await
    }

    async fn take_over(&self, partition: Partition, topic: &TopicId) -> Result<(i64, Option<Position>), StoreError> {
        self.store.store().take_over(&self.group, partition, topic).await
    }

    async fn write(&self, moves: &[Move], records: &[Record]) -> Result<(), StoreError> {
        let (mut all, mut unreadable) = (Vec::new(), Vec::new());
        for record in records {
            match status(record) {
                Ok(status) => all.push(status),
                Err(why) => unreadable.push((record, why)),
            }
        }
        self.store.add(&self.group, moves, all, self.clock.now()).await?;
        unreadable.iter().for_each(|(record, why)| tell(record, why));
        Ok(())
    }

    fn refused(&self, record: &Record, error: &StoreError) {
        tell(record, &error.to_string());
    }
}

/// What a record says, or why it says nothing that can be counted.
fn status(record: &Record) -> Result<JobStatus, String> {
    match record.value.as_ref().map(codec::decode::<JobStatus>) {
        None => Err("it has no value".to_owned()),
        Some(Err(error)) => Err(error.to_string()),
        Some(Ok(status)) => {
            let key = &status.key;
            let names = [key.job_run.as_str(), key.task_run.as_str(), key.source.as_str()];
            let is_one = |name: &str| name.len() <= NAME;
            let are_names = names.into_iter().chain(key.destination.as_ref().map(|id| id.as_str())).all(is_one);
            if are_names { Ok(status) } else { Err("a name is too long".to_owned()) }
        }
    }
}

fn tell(record: &Record, why: &str) {
    metrics().reporter_unreadable.with_label_values::<&str>(&[]).inc();
    tracing::error!(partition = record.partition.0, offset = %record.offset, why, "a job status cannot be counted");
}
