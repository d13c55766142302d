//! The endpoints as OpenAPI 3.1, and as a page to read: both made from the table that the router is made from.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::auth::Auth;
use super::endpoints::{Action, Endpoint, Ingest, Listener};
use super::job_status::About;
use super::request::{Call, Refusal};

/// Refusals that a client may get from a route that takes events.
const REFUSALS: [Refusal; 14] = [
    Refusal::InvalidJson,
    Refusal::NotAnEvent,
    Refusal::NoIdentity,
    Refusal::EmptyBatch,
    Refusal::UnreadableBody,
    Refusal::NoWriteKey,
    Refusal::InvalidWriteKey,
    Refusal::SourceDisabled,
    Refusal::InvalidDestination,
    Refusal::Slow,
    Refusal::TooLarge,
    Refusal::UnknownEncoding,
    Refusal::RateLimited { wait: 1 },
    Refusal::Unavailable,
];

pub fn document(listener: Listener) -> Value {
    let mut paths = Map::new();
    for (_, endpoints, is_internal) in listener.described() {
        for endpoint in endpoints {
            let path = paths.entry(endpoint.path).or_insert_with(|| json!({}));
            path[endpoint.method] = operation(endpoint, is_internal);
        }
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Laneway", "version": env!("CARGO_PKG_VERSION"), "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "Customer events in, as the Segment and RudderStack SDKs send them.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {
                "writeKey": {"type": "http", "scheme": "basic", "description": "The write key as user, no password. Public routes without this header take `writeKey` of the body."},
                "queryKey": {"type": "apiKey", "in": "query", "name": "writeKey"},
                "sourceId": {"type": "apiKey", "in": "header", "name": "X-Rudder-Source-Id"},
                "token": {"type": "apiKey", "in": "header", "name": "X-Laneway-Token", "description": "Or as a bearer's token."},
            },
            "schemas": {
                "Event": {
                    "type": "object", "additionalProperties": true,
                    "description": "One of anonymousId and userId is needed; everything else is kept as it is.",
                    "properties": {
                        "type": {"type": "string"}, "messageId": {"type": "string"}, "userId": {}, "anonymousId": {},
                        "event": {"type": "string"}, "properties": {"type": "object"}, "traits": {"type": "object"},
                        "context": {"type": "object"}, "integrations": {"type": "object"},
                        "originalTimestamp": {"type": "string", "format": "date-time"}, "sentAt": {"type": "string", "format": "date-time"},
                    },
                },
                "Batch": {
                    "type": "object", "required": ["batch"], "additionalProperties": true,
                    "properties": {"batch": {"type": "array", "items": {"$ref": "#/components/schemas/Event"}}},
                },
                "Verdicts": {
                    "type": "object", "required": ["accepted", "refused", "events"],
                    "properties": {"accepted": {"type": "integer"}, "refused": {"type": "integer"}, "events": {"type": "array", "items": {
                        "type": "object", "required": ["index", "accepted"],
                        "properties": {"index": {"type": "integer"}, "accepted": {"type": "boolean"}, "messageId": {"type": "string"},
                            "code": {"type": "integer"}, "reason": {"type": "string"}},
                    }}},
                },
            },
        },
    })
}

fn operation(endpoint: &Endpoint, is_internal: bool) -> Value {
    let mut operation = json!({"summary": endpoint.summary, "responses": {"200": {"description": "Done."}}});
    let mut needed = Map::new();
    match endpoint.action {
        Action::Ingest(ingest) => ingested(&mut operation, &mut needed, ingest),
        Action::Pixel(_) => {
            needed.insert("queryKey".into(), json!([]));
            operation["responses"]["200"] =
                json!({"description": "An image, whatever became of the event.", "content": {"image/gif": {}}});
        }
        Action::Webhook => {
            needed.insert("queryKey".into(), json!([]));
            operation["responses"] = webhook_answers();
        }
        Action::Messages => operation["requestBody"] = body(&json!({"type": "array", "items": {"type": "object"}})),
        Action::DrainJob => {
            operation["parameters"] =
                json!([{"name": "job_run_id", "in": "path", "required": true, "schema": {"type": "string"}}]);
            operation["responses"] = json!({"201": {"description": "It is being drained."}});
        }
        Action::JobStatus(about) => {
            let text = |name: &str, place: &str, kind: &str| json!({"name": name, "in": place, "required": place == "path", "schema": {"type": kind}});
            let mut parameters = vec![text("job_run_id", "path", "string")];
            parameters.extend(["task_run_id", "source_id"].map(|name| text(name, "query", "string")));
            if about == About::FailedRecords {
                parameters.extend([text("pageSize", "query", "integer"), text("pageToken", "query", "string")]);
            }
            operation["parameters"] = Value::from(parameters);
            operation["responses"] = match endpoint.method {
                "get" => {
                    json!({"200": answer("What is known.", "application/json"), "404": answer("`status not found`", "text/plain")})
                }
                _ => {
                    json!({"204": {"description": "Forgotten."}, "400": answer("`source not completed`", "text/plain")})
                }
            };
        }
        Action::SourceConfig => {
            needed.insert("queryKey".into(), json!([]));
            operation["responses"]["200"] = answer("The source.", "application/json");
        }
        Action::Settings => {
            operation["parameters"] =
                json!([{"name": "write_key", "in": "path", "required": true, "schema": {"type": "string"}}]);
            operation["responses"] = json!({
                "200": answer("The source, with no integration but this one.", "application/json"),
                "401": answer(&format!("`{}`", Refusal::InvalidWriteKey), "text/plain"),
                "404": answer(&format!("`{}`", Refusal::SourceDisabled), "text/plain"),
            });
        }
        Action::Health | Action::Version | Action::OpenApi(_) => {
            operation["responses"]["200"] = answer("What was asked for.", "application/json");
        }
        Action::Warehouse => {
            operation["responses"] =
                json!({"default": {"description": "What the warehouse service answers; 503 where it does not."}});
        }
        Action::Robots | Action::Docs(_) => {}
    }
    if is_internal {
        needed.insert("token".into(), json!([]));
    }
    if !needed.is_empty() {
        operation["security"] = json!([needed]);
    }
    operation
}

