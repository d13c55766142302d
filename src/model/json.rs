//! Looking into a customer's JSON object and splicing into it without touching any other byte: numbers, key order, duplicate
//! keys and escapes stay as they came. On a key that occurs more than once the first occurrence counts.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Deeper nesting than this is refused: no SDK produces it, and whoever reads the event later may recurse.
pub const MAX_DEPTH: usize = 512;

/// What is wrong with a JSON text.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum JsonError {
    #[error("not valid json: {0}")]
    Invalid(String),
    #[error("not a json object")]
    NotAnObject,
    #[error("nested deeper than {MAX_DEPTH} levels")]
    TooDeep,
    #[error("too many elements")]
    TooMany,
}

/// One member of an object.
#[derive(Debug, Clone)]
pub struct Member<'a> {
    pub key: Cow<'a, str>,
    /// The value's text, as it stands in the object.
    pub value: &'a str,
}

/// The members of an object in their order, borrowed from its text.
#[derive(Debug, Clone)]
pub struct Object<'a> {
    text: &'a str,
    members: Vec<Member<'a>>,
}

impl<'a> Object<'a> {
    /// Reads the top level of `text`. The whole text is checked to be JSON.
    ///
    /// # Errors
    /// [`JsonError`] where it is not JSON, or JSON but not an object.
    pub fn parse(text: &'a str) -> Result<Self, JsonError> {
        if !text.trim_start().starts_with('{') {
            serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(invalid)?;
            return Err(JsonError::NotAnObject);
        }
        let mut input = serde_json::Deserializer::from_str(text);
        let (members, _) = input.deserialize_map(Members).map_err(invalid)?;
        input.end().map_err(invalid)?;
        Ok(Self { text: text.trim(), members })
    }

    /// Reads an object and the elements of the array that is its first member `key`: each as an object, or none where it is something
    /// else. No elements where there is no such member, or it is null; the value itself as the only one where it is no array.
    ///
    /// # Errors
    /// As [`Object::parse`]; [`JsonError::TooMany`] where there are more than `most` elements.
    pub fn parse_list(text: &'a str, key: &str, most: usize) -> Result<(Self, Vec<Option<Self>>), JsonError> {
        let mut input = serde_json::Deserializer::from_str(text);
        let found = input.deserialize_map(WithList { text, key, most });
        if let (Ok((members, elements)), Ok(())) = (found, input.end()) {
            return Ok((Self { text: text.trim(), members }, elements));
        }
        // Something is not as it should be. That is rare enough to be read again.
        let whole = Self::parse(text)?;
        let elements: Vec<&RawValue> = match whole.get(key).unwrap_or("null") {
            "null" => Vec::new(),
            list if list.starts_with('[') => serde_json::from_str(list).map_err(invalid)?,
            only => vec![serde_json::from_str(only).map_err(invalid)?],
        };
        if elements.len() > most {
            return Err(JsonError::TooMany);
        }
        let objects = elements.into_iter().map(|raw| Self::parse(raw.get()).ok()).collect();
        Ok((whole, objects))
    }

    /// The object inside of `text` that has these members; without any, an empty one that is no part of it.
    fn around(text: &'a str, members: Vec<Member<'a>>, first_key: Option<&'a str>) -> Self {
        let place = |part: &str| part.as_ptr() as usize - text.as_ptr() as usize;
        let (Some(key), Some(last)) = (first_key, members.last()) else { return Self { text: "{}", members } };
        // Only blanks stand between an object's brackets and its members.
        let open = text[..place(key)].trim_end().len() - 1;
        let end = place(last.value) + last.value.len();
        let close = text.len() - text[end..].trim_start().len();
        Self { text: &text[open..=close], members }
    }

    /// The object's own text, without what is around it.
    pub fn text(&self) -> &'a str {
        self.text
    }

    /// The raw value of the first member with this key.
    pub fn get(&self, key: &str) -> Option<&'a str> {
        self.members.iter().find(|member| member.key == key).map(|member| member.value)
    }

    pub fn members(&self) -> &[Member<'a>] {
        &self.members
    }

    /// The member as text: a string's content, nothing for null or absent, the JSON text of anything else.
    pub fn text_of(&self, key: &str) -> Cow<'a, str> {
        self.get(key).map_or(Cow::Borrowed(""), text_of)
    }

    fn position(&self, part: &str) -> usize {
        part.as_ptr() as usize - self.text.as_ptr() as usize
    }
}

/// A raw value as text: a string's content, nothing for null, the JSON text of anything else.
pub fn text_of(raw: &str) -> Cow<'_, str> {
    match raw.as_bytes() {
        b"null" => Cow::Borrowed(""),
        [b'"', inner @ .., b'"'] if !inner.contains(&b'\\') => Cow::Borrowed(&raw[1..raw.len() - 1]),
        [b'"', ..] => serde_json::from_str::<String>(raw).map_or(Cow::Borrowed(raw), Cow::Owned),
        _ => Cow::Borrowed(raw),
    }
}

