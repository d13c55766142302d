//! The destinations: they behave as told, and judge what arrives. A delivery's address says which it is:
//! `/destination/user/number/sent`, the number counting from 0 for each destination and user, the time in microseconds.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, Uri};
use hdrhistogram::Histogram;
use laneway::clock::Clock;
use tokio::sync::watch;

/// How a destination answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Manner {
    /// 200 after so long, or as soon as it is told to behave otherwise.
    Well(Duration),
    /// 500.
    Dead,
    /// 500 to so many of a hundred requests, 200 to the others.
    Flaky(u64),
    /// 500 to so many of a hundred deliveries when they come for the first time; 200 after 20 ms.
    Once(u64),
    /// 500 to so many of a hundred users.
    FailingUsers(u64),
}

impl Manner {
    fn delay(self) -> Duration {
        match self {
            Manner::Well(delay) => delay,
            Manner::Once(_) => Duration::from_millis(20),
            Manner::Dead | Manner::Flaky(_) | Manner::FailingUsers(_) => Duration::ZERO,
        }
    }
}

/// Of the first arrivals with 200.
pub struct Seen {
    next: HashMap<(u32, u32), u32>,
    pub delivered: u64,
    pub by_destination: HashMap<u32, u64>,
    pub doubled: u64,
    pub out_of_order: u64,
    pub requests: u64,
    failed_once: HashSet<(u32, u32, u32)>,
    /// In microseconds, from publishing to arrival, of the destination that is measured (0) and its users that never fail.
    pub latency: Histogram<u64>,
}

pub struct Sink {
    manners: watch::Sender<Vec<Manner>>,
    seen: Mutex<Seen>,
    /// How many were delivered, for those who wait for it.
    grown: watch::Sender<u64>,
    clock: Clock,
}

impl Sink {
    pub async fn start(destinations: usize) -> (Arc<Self>, u16) {
        let seen = Seen {
            next: HashMap::new(),
            delivered: 0,
            by_destination: HashMap::new(),
            doubled: 0,
            out_of_order: 0,
            requests: 0,
            failed_once: HashSet::new(),
            latency: Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("bounds in order"),
        };
        let manners = watch::Sender::new(vec![Manner::Well(Duration::ZERO); destinations]);
        let sink =
            Arc::new(Self { manners, seen: Mutex::new(seen), grown: watch::Sender::new(0), clock: Clock::system() });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let routes = Router::new().fallback(take).with_state(Arc::clone(&sink));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        (sink, port)
    }

    pub fn set(&self, destinations: impl IntoIterator<Item = usize>, manner: Manner) {
        let set = |manners: &mut Vec<Manner>| destinations.into_iter().for_each(|it| manners[it] = manner);
        self.manners.send_modify(set);
    }

    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no poison")
    }

    pub fn grown(&self) -> watch::Receiver<u64> {
        self.grown.subscribe()
    }

    /// Latencies are counted anew from here on.
    pub fn measure(&self) {
        self.seen().latency.reset();
    }
}

/// The same for a delivery in every run.
fn share(destination: u32, user: u32, number: u32) -> u64 {
    let mut mixed = u64::from(destination) << 40 ^ u64::from(user) << 20 ^ u64::from(number);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (mixed ^ (mixed >> 31)) % 100
}

async fn take(State(sink): State<Arc<Sink>>, uri: Uri) -> StatusCode {
    let mut parts = uri.path().split('/').skip(1).map(|part| part.parse::<u64>().unwrap_or(u64::MAX));
    let mut next = || parts.next().unwrap_or(u64::MAX);
    let (destination, user, number, sent) = (next() as u32, next() as u32, next() as u32, next());
    let manner = sink.manners.borrow().get(destination as usize).copied();
    let Some(manner) = manner else { return StatusCode::NOT_FOUND };
    if sink.fails(manner, destination, user, number) {
        return StatusCode::INTERNAL_SERVER_ERROR;
    }
    sink.arrived(destination, user, number, sent);
    if !manner.delay().is_zero() {
        let mut manners = sink.manners.subscribe();
        let is_told = manners.wait_for(|manners| manners[destination as usize] != manner);
        // It answers either way.
        let _ = tokio::time::timeout(manner.delay(), is_told).await;
    }
    StatusCode::OK
}

impl Sink {
    fn fails(&self, manner: Manner, destination: u32, user: u32, number: u32) -> bool {
        let mut seen = self.seen();
        seen.requests += 1;
        match manner {
            Manner::Well(_) => false,
            Manner::Dead => true,
            Manner::Flaky(percent) => share(destination, user, seen.requests as u32) < percent,
            Manner::FailingUsers(percent) => share(destination, user, 0) < percent,
            Manner::Once(percent) => {
                share(destination, user, number) < percent && seen.failed_once.insert((destination, user, number))
            }
        }
    }

    fn arrived(&self, destination: u32, user: u32, number: u32, sent: u64) {
        let mut seen = self.seen();
        let expected = seen.next.entry((destination, user)).or_default();
        if number < *expected {
            seen.doubled += 1;
            return;
        }
        // What is skipped was overtaken, or is lost.
        let skipped = u64::from(number - *expected);
        *expected = number + 1;
        seen.out_of_order += skipped;
        seen.delivered += 1;
        self.grown.send_replace(seen.delivered);
        *seen.by_destination.entry(destination).or_default() += 1;
        if destination == 0 {
            let now = u64::try_from(self.clock.now().micros()).unwrap_or(0);
            seen.latency.saturating_record(now.saturating_sub(sent).max(1));
        }
    }
}