fn ingested(operation: &mut Value, needed: &mut Map<String, Value>, ingest: Ingest) {
    let scheme = match ingest.auth {
        Auth::WriteKey | Auth::HeaderOrBody | Auth::AnyKey => "writeKey",
        Auth::QueryKey => "queryKey",
        Auth::SourceId | Auth::Replay => "sourceId",
    };
    needed.insert(scheme.into(), json!([]));
    let schema = match ingest.call {
        Call::Typed(_) => json!({"$ref": "#/components/schemas/Event"}),
        Call::Batch => json!({"$ref": "#/components/schemas/Batch"}),
    };
    operation["requestBody"] = body(&schema);
    operation["parameters"] = json!([{
        "name": "verdicts", "in": "query", "schema": {"type": "string", "enum": ["1"]},
        "description": "Keep the good events, and say of each what became of it.",
    }]);
    operation["responses"]["200"] = json!({
        "description": "Stored, on all replicas. The text `ok`; with `verdicts=1`, what became of each event.",
        "content": {"text/plain": {}, "application/json": {"schema": {"$ref": "#/components/schemas/Verdicts"}}},
    });
    for refusal in REFUSALS {
        let said = &mut operation["responses"][refusal.status().to_string()];
        let text = match said.get("description").and_then(Value::as_str) {
            Some(before) => format!("{before}; `{refusal}`"),
            None => format!("`{refusal}`"),
        };
        *said = json!({"description": text, "content": {"text/plain": {}}});
    }
}

fn webhook_answers() -> Value {
    let text = |description: &str| answer(description, "text/plain");
    json!({
        "200": {"description": "What the tool expects to hear; else `ok`.", "content": {"text/plain": {}, "application/json": {}}},
        "400": text("Refused by the source's transform, with its words; or as events are. The request is kept in proc-errors."),
        "401": text(&format!("`{}`; `{}`", Refusal::NoWriteKeyInQuery, Refusal::InvalidWriteKey)),
        "404": text(&format!("`{}`", Refusal::SourceDisabled)),
        "413": text(&format!("`{}`", Refusal::TooLarge)),
        "500": text("The source's transform does not know what to say. The request is kept in proc-errors."),
        "503": text("The source's transform is away, or the log is: come again. Kept in proc-errors where the log has it."),
    })
}

fn body(schema: &Value) -> Value {
    json!({"required": true, "description": "Content-Encoding may be gzip, deflate, br or zstd; the Content-Type is not looked at.",
        "content": {"application/json": {"schema": schema}}})
}

fn answer(description: &str, content: &str) -> Value {
    json!({"description": description, "content": {content: {}}})
}

/// The table, for people.
pub fn page(listener: Listener) -> String {
    let mut rows = String::new();
    for (title, endpoints, _) in listener.described() {
        let _ = write!(rows, "<h2>{title}</h2><table>");
        for endpoint in endpoints {
            let method = endpoint.method.to_uppercase();
            let _ = write!(
                rows,
                "<tr><td>{method}</td><td><code>{}</code></td><td>{}</td></tr>",
                endpoint.path, endpoint.summary
            );
        }
        rows.push_str("</table>");
    }
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>Laneway</title><style>body{{font:16px/1.5 sans-serif;\
         max-width:60em;margin:2em auto;padding:0 1em}}td{{padding:.2em 1em .2em 0;vertical-align:top}}</style></head><body>\
         <h1>Laneway {}</h1><p>The same as <a href=\"openapi.json\">OpenAPI 3.1</a>.</p>{rows}</body></html>",
        env!("CARGO_PKG_VERSION")
    )
}

#[cfg(test)]
mod tests {
    use super::super::endpoints::{INTERNAL, PUBLIC};
    use super::*;

    #[test]
    fn every_route_is_described_once() {
        let document = document(Listener::Internal);
        let described: usize = document["paths"]
            .as_object()
            .expect("paths")
            .values()
            .map(|path| path.as_object().map_or(0, Map::len))
            .sum();
        assert_eq!(described, PUBLIC.len() + INTERNAL.len());
        let track = &document["paths"]["/v1/track"]["post"];
        assert!(track["responses"]["400"]["description"].as_str().is_some_and(|text| text.contains("invalid json")));
        assert_eq!(track["responses"]["429"]["description"], "`max requests limit reached`");
        assert!(page(Listener::Internal).contains("/internal/v1/retl"));
        let public = (page(Listener::Public), super::document(Listener::Public).to_string());
        assert!(!public.0.contains("/internal/") && !public.1.contains("/internal/"), "not for everybody");
    }
}
