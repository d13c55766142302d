//! When a failed delivery is tried again, and when it is given up.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::SmallRng;

/// The retry rules of a destination. Defaults: 1 s doubling to 300 s with full jitter; given up after 3 h and at least 3
/// attempts; reverse-ETL deliveries after 1 min.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryPolicy {
    pub first: Duration,
    pub cap: Duration,
    /// From the delivery's own first failed attempt. Only time in which it could be tried counts.
    pub window: Duration,
    pub job_run_window: Duration,
    pub min_attempts: u32,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            first: Duration::from_secs(1),
            cap: Duration::from_secs(300),
            window: Duration::from_secs(3 * 3_600),
            job_run_window: Duration::from_secs(60),
            min_attempts: 3,
        }
    }
}

impl RetryPolicy {
    /// The wait before the next attempt: anything up to the doubled step (full jitter, so that many users who failed together
    /// do not come back together), never before what the destination asked for.
    pub fn wait(&self, attempts: u32, not_before: Option<Duration>, random: &mut SmallRng) -> Duration {
        let step = self.first.saturating_mul(1 << attempts.saturating_sub(1).min(20)).min(self.cap);
        let jittered = step.mul_f64(random.random_range(0.0..1.0));
        jittered.max(not_before.unwrap_or_default())
    }

    /// `spent`: how long it has been tried.
    pub fn is_exhausted(&self, attempts: u32, spent: Duration, is_job_run: bool) -> bool {
        let window = if is_job_run { self.job_run_window } else { self.window };
        attempts >= self.min_attempts && spent > window
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_respect_the_destination() {
        let policy = RetryPolicy::default();
        let mut random = SmallRng::seed_from_u64(1);
        let mut wait = |attempts, not_before| policy.wait(attempts, not_before, &mut random);
        for (attempts, most) in [(1, 1), (2, 2), (5, 16), (9, 256), (10, 300), (4_000_000, 300)] {
            for _ in 0..50 {
                assert!(wait(attempts, None) <= Duration::from_secs(most));
            }
        }
        assert!(wait(1, Some(Duration::from_secs(40))) >= Duration::from_secs(40));
        let spread = (0..200).map(|_| wait(20, None).as_secs()).collect::<std::collections::BTreeSet<_>>();
        assert!(spread.len() > 50, "full jitter spreads: {spread:?}");
    }

    #[test]
    fn both_the_window_and_the_attempts_must_be_used_up() {
        let policy = RetryPolicy::default();
        let after = Duration::from_secs;
        assert!(!policy.is_exhausted(2, after(99_999), false));
        assert!(!policy.is_exhausted(40, after(10_800), false));
        assert!(policy.is_exhausted(3, after(10_801), false));
        assert!(policy.is_exhausted(3, after(61), true));
    }
}
