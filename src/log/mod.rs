//! The log: partitioned topics on a broker cluster or in a file, behind one small port. It is the only queue there is.
//!
//! A [`Backend`] hands out four kinds of objects:
//!
//! | object | for | owner |
//! |---|---|---|
//! | [`Session`] | one group member and the producer bound to it | exactly one driver task |
//! | [`Publisher`] | writing without reading: returns when the log has it on all replicas | shared |
//! | [`Reader`] | reading a partition from any offset, without a group | one per use |
//! | [`Admin`] | topics, offsets, watermarks | start-up, the command line |
//!
//! What every backend promises, and the contract suite in `tests/it/log_contract.rs` proves: a partition's records come in their order, each once per reading;
//! only committed records are ever seen; a [`Commit`] is visible as a whole or not at all; a partition has one owner, and
//! whoever lost it cannot commit for it; rebalances arrive in line with the records, so that one loop sees everything in
//! order; a position outside the log resumes at the earliest record, never silently at the end.
//!
//! What it does not do: choose partitions (`partitioner`), decide what to retry (the runtimes), create topics by itself.

pub mod embedded;
#[cfg(feature = "kafka")]
pub mod kafka;
pub mod partitioner;
#[cfg(feature = "pulsar")]
pub mod pulsar;
pub mod registry;
pub mod topic;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::log::topic::TopicSpec;
use crate::model::id::InstanceId;
use crate::model::record::{Addressed, Epoch, Offset, Partition, Record, Topic, TopicId};

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What goes wrong with the log, by what the caller does next.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Do the same again, later. A commit is repeated with the same content.
    #[error("the log did not take it, to be tried again: {0}")]
    Transient(BoxError),
    /// The session cannot go on, though nobody else has what it owned: drop it, build a new one and restore.
    #[error("the log's client cannot go on, only a new one: {0}")]
    Broken(BoxError),
    /// Another session of this instance has taken over. The same is to be done, unless it goes on and on: then two processes
    /// have one instance id.
    #[error("another owner has taken over: {0}")]
    Fenced(BoxError),
    /// Nothing will help but a person: stop the process and say what to mend.
    #[error("{0}")]
    Fatal(BoxError),
}

impl LogError {
    pub fn transient(error: impl Into<BoxError>) -> Self {
        LogError::Transient(error.into())
    }

    pub fn broken(error: impl Into<BoxError>) -> Self {
        LogError::Broken(error.into())
    }

    pub fn fenced(error: impl Into<BoxError>) -> Self {
        LogError::Fenced(error.into())
    }

    pub fn fatal(error: impl Into<BoxError>) -> Self {
        LogError::Fatal(error.into())
    }
}

/// Inside [`LogError::Fatal`]: what was configured for the log cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misconfigured(pub String);

/// What a backend's commits promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guarantee {
    /// Outputs and offsets become visible together: exactly once from topic to topic.
    ExactlyOnce,
    /// Outputs are stored before inputs are acknowledged: after a crash they may come twice.
    AtLeastOnce,
}

/// Who a session is.
#[derive(Clone, Debug)]
pub struct Member {
    /// The consumer group without prefix: `laneway.<stage>`.
    pub group: String,
    /// Stable over restarts, unique among the members of the group.
    pub instance: InstanceId,
    /// The input topic.
    pub topic: Topic,
    /// Where it writes.
    pub outputs: Vec<Topic>,
    /// The one of these that is partitioned as the input, in which only a partition's owner writes.
    pub state: Option<Topic>,
    /// A member that is silent for so long loses its partitions.
    pub session_timeout: Duration,
    /// How long a revoke waits for the owner to finish and commit.
    pub revoke_drain: Duration,
}

impl Member {
    /// So long a revoked partition stays with its owner at most: the drain, and the commit that follows it.
    pub fn release_timeout(&self) -> Duration {
        self.revoke_drain + Duration::from_secs(5)
    }
}

/// How much one `poll` may bring.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    pub records: usize,
    pub bytes: usize,
}

