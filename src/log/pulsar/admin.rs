//! Topics, positions and watermarks of a Pulsar cluster.
//!
//! Topics are declared with Kafka's names for what is set. What has a counterpart becomes a policy of the topic; all of it is kept as the
//! topic's properties too, so that it can be told what was wanted.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::try_join_all;
use serde::Deserialize;

use crate::clock::Timestamp;
use crate::log::topic::TopicSpec;
use crate::log::{Admin, Committed, LogError, TopicConfig, TopicInfo, Watermarks};
use crate::model::record::{Offset, Partition, Topic, TopicId};

use super::config::{Alone, Client};
use super::floor;
use super::internals::Internals;
use super::positions::{LastMessage, Place};
use super::publisher::partitions;
use super::reader::{Feed, From};
use super::rest::Rest;

/// Compaction begins when so much has been written since the last one.
const COMPACT_AFTER: u64 = 16 << 20;
const MINUTE: i64 = 60_000;
/// The property of a topic that identifies it. It is set once, when the topic is created.
const TOPIC_ID: &str = "laneway.topic.id";

#[derive(Clone)]
pub struct PulsarAdmin {
    pub(super) client: Arc<Client>,
    pub(super) rest: Rest,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Retention {
    retention_time_in_minutes: i64,
}

impl PulsarAdmin {
    fn place(&self, group: &str, topic: &Topic) -> Place {
        Place {
            client: Arc::clone(&self.client),
            rest: self.rest.clone(),
            group: group.to_owned(),
            input: topic.clone(),
        }
    }

    fn missing(&self, topic: &Topic) -> LogError {
        LogError::transient(format!("there is no partitioned topic {}", self.client.config.name(topic)))
    }

    async fn last(
        &self,
        topic: &Topic,
        partition: Partition,
        internals: &Internals,
    ) -> Result<Option<Offset>, LogError> {
        if internals.is_compacted_only() {
            // Only brokers tell of what is left in compacted form alone.
            return Feed::open(&self.client, topic, partition, From::At(Offset::START)).await?.last().await;
        }
        let path = format!("{}/lastMessageId", self.rest.partition(topic, partition));
        let last: Option<LastMessage> = self.rest.get(&path).await?;
        Ok(last.and_then(|last| {
            let index = last.batch_index.and_then(|index| u32::try_from(index).ok()).unwrap_or(0);
            Some(Offset::of_entry(u64::try_from(last.ledger_id).ok()?, u64::try_from(last.entry_id).ok()?, index))
        }))
    }

    /// Makes policies of what is set and has a counterpart.
    async fn set(&self, topic: &Topic, config: &BTreeMap<String, String>) -> Result<(), LogError> {
        let path = self.rest.topic(topic);
        let number = |key: &str| -> Result<Option<i64>, LogError> {
            let wrong = |error| LogError::fatal(format!("topic {topic}: {key}: {error}"));
            config.get(key).map(|text| text.parse::<i64>().map_err(wrong)).transpose()
        };
        if let Some(retention) = number("retention.ms")? {
            let minutes = if retention < 0 { -1 } else { minutes(retention) };
            let policy = serde_json::json!({"retentionTimeInMinutes": minutes, "retentionSizeInMB": -1});
            self.rest.post(&format!("{path}/retention"), &policy).await?;
        }
        if config.get("cleanup.policy").is_some_and(|policy| policy.contains("compact")) {
            // What is compacted is deleted; until then a cursor of the broker's own keeps it.
            self.rest.post(&format!("{path}/compactionThreshold"), &COMPACT_AFTER).await?;
        }
        if let Some(size) = number("max.message.bytes")? {
            self.rest.post(&format!("{path}/maxMessageSize"), &size).await?;
        }
        self.rest.keep_all(topic).await?;
        self.rest.put(&format!("{path}/properties"), config).await.map(drop)
    }
}

/// At least so long.
fn minutes(ms: i64) -> i64 {
    ms.div_euclid(MINUTE) + i64::from(ms.rem_euclid(MINUTE) > 0)
}

impl Admin for PulsarAdmin {
    async fn topics(&self) -> Result<Vec<TopicInfo>, LogError> {
        let path = format!("{}/partitioned", self.rest.namespace());
        let names: Vec<String> = self.rest.get(&path).await?.unwrap_or_default();
        let start = format!(
            "persistent://{}/{}/{}",
            self.client.config.tenant, self.client.config.namespace, self.client.config.prefix
        );
        let ours = names.iter().filter_map(|name| name.strip_prefix(&start)).filter(|name| !name.starts_with("__"));
        let info = async |name: &str| {
            let topic = Topic::new(name);
            let partitions = partitions(&self.client, &topic).await?;
            Ok::<_, LogError>(TopicInfo { topic, partitions })
        };
        let mut infos = try_join_all(ours.map(info)).await?;
        infos.sort_by(|a, b| a.topic.cmp(&b.topic));
        Ok(infos)
    }

