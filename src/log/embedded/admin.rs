//! Topics and positions of the embedded log.

use std::collections::BTreeMap;

use crate::clock::Timestamp;
use crate::log::topic::TopicSpec;
use crate::log::{Admin, Committed, LogError, TopicInfo, Watermarks};
use crate::model::record::{Offset, Partition, Topic};

use super::Embedded;

pub struct EmbeddedAdmin(Embedded);

impl EmbeddedAdmin {
    pub(super) fn new(log: Embedded) -> Self {
        Self(log)
    }
}

impl Admin for EmbeddedAdmin {
    async fn topics(&self) -> Result<Vec<TopicInfo>, LogError> {
        self.0.0.store.topics().await.map_err(LogError::transient)
    }

    async fn create(&self, topic: &TopicSpec) -> Result<(), LogError> {
        self.0.0.store.create(topic).await.map_err(LogError::transient)?;
        let found = self.0.0.store.ends().await.map_err(LogError::transient)?;
        self.0.0.ends.note(found);
        Ok(())
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
}
