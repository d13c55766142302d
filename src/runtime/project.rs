//! From a topic into a store, exactly once: what records mean is written together with the positions behind them, in one
//! transaction of the store, and a partition is read from where the store says.
//!
//! Whoever gets a partition takes it over in the store first: what an earlier owner has under way is refused there, however
//! late it wakes up. The log's committed offsets follow for tools that show lag; nothing is ever read from them.
//!
//! A stored position names the topic that it was stored for. One of another topic, or one beyond the log's end, says nothing about
//! this log: reading from it would pass records over, reading from the beginning could count records twice. The partition is then
//! held: nothing of it is written until an operator sets its position, or the log fits it again. The other partitions go on.
//!
//! The store may be away for as long as it likes: what was read waits in bounded memory, the rest in the log.

mod position;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};

use crate::clock::Clock;
use crate::log::{Backend, Commit, Committed, Limit, LogError, Polled, Session};
use crate::model::record::{Epoch, Offset, Partition, Record, Topic, TopicId};
use crate::runtime::driver::{self, Serve, Settings};
use crate::runtime::shutdown::Shutdown;
use crate::store::{Move, Position, StoreError};
use crate::telemetry::metrics::metrics;
use crate::telemetry::seldom;
use crate::telemetry::server::Ready;

use position::{TakenOver, take_over};

/// One poll.
const READ: Limit = Limit { records: 2_000, bytes: 4 << 20 };
/// What is read and not written yet, of all partitions. Beyond it nothing more is read.
const WAITING: usize = 16 << 20;
/// What is written at a time, at most: a transaction should take a moment.
const WRITE: usize = 1 << 20;
/// After the shutdown's budget a log that does not answer is not waited for any longer.
const OVERDUE: Duration = Duration::from_secs(5);
/// A store that is away is asked again after this.
const AGAIN: Duration = Duration::from_secs(1);

/// A stage's logic.
pub trait Project: Send + Sync + 'static {
    /// The stored position of a partition.
    fn position(&self, partition: Partition) -> impl Future<Output = Result<Option<Position>, StoreError>> + Send;

    /// Makes this process the owner of a partition, as far as the store goes: its epoch there, and its position. `topic`: what a
    /// position of no known topic belongs to from now on.
    fn take_over(
        &self,
        partition: Partition,
        topic: &TopicId,
    ) -> impl Future<Output = Result<(i64, Option<Position>), StoreError>> + Send;

    /// Writes what records mean, and moves their partitions on: both or nothing.
    fn write(&self, moves: &[Move], records: &[Record]) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// The store will never take this record: it is passed over.
    fn refused(&self, record: &Record, error: &StoreError);
}

/// Runs a stage until shutdown. The log's offsets are committed at the settings' interval.
///
/// # Errors
/// As [`driver::keep`].
pub async fn run<B: Backend, P: Project>(
    backend: B,
    project: Arc<P>,
    settings: Settings,
    clock: Clock,
    shutdown: Shutdown,
    ready: Ready,
) -> Result<(), LogError> {
    let serve = Projecting {
        backend: backend.clone(),
        project,
        stage: settings.stage,
        topic: settings.member.topic.clone(),
        interval: settings.commit_interval,
        clock: clock.clone(),
        shutdown: shutdown.clone(),
    };
    driver::keep(&backend, &settings, &clock, &shutdown, ready, serve).await
}

struct Projecting<B, P> {
    backend: B,
    project: Arc<P>,
    stage: &'static str,
    topic: Topic,
    interval: Duration,
    clock: Clock,
    shutdown: Shutdown,
}

/// A partition of this process.
struct Part {
    epoch: Epoch,
    /// In the store. None: it is being taken over.
    owner: Option<i64>,
    taking_over: Option<AbortHandle>,
    /// As the store has it. None: nothing was written yet.
    written: Option<Offset>,
    records: Vec<Record>,
    bytes: usize,
    /// The log has not been told.
    is_news: bool,
}