    async fn topic_config(&self, topic: &Topic) -> Result<TopicConfig, LogError> {
        let path = self.rest.topic(topic);
        let properties: Option<BTreeMap<String, String>> = self.rest.get(&format!("{path}/properties")).await?;
        let mut own = properties.ok_or_else(|| self.missing(topic))?;
        // What is true, where it is not what was wanted.
        let retention: Option<Retention> = self.rest.get(&format!("{path}/retention")).await?;
        if let Some(wanted) = own.get("retention.ms").and_then(|text| text.parse::<i64>().ok()) {
            let found = retention.map_or(0, |retention| retention.retention_time_in_minutes);
            if found != if wanted < 0 { -1 } else { minutes(wanted) } {
                own.insert("retention.ms".into(), (found * MINUTE).max(-1).to_string());
            }
        }
        let size: Option<i64> = self.rest.get(&format!("{path}/maxMessageSize")).await?;
        if own.contains_key("max.message.bytes") {
            match size {
                Some(size) => own.insert("max.message.bytes".into(), size.to_string()),
                None => own.remove("max.message.bytes"),
            };
        }
        let threshold: Option<i64> = self.rest.get(&format!("{path}/compactionThreshold")).await?;
        if threshold.is_none_or(|threshold| threshold <= 0) {
            own.remove("cleanup.policy");
        }
        Ok(TopicConfig { own, defaults: BTreeMap::new() })
    }

    async fn create(&self, spec: &TopicSpec) -> Result<(), LogError> {
        let topic = spec.topic();
        let path = format!("{}/partitions", self.rest.topic(&topic));
        if self.rest.put(&path, &spec.partitions).await? {
            let mut config = spec.config.clone();
            config.insert(TOPIC_ID.to_owned(), uuid::Uuid::new_v4().simple().to_string());
            self.set(&topic, &config).await?;
        }
        Ok(())
    }

    async fn topic_id(&self, topic: &Topic) -> Result<TopicId, LogError> {
        let path = self.rest.topic(topic);
        let properties: Option<BTreeMap<String, String>> = self.rest.get(&format!("{path}/properties")).await?;
        let properties = properties.ok_or_else(|| self.missing(topic))?;
        // Topics that other tools created have a name only.
        let config = &self.client.config;
        let (name, id) = (config.name(topic), properties.get(TOPIC_ID).map_or("", String::as_str));
        Ok(TopicId::new(format!("pulsar:{}/{}/{name}/{id}", config.tenant, config.namespace)))
    }

    async fn configure(&self, topic: &Topic, config: &BTreeMap<String, String>) -> Result<(), LogError> {
        let mut all = self.topic_config(topic).await?.own;
        all.extend(config.clone());
        self.set(topic, &all).await
    }

