//! A partition's worker: runs the state, spawns attempts, keeps timers, answers the driver.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::clock::{Clock, Timestamp};
use crate::control::commands::{Current, RETRY_LIFE};
use crate::delivery::verdict::Verdict;
use crate::log::{Backend, LogError};
use crate::model::outcome::Reason;
use crate::model::record::Record;
use crate::runtime::driver::{Ask, Bell, Lease};
#[cfg(debug_assertions)]
use crate::runtime::planted::are_invariants_checked;

use super::destination::Permit;
use super::partition::{KeyId, PartitionState, Start};
use super::reading::{Found, Wanted};
use super::retention::Retention;
use super::{Deliver, DeliverWork, retention};

/// A partition sheds so often while the process's memory is short, however busy it is: others need that memory. It does not for
/// its own shortness, or it would forget what it has just read and is about to send.
const SHED_INTERVAL: Duration = Duration::from_secs(1);
/// A partition without room, in which nothing happens for so long, looks whether there is some: room that another partition makes
/// rings nobody here.
const ROOM_INTERVAL: Duration = Duration::from_millis(100);

/// What a request came to.
pub type Attempt = (KeyId, Vec<Verdict>, Permit);

/// A worker's moving parts.
pub struct Runner<B: Backend, D> {
    pub work: Arc<DeliverWork<B, D>>,
    pub state: PartitionState,
    pub attempts: JoinSet<Attempt>,
    pub draining: Option<oneshot::Sender<()>>,
    pub stopped: bool,
    /// A delivery was ready, but no permit was free.
    pub starved: bool,
    pub wanted: mpsc::UnboundedSender<Wanted>,
    pub bell: Arc<Bell>,
    pub lease: Arc<Lease>,
    /// When this partition became ours.
    pub since: Duration,
    /// Something could start, but the lease has to be renewed before.
    pub renew: bool,
    /// So much waits for a commit that nothing goes on before.
    pub owed: bool,
    /// When it looks whether it has to shed for other partitions.
    pub shed_at: Timestamp,
    /// Commands that have been taken up.
    pub known: HashSet<String>,
    pub retention: Retention,
    #[cfg(debug_assertions)]
    pub steps: usize,
}

/// What comes in from outside.
pub struct Sources {
    pub records: mpsc::Receiver<Vec<Record>>,
    pub asks: mpsc::UnboundedReceiver<Ask>,
    pub found: mpsc::UnboundedReceiver<Found>,
    pub reading: JoinSet<Result<(), LogError>>,
    pub freed: watch::Receiver<u64>,
    pub commands: Current,
}

/// By how many microseconds the wall clock is ahead of the steady one.
pub fn wall_offset(clock: &Clock) -> i64 {
    clock.now().micros() - clock.steady().micros()
}

impl<B: Backend, D: Deliver> Runner<B, D> {
    pub async fn run(mut self, mut from: Sources) -> Result<(), LogError> {
        let clock = self.work.clock.clone();
        self.take_commands(&mut from.commands);
        loop {
            self.do_what_is_due();
            self.start_what_may();
            #[cfg(debug_assertions)]
            self.check();
            let room = self.has_room();
            let until = |at: Timestamp| clock.instant() + at.since(clock.steady());
            let wake = self.state.next_timer().map_or_else(|| clock.instant() + Duration::from_secs(3_600), until);
            let wake = self.retention.next_look().map_or(wake, |at| wake.min(until(at)));
            tokio::select! {
                biased;
                ask = from.asks.recv() => match ask {
                    Some(ask) => self.answer(ask),
                    None => return Ok(()),
                },
                Some(attempt) = self.attempts.join_next(), if !self.attempts.is_empty() => self.settle(attempt)?,
                Some(found) = from.found.recv() => self.take_found(found),
                Some(ended) = from.reading.join_next() => {
                    ended.map_err(|error| LogError::transient(format!("reading crashed: {error}")))??;
                }
                Ok(()) = from.commands.changed() => self.take_commands(&mut from.commands),
                _ = from.freed.changed(), if self.starved => {}
                batch = from.records.recv(), if room => match batch {
                    Some(batch) => {
                        self.state.admit_all(batch, clock.steady());
                        if self.state.take_gone_back() {
                            drop(self.wanted.send(Wanted::End { live: self.state.live() }));
                        }
                        self.bell.ring();
                    }
                    None => return Ok(()),
                },
                () = clock.sleep_until(wake), if !self.stopped => {}
                () = clock.sleep(ROOM_INTERVAL), if !room && !self.stopped => self.state.shed(clock.steady()),
            }
        }
    }

    /// Timers come before everything else: what comes in without a pause must not keep them waiting.
    fn do_what_is_due(&mut self) {
        let now = self.work.clock.steady();
        self.state.set_wall_offset(wall_offset(&self.work.clock));
        if self.stopped {
            return;
        }
        if self.state.next_timer().is_some_and(|at| at <= now) {
            self.state.wake(now);
        }
        if self.retention.next_look().is_some_and(|at| at <= now) {
            self.look();
        }
        if self.shed_at <= now {
            self.shed_at = now.plus(SHED_INTERVAL);
            if self.state.has_others_short() {
                self.state.shed(now);
            }
        }
    }

