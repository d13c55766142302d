//! The edge over real HTTP: what SDKs send, what they get back, and that bad input has its answer.

use std::io::Write;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use reqwest::{Client, Method, Response};
use serde_json::Value;

use crate::support::process::{Flow, Process};
use crate::support::{eventually, sink};

async fn edge() -> (Flow, Vec<Process>) {
    let flow = Flow::embedded();
    let running = flow.start_all().await;
    (flow, running)
}

fn gzip(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(body).expect("compressed");
    encoder.finish().expect("compressed")
}

async fn post(flow: &Flow, path: &str, body: impl Into<reqwest::Body>, headers: &[(&str, &str)]) -> Response {
    let mut request = Client::new().post(format!("{}{path}", flow.url())).body(body);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.send().await.expect("an answer")
}

const KEY: (&str, &str) = ("authorization", "Basic d2stMTo=");

/// The stored events' payloads, in no order.
fn stored(flow: &Flow) -> Vec<String> {
    let tail = flow.command(&["tail", "events", "--from-start", "--until-end", "--output", "json"]);
    assert!(tail.status.success(), "{tail:?}");
    let lines = String::from_utf8_lossy(&tail.stdout).into_owned();
    lines
        .lines()
        .map(|line| {
            let record: Value = serde_json::from_str(line).expect("JSON");
            record["value"]["payload"].as_str().expect("a payload").to_owned()
        })
        .collect()
}

