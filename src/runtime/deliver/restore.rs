//! Reading what the last owner of a partition wrote down.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;

use crate::clock::Clock;
use crate::log::{Admin, Assignment, Backend, Limit, LogError, Read, Reader};
use crate::model::codec;
use crate::model::progress::{
    Drain, KeyProgress, Lane, LaneProgress, Ledger, PartitionProgress, Progress, ProgressKey, Run,
};
use crate::model::record::Offset;
use crate::telemetry::events;

use super::DeliverSettings;
use super::repeats::Repeats;

const READ: Limit = Limit { records: 1_000, bytes: 4 << 20 };
/// Progress that the committed offset names is waited for so long before it counts as missing.
const PATIENCE: Duration = Duration::from_secs(5);
/// A transaction that is undecided for so long is told.
const OVERDUE: Duration = Duration::from_secs(30);
/// How often is looked whether the last owner's transaction has been decided.
const UNDECIDED: Duration = Duration::from_millis(20);

/// Where a partition stands.
#[derive(Debug, Default)]
pub struct Restored {
    /// Live reading begins here.
    pub base: Offset,
    /// And passes over these.
    pub runs: Vec<Run>,
    /// Records below it have been counted as taken.
    pub live: Offset,
    pub seq: u64,
    pub keys: Vec<KeyProgress>,
    pub lanes: Vec<LaneProgress>,
    pub drains: Vec<Drain>,
    pub ledgers: Vec<(Lane, Ledger)>,
    /// What lies before `base`.
    pub repeats: Repeats,
    /// Progress records that are not to be believed: these take their place in the first commit.
    pub corrections: Vec<(Bytes, Option<Bytes>)>,
}

/// What the progress says of a partition, read in the order in which it was written.
///
/// A commit's last record is the partition's own, and the committed offset names the commit that counts. What lies behind that
/// one belongs to a commit that does not count, or to a part of one: a log that forgets to end a transaction lets it be seen
/// in the end ([`crate::log::kafka`]).
#[derive(Debug, Default)]
pub(super) struct Found {
    own_key: Bytes,
    /// The number that the committed offset names.
    seq: Option<u64>,
    /// The last record of each key, up to the named commit; all of them as long as that has not come.
    records: BTreeMap<Bytes, Bytes>,
    is_named: bool,
    /// What was written behind it.
    behind: BTreeMap<Bytes, Option<Bytes>>,
    /// The highest number that was seen.
    highest: Option<u64>,
}

impl Found {
    pub fn new(assignment: &Assignment) -> Self {
        let own_key = ProgressKey::Partition.encode(assignment.partition).into();
        let committed = assignment.committed.as_ref();
        let seq = committed.and_then(|committed| committed.metadata.parse().ok());
        Self { own_key, seq, ..Self::default() }
    }

    pub fn take(&mut self, key: Bytes, value: Option<Bytes>) {
        let seq = value.as_ref().filter(|_| key == self.own_key).and_then(|value| match codec::decode(value) {
            Ok(Progress::Partition(stored)) => Some(stored.seq),
            _ => None,
        });
        self.highest = self.highest.max(seq);
        self.behind.insert(key, value);
        let is_named = seq.is_some() && seq == self.seq;
        if is_named || !self.is_named {
            for (key, value) in std::mem::take(&mut self.behind) {
                match value {
                    Some(value) => drop(self.records.insert(key, value)),
                    None => drop(self.records.remove(&key)),
                }
            }
        }
        self.is_named |= is_named;
    }

    /// The commit that the committed offset names is still to come.
    fn is_behind(&self) -> bool {
        !self.is_named && self.seq.is_some() && self.highest < self.seq
    }
}

