//! One session's life: from its first assignment until it ends.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use crate::clock::Clock;
use crate::log::{Assignment, Backend, Commit, Committer, Limit, LogError, Polled, Session};
use crate::model::record::{Epoch, Offset, Partition, Record};
use crate::runtime::planted::{Mistake, is_planted};
use crate::runtime::shutdown::Shutdown;
use crate::telemetry::events;
use crate::telemetry::server::Ready;

use super::lease::Lease;
use super::pending::Pending;
use super::watchdog::{self, Found, Judgement, Watch};
use super::{Ask, Bell, Changes, INBOX_BATCHES, Inbox, Settings, Work};

const POLL: Limit = Limit { records: 1_000, bytes: 4 << 20 };
/// A failed commit is repeated after this, doubling up to the second.
const REPEAT: Duration = Duration::from_millis(50);
const REPEAT_CAP: Duration = Duration::from_secs(1);
/// Workers answer between two of their steps; one that does not within this joins the next commit.
const COLLECT: Duration = Duration::from_millis(200);
/// After the drain: for the last commit.
const LAST_COMMIT: Duration = Duration::from_secs(5);
/// A session without any assignment for so long still counts as ready: others may own everything.
const SETTLED: Duration = Duration::from_secs(10);

/// A partition that is ours.
struct Slot {
    epoch: Epoch,
    records: mpsc::Sender<Vec<Record>>,
    asks: mpsc::UnboundedSender<Ask>,
    stash: Vec<Record>,
    /// Its worker has been asked and has not answered yet.
    asked: bool,
    restored: bool,
    /// The worker has been told to start nothing new; tells when nothing is under way any more.
    drained: Option<oneshot::Receiver<()>>,
    watch: Watch,
    worker: AbortHandle,
}

/// What the driver does while a commit is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meanwhile {
    /// Polls, and feeds the workers.
    Read,
    Wait,
}

type Answer<T> = Pin<Box<dyn Future<Output = (Partition, Epoch, Option<T>)> + Send>>;

pub struct Driver<'a, B: Backend, W: Work> {
    backend: B,
    session: B::Session,
    work: Arc<W>,
    settings: &'a Settings,
    clock: &'a Clock,
    shutdown: &'a Shutdown,
    slots: BTreeMap<Partition, Slot>,
    workers: JoinSet<(Partition, Epoch, Result<(), LogError>)>,
    restoring: FuturesUnordered<Answer<Offset>>,
    answers: FuturesUnordered<Answer<Option<Changes>>>,
    looks: FuturesUnordered<Answer<Found>>,
    look_at: Instant,
    pending: Pending,
    bell: Arc<Bell>,
    lease: Arc<Lease>,
    /// What was polled while a commit was under way, and has to wait for its end.
    held: Option<Result<Polled, LogError>>,
    /// When the next commit may begin; none while nothing has changed.
    due: Option<Instant>,
    last_commit: Instant,
    repeat: Duration,
}

impl<'a, B: Backend, W: Work> Driver<'a, B, W> {
    pub fn new(
        backend: B,
        session: B::Session,
        work: Arc<W>,
        settings: &'a Settings,
        clock: &'a Clock,
        shutdown: &'a Shutdown,
    ) -> Self {
        Self {
            backend,
            session,
            work,
            settings,
            clock,
            shutdown,
            slots: BTreeMap::new(),
            workers: JoinSet::new(),
            restoring: FuturesUnordered::new(),
            answers: FuturesUnordered::new(),
            looks: FuturesUnordered::new(),
            look_at: clock.instant() + watchdog::LOOK,
            pending: Pending::default(),
            bell: Arc::default(),
            lease: Arc::new(Lease::new(clock.clone(), settings.member.session_timeout)),
            held: None,
            due: None,
            last_commit: clock.instant(),
            repeat: REPEAT,
        }
    }

