//! Values in a topic: Avro single-object encoding (two magic bytes, the schema's fingerprint, the value), written and read
//! by hand for speed and checked against the `apache-avro` crate in the tests below.
//!
//! A value of another schema is recognised by its fingerprint. Where that schema has been learned ([`learn`], from a schema
//! registry) the value is resolved to the current one by Avro's rules, with the `apache-avro` crate: fields that are not known
//! are left out, missing ones get their default. Anything else is an error that says which fingerprint was found.
//!
//! Confluent's wire format (a zero byte, the id of the schema in a registry, the value) is translated by the log, which knows the
//! registry.

mod avro;
mod control;
mod delivery;
mod event;
#[cfg(test)]
mod evolution;
mod failure;
mod job_status;
mod progress;
mod seen;

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use apache_avro::Schema;
use apache_avro::rabin::Rabin;

pub use avro::Unreadable;

/// A type with a schema of its own on a topic.
pub trait Value: Sized {
    fn schema() -> &'static KnownSchema;
    /// About how many bytes it takes: enough to be written without moving.
    fn size(&self) -> usize {
        512
    }
    fn write(&self, out: &mut avro::Writer);
    fn read(input: &mut avro::Reader<'_>) -> Result<Self, Unreadable>;
}

/// A schema with its fingerprint, computed once.
pub struct KnownSchema {
    pub name: &'static str,
    /// The schema document, as in `schemas/`.
    pub text: &'static str,
    fingerprint: Fingerprint,
    parsed: Schema,
}

/// Which schema a value was written with.
pub type Fingerprint = [u8; 8];

impl KnownSchema {
    fn new(name: &'static str, text: &'static str) -> Self {
        let parsed = Schema::parse_str(text).expect("a compiled-in schema parses");
        let fingerprint = fingerprint(&parsed).expect("a canonical form parses");
        Self { name, text, fingerprint, parsed }
    }
}

fn fingerprint(schema: &Schema) -> Result<Fingerprint, apache_avro::Error> {
    let bytes = Schema::parse_str(&canonical_form(schema))?.fingerprint::<Rabin>().bytes;
    Ok(bytes.try_into().expect("a Rabin fingerprint has eight bytes"))
}

/// Schemas of others, by what their values begin with. Of the whole process: a fingerprint means the same everywhere.
static LEARNED: LazyLock<RwLock<HashMap<Fingerprint, Arc<Schema>>>> = LazyLock::new(RwLock::default);

/// What a foreign value may hold: bytes of a text, items of a list. Above the largest record.
const FOREIGN_LENGTH: usize = 8 << 20;

/// Makes values of another schema readable, and tells what they begin with.
///
/// # Errors
/// What is wrong with the schema's text.
pub fn learn(text: &str) -> Result<Fingerprint, String> {
    let schema = Schema::parse_str(text).map_err(|error| error.to_string())?;
    bounded(&schema, &mut Vec::new())?;
    let fingerprint = fingerprint(&schema).map_err(|error| error.to_string())?;
    if KnownSchema::all().iter().all(|known| known.fingerprint != fingerprint) {
        apache_avro::util::max_allocation_bytes(FOREIGN_LENGTH);
        LEARNED.write().unwrap_or_else(PoisonError::into_inner).insert(fingerprint, Arc::new(schema));
    }
    Ok(fingerprint)
}

/// The same value in our own schema, where its writer's has been learned and resolves to it; otherwise as it is, so that
/// [`decode`] says why it does not.
pub fn current(value: bytes::Bytes, schema: &KnownSchema) -> bytes::Bytes {
    match fingerprint_of(&value) {
        Some(found) if found != schema.fingerprint => resolved(schema, found, &value).unwrap_or(value),
        _ => value,
    }
}

/// Refuses schemas whose values cannot be read in bounded space: those that contain themselves, and long fixed bytes.
fn bounded<'a>(schema: &'a Schema, inside: &mut Vec<&'a apache_avro::schema::Name>) -> Result<(), String> {
    match schema {
        Schema::Record(record) => {
            inside.push(&record.name);
            for field in &record.fields {
                bounded(&field.schema, inside)?;
            }
            inside.pop();
            Ok(())
        }
        Schema::Ref { name } if inside.contains(&name) => Err(format!("{name} contains itself")),
        Schema::Fixed(fixed) if fixed.size > FOREIGN_LENGTH => Err(format!("{} has {} bytes", fixed.name, fixed.size)),
        Schema::Array(of) => bounded(&of.items, inside),
        Schema::Map(of) => bounded(&of.types, inside),
        Schema::Union(of) => of.variants().iter().try_for_each(|it| bounded(it, inside)),
        _ => Ok(()),
    }
}

