//! Deliveries that were given up: found, shown, sent again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode, Uri};
use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::process::{Flow, Process, workspace};

const USERS: usize = 20;
const SOON: Duration = Duration::from_secs(60);

/// Two destinations that refuse everything for good, until they are told to take it.
struct Destinations {
    is_refusing: AtomicBool,
    arrived: Mutex<Vec<Arrival>>,
}

struct Arrival {
    path: String,
    delivery_id: String,
    user: usize,
    n: usize,
}

impl Destinations {
    async fn start(flow: &Flow) -> Arc<Self> {
        let this = Arc::new(Self { is_refusing: AtomicBool::new(true), arrived: Mutex::default() });
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", flow.sink)).await.expect("a listener");
        let destinations = Arc::clone(&this);
        let take = async move |uri: Uri, headers: HeaderMap, body: String| {
            if destinations.is_refusing.load(Ordering::Relaxed) {
                return (StatusCode::BAD_REQUEST, "not today");
            }
            let event: Value = serde_json::from_str(&body).expect("JSON");
            let number = |name: &str| event["properties"][name].as_u64().expect("a number") as usize;
            destinations.arrived.lock().expect("no poison").push(Arrival {
                path: uri.path().to_owned(),
                delivery_id: headers["idempotency-key"].to_str().expect("text").to_owned(),
                user: number("user"),
                n: number("n"),
            });
            (StatusCode::OK, "")
        };
        tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(take)).await });
        let url = |path: &str| format!("http://127.0.0.1:{}/{path}", flow.sink);
        let workspace = workspace(&[("a", &url("a")), ("b", &url("b"))]);
        std::fs::write(flow.folder.path().join("workspace.json"), workspace).expect("written");
        this
    }

    fn count(&self, path: &str) -> usize {
        self.arrived.lock().expect("no poison").iter().filter(|it| it.path == path).count()
    }

    /// Each delivery came once, and each user's in order.
    fn are_whole(&self, path: &str) {
        let arrived = self.arrived.lock().expect("no poison");
        let (mut next, mut ids) = (HashMap::new(), HashMap::new());
        for it in arrived.iter().filter(|it| it.path == path) {
            let expected: &mut usize = next.entry(it.user).or_default();
            assert_eq!((it.user, it.n), (it.user, *expected), "in order, none twice");
            *expected += 1;
            *ids.entry(it.delivery_id.clone()).or_insert(0) += 1;
        }
        assert!(ids.values().all(|times| *times == 1), "each delivery has an id of its own");
    }
}

/// A running flow, and events for both destinations, all of which were given up.
async fn given_up(flow: &Flow, each: usize) -> (Vec<Process>, Arc<Destinations>) {
    let destinations = Destinations::start(flow).await;
    let running = flow.start_all().await;
    let event = |n: usize, user: usize| json!({"type": "track", "userId": format!("u{user}"), "event": "e", "properties": {"user": user, "n": n}});
    let lines: String = (0..each).flat_map(|n| (0..USERS).map(move |user| format!("{}\n", event(n, user)))).collect();
    std::fs::write(flow.folder.path().join("events"), lines).expect("written");
    let published = flow.command(&["publish", "--write-key", "wk-1", "events"]);
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
    eventually("everything is given up", SOON, async || {
        letters(flow, &["list", "--limit", "1"])["count"] == 2 * each * USERS
    })
    .await;
    destinations.is_refusing.store(false, Ordering::Relaxed);
    (running, destinations)
}

fn letters(flow: &Flow, args: &[&str]) -> Value {
    let told = flow.command(&[&["dead-letters"], args, &["--output", "json"]].concat());
    assert!(told.status.success(), "{args:?}: {}", String::from_utf8_lossy(&told.stderr));
    serde_json::from_slice(&told.stdout).expect("JSON")
}

fn refused(flow: &Flow, args: &[&str]) -> String {
    let told = flow.command(&[&["dead-letters"], args].concat());
    assert_eq!(told.status.code(), Some(2), "{args:?}: {}", String::from_utf8_lossy(&told.stdout));
    String::from_utf8_lossy(&told.stderr).into_owned()
}

