//! The webhook destination: the event as it is, posted to an URL. Facts (checked against recorded answers of the transformer
//! service in the tests): the method is `webhookMethod`, POST where it is not set; GET and DELETE carry `properties` as
//! parameters instead of a body; header names are lower case; the destination's headers come before the event's own `header`
//! object; `fullPath` replaces the URL and `appendPath` is put behind it; these three fields do not go out.
//!
//! Unlike the service, an event may not lead off the configured host: anybody with a write key could send requests anywhere.

use serde_json::Value;
use url::Url;

use crate::model::delivery::{BodyFormat, HttpRequest};
use crate::model::json::{Object, Splice, string_of, text_of};

/// What of an event is for the transform and does not go out.
const CONTROL_FIELDS: [&str; 3] = ["fullPath", "appendPath", "header"];

/// Headers that say how a request is sent, or to whom: an event does not decide that. The destination's configuration may set
/// `host`, and no other of them.
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

/// The destinations that this serves.
pub const KIND: &str = "WEBHOOK";

/// Why an event cannot be made ready.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WebhookError {
    #[error("the destination has no webhookUrl")]
    NoUrl,
    #[error("webhookMethod {0:?} is not an HTTP method that a webhook takes")]
    Method(String),
    #[error("{0:?} is not an URL: {1}")]
    Url(String, String),
    #[error("the event's fullPath leads off the configured host, to {0:?}")]
    OffHost(String),
}

/// The request for an event. `event` is the whole event with all fields added.
///
/// # Errors
/// [`WebhookError`]; none of them passes by trying again.
pub fn request(event: &Object<'_>, config: &Value) -> Result<HttpRequest, WebhookError> {
    let method = method(config)?;
    let url = target(event, config)?;
    let has_body = matches!(method.as_str(), "POST" | "PUT" | "PATCH");
    let headers = headers(event, config, has_body);
    let (params, body_format, body) = match has_body {
        true => {
            let mut splice = Splice::new(event);
            splice.remove(&CONTROL_FIELDS);
            (Vec::new(), BodyFormat::Json, splice.finish().into())
        }
        false => (params(event), BodyFormat::None, bytes::Bytes::new()),
    };
    Ok(HttpRequest { method, url, headers, params, body_format, body })
}

/// Whether any event can be made ready for a destination that is configured so.
///
/// # Errors
/// [`WebhookError`]
pub fn check(config: &Value) -> Result<(), WebhookError> {
    method(config)?;
    let url = configured(config)?;
    Url::parse(url).map(drop).map_err(|error| WebhookError::Url(url.to_owned(), error.to_string()))
}

fn method(config: &Value) -> Result<String, WebhookError> {
    let method = match config.get("webhookMethod").and_then(Value::as_str) {
        None | Some("") => "POST".to_owned(),
        Some(method) => method.to_uppercase(),
    };
    match ["POST", "PUT", "PATCH", "GET", "DELETE"].contains(&method.as_str()) {
        true => Ok(method),
        false => Err(WebhookError::Method(method)),
    }
}

fn configured(config: &Value) -> Result<&str, WebhookError> {
    let url = config.get("webhookUrl").and_then(Value::as_str).map(str::trim).unwrap_or_default();
    if url.is_empty() { Err(WebhookError::NoUrl) } else { Ok(url) }
}

fn target(event: &Object<'_>, config: &Value) -> Result<String, WebhookError> {
    let configured = configured(config)?;
    let full = event.get("fullPath").and_then(string_of).or_else(|| from_integrations(event));
    let append = event.get("appendPath").and_then(string_of).unwrap_or_default();
    if full.is_none() && append.is_empty() {
        // The common case: the URL is parsed once more where it is sent, errors and all.
        return Ok(configured.to_owned());
    }
    let target = format!("{}{append}", full.as_deref().unwrap_or(configured));
    let parse = |text: &str| Url::parse(text).map_err(|error| WebhookError::Url(text.to_owned(), error.to_string()));
    let (home, away) = (parse(configured)?, parse(&target)?);
    let host = |url: &Url| (url.scheme().to_owned(), url.host_str().map(str::to_owned), url.port_or_known_default());
    if host(&home) != host(&away) {
        return Err(WebhookError::OffHost(away.host_str().unwrap_or_default().to_owned()));
    }
    Ok(target)
}

fn from_integrations<'a>(event: &Object<'a>) -> Option<std::borrow::Cow<'a, str>> {
    let integrations = Object::parse(event.get("integrations")?).ok()?;
    let own = Object::parse(integrations.get("webhook").or_else(|| integrations.get("Webhook"))?).ok()?;
    string_of(own.get("fullPath")?)
}

