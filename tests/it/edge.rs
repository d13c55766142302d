//! Every route of the edge over real HTTP, and what bounds it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use reqwest::{Client, Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::support::process::{Flow, Process, free_port};
use crate::support::{eventually, sink};

const KEY: &str = "Basic d2stMTo=";
const TOKEN: &str = "internal-secret-4";

/// A flow with an internal listener and a workspace of several kinds of sources; where the internal listener is.
fn edge(settings: &[(&str, &str)]) -> (Flow, u16) {
    let mut flow = Flow::embedded();
    let internal = free_port();
    flow.set("LANEWAY_GATEWAY__INTERNAL__LISTEN", &format!("127.0.0.1:{internal}"));
    flow.set("LANEWAY_GATEWAY__INTERNAL__TOKEN", TOKEN);
    settings.iter().for_each(|(name, value)| flow.set(name, value));
    let webhook = |id: &str, is_on: bool| {
        json!({"id": id, "name": id, "enabled": is_on, "destinationDefinition": {"name": "WEBHOOK", "displayName": "Webhook"},
            "config": {"webhookUrl": format!("http://127.0.0.1:{}/{id}", flow.sink), "webhookMethod": "POST"}})
    };
    let hooks = || json!([webhook("dst-1", true), webhook("dst-2", true), webhook("dst-off", false)]);
    let workspace = json!({"workspaceId": "ws-1", "sources": [
        {"id": "src-1", "name": "Web", "writeKey": "wk-1", "destinations": hooks()},
        {"id": "src-off", "name": "Off", "writeKey": "wk-off", "enabled": false, "destinations": []},
        {"id": "src-retl", "name": "Rows", "writeKey": "wk-retl", "sourceDefinition": {"category": "warehouse"}, "destinations": hooks()},
        {"id": "src-again", "originalId": "src-1", "name": "Again", "writeKey": "wk-again", "destinations": hooks()},
    ]});
    std::fs::write(flow.folder.path().join("workspace.json"), workspace.to_string()).expect("written");
    (flow, internal)
}

async fn running(settings: &[(&str, &str)]) -> (Flow, u16, Vec<Process>) {
    let (flow, internal) = edge(settings);
    let processes = flow.start_all().await;
    (flow, internal, processes)
}

async fn send(method: Method, url: String, headers: &[(&str, &str)], body: impl Into<reqwest::Body>) -> Response {
    let mut request = Client::new().request(method, url).body(body);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.send().await.expect("an answer")
}

/// Posts to a route of the public listener with the write key.
async fn post(flow: &Flow, path: &str, body: impl Into<reqwest::Body>) -> Response {
    send(Method::POST, format!("{}{path}", flow.url()), &[("authorization", KEY)], body).await
}

