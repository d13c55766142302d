//! How stages and times are named on the command line.

use std::time::Duration;

use clap::ValueEnum;

use super::Usage;
use crate::app::engine::Stage;
use crate::app::job_status::{self, Stored, StoredError};
use crate::app::open;
use crate::clock::Timestamp;
use crate::config::Config;
use crate::log::Backend;

/// The stages that read a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Consumer {
    Processor,
    Router,
    Reporter,
}

impl Consumer {
    /// All of them where none is named.
    pub fn meant(named: &[Consumer]) -> Vec<Stage> {
        let meant = if named.is_empty() { Self::value_variants() } else { named };
        meant.iter().map(|consumer| (*consumer).into()).collect()
    }
}

impl From<Consumer> for Stage {
    fn from(consumer: Consumer) -> Self {
        match consumer {
            Consumer::Processor => Stage::Processor,
            Consumer::Router => Stage::Router,
            Consumer::Reporter => Stage::Reporter,
        }
    }
}

/// The reporter's positions in the store. None where the store is a file that is not on this machine, or does not answer; that is
/// written to stderr, and the log's own positions count then.
pub async fn stored_positions<B: Backend>(log: &B, config: &Config) -> anyhow::Result<Option<Stored>> {
    if open::store_file(&open::store_url(config)).is_some_and(|file| !file.exists()) {
        return Ok(None);
    }
    match job_status::stored(log, &open::job_status(config)?).await {
        Ok(stored) => Ok(Some(stored)),
        Err(StoredError::Store(error)) => {
            eprintln!(
                "laneway: the reporter's positions cannot be read from the store, those that it told the log are shown: {error}"
            );
            Ok(None)
        }
        Err(StoredError::Log(error)) => Err(error.into()),
    }
}

/// A time, or how long ago.
///
/// # Errors
/// [`Usage`] where it is neither.
pub fn when(text: &str, now: Timestamp) -> anyhow::Result<Timestamp> {
    let ago = text.parse::<jiff::SignedDuration>().ok().and_then(|span| Duration::try_from(span).ok());
    let days =
        || text.strip_suffix('d')?.parse().ok().map(|days: u64| Duration::from_secs(days.saturating_mul(86_400)));
    let at = ago.or_else(days).map(|ago| now.minus(ago)).or_else(|| Timestamp::parse(text));
    at.ok_or_else(|| Usage(format!("{text:?} is neither a duration (2h, 3d) nor a time (2026-01-31T10:00:00Z)")).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_given_as_such_or_as_ages() {
        let now = Timestamp::from_millis(864_000_000);
        let at = |text: &str| when(text, now).map(Timestamp::millis).ok();
        assert_eq!(at("1s"), Some(863_999_000));
        assert_eq!(at("2h"), Some(864_000_000 - 7_200_000));
        assert_eq!(at("3d"), Some(864_000_000 - 3 * 86_400_000));
        assert_eq!(at("1970-01-02T00:00:00Z"), Some(86_400_000));
        for text in ["", "soon", "d", "-1x", "2026-13-01"] {
            assert_eq!(at(text), None, "{text}");
        }
    }
}
