//! Values in Confluent's wire format, with a schema registry: what the engine writes is registered under `<topic>-value` and
//! carries the registry's id; what it reads may have either encoding.
//!
//! The rest of the engine knows single-object encoding only. [`Registered`] stands around a log and translates: on the way out the
//! fingerprint becomes an id, on the way in the id becomes a fingerprint, and the writer's schema is learned
//! ([`codec::learn`](crate::model::codec::learn)). Ids never change, so each is asked for once.
//!
//! A registry that is away costs no record: what is to be written is refused as transient, so that it is tried again, and a
//! session or reader keeps what it cannot name yet, with everything behind it, until the registry answers. An id that the registry
//! says it does not have is handed on as it is, and ends as a failure that names it.

mod lookups;
mod registered;
mod wire;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use schema_registry_converter::async_impl::schema_registry::{
    self as api, SrSettings, get_schema_by_id, is_compatible_schema, post_schema,
};
use schema_registry_converter::error::SRCError;
use schema_registry_converter::schema_registry_common::{RawError, RegisteredSchema, SchemaType, SuppliedSchema};

use crate::clock::Clock;
use crate::log::{LogError, Misconfigured};
use crate::model::codec::{self, Fingerprint, KnownSchema};
use crate::model::record::{Addressed, Topic};
use crate::telemetry::events;

use lookups::{Failure, Lookups};

pub use registered::Registered;

/// One call. Longer than a registry needs, shorter than a client waits for the gateway.
const CALL: Duration = Duration::from_secs(5);
/// "No such id" is believed when it was said so often, so far apart: nodes of a registry learn of a new schema one after the other.
const ABSENT: usize = 3;
/// The registry's code for it.
const NO_SCHEMA: u32 = 40403;
const ABSENT_WAIT: Duration = Duration::from_secs(1);

/// Where a schema registry is and how to get in.
#[derive(Clone, Default)]
pub struct RegistryConfig {
    /// Of one registry: the next is tried where one does not answer.
    pub urls: Vec<String>,
    /// Basic authentication, where it is not empty.
    pub username: String,
    pub password: String,
    /// A bearer token, where it is not empty.
    pub token: String,
    /// Authorities to trust besides the built-in ones, in PEM.
    pub ca_file: PathBuf,
    /// Stands before every topic in the log, so in subjects too.
    pub topic_prefix: String,
    /// What values of each topic are.
    pub schemas: BTreeMap<Topic, &'static KnownSchema>,
}

/// A schema registry with what it has answered. Clones share it.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    settings: SrSettings,
    urls: String,
    prefix: String,
    schemas: BTreeMap<Topic, &'static KnownSchema>,
    /// What a value with this id begins with in single-object encoding; none where there is no such Avro schema.
    readable: Arc<Lookups<u32, Option<Fingerprint>>>,
    /// The id of a schema of ours under a topic's subject.
    registered: Arc<Lookups<(Topic, Fingerprint), u32>>,
}

impl Registry {
    /// Asks nothing yet.
    ///
    /// # Errors
    /// [`LogError::Fatal`] with [`Misconfigured`]: an address, or the file of authorities.
    pub fn new(config: &RegistryConfig) -> Result<Self, LogError> {
        let wrong = |text: String| LogError::fatal(Misconfigured(format!("log.schema_registry.{text}")));
        for address in &config.urls {
            let url = url::Url::parse(address).map_err(|error| wrong(format!("url: {error}")))?;
            if !url.username().is_empty() || url.password().is_some() {
                return Err(wrong("url: give username and password in their own keys".into()));
            }
        }
        let Some(first) = config.urls.first() else { return Err(wrong("url: is empty".into())) };
        let mut builder = SrSettings::new_builder(first.clone());
        for more in &config.urls[1..] {
            builder.add_url(more.clone());
        }
        if !config.token.is_empty() {
            builder.set_token_authorization(&config.token);
        } else if !config.username.is_empty() {
            builder.set_basic_authorization(&config.username, Some(&config.password));
        }
        let mut client = reqwest::Client::builder();
        if !config.ca_file.as_os_str().is_empty() {
            let file = config.ca_file.display();
            let pem = std::fs::read(&config.ca_file).map_err(|error| wrong(format!("ca_file: {file}: {error}")))?;
            let found = reqwest::Certificate::from_pem_bundle(&pem);
            let found = found.map_err(|error| wrong(format!("ca_file: {file}: {error}")))?;
            client = client.tls_certs_merge(found);
        }
        builder.set_timeout(CALL);
        let settings = builder.build_with(client).map_err(|error| wrong(explain(&error)))?;
        Ok(Self(Arc::new(Inner {
            settings,
            urls: config.urls.join(", "),
            prefix: config.topic_prefix.clone(),
            readable: Lookups::new(Option::is_some),
            registered: Lookups::new(|_| true),
            schemas: config.schemas.clone(),
        })))
    }

