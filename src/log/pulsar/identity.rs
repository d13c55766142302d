//! What proves who we are: a token, or tokens that an OAuth2 provider gives for a client's credentials and that are renewed before they
//! end. Brokers and the admin API want the same.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use oauth2::basic::BasicClient;
use oauth2::{
    AsyncHttpClient, AuthType, ClientId, ClientSecret, HttpRequest, HttpResponse, RequestTokenError, Scope,
    TokenResponse, TokenUrl,
};
use pulsar::authentication::Authentication;
use pulsar::error::AuthenticationError;
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::log::{LogError, Misconfigured};

use super::config::PulsarConfig;

/// Of a token's life this is left when the next one is asked for.
const EARLY: u32 = 10;
/// A token whose end is not told is kept for so long.
const UNTOLD: Duration = Duration::from_secs(600);

/// A provider of tokens.
#[derive(Clone, Default)]
pub struct OAuth2 {
    /// Empty: there is none. What it offers is found under `/.well-known/openid-configuration`.
    pub issuer_url: String,
    /// JSON with `client_id` and `client_secret`, as Pulsar's own clients want it.
    pub credentials_file: PathBuf,
    pub audience: String,
    pub scope: String,
}

/// What a file of credentials says.
#[derive(Deserialize)]
struct Credentials {
    client_id: String,
    client_secret: String,
}

/// What a provider says of itself.
#[derive(Deserialize)]
struct Offer {
    token_endpoint: String,
}

/// A token whenever one is wanted. Clones share it.
#[derive(Clone)]
pub struct Tokens(Option<Arc<Source>>);

enum Source {
    Given(String),
    Provider(Box<Provider>),
}

struct Provider {
    http: Http,
    config: OAuth2,
    credentials: Credentials,
    state: Mutex<State>,
    clock: Clock,
}

/// Sends what the library wants sent.
struct Http(reqwest::Client);

impl<'c> AsyncHttpClient<'c> for Http {
    type Error = reqwest::Error;
    type Future = BoxFuture<'c, Result<HttpResponse, reqwest::Error>>;

    fn call(&'c self, request: HttpRequest) -> Self::Future {
        Box::pin(async move {
            let answer = self.0.execute(request.try_into()?).await?;
            let (status, headers) = (answer.status(), answer.headers().clone());
            let mut response = HttpResponse::new(answer.bytes().await?.to_vec());
            (*response.status_mut(), *response.headers_mut()) = (status, headers);
            Ok(response)
        })
    }
}

#[derive(Default)]
struct State {
    endpoint: Option<TokenUrl>,
    token: Option<Token>,
}

struct Token {
    secret: String,
    renew_at: Instant,
    ends_at: Instant,
}

impl Tokens {
    /// # Errors
    /// Where what is configured cannot be used.
    pub fn new(config: &PulsarConfig, http: &reqwest::Client) -> Result<Self, LogError> {
        let source = match (config.token.is_empty(), config.oauth2.issuer_url.is_empty()) {
            (true, true) => None,
            (false, true) => Some(Source::Given(config.token.clone())),
            (true, false) => Some(Source::Provider(Box::new(Provider {
                http: Http(http.clone()),
                credentials: credentials(&config.oauth2)?,
                config: config.oauth2.clone(),
                state: Mutex::default(),
                clock: Clock::system(),
            }))),
            (false, false) => {
                let both =
                    "log.pulsar.token and log.pulsar.oauth2.issuer_url are both set: one of them proves who we are";
                return Err(LogError::fatal(Misconfigured(both.into())));
            }
        };
        Ok(Self(source.map(Arc::new)))
    }

    /// Nobody is asked who they are.
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// None where nobody is asked.
    ///
    /// # Errors
    /// [`LogError::Transient`] where the provider does not answer, [`LogError::Fatal`] where it refuses us.
    pub async fn token(&self) -> Result<Option<String>, LogError> {
        match self.0.as_deref() {
            None => Ok(None),
            Some(Source::Given(token)) => Ok(Some(token.clone())),
            Some(Source::Provider(provider)) => provider.token().await.map(Some),
        }
    }
}

#[async_trait]
impl Authentication for Tokens {
    fn auth_method_name(&self) -> String {
        "token".into()
    }

    async fn initialize(&mut self) -> Result<(), AuthenticationError> {
        Ok(())
    }

    async fn auth_data(&mut self) -> Result<Vec<u8>, AuthenticationError> {
        match self.token().await {
            Ok(token) => Ok(token.unwrap_or_default().into_bytes()),
            Err(LogError::Fatal(error)) => Err(AuthenticationError::Custom(error.to_string())),
            Err(error) => Err(AuthenticationError::Retriable(error.to_string())),
        }
    }
}

/// What it means that the client got no token of ours.
pub fn refused(error: &AuthenticationError) -> LogError {
    match error {
        AuthenticationError::Retriable(text) => LogError::transient(text.clone()),
        AuthenticationError::Custom(text) => LogError::fatal(text.clone()),
    }
}

