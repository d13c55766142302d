//! Where a topic in the log is not as it is declared.

use std::time::Duration;

use crate::clock::Clock;
use crate::log::topic::{TopicSpec, Topics};
use crate::log::{Admin, Backend, LogError, TopicConfig, TopicInfo};

/// A topic as declared, and as the log has it.
pub struct Compared<'a> {
    pub spec: &'a TopicSpec,
    pub found: Option<(TopicInfo, TopicConfig)>,
    pub differences: Vec<Difference>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// `partitions`, or a setting's name.
    pub key: String,
    pub declared: String,
    /// What holds in the log; none where it says nothing.
    pub found: Option<String>,
}

/// A topic that was just created is not known to every broker at once.
const TOPICS_TIMEOUT: Duration = Duration::from_secs(10);
const TOPICS_INTERVAL: Duration = Duration::from_millis(100);

/// The topics that the log has: as soon as all declared ones are among them, and after 10 seconds without those that are missing.
///
/// # Errors
/// Where the log cannot be asked.
pub async fn wait_for_topics(admin: &impl Admin, declared: &Topics, clock: &Clock) -> Result<Vec<TopicInfo>, LogError> {
    let until = clock.instant() + TOPICS_TIMEOUT;
    loop {
        let found = admin.topics().await?;
        let is_complete = declared.iter().all(|spec| found.iter().any(|info| info.topic == spec.topic()));
        if is_complete || clock.instant() > until {
            return Ok(found);
        }
        clock.sleep(TOPICS_INTERVAL).await;
    }
}

/// Compares every declared topic with the log.
///
/// # Errors
/// Where the log cannot be asked.
pub async fn compare<'a, B: Backend>(
    log: &B,
    specs: impl Iterator<Item = &'a TopicSpec>,
) -> Result<Vec<Compared<'a>>, LogError> {
    let admin = log.admin()?;
    let infos = admin.topics().await?;
    let mut compared = Vec::new();
    for spec in specs {
        let found = match infos.iter().find(|info| info.topic == spec.topic()) {
            Some(info) => Some((info.clone(), admin.topic_config(&info.topic).await?)),
            None => None,
        };
        let differences =
            found.as_ref().map_or_else(Vec::new, |(info, config)| differences(spec, info.partitions, config));
        compared.push(Compared { spec, found, differences });
    }
    Ok(compared)
}

fn differences(spec: &TopicSpec, partitions: u32, config: &TopicConfig) -> Vec<Difference> {
    let difference = |key: &str, declared: String, found: Option<String>| {
        (found.as_ref() != Some(&declared)).then(|| Difference { key: key.to_owned(), declared, found })
    };
    let count = difference("partitions", spec.partitions.to_string(), Some(partitions.to_string()));
    let settings = spec
        .config
        .iter()
        .filter_map(|(key, value)| difference(key, value.clone(), config.get(key).map(str::to_owned)));
    count.into_iter().chain(settings).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::topic::Topics;
    use crate::model::record::Topic;

    #[test]
    fn what_holds_is_compared_wherever_it_is_set() {
        let topics = Topics::load(None).expect("the compiled-in topics");
        let spec = topics.get(&Topic::DELIVERIES).expect("declared");
        let set = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let (same, other) = (&spec.config["retention.ms"], "5");
        let size = &spec.config["max.message.bytes"];
        let config = TopicConfig {
            own: set(&[("retention.ms", same), ("segment.ms", "1")]),
            defaults: set(&[("max.message.bytes", size), ("retention.ms", other)]),
        };
        assert_eq!(differences(spec, spec.partitions, &config), [], "what is not declared may be anything");
        let config = TopicConfig { own: set(&[("retention.ms", other)]), defaults: set(&[]) };
        let found: Vec<(String, Option<String>)> =
            differences(spec, 3, &config).into_iter().map(|it| (it.key, it.found)).collect();
        let expected = [("partitions", Some("3")), ("max.message.bytes", None), ("retention.ms", Some(other))];
        assert_eq!(found, expected.map(|(key, found)| (key.to_owned(), found.map(str::to_owned))));
    }
}
