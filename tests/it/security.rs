//! A cluster as companies run it: TLS, passwords, client certificates. And no secret anywhere.

use std::path::{Path, PathBuf};
use std::time::Duration;

use laneway::log::pulsar::{OAuth2, PulsarConfig};
use serde_json::Value;

use crate::support::broker::Broker;
use crate::support::eventually;
use crate::support::issuer::{CLIENT, Issuer, Key, SECRET};
use crate::support::process::{Flow, free_port, number};

const SCRAM: &str = "scram-secret-1";
const PLAIN: &str = "plain-secret-2";

/// Settings of a client over TLS, as `log.kafka.properties` in the environment.
fn sasl(broker: &Broker, mechanism: &str, more: &str) -> String {
    let authority = broker.tls_file("ca.pem");
    format!(
        "security.protocol=SASL_SSL,ssl.ca.location={authority},sasl.mechanism={mechanism},sasl.username=laneway,{more}"
    )
}

/// What `laneway check` finds wrong with the log, and the whole of what it says.
fn log_problem(flow: &Flow) -> (String, String) {
    let told = flow.command(&["check", "--output", "json"]);
    let whole = format!("{}{}", String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    assert_eq!(told.status.code(), Some(3), "{whole}");
    let found: Vec<Value> = serde_json::from_slice(&told.stdout).expect("JSON");
    let log = found.iter().find(|it| it["subject"] == "log" && it["state"] == "problem").expect("a problem");
    (log["says"].as_str().expect("text").to_owned(), whole)
}

/// A flow over TLS and SCRAM that is given its password through a variable.
fn scrammed(broker: &Broker) -> Flow {
    let properties = sasl(broker, "SCRAM-SHA-512", "sasl.password=${LANEWAY_TEST_PASSWORD}");
    let settings = [("LANEWAY_LOG__KAFKA__PROPERTIES", properties.as_str()), ("LANEWAY_TEST_PASSWORD", SCRAM)];
    let flow = Flow::unapplied(&broker.tls_address(), &settings);
    flow.apply();
    flow
}

fn events(default: &str) -> String {
    std::env::var("SECURE_EVENTS").unwrap_or_else(|_| default.into())
}

fn are_none(report: &Value, names: &[&str]) {
    names.iter().for_each(|name| assert_eq!(number(report, name), 0, "{name}: {report}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_flow_runs_over_tls_and_scram_and_tells_no_secret() {
    let broker = Broker::start_secured(1);
    let flow = scrammed(&broker);
    let mut running = flow.start_all().await;
    let report = flow.load(&["--events", &events("4000"), "--users", "200"]).report().await;
    are_none(&report, &["lost", "out_of_order", "duplicated_messages"]);
    let mut said = String::new();
    for process in &mut running {
        let page = reqwest::get(format!("http://127.0.0.1:{}/metrics", process.admin)).await.expect("an answer");
        said += &page.text().await.expect("a page");
        process.terminate();
        assert!(process.ended(Duration::from_secs(30)).await.success());
        said += &process.said();
    }
    for args in [&["config", "show"][..], &["check"], &["topics", "describe"], &["lanes", "--over", "0"]] {
        let told = flow.command(args);
        assert!(told.status.success(), "{args:?}: {}", String::from_utf8_lossy(&told.stderr));
        said += &String::from_utf8_lossy(&told.stdout);
        said += &String::from_utf8_lossy(&told.stderr);
    }
    assert!(said.contains("${LANEWAY_TEST_PASSWORD}") && !said.contains(SCRAM), "a secret is told");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_way_in_works_and_a_wrong_key_is_told() {
    let broker = Broker::start_secured(1);
    let (address, mtls) = (broker.tls_address(), broker.mtls_address());
    let (authority, client) = (broker.tls_file("ca.pem"), broker.tls_file("client"));
    let certificate = format!(
        "security.protocol=SSL,ssl.ca.location={authority},ssl.certificate.location={client}.pem,ssl.key.location={client}.key"
    );
    for (address, properties) in
        [(&address, sasl(&broker, "PLAIN", &format!("sasl.password={PLAIN}"))), (&mtls, certificate)]
    {
        let flow = Flow::unapplied(address, &[("LANEWAY_LOG__KAFKA__PROPERTIES", &properties)]);
        let told = flow.command(&["topics", "list"]);
        assert!(told.status.success(), "{properties}: {}", String::from_utf8_lossy(&told.stderr));
    }
    for (address, properties, reason) in [
        (&address, sasl(&broker, "SCRAM-SHA-512", "sasl.password=hunter2"), "uthentication failed"),
        (
            &address,
            "security.protocol=SASL_SSL,sasl.mechanism=PLAIN,sasl.username=u,sasl.password=hunter2".into(),
            "certificate",
        ),
        (&mtls, format!("security.protocol=SSL,ssl.ca.location={authority}"), "ertificate"),
        (&address, "security.protocol=SASL_SSL,sasl.mechanism=hunter2".into(), "SASL mechanism"),
        (&address, "ssl.ca.location=/nowhere/ca.pem,security.protocol=SSL".into(), "ssl.ca.location"),
    ] {
        let flow = Flow::unapplied(address, &[("LANEWAY_LOG__KAFKA__PROPERTIES", &properties)]);
        let (says, whole) = log_problem(&flow);
        assert!(says.contains(reason), "{properties}: {says}");
        assert!(!whole.contains("hunter2") || reason == "SASL mechanism", "a secret is told: {whole}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_nodes_may_die() {
    let broker = Broker::start_secured(3);
    let flow = scrammed(&broker);
    // A new topic is not known to every node at once.
    eventually("deliveries has the cluster's defaults", Duration::from_secs(30), async || {
        let told = flow.command(&["topics", "describe", "deliveries", "--output", "json"]);
        let described: Value = serde_json::from_slice(&told.stdout).unwrap_or_default();
        described[0]["defaults"]["min.insync.replicas"] == "2"
    })
    .await;
    let running = flow.start_all().await;
    let count = events("6000");
    let load = flow.load(&["--events", &count, "--users", "200", "--rate", "600"]);
    running[0].takes(1_000.0).await;
    broker.kill_node(2);
    // What the gateway could not answer for is posted again.
    let at_most = Duration::from_secs(240 + count.parse::<u64>().expect("a number") / 150);
    are_none(&load.report_within(at_most).await, &["lost", "out_of_order"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_flow_runs_on_pulsar_over_tls_with_a_token() {
    let broker = Broker::start_pulsar_secured();
    let flow = Flow::on_pulsar_at(&broker.tls_config(&format!("file:{}", broker.token_file())));
    let _running = flow.start_all().await;
    let report = flow.load(&["--events", &events("4000"), "--users", "200"]).report().await;
    are_none(&report, &["lost", "out_of_order"]);
    let shown = flow.command(&["config", "show"]);
    let token = std::fs::read_to_string(broker.token_file()).expect("a token");
    assert!(!String::from_utf8_lossy(&shown.stdout).contains(token.trim()), "a secret is told");

    let stranger = broker.tls_config(&format!("file:{}", broker.token_file()));
    for (config, reason) in [
        (broker.tls_config("hunter2"), "401"),
        (broker.tls_config(""), "401"),
        (PulsarConfig { ca_file: PathBuf::new(), ..stranger.clone() }, "certificate"),
        (PulsarConfig { ca_file: "/nowhere/ca.pem".into(), ..stranger }, "log.pulsar.ca_file"),
    ] {
        let (says, whole) = log_problem(&Flow::unapplied_on_pulsar(&config));
        assert!(says.contains(reason), "{config:?}: {says}");
        assert!(!whole.contains("hunter2"), "a secret is told: {whole}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_flow_runs_on_pulsar_with_tokens_that_it_renews_and_tells_no_secret() {
    let broker = Broker::start_pulsar_secured();
    let issuer = Issuer::start(Key::Shared(Path::new(&broker.token_file()).with_file_name("secret.key"))).await;
    let folder = tempfile::tempdir().expect("a folder");
    let with = |name: &str, text: &str| {
        let file = folder.path().join(name);
        std::fs::write(&file, text).expect("written");
        let credentials = format!("file:{}", file.display());
        let oauth2 = OAuth2 { issuer_url: issuer.url().to_owned(), credentials, ..OAuth2::default() };
        PulsarConfig { oauth2, ..broker.tls_config("") }
    };
    let credentials = |secret: &str| format!(r#"{{"client_id":"{CLIENT}","client_secret":"{secret}"}}"#);
    let flow = Flow::on_pulsar_at(&with("credentials with a blank.json", &credentials(SECRET)));
    let running = flow.start_all().await;
    let before = issuer.given();
    // Longer than two tokens live: connections that stand are asked for a new one.
    let report = flow.load(&["--events", "2000", "--users", "100", "--rate", "100"]).report().await;
    are_none(&report, &["lost", "out_of_order", "duplicated_messages"]);
    assert!(issuer.given() >= before + running.len(), "tokens were not renewed: {} after {before}", issuer.given());
    let told = flow.command(&["check"]);
    let mut said = format!("{}{}", String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    running.iter().for_each(|process| said += &process.said());
    assert!(told.status.success() && !said.contains(SECRET), "{said}");

    let mut nobody = with("good.json", &credentials(SECRET));
    nobody.oauth2.issuer_url = format!("http://127.0.0.1:{}", free_port());
    for (config, reason) in [
        (with("wrong.json", &credentials("hunter2")), "invalid_client"),
        (with("broken.json", "{\"client_secret\": \"hunter2\""), "log.pulsar.oauth2.credentials"),
        (nobody, "Connection refused"),
        (PulsarConfig { token: "t".into(), ..with("both.json", &credentials(SECRET)) }, "both set"),
    ] {
        let (says, whole) = log_problem(&Flow::unapplied_on_pulsar(&config));
        assert!(says.contains(reason), "{reason}: {says}");
        assert!(!whole.contains("hunter2"), "a secret is told: {whole}");
    }
}
