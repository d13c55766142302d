//! Webhook sources: requests of other tools, made into events by the transformer service. What it refuses, or cannot be asked
//! about, goes to `proc-errors` as it came.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::http::header;
use axum::http::request::Parts;
use bytes::Bytes;
use futures_util::FutureExt;
use multer::Multipart;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio_util::task::TaskTracker;

use crate::clock::Clock;
use crate::control::workspace::Source;
use crate::model::event::Event;
use crate::model::failure::{Try, shorten};
use crate::model::outcome::Reason;
use crate::model::record::{Addressed, Headers, Offset, Partition, Record, header as lw};
use crate::runtime::failure::{Cause, FailureTopic, ORIGINAL};
use crate::runtime::shutdown::Shutdown;
use crate::transform::http::{Answer, Reply, Sources};

use super::request::{Call, Facts, Refusal, admit};

/// Fields of a form, and parameters of a query: each costs a hundred times what it takes to send.
const FIELDS: usize = 10_000;
const JSON: &str = "application/json";
const AWAY: &str = "the source transformer is not available";

/// What the service made is read off the async threads above it.
const LARGE: usize = 128 * 1024;

/// What webhook sources need.
pub struct Webhooks {
    pub sources: Sources,
    /// Types of sources whose GET requests are events too.
    pub by_get: Vec<String>,
    /// Where requests go that became nothing.
    pub failures: FailureTopic,
    /// Requests that are being answered, also where whoever sent them has gone: none of them is to be lost.
    pub tasks: TaskTracker,
    pub shutdown: Shutdown,
    pub clock: Clock,
}

/// What became of a webhook request.
pub enum Made {
    /// Events to store, and what the caller is to hear.
    Events(Vec<Event>, Option<Reply>),
    /// Nothing: to be kept, and told.
    Failed(Failed),
    /// Too much waits; the caller may come again.
    Full,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    pub reason: Reason,
    /// For the caller.
    pub status: u16,
    pub message: String,
    /// For the operator: what the service said.
    pub detail: String,
}

impl Webhooks {
    /// Makes a request's events; while the process is being stopped there is not long to wait for it.
    pub async fn make(&self, source: &Arc<Source>, request: String, facts: &Facts) -> Made {
        let ending = async {
            self.shutdown.begun().await;
            self.clock.sleep(self.shutdown.budget / 2).await;
        };
        tokio::select! {
            made = make(&self.sources, source, request, facts) => made,
            () = ending => Made::Failed(Failed {
                reason: Reason::TransformerAway,
                status: 503,
                message: AWAY.to_owned(),
                detail: "the process was stopped before an answer came".to_owned(),
            }),
        }
    }

    /// Whether a GET request of this source is an event.
    pub fn takes_get(&self, source: &Source) -> bool {
        self.by_get.iter().any(|kind| kind.eq_ignore_ascii_case(&source.definition.name))
    }

    /// The record that keeps a request which became nothing.
    pub fn failure(&self, source: &Source, request: String, facts: &Facts, failed: &Failed) -> Addressed {
        let mut headers = Headers::new();
        headers.push_text(lw::SOURCE, source.id.as_str());
        headers.push_text(lw::WORKSPACE, source.workspace.as_str());
        headers.push_text(lw::REQUEST_IP, &facts.client_ip);
        headers.push_text(lw::CONTENT_TYPE, JSON);
        let key = Bytes::from(source.write_key.as_str().to_owned());
        let original = Record {
            partition: Partition(0),
            offset: Offset::START,
            timestamp: facts.received_at,
            key: Some(key),
            value: Some(request.into()),
            headers,
        };
        let tried = Try { at: self.clock.now(), code: failed.status, message: failed.detail.clone() };
        let cause = Cause {
            attempts: 1,
            first: Some(tried.clone()),
            last: Some(tried),
            source: Some(source.id.clone()),
            ..Cause::untried(failed.reason, failed.detail.clone(), source.write_key.as_str())
        };
        self.failures.record(&original, &cause)
    }
}

