//! `/internal/v1/batch`: a list of messages, each an event that another edge has admitted, with what that edge knows of it.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::clock::Timestamp;
use crate::control::workspace::{OrderBy, Workspace};
use crate::model::event::{Channel, Event};
use crate::model::json::{Object, check_depth, string_of};

use super::identity;
use super::publish::Along;
use super::request::{
    MAX_BODY, MAX_EVENT, MAX_RECORD, MAX_RUN, MAX_STORED, MAX_TRACE, RECORD_OVERHEAD_BYTES, Refusal, weight,
};

/// Of an id that another edge names. It is in the record twice, and no control plane gives longer ones.
const MAX_ID: usize = 512;

#[derive(Deserialize)]
struct Message<'a> {
    properties: Properties,
    #[serde(borrow)]
    payload: &'a RawValue,
}

/// By the names that the field's edges use, also in a topic's properties.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct Properties {
    request_type: Text,
    routing_key: Text,
    #[serde(rename = "workspaceID")]
    workspace_id: Text,
    #[serde(rename = "sourceID")]
    source_id: Text,
    received_at: Text,
    #[serde(rename = "requestIP")]
    request_ip: Text,
    #[serde(rename = "destinationID")]
    destination_id: Text,
    #[serde(rename = "sourceJobRunID")]
    source_job_run_id: Text,
    #[serde(rename = "sourceTaskRunID")]
    source_task_run_id: Text,
    #[serde(rename = "traceID")]
    trace_id: Text,
}

/// Empty where it is missing or null.
#[derive(Default)]
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: serde::Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        Ok(Self(Option::deserialize(input)?.unwrap_or_default()))
    }
}

impl std::ops::Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

/// The events of a body. One bad message refuses all of them.
///
/// # Errors
/// [`Refusal::InvalidJson`] where it is no list of messages, [`Refusal::NotAnEvent`] where one lacks what every message has.
pub fn admit(workspace: &Workspace, body: &[u8]) -> Result<Vec<(Event, Along)>, Refusal> {
    if body.len() > MAX_BODY {
        return Err(Refusal::TooLarge);
    }
    let text = std::str::from_utf8(body).map_err(|_| Refusal::InvalidJson)?;
    check_depth(text)?;
    let messages: Vec<Message<'_>> = serde_json::from_str(text).map_err(|_| Refusal::InvalidJson)?;
    if messages.is_empty() {
        return Err(Refusal::NotAnEvent);
    }
    if messages.len() > MAX_STORED / RECORD_OVERHEAD_BYTES {
        return Err(Refusal::TooLarge);
    }
    // As for the public routes: a record that the log does not take would come again for ever.
    let mut stored = 0;
    let mut admitted = Vec::with_capacity(messages.len());
    for message in &messages {
        let (event, along) = event(workspace, message)?;
        let weight = weight(&event);
        stored += weight;
        if weight > MAX_RECORD || stored > MAX_STORED {
            return Err(Refusal::TooLarge);
        }
        admitted.push((event, along));
    }
    Ok(admitted)
}

fn event(workspace: &Workspace, message: &Message<'_>) -> Result<(Event, Along), Refusal> {
    let object = Object::parse(message.payload.get()).map_err(|_| Refusal::NotAnEvent)?;
    let is_list = object.get("type").and_then(string_of).is_some_and(|kind| kind == "audiencelist");
    if message.payload.get().len() > if is_list { MAX_BODY } else { MAX_EVENT } {
        return Err(Refusal::TooLarge);
    }
    made(workspace, &message.properties, &object).ok_or(Refusal::NotAnEvent)
}

