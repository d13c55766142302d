//! A log whose values others may have written, and may read, with a schema registry.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;
use crate::log::{Backend, Commit, Guarantee, Limit, LogError, Member, Polled, Publisher, Read, Reader, Session};
use crate::model::record::{Addressed, Offset, Partition, Record, Topic};

use super::lookups::Failure;
use super::{Registry, RegistryConfig, wire};

/// How long a poll or a read waits for an answer before it returns without records.
const WAIT: Duration = Duration::from_millis(200);
/// A reader whose records cannot be named for so long says so; a session waits on.
const PATIENCE: Duration = Duration::from_secs(10);

/// Without a registry everything goes through as it is.
#[derive(Clone)]
pub struct Registered<L> {
    inner: L,
    registry: Option<Registry>,
}

impl<B> Registered<B> {
    /// # Errors
    /// [`LogError::Fatal`] with [`Misconfigured`](crate::log::Misconfigured).
    pub fn new(inner: B, config: &RegistryConfig) -> Result<Self, LogError> {
        let registry = if config.urls.is_empty() { None } else { Some(Registry::new(config)?) };
        Ok(Self { inner, registry })
    }

    pub fn registry(&self) -> Option<&Registry> {
        self.registry.as_ref()
    }
}

impl<B: Backend> Backend for Registered<B> {
    type Session = Translated<B::Session>;
    type Publisher = Registered<B::Publisher>;
    type Reader = Translated<B::Reader>;
    type Admin = B::Admin;

    async fn session(&self, member: Member) -> Result<Self::Session, LogError> {
        Ok(Translated::new(self.inner.session(member).await?, &self.registry))
    }

    fn publisher(&self) -> Result<Self::Publisher, LogError> {
        Ok(Registered { inner: self.inner.publisher()?, registry: self.registry.clone() })
    }

    async fn reader(&self, topic: &Topic, partition: Partition, from: Offset) -> Result<Self::Reader, LogError> {
        Ok(Translated::new(self.inner.reader(topic, partition, from).await?, &self.registry))
    }

    fn admin(&self) -> Result<B::Admin, LogError> {
        self.inner.admin()
    }
}

impl<P: Publisher> Publisher for Registered<P> {
    async fn publish(&self, records: Vec<Addressed>) -> Result<(), LogError> {
        match &self.registry {
            None => self.inner.publish(records).await,
            Some(registry) => self.inner.publish(registry.encode(&records).await?).await,
        }
    }
}

/// What reads, with what it has read and cannot be named yet: while there is any, nothing further is read.
pub struct Translated<L> {
    inner: L,
    registry: Option<Registry>,
    held: Vec<Record>,
}

impl<L> Translated<L> {
    fn new(inner: L, registry: &Option<Registry>) -> Self {
        Self { inner, registry: registry.clone(), held: Vec::new() }
    }

    /// The records that were held, if all can be named by now.
    fn named(&mut self) -> Result<Option<Vec<Record>>, Failure> {
        let Some(registry) = &self.registry else { return Ok(Some(std::mem::take(&mut self.held))) };
        let mut is_whole = true;
        let mut failed = None;
        // All of them are asked for at once.
        for record in &mut self.held {
            let Some((value, id)) = record.value.as_ref().and_then(|value| Some((value, wire::id_of(value)?))) else {
                continue;
            };
            match registry.reads(id) {
                Ok(Some(Some(fingerprint))) => {
                    record.value = Some(wire::to_single_object(value, fingerprint));
                    wire::say_single_object(&mut record.headers);
                }
                Ok(Some(None)) => {}
                Ok(None) => is_whole = false,
                Err(failure) => {
                    is_whole = false;
                    failed = Some(failure);
                }
            }
        }
        match (is_whole, failed) {
            (true, _) => Ok(Some(std::mem::take(&mut self.held))),
            (false, None) => Ok(None),
            (false, Some(failure)) => Err(failure),
        }
    }

    /// The same, with a moment's patience.
    async fn soon_named(&mut self) -> Result<Option<Vec<Record>>, Failure> {
        if let Ok(Some(named)) = self.named() {
            return Ok(Some(named));
        }
        let changed = self.registry.as_ref().map(|registry| registry.0.readable.clone());
        if let Some(lookups) = changed {
            lookups.changed(WAIT).await;
        }
        self.named()
    }
}

impl<S: Session> Session for Translated<S> {
    const GUARANTEE: Guarantee = S::GUARANTEE;

    async fn poll(&mut self, limit: Limit) -> Result<Polled, LogError> {
        if self.held.is_empty() {
            match self.inner.poll(limit).await? {
                Polled::Records(records) => self.held = records,
                other => return Ok(other),
            }
        }
        // A failure has been told by whoever asked the registry.
        Ok(self.soon_named().await.ok().flatten().map_or(Polled::Idle, Polled::Records))
    }

    fn seek(&mut self, partition: Partition, to: Offset) -> Result<(), LogError> {
        self.inner.seek(partition, to)
    }

    fn pause(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.inner.pause(partitions)
    }

    fn resume(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.inner.resume(partitions)
    }

    async fn commit(&mut self, commit: Arc<Commit>) -> Result<(), LogError> {
        match &self.registry {
            Some(registry) if !commit.outputs.is_empty() => {
                let outputs = registry.encode(&commit.outputs).await?;
                self.inner.commit(Arc::new(Commit { outputs, offsets: commit.offsets.clone() })).await
            }
            _ => self.inner.commit(commit).await,
        }
    }

    async fn close(self) {
        self.inner.close().await;
    }
}

impl<R: Reader> Reader for Translated<R> {
    async fn read(&mut self, limit: Limit) -> Result<Read, LogError> {
        if self.held.is_empty() {
            match self.inner.read(limit).await? {
                Read::Records(records) => self.held = records,
                Read::End => return Ok(Read::End),
            }
        }
        // The end is not reached while something is held, whoever waits for it.
        let clock = Clock::system();
        let until = clock.instant() + PATIENCE;
        loop {
            match self.soon_named().await {
                Ok(Some(records)) => return Ok(Read::Records(records)),
                Err(failure) if clock.instant() >= until => return Err(LogError::transient(failure.text)),
                Ok(None) | Err(_) => clock.sleep(WAIT).await,
            }
        }
    }

    async fn seek(&mut self, to: Offset) -> Result<(), LogError> {
        self.held.clear();
        self.inner.seek(to).await
    }
}
