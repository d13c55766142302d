//! The cluster's admin API.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::LOCATION;
use reqwest::redirect::Policy;
use reqwest::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::log::{LogError, Misconfigured};
use crate::model::record::{Partition, Topic};

use super::config::PulsarConfig;
use super::identity::{Tokens, why};

const CALL: Duration = Duration::from_secs(10);
const REDIRECTS: usize = 4;

#[derive(Clone)]
pub struct Rest {
    client: reqwest::Client,
    config: Arc<PulsarConfig>,
    tokens: Tokens,
}

impl Rest {
    pub fn new(config: &PulsarConfig) -> Result<Self, LogError> {
        let wrong = |error: reqwest::Error| LogError::fatal(Misconfigured(format!("log.pulsar: {error}")));
        let mut client = reqwest::Client::builder().timeout(CALL).connect_timeout(CALL / 3).redirect(Policy::none());
        if let Some(authorities) = config.authorities()? {
            for authority in reqwest::Certificate::from_pem_bundle(&authorities).map_err(wrong)? {
                client = client.add_root_certificate(authority);
            }
        }
        let client = client.build().map_err(wrong)?;
        Ok(Self { tokens: Tokens::new(config, &client)?, client, config: Arc::new(config.clone()) })
    }

    /// What is shown here, for the brokers too.
    pub fn tokens(&self) -> Tokens {
        self.tokens.clone()
    }

    /// The path of the namespace's topics.
    pub fn namespace(&self) -> String {
        format!("persistent/{}/{}", self.config.tenant, self.config.namespace)
    }

    pub fn topic(&self, topic: &Topic) -> String {
        format!("{}/{}", self.namespace(), self.config.name(topic))
    }

    pub fn partition(&self, topic: &Topic, partition: Partition) -> String {
        format!("{}-partition-{partition}", self.topic(topic))
    }

    /// None where there is no such thing.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, LogError> {
        match self.call::<()>(Method::GET, path, None).await? {
            (StatusCode::NOT_FOUND, _) => Ok(None),
            (status, body) if status.is_success() => match body.trim() {
                // A policy that is not set.
                "" => Ok(None),
                text => serde_json::from_str(text)
                    .map(Some)
                    .map_err(|error| self.unexpected(path, status, &error.to_string())),
            },
            (status, body) => Err(self.unexpected(path, status, &body)),
        }
    }

    /// Whether it was made: false where it was there.
    pub async fn put(&self, path: &str, body: &impl Serialize) -> Result<bool, LogError> {
        match self.call(Method::PUT, path, Some(body)).await? {
            (StatusCode::CONFLICT, _) => Ok(false),
            (status, _) if status.is_success() => Ok(true),
            (status, body) => Err(self.unexpected(path, status, &body)),
        }
    }

    pub async fn post(&self, path: &str, body: &impl Serialize) -> Result<(), LogError> {
        match self.call(Method::POST, path, Some(body)).await? {
            (status, _) if status.is_success() => Ok(()),
            (status, body) => Err(self.unexpected(path, status, &body)),
        }
    }

    /// Whatever holds in the namespace: nothing of the topic is given up for how long it waits or for how much does, and nobody who
    /// writes is held up for that.
    pub async fn keep_all(&self, topic: &Topic) -> Result<(), LogError> {
        let path = self.topic(topic);
        // It is set last.
        if self.get::<Option<i64>>(&format!("{path}/messageTTL")).await?.flatten() == Some(0) {
            return Ok(());
        }
        let unlimited = serde_json::json!({"limitSize": -1, "limitTime": -1, "policy": "producer_exception"});
        for kind in ["destination_storage", "message_age"] {
            self.post(&format!("{path}/backlogQuota?backlogQuotaType={kind}"), &unlimited).await?;
        }
        self.post(&format!("{path}/messageTTL?messageTTL=0"), &()).await
    }

    async fn call<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<(StatusCode, String), LogError> {
        let mut url = format!("{}/admin/v2/{path}", self.config.admin_url.trim_end_matches('/'));
        let body = body.map(serde_json::to_vec).transpose().map_err(LogError::fatal)?;
        let mut is_renewed = false;
        for _ in 0..REDIRECTS {
            let mut request = self.client.request(method.clone(), &url);
            let token = self.tokens.token().await?;
            if let Some(token) = &token {
                request = request.bearer_auth(token);
            }
            if let Some(body) = &body {
                request = request.header("content-type", "application/json").body(body.clone());
            }
            let answer = request.send().await.map_err(|error| self.silent(error))?;
            let status = answer.status();
            if status == StatusCode::UNAUTHORIZED && !std::mem::replace(&mut is_renewed, true) {
                // It may have been revoked, or have ended sooner than was said.
                if token.is_some_and(|token| self.tokens.forget(&token)) {
                    continue;
                }
            }
            // A broker sends on to the one that has the partition, which wants the token too: the client would leave it out.
            let onwards = answer.headers().get(LOCATION).filter(|_| status.is_redirection());
            match onwards.and_then(|location| location.to_str().ok()) {
                Some(location) => url = location.to_owned(),
                None => return Ok((status, answer.text().await.map_err(|error| self.silent(error))?)),
            }
        }
        Err(LogError::transient(format!("{}: {path}: sent from broker to broker", self.config.admin_url)))
    }

    fn silent(&self, error: reqwest::Error) -> LogError {
        LogError::transient(format!("{}: {}", self.config.admin_url, why(&error)))
    }

    fn unexpected(&self, path: &str, status: StatusCode, body: &str) -> LogError {
        #[derive(serde::Deserialize)]
        struct Said {
            reason: String,
        }
        let said = serde_json::from_str::<Said>(body).map_or_else(|_| body.to_owned(), |said| said.reason);
        let text = format!("{}: {path}: {status}: {}", self.config.admin_url, said.trim());
        match status {
            StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::BAD_REQUEST
            | StatusCode::METHOD_NOT_ALLOWED => LogError::fatal(text),
            _ => LogError::transient(text),
        }
    }
}