    /// Runs until shutdown (and closes the session) or until the session has to be rebuilt.
    pub async fn run(mut self, ready: &mut Ready) -> Result<(), LogError> {
        let (clock, shutdown) = (self.clock.clone(), self.shutdown);
        // A log that does not answer must not keep a process that was told to stop, whatever it is asked for.
        let overdue = async {
            shutdown.begun().await;
            clock.sleep(shutdown.budget + LAST_COMMIT).await;
        };
        tokio::pin!(overdue);
        let whole = async {
            self.serve(shutdown, ready).await?;
            // What was held while the last commit was under way.
            match self.held.take() {
                Some(Err(error)) => return Err(error),
                Some(Ok(rebalance @ (Polled::Lost(_) | Polled::Revoked(_)))) => self.react(rebalance).await?,
                Some(Ok(Polled::Assigned(_) | Polled::Records(_) | Polled::Idle)) | None => {}
            }
            let all: Vec<Partition> = self.slots.keys().copied().collect();
            Ok(self.release(&all, shutdown.budget).await)
        };
        let stopped = tokio::select! {
            biased;
            whole = whole => whole,
            () = &mut overdue => Ok(Err(LogError::transient("the log does not answer"))),
        };
        if let Ok(Err(error)) = &stopped {
            let stage = self.settings.stage;
            tracing::warn!(stage, %error, "stopped without a last commit; what was under way will be repeated");
        }
        self.workers.shutdown().await;
        events::owned(self.settings.stage, 0);
        match &stopped {
            Ok(_) => self.session.close().await,
            Err(_) => drop(self.session),
        }
        stopped.map(drop)
    }

    async fn serve(&mut self, shutdown: &Shutdown, ready: &mut Ready) -> Result<(), LogError> {
        let opened = self.clock.instant();
        while !shutdown.has_begun() {
            ready.set(match self.slots.is_empty() {
                true => opened.elapsed() > SETTLED,
                false => self.slots.values().all(|slot| slot.restored),
            });
            if let Some(held) = self.held.take() {
                self.react(held?).await?;
                continue;
            }
            let due = self.due.unwrap_or_else(|| self.clock.instant() + Duration::from_secs(3_600));
            let bell = Arc::clone(&self.bell);
            tokio::select! {
                biased;
                () = shutdown.begun() => {}
                Some(answer) = self.restoring.next() => self.start_reading(answer)?,
                Some(answer) = self.answers.next() => {
                    self.take(answer);
                    if self.answers.is_empty() {
                        self.commit(Meanwhile::Read).await?;
                    }
                }
                Some(ended) = self.workers.join_next() => self.worker_ended(ended)?,
                // While a commit is due anyway a ring says nothing new, and would only interrupt the poll.
                () = bell.wake.notified(), if self.due.is_none() || self.is_stashing() => self.answer_bell()?,
                () = self.clock.sleep_until(due) => self.collect_or_commit().await?,
                // What has not been committed yet has to wait for its time to be tried again.
                () = bell.full.notified(), if self.pending.is_empty() => self.due = Some(self.clock.instant()),
                Some(found) = self.looks.next() => self.judge(found)?,
                () = self.clock.sleep_until(self.look_at) => self.look(),
                polled = self.session.poll(POLL) => self.react(polled?).await?,
            }
        }
        Ok(())
    }

    /// Looks into partitions whose live reading stands still.
    fn look(&mut self) {
        let now = self.clock.instant();
        self.look_at = now + watchdog::LOOK;
        if !self.looks.is_empty() {
            return;
        }
        for (partition, slot) in &mut self.slots {
            if !slot.stash.is_empty() || !slot.restored {
                slot.watch.waits(now);
            } else if slot.watch.is_still(now) {
                let (partition, epoch, watch) = (*partition, slot.epoch, slot.watch);
                let (backend, topic) = (self.backend.clone(), self.settings.member.topic.clone());
                self.looks.push(Box::pin(async move {
                    (partition, epoch, Some(watchdog::look(backend, topic, partition, watch).await))
                }));
            }
        }
    }