/// The content of a raw value that is a string.
pub fn string_of(raw: &str) -> Option<Cow<'_, str>> {
    raw.starts_with('"').then(|| text_of(raw))
}

/// A JSON string with `text` as its content.
pub fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn push_quoted(out: &mut String, text: &str) {
    if text.bytes().any(|byte| byte < b' ' || matches!(byte, b'"' | b'\\' | 0x7F)) {
        return out.push_str(&quote(text));
    }
    out.push('"');
    out.push_str(text);
    out.push('"');
}

/// Refuses what nests deeper than [`MAX_DEPTH`].
///
/// # Errors
/// [`JsonError::TooDeep`].
pub fn check_depth(text: &str) -> Result<(), JsonError> {
    if openings(text) <= MAX_DEPTH {
        return Ok(());
    }
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err(JsonError::TooDeep);
                }
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

/// How many brackets of the opening kinds there are, inside strings too.
fn openings(text: &str) -> usize {
    // Chunks whose count fits into a byte are added up many bytes at a time.
    let count = |chunk: &[u8]| chunk.iter().map(|byte| u8::from(matches!(byte, b'{' | b'['))).sum::<u8>();
    text.as_bytes().chunks(usize::from(u8::MAX)).map(|chunk| usize::from(count(chunk))).sum()
}

/// Collects edits of an object and applies them in one copy.
pub struct Splice<'o, 'a> {
    object: &'o Object<'a>,
    edits: Vec<Edit>,
    /// What is put in, one after the other.
    texts: String,
}

struct Edit {
    at: usize,
    until: usize,
    /// Where its text lies in `texts`.
    text: std::ops::Range<usize>,
}

impl<'o, 'a> Splice<'o, 'a> {
    pub fn new(object: &'o Object<'a>) -> Self {
        Self { object, edits: Vec::with_capacity(8), texts: String::with_capacity(256) }
    }

    /// Sets a top-level member to a text: its first occurrence is replaced, or it is added at the end.
    pub fn set(&mut self, key: &str, text: &str) {
        match self.object.get(key) {
            Some(old) => {
                let (at, from) = (self.object.position(old), self.texts.len());
                push_quoted(&mut self.texts, text);
                self.edits.push(Edit { at, until: at + old.len(), text: from..self.texts.len() });
            }
            None => self.add_text(key, text),
        }
    }

    /// Adds a member at the end of the object: a text.
    pub fn add_text(&mut self, key: &str, text: &str) {
        self.put(self.object.text, self.object.members.is_empty(), key, |texts| push_quoted(texts, text));
    }

    /// Adds a member at the end of the object: JSON as it is.
    pub fn add(&mut self, key: &str, value: &str) {
        self.put(self.object.text, self.object.members.is_empty(), key, |texts| texts.push_str(value));
    }

    /// Adds a text at the end of an object inside this one, given by its own text.
    pub fn add_inside(&mut self, object: &'a str, empty: bool, key: &str, text: &str) {
        self.put(object, empty, key, |texts| push_quoted(texts, text));
    }

    fn put(&mut self, object: &str, empty: bool, key: &str, value: impl FnOnce(&mut String)) {
        let at = self.object.position(object) + object.len() - 1;
        let (is_first, from) = (empty && !self.edits.iter().any(|edit| edit.at == at), self.texts.len());
        if !is_first {
            self.texts.push(',');
        }
        push_quoted(&mut self.texts, key);
        self.texts.push(':');
        value(&mut self.texts);
        self.edits.push(Edit { at, until: at, text: from..self.texts.len() });
    }

    /// Takes out every member with one of these keys. Not to be mixed with [`Splice::add`] on an object that this leaves empty.
    pub fn remove(&mut self, keys: &[&str]) {
        let mut leading = true;
        let mut previous_end = 1;
        for member in &self.object.members {
            let end = self.object.position(member.value) + member.value.len();
            if keys.contains(&member.key.as_ref()) {
                let mut until = end;
                if leading {
                    // Nothing stands before it, so the comma behind it goes instead of the one before.
                    let rest = &self.object.text[end..];
                    let space = rest.len() - rest.trim_start().len();
                    until = if rest[space..].starts_with(',') { end + space + 1 } else { end };
                }
                self.edits.push(Edit { at: previous_end, until, text: 0..0 });
                previous_end = until;
            } else {
                leading = false;
                previous_end = end;
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.edits.is_empty()
    }

    /// The edited text.
    pub fn finish(mut self) -> String {
        self.edits.sort_by_key(|edit| edit.at);
        let mut out = String::with_capacity(self.object.text.len() + self.texts.len());
        let mut at = 0;
        for edit in &self.edits {
            out.push_str(&self.object.text[at..edit.at]);
            out.push_str(&self.texts[edit.text.clone()]);
            at = edit.until;
        }
        out.push_str(&self.object.text[at..]);
        out
    }
}

fn invalid(error: serde_json::Error) -> JsonError {
    JsonError::Invalid(error.to_string())
}

struct Members;

impl<'de> Visitor<'de> for Members {
    /// And the first key, as it stands in the text.
    type Value = (Vec<Member<'de>>, Option<&'de str>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut members, mut first) = (Vec::with_capacity(16), None);
        // As it stands: a lone surrogate escape is legal JSON but no Rust string, and a bare control character is neither.
        while let Some(key) = map.next_key::<&'de RawValue>()? {
            let value: &'de RawValue = map.next_value()?;
            first = first.or(Some(key.get()));
            members.push(Member { key: text_of(key.get()), value: value.get() });
        }
        Ok((members, first))
    }
}