/// Begins a redrive and waits until so many have arrived.
async fn sends(flow: &Flow, args: &[&str], arrived: impl Fn() -> bool) -> Process {
    let running = flow.begin(&[&["dead-letters", "redrive", "--execute"], args].concat());
    eventually("it sends", SOON, async || arrived()).await;
    running
}

/// A length that the long form sets.
fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_that_is_killed_goes_on_and_doubles_nothing() {
    for flow in [Flow::on_kafka(), Flow::on_pulsar()] {
        goes_on(&flow).await;
    }
}

async fn goes_on(flow: &Flow) {
    let all = setting("REDRIVE_LETTERS", 600);
    let slowly = (all / 10).to_string();
    let (_running, destinations) = given_up(flow, all / USERS).await;
    let plan = letters(flow, &["redrive", "--destination", "a", "--rate", &slowly]);
    assert_eq!((&plan["letters"], &plan["executed"]), (&json!(all), &json!(false)), "{plan}");
    assert_eq!((&plan["groups"][0]["reason"], &plan["takes_seconds"]), (&json!("rejected"), &json!(10.0)), "{plan}");
    assert_eq!(destinations.count("/a"), 0, "nothing is sent without --execute");

    let args = ["--destination", "a", "--rate", &slowly];
    let mut first = sends(flow, &args, || destinations.count("/a") >= all / 10).await;
    first.kill();
    let before = destinations.count("/a");
    // Another command leaves its letters out, and says who has them.
    let other = flow.command(&["dead-letters", "redrive", "--destination", "a", "--since", "1h", "--execute"]);
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(other.status.code() == Some(3) && said.contains("--execute` goes on with it"), "{said}");
    let rate = all / 3;
    let done = letters(flow, &["redrive", "--destination", "a", "--rate", &rate.to_string(), "--execute"]);
    assert_eq!((&done["sent"], &done["finished"]), (&json!(all), &json!(true)), "the same plan: {done}");
    // Of what the first start had sent not everything had arrived yet: a second's letters at most. Nothing waits for the last.
    let least = (all - before).saturating_sub(all / 10 + rate / 10) as f64 / rate as f64;
    assert!(done["seconds"].as_f64() > Some(least), "as slowly as asked for: {done}");
    eventually("all arrive", SOON, async || destinations.count("/a") >= all).await;
    destinations.are_whole("/a");
    assert_eq!((destinations.count("/a"), destinations.count("/b")), (all, 0), "to the one that was asked for");

    let nothing = letters(flow, &["redrive", "--destination", "a", "--execute"]);
    assert_eq!((&nothing["letters"], &nothing["planned_before"]), (&json!(0), &json!(all)), "{nothing}");
    let again = letters(flow, &["redrive", "--destination", "a", "--again"]);
    assert_eq!(again["letters"], all, "{again}");
    let others = letters(flow, &["redrive"]);
    assert_eq!((&others["letters"], &others["planned_before"]), (&json!(all), &json!(all)), "{others}");
    let record = flow.command(&["tail", "dead-letters", "--from-start", "--until-end", "--output", "json"]);
    let record: Value =
        serde_json::from_slice(record.stdout.split(|byte| *byte == b'\n').next().expect("a line")).expect("JSON");
    let header = |name: &str| {
        let found = record["headers"].as_array().into_iter().flatten().find(|it| it["name"] == name);
        found.and_then(|it| it["value"].as_str()).unwrap_or_default().to_owned()
    };
    let topic = header("kafka_dlt-original-topic");
    assert!(topic.ends_with(".deliveries") && topic == header("__connect.errors.topic"), "as Kafka calls it: {topic}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_start_takes_over_from_the_first() {
    for flow in [Flow::on_kafka(), Flow::on_pulsar()] {
        takes_over(&flow).await;
    }
}

async fn takes_over(flow: &Flow) {
    const EACH: usize = 30;
    let all = EACH * USERS;
    let (_running, destinations) = given_up(flow, EACH).await;
    let mut first = sends(flow, &["--destination", "a", "--rate", "60"], || destinations.count("/a") >= 30).await;
    let done = letters(flow, &["redrive", "--destination", "a", "--rate", "1000", "--execute"]);
    assert_eq!((&done["sent"], &done["finished"]), (&json!(all), &json!(true)), "{done}");
    assert_eq!(first.ended(SOON).await.code(), Some(1), "{}", first.said());
    assert!(first.said().contains("another start has taken over"), "{}", first.said());
    eventually("all arrive", SOON, async || destinations.count("/a") >= all).await;
    destinations.are_whole("/a");
    assert_eq!(destinations.count("/a"), all);
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_are_listed_shown_and_sent_by_what_they_are() {
    let flow = Flow::embedded();
    let (_running, destinations) = given_up(&flow, 5).await;
    let found =
        letters(&flow, &["list", "--user", "u3", "--destination", "b", "--reason", "rejected", "--code", "400"]);
    assert_eq!((&found["count"], found["letters"].as_array().map(Vec::len)), (&json!(5), Some(5)), "{found}");
    let one = &found["letters"][0];
    assert_eq!((&one["last"]["message"], &one["attempts"]), (&json!("not today"), &json!(1)), "{one}");
    assert_eq!(letters(&flow, &["list", "--since", "1h", "--until", "30m"])["count"], 0);
    assert_eq!(letters(&flow, &["list", "--since", "1h", "--limit", "7"])["letters"].as_array().map(Vec::len), Some(7));
    let shown = letters(&flow, &["show", one["letter"].as_str().expect("a name")]);
    assert!(shown["request"]["body"].as_str().is_some_and(|body| body.contains("\"userId\":\"u3\"")), "{shown}");
    assert!(shown["request"]["url"].as_str().is_some_and(|url| url.ends_with("/(hidden)")), "{shown}");
    let whole = letters(&flow, &["show", "--secrets", one["letter"].as_str().expect("a name")]);
    assert!(whole["request"]["url"].as_str().is_some_and(|url| url.ends_with("/b")), "{whole}");

    assert!(refused(&flow, &["list", "--reason", "mood"]).contains("there are: unreadable"));
    assert!(refused(&flow, &["list", "--since", "soon"]).contains("neither a duration"));
    assert!(refused(&flow, &["show", "0"]).contains("PARTITION/OFFSET"));
    assert!(refused(&flow, &["show", "0/99999999"]).contains("no letter at 0/99999999"));
    assert!(refused(&flow, &["redrive", "--destination", "bb"]).contains("there is no destination bb"));
    assert!(letters(&flow, &["redrive", "--destination", "bb", "--unknown"])["letters"] == 0);
    assert!(refused(&flow, &["redrive", "--plan", "x"]).contains("no plan x"));

    // A start that is told to stop says how to go on; another one beside it is refused.
    let mut stopped = sends(&flow, &["--user", "u3", "--rate", "1"], || destinations.count("/a") >= 1).await;
    let beside = flow.command(&["dead-letters", "redrive", "--user", "u3", "--execute"]);
    assert!(String::from_utf8_lossy(&beside.stderr).contains("another process is in group"), "{beside:?}");
    stopped.terminate();
    assert_eq!(stopped.ended(SOON).await.code(), Some(1), "{}", stopped.said());
    let plans = letters(&flow, &["plans"]);
    let (plan, sent) = (plans[0]["plan"].as_str().expect("an id"), plans[0]["sent"].as_u64().expect("a count"));
    assert!(stopped.said().contains(&format!("--plan {plan} --execute` goes on")), "{}", stopped.said());
    assert!((1..10).contains(&sent) && plans[0]["finished_at"].is_null(), "{plans}");

    // What a plan has not sent is free when it is given up.
    let given_up = letters(&flow, &["abandon", plan]);
    assert_eq!((&given_up["letters"], &given_up["sent"]), (&json!(10), &json!(sent)), "{given_up}");
    assert!(refused(&flow, &["redrive", "--plan", plan, "--execute"]).contains("is finished"));
    let rest = letters(&flow, &["redrive", "--user", "u3", "--rate", "1000", "--execute"]);
    assert_eq!((&rest["sent"], &rest["finished"]), (&json!(10 - sent), &json!(true)), "{rest}");
    eventually("all arrive", SOON, async || destinations.count("/a") + destinations.count("/b") == 10).await;
    destinations.are_whole("/a");
    destinations.are_whole("/b");
}
