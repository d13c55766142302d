//! From a request's body to events: validation, ids, the fields that users expect to be added. Pure; nothing is stored here.
//!
//! One bad event refuses the whole request, as clients of this API expect: they send it again or drop it as a whole.

use std::borrow::Cow;
use std::sync::Arc;

use uuid::Uuid;

use crate::clock::Timestamp;
use crate::control::workspace::Source;
use crate::model::event::{Channel, Event};
use crate::model::id::{JobRunId, MessageId};
use crate::model::json::{JsonError, Object, Splice, check_depth, string_of};

use super::identity;

/// A request's body after inflation.
pub const MAX_BODY: usize = 4_096_000;
/// One event, as stored.
pub const MAX_EVENT: usize = 1 << 20;

/// All events of a request, as stored: what a batch lends to its events is copied into each, so a small request could ask for
/// any amount of memory.
pub const MAX_STORED: usize = 16 << 20;
/// What an event costs beside its payload and its ids.
pub(super) const RECORD_OVERHEAD_BYTES: usize = 512;
/// A record with everything that goes along: below what topics and clients take.
pub(super) const MAX_RECORD: usize = 5_000_000;
/// The name of a run. What is longer is none: it would stand in every event of the request.
pub(super) const MAX_RUN: usize = 512;
/// W3C trace context; a longer one is dropped, because it is copied into every event of the request.
pub(super) const MAX_TRACE: usize = 128;
/// What a batch lends to its events that have none.
const LENT: [&str; 3] = ["sentAt", "context", "integrations"];

/// What kind of request it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// One event; its type is the path's word.
    Typed(&'static str),
    /// `{"batch": [...]}`; the events bring their types.
    Batch,
}

impl Call {
    /// A list of members is one event and cannot be divided.
    fn largest(self) -> usize {
        if self == Call::Typed("audiencelist") { MAX_BODY } else { MAX_EVENT }
    }
}

/// What the request says about its events beside the body.
#[derive(Clone, Debug)]
pub struct Facts {
    pub received_at: Timestamp,
    pub client_ip: String,
    pub channel: Channel,
    /// Whether the request may name a run of reverse ETL. Those of public write keys may not: each name is a row in the store, and a known one
    /// changes the status of that run.
    pub names_runs: bool,
    /// `X-Rudder-Job-Run-Id` and `X-Rudder-Task-Run-Id`.
    pub job_run: Option<JobRunId>,
    pub task_run: Option<JobRunId>,
}

/// Why a request is refused. Texts and codes are those that clients of this API know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("failed to read writekey from header")]
    NoWriteKey,
    #[error("failed to read writekey from query params")]
    NoWriteKeyInQuery,
    #[error("failed to read source id from header")]
    NoSourceId,
    #[error("invalid source id")]
    InvalidSourceId,
    #[error("invalid replay source")]
    NotAReplaySource,
    #[error("invalid destination id")]
    InvalidDestination,
    #[error("destination is disabled")]
    DestinationDisabled,
    #[error("invalid write key")]
    InvalidWriteKey,
    #[error("source is disabled")]
    SourceDisabled,
    #[error("failed to read body from request")]
    UnreadableBody,
    /// A body that did not come in time.
    #[error("request timeout")]
    Slow,
    #[error("unsupported content encoding")]
    UnknownEncoding,
    /// So many seconds until the next is taken.
    #[error("max requests limit reached")]
    RateLimited { wait: u32 },
    #[error("request size exceeds max limit")]
    TooLarge,
    #[error("invalid json")]
    InvalidJson,
    #[error("event is not a valid rudder event")]
    NotAnEvent,
    #[error("request neither has anonymousId nor userId")]
    NoIdentity,
    #[error("empty batch payload")]
    EmptyBatch,
    #[error("error during parsing multiform")]
    UnreadableForm,
    #[error("service unavailable")]
    Unavailable,
}

