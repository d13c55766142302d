//! The headers of a webhook request: of the destination's configuration first, then those that the event adds.

use indexmap::IndexMap;
use serde_json::Value;

use super::{EventFields, WebhookError};
use crate::model::json::{Object, text_of};

/// Headers of one event: more than any receiver reads, and few enough that all of them together cost microseconds. An event with more
/// goes to `proc-errors`.
const MAX_EVENT_HEADERS: usize = 64;
/// Names and values of them together. Most servers refuse a head over 8 to 32 KiB.
const MAX_EVENT_HEADER_BYTES: usize = 16 << 10;

/// Headers that frame a request or address it. An event sets none of them; the destination's configuration sets `host` only.
const NOT_FROM_EVENTS: [&str; 10] = [
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "proxy-authorization",
];

/// Every header once, with a lower-case name. A configured header has precedence over the event's of the same name.
///
/// # Errors
/// [`WebhookError::Headers`] where the event has too many.
pub(super) fn of(
    event: &Object<'_>,
    config: &Value,
    has_body: bool,
    fields: EventFields,
) -> Result<Vec<(String, String)>, WebhookError> {
    let mut headers: IndexMap<String, String> = IndexMap::new();
    for pair in config.get("headers").and_then(Value::as_array).into_iter().flatten() {
        let text = |key: &str| pair.get(key).and_then(Value::as_str);
        let (Some(name), Some(value)) = (text("from"), text("to")) else { continue };
        let name = name.trim().to_lowercase();
        if !name.is_empty() && (name == "host" || !NOT_FROM_EVENTS.contains(&name.as_str())) {
            headers.insert(name, value.to_owned());
        }
    }
    if fields == EventFields::Allowed
        && let Some(own) = event.get("header").and_then(|raw| Object::parse(raw).ok())
    {
        add(&mut headers, &own)?;
    }
    if has_body && !headers.contains_key("content-type") {
        headers.shift_insert(0, "content-type".to_owned(), "application/json".to_owned());
    }
    Ok(headers.into_iter().collect())
}

fn add(headers: &mut IndexMap<String, String>, own: &Object<'_>) -> Result<(), WebhookError> {
    let too_many = |found: String, most: String| Err(WebhookError::Headers { found, most });
    if own.members().len() > MAX_EVENT_HEADERS {
        return too_many(format!("{} members", own.members().len()), MAX_EVENT_HEADERS.to_string());
    }
    let bytes: usize = own.members().iter().map(|member| member.key.len() + text_of(member.value).len()).sum();
    if bytes > MAX_EVENT_HEADER_BYTES {
        return too_many(format!("{bytes} bytes"), MAX_EVENT_HEADER_BYTES.to_string());
    }
    for member in own.members() {
        let name = member.key.trim().to_lowercase();
        if !name.is_empty() && !NOT_FROM_EVENTS.contains(&name.as_str()) {
            headers.entry(name).or_insert_with(|| text_of(member.value).into_owned());
        }
    }
    Ok(())
}
