//! The admin listener's routes that every process has: `/livez`, `/readyz`, `/metrics`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;

use crate::telemetry::metrics::metrics;

/// Whether the process does its work. Each part that must be up takes a [`Ready`] and says when it is.
#[derive(Clone, Default)]
pub struct Readiness(Arc<AtomicUsize>);

/// A part's say in the process's readiness: not ready until it says so, and not any more when it is dropped.
pub struct Ready {
    missing: Arc<AtomicUsize>,
    is_ready: bool,
}

impl Readiness {
    pub fn part(&self) -> Ready {
        self.0.fetch_add(1, Ordering::AcqRel);
        Ready { missing: Arc::clone(&self.0), is_ready: false }
    }

    pub fn is_ready(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }
}

impl Ready {
    pub fn set(&mut self, ready: bool) {
        match (self.is_ready, ready) {
            (false, true) => drop(self.missing.fetch_sub(1, Ordering::AcqRel)),
            (true, false) => drop(self.missing.fetch_add(1, Ordering::AcqRel)),
            _ => {}
        }
        self.is_ready = ready;
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        self.set(false);
    }
}

pub fn routes(readiness: Readiness) -> Router {
    let ready = move || async move {
        match readiness.is_ready() {
            true => (StatusCode::OK, "ready\n"),
            false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
        }
    };
    let metrics = || async {
        ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics().render()).into_response()
    };
    Router::new()
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
}
