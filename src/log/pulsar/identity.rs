//! What proves who we are: a token, or tokens that an OAuth2 provider gives for a client's credentials. Brokers and the admin API want the
//! same.
//!
//! A token is asked for again when a tenth of its life is left. Calls of the admin API do not wait for that as long as the old one
//! holds. A broker asks when the one that it has been given has ended by its own clock: it gets a new one, if there is one soon. What
//! the provider says goes on without whoever wanted it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use oauth2::basic::{BasicClient, BasicErrorResponseType};
use oauth2::{
    AsyncHttpClient, AuthType, ClientId, ClientSecret, HttpRequest, HttpResponse, RequestTokenError, Scope,
    TokenResponse, TokenUrl,
};
use pulsar::authentication::Authentication;
use pulsar::error::AuthenticationError;
use serde::Deserialize;

use crate::clock::Clock;
use crate::log::{LogError, Misconfigured};

use super::config::PulsarConfig;

/// Of a token's life this is left when the next one is asked for.
const EARLY: u32 = 10;
/// A token whose end is not told is kept for so long, and none for longer than this.
const UNTOLD: Duration = Duration::from_secs(600);
const LONGEST: Duration = Duration::from_secs(24 * 3_600);
/// After a failure the provider is left alone for so long, while the old token holds.
const AGAIN: Duration = Duration::from_secs(10);
/// And for so long where there is none: until then everybody is told the same.
const SOON: Duration = Duration::from_secs(1);
/// A broker that asks waits for a new token so long; then it gets the old one.
const PATIENCE: Duration = Duration::from_secs(2);
/// A token is new for so long.
const NEW: Duration = Duration::from_secs(60);

/// A provider of tokens.
#[derive(Clone, Default)]
pub struct OAuth2 {
    /// Empty: there is none. What it offers is found under `/.well-known/openid-configuration`.
    pub issuer_url: String,
    /// JSON with `client_id` and `client_secret`, as in the files of Pulsar's own clients.
    pub credentials: String,
    pub audience: String,
    pub scope: String,
}

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
    Provider(Arc<Provider>),
}

struct Provider {
    http: Http,
    config: OAuth2,
    credentials: Credentials,
    clock: Clock,
    state: Mutex<State>,
    /// Who asks the provider.
    asking: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Default)]
struct State {
    token: Option<Token>,
    failure: Option<Failure>,
}

/// Times are the clock's uptime: a token ages while the machine sleeps.
#[derive(Clone)]
struct Token {
    secret: String,
    asked_at: Duration,
    renew_at: Duration,
    ends_at: Duration,
}

#[derive(Clone)]
struct Failure {
    at: Duration,
    is_final: bool,
    says: String,
}

