//! The topics of the flow, declared in `topics/*.yaml` and compiled in; a directory can override single ones.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::log::partitioner::{IsolateBy, Placement};
use crate::model::record::Topic;

/// A topic as declared. `config` holds broker settings by their Kafka names.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopicSpec {
    pub name: String,
    pub partitions: u32,
    /// Replicas of each partition; the broker's default where it is not given.
    #[serde(default)]
    pub replication: Option<u16>,
    #[serde(default)]
    pub config: BTreeMap<String, String>,
    /// What the record key is.
    pub key: String,
    /// The value's schema in `schemas/`.
    pub value: String,
    #[serde(default = "not_isolated")]
    pub isolate_by: IsolateBy,
    #[serde(default)]
    pub spread: Option<u32>,
    pub written_by: Vec<String>,
    pub read_by: Vec<String>,
    pub why: String,
}

fn not_isolated() -> IsolateBy {
    IsolateBy::None
}

impl TopicSpec {
    pub fn topic(&self) -> Topic {
        Topic::new(self.name.clone())
    }

    pub fn placement(&self) -> Placement {
        Placement { isolate_by: self.isolate_by, spread: self.spread, partitions: self.partitions }
    }

    /// A setting in milliseconds, where it is given and not unlimited.
    pub fn retention_ms(&self) -> Option<i64> {
        self.config.get("retention.ms").and_then(|text| text.parse().ok()).filter(|ms| *ms >= 0)
    }

    pub fn is_compacted(&self) -> bool {
        self.config.get("cleanup.policy").is_some_and(|policy| policy.contains("compact"))
    }
}

/// What is wrong with a topic declaration, and where.
#[derive(Debug, thiserror::Error)]
pub enum TopicError {
    #[error("{file}: {error}")]
    Unreadable { file: String, error: String },
    #[error("{file}: {problem}")]
    Refused { file: String, problem: String },
}

/// All declared topics, by logical name.
#[derive(Clone, Debug)]
pub struct Topics(BTreeMap<String, TopicSpec>);

const COMPILED_IN: [(&str, &str); 9] = [
    ("events.yaml", include_str!("../../topics/events.yaml")),
    ("seen.yaml", include_str!("../../topics/seen.yaml")),
    ("deliveries.yaml", include_str!("../../topics/deliveries.yaml")),
    ("progress.yaml", include_str!("../../topics/progress.yaml")),
    ("control.yaml", include_str!("../../topics/control.yaml")),
    ("dead-letters.yaml", include_str!("../../topics/dead-letters.yaml")),
    ("job-status.yaml", include_str!("../../topics/job-status.yaml")),
    ("suppressions.yaml", include_str!("../../topics/suppressions.yaml")),
    ("proc-errors.yaml", include_str!("../../topics/proc-errors.yaml")),
];

impl Topics {
    /// The compiled-in declarations, with those of `overrides` (every `*.yaml` in it) in their place.
    ///
    /// # Errors
    /// [`TopicError`] names the file and what is wrong in it.
    pub fn load(overrides: Option<&Path>) -> Result<Self, TopicError> {
        let mut topics = BTreeMap::new();
        for (file, text) in COMPILED_IN {
            let spec = parse(file, text)?;
            topics.insert(spec.name.clone(), spec);
        }
        if let Some(folder) = overrides {
            for (file, text) in files(folder)? {
                let spec = parse(&file, &text)?;
                if !topics.contains_key(&spec.name) {
                    let problem = format!("there is no topic {:?} in the flow", spec.name);
                    return Err(TopicError::Refused { file, problem });
                }
                topics.insert(spec.name.clone(), spec);
            }
        }
        let topics = Self(topics);
        topics.check_co_partitioned()?;
        Ok(topics)
    }

    /// The same topics with this many partitions for the keyed ones and what is co-partitioned with them.
    #[must_use]
    pub fn with_partitions(mut self, partitions: u32) -> Self {
        for name in ["events", "events.seen", "deliveries", "progress.router"] {
            if let Some(spec) = self.0.get_mut(name) {
                spec.partitions = partitions;
            }
        }
        self
    }

    pub fn get(&self, topic: &Topic) -> Option<&TopicSpec> {
        self.0.get(topic.as_str())
    }

    pub fn iter(&self) -> impl Iterator<Item = &TopicSpec> {
        self.0.values()
    }

    /// Progress lies in the partition of the same number as its input.
    fn check_co_partitioned(&self) -> Result<(), TopicError> {
        let partitions = |name: &str| self.0.get(name).map(|spec| spec.partitions);
        for (own, input, file) in
            [("progress.router", "deliveries", "progress.yaml"), ("events.seen", "events", "seen.yaml")]
        {
            if partitions(own) != partitions(input) {
                let problem = format!("{own} needs as many partitions as {input}");
                return Err(TopicError::Refused { file: file.into(), problem });
            }
        }
        Ok(())
    }
}

fn parse(file: &str, text: &str) -> Result<TopicSpec, TopicError> {
    let spec: TopicSpec = serde_norway::from_str(text)
        .map_err(|error| TopicError::Unreadable { file: file.into(), error: error.to_string() })?;
    let refused = |problem: String| Err(TopicError::Refused { file: file.into(), problem });
    if spec.partitions == 0 {
        return refused("partitions must be at least 1".into());
    }
    if spec.spread == Some(0) {
        return refused("spread must be at least 1".into());
    }
    if spec.config.contains_key("retention.bytes") {
        return refused("retention.bytes would delete what is not delivered yet; use retention.ms".into());
    }
    Ok(spec)
}

fn files(folder: &Path) -> Result<Vec<(String, String)>, TopicError> {
    let unreadable =
        |error: std::io::Error| TopicError::Unreadable { file: folder.display().to_string(), error: error.to_string() };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let text = std::fs::read_to_string(&path).map_err(unreadable)?;
            found.push((path.display().to_string(), text));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_declared_topics_are_readable_and_fit_together() {
        let topics = Topics::load(None).expect("the compiled-in topics");
        assert_eq!(topics.iter().count(), COMPILED_IN.len());
        assert!(topics.get(&Topic::PROGRESS_ROUTER).expect("declared").is_compacted());
        assert_eq!(topics.get(&Topic::EVENTS).and_then(TopicSpec::retention_ms), Some(604_800_000));
    }

    #[test]
    fn broken_declarations_say_what_and_where() {
        let base = include_str!("../../topics/events.yaml");
        let cases = [
            (base.replace("partitions: 12", "partitions: 0"), "at least 1"),
            (base.replace("retention.ms", "retention.bytes"), "retention.bytes"),
            (base.replace("partitions:", "partition:"), "partition"),
        ];
        for (text, word) in cases {
            let message = parse("events.yaml", &text).expect_err("refused").to_string();
            assert!(message.starts_with("events.yaml: ") && message.contains(word), "{message}");
        }
    }
}
