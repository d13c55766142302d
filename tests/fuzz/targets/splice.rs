//! Edits of an object: what was JSON stays JSON, and what was not touched keeps its bytes.
#![no_main]

use laneway::model::json::{Object, Splice, check_depth};
use libfuzzer_sys::fuzz_target;
use serde_json::value::RawValue;

/// Its text, where it has any members, and these.
fn seen<'a>(object: &'a Object<'a>) -> (Option<&'a str>, Vec<(&'a str, &'a str)>) {
    let members: Vec<_> = object.members().iter().map(|member| (member.key.as_ref(), member.value)).collect();
    ((!members.is_empty()).then(|| object.text()), members)
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = check_depth(text);
    // Read with its envelope or each by itself, a list is the same.
    if let (Ok((object, list)), Ok(whole)) = (Object::parse_list(text, "batch", usize::MAX), Object::parse(text)) {
        assert!(object.members().len() <= whole.members().len());
        let raw = whole.get("batch").and_then(|raw| serde_json::from_str::<Vec<&RawValue>>(raw).ok());
        for (element, raw) in list.iter().zip(raw.unwrap_or_default()) {
            let alone = Object::parse(raw.get()).ok();
            assert_eq!(element.as_ref().map(seen), alone.as_ref().map(seen));
        }
    }
    let Ok(object) = Object::parse(text) else { return };
    // Of two the first counts.
    if ["added", "raw"].iter().any(|key| object.get(key).is_some()) {
        return;
    }
    let mut splice = Splice::new(&object);
    splice.set("userId", "a \"quoted\" \u{1} text");
    splice.add_text("added", text);
    splice.add("raw", "{\"a\":[1.50]}");
    if let Some(inner) = object.get("context").and_then(|raw| Object::parse(raw).ok()) {
        splice.add_inside(inner.text(), inner.members().is_empty(), "ip", "::1");
    }
    let edited = splice.finish();
    serde_json::from_str::<&RawValue>(&edited).expect("it is JSON still");
    let again = Object::parse(&edited).expect("an object");
    assert_eq!(again.text_of("added"), text);
    for member in object.members() {
        if !["userId", "context"].contains(&member.key.as_ref()) {
            assert_eq!(again.get(&member.key), object.get(&member.key));
        }
    }
    let mut splice = Splice::new(&object);
    splice.remove(&["userId", "context", ""]);
    let shorter = splice.finish();
    let left = Object::parse(&shorter).expect("an object");
    assert!(left.get("userId").is_none() && left.get("context").is_none());
});
