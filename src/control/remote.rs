//! The workspace configuration from a control plane over HTTP, in RudderStack's API: asked now and then, with conditional requests.

use std::time::Duration;

use reqwest::header::{ETAG, HeaderMap, HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED};
use reqwest::{Client, RequestBuilder, StatusCode, Url};

/// One answer, whole.
const PATIENCE: Duration = Duration::from_secs(30);
/// Of an answer: several hundred thousand destinations.
const MAX_BODY: usize = 256 << 20;
/// So much of an error's text is told.
const QUOTED: usize = 200;

/// Which control plane, and which part of it.
#[derive(Clone)]
pub struct RemoteSettings {
    /// http(s)://host, with a path where there is one.
    pub url: String,
    /// The workspace's token, or the namespace's secret.
    pub token: String,
    /// Of several workspaces. Empty: the token's own workspace.
    pub namespace: String,
    /// Empty: none is asked for.
    pub region: String,
    pub poll_interval: Duration,
    /// Whether a configuration without sources may replace one that has some.
    pub allow_empty: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// It is not told: it may hold a password.
    #[error("control.url is no address of a control plane such as https://host (a token goes into control.token)")]
    Address,
    #[error("no answer from the control plane: {0}")]
    Silent(String),
    #[error("the control plane answers {0}: {1}")]
    Refused(StatusCode, String),
    #[error("the control plane's answer is larger than {MAX_BODY} bytes")]
    TooLarge,
    #[error("the control plane's answer is not UTF-8")]
    NotText,
    #[error("the control plane's answer cannot be used: {0}")]
    Unusable(String),
}

/// A client, and the address that a setting names.
pub(super) fn base(url: &str) -> Result<(Client, Url), RemoteError> {
    let mut url = Url::parse(url.trim_end_matches('/')).map_err(|_| RemoteError::Address)?;
    if !["http", "https"].contains(&url.scheme()) || !url.username().is_empty() || url.password().is_some() {
        return Err(RemoteError::Address);
    }
    url.path_segments_mut().map_err(|()| RemoteError::Address)?.pop_if_empty();
    let client = Client::builder().timeout(PATIENCE).build().map_err(|error| RemoteError::Silent(error.to_string()))?;
    Ok((client, url))
}

/// An answer with its body; none of it where it is not that of a success, or of nothing new.
pub(super) async fn whole(request: RequestBuilder) -> Result<(StatusCode, Vec<u8>, HeaderMap), RemoteError> {
    // The address may hold a password.
    let silent = |error: reqwest::Error| RemoteError::Silent(why(&error.without_url()));
    let mut answer = request.send().await.map_err(silent)?;
    let (status, headers) = (answer.status(), answer.headers().clone());
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(silent)? {
        if body.len() + chunk.len() > MAX_BODY {
            return Err(RemoteError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    if !status.is_success() && status != StatusCode::NOT_MODIFIED {
        let said = String::from_utf8_lossy(&body).chars().take(QUOTED).collect();
        return Err(RemoteError::Refused(status, said));
    }
    Ok((status, body, headers))
}

/// Asks a control plane. Remembers what it was told last.
pub struct Remote {
    client: Client,
    url: Url,
    token: String,
    /// What makes the next request conditional.
    known: HeaderMap,
    /// The same, of the last answer, until [`Remote::accept`] says that it is usable.
    unproven: HeaderMap,
}

impl Remote {
    /// # Errors
    /// [`RemoteError::Address`].
    pub fn new(settings: &RemoteSettings) -> Result<Self, RemoteError> {
        let (client, mut url) = base(&settings.url)?;
        {
            let mut path = url.path_segments_mut().map_err(|()| RemoteError::Address)?;
            match settings.namespace.as_str() {
                "" => path.push("workspaceConfig"),
                namespace => path.extend(["data-plane", "v1", "namespaces", namespace, "config"]),
            };
        }
        if settings.namespace.is_empty() {
            url.query_pairs_mut().append_pair("fetchAll", "true");
        }
        if !settings.region.is_empty() {
            url.query_pairs_mut().append_pair("region", &settings.region);
        }
        Ok(Self { client, url, token: settings.token.clone(), known: HeaderMap::new(), unproven: HeaderMap::new() })
    }

    /// The configuration as it is now. None: the same as last time.
    ///
    /// # Errors
    /// [`RemoteError`], without any secret.
    pub async fn fetch(&mut self) -> Result<Option<String>, RemoteError> {
        let request = self.client.get(self.url.clone()).basic_auth(&self.token, Some("")).headers(self.known.clone());
        let (status, body, headers) = whole(request.header("content-type", "application/json")).await?;
        if status == StatusCode::NOT_MODIFIED {
            return Ok(None);
        }
        let text = String::from_utf8(body).map_err(|_| RemoteError::NotText)?;
        self.unproven = conditions(&headers);
        Ok(Some(text))
    }

    /// Makes the next request conditional on the last answer. The caller calls it when the answer is usable; an unusable one is requested again.
    pub fn accept(&mut self) {
        self.known = std::mem::take(&mut self.unproven);
    }
}

/// With its causes: the outermost says only that something failed.
fn why(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

fn conditions(told: &HeaderMap) -> HeaderMap {
    let mut known = HeaderMap::new();
    let mut keep = |from, to| {
        if let Some(value) = told.get(from).cloned() {
            let _: Option<HeaderValue> = known.insert(to, value);
        }
    };
    keep(ETAG, IF_NONE_MATCH);
    keep(LAST_MODIFIED, IF_MODIFIED_SINCE);
    known
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_are_the_known_ones() {
        let settings = |url: &str, namespace: &str, region: &str| RemoteSettings {
            url: url.into(),
            token: "t".into(),
            namespace: namespace.into(),
            region: region.into(),
            poll_interval: Duration::from_secs(5),
            allow_empty: false,
        };
        let address = |url: &str, namespace: &str, region: &str| {
            Remote::new(&settings(url, namespace, region)).map(|remote| remote.url.to_string()).ok()
        };
        let single = "https://api.example.com/workspaceConfig?fetchAll=true";
        assert_eq!(address("https://api.example.com", "", "").as_deref(), Some(single));
        assert_eq!(
            address("https://api.example.com/cp/", "free us", "US").as_deref(),
            Some("https://api.example.com/cp/data-plane/v1/namespaces/free%20us/config?region=US")
        );
        for wrong in
            ["api.example.com", "ftp://api.example.com", "https://user:secret@api.example.com", "https://x:99999"]
        {
            assert_eq!(address(wrong, "", ""), None, "{wrong}");
        }
    }
}
