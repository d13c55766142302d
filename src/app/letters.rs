//! What was given up: finding it, and sending it again. Deliveries lie on `dead-letters`, events and webhook requests on
//! `proc-errors`: a letter is a record of either.
//!
//! A redrive is a plan (`model/redrive.rs`) in the `control` topic and one group that carries it out. The group is named after the
//! plan and commits its position in the letters together with what it writes. So a second start of a plan goes
//! on exactly where the first one ended, a start beside a running one takes over from it (the embedded log, whose groups live in one
//! process, refuses it), and a letter that a plan means is never sent by a later one.
//!
//! Of `dead-letters` the original record is sent, with its delivery id (it is the same delivery, tried again) and the plan's id as replay id:
//! a lane of its own, which neither waits for the live one nor holds it up. In it a user's deliveries stay in order, since they
//! were given up in order.

mod redrive;
mod resend;

use std::collections::BTreeMap;

use futures_util::StreamExt;
use futures_util::stream;

use crate::clock::Timestamp;
use crate::control::commands;
use crate::log::{Admin, Backend, Limit, LogError, Publisher, Read, Reader};
use crate::model::codec::Unreadable;
use crate::model::record::{Addressed, Offset, Partition, Record, Topic};
use crate::model::redrive::{Filter, KIND, Letter, Plan, Shelf, Span};

pub use redrive::{Redrive, RedriveError, Sent, abandon};
pub use resend::{Events, Resend, is_whole};

/// Partitions that are read at a time: each takes a reader.
const AT_A_TIME: usize = 8;
const READ: Limit = Limit { records: 1_000, bytes: 4 << 20 };

/// Reads the letters of every partition, each into a `T` of its own. `since`: older ones are passed over.
///
/// # Errors
/// Where the log cannot be read.
pub async fn scan<B: Backend, T: Default>(
    log: &B,
    shelf: Shelf,
    since: Option<Timestamp>,
    take: impl Fn(&mut T, Result<Letter, Unreadable>),
) -> Result<Vec<T>, LogError> {
    let admin = log.admin()?;
    let topics = admin.topics().await?;
    let topic = &shelf.topic();
    let info = topics.into_iter().find(|info| info.topic == *topic);
    let missing = || LogError::fatal(format!("there is no topic {topic}; is log.topic_prefix right?"));
    let partitions = info.ok_or_else(missing)?.partitions;
    let (admin, take) = (&admin, &take);
    let scans = (0..partitions).map(Partition).map(async |partition| {
        let mut found = T::default();
        let marks = admin.watermarks(topic, partition).await?;
        let from = match since {
            Some(since) => admin.offset_at(topic, partition, since).await?,
            None => Offset::START,
        };
        if from.max(marks.start) >= marks.stable {
            return Ok(found);
        }
        let mut reader = log.reader(topic, partition, from).await?;
        while let Read::Records(records) = reader.read(READ).await? {
            let is_last = records.last().is_some_and(|last| last.offset >= marks.stable);
            let there = records.iter().take_while(|record| record.offset < marks.stable);
            there.for_each(|record| take(&mut found, Letter::of(record)));
            if is_last {
                break;
            }
        }
        Ok(found)
    });
    let found: Vec<Result<T, LogError>> = stream::iter(scans).buffer_unordered(AT_A_TIME).collect().await;
    found.into_iter().collect()
}

/// The letter at a place.
///
/// # Errors
/// Where the log cannot be read. None where there is no letter.
pub async fn letter_at<B: Backend>(
    log: &B,
    shelf: Shelf,
    partition: Partition,
    offset: Offset,
) -> Result<Option<Record>, LogError> {
    let admin = log.admin()?;
    let topics = admin.topics().await?;
    if topics.iter().any(|info| info.topic == shelf.topic() && partition.0 >= info.partitions) {
        return Ok(None);
    }
    let marks = admin.watermarks(&shelf.topic(), partition).await?;
    if offset < marks.start || offset >= marks.stable {
        return Ok(None);
    }
    let mut reader = log.reader(&shelf.topic(), partition, offset).await?;
    let Read::Records(records) = reader.read(Limit { records: 1, bytes: 1 }).await? else { return Ok(None) };
    Ok(records.into_iter().find(|record| record.offset == offset))
}

/// Every plan of these letters that is known, the oldest first.
///
/// # Errors
/// Where the log cannot be read.
pub async fn plans<B: Backend>(log: &B, shelf: Shelf) -> Result<Vec<Plan>, LogError> {
    // Asked first: it says so where the log does not answer, and a reader would wait.
    let topics = log.admin()?.topics().await?;
    if topics.iter().all(|info| info.topic != Topic::CONTROL) {
        return Err(LogError::fatal(format!("there is no topic {}; is log.topic_prefix right?", Topic::CONTROL)));
    }
    let mut plans = Vec::new();
    for (id, control) in commands::of_kind(log, KIND).await? {
        // Without knowing what it sends, a letter could be sent twice.
        let plan = control.and_then(|control| Plan::of_control(&control));
        plans.extend(plan.map_err(|error| LogError::fatal(format!("redrive plan {id}: {error}")))?);
    }
    plans.retain(|plan: &Plan| plan.shelf == shelf);
    plans.sort_by(|a, b| a.at.cmp(&b.at).then_with(|| a.id.cmp(&b.id)));
    Ok(plans)
}

