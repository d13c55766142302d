//! What the stages count of runs of reverse ETL (schemas/job_status.avsc): what was taken, what came through, what failed.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::model::id::{DestinationId, JobRunId, SourceId};

/// What is counted together: a run's rows of one source, or what became of them at one destination.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct JobKey {
    pub job_run: JobRunId,
    /// Empty where the run has none.
    pub task_run: JobRunId,
    pub source: SourceId,
    /// None: of the source, not of a destination.
    pub destination: Option<DestinationId>,
}

/// A row that failed for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedRow {
    /// What its sender calls it: any JSON.
    pub record: Bytes,
    pub code: u16,
}

/// What is added to the counts of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Rows that came in, that came through, and that failed.
    pub taken: u64,
    pub passed: u64,
    pub failed: u64,
    pub failed_rows: Vec<FailedRow>,
}

impl Counts {
    pub fn taken(count: u64) -> Self {
        Self { taken: count, ..Self::default() }
    }

    pub fn passed() -> Self {
        Self { passed: 1, ..Self::default() }
    }

    pub fn failed(row: Option<Bytes>, code: u16) -> Self {
        Self {
            failed: 1,
            failed_rows: row.map(|record| FailedRow { record, code }).into_iter().collect(),
            ..Self::default()
        }
    }

    pub fn add(&mut self, other: Counts) {
        self.taken += other.taken;
        self.passed += other.passed;
        self.failed += other.failed;
        self.failed_rows.extend(other.failed_rows);
    }
}

/// A record of `job-status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobStatus {
    pub key: JobKey,
    pub counts: Counts,
}

/// Names of failed rows in one record, in bytes.
const MOST: usize = 256 * 1024;
/// A row whose name is longer is only counted.
const NAME: usize = 4 * 1024;

/// Counts that go into one commit.
#[derive(Debug, Default)]
pub struct Tally(BTreeMap<JobKey, Counts>);

impl Tally {
    pub fn add(&mut self, key: JobKey, mut counts: Counts) {
        counts.failed_rows.retain(|row| row.record.len() <= NAME);
        self.0.entry(key).or_default().add(counts);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What was counted so far, each record small enough for a topic; nothing is left of it here.
    pub fn take(&mut self) -> Vec<JobStatus> {
        let mut all = Vec::new();
        // What destinations are to do comes before what their source has done: whoever reads only a part of it takes nothing for
        // completed that is not.
        let (destinations, sources): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.0).into_iter().partition(|(key, _)| key.destination.is_some());
        for (key, mut counts) in destinations.into_iter().chain(sources) {
            let rows = std::mem::take(&mut counts.failed_rows);
            let (mut part, mut bytes) = (counts, 0);
            for row in rows {
                bytes += row.record.len() + 16;
                part.failed_rows.push(row);
                if bytes > MOST {
                    all.push(JobStatus { key: key.clone(), counts: std::mem::take(&mut part) });
                    bytes = 0;
                }
            }
            if part != Counts::default() {
                all.push(JobStatus { key, counts: part });
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_is_taken_once_and_in_small_records() {
        let key = |destination: &str| JobKey {
            job_run: "r".into(),
            task_run: "t".into(),
            source: "s".into(),
            destination: Some(destination.into()),
        };
        let mut tally = Tally::default();
        tally.add(key("a"), Counts::taken(3));
        tally.add(key("a"), Counts::passed());
        let row = |bytes: usize| Some(Bytes::from(vec![b'1'; bytes]));
        (0..1_000).for_each(|_| tally.add(key("b"), Counts::failed(row(1_000), 400)));
        tally.add(key("b"), Counts::failed(row(NAME + 1), 400));
        let taken = tally.take();
        assert_eq!(taken[0].counts, Counts { taken: 3, passed: 1, ..Counts::default() });
        let b: Vec<&JobStatus> = taken.iter().filter(|status| status.key == key("b")).collect();
        assert_eq!(b.iter().map(|status| status.counts.failed).sum::<u64>(), 1_001);
        assert_eq!(b.iter().map(|status| status.counts.failed_rows.len()).sum::<usize>(), 1_000);
        assert!(b.len() > 2 && b.iter().all(|status| status.counts.failed_rows.len() < 300), "{}", b.len());
        assert!(tally.is_empty() && tally.take().is_empty());
    }
}
