//! Waiting for a condition: what tests and benchmarks do instead of waiting for a while.

use std::future::Future;
use std::time::{Duration, Instant};

/// Looks until the condition holds; fails with `what` after the deadline.
pub async fn eventually<F, Fut>(what: &str, deadline: Duration, mut condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let until = Instant::now() + deadline;
    while !condition().await {
        assert!(Instant::now() < until, "did not happen within {deadline:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