impl From<Failure> for LogError {
    fn from(failure: Failure) -> Self {
        if failure.is_final { LogError::fatal(failure.says) } else { LogError::transient(failure.says) }
    }
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

impl Tokens {
    /// # Errors
    /// Where what is configured cannot be used.
    pub fn new(config: &PulsarConfig, http: &reqwest::Client) -> Result<Self, LogError> {
        let source = match (config.token.is_empty(), config.oauth2.issuer_url.is_empty()) {
            (true, true) => None,
            (false, true) => Some(Source::Given(config.token.clone())),
            (true, false) => Some(Source::Provider(Arc::new(Provider {
                http: Http(http.clone()),
                credentials: credentials(&config.oauth2)?,
                config: config.oauth2.clone(),
                clock: Clock::system(),
                state: Mutex::default(),
                asking: Arc::default(),
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

    /// This one is refused. True: there may be another one. A new one is refused for another reason.
    pub fn forget(&self, token: &str) -> bool {
        let Some(Source::Provider(provider)) = self.0.as_deref() else { return false };
        let (now, mut state) = (provider.clock.uptime(), provider.state());
        let Some(kept) = state.token.as_ref().filter(|kept| kept.secret == token) else { return true };
        let is_old = now >= kept.asked_at + NEW;
        if is_old {
            state.token = None;
        }
        is_old
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
        if let Some(Source::Provider(provider)) = self.0.as_deref() {
            // Without one in time the old one is shown.
            let _ = tokio::time::timeout(PATIENCE, provider.renewed()).await;
        }
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

/// What is wrong with them is told without them.
fn credentials(config: &OAuth2) -> Result<Credentials, LogError> {
    serde_json::from_str(&config.credentials).map_err(|error| {
        let says =
            "log.pulsar.oauth2.credentials: it has to be JSON with client_id and client_secret, or file:PATH of that";
        LogError::fatal(Misconfigured(format!("{says} (line {})", error.line())))
    })
}

impl Provider {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self, now: Duration) -> Option<Token> {
        self.state().token.clone().filter(|token| now < token.ends_at)
    }

    async fn token(self: &Arc<Self>) -> Result<String, LogError> {
        let now = self.clock.uptime();
        if let Some(token) = self.kept(now) {
            if now >= token.renew_at
                && let Ok(turn) = Arc::clone(&self.asking).try_lock_owned()
            {
                tokio::spawn(Arc::clone(self).ask(turn));
            }
            return Ok(token.secret);
        }
        let turn = Arc::clone(&self.asking).lock_owned().await;
        let now = self.clock.uptime();
        if let Some(token) = self.kept(now) {
            return Ok(token.secret);
        }
        if let Some(failure) = self.state().failure.clone().filter(|failure| now < failure.at + SOON) {
            return Err(failure.into());
        }
        // In a task of its own: a client that has no time to wait for it finds it there the next time.
        let asked = tokio::spawn(Arc::clone(self).ask(turn)).await.map_err(LogError::transient)?;
        asked.map_err(LogError::from)
    }

    /// Waits for a token that is not about to end, where the provider was not asked in vain just now.
    async fn renewed(self: &Arc<Self>) {
        let is_old = |token: &Token| self.clock.uptime() >= token.renew_at;
        if self.state().token.as_ref().is_some_and(is_old) {
            let turn = Arc::clone(&self.asking).lock_owned().await;
            if self.state().token.as_ref().is_some_and(is_old) {
                // Whether it failed is told to who takes the token.
                let _ = tokio::spawn(Arc::clone(self).ask(turn)).await;
            }
        }
    }

    /// Asks for a token, and keeps what comes of it.
    async fn ask(self: Arc<Self>, _turn: tokio::sync::OwnedMutexGuard<()>) -> Result<String, Failure> {
        let fetched = self.fetch().await;
        let now = self.clock.uptime();
        let mut state = self.state();
        match fetched {
            Ok(token) => {
                state.failure = None;
                Ok(state.token.insert(token).secret.clone())
            }
            Err(error) => {
                let failure =
                    Failure { at: now, is_final: matches!(error, LogError::Fatal(_)), says: error.to_string() };
                state.failure = Some(failure.clone());
                if let Some(token) = state.token.as_mut().filter(|token| now < token.ends_at) {
                    tracing::warn!(%error, "no new token for Pulsar, the old one still holds");
                    token.renew_at = now + AGAIN;
                }
                Err(failure)
            }
        }
    }

    async fn fetch(&self) -> Result<Token, LogError> {
        let client = BasicClient::new(ClientId::new(self.credentials.client_id.clone()))
            .set_client_secret(ClientSecret::new(self.credentials.client_secret.clone()))
            .set_token_uri(self.discover().await?)
            .set_auth_type(AuthType::RequestBody);
        let mut request = client.exchange_client_credentials();
        if !self.config.audience.is_empty() {
            request = request.add_extra_param("audience", &self.config.audience);
        }
        if !self.config.scope.is_empty() {
            request = request.add_scope(Scope::new(self.config.scope.clone()));
        }
        let asked_at = self.clock.uptime();
        let answer = request.request_async(&self.http).await.map_err(|error| match &error {
            // What a provider says of itself, it is busy or broken, comes in the same form.
            RequestTokenError::ServerResponse(says)
                if !matches!(says.error(), BasicErrorResponseType::Extension(_)) =>
            {
                LogError::fatal(self.says(&error))
            }
            RequestTokenError::Request(error) => LogError::transient(self.says(&why(error))),
            other => LogError::transient(self.says(other)),
        })?;
        let life = answer.expires_in().unwrap_or(UNTOLD).min(LONGEST);
        let secret = answer.access_token().secret().clone();
        Ok(Token { secret, asked_at, renew_at: asked_at + life - life / EARLY, ends_at: asked_at + life })
    }

    /// Where tokens are had.
    async fn discover(&self) -> Result<TokenUrl, LogError> {
        let url = format!("{}/.well-known/openid-configuration", self.config.issuer_url.trim_end_matches('/'));
        let silent = |error: reqwest::Error| LogError::transient(self.says(&why(&error)));
        let answer = self.http.0.get(url).send().await.map_err(silent)?;
        if !answer.status().is_success() {
            return Err(LogError::transient(self.says(&answer.status())));
        }
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
        let told = |credentials: &str, token: &str| {
            let (issuer_url, credentials) = ("https://issuer".into(), credentials.into());
            let oauth2 = OAuth2 { issuer_url, credentials, ..OAuth2::default() };
            let config = PulsarConfig { oauth2, token: token.into(), ..PulsarConfig::default() };
            let tokens = Tokens::new(&config, &reqwest::Client::new());
            tokens.err().map(|error| error.to_string()).unwrap_or_default()
        };
        let good = r#"{"client_id": "a", "client_secret": "b", "type": "client_credentials"}"#;
        assert!(told(good, "").is_empty() && told(good, "t").contains("both set"));
        for (text, line) in [
            ("/etc/hunter2.json", 1),
            (r#"{"client_id": "a", "client_secret": "hunter2""#, 1),
            ("{\"client_id\": \"a\",\n \"client_secret\": [\"hunter2\"]}", 2),
            (r#"{"client_secret": "hunter2"}"#, 1),
        ] {
            let told = told(text, "");
            let is_told = told.contains("log.pulsar.oauth2.credentials") && told.contains(&format!("(line {line})"));
            assert!(is_told && !told.contains("hunter2"), "{told}");
        }
    }
}
