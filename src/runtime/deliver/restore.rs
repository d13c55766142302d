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
    /// Keys of progress records that are not to be believed: removed in the first commit.
    pub stale: Vec<Bytes>,
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
    let mut found: BTreeMap<Bytes, Bytes> = BTreeMap::new();
    let (mut bytes, mut last) = (0, None);
    if end > Offset::START {
        loop {
            while let Read::Records(records) = reader.read(READ).await? {
                for record in records {
                    bytes += record.weight();
                    last.clone_from(&record.key);
                    match (record.key, record.value) {
                        (Some(key), Some(value)) => drop(found.insert(key, value)),
                        (Some(key), None) => drop(found.remove(&key)),
                        (None, _) => {}
                    }
                }
            }
            // A replica that has just taken over may not show the newest records yet.
            let is_behind = stored_seq(&found, assignment) < committed_seq(assignment);
            if !is_behind || began.elapsed() > PATIENCE {
                break;
            }
        }
    }
    let restored = judge(found, last, assignment, settings)?;
    events::restored(settings.stage, partition, bytes, restored.keys.len(), began.elapsed());
    Ok(restored)
}

fn committed_seq(assignment: &Assignment) -> Option<u64> {
    assignment.committed.as_ref().and_then(|committed| committed.metadata.parse().ok())
}

fn stored_seq(found: &BTreeMap<Bytes, Bytes>, assignment: &Assignment) -> Option<u64> {
    let own_key = ProgressKey::Partition.encode(assignment.partition);
    match codec::decode::<Progress>(found.get(own_key.as_bytes())?) {
        Ok(Progress::Partition(stored)) => Some(stored.seq),
        _ => None,
    }
}

/// Believes the progress if its partition record is the one that the committed offset names, and was written last: it is the
/// last one of each commit, so a part of a commit lies behind it otherwise. `last`: the key of the last record of all.
pub(super) fn judge(
    found: BTreeMap<Bytes, Bytes>,
    last: Option<Bytes>,
    assignment: &Assignment,
    settings: &DeliverSettings,
) -> Result<Restored, LogError> {
    let partition = assignment.partition;
    let own_key = ProgressKey::Partition.encode(partition);
    let stored = match found.get(own_key.as_bytes()).map(codec::decode::<Progress>) {
        Some(Ok(Progress::Partition(stored))) => Some(stored),
        Some(Ok(_)) | None => None,
        Some(Err(error)) => return Err(unreadable(settings, partition, &own_key, &error)),
    };
    let committed = assignment.committed.as_ref();
    let seq = committed_seq(assignment);
    let is_whole = last.is_some_and(|last| last == own_key.as_bytes());
    match stored {
        Some(stored) if seq == Some(stored.seq) && is_whole => believe(found, stored, assignment, settings),
        stored => {
            let from = committed.map_or(Offset::START, |committed| committed.offset);
            if committed.is_some() || stored.is_some() {
                events::progress_missing(settings.stage, partition);
            }
            // Numbers go on above the stale ones, so that an old record is never taken for a new one.
            let seq = stored.map_or(0, |stored| stored.seq).max(seq.unwrap_or(0));
            Ok(Restored { base: from, live: from, seq, stale: found.into_keys().collect(), ..Restored::default() })
        }
    }
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