/// Requests restated from recordings of the SDKs (tests/fixtures/sdks.json), each as it goes over the wire.
#[tokio::test(flavor = "multi_thread")]
async fn what_sdks_send_is_taken() {
    let (flow, _running) = edge().await;
    let requests: Vec<Value> = serde_json::from_str(include_str!("../fixtures/sdks.json")).expect("a readable fixture");
    assert!(requests.len() >= 8);
    let mut events = 0;
    for request in requests {
        let body = request["body"].to_string();
        let compressed = request["gzip"].as_bool().unwrap_or(false);
        let bytes = if compressed { gzip(body.as_bytes()) } else { body.clone().into_bytes() };
        let mut headers = vec![KEY, ("content-type", request["content_type"].as_str().expect("text"))];
        if compressed {
            headers.push(("content-encoding", "gzip"));
        }
        let answer = post(&flow, request["path"].as_str().expect("text"), bytes, &headers).await;
        assert_eq!(answer.status(), 200, "{}", request["sdk"]);
        assert_eq!(answer.headers()["content-type"], "text/plain; charset=utf-8");
        assert_eq!(answer.text().await.expect("text"), "ok");
        events += request["body"]["batch"].as_array().map_or(1, Vec::len);
    }
    let payloads = stored(&flow);
    assert_eq!(payloads.len(), events);
    for payload in payloads {
        let event: Value = serde_json::from_str(&payload).expect("JSON");
        for field in ["messageId", "rudderId", "receivedAt", "request_ip", "type"] {
            assert!(event[field].as_str().is_some_and(|text| !text.is_empty()), "{field} in {payload}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_have_their_status_and_text() {
    let (flow, _running) = edge().await;
    let deep = format!("{{\"userId\":\"u\",\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let large = format!("{{\"userId\":\"u\",\"a\":\"{}\"}}", "x".repeat(5_000_000));
    let bomb = gzip(&vec![b' '; 200_000_000]);
    let gz = ("content-encoding", "gzip");
    let (off, unknown, empty) = ("Basic d2stb2ZmOg==", "Basic bm9wZTo=", "Basic Og==");
    let good = br#"{"userId":"u"}"#.to_vec();
    type Case<'a> = (&'a str, Vec<u8>, Vec<(&'a str, &'a str)>, u16, &'a str);
    let cases: Vec<Case<'_>> = vec![
        ("/v1/track", good.clone(), vec![], 401, "failed to read writekey from header"),
        ("/v1/track", good.clone(), vec![("authorization", "Bearer x")], 401, "failed to read writekey from header"),
        ("/v1/track", good.clone(), vec![("authorization", empty)], 401, "failed to read writekey from header"),
        ("/v1/track", good.clone(), vec![("authorization", unknown)], 401, "invalid write key"),
        ("/v1/track", good.clone(), vec![("authorization", off)], 404, "source is disabled"),
        ("/v1/track", b"{\"userId\"".to_vec(), vec![KEY], 400, "invalid json"),
        ("/v1/track", vec![], vec![KEY], 400, "invalid json"),
        ("/v1/track", deep.into_bytes(), vec![KEY], 400, "invalid json"),
        ("/v1/track", b"[]".to_vec(), vec![KEY], 400, "event is not a valid rudder event"),
        ("/v1/track", b"{}".to_vec(), vec![KEY], 400, "request neither has anonymousId nor userId"),
        ("/v1/track", b"not gzip".to_vec(), vec![KEY, gz], 400, "failed to read body from request"),
        ("/v1/track", gzip(&good)[..20].to_vec(), vec![KEY, gz], 400, "failed to read body from request"),
        ("/v1/track", good.clone(), vec![KEY, ("content-encoding", "compress")], 415, "unsupported content encoding"),
        ("/v1/track", large.into_bytes(), vec![KEY], 413, "request size exceeds max limit"),
        ("/v1/track", bomb, vec![KEY, gz], 413, "request size exceeds max limit"),
        ("/v1/batch", b"{\"batch\":[]}".to_vec(), vec![KEY], 400, "empty batch payload"),
        ("/v1/batch", br#"{"batch":[{"userId":"u"},5]}"#.to_vec(), vec![KEY], 400, "event is not a valid rudder event"),
        ("/v1/nowhere", good.clone(), vec![KEY], 404, "404 page not found"),
    ];
    for (path, body, headers, status, text) in cases {
        let answer = post(&flow, path, body, &headers).await;
        assert_eq!(answer.status(), status, "{path}: {text}");
        assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
        assert_eq!(answer.text().await.expect("text"), format!("{text}\n"));
    }
    assert!(stored(&flow).is_empty(), "nothing of a refused request is stored");
    let wrong_method = Client::new().get(format!("{}/v1/track", flow.url())).send().await.expect("an answer");
    assert_eq!((wrong_method.status().as_u16(), wrong_method.headers()["allow"].to_str().ok()), (405, Some("POST")));
}

#[tokio::test(flavor = "multi_thread")]
async fn browsers_on_other_origins_are_allowed() {
    let (flow, _running) = edge().await;
    let url = format!("{}/v1/track", flow.url());
    let preflight = Client::new()
        .request(Method::OPTIONS, &url)
        .header("origin", "https://shop.example")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "anonymousid,authorization,content-type,sentat")
        .send()
        .await
        .expect("an answer");
    assert_eq!(preflight.status(), 204);
    for (name, value) in [
        ("access-control-allow-origin", "https://shop.example"),
        ("access-control-allow-credentials", "true"),
        ("access-control-allow-methods", "POST"),
        ("access-control-allow-headers", "anonymousid,authorization,content-type,sentat"),
        ("access-control-max-age", "900"),
    ] {
        assert_eq!(preflight.headers()[name], value);
    }
    let refused = post(&flow, "/v1/track", "{}", &[KEY, ("origin", "https://shop.example")]).await;
    assert_eq!(refused.headers()["access-control-allow-origin"], "https://shop.example", "errors are readable too");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_customers_bytes_reach_the_destination_unchanged() {
    let (flow, _running) = edge().await;
    let mut arrivals = sink(flow.sink).await;
    let sent = "{\"anonymousId\":\"a\",\"messageId\":\"m-1\",\"big\":123456789012345678901234567890,\"f\":1.50,\"z\":1,\"a\":1,\"a\":2,\
         \"esc\":\"\\u00e9\\ud83d\\ude00\",\"raw\":\"é\u{2028}😀\",\"timestamp\":\"2026-01-01T00:00:00.000Z\"";
    let answer = post(&flow, "/v1/track", format!("{sent}}}"), &[KEY]).await;
    assert_eq!(answer.status(), 200);
    let arrived = tokio::time::timeout(Duration::from_secs(20), arrivals.recv()).await.expect("in time");
    let (_, body) = arrived.expect("a delivery");
    assert!(body.starts_with(sent), "{body}");
    let event: Value = serde_json::from_str(&body).expect("JSON");
    for field in ["type", "rudderId", "receivedAt", "request_ip", "originalTimestamp", "sentAt"] {
        assert!(event[field].is_string(), "{field} in {body}");
    }
    assert_eq!(event["context"]["ip"], event["request_ip"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_workspace_applies_and_a_broken_one_does_not() {
    let (flow, running) = edge().await;
    let path = flow.folder.path().join("workspace.json");
    let good = std::fs::read_to_string(&path).expect("there");
    std::fs::write(&path, "{\"sources\": [").expect("written");
    eventually("the broken one is reported", Duration::from_secs(10), async || {
        running[0].said().contains("not usable, the last good one stays in force")
    })
    .await;
    assert_eq!(post(&flow, "/v1/track", r#"{"userId":"u"}"#, &[KEY]).await.status(), 200);
    std::fs::write(&path, r#"{"workspaceId":"ws-1","sources":[]}"#).expect("written");
    eventually("an empty one is taken for a mistake", Duration::from_secs(10), async || {
        running[0].said().contains("it has no source, and the one in force has")
    })
    .await;
    assert_eq!(post(&flow, "/v1/track", r#"{"userId":"u"}"#, &[KEY]).await.status(), 200);
    std::fs::write(&path, good.replace("wk-1", "wk-2")).expect("written");
    eventually("the new key is known", Duration::from_secs(10), async || {
        let answer = post(&flow, "/v1/track", r#"{"userId":"u"}"#, &[("authorization", "Basic d2stMjo=")]).await;
        answer.status() == 200
    })
    .await;
    assert_eq!(post(&flow, "/v1/track", r#"{"userId":"u"}"#, &[KEY]).await.status(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_process_tells_how_it_is() {
    let (flow, running) = edge().await;
    let get = async |url: String| reqwest::get(url).await.expect("an answer");
    let admin = format!("http://127.0.0.1:{}", running[0].admin);
    assert_eq!(get(format!("{admin}/livez")).await.status(), 200);
    assert_eq!(post(&flow, "/v1/track", r#"{"userId":"u"}"#, &[KEY]).await.status(), 200);
    let page = get(format!("{admin}/metrics")).await.text().await.expect("text");
    assert!(page.contains("laneway_gateway_requests_total{code=\"200\"} 1"), "{page}");
    let catalogue = flow.command(&["metrics", "--output", "json"]);
    let catalogue: Vec<Value> = serde_json::from_slice(&catalogue.stdout).expect("JSON");
    for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').expect("a name and a kind");
        assert!(
            catalogue.iter().any(|row| row["name"] == name && row["kind"] == kind),
            "{line} is not in the catalogue"
        );
    }
    let health: Value = get(format!("{}/health", flow.url())).await.json_value().await;
    assert_eq!((&health["server"], &health["acceptingEvents"]), (&"UP".into(), &"TRUE".into()));
}

trait JsonValue {
    async fn json_value(self) -> Value;
}

impl JsonValue for Response {
    async fn json_value(self) -> Value {
        serde_json::from_str(&self.text().await.expect("text")).expect("JSON")
    }
}

/// What analytics-next, -kotlin, -swift and -react-native send: no Authorization, the write key in the body, short routes.
#[tokio::test(flavor = "multi_thread")]
async fn newer_sdks_of_segment_are_taken() {
    let (flow, _running) = edge().await;
    let plain = ("content-type", "text/plain");
    for (letter, kind) in
        [("t", "track"), ("i", "identify"), ("p", "page"), ("s", "screen"), ("g", "group"), ("a", "alias")]
    {
        for prefix in ["/v1", ""] {
            let event = format!(r#"{{"userId":"u","writeKey":"wk-1","messageId":"{prefix}{letter}"}}"#);
            assert_eq!(post(&flow, &format!("{prefix}/{letter}"), event, &[plain]).await.status(), 200, "{letter}");
            let of_kind = stored(&flow).into_iter().filter(|it| it.contains(&format!("\"type\":\"{kind}\""))).count();
            assert_eq!(of_kind, if prefix.is_empty() { 2 } else { 1 }, "{kind}");
        }
    }
    let batches = [
        r#"{"writeKey":"wk-1","batch":[{"userId":"u","type":"track"}],"sentAt":"2026-01-01T00:00:00Z"}"#,
        r#"{"batch":[{"userId":"u","type":"track","writeKey":"wk-1"}]}"#,
    ];
    for path in ["/v1/b", "/b", "/v1/batch", "/v1/import"] {
        for batch in batches {
            let chunks = [Ok::<_, std::io::Error>(gzip(batch.as_bytes()))];
            let chunked = reqwest::Body::wrap_stream(futures_util::stream::iter(chunks));
            let answer = post(&flow, path, chunked, &[plain, ("content-encoding", "gzip")]).await;
            assert_eq!(answer.status(), 200, "{path} {batch}");
        }
    }
    let cases = [
        (r#"{"userId":"u"}"#, 401, "failed to read writekey from header"),
        (r#"{"userId":"u","writeKey":""}"#, 401, "failed to read writekey from header"),
        (r#"{"userId":"u","writeKey":1}"#, 401, "failed to read writekey from header"),
        ("no json", 401, "failed to read writekey from header"),
        (r#"{"userId":"u","writeKey":"nobody"}"#, 401, "invalid write key"),
        (r#"{"userId":"u","writeKey":"wk-off"}"#, 404, "source is disabled"),
        (r#"{"writeKey":"wk-1"}"#, 400, "request neither has anonymousId nor userId"),
    ];
    for (body, status, text) in cases {
        let answer = post(&flow, "/v1/t", body, &[plain]).await;
        assert_eq!((answer.status().as_u16(), answer.text().await.expect("text")), (status, format!("{text}\n")));
    }
    // The header decides where there is one.
    let both =
        post(&flow, "/v1/t", r#"{"userId":"u","writeKey":"wk-1"}"#, &[("authorization", "Basic bm9wZTo=")]).await;
    assert_eq!(both.status(), 401);
    let settings = async |key: &str| reqwest::get(format!("{}/v1/projects/{key}/settings", flow.url())).await.unwrap();
    let known: Value = serde_json::from_str(&settings("wk-1").await.text().await.expect("text")).expect("JSON");
    assert_eq!(known["integrations"]["Segment.io"]["apiKey"], "wk-1");
    assert_eq!(settings("nobody").await.status(), 401);
}

/// As rudder-server's router has it: a path with a slash too many is another path.
#[tokio::test(flavor = "multi_thread")]
async fn a_slash_too_many_is_another_path() {
    let (flow, _running) = edge().await;
    for path in ["/v1/track/", "//v1/track", "/v1//track", "/v1/batch/"] {
        let answer = post(&flow, path, r#"{"userId":"u"}"#, &[KEY]).await;
        assert_eq!(answer.status(), 404, "{path}");
    }
}

/// Heads are not counted by the gateway's memory limit, so they are small.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_of_more_than_32_kib_is_refused() {
    let (flow, _running) = edge().await;
    let (small, large) = ("x".repeat(20 << 10), "x".repeat(40 << 10));
    let with = async |value: &str| post(&flow, "/v1/track", r#"{"userId":"u"}"#, &[KEY, ("x-large", value)]).await;
    assert_eq!(with(&small).await.status(), 200);
    assert_eq!(with(&large).await.status(), 431);
}
