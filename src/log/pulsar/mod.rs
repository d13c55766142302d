//! The log on a Pulsar cluster.
//!
//! Pulsar has no transactions that the client could use and its subscriptions acknowledge whole batches, so positions are kept by us
//! (`positions`), with the partition's owner decided by the broker: there is one producer at most where they are written. What this costs is
//! said in [`Guarantee::AtLeastOnce`](crate::log::Guarantee): a commit's outputs are stored before its positions, so a crash in between
//! brings them again.
//!
//! - A place is (ledger, entry, index in the batch): exact, though Pulsar acknowledges entries only.
//! - Which partition a record goes to is our partitioner's affair: each partition has a producer of its own.
//! - Reading needs no subscription (`reader`); the one with the group's name follows behind (`floor`).
//! - Members find each other on a small topic (`members`).

mod admin;
mod config;
mod convert;
mod floor;
mod identity;
mod internals;
mod members;
mod membership;
mod positions;
mod publisher;
mod reader;
mod rest;
mod session;

use std::sync::Arc;

use crate::log::{Backend, LogError, Member};
use crate::model::record::{Offset, Partition, Topic};

use config::Client;
use positions::Place;
use rest::Rest;

pub use admin::PulsarAdmin;
pub use config::PulsarConfig;
pub use identity::OAuth2;
pub use publisher::PulsarPublisher;
pub use reader::PulsarReader;
pub use session::{PulsarCommitter, PulsarSession};

/// A Pulsar cluster. Connected when it is first needed.
#[derive(Clone)]
pub struct PulsarLog {
    client: Arc<Client>,
    rest: Rest,
}

impl PulsarLog {
    /// # Errors
    /// Where what is configured cannot be used.
    pub fn new(config: PulsarConfig) -> Result<Self, LogError> {
        let rest = Rest::new(&config)?;
        Ok(Self { client: Arc::new(Client::new(config, rest.tokens())), rest })
    }
}

impl Backend for PulsarLog {
    type Session = PulsarSession;
    type Publisher = PulsarPublisher;
    type Reader = PulsarReader;
    type Admin = PulsarAdmin;

    async fn session(&self, member: Member) -> Result<PulsarSession, LogError> {
        let place = Place {
            client: Arc::clone(&self.client),
            rest: self.rest.clone(),
            group: member.group.clone(),
            input: member.topic.clone(),
        };
        PulsarSession::join(place, member, PulsarPublisher::new(Arc::clone(&self.client))).await
    }

    fn publisher(&self) -> Result<PulsarPublisher, LogError> {
        Ok(PulsarPublisher::new(Arc::clone(&self.client)))
    }

    async fn reader(&self, topic: &Topic, partition: Partition, from: Offset) -> Result<PulsarReader, LogError> {
        PulsarReader::open(Arc::clone(&self.client), topic, partition, from).await
    }

    fn admin(&self) -> Result<PulsarAdmin, LogError> {
        Ok(PulsarAdmin { client: Arc::clone(&self.client), rest: self.rest.clone() })
    }
}