/// Makes a request's events. `request` is as [`request_of`] writes it.
pub async fn make(sources: &Sources, source: &Arc<Source>, request: String, facts: &Facts) -> Made {
    let failed = |reason, status, message: &str, detail: String| {
        Made::Failed(Failed { reason, status, message: message.to_owned(), detail: shorten(detail) })
    };
    let (output, reply) = match sources.transform(&source.definition.name, request).await {
        Answer::Taken { output, reply } => (output, reply),
        Answer::Refused { status, message } => {
            let words = shorten(message);
            return failed(Reason::SourceTransform, status, &words.clone(), words);
        }
        Answer::Broken(detail) => {
            return failed(Reason::SourceTransform, 500, "invalid output of the source transformer", detail);
        }
        Answer::Away(detail) => {
            return failed(Reason::TransformerAway, 503, AWAY, detail);
        }
        Answer::Full => return Made::Full,
    };
    let Some(output) = output else { return Made::Events(Vec::new(), reply) };
    let admitted = match output.len() <= LARGE {
        true => admit(source, Call::Batch, output.as_bytes(), facts),
        false => {
            let (source, facts) = (Arc::clone(source), facts.clone());
            let admitting = tokio::task::spawn_blocking(move || admit(&source, Call::Batch, output.as_bytes(), &facts));
            admitting.await.unwrap_or(Err(Refusal::Unavailable))
        }
    };
    match admitted {
        Ok(events) => Made::Events(events, reply),
        Err(refusal) => failed(Reason::NotAdmitted, refusal.status(), &refusal.to_string(), refusal.to_string()),
    }
}

#[derive(Serialize)]
struct Element<'a> {
    request: Request<'a>,
    source: SourceFacts<'a>,
}

#[derive(Serialize)]
struct Request<'a> {
    method: &'a str,
    url: &'a str,
    proto: String,
    headers: BTreeMap<String, Vec<String>>,
    body: String,
    query_parameters: BTreeMap<String, Vec<String>>,
}

/// By the names that the service's transforms know.
#[derive(Serialize)]
struct SourceFacts<'a> {
    #[serde(rename = "ID")]
    id: &'a str,
    #[serde(rename = "OriginalID")]
    original_id: &'a str,
    #[serde(rename = "Name")]
    name: &'a str,
    #[serde(rename = "SourceDefinition")]
    definition: DefinitionFacts<'a>,
    #[serde(rename = "Config")]
    config: &'a Value,
    #[serde(rename = "Enabled")]
    enabled: bool,
    #[serde(rename = "WorkspaceID")]
    workspace_id: &'a str,
    #[serde(rename = "WriteKey")]
    write_key: &'a str,
    #[serde(rename = "Destinations")]
    destinations: Option<()>,
}

#[derive(Serialize)]
struct DefinitionFacts<'a> {
    #[serde(rename = "ID")]
    id: &'a str,
    #[serde(rename = "Name")]
    name: &'a str,
    #[serde(rename = "Category")]
    category: &'a str,
    #[serde(rename = "Type")]
    kind: &'a str,
    #[serde(rename = "Options")]
    options: &'a Value,
}

/// A request as the service wants it: one element of its input.
///
/// # Errors
/// [`Refusal::UnreadableForm`], [`Refusal::TooLarge`].
pub fn request_of(parts: &Parts, body: Bytes, source: &Source) -> Result<String, Refusal> {
    let mut headers = BTreeMap::new();
    for (name, value) in &parts.headers {
        let values: &mut Vec<String> = headers.entry(canonical(name.as_str())).or_default();
        values.push(String::from_utf8_lossy(value.as_bytes()).into_owned());
    }
    let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let form = form(kind, &body)?;
    if form.is_some() {
        headers.insert("Content-Type".to_owned(), vec![JSON.to_owned()]);
    }
    let body = match form {
        Some(form) => form,
        None if body.is_empty() => "{}".to_owned(),
        None => String::from_utf8_lossy(&body).into_owned(),
    };
    let element = Element {
        request: Request {
            method: parts.method.as_str(),
            url: parts.uri.path_and_query().map_or("/", |it| it.as_str()),
            proto: format!("{:?}", parts.version),
            headers,
            body,
            query_parameters: fields(parts.uri.query().unwrap_or_default().as_bytes())?,
        },
        source: SourceFacts::of(source),
    };
    let request = serde_json::to_string(&element).map_err(|_| Refusal::InvalidJson)?;
    // What could not be kept whole could not be sent again.
    if request.len() > ORIGINAL { Err(Refusal::TooLarge) } else { Ok(request) }
}

