//! The configuration: defaults from the commented file `deploy/laneway.toml`, which is compiled in; then a file, then the
//! environment, then flags. Unknown keys are errors that name the nearest one.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer};

mod layers;
mod numbers;
pub mod schema;

pub use layers::{ConfigError, Layers};

/// The defaults, every key commented.
pub const DEFAULTS: &str = include_str!("../deploy/laneway.toml");

#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    pub instance: Instance,
    pub log: Log,
    pub topics: Topics,
    pub control: Control,
    pub gateway: Gateway,
    pub admin: Admin,
    pub runtime: Runtime,
    pub transformer: Transformer,
    pub processor: Processor,
    pub router: Router,
    pub reporter: Reporter,
    pub store: Store,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Instance {
    pub id: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    Kafka,
    Pulsar,
    Embedded,
    Memory,
}

impl BackendKind {
    /// A cluster of brokers, which several processes use; the others belong to one.
    pub fn is_cluster(self) -> bool {
        matches!(self, BackendKind::Kafka | BackendKind::Pulsar)
    }
}

#[derive(Clone, Debug, Deserialize)]
pub struct Log {
    pub backend: BackendKind,
    pub topic_prefix: String,
    pub kafka: Kafka,
    pub pulsar: Pulsar,
    pub schema_registry: SchemaRegistry,
    pub embedded: Embedded,
}

#[derive(Clone, Deserialize)]
pub struct SchemaRegistry {
    /// Several separated by commas; empty where there is none.
    pub url: String,
    pub username: String,
    pub password: String,
    pub token: String,
    pub ca_file: PathBuf,
}

impl std::fmt::Debug for SchemaRegistry {
    /// Without what lets somebody in.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL too may hold it.
        let Self { username, ca_file, .. } = self;
        f.debug_struct("SchemaRegistry").field("username", username).field("ca_file", ca_file).finish_non_exhaustive()
    }
}

#[derive(Clone, Deserialize)]
pub struct Pulsar {
    pub service_url: String,
    pub admin_url: String,
    pub tenant: String,
    pub namespace: String,
    pub token: String,
    pub oauth2: OAuth2,
    pub ca_file: PathBuf,
}

/// Who gives tokens for Pulsar.
#[derive(Clone, Deserialize)]
pub struct OAuth2 {
    pub issuer_url: String,
    pub credentials: String,
    pub audience: String,
    pub scope: String,
}

impl std::fmt::Debug for Pulsar {
    /// Without what lets somebody in.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { service_url, admin_url, tenant, namespace, ca_file, oauth2: _, token: _ } = self;
        f.debug_struct("Pulsar")
            .field("service_url", service_url)
            .field("admin_url", admin_url)
            .field("tenant", tenant)
            .field("namespace", namespace)
            .field("ca_file", ca_file)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Deserialize)]
pub struct Kafka {
    pub bootstrap_servers: String,
    pub properties: std::collections::BTreeMap<String, String>,
}

impl std::fmt::Debug for Kafka {
    /// Without the properties' values, which may be secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let properties: Vec<&String> = self.properties.keys().collect();
        f.debug_struct("Kafka")
            .field("bootstrap_servers", &self.bootstrap_servers)
            .field("properties", &properties)
            .finish()
    }
}

#[derive(Clone, Debug, Deserialize)]
pub struct Embedded {
    pub data_dir: PathBuf,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Topics {
    pub dir: PathBuf,
}

#[derive(Clone, Deserialize)]
pub struct Control {
    pub workspace_file: PathBuf,
    /// Empty: the file.
    pub url: String,
    pub token: String,
    pub namespace: String,
    pub region: String,
    #[serde(deserialize_with = "some_time")]
    pub poll_interval: Duration,
    pub allow_empty: bool,
    pub suppression: Suppression,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Suppression {
    /// Empty: nobody is suppressed.
    pub url: String,
    #[serde(deserialize_with = "some_time")]
    pub poll_interval: Duration,
    pub page_size: usize,
}

impl std::fmt::Debug for Control {
    /// Without what lets somebody in.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("workspace_file", &self.workspace_file).finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, Deserialize)]
pub struct Gateway {
    pub listen: SocketAddr,
    #[serde(deserialize_with = "networks")]
    pub trusted_proxies: Vec<IpNet>,
    pub cors_origins: String,
    pub max_requests: usize,
    #[serde(deserialize_with = "size")]
    pub body_memory: usize,
    #[serde(deserialize_with = "duration")]
    pub body_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub idle_timeout: Duration,
    #[serde(deserialize_with = "words")]
    pub webhooks_by_get: Vec<String>,
    pub internal: Internal,
    pub limits: EventLimits,
}

#[derive(Clone, Deserialize)]
#[serde(try_from = "RawInternal")]
pub struct Internal {
    pub listen: Option<SocketAddr>,
    pub token: String,
    /// Empty: none.
    pub warehouse_url: String,
}

#[derive(Deserialize)]
struct RawInternal {
    listen: String,
    token: String,
    warehouse_url: String,
}

impl TryFrom<RawInternal> for Internal {
    type Error = String;

