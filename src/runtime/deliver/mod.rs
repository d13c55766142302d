//! From a topic to the outside world: in order per user and destination, without one user or destination blocking another.
//!
//! A partition's state ([`partition`]) is pure: records and verdicts go in, deliveries to start, things to read and progress to
//! write come out. `runner` runs it: it spawns attempts, keeps timers, answers the driver. `reading` reads what is not in
//! memory.
//!
//! # Who covers what
//!
//! Each unfinished record is covered by **exactly one** of three:
//!
//! - **memory**: its lane is attached and its key is not held. It is open in the partition's `window`; the partition's progress
//!   record names the lowest such offset (`base`) and what is finished above it (`runs`), so a successor reads it again;
//! - **its lane's mark**: its lane is *detached*, its key is not held. It is open in the lane's own window, or still ahead of
//!   the lane's reading; the lane's progress record names `tail` and `done`. So a destination that is down for days, or a
//!   backlog that does not fit into memory, holds nothing else back;
//! - **its key's mark**: its key is *held*: the head failed and waits, or there is more of it than may be queued. The key's
//!   progress record names the head, the next followers and where the rest begins (`parked`). So a user who fails for hours
//!   holds nothing back either.
//!
//! Wherever cover goes from one to another, that happens in one step of the state, and both sides are written by the same
//! commit, since a commit writes everything that changed. A window counts a record that a key's mark covers as finished.
//!
//! # After a crash
//!
//! The progress record with the number (`seq`) in the committed offset's metadata is the last one: both are in one
//! transaction, together with every mark that had changed. Live reading starts at `base` and passes over `runs`. Detached lanes
//! start at `tail` and pass over `done`. Held keys come with their marks and read their records at their offsets.
//!
//! - Records of a commit whose offset does not count may lie behind that one: a log may let a transaction be seen that it had
//!   forgotten to abort. The partition's own record is the last one of each commit, so it is known where they begin; they are
//!   passed over, and the first commit puts back what they replaced.
//! - A record that live had passed but whose passing was not committed is read again by live: `base` and `live` are older too.
//! - A record whose final outcome was not committed is open in what is restored, and is sent again with the same delivery id.
//! - A record is never covered twice: marks of lanes and keys were written with the `runs` that leave out what they cover. Until
//!   live reading is where the last owner's was (`live`), cursors read up to there, and lanes are not attached: what is between
//!   counts as finished for live if a mark covers it.
//! - Order holds: a held key's mark covers all of its unfinished records, so none of them comes by another way.
//!
//! # Where the rules are
//!
//! | rule (runtimes 5.2) | where |
//! |---|---|
//! | 1 from live | `partition` `admit` |
//! | 2 starting, permits, turns | `partition` `next_start`, `partition/lane`, `destination` |
//! | 3 settlement | `partition/settle`, `backoff` |
//! | 4 breaker | `breaker`, `destination` |
//! | 5 shedding | `partition/detach` `shed` |
//! | 6 heads that are not in memory | `partition/fetch`, `reading` |
//! | 7 cursors, attaching | `partition/scan`, `partition/detach` |
//! | 8 restore | `restore`, `partition` `new` |
//! | 9 retention | `retention`, `partition/settle` `drain`; `app/retention` refuses topics |
//! | 10 pause, drain, retry | `partition/settle`, `destination` |
//! | 5.3 shares of limits | `destination` |
//! | 5.4 what lies in the log twice | `repeats` |
//! | 2.7 lease, 2.8 watchdog | `driver/lease`, `driver/watchdog` |

mod backoff;
mod breaker;
mod destination;
mod key;
mod memory;
mod partition;
mod reading;
mod repeats;
mod restore;
mod retention;
mod runner;
mod window;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::clock::Clock;
use crate::control::commands::Current;
use crate::delivery::verdict::Verdict;
use crate::log::{Assignment, Backend, LogError};
use crate::model::id::DestinationId;
use crate::model::record::{Partition, Record, Topic};
use crate::runtime::driver::{Inbox, Work};
use crate::runtime::failure::FailureTopic;
use crate::runtime::tally::JobTopic;
use crate::telemetry::events;

pub use backoff::RetryPolicy;
pub use destination::{Destinations, Rules};
pub use memory::{Bounds, Memory};

use partition::{Given, PartitionState};
use reading::{AGAIN, Reading};
use retention::Retention;
use runner::{Runner, Sources};

