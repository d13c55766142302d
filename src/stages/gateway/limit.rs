//! How many events a source and a workspace may bring: GCRA, by this process, off unless configured.
//!
//! Both limits are looked at before either is charged, so that a source whose workspace is over its limit does not lose its own quota. No limiter
//! crate charges two at once, hence the ten lines of GCRA here.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::clock::Clock;
use crate::control::workspace::Source;

use super::request::Refusal;

/// Events in a window, which may also come all at once. 0: no limit.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    pub window: Duration,
    pub source: u32,
    pub workspace: u32,
    /// For one source or workspace, by its id.
    pub own: BTreeMap<String, u32>,
}

/// What a limit is about: a workspace and a source may have the same id.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Source,
    Workspace,
}

pub struct RateLimits {
    limits: Limits,
    clock: Clock,
    /// When the events that were taken so far would have come at the limit's pace. As many as sources are configured, since a source is
    /// known before it is asked for.
    due: Mutex<HashMap<(Kind, String), Instant>>,
}

impl RateLimits {
    pub fn new(limits: Limits, clock: Clock) -> Self {
        Self { limits, clock, due: Mutex::default() }
    }

    /// Counts events of a source, for it and for its workspace.
    ///
    /// # Errors
    /// [`Refusal::RateLimited`], with how long to wait; nothing is counted then.
    pub fn admit(&self, source: &Source, events: usize) -> Result<(), Refusal> {
        self.count(source, events, true)
    }

    /// Counts events that are taken in any case: later ones wait for them.
    pub fn charge(&self, source: &Source, events: usize) {
        if events > 0 {
            let _ = self.count(source, events, false);
        }
    }

    fn count(&self, source: &Source, events: usize, may_refuse: bool) -> Result<(), Refusal> {
        let of = |kind, id: &str, default: u32| {
            let per_window = self.limits.own.get(id).copied().unwrap_or(default);
            (per_window > 0).then(|| ((kind, id.to_owned()), per_window))
        };
        let (own, all) = (self.limits.source, self.limits.workspace);
        let limits = [of(Kind::Source, source.id.as_str(), own), of(Kind::Workspace, source.workspace.as_str(), all)];
        if limits.iter().all(Option::is_none) {
            return Ok(());
        }
        let now = self.clock.instant();
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let mut charges = Vec::with_capacity(limits.len());
        for (key, per_window) in limits.into_iter().flatten() {
            // A batch larger than the window's events could never pass: it takes the whole window.
            let cost = u32::try_from(events).unwrap_or(u32::MAX).clamp(1, per_window);
            let until = due.get(&key).copied().unwrap_or(now).max(now)
                + self.limits.window.mul_f64(f64::from(cost) / f64::from(per_window));
            let wait = until.saturating_duration_since(now).saturating_sub(self.limits.window);
            // Rounding must not refuse what fits exactly.
            if may_refuse && wait > Duration::from_micros(1) {
                return Err(Refusal::RateLimited { wait: wait.as_secs_f64().ceil().max(1.0) as u32 });
            }
            charges.push((key, until));
        }
        due.extend(charges);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::control::workspace::Workspace;

    #[test]
    fn sources_and_workspaces_have_their_limits() {
        let text = r#"{"workspaceId":"w","sources":[{"id":"a","writeKey":"a"},{"id":"b","writeKey":"b"},{"id":"c","writeKey":"c"}]}"#;
        let workspace = Workspace::parse(text).expect("valid");
        let source = |key: &str| Arc::clone(workspace.by_write_key(key).expect("there"));
        let own = BTreeMap::from([("b".to_owned(), 0), ("w".to_owned(), 250)]);
        let limits = RateLimits::new(
            Limits { window: Duration::from_secs(3_600), source: 100, workspace: 1_000, own },
            Clock::system(),
        );
        assert_eq!(limits.admit(&source("a"), 60), Ok(()));
        let refused = limits.admit(&source("a"), 60);
        assert!(matches!(refused, Err(Refusal::RateLimited { wait }) if (700..=800).contains(&wait)), "{refused:?}");
        assert_eq!(limits.admit(&source("a"), 40), Ok(()));
        assert_eq!(limits.admit(&source("b"), 120), Ok(()), "a source with no limit of its own has the workspace's");
        assert!(limits.admit(&source("b"), 40).is_err(), "the workspace's 250 are used up");
        let unlimited = RateLimits::new(Limits::default(), Clock::system());
        assert_eq!(unlimited.admit(&source("a"), 1_000_000), Ok(()));
        let small = RateLimits::new(
            Limits { window: Duration::from_secs(60), source: 10, ..Limits::default() },
            Clock::system(),
        );
        assert_eq!(small.admit(&source("c"), 500), Ok(()), "a batch larger than the window passes alone");
        assert!(small.admit(&source("c"), 1).is_err());
    }

    #[test]
    fn a_source_and_a_workspace_of_one_id_are_two_and_a_refusal_costs_nothing() {
        let text = r#"{"workspaceId":"x","sources":[{"id":"x","writeKey":"x"},{"id":"y","writeKey":"y"}]}"#;
        let workspace = Workspace::parse(text).expect("valid");
        let source = |key: &str| Arc::clone(workspace.by_write_key(key).expect("there"));
        let hour = Duration::from_secs(3_600);
        let limits = Limits { window: hour, source: 100, workspace: 1_000, ..Limits::default() };
        let limits = RateLimits::new(limits, Clock::system());
        assert_eq!(limits.admit(&source("x"), 100), Ok(()));
        assert_eq!(limits.admit(&source("y"), 100), Ok(()), "the workspace has 900 left");
        let small = Limits { window: hour, source: 100, workspace: 50, ..Limits::default() };
        let small = RateLimits::new(small, Clock::system());
        assert_eq!(small.admit(&source("x"), 50), Ok(()));
        for _ in 0..10 {
            assert!(small.admit(&source("y"), 20).is_err(), "the workspace refuses");
        }
        let charged = RateLimits::new(Limits { window: hour, source: 10, ..Limits::default() }, Clock::system());
        charged.charge(&source("y"), 10);
        assert!(charged.admit(&source("y"), 1).is_err(), "what is taken in any case counts");
        assert!(small.due.lock().unwrap().keys().all(|(_, id)| id == "x"), "y has lost nothing");
    }
}
