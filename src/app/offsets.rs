//! Where a stage's group stands in its topic, and putting it elsewhere.
//!
//! For the processor a position says what is read next. For a router it also names the progress that counts: a position that
//! is set here names none, so a router that starts from it forgets what was pending below it, and delivers again what lies above
//! it, done or not. The reporter's positions are in the store, with the topic that they belong to.

use std::collections::BTreeMap;

use super::engine::Stage;
use super::job_status::{self, Stored, StoredError};
use super::standing::Standing;
use crate::clock::Timestamp;
use crate::log::{Admin, Backend, Committed, LogError, Watermarks};
use crate::model::record::{Offset, Partition, Topic};
use crate::store::Mismatch;
use crate::store::job_status::JobStatusStore;

/// One partition of a stage's topic.
#[derive(Clone, Debug)]
pub struct Place {
    pub committed: Option<Committed>,
    pub marks: Watermarks,
    /// Of a router: what it has taken and not ended.
    pub pending: Option<u64>,
    /// Why the stored position is none of this log.
    pub problem: Option<Mismatch>,
}

/// Where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Earliest,
    Latest,
    /// Where it is; a group without a position gets the earliest one.
    Current,
    /// This offset, in every partition that is meant.
    Offset(Offset),
    /// So many offsets on; back where it is negative. Offsets have gaps.
    Shift(i64),
    /// The first record that was written then or later.
    Time(Timestamp),
    /// An offset for each partition.
    Each(BTreeMap<Partition, Offset>),
}

/// A partition whose position is to be set.
#[derive(Clone, Debug)]
pub struct Step {
    pub place: Place,
    pub to: Offset,
    /// What was asked for lies outside the log: it is the nearest offset inside.
    pub is_clamped: bool,
}

/// Looks where a stage stands. `standing`: what the routers have committed. `stored`: the reporter's positions; none where the store
/// does not tell them.
///
/// # Errors
/// Where the log cannot be asked, or the stage's topic is not there.
pub async fn look<B: Backend>(
    log: &B,
    stage: Stage,
    topic: &Topic,
    standing: &Standing,
    stored: Option<&Stored>,
) -> Result<BTreeMap<Partition, Place>, LogError> {
    let admin = log.admin()?;
    let infos = admin.topics().await?;
    let Some(info) = infos.iter().find(|info| info.topic == *topic) else {
        return Err(LogError::fatal(format!("there is no topic {topic}; `laneway topics apply` creates it")));
    };
    let mut committed = admin.committed(&stage.group(), topic).await?;
    let mut problems = BTreeMap::new();
    if let Some(stored) = stored {
        committed.clear();
        for (partition, (position, mismatch)) in stored {
            committed.insert(*partition, Committed { offset: position.offset, metadata: String::new() });
            mismatch.clone().into_iter().for_each(|mismatch| drop(problems.insert(*partition, mismatch)));
        }
    }
    let mut places = BTreeMap::new();
    for partition in (0..info.partitions).map(Partition) {
        let marks = admin.watermarks(topic, partition).await?;
        let taken = standing.partitions.get(&partition).filter(|_| stage == Stage::Router);
        let pending = taken.map(|taken| taken.pending);
        let problem = problems.remove(&partition);
        places.insert(partition, Place { committed: committed.remove(&partition), marks, pending, problem });
    }
    Ok(places)
}

/// What a reset would do to each of these partitions.
///
/// # Errors
/// Where the log cannot be asked for a time.
pub async fn plan<B: Backend>(
    log: &B,
    topic: &Topic,
    places: BTreeMap<Partition, Place>,
    target: &Target,
) -> Result<BTreeMap<Partition, Step>, LogError> {
    let admin = log.admin()?;
    let mut steps = BTreeMap::new();
    for (partition, place) in places {
        let marks = place.marks;
        // An offset of another log is no place in this one.
        let is_foreign = matches!(place.problem, Some(Mismatch::AnotherTopic { .. }));
        let committed = place.committed.as_ref().filter(|_| !is_foreign);
        let at = committed.map_or(marks.start, |committed| committed.offset);
        let wanted = match target {
            Target::Earliest => marks.start,
            Target::Latest => marks.stable,
            Target::Current => at,
            Target::Offset(offset) => *offset,
            Target::Shift(by) => shifted(at, *by),
            Target::Time(time) => admin.offset_at(topic, partition, *time).await?,
            Target::Each(offsets) => match offsets.get(&partition) {
                Some(offset) => *offset,
                None => continue,
            },
        };
        let to = wanted.clamp(marks.start, marks.stable.max(marks.start));
        steps.insert(partition, Step { place, to, is_clamped: to != wanted });
    }
    Ok(steps)
}

