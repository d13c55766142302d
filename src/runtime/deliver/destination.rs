//! What all partitions of the process share about a destination: how many requests are under way, how many bytes wait, its
//! breaker, its limits. A destination may hold half of what is free at that moment, and one request is always kept for each:
//! one that only answers slowly cannot take the process.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::clock::Timestamp;
use crate::log::partitioner::Placement;
use crate::model::id::DestinationId;
use crate::model::record::Partition;
use crate::telemetry::events;
use crate::telemetry::metrics::metrics;

use super::backoff::RetryPolicy;
use super::breaker::Breaker;
use super::memory::DestinationUse;

/// Who was refused by a breaker or a pause looks again after this at the latest: another partition may have found out more.
const AGAIN: Duration = Duration::from_secs(1);

/// What a destination wants of us. Rules that change apply from the next request or failure on, except for `ordered`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// Deliveries of a user go out one after the other. It decides which key a record has, in memory and in progress, so it stays
    /// what it was when the process met the destination's first record.
    pub ordered: bool,
    /// So many deliveries of a user may share one request.
    pub batch: usize,
    /// Requests per second, and at a time, over the whole cluster.
    pub rate: Option<f64>,
    pub concurrency: Option<usize>,
    pub retry: RetryPolicy,
}

impl Default for Rules {
    fn default() -> Self {
        Self { ordered: true, batch: 1, rate: None, concurrency: None, retry: RetryPolicy::default() }
    }
}

/// The destinations of a process.
#[derive(Clone)]
pub struct Destinations(Arc<Shared>);

struct Shared {
    total: usize,
    per_destination: usize,
    /// How `deliveries` is partitioned: which partitions a destination's limits are shared over.
    placement: Placement,
    in_flight: AtomicUsize,
    known: Mutex<HashMap<DestinationId, Arc<Destination>>>,
    /// The partitions that are here, each with how many workers have it: a new one may begin before the last one has ended.
    owned: Mutex<BTreeMap<Partition, usize>>,
    freed: watch::Sender<u64>,
}

pub struct Destination {
    pub id: DestinationId,
    rules: Mutex<Rules>,
    /// [`Rules::ordered`] as it was when the first record got its key.
    ordered: OnceLock<bool>,
    /// The partitions its deliveries are spread over.
    shard: Vec<Partition>,
    in_flight: AtomicUsize,
    /// What its records and keys use in all partitions.
    pub memory: Arc<DestinationUse>,
    paused: AtomicBool,
    circuit: Mutex<Circuit>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Circuit {
    breaker: Breaker,
    /// Requests that the rate allows now, and as of when.
    tokens: Option<(f64, Timestamp)>,
}

/// Why a request may not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Too many are under way; [`Destinations::subscribe`] tells when that changes.
    Permits,
    /// Not before then.
    Until(Timestamp),
}

impl Destinations {
    pub fn new(total: usize, per_destination: usize, placement: Placement) -> Self {
        Self(Arc::new(Shared {
            total,
            per_destination,
            placement,
            in_flight: AtomicUsize::new(0),
            known: Mutex::default(),
            owned: Mutex::default(),
            freed: watch::Sender::new(0),
        }))
    }

    /// The destination of this id. `rules` are asked for where it is new, see [`Destinations::refresh`].
    pub fn get(&self, id: &DestinationId, rules: impl FnOnce(&DestinationId) -> Rules) -> Arc<Destination> {
        let mut known = lock(&self.0.known);
        if let Some(destination) = known.get(id) {
            return Arc::clone(destination);
        }
        let destination = Arc::new(Destination {
            id: id.clone(),
            rules: Mutex::new(rules(id)),
            ordered: OnceLock::new(),
            shard: self.0.placement.shard_of(id.as_str()),
            in_flight: AtomicUsize::new(0),
            memory: Arc::default(),
            paused: AtomicBool::new(false),
            circuit: Mutex::default(),
            shared: Arc::clone(&self.0),
        });
        known.insert(id.clone(), Arc::clone(&destination));
        destination
    }

