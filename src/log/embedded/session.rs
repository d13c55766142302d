//! A group member on the embedded log.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::log::{Assignment, Commit, Committer, Guarantee, Limit, LogError, Member, Polled, Session};
use crate::model::record::{Epoch, Offset, Partition, Record};

use super::Embedded;
use super::coordinator::{Event, GroupKey, SessionId};
use super::store::{Position, read_error};

/// A poll without anything to tell ends after so long.
const IDLE: Duration = Duration::from_millis(200);

pub struct EmbeddedSession {
    own: Arc<Own>,
    partitions: BTreeMap<Partition, ReadAt>,
    /// An assignment that has been taken from the coordinator, but not been told yet: a cancelled poll must not lose it.
    assigned: Option<Vec<(Partition, Epoch)>>,
    /// Partitions that were revoked and are given back at the next poll.
    releasing: Vec<Partition>,
    /// Rotates which partition is read first.
    turn: usize,
    bell: Arc<Notify>,
    grown: watch::Receiver<u64>,
    /// Held as long as this is a member, in a process that is no engine.
    _alone: Option<std::fs::File>,
}

/// What a session is, to what commits for it too.
struct Own {
    log: Embedded,
    member: Member,
    group: GroupKey,
    session: SessionId,
    name: String,
    /// The last one's number.
    commits: AtomicU64,
}

/// Where a partition is read.
struct ReadAt {
    next: Offset,
    paused: bool,
}

impl EmbeddedSession {
    pub(super) async fn join(log: Embedded, member: Member) -> Result<Self, LogError> {
        let alone = log.exclude_members(&member.group)?;
        let topics = log.0.store.topics().await.map_err(LogError::transient)?;
        let info = topics.iter().find(|info| info.topic == member.topic);
        let partitions = info.ok_or_else(|| LogError::fatal(format!("there is no topic {}", member.topic)))?.partitions;
        let group = (member.group.clone(), member.topic.clone());
        let now = log.0.clock.instant();
        let joined = log.groups().join(&group, partitions, &member.instance, member.session_timeout, now);
        let name = format!("{}.{}", member.group, member.instance);
        // Passes through the writer first: the last session's commit may still be under way there.
        log.0.writer.write(Vec::new(), Vec::new(), None, None).await?;
        // Numbers go on where the last session of this name ended, so that a doubt is never settled by an older commit.
        let commits = log.0.store.last_commit(&name).await.map_err(LogError::transient)?.unwrap_or(0);
        let grown = log.0.ends.subscribe();
        let own = Own { log, member, group, session: joined.session, name, commits: AtomicU64::new(commits) };
        Ok(Self {
            own: Arc::new(own),
            partitions: BTreeMap::new(),
            assigned: None,
            releasing: Vec::new(),
            turn: 0,
            bell: joined.bell,
            grown,
            _alone: alone,
        })
    }

    async fn event(&mut self) -> Result<Option<Polled>, LogError> {
        if !self.releasing.is_empty() {
            self.releasing.clear();
            self.own.log.groups().release(&self.own.group, &self.own.session);
        }
        if self.assigned.is_none() {
            let now = self.own.log.0.clock.instant();
            let event = self.own.log.groups().poll(&self.own.group, &self.own.session, now);
            match event {
                None => return Ok(None),
                Some(Event::Assigned(given)) => self.assigned = Some(given),
                Some(Event::Revoked(gone)) => {
                    for partition in &gone {
                        self.partitions.remove(partition);
                    }
                    self.releasing = gone.clone();
                    return Ok(Some(Polled::Revoked(gone)));
                }
                Some(Event::Lost(gone)) => {
                    self.partitions.clear();
                    return Ok(Some(Polled::Lost(gone)));
                }
                Some(Event::Fenced) => {
                    return Err(LogError::fenced(format!("another session of {} has joined", self.own.name)));
                }
            }
        }
        self.tell_assignment().await.map(Some)
    }

    async fn tell_assignment(&mut self) -> Result<Polled, LogError> {
        // Passes through the writer, so that whatever the last owner had under way is settled before it is read.
        self.own.log.0.writer.write(Vec::new(), Vec::new(), None, None).await?;
        let store = &self.own.log.0.store;
        let mut committed =
            store.committed(&self.own.member.group, &self.own.member.topic).await.map_err(LogError::transient)?;
        let given = self.assigned.take().unwrap_or_default();
        let assignments = given
            .into_iter()
            .map(|(partition, epoch)| {
                let committed = committed.remove(&partition);
                let next = committed.as_ref().map_or(Offset::START, |committed| committed.offset);
                self.partitions.insert(partition, ReadAt { next, paused: true });
                Assignment { partition, epoch, committed }
            })
            .collect();
        Ok(Polled::Assigned(assignments))
    }

