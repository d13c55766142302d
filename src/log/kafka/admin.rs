//! Topics, positions and watermarks of a Kafka cluster.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, ConfigSource, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::topic_partition_list::{Offset as RawOffset, TopicPartitionList};

use crate::clock::Timestamp;
use crate::log::topic::TopicSpec;
use crate::log::{Admin, Committed, LogError, TopicInfo, Watermarks};
use crate::model::record::{Offset, Partition, Topic};

use super::config::KafkaConfig;
use super::convert;

const CALL: Duration = Duration::from_secs(10);

/// Clones share their clients.
#[derive(Clone)]
pub struct KafkaAdmin(Arc<Clients>);

struct Clients {
    config: KafkaConfig,
    admin: AdminClient<DefaultClientContext>,
    /// Its watermarks end at the last stable offset.
    committed: Arc<BaseConsumer>,
    /// Its watermarks end behind the last record.
    uncommitted: Arc<BaseConsumer>,
}

impl KafkaAdmin {
    pub(super) fn new(config: &KafkaConfig) -> Result<Self, LogError> {
        let observer = |isolation: &str| config.observer("laneway.observer", isolation);
        Ok(Self(Arc::new(Clients {
            config: config.clone(),
            admin: observer("read_committed").create().map_err(convert::error)?,
            committed: Arc::new(observer("read_committed").create().map_err(convert::error)?),
            uncommitted: Arc::new(observer("read_uncommitted").create().map_err(convert::error)?),
        })))
    }

    pub(super) fn name(&self, topic: &Topic) -> String {
        self.0.config.topic(topic)
    }

    /// Is told of decided records only.
    pub(super) fn committed_client(&self) -> &BaseConsumer {
        &self.0.committed
    }

    /// Is told of all records.
    pub(super) fn uncommitted_client(&self) -> &BaseConsumer {
        &self.0.uncommitted
    }

    /// librdkafka's look-ups block.
    async fn ask<T: Send + 'static>(
        client: &Arc<BaseConsumer>,
        call: impl FnOnce(&BaseConsumer) -> Result<T, KafkaError> + Send + 'static,
    ) -> Result<T, LogError> {
        let client = Arc::clone(client);
        let answer = tokio::task::spawn_blocking(move || call(&client)).await;
        answer.map_err(LogError::transient)?.map_err(convert::error)
    }
}

impl Admin for KafkaAdmin {
    async fn topics(&self) -> Result<Vec<TopicInfo>, LogError> {
        let prefix = self.0.config.prefix.clone();
        let found: Vec<(String, u32)> = Self::ask(&self.0.committed, move |client| {
            let metadata = client.fetch_metadata(None, CALL)?;
            let topics = metadata.topics().iter().filter(|topic| topic.error().is_none());
            let ours = topics.filter_map(|topic| {
                let name = topic.name().strip_prefix(&prefix)?;
                (!name.starts_with("__")).then(|| (name.to_owned(), topic.partitions().len() as u32))
            });
            Ok(ours.collect())
        })
        .await?;
        let mut infos = Vec::with_capacity(found.len());
        for (name, partitions) in found {
            let topic = Topic::new(name);
            let (config, defaults) = self.topic_config(&topic).await?;
            infos.push(TopicInfo { topic, partitions, config, defaults });
        }
        infos.sort_by(|a, b| a.topic.cmp(&b.topic));
        Ok(infos)
    }

    async fn create(&self, spec: &TopicSpec) -> Result<(), LogError> {
        let name = self.0.config.topic(&spec.topic());
        let replication = spec.replication.map_or(-1, i32::from);
        let mut topic = NewTopic::new(&name, spec.partitions as i32, TopicReplication::Fixed(replication));
        for (key, value) in &spec.config {
            topic = topic.set(key, value);
        }
        let options = AdminOptions::new().operation_timeout(Some(CALL)).request_timeout(Some(CALL));
        let answers = self.0.admin.create_topics([&topic], &options).await.map_err(convert::error)?;
        for answer in answers {
            match answer {
                Ok(_) | Err((_, Code::TopicAlreadyExists)) => {}
                Err((topic, code)) => return Err(refused(&topic, code)),
            }
        }
        Ok(())
    }

