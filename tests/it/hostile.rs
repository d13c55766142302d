//! Destinations that answer as nobody should: each answer ends in its verdict, in time, and is never taken for another.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use laneway::clock::Clock;
use laneway::delivery::http::{Client, ClientSettings, Guard};
use laneway::delivery::verdict::Verdict;
use laneway::model::delivery::{BodyFormat, HttpRequest};
use laneway::model::outcome::Reason;
use serde_json::Value;

use crate::support::eventually;
use crate::support::process::{Flow, number, workspace};

/// A request has so long, answer and all.
const TIMEOUT: Duration = Duration::from_millis(500);
const BODY: &str = "{\"a\":1}";

/// What a server has been asked.
type Asked = Arc<Mutex<Vec<String>>>;

/// A server of raw bytes: takes a request whole, then does `act` with the connection.
fn server(act: impl Fn(&mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static) -> (String, Asked) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = listener.local_addr().expect("an address");
    let (asked, act) = (Asked::default(), Arc::new(act));
    let noted = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let (noted, act) = (Arc::clone(&noted), Arc::clone(&act));
            std::thread::spawn(move || {
                let mut request = Vec::new();
                let mut chunk = [0; 4096];
                // The end of a JSON object: the only one in its request.
                while !request.ends_with(b"}") {
                    match stream.read(&mut chunk) {
                        Ok(count) if count > 0 => request.extend_from_slice(&chunk[..count]),
                        _ => break,
                    }
                }
                noted.lock().expect("no poison").push(String::from_utf8_lossy(&request).into_owned());
                // The other side may have gone: that is what is tried.
                let _ = act(&mut stream);
            });
        }
    });
    (format!("http://{address}"), asked)
}

/// A server that says this and closes.
fn says(text: &'static str) -> String {
    server(move |stream| stream.write_all(text.as_bytes())).0
}

/// A server that goes on with so little every now and then until the other side hangs up.
fn drips(head: &'static str, drop: &'static str) -> String {
    let drip = move |stream: &mut TcpStream| {
        stream.set_read_timeout(Some(Duration::from_millis(20)))?;
        stream.write_all(head.as_bytes())?;
        loop {
            stream.write_all(drop.as_bytes())?;
            match stream.read(&mut [0; 1]) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                _ => return Ok(()),
            }
        }
    };
    server(drip).0
}

fn request(url: &str) -> HttpRequest {
    HttpRequest {
        method: "POST".into(),
        url: url.into(),
        headers: vec![("content-type".into(), "application/json".into()), ("authorization".into(), "secret".into())],
        params: vec![],
        body_format: BodyFormat::Json,
        body: Bytes::from_static(BODY.as_bytes()),
    }
}

async fn send_with(url: &str, guard: Guard) -> Verdict {
    let settings = ClientSettings { timeout: TIMEOUT, guard, ..ClientSettings::default() };
    let client = Client::new(settings, Clock::system()).expect("a client");
    let (request, id) = (request(url), "d-1".into());
    let sent = client.send(&request, &id);
    tokio::time::timeout(TIMEOUT * 20, sent).await.unwrap_or_else(|_| panic!("{url} holds the request up for ever"))
}

async fn send(url: &str) -> Verdict {
    send_with(url, Guard::default()).await
}

/// It counts as no answer, for this reason.
async fn is_silence(url: &str, reason: &str) {
    match send(url).await {
        Verdict::Retry { code: 0, message, .. } => assert!(message.contains(reason), "{reason}: {message}"),
        other => panic!("{reason}: {other:?}"),
    }
}

