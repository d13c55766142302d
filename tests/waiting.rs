//! Waiting for a condition: what tests and benchmarks do instead of waiting for a while.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;

/// Looks until the condition holds; fails with `what` after the deadline.
pub async fn eventually<F, Fut>(what: &str, deadline: Duration, condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    assert!(holds_within(deadline, condition).await, "did not happen within {deadline:?}: {what}");
}

/// Looks until the condition holds; false after the deadline.
pub async fn holds_within<F, Fut>(deadline: Duration, mut condition: F) -> bool
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let until = Instant::now() + deadline;
    // What processes do is seen from outside only, by looking again.
    let mut looks = tokio::time::interval(Duration::from_millis(10));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        if condition().await {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
    }
}
