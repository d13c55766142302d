//! Where the cluster is, how to get in, and what things are called there.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use pulsar::{ConnectionRetryOptions, OperationRetryOptions, ProducerOptions, Pulsar, TokioExecutor};
use tokio::sync::OnceCell;

use crate::log::{LogError, Misconfigured};
use crate::model::record::{Partition, Topic};

use super::convert;
use super::identity::{OAuth2, Tokens};

/// One call to a broker. What takes longer is tried again by whoever asked.
pub const CALL: Duration = Duration::from_secs(10);

#[derive(Clone, Default)]
pub struct PulsarConfig {
    /// `pulsar://host:6650` or `pulsar+ssl://host:6651`.
    pub service_url: String,
    /// `http://host:8080` or `https://host:8443`.
    pub admin_url: String,
    pub tenant: String,
    pub namespace: String,
    /// Stands before every topic and subscription.
    pub prefix: String,
    /// Where it is not empty: what proves who we are.
    pub token: String,
    /// Who gives tokens instead.
    pub oauth2: OAuth2,
    /// Authorities to trust besides the built-in ones, in PEM.
    pub ca_file: PathBuf,
}

impl std::fmt::Debug for PulsarConfig {
    /// Without what lets somebody in.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PulsarConfig")
            .field("service_url", &self.service_url)
            .field("admin_url", &self.admin_url)
            .field("tenant", &self.tenant)
            .field("namespace", &self.namespace)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl PulsarConfig {
    /// A topic's name inside its namespace.
    pub fn name(&self, topic: &Topic) -> String {
        format!("{}{topic}", self.prefix)
    }

    /// A partition is a topic of its own there.
    pub fn partition(&self, topic: &Topic, partition: Partition) -> String {
        let (tenant, namespace) = (&self.tenant, &self.namespace);
        format!("persistent://{tenant}/{namespace}/{}-partition-{partition}", self.name(topic))
    }

    /// What an authority's file says.
    pub fn authorities(&self) -> Result<Option<Vec<u8>>, LogError> {
        if self.ca_file.as_os_str().is_empty() {
            return Ok(None);
        }
        let unreadable = |error| {
            let place = self.ca_file.display();
            LogError::fatal(Misconfigured(format!("log.pulsar.ca_file: {place}: {error}")))
        };
        std::fs::read(&self.ca_file).map(Some).map_err(unreadable)
    }
}

/// The connection, made when it is first wanted.
pub struct Client {
    pub config: PulsarConfig,
    tokens: Tokens,
    connected: OnceCell<Pulsar<TokioExecutor>>,
}

impl Client {
    pub fn new(config: PulsarConfig, tokens: Tokens) -> Self {
        Self { config, tokens, connected: OnceCell::new() }
    }

    /// # Errors
    /// [`LogError::Transient`] where there is no broker, [`LogError::Fatal`] where it does not let us in.
    pub async fn get(&self) -> Result<&Pulsar<TokioExecutor>, LogError> {
        self.connected.get_or_try_init(|| self.connect()).await
    }

    async fn connect(&self) -> Result<Pulsar<TokioExecutor>, LogError> {
        let mut builder = Pulsar::builder(&self.config.service_url, TokioExecutor)
            .with_connection_retry_options(ConnectionRetryOptions {
                min_backoff: Duration::from_millis(50),
                max_backoff: Duration::from_secs(1),
                max_retries: 2,
                connection_timeout: Duration::from_secs(3),
                // A peer that is silent for so long is gone.
                keep_alive: Duration::from_secs(5),
                ..ConnectionRetryOptions::default()
            })
            // Whoever calls tries again by itself, and knows until when.
            .with_operation_retry_options(OperationRetryOptions {
                operation_timeout: CALL,
                retry_delay: Duration::from_millis(100),
                max_retries: Some(0),
            });
        if !self.tokens.is_none() {
            // What is wrong with it is told here: the client says only that it is not let in.
            self.tokens.token().await?;
            builder = builder.with_auth_provider(Box::new(self.tokens.clone()));
        }
        if let Some(authorities) = self.config.authorities()? {
            builder = builder.with_certificate_chain(authorities);
        }
        apart(builder.build()).await?.map_err(convert::error)
    }
}

/// Makes something of the client's in a task of its own: who gives up waiting leaves nothing half made, and its futures are large.
pub async fn apart<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, LogError> {
    tokio::spawn(work).await.map_err(LogError::transient)
}

/// A batch holds so many records at most, and so many bytes where it holds more than one.
pub const BATCH: (usize, usize) = (1_000, 256 * 1024);

/// How producers send: what is handed over goes out when they are told to.
pub fn batching() -> ProducerOptions {
    // One more than a batch ever holds: where it ends is ours to say.
    let batch_size = Some(BATCH.0 as u32 + 1);
    ProducerOptions { batch_size, block_queue_if_full: true, ..ProducerOptions::default() }
}

/// Who else may write there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alone {
    /// Nobody: refused where somebody does.
    IfFree,
    /// Nobody any more: whoever did is cut off.
    Fencing,
}

impl Alone {
    /// The protocol's `ProducerAccessMode`.
    pub fn options(self) -> ProducerOptions {
        let mode = match self {
            Alone::IfFree => 1,
            Alone::Fencing => 3,
        };
        ProducerOptions { access_mode: Some(mode), ..batching() }
    }
}