impl Refusal {
    pub fn status(self) -> u16 {
        match self {
            Refusal::NoWriteKey
            | Refusal::NoWriteKeyInQuery
            | Refusal::InvalidWriteKey
            | Refusal::NoSourceId
            | Refusal::InvalidSourceId
            | Refusal::NotAReplaySource => 401,
            Refusal::SourceDisabled | Refusal::DestinationDisabled => 404,
            Refusal::Slow => 408,
            Refusal::TooLarge => 413,
            Refusal::UnknownEncoding => 415,
            Refusal::RateLimited { .. } => 429,
            Refusal::InvalidJson
            | Refusal::NotAnEvent
            | Refusal::NoIdentity
            | Refusal::EmptyBatch
            | Refusal::UnreadableBody
            | Refusal::UnreadableForm
            | Refusal::InvalidDestination => 400,
            Refusal::Unavailable => 503,
        }
    }
}

impl From<JsonError> for Refusal {
    fn from(error: JsonError) -> Self {
        match error {
            JsonError::Invalid(_) | JsonError::TooDeep => Refusal::InvalidJson,
            JsonError::NotAnObject => Refusal::NotAnEvent,
            JsonError::TooMany => Refusal::TooLarge,
        }
    }
}

/// The events of a body. One bad event refuses all of them.
///
/// # Errors
/// [`Refusal`], for the request as a whole.
pub fn admit(source: &Arc<Source>, call: Call, body: &[u8], facts: &Facts) -> Result<Vec<Event>, Refusal> {
    judged(source, call, body, facts, |judged| judged.collect())
}

/// The events of a body, each by itself: its event, or why there is none.
///
/// # Errors
/// [`Refusal`], where the body cannot be read as a whole.
pub fn admit_each(
    source: &Arc<Source>,
    call: Call,
    body: &[u8],
    facts: &Facts,
) -> Result<Vec<Result<Event, Refusal>>, Refusal> {
    judged(source, call, body, facts, |judged| Ok(judged.collect()))
}

/// Makes the events of a body, one after the other: a body of a few kilobytes can hold a million things that are none.
fn judged<T>(
    source: &Arc<Source>,
    call: Call,
    body: &[u8],
    facts: &Facts,
    gather: impl FnOnce(&mut dyn Iterator<Item = Result<Event, Refusal>>) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    if body.len() > MAX_BODY {
        return Err(Refusal::TooLarge);
    }
    let text = std::str::from_utf8(body).map_err(|_| Refusal::InvalidJson)?;
    check_depth(text)?;
    if let Call::Typed(_) = call {
        let object = Object::parse(text)?;
        let mut request = Request::new(source, call, facts, Some(&object), None);
        return gather(&mut std::iter::once_with(|| request.take(&object)));
    }
    // A single event in place of the list counts as one.
    let (object, parts) = Object::parse_list(text, "batch", MAX_STORED / RECORD_OVERHEAD_BYTES)?;
    if parts.is_empty() {
        return Err(Refusal::EmptyBatch);
    }
    let mut request = Request::new(source, call, facts, parts[0].as_ref(), Some(&object));
    let take = |part: &Option<Object<'_>>| request.take(part.as_ref().ok_or(Refusal::NotAnEvent)?);
    gather(&mut parts.iter().map(take))
}

/// The write key that a body names: its own, else that of its first event.
pub fn write_key(call: Call, body: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(body).ok()?;
    let of = |object: &Object<'_>| object.get("writeKey").and_then(string_of).map(Cow::into_owned);
    if let Call::Typed(_) = call {
        return of(&Object::parse(text).ok()?);
    }
    let (object, events) = Object::parse_list(text, "batch", MAX_STORED / RECORD_OVERHEAD_BYTES).ok()?;
    of(&object).or_else(|| events.first()?.as_ref().and_then(of))
}

/// What a record of it takes, about: ids stand in the value and in a header each.
pub(super) fn weight(event: &Event) -> usize {
    let ids = [event.user.as_ref().map_or("", |user| user.as_str()), event.message_id.as_str(), &event.event_type];
    let runs = [&event.job_run, &event.task_run].into_iter().flatten().map(|run| run.as_str().len() * 2);
    event.payload.len()
        + ids.iter().map(|id| id.len() * 2).sum::<usize>()
        + runs.sum::<usize>()
        + event.request_ip.len()
        + RECORD_OVERHEAD_BYTES
}