    /// Whether live reading may go on.
    fn has_room(&mut self) -> bool {
        let owes = self.state.owes_much();
        if owes && !self.owed {
            self.bell.ring_full();
        }
        self.owed = owes;
        !self.stopped && self.state.has_room() && !owes
    }

    fn take_found(&mut self, found: Found) {
        let now = self.work.clock.steady();
        match found {
            Found::Single { key, offset, record } => self.state.fetched(&key, offset, record, now),
            Found::Stretch { cursor, records, passed } => self.state.scanned(cursor, records, passed, now),
            Found::Bound { drain } => self.state.drain(vec![drain], now),
            Found::Age { at, pending, rate } => {
                if let Some(before) = self.retention.judge(at, pending, rate, self.work.clock.now()) {
                    drop(self.wanted.send(Wanted::Expired { before }));
                }
            }
            Found::Expired { bound } => self.state.drain(vec![retention::drain(bound)], now),
        }
        self.bell.ring();
    }

    /// Asks how old the oldest unfinished record is.
    fn look(&mut self) {
        let rate = self.retention.look(self.state.ended(), self.work.clock.steady());
        match self.state.oldest() {
            Some((from, pending)) => drop(self.wanted.send(Wanted::Age { from, pending, rate })),
            None => self.retention.rest(),
        }
    }

    /// A large state is checked after some of its steps only: a check takes as long as there are keys.
    #[cfg(debug_assertions)]
    fn check(&mut self) {
        self.steps += 1;
        if are_invariants_checked() && self.steps.is_multiple_of(1 + self.state.keys() / 100) {
            let checked = self.state.check();
            assert!(checked.is_ok(), "an invariant of the partition's state is broken: {checked:?}");
        }
    }

    /// Takes up what the operator wants of this partition. Pauses are the whole process's.
    fn take_commands(&mut self, commands: &mut Current) {
        let commands = Arc::clone(&commands.borrow_and_update());
        let (now, steady) = (self.work.clock.now(), self.work.clock.steady());
        for command in commands.drains(now) {
            if self.known.insert(command.id.clone()) {
                drop(self.wanted.send(Wanted::Bound { command: command.clone() }));
            }
        }
        for command in commands.retries(now) {
            if self.known.insert(command.id.clone()) {
                self.state.retry_now(&command.target, steady, command.at.plus(RETRY_LIFE));
            }
        }
    }

    fn start_what_may(&mut self) {
        self.starved = false;
        if self.stopped {
            if self.attempts.is_empty()
                && let Some(done) = self.draining.take()
            {
                // Whoever asked has given up waiting; the drain is over all the same.
                let _ = done.send(());
            }
            return;
        }
        let now = self.work.clock.steady();
        let may_send = self.lease.holds(self.since);
        while let Some(start) = self.state.next_start(now, may_send) {
            match start {
                Start::Attempt { key, records, permit } => self.attempt(key, records, permit),
                // Nobody reads any more where the reading task has ended; that takes the worker down.
                Start::Fetch { key, offset } => drop(self.wanted.send(Wanted::Single { key, offset })),
                Start::Scan { cursor, from, until } => {
                    drop(self.wanted.send(Wanted::Stretch { cursor, from, until }));
                }
                Start::Close { cursor } => drop(self.wanted.send(Wanted::Close { cursor })),
                Start::Starved => {
                    self.starved = true;
                    return;
                }
            }
        }
        if !may_send && !self.renew && self.state.has_ready() {
            self.renew = true;
            self.bell.ring();
        }
    }

    fn attempt(&mut self, key: KeyId, records: Vec<Arc<Record>>, permit: Permit) {
        let stage = Arc::clone(&self.work.stage);
        self.attempts.spawn(async move {
            let attempt = AssertUnwindSafe(stage.attempt(records)).catch_unwind().await;
            let verdicts = attempt.unwrap_or_else(|_| {
                let message = "the stage panicked on this record".to_owned();
                vec![Verdict::Abort { reason: Reason::Panicked, code: 0, message }]
            });
            (key, verdicts, permit)
        });
    }

    fn settle(&mut self, attempt: Result<Attempt, tokio::task::JoinError>) -> Result<(), LogError> {
        let (key, verdicts, permit) =
            attempt.map_err(|error| LogError::transient(format!("an attempt crashed: {error}")))?;
        self.state.settle(&key, verdicts, permit, self.work.clock.steady());
        self.bell.ring();
        Ok(())
    }

    fn answer(&mut self, ask: Ask) {
        match ask {
            Ask::Collect(answer) => {
                let clean = self.stopped && self.attempts.is_empty();
                let changes = self.state.collect(clean, std::mem::take(&mut self.renew));
                // A driver that does not wait any more has lost the partition, and drops this worker.
                let _ = answer.send(changes);
            }
            Ask::Committed => self.state.committed(self.work.clock.steady()),
            Ask::Drain(done) => {
                self.stopped = true;
                self.draining = Some(done);
            }
        }
    }
}
