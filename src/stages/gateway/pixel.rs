//! Events from an image's address: every parameter becomes a field, one with dots a nested one.

use serde_json::{Map, Value};

use crate::clock::Timestamp;

/// A transparent GIF of one pixel.
pub const GIF: [u8; 43] = [
    0x47, 0x49, 0x46, 0x38, 0x39, 0x61, 0x01, 0x00, 0x01, 0x00, 0x80, 0x00, 0x00, 0x00, 0x00, 0x00, 0xFF, 0xFF, 0xFF,
    0x21, 0xF9, 0x04, 0x01, 0x00, 0x00, 0x00, 0x00, 0x2C, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x01, 0x00, 0x00, 0x02,
    0x01, 0x44, 0x00, 0x3B, 0x00,
];
/// A query has no room for more.
const FIELDS: usize = 1_000;
const DEPTH: usize = 32;

/// The event that a query describes. None: a track without the name of its event, which says nothing.
pub fn event(kind: &str, query: &str, user_agent: Option<&str>, now: Timestamp) -> Option<String> {
    let mut event = Map::new();
    event.insert("channel".into(), "web".into());
    event.insert("integrations".into(), serde_json::json!({"All": true}));
    let now = now.rfc3339_millis();
    event.insert("originalTimestamp".into(), now.clone().into());
    event.insert("sentAt".into(), now.into());
    let mut seen = std::collections::HashSet::new();
    for (name, value) in url::form_urlencoded::parse(query.as_bytes()).take(FIELDS) {
        if name == "writeKey" || name.is_empty() || !seen.insert(name.clone()) {
            continue;
        }
        let path: Vec<&str> = name.splitn(DEPTH, '.').collect();
        let value = match name.as_ref() {
            // Some clients quote it.
            "anonymousId" => value.trim_matches('"').to_owned(),
            _ => value.into_owned(),
        };
        put(&mut event, &path, value);
    }
    match (kind, event.get("event"), event.get("name")) {
        ("track", Some(Value::String(name)), _) if name.is_empty() => return None,
        ("page", _, Some(Value::String(name))) if name.is_empty() => {
            event.insert("name".into(), "Unknown Page".into());
        }
        _ => {}
    }
    if let Some(agent) = user_agent
        && event.get("context").and_then(|context| context.get("userAgent")).is_none()
    {
        put(&mut event, &["context", "userAgent"], agent.to_owned());
    }
    Some(Value::Object(event).to_string())
}

/// A text in the place of an object keeps its place.
fn put(object: &mut Map<String, Value>, path: &[&str], value: String) {
    match path {
        [] => {}
        [last] => drop(object.insert((*last).to_owned(), value.into())),
        [first, rest @ ..] => {
            let inner = object.entry(*first).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(inner) = inner {
                put(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(kind: &str, query: &str) -> Option<Value> {
        let at = Timestamp::from_millis(1_767_225_602_000);
        event(kind, query, Some("agent"), at).map(|text| serde_json::from_str(&text).expect("JSON"))
    }

    #[test]
    fn a_query_becomes_an_event() {
        let query =
            "writeKey=k&anonymousId=%22a-1%22&name=&context.page.url=http%3A%2F%2Fx&context.page.url=2&context=x&n=1";
        let page = made("page", query).expect("an event");
        assert_eq!(page["anonymousId"], "a-1");
        assert_eq!((&page["name"], &page["n"]), (&"Unknown Page".into(), &"1".into()));
        assert_eq!(page["context"], "x", "a later text wins over the object");
        assert_eq!(page["originalTimestamp"], "2026-01-01T00:00:02.000Z");
        assert!(page.get("writeKey").is_none());
        let nested = made("page", "context.page.url=u&anonymousId=a").expect("an event");
        assert_eq!(
            (&nested["context"]["page"]["url"], &nested["context"]["userAgent"]),
            (&"u".into(), &"agent".into())
        );
        assert!(nested.get("name").is_none());
    }

    #[test]
    fn a_track_without_a_name_is_dropped_and_one_without_the_field_is_not() {
        assert_eq!(made("track", "event=&anonymousId=a"), None);
        assert!(made("track", "anonymousId=a").is_some());
        let deep = format!("{}=x", vec!["a"; 10_000].join("."));
        assert!(made("track", &deep).is_some());
    }
}