/// The header of single-object encoding: what [`encode`] puts before a value.
pub const HEADER: usize = 10;

/// Which schema a single-object value was written with; none where it is something else.
pub fn fingerprint_of(value: &[u8]) -> Option<Fingerprint> {
    value.strip_prefix(&MAGIC)?.first_chunk().copied()
}

/// The header of a single-object value.
pub fn header(fingerprint: Fingerprint) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..2].copy_from_slice(&MAGIC);
    header[2..].copy_from_slice(&fingerprint);
    header
}

/// The parsing canonical form. The crate leaves `{"type":"long"}` where it took a logical type away, which the
/// specification writes as `"long"`; other implementations would compute another fingerprint from that.
fn canonical_form(schema: &Schema) -> String {
    const PRIMITIVES: [&str; 8] = ["null", "boolean", "int", "long", "float", "double", "bytes", "string"];
    PRIMITIVES.iter().fold(schema.canonical_form(), |text, primitive| {
        text.replace(&format!("{{\"type\":\"{primitive}\"}}"), &format!("\"{primitive}\""))
    })
}

macro_rules! schemas {
    ($($name:ident = $file:literal;)*) => {
        $(pub(crate) static $name: LazyLock<KnownSchema> =
            LazyLock::new(|| KnownSchema::new($file, include_str!(concat!("../../../schemas/", $file, ".avsc"))));)*
    };
}

impl KnownSchema {
    /// The current schemas.
    pub fn all() -> [&'static KnownSchema; 7] {
        [&EVENT, &DELIVERY, &FAILURE, &PROGRESS, &CONTROL, &SEEN, &JOB_STATUS]
    }

    pub fn named(name: &str) -> Option<&'static KnownSchema> {
        Self::all().into_iter().find(|known| known.name == name)
    }

    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The current schema that has this fingerprint.
    pub fn of(fingerprint: Fingerprint) -> Option<&'static KnownSchema> {
        Self::all().into_iter().find(|known| known.fingerprint == fingerprint)
    }
}

schemas! {
    EVENT = "event";
    DELIVERY = "delivery";
    FAILURE = "failure";
    PROGRESS = "progress";
    CONTROL = "control";
    SEEN = "seen";
    JOB_STATUS = "job_status";
}

const MAGIC: [u8; 2] = [0xC3, 0x01];

/// The value as it is stored.
pub fn encode<V: Value>(value: &V) -> Vec<u8> {
    let mut out = avro::Writer::with_capacity(value.size());
    out.raw(&header(V::schema().fingerprint));
    value.write(&mut out);
    out.into_bytes()
}

/// Reads what [`encode`] wrote.
///
/// # Errors
/// [`Unreadable`] says what is wrong and at which byte: another encoding, another schema, or broken content.
pub fn decode<V: Value>(bytes: &bytes::Bytes) -> Result<V, Unreadable> {
    let schema = V::schema();
    match (fingerprint_of(bytes), bytes.as_ref()) {
        (Some(found), _) if found == schema.fingerprint => read(bytes),
        (Some(found), _) => read(&resolved(schema, found, bytes)?),
        (None, [0, id @ ..]) if id.len() >= 4 => {
            let id = u32::from_be_bytes(*id.first_chunk().expect("four bytes"));
            let text = format!("confluent wire format with schema id {id}, of which no schema registry has told");
            Err(Unreadable::new(0, text))
        }
        _ => Err(Unreadable::new(0, "neither avro single-object nor confluent encoding".into())),
    }
}

