//! Events for people who look at them in a control plane, in RudderStack's API.

use reqwest::{Client, Url};

use super::remote::{RemoteError, RemoteSettings, base, whole};

/// Where events are uploaded to.
pub struct Uploads {
    client: Client,
    url: Url,
    token: String,
}

impl Uploads {
    /// # Errors
    /// [`RemoteError::Address`].
    pub fn new(settings: &RemoteSettings) -> Result<Self, RemoteError> {
        let (client, mut url) = base(&settings.url)?;
        url.path_segments_mut().map_err(|()| RemoteError::Address)?.extend(["dataplane", "v2", "eventUploads"]);
        if !settings.region.is_empty() {
            url.query_pairs_mut().append_pair("region", &settings.region);
        }
        Ok(Self { client, url, token: settings.token.clone() })
    }

    /// # Errors
    /// [`RemoteError`]; only [`RemoteError::Silent`] may be otherwise at once.
    pub async fn upload(&self, body: String) -> Result<(), RemoteError> {
        let request = self.client.post(self.url.clone()).basic_auth(&self.token, Some(""));
        whole(request.header("content-type", "application/json;charset=UTF-8").body(body)).await.map(drop)
    }
}
