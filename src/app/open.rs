//! From configuration to a log.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;

use crate::clock::Clock;
use crate::config::{BackendKind, Config, ConfigError};
use crate::control::file::FileWatch;
use crate::control::follow;
use crate::control::remote::RemoteSettings;
use crate::control::workspace::Workspace;
#[cfg(any(feature = "kafka", feature = "pulsar"))]
use crate::log::Backend;
use crate::log::embedded::memory::Faults;
use crate::log::embedded::{Access, Embedded};
#[cfg(feature = "kafka")]
use crate::log::kafka::{Kafka, KafkaConfig};
#[cfg(feature = "pulsar")]
use crate::log::pulsar::{OAuth2, PulsarConfig, PulsarLog};
use crate::log::registry::Registry;
#[cfg(any(feature = "kafka", feature = "pulsar"))]
use crate::log::registry::{Registered, RegistryConfig};
use crate::log::topic::Topics;
#[cfg(any(feature = "kafka", feature = "pulsar"))]
use crate::model::codec::KnownSchema;
use crate::store::job_status::JobStatusStore;
use crate::telemetry::seldom;
use crate::transform::http::{Service, ServiceError};

/// The control plane to follow. None: there is a file.
pub fn control_plane(config: &Config) -> Option<RemoteSettings> {
    let control = &config.control;
    (!control.url.is_empty()).then(|| RemoteSettings {
        url: control.url.clone(),
        token: control.token.clone(),
        namespace: control.namespace.clone(),
        region: control.region.clone(),
        poll_interval: control.poll_interval,
        allow_empty: control.allow_empty,
    })
}

/// The workspace as it is now, for a command.
///
/// # Errors
/// What is wrong with the file, or with what the control plane answers.
pub async fn workspace(config: &Config) -> anyhow::Result<Arc<Workspace>> {
    match control_plane(config) {
        Some(settings) => Ok(Arc::new(follow::once(&settings).await.map_err(anyhow::Error::msg)?)),
        None => Ok(FileWatch::open(&config.control.workspace_file, config.control.allow_empty).await?.current().get()),
    }
}

/// One of the logs. What is generic over a backend is called through [`with_log`](crate::with_log).
pub enum AnyLog {
    Embedded(Embedded),
    #[cfg(feature = "kafka")]
    Kafka(Registered<Kafka>),
    #[cfg(feature = "pulsar")]
    Pulsar(Registered<PulsarLog>),
}

/// Runs an expression with whichever log there is.
#[macro_export]
macro_rules! with_log {
    ($log:expr, $name:ident => $body:expr) => {
        match $log {
            $crate::app::open::AnyLog::Embedded($name) => $body,
            #[cfg(feature = "kafka")]
            $crate::app::open::AnyLog::Kafka($name) => $body,
            #[cfg(feature = "pulsar")]
            $crate::app::open::AnyLog::Pulsar($name) => $body,
        }
    };
}

#[cfg(feature = "kafka")]
fn kafka(config: &Config) -> anyhow::Result<Registered<Kafka>> {
    let log = Kafka::new(KafkaConfig {
        bootstrap_servers: config.log.kafka.bootstrap_servers.clone(),
        prefix: config.log.topic_prefix.clone(),
        properties: config.log.kafka.properties.clone(),
    });
    registered(log, config)
}

#[cfg(feature = "pulsar")]
fn pulsar(config: &Config) -> anyhow::Result<Registered<PulsarLog>> {
    let pulsar = &config.log.pulsar;
    let log = PulsarLog::new(PulsarConfig {
        service_url: pulsar.service_url.clone(),
        admin_url: pulsar.admin_url.clone(),
        tenant: pulsar.tenant.clone(),
        namespace: pulsar.namespace.clone(),
        prefix: config.log.topic_prefix.clone(),
        token: pulsar.token.clone(),
        oauth2: OAuth2 {
            issuer_url: pulsar.oauth2.issuer_url.clone(),
            credentials: pulsar.oauth2.credentials.clone(),
            audience: pulsar.oauth2.audience.clone(),
            scope: pulsar.oauth2.scope.clone(),
        },
        ca_file: pulsar.ca_file.clone(),
    })?;
    registered(log, config)
}

/// With the schema registry, where there is one.
#[cfg(any(feature = "kafka", feature = "pulsar"))]
fn registered<B: Backend>(log: B, config: &Config) -> anyhow::Result<Registered<B>> {
    let registry = &config.log.schema_registry;
    let urls = registry.url.split(',').map(str::trim).filter(|url| !url.is_empty());
    Ok(Registered::new(
        log,
        &RegistryConfig {
            urls: urls.map(str::to_owned).collect(),
            username: registry.username.clone(),
            password: registry.password.clone(),
            token: registry.token.clone(),
            ca_file: registry.ca_file.clone(),
            topic_prefix: config.log.topic_prefix.clone(),
            schemas: topics(config)?
                .iter()
                .filter_map(|spec| Some((spec.topic(), KnownSchema::named(&spec.value)?)))
                .collect(),
        },
    )?)
}

