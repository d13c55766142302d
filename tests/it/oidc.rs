//! A cluster whose clients bring tokens from an OpenID Connect provider, which they get with a secret and renew.

use std::sync::Arc;

use crate::support::broker::Broker;
use crate::support::issuer::{CLIENT, Issuer, Key, SECRET};
use crate::support::process::{Flow, number};

async fn issuer(broker: &Broker) -> Arc<Issuer> {
    Issuer::start(Key::Rsa(broker.tls_file("token.key").into())).await
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
    let issuer = issuer(&broker).await;
    let settings = [
        ("LANEWAY_LOG__KAFKA__PROPERTIES", properties(&broker, &issuer.endpoint(), "${LANEWAY_TEST_SECRET}")),
        ("LANEWAY_TEST_SECRET", SECRET.to_owned()),
    ];
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let flow = Flow::unapplied(&broker.tls_address(), &settings);
    flow.apply();
    let running = flow.start_all().await;
    let before = issuer.given();
    // Longer than two tokens live.
    let report = flow.load(&["--events", "2000", "--users", "100", "--rate", "100"]).report().await;
    for name in ["lost", "out_of_order", "duplicated_messages"] {
        assert_eq!(number(&report, name), 0, "{name}: {report}");
    }
    assert!(issuer.given() > before + 2, "no token was renewed");
    let told = flow.command(&["check"]);
    let mut said = format!("{}{}", String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    running.iter().for_each(|process| said += &process.said());
    assert!(told.status.success() && !said.contains(SECRET), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_the_provider_does_not_know_is_told() {
    let broker = Broker::start_secured(1);
    let issuer = issuer(&broker).await;
    let given = properties(&broker, &issuer.endpoint(), "hunter2");
    let flow = Flow::unapplied(&broker.tls_address(), &[("LANEWAY_LOG__KAFKA__PROPERTIES", given.as_str())]);
    let told = flow.command(&["check"]);
    let said = format!("{}{}", String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    assert_eq!(told.status.code(), Some(3), "{said}");
    assert!(said.contains("token") && !said.contains("hunter2"), "{said}");
}