/// What a plan is made of, beside itself.
#[derive(Debug, Default)]
pub struct Survey {
    pub spans: BTreeMap<Partition, Span>,
    pub letters: u64,
    /// Bytes of the original values.
    pub bytes: u64,
    pub oldest: Option<Timestamp>,
    pub newest: Option<Timestamp>,
    /// By destination, or source where there is none, and reason.
    pub groups: BTreeMap<(String, &'static str), u64>,
    /// Meant by the filter, and sent by an earlier plan: how many, by its id.
    pub planned_before: BTreeMap<String, u64>,
    /// Meant by the filter, and without a whole delivery: it could not be read when it was given up, or was too large.
    pub unsendable: u64,
}

impl Survey {
    fn add(&mut self, letter: &Letter) {
        let at = letter.offset;
        let span = self.spans.entry(letter.partition).or_insert(Span { first: at, until: at });
        span.until = at.just_after();
        self.letters += 1;
        self.bytes += letter.failure.value.as_ref().map_or(0, |value| value.len() as u64);
        self.oldest = [self.oldest, Some(letter.at)].into_iter().flatten().min();
        self.newest = self.newest.max(Some(letter.at));
        let failure = &letter.failure;
        let source = || failure.source.as_ref().map_or("-", |id| id.as_str());
        let whose = failure.destination.as_ref().map_or_else(source, |id| id.as_str()).to_owned();
        *self.groups.entry((whose, letter.failure.reason.as_str())).or_default() += 1;
    }

    fn merge(mut self, other: Self) -> Self {
        self.spans.extend(other.spans);
        self.letters += other.letters;
        self.bytes += other.bytes;
        self.oldest = [self.oldest, other.oldest].into_iter().flatten().min();
        self.newest = self.newest.max(other.newest);
        for (group, count) in other.groups {
            *self.groups.entry(group).or_default() += count;
        }
        for (plan, count) in other.planned_before {
            *self.planned_before.entry(plan).or_default() += count;
        }
        self.unsendable += other.unsendable;
        self
    }
}

/// Looks at what a plan with this filter would send now. `again`: also what an earlier plan sends.
///
/// # Errors
/// Where the log cannot be read.
pub async fn survey<B: Backend>(
    log: &B,
    shelf: Shelf,
    filter: &Filter,
    again: bool,
    earlier: &[Plan],
) -> Result<Survey, LogError> {
    let take = |survey: &mut Survey, letter: Result<Letter, Unreadable>| {
        let Ok(letter) = letter else { return };
        if !filter.matches(&letter) {
            return;
        }
        let planned = earlier.iter().find(|plan| !again && plan.covers(&letter));
        match planned {
            _ if !is_whole(shelf, &letter) => survey.unsendable += 1,
            Some(plan) => *survey.planned_before.entry(plan.id.clone()).or_default() += 1,
            None => survey.add(&letter),
        }
    };
    let surveys = scan(log, shelf, filter.since, take).await?;
    Ok(surveys.into_iter().fold(Survey::default(), Survey::merge))
}

/// How many letters a plan has sent, as its group has committed.
///
/// # Errors
/// Where the log does not answer.
pub async fn sent<B: Backend>(log: &B, plan: &Plan) -> Result<u64, LogError> {
    let committed = log.admin()?.committed(&group(plan), &plan.shelf.topic()).await?;
    Ok(committed.values().filter_map(|committed| committed.metadata.parse::<u64>().ok()).sum())
}

/// The group that carries a plan out, without prefix.
fn group(plan: &Plan) -> String {
    format!("laneway.redrive.{}", plan.id)
}

/// Makes a plan known. Says no where another one was made at the same moment: neither knows what the other sends.
///
/// # Errors
/// Where the log does not take it.
pub async fn announce<B: Backend>(log: &B, plan: &Plan) -> Result<bool, LogError> {
    store(log, plan).await?;
    let is_known = |other: &Plan| other.id == plan.id || plan.earlier.contains(&other.id);
    if plans(log, plan.shelf).await?.iter().all(is_known) {
        return Ok(true);
    }
    let gone = Addressed { value: None, ..commands::record(&plan.to_control()) };
    log.publisher()?.publish(vec![gone]).await?;
    Ok(false)
}

/// Writes a plan to `control`, in place of what was there of it.
///
/// # Errors
/// Where the log does not take it.
pub async fn store<B: Backend>(log: &B, plan: &Plan) -> Result<(), LogError> {
    log.publisher()?.publish(vec![commands::record(&plan.to_control())]).await
}

/// Removes the finished plans all of whose letters the log has deleted: they exclude nothing any more.
///
/// # Errors
/// Where the log does not answer.
pub async fn forget<B: Backend>(log: &B, plans: &[Plan]) -> Result<(), LogError> {
    let admin = log.admin()?;
    let mut starts: BTreeMap<Partition, Offset> = BTreeMap::new();
    let mut gone = Vec::new();
    for plan in plans.iter().filter(|plan| plan.finished_at.is_some()) {
        let mut is_gone = true;
        for (partition, span) in &plan.spans {
            let start = match starts.get(partition) {
                Some(start) => *start,
                None => {
                    let start = admin.watermarks(&plan.shelf.topic(), *partition).await?.start;
                    *starts.entry(*partition).or_insert(start)
                }
            };
            is_gone &= start >= span.until;
        }
        if is_gone {
            gone.push(Addressed { value: None, ..commands::record(&plan.to_control()) });
        }
    }
    if gone.is_empty() { Ok(()) } else { log.publisher()?.publish(gone).await }
}

#[cfg(test)]
mod tests;
