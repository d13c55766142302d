//! An OpenID Connect provider: gives short-lived tokens to who knows the secret.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};

pub const CLIENT: &str = "laneway-client";
pub const SECRET: &str = "oidc-secret-3";
/// So short that every client has to renew its token while a flow runs.
const LIFETIME: u64 = 10;

/// What its tokens are signed with.
pub enum Key {
    Rsa(PathBuf),
    Shared(PathBuf),
}

pub struct Issuer {
    key: Key,
    url: String,
    given: AtomicUsize,
}

impl Issuer {
    /// Starts one whose tokens the broker believes.
    pub async fn start(key: Key) -> Arc<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let issuer = Arc::new(Self { key, url, given: AtomicUsize::new(0) });
        let routes = axum::Router::new()
            .route("/.well-known/openid-configuration", get(offer))
            .route("/keys", get(async || says(&json!({"keys": []}))))
            .route("/token", post(answer))
            .with_state(Arc::clone(&issuer));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        issuer
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn endpoint(&self) -> String {
        format!("{}/token", self.url)
    }

    /// Tokens so far.
    pub fn given(&self) -> usize {
        self.given.load(Ordering::Relaxed)
    }

    fn token(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let claims =
            json!({"iss": "laneway-test", "sub": "laneway", "aud": "kafka", "iat": now, "exp": now + LIFETIME});
        let encode = |part: Value| BASE64_URL_SAFE_NO_PAD.encode(part.to_string());
        let mut openssl = Command::new("openssl");
        openssl.args(["dgst", "-sha256", "-binary"]);
        let algorithm = match &self.key {
            Key::Rsa(file) => {
                openssl.arg("-sign").arg(file);
                "RS256"
            }
            Key::Shared(file) => {
                let key: String =
                    std::fs::read(file).expect("a key").iter().map(|byte| format!("{byte:02x}")).collect();
                openssl.args(["-mac", "HMAC", "-macopt", &format!("hexkey:{key}")]);
                "HS256"
            }
        };
        let signed = format!("{}.{}", encode(json!({"alg": algorithm, "typ": "JWT", "kid": "test"})), encode(claims));
        let mut openssl = openssl.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("openssl");
        openssl.stdin.take().expect("piped").write_all(signed.as_bytes()).expect("written");
        let signature = openssl.wait_with_output().expect("signed").stdout;
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
}

/// As JSON.
fn says(value: &Value) -> Response {
    ([("content-type", "application/json")], value.to_string()).into_response()
}

/// What a provider says of itself.
async fn offer(State(issuer): State<Arc<Issuer>>) -> Response {
    let url = &issuer.url;
    says(
        &json!({"issuer": url, "authorization_endpoint": format!("{url}/authorize"), "token_endpoint": issuer.endpoint(),
        "jwks_uri": format!("{url}/keys"), "response_types_supported": ["code"], "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["RS256"]}),
    )
}

/// Credentials come in a header or in the form.
async fn answer(State(issuer): State<Arc<Issuer>>, headers: HeaderMap, body: String) -> Response {
    let credentials = format!("Basic {}", BASE64_STANDARD.encode(format!("{CLIENT}:{SECRET}")));
    let in_header = headers.get("authorization").is_some_and(|given| given.as_bytes() == credentials.as_bytes());
    let has = |field: String| body.split('&').any(|it| it == field);
    let in_form = has(format!("client_id={CLIENT}")) && has(format!("client_secret={SECRET}"));
    if !(in_header || in_form) || !has("grant_type=client_credentials".into()) {
        return (StatusCode::UNAUTHORIZED, says(&json!({"error": "invalid_client"}))).into_response();
    }
    issuer.given.fetch_add(1, Ordering::Relaxed);
    says(&json!({"access_token": issuer.token(), "token_type": "Bearer", "expires_in": LIFETIME}))
}
