//! The webhook destination: the event as it is, sent to a URL. Facts (checked against recorded answers of the transformer
//! service in the tests): the method is `webhookMethod`, POST where it is not set; GET and DELETE carry `properties`
//! (of an identify its traits) as parameters instead of a body; header names are lower case; `fullPath` replaces the URL and `appendPath` extends it; the event's
//! `header` object adds headers; these three fields do not go out.
//!
//! Unlike the service: an event cannot change scheme, host or port of the configured URL, cannot replace a configured header, and
//! changes path, query and headers only where [`EventFields::Allowed`] says so, because the write key of a browser is public.

mod headers;
mod params;

use std::borrow::Cow;

use serde_json::Value;
use url::Url;

use crate::model::delivery::{BodyFormat, HttpRequest};
use crate::model::json::{Object, Splice, string_of};

/// Fields of an event that are for the transform and do not go out.
const CONTROL_FIELDS: [&str; 3] = ["fullPath", "appendPath", "header"];

/// The destination type that this module serves.
pub const KIND: &str = "WEBHOOK";

/// Whether `fullPath`, `appendPath` and `header` of an event change the request. They are taken out of the body either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventFields {
    Allowed,
    Ignored,
}

/// Why an event cannot be made ready. No message contains the URL, which may hold a secret.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WebhookError {
    #[error("the destination has no webhookUrl")]
    NoUrl,
    #[error("webhookMethod {0:?} is not an HTTP method that a webhook takes")]
    Method(String),
    #[error("{field} is not a URL that a request can be sent to: {why}")]
    Url { field: &'static str, why: String },
    #[error("the event's fullPath or appendPath changes the host of webhookUrl, to {0:?}")]
    OffHost(String),
    #[error("the event's header object has {found}, more than {most}")]
    Headers { found: String, most: String },
    #[error("the event's parameters have {found} bytes, more than {most}: they do not fit into a URL")]
    Params { found: usize, most: usize },
    #[error("the event's properties or traits are nested too deep")]
    TooDeep,
}

/// The request for an event. `event` is the whole event with all fields added.
///
/// # Errors
/// [`WebhookError`]; a retry cannot succeed.
pub fn request(event: &Object<'_>, config: &Value, fields: EventFields) -> Result<HttpRequest, WebhookError> {
    let method = method(config)?;
    let url = target(event, config, fields)?;
    let has_body = matches!(method.as_str(), "POST" | "PUT" | "PATCH");
    let headers = headers::of(event, config, has_body, fields)?;
    let (params, body_format, body) = match has_body {
        true => {
            let mut splice = Splice::new(event);
            splice.remove(&CONTROL_FIELDS);
            (Vec::new(), BodyFormat::Json, splice.finish().into())
        }
        false => (params::of(event)?, BodyFormat::None, bytes::Bytes::new()),
    };
    Ok(HttpRequest { method, url, headers, params, body_format, body })
}

/// Whether any event can be made ready for a destination with this configuration.
///
/// # Errors
/// [`WebhookError`]
pub fn check(config: &Value) -> Result<(), WebhookError> {
    method(config)?;
    let url = parse("webhookUrl", configured(config)?)?;
    // The HTTP client refuses some URLs that `url` accepts, such as `https://{{host}}/`.
    match hyper::Uri::try_from(url.as_str()) {
        Ok(_) if !matches!(url.scheme(), "http" | "https") => {
            Err(WebhookError::Url { field: "webhookUrl", why: "its scheme is neither http nor https".to_owned() })
        }
        Ok(_) => Ok(()),
        Err(error) => Err(WebhookError::Url { field: "webhookUrl", why: error.to_string() }),
    }
}