fn read<V: Value>(bytes: &bytes::Bytes) -> Result<V, Unreadable> {
    let mut input = avro::Reader::new(bytes, HEADER);
    let value = V::read(&mut input)?;
    input.finish()?;
    Ok(value)
}

/// A value of another schema, as one of ours.
fn resolved(schema: &KnownSchema, writer: Fingerprint, bytes: &[u8]) -> Result<bytes::Bytes, Unreadable> {
    let learned = LEARNED.read().unwrap_or_else(PoisonError::into_inner).get(&writer).cloned();
    let Some(learned) = learned else {
        let (found, known) = (u64::from_le_bytes(writer), u64::from_le_bytes(schema.fingerprint));
        let text = format!("fingerprint {found:016x} is not that of schema {} ({known:016x})", schema.name);
        return Err(Unreadable::new(2, text));
    };
    let wrong = |error: apache_avro::Error| {
        let text = format!("it does not become a value of schema {}: {error}", schema.name);
        Unreadable::new(HEADER, text)
    };
    let mut rest = &bytes[HEADER..];
    let value = apache_avro::from_avro_datum(&learned, &mut rest, None).map_err(wrong)?;
    if !rest.is_empty() {
        return Err(Unreadable::new(bytes.len() - rest.len(), format!("{} bytes too many", rest.len())));
    }
    // The crate takes a value that ends too early for one whose last fields are empty.
    if apache_avro::to_avro_datum(&learned, value.clone()).map_err(wrong)?.len() > bytes.len() - HEADER {
        return Err(Unreadable::new(bytes.len(), "it is cut off".into()));
    }
    let resolved = value.resolve(&schema.parsed).map_err(wrong)?;
    let datum = apache_avro::to_avro_datum(&schema.parsed, resolved).map_err(wrong)?;
    Ok([&header(schema.fingerprint)[..], &datum].concat().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use apache_avro::types::Value as Oracle;
    use bytes::Bytes;
    use std::collections::BTreeMap;

    use crate::clock::Timestamp;
    use crate::model::command::Control;
    use crate::model::delivery::{BodyFormat, Delivery, HttpRequest, Payload, TransformAt};
    use crate::model::event::{Channel, Event};
    use crate::model::failure::{Failure, Try};
    use crate::model::job_status::{Counts, FailedRow, JobKey, JobStatus};
    use crate::model::outcome::Reason;
    use crate::model::progress::{
        Drain, Head, KeyProgress, Lane, LaneProgress, Ledger, PartitionProgress, Progress, Run, Target,
    };
    use crate::model::record::{Offset, Partition, Topic};
    use crate::model::seen::Seen;

    fn event() -> Event {
        Event {
            workspace: "ws-1".into(),
            source: "src-1".into(),
            write_key: "wk-1".into(),
            user: Some("anon-1".into()),
            message_id: "m-1".into(),
            event_type: "track".into(),
            received_at: Timestamp::from_micros(1_767_225_602_000_000),
            request_ip: "10.0.0.1".into(),
            job_run: None,
            task_run: Some("t".into()),
            channel: Channel::Publish,
            payload: Bytes::from_static("{\"n\":12345678901234567890,\"é\":1}".as_bytes()),
        }
    }

    fn delivery(payload: Payload) -> Delivery {
        Delivery {
            delivery_id: "00ff".into(),
            workspace: "ws-1".into(),
            source: "src-1".into(),
            destination: "dst-1".into(),
            destination_type: "WEBHOOK".into(),
            user: None,
            message_id: "m-1".into(),
            event_type: "track".into(),
            event_name: Some("Order Completed".into()),
            received_at: Timestamp::from_micros(-1),
            job_run: Some("run".into()),
            task_run: None,
            record_id: Some(Bytes::from_static(b"7")),
            transform_at: TransformAt::Nowhere,
            payload,
        }
    }

    fn request() -> Payload {
        Payload::Request(HttpRequest {
            method: "POST".into(),
            url: "http://127.0.0.1/x".into(),
            headers: vec![("a".into(), "1".into()), ("a".into(), "2".into())],
            params: vec![],
            body_format: BodyFormat::JsonArray,
            body: Bytes::from_static(b"[]"),
        })
    }

    fn failure() -> Failure {
        let last = Try { at: Timestamp::from_micros(9), code: 500, message: "no".into() };
        Failure {
            stage: "router".into(),
            reason: Reason::Rejected,
            attempts: 3,
            first: None,
            last: Some(last),
            topic: Topic::DELIVERIES,
            partition: Partition(3),
            offset: Offset::new(99),
            timestamp: Timestamp::from_micros(8),
            key: None,
            value: Some(Bytes::from_static(b"v")),
            headers: vec![("h".into(), Bytes::from_static(b"x"))],
            destination: Some("d".into()),
            source: None,
        }
    }

    fn progress() -> Vec<Progress> {
        let lane = Lane { destination: "d".into(), replay: Some("r".into()) };
        let run = |first, last| Run { first: Offset::new(first), last: Offset::new(last) };
        let head = Head {
            offset: Offset::new(300),
            attempts: 2,
            spent: std::time::Duration::from_millis(3),
            first_failed_at: Timestamp::from_micros(1),
            next_try_at: Timestamp::from_micros(2),
            first_code: 500,
            first_message: "a".into(),
            last_code: 0,
            last_message: "b".into(),
        };
        vec![
            Progress::Partition(PartitionProgress {
                seq: 7,
                epoch: 2,
                base: Offset::new(256),
                runs: vec![run(257, 257), run(400, 70_000)],
                live: Offset::new(1 << 70),
                clean_stop: true,
                drains: vec![Drain {
                    id: "i".into(),
                    target: Target::User("d".into(), "u/1".into()),
                    bound: Offset::START,
                }],
            }),
            Progress::Lane(LaneProgress {
                lane: lane.clone(),
                tail: Offset::new(1),
                done: vec![],
                pending: 5,
                pending_bytes: 6,
                oldest: Timestamp::from_micros(3),
            }),
            Progress::Key(KeyProgress {
                lane: lane.clone(),
                user: "u".into(),
                head: Some(head),
                followers: vec![Offset::new(301), Offset::new(1_000_000)],
                parked: Some(Offset::new(2_000_000)),
            }),
            Progress::Ledger(
                lane,
                Ledger {
                    taken: 4,
                    delivered: 1,
                    filtered: 1,
                    aborted: 1,
                    drained: 1,
                    open_since: Some(Timestamp::from_micros(9)),
                },
            ),
        ]
    }

    /// What the crate reads from our bytes, and that it writes the same bytes again.
    fn oracle(schema: &KnownSchema, bytes: &[u8]) -> BTreeMap<String, Oracle> {
        let parsed = Schema::parse_str(schema.text).expect("a schema");
        let value = apache_avro::from_avro_datum(&parsed, &mut &bytes[10..], None).expect("the crate reads our bytes");
        let again = apache_avro::to_avro_datum(&parsed, value.clone()).expect("the crate writes it");
        assert_eq!(again, &bytes[10..], "the crate writes the same bytes");
        match value {
            Oracle::Record(fields) => fields.into_iter().collect(),
            other => panic!("not a record: {other:?}"),
        }
    }

    fn round_trip<V: Value + PartialEq + std::fmt::Debug>(value: &V) -> Vec<u8> {
        let bytes = encode(value);
        assert_eq!(&decode::<V>(&Bytes::from(bytes.clone())).expect("readable"), value);
        for cut in 0..bytes.len() {
            assert!(decode::<V>(&Bytes::copy_from_slice(&bytes[..cut])).is_err(), "cut at {cut} is noticed");
        }
        bytes
    }

    #[test]
    fn events_are_what_the_avro_crate_reads() {
        let fields = oracle(&EVENT, &round_trip(&event()));
        assert_eq!(fields["channel"], Oracle::Enum(3, "publish".into()));
        assert_eq!(fields["user"], Oracle::Union(1, Box::new(Oracle::String("anon-1".into()))));
        assert_eq!(fields["received_at"], Oracle::TimestampMicros(1_767_225_602_000_000));
    }

    #[test]
    fn deliveries_are_what_the_avro_crate_reads() {
        for payload in [request(), Payload::Event(Bytes::from_static(b"{}"))] {
            let fields = oracle(&DELIVERY, &round_trip(&delivery(payload)));
            assert_eq!(fields["transform_at"], Oracle::Enum(2, "none".into()));
        }
    }

    #[test]
    fn failures_are_what_the_avro_crate_reads() {
        let fields = oracle(&FAILURE, &round_trip(&failure()));
        assert_eq!(fields["reason"], Oracle::String("rejected".into()));
    }

    #[test]
    fn progress_is_what_the_avro_crate_reads() {
        for value in progress() {
            oracle(&PROGRESS, &round_trip(&value));
        }
    }

    fn control() -> Control {
        Control { kind: "pause".into(), id: "destination/d".into(), version: 7, payload: Bytes::from_static(b"{}") }
    }

    #[test]
    fn control_is_what_the_avro_crate_reads() {
        oracle(&CONTROL, &round_trip(&control()));
    }

    fn seen() -> Seen {
        let events = vec![(1 << 127, Offset::new(300)), (7, Offset::new(70_000))];
        Seen { at: Timestamp::from_micros(5), events }
    }

    #[test]
    fn what_was_seen_is_what_the_avro_crate_reads() {
        oracle(&SEEN, &round_trip(&seen()));
    }

    fn job_status() -> JobStatus {
        let key =
            JobKey { job_run: "r".into(), task_run: "".into(), source: "s".into(), destination: Some("d".into()) };
        let failed_rows = vec![FailedRow { record: Bytes::from_static(b"{\"id\":1}"), code: 400 }];
        JobStatus { key, counts: Counts { taken: 3, passed: 300, failed: 1, failed_rows } }
    }

    #[test]
    fn job_status_is_what_the_avro_crate_reads() {
        oracle(&JOB_STATUS, &round_trip(&job_status()));
    }

    /// Golden bytes: stored records must stay readable, so a change here needs a new schema version.
    #[test]
    fn the_bytes_are_the_golden_ones() {
        let mut found = vec![
            ("event", encode(&event())),
            ("delivery of a request", encode(&delivery(request()))),
            ("delivery of an event", encode(&delivery(Payload::Event(Bytes::from_static(b"{}"))))),
            ("failure", encode(&failure())),
            ("control", encode(&control())),
            ("seen", encode(&seen())),
            ("job status", encode(&job_status())),
        ];
        let names = ["progress of a partition", "progress of a lane", "progress of a key", "ledger"];
        found.extend(names.into_iter().zip(progress().iter().map(encode)));
        let found: BTreeMap<&str, String> = found
            .into_iter()
            .map(|(name, bytes)| (name, bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
            .collect();
        let golden: BTreeMap<&str, String> =
            serde_json::from_str(include_str!("../../../tests/fixtures/golden_bytes.json"))
                .expect("a readable fixture");
        assert_eq!(found, golden, "found: {}", serde_json::to_string_pretty(&found).unwrap_or_default());
    }

    #[test]
    fn foreign_values_are_refused_with_the_reason() {
        let text = |bytes: &'static [u8]| decode::<Event>(&Bytes::from_static(bytes)).unwrap_err().to_string();
        assert!(text(b"").contains("neither avro"));
        assert!(text(b"{\"a\":1}").contains("neither avro"));
        assert!(text(b"\0\0\0\0\x07x").contains("schema id 7"));
        let other = encode(&delivery(request()));
        assert!(decode::<Event>(&Bytes::from(other)).unwrap_err().to_string().contains("fingerprint"));
    }
}