/// The members of an object but one, which is a list of objects.
struct WithList<'t, 'k> {
    text: &'t str,
    key: &'k str,
    most: usize,
}

impl<'de> Visitor<'de> for WithList<'de, '_> {
    type Value = (Vec<Member<'de>>, Vec<Option<Object<'de>>>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut members, mut list) = (Vec::with_capacity(8), None);
        while let Some(key) = map.next_key::<&'de RawValue>()? {
            let key = text_of(key.get());
            if key == self.key && list.is_none() {
                list = Some(map.next_value_seed(Elements { text: self.text, most: self.most })?);
                continue;
            }
            let value: &'de RawValue = map.next_value()?;
            members.push(Member { key, value: value.get() });
        }
        Ok((members, list.unwrap_or_default()))
    }
}

struct Elements<'t> {
    text: &'t str,
    most: usize,
}

impl<'de> DeserializeSeed<'de> for Elements<'de> {
    type Value = Vec<Option<Object<'de>>>;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Self::Value, D::Error> {
        input.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Elements<'de> {
    type Value = Vec<Option<Object<'de>>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::with_capacity(128);
        while let Some(object) = list.next_element_seed(Element(self.text))? {
            if elements.len() == self.most {
                return Err(serde::de::Error::custom("too many"));
            }
            elements.push(Some(object));
        }
        Ok(elements)
    }
}

/// An object inside of a text.
struct Element<'t>(&'t str);