/// A stage's logic: one attempt.
pub trait Deliver: Send + Sync + 'static {
    /// Sends deliveries of one user in one request and says what came of each, in order, up to the first that is not final.
    /// `records` are as they lie in the log; there is more than one only where [`Rules::batch`] allows it.
    fn attempt(&self, records: Vec<Arc<Record>>) -> impl Future<Output = Vec<Verdict>> + Send;

    /// What a destination wants. Asked when the process meets it, and again by whoever knows that it has changed
    /// ([`Destinations::refresh`]).
    fn rules(&self, destination: &DestinationId) -> Rules;
}

/// What the runtime needs to know beside the stage.
#[derive(Clone, Debug)]
pub struct DeliverSettings {
    pub input: Topic,
    pub progress: Topic,
    pub failures: FailureTopic,
    pub jobs: JobTopic,
    pub bounds: Bounds,
    pub stage: &'static str,
    /// So many deliveries of a partition are remembered, to know those that a log without transactions has twice; 0: none.
    pub repeats: usize,
    /// How long the log keeps what is on `input`; none: for ever.
    pub retention: Option<Duration>,
    /// Decides the jitter of retries.
    pub seed: u64,
}

/// Runs a [`Deliver`] stage on a log.
pub struct DeliverWork<B: Backend, D> {
    backend: B,
    admin: B::Admin,
    stage: Arc<D>,
    settings: DeliverSettings,
    destinations: Destinations,
    memory: Memory,
    commands: Current,
    clock: Clock,
}

impl<B: Backend, D: Deliver> DeliverWork<B, D> {
    /// # Errors
    /// Where the log cannot be asked.
    pub fn new(
        backend: B,
        stage: Arc<D>,
        settings: DeliverSettings,
        destinations: Destinations,
        commands: Current,
        clock: Clock,
    ) -> Result<Self, LogError> {
        let memory = Memory::new(&settings.bounds);
        let admin = backend.admin()?;
        Ok(Self { backend, admin, stage, settings, destinations, memory, commands, clock })
    }
}

impl<B: Backend, D: Deliver> Work for DeliverWork<B, D> {
    async fn run(self: Arc<Self>, assignment: Assignment, inbox: Inbox) -> Result<(), LogError> {
        let Inbox { records, asks, ready, bell, lease } = inbox;
        let since = lease.now();
        let partition = assignment.partition;
        let restored = loop {
            match restore::restore(&self.backend, &self.admin, &self.settings, &assignment, &self.clock).await {
                Err(LogError::Transient(error)) => {
                    // The other partitions of this session go on meanwhile.
                    tracing::warn!(partition = partition.0, %error, "restore failed, trying again");
                    self.clock.sleep(AGAIN).await;
                }
                restored => break restored?,
            }
        };
        let stage = Arc::clone(&self.stage);
        let given = Given {
            partition,
            epoch: assignment.epoch,
            settings: self.settings.clone(),
            memory: self.memory.clone(),
            destinations: self.destinations.clone(),
            rules: Arc::new(move |id| stage.rules(id)),
            seed: self.settings.seed ^ (assignment.epoch.0 << 16) ^ u64::from(partition.0),
            wall_offset: runner::wall_offset(&self.clock),
        };
        let now = self.clock.steady();
        let state = PartitionState::new(given, restored, now);
        let retention = Retention::new(partition, self.settings.retention, state.ended(), now);
        let (wanted, wishes) = mpsc::unbounded_channel();
        let (found_in, found) = mpsc::unbounded_channel();
        let (backend, topic, clock) = (self.backend.clone(), self.settings.input.clone(), self.clock.clone());
        let mut reading = JoinSet::new();
        reading.spawn(Reading { backend, topic, partition, clock }.run(wishes, found_in));
        // A driver that is gone does not want the partition any more.
        let _ = ready.send(state.live());
        let freed = self.destinations.subscribe();
        let commands = self.commands.clone();
        let runner = Runner {
            work: self,
            state,
            attempts: JoinSet::new(),
            draining: None,
            stopped: false,
            starved: false,
            wanted,
            bell,
            lease,
            since,
            renew: false,
            owed: false,
            shed_at: now,
            known: std::collections::HashSet::new(),
            retention,
            #[cfg(debug_assertions)]
            steps: 0,
        };
        runner.run(Sources { records, asks, found, reading, freed, commands }).await
    }
}

/// Tells when a partition begins or ends waiting.
fn tell_waiting(stage: &str, partition: Partition, before: Option<&'static str>, now: Option<&'static str>) {
    if before == now {
        return;
    }
    if let Some(reason) = before {
        events::waiting(stage, partition, reason, false);
    }
    if let Some(reason) = now {
        events::waiting(stage, partition, reason, true);
    }
}
