//! The warehouse service: what is asked about it at the edge is passed on to it, and its answer back.

use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Client, Method, StatusCode, Url};

/// For a whole request.
const PATIENCE: Duration = Duration::from_secs(30);
const MAX_ANSWER: usize = 16 << 20;

/// The service. Clones share its connections.
#[derive(Clone)]
pub struct Warehouse {
    client: Client,
    base: Url,
}

/// What it said.
pub struct Answer {
    pub status: StatusCode,
    pub content_type: Option<HeaderValue>,
    pub body: Bytes,
}

#[derive(Debug, thiserror::Error)]
pub enum WarehouseError {
    /// It may hold a password, so it is not shown.
    #[error("gateway.internal.warehouse_url is not an address such as http://localhost:8082")]
    Address,
    #[error("{0}")]
    Silent(String),
    #[error("its answer has more than {MAX_ANSWER} bytes")]
    TooLarge,
}

impl Warehouse {
    /// # Errors
    /// [`WarehouseError::Address`].
    pub fn new(url: &str) -> Result<Self, WarehouseError> {
        let base = Url::parse(url).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let client = Client::builder().timeout(PATIENCE).redirect(reqwest::redirect::Policy::none()).no_proxy().build();
        Ok(Self { client: client.map_err(silent)?, base: base.ok_or(WarehouseError::Address)? })
    }

    /// Passes a request on, with the headers that say what its body is: the token that opens our door is nobody else's.
    ///
    /// # Errors
    /// [`WarehouseError`], where there is no answer.
    pub async fn pass_on(
        &self,
        method: Method,
        path: &str,
        query: Option<&str>,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Answer, WarehouseError> {
        let mut url = self.base.clone();
        url.set_path(&format!("{}{path}", self.base.path().trim_end_matches('/')));
        url.set_query(query);
        let mut request = self.client.request(method, url).body(body);
        for name in [CONTENT_TYPE, ACCEPT] {
            if let Some(value) = headers.get(&name) {
                request = request.header(name, value);
            }
        }
        let mut answer = request.send().await.map_err(silent)?;
        let (status, content_type) = (answer.status(), answer.headers().get(CONTENT_TYPE).cloned());
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(silent)? {
            if body.len() + chunk.len() > MAX_ANSWER {
                return Err(WarehouseError::TooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Answer { status, content_type, body: body.into() })
    }
}

fn silent(error: reqwest::Error) -> WarehouseError {
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    WarehouseError::Silent(cause.to_string())
}
