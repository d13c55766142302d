//! Recent events of the sources that somebody looks at in the control plane (`config.eventUpload`), uploaded there: bounded, lossy, and
//! outside of everything that events wait for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde_json::value::RawValue;

use crate::clock::Clock;
use crate::control::Current;
use crate::control::remote::RemoteError;
use crate::control::uploads::Uploads;
use crate::model::codec;
use crate::model::event::Event;
use crate::model::json::{Object, string_of};
use crate::model::record::{Record, header};
use crate::runtime::watch::Watch;
use crate::telemetry::metrics::metrics;
use crate::telemetry::seldom;

/// Events that wait to be uploaded, and their bytes. The oldest give way.
const WAITING: usize = 256;
const WAITING_BYTES: usize = 4 << 20;
/// One upload of all that wait, so often.
const EVERY: Duration = Duration::from_secs(2);
/// Of one upload, where no answer comes.
const TRIES: u32 = 3;
const AGAIN: Duration = Duration::from_millis(100);

pub struct Live {
    pub workspace: Current,
    pub uploads: Uploads,
    pub clock: Clock,
    pub waiting: Waiting,
}

/// What is to be uploaded next.
#[derive(Default)]
pub struct Waiting(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    events: VecDeque<Event>,
    bytes: usize,
}

impl Waiting {
    /// Lets the oldest go where it is too much.
    fn push(&self, event: Event) {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        queue.bytes += event.payload.len();
        queue.events.push_back(event);
        while queue.events.len() > WAITING || queue.bytes > WAITING_BYTES {
            let Some(gone) = queue.events.pop_front() else { break };
            queue.bytes -= gone.payload.len();
            count("dropped", 1);
        }
    }

    fn take(&self) -> VecDeque<Event> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).events
    }
}

impl Watch for Live {
    fn is_watching(&self) -> bool {
        self.workspace.get().sources().any(|source| source.is_watched())
    }

    fn take(&self, records: &[Record]) {
        let workspace = self.workspace.get();
        for record in records {
            let source = record.headers.text(header::SOURCE).and_then(|id| workspace.source(&id.into()));
            if source.is_none_or(|source| !source.is_watched()) {
                continue;
            }
            // What cannot be read the processor tells.
            if let Some(Ok(event)) = record.value.as_ref().map(codec::decode::<Event>) {
                self.waiting.push(event);
            }
        }
    }
}

impl Live {
    /// Uploads what waits, for ever.
    pub async fn upload(&self) {
        loop {
            self.clock.sleep(EVERY).await;
            let events = self.waiting.take();
            if !events.is_empty() {
                let result = if self.send(&body(&events)).await { "uploaded" } else { "failed" };
                count(result, events.len() as u64);
            }
        }
    }

    async fn send(&self, body: &str) -> bool {
        for left in (0..TRIES).rev() {
            match self.uploads.upload(body.to_owned()).await {
                Ok(()) => return true,
                Err(RemoteError::Silent(_)) if left > 0 => self.clock.sleep(AGAIN).await,
                Err(error) => {
                    if let Some(left_out) = seldom::due("live events", &error.to_string()) {
                        tracing::warn!(%error, left_out, "live events are not uploaded");
                    }
                    return false;
                }
            }
        }
        false
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    payload: &'a RawValue,
    received_at: String,
    event_name: String,
    event_type: &'a str,
    error_response: BTreeMap<(), ()>,
    error_code: u16,
}

#[derive(Serialize)]
struct Body<'a> {
    version: &'static str,
    #[serde(flatten)]
    by_write_key: BTreeMap<&'a str, Vec<Shown<'a>>>,
}

fn body(events: &VecDeque<Event>) -> String {
    let mut by_write_key: BTreeMap<&str, Vec<Shown<'_>>> = BTreeMap::new();
    for event in events {
        let Ok(payload) = serde_json::from_slice::<&RawValue>(&event.payload) else { continue };
        let object = Object::parse(payload.get()).ok();
        let name = object.as_ref().and_then(|object| object.get("event")).and_then(string_of);
        by_write_key.entry(event.write_key.as_str()).or_default().push(Shown {
            payload,
            received_at: event.received_at.rfc3339_millis(),
            event_name: name.unwrap_or_default().into_owned(),
            event_type: &event.event_type,
            error_response: BTreeMap::new(),
            error_code: 200,
        });
    }
    serde_json::to_string(&Body { version: "v2", by_write_key }).unwrap_or_default()
}

fn count(result: &str, events: u64) {
    metrics().live_events.with_label_values(&[result]).inc_by(events);
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::clock::Timestamp;
    use crate::model::event::Channel;

    fn event(key: &str, n: usize, bytes: usize) -> Event {
        Event {
            workspace: "w".into(),
            source: "s".into(),
            write_key: key.into(),
            user: None,
            message_id: n.to_string().into(),
            event_type: "track".into(),
            received_at: Timestamp::from_millis(1_767_225_602_000),
            request_ip: String::new(),
            job_run: None,
            task_run: None,
            channel: Channel::Http,
            payload: Bytes::from(format!("{{\"event\":\"e\",\"n\":1.0,\"x\":\"{}\"}}", "x".repeat(bytes))),
        }
    }

    #[test]
    fn the_newest_wait_and_no_more_than_there_is_room_for() {
        let waiting = Waiting::default();
        (0..WAITING + 10).for_each(|n| waiting.push(event("k", n, 0)));
        let taken = waiting.take();
        assert_eq!((taken.len(), taken[0].message_id.as_str()), (WAITING, "10"));
        (0..6).for_each(|n| waiting.push(event("k", n, 1 << 20)));
        assert_eq!(waiting.take().len(), 3);
        assert!(waiting.take().is_empty());
    }

    #[test]
    fn events_are_told_by_their_write_keys() {
        let events = [event("k1", 1, 0), event("k2", 2, 0), event("k1", 3, 0)].into();
        let told = body(&events);
        let parsed: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        assert_eq!((&parsed["version"], parsed["k1"].as_array().map(Vec::len)), (&"v2".into(), Some(2)));
        assert!(told.contains(r#"{"payload":{"event":"e","n":1.0,"x":""},"receivedAt":"2026-01-01T00:00:02.000Z","eventName":"e","eventType":"track","errorResponse":{},"errorCode":200}"#), "{told}");
    }
}
