//! Runs of reverse ETL: counted once, whatever happens to the reporter and to its store.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::http::StatusCode;
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::postgres::Postgres;
use crate::support::process::{Flow, Process, free_port};

const TOKEN: &str = "internal-secret-4";
const SOON: Duration = Duration::from_secs(60);

/// Rows, of which each seventh is refused by the destination for good, go to one that works and one of an unknown type.
struct Run {
    flow: Flow,
    internal: u16,
}

impl Run {
    fn new(mut flow: Flow, settings: &[(&str, &str)]) -> Self {
        let internal = free_port();
        flow.set("LANEWAY_GATEWAY__INTERNAL__LISTEN", &format!("127.0.0.1:{internal}"));
        flow.set("LANEWAY_GATEWAY__INTERNAL__TOKEN", TOKEN);
        settings.iter().for_each(|(name, value)| flow.set(name, value));
        let destination = |id: &str, kind: &str| {
            json!({"id": id, "name": id, "destinationDefinition": {"name": kind, "displayName": kind},
                "config": {"webhookUrl": format!("http://127.0.0.1:{}/", flow.sink), "webhookMethod": "POST"}})
        };
        let workspace = json!({"workspaceId": "ws-1", "sources": [{"id": "rows", "name": "Rows", "writeKey": "wk-1",
            "sourceDefinition": {"category": "warehouse"},
            "destinations": [destination("hook", "WEBHOOK"), destination("strange", "UNHEARD_OF")]}]});
        std::fs::write(flow.folder.path().join("workspace.json"), workspace.to_string()).expect("written");
        Self { flow, internal }
    }