/// The stored events, as they are on the topic.
fn stored(flow: &Flow) -> Vec<Value> {
    let tail = flow.command(&["tail", "events", "--from-start", "--until-end", "--output", "json"]);
    assert!(tail.status.success(), "{tail:?}");
    String::from_utf8_lossy(&tail.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// The only event that holds `what` in its payload.
fn only(flow: &Flow, what: &str) -> (Value, Value) {
    let mut found: Vec<Value> =
        stored(flow).into_iter().filter(|it| it["value"]["payload"].as_str().expect("text").contains(what)).collect();
    assert_eq!(found.len(), 1, "{what}: {found:?}");
    let record = found.remove(0);
    let payload = serde_json::from_str(record["value"]["payload"].as_str().expect("text")).expect("JSON");
    (record, payload)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_described_route_is_there_and_others_are_not() {
    let (flow, internal, _running) = running(&[]).await;
    let public = reqwest::get(format!("{}/openapi.json", flow.url())).await.unwrap().text().await.unwrap();
    assert!(!public.contains("/internal/"), "inner routes are described to who has the token");
    let inner = format!("http://127.0.0.1:{internal}/internal/openapi.json");
    let document = send(Method::GET, inner, &[("x-laneway-token", TOKEN)], "").await.text().await.unwrap();
    let document: Value = serde_json::from_str(&document).expect("JSON");
    assert_eq!(document["openapi"], "3.1.0");
    let mut seen = 0;
    for (path, methods) in document["paths"].as_object().expect("paths") {
        let url = match path.starts_with("/internal/") {
            true => format!("http://127.0.0.1:{internal}{path}"),
            false => format!("{}{path}", flow.url()),
        };
        for method in methods.as_object().expect("methods").keys() {
            let method: Method = method.to_uppercase().parse().expect("a method");
            let answer = send(method.clone(), url.clone(), &[("x-laneway-token", TOKEN)], "").await;
            assert_ne!(answer.status(), StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
            // Of a run that nobody knows there is nothing to tell.
            let said = answer.text().await.expect("text");
            assert_ne!(said, "404 page not found\n", "{method} {path}");
            seen += 1;
        }
        if path.starts_with("/internal/") {
            let closed = send(Method::POST, url.clone(), &[("authorization", KEY)], "").await;
            assert_eq!(closed.status(), 401, "{path} without the token");
            let outside = format!("{}{path}", flow.url());
            assert_eq!(send(Method::POST, outside, &[], "").await.status(), 404, "{path} on the public listener");
        }
    }
    assert!(seen >= 25, "{seen}");
    for (path, content) in [("/docs", "text/html; charset=utf-8"), ("/version", "application/json; charset=utf-8")] {
        let answer = reqwest::get(format!("{}{path}", flow.url())).await.expect("an answer");
        assert_eq!((answer.status().as_u16(), answer.headers()["content-type"].to_str().unwrap()), (200, content));
    }
    let robots = reqwest::get(format!("{}/robots.txt", flow.url())).await.unwrap().text().await.unwrap();
    assert_eq!(robots, "User-agent: * \nDisallow: / \n");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_in_by_every_door() {
    let (flow, _, _running) = running(&[]).await;
    for kind in ["identify", "track", "page", "screen", "group", "alias", "merge", "audiencelist"] {
        let body = format!("{{\"userId\":\"u\",\"door\":\"{kind}\"}}");
        assert_eq!(post(&flow, &format!("/v1/{kind}"), body).await.status(), 200);
        assert_eq!(only(&flow, &format!("\"door\":\"{kind}\"")).1["type"], kind);
    }
    let import = post(&flow, "/v1/import", r#"{"batch":[{"userId":"a","type":"track","door":"import"}]}"#).await;
    assert_eq!(import.status(), 200);
    let beacon = format!("{}/beacon/v1/batch?writeKey=wk-1", flow.url());
    let answer =
        send(Method::POST, beacon, &[("content-type", "text/plain")], r#"{"batch":[{"userId":"b","door":"beacon"}]}"#);
    assert_eq!(answer.await.status(), 200);
    let nobody = send(Method::POST, format!("{}/beacon/v1/batch", flow.url()), &[("authorization", KEY)], "{}").await;
    assert_eq!(
        (nobody.status().as_u16(), nobody.text().await.unwrap().as_str()),
        (401, "failed to read writekey from query params\n")
    );
    for (query, is_stored) in [
        ("track?writeKey=wk-1&anonymousId=%22p1%22&event=Opened&context.campaign.name=May", true),
        ("page?writeKey=wk-1&userId=p2&name=", true),
        ("track?writeKey=wk-1&userId=p3&event=", false),
        ("track?writeKey=nobody&userId=p4", false),
        ("track", false),
    ] {
        let before = stored(&flow).len();
        let url = format!("{}/pixel/v1/{query}", flow.url());
        let answer = send(Method::GET, url, &[("user-agent", "mailer/1")], "").await;
        assert_eq!((answer.status().as_u16(), answer.headers()["content-type"].to_str().unwrap()), (200, "image/gif"));
        assert_eq!(answer.bytes().await.unwrap().len(), 43);
        assert_eq!(stored(&flow).len() - before, usize::from(is_stored), "{query}");
    }
    let (record, pixel) = only(&flow, "Opened");
    assert_eq!((&record["value"]["channel"], &pixel["context"]["campaign"]["name"]), (&json!("pixel"), &json!("May")));
    assert_eq!((&pixel["anonymousId"], &pixel["context"]["userAgent"]), (&json!("p1"), &json!("mailer/1")));
    assert_eq!(pixel["request_ip"], "127.0.0.1");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_in_by_every_inner_door() {
    let (flow, internal, _running) = running(&[]).await;
    let inside = async |path: &str, headers: &[(&str, &str)], body: &str| {
        let mut all = vec![("x-laneway-token", TOKEN)];
        all.extend(headers);
        let answer =
            send(Method::POST, format!("http://127.0.0.1:{internal}/internal/v1/{path}"), &all, body.to_owned()).await;
        (answer.status().as_u16(), answer.text().await.expect("text"))
    };
    assert_eq!(inside("extract", &[("authorization", KEY)], r#"{"door":"extract"}"#).await, (200, "ok".into()));
    let replayed = r#"{"batch":[{"userId":"u","door":"replay","receivedAt":"2025-01-01T00:00:00.000Z"}]}"#;
    assert_eq!(inside("replay", &[("x-rudder-source-id", "src-again")], replayed).await, (200, "ok".into()));
    let (record, payload) = only(&flow, "\"door\":\"replay\"");
    assert_eq!(
        (&record["value"]["channel"], &payload["receivedAt"]),
        (&json!("replay"), &json!("2025-01-01T00:00:00.000Z"))
    );
    let message = json!([{"properties": {"requestType": "track", "routingKey": "<<>>a<<>>u", "workspaceID": "ws-1", "sourceID": "src-1",
            "receivedAt": "2024-01-01T01:01:01.000000001Z", "requestIP": "1.1.1.1"},
        "payload": {"type": "track", "userId": "u", "messageId": "m", "rudderId": "r", "door": "messages",
            "receivedAt": "2024-01-01T01:01:01.000Z", "request_ip": "1.1.1.1"}}]);
    assert_eq!(inside("batch", &[], &message.to_string()).await, (200, "ok".into()));
    assert_eq!(only(&flow, "\"door\":\"messages\"").1["request_ip"], "1.1.1.1");
    let rows = r#"{"batch":[{"type":"record","recordId":1}]}"#;
    for (path, headers, code, text) in [
        ("replay", vec![("x-rudder-source-id", "src-1")], 401, "invalid replay source"),
        ("retl", vec![], 401, "failed to read source id from header"),
        ("retl", vec![("x-rudder-source-id", "nobody")], 401, "invalid source id"),
        ("retl", vec![("x-rudder-source-id", "src-off")], 404, "source is disabled"),
        (
            "retl",
            vec![("x-rudder-source-id", "src-retl"), ("x-rudder-destination-id", "x")],
            400,
            "invalid destination id",
        ),
        (
            "retl",
            vec![("x-rudder-source-id", "src-retl"), ("x-rudder-destination-id", "dst-off")],
            404,
            "destination is disabled",
        ),
    ] {
        assert_eq!(inside(path, &headers, rows).await, (code, format!("{text}\n")), "{path} {headers:?}");
    }
    assert_eq!(inside("batch", &[], "[]").await, (400, "event is not a valid rudder event\n".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_may_be_for_one_destination_and_a_run_can_be_drained() {
    let (flow, internal, _running) = running(&[("LANEWAY_ROUTER__RETRY_FIRST", "500ms")]).await;
    let rows = |id: &str, run: &str| json!({"batch": [{"type": "record", "userId": "u", "recordId": id, "context": {"sources": {"job_run_id": run, "task_run_id": "t"}}}]});
    let retl = async |headers: &[(&str, &str)], body: Value| {
        let mut all = vec![("authorization", "Bearer internal-secret-4"), ("x-rudder-source-id", "src-retl")];
        all.extend(headers);
        let url = format!("http://127.0.0.1:{internal}/internal/v1/retl");
        assert_eq!(send(Method::POST, url, &all, body.to_string()).await.status(), 200);
    };
    // Nothing listens at the sink: the run waits for retries until it is drained.
    retl(&[], rows("drained", "run-1")).await;
    let total = |name: &str| -> u64 {
        let told = flow.command(&["lanes", "list", "--over", "0", "--output", "json"]);
        let lanes: Vec<Value> = serde_json::from_slice(&told.stdout).unwrap_or_default();
        lanes.iter().filter_map(|lane| lane.pointer(name)?.as_u64()).sum()
    };
    eventually("both are pending", Duration::from_secs(20), async || total("/pending") == 2).await;
    let drain = format!("http://127.0.0.1:{internal}/internal/drain/job/run-1");
    let answer = send(Method::PUT, drain, &[("x-laneway-token", TOKEN)], "").await;
    assert_eq!((answer.status().as_u16(), answer.text().await.unwrap().as_str()), (201, ""));
    eventually("both are drained", Duration::from_secs(20), async || total("/ledger/drained") == 2).await;
    let mut arrivals = sink(flow.sink).await;
    // Rows of the run that were not processed yet when it was drained, or come afterwards, are not delivered either.
    retl(&[], rows("late", "run-1")).await;
    let status = format!("http://127.0.0.1:{internal}/internal/v2/job-status/run-1");
    eventually("all of them have failed", Duration::from_secs(20), async || {
        let told = send(Method::GET, status.clone(), &[("x-laneway-token", TOKEN)], "").await;
        let told: Value = serde_json::from_str(&told.text().await.unwrap()).unwrap_or_default();
        let source = &told["tasks"][0]["sources"][0];
        let stats =
            |of: &Value| (of["stats"]["in"].as_u64(), of["stats"]["out"].as_u64(), of["stats"]["failed"].as_u64());
        let at = source["destinations"].as_array().into_iter().flatten().map(stats);
        stats(source) == (Some(2), Some(2), Some(0)) && at.eq([(Some(2), Some(0), Some(2)); 2])
    })
    .await;
    retl(&[("x-rudder-destination-id", "dst-2")], rows("one", "run-2")).await;
    retl(&[], rows("all", "run-2")).await;
    let mut arrived = Vec::new();
    while arrived.len() < 3 {
        let (path, body) =
            tokio::time::timeout(Duration::from_secs(20), arrivals.recv()).await.expect("in time").expect("a delivery");
        let event: Value = serde_json::from_str(&body).expect("JSON");
        arrived.push((path, event["recordId"].as_str().expect("text").to_owned()));
    }
    arrived.sort();
    let expected = [("/dst-1", "all"), ("/dst-2", "all"), ("/dst-2", "one")];
    assert_eq!(arrived, expected.map(|(path, id)| (path.to_owned(), id.to_owned())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_may_be_judged_event_by_event() {
    let (flow, _, _running) = running(&[]).await;
    let body = r#"{"batch":[{"userId":"u","messageId":"good-1"},7,{"type":"track"},{"anonymousId":"a","messageId":"good-2"}]}"#;
    assert_eq!(post(&flow, "/v1/batch", body).await.status(), 400);
    assert!(stored(&flow).is_empty());
    let answer = post(&flow, "/v1/batch?verdicts=1", body).await;
    assert_eq!(answer.status(), 200);
    let said: Value = serde_json::from_str(&answer.text().await.unwrap()).expect("JSON");
    assert_eq!((&said["accepted"], &said["refused"]), (&json!(2), &json!(2)));
    assert_eq!(said["events"][0], json!({"index": 0, "accepted": true, "messageId": "good-1"}));
    assert_eq!(
        said["events"][2],
        json!({"index": 2, "accepted": false, "code": 400, "reason": "request neither has anonymousId nor userId"})
    );
    assert_eq!(stored(&flow).len(), 2);
    assert_eq!(post(&flow, "/v1/batch?verdicts=1", r#"{"batch":[7]}"#).await.status(), 400);
    assert_eq!(post(&flow, "/v1/batch?verdicts=1", "{").await.text().await.unwrap(), "invalid json\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn browsers_find_their_source() {
    let (flow, _, _running) = running(&[("LANEWAY_GATEWAY__CORS_ORIGINS", "https://shop.example")]).await;
    for (path, key) in [("/sourceConfig/?p=npm&writeKey=wk-1", ""), ("/sourceConfig", KEY)] {
        let headers = [("authorization", key), ("origin", "https://shop.example")];
        let answer = send(Method::GET, format!("{}{path}", flow.url()), &headers, "").await;
        assert_eq!(answer.headers()["access-control-allow-origin"], "https://shop.example");
        let config: Value = serde_json::from_str(&answer.text().await.unwrap()).expect("JSON");
        assert_eq!((&config["source"]["id"], &config["source"]["enabled"]), (&json!("src-1"), &json!(true)));
    }
    let other =
        send(Method::GET, format!("{}/sourceConfig", flow.url()), &[("origin", "https://evil.example")], "").await;
    assert_eq!(other.status(), 401);
    assert!(other.headers().get("access-control-allow-origin").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_encoding_is_read_and_an_unknown_one_is_told() {
    let (flow, _, _running) = running(&[]).await;
    let text = br#"{"userId":"u","event":"encoded"}"#;
    let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    zlib.write_all(text).expect("compressed");
    for (encoding, body, code) in [
        ("deflate", zlib.finish().expect("compressed"), 200),
        ("zstd", zstd::encode_all(&text[..], 3).expect("compressed"), 200),
        ("identity", text.to_vec(), 200),
        ("compress", text.to_vec(), 415),
        ("br", text.to_vec(), 400),
        ("zstd", text.to_vec(), 400),
    ] {
        let headers = [("authorization", KEY), ("content-encoding", encoding)];
        let answer = send(Method::POST, format!("{}/v1/track", flow.url()), &headers, body).await;
        assert_eq!(answer.status(), code, "{encoding}");
    }
    assert_eq!(stored(&flow).len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_brings_too_much_is_told_when_to_come_back() {
    let limits = [("LANEWAY_GATEWAY__LIMITS__SOURCE", "10"), ("LANEWAY_GATEWAY__LIMITS__WINDOW", "1h")];
    let (flow, internal, _running) = running(&limits).await;
    let batch = |count: usize| json!({"batch": vec![json!({"type": "track", "userId": "u"}); count]}).to_string();
    assert_eq!(post(&flow, "/v1/batch", batch(6)).await.status(), 200);
    let refused = post(&flow, "/v1/batch", batch(6)).await;
    assert_eq!(refused.status(), 429);
    let wait: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().expect("seconds");
    assert!((600..=720).contains(&wait), "two events of 360 s each: {wait}");
    assert_eq!(refused.text().await.unwrap(), "max requests limit reached\n");
    let headers = [("authorization", KEY), ("x-rudder-job-run-id", "r"), ("x-rudder-task-run-id", "t")];
    let claims = send(Method::POST, format!("{}/v1/batch", flow.url()), &headers, batch(6)).await;
    assert_eq!(claims.status(), 429, "who only says that it is reverse ETL is not believed");
    let url = format!("http://127.0.0.1:{internal}/internal/v1/retl");
    for _ in 0..3 {
        let headers = [("x-laneway-token", TOKEN), ("x-rudder-source-id", "src-retl")];
        assert_eq!(send(Method::POST, url.clone(), &headers, batch(10)).await.status(), 200);
    }
    assert_eq!(post(&flow, "/v1/batch", batch(4)).await.status(), 200, "a refused request costs nothing");
}

/// What a connection gets to read until it is closed, or for so long.
fn heard(mut stream: &TcpStream, at_most: Duration) -> (String, bool) {
    let until = Instant::now() + at_most;
    let (mut heard, mut chunk) = (Vec::new(), [0; 4096]);
    while Instant::now() < until {
        stream.set_read_timeout(Some(Duration::from_millis(200))).expect("set");
        match stream.read(&mut chunk) {
            Ok(0) => return (String::from_utf8_lossy(&heard).into_owned(), true),
            Ok(count) => heard.extend_from_slice(&chunk[..count]),
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => return (String::from_utf8_lossy(&heard).into_owned(), true),
        }
    }
    (String::from_utf8_lossy(&heard).into_owned(), false)
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_do_not_stay_and_hold_nothing_up() {
    let settings = [
        ("LANEWAY_GATEWAY__BODY_TIMEOUT", "1s"),
        ("LANEWAY_GATEWAY__IDLE_TIMEOUT", "2s"),
        ("LANEWAY_GATEWAY__BODY_MEMORY", "1MiB"),
    ];
    let (flow, _, processes) = running(&settings).await;
    let connect = |text: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", flow.gateway)).expect("connected");
        stream.write_all(text.as_bytes()).expect("sent");
        stream
    };
    let head = format!("POST /v1/track HTTP/1.1\r\nhost: x\r\nauthorization: {KEY}\r\n");
    let slow_heads: Vec<TcpStream> =
        (0..50).map(|_| connect("POST /v1/track HTTP/1.1\r\nhost: x\r\nx-slow: ")).collect();
    // Each announces more than there is memory for; 40 KiB of it come.
    let slow_bodies: Vec<TcpStream> =
        (0..20).map(|_| connect(&format!("{head}content-length: 4000000\r\n\r\n{}", " ".repeat(40_000)))).collect();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(700) {
        let sent = Instant::now();
        assert_eq!(post(&flow, "/v1/track", r#"{"userId":"u"}"#).await.status(), 200, "the others go on");
        assert!(sent.elapsed() < Duration::from_secs(5));
    }
    let (said, is_closed) = tokio::task::block_in_place(|| heard(&slow_bodies[0], Duration::from_secs(20)));
    assert!(said.starts_with("HTTP/1.1 408") && said.contains("request timeout") && is_closed, "{said}");
    let (said, is_closed) = tokio::task::block_in_place(|| heard(&slow_heads[0], Duration::from_secs(20)));
    assert!(is_closed, "{said}");
    drop((slow_bodies, slow_heads));
    // Thirty bodies of 100 KB that are not finished do not fit into 1 MiB: the last are told to come back, and later all is well.
    let held: Vec<TcpStream> =
        (0..30).map(|_| connect(&format!("{head}content-length: 200000\r\n\r\n{}", " ".repeat(100_000)))).collect();
    let turned_away = tokio::task::block_in_place(|| {
        held.iter().filter(|stream| heard(stream, Duration::from_secs(5)).0.starts_with("HTTP/1.1 503")).count()
    });
    assert!((15..30).contains(&turned_away), "{turned_away}");
    drop(held);
    eventually("memory is free again", Duration::from_secs(10), async || {
        post(&flow, "/v1/track", r#"{"userId":"u"}"#).await.status() == 200
    })
    .await;
    assert!(processes[0].metric("laneway_gateway_open_requests").await.is_some_and(|open| open < 5.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_so_many_requests_are_taken_at_a_time_and_proxies_are_believed_where_they_are_trusted() {
    let settings =
        [("LANEWAY_GATEWAY__MAX_REQUESTS", "3"), ("LANEWAY_GATEWAY__TRUSTED_PROXIES", "127.0.0.0/8,10.0.0.0/8")];
    let (flow, _, _running) = running(&settings).await;
    let headers = [("authorization", KEY), ("x-forwarded-for", "6.6.6.6, 1.2.3.4, 10.0.0.7")];
    let answer =
        send(Method::POST, format!("{}/v1/track", flow.url()), &headers, r#"{"userId":"u","event":"proxied"}"#).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(only(&flow, "proxied").1["request_ip"], "1.2.3.4");
    let open: Vec<TcpStream> = (0..3)
        .map(|_| {
            let mut stream = TcpStream::connect(("127.0.0.1", flow.gateway)).expect("connected");
            let head =
                format!("POST /v1/track HTTP/1.1\r\nhost: x\r\nauthorization: {KEY}\r\ncontent-length: 100\r\n\r\n");
            stream.write_all(head.as_bytes()).expect("sent");
            stream
        })
        .collect();
    eventually("one too many is turned away", Duration::from_secs(10), async || {
        let answer = post(&flow, "/v1/track", r#"{"userId":"u"}"#).await;
        answer.status() == 503 && answer.headers().contains_key("retry-after")
    })
    .await;
    drop(open);
    eventually("there is room again", Duration::from_secs(10), async || {
        post(&flow, "/v1/track", r#"{"userId":"u"}"#).await.status() == 200
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_warehouse_is_asked_through_the_internal_door() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/w/", listener.local_addr().expect("bound"));
    let answer = async |method: Method, uri: axum::http::Uri, headers: axum::http::HeaderMap, body: String| {
        let told = json!({"method": method.as_str(), "uri": uri.to_string(), "body": body,
            "type": headers.get("content-type").map(|it| it.to_str().expect("text").to_owned()),
            "has_token": headers.contains_key("x-laneway-token") || headers.contains_key("authorization")});
        (StatusCode::ACCEPTED, [("content-type", "application/json")], told.to_string())
    };
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(answer)).await });
    let (_flow, internal, _running) = running(&[("LANEWAY_GATEWAY__INTERNAL__WAREHOUSE_URL", url.as_str())]).await;
    let at = |path: &str| format!("http://127.0.0.1:{internal}/internal/v1/warehouse/{path}");
    for (method, path, body) in [
        (Method::GET, "fetch-tables?a=1&b=%20", ""),
        (Method::POST, "pending-events", "{\"a\":1}"),
        (Method::POST, "trigger-upload", "{}"),
        (Method::POST, "jobs", "[]"),
        (Method::GET, "jobs/status", ""),
    ] {
        let headers = [("x-laneway-token", TOKEN), ("content-type", "application/json")];
        let answer = send(method.clone(), at(path), &headers, body).await;
        assert_eq!(
            (answer.status(), answer.headers()["content-type"].to_str().unwrap()),
            (StatusCode::ACCEPTED, "application/json")
        );
        let told: Value = serde_json::from_str(&answer.text().await.expect("text")).expect("JSON");
        let whole = json!({"method": method.as_str(), "uri": format!("/w/internal/v1/warehouse/{path}"), "body": body,
            "type": "application/json", "has_token": false});
        assert_eq!(told, whole);
    }
    let (_flow, internal, _running) =
        running(&[("LANEWAY_GATEWAY__INTERNAL__WAREHOUSE_URL", "http://127.0.0.1:1")]).await;
    let url = format!("http://127.0.0.1:{internal}/internal/v1/warehouse/fetch-tables");
    assert_eq!(send(Method::GET, url, &[("x-laneway-token", TOKEN)], "").await.status(), 503);
}
