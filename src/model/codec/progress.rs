//! `schemas/progress.avsc`. Offsets are big-endian without leading zero bytes, since a backend's offsets may need more than
//! 64 bits. A list of offsets is the first one and then the steps to the next, a list of runs the steps from end to start and
//! the lengths, all LEB128: a held key's thousand followers fit in a kilobyte.

use std::time::Duration;

use super::avro::{Reader, Unreadable, Writer};
use super::{KnownSchema, PROGRESS, Value};
use crate::clock::Timestamp;
use crate::model::progress::{
    Drain, Head, KeyProgress, Lane, LaneProgress, Ledger, PartitionProgress, Progress, Run, Target,
};
use crate::model::record::Offset;

impl Value for Progress {
    fn schema() -> &'static KnownSchema {
        &PROGRESS
    }

    fn write(&self, out: &mut Writer) {
        match self {
            Progress::Partition(partition) => {
                out.long(0);
                write_partition(partition, out);
            }
            Progress::Lane(lane) => {
                out.long(1);
                write_lane(&lane.lane, out);
                write_offset(lane.tail, out);
                write_runs(&lane.done, out);
                out.count(lane.pending);
                out.count(lane.pending_bytes);
                out.long(lane.oldest.micros());
            }
            Progress::Key(key) => {
                out.long(2);
                write_key(key, out);
            }
            Progress::Ledger(lane, ledger) => {
                out.long(3);
                write_lane(lane, out);
                for value in [ledger.taken, ledger.delivered, ledger.filtered, ledger.aborted, ledger.drained] {
                    out.count(value);
                }
                out.option(ledger.open_since, |out, since| out.long(since.micros()));
            }
        }
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, Unreadable> {
        Ok(match input.long()? {
            0 => Progress::Partition(read_partition(input)?),
            1 => Progress::Lane(LaneProgress {
                lane: read_lane(input)?,
                tail: read_offset(input)?,
                done: read_runs(input)?,
                pending: input.count()?,
                pending_bytes: input.count()?,
                oldest: Timestamp::from_micros(input.long()?),
            }),
            2 => Progress::Key(read_key(input)?),
            3 => Progress::Ledger(
                read_lane(input)?,
                Ledger {
                    taken: input.count()?,
                    delivered: input.count()?,
                    filtered: input.count()?,
                    aborted: input.count()?,
                    drained: input.count()?,
                    open_since: input.option(|input| Ok(Timestamp::from_micros(input.long()?)))?,
                },
            ),
            other => return input.fail(format!("no branch {other} in progress")),
        })
    }
}

fn write_partition(partition: &PartitionProgress, out: &mut Writer) {
    out.count(partition.seq);
    out.count(partition.epoch);
    write_offset(partition.base, out);
    write_runs(&partition.runs, out);
    write_offset(partition.live, out);
    out.boolean(partition.clean_stop);
    out.array(&partition.drains, |out, drain| {
        out.text(&drain.id);
        out.text(&drain.target.to_string());
        write_offset(drain.bound, out);
    });
}

fn read_partition(input: &mut Reader<'_>) -> Result<PartitionProgress, Unreadable> {
    Ok(PartitionProgress {
        seq: input.count()?,
        epoch: input.count()?,
        base: read_offset(input)?,
        runs: read_runs(input)?,
        live: read_offset(input)?,
        clean_stop: input.boolean()?,
        drains: input
            .array(|input| Ok(Drain { id: input.text()?, target: read_target(input)?, bound: read_offset(input)? }))?,
    })
}

fn write_key(key: &KeyProgress, out: &mut Writer) {
    write_lane(&key.lane, out);
    out.text(key.user.as_str());
    out.option(key.head.as_ref(), |out, head| {
        write_offset(head.offset, out);
        out.long(i64::from(head.attempts));
        out.long(i64::try_from(head.spent.as_micros()).unwrap_or(i64::MAX));
        out.long(head.first_failed_at.micros());
        out.long(head.next_try_at.micros());
        out.long(i64::from(head.first_code));
        out.text(&head.first_message);
        out.long(i64::from(head.last_code));
        out.text(&head.last_message);
    });
    let mut list = Writer::with_capacity(key.followers.len() * 2);
    let mut last = 0;
    for follower in &key.followers {
        list.unsigned(follower.raw() - last);
        last = follower.raw();
    }
    out.bytes(&list.into_bytes());
    out.option(key.parked, |out, parked| write_offset(parked, out));
}

fn read_key(input: &mut Reader<'_>) -> Result<KeyProgress, Unreadable> {
    Ok(KeyProgress {
        lane: read_lane(input)?,
        user: input.text()?,
        head: input.option(|input| {
            Ok(Head {
                offset: read_offset(input)?,
                attempts: input.count()?,
                spent: Duration::from_micros(input.count()?),
                first_failed_at: Timestamp::from_micros(input.long()?),
                next_try_at: Timestamp::from_micros(input.long()?),
                first_code: input.count()?,
                first_message: input.text()?,
                last_code: input.count()?,
                last_message: input.text()?,
            })
        })?,
        followers: {
            let list = input.bytes()?;
            let mut list = Reader::new(&list, 0);
            let (mut followers, mut last) = (Vec::new(), 0_u128);
            while !list.is_empty() {
                last = step(&mut list, last)?;
                followers.push(Offset::new(last));
            }
            followers
        },
        parked: input.option(read_offset)?,
    })
}

fn write_lane(lane: &Lane, out: &mut Writer) {
    out.text(lane.destination.as_str());
    out.option(lane.replay.as_ref(), |out, replay| out.text(replay));
}

fn read_lane(input: &mut Reader<'_>) -> Result<Lane, Unreadable> {
    Ok(Lane { destination: input.text()?, replay: input.option(Reader::text)? })
}

fn read_target(input: &mut Reader<'_>) -> Result<Target, Unreadable> {
    let text: String = input.text()?;
    Target::parse(&text).map_or_else(|| input.fail(format!("no target: {text}")), Ok)
}

fn write_offset(offset: Offset, out: &mut Writer) {
    let bytes = offset.raw().to_be_bytes();
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    out.bytes(&bytes[zeros..]);
}

fn read_offset(input: &mut Reader<'_>) -> Result<Offset, Unreadable> {
    let bytes = input.bytes()?;
    if bytes.len() > 16 {
        return input.fail("an offset of more than 16 bytes");
    }
    Ok(Offset::new(bytes.iter().fold(0, |value, byte| value << 8 | u128::from(*byte))))
}

fn write_runs(runs: &[Run], out: &mut Writer) {
    let mut list = Writer::with_capacity(runs.len() * 3);
    let mut last = 0;
    for run in runs {
        list.unsigned(run.first.raw() - last);
        list.unsigned(run.last.raw() - run.first.raw());
        last = run.last.raw();
    }
    out.bytes(&list.into_bytes());
}

fn read_runs(input: &mut Reader<'_>) -> Result<Vec<Run>, Unreadable> {
    let list = input.bytes()?;
    let mut list = Reader::new(&list, 0);
    let (mut runs, mut last) = (Vec::new(), 0_u128);
    while !list.is_empty() {
        let first = step(&mut list, last)?;
        last = step(&mut list, first)?;
        runs.push(Run { first: Offset::new(first), last: Offset::new(last) });
    }
    Ok(runs)
}

pub(super) fn step(list: &mut Reader<'_>, from: u128) -> Result<u128, Unreadable> {
    let by = list.unsigned()?;
    from.checked_add(by).map_or_else(|| list.fail("an offset list runs over"), Ok)
}
