//! A log whose values others may have written, and may read, with a schema registry.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;
use crate::log::{
    Backend, Commit, Committer, Guarantee, Limit, LogError, Member, Polled, Publisher, Read, Reader, Session,
};
use crate::model::codec::{self, KnownSchema};
use crate::model::record::{Addressed, Offset, Partition, Record, Topic};

use super::lookups::Failure;
use super::{Registry, RegistryConfig, wire};

/// How often a reader looks whether its records can be named by now. A session does so with each poll.
const LOOK: Duration = Duration::from_millis(50);
/// A reader whose records cannot be named for so long says so; a session waits on.
const PATIENCE: Duration = Duration::from_secs(10);

/// Without a registry everything goes through as it is.
#[derive(Clone)]
pub struct Registered<L> {
    inner: L,
    registry: Option<Registry>,
}

impl<B> Registered<B> {
    /// # Errors
    /// [`LogError::Fatal`] with [`Misconfigured`](crate::log::Misconfigured).
    pub fn new(inner: B, config: &RegistryConfig) -> Result<Self, LogError> {
        let registry = if config.urls.is_empty() { None } else { Some(Registry::new(config)?) };
        Ok(Self { inner, registry })
    }

    pub fn registry(&self) -> Option<&Registry> {
        self.registry.as_ref()
    }

    fn names(&self, topic: &Topic) -> Names {
        let schema = self.registry.as_ref().and_then(|registry| registry.schema(topic));
        Names { registry: self.registry.clone(), schema }
    }
}

impl<B: Backend> Backend for Registered<B> {
    type Session = RegisteredSession<B::Session>;
    type Publisher = Registered<B::Publisher>;
    type Reader = RegisteredReader<B::Reader>;
    type Admin = B::Admin;

    async fn session(&self, member: Member) -> Result<Self::Session, LogError> {
        let names = self.names(&member.topic);
        Ok(RegisteredSession::new(self.inner.session(member).await?, names))
    }

    fn publisher(&self) -> Result<Self::Publisher, LogError> {
        Ok(Registered { inner: self.inner.publisher()?, registry: self.registry.clone() })
    }

    async fn reader(&self, topic: &Topic, partition: Partition, from: Offset) -> Result<Self::Reader, LogError> {
        let inner = self.inner.reader(topic, partition, from).await?;
        Ok(RegisteredReader { inner, names: self.names(topic), held: VecDeque::new() })
    }

    fn admin(&self) -> Result<B::Admin, LogError> {
        self.inner.admin()
    }
}

impl<P: Publisher> Publisher for Registered<P> {
    async fn publish(&self, records: Vec<Addressed>) -> Result<(), LogError> {
        match &self.registry {
            None => self.inner.publish(records).await,
            Some(registry) => self.inner.publish(registry.encode(&records).await?).await,
        }
    }
}

/// What values of a topic are read as.
#[derive(Clone)]
struct Names {
    registry: Option<Registry>,
    /// The current schema of the topic.
    schema: Option<&'static KnownSchema>,
}

impl Names {
    /// Makes a record's value what it would be without a registry: one of the current schema where it can be, so that it is
    /// still readable where it is kept inside another. False: its schema is being asked for.
    fn name(&self, record: &mut Record) -> Result<bool, Failure> {
        let Some(registry) = &self.registry else { return Ok(true) };
        let Some((value, id)) = record.value.as_ref().and_then(|value| Some((value, wire::id_of(value)?))) else {
            return Ok(true);
        };
        let Some(found) = registry.reads(id)? else { return Ok(false) };
        if let Some(fingerprint) = found {
            let single = wire::to_single_object(value, fingerprint);
            record.value = Some(match self.schema {
                Some(schema) => codec::current(single, schema),
                None => single,
            });
            wire::say_single_object(&mut record.headers);
        }
        Ok(true)
    }

    /// Takes off what can be named by now, up to the first that cannot.
    fn release(&self, held: &mut VecDeque<Record>, out: &mut Vec<Record>) -> Result<(), Failure> {
        while let Some(first) = held.front_mut() {
            if !self.name(first)? {
                return Ok(());
            }
            out.extend(held.pop_front());
        }
        Ok(())
    }
}

