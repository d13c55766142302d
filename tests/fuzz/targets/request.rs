//! A request's body, whatever it is: refused, or events that are JSON, with what every event has.
#![no_main]

use std::sync::{Arc, LazyLock};

use laneway::clock::Timestamp;
use laneway::control::workspace::{Source, Workspace};
use laneway::model::event::Channel;
use laneway::stages::gateway::request::{Call, Facts, admit, admit_each};
use laneway::stages::gateway::{messages, pixel};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

static WORKSPACE: LazyLock<Workspace> =
    LazyLock::new(|| Workspace::parse(r#"{"workspaceId":"w","sources":[{"id":"s","writeKey":"k"}]}"#).unwrap());

fn source() -> Arc<Source> {
    Arc::clone(WORKSPACE.by_write_key("k").unwrap())
}

fuzz_target!(|data: &[u8]| {
    let facts = Facts {
        received_at: Timestamp::from_millis(1_767_225_602_000),
        client_ip: "10.0.0.1".into(),
        channel: Channel::Http,
        job_run: None,
        task_run: None,
    };
    for call in [Call::Typed("track"), Call::Typed("audiencelist"), Call::Batch] {
        let whole = admit(&source(), call, data, &facts);
        for event in whole.iter().flatten() {
            let payload: Value = match serde_json::from_slice(&event.payload) {
                Ok(payload) => payload,
                // A lone surrogate is JSON that no string of Rust's can hold, and a number may be beyond all of them.
                Err(_) => {
                    serde_json::from_slice::<&serde_json::value::RawValue>(&event.payload).unwrap();
                    continue;
                }
            };
            for field in ["messageId", "rudderId"] {
                assert!(payload[field].is_string(), "{field} in {payload}");
            }
        }
        let each = admit_each(&source(), call, data, &facts);
        if let Ok(events) = &whole {
            assert_eq!(each.unwrap().iter().filter(|event| event.is_ok()).count(), events.len());
        }
    }
    let _ = messages::admit(&WORKSPACE, data);
    if let Ok(query) = std::str::from_utf8(data)
        && let Some(event) = pixel::event("track", query, Some("agent"), facts.received_at)
    {
        serde_json::from_str::<Value>(&event).unwrap();
    }
});
