//! Counts of runs of reverse ETL on their way to `job-status`: written by the commit that makes them true.

use crate::log::partitioner::Placement;
use crate::model::codec;
use crate::model::delivery::Delivery;
use crate::model::event::Event;
use crate::model::job_status::{Counts, JobKey, JobStatus, Tally};
use crate::model::record::{Addressed, Headers, Record, Topic, header};

/// How `job-status` is placed.
#[derive(Clone, Copy, Debug)]
pub struct JobTopic(pub Placement);

impl JobTopic {
    /// The records of what was counted; the tally is empty then.
    pub fn records(self, tally: &mut Tally) -> Vec<Addressed> {
        tally.take().into_iter().map(|status| self.record(&status)).collect()
    }

    fn record(self, status: &JobStatus) -> Addressed {
        let run = status.key.job_run.as_str();
        let mut headers = Headers::new();
        headers.push_text(header::JOB_RUN, run);
        headers.push_text(header::CONTENT_TYPE, header::AVRO);
        Addressed {
            topic: Topic::JOB_STATUS,
            partition: self.0.place("", run),
            key: Some(run.to_owned().into()),
            value: Some(codec::encode(status).into()),
            headers,
        }
    }
}

/// Whether a record counts for a run: it belongs to one, and was not counted before.
pub fn counts(record: &Record) -> bool {
    record.headers.text(header::JOB_RUN).is_some() && record.headers.text(header::REPLAY_ID).is_none()
}

/// Whose run an event is of.
pub fn key_of_event(event: &Event) -> Option<JobKey> {
    Some(JobKey {
        job_run: event.job_run.clone()?,
        task_run: event.task_run.clone().unwrap_or_default(),
        source: event.source.clone(),
        destination: None,
    })
}

/// Counts a delivery's outcome for its run, if it has one.
pub fn count_delivery(tally: &mut Tally, record: &Record, failed: Option<u16>) {
    if !counts(record) {
        return;
    }
    let Some(Ok(delivery)) = record.value.as_ref().map(codec::decode::<Delivery>) else { return };
    let Some(job_run) = delivery.job_run else { return };
    let key = JobKey {
        job_run,
        task_run: delivery.task_run.unwrap_or_default(),
        source: delivery.source,
        destination: Some(delivery.destination),
    };
    tally.add(key, failed.map_or_else(Counts::passed, |code| Counts::failed(delivery.record_id, code)));
}