/// A session that keeps what cannot be named yet: its partition stands still, the others go on.
pub struct RegisteredSession<S> {
    inner: S,
    names: Names,
    held: BTreeMap<Partition, VecDeque<Record>>,
    /// Paused by the runtime, as assignments are.
    paused: BTreeSet<Partition>,
}

impl<S: Session> RegisteredSession<S> {
    fn new(inner: S, names: Names) -> Self {
        Self { inner, names, held: BTreeMap::new(), paused: BTreeSet::new() }
    }

    /// What was held and can be named by now; a partition of which nothing is held any more goes on.
    fn released(&mut self) -> Result<Vec<Record>, LogError> {
        let mut out = Vec::new();
        // A paused partition is silent.
        for (_, held) in self.held.iter_mut().filter(|(partition, _)| !self.paused.contains(partition)) {
            // A failure has been told by whoever asked the registry.
            let _ = self.names.release(held, &mut out);
        }
        let done: Vec<Partition> = self.held.iter().filter(|(_, held)| held.is_empty()).map(|(it, _)| *it).collect();
        self.held.retain(|_, held| !held.is_empty());
        self.go_on(&done)?;
        Ok(out)
    }

    fn go_on(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        let free = |it: &&Partition| !self.held.contains_key(it) && !self.paused.contains(it);
        let free: Vec<Partition> = partitions.iter().filter(free).copied().collect();
        if free.is_empty() { Ok(()) } else { self.inner.resume(&free) }
    }

    fn keep_back(&mut self, records: Vec<Record>) -> Result<Vec<Record>, LogError> {
        let mut out = Vec::with_capacity(records.len());
        for mut record in records {
            let partition = record.partition;
            if let Some(held) = self.held.get_mut(&partition) {
                held.push_back(record);
            } else if self.names.name(&mut record).unwrap_or(false) {
                out.push(record);
            } else {
                self.held.insert(partition, VecDeque::from([record]));
                self.inner.pause(&[partition])?;
            }
        }
        Ok(out)
    }

    fn forget(&mut self, partitions: &[Partition]) {
        self.held.retain(|partition, _| !partitions.contains(partition));
    }
}

impl<S: Session> Session for RegisteredSession<S> {
    const GUARANTEE: Guarantee = S::GUARANTEE;
    type Committer = RegisteredCommitter<S::Committer>;

    async fn poll(&mut self, limit: Limit) -> Result<Polled, LogError> {
        if self.names.registry.is_none() {
            return self.inner.poll(limit).await;
        }
        let released = self.released()?;
        if !released.is_empty() {
            return Ok(Polled::Records(released));
        }
        // Nothing is in our hands while this waits.
        match self.inner.poll(limit).await? {
            Polled::Records(records) => {
                let records = self.keep_back(records)?;
                Ok(if records.is_empty() { Polled::Idle } else { Polled::Records(records) })
            }
            Polled::Assigned(given) => {
                self.paused.extend(given.iter().map(|assignment| assignment.partition));
                Ok(Polled::Assigned(given))
            }
            Polled::Revoked(gone) => {
                self.forget(&gone);
                Ok(Polled::Revoked(gone))
            }
            Polled::Lost(gone) => {
                self.forget(&gone);
                Ok(Polled::Lost(gone))
            }
            Polled::Idle => Ok(Polled::Idle),
        }
    }

    fn seek(&mut self, partition: Partition, to: Offset) -> Result<(), LogError> {
        self.inner.seek(partition, to)?;
        self.forget(&[partition]);
        self.go_on(&[partition])
    }

    fn pause(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.paused.extend(partitions);
        self.inner.pause(partitions)
    }

    fn resume(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.paused.retain(|partition| !partitions.contains(partition));
        self.go_on(partitions)
    }

    fn committer(&self) -> RegisteredCommitter<S::Committer> {
        RegisteredCommitter { inner: self.inner.committer(), names: self.names.clone() }
    }

    async fn close(self) {
        self.inner.close().await;
    }
}

/// Registers the schemas of what is committed.
pub struct RegisteredCommitter<C> {
    inner: C,
    names: Names,
}

impl<C: Committer> Committer for RegisteredCommitter<C> {
    async fn commit(&mut self, commit: Arc<Commit>) -> Result<(), LogError> {
        match &self.names.registry {
            Some(registry) if !commit.outputs.is_empty() => {
                let outputs = registry.encode(&commit.outputs).await?;
                self.inner.commit(Arc::new(Commit { outputs, offsets: commit.offsets.clone() })).await
            }
            _ => self.inner.commit(commit).await,
        }
    }
}