    fn try_from(raw: RawInternal) -> Result<Self, String> {
        let listen =
            match raw.listen.as_str() {
                "" => None,
                _ if raw.token.is_empty() => {
                    return Err("gateway.internal.listen needs a gateway.internal.token".to_owned());
                }
                text => Some(text.parse().map_err(|_| {
                    format!("gateway.internal.listen: {text:?} is not an address such as 127.0.0.1:8082")
                })?),
            };
        Ok(Self { listen, token: raw.token, warehouse_url: raw.warehouse_url })
    }
}

impl std::fmt::Debug for Internal {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Internal").field("listen", &self.listen).finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, Deserialize)]
pub struct EventLimits {
    #[serde(deserialize_with = "some_time")]
    pub window: Duration,
    pub source: u32,
    pub workspace: u32,
    /// By source or workspace id.
    pub own: std::collections::BTreeMap<String, u32>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Admin {
    pub listen: SocketAddr,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Runtime {
    #[serde(deserialize_with = "duration")]
    pub session_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub revoke_drain: Duration,
    #[serde(deserialize_with = "duration")]
    pub drain_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub transform_commit_interval: Duration,
    #[serde(deserialize_with = "duration")]
    pub deliver_commit_interval: Duration,
    #[serde(deserialize_with = "size")]
    pub process_memory: usize,
    #[serde(deserialize_with = "size")]
    pub partition_memory: usize,
}

#[derive(Clone, Deserialize)]
pub struct Transformer {
    /// Empty: none.
    pub url: String,
    #[serde(deserialize_with = "some_time")]
    pub timeout: Duration,
}

impl std::fmt::Debug for Transformer {
    /// The URL may let somebody in.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transformer").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, Deserialize)]
pub struct Processor {
    #[serde(deserialize_with = "duration")]
    pub dedup_window: Duration,
    #[serde(deserialize_with = "size")]
    pub dedup_memory: usize,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Reporter {
    #[serde(deserialize_with = "some_time")]
    pub job_retention: Duration,
}

#[derive(Clone, Deserialize)]
pub struct Store {
    /// Empty: a file beside the embedded log.
    pub url: String,
}

impl std::fmt::Debug for Store {
    /// The URL holds a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, Deserialize)]
pub struct Router {
    pub in_flight: usize,
    pub in_flight_per_destination: usize,
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
    pub block_private_ips: bool,
    pub http2: bool,
    #[serde(deserialize_with = "duration")]
    pub retry_first: Duration,
    #[serde(deserialize_with = "duration")]
    pub retry_cap: Duration,
    #[serde(deserialize_with = "duration")]
    pub retry_window: Duration,
    pub retry_min_attempts: u32,
    #[serde(deserialize_with = "duration")]
    pub job_run_retry_window: Duration,
    pub repeat_window: usize,
    /// By destination type or id.
    pub destinations: std::collections::BTreeMap<String, DestinationRules>,
}

/// What is different for a destination, or a type of destinations.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DestinationRules {
    pub ordered: Option<bool>,
    /// Requests per second over the whole cluster.
    pub rate: Option<f64>,
    /// Requests at a time over the whole cluster.
    pub concurrency: Option<usize>,
    #[serde(default, deserialize_with = "some_duration")]
    pub retry_first: Option<Duration>,
    #[serde(default, deserialize_with = "some_duration")]
    pub retry_cap: Option<Duration>,
    #[serde(default, deserialize_with = "some_duration")]
    pub retry_window: Option<Duration>,
    pub retry_min_attempts: Option<u32>,
    #[serde(default, deserialize_with = "some_duration")]
    pub job_run_retry_window: Option<Duration>,
    /// Whether `fullPath`, `appendPath` and `header` of an event change its request. None: where the source's key is secret.
    pub request_from_event: Option<bool>,
}

/// Networks or addresses, separated by commas.
fn networks<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<IpNet>, D::Error> {
    let parse = |text: &str| {
        let address = text.parse::<IpAddr>().map(IpNet::from);
        let wrong = |_| serde::de::Error::custom(format!("{text:?} is not a network such as 10.0.0.0/8"));
        text.parse::<IpNet>().or(address).map_err(wrong)
    };
    String::deserialize(input)?.split(',').map(str::trim).filter(|text| !text.is_empty()).map(parse).collect()
}

/// Separated by commas.
fn words<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<String>, D::Error> {
    let text = String::deserialize(input)?;
    Ok(text.split(',').map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect())
}

/// Points in time that far ahead can be computed.
const MAX_DURATION: Duration = Duration::from_secs(10 * 365 * 86_400);

fn duration<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(input)?;
    let parsed = text.parse::<jiff::SignedDuration>().ok().and_then(|span| Duration::try_from(span).ok());
    let wrong = |what: &str| serde::de::Error::custom(format!("{text:?} is {what}"));
    match parsed {
        None => Err(wrong("not a duration such as 500ms, 10s or 3h")),
        Some(time) if time > MAX_DURATION => Err(wrong("more than 10 years")),
        Some(time) => Ok(time),
    }
}

/// Not none, nor next to none.
fn some_time<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let time = duration(input)?;
    if time < Duration::from_millis(100) {
        Err(serde::de::Error::custom("less than 100ms is too short"))
    } else {
        Ok(time)
    }
}

fn some_duration<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Duration>, D::Error> {
    duration(input).map(Some)
}

fn size<'de, D: Deserializer<'de>>(input: D) -> Result<usize, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Size {
        Bytes(usize),
        Text(String),
    }
    match Size::deserialize(input)? {
        Size::Bytes(bytes) => Ok(bytes),
        Size::Text(text) => parse_size(&text)
            .ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not a size such as 64KiB or 8MiB"))),
    }
}

fn parse_size(text: &str) -> Option<usize> {
    let digits = text.trim().trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let number: usize = digits.trim().parse().ok()?;
    let factor = match text.trim()[digits.len()..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: &str, environment: &[(&str, &str)], flags: &[(&str, String)]) -> Result<Config, ConfigError> {
        let path = std::env::temp_dir().join(format!("laneway-{}.toml", uuid::Uuid::new_v4()));
        std::fs::write(&path, file).expect("written");
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let loaded = Layers::read(Some(&path), environment, flags, &[]).and_then(|layers| layers.config());
        std::fs::remove_file(&path).expect("removed");
        loaded
    }

    #[test]
    fn flags_win_over_environment_over_file_over_defaults() {
        let file =
            "[gateway]\nlisten = \"127.0.0.1:1\"\n[router]\ntimeout = \"2s\"\n[log.kafka.properties]\n\"a.b\" = \"1\"";
        let environment = [
            ("LANEWAY_GATEWAY__LISTEN", "127.0.0.1:2"),
            ("LANEWAY_LOG__BACKEND", "kafka"),
            ("LANEWAY_ROUTER__IN_FLIGHT", "7"),
            ("LANEWAY_LOG__KAFKA__PROPERTIES", "c.d=x=y, e=f"),
            ("OTHER", "ignored"),
        ];
        let config = load(file, &environment, &[("gateway.listen", "127.0.0.1:3".into())]).expect("valid");
        assert_eq!(config.gateway.listen.port(), 3);
        assert_eq!((config.log.backend, config.router.in_flight), (BackendKind::Kafka, 7));
        assert_eq!(config.router.timeout, Duration::from_secs(2));
        assert_eq!(config.runtime.process_memory, 256 << 20);
        let properties: Vec<(&str, &str)> =
            config.log.kafka.properties.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(properties, [("a.b", "1"), ("c.d", "x=y"), ("e", "f")]);
        assert!(!format!("{config:?}").contains("x=y"), "values may be secrets");
    }

    #[test]
    fn the_edge_is_configured() {
        let file = "[gateway]\ntrusted_proxies = \"10.0.0.0/8, ::1\"\n[gateway.limits.own]\n\"src-1\" = 5";
        let own = [("gateway.limits.own.src-2", "7".to_owned())];
        let config =
            load(file, &[("LANEWAY_GATEWAY__LIMITS__SOURCE", "3"), ("LANEWAY_GATEWAY__LIMITS__OWN__2fXk", "9")], &own)
                .expect("valid")
                .gateway;
        assert_eq!((config.trusted_proxies.len(), config.limits.source), (2, 3));
        let own = [("2fXk".to_owned(), 9), ("src-1".to_owned(), 5), ("src-2".to_owned(), 7)];
        assert_eq!(config.limits.own, own.into());
        let wrong = |file: &str| load(file, &[], &[]).unwrap_err().to_string();
        assert!(wrong("[gateway]\ntrusted_proxies = \"10.0.0.0/99\"").contains("not a network"));
        assert!(wrong("[gateway.internal]\nlisten = \"127.0.0.1:1\"").contains("needs a gateway.internal.token"));
        let open = load("[gateway.internal]\nlisten = \"127.0.0.1:1\"\ntoken = \"hunter2\"", &[], &[]).expect("valid");
        assert!(open.gateway.internal.listen.is_some() && !format!("{open:?}").contains("hunter2"));
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        let message = |file: &str, environment: &[(&str, &str)]| load(file, environment, &[]).unwrap_err().to_string();
        assert!(
            message("[gateway]\nlisten_on = 1", &[])
                .ends_with("there is no key gateway.listen_on; the nearest is gateway.listen")
        );
        assert!(message("", &[("LANEWAY_ROUTER__TIMEOT", "1s")]).contains("LANEWAY_ROUTER__TIMEOT"));
        assert!(message("[router]\ntimeout = \"soon\"", &[]).contains("\"soon\" is not a duration"));
        assert!(message("[runtime]\nprocess_memory = \"1 elephant\"", &[]).contains("not a size"));
        assert!(message("[gateway\n", &[]).contains("line 1"));
        assert!(!message("[log.kafka.properties]\n\"sasl.password\" = \"hunter2", &[]).contains("hunter2"));
        let flag = load("", &[], &[("log.bakend", "kafka".into())]).unwrap_err().to_string();
        assert!(flag.contains("the nearest is log.backend"), "{flag}");
    }

    #[test]
    fn destinations_have_rules_of_their_own() {
        let file = "[router.destinations.WEBHOOK]\nrate = 0.5\nretry_window = \"1m\"\n\
                    [router.destinations.d1]\nordered = false\nconcurrency = 3";
        let rules = load(file, &[], &[]).expect("valid").router.destinations;
        let (webhook, one) = (&rules["WEBHOOK"], &rules["d1"]);
        assert_eq!((webhook.rate, webhook.retry_window), (Some(0.5), Some(Duration::from_secs(60))));
        assert_eq!((one.ordered, one.concurrency, one.rate), (Some(false), Some(3), None));
        let flag = |key: &str, text: &str| (format!("router.destinations.d.{key}"), text.to_owned());
        let flags = [flag("rate", "5"), flag("concurrency", "7"), flag("ordered", "false"), flag("retry_window", "2m")];
        let flags: Vec<(&str, String)> = flags.iter().map(|(key, text)| (key.as_str(), text.clone())).collect();
        let environment = [
            ("LANEWAY_ROUTER__DESTINATIONS__e__RATE", "0.5"),
            ("LANEWAY_ROUTER__DESTINATIONS__WEBHOOK__ORDERED", "false"),
        ];
        let rules = load("", &environment, &flags).expect("valid").router.destinations;
        assert_eq!((rules["d"].rate, rules["d"].concurrency, rules["d"].ordered), (Some(5.0), Some(7), Some(false)));
        assert_eq!((rules["d"].retry_window, rules["e"].rate), (Some(Duration::from_secs(120)), Some(0.5)));
        assert_eq!(rules["WEBHOOK"].ordered, Some(false), "a type keeps its case");
        let steered = [("LANEWAY_ROUTER__DESTINATIONS__WEBHOOK__REQUEST_FROM_EVENT", "true")];
        assert_eq!(
            load("", &steered, &[]).expect("valid").router.destinations["WEBHOOK"].request_from_event,
            Some(true)
        );
        let tried = [("LANEWAY_ROUTER__DESTINATIONS__d__RETRY_MIN_ATTEMPTS", "1")];
        assert_eq!(load("", &tried, &[]).expect("valid").router.destinations["d"].retry_min_attempts, Some(1));
        let wrong = load("[router.destinations.d1]\nrat = 1", &[], &[]).unwrap_err().to_string();
        assert!(wrong.contains("rat"), "{wrong}");
    }

    #[test]
    fn the_defaults_are_complete() {
        let layers = Layers::read(None, std::iter::empty(), &[], &[]).expect("the compiled-in file is readable");
        layers.config().expect("it has every key");
    }
}
