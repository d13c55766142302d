//! From topic to topic, exactly once: each input ends in one outcome, and outputs, failures and offsets become visible
//! together. A partition works ahead on its own, chunks of it on all cores; results are put together in input order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::oneshot;

use crate::log::{Assignment, Committed, LogError};
use crate::model::outcome::{Outcome, Reason};
use crate::model::record::{Addressed, Offset, Record};
use crate::runtime::driver::{Ask, Changes, Inbox, Work};
use crate::runtime::failure::{Cause, FailureTopic};
use crate::telemetry::events;

/// Records that one core works on at a time: small enough that both cores get some, large enough to be worth the hand-over.
const CHUNK: usize = 64;
/// Outputs kept until the next commit. Beyond it the partition takes nothing.
const FINISHED_BYTES: usize = 16 << 20;

/// A stage's logic.
pub trait Transform: Send + Sync + 'static {
    /// One outcome for each record, in their order. No I/O and no waiting.
    fn process(&self, records: &[Record]) -> Vec<Outcome>;

    /// Where failures go.
    fn failures(&self) -> &FailureTopic;
}

/// Runs a [`Transform`].
pub struct TransformWork<T> {
    stage: Arc<T>,
    parallel: usize,
}

impl<T: Transform> TransformWork<T> {
    /// `parallel` chunks of a partition run at a time.
    pub fn new(stage: T, parallel: usize) -> Self {
        Self { stage: Arc::new(stage), parallel: parallel.max(1) }
    }
}

/// What a partition has finished and not handed to a commit yet.
#[derive(Default)]
struct Finished {
    outputs: Vec<Addressed>,
    bytes: usize,
    position: Option<Offset>,
}

impl<T: Transform> Work for TransformWork<T> {
    async fn run(self: Arc<Self>, assignment: Assignment, mut inbox: Inbox) -> Result<(), LogError> {
        let start = assignment.committed.map_or(Offset::START, |committed| committed.offset);
        let Inbox { ready, .. } = inbox;
        // A driver that is gone does not want the partition any more.
        let _ = ready.send(start);
        let mut chunks = FuturesOrdered::new();
        let mut finished = Finished::default();
        let mut draining: Option<oneshot::Sender<()>> = None;
        let mut stopped = false;
        loop {
            if stopped && chunks.is_empty() {
                draining.take().map(|done| done.send(()));
            }
            let room = !stopped && chunks.len() < self.parallel && finished.bytes < FINISHED_BYTES;
            tokio::select! {
                biased;
                ask = inbox.asks.recv() => match ask {
                    Some(Ask::Collect(answer)) => drop(answer.send(collect(&mut finished))),
                    Some(Ask::Committed) => {}
                    Some(Ask::Drain(done)) => {
                        stopped = true;
                        draining = Some(done);
                    }
                    None => return Ok(()),
                },
                Some(chunk) = chunks.next() => {
                    add(&mut finished, chunk)?;
                    inbox.bell.ring();
                }
                batch = inbox.records.recv(), if room => match batch {
                    Some(batch) => {
                        inbox.bell.ring();
                        for chunk in split(batch) {
                            let stage = Arc::clone(&self.stage);
                            chunks.push_back(tokio::task::spawn_blocking(move || work(&*stage, &chunk)));
                        }
                    }
                    None => return Ok(()),
                },
            }
        }
    }
}

fn split(batch: Vec<Record>) -> Vec<Vec<Record>> {
    let mut rest = batch;
    let mut chunks = Vec::with_capacity(rest.len().div_ceil(CHUNK));
    while rest.len() > CHUNK {
        let tail = rest.split_off(CHUNK);
        chunks.push(std::mem::replace(&mut rest, tail));
    }
    chunks.push(rest);
    chunks
}

type Worked = (Vec<Addressed>, Option<Offset>);

