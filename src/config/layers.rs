//! The configuration's layers, one over the other: the compiled-in defaults, a command's own, a file, the environment, flags.
//!
//! A text may name a secret instead of holding it: `${NAME}` inside it stands for an environment variable (`$${` for `${` itself),
//! and `file:PATH` as the whole of it for a file's content. Names are kept as they are, and only [`Layers::config`] looks behind them, so what is
//! shown never holds what they stand for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::{Config, DEFAULTS, numbers};

const PREFIX: &str = "LANEWAY_";
/// Sections whose keys are the user's own.
const FREE: [&str; 3] = [PROPERTIES, "router.destinations", "gateway.limits.own"];
const PROPERTIES: &str = "log.kafka.properties";
/// In place of what nobody is to see.
const HIDDEN: &str = "(hidden)";

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{path}: {error}")]
    Unreadable { path: PathBuf, error: std::io::Error },
    #[error("{place}: {error}")]
    Invalid { place: String, error: String },
    #[error("{place}: there is no key {key}; the nearest is {nearest}")]
    Unknown { place: String, key: String, nearest: String },
    #[error(
        "the environment variable {name} sets no key (two underscores separate section and key); the nearest is {nearest}"
    )]
    Variable { name: String, nearest: String },
    #[error("{key}: {problem}")]
    Secret { key: String, problem: String },
}

/// What is set, and where.
pub struct Layers {
    table: Table,
    /// Of what is not a compiled-in default.
    places: BTreeMap<String, String>,
    environment: BTreeMap<String, String>,
}

/// A key of the configuration in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    pub key: String,
    /// As it was given; hidden where it may be a secret.
    pub value: Value,
    /// The file, variable or flag that gave it; none: the default.
    pub place: Option<String>,
}

impl Layers {
    /// `defaults` are a command's own, above the compiled-in ones and below everything that the user says.
    ///
    /// # Errors
    /// [`ConfigError`] names the file or variable, the key and what is wrong.
    pub fn read(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        flags: &[(&str, String)],
        defaults: &[(&str, String)],
    ) -> Result<Self, ConfigError> {
        let table: Table = toml::from_str(DEFAULTS).expect("the compiled-in defaults are TOML");
        let known = keys(&table, "");
        let mut layers = Self { table, places: BTreeMap::new(), environment: environment.collect() };
        for (key, text) in defaults {
            layers.set(key, layers.like(key, text), "this command");
        }
        if let Some(path) = file {
            let unreadable = |error| ConfigError::Unreadable { path: path.to_owned(), error };
            let text = std::fs::read_to_string(path).map_err(unreadable)?;
            let place = path.display().to_string();
            let own: Table = toml::from_str(&text).map_err(|error| syntax(&place, &text, &error))?;
            for (key, value) in leaves(&own, "") {
                check(&known, &key, &place)?;
                layers.set(&key, value, &place);
            }
        }
        for (name, text) in layers.environment.clone() {
            let Some(path) = name.strip_prefix(PREFIX).filter(|path| path.contains("__")) else { continue };
            let key = key_of(path);
            if key == PROPERTIES {
                for (property, value) in pairs(&name, &text)? {
                    layers.set(&format!("{PROPERTIES}.{property}"), value, &name);
                }
                continue;
            }
            check(&known, &key, &name)?;
            layers.set(&key, layers.like(&key, &text), &name);
        }
        for (key, text) in flags {
            check(&known, key, "--set")?;
            layers.set(key, layers.like(key, text), "--set");
        }
        layers.check_names(&known)?;
        Ok(layers)
    }

