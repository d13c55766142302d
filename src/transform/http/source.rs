//! Webhook requests of other tools, made into events by the service.
//!
//! Requests of one type of source go together: whoever comes while the service is busy waits for the next call, so a call is as
//! large as it has to be and nobody waits for company. Each type has its own calls: a slow one delays no other. A call that is
//! refused is made again with each half of it, one after the other, until the request that is refused stands alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::{CallError, Service};

/// Requests in one call, and their bytes.
const MOST: usize = 32;
const MOST_BYTES: usize = 8 << 20;
/// Calls of one type of source at a time.
const CALLS: usize = 8;
/// Requests of one type that wait for a call; what comes then is turned away.
const WAITING: usize = 1_000;

/// Answers above it are read off the async threads.
const LARGE: usize = 128 * 1024;

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Events in the form of a batch's body, if any, and what the caller is to be told, if the service says so.
    Taken { output: Option<String>, reply: Option<Reply> },
    /// Refused by the service, with what the caller is to be told.
    Refused { status: u16, message: String },
    /// The service does not know what to say.
    Broken(String),
    /// The service is away.
    Away(String),
    /// Too many wait.
    Full,
}

/// What the caller of a webhook expects to hear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub body: Bytes,
    pub content_type: String,
}

/// The transform of webhook sources.
pub struct Sources {
    service: Service,
    lines: Mutex<HashMap<String, mpsc::Sender<Waiting>>>,
}

struct Waiting {
    request: String,
    done: oneshot::Sender<Answer>,
}

impl Sources {
    pub fn new(service: Service) -> Self {
        Self { service, lines: Mutex::default() }
    }

    /// Whether the service says anything at all.
    pub async fn is_there(&self) -> bool {
        self.service.features().await.is_ok()
    }

    /// Hands a request in: an element of the service's input, as JSON. `kind` is the source's type.
    pub async fn transform(&self, kind: &str, request: String) -> Answer {
        let (done, answer) = oneshot::channel();
        if self.line(kind).try_send(Waiting { request, done }).is_err() {
            return Answer::Full;
        }
        answer.await.unwrap_or_else(|_| Answer::Away("the call was ended".to_owned()))
    }

    /// Types come from the configuration, so they are few.
    fn line(&self, kind: &str) -> mpsc::Sender<Waiting> {
        let kind = kind.to_lowercase();
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let service = &self.service;
        let line = lines.entry(kind).or_insert_with_key(|kind| {
            let (sender, waiting) = mpsc::channel(WAITING);
            tokio::spawn(serve(service.clone(), kind.clone(), waiting));
            sender
        });
        line.clone()
    }
}

/// Calls for one type of source, until nobody can come any more.
async fn serve(service: Service, kind: String, mut waiting: mpsc::Receiver<Waiting>) {
    let calls = Arc::new(Semaphore::new(CALLS));
    let mut next = waiting.recv().await;
    while let Some(first) = next.take() {
        // Others come while this one waits for a free call.
        let Ok(permit) = Arc::clone(&calls).acquire_owned().await else { return };
        let (mut batch, mut bytes) = (vec![first], 0);
        while batch.len() < MOST {
            bytes += batch.last().map_or(0, |last| last.request.len());
            match waiting.try_recv() {
                Ok(more) if bytes + more.request.len() <= MOST_BYTES => batch.push(more),
                Ok(more) => {
                    next = Some(more);
                    break;
                }
                Err(_) => break,
            }
        }
        let (service, kind) = (service.clone(), kind.clone());
        tokio::spawn(async move {
            let (requests, callers): (Vec<String>, Vec<_>) = batch.into_iter().map(|it| (it.request, it.done)).unzip();
            let answers = call(&service, &kind, &requests, true).await;
            // Who has gone does not want to know.
            callers.into_iter().zip(answers).for_each(|(caller, answer)| drop(caller.send(answer)));
            drop(permit);
        });
        if next.is_none() {
            next = waiting.recv().await;
        }
    }
}

