//! Reading what is not in memory: single records at their offsets, and stretches for cursors.

use std::collections::HashMap;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::clock::{Clock, Timestamp};
use crate::log::{Admin, Backend, Limit, LogError, Read, Reader};
use crate::model::command::Command;
use crate::model::progress::Drain;
use crate::model::record::{Offset, Partition, Record, Topic};
use crate::telemetry::metrics::metrics;

use super::partition::{CursorId, KeyId};

/// What failed for the moment is tried again after this.
pub const AGAIN: Duration = Duration::from_millis(500);
/// A cursor reads so much at a time, and keeps what its lanes have no room for.
const STRETCH: Limit = Limit { records: 500, bytes: 512 << 10 };

/// What to read.
pub enum Wanted {
    Single {
        key: KeyId,
        offset: Offset,
    },
    Stretch {
        cursor: CursorId,
        from: Offset,
        until: Offset,
    },
    Close {
        cursor: CursorId,
    },
    /// Where a drain ends: where the partition ended when the command was given, or at the first record that was written after it.
    Bound {
        command: Command,
    },
    /// When the first record from here on was written.
    Age {
        from: Offset,
        pending: u64,
        rate: f64,
    },
    /// The first record that was written no earlier.
    Expired {
        before: Timestamp,
    },
    /// Whether the log still reaches to where live reading is.
    End {
        live: Offset,
    },
}

/// What was found.
pub enum Found {
    /// None where the log has deleted it.
    Single {
        key: KeyId,
        offset: Offset,
        record: Option<Record>,
    },
    /// `passed`: the log has nothing more below it.
    Stretch {
        cursor: CursorId,
        records: Vec<Record>,
        passed: Option<Offset>,
    },
    Bound {
        drain: Drain,
    },
    Age {
        at: Timestamp,
        pending: u64,
        rate: f64,
    },
    Expired {
        bound: Offset,
    },
}

/// Wishes that are put into order together.
const WISHES: usize = 1_000;

/// Each cursor's reader, and where that stands.
type Cursors<B> = HashMap<CursorId, Option<(<B as Backend>::Reader, Offset)>>;

/// One partition's readers.
pub struct Reading<B: Backend> {
    pub backend: B,
    pub topic: Topic,
    pub partition: Partition,
    pub clock: Clock,
}

