//! What the destinations see, and what must hold of it.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use laneway::clock::{Clock, Timestamp};
use laneway::delivery::verdict::Verdict;
use laneway::model::id::DestinationId;
use laneway::model::outcome::Reason;
use laneway::model::record::{Offset, Partition, Record, header};
use laneway::runtime::deliver::{Deliver, RetryPolicy, Rules};

use crate::plan::{Manner, Plan};

/// Where a delivery lies.
pub type At = (Partition, Offset);
/// A destination's index and a user.
pub type KeyName = (usize, String);

/// The client's time-out of a destination that hangs.
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Default)]
pub struct Seen {
    /// The deliveries of each key, in the order of the log.
    pub keys: BTreeMap<KeyName, Vec<At>>,
    pub published: BTreeMap<At, Timestamp>,
    /// What the log has once more, and when it was written; the deliveries that it has, by their ids.
    pub copies: BTreeMap<At, Timestamp>,
    pub ids: BTreeMap<(Partition, String), At>,
    /// Of the published values.
    pub bytes: u64,
    pub first_sent: BTreeMap<At, Timestamp>,
    /// Final verdicts, with their times.
    pub finals: BTreeMap<At, Vec<Timestamp>>,
    /// Ended by the engine: dead letters, drains.
    pub ended: BTreeSet<At>,
    /// When the engine was hurt: what was in doubt then may be repeated.
    pub hurt: Vec<Timestamp>,
    pub drained: bool,
    pub violations: Vec<String>,
    /// Of everything that was sent, and when.
    pub digest: DefaultHasher,
}

/// Everything outside the engine.
pub struct World {
    pub plan: Plan,
    pub clock: Clock,
    pub start: Timestamp,
    /// Bytes that cursors and direct reads have read.
    pub read: Arc<AtomicU64>,
    seen: Mutex<Seen>,
    random: Mutex<StdRng>,
}

