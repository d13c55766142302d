//! Topics, positions and watermarks of a Kafka cluster.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, ConfigSource, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::groups::GroupMemberInfo;
use rdkafka::topic_partition_list::{Offset as RawOffset, TopicPartitionList};

use crate::clock::Timestamp;
use crate::log::topic::TopicSpec;
use crate::log::{Admin, Committed, LogError, TopicConfig, TopicInfo, Watermarks};
use crate::model::record::{Offset, Partition, Topic, TopicId};

use super::config::KafkaConfig;
use super::membership::Described;
use super::{convert, leaders};

const CALL: Duration = Duration::from_secs(10);
/// How long a new topic's partitions may be without a leader.
const LEADERS_TIMEOUT: Duration = Duration::from_secs(60);
/// A client has so much to tell between two calls, at most: two lines for each try to connect.
const TOLD: usize = 100;

/// Clones share their clients.
#[derive(Clone)]
pub struct KafkaAdmin(Arc<Clients>);

struct Clients {
    config: KafkaConfig,
    admin: AdminClient<Witness>,
    /// Its watermarks end at the last stable offset.
    committed: Arc<BaseConsumer<Witness>>,
    /// Its watermarks end behind the last record.
    uncommitted: Arc<BaseConsumer<Witness>>,
    witness: Witness,
}

/// Keeps what the clients said last about a connection that failed: a call that ran out of time does not know why.
#[derive(Clone, Default)]
pub(super) struct Witness(Arc<Mutex<Option<String>>>);

impl ClientContext for Witness {
    fn error(&self, error: KafkaError, reason: &str) {
        // That all brokers are down is not why.
        if error.rdkafka_error_code() != Some(Code::AllBrokersDown) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.to_owned());
        }
    }
}

impl ConsumerContext for Witness {}

/// Takes in what a client has to tell. It reads nothing, so nobody else does, and what it tells would pile up.
pub(super) fn hear<C: ConsumerContext>(client: &BaseConsumer<C>) {
    // Nothing and something that was told look the same from here.
    for _ in 0..TOLD {
        let _ = client.poll(Duration::ZERO);
    }
}

impl KafkaAdmin {
    pub(super) fn new(config: &KafkaConfig) -> Result<Self, LogError> {
        let witness = Witness::default();
        let observer = |isolation: &str| {
            let client = config.observer("laneway.observer", isolation).create_with_context(witness.clone());
            client.map(Arc::new).map_err(convert::error)
        };
        let mut admin = config.observer("laneway.observer", "read_committed");
        // Nobody can hear this one.
        admin.set_log_level(RDKafkaLogLevel::Emerg);
        let admin = admin.create_with_context(witness.clone());
        Ok(Self(Arc::new(Clients {
            config: config.clone(),
            admin: admin.map_err(convert::error)?,
            committed: observer("read_committed")?,
            uncommitted: observer("read_uncommitted")?,
            witness,
        })))
    }

    pub(super) fn name(&self, topic: &Topic) -> String {
        self.0.config.topic(topic)
    }

    /// Is told of decided records only.
    pub(super) fn committed_client(&self) -> &BaseConsumer<Witness> {
        &self.0.committed
    }

    /// Is told of all records.
    pub(super) fn uncommitted_client(&self) -> &BaseConsumer<Witness> {
        &self.0.uncommitted
    }

    /// A group, by its full name, as its coordinator knows it.
    pub(super) async fn describe(&self, group: &str) -> Result<Described, LogError> {
        let group = group.to_owned();
        self.ask(&self.0.committed, move |client| {
            let list = client.fetch_group_list(Some(&group), CALL)?;
            let found = list.groups().iter().filter(|found| found.name() == group);
            let mut described = Described { is_settled: false, members: Vec::new() };
            for group in found {
                described.is_settled |= matches!(group.state(), "Stable" | "Empty" | "Dead");
                let member = |it: &GroupMemberInfo| (it.id().to_owned(), it.assignment().unwrap_or_default().to_vec());
                described.members.extend(group.members().iter().map(member));
            }
            Ok(described)
        })
        .await
    }

