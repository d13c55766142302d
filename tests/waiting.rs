//! Waiting for a condition: what tests and benchmarks do instead of waiting for a while.

use std::future::Future;
use std::time::{Duration, Instant};

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
    while !condition().await {
        if Instant::now() >= until {
            return false;
        }
        // The one place that looks again after a while: what processes do is seen from outside only.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    true
}
