//! For how long an owner may believe that it still is one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Clock;

/// Renewed by every commit that the log has taken: it refuses those of an owner that was replaced. An owner that is cut off,
/// or was frozen, stops starting requests by itself before its successor begins, since it can renew no more.
#[derive(Debug)]
pub struct Lease {
    clock: Clock,
    /// In microseconds of [`Clock::uptime`]; 0 before the first.
    renewed: AtomicU64,
    limit: Duration,
}

impl Lease {
    /// A lease of a member with this session time-out. It lasts a third of that.
    pub fn new(clock: Clock, session_timeout: Duration) -> Self {
        Self { clock, renewed: AtomicU64::new(0), limit: session_timeout / 3 }
    }

    pub fn now(&self) -> Duration {
        self.clock.uptime()
    }

    /// A commit that began at `began` has succeeded.
    pub fn renew(&self, began: Duration) {
        self.renewed.fetch_max(u64::try_from(began.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Whether who became an owner at `since` may start something now.
    pub fn holds(&self, since: Duration) -> bool {
        let renewed = Duration::from_micros(self.renewed.load(Ordering::Relaxed));
        renewed > since && self.now().saturating_sub(renewed) < self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;

    #[tokio::test(start_paused = true)]
    async fn it_holds_a_third_of_the_session_after_a_commit_by_this_owner() {
        let clock = Clock::derived(Timestamp::default());
        let lease = Lease::new(clock.clone(), Duration::from_secs(6));
        let since = lease.now();
        assert!(!lease.holds(since), "nothing is proved yet");
        clock.sleep(Duration::from_millis(10)).await;
        lease.renew(lease.now());
        assert!(lease.holds(since));
        assert!(!lease.holds(lease.now()), "who became an owner after that commit has to prove it anew");
        clock.sleep(Duration::from_millis(2_001)).await;
        assert!(!lease.holds(since));
    }
}