    async fn configure(&self, topic: &Topic, config: &BTreeMap<String, String>) -> Result<(), LogError> {
        let name = self.0.config.topic(topic);
        // The call sets all of a topic's entries at once, so what is there goes along.
        let (mut all, _) = self.topic_config(topic).await?;
        all.extend(config.clone());
        let mut alter = AlterConfig::new(ResourceSpecifier::Topic(&name));
        for (key, value) in &all {
            alter = alter.set(key, value);
        }
        let options = AdminOptions::new().request_timeout(Some(CALL));
        for answer in self.0.admin.alter_configs([&alter], &options).await.map_err(convert::error)? {
            answer.map_err(|(_, code)| refused(&name, code))?;
        }
        Ok(())
    }

    async fn watermarks(&self, topic: &Topic, partition: Partition) -> Result<Watermarks, LogError> {
        let (name, number) = (self.0.config.topic(topic), convert::partition(partition));
        let stable_of = name.clone();
        let (_, stable) =
            Self::ask(&self.0.committed, move |client| client.fetch_watermarks(&stable_of, number, CALL)).await?;
        let (start, end) =
            Self::ask(&self.0.uncommitted, move |client| client.fetch_watermarks(&name, number, CALL)).await?;
        Ok(Watermarks { start: convert::offset(start), stable: convert::offset(stable), end: convert::offset(end) })
    }

    async fn offset_at(&self, topic: &Topic, partition: Partition, at: Timestamp) -> Result<Offset, LogError> {
        let (name, number) = (self.0.config.topic(topic), convert::partition(partition));
        // Taken before: what lies below it when nothing at or after that time is found has been written before that time.
        let end = self.watermarks(topic, partition).await?.end;
        let found = Self::ask(&self.0.uncommitted, move |client| {
            let mut list = TopicPartitionList::new();
            list.add_partition_offset(&name, number, RawOffset::Offset(at.millis()))?;
            let found = client.offsets_for_times(list, CALL)?;
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
        let client: BaseConsumer = self.0.config.observer(group, "read_committed").create().map_err(convert::error)?;
        let found = Self::ask(&Arc::new(client), move |client| {
            let metadata = client.fetch_metadata(Some(&name), CALL)?;
            let count = metadata.topics().first().map_or(0, |topic| topic.partitions().len());
            let mut list = TopicPartitionList::new();
            list.add_partition_range(&name, 0, count as i32 - 1);
            client.committed_offsets(list, CALL)
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
}

impl KafkaAdmin {
    /// What is set on the topic itself, and what the broker does where nothing is.
    async fn topic_config(
        &self,
        topic: &Topic,
    ) -> Result<(BTreeMap<String, String>, BTreeMap<String, String>), LogError> {
        let name = self.0.config.topic(topic);
        let options = AdminOptions::new().request_timeout(Some(CALL));
        let answers = self.0.admin.describe_configs([&ResourceSpecifier::Topic(&name)], &options).await;
        let (mut own, mut defaults) = (BTreeMap::new(), BTreeMap::new());
        for answer in answers.map_err(convert::error)? {
            for entry in answer.map_err(|code| refused(&name, code))?.entries {
                let Some(value) = entry.value else { continue };
                let is_own = entry.source == ConfigSource::DynamicTopic;
                if is_own { &mut own } else { &mut defaults }.insert(entry.name, value);
            }
        }
        Ok((own, defaults))
    }
}

fn refused(topic: &str, code: Code) -> LogError {
    match convert::error(KafkaError::AdminOp(code)) {
        LogError::Fatal(error) => LogError::fatal(format!("topic {topic}: {error}")),
        other => other,
    }
}
