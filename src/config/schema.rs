//! The configuration file as a JSON Schema, for editors and for checks before a release: made from the commented defaults, so that
//! it says what they say.

use serde_json::{Map, Value, json};
use toml::Table;

use super::DEFAULTS;

// Each may be looked up elsewhere instead (`layers`).
const DURATION: &str = "^[0-9]+(\\.[0-9]+)?(ms|s|m|h)( ?[0-9]+(ms|s|m|h))*$|\\$\\{|^file:";
const SIZE: &str = "^[0-9]+ ?(B|KiB|MiB|GiB)?$|\\$\\{|^file:";
const BACKEND: &str = "^(kafka|pulsar|embedded|memory)$|\\$\\{|^file:";

/// JSON Schema, draft 2020-12.
pub fn schema() -> Value {
    let defaults: Table = toml::from_str(DEFAULTS).expect("the compiled-in defaults are TOML");
    let mut whole = section(&defaults, "", &comments());
    let texts = json!({"type": ["string", "number", "boolean"]});
    whole["properties"]["log"]["properties"]["kafka"]["properties"]["properties"]["additionalProperties"] = texts;
    whole["properties"]["log"]["properties"]["backend"]["pattern"] = json!(BACKEND);
    whole["properties"]["router"]["properties"]["destinations"]["additionalProperties"] = destination();
    whole["properties"]["gateway"]["properties"]["limits"]["properties"]["own"]["additionalProperties"] =
        json!({"type": "integer", "minimum": 0});
    whole["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    whole["title"] = json!("Laneway");
    whole
}

fn destination() -> Value {
    let duration = json!({"type": "string", "pattern": DURATION});
    json!({"type": "object", "additionalProperties": false, "properties": {
        "ordered": {"type": "boolean"}, "request_from_event": {"type": "boolean"}, "rate": {"type": "number", "exclusiveMinimum": 0}, "concurrency": {"type": "integer", "minimum": 1},
        "retry_first": duration, "retry_cap": duration, "retry_window": duration, "job_run_retry_window": duration,
        "retry_min_attempts": {"type": "integer", "minimum": 0},
    }})
}

fn section(table: &Table, path: &str, comments: &Map<String, Value>) -> Value {
    let mut properties = Map::new();
    for (name, value) in table {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let mut property = match value {
            toml::Value::Table(inner) => section(inner, &path, comments),
            toml::Value::Boolean(default) => json!({"type": "boolean", "default": default}),
            toml::Value::Integer(default) => json!({"type": "integer", "minimum": 0, "default": default}),
            toml::Value::String(default) if default.ends_with("iB") => {
                json!({"type": ["string", "integer"], "pattern": SIZE, "default": default})
            }
            toml::Value::String(default) if default.parse::<jiff::SignedDuration>().is_ok() => {
                json!({"type": "string", "pattern": DURATION, "default": default})
            }
            other => json!({"type": "string", "default": other.as_str()}),
        };
        if let Some(comment) = comments.get(&path) {
            property["description"] = comment.clone();
        }
        properties.insert(name.clone(), property);
    }
    json!({"type": "object", "additionalProperties": false, "properties": properties})
}

/// What stands above each key and section.
fn comments() -> Map<String, Value> {
    let (mut found, mut waiting, mut inside) = (Map::new(), Vec::new(), String::new());
    for line in DEFAULTS.lines() {
        if let Some(comment) = line.strip_prefix('#') {
            waiting.push(comment.trim());
            continue;
        }
        let key = match line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(section) => {
                section.clone_into(&mut inside);
                Some(section.to_owned())
            }
            None => line.split_once(" = ").map(|(key, _)| format!("{inside}.{key}")),
        };
        if let Some(key) = key.filter(|_| !waiting.is_empty()) {
            found.insert(key, json!(waiting.join(" ")));
        }
        waiting.clear();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_says_what_the_defaults_say() {
        let schema = schema();
        let at = |path: &str| path.split('.').fold(&schema, |value, key| &value["properties"][key]);
        assert_eq!(at("router.in_flight")["type"], "integer");
        assert_eq!(at("router.timeout")["pattern"], DURATION);
        assert_eq!(at("router.timeout")["description"], "Of one request, body included.");
        assert_eq!(at("runtime.partition_memory")["pattern"], SIZE);
        assert_eq!(at("gateway.listen")["default"], "0.0.0.0:8080");
        assert_eq!(at("router.destinations")["additionalProperties"]["properties"]["rate"]["type"], "number");
        assert_eq!(at("log.kafka.properties")["additionalProperties"]["type"][0], "string");
        assert_eq!(
            (&at("router")["additionalProperties"], &at("log.backend")["pattern"]),
            (&json!(false), &json!(BACKEND))
        );
    }
}