/// What a task of this session has done.
enum Done {
    TookOver { partition: Partition, epoch: Epoch, owner: i64, next: Option<Offset>, start: Offset },
    Wrote { moves: Vec<(Epoch, Move)>, result: Result<(), StoreError> },
}

/// The state of one session.
struct Parts {
    all: BTreeMap<Partition, Part>,
    tasks: JoinSet<Done>,
    /// Records are being written.
    is_writing: bool,
    /// Nothing more is read.
    is_full: bool,
}

impl<B: Backend, P: Project> Serve<B::Session> for Projecting<B, P> {
    async fn serve(&mut self, mut session: B::Session, ready: &mut Ready) -> Result<(), LogError> {
        ready.set(true);
        let mut parts = Parts { all: BTreeMap::new(), tasks: JoinSet::new(), is_writing: false, is_full: false };
        let (stop, clock) = (self.shutdown.clone(), self.clock.clone());
        let overdue = async {
            stop.begun().await;
            clock.sleep(stop.budget + OVERDUE).await;
        };
        let ended = tokio::select! {
            ended = self.go(&mut session, &mut parts) => ended,
            () = overdue => Ok(()),
        };
        // A transaction that is cut off has either been committed, or not: the next owner sees.
        parts.tasks.shutdown().await;
        session.close().await;
        ended
    }
}

impl<B: Backend, P: Project> Projecting<B, P> {
    async fn go(&self, session: &mut B::Session, parts: &mut Parts) -> Result<(), LogError> {
        let mut tell_at = self.clock.instant() + self.interval;
        loop {
            self.write(parts);
            self.bound(session, parts)?;
            if self.clock.instant() >= tell_at {
                self.tell(session, parts).await?;
                tell_at = self.clock.instant() + self.interval;
            }
            if self.shutdown.has_begun() {
                return self.stop(session, parts).await;
            }
            tokio::select! {
                biased;
                () = self.shutdown.begun() => {}
                Some(done) = parts.tasks.join_next() => self.done(session, parts, done)?,
                polled = session.poll(READ) => self.polled(session, parts, polled?)?,
                () = self.clock.sleep_until(tell_at) => {}
            }
        }
    }

    fn polled(&self, session: &mut B::Session, parts: &mut Parts, polled: Polled) -> Result<(), LogError> {
        match polled {
            Polled::Assigned(given) => {
                for assignment in given {
                    self.take_over(parts, assignment.partition, assignment.epoch);
                }
            }
            Polled::Records(records) => {
                let mut rewound = BTreeMap::new();
                for record in records {
                    let Some(part) = parts.all.get_mut(&record.partition).filter(|part| part.owner.is_some()) else {
                        continue;
                    };
                    if part.written.is_some_and(|written| record.offset < written) {
                        rewound.insert(record.partition, part.epoch);
                        continue;
                    }
                    part.bytes += record.weight();
                    part.records.push(record);
                }
                // The log begins anew below what is written: it may be another one by now.
                for (partition, epoch) in rewound {
                    session.pause(&[partition])?;
                    self.take_over(parts, partition, epoch);
                }
            }
            // What is being written ends by itself, or is refused.
            Polled::Revoked(gone) | Polled::Lost(gone) => {
                for partition in gone {
                    let part = parts.all.remove(&partition);
                    part.and_then(|part| part.taking_over).iter().for_each(AbortHandle::abort);
                }
            }
            Polled::Idle => {}
        }
        Ok(())
    }

    fn take_over(&self, parts: &mut Parts, partition: Partition, epoch: Epoch) {
        let (project, backend) = (Arc::clone(&self.project), self.backend.clone());
        let (topic, clock, stage) = (self.topic.clone(), self.clock.clone(), self.stage);
        let handle = parts.tasks.spawn(async move {
            let TakenOver { owner, next, start } =
                take_over(&backend, &*project, &topic, partition, stage, &clock).await;
            Done::TookOver { partition, epoch, owner, next, start }
        });
        let part = Part {
            epoch,
            owner: None,
            taking_over: Some(handle),
            written: None,
            records: Vec::new(),
            bytes: 0,
            is_news: false,
        };
        parts.all.insert(partition, part);
    }

