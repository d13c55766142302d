//! Webhook sources: requests of other tools become events, or are kept and sent again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use axum::extract::Path;
use axum::http::StatusCode;
use reqwest::{Client, Response};
use serde_json::{Value, json};

use crate::support::process::{Flow, Process, free_port};
use crate::support::{eventually, sink};

const SOON: Duration = Duration::from_secs(60);
const TYPES: [&str; 7] = ["webhook", "segment", "customerio", "slack", "auth0", "shopify", "pagerduty"];

/// How the transformer service is.
const FINE: u8 = 0;
const FAILING: u8 = 1;
const BABBLING: u8 = 2;
/// It keeps everybody waiting until it is fine again.
const HANGING: u8 = 3;

/// A transformer service that answers what the real one was seen to answer.
struct Transformer {
    state: AtomicU8,
    calls: AtomicUsize,
    /// Requests in one call.
    largest: AtomicUsize,
    thawed: tokio::sync::Notify,
    port: u16,
}

impl Transformer {
    async fn start() -> Arc<Self> {
        let this = Arc::new(Self {
            state: AtomicU8::new(FINE),
            calls: AtomicUsize::new(0),
            largest: AtomicUsize::new(0),
            thawed: tokio::sync::Notify::new(),
            port: free_port(),
        });
        let known: Value =
            serde_json::from_str(include_str!("../fixtures/source_transform.json")).expect("a fixture of JSON");
        let service = Arc::clone(&this);
        let take = async move |Path(kind): Path<String>, body: String| {
            service.calls.fetch_add(1, Ordering::Relaxed);
            let requests: Vec<Value> = serde_json::from_str(&body).expect("a list");
            service.largest.fetch_max(requests.len(), Ordering::Relaxed);
            while service.state.load(Ordering::Relaxed) == HANGING {
                service.thawed.notified().await;
            }
            match service.state.load(Ordering::Relaxed) {
                FAILING => return (StatusCode::SERVICE_UNAVAILABLE, "busy".to_owned()),
                BABBLING => return (StatusCode::OK, "{}".to_owned()),
                _ => {}
            }
            if requests.iter().any(|it| it["request"]["body"].as_str().expect("text").contains("poison")) {
                return (StatusCode::INTERNAL_SERVER_ERROR, "poisoned".to_owned());
            }
            let answer = |request: &Value| {
                let mut answer = known[&kind].clone();
                if kind == "webhook" {
                    let body = request["request"]["body"].as_str().expect("text");
                    answer["output"]["batch"][0]["properties"] =
                        serde_json::from_str(body).unwrap_or(json!({"raw": body}));
                    answer["output"]["batch"][0]["context"] = json!({"query": request["request"]["query_parameters"]});
                }
                answer
            };
            (StatusCode::OK, Value::from_iter(requests.iter().map(answer)).to_string())
        };
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", this.port)).await.expect("a listener");
        let service = Arc::clone(&this);
        let features = async move || match service.state.load(Ordering::Relaxed) {
            FAILING => (StatusCode::SERVICE_UNAVAILABLE, "busy"),
            _ => (StatusCode::OK, r#"{"upgradedToSourceTransformV2":true}"#),
        };
        let routes = axum::Router::new()
            .route("/v2/sources/{kind}", axum::routing::post(take))
            .route("/features", axum::routing::get(features));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        this
    }
}

impl Transformer {
    fn thaw(&self) {
        self.state.store(FINE, Ordering::Relaxed);
        self.thawed.notify_waiters();
    }

