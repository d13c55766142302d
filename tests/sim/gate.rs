//! The log as one process sees it: for a while nothing of it may get through, and what is read of it is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use laneway::clock::{Clock, Timestamp};
use laneway::log::embedded::{
    Embedded, EmbeddedAdmin, EmbeddedCommitter, EmbeddedPublisher, EmbeddedReader, EmbeddedSession,
};
use laneway::log::{Backend, Commit, Committer, Guarantee, Limit, LogError, Member, Polled, Read, Reader, Session};
use laneway::model::record::{Offset, Partition, Topic};

/// Opened and shut by the simulation, asked by a process before everything that it does with the log.
#[derive(Clone)]
pub struct Gate {
    clock: Clock,
    /// Microseconds; shut until then.
    until: Arc<AtomicI64>,
    /// Bytes of deliveries that readers have read: by cursors, not directly nor from live.
    read: Arc<AtomicU64>,
}

impl Gate {
    pub fn new(clock: Clock, read: Arc<AtomicU64>) -> Self {
        Self { clock, until: Arc::default(), read }
    }

    pub fn shut(&self, during: Duration) {
        self.until.store(self.clock.steady().plus(during).micros(), Ordering::Relaxed);
    }

    async fn pass(&self) {
        let until = Timestamp::from_micros(self.until.load(Ordering::Relaxed));
        let wait = until.since(self.clock.steady());
        if !wait.is_zero() {
            self.clock.sleep(wait).await;
        }
    }
}

/// A log behind a [`Gate`].
#[derive(Clone)]
pub struct Gated {
    pub log: Embedded,
    pub gate: Gate,
}

impl Backend for Gated {
    type Session = GatedSession;
    type Publisher = EmbeddedPublisher;
    type Reader = GatedReader;
    type Admin = EmbeddedAdmin;

    async fn session(&self, member: Member) -> Result<GatedSession, LogError> {
        self.gate.pass().await;
        let session = self.log.session(member).await?;
        Ok(GatedSession { session, gate: self.gate.clone() })
    }

    fn publisher(&self) -> Result<EmbeddedPublisher, LogError> {
        self.log.publisher()
    }

    async fn reader(&self, topic: &Topic, partition: Partition, from: Offset) -> Result<GatedReader, LogError> {
        let reader = self.log.reader(topic, partition, from).await?;
        Ok(GatedReader { reader, gate: self.gate.clone(), is_counted: *topic == Topic::DELIVERIES })
    }

    fn admin(&self) -> Result<EmbeddedAdmin, LogError> {
        self.log.admin()
    }
}

pub struct GatedSession {
    session: EmbeddedSession,
    gate: Gate,
}

impl Session for GatedSession {
    const GUARANTEE: Guarantee = EmbeddedSession::GUARANTEE;
    type Committer = GatedCommitter;

    async fn poll(&mut self, limit: Limit) -> Result<Polled, LogError> {
        self.gate.pass().await;
        self.session.poll(limit).await
    }

    fn seek(&mut self, partition: Partition, to: Offset) -> Result<(), LogError> {
        self.session.seek(partition, to)
    }

    fn pause(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.session.pause(partitions)
    }

    fn resume(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.session.resume(partitions)
    }

    fn committer(&self) -> GatedCommitter {
        GatedCommitter { committer: self.session.committer(), gate: self.gate.clone() }
    }

    async fn close(self) {
        self.session.close().await;
    }
}

pub struct GatedCommitter {
    committer: EmbeddedCommitter,
    gate: Gate,
}

impl Committer for GatedCommitter {
    async fn commit(&mut self, commit: Arc<Commit>) -> Result<(), LogError> {
        self.gate.pass().await;
        self.committer.commit(commit).await
    }
}

pub struct GatedReader {
    reader: EmbeddedReader,
    gate: Gate,
    is_counted: bool,
}

impl Reader for GatedReader {
    async fn read(&mut self, limit: Limit) -> Result<Read, LogError> {
        self.gate.pass().await;
        let read = self.reader.read(limit).await?;
        // A direct read of one record is bounded by its attempt, not by the backlog.
        if let (Read::Records(records), true) = (&read, self.is_counted && limit.records > 1) {
            let bytes: usize = records.iter().map(|record| record.value.as_ref().map_or(0, bytes::Bytes::len)).sum();
            self.gate.read.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        Ok(read)
    }

    async fn seek(&mut self, to: Offset) -> Result<(), LogError> {
        self.reader.seek(to).await
    }
}