/// The same request, with the source as it is now.
///
/// # Errors
/// Where it is none.
pub fn renewed(request: &str, source: &Source) -> Result<String, serde_json::Error> {
    #[derive(Deserialize, Serialize)]
    struct Kept<'a, S> {
        #[serde(borrow)]
        request: &'a RawValue,
        source: S,
    }
    let kept: Kept<'_, IgnoredAny> = serde_json::from_str(request)?;
    serde_json::to_string(&Kept { request: kept.request, source: SourceFacts::of(source) })
}

impl<'a> SourceFacts<'a> {
    fn of(source: &'a Source) -> Self {
        let definition = &source.definition;
        Self {
            id: source.id.as_str(),
            original_id: source.replays.as_ref().map_or("", |id| id.as_str()),
            name: &source.name,
            definition: DefinitionFacts {
                id: &definition.id,
                name: &definition.name,
                category: &definition.category,
                kind: &definition.kind,
                options: &definition.options,
            },
            config: &source.config,
            enabled: source.enabled,
            workspace_id: source.workspace.as_str(),
            write_key: source.write_key.as_str(),
            destinations: None,
        }
    }
}

/// A form as JSON; none where the body is no form. `kind`: its content type.
///
/// # Errors
/// As [`request_of`].
pub fn form(kind: &str, body: &Bytes) -> Result<Option<String>, Refusal> {
    if kind.contains("application/x-www-form-urlencoded") {
        let fields = fields(body)?;
        let text = (!fields.is_empty()).then(|| serde_json::to_string(&fields).ok()).flatten();
        return Ok(text);
    }
    if !kind.contains("multipart/form-data") {
        return Ok(None);
    }
    // The whole body is there, so nothing is waited for.
    multipart(kind, body).now_or_never().unwrap_or(Err(Refusal::UnreadableForm)).map(Some)
}

fn fields(text: &[u8]) -> Result<BTreeMap<String, Vec<String>>, Refusal> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (count, (name, value)) in url::form_urlencoded::parse(text).enumerate() {
        if count >= FIELDS {
            return Err(Refusal::TooLarge);
        }
        all.entry(name.into_owned()).or_default().push(value.into_owned());
    }
    Ok(all)
}

#[derive(Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Form {
    value: BTreeMap<String, Vec<String>>,
    file: BTreeMap<String, Vec<File>>,
}

/// Of a file its content stays behind.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    filename: String,
    header: BTreeMap<String, Vec<String>>,
    size: usize,
}

async fn multipart(kind: &str, body: &Bytes) -> Result<String, Refusal> {
    let boundary = multer::parse_boundary(kind).map_err(|_| Refusal::UnreadableForm)?;
    let whole = body.clone();
    let stream = futures_util::stream::once(async move { Ok::<_, std::convert::Infallible>(whole) });
    let mut parts = Multipart::new(stream, boundary);
    let (mut form, mut count) = (Form::default(), 0);
    while let Some(field) = parts.next_field().await.map_err(|_| Refusal::UnreadableForm)? {
        count += 1;
        if count > FIELDS {
            return Err(Refusal::TooLarge);
        }
        let name = field.name().unwrap_or_default().to_owned();
        let filename = field.file_name().map(str::to_owned);
        let mut header: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, value) in field.headers() {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            header.entry(canonical(name.as_str())).or_default().push(value);
        }
        let content = field.bytes().await.map_err(|_| Refusal::UnreadableForm)?;
        match filename {
            Some(filename) => form.file.entry(name).or_default().push(File { filename, header, size: content.len() }),
            None => form.value.entry(name).or_default().push(String::from_utf8_lossy(&content).into_owned()),
        }
    }
    serde_json::to_string(&form).map_err(|_| Refusal::UnreadableForm)
}

