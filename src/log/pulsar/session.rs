//! One group member on Pulsar.
//!
//! A partition is taken in three steps: the group's shares say who should have it ([`super::members`]), the broker gives one member its
//! only producer ([`super::positions`]), and reading goes on where the last owner committed. What is read comes from readers of our own; the
//! subscription under the group's name is moved along behind, for the broker's retention and the operator's tools.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::log::{Assignment, Commit, Committer, Guarantee, Limit, LogError, Member, Polled, Publisher, Session};
use crate::model::record::{Addressed, Epoch, Offset, Partition, Record, Topic};
use crate::telemetry::seldom;

use super::config::Alone;
use super::floor;
use super::membership::{Membership, Own};
use super::positions::{Kept, Lock, Place};
use super::publisher::{PulsarPublisher, partitions};
use super::reader::{Feed, From};

/// A poll without anything to tell ends after so long.
const IDLE: Duration = Duration::from_millis(200);
/// To take a partition takes so long at most.
const ACQUIRE: Duration = Duration::from_secs(30);
/// What is left of a session when it is closed is let go of within so long.
const CLOSE: Duration = Duration::from_secs(5);
/// A partition that somebody else has is asked for so often.
const ASK: Duration = Duration::from_millis(100);

pub struct PulsarSession {
    own: Arc<Own>,
    /// What is ours, as the poller was told.
    read: BTreeMap<Partition, Reading>,
    /// Revoked, given back at the next poll.
    releasing: BTreeSet<Partition>,
    asking: JoinSet<(Partition, Result<Option<Lock>, LogError>)>,
    /// Those that are asked for, since when in vain, and when it was last tried.
    wanted: BTreeMap<Partition, Wanted>,
    opening: JoinSet<(Partition, u64, Result<Feed, LogError>)>,
    turn: usize,
    _membership: Membership,
    _floor: AbortOnDropHandle<()>,
}

struct Wanted {
    since: Instant,
    tried: Option<Instant>,
    is_asked: bool,
}

/// Where a partition is read.
struct Reading {
    next: Offset,
    is_paused: bool,
    /// Counts seeks: what an earlier one opened is of no use.
    seek: u64,
    feed: At,
    /// After an error it is not read before then.
    not_before: Instant,
}

enum At {
    Closed,
    Opening,
    Open(Box<Feed>),
}

impl Reading {
    /// It is opened again, a little later.
    fn fails(&mut self, error: &LogError, partition: Partition, now: Instant) {
        if let Some(left_out) = seldom::due("pulsar reading", &error.to_string()) {
            tracing::warn!(%error, left_out, partition = partition.0, "reading is interrupted");
        }
        (self.feed, self.not_before) = (At::Closed, now + ASK);
    }
}

impl PulsarSession {
    pub(super) async fn join(place: Place, member: Member, publisher: PulsarPublisher) -> Result<Self, LogError> {
        let count = partitions(&place.client, &member.topic).await?;
        if count == 0 {
            let name = place.client.config.name(&member.topic);
            return Err(LogError::fatal(format!("there is no partitioned topic {name}")));
        }
        place.prepare(count).await?;
        floor::prepare(&place, &place.input).await?;
        let own = Arc::new(Own::new(place, member, count, publisher));
        let membership = Membership::join(&own).await?;
        let floor = AbortOnDropHandle::new(tokio::spawn(floor::follow(Arc::clone(&own))));
        Ok(Self {
            own,
            read: BTreeMap::new(),
            releasing: BTreeSet::new(),
            asking: JoinSet::new(),
            wanted: BTreeMap::new(),
            opening: JoinSet::new(),
            turn: 0,
            _membership: membership,
            _floor: floor,
        })
    }

