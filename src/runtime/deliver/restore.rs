//! Reading what the last owner of a partition wrote down.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;

use crate::clock::{Clock, Timestamp};
use crate::log::{Admin, Assignment, Backend, Committed, Limit, LogError, Read, Reader};
use crate::model::codec;
use crate::model::progress::{
    Drain, KeyProgress, Lane, LaneProgress, Ledger, PartitionProgress, Progress, ProgressKey, Run,
};
use crate::model::record::{Offset, Partition, Topic};
use crate::telemetry::events;

use super::DeliverSettings;
use super::reading::AGAIN;
use super::repeats::Repeats;

const READ: Limit = Limit { records: 1_000, bytes: 4 << 20 };
/// Progress that the committed offset names is waited for so long before it counts as missing.
const PATIENCE: Duration = Duration::from_secs(5);
/// A transaction that is undecided for so long is told.
const OVERDUE: Duration = Duration::from_secs(30);
/// A log that ends before what was read of it is looked at again for so long.
const CUT_TIMEOUT: Duration = Duration::from_secs(20);
/// Where a log has lost what was read last, records from so long before the last commit on are read again: clocks of those who wrote them
/// may differ by as much.
const CUT_MARGIN: Duration = Duration::from_secs(3_600);
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
    /// What lies before `base`, and where an operator has put the position: what is below that is nobody's any more.
    pub repeats: Repeats,
    pub floor: Option<Offset>,
    /// Progress records that are not to be believed: these take their place in the first commit.
    pub corrections: Vec<(Bytes, Option<Bytes>)>,
}

impl Restored {
    /// Nothing at or above `from` is known any more: other records may lie there now. What marks say below it holds.
    fn cut(mut self, partition: Partition, from: Offset) -> Self {
        let clipped = |runs: Vec<Run>| -> Vec<Run> {
            let below = runs.into_iter().filter(|run| run.first < from);
            below.map(|run| Run { last: run.last.min(from.back(1)), ..run }).collect()
        };
        (self.base, self.live) = (self.base.min(from), from);
        self.runs = clipped(std::mem::take(&mut self.runs));
        let (lanes, lost_lanes) = self.lanes.into_iter().partition(|lane| lane.tail < from);
        let (keys, lost_keys) = self.keys.into_iter().partition(|key| key.lowest().is_some_and(|lowest| lowest < from));
        let (lost_lanes, lost_keys): (Vec<LaneProgress>, Vec<KeyProgress>) = (lost_lanes, lost_keys);
        let lanes: Vec<LaneProgress> = lanes;
        self.lanes = lanes.into_iter().map(|lane| LaneProgress { done: clipped(lane.done), ..lane }).collect();
        let keys: Vec<KeyProgress> = keys;
        self.keys = keys
            .into_iter()
            .map(|mut key| {
                key.followers.retain(|offset| *offset < from);
                key.parked = key.parked.filter(|parked| *parked < from);
                key
            })
            .collect();
        let lanes = lost_lanes.iter().map(|lane| ProgressKey::Lane(&lane.lane).encode(partition));
        let keys = lost_keys.iter().map(|key| ProgressKey::Key(&key.lane, key.user.as_str()).encode(partition));
        self.corrections.extend(lanes.chain(keys).map(|key| (key.into(), None)));
        self
    }
}

/// What stands with a committed position: the number of its commit and, after `from`, where an operator has put the position last. Nothing
/// stands there as long as only the operator has.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Note {
    seq: Option<u64>,
    floor: Option<Offset>,
}

impl Note {
    fn parse(committed: &Committed) -> Self {
        let mut words = committed.metadata.split(' ');
        let seq = words.next().and_then(|word| word.parse().ok());
        match (words.next(), words.next()) {
            (Some("from"), Some(floor)) => Self { seq, floor: Offset::parse(floor) },
            _ if committed.metadata.is_empty() => Self { seq: None, floor: Some(committed.offset) },
            _ => Self { seq, floor: None },
        }
    }

    pub fn text(seq: u64, floor: Option<Offset>) -> String {
        floor.map_or_else(|| seq.to_string(), |floor| format!("{seq} from {floor}"))
    }
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
    /// When the partition's own record was written that counts, or the last one.
    written_at: Option<Timestamp>,
    /// What was written behind it.
    behind: BTreeMap<Bytes, Option<Bytes>>,
    /// The highest number that was seen.
    highest: Option<u64>,
}