    async fn is_asked(&self, calls: usize) {
        eventually("it is asked", SOON, async || self.calls.load(Ordering::Relaxed) >= calls).await;
    }
}

/// A flow with a webhook source of each type, and one source that is none.
fn flow(transformer: &Transformer) -> Flow {
    let mut flow = Flow::embedded();
    flow.set("LANEWAY_TRANSFORMER__URL", &format!("http://127.0.0.1:{}", transformer.port));
    configure(&flow, "WEBHOOK");
    flow
}

/// `kind`: of the second destination of the source `events`.
fn configure(flow: &Flow, kind: &str) {
    let hook = |id: &str, kind: &str| {
        json!({"id": id, "name": id, "destinationDefinition": {"name": kind, "displayName": kind},
            "config": {"webhookUrl": format!("http://127.0.0.1:{}/{id}", flow.sink), "webhookMethod": "POST"}})
    };
    let source = |kind: &&str| {
        json!({"id": format!("src-{kind}"), "name": kind, "writeKey": format!("wk-{kind}"), "config": {"version": 2},
            "sourceDefinition": {"id": "d", "name": kind, "category": "webhook"}, "destinations": [hook("hook", "WEBHOOK")]})
    };
    let mut sources: Vec<Value> = TYPES.iter().chain(&["adjust"]).map(source).collect();
    sources.push(json!({"id": "events", "name": "e", "writeKey": "wk-events",
        "destinations": [hook("hook", "WEBHOOK"), hook("other", kind)]}));
    let workspace = json!({"workspaceId": "ws-1", "sources": sources});
    std::fs::write(flow.folder.path().join("workspace.json"), workspace.to_string()).expect("written");
}

async fn post(flow: &Flow, key: &str, content_type: &str, body: impl Into<reqwest::Body>) -> Response {
    let request = Client::new().post(format!("{}/v1/webhook?writeKey={key}&a=1", flow.url()));
    request.header("content-type", content_type).body(body).send().await.expect("an answer")
}

async fn said(answer: Response) -> (u16, String) {
    (answer.status().as_u16(), answer.text().await.expect("text"))
}

fn failures(flow: &Flow, args: &[&str]) -> Value {
    let told = flow.command(&[&["proc-errors"], args, &["--output", "json"]].concat());
    assert!(told.status.success(), "{args:?}: {}", String::from_utf8_lossy(&told.stderr));
    serde_json::from_slice(&told.stdout).expect("JSON")
}

async fn start(flow: &Flow) -> Vec<Process> {
    flow.start_all().await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_answer_of_the_service_reaches_the_caller() {
    let transformer = Transformer::start().await;
    let flow = flow(&transformer);
    let mut arrivals = sink(flow.sink).await;
    let _running = start(&flow).await;
    for kind in TYPES {
        let (code, text) = said(post(&flow, &format!("wk-{kind}"), "application/json", r#"{"hello":1.0}"#).await).await;
        match kind {
            "slack" => assert_eq!((code, text.as_str()), (200, r#"{"challenge":"chal"}"#)),
            "shopify" => assert_eq!((code, text.as_str()), (400, "Invalid topic in query_parameters\n")),
            // Its event names nobody by an id that counts, but by an anonymous one that the service made.
            _ => assert_eq!((code, text.as_str()), (200, "ok"), "{kind}"),
        }
    }
    let mut names = Vec::new();
    for _ in 0..5 {
        let (_, body) = arrivals.recv().await.expect("an arrival");
        let event: Value = serde_json::from_str(&body).expect("JSON");
        assert!(
            event["messageId"].is_string() && event["receivedAt"].is_string() && event["request_ip"] == "127.0.0.1"
        );
        names.push(event["event"].as_str().expect("a name").to_owned());
    }
    names.sort();
    assert_eq!(names, ["Email Sent", "Incident Triggered", "Success API Operation", "webhook_source_event", "x"]);
    let kept = failures(&flow, &["list"]);
    assert_eq!((&kept["count"], &kept["letters"][0]["reason"]), (&json!(1), &json!("source_transform")), "{kept}");
    let one = &kept["letters"][0];
    assert_eq!((&one["source"], &one["last"]["code"]), (&json!("src-shopify"), &json!(400)), "{one}");
    let shown = failures(&flow, &["show", one["letter"].as_str().expect("a name")]);
    assert_eq!(shown["webhook"]["request"]["body"], r#"{"hello":1.0}"#, "{shown}");
    assert_eq!(shown["webhook"]["source"]["ID"], "src-shopify", "{shown}");
    assert!(!shown.to_string().contains("wk-shopify"), "what lets somebody in is not shown: {shown}");

    // Forms, the other way to name the source, and what is refused.
    assert_eq!(post(&flow, "wk-webhook", "application/x-www-form-urlencoded", "x=1&x=2").await.status(), 200);
    let form = "--B\r\nContent-Disposition: form-data; name=\"x\"\r\n\r\n3\r\n--B--\r\n";
    assert_eq!(post(&flow, "wk-webhook", "multipart/form-data; boundary=B", form).await.status(), 200);
    let properties = async |arrivals: &mut tokio::sync::mpsc::UnboundedReceiver<(String, String)>| {
        let (_, body) = arrivals.recv().await.expect("an arrival");
        serde_json::from_str::<Value>(&body).expect("JSON")["properties"].clone()
    };
    let mut seen = [properties(&mut arrivals).await, properties(&mut arrivals).await].map(|it| it.to_string());
    seen.sort();
    assert_eq!(seen, [r#"{"File":{},"Value":{"x":["3"]}}"#, r#"{"x":["1","2"]}"#]);
    let basic =
        Client::new().post(format!("{}/v1/webhook", flow.url())).header("authorization", "Basic d2std2ViaG9vazo=");
    assert_eq!(basic.body(r#"{"basic":1}"#).send().await.expect("an answer").status(), 200);
    assert_eq!(properties(&mut arrivals).await, json!({"basic": 1}));
    for (key, kind, refused) in [
        ("wk-events", "application/json", (401, "invalid write key\n")),
        ("nobody", "application/json", (401, "invalid write key\n")),
        ("", "application/json", (401, "failed to read writekey from query params\n")),
        ("wk-webhook", "multipart/form-data", (400, "error during parsing multiform\n")),
    ] {
        let (code, text) = said(post(&flow, key, kind, "{}").await).await;
        assert_eq!((code, text.as_str()), refused, "{key} {kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_some_types_send_events_by_get() {
    let transformer = Transformer::start().await;
    let flow = flow(&transformer);
    let _running = start(&flow).await;
    let get = async |key: &str| {
        said(reqwest::get(format!("{}/v1/webhook?writeKey={key}", flow.url())).await.expect("an answer")).await
    };
    assert_eq!(get("wk-webhook").await, (200, String::new()), "it is told that somebody is there");
    assert_eq!(transformer.calls.load(Ordering::Relaxed), 0);
    // The service knows nothing of it.
    assert_eq!(get("wk-adjust").await, (500, "invalid output of the source transformer\n".into()));
    let kept = failures(&flow, &["list"]);
    let letter = kept["letters"][0]["letter"].as_str().expect("a name");
    let shown = failures(&flow, &["show", letter]);
    assert_eq!(
        (&shown["webhook"]["request"]["method"], &shown["webhook"]["request"]["body"]),
        (&json!("GET"), &json!("{}"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_became_nothing_is_kept_and_sent_again() {
    let transformer = Transformer::start().await;
    let flow = flow(&transformer);
    let mut arrivals = sink(flow.sink).await;
    let _running = start(&flow).await;
    let send =
        async |n: usize| said(post(&flow, "wk-webhook", "application/json", format!("{{\"n\":{n}}}")).await).await;
    transformer.state.store(FAILING, Ordering::Relaxed);
    assert_eq!(send(0).await, (503, "the source transformer is not available\n".into()));
    assert!(transformer.calls.load(Ordering::Relaxed) > 1, "it was asked again");
    transformer.state.store(BABBLING, Ordering::Relaxed);
    for n in 1..10 {
        assert_eq!(send(n).await, (500, "invalid output of the source transformer\n".into()));
    }
    let kept = failures(&flow, &["list", "--source", "src-webhook"]);
    assert_eq!(kept["count"], 10, "{kept}");
    let plan = failures(&flow, &["redrive"]);
    assert_eq!((&plan["letters"], &plan["unsendable"]), (&json!(10), &json!(0)), "{plan}");

    // What fails again is kept again; while the service is away the plan waits.
    let args = ["proc-errors", "redrive", "--reason", "transformer_away", "--execute", "--output", "json"];
    let again = flow.command(&args);
    assert_eq!(again.status.code(), Some(3), "it is told that it failed again: {again:?}");
    let again: Value = serde_json::from_slice(&again.stdout).expect("JSON");
    assert_eq!(
        (&again["sent"], &again["failed_again"], &again["finished"]),
        (&json!(1), &json!(1), &json!(true)),
        "{again}"
    );
    let kept = failures(&flow, &["list", "--reason", "source_transform"]);
    assert_eq!((&kept["count"], &kept["letters"][0]["attempts"]), (&json!(10), &json!(2)), "{kept}");
    transformer.state.store(FAILING, Ordering::Relaxed);
    let args = ["--reason", "source_transform", "--rate", "1000", "--execute"];
    let stopped = flow.command(&[&["proc-errors", "redrive"][..], &args].concat());
    let told = String::from_utf8_lossy(&stopped.stderr);
    assert!(
        stopped.status.code() == Some(1)
            && told.contains("does not answer")
            && told.contains("proc-errors redrive --plan"),
        "{told}"
    );
    transformer.state.store(FINE, Ordering::Relaxed);
    let done = failures(&flow, &[&["redrive"][..], &args].concat());
    assert_eq!((&done["sent"], &done["finished"]), (&json!(10), &json!(true)), "{done}");
    let mut seen: Vec<u64> = Vec::new();
    while seen.len() < 10 {
        let (_, body) = arrivals.recv().await.expect("an arrival");
        let event: Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!((&event["request_ip"], &event["context"]["query"]["a"]), (&json!("127.0.0.1"), &json!(["1"])));
        seen.push(event["properties"]["n"].as_u64().expect("a number"));
    }
    seen.sort_unstable();
    assert_eq!(seen, Vec::from_iter(0..10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisonous_request_costs_no_other() {
    let transformer = Transformer::start().await;
    let flow = flow(&transformer);
    let running = start(&flow).await;
    let flow = &flow;
    transformer.state.store(HANGING, Ordering::Relaxed);
    let requests = (0..100).map(async |n| {
        let body = if n == 30 { r#"{"poison":1}"#.to_owned() } else { format!("{{\"n\":{n}}}") };
        (n, said(post(flow, "wk-webhook", "application/json", body).await).await)
    });
    let thaw = async {
        // All calls that it takes are under way, so the others wait for a call together.
        transformer.is_asked(8).await;
        eventually("all wait", SOON, async || running[0].metric("laneway_gateway_open_requests").await == Some(100.0))
            .await;
        transformer.thaw();
    };
    for (n, (code, _)) in futures_util::future::join(futures_util::future::join_all(requests), thaw).await.0 {
        assert_eq!(code, if n == 30 { 503 } else { 200 }, "{n}");
    }
    assert!(transformer.largest.load(Ordering::Relaxed) > 8, "they went together");
    let kept = failures(flow, &["list"]);
    assert_eq!((&kept["count"], &kept["letters"][0]["reason"]), (&json!(1), &json!("transformer_away")), "{kept}");
    assert!(kept["letters"][0]["last"]["message"].as_str().is_some_and(|it| it.contains("poisoned")), "{kept}");

    // Nor does it stand in the way of a redrive.
    transformer.state.store(BABBLING, Ordering::Relaxed);
    for n in 0..3 {
        assert_eq!(post(flow, "wk-webhook", "application/json", format!("{{\"n\":{n}}}")).await.status(), 500);
    }
    transformer.thaw();
    let redriven = flow.command(&["proc-errors", "redrive", "--execute", "--output", "json"]);
    let redriven: Value = serde_json::from_slice(&redriven.stdout).expect("JSON");
    assert_eq!((&redriven["sent"], &redriven["failed_again"]), (&json!(4), &json!(1)), "{redriven}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_and_a_stop_lose_nothing() {
    let transformer = Transformer::start().await;
    let mut flow = flow(&transformer);
    flow.set("LANEWAY_RUNTIME__DRAIN_TIMEOUT", "4s");
    let mut running = start(&flow).await;
    let gives_up = async |body: &'static str| {
        let request = Client::new().post(format!("{}/v1/webhook?writeKey=wk-webhook", flow.url())).body(body);
        assert!(request.timeout(Duration::from_secs(2)).send().await.is_err(), "no answer in time");
    };
    transformer.state.store(HANGING, Ordering::Relaxed);
    gives_up(r#"{"hung_up":1}"#).await;
    transformer.thaw();
    let stored = async || {
        let tail = flow.command(&["tail", "events", "--from-start", "--until-end", "--output", "json"]);
        String::from_utf8_lossy(&tail.stdout).contains("hung_up")
    };
    eventually("its event is stored", SOON, stored).await;

    transformer.state.store(HANGING, Ordering::Relaxed);
    let asked = transformer.calls.load(Ordering::Relaxed);
    gives_up(r#"{"stopped":1}"#).await;
    transformer.is_asked(asked + 1).await;
    running[0].terminate();
    assert!(running[0].ended(SOON).await.success(), "{}", running[0].said());
    let kept = failures(&flow, &["list", "--reason", "transformer_away"]);
    assert_eq!(kept["count"], 1, "{kept}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_sent_again_to_the_destination_that_had_none_of_it() {
    let transformer = Transformer::start().await;
    let flow = flow(&transformer);
    configure(&flow, "UNHEARD_OF");
    let mut arrivals = sink(flow.sink).await;
    let running = start(&flow).await;
    let track = |n: u32| {
        let request = Client::new().post(format!("{}/v1/track", flow.url()));
        request
            .header("authorization", "Basic d2stZXZlbnRzOg==")
            .body(format!(r#"{{"userId":"u","event":"e","n":{n}}}"#))
    };
    assert_eq!(track(1).send().await.expect("an answer").status(), 200);
    assert_eq!(arrivals.recv().await.expect("an arrival").0, "/hook");
    eventually("the failure is there", SOON, async || failures(&flow, &["list"])["count"] == 1).await;
    let loads = async || running[0].metric("laneway_control_workspace_loads_total").await.expect("a number");
    let before = loads().await;
    configure(&flow, "WEBHOOK");
    eventually("the configuration is known", SOON, async || loads().await > before).await;
    let done = failures(&flow, &["redrive", "--destination", "other", "--execute"]);
    assert_eq!((&done["sent"], &done["finished"]), (&json!(1), &json!(true)), "{done}");
    assert_eq!(arrivals.recv().await.expect("an arrival").0, "/other");
    // What comes behind it is next: the other had it already.
    assert_eq!(track(2).send().await.expect("an answer").status(), 200);
    for _ in 0..2 {
        let (path, body) = arrivals.recv().await.expect("an arrival");
        assert!(body.contains("\"n\":2"), "{path} {body}");
    }
}