fn method(config: &Value) -> Result<String, WebhookError> {
    let method = match config.get("webhookMethod").and_then(Value::as_str).map(str::trim) {
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

fn parse(field: &'static str, text: &str) -> Result<Url, WebhookError> {
    Url::parse(text).map_err(|error| WebhookError::Url { field, why: error.to_string() })
}

fn target(event: &Object<'_>, config: &Value, fields: EventFields) -> Result<String, WebhookError> {
    let configured = configured(config)?;
    if fields == EventFields::Ignored {
        return Ok(configured.to_owned());
    }
    let own = own_integration(event);
    let full = control_text(event, own.as_ref(), "fullPath");
    let append = control_text(event, own.as_ref(), "appendPath").unwrap_or_default();
    if full.is_none() && append.is_empty() {
        // The common case: the URL is parsed once more where it is sent, errors and all.
        return Ok(configured.to_owned());
    }
    let target = format!("{}{append}", full.as_deref().unwrap_or(configured));
    let field = if full.is_some() { "the event's fullPath" } else { "webhookUrl with the event's appendPath" };
    let (home, away) = (parse("webhookUrl", configured)?, parse(field, &target)?);
    let host = |url: &Url| (url.scheme().to_owned(), url.host_str().map(str::to_owned), url.port_or_known_default());
    if host(&home) != host(&away) {
        return Err(WebhookError::OffHost(away.host_str().unwrap_or_default().to_owned()));
    }
    Ok(target)
}

/// A text of the event, or of what its `integrations` says about webhooks. An empty one is none.
fn control_text<'a>(event: &Object<'a>, own: Option<&Object<'a>>, field: &str) -> Option<Cow<'a, str>> {
    let text = |object: &Object<'a>| object.get(field).and_then(string_of).filter(|text| !text.trim().is_empty());
    text(event).or_else(|| own.and_then(text))
}

fn own_integration<'a>(event: &Object<'a>) -> Option<Object<'a>> {
    let integrations = Object::parse(event.get("integrations")?).ok()?;
    Object::parse(integrations.get("webhook").or_else(|| integrations.get("Webhook"))?).ok()
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
        request(&Object::parse(event).expect("an event"), &config(more), EventFields::Allowed)
    }

    /// The pairs in tests/fixtures/webhook.json restate what the transformer service answered.
    #[test]
    fn requests_are_those_of_the_transformer_service() {
        let pairs: Vec<Value> =
            serde_json::from_str(include_str!("../../../tests/fixtures/webhook.json")).expect("a readable fixture");
        assert!(pairs.len() >= 2);
        for pair in pairs {
            let event = pair["event"].to_string();
            let found = request(&Object::parse(&event).expect("an event"), &pair["config"], EventFields::Allowed)
                .expect("made");
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
        assert_eq!(headers, [("content-type", "application/json"), ("x-one", "0"), ("x-two", r#"{"b":2}"#)]);
        let cases = [
            (
                r#"{"integrations":{"webhook":{"fullPath":"http://hook.test:7000/other"}}}"#,
                "http://hook.test:7000/other",
            ),
            (r#"{"integrations":{"Webhook":{"appendPath":"/x"}}}"#, "http://hook.test:7000/hook/x"),
            (r#"{"fullPath":"","integrations":{"webhook":{"appendPath":"/x"}}}"#, "http://hook.test:7000/hook/x"),
            (r#"{"fullPath":" ","appendPath":null}"#, "http://hook.test:7000/hook"),
            (
                r#"{"appendPath":"/own","integrations":{"webhook":{"appendPath":"/x"}}}"#,
                "http://hook.test:7000/hook/own",
            ),
        ];
        for (event, url) in cases {
            assert_eq!(made(event, json!({})).expect("made").url, url, "{event}");
        }
    }

    #[test]
    fn the_configuration_of_the_destination_wins_over_the_event() {
        let event = r#"{"header":{"Authorization":"of the event","x-one":"1","X-ONE":"2"}}"#;
        let keys = json!({"headers": [{"from": "authorization", "to": "of the destination"}]});
        let found = made(event, keys).expect("made").headers;
        let headers: Vec<(&str, &str)> = found.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(
            headers,
            [("content-type", "application/json"), ("authorization", "of the destination"), ("x-one", "1")]
        );
    }

    #[test]
    fn an_event_changes_nothing_where_it_may_not() {
        let event = r#"{"a":1,"header":{"x-one":"1"},"fullPath":"http://hook.test:7000/admin","appendPath":"/x","integrations":{"webhook":{"fullPath":"http://hook.test:7000/admin"}}}"#;
        let found = request(&Object::parse(event).expect("an event"), &config(json!({})), EventFields::Ignored);
        let found = found.expect("made");
        assert_eq!(found.url, "http://hook.test:7000/hook");
        assert_eq!(found.headers, [("content-type".to_owned(), "application/json".to_owned())]);
        assert_eq!(
            found.body, r#"{"a":1,"integrations":{"webhook":{"fullPath":"http://hook.test:7000/admin"}}}"#,
            "the control fields do not go out"
        );
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "the time of pure work")]
    fn an_event_with_many_headers_is_refused_at_once() {
        let members: Vec<String> = (0..116_000).map(|n| format!(r#""x{n}":1"#)).collect();
        let event = format!(r#"{{"header":{{{}}}}}"#, members.join(","));
        let began = std::time::Instant::now();
        let error = made(&event, json!({})).unwrap_err().to_string();
        assert_eq!(error, "the event's header object has 116000 members, more than 64");
        assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
        let long = format!(r#"{{"header":{{"x":"{}"}}}}"#, "v".repeat(16 << 10));
        assert!(made(&long, json!({})).unwrap_err().to_string().contains("16385 bytes, more than 16384"));
        let most: Vec<String> = (0..64).map(|n| format!(r#""x{n}":1"#)).collect();
        let found = made(&format!(r#"{{"header":{{{}}}}}"#, most.join(",")), json!({})).expect("made");
        assert_eq!(found.headers.len(), 65);
    }

    #[test]
    fn a_destination_that_no_request_can_be_sent_to_is_named() {
        let of = |url: &str| check(&json!({"webhookUrl": url}));
        assert_eq!(of("https://hook.test/x"), Ok(()));
        let long = format!("https://hook.test/{}", "a".repeat(70_000));
        for wrong in ["https://{{host}}/x", "ftp://hook.test/", "hook.test/x", long.as_str()] {
            let error = of(wrong).expect_err("refused").to_string();
            assert!(error.starts_with("webhookUrl is not a URL") && !error.contains("{{host}}"), "{error}");
        }
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