/// None: something is missing that every message has.
fn made(workspace: &Workspace, said: &Properties, object: &Object<'_>) -> Option<(Event, Along)> {
    let needed = [&said.routing_key, &said.workspace_id, &said.source_id, &said.request_ip];
    let has_type =
        matches!(&*said.request_type, "" | "batch" | "replay" | "retl" | "import") || object.get("type").is_some();
    let has_fields = ["receivedAt", "request_ip", "rudderId"].iter().all(|field| object.get(field).is_some());
    let message_id = object.get("messageId").and_then(string_of)?;
    let message_id = identity::clean(&message_id);
    let named = [&said.workspace_id, &said.source_id, &said.destination_id, &said.request_ip];
    if named.iter().any(|id| id.len() > MAX_ID) {
        return None;
    }
    if !has_type || !has_fields || message_id.is_empty() || needed.iter().any(|it| it.is_empty()) {
        return None;
    }
    let source = workspace.source(&(&*said.source_id).into());
    let (anonymous, user) = (object.text_of("anonymousId"), object.text_of("userId"));
    let order_by = source.map_or(OrderBy::default(), |source| source.order_by);
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    // Left out where it is too long, as on the public routes.
    let run = |text: &str| some(text).filter(|run| run.len() <= MAX_RUN).map(Into::into);
    let event = Event {
        workspace: (&*said.workspace_id).into(),
        source: (&*said.source_id).into(),
        write_key: source.map(|source| source.write_key.clone()).unwrap_or_default(),
        user: identity::user(order_by, &identity::clean(&anonymous), &identity::clean(&user)),
        message_id: message_id.as_ref().into(),
        event_type: object.get("type").and_then(string_of).unwrap_or_default().into_owned(),
        received_at: Timestamp::parse(&said.received_at)?,
        request_ip: said.request_ip.to_owned(),
        job_run: run(&said.source_job_run_id),
        task_run: run(&said.source_task_run_id),
        channel: if &*said.request_type == "replay" { Channel::Replay } else { Channel::Http },
        payload: object.text().to_owned().into(),
    };
    Some((
        event,
        Along {
            traceparent: some(&said.trace_id).filter(|trace| trace.len() <= MAX_TRACE),
            only: some(&said.destination_id).map(Into::into),
            replay: None,
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYLOAD: &str = r#"{"type":"track","userId":"u","messageId":"m","rudderId":"r","receivedAt":"2024-01-01T01:01:01.000Z","request_ip":"1.1.1.1"}"#;

    fn message(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut message = serde_json::json!({"properties": {
            "requestType": "track", "routingKey": "<<>>a<<>>u", "workspaceID": "w", "sourceID": "s",
            "receivedAt": "2024-01-01T01:01:01.000000001Z", "requestIP": "1.1.1.1", "destinationID": "d", "traceID": "t",
            "isBot": false}});
        message["payload"] = serde_json::from_str(PAYLOAD).expect("JSON");
        change(&mut message);
        format!("[{message}]")
    }

    fn admitted(body: &str) -> Result<Vec<(Event, Along)>, Refusal> {
        let workspace =
            Workspace::parse(r#"{"workspaceId":"w","sources":[{"id":"s","writeKey":"k"}]}"#).expect("valid");
        admit(&workspace, body.as_bytes())
    }

    #[test]
    fn a_message_is_an_event_with_what_another_edge_knows() {
        let (event, along) = admitted(&message(|_| {})).expect("admitted").remove(0);
        assert_eq!(
            (event.write_key.as_str(), event.message_id.as_str(), event.event_type.as_str()),
            ("k", "m", "track")
        );
        assert_eq!(event.received_at.rfc3339_millis(), "2024-01-01T01:01:01.000Z");
        assert_eq!(along.only, Some("d".into()));
        assert_eq!(along.traceparent.as_deref(), Some("t"));
        let unknown = admitted(&message(|it| it["properties"]["sourceID"] = "other".into())).expect("admitted");
        assert_eq!(unknown[0].0.write_key.as_str(), "", "the processor tells of an unknown source");
    }

    #[test]
    fn what_lacks_something_is_refused() {
        for field in ["routingKey", "workspaceID", "sourceID", "requestIP"] {
            let empty = message(|it| it["properties"][field] = "".into());
            assert_eq!(admitted(&empty).err(), Some(Refusal::NotAnEvent), "{field}");
        }
        for field in ["messageId", "type", "receivedAt", "request_ip", "rudderId"] {
            let gone = message(|it| drop(it["payload"].as_object_mut().and_then(|payload| payload.remove(field))));
            assert_eq!(admitted(&gone).err(), Some(Refusal::NotAnEvent), "{field}");
        }
        let long = "x".repeat(1 << 20);
        let too_large = message(|it| it["payload"]["userId"] = long.repeat(2).into());
        assert_eq!(admitted(&too_large).err(), Some(Refusal::TooLarge));
        let nameless = message(|it| it["properties"]["sourceID"] = long.as_str().into());
        assert_eq!(admitted(&nameless).err(), Some(Refusal::NotAnEvent));
        let (event, along) = admitted(&message(|it| {
            it["properties"]["traceID"] = long.as_str().into();
            it["properties"]["sourceJobRunID"] = long.as_str().into();
        }))
        .expect("admitted")
        .remove(0);
        assert_eq!((along.traceparent, event.job_run), (None, None));
        for (body, refusal) in [
            ("[]", Refusal::NotAnEvent),
            ("{}", Refusal::InvalidJson),
            (r#"[{"payload":{}}]"#, Refusal::InvalidJson),
            (r#"[{"properties":{"requestType":null},"payload":{}}]"#, Refusal::NotAnEvent),
            ("[1", Refusal::InvalidJson),
        ] {
            assert_eq!(admitted(body).err(), Some(refusal), "{body}");
        }
    }
}