    /// What has happened to the assignment. Waits for nothing.
    fn event(&mut self) -> Result<Option<Polled>, LogError> {
        if self.own.is_fenced() {
            self.own.check()?;
        }
        self.release();
        let mut lost: Vec<Partition> = self.own.take_stolen().into_iter().collect();
        if self.own.is_silent() {
            lost.extend(self.read.keys());
            self.own.release(BTreeMap::clear);
            self.own.owns(BTreeMap::clear);
            self.own.lives_again();
        }
        lost.retain(|partition| self.read.remove(partition).is_some());
        if !lost.is_empty() {
            self.own.owns(|owned| owned.retain(|partition, _| !lost.contains(partition)));
            return Ok(Some(Polled::Lost(lost)));
        }
        let share = self.own.share();
        let surplus: Vec<Partition> = self.read.keys().copied().filter(|it| !share.contains(it)).collect();
        if !surplus.is_empty() {
            for partition in &surplus {
                self.read.remove(partition);
                self.releasing.insert(*partition);
            }
            return Ok(Some(Polled::Revoked(surplus)));
        }
        self.ask(&share);
        Ok(None)
    }

    /// Lets go of what was revoked at the last poll.
    fn release(&mut self) {
        let releasing = std::mem::take(&mut self.releasing);
        if releasing.is_empty() {
            return;
        }
        let own = Arc::clone(&self.own);
        tokio::spawn(async move {
            for partition in &releasing {
                let lock = own.locks.lock().await.remove(partition);
                if let Some(lock) = lock {
                    lock.close().await;
                }
            }
            own.owns(|owned| owned.retain(|partition, _| !releasing.contains(partition)));
        });
    }

    /// Asks the broker for what should be ours and nobody else says to have.
    fn ask(&mut self, share: &BTreeSet<Partition>) {
        if self.own.is_silent() {
            return;
        }
        let now = self.own.clock.instant();
        self.wanted.retain(|partition, wanted| wanted.is_asked || share.contains(partition));
        for partition in share.iter().copied().filter(|partition| !self.read.contains_key(partition)) {
            let wanted = self.wanted.entry(partition).or_insert(Wanted { since: now, tried: None, is_asked: false });
            if self.own.is_owned_by_another(partition) {
                // It lives: it will let go.
                wanted.since = now;
            }
            let is_due = wanted.tried.is_none_or(|tried| now.saturating_duration_since(tried) >= ASK);
            if wanted.is_asked || !is_due || self.own.is_owned_by_another(partition) {
                continue;
            }
            let is_silent = now.saturating_duration_since(wanted.since) >= self.own.member.session_timeout;
            let alone = if is_silent && self.own.hears() { Alone::Fencing } else { Alone::IfFree };
            (wanted.tried, wanted.is_asked) = (Some(now), true);
            let own = Arc::clone(&self.own);
            self.asking.spawn(async move {
                let (state, instance) = (own.member.state.as_ref(), own.member.instance.as_str());
                let acquired =
                    tokio::time::timeout(ACQUIRE, own.place.acquire(partition, state, alone, instance)).await;
                (partition, acquired.unwrap_or_else(|late| Err(LogError::transient(late))))
            });
        }
    }

