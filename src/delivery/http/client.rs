//! One pooled HTTP client for all destinations.

use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Method, Response};
use url::Url;

use crate::clock::Clock;
use crate::delivery::verdict::Verdict;
use crate::model::delivery::HttpRequest;
use crate::model::id::DeliveryId;
use crate::model::outcome::Reason;

use super::guard::{Blocked, Guard};

/// Of an answer's body so much is read; nobody looks at more, and an endless one must end.
const BODY: usize = 64 * 1024;
/// And so much of it is kept as the destination's words.
const WORDS: usize = 512;
const REDIRECTS: usize = 5;

#[derive(Clone, Copy, Debug)]
pub struct ClientSettings {
    /// For a whole request, body included.
    pub timeout: Duration,
    pub connect_timeout: Duration,
    /// Idle connections kept for each host.
    pub idle_per_host: usize,
    pub guard: Guard,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            idle_per_host: 1_000,
            guard: Guard::default(),
        }
    }
}

#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    settings: ClientSettings,
    clock: Clock,
}

/// A request that cannot be sent by anyone.
struct Unbuildable(String);

impl Client {
    /// # Errors
    /// Where the TLS library does not start.
    pub fn new(settings: ClientSettings, clock: Clock) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .user_agent(concat!("Laneway/", env!("CARGO_PKG_VERSION")))
            .timeout(settings.timeout)
            .connect_timeout(settings.connect_timeout)
            .pool_max_idle_per_host(settings.idle_per_host)
            .pool_idle_timeout(Duration::from_secs(30))
            .tcp_nodelay(true)
            // Followed here: each hop passes the guard, and only those that keep method and body are followed at all.
            .redirect(reqwest::redirect::Policy::none())
            // A proxy would resolve names itself, past the guard.
            .no_proxy()
            .dns_resolver(settings.guard)
            .build()?;
        Ok(Self { http, settings, clock })
    }

    /// Sends a request and says what came of it. Never fails: whatever happens is a verdict.
    pub async fn send(&self, request: &HttpRequest, delivery: &DeliveryId) -> Verdict {
        let built = build(request, delivery);
        let (method, mut url, mut headers) = match built {
            Ok(built) => built,
            Err(Unbuildable(message)) => return Verdict::Abort { reason: Reason::BadRequest, code: 0, message },
        };
        let until = self.clock.instant() + self.settings.timeout;
        for _ in 0..=REDIRECTS {
            // The time is for all hops together.
            let left = until.saturating_duration_since(self.clock.instant());
            if let Err(blocked) = self.settings.guard.check(&url) {
                return Verdict::Abort { reason: Reason::BlockedAddress, code: 0, message: blocked.to_string() };
            }
            let mut sending = self.http.request(method.clone(), url.clone()).headers(headers.clone()).timeout(left);
            if !request.body.is_empty() {
                sending = sending.body(request.body.clone());
            }
            let answer = match sending.send().await {
                Ok(answer) => answer,
                Err(error) => return silence(&error),
            };
            if !matches!(answer.status().as_u16(), 307 | 308) {
                return self.judge(answer).await;
            }
            let next = answer.headers().get(LOCATION).and_then(|place| url.join(place.to_str().ok()?).ok());
            match next {
                Some(next) if matches!(next.scheme(), "http" | "https") => {
                    if next.origin() != url.origin() {
                        // What was configured for one host, keys among it, is not for another.
                        let keeps = [CONTENT_TYPE.as_str(), "idempotency-key"];
                        let own: Vec<HeaderName> =
                            headers.keys().filter(|name| !keeps.contains(&name.as_str())).cloned().collect();
                        own.iter().for_each(|name| drop(headers.remove(name)));
                    }
                    url = next;
                }
                _ => return self.judge(answer).await,
            }
        }
        let message = format!("redirected more than {REDIRECTS} times");
        Verdict::Abort { reason: Reason::Rejected, code: 308, message }
    }

    async fn judge(&self, mut answer: Response) -> Verdict {
        let code = answer.status().as_u16();
        let retry_after = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let mut words = Vec::new();
        let mut read = 0;
        while read < BODY {
            match answer.chunk().await {
                Ok(Some(chunk)) => {
                    read += chunk.len();
                    let room = WORDS.saturating_sub(words.len()).min(chunk.len());
                    words.extend_from_slice(&chunk[..room]);
                }
                Ok(None) => break,
                Err(error) => return silence(&error),
            }
        }
        let words = String::from_utf8_lossy(&words).into_owned();
        Verdict::of_status(code, words, retry_after.as_deref(), self.clock.now())
    }
}

fn build(request: &HttpRequest, delivery: &DeliveryId) -> Result<(Method, Url, HeaderMap), Unbuildable> {
    let method = Method::from_bytes(request.method.as_bytes())
        .map_err(|_| Unbuildable(format!("{:?} is not an HTTP method", request.method)))?;
    let mut url =
        Url::parse(&request.url).map_err(|error| Unbuildable(format!("{:?} is not an URL: {error}", request.url)))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(Unbuildable(format!("{:?} is neither http nor https", request.url)));
    }
    if !request.params.is_empty() {
        url.query_pairs_mut().extend_pairs(&request.params);
    }
    let mut headers = HeaderMap::with_capacity(request.headers.len() + 1);
    for (name, value) in &request.headers {
        let unusable = || Unbuildable(format!("header {name:?} is not a valid one"));
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| unusable())?;
        let value = HeaderValue::from_str(value).map_err(|_| unusable())?;
        headers.append(name, value);
    }
    if let Ok(id) = HeaderValue::from_str(delivery.as_str()) {
        headers.insert("idempotency-key", id);
    }
    Ok((method, url, headers))
}

fn silence(error: &reqwest::Error) -> Verdict {
    let mut cause: &dyn std::error::Error = error;
    let mut message = String::new();
    loop {
        if cause.is::<Blocked>() {
            return Verdict::Abort { reason: Reason::BlockedAddress, code: 0, message: cause.to_string() };
        }
        if let Some(next) = cause.source() {
            cause = next;
        } else {
            break;
        }
    }
    // The outermost text names the URL, which may hold secrets; what went wrong stands innermost.
    message.push_str(if error.is_timeout() {
        "timed out: "
    } else if error.is_connect() {
        "no connection: "
    } else {
        "no answer: "
    });
    message.push_str(&cause.to_string());
    Verdict::of_silence(message)
}
