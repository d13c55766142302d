//! What a browser SDK asks its control plane before it starts: so that no other service is needed. Deliveries are made here, so it
//! is told of no destinations to load scripts for.

use serde_json::{Value, json};

use crate::clock::Timestamp;
use crate::control::workspace::Source;

pub fn of(source: &Source, now: Timestamp) -> Value {
    json!({
        "source": {
            "id": source.id.as_str(),
            "name": source.name,
            "writeKey": source.write_key.as_str(),
            "enabled": source.enabled,
            "workspaceId": source.workspace.as_str(),
            "config": {"statsCollection": {"errors": {"enabled": false}, "metrics": {"enabled": false}}},
            "dataplanes": {},
            "destinations": [],
        },
        "updatedAt": now.rfc3339_millis(),
        "consentManagementMetadata": {"providers": [], "resolutionStrategies": {}},
    })
}

/// What an SDK of Segment asks its settings host before it starts: every kind of event goes here, and nowhere from the device.
pub fn segment(source: &Source) -> Value {
    let all = json!({"__default": {"enabled": true, "integrations": {}}});
    json!({
        "integrations": {
            "Segment.io": {
                "apiKey": source.write_key.as_str(),
                "unbundledIntegrations": [],
                "addBundledMetadata": true,
                "maybeBundledConfigIds": {},
            },
        },
        "plan": {"track": all, "identify": all, "group": all},
        "edgeFunction": {},
        "middlewareSettings": {},
        "enabledMiddleware": {},
        "metrics": {"sampleRate": 0},
        "analyticsNextEnabled": true,
        "legacyVideoPluginsEnabled": false,
        "remotePlugins": [],
    })
}