/// A partition given to this session, paused. What was committed for it last, if anything was.
#[derive(Clone, Debug)]
pub struct Assignment {
    pub partition: Partition,
    pub epoch: Epoch,
    pub committed: Option<Committed>,
}

/// A committed position and the small text stored with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    pub offset: Offset,
    pub metadata: String,
}

/// What a poll brings, in the order in which it happened.
#[derive(Debug)]
pub enum Polled {
    Records(Vec<Record>),
    /// They are ours and paused, to be sought and resumed when the stage is ready for them.
    Assigned(Vec<Assignment>),
    /// They are still ours until the next `poll`: finish, commit, release.
    Revoked(Vec<Partition>),
    /// They are gone: drop everything of theirs, commit nothing for them.
    Lost(Vec<Partition>),
    Idle,
}

/// Outputs and input positions that become visible together.
#[derive(Clone, Debug, Default)]
pub struct Commit {
    pub outputs: Vec<Addressed>,
    /// Where each partition of the input topic is to be read from next.
    pub offsets: BTreeMap<Partition, (Epoch, Committed)>,
}

/// One membership in a consumer group together with the producer that belongs to it. No clones: `&mut self` is the ordering
/// guarantee.
pub trait Session: Send + 'static {
    const GUARANTEE: Guarantee;
    type Committer: Committer;

    /// Waits for what comes next, or returns [`Polled::Idle`] after a while. Cancel-safe.
    fn poll(&mut self, limit: Limit) -> impl Future<Output = Result<Polled, LogError>> + Send;

    /// The next record of a paused partition will be the first one at or above `to`.
    fn seek(&mut self, partition: Partition, to: Offset) -> Result<(), LogError>;

    fn pause(&mut self, partitions: &[Partition]) -> Result<(), LogError>;

    fn resume(&mut self, partitions: &[Partition]) -> Result<(), LogError>;

    /// What commits for this session, as long as it lives. Only one is used at a time.
    fn committer(&self) -> Self::Committer;

    /// Commits, and does nothing else meanwhile.
    fn commit(&mut self, commit: Arc<Commit>) -> impl Future<Output = Result<(), LogError>> + Send {
        let mut committer = self.committer();
        async move { committer.commit(commit).await }
    }

    /// Leaves the group at once, so that others take over without waiting for a time-out.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// The half of a session that commits, so that it may be polled meanwhile.
pub trait Committer: Send + 'static {
    /// Makes outputs and positions visible as one, where the log is [`Guarantee::ExactlyOnce`]: after [`LogError::Transient`]
    /// nothing of it is visible, and a doubt about its fate is settled inside or ends as [`LogError::Broken`].
    ///
    /// Where it is not, outputs are visible before positions: after [`LogError::Transient`] any of the outputs may be, and the
    /// next call writes them again. What reads such a topic knows them again by their ids (deliveries, events that were seen),
    /// or is a state of which the last record counts (progress); dead letters and counts of job runs may lie there twice.
    ///
    /// In both cases it may be called again after that, with other content too.
    fn commit(&mut self, commit: Arc<Commit>) -> impl Future<Output = Result<(), LogError>> + Send;
}

/// For those who only write.
pub trait Publisher: Clone + Send + Sync + 'static {
    /// Returns once every record is on all replicas. After an error some of them may be.
    fn publish(&self, records: Vec<Addressed>) -> impl Future<Output = Result<(), LogError>> + Send;
}

/// What a reader brings.
#[derive(Debug)]
pub enum Read {
    Records(Vec<Record>),
    /// Everything that is visible now has been read.
    End,
}

/// Reads one partition from any offset, without a group, committed records only.
pub trait Reader: Send + 'static {
    /// Waits a moment for records; [`Read::End`] where there are none yet. Cancel-safe.
    fn read(&mut self, limit: Limit) -> impl Future<Output = Result<Read, LogError>> + Send;

    fn seek(&mut self, to: Offset) -> impl Future<Output = Result<(), LogError>> + Send;
}

/// The bounds of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watermarks {
    /// The earliest record that is still there, or `end`.
    pub start: Offset,
    /// Below it everything is decided: committed or aborted.
    pub stable: Offset,
    /// Behind the last record, decided or not.
    pub end: Offset,
}

