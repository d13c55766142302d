//! `laneway load`: a realistic load for any endpoint of the API and, with `--sink`, the destination that judges what arrives:
//! nothing lost, nothing doubled, each user in order.

mod mix;
mod oracle;
mod report;
mod sender;
mod sink;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::output::Output;
use super::{Found, Usage, signalled};
use crate::clock::Clock;
use mix::Mix;
use oracle::Oracle;
use report::Report;

#[derive(Args, Clone, Debug)]
pub struct Load {
    /// The endpoint's base URL.
    #[arg(long, default_value = "http://127.0.0.1:8080", value_name = "URL")]
    to: String,
    #[arg(long, default_value = "dev-key", value_name = "KEY")]
    write_key: String,
    /// How many events.
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    events: usize,
    /// How many users they are of; few of them make most of the events.
    #[arg(long, default_value_t = 1_000, value_name = "N")]
    users: usize,
    /// Events a second. Default: as fast as the endpoint takes them.
    #[arg(long, value_name = "N")]
    rate: Option<f64>,
    /// Events in a request: 1 uses the typed endpoints, more use /v1/batch.
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch: usize,
    /// Requests at a time. A user's events always take the same way, one after the other.
    #[arg(long, default_value_t = 64, value_name = "N")]
    connections: usize,
    /// The same seed makes the same events.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Be the destination too: listen here, and judge what arrives. The workspace's webhook must point to it.
    #[arg(long, value_name = "ADDR")]
    sink: Option<SocketAddr>,
    /// The sink answers after so many milliseconds.
    #[arg(long, default_value_t = 0, value_name = "MS")]
    sink_delay: u64,
    /// The sink answers 500 to this many users …
    #[arg(long, default_value_t = 0, value_name = "N")]
    fail_users: usize,
    /// … for so many seconds from its start.
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    fail_for: u64,
    /// Give up waiting when nothing has arrived for so many seconds. A destination that was down is probed once a minute.
    #[arg(long, default_value_t = 90, value_name = "SECONDS")]
    patience: u64,
    /// Keep on listening for repeats for so many seconds after everything has arrived.
    #[arg(long, default_value_t = 1, value_name = "SECONDS")]
    settle: u64,
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// The oracle, shared by those who send and those who receive.
#[derive(Clone)]
struct Shared(Arc<Mutex<Oracle>>);

impl Shared {
    fn with<T>(&self, act: impl FnOnce(&mut Oracle) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Load {
    pub async fn run(&self) -> anyhow::Result<()> {
        if self.events == 0 || self.users == 0 || self.batch == 0 || self.connections == 0 {
            anyhow::bail!(Usage("--events, --users, --batch and --connections must be at least 1".into()));
        }
        if self.rate.is_some_and(|rate| !rate.is_finite() || rate <= 0.0) {
            anyhow::bail!(Usage("--rate must be more than 0".into()));
        }
        let clock = Clock::system();
        let run = uuid::Uuid::new_v4().as_fields().0;
        let mix = Arc::new(Mix::new(self.seed, self.users, run));
        let oracle = Shared(Arc::new(Mutex::new(Oracle::new(mix.prefix(), self.events, self.users, self.fail_users))));
        let sink = match self.sink {
            None => None,
            Some(address) => {
                let listener =
                    tokio::net::TcpListener::bind(address).await.with_context(|| format!("--sink {address}"))?;
                let routes = sink::routes(self, oracle.clone(), clock.clone());
                Some(tokio::spawn(async move { axum::serve(listener, routes).await }))
            }
        };
        let began = clock.instant();
        let progress = tokio::spawn(tell_progress(oracle.clone(), clock.clone(), self.events));
        let sending = async {
            let sent = sender::send(self, &mix, &oracle, &clock).await;
            let sent_for = began.elapsed();
            if sink.is_some() {
                self.await_arrivals(&oracle, &clock).await;
            }
            (sent, sent_for)
        };
        let (sent, sent_for) = tokio::select! {
            ended = sending => ended,
            () = signalled() => (Ok(()), began.elapsed()),
        };
        progress.abort();
        if let Some(sink) = sink {
            sink.abort();
        }
        let report = oracle.with(|oracle| Report::of(oracle, sent_for, self.sink.is_some()));
        report.print(self.output);
        // What was sent until then is reported all the same.
        sent?;
        match report.verdict() {
            None => Ok(()),
            Some(problem) => Err(Found(problem).into()),
        }
    }

    async fn await_arrivals(&self, oracle: &Shared, clock: &Clock) {
        let patience = Duration::from_secs(self.patience);
        let (mut last, mut since) = (0, clock.instant());
        loop {
            let (missing, arrivals) = oracle.with(|oracle| (oracle.missing(), oracle.arrivals()));
            if missing == 0 {
                return clock.sleep(Duration::from_secs(self.settle)).await;
            }
            if arrivals != last {
                (last, since) = (arrivals, clock.instant());
            }
            if since.elapsed() > patience {
                return;
            }
            clock.sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn tell_progress(oracle: Shared, clock: Clock, events: usize) {
    loop {
        clock.sleep(Duration::from_secs(2)).await;
        let (accepted, delivered) = oracle.with(|oracle| (oracle.accepted_count(), oracle.delivered_count()));
        eprintln!("accepted {accepted} of {events}, delivered {delivered}");
    }
}
