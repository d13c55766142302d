//! Reading one partition of the embedded log, without a group.

use std::time::Duration;

use crate::log::{Limit, LogError, Read, Reader};
use crate::model::record::{Offset, Partition, Topic};

use super::Embedded;
use super::store::read_error;

/// A read at the end waits so long for more.
const WAIT: Duration = Duration::from_millis(100);

pub struct EmbeddedReader {
    log: Embedded,
    topic: Topic,
    partition: Partition,
    next: Offset,
}

impl EmbeddedReader {
    pub(super) fn new(log: Embedded, topic: Topic, partition: Partition, next: Offset) -> Self {
        Self { log, topic, partition, next }
    }
}

impl Reader for EmbeddedReader {
    async fn read(&mut self, limit: Limit) -> Result<Read, LogError> {
        let mut grown = self.log.0.ends.subscribe();
        let until = self.log.0.clock.instant() + WAIT;
        loop {
            let store = &self.log.0.store;
            let records = store.read(&self.topic, self.partition, self.next, limit).await.map_err(read_error)?;
            if let Some(last) = records.last() {
                self.next = last.offset.just_after();
                return Ok(Read::Records(records));
            }
            tokio::select! {
                biased;
                _ = grown.changed() => {}
                () = self.log.0.clock.sleep_until(until) => return Ok(Read::End),
            }
        }
    }

    async fn seek(&mut self, to: Offset) -> Result<(), LogError> {
        self.next = to;
        Ok(())
    }
}