fn shifted(at: Offset, by: i64) -> Offset {
    let distance = by.unsigned_abs();
    if by < 0 { at.back(distance) } else { at.forward(distance) }
}

/// Sets the positions, and looks whether they are set.
///
/// # Errors
/// [`LogError::Fatal`] while the stage runs anywhere, or where another position is found afterwards.
pub async fn execute<B: Backend>(
    log: &B,
    stage: Stage,
    topic: &Topic,
    steps: &BTreeMap<Partition, Step>,
) -> Result<(), LogError> {
    let admin = log.admin()?;
    let to: BTreeMap<Partition, Offset> = steps.iter().map(|(partition, step)| (*partition, step.to)).collect();
    admin.reset(&stage.group(), topic, &to).await?;
    let found = admin.committed(&stage.group(), topic).await?;
    for (partition, wanted) in to {
        let there = found.get(&partition).map(|committed| committed.offset);
        if there != Some(wanted) {
            let there = there.map_or_else(|| "none".to_owned(), |offset| offset.to_string());
            return Err(LogError::fatal(format!(
                "partition {partition} was set to {wanted}, and its position is {there}"
            )));
        }
    }
    Ok(())
}

/// Sets the reporter's positions in the store, as ones of this log. A reporter that runs goes on from them within seconds: what it
/// had under way is refused by the store.
///
/// # Errors
/// Where store or log cannot be asked.
pub async fn execute_stored<B: Backend>(
    log: &B,
    store: &JobStatusStore,
    topic: &Topic,
    steps: &BTreeMap<Partition, Step>,
) -> Result<(), StoredError> {
    let topic_id = log.admin()?.topic_id(topic).await?;
    let to: BTreeMap<Partition, Offset> = steps.iter().map(|(partition, step)| (*partition, step.to)).collect();
    Ok(store.store().reset(&job_status::group(), &topic_id, &to).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::log::embedded::Embedded;
    use crate::log::embedded::memory::Faults;

    #[tokio::test]
    async fn each_target_lies_inside_the_log() {
        let log = Embedded::in_memory(Faults::none(), Clock::system()).await.expect("a log");
        let at = |start: u128, stable: u128, committed: Option<u128>| Place {
            committed: committed.map(|offset| Committed { offset: Offset::new(offset), metadata: "m".into() }),
            marks: Watermarks { start: Offset::new(start), stable: Offset::new(stable), end: Offset::new(stable + 5) },
            pending: None,
            problem: None,
        };
        let places = BTreeMap::from([(Partition(0), at(10, 50, Some(30))), (Partition(1), at(0, 20, None))]);
        let each = BTreeMap::from([(Partition(1), Offset::new(7))]);
        for (target, expected) in [
            (Target::Earliest, vec![(0, 10, false), (1, 0, false)]),
            (Target::Latest, vec![(0, 50, false), (1, 20, false)]),
            (Target::Current, vec![(0, 30, false), (1, 0, false)]),
            (Target::Offset(Offset::new(25)), vec![(0, 25, false), (1, 20, true)]),
            (Target::Shift(-25), vec![(0, 10, true), (1, 0, false)]),
            (Target::Shift(15), vec![(0, 45, false), (1, 15, false)]),
            (Target::Each(each), vec![(1, 7, false)]),
        ] {
            let steps = plan(&log, &Topic::EVENTS, places.clone(), &target).await.expect("a plan");
            let found: Vec<(u32, u128, bool)> =
                steps.iter().map(|(partition, step)| (partition.0, step.to.raw(), step.is_clamped)).collect();
            assert_eq!(found, expected, "{target:?}");
        }
    }
}
