//! When a destination counts as down: one breaker per destination and process.
//!
//! It opens on the share of failures over enough tries, of enough different users: one poisonous user does not close a
//! destination for the others. While it is open nothing is started but one probe at a time. After a probe that goes through it is
//! half-open: the destination may have 1, then 2, 4, … requests in flight, doubling with each success. Where most of these fail it
//! opens again, and waits for longer than before.

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::Timestamp;

/// Tries are counted over six of these.
const BUCKET: Duration = Duration::from_secs(5);
const BUCKETS: usize = 6;
const TRIES: u32 = 20;
const USERS: usize = 5;
const PROBE_FIRST: Duration = Duration::from_secs(1);
const PROBE_CAP: Duration = Duration::from_secs(60);
/// Half-open ends when this many requests may be in flight: more than a destination gets at once.
const MAX_RAMP_REQUESTS: usize = 1_024;

#[derive(Debug, Default)]
pub struct Breaker {
    buckets: VecDeque<Bucket>,
    open: Option<Open>,
    half_open: Option<HalfOpen>,
}

/// The destination answers again after it was down.
#[derive(Debug)]
struct HalfOpen {
    /// Requests that may be in flight.
    limit: usize,
    successes: u32,
    failures: u32,
    /// Between the last two probes.
    wait: Duration,
}

#[derive(Debug)]
struct Bucket {
    began: Timestamp,
    tries: u32,
    failures: u32,
    /// Of users whose tries failed; more than are needed are not kept.
    users: Vec<u64>,
}

#[derive(Debug)]
struct Open {
    since: Timestamp,
    next_probe_at: Timestamp,
    wait: Duration,
    probing: bool,
}

impl Breaker {
    pub fn open_since(&self) -> Option<Timestamp> {
        self.open.as_ref().map(|open| open.since)
    }

    /// Until when nothing may start; none where a request may: any while it is closed, a probe while it is open.
    pub fn shut_until(&self, now: Timestamp) -> Option<Timestamp> {
        let open = self.open.as_ref()?;
        match open.probing {
            // Its result is told when it is there.
            true => Some(now.plus(PROBE_FIRST)),
            false => (open.next_probe_at > now).then_some(open.next_probe_at),
        }
    }

    /// A request starts that [`Breaker::shut_until`] allowed. True: it is a probe.
    pub fn start(&mut self) -> bool {
        match &mut self.open {
            Some(open) => {
                open.probing = true;
                true
            }
            None => false,
        }
    }

    /// Requests that may be in flight: few while the destination has just come back.
    pub fn limit(&self) -> usize {
        self.half_open.as_ref().map_or(usize::MAX, |half_open| half_open.limit)
    }

    /// A probe ended without a result.
    pub fn give_up_probe(&mut self) {
        if let Some(open) = &mut self.open {
            open.probing = false;
        }
    }

    /// What came of a try by `user` (a hash). What was started before it opened says nothing while it is open. `not_before`: how
    /// long the destination wants to be left alone; probes respect it too.
    pub fn report(&mut self, now: Timestamp, user: u64, failed: bool, probe: bool, not_before: Option<Duration>) {
        match &mut self.open {
            Some(open) if probe && failed => {
                open.probing = false;
                open.wait = (open.wait * 2).min(PROBE_CAP);
                open.next_probe_at = now.plus(open.wait);
            }
            Some(open) if probe => {
                let wait = open.wait;
                (self.open, self.half_open) = (None, Some(HalfOpen { limit: 1, successes: 1, failures: 0, wait }));
                self.buckets.clear();
            }
            Some(_) => {}
            None => match &mut self.half_open {
                Some(half_open) => {
                    half_open.successes += u32::from(!failed);
                    half_open.failures += u32::from(failed);
                    // One failure alone may be one user's.
                    let (is_up, wait) = (half_open.failures * 2 <= half_open.successes + 1, half_open.wait);
                    half_open.limit *= if failed { 1 } else { 2 };
                    if !is_up {
                        self.open(now, (wait * 2).min(PROBE_CAP));
                    } else if half_open.limit > MAX_RAMP_REQUESTS {
                        self.half_open = None;
                    }
                }
                None => self.count(now, user, failed),
            },
        }
        if let Some(open) = self.open.as_mut().filter(|_| failed) {
            open.next_probe_at = open.next_probe_at.max(now.plus(not_before.unwrap_or_default()));
        }
    }

    fn open(&mut self, now: Timestamp, wait: Duration) {
        self.half_open = None;
        self.open = Some(Open { since: now, next_probe_at: now.plus(wait), wait, probing: false });
    }

