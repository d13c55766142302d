//! How many events a source and a workspace may bring: GCRA, by this process, off unless configured.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use crate::control::workspace::Source;

use super::request::Refusal;

/// Events in a window, which may also come all at once. 0: as many as come.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    pub window: Duration,
    pub source: u32,
    pub workspace: u32,
    /// For one source or workspace, by its id.
    pub own: BTreeMap<String, u32>,
}

pub struct RateLimits {
    limits: Limits,
    clock: DefaultClock,
    /// By id; made when it first brings something. As many as are configured, since a source is known before it is asked for.
    limiters: Mutex<HashMap<String, Option<Arc<DefaultDirectRateLimiter>>>>,
}

impl RateLimits {
    pub fn new(limits: Limits) -> Self {
        Self { limits, clock: DefaultClock::default(), limiters: Mutex::default() }
    }

    /// Takes so many events of a source into account.
    ///
    /// # Errors
    /// [`Refusal::RateLimited`], with how long to wait.
    pub fn admit(&self, source: &Source, events: usize) -> Result<(), Refusal> {
        self.of(source.id.as_str(), self.limits.source, events)?;
        self.of(source.workspace.as_str(), self.limits.workspace, events)
    }

    fn of(&self, id: &str, default: u32, events: usize) -> Result<(), Refusal> {
        let per_window = self.limits.own.get(id).copied().unwrap_or(default);
        if per_window == 0 {
            return Ok(());
        }
        let Some(limiter) = self.limiter(id, per_window) else { return Ok(()) };
        // A batch larger than the window's events could never pass: it takes the whole window.
        let cost = u32::try_from(events).unwrap_or(u32::MAX).clamp(1, per_window);
        let cost = NonZeroU32::new(cost).unwrap_or(NonZeroU32::MIN);
        match limiter.check_n(cost) {
            Ok(Ok(())) | Err(_) => Ok(()),
            Ok(Err(until)) => {
                let wait = until.wait_time_from(self.clock.now()).as_secs_f64().ceil().max(1.0);
                Err(Refusal::RateLimited { wait: wait as u32 })
            }
        }
    }

    fn limiter(&self, id: &str, per_window: u32) -> Option<Arc<DefaultDirectRateLimiter>> {
        let mut limiters = self.limiters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = limiters.get(id) {
            return known.clone();
        }
        let burst = NonZeroU32::new(per_window)?;
        let quota = Quota::with_period(self.limits.window / per_window).map(|quota| quota.allow_burst(burst));
        let made = quota.map(|quota| Arc::new(RateLimiter::direct(quota)));
        limiters.insert(id.to_owned(), made.clone());
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::workspace::Workspace;

    #[test]
    fn sources_and_workspaces_have_their_limits() {
        let text = r#"{"workspaceId":"w","sources":[{"id":"a","writeKey":"a"},{"id":"b","writeKey":"b"},{"id":"c","writeKey":"c"}]}"#;
        let workspace = Workspace::parse(text).expect("valid");
        let source = |key: &str| Arc::clone(workspace.by_write_key(key).expect("there"));
        let own = BTreeMap::from([("b".to_owned(), 0), ("w".to_owned(), 250)]);
        let limits = RateLimits::new(Limits { window: Duration::from_secs(3_600), source: 100, workspace: 1_000, own });
        assert_eq!(limits.admit(&source("a"), 60), Ok(()));
        let refused = limits.admit(&source("a"), 60);
        assert!(matches!(refused, Err(Refusal::RateLimited { wait }) if (700..=800).contains(&wait)), "{refused:?}");
        assert_eq!(limits.admit(&source("a"), 40), Ok(()));
        assert_eq!(limits.admit(&source("b"), 120), Ok(()), "a source with no limit of its own has the workspace's");
        assert!(limits.admit(&source("b"), 40).is_err(), "the workspace's 250 are used up");
        let unlimited = RateLimits::new(Limits::default());
        assert_eq!(unlimited.admit(&source("a"), 1_000_000), Ok(()));
        let small = RateLimits::new(Limits { window: Duration::from_secs(60), source: 10, ..Limits::default() });
        assert_eq!(small.admit(&source("c"), 500), Ok(()), "a batch larger than the window passes alone");
        assert!(small.admit(&source("c"), 1).is_err());
    }
}