fn add(finished: &mut Finished, chunk: Result<Worked, tokio::task::JoinError>) -> Result<(), LogError> {
    let (outputs, position) = chunk.map_err(|error| LogError::transient(format!("a chunk crashed: {error}")))?;
    finished.bytes += outputs.iter().map(Addressed::size).sum::<usize>();
    finished.outputs.extend(outputs);
    finished.position = position.or(finished.position);
    Ok(())
}

fn collect(finished: &mut Finished) -> Option<Changes> {
    let position = finished.position.take()?;
    let outputs = std::mem::take(&mut finished.outputs);
    finished.bytes = 0;
    Some(Changes { outputs, last: None, position: Committed { offset: position, metadata: String::new() } })
}

fn work<T: Transform>(stage: &T, records: &[Record]) -> Worked {
    let mut outputs = Vec::with_capacity(records.len());
    for outcome in process(stage, records) {
        match outcome {
            Outcome::Produced(produced) => outputs.extend(produced),
            Outcome::Filtered(_) => {}
            Outcome::Failed { failure, .. } => outputs.push(failure),
        }
    }
    (outputs, records.last().map(|record| record.offset.just_after()))
}

/// Runs the stage on a chunk. Where it panics the chunk is halved until the record that makes it panic stands alone: one
/// poisonous event never costs another.
fn process<T: Transform>(stage: &T, records: &[Record]) -> Vec<Outcome> {
    let outcomes = catch_unwind(AssertUnwindSafe(|| stage.process(records)));
    match outcomes {
        Ok(outcomes) if outcomes.len() == records.len() => outcomes,
        _ if records.len() > 1 => {
            let (left, right) = records.split_at(records.len() / 2);
            let mut outcomes = process(stage, left);
            outcomes.extend(process(stage, right));
            outcomes
        }
        _ => records.iter().map(|record| poisonous(stage, record)).collect(),
    }
}

fn poisonous<T: Transform>(stage: &T, record: &Record) -> Outcome {
    let failures = stage.failures();
    events::panicked(failures.stage, record.partition, &record.offset);
    let key = record.key.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
    let cause = Cause::untried(Reason::Panicked, "the stage panicked on this record", &key);
    Outcome::Failed { reason: Reason::Panicked, failure: failures.record(record, &cause) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::log::partitioner::{IsolateBy, Placement};
    use crate::model::record::{Headers, Partition, Topic};

    struct Picky(FailureTopic);

    impl Transform for Picky {
        fn process(&self, records: &[Record]) -> Vec<Outcome> {
            records
                .iter()
                .map(|record| {
                    assert_ne!(record.offset.raw() % 10, 7, "sevens are poisonous");
                    Outcome::Produced(vec![Addressed {
                        topic: Topic::DELIVERIES,
                        partition: Partition(0),
                        key: None,
                        value: Some(record.offset.to_string().into()),
                        headers: Headers::new(),
                    }])
                })
                .collect()
        }

        fn failures(&self) -> &FailureTopic {
            &self.0
        }
    }

    #[test]
    fn a_poisonous_record_costs_no_other() {
        let placement = Placement { isolate_by: IsolateBy::None, spread: None, partitions: 1 };
        let (topic, input) = (Topic::PROC_ERRORS, Topic::EVENTS);
        let stage = Picky(FailureTopic { topic, placement, stage: "test", input, group: "g".into() });
        let records: Vec<Record> = (0..64)
            .map(|n| Record {
                partition: Partition(0),
                offset: Offset::new(n),
                timestamp: Timestamp::default(),
                key: None,
                value: None,
                headers: Headers::new(),
            })
            .collect();
        let (outputs, position) = work(&stage, &records);
        assert_eq!(position, Some(Offset::new(64)));
        assert_eq!(outputs.len(), 64);
        let failed: Vec<usize> = (0..64).filter(|n| outputs[*n].topic == Topic::PROC_ERRORS).collect();
        assert_eq!(failed, [7, 17, 27, 37, 47, 57], "in their places");
    }
}