    /// librdkafka's look-ups block.
    async fn ask<T: Send + 'static>(
        &self,
        client: &Arc<BaseConsumer<Witness>>,
        call: impl FnOnce(&BaseConsumer<Witness>) -> Result<T, KafkaError> + Send + 'static,
    ) -> Result<T, LogError> {
        let client = Arc::clone(client);
        let call = move || {
            let answer = call(&client);
            hear(&client);
            answer
        };
        let answer = tokio::task::spawn_blocking(call).await.map_err(LogError::transient)?;
        if answer.is_ok() {
            self.0.witness.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
        answer.map_err(|error| self.explain(error))
    }

    /// With the reason, where the error is only that no answer came.
    fn explain(&self, error: KafkaError) -> LogError {
        let is_silence = matches!(
            error.rdkafka_error_code(),
            Some(Code::BrokerTransportFailure | Code::OperationTimedOut | Code::AllBrokersDown | Code::RequestTimedOut)
        );
        let said = self.0.witness.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match said.filter(|_| is_silence) {
            Some(reason) => LogError::transient(format!("{}: {reason}", self.0.config.bootstrap_servers)),
            None => convert::error(error),
        }
    }
}

impl Admin for KafkaAdmin {
    async fn topics(&self) -> Result<Vec<TopicInfo>, LogError> {
        let prefix = self.0.config.prefix.clone();
        let found: Vec<(String, u32)> = self
            .ask(&self.0.committed, move |client| {
                let metadata = client.fetch_metadata(None, CALL)?;
                let topics = metadata.topics().iter().filter(|topic| topic.error().is_none());
                let ours = topics.filter_map(|topic| {
                    let name = topic.name().strip_prefix(&prefix)?;
                    (!name.starts_with("__")).then(|| (name.to_owned(), topic.partitions().len() as u32))
                });
                Ok(ours.collect())
            })
            .await?;
        let info = |(name, partitions)| TopicInfo { topic: Topic::new(name), partitions };
        let mut infos: Vec<TopicInfo> = found.into_iter().map(info).collect();
        infos.sort_by(|a, b| a.topic.cmp(&b.topic));
        Ok(infos)
    }

    async fn topic_config(&self, topic: &Topic) -> Result<TopicConfig, LogError> {
        let name = self.0.config.topic(topic);
        let options = AdminOptions::new().request_timeout(Some(CALL));
        let answers = self.0.admin.describe_configs([&ResourceSpecifier::Topic(&name)], &options).await;
        let mut config = TopicConfig::default();
        for answer in answers.map_err(|error| self.explain(error))? {
            for entry in answer.map_err(|code| refused(&name, code))?.entries {
                let Some(value) = entry.value else { continue };
                let is_own = entry.source == ConfigSource::DynamicTopic;
                if is_own { &mut config.own } else { &mut config.defaults }.insert(entry.name, value);
            }
        }
        Ok(config)
    }

    async fn create(&self, spec: &TopicSpec) -> Result<(), LogError> {
        let name = self.0.config.topic(&spec.topic());
        let replication = spec.replication.map_or(-1, i32::from);
        let mut topic = NewTopic::new(&name, spec.partitions as i32, TopicReplication::Fixed(replication));
        for (key, value) in &spec.config {
            topic = topic.set(key, value);
        }
        let options = AdminOptions::new().operation_timeout(Some(CALL)).request_timeout(Some(CALL));
        let answers = self.0.admin.create_topics([&topic], &options).await.map_err(|error| self.explain(error))?;
        for answer in answers {
            match answer {
                Ok(_) | Err((_, Code::TopicAlreadyExists)) => {}
                Err((topic, code)) => return Err(refused(&topic, code)),
            }
        }
        self.ask(&self.0.committed, move |client| leaders::wait_for_all(client, &name, LEADERS_TIMEOUT))
            .await?
            .map_err(LogError::transient)
    }

    async fn topic_id(&self, topic: &Topic) -> Result<TopicId, LogError> {
        let cluster = self.ask(&self.0.committed, |client| Ok(client.client().fetch_cluster_id(CALL))).await?;
        let silent = || self.explain(KafkaError::MetadataFetch(Code::OperationTimedOut));
        Ok(TopicId::new(format!("kafka:{}/{}", cluster.ok_or_else(silent)?, self.0.config.topic(topic))))
    }

    async fn configure(&self, topic: &Topic, config: &BTreeMap<String, String>) -> Result<(), LogError> {
        let name = self.0.config.topic(topic);
        // The call sets all of a topic's entries at once, so what is there goes along.
        let mut all = self.topic_config(topic).await?.own;
        all.extend(config.clone());
        let mut alter = AlterConfig::new(ResourceSpecifier::Topic(&name));
        for (key, value) in &all {
            alter = alter.set(key, value);
        }
        let options = AdminOptions::new().request_timeout(Some(CALL));
        for answer in self.0.admin.alter_configs([&alter], &options).await.map_err(|error| self.explain(error))? {
            answer.map_err(|(_, code)| refused(&name, code))?;
        }
        Ok(())
    }