    /// Asks for the rules of all destinations again, because the configuration has changed. One that is met meanwhile has its rules
    /// from before the change or after it, and in the first case gets them again here: both happen under one lock.
    pub fn refresh(&self, rules: impl Fn(&DestinationId) -> Rules) {
        let mut changed = false;
        for (id, destination) in lock(&self.0.known).iter() {
            changed |= destination.follow(rules(id));
        }
        if changed {
            self.0.freed.send_modify(|version| *version += 1);
        }
    }

    /// These are paused, and no others.
    pub fn pause(&self, paused: &HashSet<DestinationId>, rules: impl Fn(&DestinationId) -> Rules) {
        for id in paused {
            self.get(id, &rules);
        }
        for (id, destination) in lock(&self.0.known).iter() {
            let is_paused = paused.contains(id);
            if destination.paused.swap(is_paused, Ordering::Relaxed) != is_paused {
                metrics().paused.with_label_values(&[id.as_str()]).set(i64::from(is_paused));
            }
        }
        self.0.freed.send_modify(|version| *version += 1);
    }

    /// A partition is ours from now on, or no longer.
    pub fn own(&self, partition: Partition, is_ours: bool) {
        let mut owned = lock(&self.0.owned);
        let workers = owned.entry(partition).or_default();
        *workers = if is_ours { *workers + 1 } else { workers.saturating_sub(1) };
        if *workers == 0 {
            owned.remove(&partition);
        }
    }

    /// Tells when permits are given back, or a breaker or pause has changed.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.freed.subscribe()
    }
}

impl Destination {
    /// The rules in force, but for [`Destination::is_ordered`].
    pub fn rules(&self) -> Rules {
        *lock(&self.rules)
    }

    /// Whether deliveries of a user go out one after the other. The first call fixes it for the process: records that wait under
    /// one kind of key would not be found under the other.
    pub fn is_ordered(&self) -> bool {
        *self.ordered.get_or_init(|| self.rules().ordered)
    }

    /// Whether these rules are others than those in force until now.
    fn follow(&self, rules: Rules) -> bool {
        let before = std::mem::replace(&mut *lock(&self.rules), rules);
        if before == rules {
            return false;
        }
        tracing::info!(destination = %self.id, ?rules, "the rules of a destination have changed");
        if self.ordered.get().is_some_and(|ordered| *ordered != rules.ordered) {
            tracing::warn!(
                destination = %self.id,
                ordered = rules.ordered,
                "the rule `ordered` of a destination that has deliveries applies from the next start on"
            );
        }
        true
    }

    /// A permit for one request, if it may start now.
    ///
    /// # Errors
    /// [`Refused`] says what to wait for.
    pub fn try_start(self: &Arc<Self>, now: Timestamp) -> Result<Permit, Refused> {
        if self.paused.load(Ordering::Relaxed) {
            return Err(Refused::Until(now.plus(AGAIN)));
        }
        let rules = self.rules();
        let mut circuit = lock(&self.circuit);
        if let Some(until) = circuit.breaker.shut_until(now) {
            return Err(Refused::Until(until.min(now.plus(AGAIN))));
        }
        let (all, own) = (self.shared.in_flight.load(Ordering::Relaxed), self.in_flight.load(Ordering::Relaxed));
        let fair = (self.shared.total.saturating_sub(all) + own) / 2;
        let most = fair.min(self.shared.per_destination).min(self.concurrency(&rules)).min(circuit.breaker.limit());
        if own > 0 && own >= most {
            return Err(Refused::Permits);
        }
        if let Some(rate) = rules.rate {
            circuit.take(rate * self.share(), now)?;
        }
        let probe = circuit.breaker.start();
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let all = self.shared.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        metrics().router_in_flight.with_label_values::<&str>(&[]).set(all as i64);
        Ok(Permit { destination: Arc::clone(self), probe, reported: false })
    }

    /// Its limit, by how many of its partitions are here; at least one.
    fn concurrency(&self, rules: &Rules) -> usize {
        rules.concurrency.map_or(usize::MAX, |limit| ((limit as f64 * self.share()) as usize).max(1))
    }

    fn share(&self) -> f64 {
        let owned = lock(&self.shared.owned);
        let here = self.shard.iter().filter(|partition| owned.contains_key(partition)).count();
        here as f64 / self.shard.len().max(1) as f64
    }