    fn count(&mut self, now: Timestamp, user: u64, failed: bool) {
        if self.buckets.back().is_none_or(|bucket| now.since(bucket.began) >= BUCKET) {
            self.buckets.push_back(Bucket { began: now, tries: 0, failures: 0, users: Vec::new() });
        }
        let horizon = BUCKET * BUCKETS as u32;
        while self.buckets.front().is_some_and(|bucket| now.since(bucket.began) >= horizon) {
            self.buckets.pop_front();
        }
        if let Some(bucket) = self.buckets.back_mut() {
            bucket.tries += 1;
            bucket.failures += u32::from(failed);
            if failed && bucket.users.len() < USERS && !bucket.users.contains(&user) {
                bucket.users.push(user);
            }
        }
        if failed && self.is_down() {
            self.open(now, PROBE_FIRST);
        }
    }

    fn is_down(&self) -> bool {
        let tries: u32 = self.buckets.iter().map(|bucket| bucket.tries).sum();
        let failures: u32 = self.buckets.iter().map(|bucket| bucket.failures).sum();
        if tries < TRIES || failures * 2 < tries {
            return false;
        }
        let mut users: Vec<u64> = self.buckets.iter().flat_map(|bucket| bucket.users.iter().copied()).collect();
        users.sort_unstable();
        users.dedup();
        users.len() >= USERS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn down() -> Breaker {
        let mut breaker = Breaker::default();
        for user in 0..20 {
            breaker.report(at(0), user, true, false, None);
        }
        breaker
    }

    #[test]
    fn it_opens_on_half_of_twenty_tries_of_five_users() {
        let opens = |tries: u64, users: u64, every: u64| {
            let mut breaker = Breaker::default();
            (0..tries).for_each(|n| breaker.report(at(n as i64), n % users, n % every == 0, false, None));
            breaker.open_since().is_some()
        };
        assert!(opens(20, 20, 1));
        assert!(!opens(19, 19, 1), "too few tries");
        assert!(!opens(500, 4, 1), "too few users");
        assert!(!opens(500, 97, 3), "a third fails");
        assert!(opens(500, 97, 2), "half fails");
    }

    #[test]
    fn old_tries_do_not_count() {
        let mut breaker = Breaker::default();
        for n in 0..200 {
            breaker.report(at(n * 2_000), n as u64, true, false, None);
        }
        assert_eq!(breaker.open_since(), None, "never twenty in thirty seconds");
    }

    #[test]
    fn one_probe_at_a_time_later_and_later_until_one_goes_through() {
        let mut breaker = down();
        assert_eq!(breaker.shut_until(at(1)), Some(at(1_000)));
        let (mut now, mut waits) = (at(1_000), Vec::new());
        for _ in 0..8 {
            assert_eq!(breaker.shut_until(now), None);
            assert!(breaker.start());
            assert!(breaker.shut_until(now).is_some(), "one is under way");
            breaker.report(now, 1, false, false, None);
            assert!(breaker.open_since().is_some(), "what was started before proves nothing");
            breaker.report(now, 1, true, true, None);
            let until = breaker.shut_until(now).expect("shut");
            waits.push(until.since(now).as_secs());
            now = until;
        }
        assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60, 60]);
        assert!(breaker.start());
        breaker.report(now, 1, false, true, None);
        assert_eq!((breaker.open_since(), breaker.shut_until(now)), (None, None));
    }
    #[test]
    fn it_opens_slowly_after_a_probe_and_waits_for_longer_where_most_fail_again() {
        let mut breaker = down();
        assert!(breaker.start());
        breaker.report(at(1_000), 1, true, true, None);
        assert!(breaker.start());
        breaker.report(at(3_000), 1, false, true, None);
        let mut limits = Vec::new();
        for _ in 0..3 {
            limits.push(breaker.limit());
            breaker.report(at(3_100), 1, false, false, None);
        }
        assert_eq!(limits, [1, 2, 4]);
        breaker.report(at(3_200), 2, true, false, None);
        breaker.report(at(3_200), 3, true, false, None);
        assert_eq!(breaker.open_since(), None, "a third fails");
        breaker.report(at(3_300), 4, true, false, None);
        assert_eq!(breaker.shut_until(at(3_300)), Some(at(7_300)), "4 s after the 2 s of before");
        for _ in 0..2 {
            assert!(breaker.start());
            breaker.report(at(9_000), 1, false, true, None);
            (0..12).for_each(|_| breaker.report(at(9_000), 1, false, false, None));
            assert_eq!((breaker.limit(), breaker.open_since()), (usize::MAX, None), "it is closed");
            (0..20).for_each(|user| breaker.report(at(9_000), user, true, false, None));
        }
    }

    #[test]
    fn a_destination_that_wants_to_be_left_alone_is_not_probed_before() {
        let mut breaker = down();
        breaker.report(at(10), 1, true, false, Some(Duration::from_secs(600)));
        assert_eq!(breaker.shut_until(at(50_000)), Some(at(600_010)), "what was in flight says so too");
        assert!(breaker.start());
        breaker.report(at(600_010), 1, true, true, Some(Duration::from_secs(3_600)));
        assert_eq!(breaker.shut_until(at(700_000)), Some(at(4_200_010)));
    }
}
