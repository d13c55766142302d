//! The groups of the embedded log: who owns which partition, in this process. Pure bookkeeping; the sessions ask it.
//!
//! Hand-over is cooperative: a partition that shall move is first revoked, stays with its owner until that owner polls again,
//! and only then goes to the next. A member that is silent for its session time-out loses everything. A new session of the
//! same instance takes its predecessor's partitions over at once and fences it (static membership).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::model::id::InstanceId;
use crate::model::record::{Epoch, Partition, Topic};

/// What a member is told, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Assigned(Vec<(Partition, Epoch)>),
    Revoked(Vec<Partition>),
    Lost(Vec<Partition>),
    /// A newer session of the same instance has taken over.
    Fenced,
}

/// One session's place in its group.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(u64);

#[derive(Default)]
pub struct Coordinator {
    groups: HashMap<(String, Topic), Group>,
    sessions: u64,
    epochs: u64,
}

#[derive(Default)]
struct Group {
    partitions: u32,
    members: BTreeMap<SessionId, Member>,
    owners: BTreeMap<Partition, (SessionId, Epoch)>,
}

struct Member {
    instance: InstanceId,
    timeout: Duration,
    seen: Instant,
    events: VecDeque<Event>,
    /// Revoked and not given back yet.
    leaving: BTreeSet<Partition>,
    bell: Arc<Notify>,
    fenced: bool,
}

/// What a session is called, who rings it.
pub struct Joined {
    pub session: SessionId,
    pub bell: Arc<Notify>,
}

/// The group key of a session.
pub type GroupKey = (String, Topic);

impl Coordinator {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn join(
        &mut self,
        key: &GroupKey,
        partitions: u32,
        instance: &InstanceId,
        timeout: Duration,
        now: Instant,
    ) -> Joined {
        self.sessions += 1;
        let session = SessionId(self.sessions);
        let bell = Arc::new(Notify::new());
        let group = self.groups.entry(key.clone()).or_default();
        group.partitions = partitions;
        let member = Member {
            instance: instance.clone(),
            timeout,
            seen: now,
            events: VecDeque::new(),
            leaving: BTreeSet::new(),
            bell: Arc::clone(&bell),
            fenced: false,
        };
        group.members.insert(session.clone(), member);
        let elder = group.members.iter().find(|(id, m)| **id != session && !m.fenced && m.instance == *instance);
        if let Some(elder) = elder.map(|(id, _)| id.clone()) {
            group.fence(&elder);
            let inherited: Vec<Partition> = group.owned_by(&elder);
            group.assign(inherited, &session, &mut self.epochs);
        }
        group.rebalance(&mut self.epochs);
        Joined { session, bell }
    }

    /// Tells what is next for a session, and that it is alive.
    pub fn poll(&mut self, key: &GroupKey, session: &SessionId, now: Instant) -> Option<Event> {
        let group = self.groups.get_mut(key)?;
        group.expire(session, now, &mut self.epochs);
        let Some(member) = group.members.get_mut(session) else { return Some(Event::Fenced) };
        member.seen = now;
        if member.events.is_empty() && group.owners.len() < group.partitions as usize {
            // Nobody else was there when they became free.
            group.rebalance(&mut self.epochs);
        }
        let Some(member) = group.members.get_mut(session) else { return Some(Event::Fenced) };
        let event = member.events.pop_front();
        if member.fenced && event == Some(Event::Fenced) {
            group.members.remove(session);
        }
        event
    }

    /// The session gives back what was revoked.
    pub fn release(&mut self, key: &GroupKey, session: &SessionId) {
        let Some(group) = self.groups.get_mut(key) else { return };
        let Some(member) = group.members.get_mut(session) else { return };
        for partition in std::mem::take(&mut member.leaving) {
            if group.owners.get(&partition).is_some_and(|(owner, _)| owner == session) {
                group.owners.remove(&partition);
            }
        }
        group.rebalance(&mut self.epochs);
    }

    pub fn leave(&mut self, key: &GroupKey, session: &SessionId) {
        let Some(group) = self.groups.get_mut(key) else { return };
        group.members.remove(session);
        group.owners.retain(|_, (owner, _)| owner != session);
        group.rebalance(&mut self.epochs);
    }

