//! From a request's body to events: validation, ids, the fields that users expect to be added. Pure; nothing is stored here.
//!
//! One bad event refuses the whole request, as clients of this API expect: they send it again or drop it as a whole.

use std::sync::Arc;

use uuid::Uuid;

use crate::clock::Timestamp;
use crate::control::workspace::Source;
use crate::model::event::{Channel, Event};
use crate::model::id::{JobRunId, MessageId};
use crate::model::json::{JsonError, Object, Splice, check_depth, elements, quote, string_of};

use super::identity;

/// A request's body after inflation.
pub const MAX_BODY: usize = 4_096_000;
/// One event, as stored.
pub const MAX_EVENT: usize = 1 << 20;

/// All events of a request, as stored: what a batch lends to its events is copied into each, so a small request could ask for
/// any amount of memory.
pub const MAX_STORED: usize = 16 << 20;
/// What an event costs beside its payload.
const OVERHEAD: usize = 512;

/// What kind of request it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// One event; its type is the path's word.
    Typed(&'static str),
    /// `{"batch": [...]}`; the events bring their types.
    Batch,
}

/// What the request says about its events beside the body.
#[derive(Clone, Debug)]
pub struct Facts {
    pub received_at: Timestamp,
    pub client_ip: String,
    pub channel: Channel,
    /// `X-Rudder-Job-Run-Id` and `X-Rudder-Task-Run-Id`.
    pub job_run: Option<JobRunId>,
    pub task_run: Option<JobRunId>,
}

/// Why a request is refused. Texts and codes are those that clients of this API know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("failed to read writekey from header")]
    NoWriteKey,
    #[error("invalid write key")]
    InvalidWriteKey,
    #[error("source is disabled")]
    SourceDisabled,
    #[error("failed to read body from request")]
    UnreadableBody,
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
    #[error("service unavailable")]
    Unavailable,
}

impl Refusal {
    pub fn status(self) -> u16 {
        match self {
            Refusal::NoWriteKey | Refusal::InvalidWriteKey => 401,
            Refusal::SourceDisabled => 404,
            Refusal::UnreadableBody => 500,
            Refusal::TooLarge => 413,
            Refusal::InvalidJson | Refusal::NotAnEvent | Refusal::NoIdentity | Refusal::EmptyBatch => 400,
            Refusal::Unavailable => 503,
        }
    }
}

impl From<JsonError> for Refusal {
    fn from(error: JsonError) -> Self {
        match error {
            JsonError::Invalid(_) | JsonError::TooDeep => Refusal::InvalidJson,
            JsonError::NotAnObject => Refusal::NotAnEvent,
        }
    }
}

/// The events of a body.
///
/// # Errors
/// [`Refusal`], for the request as a whole.
pub fn admit(source: &Arc<Source>, call: Call, body: &[u8], facts: &Facts) -> Result<Vec<Event>, Refusal> {
    if body.len() > MAX_BODY {
        return Err(Refusal::TooLarge);
    }
    let text = std::str::from_utf8(body).map_err(|_| Refusal::InvalidJson)?;
    check_depth(text)?;
    let object = Object::parse(text)?;
    let mut request = Request { source, facts, envelope: None, job_run: None, task_run: None };
    match call {
        Call::Typed(kind) => {
            request.take_runs_from(&object);
            Ok(vec![request.event(&object, Some(kind))?])
        }
        Call::Batch => {
            let parts = match object.get("batch") {
                None | Some("null") => return Err(Refusal::EmptyBatch),
                Some(list) if list.starts_with('[') => elements(list)?,
                // A single event in place of the list counts as one.
                Some(single) => vec![single],
            };
            let objects = parts.into_iter().map(Object::parse).collect::<Result<Vec<_>, _>>();
            let objects = objects.map_err(|_| Refusal::NotAnEvent)?;
            let first = objects.first().ok_or(Refusal::EmptyBatch)?;
            request.take_runs_from(first);
            request.envelope = Some(&object);
            let mut stored = 0;
            let mut events = Vec::with_capacity(objects.len());
            for object in &objects {
                let event = request.event(object, None)?;
                stored += event.payload.len() + OVERHEAD;
                if stored > MAX_STORED {
                    return Err(Refusal::TooLarge);
                }
                events.push(event);
            }
            Ok(events)
        }
    }
}

struct Request<'r, 'b> {
    source: &'r Arc<Source>,
    facts: &'r Facts,
    /// The batch around the events: some of its fields stand in where an event has none.
    envelope: Option<&'r Object<'b>>,
    job_run: Option<JobRunId>,
    task_run: Option<JobRunId>,
}

impl Request<'_, '_> {
    /// Reverse ETL names its run in the first event, which speaks for the whole request; else the headers do.
    fn take_runs_from(&mut self, first: &Object<'_>) {
        let context = first.get("context").and_then(|raw| Object::parse(raw).ok());
        let sources = context.and_then(|context| Object::parse(context.get("sources")?).ok());
        let run = |key: &str| {
            let text = sources.as_ref()?.get(key).and_then(string_of)?;
            (!text.is_empty()).then(|| JobRunId::from(text.as_ref()))
        };
        self.job_run = run("job_run_id").or_else(|| self.facts.job_run.clone());
        self.task_run = run("task_run_id").or_else(|| self.facts.task_run.clone());
    }

    fn event(&self, object: &Object<'_>, kind: Option<&'static str>) -> Result<Event, Refusal> {
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
        let mut splice = Splice::new(object);
        let message_id = self.message_id(object, &mut splice);
        splice.set("rudderId", quote(&identity::rudder_id(&user, &anonymous).to_string()));
        if object.get("receivedAt").is_none() {
            splice.add("receivedAt", &quote(&self.facts.received_at.rfc3339_millis()));
        }
        let request_ip = match object.get("request_ip") {
            Some(own) => string_of(own).unwrap_or_default().into_owned(),
            None => {
                splice.add("request_ip", &quote(&self.facts.client_ip));
                self.facts.client_ip.clone()
            }
        };
        if let Some(kind) = kind {
            splice.set("type", quote(kind));
        }
        for field in ["sentAt", "context", "integrations"] {
            if let (None, Some(value)) = (object.get(field), self.envelope.and_then(|envelope| envelope.get(field))) {
                splice.add(field, value);
            }
        }
        let payload = splice.finish();
        if payload.len() > MAX_EVENT {
            return Err(Refusal::TooLarge);
        }
        Ok(Event {
            workspace: self.source.workspace.clone(),
            source: self.source.id.clone(),
            write_key: self.source.write_key.clone(),
            user: identity::user(self.source.order_by, &anonymous, &user),
            message_id,
            event_type,
            received_at: self.facts.received_at,
            request_ip,
            job_run: self.job_run.clone(),
            task_run: self.task_run.clone(),
            channel: self.facts.channel,
            payload: payload.into(),
        })
    }

    /// The event's own id, or a new one where it has none that is a text.
    fn message_id(&self, object: &Object<'_>, splice: &mut Splice<'_, '_>) -> MessageId {
        let own = object.get("messageId").and_then(string_of).unwrap_or_default();
        let own = identity::clean(&own);
        if !own.is_empty() {
            return own.as_ref().into();
        }
        let id = Uuid::new_v4().to_string();
        splice.set("messageId", quote(&id));
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
