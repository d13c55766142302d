//! A destination that counts what comes, and events for it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use axum::http::{HeaderMap, StatusCode};

use super::process::Flow;

/// Counts how often each delivery came.
#[derive(Default)]
pub struct Sink {
    pub is_down: AtomicBool,
    arrived: Mutex<BTreeMap<String, usize>>,
}

impl Sink {
    pub async fn start(port: u16) -> Arc<Self> {
        let this = Arc::new(Self::default());
        let sink = Arc::clone(&this);
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.expect("a listener");
        let take = async move |headers: HeaderMap| {
            if sink.is_down.load(Ordering::Relaxed) {
                return StatusCode::SERVICE_UNAVAILABLE;
            }
            let id = headers["idempotency-key"].to_str().expect("text").to_owned();
            *sink.arrived.lock().expect("no poison").entry(id).or_default() += 1;
            StatusCode::OK
        };
        tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(take)).await });
        this
    }

    /// Deliveries, and how often they came in all.
    pub fn counts(&self) -> (usize, usize) {
        let arrived = self.arrived.lock().expect("no poison");
        (arrived.len(), arrived.values().sum())
    }
}

/// Events of so many users, one of each.
pub fn publish(flow: &Flow, events: usize) {
    let event = |n: usize| format!("{{\"type\":\"track\",\"userId\":\"u{n}\",\"event\":\"e\"}}\n");
    std::fs::write(flow.folder.path().join("events"), (0..events).map(event).collect::<String>()).expect("written");
    assert!(flow.command(&["publish", "--write-key", "wk-1", "events"]).status.success());
}