    async fn watermarks(&self, topic: &Topic, partition: Partition) -> Result<Watermarks, LogError> {
        let (name, number) = (self.0.config.topic(topic), convert::partition(partition));
        let stable_of = name.clone();
        let (_, stable) =
            self.ask(&self.0.committed, move |client| leaders::watermarks(client, &stable_of, number, CALL)).await?;
        let (start, end) =
            self.ask(&self.0.uncommitted, move |client| leaders::watermarks(client, &name, number, CALL)).await?;
        Ok(Watermarks { start: convert::offset(start), stable: convert::offset(stable), end: convert::offset(end) })
    }

    async fn offset_at(&self, topic: &Topic, partition: Partition, at: Timestamp) -> Result<Offset, LogError> {
        let (name, number) = (self.0.config.topic(topic), convert::partition(partition));
        // Below 0 the protocol has words of its own: -1 is the end.
        let millis = at.millis().max(0);
        // Taken before: what lies below it when nothing at or after that time is found has been written before that time.
        let end = self.watermarks(topic, partition).await?.end;
        let found = self
            .ask(&self.0.uncommitted, move |client| {
                let mut list = TopicPartitionList::new();
                list.add_partition_offset(&name, number, RawOffset::Offset(millis))?;
                let found = leaders::offsets_for_times(client, &name, &list, CALL)?;
                Ok(found.find_partition(&name, number).map(|element| element.offset()))
            })
            .await?;
        match found {
            Some(RawOffset::Offset(raw)) => Ok(convert::offset(raw)),
            _ => Ok(end),
        }
    }

    async fn committed(&self, group: &str, topic: &Topic) -> Result<BTreeMap<Partition, Committed>, LogError> {
        let name = self.0.config.topic(topic);
        let client = self.0.config.observer(group, "read_committed").create_with_context(self.0.witness.clone());
        let client: Arc<BaseConsumer<Witness>> = Arc::new(client.map_err(convert::error)?);
        let found = self
            .ask(&client, move |client| {
                let metadata = client.fetch_metadata(Some(&name), CALL)?;
                let count = metadata.topics().first().map_or(0, |topic| topic.partitions().len());
                let mut list = TopicPartitionList::new();
                list.add_partition_range(&name, 0, count as i32 - 1);
                let found = client.committed_offsets(list, CALL)?;
                // A position that could not be had is no "never committed".
                found.elements().iter().try_for_each(|element| element.error())?;
                Ok(found)
            })
            .await?;
        let position = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match element.offset() {
            RawOffset::Offset(raw) => {
                let committed = Committed { offset: convert::offset(raw), metadata: element.metadata().to_owned() };
                Some((Partition(element.partition().max(0) as u32), committed))
            }
            _ => None,
        };
        Ok(found.elements().iter().filter_map(position).collect())
    }

    async fn reset(&self, group: &str, topic: &Topic, to: &BTreeMap<Partition, Offset>) -> Result<(), LogError> {
        let (name, full) = (self.0.config.topic(topic), self.0.config.group(group));
        let client = self.0.config.observer(group, "read_committed").create_with_context(self.0.witness.clone());
        let client: Arc<BaseConsumer<Witness>> = Arc::new(client.map_err(convert::error)?);
        let to = to.clone();
        let members = full.clone();
        let members = self.ask(&client, move |client| {
            let list = client.fetch_group_list(Some(&members), CALL)?;
            let member = |it: &GroupMemberInfo| format!("{} on {}", it.client_id(), it.client_host());
            Ok(list.groups().iter().flat_map(|group| group.members()).map(member).collect::<Vec<_>>())
        });
        let members = members.await?;
        if !members.is_empty() {
            return Err(LogError::fatal(format!("group {full} has members ({}): stop them first", members.join(", "))));
        }
        self.ask(&client, move |client| {
            let mut list = TopicPartitionList::new();
            for (partition, offset) in &to {
                list.add_partition_offset(&name, convert::partition(*partition), convert::raw_offset(*offset))?;
            }
            // From nobody in the group: a broker refuses it where somebody has joined meanwhile.
            client.commit(&list, CommitMode::Sync)
        })
        .await
    }
}

fn refused(topic: &str, code: Code) -> LogError {
    match convert::error(KafkaError::AdminOp(code)) {
        LogError::Fatal(error) => LogError::fatal(format!("topic {topic}: {error}")),
        other => other,
    }
}