    /// What became of one that was asked for.
    fn answered(
        &mut self,
        partition: Partition,
        answer: Result<Option<Lock>, LogError>,
    ) -> Result<Option<Polled>, LogError> {
        let lock = match answer {
            Ok(Some(lock)) => lock,
            answer @ (Ok(None) | Err(LogError::Transient(_) | LogError::Fenced(_))) => {
                if let Err(error) = answer
                    && let Some(left_out) = seldom::due("pulsar partition", &self.own.member.group)
                {
                    let (group, partition) = (self.own.member.group.as_str(), partition.0);
                    tracing::warn!(%error, left_out, group, partition, "a partition cannot be taken yet");
                }
                if let Some(wanted) = self.wanted.get_mut(&partition) {
                    wanted.is_asked = false;
                }
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        self.wanted.remove(&partition);
        let Kept { term, committed } = lock.kept.clone();
        // Nobody holds it for longer than a commit takes, and there is none of what is not ours.
        let Ok(mut locks) = self.own.locks.try_lock() else {
            let own = Arc::clone(&self.own);
            let again = async move {
                let locks = own.locks.lock().await;
                drop(locks);
                (partition, Ok(Some(lock)))
            };
            self.asking.spawn(again);
            return Ok(None);
        };
        locks.insert(partition, lock);
        drop(locks);
        self.own.owns(|owned| {
            owned.insert(partition, term);
        });
        let next = committed.as_ref().map_or(Offset::START, |committed| committed.offset);
        self.read.insert(
            partition,
            Reading { next, is_paused: true, seek: 0, feed: At::Closed, not_before: self.own.clock.instant() },
        );
        Ok(Some(Polled::Assigned(vec![Assignment { partition, epoch: Epoch(term), committed }])))
    }

    fn open(&mut self) {
        let now = self.own.clock.instant();
        for (partition, reading) in &mut self.read {
            if reading.is_paused || !matches!(reading.feed, At::Closed) || now < reading.not_before {
                continue;
            }
            reading.feed = At::Opening;
            let (own, partition, seek, from) = (Arc::clone(&self.own), *partition, reading.seek, reading.next);
            self.opening.spawn(async move {
                let feed = Feed::open(&own.place.client, &own.member.topic, partition, From::At(from)).await;
                (partition, seek, feed)
            });
        }
    }

    fn opened(&mut self, partition: Partition, seek: u64, feed: Result<Feed, LogError>) -> Result<(), LogError> {
        let Some(reading) = self.read.get_mut(&partition).filter(|reading| reading.seek == seek) else { return Ok(()) };
        match feed {
            Ok(feed) => reading.feed = At::Open(Box::new(feed)),
            Err(error @ LogError::Fatal(_)) => return Err(error),
            Err(error) => reading.fails(&error, partition, self.own.clock.instant()),
        }
        Ok(())
    }

    fn each(&mut self, partitions: &[Partition], change: impl Fn(&mut Reading)) {
        for partition in partitions {
            if let Some(reading) = self.read.get_mut(partition) {
                change(reading);
            }
        }
    }
}

impl Session for PulsarSession {
    const GUARANTEE: Guarantee = Guarantee::AtLeastOnce;
    type Committer = PulsarCommitter;

    async fn poll(&mut self, limit: Limit) -> Result<Polled, LogError> {
        let own = Arc::clone(&self.own);
        let until = own.clock.instant() + IDLE;
        loop {
            let rung = own.bell.notified();
            if let Some(event) = self.event()? {
                return Ok(event);
            }
            self.open();
            let now = own.clock.instant();
            if now >= until {
                return Ok(Polled::Idle);
            }
            // What is still to be asked for is asked for in time.
            let is_closed = self.read.values().any(|it| !it.is_paused && matches!(it.feed, At::Closed));
            let pause = if self.wanted.is_empty() && !is_closed { until - now } else { ASK.min(until - now) };
            let Self { asking, opening, read, turn, .. } = &mut *self;
            let records = std::future::poll_fn(|context| match take(read, turn, context, limit, now) {
                records if records.is_empty() => Poll::Pending,
                records => Poll::Ready(records),
            });
            let woken = tokio::select! {
                biased;
                Some(answer) = asking.join_next() => Woken::Answered(answer),
                Some(opened) = opening.join_next() => Woken::Opened(opened),
                records = records => Woken::Records(records),
                () = rung => Woken::Again,
                () = own.clock.sleep(pause) => Woken::Again,
            };
            match woken {
                Woken::Answered(answer) => {
                    let (partition, answer) = answer.map_err(LogError::broken)?;
                    if let Some(assigned) = self.answered(partition, answer)? {
                        return Ok(assigned);
                    }
                }
                Woken::Opened(opened) => {
                    let (partition, seek, feed) = opened.map_err(LogError::broken)?;
                    self.opened(partition, seek, feed)?;
                }
                Woken::Records(records) => return Ok(Polled::Records(records)),
                Woken::Again => {}
            }
        }
    }

    fn seek(&mut self, partition: Partition, to: Offset) -> Result<(), LogError> {
        self.each(&[partition], |reading| {
            (reading.next, reading.seek, reading.feed) = (to, reading.seek + 1, At::Closed);
        });
        Ok(())
    }

    fn pause(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.each(partitions, |reading| reading.is_paused = true);
        Ok(())
    }

    fn resume(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.each(partitions, |reading| reading.is_paused = false);
        Ok(())
    }

    fn committer(&self) -> PulsarCommitter {
        PulsarCommitter(Arc::clone(&self.own))
    }

    async fn close(mut self) {
        // What is being acquired right now goes with its task.
        self.asking.shutdown().await;
        let own = Arc::clone(&self.own);
        let release = async move {
            let locks = std::mem::take(&mut *own.locks.lock().await);
            futures_util::future::join_all(locks.into_values().map(Lock::close)).await;
            own.leave().await;
        };
        // With the broker away nobody waits for it.
        let _ = tokio::time::timeout(CLOSE, release).await;
    }
}

/// What is here of the partitions that are not paused, an even share of each.
fn take(
    read: &mut BTreeMap<Partition, Reading>,
    turn: &mut usize,
    context: &mut std::task::Context<'_>,
    limit: Limit,
    now: Instant,
) -> Vec<Record> {
    let open = |reading: &Reading| !reading.is_paused && matches!(reading.feed, At::Open(_));
    let ready: Vec<Partition> = read.iter().filter(|(_, reading)| open(reading)).map(|(it, _)| *it).collect();
    let mut records = Vec::new();
    if ready.is_empty() {
        return records;
    }
    *turn = turn.wrapping_add(1);
    let (count, size) = (limit.records.div_ceil(ready.len()), limit.bytes.div_ceil(ready.len()));
    for step in 0..ready.len() {
        let partition = ready[(*turn + step) % ready.len()];
        let Some(reading) = read.get_mut(&partition) else { continue };
        let (mut taken, mut bytes) = (0, 0);
        while taken < count && bytes < size {
            let At::Open(feed) = &mut reading.feed else { break };
            match feed.poll(context) {
                Poll::Ready(Ok(record)) => {
                    (taken, bytes) = (taken + 1, bytes + record.weight());
                    reading.next = record.offset.just_after();
                    records.push(record);
                }
                Poll::Ready(Err(error)) => reading.fails(&error, partition, now),
                Poll::Pending => break,
            }
        }
    }
    records
}

enum Woken<A, O> {
    Answered(A),
    Opened(O),
    Records(Vec<Record>),
    Again,
}

pub struct PulsarCommitter(Arc<Own>);

impl Committer for PulsarCommitter {
    /// Outputs first, then what only the owner writes, then the positions: whatever a crash cuts off comes again.
    async fn commit(&mut self, commit: Arc<Commit>) -> Result<(), LogError> {
        let own = &self.0;
        own.check()?;
        let mut locks = own.locks.lock().await;
        for (partition, (epoch, _)) in &commit.offsets {
            if locks.get(partition).is_none_or(|lock| lock.kept.term != epoch.0) {
                return Err(LogError::transient(format!("partition {partition} is not this member's any more")));
            }
        }
        let is_state = |topic: &Topic| own.member.state.as_ref() == Some(topic);
        let without = |output: &&Addressed| is_state(&output.topic) && !commit.offsets.contains_key(&output.partition);
        if let Some(output) = commit.outputs.iter().find(without) {
            let text = format!("state of partition {} is to be written without its position", output.partition);
            return Err(LogError::broken(text));
        }
        let shared = commit.outputs.iter().filter(|output| !is_state(&output.topic)).cloned().collect();
        own.publisher.publish(shared).await?;
        // That may have taken long.
        own.check()?;
        let instance = own.member.instance.as_str();
        let kept = locks.iter_mut().filter_map(|(partition, lock)| {
            let (_, committed) = commit.offsets.get(partition)?;
            let state: Vec<_> =
                commit.outputs.iter().filter(|it| is_state(&it.topic) && it.partition == *partition).collect();
            let kept = Kept { term: lock.kept.term, committed: Some(committed.clone()) };
            Some(async move {
                let written = match lock.write(&state).await {
                    Ok(()) => own.place.keep(lock, *partition, kept, instance).await,
                    refused => refused,
                };
                (*partition, written)
            })
        });
        let results = futures_util::future::join_all(kept).await;
        let mut refused = None;
        for (partition, result) in results {
            if let Err(error) = result {
                // Whether it is stored is not known, nor whether it is still ours: the next owner finds out.
                locks.remove(&partition);
                own.lose([partition]);
                refused = Some(error);
            }
        }
        match refused {
            None => Ok(()),
            Some(LogError::Fatal(error)) => Err(LogError::Fatal(error)),
            // The positions of other partitions may have moved: the same again moves them to the same place.
            Some(error) => Err(LogError::transient(error)),
        }
    }
}