    fn judge(&mut self, (partition, epoch, found): (Partition, Epoch, Option<Found>)) -> Result<(), LogError> {
        let now = self.clock.instant();
        let Some(slot) = self.slots.get_mut(&partition).filter(|slot| slot.epoch == epoch) else { return Ok(()) };
        if !slot.stash.is_empty() {
            return Ok(());
        }
        match slot.watch.judge(found.unwrap_or(Found::Unknown), now) {
            Judgement::Fine => Ok(()),
            Judgement::Overdue(at) => {
                events::undecided(&self.settings.member.topic, partition, &at);
                Ok(())
            }
            Judgement::Stuck => {
                let position = slot.watch.position();
                events::stalled(self.settings.stage, partition, &position);
                Err(LogError::transient(format!("reading of partition {partition} stands still at {position}")))
            }
        }
    }

    fn is_stashing(&self) -> bool {
        self.slots.values().any(|slot| !slot.stash.is_empty())
    }

    async fn react(&mut self, polled: Polled) -> Result<(), LogError> {
        match polled {
            Polled::Records(records) => self.feed(records),
            Polled::Assigned(given) => {
                let numbers: Vec<Partition> = given.iter().map(|assignment| assignment.partition).collect();
                events::rebalanced(self.settings.stage, "assigned", &numbers);
                for assignment in given {
                    if assignment.partition.0 < self.settings.partitions {
                        self.begin(assignment);
                    } else {
                        events::undeclared_partition(self.settings.stage, assignment.partition);
                    }
                }
                events::owned(self.settings.stage, self.slots.len());
                Ok(())
            }
            Polled::Revoked(taken) => {
                events::rebalanced(self.settings.stage, "revoked", &taken);
                let released = self.release(&taken, self.settings.member.revoke_drain).await;
                self.forget(&taken);
                released
            }
            Polled::Lost(gone) => {
                self.lose(&gone);
                Ok(())
            }
            Polled::Idle => Ok(()),
        }
    }

    fn lose(&mut self, gone: &[Partition]) {
        events::rebalanced(self.settings.stage, "lost", gone);
        self.forget(gone);
    }

    fn begin(&mut self, assignment: Assignment) {
        let (partition, epoch) = (assignment.partition, assignment.epoch);
        self.pending.begin(partition, epoch);
        let (records, inbox_records) = mpsc::channel(INBOX_BATCHES);
        let (asks, inbox_asks) = mpsc::unbounded_channel();
        let (ready, restored) = oneshot::channel();
        let (bell, lease) = (Arc::clone(&self.bell), Arc::clone(&self.lease));
        let inbox = Inbox { records: inbox_records, asks: inbox_asks, ready, bell, lease };
        let work = Arc::clone(&self.work);
        let worker = self.workers.spawn(async move { (partition, epoch, work.run(assignment, inbox).await) });
        self.restoring.push(Box::pin(async move { (partition, epoch, restored.await.ok()) }));
        let watch = Watch::new(Offset::START, self.clock.instant());
        let stash = Vec::new();
        let slot = Slot { epoch, records, asks, stash, asked: false, restored: false, drained: None, watch, worker };
        if let Some(old) = self.slots.insert(partition, slot) {
            old.worker.abort();
        }
    }

    fn start_reading(&mut self, (partition, epoch, from): (Partition, Epoch, Option<Offset>)) -> Result<(), LogError> {
        let Some(slot) = self.slots.get_mut(&partition).filter(|slot| slot.epoch == epoch) else { return Ok(()) };
        // A worker that ended before it was ready says why when it is joined.
        let Some(from) = from else { return Ok(()) };
        slot.restored = true;
        slot.watch = Watch::new(from, self.clock.instant());
        self.session.seek(partition, from)?;
        self.session.resume(&[partition])
    }

    fn feed(&mut self, records: Vec<Record>) -> Result<(), LogError> {
        let mut by_partition: BTreeMap<Partition, Vec<Record>> = BTreeMap::new();
        for record in records {
            by_partition.entry(record.partition).or_default().push(record);
        }
        for (partition, batch) in by_partition {
            let Some(slot) = self.slots.get_mut(&partition) else { continue };
            if let Some(last) = batch.last() {
                slot.watch.moved(last.offset.just_after(), self.clock.instant());
            }
            if slot.stash.is_empty() {
                match slot.records.try_send(batch) {
                    Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => continue,
                    Err(mpsc::error::TrySendError::Full(batch)) => slot.stash = batch,
                }
                self.session.pause(&[partition])?;
            } else {
                // Polled before the pause took effect.
                slot.stash.extend(batch);
            }
        }
        Ok(())
    }