    /// Whether the session still owns a partition under this epoch: asked at a commit's turn.
    pub fn owns(&self, key: &GroupKey, session: &SessionId, partition: Partition, epoch: Epoch) -> bool {
        let owner = self.groups.get(key).and_then(|group| group.owners.get(&partition));
        owner.is_some_and(|(owner, current)| owner == session && *current == epoch)
    }

    pub fn has_members(&self, key: &GroupKey) -> bool {
        self.groups.get(key).is_some_and(|group| group.members.values().any(|member| !member.fenced))
    }

    pub fn is_member(&self, key: &GroupKey, session: &SessionId) -> bool {
        self.groups.get(key).and_then(|group| group.members.get(session)).is_some_and(|member| !member.fenced)
    }

    /// Takes everything from an instance, as a time-out would.
    pub fn cut_off(&mut self, key: &GroupKey, instance: &InstanceId) {
        let Some(group) = self.groups.get_mut(key) else { return };
        let members = group.members.iter().filter(|(_, member)| !member.fenced && member.instance == *instance);
        let silent: Vec<SessionId> = members.map(|(id, _)| id.clone()).collect();
        group.take_from(&silent, &mut self.epochs);
    }

    /// A commit shows that the session is alive.
    pub fn seen(&mut self, key: &GroupKey, session: &SessionId, now: Instant) {
        if let Some(member) = self.groups.get_mut(key).and_then(|group| group.members.get_mut(session)) {
            member.seen = now;
        }
    }
}

impl Group {
    fn owned_by(&self, session: &SessionId) -> Vec<Partition> {
        self.owners.iter().filter(|(_, (owner, _))| owner == session).map(|(partition, _)| *partition).collect()
    }

    fn fence(&mut self, session: &SessionId) {
        if let Some(member) = self.members.get_mut(session) {
            member.fenced = true;
            member.leaving.clear();
            member.events.clear();
            member.events.push_back(Event::Fenced);
            member.bell.notify_one();
        }
    }

    fn assign(&mut self, partitions: Vec<Partition>, to: &SessionId, epochs: &mut u64) {
        if partitions.is_empty() {
            return;
        }
        let mut given = Vec::with_capacity(partitions.len());
        for partition in partitions {
            *epochs += 1;
            self.owners.insert(partition, (to.clone(), Epoch(*epochs)));
            given.push((partition, Epoch(*epochs)));
        }
        if let Some(member) = self.members.get_mut(to) {
            member.events.push_back(Event::Assigned(given));
            member.bell.notify_one();
        }
    }

    /// Takes everything from members that were silent for too long. Whoever asks is not silent: it is judged by the others.
    fn expire(&mut self, asking: &SessionId, now: Instant, epochs: &mut u64) {
        let late = |m: &Member| !m.fenced && now.saturating_duration_since(m.seen) > m.timeout;
        let silent: Vec<SessionId> =
            self.members.iter().filter(|(id, m)| *id != asking && late(m)).map(|(id, _)| id.clone()).collect();
        self.take_from(&silent, epochs);
    }

    fn take_from(&mut self, silent: &[SessionId], epochs: &mut u64) {
        for session in silent {
            let lost = self.owned_by(session);
            self.owners.retain(|_, (owner, _)| owner != session);
            if let Some(member) = self.members.get_mut(session) {
                member.leaving.clear();
                // It has not heard of an earlier loss either.
                member.events.retain(|event| matches!(event, Event::Lost(_)));
                if !lost.is_empty() {
                    member.events.push_back(Event::Lost(lost));
                    member.bell.notify_one();
                }
            }
        }
        if !silent.is_empty() {
            self.rebalance_without(silent, epochs);
        }
    }

    fn rebalance(&mut self, epochs: &mut u64) {
        self.rebalance_without(&[], epochs);
    }

