//! The whole flow, from `load`'s events to `load`'s sink, judged by it: nothing lost, nothing doubled, each user in order.
//! Short forms; tests/README.md has the commands for the long ones.

use std::time::Duration;

use serde_json::Value;

use crate::support::broker::Broker;
use crate::support::process::{Flow, Process, free_port, number};
use crate::support::{eventually, kafka_address, unique};

/// Everything accepted arrived, in order; repeats only with the same delivery id.
fn assert_nothing_lost(report: &Value, events: u64) {
    assert_eq!(number(report, "accepted"), events, "{report}");
    assert_eq!(number(report, "delivered"), events, "{report}");
    for name in ["lost", "out_of_order", "duplicated_other_delivery_id", "foreign"] {
        assert_eq!(number(report, name), 0, "{name} in {report}");
    }
}

fn assert_clean(report: &Value, events: u64) {
    assert_nothing_lost(report, events);
    assert_eq!(number(report, "duplicated_messages"), 0, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_once_and_in_order_embedded() {
    let flow = Flow::embedded();
    let _running = flow.start_all().await;
    let report = flow.load(&["--events", "20000", "--batch", "20"]).report().await;
    assert_clean(&report, 20_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_once_and_in_order_on_kafka() {
    let flow = Flow::on_kafka();
    let _running = flow.start_all().await;
    let report = flow.load(&["--events", "20000", "--batch", "20"]).report().await;
    assert_clean(&report, 20_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_once_and_in_order_on_pulsar() {
    let flow = Flow::on_pulsar();
    let _running = flow.start_all().await;
    let report = flow.load(&["--events", "20000", "--batch", "20"]).report().await;
    assert_clean(&report, 20_000);
}

/// How long a killed process stays away from a flow under load.
const OUTAGE: Duration = Duration::from_secs(1);

/// Kills with -9 while events flow and starts again a second later.
async fn survive_kills(flow: Flow, parts: &[&str]) {
    let mut running = flow.start_all().await;
    let mut load = flow.load(&["--events", "6000", "--rate", "500", "--users", "200"]);
    for (n, part) in parts.iter().enumerate() {
        running[0].takes(500.0).await;
        running[n].kill();
        load.ends_within(OUTAGE).await;
        running[n] = flow.start(part, &format!("{part}-1"));
        running[n].ready().await;
    }
    let report = load.report().await;
    // A request that was cut off may have been stored: the client sends it again, under the same message ids. On one file
    // the kill takes the edge too; the same holds for the gateway's own.
    assert_eq!(number(&report, "accepted"), 6_000);
    for name in ["lost", "out_of_order", "foreign"] {
        assert_eq!(number(&report, name), 0, "{name} in {report}");
    }
    let repeated = number(&report, "requests_repeated");
    assert!(number(&report, "duplicated_other_delivery_id") <= repeated, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_of_everything_loses_nothing_embedded() {
    survive_kills(Flow::embedded(), &["all"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_of_each_process_loses_nothing_on_kafka() {
    survive_kills(Flow::on_kafka(), &["gateway", "processor", "router"]).await;
}

/// Positions follow their outputs there: what lies between is done again.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_of_each_process_loses_nothing_on_pulsar() {
    survive_kills(Flow::on_pulsar(), &["gateway", "processor", "router"]).await;
}

/// What it has written twice on Pulsar is sent once.
#[tokio::test(flavor = "multi_thread")]
async fn a_processor_that_is_killed_repeats_nothing() {
    for flow in [Flow::on_kafka(), Flow::on_pulsar()] {
        let mut running = flow.start_all().await;
        let mut load = flow.load(&["--events", "6000", "--rate", "600", "--users", "200", "--batch", "10"]);
        running[0].takes(500.0).await;
        for _ in 0..3 {
            running[1].kill();
            load.ends_within(OUTAGE).await;
            running[1] = flow.start("processor", "processor-1");
            running[1].ready().await;
        }
        assert_clean(&load.report().await, 6_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_instance_takes_over_what_a_killed_one_owned() {
    for flow in [Flow::on_kafka(), Flow::on_pulsar()] {
        take_over(&flow).await;
    }
}

async fn take_over(flow: &Flow) {
    let mut first = flow.start_all().await;
    let mut second: Vec<Process> =
        ["processor", "router"].iter().map(|part| flow.start(part, &format!("{part}-2"))).collect();
    for process in &mut second {
        process.ready().await;
    }
    let load = flow.load(&["--events", "6000", "--rate", "400", "--users", "200"]);
    first[0].takes(800.0).await;
    first[1].kill();
    first[2].kill();
    let report = load.report().await;
    assert_nothing_lost(&report, 6_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_user_does_not_delay_another_and_arrives_in_order_later() {
    for flow in [Flow::embedded(), Flow::on_kafka(), Flow::on_pulsar()] {
        let _running = flow.start_all().await;
        let args = ["--events", "3000", "--rate", "300", "--users", "100", "--fail-users", "1", "--fail-for", "8"];
        let report = flow.load(&args).report().await;
        assert_clean(&report, 3_000);
        // Had the others waited for the failing one, a tenth of them would have come seven seconds and more after they were
        // accepted, however long that took.
        let millis = |name: &str| report[name].as_f64().expect("a number");
        assert!(millis("end_to_end_p90_ms") < millis("accept_p90_ms") + 5_000.0, "{report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_drains_and_repeats_nothing() {
    for (flow, part) in [(Flow::embedded(), "all"), (Flow::on_kafka(), "router"), (Flow::on_pulsar(), "router")] {
        let mut running = flow.start_all().await;
        let load = flow.load(&["--events", "4000", "--rate", "500", "--users", "200", "--sink-delay", "20"]);
        running[0].takes(800.0).await;
        let last = running.len() - 1;
        running[last].terminate();
        let status = running[last].ended(Duration::from_secs(20)).await;
        assert_eq!(status.code(), Some(0), "{}", running[last].said());
        running[last] = flow.start(part, &format!("{part}-1"));
        running[last].ready().await;
        let report = load.report().await;
        assert_clean(&report, 4_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_goes_away_costs_503_and_nothing_else() {
    goes_away(&Broker::start()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_goes_away_costs_503_and_nothing_else_on_pulsar() {
    goes_away(&Broker::start_pulsar()).await;
}

async fn goes_away(broker: &Broker) {
    // `tests/soak away` sets it.
    let away: u64 = std::env::var("AWAY_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let flow = broker.flow();
    let running = flow.start_all().await;
    let patience = (90 + away).to_string();
    let mut load = flow.load(&["--events", "4000", "--rate", "300", "--users", "100", "--patience", &patience]);
    running[0].takes(800.0).await;
    broker.kill();
    is_refused(&flow).await;
    load.ends_within(Duration::from_secs(away)).await;
    broker.start_again();
    let report = load.report().await;
    assert_eq!(number(&report, "accepted"), 4_000);
    for name in ["lost", "out_of_order"] {
        assert_eq!(number(&report, name), 0, "{name} in {report}");
    }
    let tail = flow.command(&["tail", "events", "--from-start", "--until-end", "--output", "json"]);
    let lines = String::from_utf8_lossy(&tail.stdout).into_owned();
    let ids: std::collections::HashSet<String> = lines
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok()?["value"]["message_id"].as_str().map(str::to_owned))
        .filter(|id| id.starts_with("load-"))
        .collect();
    assert_eq!(ids.len(), 4_000, "{report}");
}

/// The edge cannot store anything, and says so.
async fn is_refused(flow: &Flow) {
    let client = reqwest::Client::new();
    eventually("the edge answers 503", Duration::from_secs(40), async || {
        let post = client.post(format!("{}/v1/track", flow.url())).basic_auth("wk-1", Some(""));
        match post.body(r#"{"userId":"probe","event":"x"}"#).send().await {
            Ok(answer) => answer.status() == 503 && answer.headers().contains_key("retry-after"),
            Err(_) => false,
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_is_heeded_while_the_broker_is_away() {
    for broker in [Broker::start(), Broker::start_pulsar()] {
        ends_without(&broker).await;
    }
}

async fn ends_without(broker: &Broker) {
    let mut flow = broker.flow();
    flow.set("LANEWAY_RUNTIME__DRAIN_TIMEOUT", "2s");
    let mut running = flow.start_all().await;
    let _load = flow.load(&["--events", "100000", "--rate", "500", "--patience", "1"]);
    running[0].takes(500.0).await;
    broker.kill();
    // By then commits wait for the broker; one that nothing ends would take a minute and more.
    is_refused(&flow).await;
    running.iter().for_each(Process::terminate);
    for process in &mut running {
        let status = process.ended(Duration::from_secs(30)).await;
        assert_eq!(status.code(), Some(0), "{}", process.said());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dev_prints_a_banner_and_a_line_for_each_delivery() {
    let folder = tempfile::tempdir().expect("a folder");
    let (listen, admin) = (free_port(), free_port());
    let (listen_at, admin_at) = (format!("127.0.0.1:{listen}"), format!("127.0.0.1:{admin}"));
    let args = ["dev", "--listen", &listen_at, "--admin", &admin_at, "--data-dir", "data"];
    let mut dev = Process::spawn(&args, &[], admin, folder.path());
    dev.ready().await;
    let said = dev.said();
    let curl = said.lines().find(|line| line.trim_start().starts_with("curl")).expect("a curl line");
    let ran = std::process::Command::new("sh").args(["-c", curl]).output().expect("the banner's line runs");
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "ok");
    eventually("the delivery is printed", Duration::from_secs(10), async || {
        dev.said().lines().any(|line| line.starts_with("webhook  ann  track Order Completed"))
    })
    .await;
    let second = Process::spawn(
        &["dev", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data-dir", "data"],
        &[],
        0,
        folder.path(),
    );
    let mut second = second;
    assert_eq!(second.ended(Duration::from_secs(10)).await.code(), Some(1));
    assert!(second.said().contains("another engine is running on the data folder data"), "{}", second.said());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_destination_refuses_is_a_dead_letter_and_the_next_goes_on() {
    let mut flow = Flow::embedded();
    let refusing = free_port();
    let url = format!("http://127.0.0.1:{refusing}/");
    std::fs::write(flow.folder.path().join("workspace.json"), crate::support::process::workspace(&[("dst-1", &url)]))
        .expect("written");
    flow.set("LANEWAY_ROUTER__RETRY_FIRST", "50ms");
    let served = axum::Router::new().fallback(|body: String| async move {
        match body.contains("\"bad\"") {
            true => (axum::http::StatusCode::BAD_REQUEST, "no such product"),
            false => (axum::http::StatusCode::OK, "fine"),
        }
    });
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", refusing)).await.expect("a listener");
    tokio::spawn(async move { axum::serve(listener, served).await });
    let mut running = flow.start_all().await;
    let name = unique("event");
    std::fs::write(
        flow.folder.path().join("events"),
        format!("{{\"type\":\"track\",\"userId\":\"u\",\"event\":\"bad\"}}\n{{\"type\":\"track\",\"userId\":\"u\",\"event\":\"{name}\"}}\n"),
    )
    .expect("written");
    let published = flow.command(&["publish", "--write-key", "wk-1", "events"]);
    assert_eq!(String::from_utf8_lossy(&published.stdout), "2 events published\n", "{published:?}");
    eventually("the refused one is a dead letter", Duration::from_secs(20), async || {
        let tail = flow.command(&["tail", "dead-letters", "--from-start", "--until-end", "--output", "json"]);
        let text = String::from_utf8_lossy(&tail.stdout).into_owned();
        text.contains("\"rejected\"") && text.contains("no such product") && text.contains("\"code\":400")
    })
    .await;
    eventually("the ledger closes", Duration::from_secs(20), async || {
        let tail = flow.command(&["tail", "progress.router", "--from-start", "--until-end"]);
        let text = String::from_utf8_lossy(&tail.stdout).into_owned();
        text.contains("taken: 2, delivered: 1, filtered: 0, aborted: 1, drained: 0")
    })
    .await;
    running[0].terminate();
    assert_eq!(running[0].ended(Duration::from_secs(20)).await.code(), Some(0));
}

/// `kafka-topics --alter` on a running cluster: nothing stops, not at the next start either, and what lies there is told.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_were_added_by_hand_stop_nothing() {
    let flow = Flow::on_kafka();
    let mut running = flow.start_all().await;
    let clients: rdkafka::admin::AdminClient<rdkafka::client::DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", kafka_address()).create().expect("a client");
    let names = ["events", "deliveries"].map(|topic| format!("{}{topic}", flow.setting("LANEWAY_LOG__TOPIC_PREFIX")));
    let more = names.iter().map(|name| rdkafka::admin::NewPartitions::new(name, 14)).collect::<Vec<_>>();
    let altered = clients.create_partitions(&more, &rdkafka::admin::AdminOptions::new()).await.expect("an answer");
    assert!(altered.iter().all(Result::is_ok), "{altered:?}");
    for number in [1, 2] {
        running[number].terminate();
        assert!(running[number].ended(Duration::from_secs(30)).await.success());
        let part = ["processor", "router"][number - 1];
        running[number] = flow.start(part, &format!("{part}-1"));
        running[number].ready().await;
    }
    assert_clean(&flow.load(&["--events", "500", "--users", "50"]).report().await, 500);
    let said = running[2].said();
    assert!(said.contains("more partitions than are declared"), "{said}");
    let checked = flow.command(&["check"]);
    let told = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(told.contains("partitions is declared as 12 and is 14"), "{told}");
}

/// A topic that is deleted and created again under a router that reads it, as an operator may do: what comes then is delivered.
#[tokio::test(flavor = "multi_thread")]
async fn deliveries_of_a_topic_that_was_made_anew_are_sent() {
    let flow = Flow::on_kafka();
    let mut running = flow.start_all().await;
    let deliver = async |count: usize| {
        let count = count.to_string();
        let report = flow.load(&["--events", &count, "--users", "50"]).report().await;
        assert_nothing_lost(&report, count.parse().expect("a number"));
    };
    let clients: rdkafka::admin::AdminClient<rdkafka::client::DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", kafka_address()).create().expect("a client");
    let name = format!("{}deliveries", flow.setting("LANEWAY_LOG__TOPIC_PREFIX"));
    deliver(1_000).await;
    running[1].terminate();
    assert!(running[1].ended(Duration::from_secs(30)).await.success());
    let deleted = clients.delete_topics(&[&name], &rdkafka::admin::AdminOptions::new()).await.expect("an answer");
    assert!(deleted.iter().all(Result::is_ok), "{deleted:?}");
    eventually("the topic can be created", Duration::from_secs(60), async || {
        let applied = flow.command(&["topics", "apply"]);
        String::from_utf8_lossy(&applied.stdout).contains("created")
    })
    .await;
    running[1] = flow.start("processor", "processor-1");
    running[1].ready().await;
    deliver(200).await;
    let said = running[2].said();
    assert!(said.contains("before what was read"), "{said}");
}
