//! `schemas/job_status.avsc`.

use super::avro::{Reader, Unreadable, Writer};
use super::{JOB_STATUS, KnownSchema, Value};
use crate::model::job_status::{Counts, FailedRow, JobKey, JobStatus};

impl Value for JobStatus {
    fn schema() -> &'static KnownSchema {
        &JOB_STATUS
    }

    fn write(&self, out: &mut Writer) {
        out.text(self.key.job_run.as_str());
        out.text(self.key.task_run.as_str());
        out.text(self.key.source.as_str());
        out.option(self.key.destination.as_ref(), |out, id| out.text(id.as_str()));
        for count in [self.counts.taken, self.counts.passed, self.counts.failed] {
            out.count(count);
        }
        out.array(&self.counts.failed_rows, |out, row| {
            out.bytes(&row.record);
            out.long(i64::from(row.code));
        });
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, Unreadable> {
        Ok(JobStatus {
            key: JobKey {
                job_run: input.text()?,
                task_run: input.text()?,
                source: input.text()?,
                destination: input.option(Reader::text)?,
            },
            counts: Counts {
                taken: input.count()?,
                passed: input.count()?,
                failed: input.count()?,
                failed_rows: input.array(|input| Ok(FailedRow { record: input.bytes()?, code: input.count()? }))?,
            },
        })
    }
}
