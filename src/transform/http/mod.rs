//! The transformer service, over its own HTTP protocol: one JSON document there, one back.
//!
//! It may be away, slow, or answer nonsense; none of it ends anything here. What a call costs is bounded: its time, its tries, and
//! the size of its answer.

mod source;

use std::time::Duration;

use bytes::Bytes;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Response, StatusCode};
use serde_json::Value;
use url::Url;

use crate::clock::Clock;

pub use source::{Answer, Reply, Sources};

/// An answer's body; a batch of webhook requests is far smaller.
const MAX_ANSWER: usize = 32 << 20;
/// And so much of an error's.
const WORDS: usize = 512;
/// Tries after the first; the waits between them grow from the first by half, up to the last.
const TRIES: u32 = 5;
const WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(5);

/// One transformer service. Clones share its connections.
#[derive(Clone)]
pub struct Service {
    http: reqwest::Client,
    base: Url,
    clock: Clock,
}

/// Why there is no service to call.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// It may hold a password, so it is not shown.
    #[error("transformer.url is not an address such as http://localhost:9090")]
    Address,
    #[error("the HTTP client does not start: {0}")]
    Client(#[from] reqwest::Error),
}

/// Why a call brought nothing.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No answer, or one that asks to come later, after all tries.
    #[error("{0}")]
    Away(String),
    /// It failed (500), after all tries: soon it may be over, or it is what was asked that makes it fail.
    #[error("{0}")]
    Failing(String),
    /// An answer that would be the same again.
    #[error("{0}")]
    Refused(String),
}

impl Service {
    /// # Errors
    /// [`ServiceError`], where the address is none.
    pub fn new(url: &str, timeout: Duration, clock: Clock) -> Result<Self, ServiceError> {
        let base = Url::parse(url).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let base = base.ok_or(ServiceError::Address)?;
        let http = reqwest::Client::builder()
            .user_agent(concat!("Laneway/", env!("CARGO_PKG_VERSION")))
            .timeout(timeout)
            .connect_timeout(CONNECT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .tcp_nodelay(true)
            .build()?;
        Ok(Self { http, base, clock })
    }

    /// What it says that it can do: an object, as it is.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn features(&self) -> Result<Value, CallError> {
        let body = self.once(self.http.get(self.at(&["features"]))).await?;
        serde_json::from_slice(&body).map_err(|error| CallError::Refused(format!("/features is no JSON: {error}")))
    }

    /// Posts a JSON document until there is an answer worth having. `patient`: also where the answer is an error of the
    /// service's own, which may be over soon.
    async fn post(&self, path: &[&str], body: Bytes, patient: bool) -> Result<Bytes, CallError> {
        let (url, began) = (self.at(path), self.clock.instant());
        let (mut wait, mut tries) = (WAIT, 0);
        loop {
            let request = self.http.post(url.clone()).header(CONTENT_TYPE, "application/json; charset=utf-8");
            let answer = self.once(request.body(body.clone())).await;
            tries += 1;
            let is_over = !patient || tries > TRIES || began.elapsed() + wait > PATIENCE;
            if is_over || matches!(answer, Ok(_) | Err(CallError::Refused(_))) {
                return answer;
            }
            self.clock.sleep(wait).await;
            wait = (wait * 3 / 2).min(LONGEST_WAIT);
        }
    }

    async fn once(&self, request: reqwest::RequestBuilder) -> Result<Bytes, CallError> {
        let answer = request.send().await.map_err(|error| CallError::Away(silence(error)))?;
        let status = answer.status();
        if status == StatusCode::OK {
            return read(answer, MAX_ANSWER).await;
        }
        let words = read(answer, WORDS).await.unwrap_or_default();
        let said = format!("answered {}: {}", status.as_u16(), String::from_utf8_lossy(&words));
        Err(match status.as_u16() {
            500 => CallError::Failing(said),
            408 | 429 | 502..=599 => CallError::Away(said),
            _ => CallError::Refused(said),
        })
    }

    fn at(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        url
    }
}

/// A body up to a bound; what is longer is refused, or cut where it is only words.
async fn read(mut answer: Response, most: usize) -> Result<Bytes, CallError> {
    let mut body = Vec::new();
    loop {
        match answer.chunk().await {
            Ok(None) => return Ok(body.into()),
            Ok(Some(chunk)) if body.len() + chunk.len() <= most => body.extend_from_slice(&chunk),
            Ok(Some(chunk)) if most == WORDS => {
                body.extend_from_slice(&chunk[..most - body.len()]);
                return Ok(body.into());
            }
            Ok(Some(_)) => return Err(CallError::Refused(format!("the answer has more than {most} bytes"))),
            Err(error) => return Err(CallError::Away(silence(error))),
        }
    }
}

/// What went wrong, without the address: whoever hears it need not know where the service is.
fn silence(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    let what = match (error.is_timeout(), error.is_connect()) {
        (true, _) => "timed out",
        (_, true) => "no connection",
        _ => "no answer",
    };
    format!("{what}: {cause}")
}