impl Found {
    pub fn new(assignment: &Assignment) -> Self {
        let own_key = ProgressKey::Partition.encode(assignment.partition).into();
        let committed = assignment.committed.as_ref();
        let seq = committed.and_then(|committed| Note::parse(committed).seq);
        Self { own_key, seq, ..Self::default() }
    }

    pub fn take(&mut self, key: Bytes, value: Option<Bytes>, at: Timestamp) {
        let seq = value.as_ref().filter(|_| key == self.own_key).and_then(|value| match codec::decode(value) {
            Ok(Progress::Partition(stored)) => Some(stored.seq),
            _ => None,
        });
        self.highest = self.highest.max(seq);
        self.behind.insert(key, value);
        let is_named = seq.is_some() && seq == self.seq;
        if seq.is_some() && (is_named || !self.is_named) {
            self.written_at = Some(at);
        }
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
                        found.take(key, record.value, record.timestamp);
                    }
                }
            }
            // A replica that has just taken over may not show the newest records yet.
            if !found.is_behind() || began.elapsed() > PATIENCE {
                break;
            }
        }
    }
    let written_at = found.written_at;
    let mut restored = judge(found, assignment, settings)?;
    if let Some(end) = cut_at(admin, settings, partition, restored.live, clock).await? {
        let from = match written_at {
            Some(at) => admin.offset_at(&settings.input, partition, at.minus(CUT_MARGIN)).await?.min(end),
            None => admin.watermarks(&settings.input, partition).await?.start,
        };
        events::log_cut(settings.stage, partition, &restored.live, &end, &from);
        restored = restored.cut(partition, from);
    }
    if settings.repeats > 0 {
        restored.floor = assignment.committed.as_ref().and_then(|committed| Note::parse(committed).floor);
        let input = (&settings.input, partition);
        restored.repeats = known_before((backend, admin), input, &restored, settings.repeats, clock).await?;
    }
    events::restored(settings.stage, partition, bytes, restored.keys.len(), began.elapsed());
    Ok(restored)
}

/// Where the log ends, if that is before what was read of it: it has lost records, or the topic was created anew. A replica that has just
/// taken over may not show the newest records yet, so it is waited for.
async fn cut_at<A: Admin>(
    admin: &A,
    settings: &DeliverSettings,
    partition: Partition,
    live: Offset,
    clock: &Clock,
) -> Result<Option<Offset>, LogError> {
    let until = clock.instant() + CUT_TIMEOUT;
    loop {
        let end = admin.watermarks(&settings.input, partition).await?.end;
        if live <= end {
            return Ok(None);
        }
        if clock.instant() >= until {
            return Ok(Some(end));
        }
        clock.sleep(AGAIN).await;
    }
}

/// What lies before the place where live reading begins. A log that cannot be looked at there keeps nobody from going on: what it does not
/// tell is sent twice at most.
async fn known_before<B: Backend>(
    log: (&B, &B::Admin),
    input: (&Topic, Partition),
    restored: &Restored,
    window: usize,
    clock: &Clock,
) -> Result<Repeats, LogError> {
    let until = clock.instant() + PATIENCE;
    loop {
        let mut repeats = Repeats::new(window);
        match repeats.look_back(log, input, restored.floor, restored.base).await {
            Err(LogError::Transient(error)) if clock.instant() >= until => {
                tracing::warn!(partition = input.1.0, %error, "what lies before is not known, and may be sent twice");
                return Ok(repeats);
            }
            Err(LogError::Transient(_)) => clock.sleep(AGAIN).await,
            looked => return looked.map(|()| repeats),
        }
    }
}

