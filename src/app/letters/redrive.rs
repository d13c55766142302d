//! Carrying a plan out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::time::Instant;

use super::{Resend, group, resend, store};
use crate::clock::Clock;
use crate::log::{Admin, Assignment, Backend, Commit, Committed, Limit, LogError, Member, Polled, Session};
use crate::model::record::{Addressed, Epoch, Offset, Partition, Record, Topic};
use crate::model::redrive::{Letter, Plan, Shelf};
use crate::runtime::shutdown::Shutdown;

/// Letters in one commit.
const MOST: usize = 500;
/// Letters that are made ready at a time: some need another service.
const AT_A_TIME: usize = 16;
/// What one poll brings, at most.
const POLL_BYTES: usize = 4 << 20;
/// A commit that the log did not take is repeated after so long, and for so long.
const AGAIN: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(60);
/// Kafka forgets the position of a group that nobody is in after seven days; from then on a plan would begin anew.
const POSITIONS_LAST: Duration = Duration::from_secs(6 * 24 * 3_600);

/// How far a plan is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// By this start and by earlier ones.
    pub letters: u64,
    /// Of those by this start: became nothing once more, and lie in `proc-errors` anew.
    pub failed_again: u64,
    pub is_finished: bool,
}

/// Why a plan stands.
#[derive(Debug, thiserror::Error)]
pub enum RedriveError {
    #[error(
        "this process carries the plan out no longer: another start has taken over, or the log was away for too long"
    )]
    Replaced,
    #[error(
        "the log has forgotten how far this plan was, which is {days} days old; `laneway {command} abandon` it and make a new \
         one, which sends everything again"
    )]
    Forgotten { days: u64, command: &'static str },
    /// Something that is needed does not answer.
    #[error("the transformer service is needed and does not answer: {0}")]
    Away(String),
    #[error(transparent)]
    Log(#[from] LogError),
}

/// A plan that is being carried out.
pub struct Redrive<'a, B> {
    pub log: &'a B,
    pub clock: &'a Clock,
    pub plan: &'a Plan,
    /// All plans, or at least those that were there before it.
    pub known: &'a [Plan],
    pub resend: &'a Resend,
    pub session_timeout: Duration,
    pub shutdown: Shutdown,
}

/// A partition of the plan.
struct Part {
    epoch: Epoch,
    next: Offset,
    until: Offset,
    sent: u64,
    failed_again: u64,
}

/// By the place of the letter.
type Outputs = BTreeMap<(Partition, Offset), resend::Sent>;

/// What goes into one commit.
#[derive(Default)]
struct Batch {
    commit: Commit,
    /// Records that were passed, and letters that were sent.
    passed: usize,
    letters: usize,
}