/// A reader that waits for what it cannot name.
pub struct RegisteredReader<R> {
    inner: R,
    names: Names,
    held: VecDeque<Record>,
}

impl<R: Reader> Reader for RegisteredReader<R> {
    async fn read(&mut self, limit: Limit) -> Result<Read, LogError> {
        if self.held.is_empty() {
            match self.inner.read(limit).await? {
                Read::Records(records) => self.held = records.into(),
                Read::End => return Ok(Read::End),
            }
        }
        // The end is not reached while something is held, whoever waits for it.
        let clock = Clock::system();
        let until = clock.instant() + PATIENCE;
        let mut out = Vec::with_capacity(self.held.len());
        loop {
            let released = self.names.release(&mut self.held, &mut out);
            if !out.is_empty() || self.held.is_empty() {
                return Ok(Read::Records(out));
            }
            match released {
                Err(failure) if clock.instant() >= until => return Err(LogError::transient(failure.text)),
                Ok(()) | Err(_) => clock.sleep(LOOK).await,
            }
        }
    }

    async fn seek(&mut self, to: Offset) -> Result<(), LogError> {
        self.held.clear();
        self.inner.seek(to).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::log::Assignment;
    use crate::model::event::Event;
    use crate::model::record::{Epoch, Headers};

    /// Says what it was told to say, and notes what it is asked.
    #[derive(Default)]
    struct Scripted {
        polls: VecDeque<Polled>,
        switched: Vec<(bool, Vec<Partition>)>,
    }

    impl Session for Scripted {
        const GUARANTEE: Guarantee = Guarantee::ExactlyOnce;
        type Committer = Silent;
        async fn poll(&mut self, _: Limit) -> Result<Polled, LogError> {
            Ok(self.polls.pop_front().unwrap_or(Polled::Idle))
        }
        fn seek(&mut self, _: Partition, _: Offset) -> Result<(), LogError> {
            Ok(())
        }
        fn pause(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
            self.switched.push((false, partitions.to_vec()));
            Ok(())
        }
        fn resume(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
            self.switched.push((true, partitions.to_vec()));
            Ok(())
        }
        fn committer(&self) -> Silent {
            Silent
        }
        async fn close(self) {}
    }

    struct Silent;

    impl Committer for Silent {
        async fn commit(&mut self, _: Arc<Commit>) -> Result<(), LogError> {
            Ok(())
        }
    }

    const P: [Partition; 3] = [Partition(0), Partition(1), Partition(2)];
    const LIMIT: Limit = Limit { records: 10, bytes: 1 << 20 };

    fn record(partition: Partition, offset: u128, id: u32) -> Record {
        let mut value = vec![0];
        value.extend(id.to_be_bytes());
        value.push(u8::try_from(offset).expect("small"));
        let (timestamp, headers) = (Timestamp::from_micros(0), Headers::new());
        Record { partition, offset: Offset::new(offset), timestamp, key: None, value: Some(value.into()), headers }
    }

    /// A session on three partitions with a registry that is away, and knows schema 1.
    fn session(polls: Vec<Polled>) -> (RegisteredSession<Scripted>, Registry) {
        let config = RegistryConfig { urls: vec!["http://127.0.0.1:1".into()], ..RegistryConfig::default() };
        let registry = Registry::new(&config).expect("a registry");
        registry.tell(1, Some(*b"schema 1"));
        let assigned = P.map(|partition| Assignment { partition, epoch: Epoch(1), committed: None });
        let mut all = VecDeque::from([Polled::Assigned(assigned.to_vec())]);
        all.extend(polls);
        let names = Names { registry: Some(registry.clone()), schema: None };
        (RegisteredSession::new(Scripted { polls: all, switched: Vec::new() }, names), registry)
    }

    async fn offsets(session: &mut RegisteredSession<Scripted>) -> Vec<(u32, u128)> {
        match session.poll(LIMIT).await.expect("polled") {
            Polled::Records(records) => records.iter().map(|it| (it.partition.0, it.offset.raw())).collect(),
            _ => Vec::new(),
        }
    }

    #[tokio::test]
    async fn only_the_partition_of_what_cannot_be_named_waits_and_its_order_holds() {
        let mixed = vec![record(P[0], 1, 1), record(P[0], 2, 7), record(P[1], 1, 1), record(P[0], 3, 1)];
        let more = vec![record(P[0], 4, 1), record(P[1], 2, 1)];
        let (mut session, registry) = session(vec![Polled::Records(mixed), Polled::Records(more)]);
        assert!(matches!(session.poll(LIMIT).await, Ok(Polled::Assigned(_))));
        session.resume(&P).expect("resumed");
        assert_eq!(offsets(&mut session).await, [(0, 1), (1, 1)]);
        assert_eq!(offsets(&mut session).await, [(1, 2)]);
        assert_eq!(session.inner.switched, [(true, P.to_vec()), (false, vec![P[0]])]);

        registry.tell(7, Some(*b"schema 7"));
        assert_eq!(offsets(&mut session).await, [(0, 2), (0, 3), (0, 4)]);
        assert_eq!(session.inner.switched.last(), Some(&(true, vec![P[0]])), "it goes on");
    }

    #[tokio::test]
    async fn what_the_runtime_has_paused_stays_so() {
        let (mut session, registry) = session(vec![Polled::Records(vec![record(P[0], 1, 7)])]);
        assert!(matches!(session.poll(LIMIT).await, Ok(Polled::Assigned(_))));
        session.resume(&P).expect("resumed");
        assert_eq!(offsets(&mut session).await, []);
        session.pause(&P[..1]).expect("paused");
        registry.tell(7, None);
        assert_eq!(offsets(&mut session).await, []);
        session.resume(&P[..1]).expect("resumed");
        assert_eq!(session.inner.switched.last(), Some(&(false, vec![P[0]])), "something is held yet");
        assert_eq!(offsets(&mut session).await, [(0, 1)], "an id that nobody knows is handed on as it is");
        assert_eq!(session.inner.switched.last(), Some(&(true, vec![P[0]])));
    }

    #[tokio::test]
    async fn a_rebalance_is_told_whatever_waits_and_takes_it_along() {
        let gone = vec![P[0]];
        let (mut session, registry) = session(vec![
            Polled::Records(vec![record(P[0], 1, 7), record(P[1], 1, 7)]),
            Polled::Revoked(gone.clone()),
            Polled::Lost(gone),
        ]);
        assert!(matches!(session.poll(LIMIT).await, Ok(Polled::Assigned(_))));
        session.resume(&P).expect("resumed");
        assert_eq!(offsets(&mut session).await, []);
        assert!(matches!(session.poll(LIMIT).await, Ok(Polled::Revoked(_))));
        assert!(matches!(session.poll(LIMIT).await, Ok(Polled::Lost(_))));
        registry.tell(7, Some(*b"schema 7"));
        assert_eq!(offsets(&mut session).await, [(1, 1)]);
        session.seek(P[1], Offset::new(1)).expect("sought");
    }

    #[tokio::test]
    async fn what_others_wrote_becomes_a_value_of_the_current_schema() {
        let schema = KnownSchema::named("event").expect("there is one");
        let other = schema.text.replacen("\"fields\": [", "\"fields\": [{\"name\": \"first\", \"type\": \"int\"},", 1);
        let fingerprint = codec::learn(&other).expect("a schema");
        let (session, registry) = session(Vec::new());
        registry.tell(9, Some(fingerprint));
        let names = Names { registry: session.names.registry, schema: Some(schema) };
        let mut value = vec![0, 0, 0, 0, 9, 2];
        let text = |text: &str| [&[2 * text.len() as u8][..], text.as_bytes()].concat();
        for field in ["w", "s", "k"] {
            value.extend(text(field));
        }
        value.extend([0]); // user: null
        value.extend(text("m"));
        value.extend(text("track"));
        value.extend([0, 0, 0, 0, 0, 0]); // time, ip, job, task, channel, payload
        let mut named = record(P[0], 1, 9);
        named.value = Some(value.into());
        assert_eq!(names.name(&mut named), Ok(true));
        let value = named.value.expect("a value");
        assert_eq!(codec::fingerprint_of(&value), Some(schema.fingerprint()));
        let event: Event = codec::decode(&value).expect("an event");
        assert_eq!((event.workspace.as_str(), event.message_id.as_str()), ("w", "m"));
    }
}
