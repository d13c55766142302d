//! The configuration: defaults from the commented file `deploy/laneway.toml`, which is compiled in; then a file, then the
//! environment, then flags. Unknown keys are errors that name the nearest one.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use toml::{Table, Value};

/// The defaults, every key commented.
pub const DEFAULTS: &str = include_str!("../deploy/laneway.toml");
const PREFIX: &str = "LANEWAY_";
/// Sections whose keys are the user's own.
const FREE: [&str; 2] = ["log.kafka.properties", "router.destinations"];

#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    pub instance: Instance,
    pub log: Log,
    pub topics: Topics,
    pub control: Control,
    pub gateway: Gateway,
    pub admin: Admin,
    pub runtime: Runtime,
    pub router: Router,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Instance {
    pub id: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    Kafka,
    Embedded,
    Memory,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Log {
    pub backend: BackendKind,
    pub topic_prefix: String,
    pub kafka: Kafka,
    pub embedded: Embedded,
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

#[derive(Clone, Debug, Deserialize)]
pub struct Control {
    pub workspace_file: PathBuf,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Gateway {
    pub listen: SocketAddr,
    pub trust_forwarded_for: bool,
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

#[derive(Clone, Debug, Deserialize)]
pub struct Router {
    pub in_flight: usize,
    pub in_flight_per_destination: usize,
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
    pub block_private_ips: bool,
    #[serde(deserialize_with = "duration")]
    pub retry_first: Duration,
    #[serde(deserialize_with = "duration")]
    pub retry_cap: Duration,
    #[serde(deserialize_with = "duration")]
    pub retry_window: Duration,
    pub retry_min_attempts: u32,
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
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{path}: {error}")]
    Unreadable { path: PathBuf, error: std::io::Error },
    #[error("{place}: {error}")]
    Invalid { place: String, error: String },
    #[error("{place}: there is no key {key}; the nearest is {nearest}")]
    Unknown { place: String, key: String, nearest: String },
}

impl Config {
    /// `defaults` are a command's own, above the compiled-in ones and below everything that the user says.
    ///
    /// # Errors
    /// [`ConfigError`] names the file or variable, the key and what is wrong.
    pub fn load(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        flags: &[(&str, String)],
        defaults: &[(&str, String)],
    ) -> Result<Self, ConfigError> {
        let mut table: Table = toml::from_str(DEFAULTS).expect("the compiled-in defaults are TOML");
        let known = keys(&table, "");
        for (key, text) in defaults {
            let value = like(key, get(&table, key), text);
            set(&mut table, key, value);
        }
        if let Some(path) = file {
            let unreadable = |error| ConfigError::Unreadable { path: path.to_owned(), error };
            let text = std::fs::read_to_string(path).map_err(unreadable)?;
            let place = path.display().to_string();
            let own: Table = toml::from_str(&text).map_err(|error| syntax(&place, &text, &error))?;
            for (key, value) in leaves(&own, "") {
                check(&known, &key, &place)?;
                set(&mut table, &key, value);
            }
        }
        for (name, text) in environment {
            let Some(path) = name.strip_prefix(PREFIX).filter(|path| path.contains("__")) else { continue };
            let key = path.to_lowercase().replace("__", ".");
            if key == "log.kafka.properties" {
                for (key, value) in pairs(&name, &text)? {
                    set_property(&mut table, &key, value);
                }
                continue;
            }
            check(&known, &key, &name)?;
            let value = like(&key, get(&table, &key), &text);
            set(&mut table, &key, value);
        }
        for (key, text) in flags {
            check(&known, key, "--set")?;
            let value = like(key, get(&table, key), text);
            set(&mut table, key, value);
        }
        table.try_into().map_err(|error: toml::de::Error| invalid("configuration", &error))
    }
}

fn invalid(place: &str, error: &toml::de::Error) -> ConfigError {
    ConfigError::Invalid { place: place.to_owned(), error: error.to_string().trim().to_owned() }
}

/// Without the line itself, which may hold a secret.
fn syntax(place: &str, text: &str, error: &toml::de::Error) -> ConfigError {
    let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    ConfigError::Invalid { place: place.to_owned(), error: format!("line {line}: {}", error.message()) }
}

fn check(known: &[String], key: &str, place: &str) -> Result<(), ConfigError> {
    let is_free = FREE.iter().any(|section| key.starts_with(&format!("{section}.")));
    if is_free || known.iter().any(|known| known == key) {
        return Ok(());
    }
    let nearest = known.iter().max_by(|a, b| {
        let (a, b) = (strsim::jaro_winkler(a, key), strsim::jaro_winkler(b, key));
        a.total_cmp(&b)
    });
    let nearest = nearest.cloned().unwrap_or_default();
    Err(ConfigError::Unknown { place: place.to_owned(), key: key.to_owned(), nearest })
}

fn keys(table: &Table, prefix: &str) -> Vec<String> {
    leaves(table, prefix).into_iter().map(|(key, _)| key).collect()
}

fn leaves(table: &Table, prefix: &str) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for (key, value) in table {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            Value::Table(inner) => found.extend(leaves(inner, &path)),
            other => found.push((path, other.clone())),
        }
    }
    found
}

fn get<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    let (first, rest) = key.split_once('.').unwrap_or((key, ""));
    match (table.get(first)?, rest) {
        (value, "") => Some(value),
        (Value::Table(inner), rest) => get(inner, rest),
        _ => None,
    }
}

fn set(table: &mut Table, key: &str, value: Value) {
    if let Some(property) = key.strip_prefix("log.kafka.properties.") {
        return set_property(table, property, value);
    }
    let (first, rest) = key.split_once('.').unwrap_or((key, ""));
    if rest.is_empty() {
        table.insert(first.to_owned(), value);
    } else if let Value::Table(inner) = table.entry(first.to_owned()).or_insert_with(|| Value::Table(Table::new())) {
        set(inner, rest, value);
    }
}

/// Property names hold dots of their own.
fn set_property(table: &mut Table, key: &str, value: Value) {
    let properties = ["log", "kafka", "properties"].iter().try_fold(table, |table, key| match table.get_mut(*key) {
        Some(Value::Table(inner)) => Some(inner),
        _ => None,
    });
    if let Some(properties) = properties {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        properties.insert(key.to_owned(), Value::String(text));
    }
}

/// A text from outside as the type that the default has, or that a destination's own key has.
fn like(key: &str, default: Option<&Value>, text: &str) -> Value {
    let own = key.strip_prefix("router.destinations.").and_then(|rest| rest.rsplit_once('.')).map(|(_, own)| own);
    let as_default = match (default, own) {
        (Some(Value::Integer(_)), _) | (_, Some("concurrency")) => text.parse().ok().map(Value::Integer),
        (Some(Value::Boolean(_)), _) | (_, Some("ordered")) => text.parse().ok().map(Value::Boolean),
        (_, Some("rate")) => text.parse().ok().map(Value::Float),
        _ => None,
    };
    as_default.unwrap_or_else(|| Value::String(text.to_owned()))
}

fn pairs(place: &str, text: &str) -> Result<Vec<(String, Value)>, ConfigError> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=').ok_or_else(|| ConfigError::Invalid {
            place: place.to_owned(),
            // Without the text itself, which may be a secret.
            error: "expected key=value pairs separated by commas".to_owned(),
        })?;
        Ok((key.trim().to_owned(), Value::String(value.trim().to_owned())))
    };
    text.split(',').filter(|part| !part.trim().is_empty()).map(pair).collect()
}

fn duration<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(input)?;
    let parsed = text.parse::<jiff::SignedDuration>().ok().and_then(|span| Duration::try_from(span).ok());
    parsed.ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not a duration such as 500ms, 10s or 3h")))
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
        let loaded = Config::load(Some(&path), environment, flags, &[]);
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
        let environment = [("LANEWAY_ROUTER__DESTINATIONS__e__RATE", "0.5")];
        let rules = load("", &environment, &flags).expect("valid").router.destinations;
        assert_eq!((rules["d"].rate, rules["d"].concurrency, rules["d"].ordered), (Some(5.0), Some(7), Some(false)));
        assert_eq!((rules["d"].retry_window, rules["e"].rate), (Some(Duration::from_secs(120)), Some(0.5)));
        let wrong = load("[router.destinations.d1]\nrat = 1", &[], &[]).unwrap_err().to_string();
        assert!(wrong.contains("rat"), "{wrong}");
    }

    #[test]
    fn the_defaults_are_complete() {
        Config::load(None, std::iter::empty(), &[], &[]).expect("the compiled-in file has every key");
    }
}