struct Request<'r> {
    source: &'r Arc<Source>,
    call: Call,
    facts: &'r Facts,
    /// What the batch around the events lends to those that have none.
    lent: [Option<&'r str>; 3],
    job_run: Option<JobRunId>,
    task_run: Option<JobRunId>,
    /// As it is written into the events.
    received_at: String,
    /// Bytes of the events so far.
    stored: usize,
}

impl<'r> Request<'r> {
    /// Reverse ETL names its run in the first event, which speaks for the whole request; else the headers do.
    fn new(
        source: &'r Arc<Source>,
        call: Call,
        facts: &'r Facts,
        first: Option<&Object<'_>>,
        envelope: Option<&Object<'r>>,
    ) -> Self {
        let context = first.and_then(|first| first.get("context")).and_then(|raw| Object::parse(raw).ok());
        let sources = context.and_then(|context| Object::parse(context.get("sources")?).ok());
        let run = |key: &str| {
            let text = sources.as_ref()?.get(key).and_then(string_of)?;
            (!text.is_empty()).then(|| JobRunId::from(text.as_ref()))
        };
        let named = |run: &JobRunId| facts.names_runs && run.as_str().len() <= MAX_RUN;
        let job_run = run("job_run_id").or_else(|| facts.job_run.clone()).filter(named);
        let task_run = run("task_run_id").or_else(|| facts.task_run.clone()).filter(named);
        let lent = LENT.map(|field| envelope.and_then(|envelope| envelope.get(field)));
        let received_at = facts.received_at.rfc3339_millis();
        Self { source, call, facts, lent, job_run, task_run, received_at, stored: 0 }
    }

    fn take(&mut self, object: &Object<'_>) -> Result<Event, Refusal> {
        if self.stored > MAX_STORED {
            return Err(Refusal::TooLarge);
        }
        let event = self.event(object)?;
        let weight = weight(&event);
        self.stored += weight;
        if self.stored > MAX_STORED || weight > MAX_RECORD { Err(Refusal::TooLarge) } else { Ok(event) }
    }

    fn event(&self, object: &Object<'_>) -> Result<Event, Refusal> {
        let kind = match self.call {
            Call::Typed(kind) => Some(kind),
            Call::Batch => None,
        };
        let anonymous = object.text_of("anonymousId");
        let user = object.text_of("userId");
        let (anonymous, user) = (identity::clean(&anonymous), identity::clean(&user));
        let event_type = match kind {
            Some(kind) => kind.to_owned(),
            None => object.get("type").and_then(string_of).unwrap_or_default().into_owned(),
        };
        if anonymous.is_empty() && user.is_empty() && !matches!(event_type.as_str(), "extract" | "record") {
            return Err(Refusal::NoIdentity);
        }
        let lent = || LENT.iter().zip(self.lent).filter_map(|(field, value)| Some((*field, value?)));
        let missing: Vec<(&str, &str)> = lent().filter(|(field, _)| object.get(field).is_none()).collect();
        // Before anything is copied.
        if object.text().len() + missing.iter().map(|(_, value)| value.len()).sum::<usize>() > self.call.largest() {
            return Err(Refusal::TooLarge);
        }
        let mut splice = Splice::new(object);
        let message_id = self.message_id(object, &mut splice);
        let mut digits = Uuid::encode_buffer();
        splice.set("rudderId", identity::rudder_id(&user, &anonymous).hyphenated().encode_lower(&mut digits));
        if object.get("receivedAt").is_none() {
            splice.add_text("receivedAt", &self.received_at);
        }
        let request_ip = match object.get("request_ip") {
            Some(own) => string_of(own).unwrap_or_default().into_owned(),
            None => {
                splice.add_text("request_ip", &self.facts.client_ip);
                self.facts.client_ip.clone()
            }
        };
        if let Some(kind) = kind {
            splice.set("type", kind);
        }
        for (field, value) in missing {
            splice.add(field, value);
        }
        let payload = splice.finish();
        if payload.len() > self.call.largest() {
            return Err(Refusal::TooLarge);
        }
        Ok(Event {
            workspace: self.source.workspace.clone(),
            source: self.source.id.clone(),
            write_key: self.source.write_key.clone(),
            user: identity::user(self.source.order_by, &anonymous, &user),
            message_id,
            event_type,
            received_at: self.received_at(object),
            request_ip,
            job_run: self.job_run.clone(),
            task_run: self.task_run.clone(),
            channel: self.facts.channel,
            payload: payload.into(),
        })
    }