/// A topic as the log has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicInfo {
    pub topic: Topic,
    pub partitions: u32,
}

/// A topic's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TopicConfig {
    /// What is set on the topic itself.
    pub own: BTreeMap<String, String>,
    /// What the log does where the topic says nothing.
    pub defaults: BTreeMap<String, String>,
}

impl TopicConfig {
    /// What holds.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.own.get(key).or_else(|| self.defaults.get(key)).map(String::as_str)
    }
}

pub trait Admin: Send + Sync + 'static {
    /// The topics under the configured prefix.
    fn topics(&self) -> impl Future<Output = Result<Vec<TopicInfo>, LogError>> + Send;

    fn topic_config(&self, topic: &Topic) -> impl Future<Output = Result<TopicConfig, LogError>> + Send;

    /// Creates a topic; one that exists is left as it is. Returns when each of its partitions can be written and read.
    fn create(&self, topic: &TopicSpec) -> impl Future<Output = Result<(), LogError>> + Send;

    /// The identity of a topic. Kafka: the cluster's id and the full name, so a topic that was deleted and created again keeps its id.
    /// Pulsar: an id that was given at its creation, else the full name. Embedded: an id of the file.
    fn topic_id(&self, topic: &Topic) -> impl Future<Output = Result<TopicId, LogError>> + Send;

    /// Sets configuration entries of a topic that exists.
    fn configure(
        &self,
        topic: &Topic,
        config: &BTreeMap<String, String>,
    ) -> impl Future<Output = Result<(), LogError>> + Send;

    fn watermarks(
        &self,
        topic: &Topic,
        partition: Partition,
    ) -> impl Future<Output = Result<Watermarks, LogError>> + Send;

    /// About how many records lie from one place to another: what the log can say without reading them.
    fn distance(
        &self,
        _topic: &Topic,
        _partition: Partition,
        from: Offset,
        to: Offset,
    ) -> impl Future<Output = Result<u64, LogError>> + Send {
        async move { Ok(u64::try_from(to.raw().saturating_sub(from.raw())).unwrap_or(u64::MAX)) }
    }

    /// A place so many records before another one, or entries where it is a log of ledgers; the start where there are not so many.
    fn before(
        &self,
        topic: &Topic,
        partition: Partition,
        at: Offset,
        count: u64,
    ) -> impl Future<Output = Result<Offset, LogError>> + Send {
        async move { Ok(at.back(count).max(self.watermarks(topic, partition).await?.start)) }
    }

    /// The first record at or after a time; the end where there is none.
    fn offset_at(
        &self,
        topic: &Topic,
        partition: Partition,
        at: Timestamp,
    ) -> impl Future<Output = Result<Offset, LogError>> + Send;

    /// What a group has committed for a topic.
    fn committed(
        &self,
        group: &str,
        topic: &Topic,
    ) -> impl Future<Output = Result<BTreeMap<Partition, Committed>, LogError>> + Send;

    /// Sets positions of a group, without a metadata text. [`LogError::Fatal`] while the group has members: they would commit
    /// their own.
    fn reset(
        &self,
        group: &str,
        topic: &Topic,
        to: &BTreeMap<Partition, Offset>,
    ) -> impl Future<Output = Result<(), LogError>> + Send;
}

/// One of the logs, connected.
pub trait Backend: Clone + Send + Sync + 'static {
    type Session: Session;
    type Publisher: Publisher;
    type Reader: Reader;
    type Admin: Admin;

    /// Joins a group. An earlier session of the same instance is fenced.
    fn session(&self, member: Member) -> impl Future<Output = Result<Self::Session, LogError>> + Send;

    fn publisher(&self) -> Result<Self::Publisher, LogError>;

    /// Reads from the first record at or above `from`.
    fn reader(
        &self,
        topic: &Topic,
        partition: Partition,
        from: Offset,
    ) -> impl Future<Output = Result<Self::Reader, LogError>> + Send;

    fn admin(&self) -> Result<Self::Admin, LogError>;
}