    async fn watermarks(&self, topic: &Topic, partition: Partition) -> Result<Watermarks, LogError> {
        let path = format!("{}/internalStats", self.rest.partition(topic, partition));
        let internals: Internals = self.rest.get(&path).await?.ok_or_else(|| self.missing(topic))?;
        let end = match self.last(topic, partition, &internals).await? {
            Some(last) => last.just_after(),
            None => internals.empty(),
        };
        // What is there is decided: nothing is undone.
        Ok(Watermarks { start: internals.start().unwrap_or(end).min(end), stable: end, end })
    }

    /// In entries, each of them a batch, as the broker counts too; one at least where the places differ.
    async fn distance(&self, topic: &Topic, partition: Partition, from: Offset, to: Offset) -> Result<u64, LogError> {
        if from >= to {
            return Ok(0);
        }
        let path = format!("{}/internalStats", self.rest.partition(topic, partition));
        let internals: Internals = self.rest.get(&path).await?.ok_or_else(|| self.missing(topic))?;
        Ok((internals.before(to) - internals.before(from)).max(1))
    }

    async fn before(&self, topic: &Topic, partition: Partition, at: Offset, count: u64) -> Result<Offset, LogError> {
        let Some((ledger, entry, _)) = at.entry() else { return Ok(Offset::START) };
        let path = format!("{}/internalStats", self.rest.partition(topic, partition));
        let internals: Internals = self.rest.get(&path).await?.ok_or_else(|| self.missing(topic))?;
        Ok(internals.back(ledger, entry, count))
    }

    async fn offset_at(&self, topic: &Topic, partition: Partition, at: Timestamp) -> Result<Offset, LogError> {
        let marks = self.watermarks(topic, partition).await?;
        let path = format!("{}/messageid/{}", self.rest.partition(topic, partition), at.millis().max(0));
        let found: Option<LastMessage> = self.rest.get(&path).await?;
        let from = found.and_then(|found| {
            Some(Offset::of_entry(u64::try_from(found.ledger_id).ok()?, u64::try_from(found.entry_id).ok()?, 0))
        });
        // The broker may point a little before it; the records say.
        let mut feed = Feed::open(&self.client, topic, partition, From::At(from.unwrap_or(marks.start))).await?;
        while feed.position() < marks.end {
            // What is compacted away may be the last that was there.
            let Some(record) = feed.soon().await? else { break };
            if record.timestamp.millis() >= at.millis() {
                return Ok(record.offset);
            }
        }
        Ok(marks.end)
    }

    async fn committed(&self, group: &str, topic: &Topic) -> Result<BTreeMap<Partition, Committed>, LogError> {
        let place = self.place(group, topic);
        let count = partitions(&self.client, &place.topic()).await?;
        let kept = async |partition| Ok::<_, LogError>((partition, place.last(partition).await?.committed));
        let all = try_join_all((0..count).map(Partition).map(kept)).await?;
        Ok(all.into_iter().filter_map(|(partition, committed)| Some((partition, committed?))).collect())
    }

    async fn reset(&self, group: &str, topic: &Topic, to: &BTreeMap<Partition, Offset>) -> Result<(), LogError> {
        let place = self.place(group, topic);
        let count = partitions(&self.client, topic).await?;
        place.prepare(count).await?;
        floor::prepare(&place, &place.input).await?;
        // All of them, so that whoever has one is found before anything changes.
        let mut locks = BTreeMap::new();
        for partition in (0..count).map(Partition) {
            match place.acquire(partition, None, Alone::IfFree, "reset").await? {
                Some(lock) => locks.insert(partition, lock),
                None => return Err(LogError::fatal(format!("group {group} has members: stop them first"))),
            };
        }
        for (partition, offset) in to {
            let Some(lock) = locks.get_mut(partition) else { continue };
            let mut kept = lock.kept.clone();
            kept.committed = Some(Committed { offset: *offset, metadata: String::new() });
            place.keep(lock, *partition, kept, "reset").await?;
            floor::put(&place, topic, *partition, *offset).await?;
        }
        for lock in locks.into_values() {
            lock.close().await;
        }
        Ok(())
    }
}