    /// Not paused, and not believed to be down.
    pub fn can_run(&self) -> bool {
        !self.paused.load(Ordering::Relaxed) && self.open_since().is_none()
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    pub fn open_since(&self) -> Option<Timestamp> {
        lock(&self.circuit).breaker.open_since()
    }
}

impl Circuit {
    /// Takes one request out of a second's worth.
    fn take(&mut self, rate: f64, now: Timestamp) -> Result<(), Refused> {
        let burst = rate.max(1.0);
        let (tokens, at) = self.tokens.unwrap_or((burst, now));
        let tokens = (tokens + now.since(at).as_secs_f64() * rate).min(burst);
        if tokens < 1.0 {
            self.tokens = Some((tokens, now));
            // A rate of next to nothing is asked again now and then: its share may have grown.
            let wait = Duration::try_from_secs_f64((1.0 - tokens) / rate).unwrap_or(AGAIN).min(AGAIN);
            return Err(Refused::Until(now.plus(wait.max(Duration::from_millis(1)))));
        }
        self.tokens = Some((tokens - 1.0, now));
        Ok(())
    }

    /// Returns what [`Circuit::take`] took.
    fn give_back(&mut self) {
        if let Some((tokens, _)) = &mut self.tokens {
            *tokens += 1.0;
        }
    }
}

/// One request under way.
pub struct Permit {
    destination: Arc<Destination>,
    probe: bool,
    reported: bool,
}

impl Permit {
    /// The request is not made: neither the rate limit nor a probe is used up.
    pub fn give_back(self) {
        lock(&self.destination.circuit).give_back();
    }

