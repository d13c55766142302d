//! What commands show of requests and events without what opens something: keys in headers and parameters, and the URL behind the host,
//! which is the whole secret of many webhooks.

use serde_json::Value;
use url::Url;

use crate::model::json::{Object, Splice};

/// In place of a secret.
pub const HIDDEN: &str = "(hidden)";

/// A header's or a parameter's value, unless its name says that it may be a key.
pub fn shown<'a>(name: &str, value: &'a str) -> &'a str {
    const WORDS: [&str; 8] = ["auth", "key", "token", "secret", "password", "cookie", "signature", "credential"];
    let name = name.to_lowercase();
    if name != "idempotency-key" && WORDS.iter().any(|word| name.contains(word)) { HIDDEN } else { value }
}

/// A destination's URL: scheme, host and port.
pub fn url(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else { return HIDDEN.to_owned() };
    let is_bare = url.path() == "/" && url.query().is_none();
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_path("/");
    url.set_query(None);
    url.set_fragment(None);
    if is_bare { url.into() } else { format!("{url}{HIDDEN}") }
}

/// An event as it is, but for its own `header` object, which is sent to webhooks.
pub fn event(text: &str) -> String {
    let Ok(object) = Object::parse(text) else { return text.to_owned() };
    if object.get("header").is_none() {
        return text.to_owned();
    }
    let mut splice = Splice::new(&object);
    splice.set("header", HIDDEN);
    splice.finish()
}

/// A webhook request: tools put keys into headers and the query, and a source's settings hold them.
pub fn webhook_request(request: &mut Value) {
    for place in ["/request/headers", "/request/query_parameters"] {
        let Some(headers) = request.pointer_mut(place).and_then(Value::as_object_mut) else { continue };
        headers.iter_mut().filter(|(name, _)| shown(name, "") == HIDDEN).for_each(|(_, value)| *value = HIDDEN.into());
    }
    if let Some(Value::String(url)) = request.pointer_mut("/request/url") {
        url.truncate(url.find('?').unwrap_or(url.len()));
    }
    for place in ["/source/Config", "/source/SourceDefinition/Options", "/source/WriteKey"] {
        if let Some(found) = request.pointer_mut(place).filter(|found| !found.is_null()) {
            *found = HIDDEN.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_shown_up_to_the_host() {
        let cases = [
            ("https://hooks.test/services/T0/B0/secret", "https://hooks.test/(hidden)"),
            ("https://user:secret@hooks.test:8443/?key=secret#secret", "https://hooks.test:8443/(hidden)"),
            ("http://127.0.0.1:9000", "http://127.0.0.1:9000/"),
            ("secret", "(hidden)"),
        ];
        for (text, expected) in cases {
            assert_eq!(url(text), expected);
        }
        assert_eq!((shown("X-Api-Key", "v"), shown("idempotency-key", "v"), shown("plan", "v")), (HIDDEN, "v", "v"));
        assert_eq!(event(r#"{"a":1.0,"header":{"k":"secret"}}"#), r#"{"a":1.0,"header":"(hidden)"}"#);
    }
}
