//! How users are placed on partitions, kept in `control`: another placement moves users while their old deliveries wait, and what
//! comes then would overtake them. So a start with another one is refused until nothing waits, or until somebody says that order
//! is not worth it.

use anyhow::bail;
use serde::{Deserialize, Serialize};

use super::engine::Stage;
use super::{lag, standing};
use crate::clock::Timestamp;
use crate::control::commands;
use crate::log::partitioner::Placement;
use crate::log::topic::Topics;
use crate::log::{Backend, LogError, Publisher};
use crate::model::command::Control;
use crate::model::record::Topic;

const KIND: &str = "placement";
/// Those whose partitions keep users in order.
const TOPICS: [Topic; 2] = [Topic::EVENTS, Topic::DELIVERIES];

#[derive(Debug, Serialize, Deserialize)]
struct Payload {
    #[serde(flatten)]
    placement: Placement,
    at_micros: i64,
}

/// A topic that is declared with another placement than the one in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    pub topic: Topic,
    pub in_force: Placement,
    pub declared: Placement,
}

impl std::fmt::Display for Moved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let say = |it: &Placement| {
            let spread = it.spread.map_or_else(|| "all".to_owned(), |spread| spread.to_string());
            format!("partitions {}, isolate_by {:?}, spread {spread}", it.partitions, it.isolate_by).to_lowercase()
        };
        write!(
            f,
            "topic {} has users placed by {}; declared is {}",
            self.topic,
            say(&self.in_force),
            say(&self.declared)
        )
    }
}

/// The topics whose placement would change, and those that have none in force yet.
///
/// # Errors
/// Where the log cannot be read, or what is there cannot be.
pub async fn look<B: Backend>(log: &B, topics: &Topics) -> Result<(Vec<Moved>, Vec<(Topic, Placement)>), LogError> {
    let found = commands::of_kind(log, KIND).await?;
    let (mut moved, mut new) = (Vec::new(), Vec::new());
    for topic in TOPICS {
        let Some(declared) = topics.get(&topic).map(|spec| spec.placement()) else { continue };
        let Some(control) = found.get(topic.as_str()) else {
            new.push((topic, declared));
            continue;
        };
        let unreadable = |error: String| LogError::fatal(format!("the placement of {topic} in control: {error}"));
        let control = control.as_ref().map_err(|error| unreadable(error.clone()))?;
        let Payload { placement: in_force, .. } =
            serde_json::from_slice(&control.payload).map_err(|error| unreadable(error.to_string()))?;
        if in_force != declared {
            moved.push(Moved { topic, in_force, declared });
        }
    }
    Ok((moved, new))
}

/// Puts the declared placement in force where that moves nobody whose deliveries wait. `break_order`: in any case.
///
/// # Errors
/// Which topic's users would move, and what can be done.
pub async fn settle<B: Backend>(log: &B, topics: &Topics, break_order: bool, now: Timestamp) -> anyhow::Result<()> {
    let (moved, mut new) = look(log, topics).await?;
    if !moved.is_empty() && !break_order {
        let waiting = waiting(log).await?;
        if waiting > 0 {
            let moved: Vec<String> = moved.iter().map(Moved::to_string).collect();
            bail!(
                "{}; {waiting} events and deliveries wait, and users would move past them: declare what was (topics.dir), let \
                 them drain first (`laneway lag`), or break the order (`laneway run --break-order`)",
                moved.join("; ")
            );
        }
    }
    for it in &moved {
        tracing::warn!("{it}; the declared one is in force from now on");
    }
    new.extend(moved.into_iter().map(|it| (it.topic, it.declared)));
    if new.is_empty() {
        return Ok(());
    }
    let record = |(topic, placement): (Topic, Placement)| {
        let payload = serde_json::to_vec(&Payload { placement, at_micros: now.micros() }).unwrap_or_default();
        let version = now.micros().max(0).unsigned_abs();
        commands::record(&Control {
            kind: KIND.into(),
            id: topic.as_str().to_owned(),
            version,
            payload: payload.into(),
        })
    };
    Ok(log.publisher()?.publish(new.into_iter().map(record).collect()).await?)
}

/// What is not done, of every stage.
async fn waiting<B: Backend>(log: &B) -> Result<u64, LogError> {
    let standing = standing::read(log).await?;
    let lags = lag::read(log, &[Stage::Processor, Stage::Router], &standing, None).await?;
    Ok(lags.iter().flat_map(|lag| lag.partitions.values()).map(lag::PartitionLag::work).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::log::Admin;
    use crate::log::embedded::Embedded;
    use crate::log::embedded::memory::Faults;
    use crate::model::record::{Addressed, Headers, Partition};

    fn declared(spread: Option<&str>) -> Topics {
        let folder = tempfile::tempdir().expect("a folder");
        let text = include_str!("../../topics/deliveries.yaml");
        let text = spread.map_or_else(|| text.to_owned(), |spread| format!("{text}\nspread: {spread}\n"));
        std::fs::write(folder.path().join("deliveries.yaml"), text).expect("written");
        Topics::load(Some(folder.path())).expect("topics")
    }

    #[tokio::test]
    async fn users_are_not_moved_past_what_waits() {
        let log = Embedded::in_memory(Faults::none(), Clock::system()).await.expect("a log");
        for spec in declared(None).iter() {
            log.admin().expect("an admin").create(spec).await.expect("created");
        }
        let settle = async |topics: &Topics, break_order| settle(&log, topics, break_order, Timestamp::default()).await;
        settle(&declared(None), false).await.expect("the first one is in force");
        settle(&declared(None), false).await.expect("the same");
        settle(&declared(Some("3")), false).await.expect("nothing waits");
        let event = Addressed {
            topic: Topic::DELIVERIES,
            partition: Partition(0),
            key: None,
            value: Some("x".into()),
            headers: Headers::new(),
        };
        log.publisher().expect("a publisher").publish(vec![event]).await.expect("published");
        let refused = settle(&declared(Some("4")), false).await.expect_err("one waits").to_string();
        assert!(
            refused.contains("isolate_by destination, spread 3; declared is") && refused.contains("1 events"),
            "{refused}"
        );
        settle(&declared(Some("3")), false).await.expect("the one in force");
        settle(&declared(Some("4")), true).await.expect("told to");
        assert_eq!(look(&log, &declared(Some("4"))).await.expect("readable"), (vec![], vec![]));
    }
}