async fn is_aborted(url: &str, with: Reason, code: u16) {
    match send(url).await {
        Verdict::Abort { reason, code: found, .. } => assert_eq!((reason, found), (with, code)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_whole_answer_is_tried_again() {
    is_silence(&says(""), "no answer").await;
    is_silence(&says("SSH-2.0-OpenSSH_9.2\r\n"), "no answer").await;
    is_silence(&says("HTTP/1.1 2"), "no answer").await;
    is_silence("http://127.0.0.1:1/", "no connection").await;
    let plain = says("HTTP/1.1 400 Bad Request\r\n\r\n").replace("http:", "https:");
    is_silence(&plain, "").await;
    let reset = server(|stream| {
        rustix::net::sockopt::set_socket_linger(&*stream, Some(Duration::ZERO)).map_err(std::io::Error::from)
    });
    is_silence(&reset.0, "no answer").await;
}

/// A destination that has taken an event does not get it again because of how it says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_status_counts_whatever_comes_after_it() {
    let many: String = (0..3_000).map(|n| format!("x{n}: 1\r\n")).collect();
    let answers = [
        "content-length: 100\r\n\r\nten bytes.",
        "transfer-encoding: chunked\r\n\r\n5\r\nhel",
        "transfer-encoding: chunked\r\n\r\nbanana\r\n",
        "content-length: banana\r\n\r\n",
        "content-length: 1\r\ncontent-length: 2\r\n\r\nok",
        "content-security-policy: default-src 'self';\r\n  script-src 'self'\r\ncontent-length: 2\r\n\r\nok",
        "x-powered-by : x\r\ncontent-length: 2\r\n\r\nok",
        "x-\u{e9}: \u{1}\r\ncontent-length: 2\r\n\r\nok",
        "no colon at all\r\ncontent-length: 2\r\n\r\nok",
        "location\r\n",
        &many,
    ];
    for rest in answers {
        for (status, expected) in [("200 OK", 200), ("429 Too Many Requests", 429), ("400 Bad Request", 400)] {
            let text = format!("HTTP/1.1 {status}\r\n{rest}");
            let (url, asked) = server(move |stream| stream.write_all(text.as_bytes()));
            let verdict = send(&url).await;
            assert_eq!(verdict.code(), expected, "{rest:?}: {verdict:?}");
            assert_eq!(matches!(verdict, Verdict::Delivered { .. }), expected == 200, "{rest:?}: {verdict:?}");
            assert_eq!(asked.lock().expect("no poison").len(), 1, "{rest:?}");
        }
    }
    let reset = server(|stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nten")?;
        rustix::net::sockopt::set_socket_linger(&*stream, Some(Duration::ZERO)).map_err(std::io::Error::from)
    });
    assert_eq!(send(&reset.0).await, Verdict::Delivered { code: 200 });
    let drip = drips("HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", ".");
    assert_eq!(send(&drip).await, Verdict::Delivered { code: 200 });
    assert_eq!(send(&drips("HTTP/1.1 200 OK\r\n", "a: b\r\n")).await, Verdict::Delivered { code: 200 });
}

/// Serves `served` requests on each connection, then closes when the next one comes.
fn forgetful(served: usize, last_words: &'static str) -> (String, Asked) {
    server(move |stream| {
        let mut chunk = [0; 4096];
        for _ in 0..served {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
            if stream.read(&mut chunk)? == 0 {
                return Ok(());
            }
        }
        stream.write_all(last_words.as_bytes())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_breaks_on_a_used_connection_is_sent_again_at_once() {
    let settings = ClientSettings { timeout: TIMEOUT * 4, ..ClientSettings::default() };
    let client = Client::new(settings, Clock::system()).expect("a client");
    let (url, asked) = forgetful(1, "");
    for _ in 0..4 {
        assert_eq!(client.send(&request(&url), &"d-1".into()).await, Verdict::Delivered { code: 200 });
    }
    assert!(asked.lock().expect("no poison").len() >= 3, "connections are used again, and broke");
    // Where an answer had begun, the destination may have acted on the request.
    let (url, asked) = forgetful(1, "HTTP/1.1 5");
    // The next request may come before the connection is free again, and open another one.
    for _ in 0..50 {
        match client.send(&request(&url), &"d-1".into()).await {
            Verdict::Delivered { code: 200 } => {}
            Verdict::Retry { code: 0, .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(asked.lock().expect("no poison").len() < 50, "one of them broke in the middle of an answer");
    // A new connection that breaks is the destination's failure.
    let (url, asked) = forgetful(0, "");
    let broken = client.send(&request(&url), &"d-1".into()).await;
    assert!(matches!(broken, Verdict::Retry { code: 0, .. }), "{broken:?}");
    assert_eq!(asked.lock().expect("no poison").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_never_ends_is_cut_off() {
    let nothing = server(|stream| stream.read(&mut [0; 1]).map(drop));
    is_silence(&nothing.0, "timed out").await;
    let informs = server(|stream| {
        loop {
            stream.write_all(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n")?;
        }
    });
    is_silence(&informs.0, "").await;
    let headers = server(|stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\n")?;
        loop {
            stream.write_all(b"x: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n")?;
        }
    });
    assert_eq!(send(&headers.0).await, Verdict::Delivered { code: 200 });
    // What it says is enough to know that it has the delivery; the rest is of no interest.
    let body = server(|stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
        loop {
            stream.write_all(&[b'x'; 4096])?;
        }
    });
    assert_eq!(send(&body.0).await, Verdict::Delivered { code: 200 });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_one_whatever_comes_with_it() {
    is_aborted(
        &says("HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"),
        Reason::Rejected,
        101,
    )
    .await;
    is_aborted(&says("HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n"), Reason::Rejected, 302)
        .await;
    is_aborted(
        &says("HTTP/1.1 307 There\r\nlocation: file:///etc/passwd\r\ncontent-length: 0\r\n\r\n"),
        Reason::Rejected,
        307,
    )
    .await;
    is_aborted(&says("HTTP/1.1 307 There\r\ncontent-length: 0\r\n\r\n"), Reason::Rejected, 307).await;
    is_aborted(&says("HTTP/1.1 307 There\r\nlocation: \r\ncontent-length: 0\r\n\r\n"), Reason::Rejected, 307).await;
    is_aborted(
        &says("HTTP/1.1 308 Again\r\nlocation: /\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"),
        Reason::Rejected,
        308,
    )
    .await;
    is_aborted("ftp://127.0.0.1/", Reason::BadRequest, 0).await;
    is_aborted("http://{{host}}/", Reason::BadRequest, 0).await;
    is_aborted(&format!("http://127.0.0.1:1/{}", "a".repeat(70_000)), Reason::BadRequest, 0).await;
    assert_eq!(send(&says("HTTP/1.1 204 No Content\r\n\r\n")).await, Verdict::Delivered { code: 204 });
    for (told, least) in [("120", 100), ("Fri, 01 Jan 2100 00:00:00 GMT", 3_000)] {
        let text = format!("HTTP/1.1 429 Slow\r\nretry-after: {told}\r\ncontent-length: 0\r\n\r\n");
        match send(&server(move |stream| stream.write_all(text.as_bytes())).0).await {
            Verdict::Retry { code: 429, not_before: Some(wait), .. } => {
                assert!(wait >= Duration::from_secs(least) && wait <= Duration::from_secs(3_600), "{told}: {wait:?}");
            }
            other => panic!("{told}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_keeps_the_body_and_leaves_the_keys_behind() {
    let (elsewhere, asked) = server(|stream| stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"));
    let text = format!("HTTP/1.1 307 There\r\nlocation: {elsewhere}/x\r\ncontent-length: 0\r\n\r\n");
    let (from, _) = server(move |stream| stream.write_all(text.as_bytes()));
    assert_eq!(send(&from).await, Verdict::Delivered { code: 200 });
    let asked = asked.lock().expect("no poison")[0].to_lowercase();
    assert!(asked.starts_with("post /x") && asked.ends_with(BODY), "method and body stay: {asked}");
    assert!(asked.contains("idempotency-key: d-1") && asked.contains("content-type"), "{asked}");
    assert!(!asked.contains("secret"), "what is for one host is not for another: {asked}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_way_leads_to_addresses_that_are_refused() {
    is_aborted("http://169.254.169.254/latest/meta-data", Reason::BlockedAddress, 0).await;
    let metadata = "HTTP/1.1 307 There\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n";
    is_aborted(&says(metadata), Reason::BlockedAddress, 0).await;
    // A name is judged by what it resolves to when the connection is made, whatever it was before.
    let (there, asked) = server(|stream| stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"));
    let named = there.replace("127.0.0.1", "localhost");
    assert_eq!(send_with(&named, Guard::default()).await, Verdict::Delivered { code: 200 });
    let strict = send_with(&named, Guard { block_private: true }).await;
    assert!(matches!(strict, Verdict::Abort { reason: Reason::BlockedAddress, .. }), "{strict:?}");
    assert_eq!(asked.lock().expect("no poison").len(), 1, "nothing was sent there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_gets_such_answers_is_alone_with_them() {
    const EVENTS: u64 = 400;
    let silent = [
        ("resets", says("HTTP/1.1 503 Busy\r\ncontent-length: 100\r\n\r\nten")),
        ("drips", drips("HTTP/1.1 503 Busy\r\ncontent-length: 100000\r\n\r\n", ".")),
        ("informs", drips("", "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n")),
        ("speaks-ssh", says("SSH-2.0-OpenSSH_9.2\r\n")),
    ];
    let astray = says("HTTP/1.1 307 There\r\nlocation: http://169.254.169.254/latest\r\ncontent-length: 0\r\n\r\n");
    let mut flow = Flow::embedded();
    flow.set("LANEWAY_ROUTER__TIMEOUT", "500ms");
    let good = format!("http://127.0.0.1:{}/", flow.sink);
    let mut destinations = vec![("dst-1", good.as_str()), ("astray", &astray)];
    destinations.extend(silent.iter().map(|(id, url)| (*id, url.as_str())));
    std::fs::write(flow.folder.path().join("workspace.json"), workspace(&destinations)).expect("written");
    let _running = flow.start_all().await;
    let report = flow.load(&["--events", &EVENTS.to_string(), "--users", "50"]).report().await;
    for name in ["lost", "out_of_order", "duplicated_messages"] {
        assert_eq!(number(&report, name), 0, "{name}: {report}");
    }

    let ledger = |id: &str| {
        let listed = flow.command(&["lanes", "list", "--over", "0", "--output", "json"]);
        let rows: Vec<Value> = serde_json::from_slice(&listed.stdout).expect("JSON");
        let row = rows.into_iter().find(|row| row["destination"] == id).unwrap_or_default();
        ["delivered", "aborted", "pending"]
            .map(|of| row["ledger"][of].as_u64().or(row[of].as_u64()).unwrap_or(u64::MAX))
    };
    eventually("what is led astray is given up", Duration::from_secs(60), async || ledger("astray") == [0, EVENTS, 0])
        .await;
    eventually("the ledger knows what was delivered", Duration::from_secs(60), async || {
        ledger("dst-1") == [EVENTS, 0, 0]
    })
    .await;
    for (id, _) in &silent {
        eventually("all of it waits", Duration::from_secs(60), async || ledger(id) == [0, 0, EVENTS]).await;
    }
    let letters = flow.command(&["dead-letters", "list", "--output", "json"]);
    let told: Value = serde_json::from_slice(&letters.stdout).expect("JSON");
    let letters = told["letters"].as_array().expect("a list");
    assert!(!letters.is_empty() && letters.iter().all(|letter| letter["destination"] == "astray"), "{told}");
}