/// An answer for each request, in their order.
fn call<'a>(service: &'a Service, kind: &'a str, requests: &'a [String], patient: bool) -> BoxFuture<'a, Vec<Answer>> {
    async move {
        let body = format!("[{}]", requests.join(","));
        let said = service.post(&["v2", "sources", kind], body.into(), patient).await;
        let read = match said {
            Ok(body) => read_apart(body, requests.len()).await,
            Err(error) => Err(error),
        };
        let error = match read {
            Ok(answers) => return answers,
            Err(error) => error,
        };
        // One that makes the service fail is not told from a service that fails, so it is looked for in either case.
        // One that is away, or has too much to do, is left alone.
        if requests.len() > 1 && !matches!(error, CallError::Away(_)) {
            let (left, right) = requests.split_at(requests.len() / 2);
            let mut answers = call(service, kind, left, false).await;
            answers.extend(call(service, kind, right, false).await);
            return answers;
        }
        let answer = match error {
            CallError::Away(error) | CallError::Failing(error) => Answer::Away(error),
            CallError::Refused(error) => Answer::Broken(error),
        };
        vec![answer; requests.len()]
    }
    .boxed()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Element {
    output: Option<Box<RawValue>>,
    output_to_source: Option<RawReply>,
    #[serde(default)]
    status_code: Option<u16>,
    error: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct RawReply {
    body: String,
    content_type: String,
}

/// Off the async threads, where it takes long.
async fn read_apart(body: Bytes, count: usize) -> Result<Vec<Answer>, CallError> {
    if body.len() <= LARGE {
        return read(&body, count);
    }
    let reading = tokio::task::spawn_blocking(move || read(&body, count)).await;
    reading.unwrap_or_else(|error| Err(CallError::Away(error.to_string())))
}

fn read(body: &[u8], count: usize) -> Result<Vec<Answer>, CallError> {
    let elements: Vec<Element> = serde_json::from_slice(body)
        .map_err(|error| CallError::Refused(format!("the answer is not what it should be: {error}")))?;
    if elements.len() != count {
        return Err(CallError::Refused(format!("{count} requests have {} answers", elements.len())));
    }
    Ok(elements.into_iter().map(answer).collect())
}

fn answer(element: Element) -> Answer {
    if let Some(error) = element.error {
        let message = match error {
            Value::String(text) => text,
            other => other.to_string(),
        };
        let status = element.status_code.filter(|code| (400..600).contains(code)).unwrap_or(400);
        return Answer::Refused { status, message };
    }
    let reply = match element.output_to_source.map(decoded).transpose() {
        Ok(reply) => reply,
        Err(broken) => return Answer::Broken(broken),
    };
    let output = element.output.map(|raw| raw.get().to_owned()).filter(|raw| raw != "null");
    if output.is_none() && reply.is_none() {
        return Answer::Broken("the answer holds neither output nor outputToSource".to_owned());
    }
    Answer::Taken { output, reply }
}

fn decoded(raw: RawReply) -> Result<Reply, String> {
    let body = BASE64_STANDARD.decode(&raw.body).map_err(|error| format!("outputToSource is no base64: {error}"))?;
    Ok(Reply { body: body.into(), content_type: raw.content_type })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_means_something() {
        let of = |text: &str| read(text.as_bytes(), 1).expect("readable").remove(0);
        let taken =
            |output: Option<&str>, reply: Option<Reply>| Answer::Taken { output: output.map(Into::into), reply };
        let challenge = Reply { body: r#"{"challenge":"chal"}"#.into(), content_type: "application/json".into() };
        let said = r#""outputToSource":{"body":"eyJjaGFsbGVuZ2UiOiJjaGFsIn0=","contentType":"application/json"}"#;
        let cases = [
            (r#"[{"output":{"batch":[ 1.0 ]}}]"#.to_owned(), taken(Some(r#"{"batch":[ 1.0 ]}"#), None)),
            (format!(r#"[{{{said},"statusCode":200}}]"#), taken(None, Some(challenge.clone()))),
            (format!(r#"[{{"output":{{}},{said}}}]"#), taken(Some("{}"), Some(challenge))),
            (r#"[{"statusCode":422,"error":"no"}]"#.into(), Answer::Refused { status: 422, message: "no".into() }),
            (r#"[{"error":{"a":1}}]"#.into(), Answer::Refused { status: 400, message: r#"{"a":1}"#.into() }),
            (r#"[{"error":"x","statusCode":200}]"#.into(), Answer::Refused { status: 400, message: "x".into() }),
        ];
        for (text, answer) in cases {
            assert_eq!(of(&text), answer, "{text}");
        }
        for broken in ["[{}]", r#"[{"output":null}]"#, r#"[{"outputToSource":{"body":"*"}}]"#] {
            assert!(matches!(of(broken), Answer::Broken(_)), "{broken}");
        }
        for nonsense in ["", "{}", "[]", "[{},{}]", "[1]"] {
            assert!(matches!(read(nonsense.as_bytes(), 1), Err(CallError::Refused(_))), "{nonsense}");
        }
    }
}