impl<B: Backend> Reading<B> {
    /// Serves one wish after the other, until nobody wishes any more.
    ///
    /// # Errors
    /// [`LogError::Broken`] where the log ends before what was read of it: the partition has to be restored. What only a person can
    /// mend.
    pub async fn run(
        self,
        mut wanted: mpsc::UnboundedReceiver<Wanted>,
        found: mpsc::UnboundedSender<Found>,
    ) -> Result<(), LogError> {
        let mut single = None;
        let mut cursors = HashMap::new();
        let mut wishes = Vec::new();
        while wanted.recv_many(&mut wishes, WISHES).await > 0 {
            // In the order of the log single records come with few looks at it.
            wishes.sort_by_key(|wish| match wish {
                Wanted::Single { offset, .. } => *offset,
                _ => Offset::START,
            });
            for wish in wishes.drain(..) {
                let Some(answer) = self.serve(wish, &mut single, &mut cursors).await? else { continue };
                if found.send(answer).is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn serve(
        &self,
        wish: Wanted,
        single: &mut Option<B::Reader>,
        cursors: &mut Cursors<B>,
    ) -> Result<Option<Found>, LogError> {
        let answer = match wish {
            Wanted::Single { key, offset } => Found::Single { key, offset, record: self.single(single, offset).await? },
            Wanted::Stretch { cursor, from, until } => {
                let (records, passed) = self.stretch(cursors.entry(cursor).or_insert(None), from, until).await?;
                Found::Stretch { cursor, records, passed }
            }
            Wanted::Bound { command } => {
                let bound = match command.ends.get(&self.partition) {
                    Some(end) => *end,
                    None => self.bound(command.at).await?,
                };
                Found::Bound { drain: Drain { id: command.id, target: command.target, bound } }
            }
            Wanted::Age { from, pending, rate } => match self.age(single, from).await? {
                Some(at) => Found::Age { at, pending, rate },
                None => return Ok(None),
            },
            Wanted::Expired { before } => Found::Expired { bound: self.bound(before).await? },
            Wanted::Close { cursor } => {
                cursors.remove(&cursor);
                return Ok(None);
            }
            Wanted::End { live } => {
                let marks = self.backend.admin()?.watermarks(&self.topic, self.partition).await;
                return match marks {
                    Ok(marks) if marks.end < live => Err(LogError::broken(format!(
                        "partition {} of {} ends at {}, before what was read of it ({live})",
                        self.partition, self.topic, marks.end
                    ))),
                    Ok(_) | Err(LogError::Transient(_)) => Ok(None),
                    Err(error) => Err(error),
                };
            }
        };
        Ok(Some(answer))
    }

    async fn single(&self, reader: &mut Option<B::Reader>, offset: Offset) -> Result<Option<Record>, LogError> {
        loop {
            match self.read_at(reader, offset).await {
                Err(LogError::Transient(error)) => self.again(&error).await,
                record => return record,
            }
        }
    }

    /// None where it cannot be told now: it is asked again soon.
    async fn age(&self, reader: &mut Option<B::Reader>, from: Offset) -> Result<Option<Timestamp>, LogError> {
        match self.written_at(reader, from).await {
            Err(LogError::Transient(_)) => Ok(None),
            at => at,
        }
    }

    async fn written_at(&self, reader: &mut Option<B::Reader>, from: Offset) -> Result<Option<Timestamp>, LogError> {
        let mut open = match reader.take() {
            Some(open) => open,
            None => self.backend.reader(&self.topic, self.partition, from).await?,
        };
        open.seek(from).await?;
        let Read::Records(records) = open.read(Limit { records: 1, bytes: 1 }).await? else { return Ok(None) };
        *reader = Some(open);
        Ok(records.first().map(|record| record.timestamp))
    }

    async fn bound(&self, at: Timestamp) -> Result<Offset, LogError> {
        loop {
            match self.backend.admin()?.offset_at(&self.topic, self.partition, at).await {
                Err(LogError::Transient(error)) => self.again(&error).await,
                bound => return bound,
            }
        }
    }

    async fn again(&self, error: &(dyn std::fmt::Display + Send + Sync)) {
        tracing::warn!(partition = self.partition.0, %error, "deliveries could not be read, trying again");
        self.clock.sleep(AGAIN).await;
    }

    async fn read_at(&self, reader: &mut Option<B::Reader>, offset: Offset) -> Result<Option<Record>, LogError> {
        let open = match reader.take() {
            Some(mut open) => {
                open.seek(offset).await?;
                open
            }
            None => self.backend.reader(&self.topic, self.partition, offset).await?,
        };
        let open = reader.insert(open);
        loop {
            let read = open.read(Limit { records: 1, bytes: 1 }).await?;
            note_read(&read);
            let Read::Records(records) = read else {
                if self.has_nothing_below(offset.just_after()).await? {
                    return Ok(None);
                }
                // The end before it: a replica that took over does not show it yet.
                let place = format!("{}/{}/{offset}", self.topic, self.partition);
                return Err(LogError::transient(format!("nothing is to be read at {place} yet")));
            };
            match records.into_iter().find(|record| record.offset >= offset) {
                Some(record) if record.offset == offset => return Ok(Some(record)),
                // What follows stands in its place: the log has deleted it.
                Some(_) => return Ok(None),
                None => {}
            }
        }
    }

    /// The next records from `from` on. Live reading has seen records up to `until`, so they are there, or were deleted.
    async fn stretch(
        &self,
        reader: &mut Option<(B::Reader, Offset)>,
        from: Offset,
        until: Offset,
    ) -> Result<(Vec<Record>, Option<Offset>), LogError> {
        loop {
            match self.read_on(reader, from, until).await {
                Ok(Read::Records(records)) => return Ok((records, None)),
                Ok(Read::End) => match self.has_nothing_below(until).await {
                    Ok(true) => return Ok((Vec::new(), Some(until))),
                    Ok(false) => self.again(&format!("nothing is to be read between {from} and {until} yet")).await,
                    Err(LogError::Transient(error)) => self.again(&error).await,
                    Err(error) => return Err(error),
                },
                Err(LogError::Transient(error)) => {
                    *reader = None;
                    self.again(&error).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn read_on(
        &self,
        reader: &mut Option<(B::Reader, Offset)>,
        from: Offset,
        until: Offset,
    ) -> Result<Read, LogError> {
        if reader.as_ref().is_none_or(|(_, at)| *at != from) {
            *reader = Some((self.backend.reader(&self.topic, self.partition, from).await?, from));
        }
        let Some((open, at)) = reader else { return Ok(Read::End) };
        // What is behind `until` would be thrown away: live reading brings it.
        let records = usize::try_from(until.distance_from(from)).unwrap_or(usize::MAX).clamp(1, STRETCH.records);
        let read = open.read(Limit { records, ..STRETCH }).await?;
        note_read(&read);
        if let Read::Records(records) = &read
            && let Some(last) = records.last()
        {
            *at = last.offset.just_after();
        }
        Ok(read)
    }

    /// The log has deleted, or lost, everything below `until` that has not been read.
    async fn has_nothing_below(&self, until: Offset) -> Result<bool, LogError> {
        let marks = self.backend.admin()?.watermarks(&self.topic, self.partition).await?;
        if marks.end < until {
            tracing::error!(partition = self.partition.0, end = %marks.end, %until, "the log ends before what was read");
        }
        Ok(marks.start >= until || marks.end < until)
    }
}

fn note_read(read: &Read) {
    if let Read::Records(records) = read {
        let bytes = records.iter().map(Record::weight).sum::<usize>();
        metrics().scanned_bytes.with_label_values::<&str>(&[]).inc_by(bytes as u64);
    }
}