/// Believes the progress up to the commit that the committed offset names.
pub(super) fn judge(found: Found, assignment: &Assignment, settings: &DeliverSettings) -> Result<Restored, LogError> {
    let Found { own_key, seq, records, is_named, behind, highest, written_at: _ } = found;
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
    let (mut corrections, mut ledgers) = (Vec::new(), Vec::new());
    for (key, value) in records {
        // What has ended stays counted. What was pending is read, and counted as taken, anew.
        let kept = match codec::decode::<Progress>(&value) {
            // Without a committed offset it is of a commit that does not count.
            Ok(Progress::Ledger(lane, ledger)) if committed.is_some() => {
                Some((lane, Ledger { taken: ledger.ended(), open_since: None, ..ledger }))
            }
            Ok(_) | Err(_) => None,
        };
        let value = kept.as_ref().map(|(lane, ledger)| codec::encode(&Progress::Ledger(lane.clone(), *ledger)).into());
        corrections.push((key, value));
        ledgers.extend(kept);
    }
    Ok(Restored { base: from, live: from, seq: highest, corrections, ledgers, ..Restored::default() })
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
fn unreadable(settings: &DeliverSettings, partition: Partition, key: &str, error: &codec::Unreadable) -> LogError {
    LogError::fatal(format!(
        "the progress record {key} in {} partition {partition} cannot be read: {error}",
        settings.progress
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_tells_its_commit_and_where_an_operator_has_put_it() {
        let note = |offset: u128, metadata: &str| {
            Note::parse(&Committed { offset: Offset::new(offset), metadata: metadata.to_owned() })
        };
        let by_hand = note(7, "");
        assert_eq!(by_hand, Note { seq: None, floor: Some(Offset::new(7)) });
        assert_eq!(note(9, &Note::text(3, by_hand.floor)), Note { seq: Some(3), floor: Some(Offset::new(7)) });
        assert_eq!(note(9, &Note::text(3, None)), Note { seq: Some(3), floor: None });
        let place = Some(Offset::of_entry(1, 2, 3));
        assert_eq!(note(9, &Note::text(4, place)).floor, place);
        assert_eq!(note(9, "x"), Note::default());
    }

    #[test]
    fn ledgers_outlive_progress_that_is_missing() {
        let lane = Lane { destination: "d".into(), replay: None };
        let ledger = Ledger { taken: 9, delivered: 5, aborted: 1, ..Ledger::default() };
        let key = Bytes::from(ProgressKey::Ledger(&lane).encode(Partition(0)));
        let restored = |committed: Option<Committed>| {
            let assignment = Assignment { partition: Partition(0), epoch: crate::model::record::Epoch(1), committed };
            let mut found = Found::new(&assignment);
            found.take(
                key.clone(),
                Some(codec::encode(&Progress::Ledger(lane.clone(), ledger)).into()),
                Timestamp::default(),
            );
            judge(found, &assignment, &super::super::partition::test_settings()).expect("readable")
        };
        let reset = restored(Some(Committed { offset: Offset::new(40), metadata: String::new() }));
        let kept = Ledger { taken: 6, ..ledger };
        assert_eq!((reset.live, reset.ledgers), (Offset::new(40), vec![(lane.clone(), kept)]));
        let written = codec::encode(&Progress::Ledger(lane.clone(), kept)).into();
        assert_eq!(reset.corrections, [(key.clone(), Some(written))]);
        let never = restored(None);
        assert_eq!((never.ledgers, never.corrections), (Vec::new(), vec![(key.clone(), None)]));
    }

    #[test]
    fn what_was_known_above_a_cut_is_forgotten() {
        let lane = |destination: &str| Lane { destination: destination.into(), replay: None };
        let stored = |destination: &str, tail: u128, done: &[(u128, u128)]| LaneProgress {
            lane: lane(destination),
            tail: Offset::new(tail),
            done: runs(done),
            pending: 0,
            pending_bytes: 0,
            oldest: Timestamp::default(),
        };
        fn runs(of: &[(u128, u128)]) -> Vec<Run> {
            of.iter().map(|(first, last)| Run { first: Offset::new(*first), last: Offset::new(*last) }).collect()
        }
        let key = |user: &str, followers: &[u128], parked: Option<u128>| KeyProgress {
            lane: lane("d"),
            user: user.into(),
            head: None,
            followers: followers.iter().copied().map(Offset::new).collect(),
            parked: parked.map(Offset::new),
        };
        let restored = Restored {
            base: Offset::new(30),
            live: Offset::new(90),
            runs: runs(&[(32, 40), (45, 60), (70, 80)]),
            lanes: vec![stored("a", 10, &[(11, 12), (48, 55)]), stored("b", 50, &[])],
            keys: vec![key("u", &[20, 49, 50], Some(70)), key("v", &[], Some(40)), key("w", &[60], None)],
            ..Restored::default()
        };
        let cut = restored.cut(Partition(2), Offset::new(50));
        assert_eq!((cut.base, cut.live), (Offset::new(30), Offset::new(50)));
        assert_eq!(cut.runs, runs(&[(32, 40), (45, 49)]));
        assert_eq!(cut.lanes, [stored("a", 10, &[(11, 12), (48, 49)])]);
        assert_eq!(cut.keys, [key("u", &[20, 49], None), key("v", &[], Some(40))]);
        let tombstones: Vec<Bytes> = cut.corrections.into_iter().map(|(key, _)| key).collect();
        let names = [
            ProgressKey::Lane(&lane("b")).encode(Partition(2)),
            ProgressKey::Key(&lane("d"), "w").encode(Partition(2)),
        ];
        assert_eq!(tombstones, names.map(Bytes::from));
    }
}
