//! The destination: takes deliveries and tells the oracle.

use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use serde::Deserialize;
use tokio::time::Instant;

use super::oracle::Arrival;
use super::{Load, Shared};
use crate::clock::Clock;

#[derive(Clone)]
struct Sink {
    oracle: Shared,
    clock: Clock,
    delay: Duration,
    fail_users: usize,
    fail_until: Instant,
}

#[derive(Deserialize)]
struct Delivered<'a> {
    #[serde(rename = "messageId", borrow)]
    message_id: std::borrow::Cow<'a, str>,
    properties: Properties,
}

#[derive(Deserialize)]
struct Properties {
    user: usize,
    seq: u64,
    sent_us: i64,
}

pub fn routes(load: &Load, oracle: Shared, clock: Clock) -> Router {
    let sink = Sink {
        oracle,
        delay: Duration::from_millis(load.sink_delay),
        fail_users: load.fail_users,
        fail_until: clock.instant() + Duration::from_secs(load.fail_for),
        clock,
    };
    Router::new().fallback(take).with_state(sink)
}

async fn take(State(sink): State<Sink>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let Ok(delivered) = serde_json::from_slice::<Delivered<'_>>(&body) else {
        sink.oracle.with(|oracle| oracle.foreign += 1);
        return StatusCode::OK;
    };
    let Properties { user, seq, sent_us } = delivered.properties;
    if user < sink.fail_users && sink.clock.instant() < sink.fail_until {
        return StatusCode::INTERNAL_SERVER_ERROR;
    }
    let delivery_id = headers.get("idempotency-key").and_then(|id| id.to_str().ok()).unwrap_or_default();
    let latency_us = u64::try_from(sink.clock.now().micros() - sent_us).unwrap_or(0);
    let message_id = &delivered.message_id;
    sink.oracle.with(|oracle| oracle.arrived(&Arrival { message_id, delivery_id, user, seq, latency_us }));
    if !sink.delay.is_zero() {
        sink.clock.sleep(sink.delay).await;
    }
    StatusCode::OK
}