    /// What is replayed was received before.
    fn received_at(&self, object: &Object<'_>) -> Timestamp {
        let own = || object.get("receivedAt").and_then(string_of).and_then(|text| Timestamp::parse(&text));
        let before = if self.facts.channel == Channel::Replay { own() } else { None };
        before.unwrap_or(self.facts.received_at)
    }

    /// The event's own id, or a new one where it has none that is a text.
    fn message_id(&self, object: &Object<'_>, splice: &mut Splice<'_, '_>) -> MessageId {
        let own = object.get("messageId").and_then(string_of).unwrap_or_default();
        let own = identity::clean(&own);
        if !own.is_empty() {
            return own.as_ref().into();
        }
        let id = Uuid::new_v4().to_string();
        splice.set("messageId", &id);
        id.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::workspace::Workspace;

    fn source() -> Arc<Source> {
        let workspace =
            Workspace::parse(r#"{"workspaceId":"w","sources":[{"id":"s","writeKey":"k"}]}"#).expect("valid");
        Arc::clone(workspace.by_write_key("k").expect("there"))
    }

    fn facts() -> Facts {
        Facts {
            received_at: Timestamp::from_millis(1_767_225_602_000),
            client_ip: "10.0.0.1".into(),
            channel: Channel::Http,
            names_runs: true,
            job_run: None,
            task_run: Some("from-header".into()),
        }
    }

    fn admitted(call: Call, body: &str) -> Result<Vec<Event>, Refusal> {
        admit(&source(), call, body.as_bytes(), &facts())
    }

    fn payload(event: &Event) -> &str {
        std::str::from_utf8(&event.payload).expect("text")
    }

    #[test]
    fn a_typed_event_gets_what_users_expect_and_keeps_its_bytes() {
        let body =
            r#" {"type":"nonsense","userId":12345678901234567890,"messageId":"m-1","x":1.0,"x":2,"\u00e9":"\ud800"} "#;
        let events = admitted(Call::Typed("track"), body).expect("admitted");
        let event = &events[0];
        assert_eq!(
            payload(event),
            concat!(
                r#"{"type":"track","userId":12345678901234567890,"messageId":"m-1","x":1.0,"x":2,"\u00e9":"\ud800","#,
                r#""rudderId":"f6ae29a3-3d2e-4a05-909a-f4c2b2a5b2a9","receivedAt":"2026-01-01T00:00:02.000Z","request_ip":"10.0.0.1"}"#
            )
            .replace("f6ae29a3-3d2e-4a05-909a-f4c2b2a5b2a9", &identity::rudder_id("12345678901234567890", "").to_string())
        );
        assert_eq!(event.user.as_ref().map(ToString::to_string).as_deref(), Some("12345678901234567890"));
        assert_eq!((event.message_id.as_str(), event.event_type.as_str()), ("m-1", "track"));
        assert_eq!(event.task_run.as_ref().map(ToString::to_string).as_deref(), Some("from-header"));
    }

    #[test]
    fn a_public_key_names_no_run() {
        let body = r#"{"userId":"u","context":{"sources":{"job_run_id":"r","task_run_id":"t"}}}"#;
        let run = |names_runs| {
            let facts = Facts { names_runs, job_run: Some("h".into()), ..facts() };
            let events = admit(&source(), Call::Typed("track"), body.as_bytes(), &facts).expect("admitted");
            (events[0].job_run.clone(), events[0].task_run.clone())
        };
        assert_eq!(run(true), (Some("r".into()), Some("t".into())));
        assert_eq!(run(false), (None, None));
    }

    #[test]
    fn what_the_client_gave_is_not_replaced() {
        let body = r#"{"anonymousId":"a","receivedAt":"garbage","request_ip":"1.2.3.4","messageId":" m "}"#;
        let event = &admitted(Call::Typed("page"), body).expect("admitted")[0];
        assert!(payload(event).contains(r#""receivedAt":"garbage","request_ip":"1.2.3.4","messageId":" m ""#));
        assert_eq!((event.request_ip.as_str(), event.message_id.as_str()), ("1.2.3.4", "m"));
        for blank in [r#""messageId":"  ""#, r#""messageId":7"#, r#""messageId":null"#, r#""x":1"#] {
            let body = format!(r#"{{"anonymousId":"a",{blank}}}"#);
            let event = &admitted(Call::Typed("page"), &body).expect("admitted")[0];
            assert!(Uuid::parse_str(event.message_id.as_str()).is_ok(), "{blank}");
            assert_eq!(payload(event).matches("messageId").count(), 1, "{blank}");
        }
    }

    #[test]
    fn a_batch_lends_its_fields_and_names_the_run() {
        let body = r#"{"sentAt":"T","context":{"a":1},"integrations":{"All":true},"batch":[
            {"type":"track","userId":"u","context":{"sources":{"job_run_id":"run-7"}}},{"type":"record"}]}"#;
        let events = admitted(Call::Batch, body).expect("admitted");
        assert!(payload(&events[0]).contains(r#""sentAt":"T""#) && !payload(&events[0]).contains(r#"{"a":1}"#));
        assert!(payload(&events[1]).contains(r#""context":{"a":1},"integrations":{"All":true}"#));
        for event in &events {
            assert_eq!(event.job_run.as_ref().map(ToString::to_string).as_deref(), Some("run-7"));
        }
        assert_eq!((events[1].event_type.as_str(), &events[1].user), ("record", &None));
        assert_eq!(
            admitted(Call::Batch, r#"{"batch":{"type":"track","userId":"u"}}"#).map(|events| events.len()),
            Ok(1)
        );
    }

    #[test]
    fn each_event_may_be_judged_by_itself() {
        let body = r#"{"sentAt":"T","batch":[{"userId":"u","messageId":"m"},7,{"type":"track"},{"anonymousId":"a"}]}"#;
        let judged = admit_each(&source(), Call::Batch, body.as_bytes(), &facts()).expect("readable");
        let said: Vec<Result<&str, Refusal>> =
            judged.iter().map(|it| it.as_ref().map(payload).map_err(|refusal| *refusal)).collect();
        assert!(matches!(said[0], Ok(text) if text.contains(r#""sentAt":"T""#)), "{said:?}");
        assert_eq!((said[1], said[2]), (Err(Refusal::NotAnEvent), Err(Refusal::NoIdentity)));
        assert!(said[3].is_ok());
        for (body, judged) in [
            ("{\"batch\":[]}", Err(Refusal::EmptyBatch)),
            ("{\"batch\":[1,2]}", Ok(2)),
            ("{", Err(Refusal::InvalidJson)),
        ] {
            let count = admit_each(&source(), Call::Batch, body.as_bytes(), &facts()).map(|all| all.len());
            assert_eq!(count, judged, "{body}");
        }
    }

    #[test]
    fn what_stands_in_every_event_is_bounded() {
        let run = "r".repeat(900_000);
        let first = format!(r#"{{"userId":"u","context":{{"sources":{{"job_run_id":"{run}","task_run_id":"t"}}}}}}"#);
        let body = format!(r#"{{"batch":[{first},{{"userId":"u"}}]}}"#);
        let events = admitted(Call::Batch, &body).expect("admitted");
        assert_eq!((&events[1].job_run, events[1].task_run.as_ref().map(JobRunId::as_str)), (&None, Some("t")));
        let user = format!(r#"{{"userId":"{}"}}"#, "u".repeat(1_500_000));
        assert_eq!(admitted(Call::Typed("audiencelist"), &user).map(|events| events.len()), Ok(1));
        let user = format!(r#"{{"userId":"{}"}}"#, "u".repeat(1_800_000));
        assert_eq!(admitted(Call::Typed("audiencelist"), &user).err(), Some(Refusal::TooLarge));
        let nothings = format!(r#"{{"batch":[{}]}}"#, vec!["{}"; 1_000_000].join(","));
        assert_eq!(admitted(Call::Batch, &nothings).err(), Some(Refusal::TooLarge));
    }

    #[test]
    fn what_is_replayed_keeps_its_time() {
        let facts = Facts { channel: Channel::Replay, ..facts() };
        let body =
            br#"{"batch":[{"userId":"u","receivedAt":"2025-01-01T00:00:00.000Z"},{"userId":"u","receivedAt":"x"}]}"#;
        let events = admit(&source(), Call::Batch, body, &facts).expect("admitted");
        let at: Vec<String> = events.iter().map(|event| event.received_at.rfc3339_millis()).collect();
        assert_eq!(at, ["2025-01-01T00:00:00.000Z", "2026-01-01T00:00:02.000Z"]);
    }

    #[test]
    fn a_list_of_members_may_fill_a_request() {
        let body = format!(r#"{{"userId":"u","a":"{}"}}"#, "x".repeat(MAX_EVENT));
        assert_eq!(admitted(Call::Typed("audiencelist"), &body).map(|events| events.len()), Ok(1));
    }

    #[test]
    fn bad_input_has_its_refusal() {
        let deep = format!(r#"{{"userId":"u","a":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
        let large = format!(r#"{{"userId":"u","a":"{}"}}"#, "x".repeat(MAX_EVENT));
        let too_large = format!(r#"{{"userId":"u","a":"{}"}}"#, "x".repeat(MAX_BODY));
        let track = Call::Typed("track");
        let lent = format!(
            r#"{{"context":{{"a":"{}"}},"batch":[{}]}}"#,
            "x".repeat(500_000),
            vec![r#"{"userId":"u"}"#; 40].join(",")
        );
        let many = format!(r#"{{"batch":[{}]}}"#, vec![r#"{"userId":"u"}"#; 200_000].join(","));
        let cases = [
            (Call::Batch, lent.as_str(), Refusal::TooLarge),
            (Call::Batch, &many, Refusal::TooLarge),
            (track, "", Refusal::InvalidJson),
            (track, "{\"userId\":\"u\"", Refusal::InvalidJson),
            (track, "[1]", Refusal::NotAnEvent),
            (track, "null", Refusal::NotAnEvent),
            (track, "{}", Refusal::NoIdentity),
            (track, r#"{"anonymousId":null,"userId":" \u200b "}"#, Refusal::NoIdentity),
            (track, &deep, Refusal::InvalidJson),
            (track, &large, Refusal::TooLarge),
            (track, &too_large, Refusal::TooLarge),
            (Call::Batch, "{}", Refusal::EmptyBatch),
            (Call::Batch, r#"{"batch":[]}"#, Refusal::EmptyBatch),
            (Call::Batch, r#"{"batch":null}"#, Refusal::EmptyBatch),
            (Call::Batch, r#"{"batch":"x"}"#, Refusal::NotAnEvent),
            (Call::Batch, r#"{"batch":[{"userId":"u"},7]}"#, Refusal::NotAnEvent),
            (Call::Batch, r#"{"batch":[{"userId":"u"},{"type":"track"}]}"#, Refusal::NoIdentity),
        ];
        for (call, body, refusal) in cases {
            assert_eq!(admitted(call, body).err(), Some(refusal), "{}", &body[..body.len().min(60)]);
        }
        assert_eq!(admit(&source(), track, b"{\"userId\":\"\xFF\"}", &facts()).err(), Some(Refusal::InvalidJson));
    }
}