    /// What came of the request; `not_before`: how long the destination wants to be left alone. True: the destination counts as
    /// down, and the try as not made.
    pub fn report(mut self, now: Timestamp, user: u64, failed: bool, not_before: Option<Duration>) -> bool {
        self.reported = true;
        let mut circuit = lock(&self.destination.circuit);
        let before = circuit.breaker.open_since();
        circuit.breaker.report(now, user, failed, self.probe, not_before);
        let after = circuit.breaker.open_since();
        drop(circuit);
        if before.is_some() != after.is_some() {
            events::breaker(self.destination.id.as_str(), after.is_some());
        }
        after.is_some() && (self.probe || before.is_some())
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.probe && !self.reported {
            lock(&self.destination.circuit).breaker.give_up_probe();
        }
        self.destination.in_flight.fetch_sub(1, Ordering::Relaxed);
        let shared = &self.destination.shared;
        let all = shared.in_flight.fetch_sub(1, Ordering::Relaxed) - 1;
        metrics().router_in_flight.with_label_values::<&str>(&[]).set(all as i64);
        shared.freed.send_modify(|version| *version += 1);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::partitioner::IsolateBy;

    const NOW: Timestamp = Timestamp::from_millis(0);

    fn destinations(total: usize, each: usize) -> Destinations {
        let placement = Placement { isolate_by: IsolateBy::Destination, spread: Some(4), partitions: 12 };
        Destinations::new(total, each, placement)
    }

    fn take(destination: &Arc<Destination>, now: Timestamp) -> Vec<Permit> {
        std::iter::from_fn(|| destination.try_start(now).ok()).take(1_000).collect()
    }

    #[test]
    fn a_slow_destination_takes_half_and_leaves_one_for_each() {
        let all = destinations(100, 1_000);
        let slow = all.get(&"slow".into(), |_| Rules::default());
        let taken = take(&slow, NOW);
        assert_eq!(taken.len(), 50);
        let others: Vec<Permit> = (0..200)
            .filter_map(|n| all.get(&format!("other-{n}").as_str().into(), |_| Rules::default()).try_start(NOW).ok())
            .collect();
        assert_eq!(others.len(), 200, "the first request of a destination always goes");
        drop(taken);
        drop(others);
        assert_eq!(take(&slow, NOW).len(), 50, "everything was given back");
    }

    #[test]
    fn a_destination_has_a_cap_of_its_own() {
        let one = destinations(10_000, 3).get(&"one".into(), |_| Rules::default());
        assert_eq!(take(&one, NOW).len(), 3);
    }

    #[test]
    fn limits_are_shared_by_the_partitions_that_are_here() {
        let all = destinations(10_000, 1_000);
        let rules = Rules { concurrency: Some(40), rate: Some(20.0), ..Rules::default() };
        let limited = all.get(&"limited".into(), |_| rules);
        assert_eq!(take(&limited, NOW).len(), 1, "none of its partitions is here: no more than one");
        for partition in limited.shard.iter().take(2) {
            all.own(*partition, true);
        }
        let later = NOW.plus(Duration::from_secs(10));
        assert_eq!(take(&limited, later).len(), 10, "half of a second's worth");
        let Err(Refused::Until(at)) = limited.try_start(later) else { panic!("the rate is used up") };
        assert_eq!(at.since(later).as_millis(), 100);
        let held: Vec<Permit> = (1..100).flat_map(|n| limited.try_start(later.plus(Duration::from_secs(n)))).collect();
        assert_eq!(held.len(), 20, "half of the concurrency");
        // Assigned again before the worker of the last assignment has ended.
        all.own(limited.shard[0], true);
        all.own(limited.shard[0], false);
        assert_eq!(limited.share(), 0.5);
    }

    #[test]
    fn rules_follow_the_configuration() {
        let all = destinations(10_000, 1_000);
        // Met before its type is known, as by a pause or a record that is ahead of the configuration.
        let one = all.get(&"one".into(), |_| Rules::default());
        all.own(one.shard[0], true);
        let later = |seconds: u64| NOW.plus(Duration::from_secs(seconds));
        assert_eq!(take(&one, NOW).len(), 1_000, "no limit of its own");
        let mut freed = all.subscribe();
        let limited = Rules { concurrency: Some(40), rate: Some(20.0), ordered: false, ..Rules::default() };
        all.refresh(|_| limited);
        assert!(freed.has_changed().expect("the destinations are there"), "who waits looks again");
        freed.mark_unchanged();
        assert_eq!(one.rules(), limited);
        assert_eq!(take(&one, later(1)).len(), 5, "a fourth of the rate");
        let held: Vec<Permit> = (2..100).flat_map(|n| one.try_start(later(n))).collect();
        assert_eq!(held.len(), 10, "a fourth of the concurrency");
        all.refresh(|_| Rules { concurrency: Some(8), ..limited });
        assert_eq!(
            one.try_start(later(200)).err(),
            Some(Refused::Permits),
            "more are under way than the new limit allows"
        );
        drop(held);
        assert!(one.try_start(later(200)).is_ok());
        freed.mark_unchanged();
        all.refresh(|_| Rules { concurrency: Some(8), ..limited });
        assert!(!freed.has_changed().expect("the destinations are there"), "nothing is new");
    }

    #[test]
    fn order_stays_as_it_was_for_the_first_record() {
        let all = destinations(100, 100);
        let unordered = Rules { ordered: false, ..Rules::default() };
        let (one, two) = (all.get(&"one".into(), |_| Rules::default()), all.get(&"two".into(), |_| Rules::default()));
        assert!(one.is_ordered(), "its first record gets its key");
        all.refresh(|_| unordered);
        assert_eq!((one.is_ordered(), two.is_ordered()), (true, false));
    }

    #[test]
    fn a_pause_and_an_open_breaker_let_nothing_start() {
        let all = destinations(100, 100);
        let one = all.get(&"one".into(), |_| Rules::default());
        all.pause(&HashSet::from(["one".into()]), |_| Rules::default());
        assert!(matches!(one.try_start(NOW), Err(Refused::Until(_))) && !one.can_run());
        all.pause(&HashSet::new(), |_| Rules::default());
        let report = |permit: Permit, user, failed| permit.report(NOW, user, failed, None);
        let lost: Vec<Permit> = take(&one, NOW);
        let counted: Vec<bool> = lost.into_iter().zip(0..).map(|(permit, user)| report(permit, user, true)).collect();
        assert_eq!(counted.iter().position(|spent_nothing| *spent_nothing), Some(20), "those behind are not spent");
        assert!(one.try_start(NOW).is_err() && !one.can_run());
        let later = NOW.plus(Duration::from_secs(2));
        let probe = one.try_start(later).expect("a probe");
        assert!(one.try_start(later).is_err(), "one at a time");
        drop(probe);
        let probe = one.try_start(later).expect("the last one ended without a result");
        assert!(!probe.report(later, 1, false, None));
        assert!(one.can_run() && one.try_start(later).is_ok());
    }
}
