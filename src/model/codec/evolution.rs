//! What other versions of a schema may look like, and what their values become here.

use apache_avro::types::Value as Avro;
use bytes::Bytes;
use serde_json::{Value as Json, json};

use super::{EVENT, HEADER, Unreadable, decode, encode, header, learn};
use crate::model::event::{Channel, Event};

/// The current event schema, changed.
fn changed(change: impl FnOnce(&mut Vec<Json>)) -> String {
    let mut schema: Json = serde_json::from_str(EVENT.text).expect("JSON");
    change(schema["fields"].as_array_mut().expect("fields"));
    schema.to_string()
}

fn place(fields: &[Json], name: &str) -> usize {
    fields.iter().position(|field| field["name"] == name).expect("such a field")
}

/// An event as somebody with this schema writes it.
fn written(schema: &str, more: &[(&str, Avro)]) -> Bytes {
    let parsed = apache_avro::Schema::parse_str(schema).expect("a schema");
    let text = |text: &str| Avro::String(text.into());
    let all = [
        ("workspace", text("ws-1")),
        ("source", text("src-1")),
        ("write_key", text("wk-1")),
        ("user", Avro::Union(1, Box::new(text("u-1")))),
        ("message_id", text("m-1")),
        ("type", text("track")),
        ("received_at", Avro::TimestampMicros(7)),
        ("request_ip", text("10.0.0.1")),
        ("job_run", Avro::Union(0, Box::new(Avro::Null))),
        ("task_run", Avro::Union(0, Box::new(Avro::Null))),
        ("channel", Avro::Enum(0, "http".into())),
        ("payload", Avro::Bytes(b"{}".to_vec())),
    ];
    let apache_avro::Schema::Record(record) = &parsed else { unreachable!("a record") };
    let field = |name: &str| {
        let of =
            |pairs: &[(&str, Avro)]| pairs.iter().find(|(field, _)| *field == name).map(|(_, value)| value.clone());
        (name.to_owned(), of(more).or_else(|| of(&all)).expect("a value for each field"))
    };
    let value = Avro::Record(record.fields.iter().map(|it| field(&it.name)).collect());
    let datum = apache_avro::to_avro_datum(&parsed, value).expect("the schema takes the value");
    [&header(learn(schema).expect("learned"))[..], &datum].concat().into()
}

fn read(schema: &str, more: &[(&str, Avro)]) -> Result<Event, Unreadable> {
    decode(&written(schema, more))
}

#[test]
fn an_older_reader_passes_over_what_a_newer_writer_added() {
    let newer = changed(|fields| fields.insert(3, json!({"name": "region", "type": "string", "default": "eu"})));
    let event = read(&newer, &[("region", Avro::String("us".into()))]).expect("readable");
    assert_eq!((event.workspace.as_str(), event.channel, &event.payload[..]), ("ws-1", Channel::Http, &b"{}"[..]));
    assert_eq!(event.user.map(|user| user.to_string()), Some("u-1".into()));
}

#[test]
fn a_newer_reader_takes_the_default_of_what_an_older_writer_did_not_know() {
    let older = changed(|fields| {
        let at = place(fields, "task_run");
        fields.remove(at);
    });
    let event = read(&older, &[]).expect("readable");
    assert_eq!((event.task_run, event.received_at.micros()), (None, 7));
}

#[test]
fn order_and_names_of_others_do_not_matter() {
    let others = changed(|fields| {
        fields.reverse();
        let at = place(fields, "received_at");
        fields[at]["type"] = json!("long");
    });
    let others = others.replace("dev.laneway", "com.example");
    let event = read(&others, &[("received_at", Avro::Long(9))]).expect("readable");
    assert_eq!((event.message_id.as_str(), event.received_at.micros()), ("m-1", 9));
}

#[test]
fn what_cannot_be_resolved_says_why() {
    let without = changed(|fields| {
        let at = place(fields, "write_key");
        fields.remove(at);
    });
    let error = read(&without, &[]).expect_err("a field without a default is missing").to_string();
    assert!(error.contains("schema event") && error.contains("write_key"), "{error}");

    let more = changed(|fields| {
        let at = place(fields, "channel");
        fields[at]["type"]["symbols"].as_array_mut().expect("symbols").push(json!("fax"));
    });
    assert!(read(&more, &[]).is_ok(), "a known symbol");
    let error = read(&more, &[("channel", Avro::Enum(5, "fax".into()))]).expect_err("an unknown symbol").to_string();
    assert!(error.contains("fax"), "{error}");
}

#[test]
fn foreign_values_that_are_cut_off_are_refused() {
    let newer = changed(|fields| fields.push(json!({"name": "region", "type": "string"})));
    let whole = written(&newer, &[("region", Avro::String("us".into()))]);
    for cut in HEADER..whole.len() {
        assert!(decode::<Event>(&whole.slice(..cut)).is_err(), "cut at {cut} is noticed");
    }
    let longer = Bytes::from([&whole[..], b"x"].concat());
    assert!(decode::<Event>(&longer).expect_err("too long").to_string().contains("too many"));
}

#[test]
fn a_text_that_is_no_schema_is_not_learned() {
    let itself = r#"{"type":"record","name":"a","fields":[{"name":"b","type":["null","a"]}]}"#;
    let long =
        r#"{"type":"record","name":"a","fields":[{"name":"b","type":{"type":"fixed","name":"f","size":99999999}}]}"#;
    assert_eq!(learn(itself), Err("a contains itself".into()));
    assert_eq!(learn(long), Err("f has 99999999 bytes".into()));
    for text in ["", "{", "\"nothing\"", "{\"type\": \"record\", \"name\": \"x\"}"] {
        assert!(learn(text).is_err(), "{text}");
    }
}

#[test]
fn what_is_learned_does_not_change_our_own() {
    let fingerprint = learn(EVENT.text).expect("ours");
    let event = read(EVENT.text, &[]).expect("readable");
    assert_eq!(encode(&event)[..HEADER], header(fingerprint));
}