    /// Evens out: everybody holds the same number, but for one. What a member has above its share is revoked; what is free
    /// goes to who has least.
    fn rebalance_without(&mut self, absent: &[SessionId], epochs: &mut u64) {
        let present: Vec<SessionId> = self
            .members
            .iter()
            .filter(|(id, member)| !member.fenced && !absent.contains(id))
            .map(|(id, _)| id.clone())
            .collect();
        if present.is_empty() {
            return;
        }
        let share = self.partitions as usize / present.len();
        let mut extra = self.partitions as usize % present.len();
        // Who holds more keeps the odd ones, so that as little as possible moves.
        let mut ranked: Vec<(usize, SessionId)> =
            present.iter().map(|id| (self.owned_by(id).len(), id.clone())).collect();
        ranked.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut free: Vec<Partition> =
            (0..self.partitions).map(Partition).filter(|p| !self.owners.contains_key(p)).collect();
        for (held, session) in ranked {
            let quota = share + usize::from(extra > 0);
            extra = extra.saturating_sub(1);
            if held > quota {
                self.revoke(&session, held - quota);
            } else {
                let count = (quota - held).min(free.len());
                let given: Vec<Partition> = free.drain(..count).collect();
                self.assign(given, &session, epochs);
            }
        }
    }

    fn revoke(&mut self, session: &SessionId, count: usize) {
        let owned = self.owned_by(session);
        let Some(member) = self.members.get_mut(session) else { return };
        let missing = count.saturating_sub(member.leaving.len());
        let revoked: Vec<Partition> =
            owned.into_iter().rev().filter(|partition| !member.leaving.contains(partition)).take(missing).collect();
        if !revoked.is_empty() {
            member.leaving.extend(revoked.iter().copied());
            member.events.push_back(Event::Revoked(revoked));
            member.bell.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(6);

    struct Bench {
        coordinator: Coordinator,
        key: GroupKey,
        now: Instant,
    }

    impl Bench {
        fn new() -> Self {
            let now = crate::clock::Clock::system().instant();
            Self { coordinator: Coordinator::new(), key: ("g".into(), Topic::EVENTS), now }
        }

        fn join(&mut self, instance: &str) -> SessionId {
            self.coordinator.join(&self.key, 4, &instance.into(), TIMEOUT, self.now).session
        }

        fn poll(&mut self, session: &SessionId) -> Option<Event> {
            self.coordinator.poll(&self.key, session, self.now)
        }
    }

    fn numbers(event: Option<Event>) -> Vec<u32> {
        match event {
            Some(Event::Assigned(given)) => given.into_iter().map(|(partition, _)| partition.0).collect(),
            Some(Event::Revoked(gone) | Event::Lost(gone)) => gone.into_iter().map(|partition| partition.0).collect(),
            other => panic!("not about partitions: {other:?}"),
        }
    }

    #[test]
    fn a_second_member_gets_its_half_only_after_the_first_released_it() {
        let mut bench = Bench::new();
        let first = bench.join("a");
        assert_eq!(numbers(bench.poll(&first)), [0, 1, 2, 3]);
        let second = bench.join("b");
        assert_eq!(bench.poll(&second), None);
        assert_eq!(numbers(bench.poll(&first)), [3, 2]);
        assert_eq!(bench.poll(&second), None, "still with its owner");
        bench.coordinator.release(&bench.key.clone(), &first);
        assert_eq!(numbers(bench.poll(&second)), [2, 3]);
    }

    #[test]
    fn a_silent_member_loses_everything_and_comes_back_for_a_share() {
        let mut bench = Bench::new();
        let (first, second) = (bench.join("a"), bench.join("b"));
        bench.poll(&first);
        bench.now += TIMEOUT + Duration::from_secs(1);
        assert_eq!(numbers(bench.poll(&second)), [0, 1, 2, 3]);
        bench.poll(&second);
        assert_eq!(numbers(bench.poll(&first)), [0, 1, 2, 3], "lost");
        assert!(!bench.coordinator.owns(&bench.key, &first, Partition(0), Epoch(1)));
    }

    #[test]
    fn a_newer_session_of_an_instance_inherits_and_fences() {
        let mut bench = Bench::new();
        let old = bench.join("a");
        bench.poll(&old);
        let new = bench.join("a");
        assert_eq!(numbers(bench.poll(&new)), [0, 1, 2, 3]);
        assert_eq!(bench.poll(&old), Some(Event::Fenced));
        assert!(!bench.coordinator.is_member(&bench.key, &old));
    }

    #[test]
    fn a_leaving_member_hands_over_at_once() {
        let mut bench = Bench::new();
        let (first, second) = (bench.join("a"), bench.join("b"));
        bench.coordinator.leave(&bench.key.clone(), &first);
        assert_eq!(numbers(bench.poll(&second)), [0, 1, 2, 3]);
    }
}
