//! From where a partition is read: the stored position, where it is one of this log.

use std::time::Duration;

use crate::clock::Clock;
use crate::log::{Admin, Backend, LogError};
use crate::model::record::{Offset, Partition, Topic};
use crate::store::{Mismatch, StoreError};
use crate::telemetry::metrics::metrics;
use crate::telemetry::seldom;

use super::{AGAIN, Project, complain};

/// A held partition is checked again after this, so a reset takes effect within it.
const HELD_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// A held partition is reported again after this.
const HELD_REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// A partition that this process owns in the store.
pub struct TakenOver {
    pub owner: i64,
    /// The stored position. None: nothing was written yet.
    pub next: Option<Offset>,
    /// Where reading begins.
    pub start: Offset,
}

/// Why a partition is not taken over.
enum Failed {
    Store(StoreError),
    Log(LogError),
    Position(Mismatch),
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Failed::Store(error)
    }
}

impl From<LogError> for Failed {
    fn from(error: LogError) -> Self {
        Failed::Log(error)
    }
}

/// Takes a partition over, as soon as store and log answer and the stored position is one of this log. Until then nothing of the
/// partition is written.
pub async fn take_over<B: Backend, P: Project>(
    backend: &B,
    project: &P,
    topic: &Topic,
    partition: Partition,
    stage: &'static str,
    clock: &Clock,
) -> TakenOver {
    let mut held: Option<Held> = None;
    loop {
        let failed = match attempt(backend, project, topic, partition).await {
            Ok(taken) => return taken,
            Err(failed) => failed,
        };
        let mut delay = AGAIN;
        match failed {
            Failed::Position(mismatch) => {
                let held = held.get_or_insert_with(|| Held::new(stage));
                held.report(partition, &mismatch, clock);
                delay = HELD_CHECK_INTERVAL;
            }
            Failed::Store(error) => complain(stage, &error),
            Failed::Log(error) => {
                if let Some(left_out) = seldom::due("a position cannot be checked", &error.to_string()) {
                    tracing::warn!(stage, %error, left_out, "the log cannot be asked for its end, partitions wait");
                }
            }
        }
        clock.sleep(delay).await;
    }
}

async fn attempt<B: Backend, P: Project>(
    backend: &B,
    project: &P,
    topic: &Topic,
    partition: Partition,
) -> Result<TakenOver, Failed> {
    let admin = backend.admin()?;
    let topic_id = admin.topic_id(topic).await?;
    // Read before the epoch changes: a held partition disturbs no owner.
    let mut stored = project.position(partition).await?;
    let mut owner = None;
    loop {
        // Asked for after the position, which its owner moves on as the log grows.
        let marks = admin.watermarks(topic, partition).await?;
        if let Some(mismatch) = stored.as_ref().and_then(|stored| stored.mismatch(&topic_id, marks.end)) {
            return Err(Failed::Position(mismatch));
        }
        if let Some(owner) = owner {
            let next = stored.map(|stored| stored.offset);
            // What is in the log since before the store was there counts, too.
            return Ok(TakenOver { owner, next, start: next.unwrap_or(marks.start) });
        }
        let (epoch, position) = project.take_over(partition, &topic_id).await?;
        (owner, stored) = (Some(epoch), position);
    }
}

/// A partition that is held, as the metric counts it.
struct Held {
    stage: &'static str,
    reported_at: Option<tokio::time::Instant>,
}

impl Held {
    fn new(stage: &'static str) -> Self {
        metrics().projected_held.with_label_values(&[stage]).inc();
        Self { stage, reported_at: None }
    }

    fn report(&mut self, partition: Partition, mismatch: &Mismatch, clock: &Clock) {
        let now = clock.instant();
        if self.reported_at.is_some_and(|at| now < at + HELD_REPORT_INTERVAL) {
            return;
        }
        self.reported_at = Some(now);
        let stage = self.stage;
        tracing::error!(
            stage,
            partition = partition.0,
            reason = %mismatch,
            "a stored position does not fit the log, nothing of the partition is counted: `laneway offsets reset {stage}` sets it"
        );
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        metrics().projected_held.with_label_values(&[self.stage]).dec();
    }
}
