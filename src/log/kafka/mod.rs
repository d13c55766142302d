//! The log on a Kafka cluster, through librdkafka: the reference for every promise in [`crate::log`].
//!
//! librdkafka's calls block, so each session has two threads of its own: one polls the consumer and answers rebalances
//! (`consume`), one runs transactions (`transact`). A reader has one. Async code only ever waits on channels.
//!
//! What this adapter settles for the engine, each point seen on a real broker:
//! - every delivery report is awaited before `commit_transaction` is called: its own flush waits 100 ms otherwise;
//! - it is assigned with numbers only, and sought only where it has to be: a seek is forgotten while an offset is looked up;
//! - an assignment is answered at once, paused and with explicit offsets, since until then *all* partitions stand still;
//! - a commit takes the group's metadata under the same lock under which partitions are lost, so that a member which has
//!   rejoined cannot commit for what it lost;
//! - a partition's first record from a producer goes alone (`known`): librdkafka would acknowledge one that was refused;
//! - a partition's leader is looked for again where librdkafka believes that there is none (`leaders`);
//! - what a restarted broker left undecided is ended (`hanging`): readers would stand before it for ever;
//! - a client that is out of step with its group is replaced (`membership`): nobody would read its partitions;
//! - static members do not leave on close: closing unsubscribes first, so that a shutdown hands over at once.

mod admin;
mod config;
mod consume;
mod convert;
mod hanging;
mod known;
mod leaders;
mod membership;
mod publisher;
mod reader;
mod session;
mod transact;

use std::sync::{Arc, Mutex, PoisonError};

use crate::log::{Backend, LogError, Member};
use crate::model::record::{Offset, Partition, Topic};

pub use admin::KafkaAdmin;
pub use config::KafkaConfig;
pub use publisher::KafkaPublisher;
pub use reader::KafkaReader;
pub use session::{KafkaCommitter, KafkaSession};

/// A Kafka cluster, by its configuration. Connections are made by what it hands out.
#[derive(Clone)]
pub struct Kafka {
    config: KafkaConfig,
    /// Made when it is first wanted: a client costs threads and connections, and ending one blocks.
    admin: Arc<Mutex<Option<KafkaAdmin>>>,
}

impl Kafka {
    pub fn new(config: KafkaConfig) -> Self {
        Self { config, admin: Arc::default() }
    }
}

impl Backend for Kafka {
    type Session = KafkaSession;
    type Publisher = KafkaPublisher;
    type Reader = KafkaReader;
    type Admin = KafkaAdmin;

    async fn session(&self, member: Member) -> Result<KafkaSession, LogError> {
        KafkaSession::join(&self.config, self.admin()?, member).await
    }

    fn publisher(&self) -> Result<KafkaPublisher, LogError> {
        KafkaPublisher::new(&self.config)
    }

    async fn reader(&self, topic: &Topic, partition: Partition, from: Offset) -> Result<KafkaReader, LogError> {
        KafkaReader::open(&self.config, topic, partition, from)
    }

    fn admin(&self) -> Result<KafkaAdmin, LogError> {
        let mut admin = self.admin.lock().unwrap_or_else(PoisonError::into_inner);
        match &*admin {
            Some(admin) => Ok(admin.clone()),
            None => Ok(admin.insert(KafkaAdmin::new(&self.config)?).clone()),
        }
    }
}

/// Starts a thread of this adapter.
fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), LogError> {
    let started = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    started.map(drop).map_err(|error| LogError::fatal(format!("no thread for the kafka client: {error}")))
}