impl<'de> DeserializeSeed<'de> for Element<'de> {
    type Value = Object<'de>;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Self::Value, D::Error> {
        let (members, first_key) = input.deserialize_map(Members)?;
        Ok(Object::around(self.0, members, first_key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> Object<'_> {
        Object::parse(text).expect("an object")
    }

    #[test]
    fn untouched_bytes_stay() {
        let text = " {\"big\": 123456789012345678901234567890 , \"a\":1.0,\"a\":2, \"\\u00e9\":\"\\ud800\", \"z\":\"é\u{2028}\"} ";
        let object = object(text);
        let mut splice = Splice::new(&object);
        splice.set("a", "3");
        splice.set("new", "x\"y");
        assert_eq!(
            splice.finish(),
            "{\"big\": 123456789012345678901234567890 , \"a\":\"3\",\"a\":2, \"\\u00e9\":\"\\ud800\", \"z\":\"é\u{2028}\",\"new\":\"x\\\"y\"}"
        );
    }

    #[test]
    fn members_are_added_to_empty_and_nested_objects() {
        let outer = object("{}");
        let mut splice = Splice::new(&outer);
        splice.add("a", "1");
        splice.add("b", "2");
        assert_eq!(splice.finish(), r#"{"a":1,"b":2}"#);

        let outer = object(r#"{"context":{ },"x":{"y":1}}"#);
        let mut splice = Splice::new(&outer);
        splice.add_inside(outer.get("context").expect("there"), true, "ip", "::1");
        splice.add_inside(outer.get("x").expect("there"), false, "ip", "2");
        splice.add("z", "3");
        assert_eq!(splice.finish(), r#"{"context":{ "ip":"::1"},"x":{"y":1,"ip":"2"},"z":3}"#);
    }

    #[test]
    fn members_are_removed_wherever_they_stand() {
        let cases = [
            (r#"{"a":1,"b":2,"c":3}"#, vec!["a"], r#"{"b":2,"c":3}"#),
            (r#"{"a":1,"b":2,"c":3}"#, vec!["b"], r#"{"a":1,"c":3}"#),
            (r#"{"a":1,"b":2,"c":3}"#, vec!["c"], r#"{"a":1,"b":2}"#),
            (r#"{"a":1 , "b":2,"c":3}"#, vec!["a", "b"], r#"{"c":3}"#),
            (r#"{"a":1,"b":2,"a":3}"#, vec!["a"], r#"{"b":2}"#),
            (r#"{"a":1,"b":2}"#, vec!["a", "b"], r#"{}"#),
            (r#"{ "a":1 }"#, vec!["a"], r#"{ }"#),
        ];
        for (text, keys, expected) in cases {
            let object = object(text);
            let mut splice = Splice::new(&object);
            splice.remove(&keys);
            let found = splice.finish();
            assert_eq!(found, expected, "{text} without {keys:?}");
            serde_json::from_str::<serde_json::Value>(&found).expect("still JSON");
        }
    }

    #[test]
    fn ids_of_any_type_are_read_as_text() {
        let object = object(r#"{"s":"a\nb","n":12345678901234567890,"o":{"x":[1]},"z":null,"u":"\ud800"}"#);
        assert_eq!(object.text_of("s"), "a\nb");
        assert_eq!(object.text_of("n"), "12345678901234567890");
        assert_eq!(object.text_of("o"), r#"{"x":[1]}"#);
        assert_eq!(object.text_of("z"), "");
        assert_eq!(object.text_of("missing"), "");
        assert_eq!(object.text_of("u"), r#""\ud800""#, "a lone surrogate stays as it is written");
    }

    #[test]
    fn a_list_is_read_with_its_envelope() {
        let listed = |text: &'static str| {
            Object::parse_list(text, "batch", 3).map(|(object, list)| {
                let texts = list.iter().map(|element| element.as_ref().map(Object::text)).collect::<Vec<_>>();
                (object.members.len(), texts)
            })
        };
        let cases = [
            (
                r#" {"a":1,"batch":[ { "x" : 1.0,"y":[{}] } ,{}, {"z":"}"}],"b":{}} "#,
                (2, vec![Some(r#"{ "x" : 1.0,"y":[{}] }"#), Some("{}"), Some(r#"{"z":"}"}"#)]),
            ),
            (r#" {"a":1,"batch":[ {"x":1.0} ,2,1e999],"b":{}} "#, (3, vec![Some(r#"{"x":1.0}"#), None, None])),
            (r#"{"batch":[]}"#, (0, vec![])),
            (r#"{"batch":null,"a":1}"#, (2, vec![])),
            (r#"{"a":1}"#, (1, vec![])),
            (r#"{"b\u0061tch":[{ }]}"#, (0, vec![Some("{}")])),
            // The first occurrence counts; what is no list is its only element.
            (r#"{"batch":[{"a":1}],"batch":[2]}"#, (1, vec![Some(r#"{"a":1}"#)])),
            (r#"{"batch":{"a":[1]},"x":2}"#, (2, vec![Some(r#"{"a":[1]}"#)])),
            (r#"{"batch":"x"}"#, (1, vec![None])),
            (r#"{"batch":-1.5}"#, (1, vec![None])),
            (r#"{"batch":true}"#, (1, vec![None])),
        ];
        for (text, found) in cases {
            assert_eq!(listed(text).expect("readable"), found, "{text}");
        }
        for text in
            ["{\"batch\":[1,]}", "{\"batch\":[1}", "{\"batch\":[]}x", "{\"batch\":{\"a\":}}", "{\"batch\":[\"\n\"]}"]
        {
            assert!(matches!(listed(text), Err(JsonError::Invalid(_))), "{text}");
        }
        assert_eq!(listed("[]").unwrap_err(), JsonError::NotAnObject);
        for text in [r#"{"batch":[{},{},{},{}]}"#, r#"{"batch":[1,2,3,4]}"#] {
            assert_eq!(listed(text).unwrap_err(), JsonError::TooMany, "{text}");
        }
    }

    #[test]
    fn broken_texts_are_told_from_other_json() {
        for text in ["", "{", "{\"a\":}", "{\"a\":1}x", "[1", "nul", "{\"a\u{1}\":1}", "{\"a\":{\"b\n\":1}}", "{1:2}"] {
            assert!(matches!(Object::parse(text), Err(JsonError::Invalid(_))), "{text}");
        }
        for text in ["[]", "1", "\"a\"", "null"] {
            assert_eq!(Object::parse(text).unwrap_err(), JsonError::NotAnObject, "{text}");
        }
    }

    #[test]
    fn deep_nesting_is_refused_and_strings_do_not_count() {
        let deep = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        assert_eq!(check_depth(&deep(MAX_DEPTH)), Ok(()));
        assert_eq!(check_depth(&deep(MAX_DEPTH + 1)), Err(JsonError::TooDeep));
        assert_eq!(check_depth(&format!("[\"\\\"{}\"]", "[".repeat(9_000))), Ok(()));
        assert!(Object::parse(&format!("{{\"a\":{}}}", deep(100_000))).is_ok(), "no recursion on the way");
    }
}
