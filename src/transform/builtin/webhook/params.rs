//! The parameters of a webhook request without a body: an event's traits or properties, flat. Nested values have dotted names
//! (`address.city`), elements of lists their index (`items[0].sku`), as the transformer service names them.

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::WebhookError;
use crate::model::json::{Object, check_depth, string_of, text_of};

/// Of the JSON that becomes parameters. No server takes a URL of this size; without a bound, deep nesting would multiply the work.
const MAX_JSON_BYTES: usize = 128 << 10;
/// Of names and values together. A URL cannot be longer, and names repeat what they are nested in.
const MAX_PARAMS_BYTES: usize = 64 << 10;

/// # Errors
/// [`WebhookError::Params`] where they are too large for a URL.
pub(super) fn of(event: &Object<'_>) -> Result<Vec<(String, String)>, WebhookError> {
    let kind = event.get("type").and_then(string_of).unwrap_or_default();
    let found = match kind.trim().eq_ignore_ascii_case("identify") {
        true => traits(event),
        false => event.get("properties").map(Cow::Borrowed),
    };
    let Some(text) = found.filter(|text| text.starts_with(['{', '['])) else { return Ok(Vec::new()) };
    if text.len() > MAX_JSON_BYTES {
        return Err(WebhookError::Params { found: text.len(), most: MAX_JSON_BYTES });
    }
    let mut flat = Flat::default();
    // Events of foreign producers have not passed the gateway.
    check_depth(&text).map_err(|_| WebhookError::TooDeep)?;
    flat.add(&mut String::new(), &text)?;
    Ok(flat.params)
}

/// The event's own, else those in its context.
fn traits<'a>(event: &Object<'a>) -> Option<Cow<'a, str>> {
    let is_there = |text: &&str| *text != "null";
    if let Some(own) = event.get("traits").filter(is_there) {
        return Some(Cow::Borrowed(own));
    }
    let context = Object::parse(event.get("context")?).ok()?;
    context.get("traits").filter(is_there).map(Cow::Borrowed)
}

#[derive(Default)]
struct Flat {
    params: Vec<(String, String)>,
    bytes: usize,
}

impl Flat {
    /// Recurses as deep as the value, which is checked before.
    fn add(&mut self, path: &mut String, value: &str) -> Result<(), WebhookError> {
        let (known, is_first) = (path.len(), path.is_empty());
        match value.as_bytes().first() {
            Some(b'{') => {
                let Ok(object) = Object::parse(value) else { return Ok(()) };
                for member in object.members() {
                    if !is_first {
                        path.push('.');
                    }
                    path.push_str(&member.key);
                    self.add(path, member.value)?;
                    path.truncate(known);
                }
                match object.members().is_empty() && !is_first {
                    true => self.push(path, "{}".to_owned()),
                    false => Ok(()),
                }
            }
            Some(b'[') => {
                let elements: Vec<&RawValue> = serde_json::from_str(value).unwrap_or_default();
                for (index, element) in elements.iter().enumerate() {
                    path.push_str(&format!("[{index}]"));
                    self.add(path, element.get())?;
                    path.truncate(known);
                }
                match elements.is_empty() && !is_first {
                    true => self.push(path, "[]".to_owned()),
                    false => Ok(()),
                }
            }
            _ => self.push(path, text_of(value).into_owned()),
        }
    }

    fn push(&mut self, path: &str, value: String) -> Result<(), WebhookError> {
        self.bytes += path.len() + value.len();
        if self.bytes > MAX_PARAMS_BYTES {
            return Err(WebhookError::Params { found: self.bytes, most: MAX_PARAMS_BYTES });
        }
        self.params.push((path.to_owned(), value));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(event: &str) -> Vec<(String, String)> {
        of(&Object::parse(event).expect("an event")).expect("few enough")
    }

    #[test]
    fn names_are_those_of_the_transformer_service() {
        let pairs = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let track = r#"{"type":"track","traits":{"no":1},"properties":{"total":1.50,"address":{"city":"Z","geo":[1,[2]]},
            "items":[{"sku":"a\u00e9"},{}],"none":[],"ok":true,"nil":null}}"#;
        assert_eq!(
            flat(track),
            pairs(&[
                ("total", "1.50"),
                ("address.city", "Z"),
                ("address.geo[0]", "1"),
                ("address.geo[1][0]", "2"),
                ("items[0].sku", "aé"),
                ("items[1]", "{}"),
                ("none", "[]"),
                ("ok", "true"),
                ("nil", ""),
            ])
        );
        let own = r#"{"type":" Identify","traits":{"email":"a@b.test"},"context":{"traits":{"email":"other"}}}"#;
        assert_eq!(flat(own), pairs(&[("email", "a@b.test")]));
        let context = r#"{"type":"identify","traits":null,"context":{"traits":{"plan":"pro"}},"properties":{"no":1}}"#;
        assert_eq!(flat(context), pairs(&[("plan", "pro")]));
        for empty in [r#"{"type":"track"}"#, r#"{"properties":"text"}"#, r#"{"type":"identify","context":[]}"#] {
            assert_eq!(flat(empty), []);
        }
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "the time of pure work")]
    fn no_event_makes_parameters_without_bound() {
        let began = std::time::Instant::now();
        let long = "k".repeat(100_000);
        let wide = format!(r#"{{"properties":{{"{long}":[{}1]}}}}"#, "1,".repeat(10_000));
        let deep = format!(r#"{{"properties":{}1{}}}"#, r#"{"k":"#.repeat(500), "}".repeat(500));
        let large = format!(r#"{{"properties":{{"a":"{}"}}}}"#, "x".repeat(1 << 20));
        for event in [&wide, &large] {
            let refused = of(&Object::parse(event).expect("an event"));
            assert!(matches!(refused, Err(WebhookError::Params { .. })));
        }
        assert_eq!(flat(&deep).len(), 1);
        let deeper = format!(r#"{{"properties":{}1{}}}"#, "[".repeat(50_000), "]".repeat(50_000));
        assert_eq!(of(&Object::parse(&deeper).expect("an event")), Err(WebhookError::TooDeep));
        assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
    }
}