impl AnyLog {
    /// # Errors
    /// Where the configured log cannot be opened, or was not built in.
    pub async fn open(config: &Config, access: Access, clock: &Clock) -> anyhow::Result<Self> {
        match config.log.backend {
            BackendKind::Embedded => {
                let folder = &config.log.embedded.data_dir;
                Ok(AnyLog::Embedded(Embedded::open(folder, access, clock.clone()).await?))
            }
            BackendKind::Memory => Ok(AnyLog::Embedded(Embedded::in_memory(Faults::none(), clock.clone()).await?)),
            #[cfg(feature = "kafka")]
            BackendKind::Kafka => Ok(AnyLog::Kafka(kafka(config)?)),
            #[cfg(not(feature = "kafka"))]
            BackendKind::Kafka => anyhow::bail!("this laneway was built without the feature kafka"),
            #[cfg(feature = "pulsar")]
            BackendKind::Pulsar => Ok(AnyLog::Pulsar(pulsar(config)?)),
            #[cfg(not(feature = "pulsar"))]
            BackendKind::Pulsar => anyhow::bail!("this laneway was built without the feature pulsar"),
        }
    }

    /// The schema registry that values are written with, where there is one.
    pub fn registry(&self) -> Option<&Registry> {
        match self {
            AnyLog::Embedded(_) => None,
            #[cfg(feature = "kafka")]
            AnyLog::Kafka(log) => log.registry(),
            #[cfg(feature = "pulsar")]
            AnyLog::Pulsar(log) => log.registry(),
        }
    }

    /// Closes what has to be closed.
    pub async fn close(self) {
        match self {
            AnyLog::Embedded(log) => log.close().await,
            #[cfg(feature = "kafka")]
            AnyLog::Kafka(_) => {}
            #[cfg(feature = "pulsar")]
            AnyLog::Pulsar(_) => {}
        }
    }
}

/// The transformer service, where one is configured.
///
/// # Errors
/// Where its address is none.
pub fn transformer(config: &Config, clock: &Clock) -> Result<Option<Service>, ServiceError> {
    let settings = &config.transformer;
    match settings.url.as_str() {
        "" => Ok(None),
        url => Service::new(url, settings.timeout, clock.clone()).map(Some),
    }
}

/// The store of job status. Nothing is asked or made yet.
///
/// # Errors
/// Where `store.url` is none of a store.
pub fn job_status(config: &Config) -> anyhow::Result<JobStatusStore> {
    Ok(JobStatusStore::new(&store_url(config))?)
}

/// Where the store is.
pub fn store_url(config: &Config) -> String {
    match config.store.url.as_str() {
        "" if config.log.backend == BackendKind::Memory => "sqlite::memory:".to_owned(),
        "" => format!("sqlite:{}", config.log.embedded.data_dir.join("store.sqlite").display()),
        url => url.to_owned(),
    }
}

/// The file of a store that is one.
pub fn store_file(url: &str) -> Option<PathBuf> {
    let file = url.strip_prefix("sqlite:").filter(|file| !file.starts_with(':'))?;
    Some(PathBuf::from(file.split('?').next()?))
}

/// Prepares a store that is a file of this machine; another one is its operator's affair.
pub async fn prepare(store: &JobStatusStore, file: Option<&Path>, clock: &Clock) {
    while store.store().is_sqlite() {
        if let Some(folder) = file.and_then(Path::parent).filter(|folder| !folder.as_os_str().is_empty())
            && let Err(error) = std::fs::create_dir_all(folder)
            && let Some(left_out) = seldom::due("the store's folder", &error.to_string())
        {
            tracing::warn!(%error, left_out, folder = %folder.display(), "the store's folder cannot be made");
        }
        let Err(error) = store.migrate().await else { return };
        if let Some(left_out) = seldom::due("the store's tables", &error.to_string()) {
            tracing::warn!(%error, left_out, "the store is not prepared yet");
        }
        clock.sleep(AGAIN).await;
    }
}

/// A store that could not be prepared is tried again after so long.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

/// The declared topics, with the configured overrides.
///
/// # Errors
/// What is wrong in which file.
pub fn topics(config: &Config) -> anyhow::Result<Topics> {
    let folder = &config.topics.dir;
    let folder = (!folder.as_os_str().is_empty()).then_some(folder.as_path());
    Topics::load(folder).context("topic declarations")
}

/// Which process of its stage this one is.
///
/// # Errors
/// Where the configured id cannot be part of a Kafka id.
pub fn instance_id(config: &Config) -> Result<String, ConfigError> {
    let id = config.instance.id.trim();
    if !id.is_empty() {
        let is_plain = |character: char| character.is_ascii_alphanumeric() || "._-".contains(character);
        if !id.chars().all(is_plain) {
            let error = format!("{id:?} may hold letters, digits, dots, dashes and underscores only");
            return Err(ConfigError::Invalid { place: "instance.id".into(), error });
        }
        return Ok(id.to_owned());
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .map(|name| name.trim().to_owned())
        .or_else(|| std::env::var("HOSTNAME").ok())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "laneway".into());
    Ok(match config.admin.listen.port() {
        0 => format!("{host}-{}", uuid::Uuid::new_v4().simple()),
        port => format!("{host}-{port}"),
    })
}