    fn schema(&self, topic: &Topic) -> Option<&'static KnownSchema> {
        self.0.schemas.get(topic).copied()
    }

    #[cfg(test)]
    fn tell(&self, id: u32, found: Option<Fingerprint>) {
        self.0.readable.tell(id, found);
    }

    fn subject(&self, topic: &Topic) -> String {
        format!("{}{topic}-value", self.0.prefix)
    }

    fn failure(&self, error: &SRCError) -> Failure {
        // 404 is a wrong path, or a proxy that looks for the registry itself.
        let is_permanent = matches!(status(error), Some(400 | 401 | 403 | 409 | 422));
        Failure { is_permanent, text: format!("schema registry {}: {}", self.0.urls, explain(error)) }
    }

    /// What values of this id begin with; `None` inside where the registry has no such Avro schema. `None`: it is being asked.
    fn reads(&self, id: u32) -> Result<Option<Option<Fingerprint>>, Failure> {
        self.0.readable.look(&id, |id| {
            let registry = self.clone();
            async move {
                let found = registry.fetch(id).await;
                events::schema_lookup("id", outcome(&found));
                if let Err(failure) = &found {
                    tracing::warn!(id, error = %failure.text, "a schema is not to be had yet; what needs it waits");
                }
                found
            }
        })
    }

    async fn fetch(&self, id: u32) -> Result<Option<Fingerprint>, Failure> {
        let mut absent = 0;
        loop {
            match get_schema_by_id(id, &self.0.settings).await {
                Ok(RegisteredSchema { schema_type: SchemaType::Avro, schema, .. }) => {
                    let learned = codec::learn(&schema);
                    if let Err(error) = &learned {
                        tracing::warn!(id, %error, "a schema of the registry cannot be used");
                    }
                    return Ok(learned.ok());
                }
                Ok(other) => {
                    tracing::warn!(id, kind = ?other.schema_type, "a schema of the registry is not Avro");
                    return Ok(None);
                }
                Err(error) if is_absent(&error) => {
                    absent += 1;
                    if absent == ABSENT {
                        tracing::warn!(id, "the schema registry has no such schema");
                        return Ok(None);
                    }
                    Clock::system().sleep(ABSENT_WAIT).await;
                }
                Err(error) => return Err(self.failure(&error)),
            }
        }
    }

    /// The id under which a schema of ours is registered for a topic; registers it where it is not.
    async fn id(&self, topic: &Topic, schema: &'static KnownSchema) -> Result<u32, Failure> {
        let ask = |(topic, _): (Topic, Fingerprint)| {
            let registry = self.clone();
            async move {
                let subject = registry.subject(&topic);
                let mut registered = post_schema(&registry.0.settings, subject.clone(), supplied(schema)).await;
                // Two that register a new subject at once: to one of them a registry may say that there is a conflict.
                if registered.as_ref().is_err_and(|error| status(error) == Some(409)) {
                    registered = post_schema(&registry.0.settings, subject.clone(), supplied(schema)).await;
                }
                let id = registered.map(|it| it.id).map_err(|error| {
                    let mut failure = registry.failure(&error);
                    if status(&error) == Some(409) {
                        failure
                            .text
                            .push_str(&format!(": schema {} does not fit those of subject {subject}", schema.name));
                    }
                    failure
                });
                events::schema_lookup("subject", outcome(&id));
                id
            }
        };
        self.0.registered.get(&(topic.clone(), schema.fingerprint()), ask).await
    }

    /// Records as they are written: values of ours in the wire format, everything else as it is.
    async fn encode(&self, records: &[Addressed]) -> Result<Vec<Addressed>, LogError> {
        let mut out = Vec::with_capacity(records.len());
        for record in records {
            let schema = record.value.as_deref().and_then(codec::fingerprint_of).and_then(KnownSchema::of);
            let (Some(schema), Some(value)) = (schema, &record.value) else {
                out.push(record.clone());
                continue;
            };
            let id = self.id(&record.topic, schema).await.map_err(|failure| match failure.is_permanent {
                true => LogError::fatal(failure.text),
                false => LogError::transient(failure.text),
            })?;
            let mut record = Addressed { value: Some(wire::to_confluent(value, id)), ..record.clone() };
            wire::say_confluent(&mut record.headers);
            out.push(record);
        }
        Ok(out)
    }

    /// Whether what the engine writes to a topic could be registered, without doing it.
    ///
    /// # Errors
    /// What the registry says against it, or why it could not be asked.
    pub async fn check(&self, topic: &Topic, schema: &'static KnownSchema) -> Result<(), String> {
        let subject = self.subject(topic);
        match is_compatible_schema(&self.0.settings, subject.clone(), supplied(schema)).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("schema {} does not fit those of subject {subject}", schema.name)),
            // A subject that is not there yet refuses nothing.
            Err(error) if status(&error) == Some(404) => Ok(()),
            Err(error) => Err(self.failure(&error).text),
        }
    }

    /// # Errors
    /// Why the registry could not be asked.
    pub async fn is_there(&self) -> Result<(), String> {
        api::get_all_subjects(&self.0.settings).await.map(drop).map_err(|error| self.failure(&error).text)
    }
}

fn supplied(schema: &KnownSchema) -> SuppliedSchema {
    SuppliedSchema::new(None, SchemaType::Avro, schema.text.to_owned())
}

fn outcome<T>(answer: &Result<T, Failure>) -> &'static str {
    match answer {
        Ok(_) => "ok",
        Err(failure) if failure.is_permanent => "refused",
        Err(_) => "failed",
    }
}

/// The status of an answer that was no success; the library has it in its text only.
fn status(error: &SRCError) -> Option<u16> {
    error.error.rsplit_once("status ")?.1.split(' ').next()?.parse().ok()
}

/// The registry itself says that it has no such schema; another 404 is a proxy's, or a wrong path's. Or it says that the id is
/// none.
fn is_absent(error: &SRCError) -> bool {
    let raw = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<RawError>());
    raw.is_some_and(|raw| raw.error_code == NO_SCHEMA) || status(error) == Some(422)
}

/// What went wrong, down to its first cause.
fn explain(error: &SRCError) -> String {
    let mut text = error.error.clone();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    text
}
