//! The list of suppressed users from a control plane over HTTP, in RudderStack's API: page after page, each with the token of the next.

use std::time::Duration;

use md5::{Digest, Md5};
use reqwest::{Client, Url};
use serde::Deserialize;

use crate::clock::{Clock, Timestamp};

use super::remote::{RemoteError, base, whole};
use super::workspace::or_default;

/// Tries for one page, and the wait before the second; it doubles.
const TRIES: u32 = 4;
const WAIT: Duration = Duration::from_millis(500);

/// Which list is asked for.
#[derive(Clone)]
pub struct RegulationSettings {
    /// http(s)://host.
    pub url: String,
    /// The workspace's token, or the namespace's secret.
    pub token: String,
    /// Empty: the workspace's list.
    pub namespace: String,
    pub workspace: String,
    /// Users in one answer.
    pub page_size: usize,
    /// Between two questions.
    pub poll_interval: Duration,
}

/// One answer.
#[derive(Debug, Deserialize)]
#[serde(default)]
#[derive(Default)]
pub struct Page {
    #[serde(deserialize_with = "or_default")]
    pub items: Vec<Item>,
    /// Behind which the next one begins.
    #[serde(deserialize_with = "or_default")]
    pub token: String,
}

/// A user, and whether its events are suppressed.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Item {
    pub workspace_id: String,
    pub user_id: String,
    /// It was suppressed, and is not any more.
    #[serde(default, deserialize_with = "or_default")]
    pub canceled: bool,
    #[serde(default, deserialize_with = "or_default")]
    pub created_at: String,
    /// Empty: at all of them.
    #[serde(default, deserialize_with = "or_default")]
    pub source_ids: Vec<String>,
}

impl Item {
    pub fn created_at(&self) -> Timestamp {
        Timestamp::parse(&self.created_at).unwrap_or_default()
    }
}

/// Asks for the list.
pub struct Regulations {
    client: Client,
    url: Url,
    settings: RegulationSettings,
    clock: Clock,
}

impl Regulations {
    /// # Errors
    /// [`RemoteError::Address`].
    pub fn new(settings: RegulationSettings, clock: Clock) -> Result<Self, RemoteError> {
        let (client, mut url) = base(&settings.url)?;
        {
            let mut path = url.path_segments_mut().map_err(|()| RemoteError::Address)?;
            let whose = match settings.namespace.as_str() {
                "" => ["workspaces", settings.workspace.as_str()],
                namespace => ["namespaces", namespace],
            };
            path.push("dataplane").extend(whose).extend(["regulations", "suppressions"]);
        }
        Ok(Self { client, url, settings, clock })
    }

    pub fn settings(&self) -> &RegulationSettings {
        &self.settings
    }

    /// Whose list it is: a token is worth nothing for another.
    pub fn whose(&self) -> String {
        let mut digest = Md5::new();
        digest.update(self.url.as_str());
        format!("{:032x}", u128::from_be_bytes(digest.finalize().into()))
    }

    /// The page behind a token, or the first one. Asked for again where no answer comes.
    ///
    /// # Errors
    /// [`RemoteError`], without any secret.
    pub async fn page(&self, token: Option<&str>) -> Result<Page, RemoteError> {
        let (mut wait, mut tries) = (WAIT, 1);
        loop {
            match self.ask(token).await {
                Err(error) if tries < TRIES => tracing::debug!(%error, "the list of suppressed users, trying again"),
                answer => return answer,
            }
            self.clock.sleep(wait).await;
            (wait, tries) = (wait * 2, tries + 1);
        }
    }

    async fn ask(&self, token: Option<&str>) -> Result<Page, RemoteError> {
        let mut url = self.url.clone();
        url.query_pairs_mut().append_pair("pageSize", &self.settings.page_size.to_string());
        if let Some(token) = token {
            url.query_pairs_mut().append_pair("pageToken", token);
        }
        let request = self.client.get(url).basic_auth(&self.settings.token, Some(""));
        let body = whole(request.header("content-type", "application/json")).await?.1;
        let page: Page = serde_json::from_slice(&body).map_err(|error| RemoteError::Unusable(error.to_string()))?;
        // Without it the next question would begin anew.
        if page.token.is_empty() { Err(RemoteError::Unusable("there is no token in it".to_owned())) } else { Ok(page) }
    }
}