fn credentials(config: &OAuth2) -> Result<Credentials, LogError> {
    let wrong = |error: String| {
        let place = config.credentials_file.display();
        LogError::fatal(Misconfigured(format!("log.pulsar.oauth2.credentials_file: {place}: {error}")))
    };
    let text = std::fs::read(&config.credentials_file).map_err(|error| wrong(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| {
        // Not what was found there: it may be the secret.
        let what = if error.is_data() { "not with client_id and client_secret as texts" } else { "not JSON" };
        wrong(format!("line {}: {what}", error.line()))
    })
}

impl Provider {
    async fn token(&self) -> Result<String, LogError> {
        let mut state = self.state.lock().await;
        let now = self.clock.instant();
        if let Some(token) = state.token.as_ref().filter(|token| now < token.renew_at) {
            return Ok(token.secret.clone());
        }
        match (self.fetch(&mut state.endpoint).await, &mut state.token) {
            (Ok(token), kept) => Ok(kept.insert(token).secret.clone()),
            // The old one is good for a while: the next who wants one asks again.
            (Err(error), Some(token)) if now < token.ends_at => {
                tracing::warn!(%error, "no new token for Pulsar, the old one still holds");
                Ok(token.secret.clone())
            }
            (Err(error), _) => Err(error),
        }
    }

    async fn fetch(&self, endpoint: &mut Option<TokenUrl>) -> Result<Token, LogError> {
        let endpoint = match endpoint {
            Some(endpoint) => endpoint.clone(),
            None => endpoint.insert(self.discover().await?).clone(),
        };
        let client = BasicClient::new(ClientId::new(self.credentials.client_id.clone()))
            .set_client_secret(ClientSecret::new(self.credentials.client_secret.clone()))
            .set_token_uri(endpoint)
            .set_auth_type(AuthType::RequestBody);
        let mut request = client.exchange_client_credentials();
        if !self.config.audience.is_empty() {
            request = request.add_extra_param("audience", &self.config.audience);
        }
        if !self.config.scope.is_empty() {
            request = request.add_scope(Scope::new(self.config.scope.clone()));
        }
        let asked_at = self.clock.instant();
        let answer = request.request_async(&self.http).await.map_err(|error| match error {
            RequestTokenError::ServerResponse(_) => LogError::fatal(self.says(&error)),
            RequestTokenError::Request(error) => LogError::transient(self.says(&why(&error))),
            other => LogError::transient(self.says(&other)),
        })?;
        let life = answer.expires_in().unwrap_or(UNTOLD);
        let secret = answer.access_token().secret().clone();
        Ok(Token { secret, renew_at: asked_at + life - life / EARLY, ends_at: asked_at + life })
    }

    /// Where tokens are had.
    async fn discover(&self) -> Result<TokenUrl, LogError> {
        let url = format!("{}/.well-known/openid-configuration", self.config.issuer_url.trim_end_matches('/'));
        let silent = |error: reqwest::Error| LogError::transient(self.says(&why(&error)));
        let answer = self.http.0.get(url).send().await.and_then(reqwest::Response::error_for_status).map_err(silent)?;
        let body = answer.bytes().await.map_err(silent)?;
        let unusable = |error: &dyn std::fmt::Display| LogError::transient(self.says(error));
        let offer: Offer = serde_json::from_slice(&body).map_err(|error| unusable(&error))?;
        TokenUrl::new(offer.token_endpoint).map_err(|error| unusable(&error))
    }

    fn says(&self, error: &dyn std::fmt::Display) -> String {
        format!("log.pulsar.oauth2: {}: {error}", self.config.issuer_url)
    }
}

/// What went wrong stands innermost.
pub fn why(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_is_told_without_the_secret() {
        let folder = tempfile::tempdir().expect("a folder");
        let told = |text: Option<&str>, token: &str| {
            let credentials_file = folder.path().join("credentials.json");
            if let Some(text) = text {
                std::fs::write(&credentials_file, text).expect("written");
            }
            let oauth2 = OAuth2 { issuer_url: "https://issuer".into(), credentials_file, ..OAuth2::default() };
            let config = PulsarConfig { oauth2, token: token.into(), ..PulsarConfig::default() };
            let tokens = Tokens::new(&config, &reqwest::Client::new());
            tokens.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(told(None, "").contains("log.pulsar.oauth2.credentials_file") && told(None, "t").contains("both set"));
        for (text, reason) in [
            ("{\"client_id\": \"a\", \"client_secret\": \"hunter2\"", "line 1: not JSON"),
            ("{\"client_id\": \"a\",\n \"client_secret\": 2}", "line 2: not with client_id"),
            ("{\"client_secret\": \"hunter2\"}", "client_id"),
        ] {
            let told = told(Some(text), "");
            assert!(told.contains(reason) && !told.contains("hunter2"), "{told}");
        }
        assert_eq!(told(Some("{\"client_id\": \"a\", \"client_secret\": \"b\"}"), ""), "");
    }
}