impl<B: Backend> Redrive<'_, B> {
    /// Sends until everything is sent or the shutdown begins. `tell` hears how far it is after every commit.
    ///
    /// # Errors
    /// [`RedriveError`]; what was sent so far is committed, and the next start goes on behind it.
    pub async fn run(&self, mut tell: impl FnMut(Sent)) -> Result<Sent, RedriveError> {
        let mut session = self.log.session(member(self.plan, self.resend.outputs(), self.session_timeout)).await?;
        let ended = self.carry_out(&mut session, &mut tell).await;
        session.close().await;
        ended
    }

    async fn carry_out(&self, session: &mut B::Session, tell: &mut impl FnMut(Sent)) -> Result<Sent, RedriveError> {
        let mut parts: BTreeMap<Partition, Part> = BTreeMap::new();
        let mut due = self.clock.instant();
        let mut is_dense = true;
        loop {
            let sent = self.sent(&parts);
            tell(sent);
            if sent.is_finished || self.shutdown.has_begun() {
                return Ok(sent);
            }
            // No more than what is sent in a moment, so that the session is polled often enough; much more where hardly
            // anything is meant.
            let records = match (is_dense, self.plan.shelf) {
                (true, _) => self.burst(),
                (false, Shelf::DeadLetters) => (self.plan.rate as usize * 60).min(MOST),
                // Each of them may need another service, which may be slow.
                (false, Shelf::ProcErrors) => AT_A_TIME * 2,
            };
            let polled = tokio::select! {
                polled = session.poll(Limit { records, bytes: POLL_BYTES }) => polled.map_err(replaced)?,
                () = self.shutdown.begun() => continue,
            };
            match polled {
                Polled::Assigned(given) => self.assigned(session, given, &mut parts).await?,
                Polled::Records(records) => is_dense = self.send(session, &records, &mut parts, &mut due).await?,
                Polled::Revoked(_) | Polled::Lost(_) => return Err(RedriveError::Replaced),
                Polled::Idle => self.pass_over_what_is_gone(&mut parts).await?,
            }
        }
    }

    /// Letters in one commit: a tenth of a second's.
    fn burst(&self) -> usize {
        let most = if self.plan.shelf == Shelf::ProcErrors { AT_A_TIME * 2 } else { MOST };
        (self.plan.rate as usize / 10).clamp(1, most)
    }

    fn sent(&self, parts: &BTreeMap<Partition, Part>) -> Sent {
        let is_done = |partition: &Partition| parts.get(partition).is_some_and(|part| part.next >= part.until);
        Sent {
            letters: parts.values().map(|part| part.sent).sum(),
            failed_again: parts.values().map(|part| part.failed_again).sum(),
            is_finished: self.plan.spans.keys().all(is_done),
        }
    }

    /// Begins where the last start has ended.
    async fn assigned(
        &self,
        session: &mut B::Session,
        given: Vec<Assignment>,
        parts: &mut BTreeMap<Partition, Part>,
    ) -> Result<(), RedriveError> {
        let age = self.clock.now().since(self.plan.at);
        if age > POSITIONS_LAST && given.iter().all(|assignment| assignment.committed.is_none()) {
            return Err(RedriveError::Forgotten {
                days: age.as_secs() / (24 * 3_600),
                command: self.plan.shelf.command(),
            });
        }
        let mut begun = Commit::default();
        for Assignment { partition, epoch, committed } in given {
            let Some(span) = self.plan.spans.get(&partition) else { continue };
            if committed.is_none() {
                begun.offsets.insert(partition, (epoch, position(span.first, 0)));
            }
            let sent = committed.as_ref().and_then(|it| it.metadata.parse().ok()).unwrap_or(0);
            let next = committed.map_or(span.first, |committed| committed.offset);
            parts.insert(partition, Part { epoch, next, until: span.until, sent, failed_again: 0 });
            if next < span.until {
                session.seek(partition, next)?;
                session.resume(&[partition])?;
            }
        }
        // Known from now on to have begun.
        if begun.offsets.is_empty() { Ok(()) } else { self.commit(session, begun).await }
    }

    /// Writes what these letters hold, each batch with the position behind it, at the plan's rate. False where none was meant.
    async fn send(
        &self,
        session: &mut B::Session,
        records: &[Record],
        parts: &mut BTreeMap<Partition, Part>,
        due: &mut Instant,
    ) -> Result<bool, RedriveError> {
        let mut meant = tokio::select! {
            meant = self.outputs(records, parts) => meant?,
            () = self.shutdown.begun() => return Ok(true),
        };
        let (mut batch, mut count, mut done) = (Batch::default(), 0, Vec::new());
        for record in records {
            let Some(part) = parts.get_mut(&record.partition).filter(|part| part.next < part.until) else { continue };
            part.next = record.offset.just_after();
            batch.passed += 1;
            if record.offset < part.until
                && let Some(outputs) = self.sent_as(meant.remove(&(record.partition, record.offset)), part)
            {
                batch.commit.outputs.extend(outputs);
                batch.letters += 1;
                part.sent += 1;
                count += 1;
            }
            if part.next >= part.until {
                done.push(record.partition);
            }
            batch.commit.offsets.insert(record.partition, (part.epoch, position(part.next, part.sent)));
            if batch.letters >= self.burst() || batch.commit.outputs.len() >= MOST {
                self.pace(session, std::mem::take(&mut batch), due).await?;
                if self.shutdown.has_begun() {
                    return Ok(true);
                }
            }
        }
        if batch.passed > 0 {
            self.pace(session, batch, due).await?;
        }
        session.pause(&done)?;
        Ok(count > 0)
    }

    async fn pace(&self, session: &mut B::Session, batch: Batch, due: &mut Instant) -> Result<(), RedriveError> {
        let count = batch.letters;
        self.commit(session, batch.commit).await?;
        // A rate that was not reached is not made up for later.
        *due = (*due).max(self.clock.instant()) + Duration::from_secs_f64(count as f64 / f64::from(self.plan.rate));
        tokio::select! {
            () = self.clock.sleep_until(*due) => {}
            () = self.shutdown.begun() => {}
        }
        Ok(())
    }

    async fn commit(&self, session: &mut B::Session, commit: Commit) -> Result<(), RedriveError> {
        let (commit, until) = (Arc::new(commit), self.clock.instant() + PATIENCE);
        loop {
            match session.commit(Arc::clone(&commit)).await {
                Ok(()) => return Ok(()),
                // Nothing of it is there. For how long the partitions are still ours only polling would tell.
                Err(LogError::Transient(_)) if self.clock.instant() < until && !self.shutdown.has_begun() => {
                    self.clock.sleep(AGAIN).await;
                }
                Err(error) => return Err(replaced(error)),
            }
        }
    }

    /// The records to write for a letter; none where it is not sent.
    fn sent_as(&self, sent: Option<resend::Sent>, part: &mut Part) -> Option<Vec<Addressed>> {
        match sent? {
            resend::Sent::Again(records) => Some(records),
            resend::Sent::Failed(letter) => {
                part.failed_again += 1;
                Some(vec![letter])
            }
            resend::Sent::Not => None,
        }
    }

    /// What becomes of those of these records that are meant, by their places.
    async fn outputs(&self, records: &[Record], parts: &BTreeMap<Partition, Part>) -> Result<Outputs, RedriveError> {
        let is_open = |record: &&Record| {
            parts.get(&record.partition).is_some_and(|part| (part.next..part.until).contains(&record.offset))
        };
        let letters = records.iter().filter(is_open).filter_map(|record| Letter::of(record).ok());
        let meant = letters.filter(|letter| self.plan.sends(letter, self.known));
        let made = meant.map(async |letter| {
            let sent = self.resend.records(&self.plan.id, &letter).await?;
            Ok(((letter.partition, letter.offset), sent))
        });
        stream::iter(made).buffered(AT_A_TIME).try_collect().await
    }

    /// What the log deleted meanwhile never comes.
    async fn pass_over_what_is_gone(&self, parts: &mut BTreeMap<Partition, Part>) -> Result<(), RedriveError> {
        let admin = self.log.admin()?;
        for (partition, part) in parts.iter_mut().filter(|(_, part)| part.next < part.until) {
            if admin.watermarks(&self.plan.shelf.topic(), *partition).await?.start >= part.until {
                part.next = part.until;
            }
        }
        Ok(())
    }
}