    /// The destination.
    async fn sink(&self) {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", self.flow.sink)).await.expect("a listener");
        let take = async |body: String| {
            let event: Value = serde_json::from_str(&body).expect("JSON");
            let n = event["n"].as_u64().expect("a number");
            if n.is_multiple_of(7) { StatusCode::BAD_REQUEST } else { StatusCode::OK }
        };
        tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(take)).await });
    }

    async fn ask(&self, method: Method, path: &str) -> Response {
        let url = format!("http://127.0.0.1:{}{path}", self.internal);
        let request = Client::new().request(method, url).header("x-laneway-token", TOKEN);
        request.header("x-rudder-source-id", "rows").send().await.expect("an answer")
    }

    async fn status(&self, run: &str) -> Value {
        let answer = self.ask(Method::GET, &format!("/internal/v2/job-status/{run}")).await;
        match answer.status().as_u16() {
            200 => serde_json::from_str(&answer.text().await.expect("text")).expect("JSON"),
            _ => Value::Null,
        }
    }

    /// Sends rows `from..to` of a run, 100 in a request.
    async fn send(&self, run: &str, from: usize, to: usize) {
        let rows: Vec<usize> = (from..to).collect();
        for rows in rows.chunks(100) {
            let row = |n: &usize| {
                json!({"type": "record", "userId": format!("u{}", n % 50), "n": n, "recordId": {"id": n},
                    "context": {"sources": {"job_run_id": run, "task_run_id": "task"}}})
            };
            let batch: Vec<Value> = rows.iter().map(row).collect();
            let url = format!("http://127.0.0.1:{}/internal/v1/retl", self.internal);
            let request = Client::new().post(url).header("x-laneway-token", TOKEN).header("x-rudder-source-id", "rows");
            let answer = request.body(json!({"batch": batch}).to_string()).send().await.expect("an answer");
            assert_eq!(answer.status(), 200);
        }
    }

    async fn completes(&self, run: &str, rows: usize, within: Duration) {
        let failed = rows.div_ceil(7);
        let whole = json!({"id": run, "tasks": [{"id": "task", "sources": [{
        "id": "rows", "completed": true, "stats": {"in": rows, "out": rows, "failed": 0},
        "destinations": [
            {"id": "hook", "completed": true, "stats": {"in": rows, "out": rows - failed, "failed": failed}},
            {"id": "strange", "completed": true, "stats": {"in": rows, "out": 0, "failed": rows}},
        ]}]}]});
        eventually("the run is completed", within, async || {
            self.status(run).await["tasks"][0]["sources"][0]["completed"] == true
        })
        .await;
        assert_eq!(self.status(run).await, whole);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_counted_told_and_forgotten() {
    let run = Run::new(Flow::embedded(), &[]);
    run.sink().await;
    let _running = run.flow.start_all().await;
    let path = "/internal/v2/job-status/run-1";
    let missing = run.ask(Method::GET, path).await;
    assert_eq!((missing.status().as_u16(), missing.text().await.expect("text").as_str()), (404, "status not found\n"));
    run.send("run-1", 0, 210).await;
    run.completes("run-1", 210, SOON).await;
    let answer = run.ask(Method::GET, path).await;
    assert_eq!(answer.headers()["cache-control"], "no-store");
    assert_eq!(answer.headers()["content-type"], "application/json; charset=utf-8");
    for (query, is_there) in
        [("task_run_id=task&task_run_id=x", true), ("source_id=rows", true), ("source_id=x", false)]
    {
        let answer = run.ask(Method::GET, &format!("{path}?{query}")).await;
        assert_eq!(answer.status() == 200, is_there, "{query}");
    }

    // The failed rows, in pages.
    let (mut seen, mut token) = (BTreeSet::new(), String::new());
    loop {
        let page = run.ask(Method::GET, &format!("{path}/failed-records?pageSize=40&pageToken={token}")).await;
        let page: Value = serde_json::from_str(&page.text().await.expect("text")).expect("JSON");
        for source in
            page["tasks"].as_array().into_iter().flatten().flat_map(|task| task["sources"].as_array().expect("a list"))
        {
            for destination in source["destinations"].as_array().expect("a list") {
                for record in destination["records"].as_array().expect("a list") {
                    let n = record["record"]["id"].as_u64().expect("the row as it was");
                    assert_eq!(record["code"], 400);
                    assert!(seen.insert((destination["id"].as_str().expect("an id").to_owned(), n)), "once");
                }
            }
        }
        match page["paging"]["next"].as_str() {
            Some(next) => next.clone_into(&mut token),
            None => break,
        }
    }
    let hook: Vec<u64> = seen.iter().filter(|(to, _)| to == "hook").map(|(_, n)| *n).collect();
    assert_eq!(hook, (0..210_u64).filter(|n| n.is_multiple_of(7)).collect::<Vec<u64>>());
    assert_eq!(seen.len(), 30 + 210);
    let wrong = run.ask(Method::GET, &format!("{path}/failed-records?pageSize=1&pageToken=!")).await;
    assert_eq!(wrong.status(), 400);

    assert_eq!(run.ask(Method::DELETE, &format!("{path}/failed-records")).await.status(), 204);
    let empty = run.ask(Method::GET, &format!("{path}/failed-records")).await;
    assert_eq!(empty.text().await.expect("text"), r#"{"id":"run-1","tasks":null}"#);
    assert_eq!(run.ask(Method::DELETE, path).await.status(), 204);
    assert_eq!(run.ask(Method::GET, path).await.status(), 404);
    assert_eq!(run.ask(Method::DELETE, path).await.status(), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_is_not_completed_and_a_drain_ends_it() {
    // Nobody listens where the rows go.
    let run = Run::new(Flow::embedded(), &[]);
    let _running = run.flow.start_all().await;
    let path = "/internal/v2/job-status/run-1";
    run.send("run-1", 0, 30).await;
    eventually("the rows are counted", SOON, async || {
        run.status("run-1").await["tasks"][0]["sources"][0]["stats"]["out"] == 30
    })
    .await;
    let status = run.status("run-1").await;
    let source = &status["tasks"][0]["sources"][0];
    assert_eq!(
        (&source["completed"], &source["destinations"][0]["completed"]),
        (&json!(false), &json!(false)),
        "{status}"
    );
    assert_eq!(source["destinations"][0]["stats"], json!({"in": 30, "out": 0, "failed": 0}), "{status}");
    let early = run.ask(Method::DELETE, path).await;
    assert_eq!((early.status().as_u16(), early.text().await.expect("text").as_str()), (400, "source not completed\n"));
    assert_eq!(run.ask(Method::PUT, "/internal/drain/job/run-1").await.status(), 201);
    eventually("what is drained has failed", SOON, async || {
        let status = run.status("run-1").await;
        let source = &status["tasks"][0]["sources"][0];
        source["completed"] == true && source["destinations"][0]["stats"] == json!({"in": 30, "out": 0, "failed": 30})
    })
    .await;
}

/// The store outlives the log: what was counted of the old one says nothing about the new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_made_anew_is_counted_once_the_positions_are_set() {
    let run = Run::new(Flow::embedded(), &[]);
    run.sink().await;
    let running = run.flow.start_all().await;
    run.send("run-1", 1, 7).await;
    eventually("the rows are counted", SOON, async || taken(&run.status("run-1").await) == (6, true)).await;
    for mut process in running {
        process.terminate();
        assert!(process.ended(SOON).await.success());
    }
    let data = run.flow.folder.path().join("data");
    for file in ["log.sqlite", "log.sqlite-wal", "log.sqlite-shm"] {
        let _ = std::fs::remove_file(data.join(file));
    }

    let running = run.flow.start_all().await;
    run.send("run-1", 1, 4).await;
    let problem = async || {
        let lag = run.flow.command(&["lag", "reporter", "--over", "0", "--output", "json"]);
        let rows: Value = serde_json::from_slice(&lag.stdout).expect("JSON");
        rows[0]["behind"].as_u64() > Some(0) && rows[0]["problem"].as_str().is_some_and(|it| it.contains("another log"))
    };
    eventually("the lag tells it", SOON, problem).await;
    assert_eq!(
        taken(&run.status("run-1").await),
        (6, false),
        "nothing of the new log is counted, and nothing completed"
    );
    let check = run.flow.command(&["check"]);
    let told = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(told.contains("belongs to another log") && told.contains("offsets reset reporter"), "{told}");
    assert!(running.iter().any(|process| process.said().contains("belongs to another log")));

    let would = run.flow.command(&["offsets", "reset", "reporter", "--to-earliest"]);
    assert!(would.status.success(), "{would:?}");
    assert_eq!(taken(&run.status("run-1").await), (6, false), "nothing was changed");
    let done = run.flow.command(&["offsets", "reset", "reporter", "--to-earliest", "--execute"]);
    assert!(done.status.success(), "{done:?}");
    eventually("the rest is counted, too", SOON, async || taken(&run.status("run-1").await) == (9, true)).await;
    assert!(!run.flow.command(&["check"]).stdout.windows(11).any(|it| it == b"another log"));
}

/// How many rows of a run were counted in, and whether it counts as completed.
fn taken(status: &Value) -> (u64, bool) {
    let source = &status["tasks"][0]["sources"][0];
    (source["stats"]["in"].as_u64().unwrap_or(0), source["completed"] == true)
}

/// The long form: `JOB_RECORDS=100000`.
#[tokio::test(flavor = "multi_thread")]
async fn kills_of_the_reporter_and_restarts_of_the_store_count_nothing_twice() {
    counts_nothing_twice(Flow::on_kafka()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_of_the_reporter_and_restarts_of_the_store_count_nothing_twice_on_pulsar() {
    counts_nothing_twice(Flow::on_pulsar()).await;
}

async fn counts_nothing_twice(flow: Flow) {
    let rows: usize = std::env::var("JOB_RECORDS").ok().and_then(|text| text.parse().ok()).unwrap_or(4_000);
    let postgres = Postgres::start();
    let run = Run::new(flow, &[("LANEWAY_STORE__URL", &postgres.url())]);
    let migrated = run.flow.command(&["migrate", "--output", "json"]);
    assert_eq!(
        String::from_utf8_lossy(&migrated.stdout).trim(),
        r#"{"executed":true,"job_status":["counts","topic_id"]}"#
    );
    run.sink().await;
    let _running = run.flow.start_all().await;
    let mut reporter = run.flow.start("reporter", "reporter-1");
    reporter.ready().await;
    // Each tenth: kill the reporter; restart or kill the store in between.
    for part in 0..10 {
        run.send("run-1", rows * part / 10, rows * (part + 1) / 10).await;
        match part % 4 {
            0 => postgres.stop(),
            2 => postgres.kill(),
            _ => {}
        }
        reporter.kill();
        reporter = run.flow.start("reporter", "reporter-1");
        if part % 2 == 0 {
            postgres.start_again();
        }
        reporter.ready().await;
    }
    run.completes("run-1", rows, Duration::from_secs(120 + rows as u64 / 50)).await;
    drop(reporter);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reporter_lives_through_restarts_of_the_store() {
    let postgres = Postgres::start();
    let run = Run::new(Flow::on_kafka(), &[("LANEWAY_STORE__URL", &postgres.url())]);
    assert!(run.flow.command(&["migrate"]).status.success());
    run.sink().await;
    let _running = run.flow.start_all().await;
    let mut reporter = run.flow.start("reporter", "reporter-1");
    reporter.ready().await;
    let is_done = AtomicBool::new(false);
    // Rows come all the time, so that each end of the store finds a write under way.
    let sending = async {
        let mut sent = 0;
        while !is_done.load(Ordering::Relaxed) {
            run.send("run-1", sent, sent + 100).await;
            sent += 100;
        }
        sent
    };
    let breaking = async {
        for n in 0..4 {
            let written = reporter.metric("laneway_runtime_projected_records_total").await.unwrap_or(0.0);
            eventually("the reporter writes", SOON, async || {
                reporter.metric("laneway_runtime_projected_records_total").await > Some(written)
            })
            .await;
            if n % 2 == 0 {
                postgres.kill()
            } else {
                postgres.stop()
            }
            postgres.start_again();
        }
        is_done.store(true, Ordering::Relaxed);
    };
    let (rows, ()) = futures_util::future::join(sending, breaking).await;
    run.completes("run-1", rows, Duration::from_secs(120)).await;
    assert!(!reporter.has_ended());
}

#[tokio::test(flavor = "multi_thread")]
async fn deliveries_go_on_while_the_store_is_away() {
    let postgres = Postgres::start();
    let run = Run::new(Flow::embedded(), &[("LANEWAY_STORE__URL", &postgres.url())]);
    assert!(run.flow.command(&["migrate"]).status.success());
    postgres.stop();
    run.sink().await;
    let running: Vec<Process> = run.flow.start_all().await;
    run.send("run-1", 0, 100).await;
    eventually("everything is delivered or given up", SOON, async || {
        running[0].metric("laneway_router_outcomes_total").await == Some(100.0)
    })
    .await;
    let away = run.ask(Method::GET, "/internal/v2/job-status/run-1").await;
    assert_eq!((away.status().as_u16(), away.headers().contains_key("retry-after")), (503, true));
    let told = run.flow.command(&["check", "--output", "json"]);
    let found: Vec<Value> = serde_json::from_slice(&told.stdout).expect("JSON");
    let store = found.iter().find(|it| it["subject"] == "store").expect("it is looked at");
    assert_eq!(store["state"], "warning", "{store}");
    postgres.start_again();
    run.completes("run-1", 100, SOON).await;
}