    /// Writes what has come, unless something is being written.
    fn write(&self, parts: &mut Parts) {
        if parts.is_writing {
            return;
        }
        let (mut work, mut bytes) = (Vec::new(), 0);
        for (partition, part) in &mut parts.all {
            let Some(owner) = part.owner else { continue };
            let fits = |record: &&Record| {
                let before = bytes;
                bytes += record.weight();
                before < WRITE
            };
            let count = part.records.iter().take_while(fits).count();
            let records: Vec<Record> = part.records.drain(..count).collect();
            let Some(last) = records.last() else { continue };
            let to = last.offset.just_after();
            let step = Move { partition: *partition, epoch: owner, from: part.written, to };
            work.push(Written { epoch: part.epoch, step, records });
        }
        if work.is_empty() {
            return;
        }
        parts.is_writing = true;
        let (project, clock, stage) = (Arc::clone(&self.project), self.clock.clone(), self.stage);
        parts.tasks.spawn(async move {
            let result = write(&*project, &work, stage, &clock).await;
            Done::Wrote { moves: work.into_iter().map(|it| (it.epoch, it.step)).collect(), result }
        });
    }

    fn done(
        &self,
        session: &mut B::Session,
        parts: &mut Parts,
        done: Result<Done, tokio::task::JoinError>,
    ) -> Result<(), LogError> {
        match done {
            Ok(Done::TookOver { partition, epoch, owner, next, start }) => {
                let Some(part) = parts.all.get_mut(&partition).filter(|part| part.epoch == epoch) else {
                    return Ok(());
                };
                (part.owner, part.written, part.taking_over) = (Some(owner), next, None);
                // Whoever had it may have gone before it told.
                part.is_news = next.is_some();
                session.seek(partition, start)?;
                if !parts.is_full {
                    session.resume(&[partition])?;
                }
            }
            Ok(Done::Wrote { moves, result }) => {
                parts.is_writing = false;
                for (epoch, it) in moves {
                    let Some(part) = parts.all.get_mut(&it.partition).filter(|part| part.epoch == epoch) else {
                        continue;
                    };
                    if let Err(error) = &result {
                        // The answer to a commit was lost, or somebody else has it and the log does not say so yet. What was
                        // read ahead is in the way: everything is taken over anew.
                        return Err(LogError::broken(format!("{}: {error}", it.partition)));
                    }
                    part.bytes = part.records.iter().map(Record::weight).sum();
                    (part.written, part.is_news) = (Some(it.to), true);
                }
            }
            // A partition that was lost.
            Err(error) if error.is_cancelled() => {}
            Err(error) => return Err(LogError::transient(format!("a write crashed: {error}"))),
        }
        Ok(())
    }

    /// Reads on, or no further.
    fn bound(&self, session: &mut B::Session, parts: &mut Parts) -> Result<(), LogError> {
        let bytes: usize = parts.all.values().map(|part| part.bytes).sum();
        let owned = parts.all.iter().filter(|(_, part)| part.owner.is_some());
        let owned: Vec<Partition> = owned.map(|(partition, _)| *partition).collect();
        match (bytes > WAITING, parts.is_full) {
            (true, false) => session.pause(&owned)?,
            (false, true) => session.resume(&owned)?,
            _ => return Ok(()),
        }
        parts.is_full = !parts.is_full;
        Ok(())
    }

