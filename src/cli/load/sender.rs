//! The sending side: one lane for each connection; a user's events go one after the other on the same one, so that the order in
//! which the endpoint takes them is known.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use tokio::sync::mpsc;

use super::mix::{Mix, Planned};
use super::{Load, Shared};
use crate::clock::{Clock, Timestamp};

/// A request that is not answered, or with 5xx or 429, is sent again after this, as SDKs do.
const RETRY: Duration = Duration::from_millis(250);
/// And given up after so many tries: more than any outage of a test lasts.
const TRIES: usize = 1_200;

pub async fn send(load: &Load, mix: &Arc<Mix>, oracle: &Shared, clock: &Clock) -> anyhow::Result<()> {
    let http = reqwest::Client::builder()
        .pool_max_idle_per_host(load.connections)
        .timeout(Duration::from_secs(30))
        .tcp_nodelay(true)
        .no_proxy()
        .build()
        .context("the HTTP client")?;
    let authorization = format!("Basic {}", BASE64_STANDARD.encode(format!("{}:", load.write_key)));
    let mut lanes = Vec::new();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..load.connections {
        let (lane, planned) = mpsc::channel(load.batch.max(64));
        lanes.push(lane);
        let connection = Connection {
            http: http.clone(),
            base: load.to.trim_end_matches('/').to_owned(),
            authorization: authorization.clone(),
            batch: load.batch,
            mix: Arc::clone(mix),
            oracle: oracle.clone(),
            clock: clock.clone(),
        };
        tasks.spawn(connection.run(planned));
    }
    let (began, started) = (clock.instant(), clock.now());
    for planned in mix.plan(load.events) {
        let mut due = None;
        if let Some(rate) = load.rate {
            let after = Duration::from_secs_f64(planned.number as f64 / rate);
            clock.sleep_until(began + after).await;
            // A lane that is behind makes the event late, and the latency says so.
            due = Some(started.plus(after));
        }
        if lanes[planned.user % lanes.len()].send((planned, due)).await.is_err() {
            // A lane that has ended says why when it is joined.
            break;
        }
    }
    drop(lanes);
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(())
}

/// An event, and when it was to be sent: at once where no rate is given.
type Due = (Planned, Option<Timestamp>);

struct Connection {
    http: reqwest::Client,
    base: String,
    authorization: String,
    batch: usize,
    mix: Arc<Mix>,
    oracle: Shared,
    clock: Clock,
}

impl Connection {
    async fn run(self, mut planned: mpsc::Receiver<Due>) -> anyhow::Result<()> {
        while let Some(first) = planned.recv().await {
            let mut batch = vec![first];
            while batch.len() < self.batch
                && let Ok(more) = planned.try_recv()
            {
                batch.push(more);
            }
            self.post(&batch).await?;
        }
        Ok(())
    }

    async fn post(&self, batch: &[Due]) -> anyhow::Result<()> {
        let now = self.clock.now();
        let at = batch.iter().filter_map(|(_, due)| *due).min().unwrap_or(now);
        let events: Vec<String> =
            batch.iter().map(|(planned, due)| self.mix.render(planned, due.unwrap_or(now))).collect();
        let (path, body) = match (&events[..], self.batch) {
            ([single], 1) => (batch[0].0.kind, single.clone()),
            (several, _) => ("batch", format!("{{\"batch\":[{}]}}", several.join(","))),
        };
        let url = format!("{}/v1/{path}", self.base);
        let body = bytes::Bytes::from(body);
        for _ in 0..TRIES {
            let request = self.http.post(&url).header("authorization", &self.authorization);
            let answer = request.header("content-type", "application/json").body(body.clone()).send().await;
            match answer {
                Ok(answer) if answer.status().as_u16() == 200 => {
                    // Read to its end, so that the connection can be used again.
                    let _ = answer.bytes().await;
                    let latency = self.clock.now().since(at).as_micros() as u64;
                    self.oracle
                        .with(|oracle| batch.iter().for_each(|(planned, _)| oracle.accepted(planned.number, latency)));
                    return Ok(());
                }
                Ok(answer) if answer.status().is_client_error() && answer.status().as_u16() != 429 => {
                    self.oracle.with(|oracle| oracle.refused += batch.len() as u64);
                    let (status, text) = (answer.status(), answer.text().await.unwrap_or_default());
                    anyhow::bail!("{url} answered {status}: {}", text.trim());
                }
                Ok(_) | Err(_) => {
                    self.oracle.with(|oracle| oracle.retried += 1);
                    self.clock.sleep(RETRY).await;
                }
            }
        }
        anyhow::bail!("{url} did not take events for {:?}", RETRY * TRIES as u32)
    }
}