impl World {
    pub fn new(plan: Plan, clock: Clock) -> Arc<Self> {
        let (start, random) = (clock.steady(), Mutex::new(StdRng::seed_from_u64(plan.seed ^ 0x5EED)));
        Arc::new(Self { plan, clock, start, read: Arc::default(), seen: Mutex::default(), random })
    }

    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no poison")
    }

    fn elapsed(&self) -> Duration {
        self.clock.steady().since(self.start)
    }

    fn chance(&self, of_hundred: u32) -> bool {
        self.random.lock().expect("no poison").random_range(0..100) < of_hundred
    }

    fn manner(&self, destination: usize) -> Manner {
        match self.elapsed() < self.plan.trouble {
            true => self.plan.destinations[destination].manner.clone(),
            false => Manner::Well,
        }
    }

    fn key_of(&self, record: &Record) -> (usize, Option<String>) {
        let destination = record.headers.text(header::DESTINATION).and_then(|id| id[1..].parse().ok()).unwrap_or(0);
        let ordered = self.plan.destinations[destination].ordered;
        let user = record.headers.text(header::USER).filter(|_| ordered).map(str::to_owned);
        (destination, user)
    }

    /// A request begins: whoever is sent has every predecessor of its key behind it, or before it in the same request.
    fn note_sent(&self, records: &[Arc<Record>]) {
        let now = self.clock.steady();
        let mut seen = self.seen();
        let together: BTreeSet<At> = records.iter().map(|record| (record.partition, record.offset)).collect();
        for record in records {
            let at = (record.partition, record.offset);
            seen.first_sent.entry(at).or_insert(now);
            (at, now).hash(&mut seen.digest);
            if seen.copies.contains_key(&at) {
                self.judge_copy(&mut seen, at);
                continue;
            }
            let (destination, user) = self.key_of(record);
            if let Some(last) = seen.finals.get(&at).and_then(|finals| finals.last().copied()) {
                // Final, and committed unless something went wrong soon after.
                // Where writes fail a session may end with what it could not commit.
                let log = self.plan.log;
                let is_log_sound = log.write_refused == 0.0 && log.write_in_doubt == 0.0 && log.read_refused == 0.0;
                let excuse = !is_log_sound
                    || seen.hurt.iter().any(|hurt| *hurt >= last || last.since(*hurt) < Duration::from_secs(30));
                if !excuse {
                    seen.violations.push(format!("{at:?} is sent again although it was final at {last}"));
                }
            }
            let Some(user) = user else { continue };
            let earlier: Vec<At> = seen.keys.get(&(destination, user)).into_iter().flatten().copied().collect();
            for before in earlier.iter().take_while(|other| **other != at) {
                let over = seen.finals.contains_key(before) || seen.ended.contains(before) || together.contains(before);
                if !over && !seen.drained && self.plan.retention.is_none() {
                    seen.violations.push(format!("{at:?} is sent before {before:?} is final"));
                }
            }
        }
    }

    /// What lies in the log before is not sent again, unless an owner has died that knew of it.
    fn judge_copy(&self, seen: &mut Seen, at: At) {
        let log = self.plan.log;
        let is_log_sound = log.write_refused == 0.0 && log.write_in_doubt == 0.0 && log.read_refused == 0.0;
        if is_log_sound && (self.plan.is_flowing || (self.plan.processes == 1 && seen.hurt.is_empty())) {
            seen.violations.push(format!("{at:?} is sent although it lies in the log before"));
        }
    }

    fn answer(&self, record: &Record) -> Verdict {
        let (destination, user) = self.key_of(record);
        let retry = || Verdict::Retry { code: 500, message: "no".into(), not_before: None };
        let fails = match self.manner(destination) {
            Manner::Dead => true,
            Manner::Flaky(share) => self.chance(share),
            Manner::FailingUsers(share) => {
                let number = user.and_then(|user| user[1..].parse::<u32>().ok()).unwrap_or(0);
                number * 37 % 100 < share
            }
            Manner::Flapping(every) => (self.elapsed().as_millis() / every.as_millis()) % 2 == 1,
            Manner::Refusing(share) if self.chance(share) => {
                return Verdict::Abort { reason: Reason::Rejected, code: 400, message: "never".into() };
            }
            Manner::Hanging => return Verdict::Retry { code: 0, message: "time-out".into(), not_before: None },
            Manner::Well | Manner::Slow(_) | Manner::Refusing(_) => false,
        };
        if fails { retry() } else { Verdict::Delivered { code: 200 } }
    }
}

/// The stage under test: its requests come to the world.
pub struct Stage(pub Arc<World>);

impl Deliver for Stage {
    async fn attempt(&self, records: Vec<Arc<Record>>) -> Vec<Verdict> {
        let world = &self.0;
        world.note_sent(&records);
        let (destination, _) = world.key_of(&records[0]);
        let time = match world.manner(destination) {
            Manner::Slow(time) => time,
            Manner::Hanging => TIMEOUT,
            _ => Duration::from_millis(20),
        };
        world.clock.sleep(time).await;
        let mut verdicts = Vec::new();
        for record in &records {
            let verdict = world.answer(record);
            let is_final = !matches!(verdict, Verdict::Retry { .. });
            verdicts.push(verdict);
            if !is_final {
                break;
            }
            let at = (record.partition, record.offset);
            world.seen().finals.entry(at).or_default().push(world.clock.steady());
        }
        verdicts
    }

    fn rules(&self, destination: &DestinationId) -> Rules {
        let index: usize = destination.as_str().get(1..).and_then(|text| text.parse().ok()).unwrap_or(0);
        let Some(of) = self.0.plan.destinations.get(index) else { return Rules::default() };
        let retry = RetryPolicy {
            first: Duration::from_millis(300),
            cap: Duration::from_secs(8),
            window: self.0.plan.retry_window,
            ..RetryPolicy::default()
        };
        Rules { ordered: of.ordered, batch: of.batch, rate: of.rate, concurrency: None, retry }
    }
}