fn headers(event: &Object<'_>, config: &Value, has_body: bool) -> Vec<(String, String)> {
    let mut headers: Vec<(String, String)> = Vec::new();
    if has_body {
        headers.push(("content-type".into(), "application/json".into()));
    }
    let mut set = |name: &str, value: String, of_event: bool| {
        let name = name.trim().to_lowercase();
        let is_ours = NOT_FROM_EVENTS.contains(&name.as_str()) && (of_event || name != "host");
        if !name.is_empty() && !is_ours {
            headers.retain(|(known, _)| *known != name);
            headers.push((name, value));
        }
    };
    for pair in config.get("headers").and_then(Value::as_array).into_iter().flatten() {
        let text = |key: &str| pair.get(key).and_then(Value::as_str);
        if let (Some(name), Some(value)) = (text("from"), text("to")) {
            set(name, value.to_owned(), false);
        }
    }
    if let Some(own) = event.get("header").and_then(|raw| Object::parse(raw).ok()) {
        for member in own.members() {
            set(&member.key, text_of(member.value).into_owned(), true);
        }
    }
    headers
}

fn params(event: &Object<'_>) -> Vec<(String, String)> {
    let properties = event.get("properties").and_then(|raw| Object::parse(raw).ok());
    let members = properties.iter().flat_map(|properties| properties.members());
    members.map(|member| (member.key.to_string(), text_of(member.value).into_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(more: Value) -> Value {
        let mut config = json!({"webhookUrl": "http://hook.test:7000/hook"});
        for (key, value) in more.as_object().expect("an object") {
            config[key] = value.clone();
        }
        config
    }

    fn made(event: &str, more: Value) -> Result<HttpRequest, WebhookError> {
        request(&Object::parse(event).expect("an event"), &config(more))
    }

    /// The pairs in tests/fixtures/webhook.json restate what the transformer service answered.
    #[test]
    fn requests_are_those_of_the_transformer_service() {
        let pairs: Vec<Value> =
            serde_json::from_str(include_str!("../../../tests/fixtures/webhook.json")).expect("a readable fixture");
        assert!(pairs.len() >= 2);
        for pair in pairs {
            let event = pair["event"].to_string();
            let found = request(&Object::parse(&event).expect("an event"), &pair["config"]).expect("made");
            let expected = &pair["request"];
            assert_eq!(found.method, expected["method"].as_str().expect("text"));
            assert_eq!(found.url, expected["endpoint"].as_str().expect("text"));
            let headers: Value = found.headers.iter().map(|(k, v)| (k.clone(), Value::from(v.clone()))).collect();
            assert_eq!(headers, expected["headers"]);
            let params: Vec<(String, String)> = expected["params"]
                .as_object()
                .expect("an object")
                .iter()
                .map(|(name, value)| (name.clone(), value.as_str().map_or(value.to_string(), str::to_owned)))
                .collect();
            let sorted = |mut list: Vec<(String, String)>| {
                list.sort();
                list
            };
            assert_eq!(sorted(found.params), sorted(params));
            let body: Value = serde_json::from_slice(&found.body).unwrap_or_else(|_| json!({}));
            assert_eq!(body, expected["body"]);
        }
    }

    #[test]
    fn the_event_steers_path_and_headers_and_keeps_its_bytes() {
        let event = r#"{"a":1.0,"header":{"X-One":"1","x-two":{"b":2},"Host":"evil.test","content-length":"5"},"big":12345678901234567890,"appendPath":"/v2?q=1"}"#;
        let found =
            made(event, json!({"headers": [{"from": "X-ONE", "to": "0"}, {"from": "", "to": ""}]})).expect("made");
        assert_eq!(found.url, "http://hook.test:7000/hook/v2?q=1");
        assert_eq!(found.body, r#"{"a":1.0,"big":12345678901234567890}"#);
        let headers: Vec<(&str, &str)> = found.headers.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(headers, [("content-type", "application/json"), ("x-one", "1"), ("x-two", r#"{"b":2}"#)]);
        let inside = r#"{"integrations":{"webhook":{"fullPath":"http://hook.test:7000/other"}}}"#;
        assert_eq!(made(inside, json!({})).expect("made").url, "http://hook.test:7000/other");
    }

    #[test]
    fn what_cannot_be_sent_says_why() {
        for away in
            ["http://169.254.169.254/", "https://hook.test:7000/", "http://hook.test:7001/", "http://evil.test/"]
        {
            let event = format!(r#"{{"fullPath":"{away}"}}"#);
            assert!(matches!(made(&event, json!({})), Err(WebhookError::OffHost(_))), "{away}");
        }
        // Put behind the host it would change it.
        let at = r#"{"appendPath":"@evil.test/"}"#;
        assert!(matches!(made(at, json!({"webhookUrl": "http://hook.test"})), Err(WebhookError::OffHost(_))));
        assert_eq!(made("{}", json!({"webhookUrl": " "})), Err(WebhookError::NoUrl));
        assert_eq!(made("{}", json!({"webhookMethod": "TRACE"})), Err(WebhookError::Method("TRACE".into())));
    }
}
