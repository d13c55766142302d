//! Real faults on real brokers, judged by `load`: members that come and go, owners that stand still for longer than they may,
//! processes and brokers that end at any moment. Short forms; `tests/soak storm` and `tests/soak faults` are the long ones,
//! which set the lengths by the environment.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use crate::support::broker::Broker;
use crate::support::eventually;
use crate::support::process::{Flow, Load, Process, number};

/// A length that the long forms set.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Decides what happens; printed, so that a failing run's can be given again.
fn chance() -> StdRng {
    let seed = setting("FAULTS_SEED", u64::from(uuid::Uuid::new_v4().as_fields().0));
    eprintln!("FAULTS_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Nothing lost, nothing out of order; repeats under another delivery id only where a request of the edge was cut off.
fn assert_sound(report: &Value, events: u64) {
    assert_eq!(number(report, "accepted"), events, "{report}");
    for name in ["lost", "out_of_order", "foreign"] {
        assert_eq!(number(report, name), 0, "{name} in {report}");
    }
    let other = number(report, "duplicated_other_delivery_id");
    assert!(other <= number(report, "requests_repeated"), "{report}");
}

/// Every partition has exactly one owner.
async fn converged(members: &[&Process], partitions: u32) {
    eventually("every partition has one owner", Duration::from_secs(60), async || {
        let mut owned = 0.0;
        for member in members {
            owned += member.metric("laneway_runtime_partitions").await.unwrap_or(0.0);
        }
        owned == f64::from(partitions)
    })
    .await;
}

/// What was taken has ended, says the ledger in `progress.router`.
async fn ledger_closes(flow: &Flow) {
    eventually("the ledger closes", Duration::from_secs(60), async || {
        let listed = flow.command(&["lanes", "list", "--over", "0", "--output", "json"]);
        let rows: Vec<Value> = serde_json::from_slice(&listed.stdout).unwrap_or_default();
        !rows.is_empty() && rows.iter().all(|row| row["pending"] == 0)
    })
    .await;
}

/// So many milliseconds of the load, or until it ends. True: it has ended.
async fn pause(load: &mut Load, random: &mut StdRng, from: u64, to: u64) -> bool {
    load.ends_within(Duration::from_millis(random.random_range(from..to))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn routers_that_come_and_go_lose_nothing_and_converge() {
    let partitions = Some(setting("STORM_PARTITIONS", 16) as u32);
    storm(&Flow::on_kafka_with(&crate::support::kafka_address(), partitions)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn routers_that_come_and_go_lose_nothing_and_converge_on_pulsar() {
    storm(&Flow::on_pulsar_with(&crate::support::pulsar_config(), Some(setting("STORM_PARTITIONS", 16) as u32))).await;
}

async fn storm(flow: &Flow) {
    let (members, partitions) = (setting("STORM_MEMBERS", 4) as usize, setting("STORM_PARTITIONS", 16) as u32);
    let seconds = setting("STORM_SECONDS", 12);
    let events = setting("STORM_RATE", 200) * (seconds + 20);
    let mut random = chance();
    let mut steady = [flow.start("gateway", "gateway-1"), flow.start("processor", "processor-1")];
    let name = |member: usize| format!("router-{member}");
    let mut routers: Vec<Option<Process>> =
        (0..members).map(|member| Some(flow.start("router", &name(member)))).collect();
    for process in steady.iter_mut().chain(routers.iter_mut().flatten()) {
        process.ready().await;
    }
    let rate = setting("STORM_RATE", 200).to_string();
    let mut load =
        flow.load(&["--events", &events.to_string(), "--rate", &rate, "--users", "300", "--sink-delay", "10"]);
    steady[0].takes(200.0).await;
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        let member = random.random_range(0..members);
        match routers[member].take() {
            None => routers[member] = Some(flow.start("router", &name(member))),
            Some(mut router) if random.random_bool(0.5) => router.kill(),
            Some(mut router) => {
                // Before it listens to signals, one just ends it.
                router.lives().await;
                router.terminate();
                let status = router.ended(Duration::from_secs(30)).await;
                assert_eq!(status.code(), Some(0), "{}", router.said());
            }
        }
        assert!(!pause(&mut load, &mut random, 100, 1_500).await, "the load outlasts the storm");
    }
    for (member, router) in routers.iter_mut().enumerate() {
        let router = router.get_or_insert_with(|| flow.start("router", &name(member)));
        router.ready().await;
    }
    converged(&routers.iter().flatten().collect::<Vec<_>>(), partitions).await;
    assert_sound(&load.report_within(Duration::from_secs(seconds + 240)).await, events);
    ledger_closes(flow).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_that_stand_still_are_replaced_and_do_no_harm_when_they_wake() {
    stand_still(&Flow::on_kafka()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_that_stand_still_are_replaced_and_do_no_harm_when_they_wake_on_pulsar() {
    stand_still(&Flow::on_pulsar()).await;
}

async fn stand_still(flow: &Flow) {
    let mut all: Vec<Process> = ["gateway", "processor", "router", "processor", "router"]
        .iter()
        .enumerate()
        .map(|(n, part)| flow.start(part, &format!("{part}-{n}")))
        .collect();
    for process in &mut all {
        process.ready().await;
    }
    // More than is delivered while they stand still, so that they wake with work in their hands.
    let load = flow.load(&["--events", "9000", "--rate", "450", "--users", "300", "--sink-delay", "30"]);
    all[0].takes(800.0).await;
    all[1].freeze();
    all[2].freeze();
    // The others own everything once the session of those is over, and are ready once their transactions are.
    for other in [3, 4] {
        converged(&[&all[other]], 12).await;
        all[other].ready().await;
    }
    all[1].thaw();
    all[2].thaw();
    let report = load.report().await;
    assert_sound(&report, 9_000);
    assert_eq!(number(&report, "duplicated_other_delivery_id"), 0, "{report}");
    converged(&[&all[2], &all[4]], 12).await;
    converged(&[&all[1], &all[3]], 12).await;
    ledger_closes(flow).await;
}

/// Everything that may happen to a flow on a broker of its own.
struct Struck {
    all: Vec<(&'static str, String, Process)>,
    flow: Flow,
    broker: Broker,
}

impl Struck {
    async fn start(broker: Broker) -> Self {
        let flow = broker.flow();
        let mut all = Vec::new();
        for (part, instance) in [
            ("gateway", "gateway-1"),
            ("processor", "processor-1"),
            ("router", "router-1"),
            ("processor", "processor-2"),
            ("router", "router-2"),
        ] {
            all.push((part, instance.to_owned(), flow.start(part, instance)));
        }
        for (.., process) in &mut all {
            process.ready().await;
        }
        Self { flow, broker, all }
    }

    /// One fault, with what ends it.
    async fn strike(&mut self, load: &mut Load, random: &mut StdRng) -> String {
        let which = random.random_range(0..self.all.len());
        let (part, instance, process) = &mut self.all[which];
        let told = match random.random_range(0..16) {
            0..8 => {
                process.kill();
                pause(load, random, 0, 3_000).await;
                *process = self.flow.start(part, instance);
                format!("kill -9 of {instance}")
            }
            8..11 => {
                process.terminate();
                process.ended(Duration::from_secs(40)).await;
                *process = self.flow.start(part, instance);
                format!("SIGTERM of {instance}")
            }
            11..14 => {
                process.freeze();
                pause(load, random, 500, 14_000).await;
                process.thaw();
                format!("SIGSTOP of {instance}")
            }
            14 => {
                self.broker.stop();
                pause(load, random, 0, 5_000).await;
                self.broker.start_again();
                "a stop of the broker".to_owned()
            }
            _ => {
                self.broker.kill();
                pause(load, random, 0, 15_000).await;
                self.broker.start_again();
                "kill -9 of the broker".to_owned()
            }
        };
        // Whoever ended by itself, since nothing can be had of a log that is away, is started again by its supervisor.
        for (part, instance, process) in &mut self.all {
            if process.has_ended() {
                *process = self.flow.start(part, instance);
            }
        }
        told
    }

    async fn end(&mut self, load: Load, events: u64, deadline: Duration) {
        for (.., process) in &mut self.all {
            process.ready().await;
        }
        let report = load.report_within(deadline).await;
        assert_sound(&report, events);
        ledger_closes(&self.flow).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_to_processes_loses_nothing() {
    whatever_happens(Broker::start()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_to_processes_loses_nothing_on_pulsar() {
    whatever_happens(Broker::start_pulsar()).await;
}

async fn whatever_happens(broker: Broker) {
    let (seconds, rate) = (setting("FAULTS_SECONDS", 25), setting("FAULTS_RATE", 150));
    let events = seconds * rate;
    let mut random = chance();
    let mut struck = Struck::start(broker).await;
    let args = ["--users", "300", "--sink-delay", "10", "--patience", "150"];
    let mut load =
        struck.flow.load(&[&["--events", &events.to_string(), "--rate", &rate.to_string()][..], &args].concat());
    struck.all[0].2.takes(rate as f64).await;
    let (began, mut count) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(seconds) {
        let told = struck.strike(&mut load, &mut random).await;
        count += 1;
        eprintln!("{:>5} s, fault {count}: {told}", began.elapsed().as_secs());
        if pause(&mut load, &mut random, 500, 6_000).await {
            break;
        }
    }
    struck.end(load, events, Duration::from_secs(seconds + 400)).await;
}