    /// A worker has room, or has changes.
    fn answer_bell(&mut self) -> Result<(), LogError> {
        for (partition, slot) in &mut self.slots {
            if slot.stash.is_empty() {
                continue;
            }
            match slot.records.try_send(std::mem::take(&mut slot.stash)) {
                Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => self.session.resume(&[*partition])?,
                Err(mpsc::error::TrySendError::Full(batch)) => slot.stash = batch,
            }
        }
        let earliest = self.last_commit + self.settings.commit_interval;
        self.due.get_or_insert(earliest.max(self.clock.instant()));
        Ok(())
    }

    async fn collect_or_commit(&mut self) -> Result<(), LogError> {
        self.due = None;
        if self.pending.is_empty() {
            let all: Vec<Partition> = self.slots.keys().copied().collect();
            self.ask(&all);
            if self.answers.is_empty() { Ok(()) } else { self.gather().await }
        } else {
            self.commit(Meanwhile::Read).await?;
            // Who rang while this commit was failing was not heard.
            self.due.get_or_insert(self.last_commit + self.settings.commit_interval);
            Ok(())
        }
    }

    fn ask(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            let Some(slot) = self.slots.get_mut(partition).filter(|slot| !slot.asked && slot.restored) else {
                continue;
            };
            let (answer, answered) = oneshot::channel();
            if slot.asks.send(Ask::Collect(answer)).is_ok() {
                slot.asked = true;
                let (partition, epoch) = (*partition, slot.epoch);
                self.answers.push(Box::pin(async move { (partition, epoch, answered.await.ok()) }));
            }
        }
    }

    /// Waits a moment for the answers: workers answer between two steps, so almost always at once.
    async fn gather(&mut self) -> Result<(), LogError> {
        self.take_answers(COLLECT).await;
        self.commit(Meanwhile::Read).await
    }

    async fn take_answers(&mut self, patience: Duration) {
        let until = self.clock.instant() + patience;
        while !self.answers.is_empty() {
            tokio::select! {
                biased;
                Some(answer) = self.answers.next() => self.take(answer),
                () = self.clock.sleep_until(until) => return,
            }
        }
    }

    fn take(&mut self, (partition, epoch, changes): (Partition, Epoch, Option<Option<Changes>>)) {
        let Some(slot) = self.slots.get_mut(&partition).filter(|slot| slot.epoch == epoch) else { return };
        slot.asked = false;
        if let Some(Some(changes)) = changes {
            self.pending.add(partition, epoch, changes);
        }
    }

    /// Commits what is pending. A failure that can pass leaves it pending and tries again later.
    async fn commit(&mut self, meanwhile: Meanwhile) -> Result<(), LogError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (began, uptime) = (self.clock.instant(), self.lease.now());
        self.last_commit = began;
        match self.committed(Arc::new(self.pending.commit()), meanwhile).await? {
            Ok(()) => {
                events::committed(self.settings.stage, began.elapsed());
                self.lease.renew(uptime);
                for partition in self.pending.partitions() {
                    if let Some(slot) = self.slots.get(&partition) {
                        // A worker that has ended is told by its join.
                        let _ = slot.asks.send(Ask::Committed);
                    }
                }
                self.pending.clear();
                self.repeat = REPEAT;
                Ok(())
            }
            Err(LogError::Transient(error)) => {
                events::commit_failed(self.settings.stage, &error);
                if is_planted(Mistake::DropAfterFailedCommit) {
                    self.pending.clear();
                }
                self.due = Some(self.clock.instant() + self.repeat);
                self.repeat = (self.repeat * 2).min(REPEAT_CAP);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// How a commit ends. Reading and working go on meanwhile; a rebalance, or the end of the session, waits until then. But
    /// partitions that are revoked meanwhile start nothing new from that moment on, and end when the log gives them away.
    async fn committed(&mut self, commit: Arc<Commit>, meanwhile: Meanwhile) -> Result<Result<(), LogError>, LogError> {
        let mut committer = self.session.committer();
        let committing = committer.commit(commit);
        tokio::pin!(committing);
        let bell = Arc::clone(&self.bell);
        let mut given_away_at: Option<Instant> = None;
        loop {
            let reads = meanwhile == Meanwhile::Read && self.held.is_none() && !self.shutdown.has_begun();
            tokio::select! {
                biased;
                ended = &mut committing => return Ok(ended),
                () = bell.wake.notified(), if reads && self.is_stashing() => self.answer_bell()?,
                () = self.clock.sleep_until(given_away_at.unwrap_or(self.last_commit)), if given_away_at.is_some() => {
                    given_away_at = None;
                    if let Some(Ok(Polled::Revoked(gone))) = &self.held {
                        self.lose(&gone.clone());
                    }
                }
                polled = self.session.poll(POLL), if reads => match polled {
                    Ok(Polled::Records(records)) => self.feed(records)?,
                    Ok(Polled::Idle) => {}
                    // Others have them by now: nothing of theirs is to go on.
                    Ok(Polled::Lost(gone)) => self.lose(&gone),
                    Ok(Polled::Revoked(leaving)) => {
                        self.stop(&leaving);
                        given_away_at = Some(self.clock.instant() + self.settings.member.release_timeout());
                        self.held = Some(Ok(Polled::Revoked(leaving)));
                    }
                    other => self.held = Some(other),
                },
            }
        }
    }

    /// Tells the workers of partitions that are leaving to start nothing new. What is under way goes on, and commits too.
    fn stop(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            let slot = self.slots.get_mut(partition).filter(|slot| slot.restored && slot.drained.is_none());
            let Some(slot) = slot else { continue };
            slot.stash.clear();
            let (done, drained) = oneshot::channel();
            if slot.asks.send(Ask::Drain(done)).is_ok() {
                slot.drained = Some(drained);
            }
        }
    }

    /// Lets partitions finish and commits them, within `budget`. They are still ours.
    async fn release(&mut self, partitions: &[Partition], budget: Duration) -> Result<(), LogError> {
        let until = self.clock.instant() + budget;
        self.stop(partitions);
        let leaving = partitions.iter().filter_map(|partition| self.slots.get_mut(partition)?.drained.take());
        let mut drained: FuturesUnordered<_> = leaving.collect();
        loop {
            // Commits go on while the drain lasts: who is killed in it repeats no more than usual.
            let next = self.clock.instant() + self.settings.commit_interval;
            tokio::select! {
                biased;
                next = drained.next() => if next.is_none() { break },
                () = self.clock.sleep_until(until) => break,
                () = self.clock.sleep_until(next) => self.settle(partitions).await?,
            }
        }
        for _ in 0..5 {
            self.settle(partitions).await?;
            if self.pending.is_empty() {
                break;
            }
            self.clock.sleep(REPEAT).await;
        }
        Ok(())
    }

    /// Collects and commits.
    async fn settle(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.take_answers(COLLECT).await;
        self.ask(partitions);
        self.take_answers(COLLECT).await;
        // The next poll would say that they are released.
        self.commit(Meanwhile::Wait).await
    }

    fn forget(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            if let Some(slot) = self.slots.remove(partition) {
                slot.worker.abort();
            }
        }
        self.pending.forget(partitions);
        events::owned(self.settings.stage, self.slots.len());
    }

    fn worker_ended(
        &self,
        ended: Result<(Partition, Epoch, Result<(), LogError>), tokio::task::JoinError>,
    ) -> Result<(), LogError> {
        match ended {
            Ok((partition, epoch, result)) => {
                let current = self.slots.get(&partition).is_some_and(|slot| slot.epoch == epoch);
                // The end of a worker whose partition is gone is expected, however it ended.
                if current { result } else { Ok(()) }
            }
            Err(error) if error.is_cancelled() => Ok(()),
            Err(error) => Err(LogError::transient(format!("a worker crashed: {error}"))),
        }
    }
}
