//! Topics and positions of the embedded log.

use std::collections::BTreeMap;

use crate::clock::Timestamp;
use crate::log::topic::TopicSpec;
use crate::log::{Admin, Committed, LogError, TopicConfig, TopicInfo, Watermarks};
use crate::model::record::{Offset, Partition, Topic, TopicId};

use super::Embedded;
use super::store::Position;

pub struct EmbeddedAdmin(Embedded);

impl EmbeddedAdmin {
    pub(super) fn new(log: Embedded) -> Self {
        Self(log)
    }
}

impl Admin for EmbeddedAdmin {
    async fn topics(&self) -> Result<Vec<TopicInfo>, LogError> {
        let found = self.0.0.store.topics().await.map_err(LogError::transient)?;
        Ok(found.into_iter().map(|it| TopicInfo { topic: it.topic, partitions: it.partitions }).collect())
    }

    async fn topic_config(&self, topic: &Topic) -> Result<TopicConfig, LogError> {
        let found = self.0.0.store.topics().await.map_err(LogError::transient)?;
        let found = found.into_iter().find(|it| it.topic == *topic);
        let found = found.ok_or_else(|| LogError::fatal(format!("there is no topic {topic}")))?;
        Ok(TopicConfig { own: found.config, defaults: BTreeMap::new() })
    }

    async fn create(&self, topic: &TopicSpec) -> Result<(), LogError> {
        self.0.0.store.create(topic).await.map_err(LogError::transient)?;
        let found = self.0.0.store.ends().await.map_err(LogError::transient)?;
        self.0.0.ends.note(found);
        Ok(())
    }

    async fn topic_id(&self, topic: &Topic) -> Result<TopicId, LogError> {
        let id = self.0.0.store.id().await.map_err(LogError::transient)?;
        Ok(TopicId::new(format!("embedded:{id}/{topic}")))
    }

    async fn configure(&self, topic: &Topic, config: &BTreeMap<String, String>) -> Result<(), LogError> {
        self.0.0.store.configure(topic, config).await.map_err(LogError::transient)
    }

    async fn watermarks(&self, topic: &Topic, partition: Partition) -> Result<Watermarks, LogError> {
        self.0.0.store.bounds(topic, partition).await.map_err(LogError::transient)
    }

    async fn offset_at(&self, topic: &Topic, partition: Partition, at: Timestamp) -> Result<Offset, LogError> {
        self.0.0.store.offset_at(topic, partition, at).await.map_err(LogError::transient)
    }

    async fn committed(&self, group: &str, topic: &Topic) -> Result<BTreeMap<Partition, Committed>, LogError> {
        self.0.0.store.committed(group, topic).await.map_err(LogError::transient)
    }

    async fn reset(&self, group: &str, topic: &Topic, to: &BTreeMap<Partition, Offset>) -> Result<(), LogError> {
        // The groups of another process are not known here.
        let _alone = self.0.exclude_engines()?;
        if self.0.groups().has_members(&(group.to_owned(), topic.clone())) {
            return Err(LogError::fatal(format!("group {group} has members: stop them first")));
        }
        let position = |(partition, offset): (&Partition, &Offset)| Position {
            group: group.to_owned(),
            topic: topic.clone(),
            partition: *partition,
            committed: Committed { offset: *offset, metadata: String::new() },
        };
        self.0.0.writer.write(Vec::new(), to.iter().map(position).collect(), None, None).await
    }
}