    /// Tells the log how far it is.
    async fn tell(&self, session: &mut B::Session, parts: &mut Parts) -> Result<(), LogError> {
        let mut commit = Commit::default();
        for (partition, part) in parts.all.iter_mut().filter(|(_, part)| part.is_news) {
            let Some(offset) = part.written else { continue };
            let position = Committed { offset, metadata: String::new() };
            commit.offsets.insert(*partition, (part.epoch, position));
        }
        if commit.offsets.is_empty() {
            return Ok(());
        }
        match session.commit(Arc::new(commit)).await {
            // It is only for others to see.
            Err(LogError::Transient(_)) => {}
            told => {
                told?;
                parts.all.values_mut().for_each(|part| part.is_news = false);
            }
        }
        Ok(())
    }

    /// Waits for what is being written, within the budget.
    async fn stop(&self, session: &mut B::Session, parts: &mut Parts) -> Result<(), LogError> {
        let until = self.clock.instant() + self.shutdown.budget;
        parts.all.values().filter_map(|part| part.taking_over.as_ref()).for_each(AbortHandle::abort);
        while parts.is_writing && self.clock.instant() < until {
            tokio::select! {
                Some(done) = parts.tasks.join_next() => self.done(session, parts, done)?,
                () = self.clock.sleep_until(until) => {}
            }
        }
        // It is only for others to see.
        tokio::select! {
            told = self.tell(session, parts) => told,
            () = self.clock.sleep(AGAIN) => Ok(()),
        }
    }
}

/// What is written of one partition.
struct Written {
    epoch: Epoch,
    step: Move,
    records: Vec<Record>,
}

/// Writes until it is done, or somebody else has written. What the store never takes is looked for, and passed over.
async fn write<P: Project>(
    project: &P,
    work: &[Written],
    stage: &'static str,
    clock: &Clock,
) -> Result<(), StoreError> {
    let moves: Vec<Move> = work.iter().map(|it| it.step.clone()).collect();
    let records: Vec<Record> = work.iter().flat_map(|it| it.records.iter().cloned()).collect();
    match persistent(project, &moves, &records, stage, clock).await {
        Err(StoreError::Refused(_)) => {}
        written => return written,
    }
    for it in work {
        let mut from = it.step.from;
        // Small steps, one record alone where it has to be.
        let mut rest = &it.records[..];
        let mut count = rest.len().div_ceil(2).max(1);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(count.min(rest.len()));
            let to = now.last().map_or(it.step.to, |last| last.offset.just_after());
            let step = [Move { from, to, ..it.step.clone() }];
            match persistent(project, &step, now, stage, clock).await {
                Err(StoreError::Refused(_)) if now.len() > 1 => {
                    count = now.len() / 2;
                    continue;
                }
                Err(error @ StoreError::Refused(_)) => {
                    persistent(project, &step, &[], stage, clock).await?;
                    project.refused(&now[0], &error);
                }
                written => written?,
            }
            (from, rest) = (Some(to), later);
        }
    }
    Ok(())
}

/// Writes again and again while the store is away.
async fn persistent<P: Project>(
    project: &P,
    moves: &[Move],
    records: &[Record],
    stage: &'static str,
    clock: &Clock,
) -> Result<(), StoreError> {
    loop {
        match project.write(moves, records).await {
            Err(error @ (StoreError::Away(_) | StoreError::Unmigrated(_))) => complain(stage, &error),
            Err(error) => return Err(error),
            Ok(()) => {
                metrics().projected.with_label_values(&[stage]).inc_by(records.len() as u64);
                return Ok(());
            }
        }
        clock.sleep(AGAIN).await;
    }
}

fn complain(stage: &'static str, error: &StoreError) {
    metrics().store_failures.with_label_values(&[stage]).inc();
    if let Some(left_out) = seldom::due("the store does not take it", &error.to_string()) {
        match error {
            StoreError::Away(_) => {
                tracing::warn!(stage, %error, left_out, "the store is away, what is to be written waits")
            }
            _ => tracing::error!(stage, %error, left_out, "the store does not take it, what is to be written waits"),
        }
    }
}

#[cfg(test)]
mod tests;
