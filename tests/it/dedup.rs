//! Events that come again are delivered once: clients that got no answer send them again, and some had been stored.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::support::eventually;
use crate::support::process::{Flow, Process, number};

async fn send(flow: &Flow, ids: std::ops::Range<u32>, users: u32) {
    let event =
        |id: u32| format!("{{\"type\":\"track\",\"userId\":\"u{}\",\"messageId\":\"m{id}\",\"n\":{id}}}", id % users);
    let body = format!("{{\"batch\":[{}]}}", ids.map(event).collect::<Vec<_>>().join(","));
    let request =
        reqwest::Client::new().post(format!("{}/v1/batch", flow.url())).header("authorization", "Basic d2stMTo=");
    assert_eq!(request.body(body).send().await.expect("an answer").status(), 200);
}

/// How often each message has arrived.
#[derive(Clone, Default)]
struct Arrived(std::sync::Arc<std::sync::Mutex<BTreeMap<String, u32>>>);

impl Arrived {
    async fn at(flow: &Flow) -> Self {
        let arrived = Self::default();
        let took = arrived.clone();
        let routes = axum::Router::new().fallback(move |body: String| {
            let took = took.clone();
            async move {
                let event: Value = serde_json::from_str(&body).expect("JSON");
                let id = event["messageId"].as_str().expect("an id").to_owned();
                *took.0.lock().expect("whole").entry(id).or_default() += 1;
            }
        });
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", flow.sink)).await.expect("a listener");
        tokio::spawn(async move { axum::serve(listener, routes).await });
        arrived
    }

    fn count(&self) -> usize {
        self.0.lock().expect("whole").len()
    }

    fn twice(&self) -> Vec<String> {
        self.0.lock().expect("whole").iter().filter(|(_, times)| **times > 1).map(|(id, _)| id.clone()).collect()
    }
}

async fn duplicates(processors: &[&Process]) -> f64 {
    let mut sum = 0.0;
    for processor in processors {
        sum += processor.metric_with("laneway_processor_reasons_total", "\"duplicate\"").await.expect("an answer");
    }
    sum
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_again_is_delivered_once_over_a_kill_and_a_rebalance() {
    for flow in [Flow::on_kafka(), Flow::on_pulsar()] {
        comes_again(flow).await;
    }
}

async fn comes_again(flow: Flow) {
    let arrived = Arrived::at(&flow).await;
    let _gateway = started(&flow, "gateway", "gateway-1").await;
    let _router = started(&flow, "router", "router-1").await;
    let mut first = started(&flow, "processor", "processor-1").await;
    send(&flow, 0..500, 40).await;
    send(&flow, 0..500, 40).await;
    eventually("the first are known again", Duration::from_secs(30), async || duplicates(&[&first]).await >= 500.0)
        .await;
    // Killed in the middle of more of them; another takes its partitions and knows what it knew.
    send(&flow, 500..2_000, 40).await;
    send(&flow, 250..1_000, 40).await;
    first.kill();
    let second = started(&flow, "processor", "processor-2").await;
    send(&flow, 0..2_000, 40).await;
    eventually("all have arrived", Duration::from_secs(60), async || arrived.count() == 2_000).await;
    // A third one joins: partitions move while the same events come again.
    let third = started(&flow, "processor", "processor-3").await;
    send(&flow, 0..2_000, 40).await;
    send(&flow, 2_000..2_001, 1).await;
    let all = async || duplicates(&[&second, &third]).await >= 4_000.0;
    eventually("the rest is known", Duration::from_secs(60), all).await;
    eventually("the last has arrived", Duration::from_secs(30), async || arrived.count() == 2_001).await;
    assert_eq!(arrived.twice(), Vec::<String>::new());
}

async fn started(flow: &Flow, stage: &str, instance: &str) -> Process {
    let mut process = flow.start(stage, instance);
    process.ready().await;
    process
}

/// The judge of `load` posts again what it got no answer for, and a killed gateway leaves many of those.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_gateway_doubles_nothing() {
    let flow = Flow::embedded();
    let mut running = flow.start_all().await;
    let load = flow.load(&["--events", "6000", "--users", "200", "--rate", "1000", "--batch", "20"]);
    running[0].takes(1_000.0).await;
    running[0].kill();
    let _again = started(&flow, "all", "all-1").await;
    let report = load.report().await;
    for name in ["lost", "out_of_order", "duplicated_other_delivery_id"] {
        assert_eq!(number(&report, name), 0, "{name}: {report}");
    }
}