    /// With every secret looked up.
    ///
    /// # Errors
    /// Which key is wrong and what is wrong with it, without any secret.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let mut table = self.table.clone();
        let mut secrets = Vec::new();
        for (key, value) in leaves(&self.table, "") {
            let Value::String(text) = &value else { continue };
            if let Some(secret) = self.look_up(&key, text)? {
                secrets.push(secret.clone());
                put(&mut table, &key, Value::String(secret));
            }
        }
        let config: Result<Config, _> = table.try_into();
        let config = config.map_err(|error: toml::de::Error| {
            let hide = |text: String, secret: &String| {
                let quoted = format!("{secret:?}");
                text.replace(secret.as_str(), HIDDEN).replace(quoted.trim_matches('"'), HIDDEN)
            };
            let error = secrets.iter().filter(|it| !it.is_empty()).fold(error.to_string().trim().to_owned(), hide);
            ConfigError::Invalid { place: "configuration".to_owned(), error }
        })?;
        match numbers::problem(&config) {
            Some((key, problem)) => {
                let place = self.places.get(&key).cloned().unwrap_or_else(|| "configuration".to_owned());
                Err(ConfigError::Invalid { place, error: format!("{key}: {problem}") })
            }
            None => Ok(config),
        }
    }

    /// Refuses variables that look like ours and set nothing, such as one with a single underscore between section and key.
    fn check_names(&self, known: &[String]) -> Result<(), ConfigError> {
        let texts: Vec<Value> = leaves(&self.table, "").into_iter().map(|(_, value)| value).collect();
        let is_named = |name: &str| {
            let name = format!("${{{name}}}");
            texts.iter().any(|value| value.as_str().is_some_and(|text| text.contains(&name)))
        };
        let strays = self.environment.keys().filter_map(|name| Some((name, name.strip_prefix(PREFIX)?)));
        let stray = strays.filter(|(_, rest)| !rest.contains("__") && !is_of_others(rest));
        let Some((name, rest)) = stray.into_iter().find(|(name, _)| !is_named(name)) else { return Ok(()) };
        let wanted = rest.to_lowercase();
        let near = |key: &&String| (strsim::jaro_winkler(&key.replace('.', "_"), &wanted) * 1e9) as u64;
        let nearest =
            known.iter().max_by_key(near).map(|key| format!("{PREFIX}{}", key.replace('.', "__").to_uppercase()));
        Err(ConfigError::Variable { name: name.clone(), nearest: nearest.unwrap_or_default() })
    }

    /// Everything that is in force, by key. What may be a secret is hidden, unless it only names one.
    pub fn settings(&self) -> Vec<Setting> {
        let setting = |(key, value): (String, Value)| {
            let names_one = value.as_str().is_some_and(|text| text.starts_with("file:") || is_all_variable(text));
            let is_secret = is_secret(&key) || value.as_str().is_some_and(holds_credentials);
            let value = if is_secret && !names_one { Value::String(HIDDEN.to_owned()) } else { value };
            Setting { place: self.places.get(&key).cloned(), key, value }
        };
        leaves(&self.table, "").into_iter().map(setting).collect()
    }

    fn set(&mut self, key: &str, value: Value, place: &str) {
        put(&mut self.table, key, value);
        self.places.insert(key.to_owned(), place.to_owned());
    }

    /// A text from outside as the type that the default has, or that a destination's own key has.
    fn like(&self, key: &str, text: &str) -> Value {
        let own = key.strip_prefix("router.destinations.").and_then(|rest| rest.rsplit_once('.')).map(|(_, own)| own);
        let is_limit = key.starts_with("gateway.limits.own.");
        let as_default = match (get(&self.table, key), own) {
            _ if is_limit => text.parse().ok().map(Value::Integer),
            (Some(Value::Integer(_)), _) | (_, Some("concurrency" | "retry_min_attempts")) => {
                text.parse().ok().map(Value::Integer)
            }
            (Some(Value::Boolean(_)), _) | (_, Some("ordered" | "request_from_event")) => {
                text.parse().ok().map(Value::Boolean)
            }
            (_, Some("rate")) => text.parse().ok().map(Value::Float),
            _ => None,
        };
        as_default.unwrap_or_else(|| Value::String(text.to_owned()))
    }

    /// What a text stands for; none where it stands for itself.
    fn look_up(&self, key: &str, text: &str) -> Result<Option<String>, ConfigError> {
        let wrong = |problem: String| ConfigError::Secret { key: key.to_owned(), problem };
        if let Some(path) = text.strip_prefix("file:") {
            let content = std::fs::read_to_string(path).map_err(|error| wrong(format!("file {path}: {error}")))?;
            return Ok(Some(content.trim_end_matches(['\r', '\n']).to_owned()));
        }
        let (mut found, mut rest) = (String::new(), text);
        while let Some((before, after)) = rest.split_once("${") {
            if let Some(before) = before.strip_suffix('$') {
                found.push_str(before);
                found.push_str("${");
                rest = after;
                continue;
            }
            let (name, behind) = after.split_once('}').ok_or_else(|| wrong("a ${ is not closed by }".to_owned()))?;
            let value = self.environment.get(name);
            let value = value.ok_or_else(|| wrong(format!("the environment variable {name} is not set")))?;
            found.push_str(before);
            found.push_str(value);
            rest = behind;
        }
        Ok((rest.len() < text.len()).then(|| found + rest))
    }
}