/// `x-a-b` as `X-A-B`, as transforms look for it.
fn canonical(name: &str) -> String {
    let part = |part: &str| {
        let mut letters = part.chars();
        letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
    };
    name.split('-').map(part).collect::<Vec<String>>().join("-")
}

#[cfg(test)]
mod tests {
    use axum::http::Request as HttpRequest;
    use serde_json::json;

    use super::*;
    use crate::control::workspace::Workspace;

    fn source() -> Arc<Source> {
        let text = r#"{"workspaceId":"w","sources":[{"id":"s","name":"n","writeKey":"k","config":{"c":1.0},
            "sourceDefinition":{"id":"d","name":"Shopify","category":"webhook","type":"cloud"}}]}"#;
        Arc::clone(Workspace::parse(text).expect("valid").by_write_key("k").expect("there"))
    }

    fn told(kind: &str, body: &str) -> Result<Value, Refusal> {
        let request = HttpRequest::post("/v1/webhook?writeKey=k&a=1&a=2").header("content-type", kind);
        let (parts, ()) = request.header("x-shopify-topic", "orders").body(()).expect("a request").into_parts();
        let element = request_of(&parts, Bytes::copy_from_slice(body.as_bytes()), &source())?;
        Ok(serde_json::from_str(&element).expect("JSON"))
    }

    #[test]
    fn the_service_is_told_everything_of_a_request() {
        let element = told("application/json", "{\"a\":\"\u{1}é\"").expect("readable");
        assert_eq!(
            element,
            json!({
                "request": {
                    "method": "POST", "url": "/v1/webhook?writeKey=k&a=1&a=2", "proto": "HTTP/1.1",
                    "headers": {"Content-Type": ["application/json"], "X-Shopify-Topic": ["orders"]},
                    "body": "{\"a\":\"\u{1}é\"", "query_parameters": {"writeKey": ["k"], "a": ["1", "2"]},
                },
                "source": {
                    "ID": "s", "OriginalID": "", "Name": "n", "Config": {"c": 1.0}, "Enabled": true, "WorkspaceID": "w",
                    "WriteKey": "k", "Destinations": null, "SourceDefinition":
                        {"ID": "d", "Name": "Shopify", "Category": "webhook", "Type": "cloud", "Options": null},
                },
            })
        );
        assert_eq!(told("text/plain", "").expect("readable")["request"]["body"], "{}");
    }

    #[test]
    fn forms_become_json() {
        let form = |element: Value| -> Value {
            assert_eq!(element["request"]["headers"]["Content-Type"], json!(["application/json"]));
            serde_json::from_str(element["request"]["body"].as_str().expect("text")).expect("JSON")
        };
        let element = told("application/x-www-form-urlencoded; charset=utf-8", "b=%20x&a=1&a=2&%zz");
        assert_eq!(form(element.expect("readable")), json!({"a": ["1", "2"], "b": [" x"], "%zz": [""]}));
        let empty = told("application/x-www-form-urlencoded", "").expect("readable");
        assert_eq!(empty["request"]["body"], "{}");
        let body = "--B\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n--B\r\nContent-Disposition: form-data; \
                    name=\"f\"; filename=\"x.txt\"\r\nContent-Type: text/plain\r\n\r\nhello\r\n--B--\r\n";
        let element = form(told("multipart/form-data; boundary=B", body).expect("readable"));
        assert_eq!(element["Value"], json!({"a": ["1"]}));
        assert_eq!(
            (&element["File"]["f"][0]["Filename"], &element["File"]["f"][0]["Size"]),
            (&json!("x.txt"), &json!(5))
        );
        assert_eq!(element["File"]["f"][0]["Header"]["Content-Type"], json!(["text/plain"]));
        for (kind, body) in [("multipart/form-data", "x"), ("multipart/form-data; boundary=B", "--B\r\nno")] {
            assert_eq!(told(kind, body).err(), Some(Refusal::UnreadableForm), "{kind} {body}");
        }
        let many = "a&".repeat(FIELDS + 1);
        assert_eq!(told("application/x-www-form-urlencoded", &many).err(), Some(Refusal::TooLarge));
    }
}
