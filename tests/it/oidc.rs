//! A cluster whose clients bring tokens from an OpenID Connect provider, which they get with a secret and renew.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::support::broker::Broker;
use crate::support::process::{Flow, number};

const CLIENT: &str = "laneway-client";
const SECRET: &str = "oidc-secret-3";
/// So short that every client has to renew its token while the flow runs.
const LIFETIME: u64 = 8;

/// The provider: gives a token to who knows the secret.
struct Issuer {
    key: PathBuf,
    given: AtomicUsize,
}

impl Issuer {
    /// Starts one whose tokens the broker believes; its token endpoint.
    async fn start(broker: &Broker) -> (Arc<Self>, String) {
        let issuer = Arc::new(Self { key: broker.tls_file("token.key").into(), given: AtomicUsize::new(0) });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("http://{}/token", listener.local_addr().expect("bound"));
        let routes = axum::Router::new().route("/token", axum::routing::post(answer)).with_state(Arc::clone(&issuer));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        (issuer, endpoint)
    }

    fn token(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let claims =
            json!({"iss": "laneway-test", "sub": "laneway", "aud": "kafka", "iat": now, "exp": now + LIFETIME});
        let encode = |part: Value| BASE64_URL_SAFE_NO_PAD.encode(part.to_string());
        let signed = format!("{}.{}", encode(json!({"alg": "RS256", "typ": "JWT", "kid": "test"})), encode(claims));
        let mut openssl = Command::new("openssl")
            .args(["dgst", "-sha256", "-sign"])
            .arg(&self.key)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("openssl");
        openssl.stdin.take().expect("piped").write_all(signed.as_bytes()).expect("written");
        let signature = openssl.wait_with_output().expect("signed").stdout;
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
}

async fn answer(State(issuer): State<Arc<Issuer>>, headers: HeaderMap, body: String) -> Response {
    let credentials = format!("Basic {}", BASE64_STANDARD.encode(format!("{CLIENT}:{SECRET}")));
    let known = headers.get("authorization").is_some_and(|given| given.as_bytes() == credentials.as_bytes());
    if !known || !body.contains("grant_type=client_credentials") {
        return (StatusCode::UNAUTHORIZED, json!({"error": "invalid_client"}).to_string()).into_response();
    }
    issuer.given.fetch_add(1, Ordering::Relaxed);
    let granted = json!({"access_token": issuer.token(), "token_type": "Bearer", "expires_in": LIFETIME});
    ([("content-type", "application/json")], granted.to_string()).into_response()
}

fn properties(broker: &Broker, endpoint: &str, secret: &str) -> String {
    let authority = broker.tls_file("ca.pem");
    format!(
        "security.protocol=SASL_SSL,ssl.ca.location={authority},sasl.mechanism=OAUTHBEARER,sasl.oauthbearer.method=oidc,\
         sasl.oauthbearer.client.id={CLIENT},sasl.oauthbearer.client.secret={secret},\
         sasl.oauthbearer.token.endpoint.url={endpoint}"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_flow_runs_with_tokens_that_it_renews_and_tells_no_secret() {
    let broker = Broker::start_secured(1);
    let (issuer, endpoint) = Issuer::start(&broker).await;
    let settings = [
        ("LANEWAY_LOG__KAFKA__PROPERTIES", properties(&broker, &endpoint, "${LANEWAY_TEST_SECRET}")),
        ("LANEWAY_TEST_SECRET", SECRET.to_owned()),
    ];
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let flow = Flow::unapplied(&broker.tls_address(), &settings);
    flow.apply();
    let running = flow.start_all().await;
    let before = issuer.given.load(Ordering::Relaxed);
    // Longer than two tokens live.
    let report = flow.load(&["--events", "2000", "--users", "100", "--rate", "100"]).report().await;
    for name in ["lost", "out_of_order", "duplicated_messages"] {
        assert_eq!(number(&report, name), 0, "{name}: {report}");
    }
    assert!(issuer.given.load(Ordering::Relaxed) > before + 2, "no token was renewed");
    let told = flow.command(&["check"]);
    let mut said = format!("{}{}", String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    running.iter().for_each(|process| said += &process.said());
    assert!(told.status.success() && !said.contains(SECRET), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_the_provider_does_not_know_is_told() {
    let broker = Broker::start_secured(1);
    let (_issuer, endpoint) = Issuer::start(&broker).await;
    let given = properties(&broker, &endpoint, "hunter2");
    let flow = Flow::unapplied(&broker.tls_address(), &[("LANEWAY_LOG__KAFKA__PROPERTIES", given.as_str())]);
    let told = flow.command(&["check"]);
    let said = format!("{}{}", String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    assert_eq!(told.status.code(), Some(3), "{said}");
    assert!(said.contains("token") && !said.contains("hunter2"), "{said}");
}