/// Variables that begin as ours do and are not: of the services for tests, and those that Kubernetes sets for a service named `laneway…`.
fn is_of_others(rest: &str) -> bool {
    const TESTS: [&str; 4] = ["SERVICES_", "TEST_", "KAFKA_FULL_JIT", "PULSAR_TOKENS"];
    let is_of_tests = TESTS.iter().any(|name| rest.starts_with(name));
    let is_port = |part: &str| {
        let (number, after) = part.split_once('_').unwrap_or((part, ""));
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) && !after.is_empty()
    };
    let is_of_kubernetes = rest.ends_with("SERVICE_HOST")
        || rest.contains("SERVICE_PORT")
        || rest == "PORT"
        || rest.ends_with("_PORT")
        || rest.split("PORT_").skip(1).any(is_port);
    is_of_tests || is_of_kubernetes
}

/// The key that a variable sets. Ids and types of destinations keep their case.
fn key_of(path: &str) -> String {
    let parts: Vec<&str> = path.split("__").collect();
    match parts.as_slice() {
        [router, destinations, id, own @ ..]
            if destinations.eq_ignore_ascii_case("destinations") && !own.is_empty() =>
        {
            format!("{router}.{destinations}.").to_lowercase() + id + "." + &own.join("__").to_lowercase()
        }
        [gateway, limits, own, id @ ..] if own.eq_ignore_ascii_case("own") && !id.is_empty() => {
            format!("{gateway}.{limits}.{own}.").to_lowercase() + &id.join("__")
        }
        parts => parts.join(".").to_lowercase(),
    }
}

/// `${NAME}` and nothing else.
fn is_all_variable(text: &str) -> bool {
    text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}')).is_some_and(|name| !name.contains(['$', '{', '}']))
}

/// By its name: librdkafka has many, and new ones.
fn is_secret(key: &str) -> bool {
    const WORDS: [&str; 8] =
        ["credentials", "password", "secret", "token", "jaas", "pem", "assertion", "sasl.oauthbearer.config"];
    let is_of_somebody = [PROPERTIES, "log.pulsar.", "log.schema_registry.", "gateway.internal.", "control.", "store."]
        .iter()
        .any(|section| key.starts_with(section));
    is_of_somebody && WORDS.iter().any(|word| key.contains(word))
}