    async fn records(&mut self, limit: Limit) -> Result<Vec<Record>, LogError> {
        let ends = &self.own.log.0.ends;
        let ready: Vec<(Partition, Offset)> = self
            .partitions
            .iter()
            .filter(|(partition, at)| !at.paused && at.next < ends.of(&self.own.member.topic, **partition))
            .map(|(partition, at)| (*partition, at.next))
            .collect();
        if ready.is_empty() {
            return Ok(Vec::new());
        }
        self.turn = self.turn.wrapping_add(1);
        let mut records = Vec::new();
        for step in 0..ready.len() {
            let (partition, from) = ready[(self.turn + step) % ready.len()];
            // An even share, so that one full partition does not crowd out the others.
            let share =
                Limit { records: limit.records.div_ceil(ready.len()), bytes: limit.bytes.div_ceil(ready.len()) };
            let read = self.own.log.0.store.read(&self.own.member.topic, partition, from, share).await;
            records.push((partition, read.map_err(read_error)?));
        }
        // From here on nothing waits: either all positions move and the records are returned, or neither.
        let mut all = Vec::new();
        for (partition, read) in records {
            if let (Some(last), Some(at)) = (read.last(), self.partitions.get_mut(&partition)) {
                at.next = last.offset.just_after();
            }
            all.extend(read);
        }
        Ok(all)
    }
}

/// Commits for a session that has not left its group.
pub struct EmbeddedCommitter(Arc<Own>);

impl Committer for EmbeddedCommitter {
    async fn commit(&mut self, commit: Arc<Commit>) -> Result<(), LogError> {
        let own = &self.0;
        let count = own.commits.fetch_add(1, Ordering::Relaxed) + 1;
        let now = own.log.0.clock.instant();
        own.log.groups().seen(&own.group, &own.session, now);
        let epochs: Vec<(Partition, Epoch)> = commit.offsets.iter().map(|(p, (epoch, _))| (*p, *epoch)).collect();
        let (log, group, session) = (own.log.clone(), own.group.clone(), own.session.clone());
        let fence = Box::new(move || {
            let groups = log.groups();
            if !groups.is_member(&group, &session) {
                return Err(LogError::fenced("this session is no longer in its group"));
            }
            match epochs.iter().find(|(partition, epoch)| !groups.owns(&group, &session, *partition, *epoch)) {
                None => Ok(()),
                Some((partition, _)) => Err(LogError::transient(format!("partition {partition} has been taken away"))),
            }
        });
        let positions = commit
            .offsets
            .iter()
            .map(|(partition, (_, committed))| Position {
                group: own.member.group.clone(),
                topic: own.member.topic.clone(),
                partition: *partition,
                committed: committed.clone(),
            })
            .collect();
        let number = Some((own.name.clone(), count));
        own.log.0.writer.write(commit.outputs.clone(), positions, number, Some(fence)).await
    }
}

impl Session for EmbeddedSession {
    const GUARANTEE: Guarantee = Guarantee::ExactlyOnce;
    type Committer = EmbeddedCommitter;

    async fn poll(&mut self, limit: Limit) -> Result<Polled, LogError> {
        let until = self.own.log.0.clock.instant() + IDLE;
        loop {
            if let Some(event) = self.event().await? {
                return Ok(event);
            }
            self.grown.borrow_and_update();
            let records = self.records(limit).await?;
            if !records.is_empty() {
                return Ok(Polled::Records(records));
            }
            tokio::select! {
                biased;
                () = self.bell.notified() => {}
                _ = self.grown.changed() => {}
                () = self.own.log.0.clock.sleep_until(until) => return Ok(Polled::Idle),
            }
        }
    }

    fn seek(&mut self, partition: Partition, to: Offset) -> Result<(), LogError> {
        if let Some(at) = self.partitions.get_mut(&partition) {
            at.next = to;
        }
        Ok(())
    }

    fn pause(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        for partition in partitions {
            if let Some(at) = self.partitions.get_mut(partition) {
                at.paused = true;
            }
        }
        Ok(())
    }

    fn resume(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        for partition in partitions {
            if let Some(at) = self.partitions.get_mut(partition) {
                at.paused = false;
            }
        }
        Ok(())
    }

    fn committer(&self) -> EmbeddedCommitter {
        EmbeddedCommitter(Arc::clone(&self.own))
    }

    async fn close(self) {
        drop(self);
    }
}

impl Drop for EmbeddedSession {
    /// Leaving is all that closing takes; a session that is dropped by a failing task leaves too, which in this process is
    /// known at once.
    fn drop(&mut self) {
        self.own.log.groups().leave(&self.own.group, &self.own.session);
    }
}
