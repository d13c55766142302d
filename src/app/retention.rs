//! How long the log keeps deliveries, and whether that is as long as they may wait.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::config::Router;
use crate::log::topic::Topics;
use crate::log::{Admin, Backend, TopicConfig};
use crate::model::record::Topic;

/// Refuses a topic from which the log would delete what is still to be delivered: one that is bounded by bytes, or kept for less
/// than deliveries are tried. Tells for how long it keeps them; none: for ever, or for as long as the log itself decides.
///
/// # Errors
/// What is wrong with `deliveries`, and what helps; or the log cannot be asked.
pub async fn check<B: Backend>(log: &B, topics: &Topics, router: &Router) -> anyhow::Result<Option<Duration>> {
    let admin = log.admin()?;
    let found = admin.topics().await.context("the log cannot be asked for its topics")?;
    let config = match found.into_iter().find(|info| info.topic == Topic::DELIVERIES) {
        Some(info) => {
            let TopicConfig { own, defaults } = admin.topic_config(&info.topic).await?;
            let mut all = defaults;
            all.extend(own);
            all
        }
        None => topics
            .iter()
            .find(|spec| spec.topic() == Topic::DELIVERIES)
            .map_or_else(BTreeMap::new, |it| it.config.clone()),
    };
    let windows = router.destinations.values().filter_map(|own| own.retry_window);
    let longest = windows.chain([router.retry_window]).max().unwrap_or_default();
    match problem(&config, longest) {
        Some(problem) => bail!("topic {}: {problem}", Topic::DELIVERIES),
        None => Ok(kept(&config)),
    }
}

fn kept(config: &BTreeMap<String, String>) -> Option<Duration> {
    let millis = config.get("retention.ms")?.parse::<i64>().ok()?;
    Some(Duration::from_millis(u64::try_from(millis).ok()?))
}

fn problem(config: &BTreeMap<String, String>, longest: Duration) -> Option<String> {
    let number = |name: &str| config.get(name).and_then(|text| text.parse::<i64>().ok());
    // -1 is no bound.
    if let Some(bytes) = number("retention.bytes").filter(|bytes| *bytes >= 0) {
        return Some(format!(
            "retention.bytes is {bytes}: the log would delete deliveries that wait; take it away and bound the time \
             (retention.ms) instead"
        ));
    }
    let kept = kept(config)?;
    (kept < longest).then(|| {
        format!(
            "retention.ms keeps {kept:?}, but deliveries are tried for {longest:?} (router.retry_window, or a destination's): \
             raise it, by far, or try for less long"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_lose_deliveries_is_refused() {
        let config = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            problem(&pairs.collect(), Duration::from_secs(3 * 3_600))
        };
        assert_eq!(config(&[("retention.ms", "604800000")]), None);
        assert_eq!(config(&[("retention.ms", "-1"), ("retention.bytes", "-1")]), None, "kept for ever");
        assert_eq!(config(&[]), None, "the log's own default");
        assert!(
            config(&[("retention.bytes", "1000000")]).is_some_and(|text| text.contains("retention.bytes is 1000000"))
        );
        assert!(config(&[("retention.ms", "60000")]).is_some_and(|text| text.contains("keeps 60s")));
    }
}