/// An address with a password in it: before the host, where it may hold slashes by mistake, or in the query.
fn holds_credentials(text: &str) -> bool {
    const WORDS: [&str; 6] = ["password", "secret", "token", "key", "credential", "auth"];
    text.split("://").skip(1).any(|rest| {
        let (before, query) = rest.split_once('?').unwrap_or((rest, ""));
        let named = |pair: &str| pair.split_once('=').map(|(name, _)| name.to_lowercase());
        let is_named = |name: String| WORDS.iter().any(|word| name.contains(word));
        before.contains('@') || query.split(['&', ';']).filter_map(named).any(is_named)
    })
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

fn put(table: &mut Table, key: &str, value: Value) {
    if let Some(property) = key.strip_prefix(PROPERTIES).and_then(|rest| rest.strip_prefix('.')) {
        return put_property(table, property, value);
    }
    let (first, rest) = key.split_once('.').unwrap_or((key, ""));
    if rest.is_empty() {
        table.insert(first.to_owned(), value);
    } else if let Value::Table(inner) = table.entry(first.to_owned()).or_insert_with(|| Value::Table(Table::new())) {
        put(inner, rest, value);
    }
}

/// Property names hold dots of their own.
fn put_property(table: &mut Table, key: &str, value: Value) {
    let properties = PROPERTIES.split('.').try_fold(table, |table, key| match table.get_mut(key) {
        Some(Value::Table(inner)) => Some(inner),
        _ => None,
    });
    if let Some(properties) = properties {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        properties.insert(key.to_owned(), Value::String(text));
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(flags: &[(&str, &str)], environment: &[(&str, &str)]) -> Layers {
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let flags: Vec<(&str, String)> = flags.iter().map(|(key, text)| (*key, (*text).to_owned())).collect();
        Layers::read(None, environment, &flags, &[]).expect("readable")
    }

    #[test]
    fn secrets_are_looked_up_and_never_shown() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "hunter2\n").expect("written");
        let from_file = format!("file:{}", file.path().display());
        let it = layers(
            &[
                ("log.kafka.properties.sasl.password", "${KAFKA_PASSWORD}"),
                ("log.kafka.properties.ssl.key.password", &from_file),
                ("log.kafka.properties.sasl.oauthbearer.client.secret", "hunter4"),
                ("log.kafka.properties.sasl.username", "team-${TEAM}$${x}"),
                ("log.schema_registry.password", "hunter5"),
                ("log.schema_registry.token", "hunter6"),
                ("log.pulsar.token", "hunter8"),
                ("log.pulsar.oauth2.credentials", "hunter9"),
                ("log.schema_registry.url", "http://a:1,https://me:hunter7@b:1/x"),
            ],
            &[("KAFKA_PASSWORD", "hunter3"), ("TEAM", "blue")],
        );
        let properties = it.config().expect("valid").log.kafka.properties;
        assert_eq!(
            (properties["sasl.password"].as_str(), properties["ssl.key.password"].as_str()),
            ("hunter3", "hunter2")
        );
        assert_eq!(properties["sasl.username"], "team-blue${x}");
        let settings = it.settings();
        let shown = |key: &str| {
            let setting = settings.iter().find(|it| it.key == format!("log.kafka.properties.{key}")).expect("set");
            (setting.value.as_str().expect("text").to_owned(), setting.place.clone().expect("a place"))
        };
        assert_eq!(shown("sasl.password"), ("${KAFKA_PASSWORD}".into(), "--set".into()));
        assert_eq!(shown("ssl.key.password").0, from_file);
        assert_eq!(shown("sasl.oauthbearer.client.secret").0, HIDDEN);
        assert!(!format!("{settings:?}").contains("hunter"));
        for url in
            ["postgres://h/d?sslmode=require&password=hunter1", "postgres://u:hun/ter1@h/d", "http://u:hunter1@h"]
        {
            let shown = layers(&[("store.url", url), ("transformer.url", url)], &[]).settings();
            let is_hidden = |key: &str| shown.iter().any(|it| it.key == key && it.value.as_str() == Some(HIDDEN));
            assert!(is_hidden("store.url") && is_hidden("transformer.url"), "{url}");
        }
        let open = layers(&[("store.url", "postgres://h/d?sslmode=require")], &[]).settings();
        assert!(open.iter().any(|it| it.value.as_str() == Some("postgres://h/d?sslmode=require")));
    }

    #[test]
    fn a_secret_that_is_not_there_is_named_by_its_key() {
        let wrong = |value: &str| layers(&[("control.workspace_file", value)], &[]).config().unwrap_err().to_string();
        assert_eq!(wrong("${NOBODY}"), "control.workspace_file: the environment variable NOBODY is not set");
        assert!(wrong("a${").contains("not closed"));
        assert!(wrong("file:/nowhere/at/all").contains("file /nowhere/at/all: No such file"));
    }

    #[test]
    fn a_secret_in_the_wrong_place_is_not_told() {
        for key in ["router.timeout", "log.backend", "router.in_flight"] {
            let it = layers(&[(key, "${PASSWORD}")], &[("PASSWORD", "hun\"xyz\\2")]);
            let error = it.config().unwrap_err().to_string();
            assert!(!error.contains("hun") && !error.contains("xyz"), "{key}: {error}");
        }
    }

    #[test]
    fn a_variable_that_sets_nothing_is_named() {
        let read = |name: &str, flags: &[(&str, String)]| {
            let environment = [(name.to_owned(), "x".to_owned())].into_iter();
            Layers::read(None, environment, flags, &[]).map(drop).map_err(|error| error.to_string())
        };
        for (name, nearest) in [
            ("LANEWAY_LOG_BACKEND", "LANEWAY_LOG__BACKEND"),
            ("LANEWAY_ROUTER_TIMEOT", "LANEWAY_ROUTER__TIMEOUT"),
            ("LANEWAY_LOG_KAFKA_BOOTSTRAP_SERVERS", "LANEWAY_LOG__KAFKA__BOOTSTRAP_SERVERS"),
        ] {
            let error = read(name, &[]).expect_err("refused");
            assert!(error.contains(name) && error.ends_with(&format!("the nearest is {nearest}")), "{error}");
        }
        for other in [
            "LANEWAY_KAFKA_PORT",
            "LANEWAY_SERVICE_HOST",
            "LANEWAY_GATEWAY_SERVICE_PORT_HTTP",
            "LANEWAY_PORT_8080_TCP_ADDR",
            "LANEWAY_GATEWAY_PORT_8080_TCP",
            "LANEWAY_SERVICES_RUN",
            "LANEWAY",
        ] {
            assert_eq!(read(other, &[]), Ok(()), "{other}");
        }
        assert_eq!(read("LANEWAY_PASSWORD", &[("control.token", "${LANEWAY_PASSWORD}".to_owned())]), Ok(()));
    }

    #[test]
    fn what_is_in_force_is_told_with_its_place() {
        let it = layers(&[("router.in_flight", "7")], &[("LANEWAY_LOG__BACKEND", "kafka")]);
        let found = |key: &str| it.settings().into_iter().find(|it| it.key == key).expect("there");
        assert_eq!(found("router.in_flight").value, Value::Integer(7));
        assert_eq!(found("log.backend").place.as_deref(), Some("LANEWAY_LOG__BACKEND"));
        assert_eq!(found("gateway.listen").place, None);
    }
}