/// Restores a partition from its progress.
///
/// The committed offset was read when the partition was assigned, and only stable ones count. Its metadata carries the `seq`
/// of the progress record written in the same transaction; the progress is read until it is certain that this record was
/// passed, however late its transaction's markers come.
pub async fn restore<B: Backend>(
    backend: &B,
    admin: &B::Admin,
    settings: &DeliverSettings,
    assignment: &Assignment,
    clock: &Clock,
) -> Result<Restored, LogError> {
    let began = clock.instant();
    let partition = assignment.partition;
    let end = admin.watermarks(&settings.progress, partition).await?.end;
    let mut tell_at = began + OVERDUE;
    loop {
        let stable = admin.watermarks(&settings.progress, partition).await?.stable;
        if stable >= end {
            break;
        }
        if clock.instant() >= tell_at {
            // Going on would be to believe a part of the progress. The log ends what was our own.
            events::undecided(&settings.progress, partition, &stable);
            tell_at += OVERDUE;
        }
        clock.sleep(UNDECIDED).await;
    }
    let mut reader = backend.reader(&settings.progress, partition, Offset::START).await?;
    let (mut found, mut bytes) = (Found::new(assignment), 0);
    if end > Offset::START {
        loop {
            while let Read::Records(records) = reader.read(READ).await? {
                for record in records {
                    bytes += record.weight();
                    if let Some(key) = record.key {
                        found.take(key, record.value);
                    }
                }
            }
            // A replica that has just taken over may not show the newest records yet.
            if !found.is_behind() || began.elapsed() > PATIENCE {
                break;
            }
        }
    }
    let mut restored = judge(found, assignment, settings)?;
    restored.repeats = Repeats::new(settings.repeats);
    let input = (&settings.input, partition);
    restored.repeats.look_back((backend, admin), input, restored.base).await?;
    events::restored(settings.stage, partition, bytes, restored.keys.len(), began.elapsed());
    Ok(restored)
}

/// Believes the progress up to the commit that the committed offset names.
pub(super) fn judge(found: Found, assignment: &Assignment, settings: &DeliverSettings) -> Result<Restored, LogError> {
    let Found { own_key, seq, records, is_named, behind, highest } = found;
    let partition = assignment.partition;
    let stored = match records.get(&own_key).map(codec::decode::<Progress>) {
        Some(Ok(Progress::Partition(stored))) => Some(stored),
        Some(Ok(_)) | None => None,
        Some(Err(error)) => {
            return Err(unreadable(settings, partition, &String::from_utf8_lossy(&own_key), &error));
        }
    };
    // Numbers go on above all that were seen, so that an old record is never taken for a new one.
    let highest = highest.max(seq).unwrap_or(0);
    if let Some(stored) = stored.as_ref().filter(|_| is_named) {
        if !behind.is_empty() {
            events::progress_behind(settings.stage, partition, behind.len());
        }
        let corrections = behind.into_keys().filter(|key| *key != own_key);
        let corrections = corrections.map(|key| (key.clone(), records.get(&key).cloned())).collect();
        let restored = believe(records, stored.clone(), assignment, settings)?;
        return Ok(Restored { seq: highest, corrections, ..restored });
    }
    let committed = assignment.committed.as_ref();
    let from = committed.map_or(Offset::START, |committed| committed.offset);
    if committed.is_some() || stored.is_some() {
        events::progress_missing(settings.stage, partition);
    }
    let corrections = records.into_keys().map(|key| (key, None)).collect();
    Ok(Restored { base: from, live: from, seq: highest, corrections, ..Restored::default() })
}

fn believe(
    found: BTreeMap<Bytes, Bytes>,
    stored: PartitionProgress,
    assignment: &Assignment,
    settings: &DeliverSettings,
) -> Result<Restored, LogError> {
    let PartitionProgress { seq, base, runs, live, drains, .. } = stored;
    let mut restored = Restored { base, runs, live, seq, drains, ..Restored::default() };
    for (key, value) in found {
        match codec::decode::<Progress>(&value) {
            Ok(Progress::Key(key)) => restored.keys.push(key),
            Ok(Progress::Ledger(lane, ledger)) => restored.ledgers.push((lane, ledger)),
            Ok(Progress::Lane(lane)) => restored.lanes.push(lane),
            Ok(Progress::Partition(_)) => {}
            Err(error) => {
                let key = String::from_utf8_lossy(&key);
                return Err(unreadable(settings, assignment.partition, &key, &error));
            }
        }
    }
    Ok(restored)
}

/// Progress that cannot be read was written by a newer version, or by somebody else: guessing would lose or repeat.
fn unreadable(
    settings: &DeliverSettings,
    partition: crate::model::record::Partition,
    key: &str,
    error: &codec::Unreadable,
) -> LogError {
    LogError::fatal(format!(
        "the progress record {key} in {} partition {partition} cannot be read: {error}",
        settings.progress
    ))
}