fn replaced(error: LogError) -> RedriveError {
    match error {
        LogError::Fenced(_) => RedriveError::Replaced,
        other => RedriveError::Log(other),
    }
}

/// The position in a partition, and how many letters were sent from it.
fn position(offset: Offset, sent: u64) -> Committed {
    Committed { offset, metadata: sent.to_string() }
}

fn member(plan: &Plan, outputs: Vec<Topic>, session_timeout: Duration) -> Member {
    Member {
        group: group(plan),
        instance: "redrive".into(),
        topic: plan.shelf.topic(),
        outputs,
        state: None,
        session_timeout,
        revoke_drain: AGAIN,
    }
}

/// Ends a plan where it has come to: what it has not sent is free for others. Whoever carries it out is stopped.
///
/// # Errors
/// Where the log does not answer, or does not hand the partitions over in time.
pub async fn abandon<B: Backend>(
    log: &B,
    clock: &Clock,
    plan: &Plan,
    session_timeout: Duration,
) -> Result<Plan, RedriveError> {
    // To be in its group ends whoever else is; what that one had under way is settled before positions are told.
    let mut session = log.session(member(plan, Vec::new(), session_timeout)).await?;
    let until = clock.instant() + PATIENCE;
    let mut places: BTreeMap<Partition, Option<Committed>> = BTreeMap::new();
    while !plan.spans.keys().all(|partition| places.contains_key(partition)) {
        if clock.instant() > until {
            session.close().await;
            return Err(LogError::transient("the log does not hand over the plan's partitions").into());
        }
        if let Polled::Assigned(given) = session.poll(Limit { records: 1, bytes: 1 }).await.map_err(replaced)? {
            places.extend(given.into_iter().map(|it| (it.partition, it.committed)));
        }
    }
    session.close().await;
    let mut ended = Plan { finished_at: Some(clock.now()), letters: 0, ..plan.clone() };
    ended.spans.retain(|partition, span| {
        let Some(Some(committed)) = places.get(partition) else { return false };
        ended.letters += committed.metadata.parse::<u64>().unwrap_or(0);
        span.until = span.until.min(committed.offset);
        span.first < span.until
    });
    store(log, &ended).await?;
    Ok(ended)
}
