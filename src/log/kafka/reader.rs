//! Reading one partition of a Kafka topic without a group, on a thread of its own.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::TopicPartitionList;
use tokio::sync::mpsc;

use crate::log::{Limit, LogError, Read, Reader};
use crate::model::record::{Offset, Partition, Record, Topic};

use super::config::KafkaConfig;
use super::{convert, hanging, thread};

const POLL: Duration = Duration::from_millis(50);
/// With its channel full the thread looks for room so often.
const FULL: Duration = Duration::from_millis(20);
/// A read at the end waits so long for more.
const WAIT: Duration = Duration::from_millis(100);
/// One hand-over of the thread.
const BATCH: Limit = Limit { records: 500, bytes: 512 * 1024 };

/// Reading on over so many offsets is cheaper than asking the broker for another place.
const NEAR: u128 = 2_000;

/// What the thread brings, and which seek it belongs to.
struct Brought {
    seek: u64,
    read: Result<Read, LogError>,
}

pub struct KafkaReader {
    seeks: Sender<(u64, Offset)>,
    seek: u64,
    brought: mpsc::Receiver<Brought>,
    at_end: bool,
    /// Moved on without a seek since the last records came: an end that is told now may be from before.
    moved: bool,
    /// Records beyond the last read's limit.
    rest: std::collections::VecDeque<Record>,
    /// Records below this are passed over.
    next: Offset,
}

impl KafkaReader {
    pub(super) fn open(
        config: &KafkaConfig,
        topic: &Topic,
        partition: Partition,
        from: Offset,
    ) -> Result<Self, LogError> {
        let consumer: BaseConsumer = config.reader().create().map_err(convert::error)?;
        let (seeks, orders) = channel();
        let (brings, brought) = mpsc::channel(2);
        let place = (config.topic(topic), convert::partition(partition));
        seeks.send((0, from)).map_err(|_| LogError::transient("no reader"))?;
        thread("kafka-read", move || run(&consumer, &place, &orders, &brings))?;
        Ok(Self { seeks, seek: 0, brought, at_end: false, moved: false, rest: Default::default(), next: from })
    }

    fn take(&mut self, limit: Limit) -> Read {
        let mut bytes = 0;
        let fits = |record: &&Record| {
            let before = bytes;
            bytes += record.weight();
            before < limit.bytes
        };
        let count = self.rest.iter().take(limit.records).take_while(fits).count();
        let records: Vec<Record> = self.rest.drain(..count).collect();
        self.next = records.last().map_or(self.next, |record| record.offset.just_after());
        Read::Records(records)
    }
}

impl Reader for KafkaReader {
    async fn read(&mut self, limit: Limit) -> Result<Read, LogError> {
        loop {
            if !self.rest.is_empty() {
                return Ok(self.take(limit));
            }
            let next = match self.at_end {
                // The end is told once per arrival; who asks again waits only a moment.
                true => match tokio::time::timeout(WAIT, self.brought.recv()).await {
                    Err(_) => return Ok(Read::End),
                    Ok(next) => next,
                },
                false => self.brought.recv().await,
            };
            let Some(brought) = next else { return Err(LogError::transient("the kafka reader has ended")) };
            if brought.seek != self.seek {
                continue;
            }
            match brought.read? {
                Read::Records(records) => {
                    (self.at_end, self.moved) = (false, false);
                    self.rest.extend(records.into_iter().filter(|record| record.offset >= self.next));
                }
                Read::End => {
                    self.at_end = true;
                    if std::mem::take(&mut self.moved) {
                        continue;
                    }
                    return Ok(Read::End);
                }
            }
        }
    }

    async fn seek(&mut self, to: Offset) -> Result<(), LogError> {
        let is_near = to >= self.next && to.raw() - self.next.raw() <= NEAR;
        self.next = to;
        if is_near && !self.at_end {
            while self.rest.front().is_some_and(|record| record.offset < to) {
                self.rest.pop_front();
            }
            self.moved = self.rest.is_empty();
            return Ok(());
        }
        self.seek += 1;
        (self.at_end, self.moved) = (false, false);
        self.rest.clear();
        self.seeks.send((self.seek, to)).map_err(|_| LogError::transient("the kafka reader has ended"))
    }
}

fn run(
    consumer: &BaseConsumer,
    place: &(String, i32),
    orders: &Receiver<(u64, Offset)>,
    brings: &mpsc::Sender<Brought>,
) {
    let mut seek = 0;
    let mut pending: Vec<Result<Read, LogError>> = Vec::new();
    let mut waited = None;
    loop {
        if let Some((number, to)) = orders.try_iter().last().or(waited) {
            (seek, waited) = (number, None);
            pending.clear();
            let mut list = TopicPartitionList::new();
            let assigned =
                list.add_partition_offset(&place.0, place.1, start(to)).and_then(|()| consumer.assign(&list));
            pending.extend(assigned.err().map(|error| Err(convert::error(error))));
        }
        if brings.is_closed() {
            return;
        }
        if pending.is_empty() {
            pending = fill(consumer);
        }
        // Handed over only where there is room, so that a seek is noticed meanwhile.
        match brings.try_reserve() {
            Ok(room) if !pending.is_empty() => room.send(Brought { seek, read: pending.remove(0) }),
            Ok(_) => {}
            // Nobody takes what was read ahead; only a seek or the reader's end changes that.
            Err(_) => waited = orders.recv_timeout(FULL).ok(),
        }
    }
}

/// From the start means: wherever the log begins now.
fn start(from: Offset) -> rdkafka::Offset {
    if from == Offset::START { rdkafka::Offset::Beginning } else { convert::raw_offset(from) }
}

fn fill(consumer: &BaseConsumer) -> Vec<Result<Read, LogError>> {
    let (mut records, mut bytes, mut wait) = (Vec::new(), 0, POLL);
    let mut after = None;
    while records.len() < BATCH.records && bytes < BATCH.bytes {
        match consumer.poll(wait) {
            None => break,
            Some(Ok(message)) if hanging::is_filler(&message) => {}
            Some(Ok(message)) => {
                let record = convert::record(&message);
                bytes += record.weight();
                records.push(record);
                wait = Duration::ZERO;
            }
            Some(Err(KafkaError::PartitionEOF(_))) => {
                after = Some(Ok(Read::End));
                break;
            }
            Some(Err(error)) => match convert::error(error) {
                LogError::Transient(error) => tracing::debug!(%error, "kafka reader, going on"),
                serious => {
                    after = Some(Err(serious));
                    break;
                }
            },
        }
    }
    let mut out = Vec::new();
    if !records.is_empty() {
        out.push(Ok(Read::Records(records)));
    }
    out.extend(after);
    out
}
